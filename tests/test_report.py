"""The report on log folders that the test writes: numbers worked out by hand, and folders with damage."""
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from ar1star_lat_replay import main
from harness import published as published_module
from harness.cli import parse_runs
from harness.config import ConfigError, load_config
from harness.published import BATCHES, CURVES, RESULTS, curve, published
from harness.report import ReportError, Run, find_runs, group, ranges, read_rows, report, table
from helpers import PARAMS, make_run


def lines_of(log_dir):
    """{experiment: {column: cell}} of the report's table."""
    runs, _ = find_runs(log_dir)
    header, lines, _ = table(group([run for run in runs if run.finished], log_dir)[0])
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


# ---- numbers ----

def test_every_number_of_a_row(tmp_path):
    make_run(tmp_path / "ours", [.1, .2, .3, .4], seed=0, last={
        "forgetting": .25, "per_class": [.5, None, .3, 1.0], "kept_mb": 200.0, "seconds_test": 15.0})
    make_run(tmp_path / "ours", [.1, .4, .3, .6], seed=1, run=2, last={
        "forgetting": .05, "per_class": [.7, .9], "kept_mb": 201.0})
    assert lines_of(tmp_path)["ours"] == {
        "experiment": "ours", "runs": "2", "orders": "0, 2", "seeds": "0-1", "batches": "4",
        "test images": "100",
        "final accuracy %": "50.0 +- 14.1 over orders",               # std: sqrt((10^2 + 10^2) / 1)
        "mean of last 10 tests %": "30.0 +- 7.1 over orders",         # there are four: of 25 and 35
        "mean of all tests %": "30.0 +- 7.1 over orders",
        "forgetting %": "15.0 +- 14.1 over orders",                   # of 25 and 5
        "worst class %": "50.0 +- 28.3 over orders",                  # of 30 and 70: sqrt((20^2 + 20^2) / 1)
        "MB kept": "200.5",
        "seconds a batch": "32.50",               # of those after the first: (30 + 30 + 45) / 3 = 35, and 30
        "minutes": "2.1",                                             # 135 and 120 seconds: 2.125
        "device": "abacus", "published": "-"}
    text = report(tmp_path)
    assert "50.0 +- 14.1" in text and "unfinished" not in text and "notes" not in text


def test_the_last_ten_tests_are_those_of_the_last_ten_batches(tmp_path):
    folder = make_run(tmp_path / "twelve", [.9, .9, *[.1] * 5, *[.3] * 5])
    lines = (folder / "results.jsonl").read_text().splitlines()
    (folder / "results.jsonl").write_text("\n".join(reversed(lines)))     # whatever the order of the lines
    row = lines_of(tmp_path)["twelve"]
    assert row["mean of last 10 tests %"] == "20.0"
    assert row["mean of all tests %"] == "31.7"         # (1.8 + .5 + 1.5) / 12


FULL = {"forgetting": .5, "per_class": [.5], "kept_mb": 50}
COLUMNS = {"forgetting": "forgetting %", "per_class": "worst class %", "kept_mb": "MB kept"}


@pytest.mark.parametrize("field, value", [
    ("forgetting", None), ("forgetting", float("nan")), ("per_class", None), ("kept_mb", "much"),
    ("per_class", [None, float("nan")])])
def test_what_a_row_does_not_say_is_a_dash(tmp_path, field, value):
    make_run(tmp_path / "odd", [.5], last=FULL | {field: value})
    make_run(tmp_path / "both", [.5], last=FULL)
    make_run(tmp_path / "both", [.5], seed=1)       # one of two runs: its number is not the experiment's
    cells = lines_of(tmp_path)
    assert [cells["odd"][column] for column in COLUMNS.values()] == [
        "-" if key == field else "50.0" for key in COLUMNS]
    assert {cells["both"][column] for column in COLUMNS.values()} == {"-"}
    assert cells["both"]["seconds a batch"] == "-"      # there is no batch after the first


def test_markdown_is_a_table_with_escaped_names(tmp_path):
    make_run(tmp_path / "our_best", [.5, .25], seed=0)
    make_run(tmp_path / "our_best", [.5, .75], seed=1)
    first, rule, line, *_ = report(tmp_path, markdown=True).splitlines()
    assert first.startswith("| experiment | runs | orders | seeds | batches |")
    assert set(rule) <= set("| -") and rule.count("|") == first.count("|") == line.count("|")
    assert line.startswith("| our\\_best | 2 | 0 | 0-1 |") and "50.0 ± 35.4" in line


def test_ranges():
    assert [ranges(n) for n in ([], [3], [0, 1, 2], {5, 0, 1, 7})] == ["", "3", "0-2", "0-1, 5, 7"]


# ---- grouping ----

def test_like_runs_of_several_folders_are_one_experiment_and_count_once(tmp_path):
    make_run(tmp_path / "a" / "exp", [.5], data="here")
    make_run(tmp_path / "b" / "exp", [.7], data="there", seed=1)
    again = make_run(tmp_path / "c" / "exp", [.9], seed=1)
    cells = lines_of(tmp_path)
    assert cells["exp"]["runs"] == "2" and cells["exp"]["final accuracy %"] == "60.0 +- 14.1 over seeds"
    assert f"{again} is left out" in report(tmp_path)


def test_unlike_experiments_of_one_name_are_kept_apart_and_all_have_their_folders(tmp_path):
    make_run(tmp_path / "logs" / "a", [.5])
    make_run(tmp_path / "logs" / "b", [.5], rm_sz=200)
    assert set(lines_of(tmp_path)) == {"a", "b"}
    make_run(tmp_path / "more" / "a", [.5], rm_sz=7)
    make_run(tmp_path / "logs" / "b", [.7], rm_sz=300, seed=1)
    assert set(lines_of(tmp_path)) == {"logs/a", "logs/b (rm_sz=200)", "logs/b (rm_sz=300)", "more/a"}


def test_runs_on_other_streams_or_images_are_kept_apart(tmp_path):
    make_run(tmp_path / "exp", [.5, .6], seed=3)
    for seed, images in enumerate("aab"):
        make_run(tmp_path / "exp", [.5], seed=seed, images=images)
    assert {label: cells["runs"] for label, cells in lines_of(tmp_path).items()} == {
        "exp (batches=1, data=a)": "2", "exp (batches=1, data=b)": "1", "exp (batches=2, data=d)": "1"}


def test_spread_over_orders_and_over_seeds_are_told_apart(tmp_path):
    for order, seed, final in ((0, 0, .40), (0, 1, .44), (3, 0, .60), (3, 1, .66), (3, 2, .63)):
        make_run(tmp_path / "both", [final], run=order, seed=seed)
    for seed, final in enumerate((.40, .46)):
        make_run(tmp_path / "seeds", [final], seed=seed)
    cells = lines_of(tmp_path)
    # means of the orders: 42 and 63; around them -2, 2 and -3, 3, 0: sqrt((4 + 4 + 9 + 9 + 0) / (5 - 2))
    assert cells["both"]["final accuracy %"] == "54.6 +- 14.8 over orders, +- 2.9 over seeds"
    assert cells["seeds"]["final accuracy %"] == "43.0 +- 4.2 over seeds"


# ---- what is not finished, or damaged ----

def test_unfinished_runs_are_listed_with_their_progress(tmp_path):
    make_run(tmp_path / "exp", [.5, .6])
    folder = make_run(tmp_path / "exp", [.5, .615], seed=1, batches=7)
    empty = make_run(tmp_path / "empty", [])
    cells, text = lines_of(tmp_path), report(tmp_path)
    assert cells["exp"]["runs"] == "1" and "empty" not in cells
    assert f"{folder}: 2 of 7 batches, 61.5%" in text and f"{empty}: no batch" in text


def test_damaged_lines_are_left_out_with_a_note(tmp_path):
    folder = make_run(tmp_path / "exp", [.5, .6, .7])
    good = (folder / "results.jsonl").read_text().splitlines()
    bad = ["", "[1, 2]", '{"batch": 1}', '{"batch": "x", "test_accuracy": 1}', '{"batch": 0, "test_acc',
           '{"batch": 1, "test_accuracy": NaN}', "[" * 100_000, '{"batch": 1, "test_accuracy": "high"}']
    text = "\n".join([good[0], *bad, good[1], good[2]]).encode() + b"\n\xff\xfe{"
    (folder / "results.jsonl").write_bytes(text)
    assert lines_of(tmp_path)["exp"]["final accuracy %"] == "70.0"
    (note,) = [line for line in report(tmp_path).splitlines() if "damaged" in line]
    assert str(folder) in note and "2-9, 12" in note
    assert read_rows("") == ({}, [])


@pytest.mark.parametrize("content", [None, b"[1, 2]", b"a: [", b"\xff\xfe\x00", b""])
def test_a_run_without_a_readable_configuration_is_left_out(tmp_path, content):
    make_run(tmp_path / "exp", [.5])
    path = make_run(tmp_path / "odd", [.5]) / "config.yaml"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert set(lines_of(tmp_path)) == {"exp"} and f"{path.parent} is left out: " in report(tmp_path)


# ---- published numbers ----

# What the papers' programs and the PyTorch program ran with, written down anew from their descriptions
FIRST = dict(
    dataset="core50", weights="imagenet", width=1.0, model="mobilenet_v1", start_batch=0, cumulative=False,
    method="latent_replay", init_lr=1e-3, init_train_ep=4, inc_train_ep=4, mb_size=128, momentum=.9, l2=5e-4)
FG = FIRST | dict(
    follow="papers", rm_sz=0, latent_layer_num="images", freeze_below_layer="images", inc_convs="pointwise",
    inc_freeze_below_layer="images", inc_update_rate=1e-4, max_r_max=1.25, max_d_max=.5, scenario="nicv2_79")
AR1 = FG | dict(cwr_consolidation="per_class", inc_lr=1e-4, head_lr_mult=10.0, si="learning_rate", si_c=.5)
CWR = FG | dict(cwr_consolidation="per_class", inc_lr=1e-3, head_lr_mult=1.0, inc_freeze_below_layer="pool6")
NAIVE = FG | dict(cwr_consolidation="none", inc_lr=3.5e-5, head_lr_mult=1.0, init_train_ep=2, inc_train_ep=2,
                  si="penalty", reg_lambda=0.0)
WIDE = dict(scenario="nicv2_391", max_r_max=1.5, max_d_max=2.5)
NATIVE = FG | dict(scenario="nicv2_391", rm_sz=1500, cwr_consolidation="per_class", inc_lr=3e-4,
                   head_lr_mult=10.0, si="penalty", reg_lambda=0.0)
LATENT = NATIVE | dict(
    latent_layer_num="conv5_4/dw", inc_freeze_below_layer="conv5_4/dw", inc_update_rate=5e-5)
HEAD = NATIVE | dict(latent_layer_num="pool6", inc_freeze_below_layer="pool6", inc_update_rate=5e-5)
PYTORCH = FIRST | dict(
    scenario="nicv2_391", rm_sz=1500, latent_layer_num="conv5_4/dw", freeze_below_layer="conv5_4/dw",
    inc_freeze_below_layer="conv5_4/dw", inc_lr=5e-5, init_update_rate=.01, inc_update_rate=5e-5,
    max_r_max=1.25, max_d_max=.5, inc_step=4.1e-5, cwr_consolidation="per_pattern", follow="pytorch_program",
    head_lr_mult=1.0, inc_convs="all", si="penalty", reg_lambda=0.0)
MIDDLE = {"scenario": "nicv2_196"}
CASES = [
    ("63.5 +- 1.2 [1]", AR1), ("57.1 +- 2 [1]", CWR), ("26.8 [1]", NAIVE),
    ("60.6 +- 1.4 [1]", AR1 | MIDDLE), ("56.9 +- 0.9 [1]", CWR | MIDDLE), ("18.9 [1]", NAIVE | MIDDLE),
    ("56.3 +- 1.1 [1]", AR1 | WIDE), ("57 +- 1 [1]", CWR | WIDE), ("8 [1]", NAIVE | WIDE),
    ("~77 [1]", PYTORCH), ("63.6 [1]", PYTORCH | {"rm_sz": 500}), ("~77.3 [1]", NATIVE),
    ("~72.5 [1]", LATENT), ("~70 [1]", LATENT | {"rm_sz": 500}),
    ("~58 [1]", HEAD), ("~58 [1]", HEAD | {"head_lr_mult": 1.0})]


DEFAULTS = asdict(load_config("DEFAULT", PARAMS))


def beside(settings, n_test=2249, batches=None):
    """The Results shown beside a finished run with these settings."""
    batches = batches or BATCHES.get(settings["scenario"], 9)
    row = {"test_accuracy": .3, "n_test": n_test, "batches": batches}
    return published(Run(Path("exp/run0_seed0"), DEFAULTS | settings, {batches - 1: row}))


@pytest.mark.parametrize("text, settings", CASES)
def test_each_published_number_stands_beside_its_settings(tmp_path, text, settings):
    make_run(tmp_path / "exp", [.3] * BATCHES[settings["scenario"]], n_test=2249, **settings)
    assert lines_of(tmp_path)["exp"]["published"] == text
    assert report(tmp_path).count("[1]") == 2       # and its source
    numbers = {"images": -1, "conv5_4/dw": 19, "pool6": 27}
    by_number = {key: numbers.get(value, value) for key, value in settings.items()}
    assert beside(by_number, n_test=44972) == beside(settings) != []


OTHER = dict(
    dataset="folder", weights="../other.pth", width=.5, model="resnet18", start_batch=2, cumulative=True,
    method="slda", init_lr=2e-3, init_train_ep=3, inc_train_ep=3, mb_size=64, momentum=.8, l2=0.0, patience=3,
    latent_layer_num="conv4_1/dw", freeze_below_layer="conv1", inc_freeze_below_layer="conv3_1/dw", rm_sz=100,
    inc_lr=2e-4, inc_update_rate=1e-3, max_r_max=3.0, max_d_max=5.0, scenario="nic", rm_mb=9.0, rm_dtype="pq",
    rm_policy="balanced", replayed_per_epoch=99, slda_weight=.5, cwr_consolidation="per_pattern",
    follow="pytorch_program", inc_convs="all", head_lr_mult=3.0)
REPLAYED = OTHER | dict(si="learning_rate", reg_lambda=1.0)
CHANGES = [
    (AR1, OTHER | dict(si="penalty", si_c=1.0)),
    (CWR, OTHER),
    (NAIVE, REPLAYED | dict(cwr_consolidation="per_class")),
    (PYTORCH, REPLAYED | dict(follow="papers", inc_convs="pointwise", head_lr_mult=10.0, init_update_rate=.1,
                              inc_step=4e-5, cwr_consolidation="per_class")),
    (LATENT, REPLAYED), (NATIVE, REPLAYED), (HEAD, REPLAYED)]


def test_each_published_number_has_its_case():
    assert len({text + settings["scenario"] for text, settings in CASES}) == len(RESULTS) == 15
    asked = {frozenset(result.settings) | {"scenario"} for result in RESULTS}   # each has a change to it
    assert asked <= {frozenset(changes) for _, changes in CHANGES}


@pytest.mark.parametrize("settings, changes", CHANGES, ids=range(len(CHANGES)))
def test_no_published_number_stands_beside_another_setting(settings, changes):
    assert beside(settings)
    for key, value in changes.items():
        assert settings.get(key) != value and beside(settings | {key: value}) == [], key


def test_no_published_number_stands_beside_other_data():
    assert beside(AR1)
    assert beside(AR1, n_test=1500) == beside(AR1, n_test=None) == beside(AR1, batches=78) == []


# ---- published curves ----

def result_of(method, scenario):
    return next(r for r in RESULTS if (r.method, r.scenario) == (method, scenario))


def test_the_published_curves_end_at_the_published_numbers():
    for result in RESULTS[:9]:
        points = curve(result)
        assert len(points) == BATCHES[result.scenario]
        assert abs(100 * points[-1][0] - result.accuracy) < .06
        assert result.std is None or abs(100 * points[-1][1] - result.std) < .06
    after = [100 * curve(result_of("AR1*", "nicv2_391"))[b][0] for b in (0, 100, 200, 300)]
    assert after == pytest.approx([14.0, 27.8, 39.2, 49.5], abs=.06)        # known of it from elsewhere
    assert all(curve(result) == [] for result in RESULTS[9:])


def test_a_curve_is_that_of_its_scenario_and_method(tmp_path, monkeypatch):
    monkeypatch.setattr(published_module, "CURVES", tmp_path / "two.csv")
    assert curve(result_of("AR1*", "nicv2_79")) == []       # there is no such file
    header = CURVES.read_text().splitlines()[0]
    (tmp_path / "two.csv").write_text(
        f"{header}\nnicv2_79,AR1*,0,50,2\nnicv2_79,naive,0,9,0\nnicv2_79,AR1*,1,60,4\n")
    assert curve(result_of("AR1*", "nicv2_79")) == [(.5, .02), (.6, .04)]


def test_a_published_curve_is_drawn_behind_runs_with_its_settings(tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    for seed in (0, 1):
        make_run(tmp_path / "mine", [.2 + .2 * seed] * 79, n_test=2249, seed=seed, **AR1)
    make_run(tmp_path / "mine_longer", [.2] * 79, n_test=44972, **AR1)          # the curve is drawn once
    make_run(tmp_path / "other", [.1] * 79, n_test=2249, **AR1 | {"si_c": 1.0})
    figures = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    report(tmp_path, plot=tmp_path / "x.png")

    (axes,) = figures[0].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {text.get_text() for text in figures[0].legends[0].get_texts()} == {
        "mine, 2 runs: 30.0%", "mine_longer: 20.0%", "other: 10.0%",
        "published AR1* on nicv2_79, 10 orders: 63.5%"}
    behind = lines["published AR1* on nicv2_79, 10 orders: 63.5%"]
    mine = lines["mine, 2 runs: 30.0%"]
    assert behind.get_color() == "gray" and behind.get_linewidth() < mine.get_linewidth()
    assert behind.get_zorder() < mine.get_zorder() and len(axes.collections) == 2       # two bands
    assert list(behind.get_xdata()) == list(range(1, 80))
    assert behind.get_ydata()[:2] == pytest.approx([.14, .14157])       # the first lines of the file


# ---- the plot, and the command line ----

def test_plot(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    make_run(tmp_path / "a", [.1, .2, .3])
    make_run(tmp_path / "a", [.3, .4, .5], seed=1)
    make_run(tmp_path / "b", [.1, .5])
    report(tmp_path, plot=tmp_path / "curves.png")
    picture = image.open(tmp_path / "curves.png").convert("RGB")
    assert picture.width > 900 and len(picture.getcolors(1 << 24)) > 20
    for path in (tmp_path / "nowhere" / "x.png", tmp_path / "x.unknown"):
        with pytest.raises(ReportError, match=path.name):
            report(tmp_path, plot=path)


def test_plot_without_matplotlib_is_one_sentence(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "a", [.1])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["--report", str(tmp_path), "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_command_line(tmp_path, capsys):
    for empty in (tmp_path, tmp_path / "missing"):
        assert main(["--report", str(empty)]) == 2
        error = capsys.readouterr().err
        assert f"no runs below {empty}" in error and error.count("\n") == 1
    make_run(tmp_path / "a", [.1], batches=3)
    assert main(["--report", str(tmp_path)]) == 0 and "No run has finished" in capsys.readouterr().out
    assert main(["--report", str(tmp_path), "--plot", str(tmp_path / "x.png")]) == 2    # nothing to plot,
    assert "No run has finished" in capsys.readouterr().out                             # but a report
    make_run(tmp_path / "b", [.1])
    assert main(["--report", "--log-dir", str(tmp_path), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| experiment |")
    assert main(["--markdown"]) == 2 and "--report" in capsys.readouterr().err


def test_runs_option(capsys):
    assert [parse_runs(t) for t in ("0-4", "0,2,5", "3", "7-9,0", " 1 , 1-2")] == [
        [0, 1, 2, 3, 4], [0, 2, 5], [3], [0, 7, 8, 9], [1, 2]]
    for text in ("", "a", "3-1", "0-", "-1", "0,,1", "1;2", "0-4-5", "10", "0-99999999", "1.5"):
        with pytest.raises(ConfigError, match="0-4 or 0,2,5"):
            parse_runs(text)
    assert main(["--runs", "0-1", "--run", "1"]) == 2 and "--run" in capsys.readouterr().err


def test_long_runs_are_read_quickly(tmp_path):
    for k in range(10):
        make_run(tmp_path / "exp", [.5] * 391, run=k)
    start = time.process_time()
    report(tmp_path)
    assert time.process_time() - start < 5
