"""What is recorded of each batch, how long its parts took, and stopping between two batches.

Uses lab.board, lab.ranks, models.batch_renorm, torch, tqdm.
"""
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress

import torch
from tqdm import tqdm

from lab import board
from lab.ranks import this_rank
from models.batch_renorm import brn_layers


class TrainingError(Exception):
    """Training that cannot go on, such as a loss that is no longer a number."""
    exit_status = 1


def record(folder, learner, rows, batches, steps, train_x, train_y, test, seconds):
    """Writes one batch's line of results.jsonl, curves and pictures; returns the line.

    rows: the lines of earlier batches; batches: how many are to be learned; steps: what Learner.learn returned; test: what
    evaluate returned; seconds: what Clock.take returned.
    """
    i, first_step = len(rows), rows[-1]["train_steps"] if rows else 0
    head, memory, device, confusion = learner.head, learner.memory, learner.device, test["confusion"]
    losses, corrects, sizes = (t.double().cpu() for t in steps)
    if not losses.isfinite().all():
        kept = "the last checkpoint is kept; lower inc_lr" if i else "lower init_lr"
        raise TrainingError(f"the training loss became {losses[~losses.isfinite()][0]:g} in batch {i}: {kept} and start "
                            "over with --fresh")
    met = (head.past_j > 0).cpu()
    row = {"batch": i, "test_accuracy": test["accuracy"], "test_loss": test["loss"],
           "train_accuracy": (corrects.sum() / sizes.sum()).item(),
           "train_loss": ((losses * sizes).sum() / sizes.sum()).item(),
           "n_train": len(train_y), "classes_seen": int(met.sum()), "memory_size": len(memory),
           "train_steps": first_step + len(losses)}
    row |= {f"seconds_{part}": round(value, 4) for part, value in seconds.items()}
    row |= {"accuracy_seen": confusion.diagonal()[met].sum().item() / max(1, confusion[met].sum().item()),
            "per_class": [None if math.isnan(a) else round(a, 4) for a in test["per_class"]],
            "classes": torch.as_tensor(train_y).unique().tolist(), "n_test": int(confusion.sum()),
            "batches": len(folder.data["batches"]) - folder.config.start_batch, "data": folder.data["data"],
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"cpu, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"}
    row |= {"forgetting": forgetting([*rows, row]), "kept_mb": kept_mb(learner)}
    if learner.si.weights:
        row["si_saturated"] = saturated(learner.si)
    codec = memory.state_dict().get("codec", {})
    if "clipped" in codec:
        row["rm_clipped"] = (codec["clipped"] / codec["coded"].clamp(min=1)).item()
    folder.write_row(row)
    board.write_steps(folder.board, first_step, losses.tolist(), (corrects / sizes).tolist())
    board.write_batch(folder.board, row, confusion, head, memory, brn_layers(learner.net))
    if board.picture_due(i, batches):
        board.write_pictures(folder.board, [*rows, row], batches, confusion, head, memory, train_x,
                             learner.net.latent_layer_num < 0, folder.data["classes"])
    if i + 1 == batches:
        board.write_hparams(folder.board, folder.config, [*rows, row])
    return row


def kept_mb(learner):
    """MB (10^6 bytes) of what a learner keeps for later batches beside its network: memory, head, importances."""
    return round(n_bytes([part.state_dict() for part in (learner.memory, learner.head, learner.si)]) / 1e6, 3)


def n_bytes(value):
    """Bytes of a tensor, or of all those in lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(n_bytes, value.values() if isinstance(value, dict) else value))


def saturated(si):
    """Share of the weights under Synaptic Intelligence whose importance is the largest allowed: 0..1."""
    return sum((f >= si.max_f).sum().item() for f in si.importance) / sum(f.numel() for f in si.importance)


def forgetting(rows):
    """Best accuracy so far minus accuracy now, mean over the classes met that have test images: 0..1.

    None where there are no such classes, or where a line of an older program does not say "per_class" and "classes". rows:
    lines of results.jsonl. What a class's accuracy was before it was met does not count.
    """
    if any(row.get("per_class") is None or row.get("classes") is None for row in rows):
        return None
    met = {}        # class: the first row that has learned it
    for i, row in enumerate(rows):
        met |= {j: i for j in row["classes"] if j not in met}
    curves = list(zip(*(row["per_class"] for row in rows), strict=True))        # one a class
    lost = [max(a for a in curves[j][i:] if a is not None) - curves[j][-1] for j, i in met.items()
            if curves[j][-1] is not None]
    return sum(lost) / len(lost) if lost else None


def results_of(rows, folder):
    """{"rows", "final_accuracy", "mean_accuracy" (over all tests), "folder"} of a run's records; accuracies in 0..1."""
    accuracies = [row["test_accuracy"] for row in rows]
    return {"rows": rows, "final_accuracy": accuracies[-1], "mean_accuracy": sum(accuracies) / len(accuracies),
            "folder": folder}


class Clock:
    """Wall-clock seconds per part of a batch; waits for the device, so that each part is charged with its own work."""

    def __init__(self, device):
        self.device, self.seconds, self.last = device, {}, time.perf_counter()

    def lap(self, name):
        """Charges the time since the last lap to a part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now

    def take(self):
        """{part: seconds} since it was called last."""
        taken, self.seconds, self.last = self.seconds, {}, time.perf_counter()
        return taken


def say(text):
    """One line on what a program is doing, to standard error and at once."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


@contextmanager
def progress_bar():
    """Yields a function that shows how far a run is: it takes the records of the batches learned, and batches in all.

    A bar on a terminal; a line a batch elsewhere, such as in the log of a cluster's job, and where several ranks write.
    """
    with tqdm(unit="batch", disable=this_rank().world > 1 or None) as bar:

        def advance(rows, batches):
            last = rows[-1]
            if bar.disable:
                seconds = sum(value for key, value in last.items() if key.startswith("seconds_"))
                say(f"batch {len(rows)} of {batches}: accuracy {last['test_accuracy']:.1%}, {seconds:.1f} s")
            if bar.total is None:       # of a continued run, what was there before is not this command's pace
                bar.total, bar.initial, bar.n = batches, len(rows) - 1, len(rows) - 1
            bar.update(len(rows) - bar.n)
            bar.set_postfix_str(f"accuracy {last['test_accuracy']:.1%}")

        yield advance


class Stop:
    """True once Ctrl-C or SIGTERM asked the run to end. While at_once, there is nothing to wait for: they end it there."""

    def __init__(self):
        self.asked, self.at_once = False, True

    def __bool__(self):
        return self.asked


@contextmanager
def finishing_the_batch():
    """Ctrl-C (or SIGTERM) inside lets the present batch end, so that it can be saved; a second one stops at once.

    Yields a Stop. Before the first batch of a new run has been learned the first one stops at once, too: its training is
    long, and nothing has been learned yet.
    """
    stop = Stop()

    def handle(number, _):
        if stop.at_once:
            raise KeyboardInterrupt("stopped; no batch had been learned yet, so the same command starts anew")
        if stop.asked:
            raise KeyboardInterrupt("stopped at once; the same command continues from the last checkpoint")
        stop.asked = True
        with suppress(OSError, ValueError):     # no print: it may have interrupted another
            os.write(sys.stderr.fileno(), b"\nstopping at the end of this batch; press Ctrl-C again to stop at once\n")

    with _on_signal(handle):
        yield stop


@contextmanager
def _on_signal(handler):
    """Ctrl-C and SIGTERM call handler(number, frame) inside."""
    try:
        before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:      # not in the main thread: signals go elsewhere
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leaving_at_once():
    """Ctrl-C and SIGTERM raise KeyboardInterrupt inside, even within finishing_the_batch."""
    return _on_signal(signal.default_int_handler)
