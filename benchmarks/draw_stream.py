"""Draws README's first picture: five batches of NICv2-391 in a row, and what the memory replays beside each.

    python benchmarks/draw_stream.py --data core50 --out docs/stream.png

What it shows comes from CORe50's index, order 0: the video of each batch, which classes are new, and the
memory of 1,500 patterns as the run of seed 0 has it then: ReplayMemory takes in each batch, with numbers of
frames in place of latents. Each video is shown by one frame of --sample. Videos of which it has none are left
out of what is replayed, and no video stands twice beside one batch. Of --data, the three files of the index
are enough. Needs matplotlib.
"""
import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_loader import INDEX_FILES, DataError, object_numbers, read_paths, read_pickle, read_png, read_run
from harness.console import errors_as_sentences
from utils import ReplayMemory, generator

KINDS = ("plug adapter", "mobile phone", "scissors", "light bulb", "can", "glasses", "ball", "marker", "cup",
         "remote control")      # of five objects each
SHOWN = range(99, 104)          # batches in a row, of which the sample has frames
RM_SZ = 1500
REPLAYED = 6                    # videos beside each batch
SEED = 0
NEW, MET, MEMORY, FAINT = "#d9480f", "#343a40", "#1864ab", "#868e96"
BEHIND, BEHIND_MEMORY = "#e9ecef", "#d0ebff"


# ---- what is shown ----

class Column(NamedTuple):
    """A batch and what is replayed beside it."""
    batch: int
    frames: int         # how many it has
    video: str          # that they are of: "s4/o12"
    replayed: list      # [(video, the batch that it came in), ...]


def video(path):
    """The session and object of a frame: "s4/o12" of s4/o12/C_04_12_006.png."""
    return "/".join(Path(path).parts[-3:-1])


def new_classes(batches):
    """How many classes each batch brings that none before it had. batches: [(indices into paths, labels)]."""
    met = set()
    counts = []
    for _, labels in batches:
        new = set(labels.tolist()) - met
        counts.append(len(new))
        met |= new
    return counts


def columns(paths, batches, videos):
    """A Column for each batch in SHOWN. videos: those that there are frames of."""
    memory = ReplayMemory(RM_SZ, like=torch.zeros(1, 1, dtype=torch.int64))
    found = []
    for i, (indices, labels) in enumerate(batches[:SHOWN[-1] + 1]):
        if i in SHOWN:
            of_batch = {video(paths[k]) for k in indices}
            if len(of_batch) > 1 or not of_batch <= videos:
                raise DataError(f"there is no frame to show of batch {i}: {', '.join(sorted(of_batch))}")
            found.append(Column(i, len(indices), *of_batch, replayed_videos(memory, paths, videos, i)))
        memory.update(torch.from_numpy(indices)[:, None], torch.from_numpy(labels), i,
                      generator(SEED, i, "memory"))
    return found


def replayed_videos(memory, paths, videos, i):
    """[(video, the batch that it came in), ...] of some patterns of the memory, each video once."""
    batch_of = {}
    for k in torch.randperm(len(memory), generator=generator(SEED, i, "picture")):
        batch_of.setdefault(video(paths[memory.x[k]]), int(memory.batch[k]))
    return [(v, batch) for v, batch in batch_of.items() if v in videos][:REPLAYED]


# ---- the picture ----

class Picture:
    """1000 x 528 pixels, y downwards. Photographs are put in at last, pixel by pixel."""

    def __init__(self):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.canvas = FigureCanvasAgg(Figure((10, 5.28), dpi=100, facecolor="white"))
        self.axes = self.canvas.figure.add_axes((0, 0, 1, 1), xlim=(0, 1000), ylim=(528, 0))
        self.axes.axis("off")
        self.photographs = []

    def area(self, x, y, width, height, color, top=None):
        """A rectangle; top: (left, right) of its upper edge where that is another one."""
        left, right = top or (x, x + width)
        self.axes.fill((left, right, x + width, x), (y, y, y + height, y + height), color=color, linewidth=0)

    def text(self, x, y, words, color=MET, size=10, ha="center", **style):
        """Words, centred at a height; ha: which part of them is at x."""
        self.axes.text(x, y, words, fontsize=size, color=color, ha=ha, va="center", **style)

    def title(self, x, y, words):
        """Bold words from x on."""
        self.text(x, y, words, color="black", size=13, ha="left", weight="bold")

    def photograph(self, image, x, y, size):
        """uint8 (height, width, 3), drawn as a square."""
        self.photographs.append((image, (x, y), (size, size)))

    def save(self, path):
        """Writes a PNG file."""
        from PIL import Image, ImageOps

        self.canvas.draw()
        picture = Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")
        for image, at, size in self.photographs:
            small = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
            picture.paste(ImageOps.posterize(small, 5), at)     # 5 bits a colour: half the bytes
        picture.save(path, optimize=True)


def draw(found, new, images):
    """The Picture of Columns. new: see new_classes; images: {video: uint8 (height, width, 3)}."""
    picture = Picture()
    draw_stream(picture, new)
    picture.area(20, 284, 960, 230, BEHIND_MEMORY)
    kept = f"what a memory of {RM_SZ:,} patterns keeps of earlier batches"
    picture.title(32, 312, f"Replayed beside each: {kept}")
    for k, column in enumerate(found):
        draw_batch(picture, 20 + 192 * k, column, new[column.batch], images, first=k == 0)
    return picture


def draw_stream(picture, new):
    """The bar of all batches, those that are shown widened below it."""
    tick = 960 / len(new)       # width of a batch in the bar
    shown = 20 + tick * SHOWN[0]
    picture.title(20, 18, "The stream: one small batch after the other, each a video of one object")
    picture.text(980, 18, "orange: a new class", NEW, ha="right")
    picture.area(shown - 2, 34, tick * len(SHOWN) + 4, 20, MET)
    picture.area(20, 36, 960, 16, "#ced4da")
    for i, count in enumerate(new):
        if count:
            picture.area(20 + tick * i, 36, tick, 16, NEW)
    picture.area(20, 54, 960, 22, BEHIND, top=(shown, shown + tick * len(SHOWN)))
    picture.area(20, 76, 960, 204, BEHIND)
    picture.text(20, 64, f"batch 0: {new[0]} objects", size=9, ha="left")
    picture.text(980, 64, f"batch {len(new) - 1}", size=9, ha="right")


def draw_batch(picture, x, column, is_new, images, first):
    """A column of the picture, from x on, 192 pixels wide."""
    picture.text(x + 96, 90, f"batch {column.batch}: {column.frames} frames")
    for offset in (12, 8, 4):       # a pile of frames
        picture.area(x + 25 + offset, 113 - offset, 130, 130, "white")
        picture.area(x + 26 + offset, 114 - offset, 128, 128, "#adb5bd")
    if is_new:
        picture.area(x + 23, 111, 134, 134, NEW)
    picture.photograph(images[column.video], x + 26, 114, 128)

    number = int(column.video.split("/o")[1])
    told = "new" if is_new else "met before"
    style = {"color": NEW, "weight": "bold"} if is_new else {}
    picture.text(x + 96, 262, f"{told}: {KINDS[(number - 1) // 5]} {number}", **style)
    picture.text(x + 96, 284, "+", size=13, bbox={"boxstyle": "circle,pad=0.1", "color": "white"})
    if not first:
        picture.text(x, 178, "\u25b6", FAINT, 13)
        picture.area(x - 1, 336, 2, 170, "white")

    for j, (old, batch) in enumerate(column.replayed):
        left = x + 8 + 60 * (j % 3)
        top = 334 + 90 * (j // 3)
        picture.photograph(images[old], left, top, 56)
        picture.text(left + 28, top + 68, f"from {batch}", MEMORY, 8.5)


# ---- the command line ----

def choose_and_draw(data, sample, out):
    """Draws the picture from the index in the folder `data` and the frames below the folder `sample`."""
    lacking = [name for name in INDEX_FILES if not (data / name).is_file()]
    if lacking:
        command = f"python data_loader.py --download --data {data}"
        raise DataError(f"{data} lacks {', '.join(lacking)}: `{command}` fetches them")
    paths = read_paths(data / "paths.pkl")
    lup = read_pickle(data / "LUP.pkl", dict)
    labels = read_pickle(data / "labels.pkl", dict)
    *batches, _ = read_run(data, object_numbers(paths), lup, labels, "nicv2_391", 0)

    files = {video(file): file for file in sorted(sample.glob("**/s*/o*/*.png"), reverse=True)}
    found = columns(paths, batches, files.keys())
    videos = {v for column in found for v in (column.video, *dict(column.replayed))}
    images = {v: read_png(files[v]) for v in videos}
    try:
        picture = draw(found, new_classes(batches), images)
    except ImportError:
        raise DataError("the picture needs matplotlib: pip install matplotlib") from None
    picture.save(out)


def main(argv=None):
    """Returns the exit status: 0 done, 2 bad input, 1 failure on the way, 130 interrupted."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--data", type=Path, default="core50", metavar="DIR", help="CORe50's index (default core50)")
    add("--sample", type=Path, metavar="DIR", help="frames of CORe50 as PNG files (default --data)")
    add("--out", default=ROOT / "docs" / "stream.png", metavar="FILE.png", help="(default docs/stream.png)")
    args = parser.parse_args(argv)
    with errors_as_sentences(parser.prog) as outcome:
        choose_and_draw(args.data, args.sample or args.data, args.out)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
