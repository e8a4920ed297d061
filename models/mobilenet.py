"""MobileNetV1 (arXiv 1704.04861), split at the latent layer, with ImageNet weights of imgclsmob or Google.

    model = MobileNetV1(num_classes=50, latent_layer_num="conv5_4/dw", weights="imagenet")

| no.  | name                                       | output for 128x128 images |
|------|--------------------------------------------|---------------------------|
| 0    | conv1: 3x3, stride 2                       | 32x64x64                  |
| 2k-1 | depthwise 3x3 of block k, "conv2_1/dw" ... |                           |
| 2k   | pointwise 1x1 of block k, "conv2_1/sep" .. |                           |
| 27   | pool6: average over the map                | 1024                      |

Each convolution is followed by a normalization and a ReLU; layer 19, conv5_4/dw, gives 512x8x8.
"""
import hashlib
import http.client
import io
import os
import pickle
import re
import tempfile
import zipfile
import zlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from models.batch_renorm import replace_batch_norm
from models.split_net import SplitNet

# (name, output channels at width 1, stride of the depthwise convolution) of the blocks, Table 1 of the paper
BLOCKS = [("conv2_1", 64, 1), ("conv2_2", 128, 2), ("conv3_1", 128, 1), ("conv3_2", 256, 2),
          ("conv4_1", 256, 1), ("conv4_2", 512, 2), ("conv5_1", 512, 1), ("conv5_2", 512, 1),
          ("conv5_3", 512, 1), ("conv5_4", 512, 1), ("conv5_5", 512, 1), ("conv5_6", 1024, 2),
          ("conv6", 1024, 1)]
LAYER_NAMES = ["conv1", *(f"{name}/{part}" for name, _, _ in BLOCKS for part in ("dw", "sep")), "pool6"]
STAGE_UNITS = [1, 2, 2, 6, 2]       # the published file groups the 13 blocks into stages of these sizes
MIN_IMAGE_SIZE = 32                 # the network halves its input five times

IMAGENET_FILE = "mobilenet_w1-0895-7e1d739f.pth"
IMAGENET_URL = f"https://github.com/osmr/imgclsmob/releases/download/v0.0.155/{IMAGENET_FILE}.zip"
TFLITE_FILE = "mobilenet_v1_1.0_224_quant_embedding_extractor.tflite"
TFLITE_URL = ("https://raw.githubusercontent.com/google-coral/test_data/"
              f"104342d2d3480b3e66203073dac24f4e2dbb4c41/{TFLITE_FILE}")
PUBLISHED = {       # file, where it is fetched from, and how its SHA-1 or SHA-256 begins
    "imagenet": (IMAGENET_FILE, IMAGENET_URL, "SHA-1", "7e1d739f"),
    "tflite": (TFLITE_FILE, TFLITE_URL, "SHA-256",
               "f409ef4f73fcbb9667841965623c5c8524aac33d41b9bf5f3667161fb4a76319"),
}

# how files begin that somebody may take for weights
OTHER_KINDS = {b"\x93NUMPY": "a NumPy array", b"\x89HDF": "an HDF5 file", b"\x1f\x8b": "a gzip archive",
               b"<": "a web page"}

# what a state_dict lies under in a checkpoint, and what wrappers of a network put before its keys
WRAPPERS = ("model", "state_dict", "model_state_dict")
KEY_PREFIXES = r"^((module|model|_orig_mod)\.)+"


class WeightsError(Exception):
    """Pre-trained weights that are missing, damaged or of another network."""
    exit_status = 2


class MobileNetV1(SplitNet):
    """MobileNetV1 with Batch Renormalization, `width` times the published channels.

    weights: None (random), "imagenet" (the published file, fetched once), "tflite" (Google's 8-bit weights of
    width 1, fetched once; see tflite_weights.py) or the path of one of the two or of a .pth or .zip file in
    the first one's layout. brn_params: keyword arguments of every BatchRenorm2D. Images may have any height
    and width from 32 pixels on.
    """

    def __init__(self, num_classes=50, latent_layer_num="conv5_4/dw", weights=None, width=1.0, **brn_params):
        c_in = max(1, round(width * 32))
        modules = [_conv(3, c_in, 3, stride=2)]
        for _, channels, stride in BLOCKS:
            c_out = max(1, round(width * channels))
            modules.append(_conv(c_in, c_in, 3, stride, groups=c_in))
            modules.append(_conv(c_in, c_out, 1))
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
            raise ValueError(f"images of {x.shape[-2]}x{x.shape[-1]} pixels are too small for MobileNetV1: "
                             f"use at least {MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE}")
        return super().forward(x, latent_input, return_lat_acts)


# ---- layers ----

def _conv(c_in, c_out, kernel, stride=1, groups=1):
    if kernel == 1:
        conv = PointwiseConv2d(c_in, c_out, 1, bias=False)
    else:
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution of stride 1, computed as a matrix product where the channels come last in memory.

    The libraries multiply matrices faster than they convolve, and torch.set_float32_matmul_precision applies
    to it. `PointwiseConv2d.bfloat16 = True` makes all such layers multiply float32 as BFloat16Product does.
    """

    bfloat16 = False
    folds_as_conv = True        # batch_renorm.fold_brn: in float32 this is a convolution like any other

    def forward(self, x):
        if not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)

        rows = x.permute(0, 2, 3, 1)            # (N, H, W, C)
        weight = self.weight.flatten(1)         # (K, C)
        if self.bfloat16 and x.dtype == torch.float32:
            y = BFloat16Product.apply(rows, weight)
            if self.bias is not None:
                y = y + self.bias
        else:
            y = F.linear(rows, weight, self.bias)
        return y.permute(0, 3, 1, 2)            # (N, K, H, W)


class BFloat16Product(torch.autograd.Function):
    """x w^T of float32 x (..., C) and w (K, C), float32 (..., K), and its gradient.

    Factors and results are rounded to bfloat16, sums are not. Pays where the processor has units for bfloat16
    (AVX512-BF16, AMX).
    """

    @staticmethod
    def forward(ctx, x, w):
        x, w = x.bfloat16(), w.bfloat16()
        ctx.save_for_backward(x, w)
        return (x @ w.t()).float()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dy = dy.bfloat16()
        dx = (dy @ w).float() if ctx.needs_input_grad[0] else None
        dw = (dy.flatten(0, -2).t() @ x.flatten(0, -2)).float()
        return dx, dw


class GlobalAvgPool(nn.Module):
    """(N, C, H, W) -> (N, C), the mean over the map; its gradient has channels last in memory."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


# ---- pre-trained weights ----

def published_prefixes():
    """Key prefixes of the published state_dict for layers 0 .. 26, in order."""
    prefixes = ["features.init_block"]
    for stage, units in enumerate(STAGE_UNITS, 1):
        for unit in range(1, units + 1):
            prefixes += [f"features.stage{stage}.unit{unit}.{part}_conv" for part in ("dw", "pw")]
    return prefixes


@torch.no_grad()
def load_imagenet_weights(model, weights):
    """Copies the published weights into a MobileNetV1 whose normalizations still are BatchNorm2d.

    weights: "imagenet", "tflite", or the path of a .pth, .zip or .tflite file. The head is left alone.
    WeightsError names the file and what does not fit.
    """
    path = fetch_weights(weights) if weights in PUBLISHED else weights
    own = {}
    for prefix, (conv, bn, _) in zip(published_prefixes(), model.layers):
        own[f"{prefix}.conv.weight"] = conv.weight
        for name in ("weight", "bias", "running_mean", "running_var"):
            own[f"{prefix}.bn.{name}"] = getattr(bn, name)
    advice = "set width to 1" if weights in PUBLISHED else f"use the published {IMAGENET_FILE}"
    copy_weights(read_weights(path), own, path, advice=f"; {advice}")


def copy_weights(state, own, path, than="", advice=""):
    """own[key] <- state[key] for each of {key: tensor}, or WeightsError: keys differ, values are not finite.

    state: what read_weights found in the file `path`. What it holds beside the network's parts, such as
    another classifier, is left alone.
    """
    differ = []
    for key, mine in own.items():
        value = state.get(key)
        if value is None:
            differ.append(f"{key} is missing, of shape {tuple(mine.shape)}")
        elif not isinstance(value, torch.Tensor) or value.shape != mine.shape:
            shape = tuple(getattr(value, "shape", ()))
            differ.append(f"{key} has shape {shape} instead of {tuple(mine.shape)}")

    unknown = [key for key in state if key not in own and not key.endswith("num_batches_tracked")]
    if state.keys() & own.keys():       # else the names say what it is the network of
        parts = {key.split(".")[0] for key in own}
        unknown = [key for key in unknown if key.split(".")[0] in parts]
    # so that one of them is among the first three, which are told
    differ[2:2] = [f"{key:.80} {tuple(getattr(state[key], 'shape', ()))} is unexpected" for key in unknown]
    if differ:
        more = f" and {len(differ) - 3} more" * (len(differ) > 3)
        raise WeightsError(f"{path} holds the weights of another network{than}: {', '.join(differ[:3])}{more}"
                           f"{advice}")

    for key in own:
        if not torch.isfinite(state[key]).all():
            raise WeightsError(f"{path} is damaged: {key} holds values that are not finite; fetch the file "
                               "anew")
    for key, mine in own.items():
        mine.copy_(state[key])


def read_weights(path):
    """The state_dict in a .pth file, in the only .pth inside a .zip, or made of the published .tflite file.

    Code in the file is not run. It may lie inside a checkpoint, and its keys may begin as DataParallel,
    torch.compile or Lightning let them.
    """
    try:
        if not os.path.isfile(path):
            raise WeightsError(f"the weights file {path} does not exist; give --weights FILE the path of "
                               f"{IMAGENET_FILE}, from {IMAGENET_URL}")
        other = _other_kind(path)
        if other:
            raise WeightsError(f"{path} is {other}, and weights are read from a .pth file as torch.save "
                               "writes it, or a .zip with one inside: give --weights FILE such a file")
        return _load_state(path)
    except WeightsError:
        raise
    except Exception as error:      # a damaged file can raise nearly anything
        raise WeightsError(_why_unreadable(path, error)) from error


def _load_state(path):
    with open(path, "rb") as file:
        content = file.read()
    if content[4:8] == b"TFL3":
        if not _is_published(path, "tflite"):
            raise ValueError(f"it is no copy of {TFLITE_FILE}")
        from models import tflite_weights
        return tflite_weights.state_dict(bytearray(content), published_prefixes())

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if name.endswith(".pth")]
            if len(inside) == 1:        # torch's own files are zip archives too, without a .pth inside
                content = archive.read(inside[0])

    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError("no state_dict")
    for name in 2 * WRAPPERS:       # twice: one inside another, in either order
        inner = state.get(name)
        if isinstance(inner, dict):
            state = inner
    return {re.sub(KEY_PREFIXES, "", str(key)): value for key, value in state.items()}


def _why_unreadable(path, error):
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused:         # torch's own advice is to run it nevertheless
        return (f"{path} holds {refused[1]:.80} where tensors are expected, and reading that could run code: "
                "give --weights FILE one that holds the network's state_dict()")

    if isinstance(error, pickle.UnpicklingError):
        reason = "it is damaged, or not written by torch.save"
    elif "central directory" in str(error):
        reason = "it ends early"
    else:
        reason = str(error).split("\n")[0][:120] or type(error).__name__
    return f"cannot read weights from {path} ({reason}): fetch the file anew"


def _other_kind(path):
    """What a file is that cannot be a .pth: "a safetensors file", ...; None where it may be one."""
    with open(path, "rb") as file:
        head = file.read(64)

    # safetensors: 8 bytes with the length of a header in JSON, and the header
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < os.path.getsize(path):
        return "a safetensors file"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()     # behind the mark with which a text may begin
    for sign, kind in OTHER_KINDS.items():
        if start.startswith(sign):
            return kind
    if all(byte >= 32 or byte in b"\t\n\r" for byte in head):
        return "a text file" if head else "an empty file"

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return "a TorchScript archive"
        if any(name.endswith(".npy") for name in names):
            return "a NumPy archive"
    return None


def fetch_weights(weights):
    """Path of the "imagenet" or "tflite" weights in torch's hub cache, downloaded once and checked."""
    name, url, algorithm, digits = PUBLISHED[weights]
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, name)
    if os.path.isfile(path):
        if not _is_published(path, weights):
            raise WeightsError(f"{path} is damaged (its {algorithm} does not begin with {digits:.8}): delete "
                               "it and run the same command again")
        return path

    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            fetched = os.path.join(temporary, "fetched")
            torch.hub.download_url_to_file(url, fetched, progress=True)
            if url.endswith(".zip"):
                unpacked = os.path.join(temporary, name)
                with zipfile.ZipFile(fetched) as z, open(unpacked, "wb") as out:
                    out.write(z.read(next(inside for inside in z.namelist() if inside.endswith(name))))
                fetched = unpacked
            if not _is_published(fetched, weights):
                raise OSError(f"what arrived as {name} is another file: its {algorithm} does not begin with "
                              f"{digits:.8}")
            os.replace(fetched, path)
    except (OSError, http.client.HTTPException, StopIteration, zlib.error, zipfile.BadZipFile) as error:
        other = "tflite" if weights == "imagenet" else "imagenet"
        raise WeightsError(f"cannot fetch the weights {weights} ({error}): download {url} by other means and "
                           "give its path with --weights FILE, or take others, from another server, with "
                           f"--weights {other}") from error
    return path


def _is_published(path, weights):
    _, _, algorithm, digits = PUBLISHED[weights]
    with open(path, "rb") as file:
        found = hashlib.new(algorithm.replace("-", ""), file.read())
    return found.hexdigest().startswith(digits)
