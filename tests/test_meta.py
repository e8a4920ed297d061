"""The training step and the test on the meta device, which has shapes and no data.

No operation, forward or backward, depends on data: on a GPU it would wait for the device, and be no part of
a CUDA graph.
"""
import pytest
import torch

from ar1star_lat_replay import train_step
from methods.papers import LearningRateSI
from models.batch_renorm import brn_layers, set_brn_params
from models.mobilenet import MobileNetV1
from utils import SynapticIntelligence, evaluate, parameter_groups, trainable_conv_weights


@pytest.fixture(scope="module", autouse=True)
def statistics_without_data():
    """torch has no shapes for this one kernel."""
    library = torch.library.Library("aten", "IMPL")
    per_channel = lambda x, *_: (x.new_empty(x.shape[1]), x.new_empty(x.shape[1]))
    library.impl("batch_norm_update_stats", per_channel, "Meta")
    yield
    library._destroy()


def step(si=None, fast=True, **brn):
    """Two training steps on the meta device; returns what the second one returns."""
    with torch.device("meta"):
        net = MobileNetV1(50, "conv5_4/dw", None)
        if fast:
            net.to(memory_format=torch.channels_last)
        x = torch.empty(128, 512, 8, 8).to(memory_format=torch.channels_last)
        y = torch.empty(128, dtype=torch.int64)
    net.train()
    net.freeze_below("latent")
    set_brn_params(net, **{"r_max": 1.25, "d_max": .5, "inc_step": 0.0} | brn)
    for layer in brn_layers(net):
        layer.fused = fast
    si = SynapticIntelligence([], 0.0) if si is None else si(trainable_conv_weights(net))
    optimizer = torch.optim.SGD(parameter_groups(net, 5e-5, 5e-4, 10.0, decay_all=False), 5e-5, .9)
    for _ in range(2):
        result = train_step(net, optimizer, si, x, y)
    return result


@pytest.mark.parametrize("keys", [
    {}, {"si": lambda w: SynapticIntelligence(w, 1.0)}, {"si": lambda w: LearningRateSI(w, 5e-4)},
    {"inc_step": 4.1e-5}, {"average": "variance"}], ids=["free", "penalty", "rate", "growth", "average"])
@pytest.mark.parametrize("fast", [True, False])
def test_the_step_depends_on_no_data(keys, fast):
    loss, correct = step(fast=fast, **keys)
    assert (loss.shape, correct.shape) == ((), ()) and loss.is_meta and correct.is_meta


def test_a_step_that_looks_at_its_data_would_be_found(monkeypatch):
    monkeypatch.setattr(SynapticIntelligence, "penalty", lambda self: float(self.weights[0].detach().sum()))
    with pytest.raises((RuntimeError, NotImplementedError)):
        step(lambda w: SynapticIntelligence(w, 1.0))


# ---- the test ----

def fetched_by_a_test(monkeypatch, classify=lambda net, x: net.classify(x)):
    """Tests 300 latents in five chunks on the meta device; returns the shapes of what was fetched from it."""
    fetched = []

    def fetch(t):
        fetched.append(t.shape)
        return torch.zeros(t.shape, dtype=t.dtype)
    monkeypatch.setattr(torch.Tensor, "cpu", fetch)
    with torch.device("meta"):
        net = MobileNetV1(50, "conv5_4/dw", None)
        x, y = torch.empty(300, 512, 8, 8), torch.empty(300, dtype=torch.int64)
    net.scores = classify.__get__(net)
    result = evaluate(net.scores, x, y, chunk=64)
    assert result["confusion"].sum() == 300 and result["accuracy"] == 1     # where all that is fetched is 0
    return fetched


def test_the_test_fetches_its_results_once_and_depends_on_no_data_before(monkeypatch):
    assert fetched_by_a_test(monkeypatch) == [(301,)]


@pytest.mark.parametrize("look", [lambda x: x.sum().item(), lambda x: torch.bincount(x.flatten().long()),
                                  lambda x: x[x > 0]], ids=["item", "bincount", "mask"])
def test_a_test_that_looks_at_its_data_would_be_found(monkeypatch, look):
    with pytest.raises((RuntimeError, NotImplementedError)):
        fetched_by_a_test(monkeypatch, lambda net, x: net.classify(x + 0 * bool(look(x) is None)))
