"""Your own images as a stream: FolderStream reads ROOT/train/<batch>/<class>/* and ROOT/test/<class>/*."""
import io
import re
import unicodedata
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_loader import DataError, Stream, check_png, fingerprint, stretch_frames

KINDS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")  # what Pillow may decode, by content
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
LAYOUT = f"ROOT/train/<batch>/<class>/*.png and ROOT/test/<class>/*.png (or {', '.join(SUFFIXES[1:])})"
NOT_READ = "of a kind that is not read: convert it to PNG or JPEG"
SMALL = 25_000_000  # pixels that any file may claim: 100 MB in memory
MOST_PIXELS = 3000  # that a byte of a larger image can stand for: 512 in a JPEG, 2,730 in a GIF


class FolderStream(Stream):
    """Your own images, of any size: ROOT/train/<batch>/<class>/* and ROOT/test/<class>/*.

    Batches come in the natural order of their folders' names ('2' before '10'). Classes are numbered as they
    first appear in them, those of a batch in the natural order of their names, those in test alone at the end
    (`class_names`): so batches may be added behind. Images are stretched to image_size x image_size and read
    when their batch's turn comes. `listing[i]` holds the (class, file name,
    bytes) of batch i, `test_listing` those of the test set; `left_out` the (path, why) of what is not read,
    hidden files aside. cumulative: batch i holds the batches 0 .. i. DataError if a folder is missing or
    empty, if the names of two classes differ in case alone and, while iterating, if an image is damaged.
    """

    def __init__(self, root, image_size=128, start_batch=0, cumulative=False):
        root = Path(root)
        self.image_size = image_size
        self.left_out = []

        if not root.is_dir():
            raise DataError(f"there is no folder {root}: lay the images out as {LAYOUT}")
        if not (root / "train").is_dir() or not (root / "test").is_dir():
            part = root.name.lower() in ("train", "test")
            advice = f"if {root} is one of them, give {root.parent}" if part else None
            raise misplaced(root, "the folders train and test, in small letters,", advice)

        folders, files = entries(root / "train")
        self.left_out += [(file, "in no batch folder") for file in files]
        if not folders:
            raise misplaced(root / "train", "batch folders")
        self._train = [find_images(folder, self.left_out) for folder in folders]
        self._test = find_images(root / "test", self.left_out)

        self._met = []  # of each batch, how many classes have appeared by its end
        self.class_names = []
        for images in self._train:
            self._add_classes(images)
            self._met.append(len(self.class_names))
        self._add_classes(self._test)
        self.num_classes = len(self.class_names)

        test = {name for name, _ in self._test}
        self.only_train = sorted(set(self.class_names) - test)
        self.only_test = sorted(self.class_names[self._met[-1]:])
        check_names(sorted(self.class_names), root)

        self._batch_names = [folder.name for folder in folders]
        self.listing = [_sizes(images) for images in self._train]
        self.test_listing = _sizes(self._test)
        super().__init__(len(folders), start_batch, cumulative)

    first_classes = property(lambda self: self._met[self.start_batch])

    def _add_classes(self, images):
        new = {name for name, _ in images}.difference(self.class_names)
        self.class_names += sorted(new, key=lambda name: natural(Path(name)))

    def _read(self, images):
        x = np.stack([read_image(path, self.image_size) for _, path in images])
        y = np.array([self.class_names.index(name) for name, _ in images], np.int64)
        return x, y

    def _read_batches(self, numbers):
        return self._read([image for i in numbers for image in self._train[i]])

    def _read_test(self, stride):
        return self._read(self._test[::stride])

    def identity(self):
        """As Stream.identity; the images are known by the names and sizes of their files."""
        content = fingerprint(repr((self.listing, self.test_listing)))
        batches = [[name, fingerprint(repr(batch))] for name, batch in zip(self._batch_names, self.listing)]
        return {"data": content, "order": content, "classes": self.class_names, "content": batches,
                "batches": [len(batch) for batch in self.listing], "test": len(self.test_listing)}

    def notes(self):
        """Sentences on classes that are in train or in test alone, and on what is not read."""
        notes = []
        for part, other, names in (("train", "test", self.only_train), ("test", "train", self.only_test)):
            if names:
                what = "class" if len(names) == 1 else "classes"
                notes.append(f"only in {part}, not in {other}: the {what} {_some(names)}")
        for reason in dict.fromkeys(why for _, why in self.left_out):
            paths = [str(path) for path, why in self.left_out if why == reason]
            notes.append(f"not read, {reason}: {_some(paths)}")
        return notes

    def unreadable(self):
        """Decodes all images; yields the message of the DataError of each damaged one."""
        for images in [*self._train, self._test]:
            for _, path in images:
                try:
                    read_image(path, self.image_size)
                except DataError as error:
                    yield str(error)


# ---- the files of a folder ----

def natural(path):
    """Sort key of a file or folder: numbers in its name count as numbers, so '2' comes before '10'."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts], path.name


def entries(folder):
    """(folders, files) in a folder but for hidden ones, in natural order. DataError if it cannot be read."""
    try:
        found = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=natural)
    except OSError as error:
        how = "make it readable" if isinstance(error, PermissionError) else f"lay the images out as {LAYOUT}"
        raise DataError(f"{folder} cannot be read ({error.strerror}): {how}") from error
    return [p for p in found if p.is_dir()], [p for p in found if not p.is_dir()]


def misplaced(folder, expected, advice=None):
    """The DataError for a folder that holds other things than expected, with what it holds."""
    folders, files = entries(folder)
    holds = _some([f"{inner.name}/" for inner in folders] + [file.name for file in files]) or "nothing"
    advice = advice or f"lay the images out as {LAYOUT}"
    return DataError(f"{folder} holds {holds} where {expected} are expected: {advice}")


def find_images(folder, left_out):
    """[(class name, path), ...] of all the images FOLDER/<class>/*; DataError where there are none.

    left_out: a list that gets (path, why) of everything that lies in the folder and is no such image.
    """
    classes, files = entries(folder)
    left_out += [(file, "in no class folder") for file in files]
    if not classes:
        raise misplaced(folder, "class folders")

    found = []
    for class_folder in classes:
        # an umlaut in one character and one in two (as macOS writes it) are the same
        name = unicodedata.normalize("NFC", class_folder.name)
        folders, files = entries(class_folder)
        images = [file for file in files if file.suffix.lower() in SUFFIXES]
        left_out += [(inner, "a folder inside a class folder") for inner in folders]
        left_out += [(file, NOT_READ) for file in files if file not in images]
        if not images:
            advice = "convert them to PNG or JPEG" if files else None
            raise misplaced(class_folder, f"images ({', '.join(SUFFIXES)})", advice)
        found += [(name, path) for path in images]
    return found


def check_names(names, root):
    """DataError if a class has a name that cannot be printed, or two have names that differ in case alone."""
    seen = {}
    for name in names:
        if not name.isprintable():  # such as bytes that are not UTF-8
            raise DataError(f"{root} has a class {name!r}, whose name cannot be printed: rename its folders")
        twin = seen.setdefault(name.casefold(), name)
        if twin != name:
            raise DataError(f"{root} has the classes {twin!r} and {name!r}, which differ in case alone: give "
                            "both one name")


def _sizes(images):
    try:
        return [(name, path.name, path.stat().st_size) for name, path in images]
    except OSError:  # a link that leads nowhere: reading names it
        return [(name, path.name, -1) for name, path in images]


def _some(names):
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


# ---- an image ----

def read_image(path, size):
    """An image file of any size and kind as RGB without transparency, uint8 (size, size, 3). DataError."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): make it readable or remove it") from error
    try:
        image = decode(raw)
    except Exception as error:  # Pillow raises nearly anything for damaged bytes
        raise DataError(f"{path} cannot be read as an image ({error}): replace or remove it") from error

    return stretched(image, size)


def stretched(image, size):
    """A Pillow image in RGB as a square of so many pixels: uint8 (size, size, 3)."""
    return stretch_frames(np.array(image)[None], size)[0]


def decode(raw):
    """The image in the bytes of a file as a Pillow image: RGB, upright, without transparency.

    Raises an exception, of nearly any type, if they are damaged or hold an animation. PNG: every damage is
    found by its check sums. The others have none: a missing end, an absurd size and impossible codes are
    found. A damage that gives possible codes or colours is not: tests/test_damage.py counts how many.
    """
    if raw.startswith(b"\x89PNG"):
        check_png(raw)  # Pillow passes over the check sums of the pixels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a photo of 100 megapixels, or of damaged EXIF data
        try:
            image = Image.open(io.BytesIO(raw), formats=KINDS)
        except UnidentifiedImageError:
            raise ValueError("no PNG, JPEG, WebP, GIF or BMP" if raw else "the file is empty") from None

        if image.width * image.height > max(SMALL, MOST_PIXELS * len(raw)):
            raise ValueError(f"{len(raw)} bytes that claim {image.width}x{image.height} pixels")
        # MPO: a JPEG of a phone, with a second picture for depth or brightness behind it
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise ValueError("an animation")

        image.load()
        with suppress(Exception):  # what EXIF says is lost if it is damaged; the pixels are whole
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # a grey PNG of 16 bits, which convert would clip
            image = Image.fromarray((np.array(image) // 257).astype(np.uint8))
        return image if image.mode == "RGB" else image.convert("RGB")
