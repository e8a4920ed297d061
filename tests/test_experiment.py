"""The experiment as a whole, on the demo's stream cut to a few batches and on the stand-in photographs."""
import copy
import json
import math
import subprocess
import sys

import pytest
import torch

import ar1star_lat_replay as program
from data_loader import CORE50
from helpers import REPO, same
from lab import fast
from lab.config import load_config
from lab.record import Stop
from lab.run_folder import CheckpointError
from models.mobilenet import MobileNetV1
from streams.demo import DemoStream
from utils import CWRHead, ReplayMemory

PARAMS = REPO / "params.cfg"
SMALL = dict(width=0.1, init_train_ep=2, inc_train_ep=2, rm_sz=60, mb_size=32, test_stride=10, device="cpu",
             checkpoint_share=1.0)
# The lower layers are frozen from batch 0 on, as in DEFAULT.
LATENT = SMALL | dict(freeze_below_layer="conv3_2/dw", inc_freeze_below_layer="conv3_2/dw")
# Two computations of the same training stay together only in float32, at a learning rate that does not blow up rounding.
STEADY = LATENT | dict(init_lr=1e-3, inc_lr=3e-4, matmul_precision="highest")


@pytest.fixture(autouse=True, scope="module")
def one_stream():
    """All runs of this module share one drawn stream; drawing it takes longer than the runs."""
    drawn, patch = {}, pytest.MonkeyPatch()
    draw = DemoStream.draw

    def draw_once(self, *unit):
        key = (self.seed, *unit)
        if key not in drawn:
            drawn[key] = draw(self, *unit)
        return drawn[key]

    patch.setattr(DemoStream, "draw", draw_once)
    yield
    patch.undo()


def config(**keys):
    return load_config("demo", PARAMS, keys)


def run(tmp_path, name="x", batches=4, **keys):
    """Results of a run, with what its checkpoint says of the learner under "state"."""
    results = program.run_experiment(config(**keys), name, tmp_path, batches)
    state = torch.load(results["folder"] / "checkpoint.pt", weights_only=True)
    return results | {"state": {k: v for k, v in state.items() if k not in ("rows", "files")}}


def build(**keys):
    """The learner of such a run, before it has learned anything."""
    return program.build_learner(config(**keys), 10, (48, 48), torch.device("cpu"))


def without_seconds(rows):
    """What two equal runs share: not their times, nor how many batches each was asked for."""
    return [{k: v for k, v in row.items() if not k.startswith("seconds") and k != "batches"} for row in rows]


def test_rows_hold_what_a_reader_needs(tmp_path):
    results = run(tmp_path, **LATENT)
    lines = [json.loads(line) for line in (results["folder"] / "results.jsonl").read_text().splitlines()]
    assert lines == results["rows"] and [row["batch"] for row in lines] == [0, 1, 2, 3]
    assert {"batch", "test_accuracy", "test_loss", "train_accuracy", "train_loss", "n_train", "classes_seen", "memory_size",
            "seconds_train", "seconds_test"} <= lines[0].keys()
    assert [row["n_train"] for row in lines] == [180, 36, 36, 36]
    assert [row["memory_size"] for row in lines] == [60] * 4
    # batch 0: 6 mini-batches of 32; then (36 + 60) // 32 = 3 of 12 new images; 2 epochs of each
    assert [row["train_steps"] for row in lines] == [12, 18, 24, 30]
    assert results["final_accuracy"] == lines[-1]["test_accuracy"]
    assert results["mean_accuracy"] == pytest.approx(sum(row["test_accuracy"] for row in lines) / 4)


@pytest.mark.parametrize("seed", [0, 3])
def test_a_seed_gives_the_same_run_bit_for_bit(tmp_path, seed):
    first, second = (run(tmp_path / name, batches=3, seed=seed, **LATENT) for name in "ab")
    other = run(tmp_path / "c", batches=3, seed=seed + 1, **LATENT)
    assert without_seconds(first["rows"]) == without_seconds(second["rows"])
    assert same(first["state"], second["state"])
    assert not torch.equal(first["state"]["head"]["cw"], other["state"]["head"]["cw"])


@pytest.mark.parametrize("keys", [LATENT, SMALL, LATENT | {"reg_lambda": 0.5}, LATENT | {"rm_sz": 0}])
def test_a_continued_run_ends_as_an_uninterrupted_one(tmp_path, keys):
    whole = run(tmp_path / "whole", **keys)
    for batches in (1, 2, 4):       # interrupted after batch 0 and after batch 1
        parts = run(tmp_path / "parts", batches=batches, **keys)
    assert without_seconds(whole["rows"]) == without_seconds(parts["rows"])
    assert same(whole["state"], parts["state"])


def test_a_finished_run_is_not_run_again(tmp_path):
    first = run(tmp_path, batches=2, **LATENT)
    again = run(tmp_path, batches=2, **LATENT)
    assert again["rows"] == first["rows"]       # the seconds are those of the first run


@pytest.mark.parametrize("keys", [STEADY, STEADY | {"reg_lambda": 1.0}, STEADY | {"cwr_consolidation": "per_class"}])
def test_the_simple_path_gives_the_same_results(tmp_path, keys):
    """fast: false evaluates the formula of BRN and encodes every image anew; only rounding may differ."""
    fast, simple = (run(tmp_path / str(f), batches=3, fast=f, **keys) for f in (True, False))
    a, b = (r["state"]["net"]["output.weight"] for r in (fast, simple))
    assert (a - b).norm() / b.norm() < 1e-4
    assert [row["test_accuracy"] for row in fast["rows"]] == [row["test_accuracy"] for row in simple["rows"]]
    assert torch.equal(fast["state"]["memory"]["y"], simple["state"]["memory"]["y"])
    assert torch.allclose(fast["state"]["memory"]["x"], simple["state"]["memory"]["x"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["medium", "low"])
def test_products_of_bfloat16_factors_stay_near_those_of_float32(precision, tmp_path):
    """Where the CPU has units for bfloat16, matmul_precision medium may round; elsewhere its runs are the same. low rounds.

    The stored latents are the same in any case: encoding is exact.
    """
    medium, highest = (run(tmp_path / p, batches=3, **STEADY | {"matmul_precision": p}) for p in (precision, "highest"))
    a, b = (r["state"]["net"]["output.weight"] for r in (medium, highest))
    assert (a - b).norm() / b.norm() < 0.1
    for mine, theirs in zip(medium["rows"], highest["rows"]):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.02)
        assert mine["test_accuracy"] == pytest.approx(theirs["test_accuracy"], abs=0.05)
    assert torch.equal(medium["state"]["memory"]["x"], highest["state"]["memory"]["x"])


def test_replaying_images_through_frozen_layers_is_latent_replay(tmp_path):
    """What Latent Replay rests on: while the lower layers are frozen, stored latents stand for stored images."""
    latent = run(tmp_path / "latent", batches=4, **STEADY)
    native = run(tmp_path / "native", batches=4, **STEADY | {"latent_layer_num": "images"})
    a, b = (r["state"]["head"]["cw"] for r in (latent, native))
    assert native["state"]["memory"]["x"].shape[1:] == (3, 48, 48)
    assert (a - b).norm() / b.norm() < 1e-4
    assert torch.equal(latent["state"]["memory"]["y"], native["state"]["memory"]["y"])


@pytest.mark.parametrize("keys", [{"reg_lambda": 1.0}, {"reg_lambda": 1e4, "reg_clip_negative": True}, {}])
def test_frozen_layers_never_move_and_the_others_do(tmp_path, keys):
    results = run(tmp_path, batches=3, **LATENT | keys)
    torch.manual_seed(0)
    fresh = MobileNetV1(10, "conv3_2/dw", width=0.1).state_dict()
    state = results["state"]["net"]
    frozen = [k for k in state if k.startswith("lat_features") and "num_batches" not in k]
    assert frozen and all(torch.equal(state[k], fresh[k]) for k in frozen)
    moved = [k for k in state if k.startswith("end_features") and k.endswith("weight")]
    assert moved and not any(torch.equal(state[k], fresh[k]) for k in moved)
    assert all(math.isfinite(row["train_loss"]) for row in results["rows"])


def test_check_frozen_notices_a_change(tmp_path):
    learner = build(**LATENT)
    learner.check_frozen()
    learner.net.lat_features[0][1].running_mean[0] += 1e-6
    with pytest.raises(AssertionError, match="running_mean"):
        learner.check_frozen()


def test_making_a_learner_leaves_the_statistics_of_learning_layers_alone():
    learner = build(**SMALL)
    torch.manual_seed(0)
    fresh = MobileNetV1(10, "conv3_2/dw", width=0.1).state_dict()
    averages = [k for k in fresh if "running" in k or k.endswith(("r_max", "d_max"))]
    assert len(averages) == 4 * 27 and all(torch.equal(learner.net.state_dict()[k], fresh[k]) for k in averages)


def test_cwr_star_moves_nothing_below_the_head_after_batch_0(tmp_path):
    keys = LATENT | dict(rm_sz=0, latent_layer_num="pool6", inc_freeze_below_layer="pool6", cwr_consolidation="per_class")
    first, later = (run(tmp_path, batches=n, **keys)["state"] for n in (1, 4))
    below = [k for k in first["net"] if not k.startswith("output")]
    assert all(torch.equal(first["net"][k], later["net"][k]) for k in below)
    assert not torch.equal(first["head"]["cw"], later["head"]["cw"])


def test_naive_fine_tuning_has_no_memory_and_an_untouched_head(tmp_path):
    results = run(tmp_path, **LATENT | dict(rm_sz=0, cwr_consolidation="none"))
    assert [row["memory_size"] for row in results["rows"]] == [0] * 4
    assert results["state"]["head"]["cw"].abs().sum() == 0
    assert (results["state"]["net"]["output.weight"].abs().sum(1) > 0).all()     # no row was set to 0


def test_latents_that_do_not_fit_are_encoded_when_needed(tmp_path):
    a, b = (run(tmp_path / str(gb), batches=3, max_latents_gb=gb, **STEADY) for gb in (4, 1e-6))
    assert torch.allclose(a["state"]["head"]["cw"], b["state"]["head"]["cw"], rtol=1e-3, atol=1e-5)


def test_stopping_saves_the_batch_that_has_ended(tmp_path):
    stop = Stop()
    batches = program.experiment(config(**LATENT), "x", tmp_path, 4, stop=stop)
    next(batches)
    stop.asked = True
    next(batches)
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    assert len(torch.load(tmp_path / "x/run0_seed0/checkpoint.pt", weights_only=True)["rows"]) == 2


# ---- the learner alone ----

@pytest.mark.parametrize("keys", [LATENT, SMALL, LATENT | {"reg_lambda": 0.5}])
def test_a_finished_run_can_be_loaded_and_goes_on_as_in_the_program(tmp_path, keys):
    finished = run(tmp_path, batches=3, **keys)
    learner = program.load_learner(finished["folder"], "cpu")
    x, y = program.open_stream(config(**keys)).get_test_set(keys["test_stride"])
    classes = learner.predict(x)
    assert classes.dtype == torch.int64 and classes.shape == y.shape
    assert (classes.numpy() == y).mean() == finished["rows"][-1]["test_accuracy"]
    assert same(learner.state_dict(), {key: finished["state"][key] for key in learner.state_dict()})    # predict only looks
    learner.learn(*next(iter(program.open_stream(config(**keys), done=3))))
    continued = run(tmp_path, batches=4, **keys)
    assert torch.equal(learner.net.output.weight, continued["state"]["net"]["output.weight"])
    assert same(learner.state_dict(), {key: continued["state"][key] for key in learner.state_dict()})
    assert (learner.predict(x).numpy() == y).mean() == continued["rows"][-1]["test_accuracy"]


def test_what_is_no_run_or_of_another_version_cannot_be_loaded(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint.pt: name the folder of a run"):
        program.load_learner(tmp_path)
    file = run(tmp_path, batches=1, **LATENT)["folder"] / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "image_size"}, file)
    with pytest.raises(CheckpointError, match="made by an older version of this program: continue the run by one batch"):
        program.load_learner(file.parent)
    torch.save(state | {"config": state["config"] | {"rm_zs": 5}}, file)
    with pytest.raises(CheckpointError, match="checkpoint.pt was made by another version of this program .*rm_zs"):
        program.load_learner(file.parent)


def test_a_learner_built_by_hand_is_that_of_the_configuration():
    torch.manual_seed(0)
    net = MobileNetV1(10, "conv3_2/dw", width=0.1)
    first = program.Phase(0.05, 2, dict(momentum=0.1, max_r_max=1.25, max_d_max=0.5, inc_step=4.1e-5))
    later = program.Phase(0.01, 2, dict(momentum=0.01, r_max=1.25, d_max=0.5, inc_step=0.0))
    by_hand = program.Learner(net, CWRHead(net.output, "per_pattern"), ReplayMemory(60, like=net.example_latent(48)),
                              first=first, later=later, mb_size=32)
    configured = build(**LATENT)
    for (x, y), _ in zip(DemoStream(0), range(4)):
        for learner in (by_hand, configured):
            learner.learn(x, y)
        assert torch.equal(by_hand.net.output.weight, configured.net.output.weight)
        assert torch.equal(by_hand.head.cw, configured.head.cw) and by_hand.head.cw.abs().sum() > 0
    assert same(by_hand.state_dict(), configured.state_dict()) and by_hand.batches == 4
    by_hand.check_frozen()


@pytest.mark.parametrize("keys", [LATENT, SMALL])
def test_loading_a_state_brings_its_frozen_layers_back(keys):
    """Into a learner whose own were others, and which has encoded the test images with them already."""
    stream, learned, other = DemoStream(0), build(**keys), build(**keys | {"seed": 1})
    for (x, y), _ in zip(stream, range(2)):
        learned.learn(x, y)
    x, y = stream.get_test_set(keys["test_stride"])
    test = fast.TestSet(x, y)
    assert test(other)["loss"] != fast.TestSet(x, y)(learned)["loss"]
    mine, theirs = learned.net.state_dict(), other.net.state_dict()
    convolutions = [key for key in mine if key.startswith("lat_features") and key.endswith(".0.weight")]
    assert convolutions and not any(torch.equal(mine[key], theirs[key]) for key in convolutions)
    state = copy.deepcopy(learned.state_dict())
    other.load_state_dict(state)
    assert same(other.net.state_dict(), learned.net.state_dict()) and same(other.state_dict(), state)
    assert torch.equal(other.encoder(x), learned.encoder(x))
    assert torch.equal(other.predict(x), learned.predict(x)) and same(test(other), fast.TestSet(x, y)(learned))
    other.check_frozen()


# ---- real photographs and weights ----

@pytest.fixture(scope="module")
def photographs(standin_weights, tmp_path_factory):
    """Folder of the stand-in photographs, 4 frames a unit."""
    folder = tmp_path_factory.mktemp("photographs")
    maker = standin_weights.parent / "make_standin.py"
    subprocess.run([sys.executable, maker, folder, "--frames", "4"], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name, keys", [
    ("standin_79", {}), ("standin_391", {}), ("standin_79", {"reg_lambda": 1.0}), ("pool6", {"scenario": "nicv2_79"}),
    ("cwr_star", {"scenario": "nicv2_79"}), ("cumulative", {"scenario": "nicv2_79", "patience": 6}),
    ("naive", {"scenario": "nicv2_196"})])
def test_experiments_on_real_photographs(photographs, standin_weights, tmp_path, name, keys):
    """Everything frozen from batch 0 stays bit-equal to the pre-trained network; what trains learns batch 0's objects."""
    keys = keys | dict(data=str(photographs), weights=str(standin_weights), test_stride=50, rm_sz=40, device="cpu",
                       init_train_ep=6, inc_train_ep=1)
    if name in ("naive", "cwr_star", "cumulative"):
        keys["rm_sz"] = 0
    cfg = load_config(name, PARAMS, keys)
    results = program.run_experiment(cfg, name, tmp_path, 2)
    state = torch.load(results["folder"] / "checkpoint.pt", weights_only=True)["net"]
    net = MobileNetV1(50, cfg.latent_layer_num, standin_weights)
    pretrained, first = net.state_dict(), net.layer_number(cfg.freeze_below_layer)
    prefix = {id(p): k for k, p in net.named_parameters()} | {id(b): k for k, b in net.named_buffers()}
    frozen = [prefix[id(t)] for layer in net.layers[:first + 1] for t in (*layer.parameters(), *layer.buffers())]
    assert len(frozen) > 100 and all(torch.equal(state[k], pretrained[k]) for k in frozen)
    assert results["rows"][0]["n_train"] == 40 and results["rows"][0]["classes_seen"] == 10
    # over all 6 epochs; chance is 0.02, and a head that CWR* starts from 0 learns faster than a random one
    assert results["rows"][0]["train_accuracy"] > (0.04 if cfg.cwr_consolidation == "none" else 0.2)
    assert len(results["rows"]) == 2


def test_start_batch_begins_later_in_the_stream(photographs):
    cfg = load_config("standin_79", PARAMS, dict(data=str(photographs), start_batch=77))
    whole, late = CORE50(photographs, scenario="nicv2_79"), program.open_stream(cfg)
    assert len(late) == len(whole) - 77
    assert (next(iter(late))[0] == list(whole)[77][0]).all()
    assert len(program.open_stream(cfg, done=1)) == len(whole) - 78
