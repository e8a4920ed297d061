"""What a run writes for TensorBoard, read back with its own reader, against its rows and numbers by hand."""
import io
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import ar1star_lat_replay as script
from harness import tensorboard
from harness.checkpoint import RunFolder, run_path
from harness.config import load_config
from harness.records import forgetting
from helpers import PARAMS
from models.batch_renorm import BatchRenorm2D, brn_layers
from utils import CWRHead, ReplayMemory

TINY = dict(width=0.1, init_train_ep=1, inc_train_ep=1, test_stride=8, rm_sz=40, checkpoint_share=1.0)
PER_BATCH = {"test_loss", "test_accuracy", "accuracy/classes_met", "accuracy/forgetting", "memory/patterns",
             "memory/age", "head/norm_batch", "head/bias", "seconds/read", "seconds/encode", "seconds/train",
             "seconds/test", "brn/r", "brn/d"}
FINAL = {"final/accuracy", "final/accuracy_mean", "final/minutes", "final/forgetting"}
PICTURES = {"classes/accuracy", "classes/confusion", "classes/head_norm", "memory/patterns_per_class",
            "images/batch"}


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def image(event):
    return np.array(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))


# ---- a run, interrupted and continued ----

class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def run(drawn_once, tmp_path_factory):
    """(folder, rows, events) of the demo's last 5 batches in native replay, killed before its third save."""
    config = load_config("demo", PARAMS, TINY | {
        "latent_layer_num": "images", "inc_freeze_below_layer": "images", "start_batch": 41})
    logs = tmp_path_factory.mktemp("logs")
    save = RunFolder.save

    def die_at_the_third(folder, state, **options):
        if len(state["rows"]) == 3:
            raise Killed
        save(folder, state, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "save", die_at_the_third)
        script.run(config, "demo", logs)
    assert max(e.step for e in events(run_path(config, "demo", logs)).Scalars("test_loss")) == 2
    results = script.run(config, "demo", logs)
    return results["folder"], results["rows"], events(results["folder"])


def test_scalars_of_a_resumed_run_equal_its_rows(run):
    folder, rows, seen = run
    assert rows == [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for tag, key in (("test_loss", "test_loss"), ("test_accuracy", "test_accuracy"),
                     ("accuracy/forgetting", "forgetting"), ("accuracy/classes_met", "accuracy_seen"),
                     ("memory/patterns", "memory_size"), ("seconds/read", "seconds_read"),
                     ("seconds/encode", "seconds_encode"), ("seconds/train", "seconds_train"),
                     ("seconds/test", "seconds_test")):
        points = [(e.step, e.value) for e in seen.Scalars(tag)]
        assert points == [(row["batch"], pytest.approx(row[key], rel=1e-6)) for row in rows], tag
    first = rows[0]["train_steps"]
    for tag in ("train_loss", "train_accuracy"):
        points = seen.Scalars(tag)
        assert [e.step for e in points] == list(range(rows[-1]["train_steps"])), tag
        assert min(e.value for e in points[:first]) <= rows[0][tag] <= max(e.value for e in points[:first])
    expected = PER_BATCH | FINAL | {"train_loss", "train_accuracy", "head/norm_earlier"}
    assert set(seen.Tags()["scalars"]) == expected
    assert all([e.step for e in seen.Scalars(tag)] == [0, 1, 2, 3, 4] for tag in PER_BATCH)


def test_pictures_of_a_resumed_run(run):
    seen = run[2]
    assert set(seen.Tags()["images"]) == PICTURES | {"images/memory"}
    for tag in seen.Tags()["images"]:
        points = seen.Images(tag)
        assert [e.step for e in points] == [0, 1, 2, 3, 4], tag         # 5 batches: each gets its pictures
        assert all(image(e).shape == (e.height, e.width, 3) for e in points)
        assert sum(len(e.encoded_image_string) for e in points) < 5 * 40_000
    assert image(seen.Images("images/memory")[-1]).std() > 20           # photographs, not flat or clipped


def test_rows_carry_what_the_report_and_the_pictures_need(run):
    met = set()
    for row in run[1]:
        met |= set(row["classes"])
        assert len(row["per_class"]) == 10 and row["classes_seen"] == len(met) and row["batches"] == 5
        assert row["n_test"] == 50 and row["device"].startswith("cpu, ")        # 5 test images a class
        assert row["test_accuracy"] == pytest.approx(np.mean(row["per_class"]), abs=1e-3)
        assert row["accuracy_seen"] == pytest.approx(np.mean([row["per_class"][c] for c in met]), abs=1e-3)


def test_hparams_lie_in_the_folder_of_the_run(run):
    folder, rows, seen = run
    assert not [path for path in folder.rglob("*") if path.is_dir()]
    content = seen.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    assert set(start) == {"cwr_consolidation", "inc_lr", "latent_layer_num", "reg_lambda", "rm_sz", "run",
                          "seed"}
    assert start["rm_sz"].number_value == 40 and start["latent_layer_num"].string_value == "images"
    metrics = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == FINAL and "_hparams_/session_end_info" in content
    (final,) = seen.Scalars("final/accuracy_mean")
    assert final.step == 4 and final.value == pytest.approx(np.mean([row["test_accuracy"] for row in rows]))


def test_charts_that_belong_together(run):
    stored = run[2].Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(stored)
    charts = [list(chart.multiline.tag) for category in layout.category for chart in category.chart]
    assert charts[:2] == [["test_accuracy", "accuracy/classes_met"], ["accuracy/forgetting"]]
    tags = run[2].Tags()["scalars"]
    assert min(tags).startswith("accuracy/") and all(tag in tags for chart in charts for tag in chart)


def test_parameters_leave_out_what_means_nothing(run):
    text = run[2].Tensors("parameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "rm_sz: 40" in text and "start_batch: 41" in text
    assert not any(f"    {key}:" in text for key in ("scenario", "data", "preload", "download", "image_size"))


def test_naive_beside_the_demo_is_another_experiment_and_says_so(monkeypatch):
    seen = {}

    def fake(config, name, **_):
        seen[name] = config
        return {"rows": [{"test_accuracy": .5, "n_test": 5}], "final_accuracy": .5}

    monkeypatch.setattr(script, "run", fake)
    demo = load_config("demo", PARAMS)
    script.run_demo(demo, "demo", {"log_dir": "logs"})
    assert seen["demo"] == demo and "AR1*free with latent replay" in demo.comment
    naive = seen["demo_naive"]
    assert naive.rm_sz == 0 and "fine-tuning without replay" in naive.comment and "AR1*" not in naive.comment


# ---- curves ----

def test_forgetting_by_hand():
    rows = [{"classes": [0, 1], "per_class": [.8, .4, .9, None]},   # classes 2 and 3 are not met yet
            {"classes": [2], "per_class": [.5, .6, .7, None]},      # 0: .8 -> .5; 1 and 2 are at their best
            {"classes": [3], "per_class": [.6, .1, .9, None]}]      # 0: .8 -> .6; 1: .6 -> .1; 3: not tested
    assert forgetting(rows[:1]) == 0 and forgetting(rows[:2]) == pytest.approx(.3 / 3)
    assert forgetting(rows) == pytest.approx((.2 + .5 + 0) / 3)
    assert forgetting([{"classes": [3], "per_class": [.1, .1, .1, None]}]) is None


def test_head_norms():
    head = CWRHead(nn.Linear(2, 4, bias=False))
    head.linear.weight.data = torch.tensor([[3., 4.], [0., 1.], [0., 3.], [9., 9.]])
    head.past_j = torch.tensor([2, 1, 1, 0])
    norms = tensorboard.head_norms(head, [0])   # of this batch: 5; met before: 1 and 3; not met yet: left out
    assert norms == pytest.approx({"head/norm_batch": 5, "head/norm_earlier": 2})
    assert tensorboard.head_norms(head, [0, 1, 2]) == pytest.approx({"head/norm_batch": 3})


def test_bias_towards_the_classes_of_the_batch():
    confusion = torch.tensor([[2, 0, 3], [1, 1, 3], [0, 0, 5]])        # (true, predicted), 5 images a class
    assert tensorboard.bias(confusion, [2]) == {"head/bias": 11 / 5}
    assert tensorboard.bias(confusion, [0, 1]) == {"head/bias": 4 / 10}
    assert tensorboard.bias(torch.tensor([[4, 1], [0, 0]]), [1]) == {"head/bias": None}


def test_brn_corrections():
    brns = [BatchRenorm2D(2), BatchRenorm2D(1), BatchRenorm2D(1).eval(), BatchRenorm2D(1)]
    assert tensorboard.brn_corrections(brns) == {}
    for brn, r, d in zip(brns, ([1., 2.], [3.], [99.]), ([.5, -.5], [-2.], [99.]), strict=False):
        brn.last = torch.tensor(r), torch.tensor(d)
    assert tensorboard.brn_corrections(brns) == pytest.approx({"brn/r": 2, "brn/d": 1})


@pytest.mark.parametrize("fused", [True, False])
def test_brn_keeps_r_and_d_of_the_last_step(fused):
    torch.manual_seed(0)
    net = nn.Sequential(BatchRenorm2D(3, r_max=2., d_max=1., fused=fused))
    x = torch.randn(8, 3, 4, 4) * 1.5 + .5
    net(x)
    r = (x.var((0, 2, 3), correction=0) + 1e-5).sqrt()      # the running std is 1,
    d = x.mean((0, 2, 3))                                   # the running mean 0
    assert tensorboard.brn_corrections(brn_layers(net)) == pytest.approx(
        {"brn/r": r.mean().item(), "brn/d": d.abs().mean().item()}, rel=1e-4)


# ---- pictures ----

@pytest.mark.parametrize("batches", [1, 2, 5, 8, 9, 10, 46, 79, 196, 391])
def test_pictures_are_due_at_most_ten_times_and_at_both_ends(batches):
    due = [i for i in range(batches) if tensorboard.picture_due(i, batches)]
    assert due[0] == 0 and due[-1] == batches - 1 and min(batches, 6) <= len(due) <= tensorboard.PICTURES


def test_accuracy_history():
    rows = [{"batch": 0, "classes": [1], "per_class": [.1, .2, None]},
            {"batch": 2, "classes": [2, 0], "per_class": [.3, .4, None]}]
    nan = np.nan
    expected = [[nan, nan, .3, nan], [.2, nan, .4, nan], [nan] * 4]
    assert np.array_equal(tensorboard.accuracy_history(rows, 4), expected, equal_nan=True)


def test_heat_map_colours():
    framed = np.array(tensorboard.heat_map(np.array([[0, 1.], [.5, np.nan]]), "title"))
    top, left, _ = np.argwhere((framed == (68, 1, 84)).all(-1, keepdims=True))[0]
    seen = framed[[top + 40, top + 120]][:, [left + 80, left + 240]].tolist()
    assert top == 34 and seen == [[[68, 1, 84], [253, 231, 37]], [[33, 145, 140], [238, 238, 238]]]


def test_a_heat_map_of_more_columns_than_pixels_shows_the_first_and_the_last():
    ends = np.arange(1000)[None] % 999 == 0         # 1 at both ends, 0 between
    row = np.array(tensorboard.heat_map(ends, "t"))[tensorboard.ABOVE + 80]
    first, last = np.flatnonzero((row == (253, 231, 37)).all(-1))
    assert last == 347 and (row[first + 1:last] == (68, 1, 84)).all()


def test_class_names_stand_beside_their_rows():
    names = ["cup", "wide name", ""]
    high = 164 // len(names)

    def begins(chart, k):       # pixels left of the text of row k; NaN is light grey, so only text is dark
        beside = np.array(chart)[34 + k * high:34 + (k + 1) * high, :100]
        return np.flatnonzero((beside < 128).all(-1).any(0)).min(initial=100)

    named, plain = (tensorboard.heat_map(np.full((3, 5), np.nan), "t", n) for n in (names, None))
    cup, wide, none = (begins(named, k) for k in range(3))
    assert wide < 12 and wide < cup < none                      # all end side by side: the widest is first
    assert max(begins(plain, k) for k in range(3)) < 12         # as numbers do
    for chart in (lambda k, names: tensorboard.heat_map(np.zeros((k, 5)), "t", names),
                  lambda k, names: tensorboard.bar_chart(np.zeros(k), [], "t", names)):
        assert chart(51, ["cup"] * 51).tobytes() == chart(51, None).tobytes()       # too many to be legible
        assert chart(50, ["cup"] * 50).height == 34 + 50 * 13 + 17                  # a line of text each


@pytest.mark.parametrize(("name", "label"), [
    ("cup", "7 cup"), ("", "7"), ("Äpfel", "7 Apfel"), ("\u5317\u4eac", "7 ??"), ("a\nb\t\udcff", "7 a?b??"),
    ("W" * 40, "7 WWWWWWWW…")])
def test_labels_have_letters_that_the_font_has(name, label):
    seen = tensorboard._label(7, name)
    assert seen.rstrip("W…") == label.rstrip("W…") and ("…" in seen) == ("…" in label)
    assert tensorboard._font().getlength(seen) <= tensorboard.NAME
    tensorboard.heat_map(np.zeros((1, 1)), "t", [name])


@pytest.mark.parametrize("classes", [1, 2, 10, 50, 300])
def test_charts_of_any_number_of_classes(classes):
    """TensorBoard shows pictures 350 pixels wide (IMAGES) or 215 high (TIME SERIES); others lose pixels."""
    high = 215 if classes < 300 else 34 + 300 + 17      # title, a pixel each, numbers
    names = [f"class {k}" for k in range(classes)] if classes < 13 else None
    for batches in (1, 391):
        assert tensorboard.heat_map(np.zeros((classes, batches)), "t", names).size == (350, high)
    assert tensorboard.bar_chart(np.zeros(classes), [], "t", names).size == (350, high)
    assert tensorboard.photo_grid(torch.zeros(min(classes, 18), 3, 9, 7), "t").size == (350, 215)

    chart = np.array(tensorboard.bar_chart(np.arange(classes), [classes - 1], "t"))
    high = max(1, 164 // classes)
    rows = [34 + k * high + (high > 4) for k in range(classes)]
    orange, blue = ((chart[rows] == colour).all(-1).sum(1) for colour in ((230, 120, 20), (59, 82, 139)))
    assert (orange > 0).tolist() == [classes > 1 and k == classes - 1 for k in range(classes)]
    assert blue[0] == 0 and (np.diff(blue[:-1]) >= 0).all()          # 0, 1, 2, ...: each as long or longer


# ---- cost ----

def test_cost_of_a_batch(tmp_path):
    """CPU seconds for the default shapes: 56 steps, 50 classes, 391 batches, of which 10 get pictures."""
    writer = SummaryWriter(tmp_path)
    head = CWRHead(nn.Linear(1024, 50, bias=False))
    memory = ReplayMemory(1500, torch.zeros(1, 1))
    memory.update(torch.zeros(1500, 1), torch.arange(1500) % 50, 0)
    brns = [BatchRenorm2D(512) for _ in range(8)]
    for brn in brns:
        brn.last = torch.ones(512), torch.zeros(512)
    images = np.random.default_rng(0).integers(0, 255, (300, 128, 128, 3), np.uint8)
    confusion = torch.ones(50, 50).long()
    row = {"test_loss": 1., "test_accuracy": .5, "accuracy_seen": .5, "per_class": [.5] * 50, "classes": [3]}
    rows = [row | {"batch": i} for i in range(391)]

    start = time.process_time()
    for _ in range(30):
        tensorboard.write_steps(writer, 0, [.5] * 56, [.5] * 56)
        tensorboard.write_batch(writer, rows[-1], confusion, head, memory, brns)
    curves = (time.process_time() - start) / 30
    tensorboard.write_pictures(writer, rows, 391, confusion, head, memory, images)
    writer.close()
    pictures = time.process_time() - start - 30 * curves
    each = curves + pictures * tensorboard.PICTURES / 391
    print(f"\nTensorBoard: {1e3 * each:.2f} ms a batch")
    assert each < .02       # measured: 3 ms; a batch takes over 5 s on a CPU


def test_without_a_memory_there_is_nothing_of_it(tmp_path):
    """And each function works on any objects with the few attributes that it names."""
    writer = SummaryWriter(tmp_path)
    head = SimpleNamespace(linear=nn.Linear(2, 3, bias=False), past_j=torch.tensor([1, 0, 0]))
    memory = ReplayMemory(0, torch.zeros(1, 4))
    row = {"batch": 0, "test_loss": 1., "test_accuracy": .5, "accuracy_seen": .5, "per_class": [.5, None, 0.],
           "classes": [0]}
    confusion, images = torch.zeros(3, 3).long(), np.zeros((2, 40, 50, 3), np.uint8)
    tensorboard.write_batch(writer, row, confusion, head, memory, [])
    tensorboard.write_pictures(writer, [row], 1, confusion, head, memory, images)
    writer.close()
    tags = events(tmp_path).Tags()
    assert "test_loss" in tags["scalars"] and not [tag for tag in tags["scalars"] if "memory" in tag]
    assert set(tags["images"]) == PICTURES - {"memory/patterns_per_class"}


def test_records_of_more_and_more_classes_are_one_history():
    rows = [{"batch": 0, "classes": [0], "per_class": [.5, None]},
            {"batch": 1, "classes": [2], "per_class": [.25, 0., .75, 0.]},
            {"batch": 2, "classes": [0], "per_class": [1., 0., .5]}]
    history = tensorboard.accuracy_history(rows, 4)
    nan = float("nan")
    np.testing.assert_array_equal(history, [[.5, .25, 1, nan], [nan] * 4, [nan, .75, .5, nan]])
