"""The head, CWR*, against a loop over the classes and numbers worked out by hand."""
import copy
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import seeded
from utils import CWRHead


def close(a, b):
    torch.testing.assert_close(a.detach(), torch.tensor(b, dtype=a.dtype), rtol=1e-5, atol=1e-6)


def cwr_by_loop(rows, cw, past, new_y, memory_y, consolidation):
    """The consolidation, class by class in Python floats, of the rows as trained. Returns cw, past and rows.

    per_pattern: c is a list in which class j stands n_j times, and its update is really repeated n_j times.
    """
    labels = new_y + memory_y
    cur = {j: labels.count(j) for j in set(labels)}
    c = sorted(cur) if consolidation == "per_class" else memory_y + sorted(set(new_y))
    entries = [v for j in c for v in rows[j]]
    a = sum(entries) / len(entries)
    cw, met = [list(row) for row in cw], [p > 0 for p in past]
    for j in c:
        t = [w - a for w in rows[j]]
        s = math.sqrt(past[j] / cur[j])
        cw[j] = [(v * s + t_k) / (s + 1) for v, t_k in zip(cw[j], t)] if met[j] else t
    past = [p + cur.get(j, 0) for j, p in enumerate(past)]
    return cw, past, [row if past[j] else [0.0] * len(row) for j, row in enumerate(cw)]


@st.composite
def label_streams(draw):
    """(number of classes, [(labels of the new images, labels of the memory) of each batch])."""
    classes = draw(st.integers(1, 9))
    label = st.integers(0, classes - 1)
    batch = st.tuples(st.lists(label, min_size=1, max_size=12), st.lists(label, max_size=30))
    return classes, draw(st.lists(batch, min_size=1, max_size=5))


@pytest.mark.parametrize("consolidation", ["per_class", "per_pattern"])
@settings(max_examples=40)
@given(stream=label_streams(), seed=st.integers(0, 1000))
@example(stream=(3, [([0, 0, 1], []), ([2], [0, 0, 1] * 300), ([1], [2])]), seed=0)
def test_head_equals_the_loop_over_classes(consolidation, stream, seed):
    classes, batches = stream
    rng, linear = seeded(seed), nn.Linear(4, classes, bias=False).double()
    head = CWRHead(linear, consolidation)
    cw, past = [[0.0] * 4 for _ in range(classes)], [0] * classes
    for new_y, memory_y in batches:
        head.begin(torch.tensor(new_y), torch.tensor(memory_y, dtype=torch.int64))
        start = [cw[j] if j in new_y + memory_y and past[j] else [0.0] * 4 for j in range(classes)]
        close(linear.weight, start)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(classes, 4, generator=rng, dtype=torch.float64))     # "training"
        cw, past, rows = cwr_by_loop(linear.weight.tolist(), cw, past, new_y, memory_y, consolidation)
        head.consolidate()
        close(head.cw, cw)
        close(linear.weight, rows)
        assert head.past_j.tolist() == past


@pytest.mark.parametrize("consolidation, kept", [("per_class", 2 / 3), ("per_pattern", (2 / 3) ** 3)])
def test_head_by_hand(consolidation, kept):
    """Class 0: met 16 times, now 4 (2 new, 2 in memory): s = 2; 2/3 of the old stays, or (2/3)^3."""
    linear = nn.Linear(2, 3, bias=False)
    head = CWRHead(linear, consolidation)
    cw = torch.tensor([[3.0, 6.0], [1.0, 1.0], [0.0, 0.0]])
    head.load_state_dict({"cw": cw, "past_j": torch.tensor([16, 5, 0])})
    head.begin(torch.tensor([0, 0]), torch.tensor([0, 0]))
    assert linear.weight.tolist() == [[3, 6], [0, 0], [0, 0]]
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[7.0, 9.0], [5.0, 5.0], [4.0, 4.0]]))     # a = 8: t = (-1, 1)
    head.consolidate()
    assert linear.weight[0].tolist() == pytest.approx([-1 + 4 * kept, 1 + 5 * kept])
    assert linear.weight[1:].tolist() == [[1, 1], [0, 0]] and head.past_j.tolist() == [20, 5, 0]


def test_head_without_consolidation_is_left_alone():
    linear = nn.Linear(3, 4, bias=False)
    head, before = CWRHead(linear, "none"), linear.weight.clone()
    for new_y, memory_y in (([0, 0, 1], []), ([2], [0, 1, 1])):
        head.begin(torch.tensor(new_y), torch.tensor(memory_y, dtype=torch.int64))
        assert torch.equal(linear.weight, before)
        head.consolidate()
        assert torch.equal(linear.weight, before)
    assert head.past_j.tolist() == [3, 3, 1, 0]
    with pytest.raises(ValueError, match="per_class"):
        CWRHead(linear, "per_batch")
    with pytest.raises(ValueError, match="bias=False"):
        CWRHead(nn.Linear(64, 50))


def test_head_continues_from_its_state():
    def batch(head, new_y, memory_y):
        head.begin(torch.tensor(new_y), torch.tensor(memory_y, dtype=torch.int64))
        with torch.no_grad():
            head.linear.weight.add_(torch.arange(20.0).view(4, 5).sin())
        head.consolidate()
    heads = [CWRHead(nn.Linear(5, 4, bias=False), "per_pattern") for _ in range(2)]
    batch(heads[0], [0, 1, 1], [])
    heads[1].load_state_dict(copy.deepcopy(heads[0].state_dict()))
    for head in heads:
        batch(head, [2, 1], [0, 1, 1])
    assert torch.equal(heads[0].linear.weight, heads[1].linear.weight)
    assert heads[1].linear.weight[:3].abs().sum() > 0
    assert heads[0].past_j.tolist() == heads[1].past_j.tolist() == [1 + 1, 2 + 3, 1, 0]
