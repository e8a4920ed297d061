"""Processes that are killed, interrupted or in each other's way: nothing but time is lost.

They are forked from a server that has imported torch already.
"""
import os
import random
import signal
import sys
import time

import pytest
import torch

import ar1star_lat_replay as program
from harness.config import load_config
from helpers import PARAMS, forkserver, same
from tiny import DEMO_WORDS, SMALL_DEMO, before_learning, outcome, said, saved, train_steps, words


def child(argv, output, fault):
    """main(argv) in a forked process, its output into a file; fault: a function's name, and its arguments."""
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if fault:
        globals()[fault[0]](*fault[1:])
    code = program.main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def kill_while_saving(phase, n):
    """Kills this process in its n-th saving: with half of it written, before it gets its name, or after."""
    saves, save, replace = iter(range(n - 1, -1, -1)), torch.save, os.replace

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def half_save(state, file):
        if next(saves, 0) == 0:
            start = file.tell()
            save(state, file)
            if phase == "half":
                file.truncate((start + file.tell()) // 2)
                kill()
            os.replace = kill_replace
        else:
            save(state, file)

    def kill_replace(source, target):
        if phase == "after":
            replace(source, target)
        kill()
    torch.save = half_save


def stop_in_batch(number, *signals):
    """Sends this process signals while it learns batch `number`."""
    waiting = list(signals)

    def act(i):
        while i == number and waiting:
            os.kill(os.getpid(), waiting.pop(0))
            time.sleep(.01)     # the handler runs between two instructions of Python
    program.Learner.learn = before_learning(act)


def wait_in_batch(number, file):
    """Stays in batch `number` until the file has gone."""
    waited = []

    def act(i):
        if i == number and not waited:
            waited.append(file.touch())
            while file.exists():
                time.sleep(.01)
    program.Learner.learn = before_learning(act)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(argv, fault=None) -> a running process; .text() is what it printed so far."""
    context = forkserver()
    outputs, started = tmp_path_factory.mktemp("outputs"), []

    def launch(argv, fault=None):
        output = outputs / f"{len(started)}.txt"
        output.touch()      # a kill may come before the child opens it
        process = context.Process(target=child, args=(argv, output, fault))
        process.start()
        process.text = lambda: output.read_text()
        started.append(process)
        return process

    finished(launch(["--list"]), 0)     # so that the server is ready
    yield launch
    for process in started:
        process.kill()
        process.join()


def finished(process, status):
    process.join(60)
    assert process.exitcode == status and "Traceback" not in process.text(), process.text()
    return process.text()


def test_kill_9_at_random_moments_costs_nothing_but_time(start, params, expected, tmp_path):
    """Ten kills, six of them in the middle of saving; every run that comes to its end is compared."""
    rng, kills, finals, k, reached = random.Random(0), 0, 0, 0, set()
    began = time.monotonic()
    finished(start(words(params, tmp_path / "timing")), 0)
    seconds = time.monotonic() - began      # that a whole run takes; a continued one less
    saving = [("after", 1), ("before", 2), ("half", 1), ("after", 2), ("before", 1), ("half", 2)]
    while kills < 10 or finals == 0:
        logs = tmp_path / f"logs{finals}"
        in_saving = saving and k % 3
        process = start(words(params, logs), ("kill_while_saving", *saving.pop()) if in_saving else None)
        if kills >= 10:
            finished(process, 0)
        elif not in_saving:
            process.join(rng.uniform(0, seconds))
            process.kill()
        process.join(60)
        k += 1
        assert process.exitcode in (0, -signal.SIGKILL) and "Traceback" not in process.text(), process.text()
        kills += process.exitcode == -signal.SIGKILL
        folder = logs / "tiny" / "run0_seed0"
        reached.add(len(saved(logs)["rows"]) if (folder / "checkpoint.pt").exists() else 0)
        if process.exitcode == 0:
            assert same(outcome(logs), expected)
            assert train_steps(folder) == list(range(expected[0][-1]["train_steps"]))
            assert not list(logs.rglob("*.tmp"))
            finals += 1
        seconds *= .7 if process.exitcode == 0 and not in_saving else 1.05
    assert len(reached) >= 4, reached   # the kills came at different batches
    print(f"{kills} kills, {finals} runs compared, batches done after a kill: {sorted(reached)}")


def test_the_demo_goes_on_when_a_kill_left_its_two_runs_at_different_batches(drawn_once, tmp_path, capsys):
    argv = [*DEMO_WORDS, "--log-dir", str(tmp_path), "--max-batches"]
    assert program.main([*argv, "1"]) == 0
    naive = load_config("demo", PARAMS, SMALL_DEMO | {"rm_sz": 0, "cwr_consolidation": "none"})
    program.run(naive, "demo_naive", tmp_path, 2)
    assert program.main([*argv, "3"]) == 0
    err = capsys.readouterr().err
    assert "continuing after batch 1 of 46" in err and "continuing after batch 2 of 46" in err
    assert [len(file.read_text().splitlines()) for file in tmp_path.rglob("results.jsonl")] == [3, 3]


@pytest.mark.parametrize("batch, signals, rows, says", [
    (2, [signal.SIGINT], 3, "batch 3 of 6"), (2, [signal.SIGTERM], 3, "batch 3 of 6"),
    (2, [signal.SIGINT, signal.SIGINT], 2, "at once"),
    (5, [signal.SIGINT], 6, "batch 6 of 6; this run is finished"),      # and another may not begin
    (0, [signal.SIGINT], 0, "starts anew")])       # batch 0 is lost either way, and takes the longest of all
def test_a_signal_lets_the_batch_end_and_the_same_command_goes_on(
        start, command, ends_as_expected, tmp_path, batch, signals, rows, says):
    output = finished(start(command, ("stop_in_batch", batch, *signals)), 130)
    assert says in output.splitlines()[-1] and ("press Ctrl-C again" in output) == (batch > 0)
    checkpoint = tmp_path / "logs" / "tiny" / "run0_seed0" / "checkpoint.pt"
    assert (len(saved(tmp_path / "logs")["rows"]) if checkpoint.exists() else 0) == rows
    ends_as_expected()


def test_a_second_process_in_the_same_folder_is_refused(start, command, expected, tmp_path, capfd):
    here = tmp_path / "here"
    first = start(command, ("wait_in_batch", 2, here))
    while not here.exists():
        assert first.is_alive(), first.text()
        time.sleep(.02)
    for extra in ([], ["--fresh"]):
        said(capfd, 2, command + extra, "another process", "--seed", "--log-dir")
    here.unlink()
    finished(first, 0)
    assert same(outcome(tmp_path / "logs"), expected)
