"""What makes an experiment fast, each against the plain computation that it stands for."""
import contextlib
import copy
import platform
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import lab.fast
from ar1star_lat_replay import train_step
from helpers import REPO, Operators, rand, random_images, seeded
from lab.fast import CapturedStep, Encoder, LazyLatents, set_up_kernels
from models.batch_renorm import BatchRenorm2D, set_brn_params
from models.mobilenet import MobileNetV1, PointwiseConv2d
from models.split_net import SplitNet
from utils import SynapticIntelligence, evaluate, preprocess, trainable_conv_weights

# ---- the machine ----

@pytest.mark.parametrize("precision, tf32", [("highest", False), ("high", True), ("medium", True), ("low", True)])
def test_the_precision_of_products_holds_for_matrices_and_convolutions(precision, tf32):
    set_up_kernels(True, precision)
    assert torch.get_float32_matmul_precision() == ("medium" if precision == "low" else precision)
    assert PointwiseConv2d.bfloat16 == (precision == "low")
    assert torch.backends.cudnn.allow_tf32 == tf32
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_in_bfloat16_rounds_factors_and_results_and_nothing_else(bias, monkeypatch):
    """Values and gradients: of factors rounded by hand, in float64, to half a step of bfloat16 results."""
    monkeypatch.setattr(PointwiseConv2d, "bfloat16", True)
    rounded = lambda t: t.detach().bfloat16().double()
    conv = PointwiseConv2d(300, 7, 1, bias=bias)
    x = rand(3, 300, 2, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y, dy = conv(x), rand(3, 7, 2, 4, seed=1)
    assert y.dtype == torch.float32 and y.is_contiguous(memory_format=torch.channels_last)
    mine = [y - conv.bias[:, None, None] if bias else y, *torch.autograd.grad(y, (x, conv.weight), dy)]
    w = rounded(conv.weight)[:, :, 0, 0]
    expected = [torch.einsum("oi,nihw->nohw", w, rounded(x)), torch.einsum("oi,nohw->nihw", w, rounded(dy)),
                torch.einsum("nohw,nihw->oi", rounded(dy), rounded(x))[:, :, None, None]]
    for one, other in zip(mine, expected, strict=True):
        assert ((one - other).abs() <= other.abs() / 256 + 1e-5).all()
        assert (one - other).abs().max() > 1e-4         # it does round
    assert torch.equal(conv(x.detach()), y) and torch.autograd.grad(conv(x.detach()).sum(), conv.weight)[0].isfinite().all()
    assert conv.double()(x.detach().double()).dtype == torch.float64        # other types are left alone


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_memory_that_tensors_give_up_is_used_again():
    """glibc takes the thresholds, and blocks that are taken and given up again and again cause no page faults any more."""
    program = """
import ctypes, resource, torch, lab.fast
answers, library = [], ctypes.CDLL(None)
class Spy:
    def __init__(self, name): pass
    def mallopt(self, *setting):
        answers.append((*setting, library.mallopt(*setting)))
lab.fast.ctypes.CDLL = Spy
lab.fast.set_up_kernels(True, "highest")
assert answers == [(-3, 32 << 20, 1), (-1, 2**31 - 1, 1)], answers      # 1: accepted
def use():
    blocks = [torch.zeros(4 << 20) for _ in range(12)]      # 16 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults = [use() for _ in range(32)]
assert faults[-1] - faults[-20] < 12 * 4096, faults         # the pages of one round's blocks, in twenty rounds
lab.fast.set_up_kernels(False, "highest")
assert answers[2:] == [(-3, 32 << 20, 1), (-1, 64 << 20, 1)], answers
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- latents ----

def encoding_net(latent=13, frozen=13):
    torch.manual_seed(0)
    net = MobileNetV1(5, latent, width=0.125)
    for i, m in enumerate(m for m in net.modules() if isinstance(m, BatchRenorm2D)):
        m.load_state_dict({**m.state_dict(), "running_mean": 0.2 * torch.randn(m.num_features, generator=seeded(i)),
                           "running_std": 0.5 + torch.rand(m.num_features, generator=seeded(i)),
                           "weight": 1 + 0.3 * torch.randn(m.num_features, generator=seeded(i + 99))})
    net.freeze_below(frozen)
    return net.train()


@torch.no_grad()
def latents_one_by_one(net, images):
    lat = copy.deepcopy(net).eval().lat_features
    return torch.cat([lat(preprocess(image[None])) for image in images])


@pytest.mark.parametrize("latent", [-1, 0, 13, 27])
def test_encoder_equals_the_frozen_layers_in_evaluation(latent):
    net, images = encoding_net(latent, latent), random_images(21, 32, 48)
    expected = latents_one_by_one(net, images)
    for fast in (True, False):
        encoder = Encoder(net, "cpu", fast=fast)
        latents = encoder(images)
        assert encoder.frozen and isinstance(latents, torch.Tensor if fast else LazyLatents) and len(latents) == 21
        torch.testing.assert_close(latents[:], expected, rtol=1e-4, atol=1e-4 * max(1, expected.abs().max().item()))
    assert net.training and expected.std() > 1e-2


@pytest.mark.parametrize("n", [1, 15, 16, 17, 40])
def test_encoder_gives_the_same_in_any_chunks_and_on_demand(n):
    """Chunks, slices and index tensors, and max_bytes: one byte less than the latents take makes them lazy."""
    net, images = encoding_net(), random_images(n, 32, 32)
    encoder = Encoder(net, "cpu")
    latents = encoder(images)
    assert isinstance(latents, torch.Tensor) and latents.shape == (n, 64, 2, 2) and not latents.requires_grad
    assert latents.is_contiguous(memory_format=torch.channels_last)
    size = n * 64 * 2 * 2 * 4
    assert isinstance(Encoder(net, "cpu", max_bytes=size)(images), torch.Tensor)
    lazy = Encoder(net, "cpu", max_bytes=size - 1)(images)
    assert isinstance(lazy, LazyLatents) and len(lazy) == n
    rng = np.random.default_rng(n)
    for index in (slice(None), slice(n // 2, n), slice(0, 1), torch.tensor(rng.integers(0, n, 7))):
        torch.testing.assert_close(lazy[index], latents[index], rtol=1e-4, atol=1e-5)
    encoder.chunk = 7
    torch.testing.assert_close(encoder(images), latents, rtol=1e-4, atol=1e-5)


def test_a_latent_is_the_same_bits_beside_any_others_and_whatever_the_precision_of_products():
    """On one thread torch convolves fewer than 16 images in another way, unless products may be rounded."""
    torch.manual_seed(0)
    net, images = MobileNetV1(5, "conv5_4/dw").eval(), random_images(35, 64, 64)
    net.freeze_below("conv5_4/dw")
    encoder = Encoder(net, "cpu")
    whole = encoder(images)
    lazy = Encoder(net, "cpu", max_bytes=1)(images)
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        for n in (1, 3, 15, 16, 17, 35):
            assert torch.equal(encoder(images[:n]), whole[:n])
            assert torch.equal(lazy[35 - n:], whole[35 - n:])


def test_encoder_of_layers_that_train_follows_them_and_passes_gradients():
    net, images = encoding_net(latent=3, frozen=1), random_images(4, 32, 32)
    encoder = Encoder(net, "cpu")
    assert not encoder.frozen
    latents = encoder(images)
    net.eval()
    first = latents[:2]
    first.sum().backward()
    assert net.layers[2][0].weight.grad.abs().sum() > 0 and net.layers[1][0].weight.grad is None
    with torch.no_grad():
        net.layers[2][0].weight.mul_(0.5)
    torch.testing.assert_close(latents[:2], latents_one_by_one(net, images[:2]), rtol=1e-4, atol=1e-5)
    assert not torch.equal(latents[:2], first)


# ---- the test ----

class CountingEncoder(Encoder):
    """An encoder that counts how often it is asked."""
    calls = 0

    def __call__(self, images):
        self.calls += 1
        return super().__call__(images)


def test_the_test_set_is_encoded_once_per_encoder_and_evaluated_as_latents_computed_directly():
    """The head learns between the tests; the frozen layers become others together with the encoder."""
    net, images, labels = encoding_net(), random_images(37, 32, 32), np.arange(37) % 5
    test = lab.fast.TestSet(images, labels)
    learner = SimpleNamespace(net=net, classify=net.classify, device=torch.device("cpu"))
    losses, encoders = [], []
    for _ in range(2):
        learner.encoder = CountingEncoder(net, "cpu")
        encoders.append(learner.encoder)
        for _ in range(3):
            expected = evaluate(net.classify, latents_one_by_one(net, images), torch.tensor(labels))
            result = test(learner)
            assert result.keys() == expected.keys() and torch.equal(result["confusion"], expected["confusion"])
            for key in ("accuracy", "loss", "per_class"):
                assert result[key] == pytest.approx(expected[key], rel=1e-4), key
            losses.append(result["loss"])
            with torch.no_grad():
                net.output.weight.add_(0.1 * torch.randn(net.output.weight.shape, generator=seeded(len(losses))))
        assert [encoder.calls for encoder in encoders] == [1] * len(encoders)
        with torch.no_grad():
            net.layers[3][0].weight.mul_(2)
    assert len({round(loss, 3) for loss in losses}) == 6       # neither the head nor the frozen layers were a stale copy


# ---- section 4: a training step ----

def tiny_net():
    torch.manual_seed(0)
    layers = {"low": nn.Flatten(), "mid": nn.Linear(6, 4), "top": nn.Tanh()}
    net = SplitNet(layers, 4, 3, "low").double()
    net.freeze_below("low")
    return net


@pytest.mark.parametrize("with_si", [False, True])
def test_train_step_equals_sgd_by_hand(with_si):
    """Two steps: g = gradient + l2 * w, v = momentum * v + g, w -= lr * v; the gradients from numpy's chain rule."""
    net, lr, momentum, l2 = tiny_net(), 0.1, 0.9, 0.01
    si = SynapticIntelligence([net.layers[1].weight], 0.5) if with_si else SynapticIntelligence([], 0.0)
    w, b, v = (p.detach().numpy().copy() for p in (net.layers[1].weight, net.layers[1].bias, net.output.weight))
    velocity, importance, trajectory = [0.0, 0.0, 0.0], np.zeros_like(w), np.zeros_like(w)
    if with_si:
        importance = np.linspace(0.1, 2, w.size).reshape(w.shape)
        si.importance[0].copy_(torch.tensor(importance))
        si.anchor[0].copy_(torch.tensor(w - 0.3))
        anchor = w - 0.3
        si.begin_batch()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr, momentum, weight_decay=l2)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(5, 6)), rng.integers(0, 3, 5)
        loss, correct = train_step(net, optimizer, si, torch.tensor(x), torch.tensor(y))
        h = np.tanh(x @ w.T + b)
        scores = h @ v.T
        p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        assert loss.item() == pytest.approx(-np.log(p[np.arange(5), y]).mean())       # without the penalty
        assert correct.item() == sum(int(np.argmax(row)) == label for row, label in zip(scores, y))
        d_scores = (p - np.eye(3)[y]) / 5
        d_z = (d_scores @ v) * (1 - h ** 2)
        gradients = [d_z.T @ x, d_z.sum(0), d_scores.T @ h]
        if with_si:
            gradients[0] = gradients[0] + 0.5 * importance * (w - anchor)
        velocity = [momentum * u + g + l2 * q for u, g, q in zip(velocity, gradients, (w, b, v))]
        trajectory = trajectory + gradients[0] * -lr * velocity[0]
        w, b, v = (q - lr * u for q, u in zip((w, b, v), velocity))
        for mine, theirs in zip((net.layers[1].weight, net.layers[1].bias, net.output.weight), (w, b, v)):
            np.testing.assert_allclose(mine.detach(), theirs, rtol=1e-10)
    if with_si:
        np.testing.assert_allclose(si.trajectory[0], trajectory, rtol=1e-9)


# ---- a step as a CUDA graph, with stand-ins for CUDA: the order of warm-up, capture and replay ----

class FakeCuda:
    """Streams that do nothing, and a graph whose capture leaves no trace (as a real one runs nothing) and whose replay runs
    the step on the captured tensors."""

    def __init__(self, net, captured):
        self.net, self.captured, self.captures, self.replays, self.device, self.streams = net, captured, 0, 0, None, 0

    def install(self, monkeypatch):
        def made(new):
            assert self.device is not None, "a stream on whatever device is current"
            self.streams += new
            return SimpleNamespace(wait_stream=lambda _: None)

        monkeypatch.setattr(torch.cuda, "Stream", lambda: made(1))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: made(0))
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(torch.cuda, "device", self.on)

    @contextlib.contextmanager
    def on(self, device):
        """The device that is current inside; every call of CUDA above belongs into it."""
        self.device = device
        yield
        self.device = None

    @contextlib.contextmanager
    def capture(self, graph):
        assert self.device is not None, "a capture on whatever device is current"
        state = self.captured._copied_state()
        yield
        self.captures += 1
        self.captured._restore(state)

    def replay(self):
        assert self.device is not None, "a replay on whatever device is current"
        self.replays += 1
        loss, correct = self.captured.step(self.captured.x, self.captured.y)
        self.captured.loss.copy_(loss)
        self.captured.correct.copy_(correct)


def small_net_and_step():
    torch.manual_seed(0)
    net = MobileNetV1(5, "conv6/dw", width=0.05)
    net.freeze_below("conv6/dw")
    net.train()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.01, 0.9, weight_decay=5e-4)
    si = SynapticIntelligence(trainable_conv_weights(net), 0.5)
    return net, optimizer, CapturedStep(partial(train_step, net, optimizer, si), optimizer, net, si)


def some_latents(net, n):
    channels = net.lat_features(torch.zeros(1, 3, 32, 32)).shape[1]
    return torch.rand(n, channels, 2, 2, generator=seeded(n)).to(memory_format=torch.channels_last)


def steps_of_both(monkeypatch, fake=FakeCuda, change=None):
    """Twelve steps, the ninth of another size, ordinary ones beside those of a CapturedStep: they must be equal. change:
    called before the seventh step with the network and the optimizer of either. Returns the FakeCuda."""
    (net, optimizer, ordinary), (graphed_net, graphed_optimizer, graphed) = small_net_and_step(), small_net_and_step()
    fake = fake(graphed_net, graphed)
    fake.install(monkeypatch)
    latents, labels = some_latents(net, 20), torch.arange(20) % 5
    for k in range(12):
        if change and k == 6:
            change(net, optimizer)
            change(graphed_net, graphed_optimizer)
        new, old = torch.randint(0, 12, (3,)), torch.randint(12, 20, (3 if k == 8 else 5,))
        x, y = lab.fast.gather(graphed, (latents, labels, new), (latents, labels, old))
        assert torch.equal(x, latents[torch.cat((new, old))]) and torch.equal(y, labels[torch.cat((new, old))])
        one, other = ordinary.step(x.clone(), y.clone()), graphed(x, y)
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    for key, value in net.state_dict().items():
        assert torch.equal(value, graphed_net.state_dict()[key]), key
    return fake


def test_graph_replays_are_the_steps_that_would_have_been_run(monkeypatch, capsys):
    fake = steps_of_both(monkeypatch)
    assert (fake.captures, fake.replays) == (1, 12 - CapturedStep.WARM_UP - 1) and capsys.readouterr().err == ""
    assert fake.streams == 1        # for all warm-up steps


class Encoding:
    """Latents that are computed when they are asked for, as those of a compressed memory are."""

    def __init__(self, latents):
        self.latents = latents

    def __getitem__(self, index):
        return self.latents[index]


def test_mini_batches_are_written_straight_into_the_input_of_a_graph(monkeypatch):
    """Without a tensor in between, channels last as they are; where latents have no place in memory, with one."""
    net, _, graphed = small_net_and_step()
    FakeCuda(net, graphed).install(monkeypatch)
    latents, memory, labels = some_latents(net, 20), some_latents(net, 30), torch.arange(30) % 5
    new, old = torch.tensor([19, 0, 7]), torch.tensor([29, 2, 2, 0, 11])
    expected = torch.cat((latents[new], memory[old])), torch.cat((labels[new], labels[old]))

    def gathered(*parts):
        with Operators() as ran:
            return lab.fast.gather(graphed, *parts), ran.names

    for _ in range(CapturedStep.WARM_UP + 1):
        (x, y), names = gathered((latents, labels, new), (memory, labels, old))
        assert torch.equal(x, expected[0]) and torch.equal(y, expected[1]) and names.count("cat") == 2
        graphed(x, y)
    straight, copied = ["index_select"] * 2, ["index", "copy_", "index_select"]
    for kind, written in ((lambda x: x, 2 * straight), (Encoding, straight + copied), (torch.Tensor.contiguous, 2 * copied)):
        graphed.x.zero_()
        graphed.y.zero_()
        (x, y), names = gathered((latents if kind is Encoding else kind(latents), labels, new), (kind(memory), labels, old))
        assert x is graphed.x and y is graphed.y and x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])
        assert names == written
        with Operators() as ran:
            graphed(x, y)
        assert "index_select" not in ran.names
    (x, y), _ = gathered((latents, labels, new), (memory, labels, old[:0]))
    assert x is not graphed.x and torch.equal(x, expected[0][:3]) and torch.equal(y, expected[1][:3])
    (x, y), _ = gathered((latents, labels, new[:0]), (memory, labels, torch.cat((old, new))))
    assert x is graphed.x and torch.equal(x, memory[torch.cat((old, new))])


@pytest.mark.parametrize("change", [
    lambda net, optimizer: optimizer.param_groups[0].update(lr=.02),
    lambda net, optimizer: set_brn_params(net.end_features, momentum=.3)], ids=["learning rate", "BRN momentum"])
def test_what_a_capture_holds_fast_may_change(monkeypatch, change):
    fake = steps_of_both(monkeypatch, change=change)
    assert fake.captures == 2 and fake.replays == 3 + 3      # steps 3 to 5; 6 to 8 warm up anew; 9 to 11


@pytest.mark.parametrize("lie", ["loss", "weights", "nothing"])
def test_a_graph_that_lies_is_found_and_not_used(monkeypatch, capsys, lie):
    class Lying(FakeCuda):
        def replay(self):
            before = copy.deepcopy(self.net.state_dict())
            if lie != "nothing":
                super().replay()
            if lie == "loss":
                self.captured.loss.mul_(1.001)
            if lie == "weights":
                self.net.load_state_dict(before)

    fake = steps_of_both(monkeypatch, Lying)
    said = capsys.readouterr().err
    assert fake.captures == 1 and said.count("without a CUDA graph") == 1 and "other results" in said


def test_a_step_that_cannot_be_captured_goes_on_without_a_graph(monkeypatch, capsys):
    class Refusing(FakeCuda):
        @contextlib.contextmanager
        def capture(self, graph):
            with super().capture(graph):
                yield
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    steps_of_both(monkeypatch, Refusing)
    said = capsys.readouterr().err
    assert said.count("without a CUDA graph") == 1 and "cannot be captured (operation not permitted when stream" in said
