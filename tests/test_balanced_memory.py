"""Which patterns a balanced memory keeps."""
from types import SimpleNamespace

import pytest
import torch

from helpers import seeded
from methods.balanced_memory import BalancedMemory, EvenTraining, fair_shares

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


@pytest.mark.parametrize("rm_sz, stored, new, trained_on", [
    (13, [5, 5, 0, 0], [0, 0, 30, 1], [0, 0, 4, 1]),        # the memory will hold 4, 4, 4 and 1
    (100, [5, 5, 0, 0], [3, 0, 30, 1], [3, 0, 30, 1]),      # there is room for all
    (6, [6, 0, 0, 0], [30, 30, 0, 0], [3, 3, 0, 0]),
    (1, [1, 0, 0, 0], [9, 9, 9, 0], [1, 1, 1, 0])])         # at least one of each
def test_training_takes_no_more_of_a_class_than_its_share_of_the_memory(rm_sz, stored, new, trained_on):
    labels = torch.arange(4).repeat_interleave(torch.tensor(new))
    labels = labels[torch.randperm(len(labels), generator=seeded(1))]
    learner = SimpleNamespace(memory=SimpleNamespace(
        rm_sz=rm_sz, y=torch.arange(4).repeat_interleave(torch.tensor(stored))))
    latents = torch.stack((torch.arange(len(labels)), labels), 1)       # each carries its place and its label

    def train_batch(given, x, y, epochs, rng):
        x = x[:]
        assert given is learner and epochs == 7 and x[:, 1].equal(y)
        assert len(x[:, 0].unique()) == len(y)      # no image twice
        return y.bincount(minlength=4).tolist()

    found = EvenTraining(train_batch)(learner, latents, labels, 7, seeded(3))
    assert found == trained_on
