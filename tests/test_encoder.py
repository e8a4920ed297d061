"""What makes an experiment fast, and the training step, each against the plain computation it stands for."""
import copy
import platform
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ar1star_lat_replay import train_step
from benchmarks import networks
from harness import encoder as encoding
from harness.encoder import EncodedOnDemand, Encoder, set_up_kernels
from helpers import REPO, rand, random_images, randomize, run_script, small_net
from models.batch_renorm import BatchRenorm2D
from models.mobilenet import MobileNetV1, PointwiseConv2d
from models.split_net import SplitNet
from test_torchvision_nets import FAMILIES
from utils import SynapticIntelligence, evaluate, preprocess

# ---- the machine ----

def test_the_precision_of_products_holds_for_matrices_and_convolutions():
    for precision, matrices, tf32 in (("highest", "highest", False), ("high", "high", True),
                                      ("medium", "medium", True), ("low", "medium", True)):
        set_up_kernels(True, precision)
        assert torch.get_float32_matmul_precision() == matrices
        assert PointwiseConv2d.bfloat16 == (precision == "low")
        assert torch.backends.cudnn.allow_tf32 == tf32 and torch.backends.cudnn.benchmark


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
    assert torch.equal(conv(x.detach()), y)
    assert torch.autograd.grad(conv(x.detach()).sum(), conv.weight)[0].isfinite().all()
    assert conv.double()(x.detach().double()).dtype == torch.float64        # other types are left alone


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_memory_that_tensors_give_up_is_used_again():
    """Blocks that are taken and given up again cause page faults, but not in a fast run."""
    code = """
import ctypes, resource, torch
from harness.encoder import set_up_kernels

def faults(rounds):     # as a share of 12 blocks of 16 MiB, all their pages
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        [torch.zeros(4 << 20) for _ in range(12)]
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (12 * 4096)

ctypes.CDLL(None).mallopt(-3, 1 << 17)      # blocks of 128 KiB and more are returned at once
assert faults(10) > 9
set_up_kernels(True, "highest")
faults(2)
assert faults(10) < 1
set_up_kernels(False, "highest")            # returns what is free
assert faults(1) > .9
"""
    status, _, errors = run_script(["-c", code])
    assert status == 0, errors


# ---- latents ----

def encoding_net(latent=13, frozen=13):
    net = small_net(latent)
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
        assert encoder.latents_are_fixed and len(latents) == 21
        assert isinstance(latents, torch.Tensor if fast else EncodedOnDemand)
        atol = 1e-4 * max(1, expected.abs().max().item())
        torch.testing.assert_close(latents[:], expected, rtol=1e-4, atol=atol)
    assert net.training and expected.std() > 1e-2


@pytest.mark.parametrize("n", [1, 15, 16, 17, 40])
def test_encoder_gives_the_same_in_any_chunks_and_on_demand(n):
    """Chunks, slices and index tensors, and max_bytes: one byte less than latents take: on demand."""
    net, images = encoding_net(), random_images(n, 32, 32)
    encoder = Encoder(net, "cpu")
    latents = encoder(images)
    assert isinstance(latents, torch.Tensor) and latents.shape == (n, 64, 2, 2) and not latents.requires_grad
    assert latents.is_contiguous(memory_format=torch.channels_last)
    size = n * 64 * 2 * 2 * 4
    assert isinstance(Encoder(net, "cpu", max_bytes=size)(images), torch.Tensor)
    on_demand = Encoder(net, "cpu", max_bytes=size - 1)(images)
    assert isinstance(on_demand, EncodedOnDemand) and len(on_demand) == n
    rng = np.random.default_rng(n)
    for index in (slice(None), slice(n // 2, n), slice(0, 1), torch.tensor(rng.integers(0, n, 7))):
        torch.testing.assert_close(on_demand[index], latents[index], rtol=1e-4, atol=1e-5)
    encoder.chunk = 7
    torch.testing.assert_close(encoder(images), latents, rtol=1e-4, atol=1e-5)


def test_a_latent_is_the_same_bits_beside_any_others_and_whatever_the_precision_of_products():
    """On one thread torch convolves fewer than 16 images in another way, unless products may be rounded."""
    torch.manual_seed(0)
    net, images = MobileNetV1(5, "conv5_4/dw").eval(), random_images(35, 64, 64)
    net.freeze_below("conv5_4/dw")
    encoder = Encoder(net, "cpu")
    whole = encoder(images)
    on_demand = Encoder(net, "cpu", max_bytes=1)(images)
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        for n in (1, 3, 15, 16, 17, 35):
            assert torch.equal(encoder(images[:n]), whole[:n])
            assert torch.equal(on_demand[35 - n:], whole[35 - n:])


@pytest.mark.parametrize("latent", [13, 27])
def test_a_mirrored_latent_is_the_mean_of_two(latent):
    """Maps of the mirror image are turned back; also where latents are made on demand."""
    net, images = encoding_net(latent, latent), random_images(18, 32, 48)
    other = latents_one_by_one(net, images[:, :, ::-1].copy())
    expected = (latents_one_by_one(net, images) + (other.flip(-1) if other.dim() == 4 else other)) / 2
    for encoder in (Encoder(net, "cpu", mirror=True), Encoder(net, "cpu", mirror=True, max_bytes=1),
                    Encoder(net.eval(), "cpu", fast=False, mirror=True)):
        torch.testing.assert_close(encoder(images)[:], expected, rtol=1e-4, atol=1e-4)


def test_encoder_of_layers_that_train_follows_them_and_passes_gradients():
    net, images = encoding_net(latent=3, frozen=1), random_images(4, 32, 32)
    encoder = Encoder(net, "cpu")
    assert not encoder.latents_are_fixed
    latents = encoder(images)
    net.eval()
    first = latents[:2]
    first.sum().backward()
    assert net.layers[2][0].weight.grad.abs().sum() > 0 and net.layers[1][0].weight.grad is None
    with torch.no_grad():
        net.layers[2][0].weight.mul_(0.5)
    torch.testing.assert_close(latents[:2], latents_one_by_one(net, images[:2]), rtol=1e-4, atol=1e-5)
    assert not torch.equal(latents[:2], first)


class Mistaken(nn.Conv2d):
    folds_as_conv = True        # which is not so

    def forward(self, x):
        return 2 * super().forward(x)


class Centered(nn.Module):
    """The other images of a mini-batch have a say."""

    def forward(self, x):
        return x - x.mean(0)


class SinglePrecision(nn.Module):
    def forward(self, x):
        return x @ torch.ones(x.shape[-1], 3)       # float32, whatever x is


@pytest.mark.parametrize("layer", [Mistaken(3, 4, 3), Centered(), SinglePrecision()])
def test_a_copy_that_gives_other_latents_is_left_alone(layer, capsys):
    brn = BatchRenorm2D(4 if isinstance(layer, nn.Conv2d) else 3)
    net = randomize(SplitNet({"a": nn.Sequential(layer, brn), "b": nn.Flatten()}, 5, 2, "a"))
    net.freeze_below("a")
    images = random_images(20, 6, 6)
    encoder = Encoder(net, "cpu")
    for _ in range(2):
        latents = encoder(images)
        assert torch.equal(latents[:], net.lat_features(preprocess(images)))
    assert capsys.readouterr().err.count("slower") == 1


# ---- other networks ----

@pytest.mark.parametrize("library, name", [
    *(("torchvision", name) for name in FAMILIES), *(("timm", name) for name in networks.TIMM)])
def test_latents_of_other_networks_are_those_of_their_layers(library, name):
    pytest.importorskip(library)
    images = torch.as_tensor(random_images(4, 64, 64))
    latents, output = networks.largest_differences(library, name, images)
    assert latents < 1e-4 and output < 1e-4


def test_the_table_of_docs_names_the_networks_of_its_command():
    table = (REPO / "docs" / "results" / "networks.md").read_text("utf-8")
    rows = [row.split("|")[1:4] for row in table.splitlines() if row.count("|") == 5][2:]
    named = [(library.strip(), name.strip(" `")) for library, name, _ in rows]
    assert named == [*(("torchvision", name) for name in networks.TORCHVISION),
                     *(("timm", name) for name in networks.TIMM)]
    assert all(float(difference) < 1e-3 for _, _, difference in rows)


# ---- the test ----

def test_the_test_set_is_encoded_once_per_encoder_and_evaluated_as_latents_computed_directly():
    """The head learns between the tests; the frozen layers become others together with the encoder."""
    net, images, labels = encoding_net(), random_images(37, 32, 32), np.arange(37) % 5
    test = encoding.TestSet(images, labels)
    learner = SimpleNamespace(net=net, classify=net.classify, device=torch.device("cpu"))
    losses, asked = [], []
    for k in range(2):
        encoder = Encoder(net, "cpu")
        learner.encoder = lambda images, encoder=encoder: asked.append(1) or encoder(images)
        for _ in range(3):
            expected = evaluate(net.classify, latents_one_by_one(net, images), torch.tensor(labels))
            result = test.evaluate(learner)
            assert result.keys() == expected.keys()
            assert torch.equal(result["confusion"], expected["confusion"])
            for key in ("accuracy", "loss", "per_class"):
                assert result[key] == pytest.approx(expected[key], rel=1e-4), key
            losses.append(result["loss"])
            with torch.no_grad():
                net.output.weight.add_(0.1 * rand(*net.output.weight.shape, seed=len(losses)))
        assert len(asked) == k + 1
        with torch.no_grad():
            net.layers[3][0].weight.mul_(2)
    assert len({round(loss, 3) for loss in losses}) == 6       # neither head nor frozen layers were stale


# ---- a training step ----

def tiny_net():
    torch.manual_seed(0)
    layers = {"low": nn.Flatten(), "mid": nn.Linear(6, 4), "top": nn.Tanh()}
    net = SplitNet(layers, 4, 3, "low").double()
    net.freeze_below("low")
    return net


@pytest.mark.parametrize("with_si", [False, True])
def test_train_step_equals_sgd_by_hand(with_si):
    """Two of g = gradient + l2 * w, v = momentum * v + g, w -= lr * v; gradients by numpy's chain rule."""
    net, lr, momentum, l2 = tiny_net(), 0.1, 0.9, 0.01
    weights = net.layers[1].weight, net.layers[1].bias, net.output.weight
    w, b, v = (p.detach().numpy().copy() for p in weights)
    si = SynapticIntelligence([weights[0]], 0.5) if with_si else SynapticIntelligence([], 0.0)
    velocity, importance, trajectory = [0.0, 0.0, 0.0], np.zeros_like(w), np.zeros_like(w)
    anchor = w - 0.3
    if with_si:
        importance = np.linspace(0.1, 2, w.size).reshape(w.shape)
        si.importance[0].copy_(torch.tensor(importance))
        si.anchor[0].copy_(torch.tensor(anchor))
        si.begin_batch()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr, momentum, weight_decay=l2)
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
        gradients[0] = gradients[0] + 0.5 * importance * (w - anchor)
        velocity = [momentum * u + g + l2 * q for u, g, q in zip(velocity, gradients, (w, b, v))]
        trajectory = trajectory + gradients[0] * -lr * velocity[0]
        w, b, v = (q - lr * u for q, u in zip((w, b, v), velocity))
        for mine, theirs in zip(weights, (w, b, v)):
            np.testing.assert_allclose(mine.detach(), theirs, rtol=1e-10)
    if with_si:
        np.testing.assert_allclose(si.trajectory[0], trajectory, rtol=1e-9)
