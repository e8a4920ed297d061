"""Reading CORe50: what comes out, against hand-written index files and pictures; and each fault of a data folder.

The pictures of the small data sets are written by a PNG encoder of 10 lines below, not by the library that reads them.
"""
import os
import pickle
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
import data_loader
import download
from data_loader import CORE50, SCENARIOS, DataError
from download import main

STANDIN = REPO.parent / "shared" / "standin"
BATCHES = {"ni": 8, "nc": 9, "nic": 79, "nicv2_79": 79, "nicv2_196": 196, "nicv2_391": 391}  # ALGORITHM.md, section 1

# Two frames each of three objects in three sessions; session 3 is the test set. Frames are numbered as in PATHS.
PATHS = [f"s{s}/o{o}/C_{s:02d}_{o:02d}_{f:03d}.png" for s in (2, 1, 3) for o in (1, 2, 3) for f in (0, 1)]
TEST = [12, 13, 14, 15, 16, 17]
LUP = [[[6, 9, 8, 7], [11, 10], [3, 2], [0, 1], [4, 5], TEST],  # run 0: batch 0 has objects 1 and 2 of session 1
       [[6, 9, 8, 7], [5, 4], [10, 11], [1, 0], [2, 3], TEST]]
LABELS = [[[0, 1, 1, 0], [2, 2], [1, 1], [0, 0], [2, 2], [0, 0, 1, 1, 2, 2]],
          [[0, 1, 1, 0], [2, 2], [2, 2], [0, 0], [1, 1], [0, 0, 1, 1, 2, 2]]]
IMAGES = np.random.default_rng(0).integers(0, 256, (18, 128, 128, 3)).astype(np.uint8)


def png(pixels, depth=8, colour=2):
    """PNG file of uint8 (height, width, 3), or (height, width) with colour=0 (greyscale)."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def write_index(root, paths=PATHS, lup=LUP, labels=LABELS):
    root.mkdir(parents=True, exist_ok=True)
    tables = {"paths": paths, "LUP": dict.fromkeys(SCENARIOS, lup), "labels": dict.fromkeys(SCENARIOS, labels)}
    for name, content in tables.items():
        (root / f"{name}.pkl").write_bytes(pickle.dumps(content, 2))


def write_pngs(folder):
    for path, image in zip(PATHS, IMAGES):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(png(image))


def write_data(root, form="png"):
    """The small data set in one of the forms that a data folder can have."""
    write_index(root)
    if form == "png":
        write_pngs(root / "core50_128x128")
    elif form == "png in root":
        write_pngs(root)
    elif form == "npz":
        np.savez(root / "core50_imgs.npz", x=IMAGES)
    elif form == "compressed npz":
        np.savez_compressed(root / "core50_imgs.npz", x=IMAGES)
    elif form == "npy":
        np.save(root / "core50_imgs.npy", IMAGES)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """PNG form; tests that damage something write their own."""
    return write_data(tmp_path_factory.mktemp("data"))


def same_batches(stream, indices, labels):
    batches = list(stream)
    assert len(batches) == len(indices)
    for (x, y), i, expected in zip(batches, indices, labels):
        assert x.dtype == np.uint8 and y.dtype == np.int64
        np.testing.assert_array_equal(x, IMAGES[i])
        np.testing.assert_array_equal(y, expected)


# ---- what comes out --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preload", [False, True])
@pytest.mark.parametrize("form", ["png", "png in root", "npz", "compressed npz", "npy"])
def test_every_form_gives_the_written_pixels_and_labels(tmp_path, form, preload):
    write_data(tmp_path, form)
    stream = CORE50(tmp_path, preload=preload)
    same_batches(stream, LUP[0][:-1], LABELS[0][:-1])
    x, y = stream.get_test_set(stride=1)
    np.testing.assert_array_equal(x, IMAGES[TEST])
    np.testing.assert_array_equal(y, LABELS[0][-1])
    assert (stream.num_classes, stream.image_size, len(stream)) == (3, 128, 5)
    assert (stream.scenario, stream.run) == ("nicv2_391", 0)


def test_run_start_batch_restart_and_cumulative(data):
    stream = CORE50(data, scenario="ni", run=1, start_batch=2)
    assert len(stream) == 3
    for _ in range(2):  # a new iter() starts again
        same_batches(stream, LUP[1][2:-1], LABELS[1][2:-1])
    cumulative = CORE50(data, cumul=True, start_batch=1)
    same_batches(cumulative, *([sum(table[0][:i + 1], []) for i in range(1, 5)] for table in (LUP, LABELS)))


def test_two_iterations_at_once_do_not_disturb_each_other(data):
    stream = CORE50(data)
    for (x1, y1), (x2, y2) in zip(stream, stream):
        np.testing.assert_array_equal(x1, x2)
        np.testing.assert_array_equal(y1, y2)


@pytest.mark.parametrize("preload", [False, True])
def test_writing_into_a_batch_leaves_the_data_alone(tmp_path, preload):
    stream = CORE50(write_data(tmp_path, "npz"), preload=preload)
    for x, y in stream:
        x[:], y[:] = 0, 0
    x, y = stream.get_test_set(1)
    x[:], y[:] = 0, 0
    same_batches(stream, LUP[0][:-1], LABELS[0][:-1])
    np.testing.assert_array_equal(stream.get_test_set(1)[0], IMAGES[TEST])
    np.testing.assert_array_equal(stream.get_test_set(1)[1], LABELS[0][-1])


def test_the_test_set_is_every_stride_th_frame(data):
    stream = CORE50(data)
    for stride in (1, 2, 4, 5, 6, 20):
        x, y = stream.get_test_set(stride)
        np.testing.assert_array_equal(x, IMAGES[[i for k, i in enumerate(TEST) if k % stride == 0]])
        np.testing.assert_array_equal(y, [c for k, c in enumerate(LABELS[0][-1]) if k % stride == 0])
    for stride in (0, -1, 2.0, None):
        with pytest.raises(DataError, match="stride"):
            stream.get_test_set(stride)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_bookkeeping_of_any_index(tmp_path, draw):
    """Each training frame once, with its own label, in the index's order: the pixels of a frame are its number."""
    n_objects, n_frames = draw.draw(st.integers(1, 6)), draw.draw(st.integers(1, 5))
    paths = [f"s{s}/o{o}/C_{s:02d}_{o:02d}_{f:03d}.png"
             for s in (1, 3) for o in range(1, n_objects + 1) for f in range(n_frames)]
    objects = [int(re.search(r"/o(\d+)/", p)[1]) for p in paths]
    n_train = len(paths) // 2
    order = draw.draw(st.permutations(range(n_train)))
    cuts = sorted(draw.draw(st.sets(st.integers(1, n_train), max_size=5)) - {n_train})
    batches = [list(b) for b in np.split(np.array(order), cuts)] + [list(range(n_train, 2 * n_train))]
    batches = [[int(i) for i in b] for b in batches]
    write_index(tmp_path, paths, [batches], [[[objects[i] - 1 for i in b] for b in batches]])
    tags = np.zeros((len(paths), 2, 2, 3), np.uint8)
    tags[:, 0, 0, 0] = np.arange(len(paths))
    np.save(tmp_path / "core50_imgs.npy", tags)

    start = draw.draw(st.integers(0, len(batches) - 2))
    stream = CORE50(tmp_path, start_batch=start)
    seen = [x[:, 0, 0, 0].tolist() for x, _ in stream]
    assert seen == batches[start:-1]
    for x, y in stream:
        assert y.tolist() == [objects[i] - 1 for i in x[:, 0, 0, 0]]
    assert stream.num_classes == n_objects
    if start == 0:
        assert sorted(sum(seen, [])) == list(range(n_train))
    *_, (x, y) = CORE50(tmp_path, cumul=True)
    assert sorted(x[:, 0, 0, 0].tolist()) == list(range(n_train))
    assert y.tolist() == [objects[i] - 1 for i in x[:, 0, 0, 0]]
    stride = draw.draw(st.integers(1, 7))
    assert stream.get_test_set(stride)[0][:, 0, 0, 0].tolist() == list(range(n_train, 2 * n_train))[::stride]


# ---- reading ahead ---------------------------------------------------------------------------------------------------

def test_exactly_one_batch_is_read_ahead(data):
    stream, read = CORE50(data), []
    original = stream.read_batch
    stream.read_batch = lambda i: read.append((i, threading.current_thread())) or original(i)
    batches = iter(stream)
    next(batches)
    for _ in range(100):
        if len(read) == 2:
            break
        time.sleep(.05)
    time.sleep(.2)
    assert [i for i, _ in read] == [0, 1]  # the consumer has batch 0 and has not asked for batch 1
    assert read[1][1] is not threading.main_thread()
    assert len(list(batches)) == 4 and [i for i, _ in read] == [0, 1, 2, 3, 4]


def test_an_error_while_reading_ahead_reaches_the_consumer_at_its_batch(tmp_path):
    write_data(tmp_path)
    file = tmp_path / "core50_128x128" / PATHS[LUP[0][2][1]]
    file.write_bytes(file.read_bytes()[:-100])
    batches = iter(CORE50(tmp_path))
    assert len(next(batches)[1]) == 4 and len(next(batches)[1]) == 2
    with pytest.raises(DataError, match=re.escape(str(file))):
        next(batches)


def test_an_abandoned_iterator_does_not_hold_up_the_end_of_the_program(data):
    code = f"from data_loader import CORE50\nbatches = iter(CORE50({str(data)!r}))\nnext(batches)\nprint('end')"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")


def test_a_closed_iterator_leaves_no_thread(data):
    before = set(threading.enumerate())
    batches = iter(CORE50(data))
    next(batches)
    batches.close()
    for _ in range(100):
        if not set(threading.enumerate()) - before:
            return
        time.sleep(.05)
    pytest.fail("the reading thread lives on")


# ---- wrong arguments, missing files ----------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, message", [
    ({"scenario": "nicv2"}, "nicv2_391"), ({"scenario": ["ni"]}, "nicv2_391"), ({"scenario": None}, "nicv2_391"),
    ({"run": 2}, "choose 0 to 1"), ({"run": -1}, "choose 0 to 1"), ({"run": "0"}, "choose 0 to 1"),
    ({"run": 0.0}, "choose 0 to 1"),
    ({"start_batch": 5}, "choose 0 to 4"), ({"start_batch": -1}, "choose 0 to 4"),
    ({"start_batch": 1.0}, "choose 0 to 4")])
def test_wrong_arguments_name_the_valid_choices(data, arguments, message):
    with pytest.raises(DataError, match=message):
        CORE50(data, **arguments)


def test_missing_files_are_listed_with_their_source_and_the_command(tmp_path):
    with pytest.raises(DataError) as e:
        CORE50(tmp_path / "nothing")
    for expected in ("paths.pkl", "LUP.pkl", "labels.pkl", "https://vlomonaco.github.io/core50/data/paths.pkl",
                     "http://bias.csr.unibo.it/maltoni/download/core50/core50_128x128.zip", "core50_imgs.npz",
                     f"python data_loader.py --download --data {tmp_path / 'nothing'}"):
        assert expected in str(e.value)
    assert "\n" not in str(e.value)
    write_data(tmp_path, "npy")
    (tmp_path / "LUP.pkl").unlink()
    with pytest.raises(DataError) as e:
        CORE50(tmp_path)
    assert "LUP.pkl" in str(e.value) and "paths.pkl" not in str(e.value) and "npz" not in str(e.value)
    write_index(tmp_path)
    (tmp_path / "core50_imgs.npy").unlink()
    with pytest.raises(DataError, match="lacks the frames"):
        CORE50(tmp_path)
    (tmp_path / "core50_128x128").mkdir()
    with pytest.raises(DataError, match=re.escape(PATHS[0])):
        CORE50(tmp_path)


# ---- index faults ----------------------------------------------------------------------------------------------------

class RunsCode:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("name", ["paths", "LUP", "labels"])
def test_a_pickle_that_runs_code_is_refused_before_it_runs(tmp_path, name):
    write_data(tmp_path, "npy")
    effect = tmp_path / "effect"
    evil = pickle.dumps({"nicv2_391": RunsCode(effect)}, 2)
    pickle.loads(evil)
    assert effect.is_dir()  # the pickle does what it is meant to
    effect.rmdir()
    for protocol in range(6):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps({"nicv2_391": RunsCode(effect)}, protocol))
        with pytest.raises(DataError, match=rf"{name}\.pkl.*mkdir"):
            CORE50(tmp_path)
        assert not effect.exists()


@pytest.mark.parametrize("name", ["paths", "LUP", "labels"])
def test_a_truncated_pickle_is_refused_at_every_length(tmp_path, name):
    write_data(tmp_path, "npy")
    file = tmp_path / f"{name}.pkl"
    content = file.read_bytes()
    for length in range(0, len(content), max(1, len(content) // 150)):
        file.write_bytes(content[:length])
        with pytest.raises(DataError, match=f"{name}.pkl"):
            CORE50(tmp_path)


def replaced(table, batch, position, value):
    table = [[list(b) for b in run] for run in table]
    table[0][batch][position] = value
    return table


@pytest.mark.parametrize("lup, labels, message", [
    (replaced(LUP, 1, 0, 18), LABELS, "batch 1 wants frames .* to 18, there are 0 to 17"),
    (replaced(LUP, 5, 0, 2**40), LABELS, "there are 0 to 17"),
    (replaced(LUP, 0, 0, -1), LABELS, "wants frames -1"),
    (replaced(LUP, 0, 0, 2**70), LABELS, "integers"),
    (replaced(LUP, 0, 0, 1.0), LABELS, "integers"),
    (replaced(LUP, 0, 0, "1"), LABELS, "integers"),
    (replaced(LUP, 0, 0, [1]), LABELS, "batch 0"),
    (replaced(LUP, 0, 0, 0), LABELS, "twice"),
    (replaced(LUP, 3, 0, 12), LABELS, "twice"),  # a frame of the test set
    (LUP, replaced(LABELS, 1, 0, float("nan")), "integers"),
    (LUP, replaced(LABELS, 1, 0, float("inf")), "integers"),
    (LUP, replaced(LABELS, 1, 0, -1), "labels -1 to 2"),
    (LUP, replaced(LABELS, 1, 0, 50), "labels 0 to 50, but 4 classes"),
    (LUP, replaced(LABELS, 5, 0, 10**9), "labels 0 to 1000000000, but 3 classes"),
    (LUP, replaced(LABELS, 1, 0, 0), "different labels"),
    (LUP, replaced(LABELS, 5, 0, 1), "different labels"),
    (LUP, [[LABELS[0][0][:-1], *LABELS[0][1:]]], "batch 0 has 4 frames and 3 labels"),
    (LUP, [LABELS[0][1:]], "6 batches of frames, 5 of labels"),
    ([[*LUP[0][:2], [], *LUP[0][3:]]], [[*LABELS[0][:2], [], *LABELS[0][3:]]], "batch 2 has 0 frames"),
    ([LUP[0][-1:]], LABELS, "no batches"), ([5], LABELS, "no batches"), (None, LABELS, "no list of runs"),
    ([[5, *LUP[0][1:]]], LABELS, "batch 0"), ("runs", LABELS, "no list of runs")])
def test_an_index_that_does_not_fit_is_refused(tmp_path, lup, labels, message):
    write_data(tmp_path, "npy")
    write_index(tmp_path, PATHS, lup, labels)
    with pytest.raises(DataError, match=message) as e:
        CORE50(tmp_path)
    assert "LUP.pkl" in str(e.value)


@pytest.mark.parametrize("paths, message", [
    ([], "no list"), ({}, "no list"), (PATHS[:-1], "there are 0 to 16"), ([*PATHS[:-1], 5], "holds 5"),
    ([*PATHS[:-1], PATHS[0]], "twice"), ([*PATHS[:-1], "../../etc/s1/o1/C.png"], "etc"),
    ([*PATHS[:-1], "/o3/a.png"], "/o3"),
    ([*PATHS[:-1], "C_01_01_000.png"], "expected"), ([*PATHS[:-1], "s1/o1/a\0.png"], "expected")])
def test_wrong_paths_are_refused(tmp_path, paths, message):
    write_data(tmp_path, "png")
    write_index(tmp_path, paths)
    with pytest.raises(DataError, match=message):
        CORE50(tmp_path)


@pytest.mark.parametrize("name", ["LUP", "labels"])
def test_a_table_of_another_kind_is_refused(tmp_path, name):
    write_data(tmp_path, "npy")
    for content in ([], 5, "nicv2_391", None, {1: 2}):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=f"{name}.pkl"):
            CORE50(tmp_path)
        assert main(["--check", "--data", str(tmp_path)]) == 2


OPCODES = b"()[]{}.NIFLUVXKMJ012lstdepbhjgqrc\x80\x81\x85\x88\x8a\x93\x95\xff"  # of the pickle language


def test_only_data_errors_come_out_of_damaged_index_files(tmp_path):
    """Thousands of mutated index files. The memory limit is for the lengths of gigabytes that a mutation can write."""
    write_data(tmp_path, "npy")
    rng, good, refused = random.Random(0), {n: (tmp_path / n).read_bytes() for n in data_loader.INDEX_FILES}, 0
    for protocol in (0, 2, 4):
        table = {"paths.pkl": PATHS, "LUP.pkl": {"nicv2_391": LUP}, "labels.pkl": {"nicv2_391": LABELS}}
        good.update({(n, protocol): pickle.dumps(c, protocol) for n, c in table.items()})
    names = [key for key in good if isinstance(key, tuple)]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    try:
        end, tries = time.monotonic() + 10, 0
        while tries < 8000 and time.monotonic() < end:
            key = rng.choice(names)
            content = bytearray(good[key])
            for _ in range(rng.choice((1, 1, 2, 4, 16))):
                at, kind = rng.randrange(len(content)), rng.randrange(4)
                if kind == 0:
                    content[at] ^= 1 << rng.randrange(8)
                elif kind == 1:
                    content[at] = rng.randrange(256)
                elif kind == 2:
                    del content[at:at + rng.randrange(1, 9)]
                else:
                    content[at:at] = bytes(rng.choices(OPCODES, k=4))
                content = content or bytearray(1)
            (tmp_path / key[0]).write_bytes(content)
            try:
                CORE50(tmp_path)
            except DataError as e:
                assert ".pkl" in str(e) or "frame" in str(e)
                refused += 1
            (tmp_path / key[0]).write_bytes(good[key[0]])
            tries += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert tries >= 1000 and refused > tries / 2


# anything that plain pickles can hold, nested like an index
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
PLAIN = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner)
                     | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=12)


@settings(max_examples=500, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["paths.pkl", "LUP.pkl", "labels.pkl"]), content=PLAIN, depth=st.integers(0, 4))
def test_only_data_errors_come_out_of_any_plain_content(tmp_path, name, content, depth):
    if not (tmp_path / "core50_imgs.npy").exists():
        write_data(tmp_path, "npy")
    original = (tmp_path / name).read_bytes()
    table = pickle.loads(original)
    if depth == 0 or name == "paths.pkl":
        table = content
    elif depth == 1:
        table["nicv2_391"] = content
    elif depth == 2:
        table["nicv2_391"][0] = content
    elif depth == 3:
        table["nicv2_391"][0][1] = content
    else:
        table["nicv2_391"][0][1][0] = content
    (tmp_path / name).write_bytes(pickle.dumps(table))
    try:
        stream = CORE50(tmp_path)
        if name != "paths.pkl":  # what is accepted can only be the same index again
            same_batches(stream, LUP[0][:-1], LABELS[0][:-1])
    except DataError:
        pass
    finally:
        (tmp_path / name).write_bytes(original)


# ---- faults of the frames --------------------------------------------------------------------------------------------

def test_every_truncation_of_a_png_is_refused(tmp_path):
    content, file = png(IMAGES[0]), tmp_path / "frame.png"
    for length in [*range(0, len(content), 499), *range(len(content) - 25, len(content))]:
        file.write_bytes(content[:length])
        with pytest.raises(DataError, match="frame.png"):
            data_loader.read_png(file)
    file.write_bytes(content)
    np.testing.assert_array_equal(data_loader.read_png(file), IMAGES[0])


def test_every_flipped_bit_of_a_png_is_refused(tmp_path):
    """torchvision's decoder alone ends the process with a segmentation fault for some of these."""
    smooth = np.broadcast_to(np.arange(128, dtype=np.uint8)[:, None, None], (128, 128, 3))
    content, file, rng = png(smooth), tmp_path / "frame.png", random.Random(0)
    for at in [*range(70), *rng.sample(range(len(content)), 300), *range(len(content) - 20, len(content))]:
        damaged = bytearray(content)
        damaged[at] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="frame.png"):
            data_loader.read_png(file)


@pytest.mark.parametrize("content, message", [
    (png(IMAGES[0])[:20000], "truncated"), (png(IMAGES[0, ..., 0], colour=0), "greyscale"), (b"", "no PNG"),
    (png(IMAGES[0, :64]), "128x64 pixels"), (png(np.zeros((256, 256, 3), np.uint8)), "256x256 pixels"),
    (png(np.zeros((128, 128, 3), ">u2"), depth=16), "16 bits"),
    (png(np.zeros((128, 128, 4), np.uint8), colour=6), "alpha"),
    (b"\x89PNG\r\n\x1a\n" + png(IMAGES[0])[-12:], "frame"), (b"GIF89a" + bytes(100), "no PNG")])
def test_a_png_of_another_kind_is_refused_by_name(tmp_path, content, message):
    write_data(tmp_path)
    file = tmp_path / "core50_128x128" / PATHS[9]  # in batch 0
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as e:
        next(iter(CORE50(tmp_path)))
    assert str(file) in str(e.value) and "\n" not in str(e.value)
    assert main(["--check", "--full", "--data", str(tmp_path)]) == 2


def test_a_missing_png_is_named(tmp_path):
    write_data(tmp_path)
    (tmp_path / "core50_128x128" / PATHS[9]).unlink()
    with pytest.raises(DataError, match=re.escape(PATHS[9])):
        next(iter(CORE50(tmp_path)))


def test_a_truncated_npz_is_refused_and_leaves_nothing(tmp_path):
    write_data(tmp_path, "npz")
    npz = tmp_path / "core50_imgs.npz"
    content = npz.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        npz.write_bytes(content[:length])
        with pytest.raises(DataError, match="core50_imgs.npz"):
            CORE50(tmp_path)
        assert not list(tmp_path.glob("*.npy*"))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_npz_is_refused_and_leaves_nothing(tmp_path, compressed):
    write_data(tmp_path, "compressed npz" if compressed else "npz")
    npz = tmp_path / "core50_imgs.npz"
    content = bytearray(npz.read_bytes())
    content[len(content) // 2] ^= 1
    npz.write_bytes(content)
    with pytest.raises(DataError, match="core50_imgs.npz is truncated or damaged"):
        CORE50(tmp_path)
    assert not list(tmp_path.glob("*.npy*"))


@pytest.mark.parametrize("array", [
    IMAGES[:-1], IMAGES[..., :1], IMAGES[:, :64], IMAGES.astype(np.int64), IMAGES[:, 0], np.asfortranarray(IMAGES),
    np.array([None]), IMAGES.reshape(-1)])
def test_an_npz_of_another_shape_is_refused(tmp_path, array):
    write_index(tmp_path)
    np.savez(tmp_path / "core50_imgs.npz", x=array)
    with pytest.raises(DataError, match="core50_imgs.npz"):
        CORE50(tmp_path)
    np.savez(tmp_path / "core50_imgs.npz", y=IMAGES)
    with pytest.raises(DataError, match="core50_imgs.npz"):
        CORE50(tmp_path)
    assert not list(tmp_path.glob("*.npy*"))


def test_an_npz_with_a_size_other_than_its_header_is_refused(tmp_path):
    write_data(tmp_path, "npy")
    content = (tmp_path / "core50_imgs.npy").read_bytes()
    (tmp_path / "core50_imgs.npy").unlink()
    for wrong in (content[:-1], content + b"\0", content[:50]):
        with zipfile.ZipFile(tmp_path / "core50_imgs.npz", "w") as z:
            z.writestr("x.npy", wrong)
        with pytest.raises(DataError, match="core50_imgs.npz"):
            CORE50(tmp_path)
        assert not list(tmp_path.glob("*.npy*"))


@pytest.mark.parametrize("chunk", [4096, 1 << 20])  # less and more than the array
def test_the_converted_array_is_reused_and_remade_when_wrong(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(data_loader, "CHUNK", chunk)
    write_data(tmp_path, "npz")
    npy = tmp_path / "core50_imgs.npy"
    CORE50(tmp_path)
    first = npy.stat()
    CORE50(tmp_path)
    assert (npy.stat().st_mtime_ns, npy.stat().st_ino) == (first.st_mtime_ns, first.st_ino)
    content = npy.read_bytes()
    for wrong in (b"", content[:1000], content[:-1], content + b"\0"):  # half-written, in the place of the array
        npy.write_bytes(wrong)
        same_batches(CORE50(tmp_path), LUP[0][:-1], LABELS[0][:-1])
        assert npy.read_bytes() == content
    (tmp_path / "core50_imgs.npy.part").write_bytes(b"left by a kill" * 10**6)
    npy.unlink()
    same_batches(CORE50(tmp_path), LUP[0][:-1], LABELS[0][:-1])
    np.save(npy, IMAGES[::-1])  # same shape, other data: as when the stand-in's array is left beside the official npz
    same_batches(CORE50(tmp_path), LUP[0][:-1], LABELS[0][:-1])
    assert not list(tmp_path.glob("*.part"))


def test_a_wrong_array_without_its_npz_is_refused(tmp_path):
    write_data(tmp_path, "npy")
    content = (tmp_path / "core50_imgs.npy").read_bytes()
    for wrong in (b"", content[:60], content[:-1], content + b"\0"):
        (tmp_path / "core50_imgs.npy").write_bytes(wrong)
        with pytest.raises(DataError, match="core50_imgs.npy"):
            CORE50(tmp_path)


def test_an_array_cut_off_while_in_use_is_an_error_and_no_crash(tmp_path):
    stream = CORE50(write_data(tmp_path, "npy"))
    os.truncate(tmp_path / "core50_imgs.npy", 14 * IMAGES[0].nbytes)
    for x, y in stream:
        pass  # these lie before the cut
    with pytest.raises(DataError, match="core50_imgs.npy was cut off"):
        stream.get_test_set(1)


def test_a_kill_during_the_conversion_costs_nothing_but_its_time(tmp_path):
    write_data(tmp_path, "npz")
    code = ("import data_loader, time, sys\nread = data_loader.read_member\ndata_loader.CHUNK = 65536\n"
            "def slow(*a):\n    print(flush=True)\n    time.sleep(.1)\n    return read(*a)\n"
            f"data_loader.read_member = slow\ndata_loader.CORE50({str(tmp_path)!r})")
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert (tmp_path / "core50_imgs.npy.part").exists() and not (tmp_path / "core50_imgs.npy").exists()
    same_batches(CORE50(tmp_path), LUP[0][:-1], LABELS[0][:-1])
    assert not list(tmp_path.glob("*.part"))


def test_two_conversions_at_once_give_the_right_array(tmp_path):
    write_data(tmp_path, "npz")
    with ThreadPoolExecutor(4) as pool:
        streams = list(pool.map(lambda _: CORE50(tmp_path), range(4)))
    for stream in streams:
        same_batches(stream, LUP[0][:-1], LABELS[0][:-1])


def test_the_conversion_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    write_data(tmp_path, "npz")
    usage = data_loader.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(data_loader.shutil, "disk_usage", lambda _: usage._replace(free=IMAGES.nbytes))
    with pytest.raises(DataError, match="are free.*make room") as e:  # the header does not fit
        CORE50(tmp_path)
    assert e.value.exit_status == 1 and not list(tmp_path.glob("*.npy*"))


# ---- --check ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", ["png", "png in root", "npz", "npy"])
def test_check_accepts_what_is_usable(tmp_path, form, capsys):
    write_data(tmp_path, form)
    for full in ([], ["--full"]):
        assert main(["--check", "--data", str(tmp_path), *full]) == 0
        out = capsys.readouterr().out
        assert "18 entries, not the official file" in out and out.count(" ok\n") == 10 and "128x128" in out
        assert "2 runs of 5 batches, 12 frames to train, 6 to test" in out and "NOT" not in out


def test_check_full_finds_one_wrong_bit_of_the_converted_array(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_loader, "CHUNK", 4096)  # every opening compares the first CHUNK of npz and npy
    write_data(tmp_path, "npz")
    CORE50(tmp_path)
    with open(tmp_path / "core50_imgs.npy", "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(bytes([IMAGES[-1, -1, -1, -1] ^ 1]))
    assert main(["--check", "--full", "--data", str(tmp_path)]) == 2
    assert "core50_imgs.npy differs from core50_imgs.npz" in capsys.readouterr().out


def test_check_refuses_what_is_not(tmp_path, capsys):
    assert main(["--check", "--data", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().out.count("missing, it comes from http") == 3
    write_data(tmp_path)
    table = {s: LABELS for s in SCENARIOS} | {"nc": [LABELS[0], replaced(LABELS, 0, 0, 7)[0]]}  # only in run 1 of nc
    (tmp_path / "labels.pkl").write_bytes(pickle.dumps(table))
    assert main(["--check", "--data", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "nc, run 1: labels 0 to 7" in out and out.count("BAD") == 1 and "NOT usable" in out
    write_index(tmp_path)
    (tmp_path / "core50_128x128" / PATHS[7]).unlink()
    assert main(["--check", "--data", str(tmp_path)]) == 2
    assert f"1 PNG files are missing, such as {PATHS[7]}" in capsys.readouterr().out


def test_an_official_file_is_called_so(tmp_path, capsys, monkeypatch):
    write_data(tmp_path)
    md5 = download.calculate_md5(tmp_path / "LUP.pkl")
    monkeypatch.setitem(data_loader.SOURCES, "LUP.pkl", ("http://nowhere", md5))
    assert main(["--check", "--data", str(tmp_path)]) == 0
    assert re.search(r"LUP.pkl +6 entries, the official file", capsys.readouterr().out)


# ---- real photographs, CORe50's own index ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """The stand-in at two frames a unit, as PNG files and as npz."""
    if not STANDIN.is_dir():
        pytest.skip(f"needs the stand-in data in {STANDIN}")
    pytest.importorskip("PIL")
    folders = {form: tmp_path_factory.mktemp(form) for form in ("png", "npz")}
    for form, folder in folders.items():
        command = [sys.executable, STANDIN / "make_standin.py", folder, "--frames", "2", "--format", form]
        subprocess.run(command, check=True, capture_output=True)
    return folders


def test_standin_has_the_published_numbers_of_batches(standin):
    for scenario, batches in BATCHES.items():
        stream = CORE50(standin["png"], scenario=scenario)
        assert len(stream) == batches and stream.num_classes == 50 and stream.image_size == 128
    assert tuple(BATCHES) == SCENARIOS


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_standin_frames_labels_and_sessions(standin, scenario):
    """Read from the pickles by the test itself; the stream must agree, with each training frame exactly once."""
    root = standin["npz"]
    paths = pickle.loads((root / "paths.pkl").read_bytes())
    session, obj = np.array([[int(n) for n in re.match(r"s(\d+)/o(\d+)/", p).groups()] for p in paths]).T
    train = np.flatnonzero(~np.isin(session, (3, 7, 10)))
    first = []
    for run in range(10):
        stream = CORE50(root, scenario=scenario, run=run)
        used = np.concatenate([i for i, _ in stream.batches])
        labels = np.concatenate([y for _, y in stream.batches])
        np.testing.assert_array_equal(np.sort(used), train)
        np.testing.assert_array_equal(np.sort(stream.test[0]), np.flatnonzero(np.isin(session, (3, 7, 10))))
        if scenario != "nc":  # nc relabels the classes of each run
            np.testing.assert_array_equal(labels, obj[used] - 1)
            np.testing.assert_array_equal(stream.test[1], obj[stream.test[0]] - 1)
        first.append(stream.batches[0][0])
    if scenario.startswith("nicv2"):
        for indices in first:
            np.testing.assert_array_equal(indices, first[0])
        np.testing.assert_array_equal(np.unique(obj[first[0]]), np.arange(1, 47, 5))
        assert (session[first[0]] == 1).all()


def test_standin_png_and_npz_are_the_same_pixels(standin):
    from PIL import Image
    from_png, from_npz = (CORE50(standin[form], scenario="nicv2_79", run=3) for form in ("png", "npz"))
    n = 0
    for (x1, y1), (x2, y2) in zip(from_png, from_npz, strict=True):
        np.testing.assert_array_equal(x1, x2)
        np.testing.assert_array_equal(y1, y2)
        n += len(y1)
    assert n == 800  # 8 sessions x 50 objects x 2 frames
    np.testing.assert_array_equal(from_png.get_test_set(1)[0], from_npz.get_test_set(1)[0])
    paths = pickle.loads((standin["png"] / "paths.pkl").read_bytes())
    x, _ = next(iter(from_png))
    for image, index in zip(x, from_png.batches[0][0]):  # and Pillow reads the same
        np.testing.assert_array_equal(image, np.asarray(Image.open(standin["png"] / "core50_128x128" / paths[index])))


def test_the_published_sources():
    """URLs and md5 sums against the project's notes."""
    notes = REPO.parent / "shared" / "ALGORITHM.md"
    if not notes.exists():
        pytest.skip(f"needs {notes}")
    table = re.findall(r"^\| (\S+\.\w+) \| (http\S+) \| ([0-9a-f]{32}) \|$", notes.read_text(), re.MULTILINE)
    assert data_loader.SOURCES == {name: (url, md5) for name, url, md5 in table} and len(table) == 5


