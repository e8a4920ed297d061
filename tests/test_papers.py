"""What the papers' programs do otherwise, each rule against numbers worked out by hand."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ar1star_lat_replay as program
from harness.config import load_config
from harness.records import kept_mb, saturated
from helpers import seeded
from methods.papers import FirstSeen, LearningRateSI, PapersHead, PapersMemory, Ramp, minibatches, padded
from models.batch_renorm import BatchRenorm2D, set_brn_params
from models.mobilenet import MobileNetV1
from utils import CWRHead, ReplayMemory, parameter_groups


def close(a, b, **tolerance):
    torch.testing.assert_close(torch.as_tensor(a).detach().double(), torch.tensor(b, dtype=torch.float64),
                               **tolerance or dict(rtol=1e-5, atol=1e-7))


# ---- Batch Renormalization ----

def test_limits_at_each_step():
    """As seen in the step: after t steps of the optimizer whose hook the ramp is."""
    limits = {0: (1, 0), 47: (1, 0), 48: (1.0416667, .1041667), 49: (1.0833333, .2083333), 95: (3, 5),
              96: (3, 5), 500: (3, 5)}
    brn = BatchRenorm2D(1)
    optimizer = torch.optim.SGD(brn.parameters(), 0.0)
    optimizer.register_step_post_hook(Ramp([brn]))
    for t in range(501):
        if t in limits:
            close([brn.r_max, brn.d_max], limits[t])
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_averages_of_the_unbiased_variance_which_r_and_d_see_before_they_move(fused):
    """x = 1, 2, 3, 6: mean 3, biased variance 3.5, unbiased 14 / 3. From mean 1, variance 4, momentum 0.1:
    mean 1.2, variance 0.9 * 4 + 0.1 * 14 / 3 = 4.0667; r = sqrt(3.5 / 4), d = 2 / 2, by the old averages."""
    brn = BatchRenorm2D(1, eps=0.0, momentum=.1, r_max=10., d_max=10., fused=fused)
    set_brn_params(brn, average="variance")
    brn.running_mean.fill_(1.)
    brn.running_std.fill_(2.)
    y = brn(torch.tensor([1., 2., 3., 6.]).view(4, 1, 1, 1))
    close(brn.last[0], [.935414])
    close(brn.last[1], [1.])
    close(brn.running_mean, [1.2])
    close(brn.running_std ** 2, [4.066667])
    close(y.flatten(), [0., .5, 1., 2.5])       # (x - 1) / 2: within its limits, evaluation before they moved


def test_the_variance_of_a_single_value_is_no_division_by_zero():
    brn = BatchRenorm2D(1)
    brn.average = "variance"
    brn(torch.ones(1, 1, 1, 1))
    assert brn.running_std.isfinite().all()


# ---- mini-batches ----

@pytest.mark.parametrize("n, m, new, old, iterations", [
    (300, 0, 128, 0, 3), (300, 1500, 21, 107, 15), (300, 500, 48, 80, 7), (600, 1500, 37, 91, 17),
    (1500, 1500, 64, 64, 24), (2999, 0, 128, 0, 24)])
def test_minibatches_of_the_papers(n, m, new, old, iterations):
    plan = minibatches(n, m, epochs=4)
    assert len(plan) == 4 * iterations
    assert {(len(a), len(b)) for a, b in plan} == {(new, old)}


def test_lists_of_other_lengths_are_gone_through_independently():
    """n = 293: 21 + 107; 294 = 14 * 21 new, 1605 = 15 * 107 of the memory, 15 mini-batches an epoch."""
    plan = minibatches(293, 1500, epochs=2, rng=seeded(0))
    new, old = [a.tolist() for a, _ in plan], [b.tolist() for _, b in plan]
    assert len(plan) == 30
    assert new[14] == new[0] and new[13] != new[0] and old[15] == old[0] and old[14] != old[0]
    assert sorted(sum(new[:14], [])) == sorted([*range(293), 0])
    assert sorted(sum(old[:15], [])) == sorted([*range(1500), *range(105)])   # the newest come twice


@settings(max_examples=100)
@given(st.integers(1, 400), st.integers(0, 400), st.integers(2, 130), st.integers(1, 3))
def test_minibatches_leave_nothing_out(n, m, mb_size, epochs):
    plan = minibatches(n, m, mb_size, seeded(1), epochs)
    assert all(len(a) + len(b) == mb_size and len(a) > 0 and (len(b) > 0) == (m > 0) for a, b in plan)
    if m == 0:
        assert set(torch.cat([a for a, _ in plan]).tolist()) == set(range(n))
    assert all(0 <= a.min() and a.max() < n for a, _ in plan)


def test_bad_sizes_are_errors():
    with pytest.raises(ValueError, match="at least one image"):
        minibatches(0, 5)
    with pytest.raises(ValueError, match="mb_size|room for two"):
        minibatches(5, 5, mb_size=1)
    assert padded(3, 4).tolist() == [0, 1, 2, 0] and padded(4, 4).tolist() == [0, 1, 2, 3]


# ---- the head ----

def test_biases_and_unmet_rows_over_three_batches():
    linear = nn.Linear(2, 4)
    head, weights = PapersHead(linear), []
    for new, memory, training, test in (([0, 1], [], [1, 1, 1, 1], [1, 1, 0, 0]),
                                        ([2, 2], [0], [1, 1, 0, 1], [1, 1, 0, 0]),
                                        ([1], [2], [1, 1, 0, 1], [1, 1, 0, 0])):
        head.begin(torch.tensor(new), torch.tensor(memory, dtype=torch.int64))
        close(linear.bias, training)
        with torch.no_grad():
            linear.weight += 1.5 * torch.arange(8.).view(4, 2)
        head.consolidate()
        close(linear.bias, test)
        weights.append(linear.weight.clone())
    assert not weights[-1][3].any() and not linear.bias.requires_grad
    again = PapersHead(nn.Linear(2, 4))
    again.load_state_dict(copy.deepcopy(head.state_dict()))
    again.begin(torch.tensor([2]), torch.tensor([0]))
    close(again.linear.bias, [1, 1, 0, 1])


def test_the_padded_batch_is_counted():
    """300 images of class 1 and 0 padded to 384: the first 84 count twice; unpadded without pad_to."""
    labels = torch.tensor([1] * 100 + [0] * 200)
    for pad_to, counts in ((128, [200, 184]), (None, [200, 100])):
        head = PapersHead(nn.Linear(2, 2), pad_to=pad_to)
        head.begin(labels, labels[:0])
        head.consolidate()
        assert head.past_j.tolist() == counts


def test_naive_fine_tuning_trains_head_and_bias():
    head = PapersHead(nn.Linear(2, 3), "none")
    before = [p.clone() for p in head.linear.parameters()]
    head.begin(torch.tensor([0]), torch.tensor([], dtype=torch.int64))
    head.consolidate()
    assert all(torch.equal(p, b) and p.requires_grad for p, b in zip(head.linear.parameters(), before))


# ---- Synaptic Intelligence ----

@pytest.mark.parametrize("c", [1.0, .5])
def test_importances_of_two_weights_over_two_batches(c):
    """Steps of plain SGD at rate 1, xi = 0.1, max_f = 0.5. Batch 1 moves the first weight by 0.1 and back,
    the second by 0.2: cum = c * 0.02 / 0.1 and c * 0.04 / 0.14. Then a gradient of -0.3 moves the first by
    0.3 (1 - F / 0.5) only."""
    w = nn.Parameter(torch.tensor([1., 1.], dtype=torch.float64))
    si = LearningRateSI([w], l2=0.0, c=c, max_f=.5, xi=.1)
    optimizer = torch.optim.SGD([w], 1.0)

    def batch(*gradients):
        si.begin_batch()
        for g in gradients:
            w.grad = torch.tensor(g, dtype=torch.float64)
            si.before_step()
            optimizer.step()
            si.after_step()
        si.end_batch()

    batch([-.1, -.2], [.1, 0.])
    first = [c * .2, c * .285714285714]
    close(si.importance[0], first)
    batch([-.3, 0.])
    moved = {1.0: .18, .5: .24}[c]
    close(w, [1 + moved, 1.2])
    close(si.cum[0], [first[0] + c * {1.0: .0324 / .1324, .5: .0576 / .1576}[c], first[1]])
    assert si.penalty() == 0


def test_the_factor_takes_gradient_and_decay_before_the_momentum():
    """theta = 2, gradient 1, l2 = 0.5, F = max_f / 4: g = (1 + 0.5 * 2) 0.75 = 1.5, then 0.9 * 1.5 + g."""
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    si = LearningRateSI([w], l2=.5)
    si.importance[0].fill_(.00025)
    optimizer = torch.optim.SGD([w], .1, momentum=.9, weight_decay=.5)
    for expected in (2 - .15, 1.85 - .1 * (.9 * 1.5 + (1 + .5 * 1.85) * .75)):
        w.grad = torch.ones_like(w)
        si.before_step()
        optimizer.step()
        close(w, [expected], rtol=1e-12, atol=0)


def test_a_saturated_weight_stands_still_and_state_comes_back():
    w = nn.Parameter(torch.tensor([2.0]))
    si = LearningRateSI([w], l2=.5)
    si.load_state_dict({"cum": [torch.tensor([7.])]})
    assert si.importance[0].item() == pytest.approx(.001) and si.state_dict()["cum"][0].item() == 7
    w.grad = torch.ones_like(w)
    si.before_step()
    torch.optim.SGD([w], .1, weight_decay=.5).step()
    close(w, [2.0])
    with pytest.raises(ValueError, match="trainable"):
        LearningRateSI([w.detach()], .5)


# ---- latents and memory ----

def test_the_first_latents_are_kept_and_training_gets_new_ones():
    asked = []
    images = torch.arange(4.)

    class Ageing:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            asked.append(index)
            return images[index] + 10 * len(asked)

    latents = FirstSeen(Ageing())
    assert latents[torch.tensor([2, 0])].tolist() == [12, 10]
    assert latents[torch.tensor([1, 2])].tolist() == [21, 22] and len(latents) == 4
    with torch.no_grad():
        assert latents[torch.tensor([0, 1, 2])].tolist() == [10, 21, 12]
        assert latents[torch.tensor([3])].tolist() == [33]      # 3 was not trained on
        assert latents[2:4].tolist() == [42, 43]


def test_memory_takes_the_new_in_front_and_draws_them_from_the_padded_list():
    """R = 10 after batch 0 of 24; batch 1: n = 6, mini-batches of 8 take round(8 * 6 / 16) = 3; h = 5."""
    memory = PapersMemory(10, torch.zeros(1), mb_size=8)
    memory.update(torch.arange(24.), torch.arange(24), 0, seeded(0))
    old = set(memory.y.tolist())
    assert len(memory) == 10 == len(old) and not memory.batch.any()
    memory.update(torch.arange(100., 106), torch.arange(100, 106), 1, seeded(1))
    assert memory.batch.tolist() == [1] * 5 + [0] * 5 and set(memory.y[5:].tolist()) < old
    assert len(set(memory.y[:5].tolist())) == 5 and set(memory.y[:5].tolist()) < set(range(100, 106))
    assert torch.equal(memory.x, memory.y.float())


def test_an_image_that_pads_the_list_may_be_stored_twice():
    memory = PapersMemory(6, torch.zeros(1), mb_size=8)     # 5 images padded to 8: all of 0, 1, 2 twice
    memory.update(torch.arange(5.), torch.arange(5), 0, seeded(3))
    full = PapersMemory(8, torch.zeros(1), mb_size=8)
    full.update(torch.arange(5.), torch.arange(5), 0, seeded(3))
    assert len(memory) == 6 and sorted(full.y.tolist()) == [0, 0, 1, 1, 2, 2, 3, 4]


# ---- what learns, and how fast ----

def build(section, **keys):
    config = load_config(section, overrides={"width": .1, "weights": "none", "device": "cpu"} | keys)
    return program.build_learner(config, 5, (32, 32), torch.device("cpu"))


@pytest.mark.parametrize("section, learning", [
    ("papers_ar1star", {"pointwise", "gamma", "head"}), ("papers_cwr_star", {"head"}),
    ("papers_naive", {"pointwise", "gamma", "head", "bias"})])
def test_what_learns_after_batch_0(section, learning):
    learner = build(section, latent_layer_num="images")
    net = learner.net
    assert sum(p.requires_grad for p in net.parameters()) == 27 * 3 + 1 + (section == "papers_naive")
    learner.enter(learner.later)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    kinds = {"pointwise": [conv.weight for conv in convs if conv.kernel_size == (1, 1)],
             "spatial": [conv.weight for conv in convs if conv.kernel_size == (3, 3)],
             "gamma": [p for m in net.modules() if isinstance(m, BatchRenorm2D) for p in m.parameters()],
             "head": [net.output.weight], "bias": [net.output.bias]}
    assert {kind for kind, params in kinds.items() if all(p.requires_grad for p in params)} == learning
    assert {kind for kind, params in kinds.items() if any(p.requires_grad for p in params)} == learning
    assert all(m.training for m in net.modules() if isinstance(m, BatchRenorm2D))


def test_groups_of_the_optimizer():
    net = MobileNetV1(5, "images", None, .1)
    net.output = nn.Linear(net.output.in_features, 5)
    groups = parameter_groups(net, 1e-4, 5e-4, head_lr_mult=10, decay_all=False)
    found = [(len(g["params"]), pytest.approx(g["lr"]), g["weight_decay"]) for g in groups]
    assert found == [(27, 1e-4, 5e-4), (54, 1e-4, 0.0), (1, 1e-3, 5e-4), (1, 2e-3, 0.0)]
    assert sum(len(g["params"]) for g in groups) == len(list(net.parameters()))
    plain = MobileNetV1(5, "images", None, .1)
    (group,) = parameter_groups(plain, 1e-4, 5e-4)
    assert group["params"] == list(plain.parameters()) and group["weight_decay"] == 5e-4


@pytest.mark.parametrize("part, changed", [
    ("pytorch_program", set()), ("ramp", {"after_step", "brn"}), ("averages", {"brn"}),
    ("moving", {"moving"}), ("minibatches", {"minibatches", "memory"}), ("bias", {"head"}),
    ("decay", {"decay_all"}), ("counts", {"head"})])
def test_each_part_changes_what_it_names(part, changed):
    def built(follow):
        learner = build("no_replay" if part == "counts" else "DEFAULT", follow=follow)
        return learner.first._asdict() | {
            "head": type(learner.head), "memory": type(learner.memory), "minibatches": learner.minibatches}

    plain, mine = built("pytorch_program"), built(part)
    assert {key for key in plain if plain[key] != mine[key]} == changed
    assert (mine["head"] is PapersHead) == (part in ("bias", "counts"))


# ---- what is recorded ----

def test_bytes_kept_and_share_of_saturated_importances():
    """2 latents of 3 float32 with int64 label and batch: 2 * (12 + 16); 5 classes of 7 float32 with an int64
    count: 5 * (28 + 8); importances of 4 float32: 16."""
    learner = type("Learner", (), {"beside": None})
    learner.head = CWRHead(nn.Linear(7, 5, bias=False))
    learner.memory = ReplayMemory(9, torch.zeros(1, 3))
    learner.memory.update(torch.zeros(2, 3), torch.tensor([0, 1]), 0)
    learner.si = LearningRateSI([nn.Parameter(torch.zeros(4))], 0.0)
    assert kept_mb(learner) == round((2 * 28 + 5 * 36 + 16) / 1e6, 3) and saturated(learner.si) == 0
    learner.memory = ReplayMemory(1000, torch.zeros(1, 250))
    learner.memory.update(torch.zeros(1000, 250), torch.zeros(1000, dtype=torch.int64), 0)
    learner.si.load_state_dict({"cum": [torch.tensor([0, .001, .0009, 5.])]})
    assert kept_mb(learner) == 1.016 and saturated(learner.si) == .5
