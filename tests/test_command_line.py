"""What the command line says while it works, and what it refuses."""
import io
import json
import re
import sys

import pytest

import ar1star_lat_replay as program
from helpers import REPO
from lab.record import Stop, progress_bar
from tiny import BATCHES

SAMPLE = REPO.parent / "shared" / "core50_sample" / "core50_128x128"
KINDS = ["adapter", "phone", "scissors", "bulb", "can", "glasses", "ball", "marker", "cup", "remote"]     # of five objects


def refused(capsys, argv, *parts):
    assert program.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in parts), error


# ---- signs of life ----

def test_output_that_is_no_terminal_gets_a_line_per_batch(command, capsys):
    assert program.main([*command[:-1], "3"]) == 0
    out, err = capsys.readouterr()
    told = err.splitlines()
    assert told[:3] == ["reading the test images", "encoding 24 test images", "learning the large first batch"]
    assert [re.sub(r"[\d.]+%, [\d.]+ s", "", line) for line in told[3:]] == [f"batch {k} of 3: accuracy " for k in (1, 2, 3)]
    assert re.search(r"accuracy after 3 of 6 batches, on 24 test images: [\d.]+% \(mean over the 3 tests: [\d.]+%\)\n$", out)
    assert "curves: tensorboard --logdir " in out and "table: python ar1star_lat_replay.py --report " in out

    assert program.main(command) == 0
    out, err = capsys.readouterr()
    assert "continuing after batch 3 of 6\nbatch 4 of 6: accuracy" in err and "batch 3 of 6: accuracy" not in err

    assert program.main(command) == 0
    out, err = capsys.readouterr()
    assert "finished, 6 of 6 batches are learned; --fresh starts over" in err and "accuracy after 6 of 6 batches" in out


class Terminal(io.StringIO):
    encoding = "utf-8"
    isatty = lambda self: True


def test_the_bar_of_a_continued_run_counts_from_where_it_continues(monkeypatch):
    """tqdm takes (n - initial) / time for the pace: 70 batches learned earlier would make the time left too short."""
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    row = {"test_accuracy": .5, "seconds_train": 1.0}
    with progress_bar() as advance:
        advance([row] * 71, 79)
        bar = advance.__closure__
        bar = next(cell.cell_contents for cell in bar if hasattr(cell.cell_contents, "initial"))
        assert (bar.initial, bar.n, bar.total) == (70, 71, 79)
        advance([row] * 72, 79)
        assert (bar.initial, bar.n) == (70, 72)
    assert "72/79" in screen.getvalue() and "accuracy 50.0%" in screen.getvalue()


def test_a_stop_is_false_until_it_is_asked_for():
    stop = Stop()
    assert not stop and stop.at_once
    stop.asked = True
    assert stop


# ---- names and places ----

def test_as_names_the_folder_of_a_variation(command, tmp_path, capsys):
    assert program.main([*command[:-1], "1"]) == 0
    capsys.readouterr()
    changed = [*command[:-1], "1", "--set", "inc_lr=0.5"]
    refused(capsys, changed, "was made with other settings: inc_lr (then 0.01, now 0.5)", "--as NAME")
    assert program.main([*changed, "--as", "fast"]) == 0
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["fast", "tiny"]


@pytest.mark.parametrize("name", ["a/../../b", "..", ".", "a/b", "", "/tmp/x", "a\\b"])
def test_a_folder_outside_the_log_folder_is_refused(command, tmp_path, capsys, name):
    assert program.main([*command, "--as", name]) == (0 if name == "" else 2)
    if name:
        assert f"the name {name!r} cannot be that of a folder" in capsys.readouterr().err
        assert not (tmp_path / "logs").exists()


def test_the_home_folder_is_found_behind_an_equals_sign(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    argv = [*command[:command.index("--log-dir")], "--log-dir=~/logs", "--max-batches", "1"]
    assert program.main(argv) == 0
    assert (tmp_path / "home/logs/tiny/run0_seed0/results.jsonl").is_file() and not (tmp_path / "~").exists()


# ---- contradictions ----

@pytest.mark.parametrize("arguments, key", [
    (["--seed", "1", "--set", "seed=2"], "seed"), (["--runs", "2,4", "--set", "run=7"], "run"),
    (["--set", "rm_sz=1", "--set", "rm_sz=2"], "rm_sz"), (["--data", "x", "--set", "data=y"], "data")])
def test_a_setting_given_twice_is_refused(capsys, arguments, key):
    refused(capsys, arguments, f"{key} is given twice on the command line")


def test_orders_of_own_images_are_refused(capsys):
    refused(capsys, ["--name", "folder", "--runs", "0-2"], "these settings would do nothing: run (with dataset folder)")


@pytest.mark.parametrize("value", ["010", "0x10", "1:30", "1_0"])
def test_a_number_that_is_not_decimal_is_refused(capsys, value):
    refused(capsys, ["--set", f"seed={value}"], f"seed is {value!r}; it must be a whole number")


# ---- lists ----

def test_list_keeps_names_and_comments_apart(capsys):
    assert program.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = {re.match(r"\w+ {2,}", line).end() for line in lines}
    assert len(lines) > 15 and len(starts) == 1


# ---- few images of one's own ----

@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"needs real frames of CORe50, and {SAMPLE} is not there")
def test_seventy_real_images_of_ten_kinds_are_learned(tmp_path, standin_weights):
    """Seven sessions of about ten images: DEFAULT ends at 5 %, since its learning rate is made for 300 images a batch."""
    for frame in SAMPLE.rglob("*.png"):
        session, kind = int(frame.parts[-3][1:]), KINDS[(int(frame.parts[-2][1:]) - 1) // 5]
        folder = tmp_path / "images" / ("test" if session in (3, 7) else f"train/{session}") / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / frame.name).write_bytes(frame.read_bytes())
    argv = ["--name", "folder", "--data", str(tmp_path / "images"), "--weights", str(standin_weights), "--device", "cpu",
            "--log-dir", str(tmp_path / "logs")]
    assert program.main(argv) == 0
    lines = (tmp_path / "logs/folder/run0_seed0/results.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert len(lines) == 7 > BATCHES and last["n_test"] == 20 and last["test_accuracy"] >= .5
