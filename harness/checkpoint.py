"""The folder of a run: its lock, configuration, records, TensorBoard's events and the checkpoint it continues
from."""
import errno
import json
import os
import re
import time
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from data_loader import DISK_ERRORS, lock
from harness.config import Config, ConfigError


class CheckpointError(Exception):
    """A run folder that cannot be used: in use by another process, not writable, or its checkpoint does not
    fit."""
    exit_status = 2


class RunFailure(CheckpointError):
    """A run that cannot go on although its settings fit: the disk is full, its results are no numbers any
    more."""
    exit_status = 1


class RunFolder:
    """LOGDIR/EXPERIMENT/run{R}_seed{S}/: config.yaml, results.jsonl, TensorBoard events, checkpoint.pt.

    `state` is what the last checkpoint holds, or None: the records of all batches so far ("rows"), the
    learner's state, and the lengths of the TensorBoard files. Opening the folder writes results.jsonl anew
    and cuts the others back: what a killed process wrote after its last checkpoint is gone, and is written
    again; what was lost of results.jsonl comes back. fresh: start over; nothing is deleted before `begin` is
    called, when it is clear that the new run can start. data: what identity() of the stream returned; a
    checkpoint of other data or settings is refused.
    """

    def __init__(self, path, config, fresh=False, data=None):
        self.path = Path(path)
        self.config = config
        self.data = data
        self.weights = None         # the fingerprint of those that the network begins with
        self.results = None         # the open results.jsonl
        self.writer = None          # TensorBoard's
        self.lock = None
        self.saved_at = time.monotonic()
        self.save_seconds = None    # that the last checkpoint took

        with self._disk():
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            self.state = None if fresh else self._load()
        # weights of another path may turn out to be others: until then nothing is changed
        same_path = self.state is None or self.state["config"].get("weights") == config.weights
        if not fresh and same_path:
            self.begin()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def begin(self):
        """Makes the files what the state says, and opens them; does nothing the second time."""
        if self.writer is not None:
            return
        with self._disk():
            self._cut_back()
            settings = asdict(self.config)
            (self.path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
            self.results = open(self.path / "results.jsonl", "a", encoding="utf-8")
            self.writer = SummaryWriter(self.path, max_queue=1000)     # so that nobody waits for its thread
            if self.state is None:
                idle = self.config.idle()
                lines = [f"    {key}: {value}" for key, value in settings.items() if key not in idle]
                self.writer.add_text("parameters", "\n".join(lines))

    @contextmanager
    def _disk(self):
        """Turns an OSError inside into one of the two errors above."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise RunFailure(f"cannot write into {self.path} ({error.strerror}): the last checkpoint is "
                                 f"kept; {DISK_ERRORS[error.errno]} and run the command again") from error
            raise CheckpointError(f"cannot use {self.path} ({error.strerror}): free it or choose another "
                                  "folder with --log-dir DIR") from error

    def _lock(self):
        try:
            self.lock = lock(self.path / "run.lock", wait=False)
        except BlockingIOError:
            raise CheckpointError(f"another process is running in {self.path}: wait for it, or choose "
                                  "another --seed, --run or --log-dir") from None

    def _load(self):
        path = self.path / "checkpoint.pt"
        results = self.path / "results.jsonl"
        if not path.exists():
            # a single line may come from a run that was killed just before its first checkpoint
            if results.is_file() and results.read_bytes().count(b"\n") > 1:
                raise CheckpointError(f"{self.path} holds results but no checkpoint.pt to continue from: "
                                      "choose another --log-dir, or delete the results and start over with "
                                      "--fresh")
            return None

        state = read_checkpoint(path)
        theirs = state["config"]
        mine = asdict(self.config)
        free = (*Config.MAY_CHANGE, "weights")      # whose content check_weights compares
        changed = [key for key in mine if key not in free and theirs.get(key) != mine[key]]
        if changed:
            what = ", ".join(f"{key} (then {theirs.get(key)!r}, now {mine[key]!r})" for key in changed)
            raise CheckpointError(f"{path} was made with other settings: {what}; put them back, name this "
                                  "variation with --as NAME, or start over with --fresh")
        changed = self._changed_data(state)
        if changed:
            raise CheckpointError(f"{path} was made from other data: {changed}; put them back, name this "
                                  "variation with --as NAME, or start over with --fresh")
        return state

    def _changed_data(self, state):
        """In words, why a checkpoint cannot go on with the present data; None if it can."""
        if not self.data or state["data"] == self.data:
            return None
        if "content" not in self.data or "content" not in state["data"]:
            return difference(state["data"], self.data)
        # whatever comes behind what was learned may differ, and the test images, too
        learned = self.config.start_batch + len(state["rows"])
        return changed_batch(state["data"]["content"][:learned], self.data["content"])

    def check_weights(self, net):
        """CheckpointError if a SplitNet begins with other weights than the checkpoint's did, whatever their
        path. To be called before the network learns or takes over a state."""
        if self.config.weights != "none":       # random ones are the seed's
            self.weights = fingerprint(net)
        if self.state and self.state.get("weights", self.weights) != self.weights:
            then = self.state["config"]["weights"]
            raise CheckpointError(f"{self.path / 'checkpoint.pt'} was made with other weights (those of "
                                  f"{then!r}, now {self.config.weights!r}): put them back, name this "
                                  "variation with --as NAME, or start over with --fresh")

    def _cut_back(self):
        (self.path / "checkpoint.pt.tmp").unlink(missing_ok=True)
        rows = []
        lengths = {}
        if self.state is None:
            (self.path / "checkpoint.pt").unlink(missing_ok=True)
        else:
            rows = self.state["rows"]
            lengths = self.state["files"]

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
            raise RunFailure(f"the results of batch {row.get('batch')} are no finite numbers any more: "
                             f"{kept}lower the learning rates and start over with --fresh") from error
        with self._disk():
            self.results.write(line + "\n")
            self.results.flush()

    def save(self, state, force=False):
        """Replaces checkpoint.pt atomically, unless saving has taken more than checkpoint_share of the time
        lately.

        state: what comes back as `self.state`: tensors, numbers, strings, lists and dicts, the records as
        "rows". force: whatever the share is.
        """
        now = time.monotonic()
        share = self.config.checkpoint_share
        too_often = self.save_seconds and self.save_seconds > share * (now - self.saved_at)
        if not force and share < 1 and too_often:
            return

        temporary = self.path / "checkpoint.pt.tmp"
        try:
            with self._disk():
                self.writer.flush()
                files = {file.name: file.stat().st_size for file in self._events()}
                everything = {**state, "config": asdict(self.config), "data": self.data, "files": files,
                              "weights": self.weights}
                with open(temporary, "wb") as file:
                    _torch_save(everything, file)
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
        for file in (self.writer, self.results, self.lock):
            if file is not None:
                with suppress(OSError):     # whatever the last checkpoint does not count is written again
                    file.close()


def _torch_save(state, file):
    try:
        torch.save(state, file)
    except RuntimeError as error:       # torch's word for a write that failed, whose cause is the OSError
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def fingerprint(net):
    """A check sum of the weights below a SplitNet's head."""
    total = 0
    for weight in torch.nn.ModuleList(net.layers).parameters():
        total = zlib.crc32(weight.detach().cpu().contiguous().numpy(), total)
    return total


def difference(theirs, mine):
    """In words, how the identity() of two streams differs."""
    then = set(theirs.get("classes") or [])
    now = set(mine["classes"] or [])
    gone = sorted(then - now)
    come = sorted(now - then)
    if gone or come:
        lists = [", ".join(map(repr, gone[:5])) + " went"] if gone else []
        lists += [", ".join(map(repr, come[:5])) + " came"] if come else []
        return f"its classes have changed ({'; '.join(lists)})"

    def size(data):
        return f"{sum(data['batches'])} images in {len(data['batches'])} batches and {data['test']} to test"

    if size(theirs) != size(mine):
        return f"it held {size(theirs)}, and holds {size(mine)}"
    return "its images or their labels are others"


def changed_batch(learned, present):
    """In words, where present batches, [[name, fingerprint], ...], do not begin with the learned ones; None
    if they do."""
    for k, (name, content) in enumerate(learned):
        if k < len(present) and present[k][1] == content:
            continue
        if k >= len(present) or name not in [other for other, _ in present]:
            return f"the batch {name!r}, which was learned, has gone"
        if present[k][0] not in [other for other, _ in learned]:
            return f"the batch {present[k][0]!r} has come before {name!r}, which was learned"
        return f"the batch {name!r}, which was learned, has changed"
    return None


def run_path(config, name, log_dir):
    """Folder of a run: log_dir/name/run{run}_seed{seed}. ConfigError unless `name` names a folder inside
    log_dir."""
    try:
        str(log_dir).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the name of the log folder {str(log_dir)!r} is not UTF-8, which TensorBoard "
                          "needs: choose another --log-dir, or start Python with PYTHONUTF8=1") from None
    if name in ("", ".", "..") or re.search(r"[/\\\0]", name):
        raise ConfigError(f"the name {name!r} cannot be that of a folder: rename the section, or give "
                          "another by --as NAME")
    return Path(log_dir) / name / f"run{config.run}_seed{config.seed}"


def read_checkpoint(path):
    """What a checkpoint.pt holds: a dict with at least "config", "rows", "files". CheckpointError if it is
    damaged."""
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
    # a damaged file can raise nearly anything: zlib.error, KeyError, AttributeError, ...
    except Exception as error:
        raise CheckpointError(f"{path} is damaged and cannot be continued from: start over with "
                              "--fresh") from error


def load_run(folder):
    """(Config, state) of a run's last checkpoint, whose tensors are on the CPU. Raises CheckpointError."""
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no checkpoint.pt: name the folder of a run, "
                              "LOGDIR/EXPERIMENT/run0_seed0")
    state = read_checkpoint(path)
    try:
        return Config(**state["config"]), state
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} was made by another version of this program ({error})") from error
