"""Draws a stand-in for CORe50: 50 household objects of ten kinds, held in a hand, in 11 sessions. README.md tells the rest.

    python benchmarks/standin/make_rendered.py OUT [--frames 300] [--units 1/1,3/22] [--index core50]
"""
import argparse
import os
import pickle
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data_loader import INDEX_FILES, read_paths, read_pickle
from streams.download import fetch_once

os.environ.update(LIBGL_ALWAYS_SOFTWARE="1", LP_NUM_THREADS="1", OMP_NUM_THREADS="1")       # the same frames on all machines

def thinned(paths, lup, labels, frames):
    """CORe50's index with so many frames of each video, evenly spread; {(session, object): {path: number in the video}}."""
    units = {}
    for path in paths:
        units.setdefault(tuple(int(part[1:]) for part in path.split("/")[-3:-1]), []).append(path)
    units = {unit: {v[k]: k for k in (i * len(v) // frames for i in range(frames))} for unit, v in units.items()}
    keep = np.isin(paths, list(set().union(*units.values())))
    new, kept = np.cumsum(keep) - 1, lambda values, i: np.asarray(values)[keep[i]].tolist()
    labels = {s: [[kept(y, i) for i, y in zip(*run)] for run in zip(lup[s], labels[s])] for s in lup}
    lup = {s: [[kept(new[i], i) for i in run] for run in runs] for s, runs in lup.items()}
    return kept(paths, slice(None)), lup, labels, units

def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--frames", type=int, default=40, choices=range(1, 301), metavar="N", help="of a video (default 40)")
    parser.add_argument("--units", type=lambda text: text.split(","), help="draw these only: 1/1,3/22 (session/object)")
    parser.add_argument("--index", type=Path, default="core50", help="folder of CORe50's index, or for it (default core50)")
    args = parser.parse_args()
    for folder in (args.index, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    for name in INDEX_FILES:
        (args.index / name).exists() or fetch_once(args.index / name, os.environ.get("CORE50_BASE_URL"))
    tables = [read_paths(args.index / INDEX_FILES[0]), *(read_pickle(args.index / name, dict) for name in INDEX_FILES[1:])]
    *tables, units = thinned(*tables, args.frames)
    for name, table in zip(INDEX_FILES, tables):
        (args.out / name).write_bytes(pickle.dumps(table, 3))
    from benchmarks.standin.drawing import Renderer  # needs the packages
    renderer = Renderer(seed=0)
    for (s, o), video in sorted(units.items(), key=lambda unit: unit[0][::-1]):
        files = [args.out / "core50_128x128" / path for path in video]
        if f"{s}/{o}" not in (args.units or [f"{s}/{o}"]) or all(file.exists() for file in files):
            continue
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for file, image in zip(files, renderer.frames(s, o, video.values())):
            Image.fromarray(image).save(file.with_suffix(".part"), "PNG", compress_level=1)
            os.replace(file.with_suffix(".part"), file)
        print(f"{files[0].parent}: {len(files)} frames", flush=True)

if __name__ == "__main__":
    main()
