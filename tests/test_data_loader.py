"""Reading CORe50: what comes out, against hand-written index files and pictures, and against CORe50's own index."""
import pickle
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data_loader
from core50_files import IMAGES, LABELS, LUP, PATHS, TEST, same_batches, write_data, write_index
from data_loader import CORE50, SCENARIOS, DataError
from helpers import REPO, STANDIN

BATCHES = {"ni": 8, "nc": 9, "nic": 79, "nicv2_79": 79, "nicv2_196": 196, "nicv2_391": 391}  # ALGORITHM.md, section 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """PNG form; tests that damage something write their own."""
    return write_data(tmp_path_factory.mktemp("data"))


# ---- what comes out ----

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


# ---- reading ahead ----

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


# ---- wrong arguments, missing files ----

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


# ---- real photographs, CORe50's own index ----

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
