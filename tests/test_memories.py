"""Which patterns are kept and how many an epoch replays: the balanced memory's bookkeeping, and parts of a memory."""
import pytest
import torch

from methods.memories import BalancedMemory, fair_shares, part_of_memory
from methods.papers import minibatches as papers_minibatches
from utils import minibatches

LIKE = torch.zeros(1, 2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("total, available, shares", [
    (6, [5, 5, 5], [2, 2, 2]), (9, [1, 5, 5], [1, 4, 4]), (100, [1, 5, 5], [1, 5, 5]), (0, [3, 3], [0, 0]),
    (7, [1, 2, 9], [1, 2, 4]), (3, [0, 2, 0, 1], [0, 2, 0, 1])])
def test_fair_shares_by_hand(total, available, shares):
    assert fair_shares(total, torch.tensor(available)).tolist() == shares


def test_what_cannot_be_divided_is_drawn():
    found = {tuple(fair_shares(4, torch.tensor([5, 5, 5]), seeded(s)).tolist()) for s in range(30)}
    assert found == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}


@pytest.mark.parametrize("seed", range(20))
def test_fair_shares_are_fair(seed):
    """They add up; and one that is more than 1 smaller than another has all that is available."""
    available = torch.randint(0, 12, (9,), generator=seeded(seed))
    total = int(torch.randint(0, 70, (), generator=seeded(seed + 100)))
    shares = fair_shares(total, available, seeded(seed))
    assert shares.sum() == min(total, available.sum()) and (shares <= available).all() and (shares >= 0).all()
    assert (shares[shares < available] >= shares.max() - 1).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_balanced_memory(seed):
    """Random batches of one to three classes, with patterns that carry their own number: sizes, balance, no pattern twice,
    each with its own label and batch; of the batches so far it is always full."""
    memory, known, number, rng = BalancedMemory(60, LIKE), {}, 0, seeded(seed)
    for i in range(12):
        n = int(torch.randint(5, 40, (), generator=rng))
        classes = torch.randperm(8, generator=rng)[:1 + i % 3]
        labels = classes[torch.randint(0, len(classes), (n,), generator=rng)]
        x = torch.arange(number, number + n).float()[:, None].expand(n, 2).contiguous()
        known |= {number + k: (int(labels[k]), i) for k in range(n)}
        before = memory.y.bincount(minlength=8).clone()
        memory.update(x, labels, i, rng)
        held = memory.x[:, 0].long().tolist()
        assert len(memory) == len(set(held)) == min(60, before.sum() + n)
        assert [known[k] for k in held] == list(zip(memory.y.tolist(), memory.batch.tolist()))
        counts, could = memory.y.bincount(minlength=8), before + labels.bincount(minlength=8)
        hungry = counts < could         # a class that could have more has no less than the fullest, but for the remainder
        assert not hungry.any() or counts[hungry].min() >= counts.max() - 1
        number += n


def test_within_a_class_its_batches_share():
    memory, y = BalancedMemory(30, LIKE), torch.zeros(30, dtype=torch.int64)
    for i, expected in enumerate(([30], [15, 15], [10, 10, 10])):
        memory.update(torch.rand(30, 2), y, i, seeded(i))
        assert memory.batch.bincount().tolist() == expected
    memory.update(torch.rand(30, 2), y + 1, 3, seeded(3))
    assert memory.batch.bincount().tolist() == [5, 5, 5, 15]


@pytest.mark.parametrize("rule", [minibatches, papers_minibatches])
def test_part_of_a_memory(rule):
    """The steps are those of the smaller memory; an epoch replays each pattern of its part as often as the rule does its
    own; epochs have different parts; nothing is asked for that is not there."""
    plan = part_of_memory(500, rule)(200, 16000, 128, seeded(), 4)
    of_500 = rule(200, 500, 128, seeded(), 4)
    assert [(len(new), len(old)) for new, old in plan] == [(len(new), len(old)) for new, old in of_500]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(plan, of_500))       # the new images as they were
    steps = len(plan) // 4
    epochs = [torch.cat([old for _, old in plan[k * steps:(k + 1) * steps]]) for k in range(4)]
    theirs = [torch.cat([old for _, old in of_500[k * steps:(k + 1) * steps]]) for k in range(4)]
    assert all(old.min() >= 0 and old.max() < 16000 for old in epochs)
    assert [len(old.unique()) for old in epochs] == [len(old.unique()) for old in theirs]
    assert len(torch.cat(epochs).unique()) > 3.5 * len(epochs[0].unique())


def test_a_memory_that_is_no_larger_is_replayed_as_ever():
    for m in (0, 300, 500):
        ours, theirs = part_of_memory(500)(200, m, 128, seeded(), 2), minibatches(200, m, 128, seeded(), 2)
        assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(ours, theirs))
