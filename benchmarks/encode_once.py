"""Runs a program of this repository, or several, with every image encoded once and its latent kept on disk.

    python benchmarks/encode_once.py latents ar1star_lat_replay.py --name cifar100 --runs 0,2-3
    python benchmarks/encode_once.py latents benchmarks/tune.py cifar100_pool6 --set held_out=0.1

On a CPU nearly all the time of a run with frozen layers is spent on encoding. Runs that have the layers up to
the latent one, the weights and image_size in common share a folder inside the first argument, here `latents`:
4 kB an image for pool6. What lies there are the bytes that the program itself would compute, so results are
the same; the seconds in the records of such runs are not those of a run alone.
"""
import hashlib
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from harness.encoder import Encoder, precision_in_use
from utils import as_images


class Latents:
    """Latents of images, in files of a folder: what earlier runs have left, and what this one adds."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.places = {}        # {image's digest: (file, row)}
        self.read = set()

    def look(self):
        """Takes note of files that have come since."""
        for names in sorted(set(self.folder.glob("*.names.npy")) - self.read):
            latents = np.load(str(names).replace(".names.npy", ".npy"), mmap_mode="r")
            for row, name in enumerate(np.load(names)):
                self.places[name.tobytes()] = latents, row
            self.read.add(names)

    def add(self, names, latents):
        """Keeps the latents of images by their names. The file of names comes last, and makes them count."""
        base = self.folder / f"{os.getpid()}_{len(list(self.folder.glob('*.names.npy')))}"
        np.save(f"{base}.npy", latents.cpu().numpy())
        np.save(f"{base}.part.npy", np.array(names))
        os.replace(f"{base}.part.npy", f"{base}.names.npy")


def keep_latents(folder):
    """Has all Encoders of this process keep their latents in a folder, and take them from there."""
    encode_anew = Encoder.__call__
    kept = {}

    def encode(self, images):
        images = as_images(images)
        if self.folded is None or not len(images):
            return encode_anew(self, images)
        key = name_of_encoder(self, images.shape[1:])
        if key not in kept:
            kept[key] = Latents(Path(folder, key))
        latents = kept[key]

        names = [np.void(hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest())
                 for image in images]
        latents.look()
        new = [k for k, name in enumerate(names) if name.tobytes() not in latents.places]
        if new:
            found = encode_anew(self, images[new])
            if not isinstance(found, torch.Tensor):     # more than max_latents_gb: encoded on demand
                return encode_anew(self, images)
            latents.add([names[k] for k in new], found)
            latents.look()
        rows = [latents.places[name.tobytes()] for name in names]
        out = torch.from_numpy(np.stack([file[row] for file, row in rows])).to(self.device)
        return out.to(memory_format=torch.channels_last) if out.dim() == 4 else out

    Encoder.__call__ = encode


def name_of_encoder(encoder, shape):
    """A name that fixes an encoder's layers, their weights, and how it computes."""
    told = hashlib.sha256(repr((encoder.folded, encoder.mirror, tuple(shape), precision_in_use(),
                                encoder.device.type, encoder.chunk)).encode())
    for name, value in encoder.folded.state_dict().items():
        told.update(name.encode())
        told.update(value.cpu().contiguous().numpy().tobytes())
    return told.hexdigest()[:16]


def main(argv=None):
    """Runs the program that the arguments name. Its exit status is ours."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) < 2 or arguments[0].startswith("-"):
        sys.exit(__doc__)
    folder, program, *rest = arguments
    keep_latents(folder)
    sys.argv = [program, *rest]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
