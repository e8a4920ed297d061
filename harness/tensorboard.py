"""What a run shows in TensorBoard, written through a SummaryWriter; each function is usable alone.

    write_steps, write_batch    curves: a point for each training step, and for each incremental batch
    write_pictures              charts of the classes and sample images, after at most ten batches of a run
    write_hparams               the settings that matter, with the final figures, after the last batch

docs/tensorboard.md explains each curve and picture. A run without a memory has nothing of memory/.
"""
import io
import unicodedata
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.nn.functional import interpolate
from torch.utils.tensorboard.summary import hparams

from utils import IMAGENET_MEAN, IMAGENET_STD

# TensorBoard shows a picture 350 pixels wide (IMAGES) or 215 high (TIME SERIES), and leaves out pixels if it
# has more: text is sharp at this size alone. Charts of many classes are higher
WIDTH, HEIGHT = 350, 215
LINE = 12           # pixels: size of the text
ABOVE = 34          # pixels above a chart, for its title
BELOW = 17          # pixels below a chart, for numbers
NAMED = 50          # more classes than this have no names
NAME = 100          # pixels that a class's number with its name may take
PHOTO = 56          # pixels of a sample image, with 2 between them
PHOTO_COLUMNS, PHOTO_ROWS = 6, 3
PICTURES = 10       # of each kind in a run: TensorBoard keeps no more of them in memory

DARK = (30, 30, 30)
GREY = (90, 90, 90)
LIGHT = (238, 238, 238)
BLUE = (59, 82, 139)
ORANGE = (230, 120, 20)
COLOURS = np.array([(68, 1, 84), BLUE, (33, 145, 140), (94, 201, 98), (253, 231, 37)], float)      # of 0 to 1

HPARAMS = ("cwr_consolidation", "inc_lr", "latent_layer_num", "reg_lambda", "rm_sz", "run", "seed")
CUSTOM_SCALARS = {      # {group: {chart: its curves}}
    "accuracy": {"all classes and classes met": ["Multiline", ["test_accuracy", "accuracy/classes_met"]],
                 "forgetting": ["Multiline", ["accuracy/forgetting"]]},
    "head": {"norms: this batch's classes, earlier ones":
             ["Multiline", ["head/norm_batch", "head/norm_earlier"]]},
    "seconds": {"a batch":
                ["Multiline", ["seconds/read", "seconds/encode", "seconds/train", "seconds/test"]]},
}


# ---- curves ----

def write_scalars(writer, step, values):
    """Writes {tag: number or None} as one event, which takes half the time of one add_scalar for each."""
    known = {tag: value for tag, value in values.items() if value is not None}
    points = [Summary.Value(tag=tag, simple_value=value) for tag, value in known.items()]
    writer.file_writer.add_summary(Summary(value=points), step)


def write_steps(writer, first_step, losses, accuracies):
    """The training steps of one batch. losses, accuracies: lists, one number per step."""
    for step, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), first_step):
        write_scalars(writer, step, {"train_loss": loss, "train_accuracy": accuracy})


def write_batch(writer, row, confusion, head, memory, brns):
    """The curves of one batch.

    row: its line of results.jsonl; confusion: int64 (true, predicted); head: CWRHead; memory: ReplayMemory;
    brns: [BatchRenorm2D, ...].
    """
    if row["batch"] == 0:
        writer.add_custom_scalars(CUSTOM_SCALARS)
    curves = {
        "test_loss": row["test_loss"],
        "test_accuracy": row["test_accuracy"],
        "accuracy/classes_met": row["accuracy_seen"],
        "accuracy/forgetting": row.get("forgetting"),
        **bias(confusion, row["classes"]),
        **head_norms(head, row["classes"]),
        **brn_corrections(brns),
    }
    if len(memory):
        curves["memory/patterns"] = len(memory)
        curves["memory/age"] = row["batch"] - memory.batch.double().mean().item()
    curves |= {key.replace("_", "/", 1): value for key, value in row.items() if key.startswith("seconds_")}
    write_scalars(writer, row["batch"], curves)


def bias(confusion, classes):
    """The bias towards the given classes: test images taken for one of them / test images that are of one."""
    taken = confusion[:, classes].sum().item()
    true = confusion[classes].sum().item()
    return {"head/bias": taken / true if true else None}


def head_norms(head, classes):
    """Mean norms of the head's rows: of the classes of this batch, and of the others met so far."""
    norms = norm_per_class(head)
    met = (head.past_j > 0).cpu().numpy()
    new = np.isin(np.arange(len(norms)), classes)
    means = {"head/norm_batch": norms[new], "head/norm_earlier": norms[met & ~new]}
    return {tag: part.mean().item() for tag, part in means.items() if len(part)}


def norm_per_class(head):
    """Norm of each class's row of the head, float32 array (classes,)."""
    return head.linear.weight.detach().float().norm(dim=1).cpu().numpy()


def brn_corrections(brns):
    """Mean r and mean |d| of the trainable layers in their last training step; {} where there was none."""
    last = [brn.last for brn in brns if brn.training and brn.last is not None]
    if not last:
        return {}
    r, d = (torch.cat(parts) for parts in zip(*last, strict=True))      # (channels of all the layers,)
    return {"brn/r": r.mean().item(), "brn/d": d.abs().mean().item()}


def write_hparams(writer, config, rows):
    """The run's line of the HPARAMS tab: settings, and the final figures as curves of a single point."""
    accuracies = [row["test_accuracy"] for row in rows]
    seconds = sum(value for row in rows for key, value in row.items() if key.startswith("seconds_"))
    final = {
        "final/accuracy": accuracies[-1],
        "final/accuracy_mean": sum(accuracies) / len(accuracies),
        "final/minutes": seconds / 60,
    }
    if rows[-1].get("forgetting") is not None:
        final["final/forgetting"] = rows[-1]["forgetting"]

    settings = {name: getattr(config, name) for name in HPARAMS}
    settings["latent_layer_num"] = str(config.latent_layer_num)     # a column holds numbers or text
    for summary in hparams(settings, final):        # writer.add_hparams would open a folder of its own
        writer.file_writer.add_summary(summary)
    write_scalars(writer, rows[-1]["batch"], final)


# ---- pictures ----

def picture_due(i, batches):
    """Whether batch i of a run gets pictures: at most PICTURES do, the first and the last among them."""
    every = -(-batches // (PICTURES - 1))
    return i % every == 0 or i + 1 == batches


def write_pictures(writer, rows, batches, confusion, head, memory, images, memory_has_images=False,
                   names=None):
    """All the pictures after the last of `rows`.

    batches: how many are to be learned; confusion: int64 (true, predicted); images: those of the batch, uint8
    (n, H, W, 3); memory_has_images: patterns are normalized images (3, H, W); names: of all classes, or None.
    """
    new = rows[-1]["classes"]
    history = accuracy_history(rows, batches)
    shares = (confusion / confusion.sum(1, keepdim=True)).numpy()
    norms = norm_per_class(head)
    sample = torch.as_tensor(images[_spread(len(images))]).permute(0, 3, 1, 2)
    charts = {
        "classes/accuracy": heat_map(history, "accuracy: class (down), batch (right)", names),
        "classes/confusion": heat_map(shares, "true class (down), predicted one (right)", names),
        "classes/head_norm": bar_chart(norms, new, "norm of each class's row of the head", names),
        "images/batch": photo_grid(sample, f"of the {len(images):,} images of this batch"),
    }
    if len(memory):
        counts = torch.bincount(memory.y, minlength=len(shares)).cpu().numpy()
        charts["memory/patterns_per_class"] = bar_chart(counts, new, "stored patterns of each class", names)
    if len(memory) and memory_has_images:
        std = torch.tensor(IMAGENET_STD)[:, None, None]
        mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
        stored = memory.x[_spread(len(memory))].cpu() * std + mean          # (n, 3, H, W) in 0..1
        stored = (stored * 255).round().clamp(0, 255)
        charts["images/memory"] = photo_grid(stored, f"of the {len(memory):,} images in the memory")
    for tag, chart in charts.items():
        write_picture(writer, rows[-1]["batch"], tag, chart)


def write_picture(writer, step, tag, picture):
    """Writes a PIL image: photographs (images/...) as JPEG, charts as PNG, which keeps text and edges."""
    file = io.BytesIO()
    if tag.startswith("images/"):
        picture.save(file, "JPEG", quality=90, subsampling=0)
    else:
        picture.save(file, "PNG", compress_level=4)
    image = Summary.Image(height=picture.height, width=picture.width, colorspace=3,
                          encoded_image_string=file.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def accuracy_history(rows, batches):
    """(classes, batches): accuracy of each class after each batch; NaN where not met yet or not tested."""
    history = np.full((len(rows[-1]["per_class"]), batches), np.nan)
    met = np.zeros(len(history), bool)
    for row in rows:
        met[row["classes"]] = True
        known = met.nonzero()[0]        # below the length of per_class, which may grow
        history[known, row["batch"]] = np.array(row["per_class"], float)[known]
    return history


def heat_map(values, title, names=None):
    """Image of a matrix (classes, columns) of numbers in 0..1, dark blue to yellow; NaN is light grey.

    names: of the classes, or None. Of more columns than pixels some are left out, never the first or last.
    """
    rows, columns = values.shape
    labels, left, high = _row_labels(rows, names)
    column_of_pixel = np.linspace(0, columns - 1e-6, WIDTH - left - 2).astype(int)
    values = values.repeat(high, 0)[:, column_of_pixel]                     # (y, x)

    position = np.nan_to_num(values).clip(0, 1) * (len(COLOURS) - 1)        # among the colours
    below = np.minimum(position.astype(int), len(COLOURS) - 2)
    share = (position - below)[..., None]
    pixels = COLOURS[below] + share * (COLOURS[below + 1] - COLOURS[below])         # (y, x, 3)
    pixels[np.isnan(values)] = LIGHT
    picture = Image.fromarray(pixels.astype(np.uint8))
    return _framed(picture, f"{title}\ndark: 0, yellow: 1, grey: no value", labels, left, high, columns)


def bar_chart(values, highlighted, title, names=None):
    """Image of one bar per class, downwards, those of the classes `highlighted` in another colour.

    values: numbers of 0 or above, array (classes,); names: of the classes, or None.
    """
    labels, left, high = _row_labels(len(values), names)
    wide = WIDTH - left - 2
    numbered = high >= LINE         # then the number stands beside its bar
    room = wide - 40 if numbered else wide
    gap = 1 if high > 2 else 0
    longest = values.max().item()

    picture = Image.new("RGB", (wide, high * len(values)), LIGHT)
    draw = ImageDraw.Draw(picture)
    for k, value in enumerate(values.tolist()):
        end = round(room * value / (longest or 1))
        if end:
            bar = (0, high * k, end - 1, high * (k + 1) - 1 - gap)
            draw.rectangle(bar, ORANGE if k in highlighted else BLUE)
        if numbered:
            draw.text((end + 4, high * (k + .5)), f"{value:.3g}", DARK, _font(), anchor="lm")
    title += f"\nlongest bar: {longest:.3g}; orange: classes of this batch"
    return _framed(picture, title, labels, left, high)


def photo_grid(images, title):
    """Image of at most PHOTO_COLUMNS * PHOTO_ROWS images (n, 3, H, W), values in 0..255, each made square."""
    photos = interpolate(images.float(), (PHOTO, PHOTO), mode="bilinear", antialias=True).round().byte()
    framed = Image.new("RGB", (WIDTH, HEIGHT), "white")
    for k, photo in enumerate(photos.permute(0, 2, 3, 1).numpy()):
        row, column = divmod(k, PHOTO_COLUMNS)
        framed.paste(Image.fromarray(photo), (2 + column * (PHOTO + 2), ABOVE + row * (PHOTO + 2)))
    ImageDraw.Draw(framed).text((2, 8), f"{len(photos)} {title}", DARK, _font())
    return framed


def _row_labels(count, names):
    """(labels of a chart's rows, pixels that they take, height of a row in pixels) for `count` classes."""
    named = names is not None and count <= NAMED
    labels = [_label(k, names[k] if named else "") for k in range(count)]
    left = round(max(map(_font().getlength, labels))) + 8
    high = max(LINE + 1 if named else 1, (HEIGHT - ABOVE - BELOW) // count)
    return labels, left, high


def _label(k, name):
    """Number and name of a class, as letters that the font has and as many as there is room for."""
    letters = [c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c)]      # ä: a
    label = f"{k} {''.join(c if ' ' <= c <= '~' else '?' for c in letters)}".strip()
    if _font().getlength(label) <= NAME:
        return label
    while _font().getlength(f"{label}…") > NAME:
        label = label[:-1]
    return f"{label}…"


def _framed(picture, title, labels, left, high, columns=0):
    """A chart with two lines of title, labels beside its rows of `high` pixels, numbers below its columns."""
    framed = Image.new("RGB", (WIDTH, max(HEIGHT, ABOVE + picture.height + BELOW)), "white")
    framed.paste(picture, (left, ABOVE))
    draw = ImageDraw.Draw(framed)
    for line, y in zip(title.split("\n"), (1, 16), strict=True):
        draw.text((4, y), line, DARK, _font())

    for k in range(0, len(labels), _every(high, LINE)):
        draw.text((left - 4, ABOVE + round((k + .5) * high)), labels[k], GREY, _font(), anchor="rm")

    wide = picture.width / max(1, columns)
    for k in range(0, columns, _every(wide, 8 * len(str(columns)) + 4)):
        middle = min(left + round((k + .5) * wide), WIDTH - 4 * len(str(k)))
        draw.text((middle, ABOVE + picture.height + 14), str(k), GREY, _font(), anchor="ms")
    return framed


def _every(size, room):
    """Every how many rows or columns of `size` pixels can have a label that takes `room` pixels."""
    return next(k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if k * size >= room)


def _spread(n):
    """Indices of the sample images out of n, spread evenly."""
    return np.linspace(0, n - 1, min(n, PHOTO_COLUMNS * PHOTO_ROWS)).astype(int)


@lru_cache
def _font():
    return ImageFont.load_default(LINE)
