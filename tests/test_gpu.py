"""On a GPU: the same results as without graphs, by the simple path, on the CPU, and continued there and back.

Skipped where there is none. AR1_TEST_DEVICE=cpu runs what a CPU can run of it, to test the tests.
"""
import os
import warnings

import numpy as np
import pytest
import torch

import ar1star_lat_replay as program
from harness import gpu
from harness.encoder import TestSet as ImagesToTest
from harness.errors import explain
from harness.gpu import CapturedStep, compile_kernels
from models.batch_renorm import BatchRenorm2D
from models.mobilenet import MobileNetV1, PointwiseConv2d
from utils import CWRHead, ReplayMemory, SynapticIntelligence, evaluate, trainable_conv_weights

DEVICE = os.environ.get("AR1_TEST_DEVICE", "cuda")
CUDA = DEVICE != "cpu"
pytestmark = pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="there is no GPU here")
only_cuda = pytest.mark.skipif(not CUDA, reason="for a GPU alone")
CLASSES = 10


def batches(n=5):
    """A large first batch, then one class at a time."""
    rng = np.random.default_rng(0)
    for i in range(n):
        labels = rng.integers(0, 5, 200) if i == 0 else np.full(60, i)
        noise = rng.integers(0, 200, (len(labels), 64, 64, 3), np.uint8)
        yield noise + 5 * labels[:, None, None, None].astype(np.uint8), labels


def learner(device=DEVICE, fast=True, si=False, bf16=False):
    """A learner with few, small steps: rounding does not grow."""
    torch.manual_seed(0)
    net = MobileNetV1(CLASSES, "conv4_1/dw", None, 0.25).to(device)
    net.freeze_below("latent")
    net.bf16 = bf16
    si = SynapticIntelligence(trainable_conv_weights(net), 1.0) if si else None
    memory = ReplayMemory(100, like=net.example_latent(64))
    first = program.FIRST._replace(epochs=1, lr=1e-4)
    return program.Learner(net, CWRHead(net.output), memory, si, first, program.LATER, mb_size=40, fast=fast)


def learned(maker, n=5):
    made = maker()
    for images, labels in batches(n):
        made.learn(images, labels)
    return made


def agree(one, other, tolerance):
    """Weights and statistics of two learners agree to `tolerance` of a tensor's largest value, or of 0.1."""
    theirs = other.net.state_dict()
    for key, value in one.net.state_dict().items():
        difference, size = (value.cpu() - theirs[key].cpu()).abs().max(), theirs[key].abs().max().cpu()
        assert difference <= tolerance * max(size, .1), (key, difference, size)


@only_cuda
@pytest.mark.parametrize("si, low, bf16", [
    (False, False, False), (True, False, False), (False, True, False), (False, False, True)])
def test_replayed_graphs_are_the_plain_steps(monkeypatch, si, low, bf16):
    monkeypatch.setattr(PointwiseConv2d, "bfloat16", low)
    graphed = learned(lambda: learner(si=si, bf16=bf16))
    assert isinstance(graphed.step, CapturedStep)
    assert graphed.step.graph is not None and not graphed.step.useless
    monkeypatch.setattr(CapturedStep, "__call__", lambda self, x, y: self.step(x, y))
    agree(graphed, learned(lambda: learner(si=si, bf16=bf16)), 1e-5)


@only_cuda
@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-4), (True, 2e-2)])
def test_joined_layers_learn_what_operators_learn(monkeypatch, bf16, tolerance):
    """tests/test_brn_relu.py holds their kernels to the formula."""
    plain = learned(learner)
    monkeypatch.setattr(gpu, "JOIN_RELUS", True)
    joined = learned(lambda: learner(bf16=bf16))
    assert gpu.relus_can_be_joined() and joined.step.graph is not None
    assert sum(type(layer).__name__ == "BatchRenormReLU" for layer in joined.net.modules()) == 17
    agree(joined, plain, tolerance)


def test_bf16_learns_nearly_the_same():
    agree(learned(lambda: learner(bf16=True)), learned(learner), 2e-2)


@only_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_renorm_in_one_kernel_is_the_formula(monkeypatch, dtype):
    """Values, r, d, averages and gradients, with limits that clip some channels; of plain operators, too."""
    def results(fused, kernels=None):
        monkeypatch.setattr(BatchRenorm2D, "gpu_kernels", kernels)
        brn = BatchRenorm2D(32, momentum=0.1, r_max=1.1, d_max=0.2, inc_step=0.0, fused=fused).to(DEVICE)
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in (brn.weight, brn.bias, brn.running_mean, brn.running_std):
                tensor.copy_(1 + 0.3 * torch.rand(32, generator=rng))
        x = torch.rand(8, 32, 5, 6, generator=rng) * torch.linspace(2, 6, 32).view(-1, 1, 1)
        x = x.to(DEVICE, dtype).requires_grad_()
        y = brn(x)
        y.backward(torch.randn(y.shape, generator=rng).to(y))
        assert 0 < (brn.last[0] == 1.1).sum() < 32 and 0 < (brn.last[1] == 0.2).sum() < 32
        return [y, *brn.last, brn.running_mean, brn.running_std, x.grad, brn.weight.grad, brn.bias.grad]

    assert compile_kernels() is not None
    in_one, by_operators, formula = results(True, compile_kernels()), results(True), results(False)
    for one, plain, exact in zip(in_one, by_operators, formula, strict=True):
        tolerance = (1e-5 if dtype == torch.float32 else 2e-2) * exact.abs().max().float()
        assert (one.float() - exact.float()).abs().max() <= tolerance
        assert (plain.float() - exact.float()).abs().max() <= tolerance


@only_cuda
def test_a_mini_batch_and_its_replayed_step_wait_for_nothing():
    made = learned(learner)
    images, labels = next(iter(batches(1)))
    latents, labels = made.encoder(images), torch.as_tensor(labels, device=DEVICE)
    new, old = torch.arange(9, device=DEVICE), torch.arange(31, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = torch.cat((latents[new], made.memory.x[old]))
        y = torch.cat((labels[new], made.memory.y[old]))
        made.step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(made.step.x, x) and torch.equal(made.step.y, y)      # it was the graph


@only_cuda
def test_a_test_waits_for_the_gpu_once():
    made = learned(learner)
    test = ImagesToTest(*next(iter(batches(1))))
    expected = test.evaluate(made)      # encodes
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            result = evaluate(made.classify, test.latents, test.labels, chunk=50)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in said) == 1
    assert torch.equal(result["confusion"], expected["confusion"])


def test_the_fast_path_agrees_with_the_simple_one_and_with_the_cpu():
    mine, theirs = learned(learner), learned(lambda: learner("cpu"))
    agree(mine, learned(lambda: learner(fast=False)), 1e-3)
    agree(mine, theirs, 1e-3)
    images = next(iter(batches(1)))[0]
    assert (mine.predict(images) == theirs.predict(images)).float().mean() > .98


def test_a_saved_state_continues_there_and_on_the_other_device():
    """Learns two batches, is saved, loaded on either device, and learns on, as what was never saved."""
    stream, whole = list(batches()), learned(learner)
    half = learned(learner, 2)
    state = half.state_dict()
    for device, tolerance in ((DEVICE, 1e-5), ("cpu", 1e-3)):
        again = learner(device)
        again.load_state_dict(state)
        for images, labels in stream[2:4]:
            again.learn(images, labels)
        back = learner(DEVICE)
        back.load_state_dict(again.state_dict())
        back.learn(*stream[4])
        agree(back, whole, tolerance)
        assert back.memory.y.tolist() == whole.memory.y.tolist() and back.batches == 5


@only_cuda
def test_the_same_seed_gives_the_same_bits():
    one, other = learned(learner), learned(learner)
    agree(one, other, 0.0)


@only_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_the_second_gpu(monkeypatch):
    torch.cuda.set_device(0)        # another one is current
    mine = learned(lambda: learner("cuda:1"))
    assert mine.net.output.weight.device.index == 1 and mine.step.graph is not None
    agree(mine, learned(lambda: learner("cuda:0")), 1e-5)


@only_cuda
def test_out_of_memory_is_one_sentence():
    with pytest.raises(torch.cuda.OutOfMemoryError) as error:
        torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)
    assert explain(error.value).startswith("out of memory") and "\n" not in explain(error.value)
