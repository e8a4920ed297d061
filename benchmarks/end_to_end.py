"""One run from its command to its last number: where the seconds go. See speed.py --end-to-end.

The frames are made here in CORe50's layout: 11 sessions of 50 objects, 300 frames each of 128x128 pixels,
sessions 3, 7 and 10 for the test, and the index of all scenarios and orders. Only frames that the run reads
are made; other PNG files are missing, and the npz has holes there. Frames come from the disk's cache.
"""
import io
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torchvision.io import write_png

import data_loader
from data_loader import SAMPLES
from harness.console import say

BATCHES = {"ni": 8, "nc": 9, "nic": 79, "nicv2_79": 79, "nicv2_196": 196, "nicv2_391": 391}
TEST_SESSIONS = (3, 7, 10)
STRIDE = 20             # of the test images
ONCE = ("start", "index", "samples", "test images", "network", "encode test")
OF_A_BATCH = ("read", "encode", "train", "test", "record", "checkpoint")
THREADS = (1, 2, 4, 8)


class RunFailed(Exception):
    """The run that was to be timed did not end as it should."""
    exit_status = 1


# ---- frames ----

def make_index(folder, frames):
    """Writes the index files for so many frames a unit.

    Returns the paths, and the batches of the default run: arrays of indices, the test set last.
    """
    units = [(s, o) for s in range(1, 12) for o in range(1, 51)]
    paths = [f"s{s}/o{o}/C_{s:02d}_{o:02d}_{f:03d}.png" for s, o in units for f in range(frames)]
    objects = np.repeat([o - 1 for _, o in units], frames)
    test = [u for u, (s, _) in enumerate(units) if s in TEST_SESSIONS]
    large = [o for o in range(0, 50, 5)]        # units of session 1: batch 0
    small = [u for u, (s, _) in enumerate(units) if s not in TEST_SESSIONS and u not in large]

    lup = {}
    labels = {}
    for scenario, n in BATCHES.items():
        runs = []
        for run in range(10):
            later = np.array_split(np.random.default_rng(run).permutation(small), n - 1)
            runs.append([frames_of(part, frames) for part in (large, *later, test)])
        lup[scenario] = [[batch.tolist() for batch in batches] for batches in runs]
        labels[scenario] = [[objects[batch].tolist() for batch in batches] for batches in runs]

    for name, content in (("paths", paths), ("LUP", lup), ("labels", labels)):
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(content, 2))
    return paths, [np.array(batch) for batch in lup["nicv2_391"][0]]


def frames_of(units, frames):
    """Indices of all frames of some units, unit after unit."""
    return (np.asarray(units)[:, None] * frames + np.arange(frames)).reshape(-1)


def frames_read(batches, n):
    """Indices of the frames that a run of n batches reads, and of those that it reads ahead."""
    test = batches[-1]
    samples = np.sort(test)[np.linspace(0, len(test) - 1, SAMPLES).astype(int)]
    return np.unique(np.concatenate([[0], *batches[:-1][:n + 1], test[::STRIDE], samples]))


def picture(path, i):
    """Frame i: a coarse pattern of its object under noise; its PNG file is about as large as CORe50's."""
    coarse = np.random.default_rng(int(path.split("_")[-2])).integers(0, 250, (8, 8, 3), np.uint8)
    noise = np.random.default_rng(i).integers(0, 4, (128, 128, 3), np.uint8)
    return coarse.repeat(16, 0).repeat(16, 1) + noise


def make_png(folder, paths, used):
    """Writes the frames `used` as PNG files."""
    root = folder / "core50_128x128"
    for place in {str(Path(paths[i]).parent) for i in used}:
        (root / place).mkdir(parents=True)

    def write(i):
        image = torch.from_numpy(picture(paths[i], i)).permute(2, 0, 1)
        write_png(image, str(root / paths[i]), compression_level=1)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, used.tolist()))


class WithHoles(io.FileIO):
    """A file in which blocks of zeros take no room on the disk."""

    def write(self, data):
        """Writes bytes; their number, as files do."""
        if np.frombuffer(data, np.uint8).any():
            return super().write(data)
        self.seek(len(data), io.SEEK_CUR)
        return len(data)


def make_npz(folder, paths, used):
    """Writes core50_imgs.npz with room for all frames and the pixels of those `used`."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), 128, 128, 3)}
    used = set(used.tolist())
    nothing = bytes(128 * 128 * 3)
    with WithHoles(folder / "core50_imgs.npz", "w") as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("x.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for i, path in enumerate(paths):
                member.write(picture(path, i).tobytes() if i in used else nothing)


MAKERS = {"PNG files": make_png, "npz": make_npz}


# ---- a run ----

def time_run(data, words):
    """Runs the program on a data folder with more words of its command line, as a process of its own.

    Returns (whole seconds, {part: seconds of each time}, lines of results.jsonl). Raises RunFailed.
    """
    with tempfile.TemporaryDirectory() as logs:
        told = Path(logs) / "told.json"
        program = Path(__file__).parent / "tell_parts.py"
        command = [sys.executable, program, told, "--data", data, "--log-dir", logs, *words]
        begin = time.monotonic()
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        end = time.monotonic()
        if done.returncode != 0:
            raise RunFailed(f"the run failed: {done.stderr.strip().splitlines()[-1]}")

        results, = Path(logs).rglob("results.jsonl")
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        seconds = {}
        for part, since, until in json.loads(told.read_text()):
            seconds.setdefault(part, []).append(until - since)
            if part == "start":
                seconds["start"] = [until - begin]
            if part == "end":
                seconds["end"] = [end - until]
    return end - begin, seconds, rows


def print_run(title, whole, seconds, rows):
    """Where the seconds of a run went."""
    once = {part: seconds[part][0] for part in ONCE}
    batches = []
    for k, row in enumerate(rows):
        of_batch = {part: row[f"seconds_{part}"] for part in OF_A_BATCH[:4]}
        batches.append(of_batch | {part: seconds[part][k] for part in OF_A_BATCH[4:]})
    total = {part: sum(batch[part] for batch in batches) for part in OF_A_BATCH}
    once["end"] = seconds["end"][0]
    once["other"] = whole - sum(once.values()) - sum(total.values())

    print(f"\n{title}: {whole:.1f} s from the command to its end, accuracy {rows[-1]['test_accuracy']:.1%}, "
          f"{rows[-1]['device']}")
    print("once:    " + ", ".join(f"{part} {value:.2f}" for part, value in once.items()))
    print(f"{'seconds':16}" + "".join(f"{part:>11}" for part in ("waiting", *OF_A_BATCH[1:], "sum")))
    later = {part: statistics.median(batch[part] for batch in batches[1:]) for part in OF_A_BATCH}
    for name, values in (("batch 0", batches[0]), ("later, median", later), ("all batches", total)):
        listed = [*values.values(), sum(values.values())]
        print(f"{name:16}" + "".join(f"{value:11.3f}" for value in listed))
    reading = sum(seconds["reader"][:len(rows)])
    print(f"reading the frames of {len(rows)} batches took {reading:.2f} s, of which learning waited for "
          f"{total['read']:.2f}; checkpoints were written after {written(seconds)} of them")


def written(seconds):
    """After how many batches a checkpoint was written, instead of left out."""
    return sum(value > 1e-3 for value in seconds["checkpoint"])


def print_rates(data, paths, used):
    """Frames a second by the number of threads that read."""
    frames = data_loader.open_frames(data, paths)
    one_each = partial(ThreadPoolExecutor, 1)
    rates = []
    with mock.patch.object(data_loader, "ThreadPoolExecutor", one_each):
        for n in THREADS:
            begin = time.perf_counter()
            with ThreadPoolExecutor(n) as pool:
                list(pool.map(frames.read, np.array_split(used, n)))
            rates.append(f"{len(used) / (time.perf_counter() - begin):,.0f}")
    print(f"frames read a second with {', '.join(map(str, THREADS))} threads: {', '.join(rates)}")


def measure(n, frames, words):
    """Times a run of batch 0 and n batches after it from PNG files, and one from an npz.

    frames: of a unit, 300 in CORe50; words: further ones of the command line.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        say("making the index")
        paths, batches = make_index(data, frames)
        used = frames_read(batches, n)
        for form, make in MAKERS.items():       # where there is an npz, PNG files are not looked at
            say(f"making {form}")
            make(data, paths, used)
            say(f"timing a run of {n + 1} batches from {form}")
            print_run(form, *time_run(data, ["--max-batches", n + 1, *words]))
            print_rates(data, paths, used[:3000])
