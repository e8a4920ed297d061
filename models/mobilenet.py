"""MobileNetV1 (arXiv 1704.04861), split at the latent layer, with the ImageNet weights of the imgclsmob collection.

    model = MobileNetV1(num_classes=50, latent_layer_num="conv5_4/dw", weights="imagenet")

| no.  | name                                       | output for 128x128 images |
|------|--------------------------------------------|---------------------------|
| 0    | conv1: 3x3, stride 2                       | 32x64x64                  |
| 2k-1 | depthwise 3x3 of block k, "conv2_1/dw" ... |                           |
| 2k   | pointwise 1x1 of block k, "conv2_1/sep" .. |                           |
| 27   | pool6: average over the map                | 1024                      |

Each convolution is followed by a normalization and a ReLU; layer 19, conv5_4/dw, gives 512x8x8.

Uses models.batch_renorm, models.split_net, torch.
"""
import hashlib
import http.client
import io
import os
import pickle
import re
import zipfile
import zlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from models.batch_renorm import replace_batch_norm
from models.split_net import SplitNet

# (name, output channels at width 1, stride of the depthwise convolution) of the 13 blocks, Table 1 of arXiv 1704.04861.
BLOCKS = [("conv2_1", 64, 1), ("conv2_2", 128, 2), ("conv3_1", 128, 1), ("conv3_2", 256, 2), ("conv4_1", 256, 1),
          ("conv4_2", 512, 2), ("conv5_1", 512, 1), ("conv5_2", 512, 1), ("conv5_3", 512, 1), ("conv5_4", 512, 1),
          ("conv5_5", 512, 1), ("conv5_6", 1024, 2), ("conv6", 1024, 1)]
LAYER_NAMES = ["conv1", *(f"{name}/{part}" for name, _, _ in BLOCKS for part in ("dw", "sep")), "pool6"]
STAGE_UNITS = [1, 2, 2, 6, 2]       # the published file groups the 13 blocks into stages of these sizes
MIN_IMAGE_SIZE = 32                 # the network halves its input five times

IMAGENET_URL = ("https://github.com/osmr/imgclsmob/releases/download/v0.0.155/mobilenet_w1-0895-7e1d739f.pth.zip")
OTHER_KINDS = {b"\x93NUMPY": "a NumPy array", b"\x89HDF": "an HDF5 file", b"\x1f\x8b": "a gzip archive", b"<": "a web page"}
IMAGENET_FILE, IMAGENET_SHA1 = "mobilenet_w1-0895-7e1d739f.pth", "7e1d739f"     # the SHA-1 begins with this


class WeightsError(Exception):
    """Pre-trained weights that are missing, damaged or of another network."""
    exit_status = 2


class MobileNetV1(SplitNet):
    """MobileNetV1 with Batch Renormalization, `width` times the published channels.

    weights: None (random), "imagenet" (the published file, fetched once) or the path of a .pth or .zip file of that layout.
    brn_params: keyword arguments of every BatchRenorm2D. Images may have any height and width from 32 pixels on.
    """

    def __init__(self, num_classes=50, latent_layer_num="conv5_4/dw", weights=None, width=1.0, **brn_params):
        channels = [max(1, round(width * c)) for _, c, _ in BLOCKS]
        c_in = max(1, round(width * 32))
        modules = [_conv(3, c_in, 3, stride=2)]
        for c_out, (_, _, stride) in zip(channels, BLOCKS):
            modules += [_conv(c_in, c_in, 3, stride, groups=c_in), _conv(c_in, c_out, 1)]
            c_in = c_out
        modules.append(GlobalAvgPool())
        super().__init__(dict(zip(LAYER_NAMES, modules)), c_in, num_classes, latent_layer_num)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if weights is not None:
            load_imagenet_weights(self, weights)
        replace_batch_norm(self, **brn_params)

    def forward(self, x, latent_input=None, return_lat_acts=False):
        if min(x.shape[-2:]) < MIN_IMAGE_SIZE:
            raise ValueError(f"images of {x.shape[-2]}x{x.shape[-1]} pixels are too small for MobileNetV1: use at least "
                             f"{MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE}")
        return super().forward(x, latent_input, return_lat_acts)


def _conv(c_in, c_out, kernel, stride=1, groups=1):
    conv = PointwiseConv2d(c_in, c_out, 1, bias=False) if kernel == 1 else \
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution of stride 1, computed as the matrix product that it is where the channels come last in memory.

    The libraries multiply matrices faster than they convolve, and torch.set_float32_matmul_precision applies to it.
    `PointwiseConv2d.bfloat16 = True` makes all such layers multiply float32 as BFloat16Product does.
    """

    bfloat16 = False

    def forward(self, x):
        if not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        rows, weight = x.permute(0, 2, 3, 1), self.weight.flatten(1)
        if self.bfloat16 and x.dtype == torch.float32:
            y = BFloat16Product.apply(rows, weight)
            return (y if self.bias is None else y + self.bias).permute(0, 3, 1, 2)
        return F.linear(rows, weight, self.bias).permute(0, 3, 1, 2)


class BFloat16Product(torch.autograd.Function):
    """x w^T of float32 x (..., C) and w (K, C), float32 (..., K); factors and result are rounded to bfloat16, sums are not.

    So are those of its gradient. Pays where the processor has units for bfloat16 (AVX512-BF16, AMX).
    """

    @staticmethod
    def forward(ctx, x, w):
        x, w = x.bfloat16(), w.bfloat16()
        ctx.save_for_backward(x, w)
        return (x @ w.t()).float()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, w), dy = ctx.saved_tensors, dy.bfloat16()
        dx = (dy @ w).float() if ctx.needs_input_grad[0] else None
        return dx, (dy.flatten(0, -2).t() @ x.flatten(0, -2)).float()


class GlobalAvgPool(nn.Module):
    """(N, C, H, W) -> (N, C), the mean over the map; its gradient has channels last in memory, as all others here."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


def published_prefixes():
    """Key prefixes of the published state_dict for layers 0 .. 26, in order."""
    units = [f"features.stage{s}.unit{u}.{part}_conv" for s, n in enumerate(STAGE_UNITS, 1) for u in range(1, n + 1)
             for part in ("dw", "pw")]
    return ["features.init_block", *units]


def load_imagenet_weights(model, weights):
    """Copies the published weights into a MobileNetV1 whose normalizations still are BatchNorm2d; the head is left alone.

    weights: "imagenet", or the path of a .pth or .zip file. WeightsError names the file and what does not fit.
    """
    path = fetch_imagenet_weights() if weights == "imagenet" else weights
    state = read_weights(path)
    with torch.no_grad():
        for prefix, (conv, bn, _) in zip(published_prefixes(), model.layers):
            wanted = {f"{prefix}.conv.weight": conv.weight} | {
                f"{prefix}.bn.{name}": getattr(bn, name) for name in ("weight", "bias", "running_mean", "running_var")}
            for key, target in wanted.items():
                copy_weight(state, key, target, path, advice=f"; use the published {IMAGENET_FILE}")


def copy_weight(state, key, target, path, than="", advice=""):
    """target <- state[key], of the file `path`; WeightsError unless it is a finite tensor of the same shape."""
    value = state.get(key)
    if not isinstance(value, torch.Tensor) or value.shape != target.shape:
        found = "is missing" if value is None else f"has shape {tuple(getattr(value, 'shape', ()))}"
        raise WeightsError(f"{path} holds the weights of another network{than}: {key} {found} instead of "
                           f"{tuple(target.shape)}{advice}")
    if not torch.isfinite(value).all():
        raise WeightsError(f"{path} is damaged: {key} holds values that are not finite; fetch the file anew")
    target.copy_(value)


def read_weights(path):
    """The state_dict in a .pth file, or in the only .pth inside a .zip; read with weights_only, so no code can run."""
    try:
        if not os.path.isfile(path):
            raise WeightsError(f"the weights file {path} does not exist; give --weights FILE the path of {IMAGENET_FILE}, "
                               f"from {IMAGENET_URL}")
        if other := _other_kind(path):
            raise WeightsError(f"{path} is {other}, and weights are read from a .pth file as torch.save writes it, or a "
                               ".zip with one inside: give --weights FILE such a file")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [n for n in archive.namelist() if n.endswith(".pth")]
                if len(names) == 1:
                    with archive.open(names[0]) as file:
                        return _load_state(file)
        with open(path, "rb") as file:          # torch's own files are zip archives too, without a .pth inside
            return _load_state(file)
    except WeightsError:
        raise
    except Exception as error:      # a damaged file can raise nearly anything: zlib.error, struct.error, IndexError, ...
        if name := re.search(r"GLOBAL ([\w.]+)", str(error)):      # torch's own advice is to run it nevertheless
            raise WeightsError(f"{path} holds {name[1]:.80} where tensors are expected, and reading that could run code: "
                               "give --weights FILE one that holds the network's state_dict()") from error
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        if "central directory" in reason:
            reason = "it ends early"
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is damaged, or not written by torch.save"
        raise WeightsError(f"cannot read weights from {path} ({reason}): fetch the file anew") from error


def _other_kind(path):
    """What a file is that cannot be a .pth: "a safetensors file", ...; None where it may be one."""
    with open(path, "rb") as file:
        head = file.read(64)
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < os.path.getsize(path):
        return "a safetensors file"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if known := [kind for sign, kind in OTHER_KINDS.items() if start.startswith(sign)]:
        return known[0]
    if all(byte >= 32 or byte in b"\t\n\r" for byte in head):
        return "a text file" if head else "an empty file"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return "a TorchScript archive"
        return "a NumPy archive" if any(name.endswith(".npy") for name in names) else None
    return None


def _load_state(file):
    state = torch.load(io.BytesIO(file.read()), map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError("no state_dict")
    return state.get("state_dict", state) if isinstance(state.get("state_dict", state), dict) else state


def fetch_imagenet_weights():
    """Path of the published weights in torch's hub cache, downloaded once, with a progress bar and its SHA-1 checked."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, IMAGENET_FILE)
    if os.path.isfile(path):
        if not _is_published(path):
            raise WeightsError(f"{path} is damaged (its SHA-1 does not begin with {IMAGENET_SHA1}): delete it and run the "
                               "same command again")
        return path
    archive, unpacked = f"{path}.{os.getpid()}.zip", f"{path}.{os.getpid()}.part"
    try:
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(IMAGENET_URL, archive, progress=True)
        with zipfile.ZipFile(archive) as z, open(unpacked, "wb") as out:
            out.write(z.read(next(n for n in z.namelist() if n.endswith(IMAGENET_FILE))))
        if not _is_published(unpacked):
            raise OSError(f"what arrived as {IMAGENET_FILE} is another file: its SHA-1 does not begin with {IMAGENET_SHA1}")
        os.replace(unpacked, path)
    except (OSError, http.client.HTTPException, StopIteration, zlib.error, zipfile.BadZipFile) as error:
        raise WeightsError(f"cannot fetch the ImageNet weights ({error}): download {IMAGENET_URL} by other means and give "
                           "its path with --weights FILE") from error
    finally:
        for leftover in (archive, unpacked):
            if os.path.exists(leftover):
                os.remove(leftover)
    return path


def _is_published(path):
    with open(path, "rb") as file:
        return hashlib.sha1(file.read()).hexdigest().startswith(IMAGENET_SHA1)
