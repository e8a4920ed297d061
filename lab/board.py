"""What a run shows in TensorBoard, written through a SummaryWriter; each function is usable alone.

    train_loss, train_accuracy              one point per training step
    test_loss, test_accuracy                one point per incremental batch, as is everything below; over all classes
    accuracy/classes_met                    accuracy over the test images of the classes met so far
    accuracy/forgetting                     best accuracy so far minus accuracy now, mean over the classes met
    head/bias                               test images taken for a class of this batch / those that are one: 1 = no bias
    head/norm_batch, norm_earlier           mean norm of the head's rows: classes of this batch, other classes met before
    brn/r, brn/d                            mean r and mean |d| of the trainable layers in the batch's last step
    memory/patterns, memory/age             patterns stored; batches since they were stored, on average
    seconds/read, encode, train, test       where the time goes
    pictures at ten batches, the last among them: classes/accuracy (class x batch), classes/confusion, classes/head_norm,
    memory/patterns_per_class, images/batch and, where the memory holds images, images/memory
    final/accuracy, accuracy_mean, forgetting, minutes      one point a run, after its last batch
    HPARAMS                                 the settings that matter, with the final figures
    CUSTOM SCALARS                          curves that belong together

A run without a memory has nothing of memory/. docs/tensorboard.md explains each for the one who looks at it.

Uses numpy, PIL (which torchvision and tensorboard bring), tensorboard, torch, utils.
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

PICTURES = 10       # of each kind in a run: TensorBoard keeps no more of them in memory
# TensorBoard shows a picture 350 pixels wide (IMAGES) or 215 high (TIME SERIES), and leaves out pixels if it has more:
# text is sharp at this size alone. Charts of many classes are higher
WIDTH, HEIGHT = 350, 215
LINE, ABOVE, BELOW = 12, 34, 17     # pixels: size of the text; above a chart, for its title; below it, for numbers
NAMED, NAME = 50, 100               # more classes than this have no names; pixels that a number with its name may take
PHOTO, PHOTO_COLUMNS, PHOTO_ROWS = 56, 6, 3         # pixels of a sample image, with 2 between them; in a grid
SETTINGS = ("cwr_consolidation", "inc_lr", "latent_layer_num", "reg_lambda", "rm_sz", "run", "seed")     # of HPARAMS
CURVES = {"accuracy": {"all classes and classes met": ["Multiline", ["test_accuracy", "accuracy/classes_met"]],
                       "forgetting": ["Multiline", ["accuracy/forgetting"]]},
          "head": {"norms: this batch's classes, earlier ones": ["Multiline", ["head/norm_batch", "head/norm_earlier"]]},
          "seconds": {"a batch": ["Multiline", ["seconds/read", "seconds/encode", "seconds/train", "seconds/test"]]}}
DARK, GREY, LIGHT, HIGHLIGHT = (30, 30, 30), (90, 90, 90), (238, 238, 238), (230, 120, 20)
COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float64)    # 0 .. 1


# ---- curves ----

def write_scalars(writer, step, values):
    """Writes {tag: number} as a single event, which takes half the time of one add_scalar for each."""
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if value is not None]
    writer.file_writer.add_summary(Summary(value=values), step)


def write_steps(writer, first_step, losses, accuracies):
    """The training steps of one batch. losses, accuracies: lists, one number per step."""
    for step, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), first_step):
        write_scalars(writer, step, {"train_loss": loss, "train_accuracy": accuracy})


def write_batch(writer, row, confusion, head, memory, brns):
    """The curves of one batch.

    row: its line of results.jsonl; confusion: int64 (true, predicted); head: CWRHead; memory: ReplayMemory.
    """
    if row["batch"] == 0:
        writer.add_custom_scalars(CURVES)
    write_scalars(writer, row["batch"], {
        "test_loss": row["test_loss"], "test_accuracy": row["test_accuracy"],
        "accuracy/classes_met": row["accuracy_seen"], "accuracy/forgetting": row.get("forgetting"),
        **bias(confusion, row["classes"]), **head_norms(head, row["classes"]), **brn_corrections(brns),
        "memory/patterns": len(memory) or None,
        "memory/age": row["batch"] - memory.batch.double().mean().item() if len(memory) else None,
        **{key.replace("_", "/", 1): value for key, value in row.items() if key.startswith("seconds_")}})


def bias(confusion, classes):
    """The bias towards the latest classes: test images taken for one of them / test images that are of one of them."""
    taken, true = confusion[:, classes].sum().item(), confusion[classes].sum().item()
    return {"head/bias": taken / true if true else None}


def head_norms(head, classes):
    """Mean norms of the head's rows: of the classes of this batch, and of the others met so far."""
    norms, met = norm_per_class(head), (head.past_j > 0).cpu().numpy()
    new = np.isin(np.arange(len(norms)), classes)
    means = {"head/norm_batch": norms[new], "head/norm_earlier": norms[met & ~new]}
    return {tag: part.mean().item() for tag, part in means.items() if len(part)}


def norm_per_class(head):
    """Norm of each class's row of the head, float32 array (classes,)."""
    return head.linear.weight.detach().float().norm(dim=1).cpu().numpy()


def brn_corrections(brns):
    """Mean r and mean |d| in the last training step of the trainable layers; nothing where there was none."""
    last = [brn.last for brn in brns if brn.training and brn.last is not None]
    if not last:
        return {}
    r, d = (torch.cat(parts) for parts in zip(*last, strict=True))
    r, d = torch.stack((r.mean(), d.abs().mean())).tolist()
    return {"brn/r": r, "brn/d": d}


def write_hparams(writer, config, rows):
    """The line of the HPARAMS tab: settings, and the final figures as curves of a single point. In the run's own folder."""
    accuracies = [row["test_accuracy"] for row in rows]
    seconds = sum(value for row in rows for key, value in row.items() if key.startswith("seconds_"))
    final = {"final/accuracy": accuracies[-1], "final/accuracy_mean": sum(accuracies) / len(accuracies),
             "final/minutes": seconds / 60}
    if rows[-1].get("forgetting") is not None:
        final["final/forgetting"] = rows[-1]["forgetting"]
    settings = {name: getattr(config, name) for name in SETTINGS} | {"latent_layer_num": str(config.latent_layer_num)}
    for summary in hparams(settings, final):
        writer.file_writer.add_summary(summary)
    write_scalars(writer, rows[-1]["batch"], final)


# ---- pictures ----

def picture_due(i, batches):
    """Whether batch i of `batches` is one of the at most PICTURES batches that get pictures: even steps and the last."""
    return i + 1 == batches or i % -(-batches // (PICTURES - 1)) == 0


def write_pictures(writer, rows, batches, confusion, head, memory, images, memory_has_images=False, names=None):
    """All the pictures after the last of `rows`.

    batches: how many are to be learned; confusion: int64 (true, predicted); images: those of the batch, uint8 (n, H, W, 3);
    memory_has_images: patterns are normalized images (3, H, W); names: of all classes, or None.
    """
    i, present = rows[-1]["batch"], rows[-1]["classes"]
    shares = (confusion / confusion.sum(1, keepdim=True)).numpy()
    charts = {"classes/accuracy": heat_map(accuracy_history(rows, batches), "accuracy: class (down), batch (right)", names),
              "classes/confusion": heat_map(shares, "true class (down), predicted one (right)", names),
              "classes/head_norm": bar_chart(norm_per_class(head), present, "norm of each class's row of the head", names),
              "images/batch": photo_grid(torch.as_tensor(images[_spread(len(images))]).permute(0, 3, 1, 2),
                                         f"of the {len(images):,} images of this batch")}
    if len(memory):
        counts = torch.bincount(memory.y, minlength=len(shares)).cpu().numpy()
        charts["memory/patterns_per_class"] = bar_chart(counts, present, "stored patterns of each class", names)
    if len(memory) and memory_has_images:
        x, mean, std = memory.x[_spread(len(memory))].cpu(), torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        x = ((x * std[:, None, None] + mean[:, None, None]) * 255).round().clamp(0, 255)
        charts["images/memory"] = photo_grid(x, f"of the {len(memory):,} images in the memory")
    for tag, chart in charts.items():
        write_picture(writer, i, tag, chart)


def write_picture(writer, step, tag, picture):
    """Writes a PIL image: photographs (images/...) as JPEG, charts as PNG, which keeps their text and edges."""
    file = io.BytesIO()
    if tag.startswith("images/"):
        picture.save(file, "JPEG", quality=90, subsampling=0)
    else:
        picture.save(file, "PNG", compress_level=4)
    image = Summary.Image(height=picture.height, width=picture.width, colorspace=3, encoded_image_string=file.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def accuracy_history(rows, batches):
    """(classes, batches): accuracy of each class after each batch; NaN before it was met and where there is none yet."""
    history = np.full((len(rows[-1]["per_class"]), batches), np.nan)
    met = np.zeros(len(history), bool)
    for row in rows:
        if "per_class" in row:      # else a line of an older program
            met[row["classes"]] = True
            history[met, row["batch"]] = np.array(row["per_class"], float)[met]
    return history


def heat_map(values, title, names=None):
    """Image of a matrix (classes, columns) of numbers in 0..1, dark blue to yellow; NaN is light grey.

    names: of the classes, or None. Where there are more columns than pixels, some are left out, never the first or last.
    """
    rows, columns = values.shape
    labels, left, high = _row_labels(rows, names)
    of_pixel = np.linspace(0, columns - 1e-6, WIDTH - left - 2).astype(int)     # the column that each pixel shows
    values = values.repeat(high, 0)[:, of_pixel]
    cells = np.nan_to_num(values).clip(0, 1)[..., None] * (len(COLOURS) - 1)        # (y, x, 1)
    below = np.minimum(cells.astype(int)[..., 0], len(COLOURS) - 2)
    colours = COLOURS[below] + (cells - below[..., None]) * (COLOURS[below + 1] - COLOURS[below])
    colours[np.isnan(values)] = LIGHT
    picture = Image.fromarray(colours.astype(np.uint8))
    return _framed(picture, f"{title}\ndark: 0, yellow: 1, grey: no value", labels, left, high, columns)


def bar_chart(values, highlighted, title, names=None):
    """Image of one bar per class, downwards, those of the classes `highlighted` in another colour.

    values: numbers of 0 or above, array (classes,); names: of the classes, or None.
    """
    labels, left, high = _row_labels(len(values), names)
    wide, longest = WIDTH - left - 2, values.max().item()
    picture = Image.new("RGB", (wide, high * len(values)), LIGHT)
    draw, room = ImageDraw.Draw(picture), wide - 40 * (high >= LINE)        # the number stands beside its bar
    for k, value in enumerate(values.tolist()):
        end, colour = round(room * value / (longest or 1)), HIGHLIGHT if k in highlighted else tuple(COLOURS[1].astype(int))
        if end:
            draw.rectangle((0, high * k, end - 1, high * (k + 1) - 1 - (high > 2)), colour)
        if room < wide:
            draw.text((end + 4, high * (k + .5)), f"{value:.3g}", DARK, _font(), anchor="lm")
    return _framed(picture, f"{title}\nlongest bar: {longest:.3g}; orange: classes of this batch", labels, left, high)


def photo_grid(images, title):
    """Image of at most PHOTO_COLUMNS * PHOTO_ROWS of the images (n, 3, H, W), values in 0..255, each made square."""
    x = interpolate(images[:PHOTO_COLUMNS * PHOTO_ROWS].float(), (PHOTO, PHOTO), mode="bilinear", antialias=True)
    framed = Image.new("RGB", (WIDTH, HEIGHT), "white")
    for k, photo in enumerate(x.round().byte().permute(0, 2, 3, 1).numpy()):
        row, column = divmod(k, PHOTO_COLUMNS)
        framed.paste(Image.fromarray(photo), (2 + column * (PHOTO + 2), ABOVE + row * (PHOTO + 2)))
    ImageDraw.Draw(framed).text((2, 8), f"{len(x)} {title}", DARK, _font())
    return framed


def _row_labels(count, names):
    """(labels of the rows of a chart, pixels that they take, height of a row in pixels) of `count` classes."""
    high, named = max(1, (HEIGHT - ABOVE - BELOW) // count), names is not None and count <= NAMED
    labels = [_label(k, names[k] if named else "") for k in range(count)]
    return labels, round(max(map(_font().getlength, labels))) + 8, max(high, LINE + 1) if named else high


def _label(k, name):
    """Number and name of a class, as letters that the font has and as many as there is room for."""
    letters = (c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))      # ä: a
    label = f"{k} {''.join(c if ' ' <= c <= '~' else '?' for c in letters)}".strip()
    if _font().getlength(label) > NAME:
        while _font().getlength(f"{label}…") > NAME:
            label = label[:-1]
        label += "…"
    return label


def _framed(picture, title, labels, left, high, columns=0):
    """A chart with two lines of title, labels beside its rows of `high` pixels, and numbers below its columns."""
    framed = Image.new("RGB", (WIDTH, max(HEIGHT, ABOVE + picture.height + BELOW)), "white")
    framed.paste(picture, (left, ABOVE))
    draw = ImageDraw.Draw(framed)
    for line, y in zip(title.split("\n"), (1, 16), strict=True):
        draw.text((4, y), line, DARK, _font())
    for k in range(0, len(labels), _step(high, LINE)):
        draw.text((left - 4, ABOVE + round((k + .5) * high)), labels[k], GREY, _font(), anchor="rm")
    wide = picture.width / max(1, columns)
    for k in range(0, columns, _step(wide, 8 * len(str(columns)) + 4)):
        middle = min(left + round((k + .5) * wide), WIDTH - 4 * len(str(k)))
        draw.text((middle, ABOVE + picture.height + 14), str(k), GREY, _font(), anchor="ms")
    return framed


def _step(size, room):
    """Every how manieth of the things of `size` pixels can have a label that takes `room` pixels."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if step * size >= room)


def _spread(n):
    """Indices of the sample images out of n, spread evenly."""
    return np.linspace(0, n - 1, min(n, PHOTO_COLUMNS * PHOTO_ROWS)).astype(int)


@lru_cache
def _font():
    return ImageFont.load_default(LINE)
