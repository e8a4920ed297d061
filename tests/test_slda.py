"""Classifiers in closed form, alone and beside a network, against formulas evaluated on all data at once."""
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ar1star_lat_replay as program
from harness.config import ConfigError, load_config
from harness.records import kept_mb
from harness.variants import ClosedFormLearner
from helpers import same, seeded
from methods.slda import UNMET, NearestClassMean, Pooled, SLDABeside, StreamingLDA
from models.mobilenet import MobileNetV1
from models.split_net import SplitNet
from tiny import said
from utils import preprocess

CROSS = torch.tensor([[1.0, 0], [-1, 0], [0, 2], [0, -2]])      # covariance diag(1/2, 2)


def features(n, d, classes, seed):
    """Correlated features of classes whose means lie apart, and their labels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    mixing, means = rng.normal(size=(d, d)), 3 * rng.normal(size=(classes, d))
    return means[y] + rng.normal(size=(n, d)) @ mixing, y


def scores_of_all_data(x, y, classes, shrinkage, test):
    """Class scores of `test` by the formula: S from every pattern around the mean of its class."""
    means = {c: x[y == c].mean(0) for c in set(y.tolist())}
    s = np.eye(x.shape[1])
    if shrinkage is not None:
        covariance = sum(np.outer(a - means[c], a - means[c]) for a, c in zip(x, y.tolist())) / len(x)
        s = (1 - shrinkage) * covariance + shrinkage * s
    scores = np.full((len(test), classes), UNMET)
    for c, mu in means.items():
        w = np.linalg.inv(s) @ mu
        scores[:, c] = test @ w - mu @ w / 2
    return scores


@pytest.mark.parametrize("make, shrinkage", [(StreamingLDA, 1e-4), (NearestClassMean, None)])
@settings(max_examples=15)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), seed=st.integers(0, 99),
       by_class=st.booleans())
def test_scores_equal_those_of_all_data_at_once_whatever_the_order(make, shrinkage, sizes, seed, by_class):
    n, d, classes = 40 + sum(sizes), 6, 5
    x, y = features(n, d, classes - 1, seed)        # the last class is never met
    order = np.argsort(y, kind="stable") if by_class else np.arange(n)
    head = make(nn.Linear(d, classes))
    start = 0
    for end in (*np.cumsum(sizes).tolist(), n):
        part = order[start:end]
        head.update(torch.from_numpy(x[part]).float(), torch.from_numpy(y[part]))
        start = end
    test, _ = features(20, d, classes, seed + 1)
    met = np.unique(y)
    expected = scores_of_all_data(x, y, classes, shrinkage, test)[:, met]
    found = head.linear(torch.from_numpy(test).float()).detach().double().numpy()
    np.testing.assert_allclose(found[:, met], expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    assert (found[:, classes - 1] < found[:, met].min()).all()
    assert head.past_j.tolist() == np.bincount(y, minlength=classes).tolist()


def test_two_classes_in_two_dimensions_by_hand():
    """Means (0, 0) and (4, 0); patterns +-1 along the first axis and +-2 along the second."""
    head = StreamingLDA(nn.Linear(2, 2), shrinkage=0.5)
    for j, mean in enumerate(([0.0, 0], [4.0, 0])):
        head.update(CROSS + torch.tensor(mean), torch.full((4,), j))
    assert head.scatter.tolist() == [[4.0, 0.0], [0.0, 16.0]]
    assert head.mean.tolist() == [[0.0, 0.0], [4.0, 0.0]]
    # S = diag(1/2, 2) / 2 + I / 2 = diag(0.75, 1.5); w = 4 / 0.75 on the first axis; bias = -4 w / 2
    assert head.linear.weight.tolist() == [[0.0, 0.0], [pytest.approx(16 / 3), 0.0]]
    assert head.linear.bias.tolist() == [0.0, pytest.approx(-32 / 3)]


@pytest.mark.parametrize("make", [StreamingLDA, NearestClassMean])
def test_state_brings_scores_back_and_is_as_small_as_told(make):
    x, y = torch.randn(30, 8, generator=seeded(0)), torch.arange(30) % 3
    one, other = make(nn.Linear(8, 4)), make(nn.Linear(8, 4))
    one.update(x, y)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.linear(x), other.linear(x))
    one.update(x[:5] + 1, y[:5])
    other.update(x[:5] + 1, y[:5])
    assert torch.equal(one.linear(x), other.linear(x))
    big = make(nn.Linear(1024, 50)).state_dict()
    size = sum(t.numel() * t.element_size() for t in big.values()) / 1e6
    assert size == pytest.approx(4.4 if make is StreamingLDA else 0.2, abs=0.01)
    with pytest.raises(ValueError, match="bias"):
        make(nn.Linear(8, 4, bias=False))


@pytest.mark.parametrize("make", [StreamingLDA, NearestClassMean])
@pytest.mark.parametrize("x, y, says", [
    (CROSS, [0, 1, 0, -1], "from 0 to 1.*from -1 to 1"), (CROSS, [0, 1, 2, 1], "from 0 to 2"),
    (CROSS, [0, 1, 0], r"4 .*\(3,\)"), (CROSS, [0.0, 1, 0, 1], "whole numbers.*float64"),
    (CROSS[:, :1], [0, 1, 0, 1], r"\(n, 2\).*\(4, 1\)"), (CROSS[0], [0, 1], r"\(n, 2\).*\(2,\)"),
    (CROSS / CROSS, [0, 1, 0, 1], "not finite")])
def test_what_cannot_be_taken_in_changes_nothing(make, x, y, says):
    head = make(nn.Linear(2, 2))
    head.update(CROSS, torch.tensor([0, 0, 0, 1]))
    before = [t.clone() for t in (*head.state_dict().values(), head.linear.weight, head.linear.bias)]
    with pytest.raises(ValueError, match=says):
        head.update(x, torch.tensor(y, dtype=torch.float64 if isinstance(y[0], float) else None))
    assert same(before, [*head.state_dict().values(), head.linear.weight, head.linear.bias])


@pytest.mark.parametrize("x", [
    torch.randn(8, 7, generator=seeded(0)),     # of two classes: six directions in which they vary
    torch.randn(90, 7, generator=seeded(0)) * torch.tensor([1, 1, 0, 1, 1, 1, 1])], ids=["few", "a dead one"])
def test_a_covariance_without_inverse_is_named_and_changes_nothing(x):
    y = torch.arange(len(x)) % 2
    head, other = StreamingLDA(nn.Linear(7, 2), 0.0), StreamingLDA(nn.Linear(7, 2), 1e-4)
    before = [t.clone() for t in (*head.state_dict().values(), head.linear.weight)]
    with pytest.raises(ValueError, match="slda_shrinkage.*above 0"):
        head.update(x, y)
    assert same(before, [*head.state_dict().values(), head.linear.weight])
    head.shrinkage = 1e-4
    for lda in (head, other):
        lda.update(x, y)
    assert torch.equal(head.linear.weight, other.linear.weight)


def test_on_the_command_line_it_is_a_setting_and_not_a_bug(command, capfd):
    more = ["--set=method=slda", "--set=rm_sz=0", "--set=slda_shrinkage=0",
            "--set=latent_layer_num=pool6", "--set=width=1"]
    assert "bug" not in said(capfd, 2, command + more, "slda_shrinkage")


def test_pooled_by_hand():
    maps = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]], [[0.0, 0.0], [0.0, -1.0]]]])
    assert Pooled()(maps).tolist() == [[4.0, -0.25]] and Pooled(root=True)(maps).tolist() == [[2.0, -0.5]]
    assert Pooled(root=True)(torch.tensor([[9.0, -16.0, 0.0]])).tolist() == [[3.0, -4.0, 0.0]]


# ---- in the network's place ----

def test_the_learner_takes_pooled_outputs_of_any_layer():
    """Class means of the features, one image at a time through the layers; the network stays as it was."""
    net = MobileNetV1(3, "conv6/dw", width=0.1)
    images = torch.randint(0, 256, (12, 48, 48, 3), dtype=torch.uint8, generator=seeded(0))
    labels = torch.arange(12) % 3
    learner = ClosedFormLearner("ncm", net, root=True)
    learner.learn(images, labels)
    learner.check_frozen()
    net.eval()
    with torch.no_grad():
        features = torch.stack([net.lat_features(preprocess(x[None]))[0].mean((1, 2)).sqrt() for x in images])
    means = torch.stack([features[labels == j].mean(0) for j in range(3)])
    assert torch.allclose(learner.head.mean, means, atol=1e-5)
    assert learner.predict(images).tolist() == (features[:, None] - means).square().sum(2).argmin(1).tolist()


@pytest.mark.parametrize("method, more", [
    ("slda", {}), ("ncm", {}),
    ("slda", dict(latent_layer_num="conv5_6/sep", slda_root=True, slda_shrinkage=1e-3))])
def test_a_run_learns_and_continues_bit_by_bit(drawn_once, tmp_path, method, more):
    keys = dict(dataset="demo", weights="none", width=0.1, test_stride=4, device="cpu", checkpoint_share=1.0)
    config = load_config(method, overrides=keys | more)
    whole = program.run(config, "whole", tmp_path, 6)
    for batches in (1, 6):
        parts = program.run(config, "parts", tmp_path, batches)
    rows, again = ([{k: v for k, v in row.items() if not k.startswith("seconds")} for row in run["rows"]]
                   for run in (whole, parts))
    assert rows == again and json.dumps(rows)
    states = [torch.load(run["folder"] / "checkpoint.pt", weights_only=True) for run in (whole, parts)]
    assert same(*({k: state[k] for k in ("net", "head")} for state in states))
    assert whole["final_accuracy"] > .12        # random features; chance is 10 %
    assert rows[-1]["memory_size"] == 0
    learner = program.load_learner(whole["folder"])
    x, y = program.open_stream(config).get_test_set(4)
    assert (learner.predict(x).numpy() == y).mean() == pytest.approx(whole["final_accuracy"], abs=1e-9)
    loss = torch.nn.functional.cross_entropy(learner.scores(x).double(), torch.as_tensor(y)).item()
    assert loss == pytest.approx(rows[-1]["test_loss"], rel=1e-5)


# ---- beside the network ----

class Toy(SplitNet):
    """Two values, copied by both layers, to two classes."""

    def __init__(self):
        super().__init__({"a": nn.Identity(), "b": nn.Identity()}, 2, 2, "a")
        with torch.no_grad():
            self.output.weight.copy_(torch.eye(2))

    def example_latent(self, height, width=None):
        return torch.zeros(1, 2)


def test_log_probabilities_are_added_by_hand():
    """Class means (0, 0) and (4, 0), covariance diag(1/2, 2), without shrinkage: the scores of (3, 0) are 0
    and 8 * 3 - 16 = 8; the network's are 3 and 0."""
    beside = SLDABeside(Toy(), 0.5, shrinkage=0.0)
    for j, mean in enumerate(([0.0, 0], [4.0, 0])):
        beside.update(CROSS + torch.tensor(mean), torch.full((4,), j))
    x = torch.tensor([[3.0, 0.0]])
    network, statistics = torch.tensor([3.0, 0.0]).log_softmax(0), torch.tensor([0.0, 8.0]).log_softmax(0)
    assert torch.allclose(beside.classify(x)[0], network + 0.5 * statistics, atol=1e-5)
    assert beside.classify(x).argmax().item() == 1 and beside.net.classify(x).argmax().item() == 0
    beside.weight = 0.0
    assert torch.allclose(beside.classify(x)[0], network)
    beside.temperature = 3.0        # p(0) of the network: e^3 / (e^3 + 1), of which the third root counts
    assert beside.classify(x).softmax(1)[0, 0].item() == pytest.approx(math.e / (math.e + 1), abs=1e-6)


def test_a_class_never_met_keeps_the_loss_finite():
    beside = SLDABeside(Toy(), 1.0)
    beside.update(torch.randn(9, 2, generator=seeded(0)), torch.zeros(9, dtype=torch.int64))
    scores = beside.classify(torch.zeros(1, 2))
    assert scores.argmax().item() == 0 and scores[0, 1].item() == pytest.approx(-50 - math.log(2))


def test_its_features_stay_while_the_network_learns_and_it_sees_all_of_a_batch():
    net = MobileNetV1(3, "conv5_4/dw", width=0.1)
    beside = SLDABeside(net, 0.25, "conv5_6/sep", root=True)
    latents = torch.rand(200, *net.example_latent(48).shape[1:], generator=seeded(1))
    before = beside.features(latents[:4])
    with torch.no_grad():
        expected = net.eval().end_features[:5](latents[:4]).mean((2, 3)).sqrt()
        for p in net.end_features.parameters():
            p.add_(1)
    assert torch.allclose(before, expected, atol=1e-5) and torch.equal(beside.features(latents[:4]), before)
    beside.update(latents, torch.arange(200) % 3)
    assert beside.lda.past_j.tolist() == [67, 67, 66]
    assert torch.allclose(beside.lda.mean[0], beside.features(latents)[::3].mean(0), atol=1e-6)
    other = SLDABeside(MobileNetV1(3, "conv5_4/dw", width=0.1), 0.25, "conv5_6/sep", root=True)
    other.bring_back(beside.kept())
    assert torch.equal(other.lda.linear(other.features(latents)), beside.lda.linear(beside.features(latents)))


def test_its_features_may_lie_below_the_latent_layer_if_latents_carry_them():
    net = MobileNetV1(3, "pool6", width=0.1).eval()
    x = torch.rand(5, 3, 48, 48, generator=seeded(1))
    expected = nn.Sequential(*net.layers[:net.layer_number("conv6/dw") + 1])(x).mean((2, 3)).sqrt()
    with pytest.raises(ValueError, match="carry"):
        SLDABeside(net, 0.25, "conv6/dw", root=True)
    net.carry("conv6/dw")
    beside = SLDABeside(net, 0.25, "conv6/dw", root=True)
    assert torch.allclose(beside.features(net.lat_features(x)), expected, atol=1e-6)
    assert beside.classify(net.lat_features(x)).shape == (5, 3)


# ---- from a configuration ----

def made(**keys):
    config = load_config("demo", overrides={"device": "cpu"} | keys)
    return program.build_learner(config, 10, (48, 48), torch.device("cpu"))


def test_all_that_is_kept_is_counted():
    """Copied layers, means and covariance of 256 features, counts of ten classes; memory, head, past_j."""
    learner = made(slda_weight=0.25)
    above = learner.net.end_features
    layers = sum(p.numel() for p in above.parameters())
    folded = sum(len(m[1].weight) for m in above if isinstance(m, nn.Sequential))   # gamma, beta: one bias
    floats = layers - folded + 256 * 256 + 10 * 256 + 10 * 256
    assert kept_mb(learner) == pytest.approx((4 * floats + 8 * 10 + 8 * 10) / 1e6, abs=1e-3)


def test_a_memory_in_mb_holds_as_many_patterns_as_fit():
    """A latent is 32x6x6: 36 positions of 8 codes, and two int64; the centres are 8 x 256 x 4 float32."""
    coded = made(rm_mb=1.0, rm_dtype="pq", pq_codes=8)
    assert coded.memory.rm_sz == (10**6 - 8 * 256 * 4 * 4) // (36 * 8 + 16)
    assert made(rm_mb=1.0).memory.rm_sz == 10**6 // (32 * 36 * 4 + 16)


@pytest.mark.parametrize("name, keys, says", [
    ("demo", dict(rm_mb=0.001), "rm_mb is 0.001.*one takes 4,624 bytes"),
    ("demo", dict(rm_mb=0.001, rm_dtype="pq", pq_codes=8), "codebooks 32,768"),
    ("demo", dict(rm_dtype="pq", pq_codes=5), "pq_codes = 5"),
    ("demo", dict(slda_weight=1.0, slda_layer="conv1"), "slda_layer.*'conv1'.*below the latent one"),
    ("demo", dict(slda_weight=1.0, slda_layer="conv9"), "slda_layer: no layer 'conv9'"),
    ("demo", dict(pq_codes=8), "pq_codes.*rm_dtype float32"),
    ("demo", dict(rm_sz=0, rm_policy="balanced"), "rm_policy"),
    ("demo", dict(follow="papers", rm_policy="balanced"), "rm_policy.*follow papers"),
    ("demo", dict(follow="moving", rm_dtype="uint8"), "rm_dtype is uint8.*follow moving"),
    ("slda", dict(inc_lr=0.1), "inc_lr.*method slda"), ("slda", dict(rm_sz=10), "method slda.*memory"),
    ("ncm", dict(slda_shrinkage=0.1), "slda_shrinkage.*method ncm"),
    ("folder", dict(slda_layer="pool6", slda_centre=True, weights="none"), "slda_centre.*below the latent"),
    ("DEFAULT", dict(slda_root=True), "slda_root.*slda_weight 0.0")])
def test_what_cannot_be_is_refused(name, keys, says):
    with pytest.raises(ConfigError, match=says):
        config = load_config(name, overrides={"device": "cpu"} | keys)
        program.build_learner(config, 10, (48, 48), torch.device("cpu"))
