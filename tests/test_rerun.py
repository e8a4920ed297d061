"""Running anew what the tables tell of: the commands of a page of results, and their runs beside its records."""
import json
import re
import sys

import pytest

import ar1star_lat_replay as program
from helpers import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import rerun

ROW = "| `noise/{0}` | `python ar1star_lat_replay.py --config {1} --name {2} --as {0} --seeds 0-1` | 1 |\n"


@pytest.fixture
def results(params, tmp_path, monkeypatch):
    """A folder of records, of two seeds, of which one row can be run anew and one cannot."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")      # as this process: the same bits
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "README.md").write_text(ROW.format("one", params, "tiny") + ROW.format("two", params, "nothing"))
    arguments = ["--config", str(params), "--name", "tiny", "--as", "one", "--seeds", "0-1"]
    assert program.main([*arguments, "--log-dir", str(folder / "noise")]) == 0
    return folder


def test_a_row_is_run_anew_and_compared_run_by_run_and_not_repeated(results, tmp_path, capsys):
    arguments = ["noise/one", "--results", str(results), "--log-dir", str(tmp_path / "again")]
    assert rerun.main(arguments) == 0
    first = capsys.readouterr().out
    runs = [tmp_path / "again" / "noise" / "one" / f"run0_seed{r}" / "results.jsonl" for r in (0, 1)]
    for r, run in enumerate(runs):
        values = [100 * json.loads(line)["test_accuracy"] for line in run.open()]
        told = f"{values[-1]:.1f} | {sum(values) / len(values):.1f}"
        assert f"| noise/one run0_seed{r} | {told} | {told} | 0.0 |" in first
    saved = [run.with_name("checkpoint.pt") for run in runs]
    before = [file.stat().st_mtime_ns for file in saved]
    changed = results / "noise" / "one" / "run0_seed1" / "results.jsonl"
    lines = changed.read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"test_accuracy": 0.0})
    changed.write_text("\n".join(lines))
    assert rerun.main(arguments) == 0 and [file.stat().st_mtime_ns for file in saved] == before
    recorded, now, difference = re.search(r"run0_seed1 \| (.*?) \| .*? \| (.*?) \| .*? \| (.*?) \|",
                                          capsys.readouterr().out).groups()
    assert recorded == "0.0" and now == difference != "0.0"


def test_a_command_that_fails_is_named_and_the_others_are_compared(results, tmp_path, capsys):
    arguments = ["noise", "--results", str(results), "--log-dir", str(tmp_path / "again"), "--jobs", "2"]
    assert rerun.main(arguments) == 1
    said = capsys.readouterr()
    assert said.out.count("| 0.0 |") == 2 and said.err.splitlines()[-1].count("failed: noise/two;") == 1
    assert "nothing" in (tmp_path / "again" / "noise" / "two.log").read_text()


def test_a_run_that_is_not_finished_is_compared_with_nothing(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rerun, "run", lambda *args: 0)
    assert rerun.main(["noise/one", "--results", str(results), "--log-dir", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.count("| not finished |") == 2


def test_the_commands_are_those_of_the_page():
    found = rerun.commands(REPO / "docs" / "results", ["rendered", "photographs/ncm"])
    assert len(found) == 1 + len(list((REPO / "docs" / "results" / "rendered").iterdir()))
    assert all(words[0] == "ar1star_lat_replay.py" and "--as" in words for words in found.values())


@pytest.mark.parametrize("arguments, says", [
    (["nowhere"], "tells of no 'nowhere'; it has "), (["rendered", "--results", "nowhere"], "--results names the folder"),
    (["rendered", "--jobs", "0"], "--jobs is 0")])
def test_bad_input_is_one_sentence(arguments, says, capsys):
    try:
        assert rerun.main(arguments) == 2
    except SystemExit as error:
        assert error.code == 2
    assert says in capsys.readouterr().err
