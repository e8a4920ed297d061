"""What the command line says while it works, and what it refuses."""
import json
import re
import sys

import pytest

import ar1star_lat_replay as program
from harness.console import progress_bar
from helpers import REPO
from tiny import Terminal, said

SAMPLE = REPO.parent / "shared" / "core50_sample" / "core50_128x128"
KINDS = ["adapter", "phone", "scissors", "bulb", "can", "glasses", "ball", "marker", "cup", "remote"]


# ---- signs of life ----

def test_output_that_is_no_terminal_gets_a_line_per_batch(command, capsys):
    assert program.main([*command[:-1], "3"]) == 0
    out, err = capsys.readouterr()
    told = err.splitlines()
    assert told[:3] == [
        "reading the test images", "encoding 24 test images", "learning the large first batch"]
    assert [re.sub(r"[\d.]+%, [\d.]+ s$", "", line) for line in told[3:]] == [
        f"batch {k} of 3: accuracy " for k in (1, 2, 3)]
    assert re.search(r"after 3 of 6 batches, on 24 test images: [\d.]+% \(mean .*3 tests: [\d.]+%\)\n$", out)
    assert "tensorboard --logdir " in out and "ar1star_lat_replay.py --report " in out

    assert program.main(command) == 0
    out, err = capsys.readouterr()
    assert "continuing after batch 3 of 6\nbatch 4 of 6: accuracy" in err
    assert "batch 3 of 6: accuracy" not in err

    assert program.main(command) == 0
    out, err = capsys.readouterr()
    assert "finished, 6 of 6 batches" in err and "--fresh" in err and "accuracy after 6 of 6 batches" in out


def test_the_bar_of_a_continued_run_counts_from_where_it_continues(monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    row = {"test_accuracy": .5, "seconds_train": 1.0}
    with progress_bar() as advance:
        advance([row] * 71, 79)
        advance([row] * 72, 79)
    assert "72/79" in screen.getvalue() and "accuracy 50.0%" in screen.getvalue()


# ---- names and places ----

def test_as_names_the_folder_of_a_variation(command, tmp_path, capfd):
    one = [*command[:-1], "1"]
    assert program.main(one) == 0
    changed = [*one, "--set", "inc_lr=0.5"]
    said(capfd, 2, changed, "inc_lr (then 0.01, now 0.5)", "--as NAME")
    assert program.main([*changed, "--as", "fast"]) == 0
    assert program.main([*one, "--as", ""]) == 0        # the experiment's name
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["fast", "tiny"]


@pytest.mark.parametrize("name", ["a/../../b", "..", ".", "a/b", "/tmp/x", "a\\b"])
def test_a_folder_outside_the_log_folder_is_refused(command, tmp_path, capfd, name):
    said(capfd, 2, [*command, "--as", name], f"the name {name!r}", "--as NAME")
    assert not (tmp_path / "logs").exists()


def test_the_home_folder_is_found_behind_an_equals_sign(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert program.main([*command[:4], "--log-dir=~/logs", "--max-batches", "1"]) == 0
    assert (tmp_path / "home/logs/tiny/run0_seed0/results.jsonl").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("arguments, part", [
    ("--seed 1 --set seed=2", "seed is given twice"), ("--runs 2,4 --set run=7", "run is given twice"),
    ("--seeds 0-1 --set seed=1", "seed is given twice"), ("--data x --set data=y", "data is given twice"),
    ("--set rm_sz=1 --set rm_sz=2", "rm_sz is given twice"), ("--seeds 0-1 --seed 1", "--seed and --seeds"),
    ("--seeds x", "--seeds is 'x'"), (f"--seeds {2**63}", f"seed is {2**63}; it must be")])
def test_settings_that_contradict_each_other_are_refused(capfd, arguments, part):
    said(capfd, 2, arguments.split(), part)


# ---- lists ----

def test_list_keeps_names_and_comments_apart(capsys):
    assert program.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = [line for line in lines if not line.startswith(" ")]
    assert files[0] == "params.cfg:" and all(file.startswith("experiments/") for file in files[1:])
    starts = {re.match(r" +\w+ {2,}", line).end() for line in lines if line not in files}
    assert len(lines) > 15 and len(starts) == 1


# ---- few images of one's own ----

@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"needs real frames of CORe50, and {SAMPLE} is not there")
def test_seventy_real_images_of_ten_kinds_are_learned(tmp_path, standin_weights):
    """Seven sessions of ten images: DEFAULT ends at 5 %, as its learning rate is made for 300 a batch."""
    for frame in SAMPLE.rglob("*.png"):
        session = int(frame.parts[-3][1:])
        kind = KINDS[(int(frame.parts[-2][1:]) - 1) // 5]       # of five objects each
        part = "test" if session in (3, 7) else f"train/{session}"
        folder = tmp_path / "images" / part / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / frame.name).write_bytes(frame.read_bytes())
    argv = ["--name", "folder", "--data", str(tmp_path / "images"), "--weights", str(standin_weights)]
    assert program.main([*argv, "--device", "cpu", "--log-dir", str(tmp_path / "logs")]) == 0
    rows = [json.loads(line) for line in open(tmp_path / "logs/folder/run0_seed0/results.jsonl")]
    assert len(rows) == 7 and rows[-1]["n_test"] == 20 and rows[-1]["test_accuracy"] >= .5
