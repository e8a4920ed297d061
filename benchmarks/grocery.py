"""Lays out Grocery Store, photographs of 81 products in shops, as own images: 27 batches of three products.

    git clone https://github.com/marcusklasson/GroceryStoreDataset
    python benchmarks/grocery.py GroceryStoreDataset grocery

Klasson, Zhang, Kjellstroem, WACV 2019, MIT licence. Batches hold the training photographs, in the order of
the products' numbers, or with --order N in a random one; the test is its own. Settings are searched with
--test val, so that nothing is chosen on the test photographs.
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


def lay_out(clone, folder, products=3, order=None, test="test"):
    """Copies the photographs of a clone into folder/train/<batch>/<product>/ and folder/test/<product>/.

    order: None, or the seed of a random order of the products. DataError if the clone is none, or the folder
    exists.
    """
    clone = Path(clone) / "dataset"
    folder = Path(folder)
    if not (clone / "classes.csv").is_file():
        raise DataError(f"{clone} is not there: give the folder that `git clone` has made")
    if folder.exists():
        raise DataError(f"{folder} exists: name a new folder")

    rows = (clone / "classes.csv").read_text(encoding="utf-8").splitlines()[1:]
    names = [row.split(",")[0] for row in rows]
    numbers = list(range(len(names)))
    if order is not None:
        random.Random(order).shuffle(numbers)
    batch = {number: place // products for place, number in enumerate(numbers)}

    for split in ("train", test):
        for row in (clone / f"{split}.txt").read_text(encoding="utf-8").splitlines():
            path, number, _ = row.split(", ")
            number = int(number)
            part = f"train/{batch[number]:02d}" if split == "train" else "test"
            target = folder / part / names[number]
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(clone / path, target)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clone", help="folder that git clone has made")
    parser.add_argument("folder", help="new folder")
    parser.add_argument("--products", type=int, default=3, metavar="N", help="of a batch (default 3)")
    parser.add_argument("--order", type=int, metavar="N", help="seed of a random order (default: theirs)")
    parser.add_argument("--test", default="test", choices=("test", "val"), help="(default test)")
    args = parser.parse_args()
    with errors_as_sentences("grocery.py") as outcome:
        lay_out(args.clone, args.folder, args.products, args.order, args.test)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
