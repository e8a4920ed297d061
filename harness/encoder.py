"""Images to latents, fast: the device, how its libraries compute, and each image encoded once.

Nothing here changes a result by more than rounding. `Encoder` gives latents, `TestSet` keeps those of the
test images, `Clock` tells how long each part of a batch takes.
"""
import copy
import ctypes
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from harness.config import ConfigError
from harness.console import say
from models.batch_renorm import brn_layers, fold_brn
from models.mobilenet import PointwiseConv2d
from utils import as_images, evaluate, memory_format, preprocess

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3     # glibc's names and numbers for its mallopt


# ---- latents ----

class Encoder:
    """Images to latents. Frozen layers give the same latents for ever, so each image needs to pass them only
    once.

    fast=True: `encoder(images)` is a tensor of latents, made once through a copy of lat_features whose
    normalizations are folded into its convolutions, if lat_features is frozen and the tensor fits into
    max_bytes. Otherwise, and always with fast=False, it is an EncodedOnDemand. The copy's convolutions are
    plain ones: on a CPU, latents are exact to float32 whatever the precision of matrix products. At its first
    use the copy is compared with lat_features, and left alone where it differs.

    mirror=True: a latent is the mean of those of an image and of its mirror image, the latter turned back.
    """

    TOLERANCE = 1e-4        # of that comparison, as a share of the largest latent

    # images encoded at a time. CPU: the maps of 16 still fit into the caches. GPU: twice 150 are a batch of
    # CORe50; chunks of 256 took 1.8 times as long for it
    CHUNK = {"cpu": 16, "cuda": 150}
    ON_DEMAND_CHUNK = {"cpu": 16, "cuda": 32}       # the same where a mini-batch asks for its few images

    def __init__(self, net, device, fast=True, max_bytes=4 << 30, mirror=False):
        self.net = net
        self.mirror = mirror
        self.device = torch.device(device)
        self.max_bytes = max_bytes
        self.chunk = self.CHUNK.get(self.device.type, 64)
        self.on_demand_chunk = self.ON_DEMAND_CHUNK.get(self.device.type, 64)

        self.averages_move = net.moving and bool(brn_layers(net.lat_features))
        frozen = net.frozen_layer_num >= net.latent_layer_num
        self.latents_are_fixed = frozen and not self.averages_move
        self.folded = None
        self.compared = False
        if fast and self.latents_are_fixed:
            self.folded = fold_brn(net.lat_features).to(memory_format=torch.channels_last)

    def __call__(self, images):
        """images: uint8 (n, H, W, 3), n > 0, or ValueError. Returns latents of length n that an int64 tensor
        or a slice indexes."""
        images = as_images(images)
        if self.folded is not None and not self.compared:
            self._compare(images[:4])
        if self.folded is None:
            return EncodedOnDemand(images, lambda part: self._latents(self.net.lat_features, part))

        first = self._encode_chunk(images[:self.chunk], self.chunk)
        if first[0].numel() * first.element_size() * len(images) > self.max_bytes:
            return EncodedOnDemand(images, lambda part: self._encode(part, self.on_demand_chunk))
        return self._encode(images, self.chunk, first)

    def _compare(self, images):
        """Gives up the copy if it computes other latents of a few images than lat_features does.

        So it is where a layer does what fold_brn does not know of, or where the other images of a mini-batch
        have a say in a latent.
        """
        if not _folds_well(self.net.lat_features, self._prepared(images), self.TOLERANCE):
            say("the fast copy of the layers that make latents computes other ones than they do, so images "
                "pass through the layers themselves: slower, and right")
            self.folded = None
        self.compared = True

    def _latents(self, layers, images):
        """Latents of images, by `layers`: lat_features or their copy."""
        x = self._prepared(images)
        latents = layers(x)
        if not self.mirror:
            return latents
        mirrored = layers(x.flip(3))
        return (latents + (mirrored.flip(3) if mirrored.dim() == 4 else mirrored)) / 2

    def _prepared(self, images):
        """Images as the network takes them, in the type of its weights."""
        return preprocess(images, self.device).to(self.net.output.weight.dtype)

    def _encode(self, images, chunk, first=None):
        """Latents of n images; `first`: those of the first chunk, where they are known."""
        if first is None:
            first = self._encode_chunk(images[:chunk], chunk)
        n = len(images)
        latents = torch.empty((n, *first.shape[1:]), dtype=first.dtype, device=self.device,
                              memory_format=memory_format(first))
        latents[:chunk] = first
        for k in tqdm(range(chunk, n, chunk), "encoding", unit="chunk", delay=2, leave=False, disable=None):
            latents[k:k + chunk] = self._encode_chunk(images[k:k + chunk], chunk)
        return latents

    @torch.no_grad()
    def _encode_chunk(self, images, chunk):
        """Latents of n <= chunk images, computed as `chunk` of them.

        Libraries take other kernels for other numbers, and with them other roundings: an image's latent would
        depend on how many stand beside it.
        """
        n = len(images)
        padded = torch.as_tensor(images)[torch.arange(chunk) % n] if n < chunk else images
        return self._latents(self.folded, padded)[:n]


@torch.no_grad()
def _folds_well(layers, x, tolerance):
    """Whether layers give the same latents of images x when folded, even beside other images.

    In float64: a deep network may enlarge the rounding of its first layer beyond any tolerance.
    """
    layers = copy.deepcopy(layers).double()
    x = x.double()
    try:
        expected = layers(x)
        found = fold_brn(layers)(torch.cat((x, x + 1)))[:len(x)]
    except RuntimeError:        # a layer that computes in float32 alone
        return False
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


class EncodedOnDemand:
    """Images that are indexed like a tensor of latents: each time, `encode` makes the latents of those asked
    for.

    images: uint8 (n, H, W, 3), on the CPU. The latents have gradients where the layers that make them learn.
    """

    def __init__(self, images, encode):
        self.images = torch.as_tensor(images)
        self.encode = encode

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if isinstance(index, torch.Tensor):
            index = index.cpu()
        return self.encode(self.images[index])


class TestSet:
    """Test images, uint8 (n, H, W, 3), and their labels (n,). Their latents are made once for each
    encoder."""

    def __init__(self, images, labels):
        self.images = images
        self.labels = torch.as_tensor(labels)
        self.classes = int(self.labels.max()) + 1
        self.encoder = None

    def encode(self, learner):
        """Makes the latents, unless the learner still has the encoder that they were made with."""
        if self.encoder is not learner.encoder:
            self.encoder = learner.encoder
            self.latents = learner.encoder(self.images)
            self.labels = self.labels.to(learner.device)

    def evaluate(self, learner):
        """What utils.evaluate says of a learner on these images."""
        self.encode(learner)
        return evaluate(learner.classify, self.latents, self.labels, None, self.classes)


# ---- the device ----

def pick_device(name):
    """torch.device of "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:n"; a GPU becomes the current
    one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; it can be auto, cpu, cuda or cuda:n")

    if device.type == "cuda":
        number = device.index or 0
        if number >= torch.cuda.device_count():
            raise ConfigError(f"there is no device {name!r} on this machine (CUDA devices: "
                              f"{torch.cuda.device_count()}); use --device auto or cpu")
        torch.cuda.set_device(number)
    return device


def precision_on(device, config):
    """The Config to compute with on a device: a CPU that would emulate bfloat16, far more slowly, computes
    with more digits than asked for, and a word tells."""
    if device.type != "cpu" or cpu_multiplies_bfloat16():
        return config
    for key, asked, instead in (("matmul_precision", "low", "medium"), ("precision", "bf16", "float32")):
        if getattr(config, key) == asked:
            say(f"this CPU has no units for bfloat16, so {key} {asked} is computed as {instead}")
            config = replace(config, **{key: instead})
    return config


def cpu_multiplies_bfloat16():
    """Whether the CPU has units for it: AVX512-BF16, AMX, or ARM's. Only Linux tells; elsewhere False."""
    with suppress(OSError):
        return "bf16" in Path("/proc/cpuinfo").read_text()      # avx512_bf16, amx_bf16, and bf16 of ARM
    return False


def precision_in_use():
    """The matmul_precision that set_up_kernels was called with last."""
    return "low" if PointwiseConv2d.bfloat16 else torch.get_float32_matmul_precision()


def set_up_kernels(fast, matmul_precision):
    """Settings of this process that training speed depends on.

    matmul_precision: of float32 matrix products, as torch.set_float32_matmul_precision takes it. "highest"
    multiplies in float32; "high" may round the factors to TF32 (10 bits), "medium" to bfloat16 (7 bits),
    where the device has units for that and the library takes them: TF32 on GPUs, bfloat16 on CPUs with AMX.
    Sums and results are float32. "low": on any device, MobileNetV1's 1x1 convolutions round factors and
    results to bfloat16; its other layers are as "medium".
    """
    PointwiseConv2d.bfloat16 = matmul_precision == "low"
    torch.set_float32_matmul_precision("medium" if matmul_precision == "low" else matmul_precision)
    torch.backends.cudnn.allow_tf32 = matmul_precision != "highest"
    torch.backends.cudnn.benchmark = fast           # shapes stay the same, so a search for kernels pays
    keep_freed_memory(fast)


def keep_freed_memory(keep):
    """Lets this process reuse the memory that tensors on the CPU give up, instead of returning it to the
    kernel.

    Otherwise every training step has the kernel clear hundreds of MB anew, which took about a fifth of its
    time on a virtual machine. Has an effect with glibc only; False returns what is free, and goes on with the
    thresholds that glibc reaches by itself.
    """
    largest = 32 << 20                                      # glibc refuses an mmap threshold above 32 MiB
    with suppress(OSError, AttributeError, TypeError):      # no C library to be found, or another one
        glibc = ctypes.CDLL(None)
        glibc.mallopt(M_MMAP_THRESHOLD, largest)
        glibc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1 if keep else 2 * largest)
        if not keep:
            glibc.malloc_trim(0)


class Clock:
    """Wall-clock seconds per part of a batch; waits for the device, so that each part is charged with its own
    work."""

    def __init__(self, device):
        self.device = device
        self.seconds = {}
        self.last = time.perf_counter()

    def lap(self, part):
        """Charges the time since the last lap to a part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] = now - self.last
        self.last = now

    def take(self):
        """{part: seconds} since it was called last; the next lap begins now."""
        taken = self.seconds
        self.seconds = {}
        self.last = time.perf_counter()
        return taken
