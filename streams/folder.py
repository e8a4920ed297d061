"""Your own images as a stream: FolderStream reads ROOT/train/<batch>/<class>/* and ROOT/test/<class>/*."""
import os
import re
import struct
import tempfile
import threading
import unicodedata
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import resize

from data_loader import DataError, Stream, check_png, fingerprint

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
LAYOUT = "ROOT/train/<batch>/<class>/*.png and ROOT/test/<class>/*.png (or .jpg, .jpeg, .webp, .gif)"
NOT_READ = "of a kind that is not read: convert it to PNG or JPEG"
JPEG_DAMAGE = ("Corrupt JPEG", "Premature end", "Invalid SOS", "Inconsistent progression",
               "Unsupported marker", "unknown JFIF", "Unknown Adobe")  # as libjpeg prints it
MOST_PIXELS = 3000  # that one byte can stand for: 512 in a JPEG of Huffman codes, 2,730 in a GIF


class FolderStream(Stream):
    """Your own images, of any size: ROOT/train/<batch>/<class>/* and ROOT/test/<class>/*.

    Batches come in the natural order of their folders' names ('2' before '10'); a label is the place of the
    class among all the names in train and test, in the same order (`class_names`). Images are stretched to
    image_size x image_size and read when their batch's turn comes. `listing[i]` holds the (class, file name,
    bytes) of batch i, `test_listing` those of the test set; `left_out` the (path, why) of what is not read,
    hidden files aside. cumulative: batch i holds the batches 0 .. i. DataError if a folder is missing or
    empty, if the names of two classes differ in case alone and, while iterating, if an image is damaged.
    """

    def __init__(self, root, image_size=128, start_batch=0, cumulative=False):
        root = Path(root)
        self.image_size = image_size
        self.left_out = []

        folders, files = entries(root / "train") if (root / "train").is_dir() else ([], [])
        self.left_out += [(file, "in no batch folder") for file in files]
        if not folders:
            missing = f"there is no folder {root}"
            wrong = f"{root / 'train'} holds no batch folders" if root.is_dir() else missing
            raise DataError(f"{wrong}: lay the images out as {LAYOUT}")
        self._train = [find_images(folder, self.left_out) for folder in folders]
        self._test = find_images(root / "test", self.left_out)

        train = {name for images in self._train for name, _ in images}
        test = {name for name, _ in self._test}
        self.class_names = sorted(train | test, key=lambda name: natural(Path(name)))
        self.num_classes = len(self.class_names)
        self.only_train = sorted(train - test)
        self.only_test = sorted(test - train)
        check_names(self.class_names, root)

        self.listing = [_sizes(images) for images in self._train]
        self.test_listing = _sizes(self._test)
        super().__init__(len(folders), start_batch, cumulative)

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
        return {"data": content, "order": content, "classes": self.class_names,
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


def find_images(folder, left_out):
    """[(class name, path), ...] of all the images FOLDER/<class>/*; DataError where there are none.

    left_out: a list that gets (path, why) of everything that lies in the folder and is no such image.
    """
    classes, files = entries(folder) if folder.is_dir() else ([], [])
    left_out += [(file, "in no class folder") for file in files]
    if not classes:
        raise DataError(f"{folder} holds no class folders: lay the images out as {LAYOUT}")

    found = []
    for class_folder in classes:
        # an umlaut in one character and one in two (as macOS writes it) are the same
        name = unicodedata.normalize("NFC", class_folder.name)
        folders, files = entries(class_folder)
        images = [file for file in files if file.suffix.lower() in SUFFIXES]
        left_out += [(inner, "a folder inside a class folder") for inner in folders]
        left_out += [(file, NOT_READ) for file in files if file not in images]
        if not images:
            kinds = ", ".join(SUFFIXES)
            raise DataError(f"{class_folder} holds no {kinds} image: lay the images out as {LAYOUT}")
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
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): make it readable or remove it") from error
    try:
        image = decode(data)
    except (RuntimeError, ValueError) as error:
        reason = f" ({error})" if isinstance(error, ValueError) else ""  # torchvision's own words help nobody
        raise DataError(f"{path} cannot be read as an image{reason}: replace or remove it") from error

    if image.dtype == torch.uint16:  # a 16-bit PNG
        image = (image.int() // 257).to(torch.uint8)
    if image.shape[1:] != (size, size):
        image = resize(image, [size, size], antialias=True)
    return image.permute(1, 2, 0).numpy()


def decode(data):
    """The image in the bytes of a file, uint8 array (n,): uint8 or uint16 tensor (3, H, W), not transparent.

    Raises ValueError or RuntimeError if they are damaged. PNG: every damage is found by its check sums. The
    others have none: a missing end, a wrong length, an absurd size and impossible codes are found, and in a
    JPEG all that libjpeg notices. A damage that gives possible codes or colours is not: tests/test_damage.py
    counts how many.
    """
    raw = bytes(data)
    check_structure(raw)
    encoded = torch.from_numpy(data)
    with libjpeg_warnings() if raw[:2] == b"\xff\xd8" else nullcontext([]) as warnings:
        image = decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
    if warnings:
        raise ValueError(warnings[0])
    return image[0] if image.dim() == 4 else image  # a GIF of one frame


def check_structure(raw):
    """ValueError if the bytes of an image file show, before decoding, that it is damaged or an animation."""
    width = height = 0
    if not raw:
        raise ValueError("the file is empty")
    if raw[:8] == b"\x89PNG\r\n\x1a\n":
        check_png(raw)
    elif raw[:4] == b"RIFF":
        if int.from_bytes(raw[4:8], "little") + 8 != len(raw):
            raise ValueError("a WebP of another length than it says")
        if raw[12:16] == b"VP8X" and raw[20] & 2:
            raise ValueError("an animation")
    elif raw[:4] == b"GIF8":
        width, height = check_gif(raw)
    elif raw[:2] == b"\xff\xd8":
        width, height = jpeg_size(raw)
    else:
        raise ValueError("no PNG, JPEG, WebP or GIF")
    if width * height > MOST_PIXELS * len(raw):  # a decoder would first take gigabytes
        raise ValueError(f"{len(raw)} bytes that claim {width}x{height} pixels")


def check_gif(raw):
    """(width, height) that the bytes of a GIF state. ValueError if its blocks do not lead to the end, and for
    an animation, which a decoder would unroll in memory.
    """
    def palette(flags):
        """Bytes of the palette that follows, by the flags before it."""
        return 3 * 2 ** (1 + (flags & 7)) if flags & 128 else 0

    try:
        width, height, flags = struct.unpack_from("<HHB", raw, 6)
        at = 13 + palette(flags)
        frames = 0
        while raw[at] != 0x3b:  # the end mark
            if raw[at] == 0x2c:  # a frame
                frames += 1
                at += 11 + palette(raw[at + 9])
            elif raw[at] == 0x21:  # an extension
                at += 2
            else:
                raise ValueError("a GIF with a damaged block")
            while raw[at]:  # parts of up to 255 bytes; one of length 0 is the last
                at += 1 + raw[at]
            at += 1
    except (IndexError, struct.error):
        raise ValueError("truncated") from None
    if frames > 1:
        raise ValueError(f"an animation of {frames} frames")
    return width, height


def jpeg_size(raw):
    """(width, height) that the bytes of a JPEG state; (0, 0) where they do not say it in the usual place."""
    at = 2
    while at + 9 < len(raw) and raw[at] == 0xff:
        marker = raw[at + 1]
        if 0xc0 <= marker <= 0xcf and marker not in (0xc4, 0xc8, 0xcc):  # the start of a frame
            return int.from_bytes(raw[at + 7:at + 9], "big"), int.from_bytes(raw[at + 5:at + 7], "big")
        # a fill byte, or a segment with its length
        at += 1 if marker == 0xff else 2 + int.from_bytes(raw[at + 2:at + 4], "big")
    return 0, 0


_one_at_a_time = threading.Lock()


@contextmanager
def libjpeg_warnings():
    """Yields a list that holds, afterwards, what libjpeg printed inside of damage in a JPEG.

    It decodes damaged data without an error, and says so on standard error alone, which is diverted for as
    long as that takes. Lines of others are passed on.
    """
    warnings = []
    with _one_at_a_time, tempfile.TemporaryFile() as file:
        try:
            before = os.dup(2)
        except OSError:  # closed
            before = None
        os.dup2(file.fileno(), 2)
        try:
            yield warnings
        finally:
            if before is None:
                os.close(2)
            else:
                os.dup2(before, 2)
            file.seek(0)
            for line in file.read().splitlines(keepends=True):
                text = line.decode("latin-1")
                if any(sign in text for sign in JPEG_DAMAGE):
                    warnings.append(text.strip())
                elif before is not None:
                    os.write(2, line)
            if before is not None:
                os.close(before)
