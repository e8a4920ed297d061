"""What a run is made from: opening it, recognizing it, and refusing to go on with something else."""
import shutil

import numpy as np
import pytest
import torch

import ar1star_lat_replay as program
from core50_files import IMAGES, LABELS, LUP, PATHS, write_data, write_index
from data_loader import CORE50
from helpers import PARAMS, REPO
from lab.config import load_config
from lab.data import identify, notes, open_stream
from lab.run_folder import difference
from streams.demo import DemoStream
from streams.folder import FolderStream
from tiny import all_files, outcome, said, some_batches


def config(**keys):
    return load_config("DEFAULT", REPO / "params.cfg", keys)


# ---- cumulative batches ----

@pytest.mark.parametrize("keys", [{"dataset": "demo"}, {"dataset": "folder"}])
def test_cumulative_batches_hold_all_images_so_far(params, keys):
    if keys["dataset"] == "folder":
        keys = keys | {"data": str(params.parent / "images"), "image_size": 48}
    plain, cumulative = list(open_stream(config(**keys)))[:3], open_stream(config(cumulative=True, **keys))
    for i, (x, y) in zip(range(3), cumulative):
        assert np.array_equal(x, np.concatenate([batch[0] for batch in plain[:i + 1]]))
        assert np.array_equal(y, np.concatenate([batch[1] for batch in plain[:i + 1]]))
    assert np.array_equal(next(iter(open_stream(config(cumulative=True, **keys), done=2)))[1], y)


# ---- recognizing data ----

def core50(root, **index):
    write_data(root)
    write_index(root, **index)
    return identify(CORE50(root, scenario="nicv2_391", run=0))


def test_core50_is_known_by_its_images_and_its_index_not_by_its_place_or_form(tmp_path, monkeypatch):
    first = core50(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    write_data(tmp_path / "npz", "npz")
    assert identify(CORE50(tmp_path / "copy", scenario="nicv2_391", run=0)) == first
    assert identify(CORE50(tmp_path / "npz", scenario="nicv2_391", run=0)) == first
    assert first["classes"] is None and first["test"] == 6 and first["batches"] == [4, 2, 2, 2, 2]

    other_order = identify(CORE50(tmp_path / "a", scenario="nicv2_391", run=1))
    assert other_order["data"] == first["data"] and other_order["order"] != first["order"]
    swapped = [[[*run[:1], *run[2:4], run[1], *run[4:]] for run in table] for table in (LUP, LABELS)]
    assert core50(tmp_path / "b", lup=swapped[0], labels=swapped[1])["order"] != first["order"]

    monkeypatch.setattr("core50_files.IMAGES", 255 - IMAGES)        # other pictures under the same index
    assert core50(tmp_path / "c")["data"] != first["data"] and PATHS


def test_the_demo_is_known_by_its_order():
    a, b = identify(DemoStream(0, 0)), identify(DemoStream(0, 1))
    assert a == identify(DemoStream(0, 0)) and a["data"] == b["data"] and a["order"] != b["order"]
    assert len(a["classes"]) == 10


@pytest.mark.parametrize("change, says", [
    ({"classes": ["a", "x", "c"]}, "its classes have changed ('b' went; 'x' came)"),
    ({"classes": ["a", "b"]}, "its classes have changed ('c' went)"),
    ({"batches": [5, 3]}, "it held 8 images in 3 batches and 4 to test, and holds 8 in 2 and 4"),
    ({"test": 5}, "and holds 8 in 3 and 5"), ({"order": "x"}, "its images or their labels are others")])
def test_what_has_changed_is_told(change, says):
    theirs = {"data": "1", "order": "2", "classes": ["a", "b", "c"], "batches": [4, 2, 2], "test": 4}
    assert says in difference(theirs, theirs | change)


# ---- continuing ----

def test_a_run_does_not_go_on_with_other_images(command, expected, params, tmp_path, capfd):
    """Flowers' network would go on with birds; a finished run would give flowers' number for birds."""
    some_batches(command)
    images = tmp_path / "birds"
    shutil.copytree(params.parent / "images", images)
    assert program.main([*command[:-1], "3", "--data", str(images)]) == 0       # a copy is the same data: finished
    before = all_files(tmp_path / "logs")
    (images / "train/5/a/7.png").write_bytes((images / "train/5/a/6.png").read_bytes() + b"\0")
    for batches in ("3", "6"):
        said(capfd, 2, [*command[:-1], batches, "--data", str(images)], "other data", "images or their labels", "--as NAME")
    (images / "test/a/7.png").unlink()
    said(capfd, 2, [*command, "--data", str(images)], "and 24 to test, and holds", "and 23;")
    for part in sorted(images.glob("**/c")):
        part.rename(part.with_name("z"))
    said(capfd, 2, [*command, "--data", str(images)], "('c' went; 'z' came)")
    assert all_files(tmp_path / "logs") == before
    assert program.main([*command, "--data", str(images), "--as", "birds"]) == 0
    assert (tmp_path / "logs" / "birds" / "run0_seed0").is_dir()
    assert program.main(command) == 0 and outcome(tmp_path / "logs")[0] == expected[0]


def test_a_checkpoint_of_before_data_were_recognized_is_taken(command, expected, tmp_path):
    file = some_batches(command)
    state = torch.load(file, weights_only=True)
    del state["data"]
    torch.save(state, file)
    assert program.main(command) == 0 and outcome(tmp_path / "logs")[0] == expected[0]


def test_class_names_come_back_from_a_checkpoint(command, params, tmp_path):
    state = torch.load(some_batches(command), weights_only=True)
    assert state["data"] == identify(FolderStream(params.parent / "images", 48))
    assert state["data"]["classes"] == ["a", "b", "c"]


# ---- settings that mean nothing with this network ----

def test_synaptic_intelligence_without_a_convolution_that_learns_is_refused(command, capfd):
    said(capfd, 2, [*command, "--set", "reg_lambda=1.0", "--set", "latent_layer_num=pool6"], "reg_lambda is above 0, but "
         "no convolution learns after batch 0")


def test_frozen_random_layers_are_told_of():
    """With weights none and layers frozen from batch 0 on, accuracy stays at chance."""
    said = lambda **keys: " ".join(notes(None, load_config("DEFAULT", PARAMS, {"weights": "none"} | keys)))
    assert "frozen at random values" in said() and "freeze_below_layer to images" in said()
    assert said(freeze_below_layer="images") == said(weights="imagenet") == ""
    assert notes(None, load_config("demo", PARAMS)) == []
