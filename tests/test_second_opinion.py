"""A second opinion in closed form: the sum of log-probabilities by hand, features that stay, and what is kept."""
import math

import pytest
import torch
from torch import nn

from helpers import REPO, seeded
from lab.config import ConfigError, load_config
from lab.pieces import pieces
from lab.record import kept_mb
from methods.second_opinion import ObservedMemory, SecondOpinion
from models.mobilenet import MobileNetV1
from models.split_net import SplitNet
from utils import ReplayMemory


class Toy(SplitNet):
    """Two values, copied by both layers, to two classes."""

    def __init__(self):
        super().__init__({"a": nn.Identity(), "b": nn.Identity()}, 2, 2, "a")
        with torch.no_grad():
            self.output.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))

    def example_latent(self, height, width=None):
        return torch.zeros(1, 2)


def test_log_probabilities_are_added_by_hand():
    """Class means (0, 0) and (4, 0) and covariance diag(1/2, 2), as in test_statistics, without shrinkage: the scores of
    (3, 0) are 0 and 8 * 3 - 16 = 8; the network's are 3 and 0."""
    opinion, cross = SecondOpinion(Toy(), 0.5, shrinkage=0.0), torch.tensor([[1.0, 0], [-1, 0], [0, 2], [0, -2]])
    for j, mean in enumerate(([0.0, 0], [4.0, 0])):
        opinion.update(cross + torch.tensor(mean), torch.full((4,), j))
    x = torch.tensor([[3.0, 0.0]])
    network, statistics = torch.tensor([3.0, 0.0]).log_softmax(0), torch.tensor([0.0, 8.0]).log_softmax(0)
    assert torch.allclose(opinion(x)[0], network + 0.5 * statistics, atol=1e-5)
    assert opinion(x).argmax().item() == 1 and opinion.net.classify(x).argmax().item() == 0
    opinion.weight = 0.0
    assert torch.allclose(opinion(x)[0], network)


def test_a_class_never_met_keeps_the_loss_finite():
    opinion = SecondOpinion(Toy(), 1.0)
    opinion.update(torch.randn(9, 2, generator=seeded(0)), torch.zeros(9, dtype=torch.int64))
    scores = opinion(torch.zeros(1, 2))
    assert scores.argmax().item() == 0 and scores[0, 1].item() == pytest.approx(-50 - math.log(2))


def test_its_features_stay_while_the_network_learns_and_it_sees_all_of_every_batch():
    net = MobileNetV1(3, "conv5_4/dw", width=0.1)
    opinion = SecondOpinion(net, 0.25, "conv5_6/sep", root=True)
    memory = ObservedMemory(ReplayMemory(10, net.example_latent(48)), opinion)
    latents = torch.rand(200, *net.example_latent(48).shape[1:], generator=seeded(1))
    before = opinion.features(latents[:4])
    with torch.no_grad():
        expected = net.eval().end_features[:5](latents[:4]).mean((2, 3)).sqrt()
        for p in net.end_features.parameters():
            p.add_(1)
    assert torch.allclose(before, expected, atol=1e-5) and torch.equal(opinion.features(latents[:4]), before)
    memory.update(latents, torch.arange(200) % 3, 0, seeded(0))
    assert len(memory) == memory.rm_sz == 10 and opinion.lda.past_j.tolist() == [67, 67, 66]
    assert torch.allclose(opinion.lda.mean[0], opinion.features(latents)[::3].mean(0), atol=1e-6)
    state = memory.state_dict()
    net2 = MobileNetV1(3, "conv5_4/dw", width=0.1)
    opinion2 = SecondOpinion(net2, 0.25, "conv5_6/sep", root=True)
    other = ObservedMemory(ReplayMemory(10, net.example_latent(48)), opinion2)
    other.load_state_dict(state)
    assert torch.equal(opinion2.lda.linear(opinion2.features(latents)), opinion.lda.linear(opinion.features(latents)))
    assert torch.equal(other.x, memory.x) and torch.equal(other.y, memory.y)


def made(**keys):
    config = load_config("demo", REPO / "params.cfg", {"device": "cpu"} | keys)
    net = MobileNetV1(10, config.latent_layer_num, width=config.width)
    return pieces(config, net, (48, 48)), net


def test_all_that_is_kept_is_counted():
    """The copied layers, means and covariance of 256 features, counts of ten classes; beside memory, head, and past_j."""
    got, net = made(slda_weight=0.25)
    got.pop("minibatches"), got.pop("classify")
    learner = type("Learner", (), got)
    layers = sum(p.numel() for m in net.end_features for p in m.parameters())       # gamma, beta fold into one bias
    gammas = sum(len(m[1].weight) for m in net.end_features if isinstance(m, nn.Sequential))
    floats = layers - gammas + 256 * 256 + 10 * 256 + 10 * 256
    assert kept_mb(learner) == pytest.approx((4 * floats + 8 * 10 + 8 * 10) / 1e6, abs=1e-3)


def test_a_memory_in_mb_holds_as_many_patterns_as_fit():
    """A latent is 32x6x6 here: 36 positions of 8 codes, and two int64; the centres are 8 x 256 x 4 float32."""
    memory = made(rm_mb=1.0, rm_dtype="pq", pq_codes=8)[0]["memory"]
    assert memory.rm_sz == (1_000_000 - 8 * 256 * 4 * 4) // (36 * 8 + 16)
    assert made(rm_mb=1.0)[0]["memory"].rm_sz == 1_000_000 // (32 * 36 * 4 + 16)


@pytest.mark.parametrize("keys, says", [
    (dict(rm_mb=0.001), "rm_mb is 0.001, and not one pattern fits into it: one takes 4,624 bytes"),
    (dict(rm_mb=0.001, rm_dtype="pq", pq_codes=8), "and its codebooks 32,768"),
    (dict(rm_dtype="pq", pq_codes=5), "cannot be cut into pq_codes = 5"),
    (dict(slda_weight=1.0, slda_layer="conv1"), "slda_layer: the layer 'conv1' lies below the latent one"),
    (dict(slda_weight=1.0, slda_layer="conv9"), "slda_layer: no layer 'conv9'"),
    (dict(pq_codes=8), "pq_codes .with rm_dtype float32"), (dict(rm_sz=0, rm_policy="balanced"), "without a replay memory"),
    (dict(follow="papers", rm_policy="balanced"), "has a rule of its own"),
    (dict(follow="moving", rm_dtype="uint8"), "latents change until they are stored")])
def test_what_cannot_be_is_one_sentence(keys, says):
    with pytest.raises(ConfigError, match=says):
        made(**keys)
