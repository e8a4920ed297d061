"""Draws README's first picture: five batches of NICv2-391 in a row, and what the memory replays beside each.

    python benchmarks/draw_stream.py --data core50 --out docs/stream.png

What it shows comes from CORe50's index, order 0: the video of each batch, which classes are new, and the memory of 1,500
patterns as the run of seed 0 has it then: ReplayMemory takes in each batch, with numbers of frames in place of latents.
Each video is shown by one frame of --sample. Videos of which it has none are left out of what is replayed, and no video
stands twice beside one batch. Of --data, the three files of the index are enough. Needs matplotlib.
"""
import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_loader import INDEX_FILES, DataError, object_numbers, read_paths, read_pickle, read_png, read_run
from lab.command_line import status_of
from utils import ReplayMemory, generator

KINDS = "plug adapter,mobile phone,scissors,light bulb,can,glasses,ball,marker,cup,remote control".split(",")  # of five each
SHOWN = range(99, 104)      # batches in a row, of which the sample has frames
RM_SZ, REPLAYED, SEED = 1500, 6, 0
NEW, MET, MEMORY, FAINT = "#d9480f", "#343a40", "#1864ab", "#868e96"


class Column(NamedTuple):
    """A batch, how many frames it has, the video that they are of ("s4/o12"), and [(video, its batch)] replayed."""
    batch: int
    frames: int
    video: str
    replayed: list


def video(path):
    """The session and object of a frame: "s4/o12" of s4/o12/C_04_12_006.png."""
    return "/".join(Path(path).parts[-3:-1])


def new_classes(batches):
    """How many classes each batch brings that none before it had. batches: [(indices into paths, labels)]."""
    met, counts = set(), []
    for _, labels in batches:
        counts.append(len(set(labels.tolist()) - met))
        met |= set(labels.tolist())
    return counts


def columns(paths, batches, videos):
    """A Column for each batch in SHOWN. videos: those that there are frames of."""
    memory, found = ReplayMemory(RM_SZ, like=torch.zeros(1, 1, dtype=torch.int64)), []
    for i, (indices, labels) in enumerate(batches[:SHOWN[-1] + 1]):
        if i in SHOWN:
            of_batch, replayed = {video(paths[k]) for k in indices}, {}
            if len(of_batch) > 1 or not of_batch <= videos:
                raise DataError(f"there is no frame to show of batch {i}: {', '.join(sorted(of_batch))}")
            for k in torch.randperm(len(memory), generator=generator(SEED, i, "picture")):
                replayed.setdefault(video(paths[memory.x[k]]), int(memory.batch[k]))
            replayed = [pair for pair in replayed.items() if pair[0] in videos]
            found.append(Column(i, len(indices), *of_batch, replayed[:REPLAYED]))
        memory.update(torch.from_numpy(indices)[:, None], torch.from_numpy(labels), i, generator(SEED, i, "memory"))
    return found


def draw(found, new, images, out):
    """Draws Columns into a PNG file. new: see new_classes; images: {video: uint8 (height, width, 3)}."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image, ImageOps
    except ImportError:
        raise DataError("the picture needs matplotlib: pip install matplotlib") from None
    canvas = FigureCanvasAgg(Figure((10, 5.28), dpi=100, facecolor="white"))
    axes = canvas.figure.add_axes((0, 0, 1, 1), xlim=(0, 1000), ylim=(528, 0))      # in pixels
    axes.axis("off")
    pasted, tick = [], 960 / len(new)       # frames, put in at last, pixel by pixel; width of a batch in the bar

    def area(x, y, width, height, color, top=None):
        left, right = top or (x, x + width)
        axes.fill((left, right, x + width, x), (y, y, y + height, y + height), color=color, linewidth=0)

    def frame(video, *at, size):
        pasted.append((Image.fromarray(images[video]).resize((size, size), Image.Resampling.LANCZOS), at))

    def text(x, y, words, color=MET, size=10, ha="center", **style):
        axes.text(x, y, words, fontsize=size, color=color, ha=ha, va="center", **style)

    title = dict(color="black", size=13, ha="left", weight="bold")
    text(20, 18, "The stream: one small batch after the other, each a video of one object", **title)
    text(980, 18, "orange: a new class", NEW, ha="right")
    area(18 + tick * SHOWN[0], 34, 4 + tick * len(SHOWN), 20, MET)
    area(20, 36, 960, 16, "#ced4da")
    for i in range(len(new)):
        area(20 + tick * i, 36, tick * (new[i] > 0), 16, NEW)
    area(20, 54, 960, 22, "#e9ecef", top=(20 + tick * SHOWN[0], 20 + tick * (SHOWN[-1] + 1)))
    area(20, 76, 960, 204, "#e9ecef")
    area(20, 284, 960, 230, "#d0ebff")
    text(20, 64, f"batch 0: {new[0]} objects", size=9, ha="left")
    text(980, 64, f"batch {len(new) - 1}", size=9, ha="right")
    text(32, 312, f"Replayed beside each: what a memory of {RM_SZ:,} patterns keeps of earlier batches", **title)
    for k, column in enumerate(found):
        x, number = 20 + 192 * k, int(column.video.split("/o")[1])
        told, style = ("new", dict(color=NEW, weight="bold")) if new[column.batch] else ("met before", {})
        text(x + 96, 90, f"batch {column.batch}: {column.frames} frames")
        for offset in (12, 8, 4):
            area(x + 25 + offset, 113 - offset, 130, 130, "white")
            area(x + 26 + offset, 114 - offset, 128, 128, "#adb5bd")
        if new[column.batch]:
            area(x + 23, 111, 134, 134, NEW)
        frame(column.video, x + 26, 114, size=128)
        text(x + 96, 262, f"{told}: {KINDS[(number - 1) // 5]} {number}", **style)
        text(x + 96, 284, "+", size=13, bbox=dict(boxstyle="circle,pad=0.1", color="white"))
        if k:
            text(x, 178, "\u25b6", FAINT, 13)
            area(x - 1, 336, 2, 170, "white")
        for j, (old, batch) in enumerate(column.replayed):
            left, top = x + 8 + 60 * (j % 3), 334 + 90 * (j // 3)
            frame(old, left, top, size=56)
            text(left + 28, top + 68, f"from {batch}", MEMORY, 8.5)
    canvas.draw()
    picture = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba(), "raw", "RGBA", 0, 1).convert("RGB")
    for image, at in pasted:
        picture.paste(ImageOps.posterize(image, 5), at)     # 5 bits a colour: half the bytes
    picture.save(out, optimize=True)


def choose_and_draw(data, sample, out):
    """Draws the picture from the index in the folder `data` and the frames below the folder `sample`."""
    if lacking := [name for name in INDEX_FILES if not (data / name).is_file()]:
        raise DataError(f"{data} lacks {', '.join(lacking)}: `python data_loader.py --download --data {data}` fetches them")
    paths, table = read_paths(data / "paths.pkl"), lambda name: read_pickle(data / name, dict)
    *batches, _ = read_run(data, object_numbers(paths), table("LUP.pkl"), table("labels.pkl"), "nicv2_391", 0)
    files = {video(file): file for file in sorted(sample.glob("**/s*/o*/*.png"), reverse=True)}
    found = columns(paths, batches, files.keys())
    videos = {v for column in found for v in (column.video, *dict(column.replayed))}
    draw(found, new_classes(batches), {v: read_png(files[v]) for v in videos}, out)


def main(argv=None):
    """Returns the exit status: 0 done, 2 bad input, 1 failure on the way, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default="core50", metavar="DIR", help="CORe50's index (default core50)")
    parser.add_argument("--sample", type=Path, metavar="DIR", help="frames of CORe50 as PNG files (default --data)")
    parser.add_argument("--out", default=ROOT / "docs" / "stream.png", metavar="FILE.png", help="(default docs/stream.png)")
    args = parser.parse_args(argv)
    return status_of(parser.prog, lambda: choose_and_draw(args.data, args.sample or args.data, args.out))


if __name__ == "__main__":
    sys.exit(main())
