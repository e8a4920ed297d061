"""Several runs, one after the other or shared among the ranks of torchrun, of which one is killed."""
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import ar1star_lat_replay as program
from harness import torchrun
from harness.cli import configurations, parse_arguments, parse_seeds
from harness.config import ConfigError, load_config
from harness.console import progress_bar
from harness.torchrun import placed, share_of, take_threads
from helpers import PARAMS, REPO, forkserver, same
from tiny import Terminal, before_learning, outcome, said, train_steps


def rank(argv, killed, cores):
    """What the ranks do: the program, of which rank 1 kills itself once, in its second batch."""
    def act(batch):
        if os.environ["RANK"] == "1" and batch == 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    os.environ.pop("OMP_NUM_THREADS", None)
    os.sched_setaffinity(0, cores)
    program.Learner.learn = before_learning(act)
    assert program.main(argv) == 0


@pytest.fixture
def as_rank(monkeypatch):
    """as_rank(number, world, local_number, local_world): what torchrun puts into the environment."""
    def put(*values):
        for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), values):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))
    return put


# ---- for real ----

@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot choose the cores of a process here")
def test_two_ranks_of_which_one_is_killed_make_the_runs_that_one_process_makes(command, tmp_path, capsys):
    """On two cores, so that a rank has one thread, as this process has: their number can change last bits.
    torchrun's own launcher forks them."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    words = [*command[:-1], "4", "--seeds", "0-2", "--log-dir"]
    assert program.main([*words, str(alone)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("order")]
    assert told == [f"order 0, seed {seed}:" for seed in range(3)]

    forkserver()
    printed = DefaultLogsSpecs(str(tmp_path / "printed"), Std.ALL)
    launcher = LaunchConfig(1, 1, 2, max_restarts=1, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                            start_method="forkserver", logs_specs=printed, signals_to_handle="SIGHUP")
    cores = sorted(os.sched_getaffinity(0))[:2]
    elastic_launch(launcher, rank)([*words, str(shared)], tmp_path / "killed", cores)
    out, err = ("".join(file.read_text() for file in (tmp_path / "printed").rglob(f"std{name}.log"))
                for name in ("out", "err"))
    assert (tmp_path / "killed").exists() and "continuing after batch 1 of 6\n" in err
    assert out.count("order 0, seed 1:\n") == 2 and "order 0, seed 2:\n" in out
    runs = [f"run0_seed{seed}" for seed in range(3)]
    assert sorted(path.name for path in (shared / "tiny").iterdir()) == runs
    for run in runs:
        expected = outcome(alone, run)
        assert len(expected[0]) == 4 and same(outcome(shared, run), expected)
        assert train_steps(shared / "tiny" / run) == list(range(expected[0][-1]["train_steps"]))
    assert not same(outcome(alone, runs[0]), outcome(alone, runs[1]))


# ---- who does what ----

def test_every_order_is_made_with_every_seed_and_the_ranks_share_them(as_rank, monkeypatch):
    for name in ("take_threads", "print_whole_lines"):
        monkeypatch.setattr(torchrun, name, lambda *_: None)
    args = parse_arguments(["--runs", "1,3", "--seeds", "0-1,7", "--name", "demo", "--device", "cpu"])
    configs = configurations(args)
    runs = [(config.run, config.seed) for config in configs]
    assert runs == [(1, 0), (1, 1), (1, 7), (3, 0), (3, 1), (3, 7)]
    for world in (1, 2, 4, 7):
        shares = []
        for number in range(world):
            as_rank(number, world)
            shares.append([(config.run, config.seed) for config in share_of(configs)])
        assert sorted(sum(shares, [])) == runs and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_rank_without_a_run_says_so(command, as_rank, tmp_path, capsys):
    as_rank(2, 3, 2, 3)
    for several in ([], ["--seeds", "3,5"]):
        assert program.main([*command, *several]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("rank 2 of 3") and f"runs in all: {len(several) or 1}" in out and not err
    assert not (tmp_path / "logs").exists()


# ---- the machine ----

def test_a_rank_has_its_gpu_and_its_threads(monkeypatch):
    configs = [load_config("demo", PARAMS, {"device": name}) for name in ("auto", "cuda", "cuda:3", "cpu")]
    for gpus, auto, cuda in ((4, "cuda:2", "cuda:2"), (2, "cuda:0", "cuda:0"), (0, "auto", "cuda")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=gpus: n)
        devices = [placed(config, local_rank=2).device for config in configs]
        assert devices == [auto, cuda, "cuda:3", "cpu"]
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torchrun, "usable_cores", lambda: 7)
    for wish in (None, "1", "2", ""):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if wish is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", wish)
        for local_world in (2, 8, 1):
            take_threads(local_world)
    assert asked == [3, 1] * 2      # a machine's only rank and who chose a number are left alone


@pytest.mark.skipif(not shutil.which("taskset") or not hasattr(socket, "SOCK_SEQPACKET"),
                    reason="needs taskset, and sockets that keep what is written apart")
def test_ranks_write_a_line_at_once_and_count_the_cores_that_are_theirs(tmp_path):
    """In a process that may use one core, with an empty package in torch's place."""
    (tmp_path / "torch.py").touch()
    code = "from harness import console, torchrun; torchrun.print_whole_lines(); print('first'); " \
           "console.say('second'); print(torchrun.usable_cores())"
    core = str(min(os.sched_getaffinity(0)))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        subprocess.run(["taskset", "-c", core, sys.executable, "-u", "-c", code], cwd=REPO, check=True,
                       stdout=theirs, stderr=theirs, env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert [ours.recv(100) for _ in range(3)] == [b"first\n", b"second\n", b"1\n"]
    assert 1 <= torchrun.usable_cores() <= os.cpu_count()


def test_ranks_that_share_a_terminal_write_lines(monkeypatch, as_rank):
    as_rank(0, 2)
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with progress_bar() as advance:
        advance([{"test_accuracy": .5, "seconds_train": 1.0}], 79)
    assert screen.getvalue() == "batch 1 of 79: accuracy 50.0%, 1.0 s\n"


# ---- bad input ----

def test_seeds_option():
    assert [parse_seeds(t) for t in ("0-2", "0,5,7", "12", "9-11,0", " 1 , 1-2", str(2**63))] == [
        [0, 1, 2], [0, 5, 7], [12], [0, 9, 10, 11], [1, 2], [2**63]]
    for text in ("", "x", "3-1", "0-", "-1", "0,,1", "1;2", "0-4-5", "0-99999999", "0-999,2000", "1.5", "010",
                 "9" * 5000, "１"):
        with pytest.raises(ConfigError, match="--seeds is .* as 0-2 or 0,5,7"):
            parse_seeds(text)


def test_starting_over_and_starting_again_exclude_each_other(command, as_rank, capfd):
    as_rank(0, 2, 0, 2)
    said(capfd, 2, [*command, "--fresh"], "--fresh would start over", "--as", "--log-dir")


@pytest.mark.parametrize("values, name", [
    (("x", 2), "RANK"), ((2, 2), "RANK"), ((-1, 2), "RANK"), ((None, 2), "RANK"), ((0, "two"), "WORLD_SIZE"),
    ((0, 0), "WORLD_SIZE"), ((0, "9" * 5000), "WORLD_SIZE"), ((0, 2, 2, 2), "LOCAL_RANK"),
    ((0, 2, 0, "²"), "LOCAL_WORLD_SIZE")])
def test_an_environment_that_no_torchrun_made_is_refused(command, as_rank, capfd, values, name):
    as_rank(*values)
    said(capfd, 2, command, f"environment variable {name} is ", "start with torchrun", "unset WORLD_SIZE")
