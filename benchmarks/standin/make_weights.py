"""The file of ImageNet weights with which most records were made, out of Google's 8-bit MobileNetV1.

    python benchmarks/standin/make_weights.py mobilenet_w1.pth

`--weights tflite` gives the same weights without this file. With --images, the statistics of the convolutions'
outputs are measured anew, on 768 images of CIFAR-100 in the folder DIR, in place of those that are in this
repository. DIR holds either cifar-100-python/, as torchvision unpacks it, or the images as PNG files in any folders,
as in github.com/cyizhuo/CIFAR-100-dataset: an image is recognized by its pixels. 75 s and 3.3 GB of memory on one CPU core.

    python benchmarks/standin/make_weights.py mobilenet_w1.pth --images DIR --statistics FILE
"""
import argparse
import hashlib
import pickle
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from models import tflite_weights
from models.mobilenet import BLOCKS, fetch_weights, published_prefixes

# of the tensors of the file that the records were made with; see digest()
SHA256 = "ac339a10f0c6b7f62b5536da03c3a9ef08744efe25a1443a5815c6a52b240ef0"
STRIDES = [2, *(s for _, _, stride in BLOCKS for s in (stride, 1))]
SIDE = 128              # pixels that the images are enlarged to
SMALLEST_VAR = 1e-3     # so that a channel that is always 0 divides by no tiny number


def images_of(folder):
    """Yields the images (32, 32, 3) uint8 of CIFAR-100 in a folder, in either of two forms."""
    archive = Path(folder) / "cifar-100-python"
    if archive.is_dir():
        for part in ("train", "test"):
            with open(archive / part, "rb") as file:
                data = pickle.load(file, encoding="latin1")["data"]
            yield from data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    else:
        for path in sorted(Path(folder).rglob("*.png")):
            yield np.array(Image.open(path).convert("RGB"))


def crc32(image):
    """The sum by which tflite_statistics.pth names an image."""
    return zlib.crc32(image.tobytes())


def chosen_images(folder, sums):
    """The images of those sums, in their order, as the network takes them: (n, 3, SIDE, SIDE) float32."""
    found = {crc32(image): image for image in images_of(folder)}
    missing = sum(s not in found for s in sums)
    if missing:
        raise SystemExit(f"error: {folder} lacks {missing} of the {len(sums)} images that the statistics are of: "
                         "give --images the folder of cifar-100-python, or of all PNG files of CIFAR-100")
    large = [np.array(Image.fromarray(found[s]).resize((SIDE, SIDE), Image.BICUBIC)) for s in sums]
    x = torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).float() / 255
    mean, std = tflite_weights.IMAGENET_MEAN.float(), tflite_weights.IMAGENET_STD.float()
    return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@torch.no_grad()
def measure(convolutions, x):
    """{"mean", "var"} of all channels of all convolutions' outputs, float64, one convolution after the other."""
    means, variances = [], []
    for (weight, bias), stride in zip(convolutions, STRIDES, strict=True):
        groups = x.shape[1] if weight.shape[1] == 1 else 1
        padding = weight.shape[-1] // 2
        x = torch.cat([F.conv2d(part, weight, None, stride, padding, groups=groups) for part in x.split(64)])
        var, mean = torch.var_mean(x.double(), (0, 2, 3), unbiased=False)
        means.append(mean)
        variances.append(var.clamp(min=SMALLEST_VAR))
        x = (x + bias.view(-1, 1, 1)).relu_()
    return {"mean": torch.cat(means), "var": torch.cat(variances)}


def whole(state):
    """The state_dict with the rest of the layout: counters, and a classifier of zeros."""
    state = {**state, "output.weight": torch.zeros(1000, 1024).half(), "output.bias": torch.zeros(1000).half()}
    return state | {f"{prefix}.bn.num_batches_tracked": torch.tensor(0) for prefix in published_prefixes()}


def digest(state):
    """SHA-256 of the names and bytes of all tensors, sorted by name: torch.save's bytes differ by version."""
    total = hashlib.sha256()
    for key in sorted(state):
        total.update(key.encode())
        total.update(state[key].contiguous().numpy().tobytes())
    return total.hexdigest()


def main(argv=None):
    """The command; exit status 1 if the tensors are not bit-equal to those of the records."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", metavar="OUT.pth")
    parser.add_argument("--tflite", metavar="FILE", help="Google's file (default: fetched once)")
    parser.add_argument("--images", metavar="DIR", help="measure the statistics anew on these images of CIFAR-100")
    parser.add_argument("--statistics", metavar="FILE", help="write the statistics there")
    args = parser.parse_args(argv)

    content = bytearray(Path(args.tflite or fetch_weights("tflite")).read_bytes())
    shipped = statistics = torch.load(tflite_weights.STATISTICS, weights_only=True)
    if args.images:
        x = chosen_images(args.images, shipped["crc32"].tolist())
        statistics = shipped | measure(tflite_weights.convolutions(content), x)
        for name, unit in (("mean", shipped["var"].sqrt()), ("var", shipped["var"])):
            apart = (statistics[name] - shipped[name]).abs() / unit
            print(f"{name}: {(apart > 0).sum()} of {len(apart)} differ from those of the repository, by at most "
                  f"{apart.max():.1e} of the {'deviation' if name == 'mean' else 'variance'}")
    if args.statistics:
        torch.save(statistics, args.statistics)

    state = whole(tflite_weights.state_dict(content, published_prefixes(), statistics))
    torch.save(state, args.out)
    found = digest(state)
    same = found == SHA256
    print(f"{args.out}: SHA-256 of its tensors {found}, {'as' if same else 'NOT as'} in the records")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
