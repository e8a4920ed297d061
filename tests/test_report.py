"""The report on log folders that the test writes: numbers worked out by hand, and folders with every kind of damage."""
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from ar1star_lat_replay import main
from helpers import REPO
from lab.command_line import parse_runs
from lab.config import ConfigError, load_config
from lab.report import PUBLISHED, ReportError, find_runs, group, method, published, ranges, read_rows, report, table

PARAMS = REPO / "params.cfg"


def make_run(experiment_folder, accuracies, run=0, seed=0, batches=None, n_test=100, name="DEFAULT", images="d", **settings):
    """Writes a run of len(accuracies) batches, 30 seconds each. batches=None: as many as there are, False: not stored.

    images: what they are recognized by; None: not stored.
    """
    config = replace(load_config(name, PARAMS), run=run, seed=seed, **settings)     # even what load_config refuses
    folder = Path(experiment_folder) / f"run{run}_seed{seed}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    rows = [{"batch": i, "test_accuracy": a, "seconds_read": 1.0, "seconds_train": 29.0, "device": "abacus",
             "n_test": n_test, "batches": batches or len(accuracies), "data": images} for i, a in enumerate(accuracies)]
    gone = ("batches", "device", "n_test", "data") if batches is False else () if images else ("data",)
    rows = [{k: v for k, v in row.items() if k not in gone} for row in rows]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def lines_of(log_dir, **options):
    """{experiment: {column: cell}} of the report's table, and the whole text."""
    runs, _ = find_runs(log_dir)
    header, lines, _ = table(group([run for run in runs if run.finished], log_dir)[0])
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}, report(log_dir, **options)


# ---- numbers ----

def test_mean_std_quarters_and_minutes(tmp_path):
    make_run(tmp_path / "ours", [.1, .2, .3, .4], seed=0)
    make_run(tmp_path / "ours", [.1, .4, .3, .6], seed=1, run=2)
    cells, text = lines_of(tmp_path)
    assert cells["ours"] == {
        "experiment": "ours", "runs": "2", "orders": "0, 2", "seeds": "0-1", "batches": "4", "test images": "100",
        "25 %": "10.0", "50 %": "30.0", "75 %": "30.0",
        "final accuracy %": "50.0 +- 14.1 over orders",               # std: sqrt((10^2 + 10^2) / 1)
        "mean of all tests %": "30.0 +- 7.1 over orders",             # of 25 and 35
        "minutes": "2.0", "device": "abacus", "published": "-"}
    assert "50.0 +- 14.1" in text and "unfinished" not in text and "notes" not in text


def test_quarters_are_rounded_up_to_whole_batches(tmp_path):
    make_run(tmp_path / "seven", [.1, .2, .3, .4, .5, .6, .7])
    row = lines_of(tmp_path)[0]["seven"]        # 1.75, 3.5, 5.25 of 7 batches: after 2, 4, 6
    assert (row["25 %"], row["50 %"], row["75 %"], row["final accuracy %"]) == ("20.0", "40.0", "60.0", "70.0")


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

REAL = dict(n_test=2249, weights="imagenet", scenario="nicv2_79")


@pytest.mark.parametrize("change, shown", [
    ({}, True), ({"n_test": 44972}, True), ({"weights": "../other.pth"}, False), ({"n_test": 1500}, False),
    ({"dataset": "demo"}, False), ({"dataset": "folder"}, False), ({"width": .5}, False), ({"cumulative": True}, False),
    ({"scenario": "nicv2_391"}, False), ({"batches": False}, False), ({"rm_sz": 100}, False), ({"start_batch": 2}, False)])
def test_published_numbers_stand_only_where_they_belong(tmp_path, change, shown):
    make_run(tmp_path / "exp", [.3] * 79, **{"name": "naive"} | REAL | change)
    cell = next(iter(lines_of(tmp_path)[0].values()), {"published": "-"})["published"]
    assert cell == ("26.8 [1]" if shown else "-")
    assert ("[1] CORe50 site" in report(tmp_path)) == shown


@pytest.mark.parametrize("name, settings, expected", [
    ("DEFAULT", {}, "latent replay 1500"), ("DEFAULT", {"rm_sz": 500, "latent_layer_num": 19}, "latent replay 500"),
    ("per_class", {}, None), ("pool6", {}, None), ("ar1star", {}, None), ("ar1star", {"rm_sz": 0}, "AR1*"),
    ("no_replay", {}, None), ("cwr_star", {}, "CWR*"), ("naive", {}, "naive"), ("cumulative", {}, None)])
def test_method(name, settings, expected):
    assert method(asdict(load_config(name, PARAMS, settings))) == expected


def test_all_published_methods_can_be_reached(tmp_path):
    make_run(tmp_path / "exp", [.7] * 391, n_test=2249, rm_sz=500)
    (run,), _ = find_runs(tmp_path)
    assert [(accuracy, about) for accuracy, _, about, _ in published(run)] == [(63.6, False), (70.0, True)]
    assert "63.6 [1], ~70 [2]" in report(tmp_path)
    assert {m for _, m in PUBLISHED} == {"AR1*", "CWR*", "naive", "latent replay 1500", "latent replay 500"}


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
    assert main(["--report", str(tmp_path), "--plot", str(tmp_path / "x.png")]) == 2
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
