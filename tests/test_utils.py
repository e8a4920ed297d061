"""The pieces of the method, each against loops or numbers worked out by hand from its specification.

Sections are those of the specification: 4 what learns, 5 the head, 6 mini-batches, 7 the replay memory, 8 Synaptic
Intelligence. Patterns are tagged: a latent holds the batch, index and label that it stands for.
"""
import contextlib
import copy
import math
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from models.batch_renorm import BatchRenorm2D
from models.mobilenet import MobileNetV1
from models.split_net import SplitNet
from utils import (CWRHead, Encoder, LazyLatents, ReplayMemory, SynapticIntelligence, TrainStep, evaluate, generator,
                   memory_format, minibatches, preprocess, set_up_kernels, trainable_conv_weights)


def same(a, b):
    torch.testing.assert_close(a.detach(), torch.tensor(b, dtype=a.dtype), rtol=1e-5, atol=1e-6)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---- the machine ----

@pytest.mark.parametrize("precision, tf32", [("highest", False), ("high", True), ("medium", True)])
def test_the_precision_of_products_holds_for_matrices_and_convolutions(precision, tf32):
    set_up_kernels(True, precision)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cudnn.allow_tf32 == tf32
    assert torch.backends.cudnn.benchmark


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_memory_that_tensors_give_up_is_used_again():
    """glibc takes the thresholds, and blocks that are taken and given up again and again cause no page faults any more."""
    program = """
import ctypes, resource, torch, utils
answers, library = [], ctypes.CDLL(None)
class Spy:
    def __init__(self, name): pass
    def mallopt(self, *setting):
        answers.append((*setting, library.mallopt(*setting)))
utils.ctypes.CDLL = Spy
utils.set_up_kernels(True, "highest")
assert answers == [(-3, 32 << 20, 1), (-1, 2**31 - 1, 1)], answers      # 1: accepted
def use():
    blocks = [torch.zeros(4 << 20) for _ in range(12)]      # 16 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults = [use() for _ in range(12)]
assert faults[-1] - faults[5] < 4096, faults                # the pages of one block
utils.set_up_kernels(False, "highest")
assert answers[2:] == [(-3, 32 << 20, 1), (-1, 64 << 20, 1)], answers
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- random streams ----

def test_generator_gives_one_stream_per_seed_batch_and_purpose():
    def numbers(*key):
        return tuple(torch.randint(2**62, (4,), generator=generator(*key)).tolist())
    keys = [(0, 0, "shuffle"), (1, 0, "shuffle"), (0, 1, "shuffle"), (0, 0, "memory"), (1, 1, "memory"),
            (2**63 - 1, 390, "shuffle")]
    assert [numbers(*key) for key in keys] == [numbers(*key) for key in keys]
    assert len({numbers(*key) for key in keys}) == len(keys)
    assert len({numbers(seed, batch, "memory") for seed in range(20) for batch in range(100)}) == 2000


# ---- section 5: the head ----

def cwr_by_loop(rows, cw, past, new_y, memory_y, consolidation):
    """Step 3 and 4 of section 5, class by class in Python floats, on the rows as trained. Returns cw, past and rows.

    per_pattern: C is a list in which class j stands n_j times, and the update of j is really repeated n_j times.
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
    return classes, draw(st.lists(st.tuples(st.lists(label, min_size=1, max_size=12), st.lists(label, max_size=30)),
                                  min_size=1, max_size=5))


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
        same(linear.weight, start)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(classes, 4, generator=rng, dtype=torch.float64))     # "training"
        cw, past, rows = cwr_by_loop(linear.weight.tolist(), cw, past, new_y, memory_y, consolidation)
        head.consolidate()
        same(head.cw, cw)
        same(linear.weight, rows)
        assert head.past_j.tolist() == past


@pytest.mark.parametrize("consolidation, kept", [("per_class", 2 / 3), ("per_pattern", (2 / 3) ** 3)])
def test_head_by_hand(consolidation, kept):
    """Class 0: met 16 times, now 4 (2 new, 2 in memory): s = 2; 2/3 of the old stays, 3 times over per pattern."""
    linear = nn.Linear(2, 3, bias=False)
    head = CWRHead(linear, consolidation)
    head.load_state_dict({"cw": torch.tensor([[3.0, 6.0], [1.0, 1.0], [0.0, 0.0]]), "past_j": torch.tensor([16, 5, 0])})
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
    assert torch.equal(heads[0].linear.weight, heads[1].linear.weight) and heads[1].linear.weight[:3].abs().sum() > 0
    assert torch.equal(heads[0].past_j, heads[1].past_j) and heads[1].past_j.tolist() == [1 + 1, 2 + 3, 1, 0]


# ---- section 6: mini-batches ----

def test_minibatches_of_the_published_size():
    """n = 300, R = 1500: k = 1800 // 128 = 14, c = 300 // 14 = 21, 14 iterations of 21 + 107."""
    plan = minibatches(300, 1500)
    assert [(len(new), len(old)) for new, old in plan] == [(21, 107)] * 14
    assert torch.equal(torch.cat([old for _, old in plan]), torch.arange(1498))     # "almost once per epoch"


def check_plan(n, m, mb_size):
    """Everything that section 6 says of the mini-batches of n images and m patterns in the memory."""
    plan = minibatches(n, m, mb_size, seeded(0))
    assert all(t.dtype == torch.int64 for pair in plan for t in pair)
    images = torch.cat([new for new, _ in plan])
    if m == 0:      # padded with the first images to a multiple, cut into mini-batches without replay
        padding = torch.tensor([i % n for i in range(-n % mb_size)], dtype=torch.int64)
        assert torch.equal(torch.bincount(images, minlength=n), torch.bincount(padding, minlength=n) + 1)
        assert {(len(new), len(old)) for new, old in plan} == {(mb_size, 0)}
        return
    k = (n + m) // mb_size
    c = n if k == 0 else 1 if n < k else n // k     # the first two, where the rule divides by 0: one mini-batch or n
    assert len(plan) == n // c and {len(new) for new, _ in plan} == {c}
    assert len(images.unique()) == len(images) == n - n % c and 0 <= images.min() and images.max() < n
    start, r = 0, min(m, max(0, mb_size - c))
    if k > 0 and c <= mb_size:
        assert r == mb_size - c                     # full mini-batches wherever the rule is defined
    for _, old in plan:
        assert old.tolist() == [(start + i) % m for i in range(r)] and len(old.unique()) == r
        start += r


@settings(max_examples=300)
@given(n=st.integers(1, 4000), m=st.integers(0, 5000), mb_size=st.sampled_from([128, 128, 128, 16, 2]))
@example(n=1, m=1, mb_size=128)
@example(n=1, m=5000, mb_size=128)
@example(n=4000, m=5000, mb_size=128)
def test_minibatches_keep_the_rule(n, m, mb_size):
    check_plan(n, m, mb_size)


@pytest.mark.parametrize("m", [0, 1, 2, 126, 127, 128, 129, 1500, 5000])
def test_minibatches_keep_the_rule_at_its_edges(m):
    for n in [*range(1, 60), *(128 * q + e for q in (1, 2, 8, 31) for e in (-2, -1, 0, 1)), 293, 2999, 4000]:
        check_plan(n, m, 128)


@pytest.mark.parametrize("n, m", [(300, 1500), (300, 0)])
def test_minibatches_depend_on_the_generator_alone(n, m):
    def images(seed):
        return torch.cat([new for new, _ in minibatches(n, m, rng=seeded(seed))])
    assert torch.equal(images(5), images(5)) and not torch.equal(images(5), images(6))
    assert not torch.equal(images(5), images(5).sort().values)
    with pytest.raises(ValueError, match="at least one image"):
        minibatches(0, m)


# ---- section 7: the replay memory ----

def tagged(n, i, classes=50, shape=(3,)):
    """n latents of batch i, whose values are (batch, index, label), and their labels."""
    index = torch.arange(n)
    labels = (index * 7 + i * 11) % classes
    latents = torch.stack((torch.full((n,), i), index, labels), 1).double()
    return latents.view(n, *shape), labels


def content(memory):
    return [tuple(x) for x in memory.x.flatten(1).long().tolist()]


def check_update(memory, n, i, rng):
    """One update with tagged patterns: everything that section 7 says of it."""
    before, free = content(memory), memory.rm_sz - len(memory)
    latents, labels = tagged(n, i)
    memory.update(latents, labels, i, rng)
    after = content(memory)
    h = min(max(memory.rm_sz // (i + 1), free), n)
    changed = [a for a, b in zip(after, before) if a != b]
    added = after[len(before):]
    fresh = changed + added
    assert len(after) == len(memory) == len(before) + min(free, h) <= memory.rm_sz      # free slots are filled first
    assert len(fresh) == h and all(batch == i for batch, _, _ in fresh)                 # h latents, of this batch,
    assert len({index for _, index, _ in fresh}) == h                                   # without replacement;
    assert sum(a == b for a, b in zip(after, before)) == len(before) - (h - min(free, h))       # the others untouched
    assert memory.y.tolist() == [label for _, _, label in after]                        # labels belong to latents
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
    """391 batches into 1500 slots: from h = 1500 // (i + 1) follows how many of each batch can at most be left."""
    memory, rng = ReplayMemory(1500, like=torch.zeros(1, 3, dtype=torch.float64)), seeded(0)
    for i in range(391):
        check_update(memory, 2999 if i == 0 else 297, i, rng)
    counts = torch.bincount(memory.batch, minlength=391)
    assert counts.sum() == 1500 and all(c <= 1500 // (i + 1) for i, c in enumerate(counts.tolist()))
    assert counts[390] == 3 and 600 < counts[:196].sum() < 1100     # old and recent batches keep similar shares


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
    lazy = LazyLatents(images, nn.Flatten(), "cpu")
    memory = ReplayMemory(600, like=lazy[:1])
    memory.update(lazy, torch.arange(700), 0, seeded(0))
    assert torch.equal(memory.x, lazy[:][memory.y]) and len(memory.y.unique()) == 600


# ---- section 8: Synaptic Intelligence ----

def toy_si(**kwargs):
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    return w, SynapticIntelligence([w], **{"reg_lambda": 3.0, "max_f": 0.5, "xi": 0.25, "c": 2.0} | kwargs)


def move(si, w, gradient, to):
    """A training step: gradient at the old weights, then the weights move."""
    w.grad = torch.tensor(gradient, dtype=torch.float64)
    si.before_step()
    with torch.no_grad():
        w.copy_(torch.tensor(to, dtype=torch.float64))
    si.after_step()


def test_si_of_two_weights_by_hand():
    """reg_lambda 3, c 2, xi 0.25, F at most 0.5; weights from (1, 2).

    Batch 0, steps to (1.5, 2) and (2, 2.5), gradients (-1, 4) and (-0.5, -0.1):
      trajectory = -1 * .5 - .5 * .5 = -.75 and 4 * 0 - .1 * .5 = -.05
      cum = 2 * -.75 / (1 + .25) = -1.2 and 2 * -.05 / (.25 + .25) = -.2;  F = (.5, .2), capped and not; anchor (2, 2.5)
    Batch 1, one step to (3, 2), gradients (1, .5):
      trajectory = 1 * 1 = 1 and .5 * -.5 = -.25: that of batch 0 is forgotten
      cum = -1.2 + 2 * 1 / 1.25 = .4 and -.2 - 2 * .25 / .5 = -1.2;  F = (-.4, .5); anchor (3, 2)
    """
    w, si = toy_si()
    si.begin_batch()
    move(si, w, [-1.0, 4.0], [1.5, 2.0])
    move(si, w, [-0.5, -0.1], [2.0, 2.5])
    assert si.penalty().item() == 0         # nothing is important before the first batch has ended
    si.end_batch()
    assert si.importance[0].tolist() == pytest.approx([0.5, 0.2]) and si.anchor[0].tolist() == [2, 2.5]
    assert si.penalty().item() == 0

    si.begin_batch()
    move(si, w, [1.0, 0.5], [3.0, 2.0])
    w.grad = None
    si.penalty().backward()                 # 3 / 2 (.5 * 1^2 + .2 * .5^2) = .825; 3 F (w - anchor) = (1.5, -.3)
    assert si.penalty().item() == pytest.approx(0.825) and w.grad.tolist() == pytest.approx([1.5, -0.3])
    si.end_batch()
    assert si.cum[0].tolist() == pytest.approx([0.4, -1.2])
    assert si.importance[0].tolist() == pytest.approx([-0.4, 0.5]) and si.anchor[0].tolist() == [3, 2]


def test_si_min_f_keeps_importances_from_falling_below():
    w, si = toy_si(min_f=0.0)
    si.begin_batch()
    move(si, w, [1.0, -0.1], [2.0, 2.5])        # uphill: cum = 2 * 1 / 1.25; downhill: 2 * -.05 / .5
    si.end_batch()
    assert si.cum[0].tolist() == pytest.approx([1.6, -0.2])
    assert si.importance[0].tolist() == pytest.approx([0, 0.2])


def test_si_defaults_are_the_published_ones():
    """c = 1, F at most 0.001, 1e-7 in the denominator, and no lower limit."""
    w, si = toy_si(c=1.0)
    si = SynapticIntelligence([w], 1.0)
    si.begin_batch()
    move(si, w, [5e-8, -5e-8], [1.0, 2.0])
    move(si, w, [-1e-7, 1e-7], [1.001, 2.001])  # trajectory -+1e-10; over (1e-6 + 1e-7): -+ 9.09e-5
    si.end_batch()
    assert si.importance[0].tolist() == pytest.approx([1e-10 / 1.1e-6, -1e-10 / 1.1e-6], rel=1e-6)
    si.begin_batch()
    move(si, w, [-1.0, 1.0], [1.002, 2.002])
    si.end_batch()
    assert si.importance[0].tolist() == pytest.approx([0.001, -1e-3 / 1.1e-6 - 1e-10 / 1.1e-6])


def test_si_takes_trainable_weights_only():
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    with pytest.raises(ValueError, match="trainable"):
        SynapticIntelligence([nn.Parameter(torch.zeros(2)), frozen], 1.0)


def test_si_continues_from_its_state():
    (w, si), (w2, si2) = toy_si(), toy_si()
    si.begin_batch()
    move(si, w, [-1.0, 1.0], [1.5, 2.5])
    si.end_batch()
    with torch.no_grad():
        w2.copy_(w)
    si2.load_state_dict(copy.deepcopy(si.state_dict()))
    for weight, s in ((w, si), (w2, si2)):
        s.begin_batch()
        move(s, weight, [-0.3, -0.2], [2.5, 2.2])
    assert si2.penalty().item() == si.penalty().item() != 0
    si.end_batch(), si2.end_batch()
    assert torch.equal(si.importance[0], si2.importance[0]) and torch.equal(si.cum[0], si2.cum[0])
    with pytest.raises(ValueError):
        SynapticIntelligence([w, w2], 1.0).load_state_dict(si.state_dict())


def test_si_regularizes_the_convolutions_that_train():
    """Section 8: not the normalization, not the head, not what is frozen."""
    net = MobileNetV1(5, 19, width=0.125)
    net.freeze_below(19)
    weights = trainable_conv_weights(net)
    expected = [layer[0].weight for layer in net.layers[20:27]]
    assert len(weights) == 7 and all(a is b for a, b in zip(weights, expected, strict=True))


# ---- section 4: a training step ----

def tiny_net():
    torch.manual_seed(0)
    layers = {"low": nn.Flatten(), "mid": nn.Linear(6, 4), "top": nn.Tanh()}
    net = SplitNet(layers, 4, 3, "low").double()
    net.freeze_below("low")
    return net


@pytest.mark.parametrize("with_si", [False, True])
def test_train_step_equals_sgd_by_hand(with_si):
    """Two steps: g = gradient + l2 * w, v = momentum * v + g, w -= lr * v; the gradients from numpy's chain rule."""
    net, lr, momentum, l2 = tiny_net(), 0.1, 0.9, 0.01
    si = SynapticIntelligence([net.layers[1].weight], 0.5) if with_si else None
    w, b, v = (p.detach().numpy().copy() for p in (net.layers[1].weight, net.layers[1].bias, net.output.weight))
    velocity, importance, trajectory = [0.0, 0.0, 0.0], np.zeros_like(w), np.zeros_like(w)
    if with_si:
        importance = np.linspace(0.1, 2, w.size).reshape(w.shape)
        si.importance[0].copy_(torch.tensor(importance))
        si.anchor[0].copy_(torch.tensor(w - 0.3))
        anchor = w - 0.3
        si.begin_batch()
    step = TrainStep(net, torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr, momentum,
                                          weight_decay=l2), si)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(5, 6)), rng.integers(0, 3, 5)
        loss, correct = step(torch.tensor(x), torch.tensor(y))
        h = np.tanh(x @ w.T + b)
        scores = h @ v.T
        p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        assert loss.item() == pytest.approx(-np.log(p[np.arange(5), y]).mean())       # without the penalty
        assert correct.item() == sum(int(np.argmax(row)) == label for row, label in zip(scores, y))
        d_scores = (p - np.eye(3)[y]) / 5
        d_z = (d_scores @ v) * (1 - h ** 2)
        gradients = [d_z.T @ x, d_z.sum(0), d_scores.T @ h]
        if with_si:
            gradients[0] = gradients[0] + 0.5 * importance * (w - anchor)
        velocity = [momentum * u + g + l2 * q for u, g, q in zip(velocity, gradients, (w, b, v))]
        trajectory = trajectory + gradients[0] * -lr * velocity[0]
        w, b, v = (q - lr * u for q, u in zip((w, b, v), velocity))
        for mine, theirs in zip((net.layers[1].weight, net.layers[1].bias, net.output.weight), (w, b, v)):
            np.testing.assert_allclose(mine.detach(), theirs, rtol=1e-10)
    if with_si:
        np.testing.assert_allclose(si.trajectory[0], trajectory, rtol=1e-9)


# ---- images on the device ----

def random_images(n=5, h=6, w=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_preprocess_equals_the_formula(kind):
    images = random_images()
    expected = (images / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    given = kind(images.copy())
    x = preprocess(given)
    np.testing.assert_allclose(x, expected.transpose(0, 3, 1, 2), atol=1e-6)
    assert x.dtype == torch.float32 and x.shape == (5, 3, 6, 4)
    assert x.is_contiguous(memory_format=torch.channels_last) and np.array_equal(np.asarray(given), images)


def encoding_net(latent=13, frozen=13):
    torch.manual_seed(0)
    net = MobileNetV1(5, latent, width=0.125)
    for i, m in enumerate(m for m in net.modules() if isinstance(m, BatchRenorm2D)):
        m.load_state_dict({**m.state_dict(), "running_mean": 0.2 * torch.randn(m.num_features, generator=seeded(i)),
                           "running_std": 0.5 + torch.rand(m.num_features, generator=seeded(i)),
                           "weight": 1 + 0.3 * torch.randn(m.num_features, generator=seeded(i + 99))})
    net.freeze_below(frozen)
    return net.train()


@torch.no_grad()
def latents_one_by_one(net, images):
    lat = copy.deepcopy(net).eval().lat_features
    return torch.cat([lat(preprocess(image[None])) for image in images])


@pytest.mark.parametrize("latent", [-1, 0, 13, 27])
def test_encoder_equals_the_frozen_layers_in_evaluation(latent):
    net, images = encoding_net(latent, latent), random_images(21, 32, 48)
    expected = latents_one_by_one(net, images)
    for fast in (True, False):
        encoder = Encoder(net, "cpu", fast=fast)
        latents = encoder(images)
        assert encoder.frozen and isinstance(latents, torch.Tensor if fast else LazyLatents) and len(latents) == 21
        torch.testing.assert_close(latents[:], expected, rtol=1e-4, atol=1e-4 * max(1, expected.abs().max().item()))
    assert net.training and expected.std() > 1e-2


@pytest.mark.parametrize("n", [1, 15, 16, 17, 40])
def test_encoder_gives_the_same_in_any_chunks_and_on_demand(n):
    """Chunks, slices and index tensors, and max_bytes: one byte less than the latents take makes them lazy."""
    net, images = encoding_net(), random_images(n, 32, 32)
    encoder = Encoder(net, "cpu")
    latents = encoder(images)
    assert isinstance(latents, torch.Tensor) and latents.shape == (n, 64, 2, 2) and not latents.requires_grad
    assert latents.is_contiguous(memory_format=torch.channels_last)
    size = n * 64 * 2 * 2 * 4
    assert isinstance(Encoder(net, "cpu", max_bytes=size)(images), torch.Tensor)
    lazy = Encoder(net, "cpu", max_bytes=size - 1)(images)
    assert isinstance(lazy, LazyLatents) and len(lazy) == n
    rng = np.random.default_rng(n)
    for index in (slice(None), slice(n // 2, n), slice(0, 1), torch.tensor(rng.integers(0, n, 7))):
        torch.testing.assert_close(lazy[index], latents[index], rtol=1e-4, atol=1e-5)
    encoder.chunk = 7
    torch.testing.assert_close(encoder(images), latents, rtol=1e-4, atol=1e-5)


def test_a_latent_is_the_same_bits_beside_any_others_and_whatever_the_precision_of_products():
    """On one thread torch convolves fewer than 16 images in another way, unless products may be rounded."""
    torch.manual_seed(0)
    net, images = MobileNetV1(5, "conv5_4/dw").eval(), random_images(35, 64, 64)
    net.freeze_below("conv5_4/dw")
    encoder = Encoder(net, "cpu")
    whole = encoder(images)
    lazy = Encoder(net, "cpu", max_bytes=1)(images)
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        for n in (1, 3, 15, 16, 17, 35):
            assert torch.equal(encoder(images[:n]), whole[:n])
            assert torch.equal(lazy[35 - n:], whole[35 - n:])


def test_encoder_of_layers_that_train_follows_them_and_passes_gradients():
    net, images = encoding_net(latent=3, frozen=1), random_images(4, 32, 32)
    encoder = Encoder(net, "cpu")
    assert not encoder.frozen
    latents = encoder(images)
    net.eval()
    first = latents[:2]
    first.sum().backward()
    assert net.layers[2][0].weight.grad.abs().sum() > 0 and net.layers[1][0].weight.grad is None
    with torch.no_grad():
        net.layers[2][0].weight.mul_(0.5)
    torch.testing.assert_close(latents[:2], latents_one_by_one(net, images[:2]), rtol=1e-4, atol=1e-5)
    assert not torch.equal(latents[:2], first)


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


# ---- TrainStep as a CUDA graph, with stand-ins for CUDA: the order of warm-up, capture and replay ----

class FakeCuda:
    """Streams that do nothing, and a graph whose capture leaves no trace (as a real one runs nothing) and whose replay runs
    the step on the captured tensors."""

    def __init__(self, step):
        self.step, self.captures, self.replays = step, 0, 0

    def install(self, monkeypatch):
        stream = type("Stream", (), {"wait_stream": lambda *_: None})
        monkeypatch.setattr(torch.cuda, "Stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)

    @contextlib.contextmanager
    def capture(self, graph):
        net, optimizer = copy.deepcopy((self.step.net.state_dict(), self.step.optimizer.state_dict()))
        yield
        self.captures += 1
        self.step.net.load_state_dict(net)
        self.step.optimizer.load_state_dict(optimizer)

    def replay(self):
        self.replays += 1
        loss, correct = self.step._step(self.step.x, self.step.y)
        self.step.loss.copy_(loss)
        self.step.correct.copy_(correct)


def small_net_and_step(graph):
    torch.manual_seed(0)
    net = MobileNetV1(5, "conv6/dw", width=0.05)
    net.freeze_below("conv6/dw")
    net.train()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.01, 0.9, weight_decay=5e-4)
    return net, TrainStep(net, optimizer, graph=graph)


def test_graph_replays_are_the_steps_that_would_have_been_run(monkeypatch):
    """Twelve steps, one of another size among them: same losses, counts and weights with and without the graph."""
    (net, eager), (graphed_net, graphed) = small_net_and_step(False), small_net_and_step(True)
    fake = FakeCuda(graphed)
    fake.install(monkeypatch)
    channels = net.lat_features(torch.zeros(1, 3, 32, 32)).shape[1]
    for k in range(12):
        n = 6 if k == 8 else 8
        x, y = torch.rand(n, channels, 2, 2), torch.randint(0, 5, (n,))
        one, other = eager(x, y), graphed(x, y)
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert (fake.captures, fake.replays) == (1, 12 - TrainStep.WARM_UP - 1)
    for key, value in net.state_dict().items():
        assert torch.equal(value, graphed_net.state_dict()[key]), key
