"""How close to the machine's limit each part of a batch comes: encoding, a training step, the test; and where its time goes.

The limit of a part is the larger of two times: its operations at the rate of a large matrix product, and the bytes that its
operators read and write at the rate of a large copy. Both rates are measured on the device itself.
"""
import statistics
import time
import warnings

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ar1star_lat_replay import train_step
from lab.fast import set_up_kernels
from lab.record import Clock, say


class Bytes(TorchDispatchMode):
    """Counts the bytes that operators read and write if each reads its inputs and writes its outputs once; no views."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if not func.is_view:
            self.total += sum(t.numel() * t.element_size() for t in tree_leaves((args, kwargs, out))
                              if isinstance(t, torch.Tensor))
        return out


def operations(modules, call):
    """Operations of each convolution and linear layer of `modules` in call(), which runs them forward; in order."""
    counted = []

    def count(module, inputs, output):
        counted.append(2 * output.numel() * module.weight[0].numel())

    hooks = [m.register_forward_hook(count) for part in modules for m in part.modules()
             if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    call()
    for hook in hooks:
        hook.remove()
    return counted


def bytes_moved(call):
    """Bytes that call() moves, as Bytes counts them."""
    with Bytes() as counted:
        call()
    return counted.total


def median_seconds(f, device, repeats=7):
    """Median wall-clock seconds of f(), which may leave work on the device."""
    seconds = []
    for k in range(repeats + 2):
        start = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if k >= 2:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def product_rate(device, precision):
    """Operations a second of a large product of float32 matrices, at a precision as set_up_kernels takes it."""
    set_up_kernels(True, precision)
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device)
    return 2 * side ** 3 / median_seconds(lambda: a @ b, device)


def copy_rate(device):
    """Bytes a second, read and written, of copying a large tensor."""
    big = torch.randn(2 ** (28 if device.type == "cuda" else 26), device=device)
    target = torch.empty_like(big)
    return 2 * big.numel() * 4 / median_seconds(lambda: target.copy_(big), device)


def parts_of_a_batch(program, images):
    """[(title, name, precision of its products, operations, call to count bytes in, call to time, repeats), ...]"""
    learner, test, precision = program.learner, program.test_set, program.config.matmul_precision
    net, encoder, mb_size = learner.net, learner.encoder, program.config.mb_size
    exact = "highest" if learner.device.type == "cpu" else precision    # an encoder's convolutions round nothing on a CPU
    net.train()
    x = learner.memory.x[:mb_size].clone(memory_format=torch.preserve_format)
    y = torch.zeros(len(x), dtype=torch.int64, device=learner.device)
    step = lambda: train_step(net, learner.optimizer, learner.si, x, y)
    trained = (net.end_features, net.output)
    encode, evaluate = (lambda: encoder(images)), (lambda: test(learner))
    forward = operations(trained, lambda: net.classify(x))      # gradients by weight and by input cost as much again, each;
    trains = 3 * sum(forward) - forward[0]                      # the latents themselves need none
    return [(f"encoding of {len(images)} images", "encoding", exact, sum(operations([encoder.folded], encode)), encode,
             encode, 3),
            ("training step", "step", precision, trains, step, lambda: learner.step(x, y), 7),
            (f"test of {len(test.labels)} images", "test", precision, sum(operations(trained, evaluate)), evaluate, evaluate,
             3)]


def print_limits(program, device, images):
    """Of each part of a batch: operations and bytes, the device's measured ceilings, and the fraction of the limit reached.

    program: speed.Ours after it has learned; images: what it encodes.
    """
    asked = program.config.matmul_precision
    say(f"measuring the limits of the device, {asked}")
    parts, copied = parts_of_a_batch(program, images), copy_rate(device)
    rates = {precision: product_rate(device, precision) for precision in {part[2] for part in parts}}
    program.set_up()
    for title, name, precision, operated, counted, timed, repeats in parts:
        say(f"timing, {asked}: {title}")
        moved, seconds, rate = bytes_moved(counted), median_seconds(timed, device, repeats), rates[precision]
        limit = max(operated / rate, moved / copied)
        print(f"\n{title}: {operated / 1e9:.1f} GFLOP, {moved / 1e9:.2f} GB moved if each operator reads and writes once")
        print(f"ceilings: matrix product, {precision} {rate / 1e9:,.0f} GFLOP/s; copy {copied / 1e9:,.0f} GB/s "
              "(read + written)")
        print(f"{name}, {asked}: {seconds * 1e3:.1f} ms; the larger of operations / product rate "
              f"({operated / rate * 1e3:.1f} ms) and bytes / copy rate ({moved / copied * 1e3:.1f} ms) is "
              f"{limit / seconds:.0%} of it")


def print_profile(program, device, images, labels):
    """Of one batch and the test after it: the kernels (on a CPU, operators) that take the longest, and the sum of all.

    program: speed.Ours after it has learned a batch of as many images.
    """
    cuda = device.type == "cuda"
    say(f"profiling a batch, {program.config.matmul_precision}")
    program.set_up()
    warnings.filterwarnings("ignore", ".*clears events at the end of each cycle")       # there is one
    for part, run in (("training on", lambda: program.learn(None, images, labels, Clock(device))),
                      ("test after", lambda: program.test(None, None))):
        run()
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
            start = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        kernels = profiled.key_averages()
        taken = (lambda k: k.self_device_time_total / 1e3) if cuda else (lambda k: k.self_cpu_time_total / 1e3)
        busy, number = sum(map(taken, kernels)), sum(k.count for k in kernels)
        print(f"\n{part} a batch: {1e3 * seconds:.1f} ms; {number:,} {'kernels' if cuda else 'operators'}: {busy:.1f} ms")
        for k in sorted(kernels, key=taken, reverse=True)[:10]:
            print(f"{taken(k):9.2f} ms{k.count:7} times  {k.key:.95}")
