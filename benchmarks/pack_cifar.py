"""Packs CIFAR-100 from a clone of PNG files into the files of its own archive, which torchvision reads.

    git clone https://github.com/cyizhuo/CIFAR-100-dataset
    python benchmarks/pack_cifar.py CIFAR-100-dataset data
    python ar1star_lat_replay.py --set dataset=cifar100 --data data

For where the archive (www.cs.toronto.edu/~kriz/cifar.html, by --download) cannot be fetched. Images, labels
and file names are the archive's own: the mean of all training pixels is the published one. The order of its
images cannot be told from files, so they stand in the order of their classes and names; the 20 superclasses
are left out. Hence the check sums differ from those that torchvision knows. The same clone gives the same
bytes everywhere, and streams/torchvision_data.py knows their check sums (PackedCIFAR100).
"""
import argparse
import io
import pickle
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_loader import DataError
from harness.console import errors_as_sentences
from streams.folder import read_image
from streams.torchvision_data import PackedCIFAR100, open_parts


def pack(clone, folder):
    """Writes folder/cifar-100-python/ with train, test and meta from clone/train/<class>/*.png and test/.

    DataError if the clone is none, or the folder holds CIFAR-100 already.
    """
    clone = Path(clone)
    target = Path(folder) / "cifar-100-python"
    classes = sorted(path.name for path in (clone / "train").glob("*"))     # numbered as in the archive
    if not classes or classes != sorted(path.name for path in (clone / "test").glob("*")):
        raise DataError(f"{clone} has no folders train and test of the same classes: give the folder that "
                        "`git clone` has made")
    if target.exists():
        raise DataError(f"{target} exists: name another folder")

    parts = {part: read_part(clone / part, classes) for part in ("train", "test")}
    target.mkdir(parents=True)
    for name, content in {**parts, "meta": {"fine_label_names": classes}}.items():
        (target / name).write_bytes(dumped(content))


def read_part(folder, classes):
    """What a file of the archive holds: names, labels and uint8 (n, 3072): red, green and blue planes."""
    files = [sorted((folder / name).glob("*.png")) for name in classes]
    labels = [label for label, inside in enumerate(files) for _ in inside]
    files = [file for inside in files for file in inside]
    planes = [read_image(file, 32).transpose(2, 0, 1).reshape(-1) for file in files]
    return {"filenames": [file.name for file in files], "fine_labels": labels, "data": np.stack(planes)}


def dumped(content):
    """The pickle of a dict, the same bytes with every numpy: the array's module has had two names."""
    out = io.BytesIO()
    pickle.dump(content, out, protocol=3)       # names modules as lines of text
    return out.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clone", help="folder that git clone has made")
    parser.add_argument("folder", help="folder that --data will name")
    args = parser.parse_args()
    with errors_as_sentences("pack_cifar.py") as outcome:
        pack(args.clone, args.folder)
        counts = [len(part) for part in open_parts(PackedCIFAR100, args.folder, download=False)]
        print(f"{args.folder} holds {counts[0]:,} images to train with and {counts[1]:,} to test with")
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
