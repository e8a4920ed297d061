"""What --teach keeps of ten objects, taught one after the other, each from one session of frames.

    python benchmarks/teach_ten.py rendered_128x128.zip --weights tflite
    python benchmarks/teach_ten.py core50_sample/core50_128x128 --kinds --weights tflite

The frames are a folder or a zip of s<session>/o<object>/*, as CORe50's are. Taught is one object of each of
its ten kinds, in session 1, and tested after each is what is known of all so far: on the frames held back,
and on those of sessions 3, 7 and 10. Beside it stand the twin, which is merely fine-tuned, seconds, and MB.
Below it, what a learner knows that met all recordings at once: what it lacks is not forgotten; and what is
known in all other sessions, on average over the one that is taught, of every second frame. Then how often
"unknown" is said, where frames are averaged as the page does it: of objects taught from the first 26 frames
of their films, seen in the last 12, and of objects that were not taught.

--kinds: kinds of objects instead, for few frames: those of sessions 1 to 6 are taught, of the others tested.
"""
import argparse
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ar1star_lat_replay import build_learner
from harness.config import load_config
from harness.console import errors_as_sentences
from teach.server import HELD_BACK, UNKNOWN, Teacher, as_frame
from utils import scores

KINDS = 10
OBJECTS = range(1, 51, 5)       # the first of each kind
HERE = 1                        # the session in which objects are taught
ELSEWHERE = (3, 7, 10)
SMOOTHED = 5                    # frames, as on the page


def read_units(path):
    """{(session, object): bytes of its image files, in order} of a folder or zip of s<session>/o<object>/."""
    path = Path(path)
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*.*g"))}
    else:
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in sorted(archive.namelist()) if name.endswith("g")}
    units = {}
    for name, content in files.items():
        session, number, _ = name.split("/")[-3:]
        units.setdefault((int(session[1:]), int(number[1:])), []).append(content)
    return units


def of_objects(units):
    """[(name, recording, frames to test on), ...] of one object of each kind."""
    return [(f"object {o}", units[HERE, o], [raw for s in ELSEWHERE for raw in units[s, o][::8]])
            for o in OBJECTS]


def of_kinds(units):
    """The same of kinds of objects that have enough frames: sessions 1 to 6, and the others."""
    found = []
    for kind in range(KINDS):
        mine = [(s, raws) for (s, o), raws in units.items() if (o - 1) // 5 == kind]
        if sum(len(raws) for s, raws in mine if s <= 6) < HELD_BACK:
            continue
        found.append((f"kind {kind + 1}", [raw for s, raws in mine for raw in raws if s <= 6],
                      [raw for s, raws in mine for raw in raws if s > 6]))
    return found


def rightly(learner, frames, labels):
    """Whether each frame is named rightly: bool (n,)."""
    return scores(learner.classify, learner.encoder(frames), len(frames)).argmax(1).numpy() == labels


def table(config, taught):
    """Teaches one after the other, and prints a line after each."""
    teacher = Teacher(config)
    size = teacher.size
    frames = []
    labels = []
    print("taught | held back: all, first, twin | elsewhere: all, first, twin | s to ready | ms a look | MB")
    for j, (name, recording, tested) in enumerate(taught):
        shots = [as_frame(raw, size) for raw in recording]
        start = time.perf_counter()
        for frame, _ in shots:
            teacher.look(frame, remember=True)
        look = (time.perf_counter() - start) / len(shots)
        start = time.perf_counter()
        teacher.teach(name, [file for _, file in shots])
        seconds = time.perf_counter() - start

        frames += [as_frame(raw, size)[0] for raw in tested]
        labels += [j] * len(tested)
        y = np.array(labels)
        right = rightly(teacher.learner, np.stack(frames), y)
        twin = rightly(teacher.twin, np.stack(frames), y)
        row = teacher.rows[-1]
        known = row["per_class"][:j + 1]
        print(f"{j + 1:6} | {np.mean(known):9.0%} {known[0]:9.0%} {np.mean(row['twin'][:j + 1]):9.0%} | "
              f"{right.mean():9.0%} {right[y == 0].mean():9.0%} {twin.mean():9.0%} | {seconds:10.2f} | "
              f"{1000 * look:9.0f} | {row['kept_mb']:.2f}", flush=True)

    images, numbers = zip(*(teacher.stream.read_batch(i) for i in range(teacher.stream.n_batches)))
    once = untaught(teacher)
    once.learn(np.concatenate(images), np.concatenate(numbers))
    right = rightly(once, np.stack(frames), y)
    print(f"learned at once: elsewhere all {right.mean():.0%}, first {right[y == 0].mean():.0%}", flush=True)
    close(teacher)


def untaught(teacher):
    """A learner that has learned nothing, with the latents that a Teacher remembers."""
    learner = build_learner(teacher.config, 1, (teacher.size, teacher.size), teacher.learner.device)
    learner.encoder = teacher.encoder
    return learner


def in_each_place(config, units):
    """Prints what is known elsewhere of all and of the first, taught in each session in turn."""
    teacher = Teacher(config)
    places = sorted({session for session, _ in units})
    frames = {(s, o): np.stack([as_frame(raw, teacher.size)[0] for raw in units[s, o][::2]])
              for s in places for o in OBJECTS}
    found = []
    for here in places:
        learner = untaught(teacher)
        for j, o in enumerate(OBJECTS):
            learner.learn(frames[here, o], np.full(len(frames[here, o]), j))
        found += [[rightly(learner, frames[s, o], j).mean() for j, o in enumerate(OBJECTS)]
                  for s in places if s != here]
    known = np.mean(found, 0)
    print(f"taught in each of {len(places)} places: elsewhere all {known.mean():.0%}, first {known[0]:.0%}",
          flush=True)
    close(teacher)


def close(teacher):
    """Lets go of a Teacher's folder."""
    teacher.close()
    teacher.lock.close()


def unknown(config, units):
    """Prints how often "unknown" is said."""
    teacher = Teacher(config)

    def near(raws):
        values = [teacher.look(as_frame(raw, teacher.size)[0])["near"] for raw in raws]
        return [np.mean(values[k:k + SMOOTHED]) for k in range(0, len(values) - SMOOTHED + 1, SMOOTHED)]

    for taught, o in enumerate(OBJECTS, 1):
        teacher.teach(f"object {o}", [as_frame(raw, teacher.size)[1] for raw in units[HERE, o][:26]])
        if taught not in (1, 3, 10):
            continue
        print(f"unknown is said, with {taught} taught, of", end="")
        known = list(OBJECTS)[:taught]
        for what, raws in (
                ("them", [units[HERE, o][28:] for o in known]),
                ("others in the same place", [units[HERE, o + d][::4] for o in OBJECTS for d in (1, 2)]),
                ("them elsewhere", [units[s, o][::4] for o in known for s in ELSEWHERE]),
                ("others elsewhere", [units[s, o + 1][::4] for o in OBJECTS for s in ELSEWHERE])):
            values = np.concatenate([near(film) for film in raws])
            print(f" {what}: {np.mean(values < UNKNOWN):.0%};", end="", flush=True)
        print()
    close(teacher)


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frames", metavar="PATH", help="folder or zip of s<session>/o<object>/*")
    parser.add_argument("--kinds", action="store_true", help="teach kinds of objects, of few frames each")
    parser.add_argument("--weights", metavar="FILE", help="pre-trained weights (default: the published ones)")
    args = parser.parse_args(argv)
    with errors_as_sentences(parser.prog) as outcome, tempfile.TemporaryDirectory() as folder:
        settings = {"weights": args.weights} if args.weights else {}
        units = read_units(args.frames)
        table(load_config("teach", overrides=settings | {"data": f"{folder}/a"}),
              of_kinds(units) if args.kinds else of_objects(units))
        if not args.kinds:
            in_each_place(load_config("teach", overrides=settings | {"data": f"{folder}/b"}), units)
            unknown(load_config("teach", overrides=settings | {"data": f"{folder}/c"}), units)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
