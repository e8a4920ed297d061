"""The kernels that join Batch Renormalization and ReLU, interpreted by Triton and compiled for a GPU.

Triton asks when it is imported whether it is to interpret, so those tests run in a process of their own.
tests/test_gpu.py has the kernels on a GPU.
"""
import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import ar1star_lat_replay as program
from harness import gpu
from helpers import rand, random_images, randomize
from models.batch_renorm import BatchRenorm2D
from models.mobilenet import MobileNetV1
from utils import CWRHead, ReplayMemory

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for CUDA alone")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
in_this_process = pytest.mark.skipif(INTERPRETED, reason="runs in the first process")
SETTINGS = dict(momentum=0.125, eps=2**-10, r_max=1.25, d_max=0.25, max_r_max=1.5, inc_step=2**-8)
KERNELS = ("_sum", "_renormalize", "_normalize", "_sum_of_gradients", "_gradients", "_gradient")


@pytest.fixture
def brn_relu(monkeypatch):
    from harness import brn_relu
    monkeypatch.setattr(brn_relu.BatchRenormReLU, "devices", ("cpu",))
    if INTERPRETED:     # takes time by the program: several tiles of few numbers
        monkeypatch.setattr(brn_relu, "ROWS", triton.language.constexpr(64))
        monkeypatch.setattr(brn_relu, "AT_ONCE", triton.language.constexpr(2))
    return brn_relu


def two_steps(layers, x, dy):
    """y, r, d, averages, limits, and the gradients of sum(dy y) by x, gamma and beta, of the second step."""
    brn = layers[0]
    for values in (x + 1, x):
        values = values.contiguous(memory_format=torch.channels_last).requires_grad_()
        layers.zero_grad()
        y = layers(values)
        y.backward(dy)
    return [y, *brn.last, *brn.buffers(), values.grad, brn.weight.grad, brn.bias.grad]


@interpreted
@pytest.mark.parametrize("shape", [(3, 96, 9, 11), (8, 32, 4, 8), (2, 64, 1, 1)])
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_averages_and_gradients_are_those_of_the_formula(brn_relu, shape, dtype, tolerance):
    """In float64: channels whose mean is far from 0, of which some are clipped; tiles that are not full."""
    formula = randomize(BatchRenorm2D(shape[1], fused=False, **SETTINGS), seed=1).double()
    joined = nn.Sequential(BatchRenorm2D(shape[1], **SETTINGS), nn.ReLU())
    joined[0].load_state_dict(formula.state_dict())
    brn_relu.join_relus(joined)
    assert type(joined[0]) is brn_relu.BatchRenormReLU and type(joined[1]) is nn.Identity
    if dtype == torch.float64:
        joined.double()

    x = (rand(*shape) + torch.linspace(-3, 3, shape[1]).view(-1, 1, 1)).to(dtype)
    dy = rand(*shape, seed=2).to(dtype)
    expected = two_steps(nn.Sequential(formula, nn.ReLU()), x.double(), dy.double())
    found = two_steps(joined, x, dy)
    assert 0 < (expected[0] == 0).double().mean() < 1 and found[0].dtype == dtype
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


@interpreted
def test_the_sums_of_squares_keep_their_digits(brn_relu):
    """Far from 0, where the mean of squares less the square of the mean is nothing but rounding."""
    x = (1000 + rand(16, 32, 8, 8)).contiguous(memory_format=torch.channels_last)
    brn = brn_relu.BatchRenormReLU(32, r_max=1e6, d_max=1e6)
    brn(x)
    sigma_b = (x.double().var((0, 2, 3), correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(brn.last[0].double(), sigma_b, rtol=1e-4, atol=0)       # sigma is 1


@interpreted
@pytest.mark.parametrize("shape, last, training, average", [
    ((4, 32, 3, 5), False, True, "std"), ((4, 5, 3, 5), True, True, "std"),
    ((4, 32, 3, 5), True, False, "std"), ((0, 32, 3, 5), True, True, "std"),
    ((4, 32, 3, 5), True, True, "variance")],
    ids=["channels first", "few channels", "evaluation", "no images", "variance"])
def test_what_the_kernels_cannot_do_is_done_by_operators(
        brn_relu, monkeypatch, shape, last, training, average):
    monkeypatch.delattr(brn_relu, "_RenormalizeReLU")
    x = rand(*shape)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    brn = randomize(BatchRenorm2D(shape[1], **SETTINGS)).train(training)
    brn.average = average
    joined = nn.Sequential(copy.deepcopy(brn), nn.ReLU())
    brn_relu.join_relus(joined)
    assert torch.equal(joined(x), torch.relu(brn(x)))
    assert torch.equal(joined[0].running_std, brn.running_std)


@interpreted
def test_a_learner_learns_the_same_with_joined_layers(brn_relu):
    learners = []
    for joined in (False, True):
        torch.manual_seed(0)
        net = MobileNetV1(4, "conv6/dw", width=0.125)
        keys = list(net.state_dict())
        if joined:
            brn_relu.join_relus(net.end_features)
            assert sum(type(layer) is brn_relu.BatchRenormReLU for layer in net.modules()) == 1
            assert list(net.state_dict()) == keys
        first, later = (phase._replace(epochs=1) for phase in (program.FIRST, program.LATER))
        memory = ReplayMemory(20, like=net.example_latent(32))
        learner = program.Learner(net, CWRHead(net.output), memory, None, first, later, mb_size=16)
        for i in range(2):
            learner.learn(random_images(16, 32, 32, seed=i), torch.arange(16) % 4)
        learners.append(learner)
    plain, joined = learners
    for key, value in plain.net.state_dict().items():
        torch.testing.assert_close(joined.net.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key)


@in_this_process
def test_with_triton_interpreting():
    """The tests above that are marked so."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", __file__]
    asked = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 passed" in done.stdout, done.stdout


@in_this_process
@pytest.mark.parametrize("activations", ["*fp32", "*bf16"])
def test_the_kernels_compile_for_gpus_and_store_16_bytes_each(brn_relu, activations, monkeypatch, tmp_path):
    """Of activations; this needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    of = dict.fromkeys(("x", "y", "dx", "dy"), activations) | {"n": "i32", "c": "i32"}
    of |= dict.fromkeys(("momentum", "eps"), "fp32")
    for name in KERNELS:
        kernel = getattr(brn_relu, name)
        signature = {argument: of.get(argument, "*fp32") for argument in kernel.arg_names}
        whole = [k for k, kind in enumerate(signature.values()) if kind != "fp32"]
        source = ASTSource(kernel, signature, {}, {(k,): [["tt.divisibility", 16]] for k in whole})
        compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": brn_relu.WARPS})
        assert compiled.asm["cubin"]
        if "y" in signature or "dx" in signature:
            stores = [line for line in compiled.asm["ptx"].splitlines() if "st.global" in line]
            assert stores and all(".v4." in line for line in stores), name


@in_this_process
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_where_they_cannot_be_compiled_the_operators_stay(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "JOIN_RELUS", True)
    gpu.relus_can_be_joined.cache_clear()
    gpu.compile_kernels.cache_clear()
    net = MobileNetV1(4, "conv6/dw", width=0.05)
    gpu.use_kernels(net)
    gpu.use_kernels(net)
    assert {type(brn) for brn in net.modules() if isinstance(brn, BatchRenorm2D)} == {BatchRenorm2D}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "more slowly" in said
