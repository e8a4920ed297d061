"""Mini-batches and the replay memory, each against its rule.

Patterns are tagged: a latent holds the batch, index and label that it stands for.
"""
import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness.encoder import EncodedOnDemand
from helpers import seeded
from utils import ReplayMemory, memory_format, minibatches

# ---- mini-batches ----

def test_minibatches_of_the_published_size():
    """n = 300, R = 1500: k = 1800 // 128 = 14, c = 300 // 14 = 21, 14 iterations of 21 + 107."""
    plan = minibatches(300, 1500)
    assert [(len(new), len(old)) for new, old in plan] == [(21, 107)] * 14
    assert torch.equal(torch.cat([old for _, old in plan]), torch.arange(1498))     # "almost once per epoch"


def check_plan(n, m, mb_size):
    """All that minibatches says of n images and m patterns in the memory."""
    plan = minibatches(n, m, mb_size, seeded(0))
    assert all(t.dtype == torch.int64 for pair in plan for t in pair)
    images = torch.cat([new for new, _ in plan])
    if m == 0:      # padded with the first images to a multiple, cut into mini-batches without replay
        padding = torch.tensor([i % n for i in range(-n % mb_size)], dtype=torch.int64)
        assert torch.equal(torch.bincount(images, minlength=n), torch.bincount(padding, minlength=n) + 1)
        assert {(len(new), len(old)) for new, old in plan} == {(mb_size, 0)}
        return
    k = (n + m) // mb_size
    # the first two, where the rule divides by 0: one mini-batch, or n
    c = n if k == 0 else 1 if n < k else n // k
    ruled = k > 0 and c < mb_size
    if c >= mb_size:                                # no room for replay: as few iterations as leave some
        k = min(q for q in range(1, n + 1) if n / q <= mb_size - 1)
        c = n // k
    assert len(plan) == n // c and {len(new) for new, _ in plan} == {c}
    assert len(images.unique()) == len(images) == n - n % c and 0 <= images.min() and images.max() < n
    start, r = 0, min(m, mb_size - c)
    assert r >= 1 and c + r <= mb_size
    if ruled:
        assert r == mb_size - c                     # full mini-batches wherever the rule is defined
    for _, old in plan:
        assert old.tolist() == [(start + i) % m for i in range(r)] and len(old.unique()) == r
        start += r


@settings(max_examples=300)
@given(n=st.integers(1, 4000), m=st.integers(0, 5000), mb_size=st.sampled_from([128, 128, 128, 16, 2]))
@example(n=1, m=1, mb_size=128)
@example(n=1, m=5000, mb_size=128)
@example(n=4000, m=5000, mb_size=128)
@example(n=300, m=83, mb_size=128)
def test_minibatches_keep_the_rule(n, m, mb_size):
    check_plan(n, m, mb_size)


@pytest.mark.parametrize("m", [0, 1, 2, 126, 127, 128, 129, 1500, 5000])
def test_minibatches_keep_the_rule_at_its_edges(m):
    for n in [*range(1, 60), *(128 * q + e for q in (1, 2, 8, 31) for e in (-2, -1, 0, 1)), 293, 2999, 4000]:
        check_plan(n, m, 128)


@settings(max_examples=300)
@given(n=st.integers(1, 700), m=st.integers(1, 3000), mb_size=st.sampled_from([128, 128, 16, 2]))
@example(n=20, m=220, mb_size=128)      # of which the published rule replays 108, the same in every epoch
@example(n=100, m=150, mb_size=128)     # 28
@example(n=100, m=30, mb_size=128)
def test_a_whole_plan_replays_every_pattern_in_every_epoch_and_learns_nearly_all_images(n, m, mb_size):
    plan = minibatches(n, m, mb_size, seeded(0), epochs=2, whole=True)
    epoch = plan[:len(plan) // 2]
    times = torch.bincount(torch.cat([new for new, _ in epoch]), minlength=n)
    assert (times == 0).sum() < len(epoch[0][0]) and times.max() <= max(1, len(epoch) // n + 1)
    assert len(torch.cat([old for _, old in epoch]).unique()) == m
    assert all(1 <= len(new) and 1 <= len(old) and len(new) + len(old) <= mb_size for new, old in plan)
    published = minibatches(n, m, mb_size, seeded(0))
    if len(torch.cat([old for _, old in published]).unique()) == m:
        assert all(torch.equal(a, b) for mine, theirs in zip(epoch, published, strict=True)
                   for a, b in zip(mine, theirs))


@pytest.mark.parametrize("n, m", [(300, 1500), (300, 0)])
def test_minibatches_depend_on_the_generator_alone(n, m):
    def images(seed):
        return torch.cat([new for new, _ in minibatches(n, m, rng=seeded(seed))])
    assert torch.equal(images(5), images(5)) and not torch.equal(images(5), images(6))
    assert not torch.equal(images(5), images(5).sort().values)
    with pytest.raises(ValueError, match="at least one image"):
        minibatches(0, m)
    with pytest.raises(ValueError, match="mb_size"):
        minibatches(n, 1, mb_size=1)


# ---- the replay memory ----

def tagged(n, i, classes=50, shape=(3,)):
    """n latents of batch i, whose values are (batch, index, label), and their labels."""
    index = torch.arange(n)
    labels = (index * 7 + i * 11) % classes
    latents = torch.stack((torch.full((n,), i), index, labels), 1).double()
    return latents.view(n, *shape), labels


def content(memory):
    return [tuple(x) for x in memory.x.flatten(1).long().tolist()]


def check_update(memory, n, i, rng):
    """One update with tagged patterns: all that ReplayMemory.update says of it."""
    before, free = content(memory), memory.rm_sz - len(memory)
    latents, labels = tagged(n, i)
    memory.update(latents, labels, i, rng)
    after = content(memory)
    h = min(max(memory.rm_sz // (i + 1), free), n)
    changed = [a for a, b in zip(after, before) if a != b]
    added = after[len(before):]
    fresh = changed + added
    filled = min(free, h)
    assert len(after) == len(memory) == len(before) + filled <= memory.rm_sz    # free slots are filled first
    assert len(fresh) == h and all(batch == i for batch, _, _ in fresh)         # h latents, of this batch,
    assert len({index for _, index, _ in fresh}) == h                           # without replacement;
    assert sum(a == b for a, b in zip(after, before)) == len(before) - (h - filled)     # the others untouched
    assert memory.y.tolist() == [label for _, _, label in after]                # labels belong to latents
    assert memory.batch.tolist() == [batch for batch, _, _ in after]
    assert all(label == (index * 7 + batch * 11) % 50 for batch, index, label in after)


@settings(max_examples=40)
@given(rm_sz=st.one_of(st.integers(0, 30), st.integers(0, 5000)), seed=st.integers(0, 99),
       sizes=st.lists(st.one_of(st.integers(1, 20), st.integers(1, 4000)), min_size=1, max_size=6))
@example(rm_sz=1500, sizes=[2999, 300, 293, 1], seed=0)         # the published sizes
@example(rm_sz=5000, sizes=[4000, 1, 4000, 4000], seed=0)       # a memory that batch 0 does not fill
@example(rm_sz=2, sizes=[3, 1, 1, 5], seed=0)                   # R // (i + 1) reaches 0
def test_memory_takes_its_share_of_each_batch(rm_sz, sizes, seed):
    memory, rng = ReplayMemory(rm_sz, like=torch.zeros(1, 3, dtype=torch.float64)), seeded(seed)
    for i, n in enumerate(sizes):
        check_update(memory, n, i, rng)


def test_memory_over_the_published_stream():
    """391 batches into 1500 slots: h = 1500 // (i + 1) says how many of each batch can at most be left."""
    memory, rng = ReplayMemory(1500, like=torch.zeros(1, 3, dtype=torch.float64)), seeded(0)
    for i in range(391):
        check_update(memory, 2999 if i == 0 else 297, i, rng)
    counts = torch.bincount(memory.batch, minlength=391)
    assert counts.sum() == 1500
    assert all(count <= 1500 // (i + 1) for i, count in enumerate(counts.tolist()))
    assert counts[390] == 3 and 600 < counts[:196].sum() < 1100     # old and recent ones keep similar shares


def test_memory_draws_patterns_and_slots_uniformly():
    """Over 2000 updates of batch 1, 5 of 20 patterns into 5 of 10 slots: chi-square at the 0.1 % level."""
    rng, patterns, slots = seeded(0), torch.zeros(20), torch.zeros(10)
    for _ in range(2000):
        memory = ReplayMemory(10, like=torch.zeros(1, 3, dtype=torch.float64))
        memory.update(*tagged(10, 0), 0, rng)
        memory.update(*tagged(20, 1), 1, rng)
        new = memory.batch == 1
        slots[new] += 1
        patterns[memory.x[new][:, 1].long()] += 1
    # draws without replacement vary less than a multinomial's, so its limits hold all the more
    assert ((patterns - 500) ** 2 / 500).sum() < 43.8 and ((slots - 1000) ** 2 / 1000).sum() < 27.9
    assert patterns.min() > 0 and slots.sum() == patterns.sum() == 10000 and patterns.std() > 1


def test_memory_draws_depend_on_the_generator_alone():
    def filled(seed):
        memory = ReplayMemory(50, like=torch.zeros(1, 3, dtype=torch.float64))
        for i in range(3):
            memory.update(*tagged(80, i), i, seeded(seed))
        return content(memory)
    assert filled(1) == filled(1) != filled(2)


@pytest.mark.parametrize("rm_sz, n", [(40, 100), (40, 15)])
def test_memory_continues_from_its_state(rm_sz, n):
    memories = [ReplayMemory(rm_sz, like=torch.zeros(1, 3, dtype=torch.float64)) for _ in range(2)]
    memories[0].update(*tagged(n, 0), 0, seeded(0))
    memories[1].load_state_dict(copy.deepcopy(memories[0].state_dict()))
    assert len(memories[1]) == min(rm_sz, n) and content(memories[1]) == content(memories[0])
    for memory in memories:
        check_update(memory, 60, 1, seeded(1))
    assert content(memories[0]) == content(memories[1])


def test_memory_keeps_channels_last_storage():
    like = torch.zeros(1, 4, 3, 2, dtype=torch.float64)
    for given_format, kept in ((torch.channels_last, True), (torch.contiguous_format, False)):
        latents = torch.randn(9, 4, 3, 2, dtype=torch.float64).to(memory_format=given_format)
        memory = ReplayMemory(6, like.to(memory_format=given_format))
        memory.update(latents, torch.arange(9), 0, seeded(0))
        for x in (memory.x, memory.x[torch.tensor([3, 1])]):
            assert x.is_contiguous(memory_format=torch.channels_last) == kept == (not x.is_contiguous())
        assert torch.equal(memory.x, latents[memory.y])
        assert memory_format(latents) == given_format


def test_memory_takes_latents_that_are_encoded_on_demand():
    images = torch.randint(256, (700, 2, 2, 3), dtype=torch.uint8, generator=seeded(0))
    latents = EncodedOnDemand(images, lambda part: part.flatten(1).float())
    memory = ReplayMemory(600, like=latents[:1])
    memory.update(latents, torch.arange(700), 0, seeded(0))
    assert torch.equal(memory.x, latents[:][memory.y]) and len(memory.y.unique()) == 600
