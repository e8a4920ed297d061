"""The experiment as a whole, on the demo's stream cut to a few batches and on the stand-in photographs."""
import copy
import json
import math
import shutil
import signal
import sys

import pytest
import torch

import ar1star_lat_replay as program
from core50_files import write_data
from harness import encoder
from harness.checkpoint import CheckpointError
from harness.config import load_config
from helpers import PARAMS, REPO, run_script, same
from models.mobilenet import MobileNetV1
from streams.demo import DemoStream
from tiny import without_seconds
from utils import CWRHead, ReplayMemory

SMALL = dict(width=0.1, init_train_ep=1, inc_train_ep=2, rm_sz=60, mb_size=32, test_stride=10, device="cpu",
             checkpoint_share=1.0)
# the lower layers are frozen from batch 0 on, as in DEFAULT
LATENT = SMALL | dict(freeze_below_layer="conv3_2/dw", inc_freeze_below_layer="conv3_2/dw")
# two computations of the same training stay together only in float32, at a learning rate that does not blow
# up rounding
STEADY = LATENT | dict(init_lr=1e-3, inc_lr=3e-4, matmul_precision="highest")

pytestmark = pytest.mark.usefixtures("drawn_once")


def config(**keys):
    return load_config("demo", PARAMS, keys)


def run(logs, batches=3, **keys):
    """Results of a run, with its checkpoint's learner under "state" and after_batch's calls under "seen"."""
    seen, handlers = [], (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    results = program.run(config(**keys), "x", logs, batches,
                          after_batch=lambda rows, n: seen.append((len(rows), n)))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    state = torch.load(results["folder"] / "checkpoint.pt", weights_only=True)
    learner = {k: v for k, v in state.items() if k not in ("rows", "files")}
    return results | {"state": learner, "seen": seen}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(**keys): the results of a run of three batches, which is made once and only looked at."""
    made = {}

    def once(**keys):
        key = tuple(sorted(keys.items()))
        if key not in made:
            made[key] = run(tmp_path_factory.mktemp("runs"), **keys)
        return made[key]
    return once


def build(**keys):
    """The learner of such a run, before it has learned anything."""
    return program.build_learner(config(**keys), 10, (48, 48), torch.device("cpu"))


def gap(one, other, *path):
    """How far a tensor of two runs' states is apart, as a share of its norm."""
    for key in path:
        one, other = one[key], other[key]
    return ((one - other).norm() / other.norm()).item()


def test_rows_hold_what_a_reader_needs(finished):
    results = finished(**LATENT)
    lines = (results["folder"] / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows == results["rows"] and [row["batch"] for row in rows] == [0, 1, 2]
    assert {"test_accuracy", "test_loss", "train_accuracy", "train_loss", "classes_seen", "seconds_train",
            "seconds_test"} <= rows[0].keys()
    assert [row["n_train"] for row in rows] == [180, 36, 36]
    assert [row["memory_size"] for row in rows] == [60] * 3
    # batch 0: 6 mini-batches of 32; then 2 epochs of (36 + 60) // 32 = 3 of 12 new images
    assert [row["train_steps"] for row in rows] == [6, 12, 18]
    assert results["final_accuracy"] == rows[-1]["test_accuracy"]
    assert results["mean_accuracy"] == pytest.approx(sum(row["test_accuracy"] for row in rows) / 3)
    assert results["seen"] == [(1, 3), (2, 3), (3, 3)]      # after_batch, once a batch


def test_another_seed_gives_another_run(finished):
    one, other = (run["state"]["head"]["cw"] for run in (finished(**LATENT), finished(seed=3, **LATENT)))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("keys", [LATENT, SMALL, LATENT | {"reg_lambda": 0.5}, LATENT | {"rm_sz": 0}])
def test_a_continued_run_ends_as_an_uninterrupted_one_and_is_not_run_again(tmp_path, finished, keys):
    whole = finished(**keys)
    for batches in (1, 2, 3):       # interrupted after batch 0 and after batch 1
        parts = run(tmp_path, batches, **keys)
    assert without_seconds(whole["rows"]) == without_seconds(parts["rows"])
    assert same(whole["state"], parts["state"])
    again = run(tmp_path, **keys)
    assert again["rows"] == parts["rows"] and again["seen"] == []       # with the seconds of the first run


@pytest.mark.parametrize("keys", [{}, {"reg_lambda": 1.0}, {"cwr_consolidation": "per_class"}])
def test_the_simple_path_gives_the_same_results(finished, keys):
    """fast: false evaluates the formula of BRN and encodes every image anew; only rounding may differ."""
    fast, simple = (finished(**STEADY | keys | {"fast": fast}) for fast in (True, False))
    assert gap(fast["state"], simple["state"], "net", "output.weight") < 1e-4
    assert [row["test_accuracy"] for row in fast["rows"]] == [row["test_accuracy"] for row in simple["rows"]]
    mine, theirs = fast["state"]["memory"], simple["state"]["memory"]
    assert torch.equal(mine["y"], theirs["y"])
    assert torch.allclose(mine["x"], theirs["x"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keys", [
    {"matmul_precision": "medium"}, {"matmul_precision": "low"}, {"precision": "bf16"}])
def test_rounding_to_bfloat16_stays_near_float32(keys, finished, monkeypatch):
    """Where the CPU has units for bfloat16, medium may round, elsewhere its runs are the same; the others do.

    The stored latents are the same in any case: encoding is exact.
    """
    monkeypatch.setattr(encoder, "cpu_multiplies_bfloat16", lambda: True)     # or low, bf16 would not be used
    rounded, exact = finished(**STEADY | keys), finished(**STEADY | {"fast": True})
    assert keys.items() <= rounded["rows"][0].items()
    assert gap(rounded["state"], exact["state"], "net", "output.weight") < 0.1
    for mine, theirs in zip(rounded["rows"], exact["rows"]):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.02)
        assert mine["test_accuracy"] == pytest.approx(theirs["test_accuracy"], abs=0.05)
    assert torch.equal(rounded["state"]["memory"]["x"], exact["state"]["memory"]["x"])
    assert {value.dtype for value in rounded["state"]["net"].values()} == {torch.float32}


def test_replaying_images_through_frozen_layers_is_latent_replay(finished):
    """What Latent Replay rests on: while lower layers are frozen, stored latents stand for stored images."""
    latent = finished(**STEADY | {"fast": True})["state"]
    native = finished(**STEADY | {"latent_layer_num": "images"})["state"]
    assert native["memory"]["x"].shape[1:] == (3, 48, 48)
    assert gap(latent, native, "head", "cw") < 1e-4
    assert torch.equal(latent["memory"]["y"], native["memory"]["y"])


def test_latents_that_do_not_fit_are_encoded_when_needed(finished):
    kept = finished(**STEADY | {"fast": True})["state"]
    on_demand = finished(**STEADY | {"max_latents_gb": 1e-6})["state"]
    assert torch.allclose(kept["head"]["cw"], on_demand["head"]["cw"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("keys", [{"reg_lambda": 0.5}, {"reg_lambda": 1e4, "reg_clip_negative": True}, {}])
def test_frozen_layers_never_move_and_the_others_do(finished, keys):
    results = finished(**LATENT | keys)
    state = results["state"]["net"]
    torch.manual_seed(0)
    fresh = MobileNetV1(10, "conv3_2/dw", width=0.1).state_dict()
    frozen = [k for k in state if k.startswith("lat_features") and "num_batches" not in k]
    assert frozen and all(torch.equal(state[k], fresh[k]) for k in frozen)
    moved = [k for k in state if k.startswith("end_features") and k.endswith("weight")]
    assert moved and not any(torch.equal(state[k], fresh[k]) for k in moved)
    assert all(math.isfinite(row["train_loss"]) for row in results["rows"])


def test_check_frozen_notices_a_change():
    learner = build(**LATENT)
    learner.check_frozen()
    learner.net.lat_features[0][1].running_mean[0] += 1e-6
    with pytest.raises(AssertionError, match="running_mean"):
        learner.check_frozen()


def test_making_a_learner_leaves_the_statistics_of_learning_layers_alone():
    state = build(**SMALL).net.state_dict()
    torch.manual_seed(0)
    fresh = MobileNetV1(10, "conv3_2/dw", width=0.1).state_dict()
    averages = [k for k in fresh if "running" in k or k.endswith(("r_max", "d_max"))]
    assert len(averages) == 4 * 27 and all(torch.equal(state[k], fresh[k]) for k in averages)


def test_cwr_star_moves_nothing_below_the_head_after_batch_0(tmp_path):
    keys = LATENT | dict(rm_sz=0, latent_layer_num="pool6", inc_freeze_below_layer="pool6",
                         cwr_consolidation="per_class")
    first, later = (run(tmp_path, batches, **keys)["state"] for batches in (1, 3))
    below = [k for k in first["net"] if not k.startswith("output")]
    assert all(torch.equal(first["net"][k], later["net"][k]) for k in below)
    assert not torch.equal(first["head"]["cw"], later["head"]["cw"])


def test_naive_fine_tuning_has_no_memory_and_an_untouched_head(finished):
    results = finished(**LATENT | dict(rm_sz=0, cwr_consolidation="none"))
    assert [row["memory_size"] for row in results["rows"]] == [0] * 3
    assert results["state"]["head"]["cw"].abs().sum() == 0
    assert (results["state"]["net"]["output.weight"].abs().sum(1) > 0).all()     # no row was set to 0


# ---- the road ----

def test_from_the_command_to_the_loss_it_is_at_most_seven_calls(command, monkeypatch):
    """The functions of this repository that are running when the first loss of training is computed."""
    roads = []
    cross_entropy = torch.nn.functional.cross_entropy

    def looking(*args, **kwargs):
        frame, road = sys._getframe(1), []
        while frame.f_code is not program.main.__code__:
            road.append(frame.f_code)
            frame = frame.f_back
        roads.append([code.co_name for code in road[::-1] if code.co_filename.startswith(str(REPO))])
        return cross_entropy(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", looking)
    assert program.main([*command[:-1], "1"]) == 0
    assert roads[0] == ["run_and_print", "run", "learn", "train_batch", "train_step"]     # called from main


def test_the_published_experiment_imports_no_variant_and_no_other_stream(tmp_path):
    """DEFAULT, on a few images in CORe50's layout."""
    write_data(tmp_path / "core50")
    small = ["weights=none", "width=0.1", "rm_sz=10", "mb_size=4", "init_train_ep=1", "test_stride=1",
             "device=cpu"]
    code = "import sys, ar1star_lat_replay; print(ar1star_lat_replay.main(), *sys.modules)"
    _, told, errors = run_script(["-c", code, "--data", str(tmp_path / "core50"), "--max-batches", "2",
                                  "--log-dir", str(tmp_path / "logs"), *(f"--set={word}" for word in small)])
    status, *modules = told.splitlines()[-1].split()
    assert status == "0" and "batch 2 of 2" in errors, errors
    assert {"utils", "models.mobilenet", "harness.encoder", "harness.checkpoint"} <= set(modules)
    others = {"methods", "streams", "harness.variants", "harness.gpu", "harness.torchrun", "harness.data_cli",
              "models.torchvision_nets"}
    assert not [module for module in modules if any(f"{module}.".startswith(f"{other}.") for other in others)]


def test_a_continued_run_opens_its_data_once(tmp_path, monkeypatch):
    """Reading CORe50's index takes seconds, and with `preload` all frames are read when it is opened."""
    run(tmp_path, 1, **LATENT)
    opened = []
    original = program.open_stream
    monkeypatch.setattr(program, "open_stream", lambda config: opened.append(config) or original(config))
    assert len(run(tmp_path, 2, **LATENT)["rows"]) == 2 and len(opened) == 1


# ---- the learner alone ----

@pytest.mark.parametrize("keys", [LATENT, SMALL, LATENT | {"reg_lambda": 0.5}])
def test_a_finished_run_can_be_loaded_and_goes_on_as_in_the_program(tmp_path, finished, keys):
    done = finished(**keys)
    learner = program.load_learner(done["folder"], "cpu")
    x, y = program.open_stream(config(**keys)).get_test_set(keys["test_stride"])
    classes = learner.predict(x)
    assert classes.dtype == torch.int64 and classes.shape == y.shape
    assert (classes.numpy() == y).mean() == done["rows"][-1]["test_accuracy"]
    scores = learner.scores(x)
    assert scores.shape == (len(y), 10) and torch.equal(scores.argmax(1), classes)
    loss = torch.nn.functional.cross_entropy(scores.double(), torch.as_tensor(y)).item()
    assert loss == pytest.approx(done["rows"][-1]["test_loss"], abs=1e-5)
    assert learner.class_names == DemoStream(0).class_names and learner.image_size == 48
    mine = learner.state_dict()
    assert same(mine, {key: done["state"][key] for key in mine})      # these only look

    learner.learn(*next(iter(program.open_stream(config(start_batch=3, **keys)))))
    shutil.copytree(done["folder"].parents[1], tmp_path, dirs_exist_ok=True)
    continued = run(tmp_path, 4, **keys)
    mine = learner.state_dict()
    assert same(mine, {key: continued["state"][key] for key in mine})
    assert (learner.predict(x).numpy() == y).mean() == continued["rows"][-1]["test_accuracy"]


def test_what_is_no_run_or_of_another_version_cannot_be_loaded(tmp_path, finished):
    with pytest.raises(CheckpointError, match="holds no checkpoint.pt: name the folder of a run"):
        program.load_learner(tmp_path)
    state = torch.load(finished(**LATENT)["folder"] / "checkpoint.pt", weights_only=True)
    torch.save(state | {"config": state["config"] | {"rm_zs": 5}}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="checkpoint.pt .*another version of this program .*rm_zs"):
        program.load_learner(tmp_path)


def test_a_learner_built_by_hand_is_that_of_the_configuration():
    torch.manual_seed(0)
    net = MobileNetV1(10, "conv3_2/dw", width=0.1)
    first = program.Phase(0.05, 1, dict(momentum=0.1, max_r_max=1.25, max_d_max=0.5, inc_step=4.1e-5))
    later = program.Phase(0.01, 2, dict(momentum=0.01, r_max=1.25, d_max=0.5, inc_step=0.0))
    head, memory = CWRHead(net.output, "per_pattern"), ReplayMemory(60, like=net.example_latent(48))
    by_hand = program.Learner(net, head, memory, first=first, later=later, mb_size=32)
    configured = build(**LATENT)
    for (x, y), _ in zip(DemoStream(0), range(3)):
        for learner in (by_hand, configured):
            learner.learn(x, y)
        assert torch.equal(by_hand.net.output.weight, configured.net.output.weight)
        assert torch.equal(by_hand.head.cw, configured.head.cw) and by_hand.head.cw.abs().sum() > 0
    assert same(by_hand.state_dict(), configured.state_dict()) and by_hand.batches == 3
    by_hand.check_frozen()


@pytest.mark.parametrize("keys", [LATENT, SMALL])
def test_loading_a_state_brings_its_frozen_layers_back(keys):
    """Into a learner whose own were others, and which has encoded the test images with them already."""
    stream, learned, other = DemoStream(0), build(**keys), build(**keys | {"seed": 1})
    for (x, y), _ in zip(stream, range(2)):
        learned.learn(x, y)
    x, y = stream.get_test_set(keys["test_stride"])
    test = encoder.TestSet(x, y)
    assert test.evaluate(other)["loss"] != encoder.TestSet(x, y).evaluate(learned)["loss"]
    mine, theirs = learned.net.state_dict(), other.net.state_dict()
    convolutions = [key for key in mine if key.startswith("lat_features") and key.endswith(".0.weight")]
    assert convolutions and not any(torch.equal(mine[key], theirs[key]) for key in convolutions)

    state = copy.deepcopy(learned.state_dict())
    other.load_state_dict(state)
    assert same(other.net.state_dict(), learned.net.state_dict()) and same(other.state_dict(), state)
    assert torch.equal(other.encoder(x), learned.encoder(x))
    assert torch.equal(other.predict(x), learned.predict(x))
    assert same(test.evaluate(other), encoder.TestSet(x, y).evaluate(learned))
    other.check_frozen()


# ---- real photographs and weights ----

@pytest.mark.parametrize("name, keys", [
    ("standin_79", {}), ("standin_391", {}), ("standin_79", {"reg_lambda": 1.0}),
    ("pool6", {"scenario": "nicv2_79"}), ("cwr_star", {"scenario": "nicv2_79"}),
    ("cumulative", {"scenario": "nicv2_79", "patience": 6}), ("naive", {"scenario": "nicv2_196"})])
def test_experiments_on_real_photographs(standin, standin_weights, tmp_path, name, keys):
    """Everything frozen from batch 0 stays bit-equal to the pre-trained network; the rest learns."""
    keys = keys | dict(data=str(standin["npz"]), weights=str(standin_weights), test_stride=50, rm_sz=20,
                       mb_size=20, device="cpu", init_train_ep=6, inc_train_ep=1)
    if name in ("naive", "cwr_star", "cumulative"):
        keys["rm_sz"] = 0
    cfg = load_config(name, PARAMS, keys)
    results = program.run(cfg, name, tmp_path, 2)
    state = torch.load(results["folder"] / "checkpoint.pt", weights_only=True)["net"]

    net = MobileNetV1(50, cfg.latent_layer_num, standin_weights)
    names = {id(t): key for key, t in (*net.named_parameters(), *net.named_buffers())}
    layers = net.layers[:net.layer_number(cfg.freeze_below_layer) + 1]
    frozen = {names[id(t)]: t for layer in layers for t in (*layer.parameters(), *layer.buffers())}
    assert len(frozen) > 100 and all(torch.equal(state[key], t) for key, t in frozen.items())

    first = results["rows"][0]
    assert first["n_train"] == 20 and first["classes_seen"] == 10 and len(results["rows"]) == 2
    # over all 6 epochs; chance is 0.02, and a head that CWR* starts from 0 learns faster than a random one
    assert first["train_accuracy"] > (0.04 if cfg.cwr_consolidation == "none" else 0.2)
