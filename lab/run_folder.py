"""The folder of a run: its lock, configuration, records, TensorBoard events and the checkpoint it continues from.

Uses lab.config, torch, yaml.
"""
import errno
import json
import os
import re
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from lab.config import Config, ConfigError

try:
    import fcntl
except ImportError:     # Windows: two processes in one run folder then go unnoticed
    fcntl = None


NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class CheckpointError(Exception):
    """A run folder that cannot be used: in use by another process, not writable, or its checkpoint does not fit."""
    exit_status = 2


class RunFailure(CheckpointError):
    """A run that cannot go on although its settings fit: the disk is full, its results are no numbers any more."""
    exit_status = 1


class RunFolder:
    """LOGDIR/EXPERIMENT/run{R}_seed{S}/: config.yaml, results.jsonl, TensorBoard events, checkpoint.pt.

    The checkpoint holds the records of all batches so far ("rows") and the lengths of the TensorBoard files. Opening the
    folder writes results.jsonl anew and cuts the others back: what a killed process wrote after its last checkpoint is
    gone, and is written again; what was lost of results.jsonl comes back. fresh: start over; nothing is deleted before
    `begin` is called, for which it must be clear that the new run can start. data: what lab.data.identify says of the
    stream; a checkpoint that was made from other data, or with other settings, is refused.
    """

    def __init__(self, path, config, fresh=False, data=None):
        self.path, self.config, self.data = Path(path), config, data
        self.save_seconds, self.saved_at, self.results, self.board = None, time.monotonic(), None, None
        with self._disk():
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            self.state = None if fresh else self._load()
        if not fresh:
            self.begin()

    def begin(self):
        """Makes the files what the state says, and opens them; does nothing the second time."""
        if self.board is not None:
            return
        with self._disk():
            self._cut_back()
            (self.path / "config.yaml").write_text(yaml.safe_dump(asdict(self.config), sort_keys=False))
            self.results = open(self.path / "results.jsonl", "a", encoding="utf-8")
            self.board = SummaryWriter(self.path, max_queue=1000)     # nobody waits for its thread
            if self.state is None:
                settings = {k: v for k, v in asdict(self.config).items() if k not in self.config.idle()}
                self.board.add_text("parameters", "\n".join(f"    {k}: {v}" for k, v in settings.items()))

    @contextmanager
    def _disk(self):
        """Turns an OSError inside into one of the two errors above."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise RunFailure(f"cannot write into {self.path} ({error.strerror}): the last checkpoint is kept; make room "
                                 "on the disk and run the same command again") from error
            raise CheckpointError(f"cannot use {self.path} ({error.strerror}): free it or choose another folder with "
                                  "--log-dir DIR") from error

    def _lock(self):
        self.lock = open(self.path / "run.lock", "w")
        if fcntl is not None:       # the system lets go of it when the process ends, however it ends
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"another process is running in {self.path}: wait for it, or choose another "
                                      "--seed, --run or --log-dir") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(f"{self.path} is on a file system without locks ({error.strerror}): a second process in it would not "
                      "be noticed", file=sys.stderr, flush=True)

    def _load(self):
        path, results = self.path / "checkpoint.pt", self.path / "results.jsonl"
        if not path.exists():
            # a single line may come from a run that was killed just before its first checkpoint
            if results.is_file() and results.read_bytes().count(b"\n") > 1:
                raise CheckpointError(f"{self.path} holds results but no checkpoint.pt to continue from: choose another "
                                      "--log-dir, or delete the results and start over with --fresh")
            return None
        state = read_checkpoint(path)
        theirs, mine = state["config"], asdict(self.config)
        theirs = Config.SINCE | theirs
        changed = [k for k in mine if k not in Config.FREE and theirs.get(k) != mine[k]]
        if changed:
            what = ", ".join(f"{k} (then {theirs.get(k)!r}, now {mine[k]!r})" for k in changed)
            raise CheckpointError(f"{path} was made with other settings: {what}; put them back, name this variation with "
                                  "--as NAME, or start over with --fresh")
        if self.data and state.get("data", self.data) != self.data:
            raise CheckpointError(f"{path} was made from other data: {difference(state['data'], self.data)}; put them back, "
                                  "name this variation with --as NAME, or start over with --fresh")
        return state

    def _cut_back(self):
        (self.path / "checkpoint.pt.tmp").unlink(missing_ok=True)
        if self.state is None:
            (self.path / "checkpoint.pt").unlink(missing_ok=True)
        rows, lengths = (self.state["rows"], self.state["files"]) if self.state else ([], {})
        temporary = self.path / "results.jsonl.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, self.path / "results.jsonl")
        for file in self._events():
            if file.name not in lengths:
                file.unlink()
            elif file.stat().st_size > lengths[file.name]:
                os.truncate(file, lengths[file.name])

    def _events(self):
        return self.path.glob("events.out.tfevents.*")

    def write_row(self, row):
        """Appends one line to results.jsonl."""
        try:
            line = json.dumps(row, allow_nan=False)
        except ValueError as error:
            kept = "the last checkpoint is kept; " if row.get("batch") else ""
            raise RunFailure(f"the results of batch {row.get('batch')} are no finite numbers any more: {kept}lower the "
                             "learning rates and start over with --fresh") from error
        with self._disk():
            self.results.write(line + "\n")
            self.results.flush()

    def save(self, state, force=False):
        """Replaces checkpoint.pt atomically, if force, or checkpoint_share is 1, or saving has cost less of the time.

        state: what load gets back as `self.state`; tensors, numbers, strings, lists and dicts, with the records as "rows".
        """
        now, share = time.monotonic(), self.config.checkpoint_share
        if not force and share < 1 and self.save_seconds and self.save_seconds > share * (now - self.saved_at):
            return
        temporary = self.path / "checkpoint.pt.tmp"
        try:
            with self._disk():
                self.board.flush()
                files = {file.name: file.stat().st_size for file in self._events()}
                with open(temporary, "wb") as file:
                    try:
                        torch.save({**state, "config": asdict(self.config), "data": self.data, "files": files}, file)
                    except RuntimeError as error:       # torch's word for a write that failed
                        raise error.__context__ if isinstance(error.__context__, OSError) else error     # noqa: B904
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path / "checkpoint.pt")
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - now

    def close(self):
        """Closes the files and lets go of the lock."""
        for file in filter(None, (self.board, self.results, self.lock)):
            with suppress(OSError):     # whatever the last checkpoint does not count is written again
                file.close()


def difference(theirs, mine):
    """In words, how what lab.data.identify says of two streams differs."""
    then, now = theirs.get("classes") or [], mine["classes"] or []
    gone, come = sorted(set(then) - set(now)), sorted(set(now) - set(then))
    if gone or come:
        lists = [f"{', '.join(map(repr, names[:5]))} {word}" for names, word in ((gone, "went"), (come, "came")) if names]
        return f"its classes have changed ({'; '.join(lists)})"
    sizes = [[sum(data["batches"]), len(data["batches"]), data["test"]] for data in (theirs, mine)]
    if sizes[0] != sizes[1]:
        return "it held {} images in {} batches and {} to test, and holds {} in {} and {}".format(*sizes[0], *sizes[1])
    return "its images or their labels are others"


def run_path(config, name, log_dir):
    """Folder of a run: log_dir/name/run{run}_seed{seed}. ConfigError unless the name is one of a folder inside log_dir."""
    try:
        str(log_dir).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the name of the log folder {str(log_dir)!r} is not UTF-8, which TensorBoard needs: choose "
                          "another --log-dir, or start Python with PYTHONUTF8=1") from None
    if name in ("", ".", "..") or re.search(r"[/\\\0]", name):
        raise ConfigError(f"the name {name!r} cannot be that of a folder: rename the section, or give another by --as NAME")
    return Path(log_dir) / name / f"run{config.run}_seed{config.seed}"


def read_checkpoint(path):
    """What a checkpoint.pt holds: a dict with at least "config", "rows" and "files". CheckpointError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:       # torch.load does not look at the check sums
                raise ValueError("wrong check sum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if [type(state[key]) for key in ("config", "rows", "files")] != [dict, list, dict]:
            raise ValueError("another file")
        return state
    except (MemoryError, PermissionError):
        raise
    except Exception as error:      # a damaged file can raise nearly anything: zlib.error, KeyError, AttributeError, ...
        raise CheckpointError(f"{path} is damaged and cannot be continued from: start over with --fresh") from error


def load_run(folder):
    """(Config, state) of a run's last checkpoint, whose tensors are on the CPU. Raises CheckpointError."""
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no checkpoint.pt: name the folder of a run, LOGDIR/EXPERIMENT/run0_seed0")
    state = read_checkpoint(path)
    if not {"image_size", "batches"} <= state.keys():
        raise CheckpointError(f"{path} was made by an older version of this program: continue the run by one batch first")
    try:
        return Config(**Config.SINCE | state["config"]), state
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} was made by another version of this program ({error})") from error
