"""Running anew what the tables tell of: the commands of a page of results, and runs beside its records."""
import json
import re
import shutil
import sys

import pytest

import ar1star_lat_replay as program
from helpers import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import rerun

ROW = "| `noise/{0}` | `python ar1star_lat_replay.py --config {1} --name {2} --as {0} --seeds 0-1 " \
      "--set start_batch=4` | 1 |\n"


@pytest.fixture(scope="module")
def results(params, tmp_path_factory):
    """A folder of records, of two seeds, of which one row can be run anew and one cannot."""
    folder = tmp_path_factory.mktemp("results")
    rows = [ROW.format("one", params, "tiny"), ROW.format("two", params, "nothing")]
    (folder / "README.md").write_text("".join(rows))
    arguments = ["--config", str(params), "--name", "tiny", "--as", "one", "--seeds", "0-1"]
    assert program.main([*arguments, "--set", "start_batch=4", "--log-dir", str(folder / "noise")]) == 0
    return folder


def test_rows_are_run_anew_and_compared_run_by_run_and_not_repeated(results, tmp_path, monkeypatch, capsys):
    """Of the two runs of a row the second is there already, and its record has been changed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")      # as this process: the same bits
    again = tmp_path / "again" / "noise" / "one"
    shutil.copytree(results / "noise" / "one" / "run0_seed1", again / "run0_seed1")
    before = (again / "run0_seed1" / "checkpoint.pt").stat().st_mtime_ns
    changed = results / "noise" / "one" / "run0_seed1" / "results.jsonl"
    lines = changed.read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"test_accuracy": 0.0})
    changed.write_text("\n".join(lines))

    folders = ["--results", str(results), "--log-dir", str(tmp_path / "again")]
    assert rerun.main(["noise", *folders, "--jobs", "2"]) == 1
    said = capsys.readouterr()
    assert "failed: noise/two;" in said.err.splitlines()[-1]
    assert "nothing" in (tmp_path / "again" / "noise" / "two.log").read_text()
    values = [100 * json.loads(line)["test_accuracy"] for line in (again / "run0_seed0/results.jsonl").open()]
    told = f"{values[-1]:.1f} | {sum(values) / len(values):.1f}"
    assert f"| noise/one run0_seed0 | {told} | {told} | 0.0 |" in said.out

    assert (again / "run0_seed1" / "checkpoint.pt").stat().st_mtime_ns == before
    pattern = r"run0_seed1 \| (.*?) \| .*? \| (.*?) \| .*? \| (.*?) \|"
    recorded, now, difference = re.search(pattern, said.out).groups()
    assert recorded == "0.0" and now == difference != "0.0"


def test_a_run_that_is_not_finished_is_compared_with_nothing(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rerun, "run", lambda *args: 0)
    assert rerun.main(["noise/one", "--results", str(results), "--log-dir", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.count("| not finished |") == 2


def test_the_commands_are_those_of_the_page():
    found = rerun.commands(REPO / "docs" / "results", ["rendered", "variants/low"])
    assert len(found) == 1 + len(list((REPO / "docs" / "results" / "rendered").iterdir()))
    assert all(words[0] == "ar1star_lat_replay.py" and "--as" in words for words in found.values())


@pytest.mark.parametrize("arguments, says", [
    (["nowhere"], "nowhere"), (["rendered", "--results", "no/folder"], "--results"),
    (["rendered", "--jobs", "0"], "--jobs is 0")])
def test_bad_input_is_one_sentence(arguments, says, capsys):
    try:
        assert rerun.main(arguments) == 2
    except SystemExit as error:
        assert error.code == 2
    assert says in capsys.readouterr().err


def test_a_row_without_a_record_tells_what_was_run(results, tmp_path, monkeypatch, capsys):
    again = tmp_path / "again" / "noise" / "one"
    shutil.copytree(results / "noise" / "one" / "run0_seed0", again / "run0_seed0")
    shutil.copy(results / "README.md", tmp_path)
    monkeypatch.setattr(rerun, "run", lambda *args: 0)
    assert rerun.main(["noise/one", "--results", str(tmp_path), "--log-dir", str(tmp_path / "again")]) == 0
    assert "| noise/one run0_seed0 | not run | | " in capsys.readouterr().out
