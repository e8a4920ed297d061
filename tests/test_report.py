"""The report on log folders that the test writes: numbers worked out by hand, and folders with every kind of damage."""
import json
import sys
import time

import pytest
import yaml

from ar1star_lat_replay import main
from helpers import make_run
from lab import published as published_module
from lab.command_line import parse_runs
from lab.config import ConfigError
from lab.published import CURVES, RESULTS, curve
from lab.report import ReportError, find_runs, group, ranges, read_rows, report, table


def lines_of(log_dir, **options):
    """{experiment: {column: cell}} of the report's table, and the whole text."""
    runs, _ = find_runs(log_dir)
    header, lines, _ = table(group([run for run in runs if run.finished], log_dir)[0])
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}, report(log_dir, **options)


# ---- numbers ----

def test_every_number_of_a_row(tmp_path):
    end = {"forgetting": .25, "per_class": [.5, None, .3, 1.0], "kept_mb": 200.0, "seconds_test": 15.0}
    make_run(tmp_path / "ours", [.1, .2, .3, .4], seed=0, last=end)
    make_run(tmp_path / "ours", [.1, .4, .3, .6], seed=1, run=2, last={"forgetting": .05, "per_class": [.7, .9],
                                                                       "kept_mb": 201.0})
    cells, text = lines_of(tmp_path)
    assert cells["ours"] == {
        "experiment": "ours", "runs": "2", "orders": "0, 2", "seeds": "0-1", "batches": "4", "test images": "100",
        "final accuracy %": "50.0 +- 14.1 over orders",               # std: sqrt((10^2 + 10^2) / 1)
        "mean of last 10 tests %": "30.0 +- 7.1 over orders",         # there are four: of 25 and 35
        "mean of all tests %": "30.0 +- 7.1 over orders",
        "forgetting %": "15.0 +- 14.1 over orders",                   # of 25 and 5
        "worst class %": "50.0 +- 28.3 over orders",                  # of 30 and 70: sqrt((20^2 + 20^2) / 1)
        "MB kept": "200.5",
        "seconds a batch": "32.50",                                   # (30 + 30 + 45) / 3 = 35, and 30
        "minutes": "2.1",                                             # 135 and 120 seconds: 2.125
        "device": "abacus", "published": "-"}
    assert "50.0 +- 14.1" in text and "unfinished" not in text and "notes" not in text


def test_the_last_ten_tests_are_those_of_the_last_ten_batches(tmp_path):
    folder = make_run(tmp_path / "twelve", [.9, .9, *[.1] * 5, *[.3] * 5])
    lines = (folder / "results.jsonl").read_text().splitlines()
    (folder / "results.jsonl").write_text("\n".join(reversed(lines)))         # whatever the order of the lines
    row = lines_of(tmp_path)[0]["twelve"]
    assert row["mean of last 10 tests %"] == "20.0" and row["mean of all tests %"] == "31.7"        # (1.8 + .5 + 1.5) / 12


def test_the_large_first_batch_does_not_count_as_a_batch_of_seconds(tmp_path):
    folder = make_run(tmp_path / "three", [.1, .2, .3])
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for row, seconds in zip(rows, (500.0, 3.0, 5.0), strict=True):
        row["seconds_train"] = seconds                                # and 1 for reading
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = lines_of(tmp_path)[0]["three"]
    assert (row["seconds a batch"], row["minutes"]) == ("5.00", "8.5")        # 511 seconds
    make_run(tmp_path / "one", [.1])
    assert lines_of(tmp_path)[0]["one"]["seconds a batch"] == "-"


NEW = {"forgetting": "forgetting %", "per_class": "worst class %", "kept_mb": "MB kept"}


@pytest.mark.parametrize("value", [None, "much", [None], {}, float("nan")])
@pytest.mark.parametrize("field", NEW)
def test_what_a_row_does_not_say_is_a_dash(tmp_path, field, value):
    full = {"forgetting": .5, "per_class": [.5], "kept_mb": 50}
    make_run(tmp_path / "odd", [.5], last=full | {field: value})
    make_run(tmp_path / "old", [.5])
    make_run(tmp_path / "both", [.5], last=full)
    make_run(tmp_path / "both", [.5], seed=1)           # one of two runs: its number is not that of the experiment
    cells = lines_of(tmp_path)[0]
    assert [cells["odd"][column] for column in NEW.values()] == ["-" if key == field else "50.0" for key in NEW]
    assert {cells[name][column] for name in ("old", "both") for column in NEW.values()} == {"-"}


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

def test_unlike_experiments_of_one_name_are_kept_apart(tmp_path):
    make_run(tmp_path / "a" / "exp", [.5], rm_sz=100)
    make_run(tmp_path / "b" / "exp", [.5], rm_sz=200)
    make_run(tmp_path / "b" / "exp", [.7], rm_sz=300, seed=1)
    make_run(tmp_path / "other", [.5])
    assert set(lines_of(tmp_path)[0]) == {"a/exp", "b/exp (rm_sz=200)", "b/exp (rm_sz=300)", "other"}


def test_like_runs_of_several_folders_are_one_experiment(tmp_path):
    make_run(tmp_path / "a" / "exp", [.5], data="here")
    make_run(tmp_path / "b" / "exp", [.7], data="there", seed=1)
    assert lines_of(tmp_path)[0]["exp"]["final accuracy %"] == "60.0 +- 14.1 over seeds"


def test_the_same_run_twice_counts_once(tmp_path):
    make_run(tmp_path / "a" / "exp", [.5])
    make_run(tmp_path / "b" / "exp", [.7])
    cells, text = lines_of(tmp_path)
    assert cells["exp"]["runs"] == "1" and "is left out: it has the settings, the order and the seed of" in text


def test_spread_over_orders_and_over_seeds_are_told_apart(tmp_path):
    for order, seed, final in ((0, 0, .40), (0, 1, .44), (3, 0, .60), (3, 1, .66), (3, 2, .63)):
        make_run(tmp_path / "both", [final], run=order, seed=seed)
    for seed, final in enumerate((.40, .46)):
        make_run(tmp_path / "seeds", [final], seed=seed)
    cells = lines_of(tmp_path)[0]
    # means of the orders: 42 and 63; around them -2, 2 and -3, 3, 0: sqrt((4 + 4 + 9 + 9 + 0) / (5 - 2)); mean of five: 54.6
    assert cells["both"]["final accuracy %"] == "54.6 +- 14.8 over orders, +- 2.9 over seeds"
    assert cells["seeds"]["final accuracy %"] == "43.0 +- 4.2 over seeds"


def test_runs_on_streams_of_other_lengths_are_kept_apart(tmp_path):
    make_run(tmp_path / "exp", [.5, .6])
    make_run(tmp_path / "exp", [.5], seed=1)
    assert set(lines_of(tmp_path)[0]) == {"exp (batches=1)", "exp (batches=2)"}


def test_runs_on_other_images_are_kept_apart(tmp_path):
    for seed, images in enumerate("aab"):
        make_run(tmp_path / "exp", [.5], seed=seed, images=images)
    runs = {label: cells["runs"] for label, cells in lines_of(tmp_path)[0].items()}
    assert runs == {"exp (data=a)": "2", "exp (data=b)": "1"}


def test_where_one_name_needs_its_folder_all_have_it(tmp_path):
    make_run(tmp_path / "logs" / "a", [.5])
    make_run(tmp_path / "logs" / "b", [.5])
    assert set(lines_of(tmp_path)[0]) == {"a", "b"}
    make_run(tmp_path / "more" / "a", [.5], rm_sz=7)
    assert set(lines_of(tmp_path)[0]) == {"logs/a", "logs/b", "more/a"}


# ---- what is not finished, or damaged ----

def test_unfinished_runs_are_listed_with_their_progress(tmp_path):
    make_run(tmp_path / "exp", [.5, .6])
    folder = make_run(tmp_path / "exp", [.5, .615], seed=1, batches=7)
    make_run(tmp_path / "empty", [])
    cells, text = lines_of(tmp_path)
    assert cells["exp"]["runs"] == "1" and "empty" not in cells
    assert f"{folder}: 2 of 7 batches, 61.5%" in text and "no batch yet" in text


def test_rows_of_an_older_program(tmp_path):
    make_run(tmp_path / "done", [.5] * 79, batches=False, scenario="nicv2_79")
    make_run(tmp_path / "half", [.5] * 40, batches=False, scenario="nicv2_79")
    late = make_run(tmp_path / "late", [.5], batches=False, scenario="nicv2_79", start_batch=78)
    cells, text = lines_of(tmp_path)
    assert set(cells) == {"done", "late"} and cells["done"]["device"] == "-" and "40 of 79 batches" in text
    lines = (late / "config.yaml").read_text().splitlines()         # a setting that came later than this run
    (late / "config.yaml").write_text("\n".join(line for line in lines if not line.startswith("matmul_precision")))
    make_run(tmp_path / "late", [.7], seed=1, batches=1, scenario="nicv2_79", start_batch=78, n_test=None, images=None)
    cells = lines_of(tmp_path)[0]       # nobody knows what it ran with: it is not averaged with runs with today's default
    assert {k: v["final accuracy %"] for k, v in cells.items() if k != "done"} == {
        "late (matmul_precision not stored)": "50.0", "late (matmul_precision=medium)": "70.0"}


def test_a_run_of_an_older_program_cut_short_by_max_batches_is_unfinished(tmp_path):
    """Such a program stored the number of batches that it was asked for as that of the stream."""
    make_run(tmp_path / "cut", [.1] * 5, batches=5, images=None, scenario="nicv2_79")
    cells, text = lines_of(tmp_path)
    assert not cells and "5 of 79 batches" in text


def test_damaged_lines_are_skipped_with_a_note(tmp_path):
    folder = make_run(tmp_path / "exp", [.5, .6, .7])
    good = (folder / "results.jsonl").read_text().splitlines()
    bad = ["", "[1, 2]", '{"batch": 1}', '{"batch": "x", "test_accuracy": 1}', '{"batch": 1, "test_accuracy": NaN}',
           '{"batch": 0, "test_acc', "[" * 100_000, '{"batch": 1, "test_accuracy": "high"}']
    (folder / "results.jsonl").write_bytes("\n".join([good[0], *bad, good[1], good[2]]).encode() + b"\n\xff\xfe{")
    cells, text = lines_of(tmp_path)
    assert cells["exp"]["final accuracy %"] == "70.0" and "damaged and left out: lines 2-9, 12" in text
    assert read_rows("")[0] == {}


@pytest.mark.parametrize("content", [None, b"[1, 2]", b"a: [", b"\xff\xfe\x00", b"", b"[" * 1500])
def test_a_run_without_a_readable_configuration_is_left_out(tmp_path, content):
    make_run(tmp_path / "exp", [.5])
    path = make_run(tmp_path / "odd", [.5]) / "config.yaml"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    cells, text = lines_of(tmp_path)
    assert set(cells) == {"exp"} and f"{path.parent} is left out: " in text


# ---- published numbers ----

# What the two programs of the papers and the PyTorch program ran with, written down anew from their descriptions
FIRST = dict(dataset="core50", weights="imagenet", width=1.0, model="mobilenet_v1", start_batch=0, cumulative=False,
             method="latent_replay", init_lr=1e-3, init_train_ep=4, inc_train_ep=4, mb_size=128, momentum=.9, l2=5e-4)
FG = FIRST | dict(follow="papers", rm_sz=0, latent_layer_num="images", freeze_below_layer="images", inc_convs="pointwise",
                  inc_freeze_below_layer="images", inc_update_rate=1e-4, max_r_max=1.25, max_d_max=.5, scenario="nicv2_79")
AR1 = FG | dict(cwr_consolidation="per_class", inc_lr=1e-4, head_lr_mult=10.0, si="learning_rate", si_c=.5)
CWR = FG | dict(cwr_consolidation="per_class", inc_lr=1e-3, head_lr_mult=1.0, inc_freeze_below_layer="pool6")
NAIVE = FG | dict(cwr_consolidation="none", inc_lr=3.5e-5, head_lr_mult=1.0, init_train_ep=2, inc_train_ep=2, si="penalty",
                  reg_lambda=0.0)
WIDE = dict(scenario="nicv2_391", max_r_max=1.5, max_d_max=2.5)
LR = FG | dict(scenario="nicv2_391", rm_sz=1500, cwr_consolidation="per_class", inc_lr=3e-4, head_lr_mult=10.0, si="penalty",
               reg_lambda=0.0)
LATENT = LR | dict(latent_layer_num="conv5_4/dw", inc_freeze_below_layer="conv5_4/dw", inc_update_rate=5e-5)
HEAD = LR | dict(latent_layer_num="pool6", inc_freeze_below_layer="pool6", inc_update_rate=5e-5)
PYTORCH = FIRST | dict(scenario="nicv2_391", rm_sz=1500, latent_layer_num="conv5_4/dw", freeze_below_layer="conv5_4/dw",
                       inc_freeze_below_layer="conv5_4/dw", inc_lr=5e-5, init_update_rate=.01, inc_update_rate=5e-5,
                       max_r_max=1.25, max_d_max=.5, inc_step=4.1e-5, cwr_consolidation="per_pattern", reg_lambda=0.0)
NEW_KEYS = dict(follow="pytorch_program", head_lr_mult=1.0, inc_convs="all", si="penalty", si_c=1.0)    # in no older config
CASES = [("63.5 +- 1.2 [1]", AR1), ("57.1 +- 2 [1]", CWR), ("26.8 [1]", NAIVE),
         *((text, settings | {"scenario": "nicv2_196"}) for text, settings in (
             ("60.6 +- 1.4 [1]", AR1), ("56.9 +- 0.9 [1]", CWR), ("18.9 [1]", NAIVE))),
         ("56.3 +- 1.1 [1]", AR1 | WIDE), ("57 +- 1 [1]", CWR | WIDE), ("8 [1]", NAIVE | WIDE),
         ("~77 [1]", PYTORCH), ("63.6 [1]", PYTORCH | {"rm_sz": 500}),
         ("~77.3 [1]", LR | {"inc_update_rate": 1e-4}), ("~72.5 [1]", LATENT), ("~70 [1]", LATENT | {"rm_sz": 500}),
         ("~58 [1]", HEAD), ("~58 [1]", HEAD | {"head_lr_mult": 1.0})]
LENGTHS = {"nicv2_79": 79, "nicv2_196": 196, "nicv2_391": 391}


def shown(folder, settings, n_test=2249):
    """The cell "published" of a run with these settings."""
    make_run(folder / "exp", [.3] * LENGTHS.get(settings["scenario"], 9), n_test=n_test, **settings)
    return lines_of(folder)[0]["exp"]["published"]


@pytest.mark.parametrize("text, settings", CASES)
def test_each_published_number_stands_beside_its_settings(tmp_path, text, settings):
    assert shown(tmp_path / "names", settings) == text
    numbers = {"images": -1, "conv5_4/dw": 19, "pool6": 27}
    assert shown(tmp_path / "numbers", {k: numbers.get(v, v) for k, v in settings.items()}, n_test=44972) == text
    assert report(tmp_path / "names").count("[1]") == 2       # and its source


def test_each_published_number_has_its_case():
    assert len({text + settings["scenario"] for text, settings in CASES}) == len(RESULTS) == 15
    asked = {frozenset(result.settings) | {"scenario"} for result in RESULTS}      # each has a change below that breaks it
    assert asked <= {frozenset(changes) for _, changes in CHANGES}


OTHER = dict(dataset="folder", weights="../other.pth", width=.5, model="resnet18", start_batch=2, cumulative=True,
             method="slda", init_lr=2e-3, init_train_ep=3, inc_train_ep=3, mb_size=64, momentum=.8, l2=0.0, patience=3,
             latent_layer_num="conv4_1/dw", freeze_below_layer="conv1", inc_freeze_below_layer="conv3_1/dw", rm_sz=100,
             inc_lr=2e-4, inc_update_rate=1e-3, max_r_max=3.0, max_d_max=5.0, scenario="nic", rm_mb=9.0, rm_dtype="pq",
             rm_policy="balanced", replayed_per_epoch=99, slda_weight=.5)
OTHER_NEW = dict(follow="pytorch_program", inc_convs="all", head_lr_mult=3.0)
CHANGES = [(AR1, OTHER | OTHER_NEW | dict(cwr_consolidation="per_pattern", si="penalty", si_c=1.0)),
           (CWR, OTHER | OTHER_NEW | dict(cwr_consolidation="per_pattern")),
           (NAIVE, OTHER | OTHER_NEW | dict(cwr_consolidation="per_class", si="learning_rate", reg_lambda=1.0)),
           (PYTORCH | NEW_KEYS, OTHER | dict(follow="papers", inc_convs="pointwise", head_lr_mult=10.0, si="learning_rate",
                                             reg_lambda=1.0, init_update_rate=.1, inc_step=4e-5,
                                             cwr_consolidation="per_class")),
           *((settings, OTHER | OTHER_NEW | dict(cwr_consolidation="per_pattern", si="learning_rate", reg_lambda=1.0))
             for settings in (LATENT, LR | {"inc_update_rate": 1e-4}, HEAD))]


@pytest.mark.parametrize("settings, key, value", [
    pytest.param(settings, key, value, id=f"{k}-{key}") for k, (settings, changes) in enumerate(CHANGES)
    for key, value in changes.items()])
def test_no_published_number_stands_beside_another_setting(tmp_path, settings, key, value):
    assert settings.get(key) != value
    assert shown(tmp_path, settings | {key: value}) == "-" and "[1]" not in report(tmp_path)


@pytest.mark.parametrize("batches, n_test", [(79, 1500), (79, None), (78, 2249)])
def test_no_published_number_stands_beside_other_data(tmp_path, batches, n_test):
    make_run(tmp_path / "exp", [.3] * batches, n_test=n_test, **AR1)
    assert lines_of(tmp_path)[0]["exp"]["published"] == "-"


def test_an_older_run_ran_as_the_pytorch_program_does(tmp_path):
    """Its config.yaml lacks the newer settings; what the papers' programs did it cannot have done."""
    for name, settings in (("old", PYTORCH), ("naive", {k: v for k, v in NAIVE.items() if k not in NEW_KEYS})):
        folder = make_run(tmp_path / name, [.3] * LENGTHS[settings["scenario"]], n_test=2249, **settings)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if k not in NEW_KEYS}))
    cells = lines_of(tmp_path)[0]
    assert (cells["old"]["published"], cells["naive"]["published"]) == ("~77 [1]", "-")


# ---- published curves ----

def result_of(method, scenario):
    return next(r for r in RESULTS if (r.method, r.scenario) == (method, scenario))


def test_the_published_curves_end_at_the_published_numbers():
    for result in RESULTS[:9]:
        points = curve(result)
        assert len(points) == LENGTHS[result.scenario]
        assert abs(100 * points[-1][0] - result.accuracy) < .06 and (
            result.std is None or abs(100 * points[-1][1] - result.std) < .06)
    after = [100 * curve(result_of("AR1*", "nicv2_391"))[b][0] for b in (0, 100, 200, 300)]
    assert after == pytest.approx([14.0, 27.8, 39.2, 49.5], abs=.06)        # known of it from elsewhere
    assert all(curve(result) == [] for result in RESULTS[9:])


def test_without_its_file_there_is_no_curve(tmp_path, monkeypatch):
    monkeypatch.setattr(published_module, "CURVES", tmp_path / "missing.csv")
    assert curve(result_of("AR1*", "nicv2_79")) == []
    (tmp_path / "two.csv").write_text(CURVES.read_text().splitlines()[0]
                                      + "\nnicv2_79,AR1*,0,50,2\nnicv2_79,naive,0,9,0\nnicv2_79,AR1*,1,60,4\n")
    monkeypatch.setattr(published_module, "CURVES", tmp_path / "two.csv")
    assert curve(result_of("AR1*", "nicv2_79")) == [(.5, .02), (.6, .04)]


def drawn(log_dir, monkeypatch):
    """{label: line} of the curves that --plot draws."""
    figure_module = pytest.importorskip("matplotlib.figure")
    figures = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    report(log_dir, plot=log_dir / "x.png")
    (axes,) = figures[0].axes
    assert {text.get_text() for text in figures[0].legends[0].get_texts()} == {line.get_label() for line in axes.lines}
    return {line.get_label(): line for line in axes.lines}, axes


def test_a_published_curve_is_drawn_behind_runs_with_its_settings(tmp_path, monkeypatch):
    for seed in (0, 1):
        make_run(tmp_path / "mine", [.3] * 79, n_test=2249, seed=seed, **AR1)
    make_run(tmp_path / "mine_longer", [.2] * 79, n_test=44972, **AR1)          # the curve is drawn once
    make_run(tmp_path / "other", [.1] * 79, n_test=2249, **AR1 | {"si_c": 1.0})
    lines, axes = drawn(tmp_path, monkeypatch)
    assert set(lines) == {"mine, 2 runs: 30.0%", "mine_longer: 20.0%", "other: 10.0%",
                          "published AR1* on nicv2_79, 10 orders: 63.5%"}
    published_line, mine = lines["published AR1* on nicv2_79, 10 orders: 63.5%"], lines["mine, 2 runs: 30.0%"]
    assert published_line.get_color() == "gray" and published_line.get_linewidth() < mine.get_linewidth()
    assert published_line.get_zorder() < mine.get_zorder() and len(axes.collections) == 2       # two bands
    assert list(published_line.get_xdata()) == list(range(1, 80))
    assert published_line.get_ydata()[:2] == pytest.approx([.14, .14157])       # the first lines of the file


@pytest.mark.parametrize("settings", [AR1 | {"inc_lr": 2e-4}, LATENT | {"rm_sz": 500}, PYTORCH])
def test_no_published_curve_is_drawn_behind_other_runs(tmp_path, monkeypatch, settings):
    make_run(tmp_path / "mine", [.3] * LENGTHS[settings["scenario"]], n_test=2249, **settings)
    assert set(drawn(tmp_path, monkeypatch)[0]) == {"mine: 30.0%"}


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
        with pytest.raises(ReportError, match="cannot write the plot"):
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
        assert "there are no runs below" in error and error.count("\n") == 1
    make_run(tmp_path / "a", [.1], batches=3)
    assert main(["--report", str(tmp_path)]) == 0 and "No run has finished yet" in capsys.readouterr().out
    assert main(["--report", str(tmp_path), "--plot", str(tmp_path / "x.png")]) == 2        # nothing to draw,
    assert "No run has finished yet" in capsys.readouterr().out                             # but there is the table
    make_run(tmp_path / "b", [.1])
    assert main(["--report", "--log-dir", str(tmp_path), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| experiment |")
    assert main(["--markdown"]) == 2 and "--report" in capsys.readouterr().err


def test_runs_option(capsys):
    assert [parse_runs(t) for t in ("0-4", "0,2,5", "3", "7-9,0", " 1 , 1-2")] == [
        [0, 1, 2, 3, 4], [0, 2, 5], [3], [0, 7, 8, 9], [1, 2]]
    for text in ("", "a", "3-1", "0-", "-1", "0,,1", "1;2", "0-4-5", "10", "0-99999999", "1.5"):
        with pytest.raises(ConfigError, match="write orders from 0 to 9 as 0-4 or 0,2,5"):
            parse_runs(text)
    assert main(["--runs", "0-1", "--run", "1"]) == 2 and "exclude each other" in capsys.readouterr().err


def test_long_runs_are_read_quickly(tmp_path):
    for k in range(10):
        make_run(tmp_path / "exp", [.5] * 391, run=k)
    start = time.process_time()
    report(tmp_path)
    assert time.process_time() - start < 5
