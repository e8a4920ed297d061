"""A training step as a CUDA graph, with stand-ins for CUDA: the order of warm-up, capture and replay.

tests/test_gpu.py does it on a GPU.
"""
import contextlib
import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from ar1star_lat_replay import train_step
from harness.gpu import WARM_UP, CapturedStep
from helpers import seeded
from models.batch_renorm import set_brn_params
from models.mobilenet import MobileNetV1
from utils import SynapticIntelligence, parameter_groups, resize_linear, resized, trainable_conv_weights


class FakeCuda:
    """Streams that do nothing, and a graph whose capture leaves no trace (a real one runs nothing) and whose
    replay runs the step on the captured tensors."""

    def __init__(self, net, captured):
        self.net = net
        self.captured = captured
        self.captures = 0
        self.replays = 0
        self.streams = 0
        self.device = None      # the current one; every call of CUDA belongs on it

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
    optimizer = torch.optim.SGD(parameter_groups(net, 0.01, 5e-4), 0.01, 0.9)
    si = SynapticIntelligence(trainable_conv_weights(net), 0.5)
    return net, optimizer, CapturedStep(partial(train_step, net, optimizer, si), optimizer, net, si)


def steps_of_both(monkeypatch, fake=FakeCuda, change=None):
    """Twelve steps, the ninth of another size: ordinary ones and a CapturedStep's, which must be equal.

    change: called before the seventh step with the network and the optimizer of either. Returns the FakeCuda.
    """
    net, optimizer, ordinary = small_net_and_step()
    graphed_net, graphed_optimizer, graphed = small_net_and_step()
    fake = fake(graphed_net, graphed)
    fake.install(monkeypatch)
    channels = net.lat_features(torch.zeros(1, 3, 32, 32)).shape[1]
    rng = seeded(0)
    for k in range(12):
        if change and k == 6:
            change(net, optimizer)
            change(graphed_net, graphed_optimizer)
        n = 6 if k == 8 else 8
        x = torch.rand(n, channels, 2, 2, generator=rng).to(memory_format=torch.channels_last)
        y = torch.randint(0, 5, (n,), generator=rng)
        loss, correct = ordinary.step(x.clone(), y.clone())
        graphed_loss, graphed_correct = graphed(x, y)
        assert torch.equal(loss, graphed_loss) and torch.equal(correct, graphed_correct)
    for key, value in net.state_dict().items():
        assert torch.equal(value, graphed_net.state_dict()[key]), key
    return fake


def test_graph_replays_are_the_steps_that_would_have_been_run(monkeypatch, capsys):
    fake = steps_of_both(monkeypatch)
    assert (fake.captures, fake.replays) == (1, 12 - WARM_UP - 1) and capsys.readouterr().err == ""
    assert fake.streams == 1        # for all warm-up steps
    assert fake.captured.x.is_contiguous(memory_format=torch.channels_last)


def more_classes(net, optimizer):
    resize_linear(net.output, 7, seeded(1))
    state = optimizer.state[net.output.weight]
    state["momentum_buffer"] = resized(state["momentum_buffer"], 7)


@pytest.mark.parametrize("change", [
    lambda net, optimizer: optimizer.param_groups[0].update(lr=.02),
    lambda net, optimizer: set_brn_params(net.end_features, momentum=.3), more_classes],
    ids=["learning rate", "BRN momentum", "more classes"])
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
        def capture(self, graph):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    steps_of_both(monkeypatch, Refusing)
    said = capsys.readouterr().err
    assert said.count("without a CUDA graph") == 1 and "not permitted when stream is capturing" in said
