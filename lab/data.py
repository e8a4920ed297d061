"""The data of a run: opening what a configuration names, and recognizing it again when the run continues.

Uses data_loader, lab.config, lab.record, numpy, streams.demo, streams.download, streams.folder, torch.
"""
import hashlib
from pathlib import Path

import numpy as np
import torch

from data_loader import CORE50, MissingData
from lab.config import ConfigError
from lab.record import leaving_at_once
from streams.demo import DemoStream
from streams.download import fetch_missing
from streams.folder import FolderStream

SAMPLES = 16                # frames of CORe50 whose pixels are looked at
STANDIN = "core50_standin"  # the folder of the sections standin_*


def open_stream(config, done=0):
    """The data set that a configuration names, less the `done` batches learned already: an iterable of (images, labels)."""
    start = config.start_batch + done
    if config.dataset == "demo":
        return DemoStream(config.seed, config.run, start_batch=start, cumulative=config.cumulative)
    if config.dataset == "folder":
        return FolderStream(config.data, config.image_size, start, config.cumulative)
    if config.download:
        with leaving_at_once():     # a download goes on from there the next time
            fetch_missing(config.data)
    try:
        return CORE50(config.data, config.preload, config.scenario, config.cumulative, config.run, start)
    except MissingData:
        _say_where_else(config.data)
        raise


def _say_where_else(folder):
    """Raises ConfigError where CORe50's data are missing from a folder, but are not what the user needs."""
    if (Path(folder) / "train").is_dir():
        raise ConfigError(f"{folder} holds own images (there is a folder train in it): learn them with --name folder")
    if Path(folder).name == STANDIN:
        raise ConfigError(f"there are no stand-in data in {folder}: draw them as benchmarks/standin/README.md says, or name "
                          "their folder with --data DIR")


def identify(stream):
    """What a stream is made of, told by its content, so that a copy in another place is the same: a dict of

    "data": 16 hex digits that stand for the images, whatever the order of the batches; "order": the same for batches and
    labels; "classes": their names, or None where they have none; "batches", "test": images in each batch, and to test on
    (of the demo: videos). Cheap: own images by names and sizes of the files, CORe50 by its index and the pixels of a few
    frames.
    """
    if isinstance(stream, FolderStream):
        batches, test = stream.listing, stream.test_listing
        data = order = _digest(repr((batches, test)))
        batches, test = [len(batch) for batch in batches], len(test)
    elif isinstance(stream, DemoStream):
        data, order = "demo", _digest(repr((stream.units, stream.test_units)))
        batches, test = [len(units) for units in stream.units], len(stream.test_units)
    else:
        everything = [*stream.batches, stream.test]
        frames = [np.sort(indices)[np.linspace(0, len(indices) - 1, SAMPLES).astype(int)]
                  for indices in (everything[0][0], stream.test[0])]
        data = _digest(*(stream.read_frames(indices).tobytes() for indices in frames))
        order = _digest(*(part.tobytes() for batch in everything for part in batch))
        batches, test = [len(y) for _, y in stream.batches], len(stream.test[1])
    return {"data": data, "order": order, "classes": getattr(stream, "class_names", None), "batches": batches, "test": test}


def notes(stream, config):
    """What the user of a stream should know before it is learned with a configuration: a list of sentences."""
    said = stream.notes() if isinstance(stream, FolderStream) else []
    if config.weights == "none" and config.freeze_below_layer not in ("images", -1):
        said.append(f"the layers up to {config.freeze_below_layer} are frozen at random values, since weights is none: give "
                    "weights, or set freeze_below_layer to images, so that batch 0 trains them")
    return said


def as_labels(labels, n, head):
    """The labels of n images as int64 on the device of a head, nn.Linear; ValueError unless they are n of its classes."""
    y, classes = torch.as_tensor(labels), head.out_features
    if y.shape != (n,) or y.is_floating_point() or y.dtype == torch.bool or not bool(((y >= 0) & (y < classes)).all()):
        raise ValueError(f"{n} images need as many whole numbers from 0 to {classes - 1} as labels; these are "
                         f"{str(y.dtype).removeprefix('torch.')} {tuple(y.shape)}"
                         + (f" from {y.min():g} to {y.max():g}" if y.numel() else ""))
    return y.to(head.weight.device, torch.int64)


def _digest(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part)
    return digest.hexdigest()[:16]
