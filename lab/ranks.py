"""Several runs shared among processes, which torchrun starts on one machine or on many and calls ranks.

    torchrun --nproc-per-node 4 ar1star_lat_replay.py --name ar1star --runs 0-4 --seeds 0-2

A rank takes every WORLD_SIZE-th run. Ranks exchange nothing, so all that they need is in the environment variables RANK,
WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. Without these there is one rank, which makes all the runs.

Uses lab.config, torch.
"""
import os
import sys
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import torch

from lab.config import ConfigError


class Rank(NamedTuple):
    """The place of this process among those that torchrun started: which of how many, in all and on this machine."""
    number: int = 0
    world: int = 1
    local_number: int = 0
    local_world: int = 1

    def share(self, runs):
        """Those of a list that are this rank's."""
        return runs[self.number::self.world]

    def placed(self, config):
        """A Config, with "auto" and "cuda" replaced by this rank's GPU. Ranks share where a machine has fewer GPUs."""
        gpus = torch.cuda.device_count() if self.world > 1 and config.device in ("auto", "cuda") else 0
        return replace(config, device=f"cuda:{self.local_number % gpus}") if gpus else config

    def take_threads(self):
        """Has torch use this rank's share of the machine's cores.

        An OMP_NUM_THREADS above 1 is somebody's wish and is left alone; torchrun itself sets it to 1 where it is unset.
        """
        if self.local_world > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(max(1, usable_cores() // self.local_world))


def this_rank():
    """The Rank of this process, from its environment."""
    world = _number("WORLD_SIZE", 1, 1)
    if world == 1:
        return Rank()
    local_world = _number("LOCAL_WORLD_SIZE", 1, 1)
    return Rank(_number("RANK", None, 0, world - 1), world, _number("LOCAL_RANK", 0, 0, local_world - 1), local_world)


def print_whole_lines():
    """Has each line that is printed written at once, so that the ranks' lines do not run into each other.

    torchrun starts Python with -u, which writes a line and its end one after the other.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):     # a program may have put something of its own there
            stream.reconfigure(line_buffering=True, write_through=False)


def pick_device(name):
    """torch.device of "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:n"; a GPU becomes the current one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; it can be auto, cpu, cuda or cuda:n")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"there is no device {name!r} on this machine, which has {torch.cuda.device_count()} CUDA "
                          "devices; use --device auto or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    return device


def usable_cores():
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(name, default, low, high=10**6):
    text = os.environ.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 9 and low <= int(text) <= high):
        raise ConfigError(f"the environment variable {name} is {text[:20]!r}, and with the others of torchrun it must be a "
                          f"whole number from {low} to {high}: start with torchrun, or unset WORLD_SIZE")
    return int(text)
