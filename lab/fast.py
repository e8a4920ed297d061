"""What makes an experiment fast, apart from the method: nothing here changes a result by more than rounding.

`Encoder` computes each image's latent once, `LazyLatents` anew whenever it is asked for; `TestSet` keeps the latents of the
test images; `CapturedStep` replays a training step as a CUDA graph, `gather` gives it its mini-batches; `set_up_kernels`
chooses how the libraries compute; `restore_optimizer` loads what another device may have saved.

Uses lab.record, methods.papers, models.batch_renorm, models.mobilenet, torch, tqdm, utils.
"""
import copy
import ctypes
from contextlib import suppress

import torch
from tqdm import tqdm

from lab.record import say
from methods.papers import FirstSeen
from models.batch_renorm import brn_layers, fold_brn
from models.mobilenet import PointwiseConv2d
from utils import evaluate, memory_format, preprocess


class Encoder:
    """Images to latents. Frozen layers give the same latents for ever, so each image needs to pass them only once.

    fast=True: `encoder(images)` is a tensor of latents, made once through a copy of lat_features whose normalizations
    are folded into its convolutions, if lat_features is frozen and the tensor fits into max_bytes. Otherwise, and
    always with fast=False, it is a LazyLatents, which encodes what is asked for each time it is asked (a FirstSeen around
    one where moving averages below the latent layer still move). The copy's
    convolutions are plain ones: on a CPU, latents are exact to float32 whatever the precision of matrix products.
    """

    CHUNK = {"cpu": 16, "cuda": 150}    # images encoded at a time; the maps of 16 still fit into a CPU's caches, and twice
                                        # 150 are a batch of CORe50: on a GPU, chunks of 256 took 1.8 times as long for it
    LAZY_CHUNK = {"cpu": 16, "cuda": 32}        # the same where a mini-batch asks for its few images

    def __init__(self, net, device, fast=True, max_bytes=4 << 30):
        self.net, self.device, self.max_bytes = net, torch.device(device), max_bytes
        moving = net.moving and bool(brn_layers(net.lat_features))
        self.frozen = net.frozen_layer_num >= net.latent_layer_num and not moving
        self.ageing = moving and not any(p.requires_grad for p in net.lat_features.parameters())
        self.folded = fold_brn(net.lat_features).to(memory_format=torch.channels_last) if fast and self.frozen else None
        self.chunk, self.lazy_chunk = (sizes.get(self.device.type, 64) for sizes in (self.CHUNK, self.LAZY_CHUNK))

    def __call__(self, images):
        """images: uint8 (n, H, W, 3), n > 0, or ValueError. Returns something of length n that an int64 tensor or a slice
        indexes."""
        dtype = str(images.dtype).removeprefix("torch.")
        if dtype != "uint8" or images.ndim != 4 or images.shape[3] != 3 or len(images) == 0:
            raise ValueError("images are RGB values 0 to 255 in uint8, (n, height, width, 3), n > 0; these are "
                             f"{dtype} {tuple(images.shape)}")
        if self.folded is None:
            latents = LazyLatents(images, self.net.lat_features, self.device)
            return FirstSeen(latents) if self.ageing else latents
        first = self._encode_chunk(images[:self.chunk], self.chunk)
        if first[0].numel() * first.element_size() * len(images) > self.max_bytes:
            return LazyLatents(images, lambda part: self._encode(part, self.lazy_chunk), self.device, raw=True)
        return self._encode(images, self.chunk, first)

    def _encode(self, images, chunk, first=None):
        """Latents of n images; `first`: those of the first chunk, where they are known."""
        first = self._encode_chunk(images[:chunk], chunk) if first is None else first
        latents = torch.empty((len(images), *first.shape[1:]), device=self.device, memory_format=memory_format(first))
        latents[:chunk] = first
        for k in tqdm(range(chunk, len(images), chunk), "encoding", unit="chunk", delay=2, leave=False, disable=None):
            latents[k:k + chunk] = self._encode_chunk(images[k:k + chunk], chunk)
        return latents

    @torch.no_grad()
    def _encode_chunk(self, images, chunk):
        """Latents of n <= chunk images, computed as `chunk` of them: libraries take other kernels for other numbers, and
        with them other roundings, so an image's latent would depend on how many stand beside it."""
        n = len(images)
        padded = torch.as_tensor(images)[torch.arange(chunk) % n] if n < chunk else images
        return self.folded(preprocess(padded, self.device))[:n]


class LazyLatents:
    """Images that look like a tensor of latents: indexing encodes. With gradients where the encoding layers train."""

    def __init__(self, images, encode, device, raw=False):
        self.images, self.encode, self.device, self.raw = torch.as_tensor(images), encode, device, raw

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        images = self.images[index.cpu() if isinstance(index, torch.Tensor) else index]
        return self.encode(images if self.raw else preprocess(images, self.device))


class TestSet:
    """The test images, uint8 (n, H, W, 3), and their labels (n,). Called with a learner, it gives what `evaluate` gives.

    The images' latents are made once, and again when the learner has got another encoder.
    """

    def __init__(self, images, labels):
        self.images, self.labels, self.encoder = images, torch.as_tensor(labels), None

    def encode(self, learner):
        """Makes the latents, if the learner's encoder is another than the one that they were made with."""
        if self.encoder is not learner.encoder:
            self.encoder, self.latents = learner.encoder, learner.encoder(self.images)
            self.labels = self.labels.to(learner.device)

    def __call__(self, learner):
        self.encode(learner)
        return evaluate(learner.classify, self.latents, self.labels)


class CapturedStep:
    """A training step on a CUDA device, replayed as a CUDA graph: the same kernels, without the time that Python takes to
    launch them one by one.

    step(x, y): trains net on latents x (N, *latent shape) and labels y (N,) with the optimizer and si, returns (loss,
    correct) and has no choice that depends on data. After a few ordinary steps it is captured; further steps of that shape
    replay the capture, steps of another shape stay ordinary ones. The first replay is checked against an ordinary step
    from the same state; where they differ, or nothing can be captured, all steps stay ordinary ones, and a line says so.
    What a capture holds fast (learning rates, momentum, ...) may change: the step is then captured anew.
    """

    WARM_UP = 3     # steps run before the capture, so that gradients, momentum and workspaces exist

    def __init__(self, step, optimizer, net, si):
        self.step, self.optimizer, self.net, self.si, self.layers = step, optimizer, net, si, brn_layers(net)
        self.graph, self.warm, self.useless, self.settings, self.side = None, 0, False, None, None

    def __call__(self, x, y):
        if self.useless:
            return self.step(x, y)
        with torch.cuda.device(x.device):       # streams and graphs are made on the current one, which may be another
            return self._run(x, y)

    def _run(self, x, y):
        if self.graph is not None and self.settings != self._settings():
            self.graph, self.warm = None, 0
        if self.graph is not None and x.shape != self.x.shape:
            return self.step(x, y)
        if self.graph is None:
            if self.warm < self.WARM_UP:
                self.warm += 1
                return self._on_side_stream(x, y)
            return self._capture_and_check(x, y)
        return self._replay(x, y)

    def _replay(self, x, y):
        if x is not self.x:         # else `gather` has written them there
            self.x.copy_(x)
            self.y.copy_(y)
        self.graph.replay()
        return self.loss.clone(), self.correct.clone()

    def _on_side_stream(self, x, y):
        self.side = self.side or torch.cuda.Stream()
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            result = self.step(x, y)
        torch.cuda.current_stream().wait_stream(self.side)
        return result

    def _capture_and_check(self, x, y):
        try:
            self._capture(x, y)
        except RuntimeError as error:
            return self._give_up(f"this step cannot be captured ({' '.join(str(error).split()):.100})", x, y)
        before = self._copied_state()
        result = self.step(x, y)
        after = self._copied_state()
        self._restore(before)
        replayed = self._replay(x, y)
        if all(map(_close, [*replayed, *self._state()], [*result, *after])):
            return replayed
        self._restore(after)
        return self._give_up("its first replay gave other results than an ordinary step", result=result)

    def _give_up(self, why, x=None, y=None, result=None):
        say(f"training goes on without a CUDA graph, with the same results but more slowly: {why}")
        self.graph, self.useless = None, True
        return self.step(x, y) if result is None else result

    def _capture(self, x, y):
        self.x, self.y, self.settings = x.clone(), y.clone(), self._settings()
        self.graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        with torch.cuda.graph(self.graph):      # records the step, does not run it
            self.loss, self.correct = self.step(self.x, self.y)

    def _settings(self):
        """The numbers that a capture holds fast."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        layers = [(brn.momentum, brn.inc_step, brn.max_r_max, brn.max_d_max, brn.average, brn.training)
                  for brn in self.layers]
        return groups, layers, {key: value for key, value in vars(self.si).items() if isinstance(value, float)}

    def _state(self):
        """All that a step changes."""
        momenta = [value for state in self.optimizer.state.values() for value in state.values()
                   if isinstance(value, torch.Tensor)]
        return [*self.net.state_dict().values(), *momenta, *self.si.trajectory, *self.si.before]

    def _copied_state(self):
        return [t.clone() for t in self._state()]

    @torch.no_grad()
    def _restore(self, state):
        for mine, theirs in zip(self._state(), state, strict=True):
            mine.copy_(theirs)


def gather(step, *parts):
    """(x, y) of a mini-batch: of each part, (latents, labels, index), the patterns that its index names, joined in order.

    Where `step` is a CapturedStep with a graph for as many, they are written straight to where the graph reads them.
    """
    sizes = [len(index) for _, _, index in parts]
    if not (isinstance(step, CapturedStep) and step.graph is not None and sum(sizes) == len(step.y)):
        return (torch.cat([latents[index] for latents, _, index in parts]),
                torch.cat([labels[index] for _, labels, index in parts]))
    for (latents, labels, index), x, y in zip(parts, step.x.split(sizes), step.y.split(sizes)):
        _select(latents, index, x)
        _select(labels, index, y)
    return step.x, step.y


@torch.no_grad()
def _select(source, index, target):
    """target <- source[index]; without a tensor in between where both are tensors that lie in memory in the same order."""
    if isinstance(source, torch.Tensor) and memory_format(source) == memory_format(target) and source.dtype == target.dtype:
        torch.index_select(_in_memory_order(source), 0, index, out=_in_memory_order(target))
    else:
        target.copy_(source[index])


def _in_memory_order(x):
    """x, whose channels may come last in memory, with its dimensions in that order: what lies side by side is read so."""
    return x.permute(0, 2, 3, 1) if memory_format(x) == torch.channels_last else x


def restore_optimizer(optimizer, state):
    """Loads a copy of a saved state, which may come from another device: whether steps are fused stays as it is here."""
    state = copy.deepcopy(state)        # or the optimizer would go on in its tensors
    for group in state["param_groups"]:
        group["fused"] = optimizer.defaults["fused"]
    optimizer.load_state_dict(state)


def _close(a, b):
    """Whether two tensors agree to 1e-5 of the largest value."""
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def set_up_kernels(fast, matmul_precision):
    """Settings of this process that training speed depends on.

    matmul_precision: of float32 matrix products, as torch.set_float32_matmul_precision takes it. "highest" multiplies in
    float32; "high" may round the factors to TF32 (10 bits), "medium" to bfloat16 (7 bits), where the device has units
    for that and the library takes them: TF32 on GPUs, bfloat16 on CPUs with AMX. Sums and results are float32. "low": on
    any device, MobileNetV1's 1x1 convolutions round factors and results to bfloat16; its other layers are as "medium".
    """
    PointwiseConv2d.bfloat16 = matmul_precision == "low"
    torch.set_float32_matmul_precision("medium" if matmul_precision == "low" else matmul_precision)
    torch.backends.cudnn.allow_tf32 = matmul_precision != "highest"
    torch.backends.cudnn.benchmark = fast           # shapes stay the same, so a search for kernels pays
    keep_freed_memory(fast)


def keep_freed_memory(keep):
    """Lets this process reuse the memory that tensors on the CPU give up, instead of returning it to the kernel.

    Otherwise every training step has the kernel clear hundreds of MB anew, which took about a fifth of its time on a
    virtual machine. Has an effect with glibc only; False returns what is free, and goes on with the thresholds that glibc
    reaches by itself.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, largest = -1, -3, 32 << 20     # glibc refuses an mmap threshold above 32 MiB
    with suppress(OSError, AttributeError, TypeError):                  # no C library to be found, or another one
        glibc = ctypes.CDLL(None)
        glibc.mallopt(M_MMAP_THRESHOLD, largest)
        glibc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1 if keep else 2 * largest)
        if not keep:
            glibc.malloc_trim(0)
