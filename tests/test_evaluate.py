"""Random streams, images on their way to the network, and the test, against formulas and loops."""
import contextlib
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
    keys = [(0, 0, "shuffle"), (1, 0, "shuffle"), (0, 1, "shuffle"), (0, 0, "memory"), (2**63 - 1, 390, "a")]
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
    expected = [row[j] / sum(row) if sum(row) else math.nan for j, row in enumerate(confusion)]
    assert result["per_class"] == pytest.approx(expected, nan_ok=True)
    assert set(model.modes) == {(False, False, False)} and len(model.modes) == -(-n // chunk)


@pytest.mark.parametrize("name", ["uint8", "int32", "uint16", "uint32", "uint64"])
def test_labels_of_any_whole_numbers_are_counted_alike(name):
    """Of 50 classes: 49 * 50 + 49, the number of a pair, is beyond uint8."""
    labels = np.arange(50)
    for y in (labels.astype(name), torch.tensor(labels).to(getattr(torch, name)), labels.tolist()):
        result = evaluate(nn.Identity(), torch.eye(50), y)
        assert torch.equal(result["confusion"], torch.eye(50, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"whole numbers.*float64 \(50,\)"):
        evaluate(nn.Identity(), torch.eye(50), labels / 1.0)


def test_a_list_of_images_is_preprocessed_and_other_types_are_refused():
    images = random_images()
    assert torch.equal(preprocess(list(images)), preprocess(images))
    for wrong in (images / 255, images.astype("uint16"), list(images / 255), images[0], [], None,
                  [images[0], images[1, 1:]], images.transpose(0, 3, 1, 2)):
        with pytest.raises(ValueError):
            preprocess(wrong)


@settings(max_examples=25)
@given(n=st.integers(1, 60), columns=st.integers(1, 4), more=st.integers(1, 3), seed=st.integers(0, 99))
def test_images_of_classes_without_a_column_are_wrong_and_leave_the_others_alone(n, columns, more, seed):
    rng = np.random.default_rng(seed)
    scores = torch.tensor(rng.normal(size=(n, columns)) * 100, dtype=torch.float32)
    labels = torch.tensor(rng.integers(0, columns + more, n))
    result = evaluate(nn.Identity(), scores, labels, 7, columns + more)
    known = labels < columns
    assert result["confusion"].shape == (columns + more, columns + more)
    assert result["confusion"][:, columns:].sum() == 0 and result["confusion"].sum() == n
    assert (result["confusion"].sum(1) == labels.bincount(minlength=columns + more)).all()
    assert len(result["per_class"]) == columns + more and math.isfinite(result["loss"])
    if known.any():
        alone = evaluate(nn.Identity(), scores[known], labels[known])
        assert torch.equal(result["confusion"][:columns, :columns], alone["confusion"])
        assert result["per_class"][:columns] == pytest.approx(alone["per_class"], nan_ok=True)
        assert result["accuracy"] == pytest.approx(alone["accuracy"] * known.sum().item() / n)


@settings(max_examples=25)
@given(n=st.integers(1, 60), more=st.integers(0, 3), chunk=st.integers(1, 70), method=st.booleans())
def test_predict_equals_one_argmax_over_the_first_n_inputs(n, more, chunk, method):
    model, scores = Scores(), torch.randn(n + more, 6, generator=seeded(n))
    predicted = predict(model.classify if method else model, scores, n, chunk)
    assert predicted.dtype == torch.int64 and torch.equal(predicted, scores[:n].argmax(1))
    assert set(model.modes) == {(False, False, False)} and len(model.modes) == -(-n // chunk)


@pytest.mark.parametrize("fault", [False, True])
@pytest.mark.parametrize("call", [evaluate, predict])
def test_a_mixed_mode_and_gradients_stay_as_they_were(call, fault):
    model = Scores(fault).train()
    model.inner.training, model.inner[1].training = False, False        # but inner[0] still trains
    x, y = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    with pytest.raises(RuntimeError, match="out of memory") if fault else contextlib.nullcontext():
        result = call(model, x, y if call is evaluate else 4)
    assert [m.training for m in model.modules()] == [True, False, True, False] and torch.is_grad_enabled()
    assert model.modes == [(False, False, False)]
    if not fault and call is evaluate:
        assert result["loss"] == pytest.approx(F.cross_entropy(x, y).item(), rel=1e-6)
