"""Classification data sets of torchvision as streams: TorchvisionStream("CIFAR100", DIR, download=True)."""
import difflib
import inspect
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from data_loader import SAMPLES, DataError, FetchError, MissingData, Stream, fingerprint
from streams.folder import stretched

OTHERS = ("core50", "folder", "demo")       # what a data set can be besides torchvision's
# The parts that a class's argument `split` may name: the first that it knows is taken.
TRAIN_PARTS = ("trainval", "train", "train-standard")
TEST_PARTS = ("test", "val")
ANOTHER = "choose another data set of torchvision, such as cifar100"
OUR_TEST = 0.2      # share of each class's images that is tested on where a data set has no parts


class TorchvisionStream(Stream):
    """A classification data set of torchvision, by its class's name in any case, in ten fixed orders.

    root is the folder that torchvision reads, or with download=True fetches the data into. Labels are its
    own, and `class_names` where it has any. Images become RGB and are stretched to image_size x image_size,
    when their batch's turn comes.

    units=0: each class is learned in one of `batches` batches, of as equally many classes as possible. In
    order (run) 0 classes come as they are numbered, in the orders 1-9 they are mixed.
    units=n: each class's training images are dealt to n units. Batch 0 holds one unit of each class of the
    first tenth in that order of classes (rounded up, at least 2); each later batch is one of the other units,
    which are mixed in all orders, 0 included. With CIFAR-100 and 4 units that makes 1 + 390 batches.

    held_out, above 0: this share of each class's training images is tested on instead of the test images, and
    not learned. A data set without a test part is tested on a fifth of each class. `batches[i]` holds the
    places of batch i's images in the training part, `test` those that are tested on. cumulative: batch i
    holds the batches 0 .. i. MissingData if root does not hold the data, FetchError if fetching fails,
    DataError for an unknown data set, one that is no classification of images, or too few images or classes.
    """

    def __init__(self, name, root, image_size=128, batches=10, units=0, run=0, held_out=0.0, download=False,
                 start_batch=0, cumulative=False):
        kind = find_kind(name, root)
        self.name = name.lower()
        self.image_size = image_size
        self.root = Path(root)
        # [(data set, its labels)] of the training part and, where there is one, the test part
        self._parts = [(part, read_labels(part)) for part in open_parts(kind, root, download)]
        train, labels = self._parts[0]
        classes = np.unique(labels)

        drawn = [mixed(np.flatnonzero(labels == c), seed=int(c)) for c in classes]
        self._tested = self._parts[-1]
        self.test = np.arange(len(self._tested[1]))
        if held_out or len(self._parts) == 1:
            self._tested = self._parts[0]
            counts = [max(1, round((held_out or OUR_TEST) * len(places))) for places in drawn]
            self.test = np.sort(np.concatenate([places[:n] for places, n in zip(drawn, counts)]))
            drawn = [places[n:] for places, n in zip(drawn, counts)]

        fewest = min(map(len, drawn))
        if fewest < max(1, units):
            raise DataError(f"{self.name} has a class with {fewest} training images left, which cannot be "
                            f"dealt to {max(1, units)} units: set units or held_out lower")
        if not units and batches > len(classes):
            raise DataError(f"{self.name} has {len(classes)} classes, which cannot be dealt to {batches} "
                            f"batches: set batches to {len(classes)} or less")

        order = list(range(len(classes)))
        if run:
            order = mixed(order, run)
        if units:
            self.batches = one_unit_each(drawn, units, order, run)
        else:
            self.batches = whole_classes(drawn, batches, order)

        labelled = 1 + int(max(labels.max() for _, labels in self._parts))
        self.class_names = names_of(train, labelled)
        self.num_classes = len(self.class_names or range(labelled))
        super().__init__(len(self.batches), start_batch, cumulative)

    def _read(self, part, places):
        images, labels = part
        x = np.empty((len(places), self.image_size, self.image_size, 3), np.uint8)
        for k, place in enumerate(places):
            x[k] = stretched(as_rgb(images, int(place)), self.image_size)
        return x, labels[places]

    def _read_batches(self, numbers):
        return self._read(self._parts[0], np.concatenate([self.batches[i] for i in numbers]))

    def _read_test(self, stride):
        return self._read(self._tested, self.test[::stride])

    def identity(self):
        """As Stream.identity; the images are known by some of them, of the training and the test part."""
        seen = [self.name]
        for part, labels in self._parts:
            seen.append(np.bincount(labels).tobytes())
            for place in sample(part):
                image = as_rgb(part, place)
                seen += [repr(image.size), image.tobytes()]

        learned = [self._parts[0][1][batch] for batch in self.batches]
        order = [array.tobytes() for array in (*self.batches, *learned, self.test)]
        return {"data": fingerprint(*seen), "order": fingerprint(*order), "classes": self.class_names,
                "batches": [len(batch) for batch in self.batches], "test": len(self.test)}

    def notes(self):
        """Sentences on what is tested, if that is no test part, and on where the images come from."""
        notes = []
        if self._tested is self._parts[0]:
            notes.append(f"tested on {len(self.test):,} of {self.name}'s training images, not learned")
        if isinstance(self._parts[0][0], PackedCIFAR100):
            notes.append(f"{self.root} holds CIFAR-100 as benchmarks/pack_cifar.py packs it: its images, in "
                         "the order of their names")
        return notes

    def unreadable(self):
        """Decodes all images; yields the message of the DataError of each damaged one."""
        for part, _ in self._parts:
            for place in range(len(part)):
                try:
                    as_rgb(part, place)
                except DataError as error:
                    yield str(error)


# ---- batches ----

def mixed(items, seed):
    """A list of the items in an order that a seed fixes, in every version of Python and on every machine."""
    # of the module's functions random() alone is promised to stay as it is
    draw = random.Random(seed).random
    return [it for _, _, it in sorted((draw(), place, it) for place, it in enumerate(items))]


def whole_classes(drawn, batches, order):
    """[places of a batch's images, ...]: each holds some classes, as equally many as can be.

    drawn: of each class the places of its images; order: the numbers of the classes.
    """
    cuts = [k * len(order) // batches for k in range(batches + 1)]
    groups = [order[start:end] for start, end in pairwise(cuts)]
    return [np.sort(np.concatenate([drawn[c] for c in group])) for group in groups]


def one_unit_each(drawn, units, order, run):
    """[places of a batch's images, ...]: in batch 0 a unit of each of some classes, then one unit each."""
    cut = [[np.sort(unit) for unit in np.array_split(places, units)] for places in drawn]
    first = order[:max(2, -(-len(order) // 10))]
    rest = [(c, u) for c in range(len(cut)) for u in range(units) if c not in first or u > 0]
    return [np.concatenate([cut[c][0] for c in first]), *(cut[c][u] for c, u in mixed(rest, run))]


# ---- data sets ----

class PackedCIFAR100(datasets.CIFAR100):
    """CIFAR-100 as benchmarks/pack_cifar.py packs it, whose files have check sums of their own."""
    train_list = [["train", "89ba04b710e03737ab550f2c761c9181"]]
    test_list = [["test", "dceaea392ea031e23a847e5f070a3fca"]]
    meta = datasets.CIFAR100.meta | {"md5": "24d1c154ae748f2720a56f6c68a4b20a"}

    @classmethod
    def lies_in(cls, root):
        """Whether a folder holds CIFAR-100 in this form, by the smallest of its files."""
        return check_integrity(Path(root, cls.base_folder, cls.meta["filename"]), cls.meta["md5"])


def find_kind(name, root):
    """torchvision's class of that name, in any case. DataError if there is none, or it holds other things."""
    kinds = {}
    for word in datasets.__all__:
        kind = getattr(datasets, word)
        if inspect.isclass(kind) and issubclass(kind, datasets.VisionDataset):
            kinds[word.lower()] = kind
    kind = kinds.get(name.lower())
    if kind is None:
        near = difflib.get_close_matches(name.lower(), [*OTHERS, *kinds], n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"unknown data set {name!r}: it can be {', '.join(OTHERS)} or a classification data "
                        f"set of torchvision, such as cifar100{meant}")

    known = parameters(kind)
    # where a transform is of image and target together, the target is an image or boxes
    joint = "transforms" in known and "target_types" not in known
    if joint or "target_transform" not in known:
        raise no_classification(kind)
    needed = [word for word, its in known.items() if its.default is its.empty and word != "root"]
    if needed:
        raise DataError(f"{kind.__name__} cannot be opened by a folder alone, it needs {', '.join(needed)}: "
                        f"{ANOTHER}")

    if kind is datasets.CIFAR100 and PackedCIFAR100.lies_in(root):
        return PackedCIFAR100
    return kind


def no_classification(kind):
    """The DataError for a data set whose targets are no classes."""
    return DataError(f"{kind.__name__} is no classification of images into numbered classes: {ANOTHER}")


def parameters(kind):
    """{name: inspect.Parameter} of a class's constructor, with those that its **kwargs hands on."""
    own = dict(inspect.signature(kind).parameters)
    passed_on = [word for word, parameter in own.items() if parameter.kind is parameter.VAR_KEYWORD]
    for word in passed_on:
        del own[word]
        own = parameters(kind.__base__) | own
    return own


def open_parts(kind, root, download):
    """[training part, test part if there is one] of a class. DataError, MissingData, FetchError."""
    known = parameters(kind)
    arguments = {"root": str(root), "download": download}
    arguments = {word: value for word, value in arguments.items() if word in known}
    try:
        if "train" in known:
            return [kind(**arguments, train=True), kind(**arguments, train=False)]
        if "split" in known:
            return [open_part(kind, arguments, names) for names in (TRAIN_PARTS, TEST_PARTS)]
        return [kind(**arguments)]

    except (DataError, MemoryError):
        raise
    except ImportError as error:
        raise DataError(f"torchvision's {kind.__name__} needs the package {error.name}: install it by `pip "
                        f"install {error.name}`") from error
    except Exception as error:      # torchvision raises nearly anything for data that are missing or damaged
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        lacks = f"{root} does not hold {kind.__name__}, or not the whole of it ({reason})"
        if "download" not in known:
            raise DataError(f"{lacks}, and torchvision cannot fetch it: lay it out as torchvision's "
                            "documentation says, and name its folder with --data DIR") from error
        if not download:
            raise MissingData(f"{lacks}: name another folder with --data DIR") from error
        raise FetchError(f"{kind.__name__} cannot be fetched into {root} ({reason}): run the same command "
                         "again, or name a folder that holds it with --data DIR") from error


def open_part(kind, arguments, parts):
    """The first part of a data set among some names for it. DataError if it has none of them."""
    for part in parts:
        try:
            return kind(**arguments, split=part)
        except ValueError as error:
            if "argument split" not in str(error):      # torchvision's words for a part that is not there
                raise
    raise DataError(f"{kind.__name__} has no part {' or '.join(parts)}: {ANOTHER}")


def sample(part):
    """The places of some images, from the first to the last one."""
    return np.linspace(0, len(part) - 1, SAMPLES).astype(int).tolist()


def item(part, place):
    """(Pillow image, label) of a place in a part of a data set. DataError."""
    try:
        found = part[place]
    except Exception as error:      # torchvision and Pillow raise nearly anything for damaged files
        raise DataError(f"image {place} of {type(part).__name__} cannot be read ({error}): delete the data "
                        "and fetch them anew") from error
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], Image.Image):
        raise no_classification(type(part))
    return found


def as_rgb(part, place):
    """The Pillow image of a place in a part of a data set, in RGB. DataError."""
    return item(part, place)[0].convert("RGB")


def read_labels(part):
    """int64 (n,): the labels of a part, in its order. DataError if they are no numbers from 0 on."""
    places = sample(part)
    some = [item(part, place)[1] for place in places]
    for label in some:
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or label < 0:
            raise no_classification(type(part))

    # most classes hold all labels in a list, whatever its name: reading all images would take minutes
    for values in vars(part).values():
        labels = as_labels(values, len(part))
        if labels is not None and labels[places].tolist() == some:
            return labels
    return np.array([item(part, place)[1] for place in range(len(part))], np.int64)


def as_labels(values, n):
    """int64 (n,) of n integers, or of n tuples that end in one; None of anything else."""
    if isinstance(values, (list, tuple)) and values and isinstance(values[0], tuple):
        values = [value[-1] for value in values]
    try:
        labels = np.asarray(values)
    except ValueError:      # of lists of different lengths
        return None
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        return None
    return labels.astype(np.int64)


def names_of(part, num_classes):
    """The names of the classes, where a part has one for each label; else None."""
    names = getattr(part, "classes", None) or getattr(part, "categories", None) or []
    names = [name if isinstance(name, str) else ", ".join(name) for name in names]      # ImageNet's: tuples
    return names if len(names) >= num_classes else None
