"""Several runs, one after the other or shared among the ranks of torchrun, of which one is killed."""
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch

import ar1star_lat_replay as program
from helpers import REPO, same
from lab import ranks
from lab.command_line import configurations, parse_arguments, parse_seeds
from lab.config import ConfigError, load_config
from lab.ranks import Rank, this_rank
from lab.record import progress_bar
from test_command_line import Terminal, refused
from tiny import BATCHES, TINY, outcome, train_steps

# What torchrun starts: the program, of which rank 1 kills itself once, in its third batch.
KILLED = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = {[str(REPO), str(REPO / "tests")]!r}
import ar1star_lat_replay as program
from tiny import before_learning

def act(batch):
    mark = Path(__file__).with_name("killed")
    if os.environ["RANK"] == "1" and batch == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

program.Learner.learn = before_learning(act)
sys.exit(program.main())
"""


@pytest.fixture
def as_rank(monkeypatch):
    """as_rank(number, world, local_number, local_world): what torchrun puts into the environment."""
    def put(*values):
        for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), values):
            monkeypatch.setenv(name, str(value))
    return put


def with_logs(command, logs):
    """The arguments of the fixture `command`, with other logs."""
    at = command.index("--log-dir") + 1
    return [*command[:at], str(logs), *command[at + 1:]]


# ---- for real ----

@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot choose the cores of a process here")
def test_two_ranks_of_which_one_is_killed_make_the_runs_that_one_process_makes(command, tmp_path, capsys):
    """On two cores, so that a rank has one thread, as this process has: the number of threads can change last bits."""
    alone, shared, cores = tmp_path / "alone", tmp_path / "shared", sorted(os.sched_getaffinity(0))[:2]
    assert program.main([*with_logs(command, alone), "--seeds", "0-2"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("order")]
    assert told == [f"order 0, seed {seed}:" for seed in range(3)]

    (tmp_path / "killed.py").write_text(KILLED)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
         str(tmp_path / "killed.py"), *with_logs(command, shared), "--seeds", "0-2"], env=environment, text=True,
        capture_output=True, timeout=240, preexec_fn=lambda: os.sched_setaffinity(0, cores))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists() and f"continuing after batch 2 of {BATCHES}\n" in done.stderr
    assert done.stdout.count("order 0, seed 1:\n") == 2 and "order 0, seed 2:\n" in done.stdout
    runs = [f"run0_seed{seed}" for seed in range(3)]
    assert sorted(path.name for path in (shared / "tiny").iterdir()) == runs and not list(shared.rglob("*.tmp"))
    for run in runs:
        expected = outcome(alone, run)
        assert len(expected[0]) == BATCHES and same(outcome(shared, run), expected)
        assert train_steps(shared / "tiny" / run) == list(range(expected[0][-1]["train_steps"]))
    assert not same(outcome(alone, runs[0]), outcome(alone, runs[1]))


# ---- who does what ----

def test_every_order_is_made_with_every_seed_and_the_ranks_share_them():
    args = parse_arguments(["--runs", "1,3", "--seeds", "0-1,7", "--name", "demo"])
    runs = [(config.run, config.seed) for config in configurations(args)]
    assert runs == [(1, 0), (1, 1), (1, 7), (3, 0), (3, 1), (3, 7)]
    for world in (1, 2, 4, 7):
        shares = [Rank(number, world).share(runs) for number in range(world)]
        assert sorted(sum(shares, [])) == runs and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ranks_of_the_demo_keep_to_their_own_folders(as_rank, tmp_path, capsys):
    tiny = {key: value for key, value in TINY.items() if key not in ("dataset", "image_size")} | {"test_stride": 20}
    settings = [word for key, value in tiny.items() for word in ("--set", f"{key}={value}")]
    argv = ["--name", "demo", "--log-dir", str(tmp_path), *settings, "--max-batches", "1", "--runs", "2,5"]
    as_rank(1, 2, 0, 1)
    assert program.main(argv) == 0
    assert "order 5, seed 0:\n" in (out := capsys.readouterr().out) and "order 2" not in out
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")) == [
        "demo/run5_seed0", "demo_naive/run5_seed0"]


def test_a_rank_without_a_run_says_so(command, as_rank, tmp_path, capsys):
    as_rank(2, 3, 2, 3)
    for several in ([], ["--seeds", "3,5"]):
        assert program.main([*command, *several]) == 0
        out, err = capsys.readouterr()
        assert out == f"rank 2 of 3, counted from 0, has nothing to do: runs in all: {len(several) or 1}\n" and not err
    assert not (tmp_path / "logs").exists()


def test_a_finished_run_returns_at_once(command, as_rank, tmp_path, capsys):
    assert program.main([*command[:-1], "1", "--seed", "4"]) == 0
    capsys.readouterr()
    as_rank(0, 2, 0, 1)
    assert program.main([*command[:-1], "1", "--seeds", "4,9"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("order 0, seed 4:\n") and "finished, 1 of 6 batches are learned" in err and "seed 9" not in out


# ---- the machine ----

def test_a_rank_has_its_gpu_and_its_threads(monkeypatch):
    configs = {name: load_config("demo", REPO / "params.cfg", {"device": name})
               for name in ("auto", "cuda", "cuda:3", "cpu")}
    for gpus, devices in ((4, ["cuda:2", "cuda:2", "cuda:3", "cpu"]), (2, ["cuda:0", "cuda:0", "cuda:3", "cpu"]),
                          (0, ["auto", "cuda", "cuda:3", "cpu"])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=gpus: n)
        assert [Rank(6, 8, 2, 4).placed(config).device for config in configs.values()] == devices
        assert [Rank().placed(config).device for config in configs.values()] == list(configs)
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(ranks, "usable_cores", lambda: 7)
    for wish in (None, "1", "2", ""):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if wish is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", wish)
        for rank in (Rank(1, 2, 1, 2), Rank(9, 16, 1, 8), Rank(1, 2, 0, 1), Rank()):
            rank.take_threads()
    assert asked == [3, 1] * 2      # a machine's only rank is left alone, and so is who chose a number of threads


def test_the_cores_of_another_program_are_not_counted():
    assert 1 <= ranks.usable_cores() <= os.cpu_count()
    if shutil.which("taskset"):
        code = "from lab.ranks import usable_cores; print(usable_cores())"
        core = str(min(os.sched_getaffinity(0)))
        done = subprocess.run(["taskset", "-c", core, sys.executable, "-c", code], cwd=REPO, text=True, capture_output=True)
        assert done.stdout == "1\n"


def test_ranks_that_share_a_terminal_write_lines(monkeypatch, as_rank):
    as_rank(0, 2)
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with progress_bar() as advance:
        advance([{"test_accuracy": .5, "seconds_train": 1.0}], 79)
    assert screen.getvalue() == "batch 1 of 79: accuracy 50.0%, 1.0 s\n"


@pytest.mark.skipif(not hasattr(socket, "SOCK_SEQPACKET"), reason="needs sockets that keep what is written apart")
def test_ranks_write_a_line_at_once():
    code = "from lab import ranks, record; ranks.print_whole_lines(); print('first'); record.say('second')"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        subprocess.run([sys.executable, "-u", "-c", code], cwd=REPO, stdout=theirs, stderr=theirs, check=True, timeout=60)
        assert [ours.recv(100) for _ in range(2)] == [b"first\n", b"second\n"]


# ---- bad input ----

def test_seeds_option():
    assert [parse_seeds(t) for t in ("0-2", "0,5,7", "12", "9-11,0", " 1 , 1-2", str(2**63))] == [
        [0, 1, 2], [0, 5, 7], [12], [0, 9, 10, 11], [1, 2], [2**63]]
    for text in ("", "x", "3-1", "0-", "-1", "0,,1", "1;2", "0-4-5", "0-99999999", "0-999,2000", "1.5", "010", "9" * 5000,
                 "１"):
        with pytest.raises(ConfigError, match="write whole numbers, 1,000 at most, as 0-2 or 0,5,7"):
            parse_seeds(text)


@pytest.mark.parametrize("arguments, parts", [
    (["--seeds", "x"], ["--seeds is 'x'; write whole numbers"]),
    (["--seeds", str(2**63)], ["seed is 9223372036854775808; it must be"]),
    (["--seeds", "0-1", "--seed", "1"], ["--seed and --seeds exclude each other"]),
    (["--seeds", "0-1", "--set", "seed=1"], ["seed is given twice on the command line"])])
def test_wrong_seeds_are_refused(capsys, arguments, parts):
    refused(capsys, arguments, *parts)


def test_starting_over_and_starting_again_exclude_each_other(command, as_rank, capsys):
    as_rank(0, 2, 0, 2)
    refused(capsys, [*command, "--fresh"], "--fresh would start over whenever torchrun starts a rank again")


@pytest.mark.parametrize("values, name", [
    (("x", 2), "RANK"), ((2, 2), "RANK"), ((-1, 2), "RANK"), ((0, "two"), "WORLD_SIZE"), ((0, 0), "WORLD_SIZE"),
    ((0, 2, 2, 2), "LOCAL_RANK"), ((0, 2, 0, "²"), "LOCAL_WORLD_SIZE"), ((0, "9" * 5000), "WORLD_SIZE")])
def test_an_environment_that_no_torchrun_made_is_refused(command, as_rank, capsys, values, name):
    as_rank(*values)
    refused(capsys, command, f"the environment variable {name} is ", "start with torchrun, or unset WORLD_SIZE")


def test_a_rank_of_unknown_number_is_refused(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    refused(capsys, command, "the environment variable RANK is ''")
    monkeypatch.setenv("RANK", "1")
    assert this_rank() == Rank(1, 2, 0, 1)
