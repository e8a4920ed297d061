"""Lays out a collection of photographs as own images, in batches of a few classes.

    git clone https://github.com/marcusklasson/GroceryStoreDataset
    python benchmarks/lay_out.py GroceryStoreDataset grocery

    git clone https://github.com/alexeygrigorev/clothing-dataset-small
    python benchmarks/lay_out.py clothing-dataset-small clothing --classes 1

Grocery Store (Klasson, Zhang, Kjellstroem, WACV 2019; MIT licence): 81 products in shops. Any other source
holds train/<class>/<image> and test/<class>/<image>, as many collections do. Batches hold the training
photographs, classes in the order of the source or with --order N in a random one; the test is its own.
Settings are searched with another --test, so that nothing is chosen on the test photographs.
"""
import argparse
import random
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_loader import DataError
from harness.console import errors_as_sentences
from streams.folder import entries, find_images


def grocery(source, split):
    """[(class, path), ...] of one split of Grocery Store, in the order of the products' numbers."""
    rows = (source / "classes.csv").read_text(encoding="utf-8").splitlines()[1:]
    names = [row.split(",")[0] for row in rows]
    lines = (source / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    photos = [line.split(", ") for line in lines]
    photos.sort(key=lambda photo: int(photo[1]))
    return [(names[int(number)], source / path) for path, number, _ in photos]


def photographs(source, split):
    """[(class, path), ...] of one split of a source. DataError where it has none."""
    source = Path(source)
    if (source / "dataset" / "classes.csv").is_file():
        return grocery(source / "dataset", split)
    if not (source / split).is_dir():
        parts = ", ".join(folder.name for folder in entries(source)[0]) if source.is_dir() else "nothing"
        raise DataError(f"{source} holds {parts or 'no folders'} where {split}/<class>/* is expected: give a "
                        "folder that `git clone` has made")
    return find_images(source / split, [])


def lay_out(source, folder, classes=3, images=None, order=None, test="test", tests=None):
    """Copies photographs into folder/train/<batch>/<class>/ and folder/test/<class>/.

    classes: of a batch. images, tests: at most so many of a class, the first ones; None: all. order: None, or
    the seed of a random order of the classes. test: the part of the source that is tested on. DataError if
    the source has no such photographs, or the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists: name a new folder")
    train = photographs(source, "train")
    tested = photographs(source, test)

    names = list(dict.fromkeys(name for name, _ in train))
    if order is not None:
        random.Random(order).shuffle(names)
    batch = {name: f"train/{place // classes:02d}" for place, name in enumerate(names)}

    for part, most in ((train, images), (tested, tests)):
        taken = dict.fromkeys(names, 0)
        for name, path in part:
            if taken.setdefault(name, 0) == most:
                continue
            taken[name] += 1
            target = folder / (batch[name] if part is train else "test") / name
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="folder that git clone has made")
    parser.add_argument("folder", help="new folder")
    parser.add_argument("--classes", type=int, default=3, metavar="N", help="of a batch (default 3)")
    parser.add_argument("--images", type=int, metavar="N", help="training images of a class, at most")
    parser.add_argument("--order", type=int, metavar="N", help="seed of a random order (default: theirs)")
    parser.add_argument("--test", default="test", metavar="PART", help="what is tested on (default test)")
    parser.add_argument("--tests", type=int, metavar="N", help="test images of a class, at most")
    args = parser.parse_args()
    with errors_as_sentences("lay_out.py") as outcome:
        lay_out(args.source, args.folder, args.classes, args.images, args.order, args.test, args.tests)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
