"""The pieces of AR1* with Latent Replay, each usable alone, and what an experiment needs around them.

The method: `CWRHead`, `ReplayMemory`, `minibatches`, `SynapticIntelligence`, `TrainStep`.
Data on the device: `preprocess`, `Encoder`, `evaluate`. Randomness: `generator`.
The run: `RunFolder`.

Papers: [LR] arXiv 1912.01100 Latent Replay; [CWR*] arXiv 1907.03799; [AR1] Neural Networks 116, 2019;
[SI] arXiv 1703.04200. Batch numbers count from 0; n is a number of images, R = rm_sz the capacity of the memory.
"""
import ctypes
import errno
import json
import os
import time
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from config import Config
from models.batch_renorm import fold_brn

try:
    import fcntl
except ImportError:     # Windows: two processes in one run folder then go unnoticed
    fcntl = None

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # of RGB in 0..1


def generator(seed, batch, purpose):
    """A CPU random generator for one purpose in one batch: a change in one draw leaves all the others alone.

    Nothing random lives longer than a batch, so the number of the batch is all the random state that a checkpoint holds.
    """
    words = np.random.SeedSequence([seed, batch, zlib.crc32(purpose.encode())]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


# ---- the head: CWR* ----

class CWRHead:
    """CWR* consolidation of a linear head without bias, Alg. 1 of [CWR*].

    linear: nn.Linear(features, classes, bias=False). State: `cw` (classes, features), the consolidated weights, and
    `past_j` (classes,) int64, the patterns of each class met in earlier batches.

    consolidation: "per_class" counts each class of a batch once, as the papers do; "per_pattern" counts it n_j times,
    n_j = its patterns in the replay memory + 1 if it is among the new images, as the published PyTorch program does;
    "none" leaves the head alone (naive fine-tuning).
    """

    def __init__(self, linear, consolidation="per_class"):
        if consolidation not in ("per_class", "per_pattern", "none"):
            raise ValueError(f"consolidation is 'per_class', 'per_pattern' or 'none', not {consolidation!r}")
        self.linear, self.consolidation = linear, consolidation
        self.cw = torch.zeros_like(linear.weight, requires_grad=False)
        self.past_j = torch.zeros(linear.out_features, dtype=torch.int64, device=linear.weight.device)

    @torch.no_grad()
    def begin(self, new_y, memory_y):
        """Before training: the rows of the classes present get their consolidated weights, all others 0 (lines 4-7).

        new_y, memory_y: int64 labels on the head's device, of the new images and of the whole replay memory.
        """
        count = lambda y: torch.bincount(y, minlength=self.linear.out_features)
        new, memory = count(new_y), count(memory_y)
        self.cur_j = new + memory
        self.n_j = memory + (new > 0) if self.consolidation == "per_pattern" else (self.cur_j > 0).long()
        if self.consolidation != "none":
            self._load((self.cur_j > 0) & (self.past_j > 0))

    @torch.no_grad()
    def consolidate(self):
        """After training: merges the trained rows into `cw` (lines 9-16) and loads `cw` of every class met, for the test.

        n applications of cw <- (cw s + t) / (s + 1), s = sqrt(past_j / cur_j), are cw <- t + (cw - t) (s / (s + 1))^n.
        """
        present = self.cur_j > 0
        if self.consolidation != "none":
            n_j = self.n_j.to(self.cw.dtype)
            w = self.linear.weight
            t = w - (n_j / n_j.sum()) @ w.mean(1)           # (classes, features); subtracts one scalar
            s = (self.past_j / self.cur_j.clamp(min=1)).sqrt().to(w.dtype)
            kept = ((s / (s + 1)) ** n_j)[:, None]          # share of the old weights; 0 for a class not met before
            self.cw = torch.where(present[:, None], t + (self.cw - t) * kept, self.cw)
        self.past_j += self.cur_j
        if self.consolidation != "none":
            self._load(self.past_j > 0)

    def _load(self, rows):
        self.linear.weight.copy_(torch.where(rows[:, None], self.cw, 0))

    def state_dict(self):
        return {"cw": self.cw, "past_j": self.past_j}

    def load_state_dict(self, state):
        self.cw.copy_(state["cw"])
        self.past_j.copy_(state["past_j"])


# ---- latent replay ----

class ReplayMemory:
    """R latents with their labels, class-blind, each batch's share replaced at random: Alg. 1 of [LR].

    `x` (size, *latent shape), `y` (size,) int64 and `batch` (size,) int64 (the batch it came in) are views of what is
    stored: pattern k is x[k] with label y[k]. like: one latent (1, *latent shape), whose device, type and memory format
    the storage takes.
    """

    def __init__(self, rm_sz, like):
        self.rm_sz, self.size = rm_sz, 0
        self._x = torch.empty((rm_sz, *like.shape[1:]), dtype=like.dtype, device=like.device,
                              memory_format=memory_format(like))
        self._y = torch.zeros(rm_sz, dtype=torch.int64, device=like.device)
        self._batch = torch.zeros_like(self._y)

    x = property(lambda self: self._x[:self.size])
    y = property(lambda self: self._y[:self.size])
    batch = property(lambda self: self._batch[:self.size])

    def __len__(self):
        return self.size

    @torch.no_grad()
    def update(self, latents, labels, i, rng=None):
        """Takes in h = min(R // (i + 1), n) of the n latents of batch i, drawn without replacement.

        They replace h random slots; while the memory is not full, its free slots are filled first, with more than h if
        need be. latents: (n, *latent shape), indexable by an int64 tensor; labels: (n,); rng: a CPU generator.
        """
        n = len(labels)
        free = self.rm_sz - self.size
        h = min(max(self.rm_sz // (i + 1), free), n)
        chosen = torch.randperm(n, generator=rng)[:h]
        fill = min(free, h)
        replaced = torch.randperm(self.size, generator=rng)[:h - fill]
        slots = torch.cat((torch.arange(self.size, self.size + fill), replaced))
        self.size += fill
        for part in torch.arange(h).split(256) if h else ():    # in parts: latents may be encoded when asked for
            slot, pattern = slots[part].to(self._y.device), chosen[part].to(self._y.device)
            self._x[slot] = latents[pattern]
            self._y[slot] = labels[pattern]
            self._batch[slot] = i

    def state_dict(self):
        return {"x": self.x, "y": self.y, "batch": self.batch}

    def load_state_dict(self, state):
        self.size = len(state["y"])
        for mine, theirs in ((self.x, state["x"]), (self.y, state["y"]), (self.batch, state["batch"])):
            mine.copy_(theirs)


def minibatches(n, m, mb_size=128, rng=None):
    """The mini-batches of an epoch: [(indices of new images, indices of memory patterns), ...], both int64 tensors.

    n: new images; m: patterns in the memory. As in [LR] and the published program: k = (n + m) // mb_size iterations are
    aimed at, c = n // k new images go into each, n // c iterations are run, each with mb_size - c replayed patterns. The
    new images are shuffled (once per batch: every epoch reuses the list), the memory is taken in the order of its slots.
    Where the rule is silent: at least one new image and one iteration; a memory that runs out starts again from slot 0.
    Without a memory all images are used: the list is padded to a multiple of mb_size with its first images, then shuffled.
    """
    if n < 1:
        raise ValueError("a batch needs at least one image")
    if m == 0:
        padded = torch.arange(-(-n // mb_size) * mb_size) % n
        return [(new, padded[:0]) for new in padded[torch.randperm(len(padded), generator=rng)].split(mb_size)]
    c = max(1, n // max(1, (n + m) // mb_size))
    r = min(max(0, mb_size - c), m)
    order = torch.randperm(n, generator=rng)
    return [(order[t * c:(t + 1) * c], torch.arange(t * r, (t + 1) * r) % m) for t in range(n // c)]


# ---- Synaptic Intelligence ----

class SynapticIntelligence:
    """The regularization of AR1*: Synaptic Intelligence [SI] as [AR1] uses it, over a list of weights.

    Per weight k: importance F_k = min(-cum_k, max_f), cum_k += c * trajectory_k / ((theta_k - theta_k at the batch's
    start)^2 + xi), trajectory_k = sum over a batch's steps of grad_k * (change of theta_k in that step). The penalty is
    reg_lambda / 2 * sum_k F_k (theta_k - anchor_k)^2, the anchor being the weights at the end of the last batch.

    As published, F_k may fall below 0, without limit: about a quarter of the weights end a batch with a positive
    trajectory (momentum carries them uphill), and the penalty then drives them away from their anchor. min_f=0 ends that.
    """

    def __init__(self, weights, reg_lambda, c=1.0, max_f=1e-3, min_f=-float("inf"), xi=1e-7):
        self.weights, self.reg_lambda, self.c, self.xi = list(weights), reg_lambda, c, xi
        self.min_f, self.max_f = min_f, max_f
        if not all(w.requires_grad for w in self.weights):
            raise ValueError("Synaptic Intelligence takes trainable weights only: leave the frozen ones out")
        clones = lambda: [w.detach().clone() for w in self.weights]
        zeros = lambda: [torch.zeros_like(w) for w in self.weights]
        self.anchor, self.start, self.before = clones(), clones(), clones()
        self.trajectory, self.cum, self.importance = zeros(), zeros(), zeros()

    def penalty(self):
        """The scalar to add to the loss."""
        terms = [(f * (w - a).square()).sum() for w, f, a in zip(self.weights, self.importance, self.anchor)]
        return self.reg_lambda / 2 * sum(terms)

    @torch.no_grad()
    def begin_batch(self):
        for w, start, trajectory in zip(self.weights, self.start, self.trajectory):
            start.copy_(w)
            trajectory.zero_()

    @torch.no_grad()
    def before_step(self):
        for w, before in zip(self.weights, self.before):
            before.copy_(w)

    @torch.no_grad()
    def after_step(self):
        for w, before, trajectory in zip(self.weights, self.before, self.trajectory):
            trajectory += w.grad * (w - before)

    @torch.no_grad()
    def end_batch(self):
        for w, *state in zip(self.weights, self.start, self.trajectory, self.cum, self.importance, self.anchor):
            start, trajectory, cum, importance, anchor = state
            cum += self.c * trajectory / ((w - start).square() + self.xi)
            importance.copy_((-cum).clamp(self.min_f, self.max_f))
            anchor.copy_(w)

    def state_dict(self):
        return {"cum": self.cum, "importance": self.importance, "anchor": self.anchor}

    def load_state_dict(self, state):
        for name, tensors in state.items():
            for mine, theirs in zip(getattr(self, name), tensors, strict=True):
                mine.copy_(theirs)


def trainable_conv_weights(model):
    """The weights that [AR1] regularizes: those of the convolutions that are not frozen; no normalization, no head."""
    return [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.requires_grad]


# ---- a training step ----

class TrainStep:
    """One step of SGD on the layers above the latent one. Returns (loss, correct), scalars that stay on the device.

    graph=True (CUDA only): after a few steps of one shape the step is captured as a CUDA graph, and further steps of
    that shape replay it: the same kernels, without the time that Python takes to launch them one by one.
    """

    WARM_UP = 3     # steps run before the capture, so that gradients, momentum and workspaces exist

    def __init__(self, net, optimizer, si=None, graph=False):
        self.net, self.optimizer, self.si = net, optimizer, si
        self.graph, self.warm = None, 0 if graph else -1

    def __call__(self, x, y):
        """x: latents (N, *latent shape); y: int64 (N,)."""
        if self.warm < 0 or (self.graph is not None and x.shape != self.x.shape):
            return self._step(x, y)
        if self.graph is None:
            if self.warm < self.WARM_UP:
                self.warm += 1
                return self._on_side_stream(x, y)
            self._capture(x, y)
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.loss.clone(), self.correct.clone()

    def _step(self, x, y):
        scores = self.net.classify(x)                                   # (N, classes)
        loss = F.cross_entropy(scores, y)
        total = loss if self.si is None else loss + self.si.penalty()
        self.optimizer.zero_grad()
        total.backward()
        if self.si is not None:
            self.si.before_step()
        self.optimizer.step()
        if self.si is not None:
            self.si.after_step()
        return loss.detach(), (scores.detach().argmax(1) == y).sum()

    def _on_side_stream(self, x, y):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result = self._step(x, y)
        torch.cuda.current_stream().wait_stream(side)
        return result

    def _capture(self, x, y):
        self.x, self.y = x.clone(), y.clone()
        self.graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        with torch.cuda.graph(self.graph):      # records the step, does not run it
            self.loss, self.correct = self._step(self.x, self.y)


# ---- the machine ----

def set_up_kernels(fast, matmul_precision):
    """Settings of this process that training speed depends on.

    matmul_precision: of float32 matrix products, as torch.set_float32_matmul_precision takes it. "highest" multiplies in
    float32; "high" may round the factors to TF32 (10 bits), "medium" to bfloat16 (7 bits), where the device has units
    for that: TF32 on GPUs, bfloat16 on CPUs with AMX or AVX512-BF16. Sums and results are float32 always.
    """
    torch.set_float32_matmul_precision(matmul_precision)
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


# ---- images on the device ----

def preprocess(images, device="cpu"):
    """uint8 RGB images (n, H, W, 3), array or tensor, to normalized float32 (n, 3, H, W), channels last in memory."""
    x = torch.as_tensor(images).to(device, non_blocking=True).permute(0, 3, 1, 2).to(torch.float32)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return x.div_(255).sub_(mean).div_(std)


def memory_format(x):
    """The memory format to allocate like x in: channels last for images and maps that are so, else contiguous."""
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


class Encoder:
    """Images to latents. Frozen layers give the same latents for ever, so each image needs to pass them only once.

    fast=True: `encoder(images)` is a tensor of latents, made once through a copy of lat_features whose normalizations
    are folded into its convolutions, if lat_features is frozen and the tensor fits into max_bytes. Otherwise, and
    always with fast=False, it is a LazyLatents, which encodes what is asked for each time it is asked. The copy's
    convolutions are plain ones: on a CPU, latents are exact to float32 whatever the precision of matrix products.
    """

    CHUNK = {"cpu": 16, "cuda": 256}    # images encoded at a time; on a CPU the maps of 16 still fit into its caches
    LAZY_CHUNK = {"cpu": 16, "cuda": 32}        # the same where a mini-batch asks for its few images

    def __init__(self, net, device, fast=True, max_bytes=4 << 30):
        self.net, self.device, self.max_bytes = net, torch.device(device), max_bytes
        self.frozen = net.frozen_layer_num >= net.latent_layer_num
        self.folded = fold_brn(net.lat_features).to(memory_format=torch.channels_last) if fast and self.frozen else None
        self.chunk, self.lazy_chunk = (sizes.get(self.device.type, 64) for sizes in (self.CHUNK, self.LAZY_CHUNK))

    def __call__(self, images):
        """images: uint8 (n, H, W, 3), n > 0. Returns something of length n that an int64 tensor or a slice indexes."""
        if self.folded is None:
            return LazyLatents(images, self.net.lat_features, self.device)
        first = self._encode_chunk(images[:self.chunk], self.chunk)
        if first[0].numel() * first.element_size() * len(images) > self.max_bytes:
            return LazyLatents(images, lambda part: self._encode(part, self.lazy_chunk), self.device, raw=True)
        return self._encode(images, self.chunk, first)

    def _encode(self, images, chunk, first=None):
        """Latents of n images; `first`: those of the first chunk, where they are known."""
        first = self._encode_chunk(images[:chunk], chunk) if first is None else first
        latents = torch.empty((len(images), *first.shape[1:]), device=self.device, memory_format=memory_format(first))
        latents[:chunk] = first
        for k in range(chunk, len(images), chunk):
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


@torch.no_grad()
def evaluate(model, inputs, labels, chunk=None):
    """{"accuracy": 0..1, "loss": mean cross-entropy, "per_class": accuracies (NaN: none in the set), "confusion": int64
    (true, predicted)}.

    model: a module or a method of one (net.classify), mapping inputs[a:b] to scores; inputs: whatever slices give it;
    labels: int64 (n,), n > 0, on the device; chunk: how many of them at a time. Runs in evaluation mode, and leaves the
    mode as it was.
    """
    if len(labels) == 0:
        raise ValueError("there is nothing to evaluate: the set is empty")
    chunk = chunk or (128 if labels.device.type == "cpu" else 512)
    module = getattr(model, "__self__", model)
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        confusion, loss = None, 0.0
        for k in range(0, len(labels), chunk):
            scores, y = model(inputs[k:k + chunk]), labels[k:k + chunk]
            loss = loss + F.cross_entropy(scores, y, reduction="sum").double()
            classes = scores.shape[1]
            counts = torch.bincount(y * classes + scores.argmax(1), minlength=classes ** 2).view(classes, classes)
            confusion = counts if confusion is None else confusion + counts
    finally:
        for m, mode in modes:
            m.training = mode
    right, total = confusion.diagonal().double(), confusion.sum(1)
    return {"accuracy": (right.sum() / total.sum()).item(), "loss": (loss / len(labels)).item(),
            "per_class": (right / total).tolist(), "confusion": confusion.cpu()}


# ---- what a run leaves behind ----

class CheckpointError(Exception):
    """A run folder that cannot be used: in use by another process, not writable, or its checkpoint does not fit."""
    exit_status = 2


class RunFailure(CheckpointError):
    """A run that cannot go on although its settings fit: the disk is full, its results are no numbers any more."""
    exit_status = 1


class RunFolder:
    """LOGDIR/EXPERIMENT/run{R}_seed{S}/: config.yaml, results.jsonl, TensorBoard events, checkpoint.pt.

    The checkpoint holds the records of all batches so far ("rows") and the lengths of the TensorBoard files. Opening the
    folder writes results.jsonl anew and cuts the others back: what a killed process wrote after its last checkpoint is
    gone, and is written again; what was lost of results.jsonl comes back.
    """

    def __init__(self, path, config, fresh=False):
        self.path, self.config = Path(path), config
        self.save_seconds, self.saved_at = None, time.monotonic()
        with self._disk():
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            self.state = None if fresh else self._load()
            self._cut_back()
            (self.path / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
            self.results = open(self.path / "results.jsonl", "a", encoding="utf-8")
            self.board = SummaryWriter(self.path, max_queue=1000)     # nobody waits for its thread
            if self.state is None:
                self.board.add_text("parameters", "\n".join(f"    {k}: {v}" for k, v in asdict(config).items()))

    @contextmanager
    def _disk(self):
        """Turns an OSError inside into one of the two errors above."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise RunFailure(f"cannot write into {self.path} ({error.strerror}): the last checkpoint is kept; make room "
                                 "on the disk and run the same command again") from error
            raise CheckpointError(f"cannot use {self.path} ({error.strerror}): free it or choose another folder with "
                                  "--log-dir DIR") from error

    def _lock(self):
        self.lock = open(self.path / "run.lock", "w")
        if fcntl is not None:       # the system lets go of it when the process ends, however it ends
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"another process is running in {self.path}: wait for it, or choose another "
                                      "--seed, --run or --log-dir") from None

    def _load(self):
        path, results = self.path / "checkpoint.pt", self.path / "results.jsonl"
        if not path.exists():
            # a single line may come from a run that was killed just before its first checkpoint
            if results.is_file() and results.read_bytes().count(b"\n") > 1:
                raise CheckpointError(f"{self.path} holds results but no checkpoint.pt to continue from: choose another "
                                      "--log-dir, or delete the results and start over with --fresh")
            return None
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:       # torch.load does not look at the check sums
                    raise ValueError("wrong check sum")
            state = torch.load(path, map_location="cpu", weights_only=True)
            theirs, mine, _ = state["config"], asdict(self.config), (state["rows"], state["files"])
            changed = [k for k in mine if k not in Config.FREE and theirs.get(k) != mine[k]]
        except (MemoryError, PermissionError):
            raise
        except Exception as error:      # a damaged file can raise nearly anything: zlib.error, KeyError, AttributeError, ...
            raise CheckpointError(f"{path} is damaged and cannot be continued from: start over with --fresh") from error
        if changed:
            what = ", ".join(f"{k} (then {theirs.get(k)!r}, now {mine[k]!r})" for k in changed)
            raise CheckpointError(f"{path} was made with other settings: {what}; put them back, choose another "
                                  "--log-dir, or start over with --fresh")
        return state

    def _cut_back(self):
        (self.path / "checkpoint.pt.tmp").unlink(missing_ok=True)
        if self.state is None:
            (self.path / "checkpoint.pt").unlink(missing_ok=True)
        rows, lengths = (self.state["rows"], self.state["files"]) if self.state else ([], {})
        temporary = self.path / "results.jsonl.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, self.path / "results.jsonl")
        for file in self._events():
            if file.name not in lengths:
                file.unlink()
            elif file.stat().st_size > lengths[file.name]:
                os.truncate(file, lengths[file.name])

    def _events(self):
        return self.path.glob("events.out.tfevents.*")

    def write_row(self, row):
        """Appends one line to results.jsonl."""
        try:
            line = json.dumps(row, allow_nan=False)
        except ValueError as error:
            raise RunFailure(f"the results of batch {row.get('batch')} are no finite numbers any more: the last checkpoint "
                             "is kept; lower the learning rates and start over with --fresh") from error
        with self._disk():
            self.results.write(line + "\n")
            self.results.flush()

    def save(self, state, force=False):
        """Replaces checkpoint.pt atomically, if saving so far has cost less than checkpoint_share of the time, or force.

        state: what load gets back as `self.state`; tensors, numbers, strings, lists and dicts, with the records as "rows".
        """
        now = time.monotonic()
        if not force and self.save_seconds and self.save_seconds > self.config.checkpoint_share * (now - self.saved_at):
            return
        temporary = self.path / "checkpoint.pt.tmp"
        try:
            with self._disk():
                self.board.flush()
                files = {file.name: file.stat().st_size for file in self._events()}
                with open(temporary, "wb") as file:
                    try:
                        torch.save({**state, "config": asdict(self.config), "files": files}, file)
                    except RuntimeError as error:       # torch's word for a write that failed
                        raise error.__context__ if isinstance(error.__context__, OSError) else error
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path / "checkpoint.pt")
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - now

    def close(self):
        for file in (self.board, self.results, self.lock):
            with suppress(OSError):     # whatever the last checkpoint does not count is written again
                file.close()
