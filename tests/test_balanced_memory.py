"""Which patterns a balanced memory keeps."""
import pytest
import torch

from helpers import seeded
from methods.balanced_memory import BalancedMemory, fair_shares

LIKE = torch.zeros(1, 2)


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
    """Random batches of one to three classes, with patterns that carry their own number: sizes, balance, no
    pattern twice, each with its own label and batch; of the batches so far it is always full."""
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

        # a class that could have more has no less than the fullest, but for the remainder
        counts = memory.y.bincount(minlength=8)
        hungry = counts < before + labels.bincount(minlength=8)
        assert not hungry.any() or counts[hungry].min() >= counts.max() - 1
        number += n


def test_within_a_class_its_batches_share():
    memory, y = BalancedMemory(30, LIKE), torch.zeros(30, dtype=torch.int64)
    for i, expected in enumerate(([30], [15, 15], [10, 10, 10])):
        memory.update(torch.rand(30, 2), y, i, seeded(i))
        assert memory.batch.bincount().tolist() == expected
    memory.update(torch.rand(30, 2), y + 1, 3, seeded(3))
    assert memory.batch.bincount().tolist() == [5, 5, 5, 15]
