"""The search of learning rates: what it tries, keeps, skips and prints."""
import json
import sys

import pytest

from helpers import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import tune

GRID = ["--rates", "1e-3", "1e30", "--multiples", "1", "10", "--batches", "3", "--order", "0"]


@pytest.fixture
def arguments(params, tmp_path):
    return ["tiny", *GRID, "--config", str(params), "--log-dir", str(tmp_path)]


def test_the_default_grid_has_nine_points():
    assert len(tune.RATES) * len(tune.MULTIPLES) == 9


def test_it_tries_every_pair_keeps_what_ran_and_prints_the_best(arguments, tmp_path, capsys):
    assert tune.main(arguments) == 0
    first = capsys.readouterr().out
    names = [f"tiny_lr0.001_head{head}" for head in (1, 10)]
    means = []
    for name in names:
        rows = [json.loads(line) for line in (tmp_path / name / "run0_seed0/results.jsonl").open()]
        assert len(rows) == 3
        means.append(100 * sum(row["test_accuracy"] for row in rows) / 3)
    assert f"| inc_lr 0.001 | {means[0]:.1f} | {means[1]:.1f} |" in first
    assert "| inc_lr 1e+30 | failed | failed |" in first
    winner = 10 if means[1] > means[0] else 1
    assert first.endswith(f"tiny: inc_lr 0.001, head_lr_mult {winner}: {max(means):.1f} %\n")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/checkpoint.pt")}
    assert tune.main(arguments) == 0 and capsys.readouterr().out == first
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/checkpoint.pt")}


def test_where_all_fail_it_says_so(arguments, capsys):
    assert tune.main([*arguments, "--rates", "1e30"]) == 0
    assert "tiny: all have failed" in capsys.readouterr().out


@pytest.mark.parametrize("change, says", [
    (["--batches", "1"], "at least 2"), (["--set", "rmsz=3"], "rm_sz"), (["--rates", "-1"], "inc_lr is -1"),
    (["--order", "12"], "run")])
def test_bad_input_is_one_sentence(arguments, change, says, capsys):
    assert tune.main([*arguments, *change]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
