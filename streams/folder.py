"""Your own images as a stream: FolderStream reads ROOT/train/<batch>/<class>/* and ROOT/test/<class>/*.

Uses data_loader, numpy, streams, torch, torchvision.
"""
import re
from pathlib import Path

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import resize

from data_loader import DataError
from streams import Stream

SUFFIXES = (".png", ".jpg", ".jpeg")
LAYOUT = "ROOT/train/<batch>/<class>/*.png and ROOT/test/<class>/*.png (or .jpg, .jpeg)"


def natural(path):
    """Sort key of a file or folder: numbers in its name count as numbers, so '2' comes before '10'."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)], path.name


def entries(folder, folders):
    """The visible folders, or the visible images, in a folder, in natural order."""
    found = [p for p in folder.iterdir() if not p.name.startswith(".") and p.is_dir() == folders]
    return sorted((p for p in found if folders or p.suffix.lower() in SUFFIXES), key=natural)


def find_images(folder):
    """[(class name, path), ...] of all the images FOLDER/<class>/*; DataError where there are none."""
    found = []
    classes = entries(folder, folders=True) if folder.is_dir() else []
    if not classes:
        raise DataError(f"{folder} holds no class folders: lay the images out as {LAYOUT}")
    for class_folder in classes:
        images = entries(class_folder, folders=False)
        if not images:
            raise DataError(f"{class_folder} holds no .png, .jpg or .jpeg image: lay the images out as {LAYOUT}")
        found += [(class_folder.name, path) for path in images]
    return found


def read_image(path, size):
    """An image file of any size and kind as RGB, uint8 (size, size, 3), without transparency. DataError if damaged."""
    try:
        data = torch.from_numpy(np.fromfile(path, np.uint8))
        image = decode_image(data, ImageReadMode.RGB, apply_exif_orientation=True)  # (3, H, W)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path} cannot be read as an image: replace or remove it") from error
    if image.dtype == torch.uint16:  # a 16-bit PNG
        image = (image.int() // 257).to(torch.uint8)
    if image.shape[1:] != (size, size):
        image = resize(image, [size, size], antialias=True)
    return image.permute(1, 2, 0).numpy()


class FolderStream(Stream):
    """Your own images: ROOT/train/<batch>/<class>/* and ROOT/test/<class>/*, .png, .jpg or .jpeg, of any size.

    Batches come in the natural order of their folders' names ('2' before '10'); a label is the place of the class among
    all the names in train and test, in the same order (`class_names`). Images are stretched to image_size x image_size
    and read when their batch's turn comes. Hidden files and those of other kinds are left out. DataError if a folder is
    missing or empty, if there is no batch `start_batch` and, while iterating, if an image is damaged.
    """

    def __init__(self, root, image_size=128, start_batch=0):
        root, self.image_size = Path(root), image_size
        folders = entries(root / "train", folders=True) if (root / "train").is_dir() else []
        if not folders:
            raise DataError(f"{root / 'train'} holds no batch folders: lay the images out as {LAYOUT}")
        self._train, self._test = [find_images(folder) for folder in folders], find_images(root / "test")
        names = {name for images in [*self._train, self._test] for name, _ in images}
        self.class_names = sorted(names, key=lambda name: natural(Path(name)))
        self.num_classes = len(names)
        super().__init__(len(folders), start_batch)

    def _read(self, images):
        x = np.stack([read_image(path, self.image_size) for _, path in images])
        return x, np.array([self.class_names.index(name) for name, _ in images], np.int64)

    def read_batch(self, i):
        return self._read(self._train[i])

    def _read_test(self, stride):
        return self._read(self._test[::stride])
