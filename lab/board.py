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
    HPARAMS                                 the settings with the final figures; CUSTOM SCALARS: curves that belong together

Uses numpy, PIL (which torchvision and tensorboard bring), tensorboard, torch, torchvision, utils.
"""
import io
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import hparams
from torchvision.io import encode_jpeg
from torchvision.utils import make_grid

from utils import IMAGENET_MEAN, IMAGENET_STD

PICTURES = 10       # of each kind in a run: TensorBoard keeps no more of them in memory
SIDE, FONT = 512, 28    # pixels: twice of what TensorBoard's cards show, which leave out pixels and so parts of thin letters
PHOTOS, PHOTO_SIZE = 16, 64     # in a grid of sample images; pixels, about
SETTINGS = ("cwr_consolidation", "inc_lr", "latent_layer_num", "reg_lambda", "rm_sz", "run", "seed")     # of HPARAMS
CURVES = {"accuracy": {"all classes and classes met": ["Multiline", ["test_accuracy", "accuracy/classes_met"]],
                       "forgetting": ["Multiline", ["accuracy/forgetting"]]},
          "head": {"norms: this batch's classes, earlier ones": ["Multiline", ["head/norm_batch", "head/norm_earlier"]]},
          "seconds": {"a batch": ["Multiline", ["seconds/read", "seconds/encode", "seconds/train", "seconds/test"]]}}
DARK, GREY, LIGHT, HIGHLIGHT = (40, 40, 40), (110, 110, 110), (238, 238, 238), (230, 120, 20)
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

    confusion: int64 (true, predicted); images: uint8 (n, H, W, 3); memory_has_images: patterns are normalized images;
    names: of the classes, if they have any.
    """
    i, present = rows[-1]["batch"], rows[-1]["classes"]
    shares = (confusion / confusion.sum(1, keepdim=True)).numpy()
    counts = torch.bincount(memory.y, minlength=len(shares)).cpu().numpy()
    history = accuracy_history(rows, batches)
    charts = {"classes/accuracy": heat_map(history, "accuracy: class (down), batch (right)", names=names),
              "classes/confusion": heat_map(shares, "true class (down), predicted one (right)", names=names),
              "classes/head_norm": bar_chart(norm_per_class(head), present, "norm of each class's row of the head", names)}
    if len(memory):
        charts["memory/patterns_per_class"] = bar_chart(counts, present, "stored patterns of each class", names)
    for tag, chart in charts.items():
        file = io.BytesIO()
        chart.quantize(128).save(file, "PNG", compress_level=4)
        write_image(writer, i, tag, file.getvalue(), *chart.size)
    photos = {"images/batch": torch.as_tensor(images[_spread(len(images))]).permute(0, 3, 1, 2)}
    if memory_has_images and len(memory):
        x, mean, std = memory.x[_spread(len(memory))].cpu(), torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        photos["images/memory"] = ((x * std[:, None, None] + mean[:, None, None]) * 255).round().clamp(0, 255).byte()
    for tag, x in photos.items():
        skip = max(1, min(x.shape[-2:]) // PHOTO_SIZE)
        grid = make_grid(x[..., ::skip, ::skip], nrow=8)        # (3, H, W)
        write_image(writer, i, tag, encode_jpeg(grid, quality=85).numpy().tobytes(), grid.shape[2], grid.shape[1])


def write_image(writer, step, tag, encoded, width, height):
    """Writes an image that is PNG or JPEG already."""
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
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


def heat_map(values, title, side=SIDE, names=None):
    """Image of a matrix (y, x) of numbers in 0..1, dark blue to yellow; NaN is light grey. side: pixels, about; names: of
    the rows."""
    rows, columns = values.shape
    high, wide = max(1, side // rows), max(1, round(side / columns))
    cells = np.nan_to_num(values).clip(0, 1)[..., None] * (len(COLOURS) - 1)        # (y, x, 1)
    below = np.minimum(cells.astype(int)[..., 0], len(COLOURS) - 2)
    colours = COLOURS[below] + (cells - below[..., None]) * (COLOURS[below + 1] - COLOURS[below])
    colours[np.isnan(values)] = LIGHT
    picture = Image.fromarray(colours.astype(np.uint8)).resize((columns * wide, rows * high), Image.Resampling.NEAREST)
    return _framed(picture, f"{title}\ndark: 0, yellow: 1, grey: no value", (rows, columns), names)


def bar_chart(values, highlighted, title, names=None, side=SIDE):
    """Image of one bar per class, those of the classes `highlighted` in another colour; names: of the classes."""
    wide, high = max(2, round(side / len(values))), side // 2
    picture = Image.new("RGB", (wide * len(values), high), LIGHT)
    draw, top = ImageDraw.Draw(picture), max(values.max().item(), 1e-9)
    for k, value in enumerate(values.tolist()):
        if value > 0:
            colour = HIGHLIGHT if k in highlighted else tuple(COLOURS[1].astype(int))
            draw.rectangle((k * wide, high * (1 - value / top), (k + 1) * wide - 2, high), colour)
    which = ", ".join(names[k] for k in highlighted)[:40] if names and len(highlighted) < 4 else "in this batch"
    return _framed(picture, f"{title}\nhighest: {top:.3g}; orange: {which}", (None, len(values)))


def _framed(picture, title, counts, names=None, top=74, bottom=38):
    """The picture with two lines of title, and numbers along its rows and columns; counts: (rows or None, columns).

    names: of the rows, shown instead of their numbers where there is room for a line each.
    """
    names = names if names and picture.height / len(names) >= FONT and max(map(len, names)) <= 20 else None
    left = 60 if names is None else 14 + max(round(_font().getlength(name)) for name in names)
    framed = Image.new("RGB", (max(left + picture.width, 680) + 10, top + picture.height + bottom), "white")
    framed.paste(picture, (left, top))
    draw = ImageDraw.Draw(framed)
    draw.multiline_text((left, 2), title, DARK, _font())
    beside, below = (lambda at: ((left - 4, top + at), "rm")), (lambda at: ((left + at, framed.height - 4), "ms"))
    for count, size, place in zip(counts, picture.size[::-1], (beside, below), strict=True):
        count = count or 0
        for k in range(0, count, next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000, 10**9) if s * 20 > count)):
            at, anchor = place((k + .5) * size / count)
            draw.text(at, names[k] if names and place is beside else str(k), GREY, _font(), anchor=anchor)
    return framed


def _spread(n):
    """Indices of PHOTOS of n things, spread evenly."""
    return np.linspace(0, n - 1, min(n, PHOTOS)).astype(int)


@lru_cache
def _font():
    return ImageFont.load_default(FONT)
