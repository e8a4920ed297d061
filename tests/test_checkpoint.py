"""The folder of a run: damaged and foreign checkpoints, folders that cannot be used, disks that are full."""
import os
import random
import shutil
import subprocess

import pytest
import torch
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

import ar1star_lat_replay as program
from harness.checkpoint import CheckpointError, RunFolder
from harness.config import load_config
from helpers import PARAMS, same
from test_mobilenet import published_state
from tiny import all_files, before_learning, outcome, said, saved, some_batches


def test_a_damaged_checkpoint_is_refused_and_nothing_is_destroyed(command, tmp_path, capfd):
    file = some_batches(command)
    config, rng = load_config("tiny", command[1]), random.Random(0)
    whole, good = file.read_bytes(), torch.load(file)
    wrong = [whole[:n] for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)] + [rng.randbytes(5000)]
    for _ in range(30):     # most of it is numbers, in which torch.load would not notice
        k = rng.randrange(len(whole))
        wrong.append(whole[:k] + rng.randbytes(4) + whole[k + 4:])
    refused = 0
    for content in wrong:
        file.write_bytes(content)
        before = all_files(tmp_path / "logs")
        try:
            RunFolder(file.parent, config).close()
        except CheckpointError as error:
            refused += 1
            assert "checkpoint.pt is damaged" in str(error) and "--fresh" in str(error)
            assert all_files(tmp_path / "logs") == before
        else:   # padding between the records of the file
            assert same(torch.load(file) | {"files": 0}, good | {"files": 0})
    assert refused >= len(wrong) - 5
    for other in ({"rows": []}, [1, 2]):
        torch.save(other, file)
        said(capfd, 2, command, "checkpoint.pt is damaged", "--fresh")
    assert program.main([*command, "--fresh", "--max-batches", "2"]) == 0


def test_what_is_refused_changes_nothing(command, expected, tmp_path, capfd):
    """A run that cannot start over, other settings, and results whose checkpoint has gone."""
    file = some_batches(command)
    before = all_files(tmp_path / "logs")
    for wrong, *parts in (
            (["--fresh", "--weights", "nowhere.pth"], "nowhere.pth"),
            (["--fresh", "--set=rm_dtype=pq", "--set=pq_codes=7"], "pq_codes"),
            (["--fresh", "--set=slda_weight=1", "--set=slda_layer=0"], "slda_layer"),
            (["--set=rm_sz=60", "--set=inc_lr=0.5"], "inc_lr (then 0.01, now 0.5)", "rm_sz (then 50, now 60)",
             "--as NAME", "--fresh")):
        said(capfd, 2, command + wrong, *parts)
        assert all_files(tmp_path / "logs") == before
    assert program.main([*command, "--set", "checkpoint_share=0.5"]) == 0   # which is free to change
    assert same(outcome(tmp_path / "logs")[0], expected[0])

    file.unlink()
    before = all_files(tmp_path / "logs")
    said(capfd, 2, command, "results but no checkpoint", "--fresh")
    assert all_files(tmp_path / "logs") == before
    assert program.main([*command, "--fresh", "--max-batches", "1"]) == 0
    assert len(outcome(tmp_path / "logs")[0]) == 1


def test_a_run_continues_with_the_same_weights_wherever_they_lie_and_with_no_others(command, tmp_path, capfd):
    """A path is not what the run was made with, and a file may be written over."""
    here, there = tmp_path / "here.pth", tmp_path / "there.pth"
    torch.save(published_state(), here)
    torch.save({"state_dict": published_state()}, there)
    command = [*command[:-1], "1", "--set=width=0.125", "--weights"]
    assert program.main([*command, str(here)]) == 0
    command[command.index("1")] = "2"
    torch.save(published_state(seed=1), here)
    before = all_files(tmp_path / "logs")
    for weights in ("none", "nowhere.pth", str(here)):
        if weights != "nowhere.pth":
            said(capfd, 2, [*command, weights], "other weights", "here.pth", weights, "--as NAME", "--fresh")
        else:
            said(capfd, 2, [*command, weights], "nowhere.pth", "--weights FILE")
        left = all_files(tmp_path / "logs")
        assert before.items() <= left.items()       # the next command deletes events that nothing counts
    assert program.main([*command, str(there)]) == 0
    assert len(saved(tmp_path / "logs")["rows"]) == 2


def test_results_that_were_deleted_or_damaged_come_back(command, ends_as_expected):
    folder = some_batches(command).parent
    (folder / "results.jsonl").unlink()
    for file in folder.glob("events.*"):
        file.unlink()
    (folder / "config.yaml").unlink()
    assert program.main([*command[:-1], "4"]) == 0
    with open(folder / "results.jsonl", "r+b") as file:     # a power failure
        file.seek(600)
        file.write(bytes(500))
    ends_as_expected()
    assert (folder / "config.yaml").exists()


# ---- the log folder ----

def test_files_where_folders_should_be_and_the_reverse(command, tmp_path, capfd):
    logs = tmp_path / "logs"
    logs.write_text("mine")
    said(capfd, 2, command, str(logs), "--log-dir")
    assert logs.read_text() == "mine"
    logs.unlink()
    folder = logs / "tiny" / "run0_seed0"
    for name in ("run.lock", "checkpoint.pt", "results.jsonl", "config.yaml"):
        (folder / name).mkdir(parents=True)
        said(capfd, 2, command, str(folder))
        (folder / name).rmdir()
    assert program.main([*command, "--max-batches", "1"]) == 0


@pytest.fixture
def disk(tmp_path):
    """disk(options) mounts tmp_path/logs as a small file system, or changes its options."""
    logs, mounted = tmp_path / "logs", []

    def mount(options):
        logs.mkdir(exist_ok=True)
        remount = ["-o", f"remount,{options}"] if mounted else ["-t", "tmpfs", "-o", options, "tmpfs"]
        done = subprocess.run(["mount", *remount, logs], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs the right to mount a small tmpfs ({done.stderr.strip()})")
        mounted.append(options)
        return logs
    yield mount
    if mounted:
        subprocess.run(["umount", "-l", logs], check=True)


def test_a_read_only_log_folder(command, disk, ends_as_expected, capfd):
    logs = disk("size=20m")
    some_batches(command)
    before = all_files(logs)
    disk("ro,size=20m")
    for extra in ([], ["--fresh"], ["--seed", "5"]):
        said(capfd, 2, command + extra, str(logs), "Read-only file system", "--log-dir")
    assert all_files(logs) == before
    disk("rw,size=20m")
    ends_as_expected()


@pytest.mark.parametrize("share, saves", [(1.0, 3), (.05, 1)])
def test_a_share_of_1_saves_after_every_batch_however_long_it_takes(tmp_path, monkeypatch, share, saves):
    """Each save takes 10 s of a clock that stands still between the batches."""
    config = load_config("demo", PARAMS, {"checkpoint_share": share})
    seconds, kept = iter(range(0, 1000, 10)), []
    monkeypatch.setattr("harness.checkpoint.time.monotonic", lambda: next(seconds))
    folder = RunFolder(tmp_path / "x", config)
    monkeypatch.setattr("harness.checkpoint.os.replace", lambda *files: kept.append(files))
    for _ in range(3):
        folder.save({"rows": []})
    folder.close()
    assert len(kept) == saves


@pytest.mark.parametrize("spare", [0, 100_000])
def test_a_disk_that_fills_up(command, disk, ends_as_expected, capfd, monkeypatch, spare):
    """With 0 bytes left nothing can be written, with 100,000 a line of results, but no checkpoint."""
    logs = disk("size=20m")

    def fill_up(i):
        if i == 3 and not (logs / "filler").exists():
            with open(logs / "filler", "wb", buffering=0) as file:
                free = os.statvfs(logs)
                file.write(bytes(max(0, free.f_bavail * free.f_frsize - spare)))

    monkeypatch.setattr(program.Learner, "learn", before_learning(fill_up))
    said(capfd, 1, command, "No space left on device", "the last checkpoint is kept", "make room")
    assert len(saved(logs)["rows"]) == 3 and not list(logs.rglob("*.tmp"))
    if spare == 0:
        said(capfd, 1, command, "make room")        # still full: said again, nothing lost
        assert len(saved(logs)["rows"]) == 3
    monkeypatch.undo()
    (logs / "filler").unlink()
    ends_as_expected()


@pytest.mark.parametrize("victim", ["results", "writer", "writer at the start"])
def test_a_disk_that_is_full_for_one_file(command, ends_as_expected, tmp_path, capfd, monkeypatch, victim):
    """What the thread of TensorBoard's writer meets is told by us, not by a traceback, and not swallowed."""
    append, write, full = LocalFileSystem.append, RunFolder.write_row, []

    def fails(*args):
        if full:
            raise OSError(28, "No space left on device")
        return append(*args)

    def fill_up(i):
        if i == 3:
            full.append(True)

    def write_row(self, row):
        if full:
            self.results = open("/dev/full", "w")
        return write(self, row)
    with monkeypatch.context() as patch:
        patch.setattr(program.Learner, "learn", before_learning(fill_up))
        if victim == "results":
            patch.setattr(RunFolder, "write_row", write_row)
        else:
            patch.setattr(LocalFileSystem, "append", fails)
        if victim == "writer at the start":
            some_batches(command)
            patch.setattr(LocalFileSystem, "write", fails)
            full.append(True)
        said(capfd, 1, command, "No space left on device", "make room")
    assert len(saved(tmp_path / "logs")["rows"]) == 3
    ends_as_expected()


def test_a_log_folder_that_is_deleted_in_mid_run(command, tmp_path, capfd, monkeypatch):
    def delete(i):
        if i == 2:
            shutil.rmtree(tmp_path / "logs", ignore_errors=True)
    monkeypatch.setattr(program.Learner, "learn", before_learning(delete))
    said(capfd, 1, command, str(tmp_path / "logs"), "No such file or directory")
