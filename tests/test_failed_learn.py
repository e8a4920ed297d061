"""A batch whose learning fails or is interrupted, wherever that is, leaves the learner as it was."""
import contextlib
import copy
import functools
import os
import random
import sys

import numpy as np
import pytest
import torch

from ar1star_lat_replay import FIRST, LATER, Learner
from harness.records import TrainingError
from harness.variants import ClosedFormLearner
from helpers import REPO, random_images, same, seeded
from methods.balanced_memory import BalancedMemory
from methods.compressed_memory import Bytes, CompressedMemory
from methods.papers import PapersMemory
from methods.slda import SLDABeside
from models.mobilenet import MobileNetV1
from utils import CWRHead, ReplayMemory, SynapticIntelligence, trainable_conv_weights

IMAGES = random_images(8, 32, 32)
OURS = {str(REPO), str(REPO / "methods"), str(REPO / "harness")}
FAST = {"lr": 1e-2, "epochs": 1}


def replaying(memory=ReplayMemory, layer="conv3_2/dw", si=False, **more):
    """A Learner of four classes that trains all layers in batch 0."""
    torch.manual_seed(0)
    net = MobileNetV1(4, layer, weights=None, width=0.1)
    importances = None
    if si:
        net.freeze_below("latent")
        importances = SynapticIntelligence(trainable_conv_weights(net), 10.0)
    if more.pop("beside", False):
        more["beside"] = SLDABeside(net, 0.5)
    memory = memory(10, like=net.example_latent(32))
    first = FIRST._replace(frozen_layer="images", **FAST)
    return Learner(net, CWRHead(net.output), memory, importances, first, LATER._replace(**FAST), mb_size=6,
                   **more)


def in_codes(codec):
    """A memory of latents coded by a codec."""
    return lambda size, like: CompressedMemory(ReplayMemory, size, like, codec(like))


LEARNERS = {
    "plain": replaying,
    "with si": lambda: replaying(si=True),
    "balanced": lambda: replaying(BalancedMemory),
    "papers": lambda: replaying(PapersMemory),
    "bytes with SLDA": lambda: replaying(in_codes(Bytes), beside=True),
    "SLDA": lambda: ClosedFormLearner("slda", MobileNetV1(4, "pool6", weights=None, width=0.1)),
}


def batch(i):
    """Batch i; from batch 2 on each brings a new class."""
    labels = np.arange(8) % 4 if i == 0 else np.arange(8) % 2 + (i + 1 if i > 1 else 0)
    return np.roll(IMAGES, i, 1), labels


def learned(make, n):
    torch.manual_seed(1)
    learner = make()
    for i in range(n):
        learner.learn(*batch(i))
    return learner


@functools.cache
def known_after(make, n):
    """What a learner that nothing disturbs knows after n batches."""
    return known(learned(make, n))


def known(learner):
    """All that a learner knows: its state and what it predicts."""
    state = copy.deepcopy(learner.state_dict())
    return state, learner.predict(IMAGES), [p.shape for p in learner.net.output.parameters()]


class Interrupted:
    """Raises KeyboardInterrupt before the n-th line of this program that is run inside; counts them."""

    def __init__(self, n=10**9):
        self.left = n
        self.lines = 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *error):
        sys.settrace(self.before)

    def trace(self, frame, event, arg):
        if os.path.dirname(frame.f_code.co_filename) not in OURS:
            return None
        if event == "line":
            self.lines += 1
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.trace


@pytest.mark.parametrize("name, batches", [
    ("plain", 0), ("with si", 3), ("balanced", 2), ("papers", 2), ("bytes with SLDA", 0), ("SLDA", 2)])
def test_an_interruption_at_any_line_leaves_the_learner_as_it_was(name, batches):
    """Or, at the very end, as it is after the batch; and what comes after it is as if nothing had been."""
    make = LEARNERS[name]
    ended = learned(make, batches)
    counting = Interrupted()
    with counting:
        ended.learn(*batch(batches))
    after = known(ended)

    learner = learned(make, batches)
    before = known(learner)
    rng = random.Random(batches)
    last = counting.lines
    for n in [*(rng.randrange(last) + 1 for _ in range(2)), last - rng.randrange(last // 10), last - 2]:
        with contextlib.suppress(KeyboardInterrupt), Interrupted(n):
            learner.learn(*batch(batches))
        if learner.batches > batches:
            assert n > .9 * last and same(known(learner), after)
            learner = learned(make, batches)
        assert same(known(learner), before), n
    learner.learn(*batch(batches))
    assert same(known(learner), after)


def with_all_parts():
    return replaying(si=True, beside=True)


def failing(function, after):
    """As function, which is done or not, and then raises."""
    def fail(*arguments, **more):
        if after:
            function(*arguments, **more)
        raise RuntimeError("out of memory")
    return fail


@pytest.mark.parametrize("batches", [0, 2])
@pytest.mark.parametrize("part, name, after", [
    ("head", "begin", True), ("head", "consolidate", False), ("head", "consolidate", True),
    ("si", "end_batch", True), ("beside", "update", True), ("memory", "update", False)])
def test_a_part_that_fails_costs_nothing_else(monkeypatch, part, name, after, batches):
    learner = learned(with_all_parts, batches)
    before = known(learner)
    encoder = learner.encoder
    with monkeypatch.context() as patch:
        victim = getattr(learner, part)
        patch.setattr(victim, name, failing(getattr(victim, name), after))
        with pytest.raises(RuntimeError, match="out of memory"):
            learner.learn(*batch(batches))
    assert same(known(learner), before)
    assert batches == 0 or learner.encoder is encoder       # latents of test images stay what they are
    learner.learn(*batch(batches))
    assert same(known(learner), known_after(with_all_parts, batches + 1))


def test_images_of_another_size_are_refused_before_anything_moves(monkeypatch):
    learner = learned(replaying, 2)
    before = known(learner)
    monkeypatch.setattr(learner.head, "begin", None)
    with pytest.raises(ValueError, match=r"64x48.*memory"):
        learner.learn(random_images(8, 64, 48), batch(2)[1])
    assert same(known(learner), before)
    pooled = learned(lambda: replaying(layer="pool6"), 1)       # whose latents are the same for all sizes
    pooled.learn(random_images(8, 64, 48), batch(1)[1])


@pytest.mark.parametrize("batches", [0, 2])
def test_a_loss_that_is_no_number_raises_and_is_taken_back(monkeypatch, batches):
    learner = learned(replaying, batches)
    before = known(learner)
    with monkeypatch.context() as patch:
        patch.setitem(learner.optimizer.param_groups[0], "lr", 1e30)
        with pytest.raises(TrainingError, match=rf"batch {batches}\b"):
            learner.learn(*batch(batches))
    learner.optimizer.param_groups[0]["lr"] = before[0]["optimizer"]["param_groups"][0]["lr"]
    assert same(known(learner), before)


def test_memories_that_fail_on_the_way_are_as_they_were():
    """Where latents are encoded as they are asked for, the second part of them may fail."""
    class Failing:
        def __init__(self, calls):
            self.calls = calls

        def __getitem__(self, index):
            self.calls -= 1
            if self.calls < 0:
                raise RuntimeError("out of memory")
            return torch.full((len(torch.arange(400)[index]), 3), 9.0)

        def __len__(self):
            return 400

    like = torch.zeros(1, 3)
    for make in (ReplayMemory, BalancedMemory, PapersMemory, in_codes(Bytes)):
        memory = make(900, like)
        labels = torch.arange(400) % 7
        memory.update(torch.rand(400, 3), labels, 0, seeded(0))
        memory.update(torch.rand(400, 3), labels, 1, seeded(0))
        before = copy.deepcopy(memory.state_dict())
        with pytest.raises(RuntimeError, match="out of memory"):
            memory.update(Failing(1), labels, 2, seeded(1))
        assert same(memory.state_dict(), before)
