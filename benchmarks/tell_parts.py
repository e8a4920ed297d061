"""Runs ar1star_lat_replay.py as its own command does, and writes down when its parts began and ended.

    python benchmarks/tell_parts.py FILE WORDS...       FILE gets a list of [part, begin, end]

Seconds are those of time.monotonic, which all processes of a machine share. Nothing in the program knows of
this: when its imports are done, a few functions are wrapped where it looks them up.
"""
import json
import runpy
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = (       # module, class, what is called, and the part that it is
    ("__main__", None, "open_stream", "index"),
    ("__main__", None, "build_learner", "network"),
    ("__main__", None, "record", "record"),
    ("data_loader", "CORE50", "identity", "samples"),
    ("data_loader", "CORE50", "get_test_set", "test images"),
    ("data_loader", "CORE50", "_read_batches", "reader"),
    ("harness.encoder", "TestSet", "encode", "encode test"),
    ("harness.checkpoint", "RunFolder", "save", "checkpoint"),
)
spans = []


def wrap(place, name, part):
    """Has place.name tell when it is called."""
    function = getattr(place, name)

    def call(*args, **kwargs):
        begin = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            spans.append((part, begin, time.monotonic()))

    setattr(place, name, call)


def main(file, words):
    """Runs the program with these words of its command line."""
    sys.path[0] = str(ROOT)
    sys.argv = ["ar1star_lat_replay.py", *words]
    from harness import console
    end_imports = console.end_imports

    def wrap_parts():
        end_imports()
        now = time.monotonic()
        spans.append(("start", now, now))
        for module, owner, name, part in PARTS:
            place = sys.modules[module]
            wrap(getattr(place, owner) if owner else place, name, part)

    console.end_imports = wrap_parts
    try:
        runpy.run_path(str(ROOT / "ar1star_lat_replay.py"), run_name="__main__")
    finally:
        now = time.monotonic()
        spans.append(("end", now, now))
        Path(file).write_text(json.dumps(spans))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
