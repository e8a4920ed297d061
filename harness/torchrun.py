"""Several runs shared among processes, which torchrun starts on one machine or on many and calls ranks.

    torchrun --nproc-per-node 4 ar1star_lat_replay.py --name ar1star --runs 0-4 --seeds 0-2

A rank takes every WORLD_SIZE-th run. Ranks exchange nothing, so all that they need is in the environment
variables RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.
"""
import os
import sys
from contextlib import suppress
from dataclasses import replace

import torch

from harness.config import ConfigError


def share_of(configs, fresh=False):
    """Those of [Config, ...] that are this rank's, on its GPU; sets up its threads and what it prints.

    fresh: that of the command line, which is refused.
    """
    world = _number("WORLD_SIZE", None, low=1)
    rank = _number("RANK", None, high=world - 1)
    local_world = _number("LOCAL_WORLD_SIZE", 1, low=1)
    local_rank = _number("LOCAL_RANK", 0, high=local_world - 1)
    if world == 1:
        return configs
    if fresh:
        raise ConfigError("--fresh would start over whenever torchrun starts a rank again: delete the "
                          "folders of these runs, or choose others with --as or --log-dir")

    mine = configs[rank::world]
    if not mine:
        print(f"rank {rank} of {world}, counted from 0, has nothing to do: runs in all: {len(configs)}")
    take_threads(local_world)
    print_whole_lines()
    return [placed(config, local_rank) for config in mine]


def placed(config, local_rank):
    """A Config, with "auto" and "cuda" replaced by this rank's GPU. Ranks share where a machine has fewer
    GPUs."""
    gpus = torch.cuda.device_count()
    if gpus == 0 or config.device not in ("auto", "cuda"):
        return config
    return replace(config, device=f"cuda:{local_rank % gpus}")


def take_threads(local_world):
    """Has torch use this rank's share of the machine's cores.

    An OMP_NUM_THREADS above 1 is somebody's wish and is left alone; torchrun itself sets it to 1 where it is
    unset.
    """
    if local_world > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, usable_cores() // local_world))


def print_whole_lines():
    """Has each line that is printed written at once, so that the ranks' lines do not run into each other.

    torchrun starts Python with -u, which writes a line and its end one after the other.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):     # a program may have replaced them
            stream.reconfigure(line_buffering=True, write_through=False)


def usable_cores():
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _number(name, default, low=0, high=10**6):
    """An environment variable as a whole number; ConfigError unless it is one from low to high."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 9 and low <= int(text) <= high):
        raise ConfigError(f"the environment variable {name} is {text[:20]!r}, and with the others of "
                          f"torchrun it must be a whole number from {low} to {high}: start with torchrun, or "
                          "unset WORLD_SIZE")
    return int(text)
