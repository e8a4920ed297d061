"""What the command line says while it works, and what it refuses."""
import json
import os
import re
import shlex
import struct
import subprocess
import sys

import pytest

import ar1star_lat_replay as program
from harness import data_cli, encoder, printing
from harness.console import progress_bar
from helpers import REPO
from streams import demo
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


@pytest.mark.parametrize("size", [(0, 0), (0, 80), (24, 0)])
def test_a_terminal_without_columns_or_lines_gets_a_line_per_batch(monkeypatch, size):
    """A fresh pseudo-terminal is one, and tqdm draws nothing on it."""
    fcntl, termios = (pytest.importorskip(name) for name in ("fcntl", "termios"))
    main, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))
    with open(terminal, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        with progress_bar() as advance:
            advance([{"test_accuracy": .5, "seconds_train": 1.0}], 79)
        shown = os.read(main, 999).decode()
        os.close(main)
    assert "batch 1 of 79" in shown and "50.0%" in shown and shown.count("\n") == 1


def test_other_bars_are_seen_on_a_terminal_without_columns():
    """Those of a download, for example; tqdm is told a size before it is imported."""
    main, terminal = os.openpty()       # of 0 columns
    code = "from harness.console import safe_output\nsafe_output()\nimport tqdm\nlist(tqdm.tqdm(range(3)))"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, stderr=terminal, check=True)
    assert "3/3" in os.read(main, 999).decode()
    os.close(main)
    os.close(terminal)


def test_a_precision_that_the_cpu_would_emulate(command, tmp_path, capsys, monkeypatch):
    """It is computed as medium there; the records tell; and another CPU may go on, each in its own way."""
    for units, done in ((False, 1), (True, 2), (False, 3)):
        monkeypatch.setattr(encoder, "cpu_multiplies_bfloat16", lambda units=units: units)
        assert program.main([*command[:-1], str(done), "--set", "matmul_precision=low",
                             "--set", "precision=bf16"]) == 0
        told = [line for line in capsys.readouterr().err.splitlines() if "bfloat16" in line]
        assert len(told) == (0 if units else 2)
        assert units or "medium" in told[0] and "float32" in told[1]
    rows = [json.loads(line) for line in open(tmp_path / "logs/tiny/run0_seed0/results.jsonl")]
    assert [row["matmul_precision"] for row in rows] == ["medium", "low", "medium"]
    assert [row.get("precision") for row in rows] == [None, "bf16", None]


@pytest.mark.parametrize("flags, units", [
    ("flags : fpu sse4_2 avx2 f16c\n", False), ("flags : avx512f avx512bw avx512vl avx512_vnni\n", False),
    ("flags : avx512bw avx512_bf16\n", True), ("flags : amx_bf16 amx_tile\n", True),
    ("Features : fp asimd i8mm bf16 dgh\n", True), (OSError("no such file"), False)])
def test_units_for_bfloat16_are_found(flags, units, monkeypatch):
    def read_text(path):
        if isinstance(flags, OSError):
            raise flags
        return flags

    monkeypatch.setattr(encoder.Path, "read_text", read_text)
    assert encoder.cpu_multiplies_bfloat16() == units


def test_commands_that_are_printed_can_be_copied(capsys, monkeypatch):
    monkeypatch.setattr(demo, "export_demo", lambda root: dict.fromkeys(
        ("train", "classes", "batches", "test"), 2))
    data_cli.export_demo("my images")
    assert shlex.split(capsys.readouterr().out.split("`")[1])[-2:] == ["--data", "my images"]
    printing.print_where_curves_are("my logs")
    out = capsys.readouterr().out
    assert shlex.split(out.split("table: ")[1])[-2:] == ["--report", "my logs"]
    assert shlex.split(out.split("curves: ")[1].split(";")[0])[-1] == "my logs"


def test_one_test_is_not_called_tests(capsys):
    row = {"batches": 6, "n_test": 24}
    for rows, words in (([row], "one test:"), ([row] * 2, "2 tests:")):
        printing.print_results({"rows": rows, "final_accuracy": .5, "mean_accuracy": .25})
        out = capsys.readouterr().out
        assert f"{words} 25.00%" in out


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
    argv = ["--name", "folder", "--data", str(tmp_path / "images"), "--weights", str(standin_weights),
            "--set=image_size=128"]     # as large as they are
    assert program.main([*argv, "--device", "cpu", "--log-dir", str(tmp_path / "logs")]) == 0
    rows = [json.loads(line) for line in open(tmp_path / "logs/folder/run0_seed0/results.jsonl")]
    assert len(rows) == 7 and rows[-1]["n_test"] == 20 and rows[-1]["test_accuracy"] >= .5
