"""Reading CORe50: what comes out, against hand-written index files and pictures, and CORe50's own index."""
import pickle
import re
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import core50_files
import data_loader
from ar1star_lat_replay import open_stream
from core50_files import IMAGES, LABELS, LUP, NPY, PATHS, TEST, same_batches, write_data, write_index
from data_loader import CORE50, SCENARIOS, DataError
from harness.config import load_config
from helpers import REPO

BATCHES = {"ni": 8, "nc": 9, "nic": 79, "nicv2_79": 79, "nicv2_196": 196, "nicv2_391": 391}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """PNG form; tests that damage something write their own."""
    return write_data(tmp_path_factory.mktemp("data"))


# ---- what comes out ----

@pytest.mark.parametrize("preload", [False, True])
@pytest.mark.parametrize("form", ["png", "png in root", "npz", "npy"])
def test_every_form_gives_the_written_pixels_and_labels(tmp_path, form, preload):
    stream = CORE50(write_data(tmp_path, form), preload=preload)
    for _ in range(2):
        same_batches(stream)
        x, y = stream.get_test_set(stride=1)
        np.testing.assert_array_equal(x, IMAGES[TEST])
        np.testing.assert_array_equal(y, LABELS[0][-1])
        for images, labels in [*stream, (x, y)]:    # writing into what was given leaves the data alone
            images[:], labels[:] = 0, 0
    assert (stream.num_classes, stream.image_size, len(stream)) == (3, 128, 5)
    assert (stream.scenario, stream.run) == ("nicv2_391", 0)


@pytest.mark.parametrize("preload", [False, True])
def test_frames_are_stretched_to_image_size(data, preload):
    """At half the side a triangle four pixels wide weighs neighbours by 1, 3, 3, 1."""
    stream = open_stream(load_config(overrides={"data": str(data), "image_size": 64, "preload": preload}))
    weights = np.zeros((64, 128))
    for k in range(64):
        for pixel, weight in zip(range(2 * k - 1, 2 * k + 3), (1, 3, 3, 1)):
            if 0 <= pixel < 128:
                weights[k, pixel] = weight
    weights /= weights.sum(1, keepdims=True)
    expected = np.einsum("ip, jq, npqc -> nijc", weights, weights, IMAGES, optimize=True)

    assert stream.image_size == 64
    for _ in range(2):
        batches = [*stream, stream.get_test_set(stride=2)]
        frames = [*LUP[0][:-1], TEST[::2]]
        for (x, y), indices in zip(batches, frames, strict=True):
            assert x.dtype == np.uint8 and np.abs(x - expected[indices]).max() < 0.501
            np.testing.assert_array_equal(y, np.array(indices) // 2 % 3)
            x[:] = 0                            # writing into what was given leaves the data alone


def test_run_start_batch_restart_and_cumulative(data):
    stream = CORE50(data, scenario="ni", run=1, start_batch=2)
    assert len(stream) == 3
    for _ in range(2):  # a new iter() starts again
        same_batches(stream, LUP[1][2:-1], LABELS[1][2:-1])
    cumulative = CORE50(data, cumul=True, start_batch=1)
    same_batches(cumulative, *([sum(table[0][:i + 1], []) for i in range(1, 5)] for table in (LUP, LABELS)))
    for (x1, y1), (x2, y2) in zip(stream, stream):      # at once
        np.testing.assert_array_equal(x1, x2)
        np.testing.assert_array_equal(y1, y2)


def test_the_test_set_is_every_stride_th_frame(data):
    stream = CORE50(data)
    for stride in (1, 2, 4, 5, 6, 20):
        x, y = stream.get_test_set(stride)
        np.testing.assert_array_equal(x, IMAGES[[i for k, i in enumerate(TEST) if k % stride == 0]])
        np.testing.assert_array_equal(y, [c for k, c in enumerate(LABELS[0][-1]) if k % stride == 0])
    np.testing.assert_array_equal(stream.get_test_set()[0], IMAGES[TEST[:1]])    # every 20th


@settings(max_examples=40)
@given(draw=st.data())
def test_bookkeeping_of_any_index(tmp_path, draw):
    """Each training frame once, with its own label, in the index's order: a frame's pixels are its number."""
    n_objects, n_frames = draw.draw(st.integers(1, 6)), draw.draw(st.integers(1, 5))
    paths = [f"s{s}/o{o}/C_{s:02d}_{o:02d}_{f:03d}.png"
             for s in (1, 3) for o in range(1, n_objects + 1) for f in range(n_frames)]
    label_of = [int(re.search(r"/o(\d+)/", p)[1]) - 1 for p in paths]
    n_train = len(paths) // 2
    order = draw.draw(st.permutations(range(n_train)))
    cuts = [0, *sorted(draw.draw(st.sets(st.integers(1, n_train), max_size=5)) - {n_train}), n_train]
    batches = [order[a:b] for a, b in zip(cuts, cuts[1:])] + [list(range(n_train, 2 * n_train))]
    write_index(tmp_path, paths, [batches], [[[label_of[i] for i in b] for b in batches]])
    tags = np.zeros((len(paths), 2, 2, 3), np.uint8)
    tags[:, 0, 0, 0] = np.arange(len(paths))
    np.save(tmp_path / NPY, tags)

    start = draw.draw(st.integers(0, len(batches) - 2))
    stream = CORE50(tmp_path, start_batch=start)
    *_, everything = CORE50(tmp_path, cumul=True)
    assert [x[:, 0, 0, 0].tolist() for x, _ in stream] == batches[start:-1]
    assert sorted(everything[0][:, 0, 0, 0].tolist()) == list(range(n_train))
    for x, y in [*stream, everything]:
        assert y.tolist() == [label_of[i] for i in x[:, 0, 0, 0]]
    assert stream.num_classes == n_objects
    stride = draw.draw(st.integers(1, 7))
    assert stream.get_test_set(stride)[0][:, 0, 0, 0].tolist() == list(range(n_train, 2 * n_train))[::stride]


# ---- reading ahead ----

def eventually(condition):
    """Waits up to 5 s for a condition; whether it came true."""
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(.05)
    return condition()


def test_exactly_one_batch_is_read_ahead(data):
    stream, read = CORE50(data), []
    original = stream.read_batch
    stream.read_batch = lambda i: read.append((i, threading.current_thread())) or original(i)
    batches = iter(stream)
    next(batches)
    assert eventually(lambda: len(read) == 2)
    time.sleep(.2)
    assert [i for i, _ in read] == [0, 1]  # the consumer has batch 0 and has not asked for batch 1
    assert read[1][1] is not threading.main_thread()
    assert len(list(batches)) == 4 and [i for i, _ in read] == [0, 1, 2, 3, 4]


def test_an_error_while_reading_ahead_reaches_the_consumer_at_its_batch(tmp_path):
    file = write_data(tmp_path) / "core50_128x128" / PATHS[LUP[0][2][1]]
    file.write_bytes(file.read_bytes()[:-100])
    batches = iter(CORE50(tmp_path))
    assert len(next(batches)[1]) == 4 and len(next(batches)[1]) == 2
    with pytest.raises(DataError, match=re.escape(str(file))):
        next(batches)


abandoned = []  # iterators that live until their process ends


def abandon(root):
    abandoned.append(iter(CORE50(root)))
    next(abandoned[0])


def test_an_abandoned_iterator_does_not_hold_up_the_end_of_the_program(data):
    assert core50_files.in_another_process(abandon, data) == (0, "")


def test_a_closed_iterator_leaves_no_thread(data):
    before = set(threading.enumerate())
    batches = iter(CORE50(data))
    next(batches)
    batches.close()
    assert eventually(lambda: not set(threading.enumerate()) - before)


# ---- wrong arguments, missing files ----

@pytest.mark.parametrize("arguments, message", [
    *(({"scenario": scenario}, "nicv2_391") for scenario in ("nicv2", ["ni"], None)),
    *(({"run": run}, "choose 0 to 1") for run in (2, -1, "0", 0.0))])
def test_wrong_arguments_name_the_valid_choices(data, arguments, message):
    with pytest.raises(DataError, match=message):
        CORE50(data, **arguments)


def test_missing_files_are_listed_with_their_source_and_the_command(tmp_path):
    with pytest.raises(DataError) as e:
        CORE50(tmp_path)
    for expected in ("LUP.pkl", "labels.pkl", "https://vlomonaco.github.io/core50/data/paths.pkl",
                     "http://bias.csr.unibo.it/maltoni/download/core50/core50_128x128.zip", "core50_imgs.npz",
                     f"python data_loader.py --download --data {tmp_path}"):
        assert expected in str(e.value)
    assert "\n" not in str(e.value)
    write_data(tmp_path, "npy")
    (tmp_path / "LUP.pkl").unlink()
    with pytest.raises(DataError) as e:
        CORE50(tmp_path)
    assert "LUP.pkl" in str(e.value) and "paths.pkl" not in str(e.value) and "npz" not in str(e.value)
    write_index(tmp_path)
    (tmp_path / NPY).unlink()
    with pytest.raises(DataError, match="lacks the frames"):
        CORE50(tmp_path)
    (tmp_path / "core50_128x128").mkdir()
    with pytest.raises(DataError, match=re.escape(PATHS[0])):
        CORE50(tmp_path)


# ---- real photographs, CORe50's own index ----

@pytest.mark.parametrize("scenario", SCENARIOS)
def test_standin_frames_labels_and_sessions(standin, scenario):
    """Read from the pickles by the test itself; the stream must agree, with each training frame once."""
    paths = pickle.loads((standin["npz"] / "paths.pkl").read_bytes())
    session, obj = np.array([[int(n) for n in re.match(r"s(\d+)/o(\d+)/", p).groups()] for p in paths]).T
    in_test = np.isin(session, (3, 7, 10))
    for run in range(10):
        stream = CORE50(standin["npz"], scenario=scenario, run=run)
        assert (len(stream), stream.num_classes, stream.image_size) == (BATCHES[scenario], 50, 128)
        used, labels = (np.concatenate(column) for column in zip(*stream.batches))
        np.testing.assert_array_equal(np.sort(used), np.flatnonzero(~in_test))
        np.testing.assert_array_equal(np.sort(stream.test[0]), np.flatnonzero(in_test))
        if scenario != "nc":  # nc relabels the classes of each run
            np.testing.assert_array_equal(labels, obj[used] - 1)
            np.testing.assert_array_equal(stream.test[1], obj[stream.test[0]] - 1)
        first = stream.batches[0][0]
        if scenario.startswith("nicv2"):    # the same first batch in all runs
            np.testing.assert_array_equal(first, CORE50(standin["npz"], scenario=scenario).batches[0][0])
            np.testing.assert_array_equal(np.unique(obj[first]), np.arange(1, 47, 5))
            assert (session[first] == 1).all()


def test_standin_png_and_npz_are_the_same_pixels(standin):
    streams = [CORE50(standin[form], scenario="nicv2_79", run=3) for form in ("png", "npz")]
    n = 0
    for (x1, y1), (x2, y2) in zip(*([*stream, stream.get_test_set(1)] for stream in streams), strict=True):
        np.testing.assert_array_equal(x1, x2)
        np.testing.assert_array_equal(y1, y2)
        n += len(y1)
    assert n == 1100  # 11 sessions x 50 objects x 2 frames


def test_the_published_sources():
    """URLs and md5 sums against the project's notes."""
    notes = REPO.parent / "shared" / "ALGORITHM.md"
    if not notes.exists():
        pytest.skip(f"needs {notes}")
    table = re.findall(r"^\| (\S+\.\w+) \| (http\S+) \| ([0-9a-f]{32}) \|$", notes.read_text(), re.MULTILINE)
    assert data_loader.SOURCES == {name: (url, md5) for name, url, md5 in table} and len(table) == 5
