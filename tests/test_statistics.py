"""Baselines in closed form, against the formulas evaluated on all data at once."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ar1star_lat_replay as program
from helpers import REPO, same, seeded
from lab.baselines import StatisticsLearner
from lab.config import ConfigError, load_config
from methods.statistics import UNMET, NearestClassMean, Pooled, StreamingLDA
from models.mobilenet import MobileNetV1
from utils import preprocess

PARAMS = REPO / "params.cfg"


def features(n, d, classes, seed):
    """Correlated features of classes whose means lie apart, and their labels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    mixing, means = rng.normal(size=(d, d)), 3 * rng.normal(size=(classes, d))
    return means[y] + rng.normal(size=(n, d)) @ mixing, y


def scores_of_all_data(x, y, classes, shrinkage, test):
    """Class scores of `test` by the formula: S from one pass over every pattern around the mean of its class."""
    means = {c: x[y == c].mean(0) for c in set(y.tolist())}
    covariance = sum(np.outer(a - means[c], a - means[c]) for a, c in zip(x, y.tolist())) / len(x)
    s = (1 - shrinkage) * covariance + shrinkage * np.eye(x.shape[1]) if shrinkage is not None else np.eye(x.shape[1])
    scores = np.full((len(test), classes), UNMET)
    for c, mu in means.items():
        w = np.linalg.inv(s) @ mu
        scores[:, c] = test @ w - mu @ w / 2
    return scores


@pytest.mark.parametrize("make, shrinkage", [(StreamingLDA, 1e-4), (NearestClassMean, None)])
@settings(max_examples=15)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), seed=st.integers(0, 99), by_class=st.booleans())
def test_scores_equal_those_of_all_data_at_once_whatever_the_order(make, shrinkage, sizes, seed, by_class):
    n, d, classes = 40 + sum(sizes), 6, 5
    x, y = features(n, d, classes - 1, seed)        # the last class is never met
    order = np.argsort(y, kind="stable") if by_class else np.arange(n)     # one class after the other, or mixed
    head = make(nn.Linear(d, classes))
    start = 0
    for end in (*np.cumsum(sizes).tolist(), n):
        part = order[start:end]
        head.update(torch.from_numpy(x[part]).float(), torch.from_numpy(y[part]))
        start = end
    test, _ = features(20, d, classes, seed + 1)
    expected = scores_of_all_data(x, y, classes, shrinkage, test)
    found = head.linear(torch.from_numpy(test).float()).detach().double().numpy()
    met = np.unique(y)
    np.testing.assert_allclose(found[:, met], expected[:, met], rtol=2e-3, atol=2e-3 * np.abs(expected[:, met]).max())
    assert (found[:, classes - 1] < found[:, met].min()).all()
    assert head.past_j.tolist() == np.bincount(y, minlength=classes).tolist()


def test_two_classes_in_two_dimensions_by_hand():
    """Means (0, 0) and (4, 0); patterns +-1 along the first axis and +-2 along the second: covariance diag(1/2, 2)."""
    head = StreamingLDA(nn.Linear(2, 2), shrinkage=0.5)
    cross = torch.tensor([[1.0, 0], [-1, 0], [0, 2], [0, -2]])
    for j, mean in enumerate(([0.0, 0], [4.0, 0])):
        head.update(cross + torch.tensor(mean), torch.full((4,), j))
    assert head.scatter.tolist() == [[4.0, 0.0], [0.0, 16.0]] and head.mean.tolist() == [[0.0, 0.0], [4.0, 0.0]]
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


def test_pooled_by_hand():
    maps = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]], [[0.0, 0.0], [0.0, -1.0]]]])
    assert Pooled()(maps).tolist() == [[4.0, -0.25]] and Pooled(root=True)(maps).tolist() == [[2.0, -0.5]]
    assert Pooled(root=True)(torch.tensor([[9.0, -16.0, 0.0]])).tolist() == [[3.0, -4.0, 0.0]]


def test_the_learner_takes_pooled_outputs_of_any_layer():
    """Class means of the features, one image at a time through the layers themselves; the network stays as it was."""
    net = MobileNetV1(3, "conv6/dw", width=0.1)
    images, labels = torch.randint(0, 256, (12, 48, 48, 3), dtype=torch.uint8, generator=seeded(0)), torch.arange(12) % 3
    learner = StatisticsLearner("ncm", net, root=True)
    learner.learn(images, labels)
    learner.check_frozen()
    net.eval()
    with torch.no_grad():
        features = torch.stack([net.lat_features(preprocess(x[None]))[0].mean((1, 2)).sqrt() for x in images])
    means = torch.stack([features[labels == j].mean(0) for j in range(3)])
    assert torch.allclose(learner.head.mean, means, atol=1e-5)
    assert learner.predict(images).tolist() == (features[:, None] - means).square().sum(2).argmin(1).tolist()


@pytest.mark.parametrize("method, more", [("slda", {}), ("ncm", {}), ("slda", dict(latent_layer_num="conv5_6/sep",
                                                                              slda_root=True, slda_shrinkage=1e-3))])
def test_a_run_learns_and_continues_bit_by_bit(tmp_path, method, more):
    keys = dict(dataset="demo", weights="none", width=0.1, test_stride=4, device="cpu", checkpoint_share=1.0) | more
    config = load_config(method, PARAMS, keys)
    whole = program.run_experiment(config, "whole", tmp_path, 12)
    for batches in (1, 5, 12):
        parts = program.run_experiment(config, "parts", tmp_path, batches)
    rows = [[{k: v for k, v in row.items() if not k.startswith("seconds")} for row in run["rows"]] for run in (whole, parts)]
    assert rows[0] == rows[1] and json.dumps(rows[0])
    states = [torch.load(run["folder"] / "checkpoint.pt", weights_only=True) for run in (whole, parts)]
    assert same(*({k: state[k] for k in ("net", "head")} for state in states))
    assert whole["final_accuracy"] > .12 and rows[0][-1]["memory_size"] == 0      # random features; chance is 10 %
    learner = program.load_learner(whole["folder"])
    stream = program.open_stream(config)
    x, y = stream.get_test_set(4)
    assert (learner.predict(x).numpy() == y).mean() == pytest.approx(whole["final_accuracy"], abs=1e-9)


def test_settings_of_training_are_refused_with_a_method_without_training():
    with pytest.raises(ConfigError, match="do nothing: inc_lr .with method slda."):
        load_config("slda", PARAMS, {"inc_lr": 0.1})
    with pytest.raises(ConfigError, match="method slda keeps no memory"):
        load_config("slda", PARAMS, {"rm_sz": 10})
    with pytest.raises(ConfigError, match="slda_shrinkage .with method ncm."):
        load_config("ncm", PARAMS, {"slda_shrinkage": 0.1})
    with pytest.raises(ConfigError, match="slda_root .with slda_weight 0.0."):
        load_config("DEFAULT", PARAMS, {"slda_root": True})
