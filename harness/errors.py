"""An error as one sentence: what is wrong and what to do. Needs no torch, and no other package."""
import errno
import os
import re

PROGRAM = "ar1star_lat_replay.py"
STANDIN = "core50_standin"      # the folder of the data that the sections standin_* read
# of requirements.txt
PACKAGES = ("numpy", "tensorboard", "torch", "torchvision", "tqdm", "werkzeug", "yaml")
INSTALL = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt"
# how torch's and Python's errors say it
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory",
             "Storage size calculation overflowed", "Overflow when unpacking")


def explain(error):
    """What is wrong and what to do, in one sentence."""
    text = " ".join(str(error).split()) or type(error).__name__

    if is_missing_package(error):
        return (f"the package {error.name} is missing: activate the virtual environment that has it, or make "
                f"one in the folder of {PROGRAM} by `{INSTALL}`")

    if isinstance(error, MemoryError) or any(sign in text for sign in NO_MEMORY):
        return (f"out of memory ({text:.100}); lower max_latents_gb with --set and run the same command "
                "again, or lower rm_sz or mb_size and start over with --fresh")

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (f"the disk is full ({text}): the last checkpoint is kept; make room and run the same command "
                "again")

    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
        file = os.fsdecode(error.filename)
        return f"cannot use {file} ({error.strerror}): make it usable, or name another one"

    if is_of_another_network(error):
        return ("the checkpoint is of another network, so the data or the program have changed since: put "
                "them back, choose another --log-dir, or start over with --fresh")

    # by name: these classes' files bring torch, which errors of the command line do without
    kind = type(error).__name__
    right_now = f"; `python {PROGRAM} --name demo` runs right now, without any download"
    if kind == "MissingData" and STANDIN in text:
        folder = re.split(" lacks |: ", text.removeprefix("there is no folder "))[0]
        return (f"there are no stand-in data in {folder}: draw them, as in benchmarks/standin/README.md, or "
                "name their folder with --data DIR")
    if kind == "MissingData":
        return f"{text}, or add --download to this command{right_now}"
    if kind == "WeightsError":
        return text + right_now

    if hasattr(error, "exit_status") or isinstance(error, OSError):      # its text is one sentence
        return text

    return f"unexpected {kind} ({text:.300}): this is a bug; please report it with what --debug shows"


def exit_status(error):
    """The exit status of a program that an error ends."""
    return getattr(error, "exit_status", 2 if is_of_another_network(error) else 1)


def is_missing_package(error):
    """Whether an import failed for want of a package of requirements.txt."""
    return isinstance(error, ModuleNotFoundError) and error.name in PACKAGES


def is_of_another_network(error):
    """Whether a checkpoint did not fit: torch has no type of its own for this error."""
    return isinstance(error, RuntimeError) and "loading state_dict" in str(error)
