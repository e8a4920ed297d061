"""The demo's stream has NICv2's properties, and what is written to disk comes back as it was."""
import numpy as np
import pytest
import torch

from data_loader import DataError
from streams.demo import OBJECTS, SURFACES, TEST_SESSIONS, TRAIN_SESSIONS, DemoStream, export_demo
from streams.folder import FolderStream


@pytest.fixture(scope="module")
def demo():
    return DemoStream(0)


@pytest.fixture(scope="module")
def exported(demo, tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")  # exists and is empty: allowed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streams.demo.DemoStream", {0: demo}.__getitem__)  # has drawn its images already
        return root, export_demo(root, seed=0)


def test_same_seed_same_bytes(demo):
    again, other = DemoStream(0, start_batch=44), DemoStream(1, start_batch=44)
    for i, (x, y) in enumerate(again, 44):  # drawn without the batches before it
        assert x.tobytes() == demo.read_batch(i)[0].tobytes() and (y == demo.read_batch(i)[1]).all()
    assert other.draw(0, 3).tobytes() != demo.draw(0, 3).tobytes() and other.units != demo.units
    assert again.draw(0, 3).tobytes() == demo.draw(0, 3).tobytes()
    assert np.abs(DemoStream(0).draw(5, 3)[0].astype(int) - demo.draw(6, 3)[0]).mean() > 2  # sessions differ


def test_interface(demo):
    assert (demo.num_classes, demo.image_size, len(demo)) == (10, 48, 46)
    x, y = demo.get_test_set()
    few_x, few_y = demo.get_test_set(stride=7)
    assert (few_x == x[::7]).all() and (few_y == y[::7]).all()
    few_x[:] = 0  # a copy: the stream itself must not change
    assert (demo.get_test_set()[0] == x).all()
    assert np.bincount(y).tolist() == [40] * 10  # every object, two sessions of 20 frames
    batches = list(demo)
    for i, (images, labels) in enumerate(batches):
        assert (images == np.concatenate([demo.draw(*unit) for unit in demo.units[i]])).all()
        assert labels.tolist() == [label for _, label in demo.units[i] for _ in range(36)]
    assert sum(len(labels) for _, labels in batches) == 1800
    for images, labels in [*batches, (x, y)]:
        assert (images.dtype, labels.dtype, images.shape) == (np.uint8, np.int64, (len(labels), 48, 48, 3))
    assert demo.class_names == sorted(demo.class_names) and len(set(demo.class_names)) == 10
    assert DemoStream(0, image_size=32).draw(0, 0).shape == (36, 32, 32, 3)


@pytest.mark.parametrize("seed", range(5))
def test_order_is_that_of_nicv2(seed):
    for run in range(4):
        units = DemoStream(seed, run).units
        assert units[0] == [(0, 0), (0, 2), (0, 4), (0, 6), (0, 8)]  # half of the classes, session 1
        assert all(len(batch) == 1 for batch in units[1:])  # then one object in one session
        flat = [unit for batch in units for unit in batch]
        assert sorted(flat) == [(s, o) for s in TRAIN_SESSIONS for o in range(10)]  # each unit exactly once
        first = sorted(next(i for i, batch in enumerate(units) if o in [label for _, label in batch])
                       for o in range(10))
        assert first[4] == 0 and .75 * 46 - 1 < first[9] < .82 * 46  # the last one in the last quarter
        assert min(np.diff(first[4:])) >= 5  # and the newcomers one by one
        assert run == 0 or units[1:] != DemoStream(seed, 0).units[1:]


@pytest.mark.parametrize("label", range(10))
def test_frames_of_a_unit_are_a_video(demo, label):
    videos = np.stack([demo.draw(session, label) for session in TRAIN_SESSIONS]).astype(np.float32)
    steps = np.abs(np.diff(videos, axis=1)).mean((1, 2, 3, 4))  # between frames, in grey levels, (5,)
    frames = torch.from_numpy(videos[:, ::3].reshape(5 * 12, -1))
    pairs = torch.cdist(frames, frames, p=1).div(frames.shape[1]).reshape(5, 12, 5, 12).mean((1, 3)).numpy()
    within = np.diag(pairs) * 12 / 11  # a frame is not compared with itself
    across = pairs[~np.eye(5, dtype=bool)]
    assert steps.min() > 1 and steps.max() < across.min() / 3  # it moves, and smoothly
    assert within.mean() < .9 * across.mean()
    assert all(within[s] < np.delete(pairs[s], s).mean() for s in range(5))  # most like itself


def wall_colour(demo, session, labels):
    """Chromaticity (3,) of the wall, from the upper corners; a median over frames is free of the objects."""
    x = np.concatenate([demo.draw(session, label) for label in labels]).astype(np.float32)
    corners = np.concatenate([x[:, :8, :5], x[:, :8, -5:]], 2).mean((1, 2))
    return np.median(corners / corners.sum(1, keepdims=True), 0)


def test_surroundings_of_the_test_sessions_are_new(demo):
    assert not {SURFACES[s] for s in TEST_SESSIONS} & {SURFACES[s] for s in TRAIN_SESSIONS}  # other textures
    one, two = (np.array([wall_colour(demo, s, seen) for s in range(7)]) for seen in ((0, 3, 7), (1, 5, 8)))
    same = np.abs(one - two).max(1)  # the same session seen with other objects, (7,)
    nearest = min(np.abs(one[t] - two[s]).max() for t in TEST_SESSIONS for s in TRAIN_SESSIONS)
    assert nearest > 2 * same.max()  # and other colours


def test_export_comes_back_pixel_by_pixel(demo, exported, tmp_path):
    root, counts = exported
    assert counts == {"batches": 46, "classes": 10, "train": 1800, "test": 400}
    folder = FolderStream(root, image_size=48)
    assert set(folder.class_names) == set(demo.class_names) and folder.num_classes == 10 and len(folder) == 46
    labels = np.array([demo.class_names.index(name) for name in folder.class_names])
    tests = [(demo.get_test_set(stride), folder.get_test_set(stride)) for stride in (1, 3)]
    for (x, y), (folder_x, folder_y) in [*zip(demo, folder, strict=True), *tests]:
        assert folder_x.dtype == np.uint8 and folder_y.dtype == np.int64
        assert folder_x.tobytes() == x.tobytes() and labels[folder_y].tolist() == y.tolist()
    (tmp_path / "file").write_text("")
    for used in (root, tmp_path, tmp_path / "file"):
        with pytest.raises(DataError, match="exists and is not an empty folder: name a new folder"):
            export_demo(used)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_no_property_alone_gives_an_object_away():
    for columns in ([0], [1], [2, 3]):  # shape, pattern, colours
        names = [obj[column] for obj in OBJECTS for column in columns]
        assert all(names.count(name) == 2 for name in names)
    assert len({obj[:2] for obj in OBJECTS}) == len({obj[2:] for obj in OBJECTS}) == 10  # but two of them do
