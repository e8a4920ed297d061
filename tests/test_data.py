"""What all streams have in common, how they are recognized, and what a run says of other data than before."""
import shutil

import numpy as np
import pytest
import torch

import ar1star_lat_replay as program
from core50_files import IMAGES, LABELS, LUP, write_data, write_index
from data_loader import CORE50, SCENARIOS, DataError, Stream
from harness.checkpoint import difference
from harness.config import Config
from streams.demo import DemoStream
from streams.folder import FolderStream
from tiny import all_files, outcome, said, some_batches


@pytest.fixture
def make(tmp_path, params):
    """{name: (function of start_batch and cumulative that makes the stream, number of its batches)}."""
    write_data(tmp_path / "core50")
    return {
        "demo": (lambda **keys: DemoStream(**keys), 46),
        "folder": (lambda **keys: FolderStream(params.parent / "images", 48, **keys), 6),
        "core50": (lambda cumulative=False, **keys: CORE50(tmp_path / "core50", cumul=cumulative, **keys), 5)}


@pytest.mark.parametrize("name", ["demo", "folder", "core50"])
def test_what_all_streams_do(make, name):
    make, n = make[name]
    plain = [batch for _, batch in zip(range(4), make())]
    assert len(make()) == n and isinstance(make(), Stream)
    last = make(start_batch=n - 1)
    assert len(last) == len(list(last)) == len(list(last)) == 1 and last.start_batch == n - 1
    for start in (-1, n, 1.0, "0"):
        with pytest.raises(DataError, match=f"start_batch {start!r} .*choose 0 to {n - 1}"):
            make(start_batch=start)
    for stride in (0, -1, 1.5, None):
        with pytest.raises(DataError, match=f"stride {stride} .*choose 1"):
            last.get_test_set(stride)
    for i, (x, y) in zip(range(1, 4), make(start_batch=1, cumulative=True)):
        assert np.array_equal(x, np.concatenate([batch[0] for batch in plain[:i + 1]]))
        assert np.array_equal(y, np.concatenate([batch[1] for batch in plain[:i + 1]]))


# ---- recognizing data ----

def core50(root, form="png", run=0, scenario="nicv2_391", **index):
    write_data(root, form)
    write_index(root, **index)
    return CORE50(root, scenario=scenario, run=run).identity()


def test_core50_is_known_by_its_images_and_its_index_not_by_its_place_or_form(tmp_path, monkeypatch):
    first = core50(tmp_path / "a")
    assert first == {"data": "378ac8384854d9f4", "order": "966b1c3f2ebf16d1", "classes": None,
                     "batches": [4, 2, 2, 2, 2], "test": 6}         # checkpoints and records hold such digits
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert CORE50(tmp_path / "copy", start_batch=2, cumul=True).identity() == first
    assert core50(tmp_path / "npz", "npz") == first
    assert core50(tmp_path / "a", run=1, scenario="ni") == first | {"order": "b9995df839b1c1a2"}
    swapped = [[[*run[:1], *run[2:4], run[1], *run[4:]] for run in table] for table in (LUP, LABELS)]
    assert core50(tmp_path / "b", lup=swapped[0], labels=swapped[1])["order"] != first["order"]
    monkeypatch.setattr("core50_files.IMAGES", 255 - IMAGES)        # other pictures under the same index
    assert core50(tmp_path / "c")["data"] != first["data"]
    assert CORE50(tmp_path / "a").notes() == []


def test_the_demo_is_known_by_its_order():
    classes = ["ball_banded", "ball_dotted", "box_checked", "box_swirled", "can_banded", "can_checked",
               "cone_sectored", "cone_swirled", "ring_dotted", "ring_sectored"]
    expected = {"data": "demo", "order": "d08a41cfe0a57bbe", "classes": classes, "batches": [5] + [1] * 45,
                "test": 20}
    assert DemoStream(0, 0).identity() == expected and DemoStream().notes() == []
    assert DemoStream(3, 2, start_batch=5).identity() == expected | {"order": "7edebeea4138d1f1"}


@pytest.mark.parametrize("change, says", [
    ({"classes": ["a", "x", "c"]}, ["'b' went", "'x' came"]), ({"classes": ["a", "b"]}, ["'c' went"]),
    ({"batches": [5, 3]}, ["8 images in 3 batches and 4 to test", "8 images in 2 batches and 4 to test"]),
    ({"test": 5}, ["and 4 to test", "and 5 to test"]), ({"order": "x"}, ["images or their labels"])])
def test_what_has_changed_is_told(change, says):
    theirs = {"data": "1", "order": "2", "classes": ["a", "b", "c"], "batches": [4, 2, 2], "test": 4}
    told = difference(theirs, theirs | change)
    assert all(part in told for part in says), told


# ---- continuing ----

def test_a_run_does_not_go_on_with_other_images(command, expected, params, tmp_path, capfd):
    """Flowers' network would go on with birds; a finished run would give flowers' number for birds."""
    state = torch.load(some_batches(command), weights_only=True)
    assert state["data"] == FolderStream(params.parent / "images", 48).identity()
    assert state["data"]["classes"] == ["a", "b", "c"]
    images = tmp_path / "birds"
    shutil.copytree(params.parent / "images", images)
    assert program.main([*command[:-1], "3", "--data", str(images)]) == 0       # a copy is the same data
    before = all_files(tmp_path / "logs")
    (images / "train/2/a/7.png").write_bytes((images / "train/2/a/6.png").read_bytes() + b"\0")
    for batches in ("3", "6"):
        said(capfd, 2, [*command[:-1], batches, "--data", str(images)], "other data", "'2'", "--as NAME")
    for part in sorted(images.glob("**/c")):
        part.rename(part.with_name("z"))
    said(capfd, 2, [*command, "--data", str(images)], "other data", "'0'")
    assert all_files(tmp_path / "logs") == before
    assert program.main([*command, "--data", str(images), "--as", "birds"]) == 0
    assert (tmp_path / "logs" / "birds" / "run0_seed0").is_dir()
    assert program.main(command) == 0 and outcome(tmp_path / "logs")[0] == expected[0]


# ---- settings ----

def test_the_scenarios_of_the_configuration_are_those_of_the_data():
    """harness/config.py needs no torch, and so cannot import data_loader."""
    assert Config.__dataclass_fields__["scenario"].metadata["choices"] == SCENARIOS


def test_synaptic_intelligence_without_a_convolution_that_learns_is_refused(command, capfd):
    said(capfd, 2, [*command, "--set", "reg_lambda=1.0", "--set", "latent_layer_num=pool6"], "reg_lambda",
         "no convolution learns")


@pytest.mark.parametrize("layer, told", [("conv3_2/dw", True), ("images", False)])
def test_frozen_random_layers_are_told_of(command, capfd, layer, told):
    """With weights none and layers frozen from batch 0 on, accuracy stays at chance."""
    settings = ["--set", f"freeze_below_layer={layer}", "--set", "weights=none"]
    assert program.main([*command[:-1], "1", *settings]) == 0
    said = capfd.readouterr().err
    assert ("frozen at random values" in said) == ("freeze_below_layer to images" in said) == told
