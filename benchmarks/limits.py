"""For speed.py: how close to the machine's limit each part of a batch comes, and where its time goes.

The limit of a part is the larger of two times: its operations at the rate of a large matrix product, and the
bytes that its operators read and write at the rate of a large copy. Both rates are measured on the device.
"""
import statistics
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ar1star_lat_replay import train_step
from harness.console import say
from harness.encoder import set_up_kernels


class Part(NamedTuple):
    """A part of a batch's work."""
    name: str
    title: str
    precision: str      # of its matrix products, as set_up_kernels takes it
    operations: int
    work: Callable      # what is timed
    plain: Callable     # the same without a CUDA graph, inside which operators cannot be counted


# ---- what there is to do ----

class Bytes(TorchDispatchMode):
    """Counts in `total` the bytes that operators move if each reads inputs and writes outputs once."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.total += sum(t.numel() * t.element_size() for t in tensors)
        return out


def bytes_moved(work):
    """Bytes that work() moves, as Bytes counts them."""
    with Bytes() as counted:
        work()
    return counted.total


def operations(modules, work):
    """[operations of each convolution and linear layer of the modules, as they run in work()]."""
    counted = []

    def count(layer, inputs, output):
        counted.append(2 * output.numel() * layer.weight[0].numel())

    layers = [m for module in modules for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    work()
    for hook in hooks:
        hook.remove()
    return counted


def parts_of_a_batch(program, images):
    """[Part, ...] of a speed.Ours that has learned; images: uint8 (n, H, W, 3), what it encodes."""
    learner = program.learner
    net = learner.net.train()
    encoder = learner.encoder
    precision = program.config.matmul_precision
    trained = (net.end_features, net.output)

    x = learner.memory.x[:learner.mb_size].clone(memory_format=torch.preserve_format)
    y = torch.zeros(len(x), dtype=torch.int64, device=learner.device)
    plain_step = lambda: train_step(net, learner.optimizer, learner.si, x, y)
    encode = lambda: encoder(images)

    encoding = sum(operations([encoder.folded], encode))
    forward = operations(trained, lambda: net.classify(x))
    # gradients by weights and by inputs cost as much again, each; the latents themselves need none
    step = 3 * sum(forward) - forward[0]
    testing = sum(operations(trained, program.test))

    exact = "highest" if learner.device.type == "cpu" else precision    # a CPU rounds nothing in encoding
    n_test = len(program.test_set.labels)
    return [
        Part("encoding", f"encoding of {len(images)} images", exact, encoding, encode, encode),
        Part("step", "training step", precision, step, lambda: learner.step(x, y), plain_step),
        Part("test", f"test of {n_test} images", precision, testing, program.test, program.test),
    ]


# ---- what the device can do ----

def median_seconds(work, device, repeats=5):
    """Median wall-clock seconds of work(), which may leave some on the device; two more calls warm up."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def product_rate(device, precision):
    """Operations a second of a large product of float32 matrices; precision: as set_up_kernels takes it."""
    set_up_kernels(True, precision)
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device)
    return 2 * side ** 3 / median_seconds(lambda: a @ b, device)


def copy_rate(device):
    """Bytes a second, read and written, of copying a large tensor."""
    big = torch.randn(2 ** (28 if device.type == "cuda" else 26), device=device)
    target = torch.empty_like(big)
    return 2 * big.numel() * 4 / median_seconds(lambda: target.copy_(big), device)


def print_limits(program, device, images):
    """Of each part: operations, bytes, what the device can do, and what fraction of the limit is reached.

    program, images: as parts_of_a_batch takes them.
    """
    asked = program.config.matmul_precision
    say(f"measuring the limits of the device, {asked}")
    parts = parts_of_a_batch(program, images)
    copied = copy_rate(device)
    rates = {precision: product_rate(device, precision) for precision in {part.precision for part in parts}}

    program.set_up()
    for part in parts:
        say(f"timing, {asked}: {part.title}")
        moved = bytes_moved(part.plain)
        seconds = median_seconds(part.work, device)
        rate = rates[part.precision]
        by_products = part.operations / rate
        by_copies = moved / copied
        print(f"\n{part.title}: {part.operations / 1e9:.1f} GFLOP, {moved / 1e9:.2f} GB moved if each "
              "operator reads and writes once")
        print(f"ceilings: matrix product, {part.precision} {rate / 1e9:,.0f} GFLOP/s; copy "
              f"{copied / 1e9:,.0f} GB/s (read + written)")
        print(f"{part.name}, {asked}: {seconds * 1e3:.1f} ms; the larger of operations / product rate "
              f"({by_products * 1e3:.1f} ms) and bytes / copy rate ({by_copies * 1e3:.1f} ms) is "
              f"{max(by_products, by_copies) / seconds:.0%} of it")


# ---- where the time goes ----

def print_profile(program, device, images, labels):
    """Of a batch and the test after it: the ten kernels (on a CPU, operators) that take the longest.

    program: speed.Ours after it has learned a batch of as many images.
    """
    say(f"profiling a batch, {program.config.matmul_precision}")
    program.set_up()
    warnings.filterwarnings("ignore", ".*clears events at the end of each cycle")       # there is one
    profile_part("training on", lambda: program.learn(images, labels), device)
    profile_part("test after", program.test, device)


def profile_part(title, work, device):
    """Prints the kernels of work(), which runs twice: what the first run sets up is not counted."""
    cuda = device.type == "cuda"
    work()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start

    kernels = profiled.key_averages()
    milliseconds = lambda k: (k.self_device_time_total if cuda else k.self_cpu_time_total) / 1e3
    busy = sum(map(milliseconds, kernels))
    number = sum(k.count for k in kernels)
    print(f"\n{title} a batch: {1e3 * seconds:.1f} ms; {number:,} {'kernels' if cuda else 'operators'}: "
          f"{busy:.1f} ms")
    for k in sorted(kernels, key=milliseconds, reverse=True)[:10]:
        print(f"{milliseconds(k):9.2f} ms{k.count:7} times  {k.key:.95}")
