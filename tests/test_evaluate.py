"""Random streams, images on their way to the network, and the test, against formulas and loops over patterns."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import random_images, seeded
from utils import evaluate, generator, predict, preprocess

# ---- random streams ----

def test_generator_gives_one_stream_per_seed_batch_and_purpose():
    def numbers(*key):
        return tuple(torch.randint(2**62, (4,), generator=generator(*key)).tolist())
    keys = [(0, 0, "shuffle"), (1, 0, "shuffle"), (0, 1, "shuffle"), (0, 0, "memory"), (1, 1, "memory"),
            (2**63 - 1, 390, "shuffle")]
    assert [numbers(*key) for key in keys] == [numbers(*key) for key in keys]
    assert len({numbers(*key) for key in keys}) == len(keys)
    assert len({numbers(seed, batch, "memory") for seed in range(20) for batch in range(100)}) == 2000


# ---- images on the device ----

@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_preprocess_equals_the_formula(kind):
    images = random_images()
    expected = (images / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    given = kind(images.copy())
    x = preprocess(given)
    np.testing.assert_allclose(x, expected.transpose(0, 3, 1, 2), atol=1e-6)
    assert x.dtype == torch.float32 and x.shape == (5, 3, 6, 4)
    assert x.is_contiguous(memory_format=torch.channels_last) and np.array_equal(np.asarray(given), images)


# ---- the test ----

class Scores(nn.Module):
    """Gives back its input as scores, and remembers the mode it was called in; raises if `fault`."""

    def __init__(self, fault=False):
        super().__init__()
        self.inner, self.fault, self.modes = nn.Sequential(nn.Dropout(0.5), nn.Identity()), fault, []

    def forward(self, x):
        self.modes.append((self.training, self.inner.training, self.inner[0].training))
        if self.fault:
            raise RuntimeError("out of memory")
        return self.inner(x)

    classify = forward


@settings(max_examples=25)
@given(n=st.integers(1, 60), classes=st.integers(1, 6), chunk=st.integers(1, 70), seed=st.integers(0, 99),
       method=st.booleans())
def test_evaluate_equals_the_loop_over_patterns(n, classes, chunk, seed, method):
    rng, model = np.random.default_rng(seed), Scores()
    scores, labels = rng.normal(size=(n, classes)) * 3, rng.integers(0, classes, n)
    result = evaluate(model.classify if method else model, torch.tensor(scores), torch.tensor(labels), chunk)
    loss, confusion = 0.0, np.zeros((classes, classes), dtype=int)
    for row, y in zip(scores.tolist(), labels.tolist()):
        loss += math.log(sum(math.exp(v) for v in row)) - row[y]
        confusion[y, row.index(max(row))] += 1
    assert np.array_equal(result["confusion"], confusion)
    assert result["loss"] == pytest.approx(loss / n, abs=1e-9)
    assert result["accuracy"] == pytest.approx(sum(confusion[j, j] for j in range(classes)) / n)
    expected = [confusion[j, j] / sum(confusion[j]) if sum(confusion[j]) else math.nan for j in range(classes)]
    assert result["per_class"] == pytest.approx(expected, nan_ok=True)
    assert set(model.modes) == {(False, False, False)} and len(model.modes) == -(-n // chunk)


@pytest.mark.parametrize("fault", [False, True])
def test_evaluate_leaves_a_mixed_mode_as_it_was(fault):
    model = Scores(fault).train()
    model.inner.training, model.inner[1].training = False, False        # but inner[0] still trains
    modes = [m.training for m in model.modules()]
    assert modes == [True, False, True, False]
    x, y = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    if fault:
        with pytest.raises(RuntimeError, match="out of memory"):
            evaluate(model, x, y)
    else:
        assert evaluate(model, x, y)["loss"] == pytest.approx(F.cross_entropy(x, y).item(), rel=1e-6)
    assert [m.training for m in model.modules()] == modes and model.modes == [(False, False, False)]
    assert torch.is_grad_enabled()


@settings(max_examples=25)
@given(n=st.integers(1, 60), more=st.integers(0, 3), chunk=st.integers(1, 70), seed=st.integers(0, 99), method=st.booleans())
def test_predict_equals_one_argmax_over_all_inputs(n, more, chunk, seed, method):
    """Of the first n inputs, in any chunks; a mixed mode stays as it was."""
    model, scores = Scores().train(), torch.randn(n + more, 6, generator=seeded(seed), requires_grad=True)
    model.inner.training, model.inner[1].training = False, False        # but inner[0] still trains
    predicted = predict(model.classify if method else model, scores, n, chunk)
    assert predicted.dtype == torch.int64 and torch.equal(predicted, scores[:n].argmax(1))
    assert [m.training for m in model.modules()] == [True, False, True, False] and torch.is_grad_enabled()
    assert set(model.modes) == {(False, False, False)} and len(model.modes) == -(-n // chunk)


def test_predict_leaves_a_mixed_mode_as_it_was_when_it_fails():
    model = Scores(fault=True).train()
    model.inner.training = False
    with pytest.raises(RuntimeError, match="out of memory"):
        predict(model, torch.randn(4, 3), 4)
    assert [m.training for m in model.modules()] == [True, False, True, True] and torch.is_grad_enabled()
