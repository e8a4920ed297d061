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
from helpers import random_images, seeded
from methods.papers import (
    FirstSeen,
    LearningRateSI,
    PapersHead,
    PapersMemory,
    Ramp,
    minibatches,
    padded,
    pass_again,
)
from models.batch_renorm import BatchRenorm2D, brn_layers, set_brn_params
from models.mobilenet import MobileNetV1
from models.split_net import SplitNet
from utils import CWRHead, Mapped, ReplayMemory, parameter_groups


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


def test_both_lists_are_shuffled_once_and_gone_through_independently():
    """n = 9, 37 in the memory, mini-batches of 8: round(8 * 9 / 46) = 2 new of a list of 10, 6 of a list of
    42; 6 mini-batches an epoch, where one list has 5 parts and the other 7."""
    lists = []
    for seed in (0, 1):
        plan = minibatches(9, 37, 8, seeded(seed), epochs=3)
        new, old = [a.tolist() for a, _ in plan], [b.tolist() for _, b in plan]
        assert new == (new[:5] * 4)[:18] and old == (old[:7] * 3)[:18]
        lists += [sum(new[:5], []), sum(old[:7], [])]
    for images, patterns in (lists[:2], lists[2:]):
        assert sorted(images) == sorted([*range(9), 0]) and images != [*range(9), 0]
        assert sorted(patterns) == sorted([*range(37), *range(5)]) and patterns != [*range(37), *range(5)]
    assert lists[0] != lists[2] and lists[1] != lists[3]


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


def test_the_head_of_naive_fine_tuning_begins_with_normal_weights():
    """Caffe's `msra`: deviation sqrt(2 / 1024) = 0.0442; PyTorch's own are uniform between -1/32 and 1/32."""
    output = build("papers_naive", width=1.0).net.output
    assert output.weight.std().item() == pytest.approx(.0442, rel=.05)
    assert output.weight.abs().max() > 3 * .0442 and not output.bias.any()


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


def test_an_image_that_pads_the_list_has_a_latent_for_each_place():
    """Images 2, 0, 4, normalized in pairs, where the larger becomes 1, the smaller -1. Padded: 2, 0, 4, 2;
    shuffled: 2 beside 0, then 2 beside 4. Batch means 1 and 3, momentum 0.5: 0 moves to 0.5, then 1.75."""
    brn = BatchRenorm2D(1, eps=0.0, momentum=.5, inc_step=0.0)
    net = SplitNet({"norm": brn, "flat": nn.Flatten()}, 1, 2, "norm").requires_grad_(False)
    images = Mapped(torch.tensor([2., 0., 4.]).view(3, 1, 1, 1), net.lat_features)
    trained = FirstSeen(images)
    for first, second in ([1, 0], [0, 2]), ([0, 2], [0, 1]):        # two epochs
        trained[torch.tensor(first)], trained[torch.tensor(second)]
    brn.running_mean.zero_()
    passed = pass_again(net, trained, 2, seeded(0))      # not what training has seen, but a pass
    close(brn.running_mean, [1.75])

    for latents in (trained, passed):
        memory = PapersMemory(4, torch.zeros(1, 1, 1, 1), mb_size=2)
        memory.update(latents, torch.tensor([7, 8, 9]), 0, seeded(0))
        stored = sorted(zip(memory.y.tolist(), memory.x.flatten().tolist()))
        close(stored, [(7, -1), (7, 1), (8, -1), (9, 1)])


@pytest.mark.parametrize("frozen", ["images", "conv5_4/dw"])
@pytest.mark.parametrize("steps, r_max, d_max", [(4, 1, 0), (70, 1.9583333, 2.3958333), (96, 3, 5)])
def test_the_pass_after_batch_0_has_the_limits_of_the_last_step(frozen, steps, r_max, d_max):
    """The last 4 steps of batch 0, of 8 images, and the pass: 1 + (70 - 47) / 24 and 5 (70 - 47) / 48. The
    averages of all layers move, with 0.01, whether they were frozen from the start or not."""
    learner = build("papers_latent_replay", freeze_below_layer=frozen, mb_size=8, rm_sz=8)
    learner.first.after_step.t = steps - 4
    seen = []
    for layer in (learner.net.layers[0][1], learner.net.layers[26][1]):
        layer.register_forward_pre_hook(lambda brn, x: seen.append(
            (len(x[0]), brn.training, brn.momentum, brn.r_max.item(), brn.d_max.item())))
    learner.learn(random_images(8, 32, 32), torch.arange(8) % 5)
    assert len(seen) == 2 * (4 + 1)
    close(seen[-2:], [(8, True, .01, r_max, d_max)] * 2)
    brn = learner.net.layers[0][1]
    close([brn.momentum, brn.r_max, brn.d_max], [5e-5, 1.25, .5])


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


def learning(learner):
    """{kind of parameter: (how many, learning rate, weight decay)} of what the optimizer moves."""
    output = learner.net.output
    kinds = {output.weight: "head", output.bias: "bias"}
    for m in learner.net.modules():
        if isinstance(m, nn.Conv2d):
            kinds[m.weight] = "pointwise" if m.kernel_size == (1, 1) else "spatial"
        if isinstance(m, BatchRenorm2D):
            kinds |= dict.fromkeys(m.parameters(), "gamma")
    found = {}
    for group in learner.optimizer.param_groups:
        assert group["momentum"] == .9
        for p in group["params"]:
            assert p.requires_grad
            found.setdefault(kinds[p], []).append((group["lr"], group["weight_decay"]))
    assert all(len(set(rates)) == 1 for rates in found.values())
    return {kind: (len(rates), *rates[0]) for kind, rates in found.items()}


# latent layer, patterns in the memory, epochs; 1x1 convolutions and gammas and betas that learn from batch 1
# on; learning rates of these and of the head; c of SI; momentum, r_max, d_max of BRN from batch 1 on
OF_THE_PAPERS = {
    "papers_naive":                  ("images", 0, 2, 13, 54, 3.5e-5, 3.5e-5, None, 1e-4, 1.5, 2.5),
    "papers_cwr_star":               ("images", 0, 4, 0, 0, 1e-3, 1e-3, None, 1e-4, 1.5, 2.5),
    "papers_ar1star":                ("images", 0, 4, 13, 54, 1e-4, 1e-3, .5, 1e-4, 1.5, 2.5),
    "papers_native_replay":          ("images", 1500, 4, 13, 54, 3e-4, 3e-3, None, 1e-4, 1.25, .5),
    "papers_native_replay_ar1star":  ("images", 1500, 4, 13, 54, 3e-4, 3e-3, 1, 1e-4, 1.25, .5),
    "papers_native_replay_cwr_star": ("images", 1500, 4, 0, 0, 3e-4, 3e-4, None, 1e-4, 1.25, .5),
    "papers_latent_replay":          ("conv5_4/dw", 1500, 4, 4, 14, 3e-4, 3e-3, None, 5e-5, 1.25, .5),
    "papers_latent_replay_ar1star":  ("conv5_4/dw", 1500, 4, 4, 14, 3e-4, 3e-3, 1, 5e-5, 1.25, .5),
    "papers_latent_replay_cwr_star": ("pool6", 1500, 4, 0, 0, 3e-4, 3e-4, None, 5e-5, 1.25, .5),
}


@pytest.mark.parametrize("section", OF_THE_PAPERS)
def test_each_section_has_the_values_of_the_papers(section):
    latent, rm_sz, epochs, convs, gammas, lr, head_lr, c, rate, r_max, d_max = OF_THE_PAPERS[section]
    learner = build(section)
    net = learner.net
    naive = section == "papers_naive"
    bias = lambda lr: {"bias": (1, pytest.approx(2 * lr), 0)} if naive else {}

    def layers_of_brn():
        return {(m.training, m.average, m.momentum, m.r_max.item(), m.d_max.item(), m.inc_step)
                for m in brn_layers(net)}

    # batch 0: everything learns
    assert learning(learner) == {"spatial": (14, 1e-3, 5e-4), "pointwise": (13, 1e-3, 5e-4),
                                 "gamma": (54, 1e-3, 0), "head": (1, 1e-3, 5e-4)} | bias(1e-3)
    assert layers_of_brn() == {(True, "variance", .01, 1, 0, 0)}
    assert isinstance(learner.first.after_step, Ramp)

    learner.enter(learner.later)
    near = pytest.approx(lr)
    body = {"pointwise": (convs, near, 5e-4), "gamma": (gammas, near, 0)} if convs else {}
    assert learning(learner) == body | {"head": (1, pytest.approx(head_lr), 5e-4)} | bias(head_lr)
    assert layers_of_brn() == {(True, "variance", rate, r_max, d_max, 0)}

    assert learner.first.epochs == learner.later.epochs == epochs
    assert (learner.mb_size, learner.minibatches) == (128, minibatches)
    assert net.latent_layer_num == net.layer_number(latent)
    assert type(learner.memory) is PapersMemory and learner.memory.rm_sz == rm_sz
    assert type(learner.head) is PapersHead and learner.head.pad_to == (None if rm_sz else 128)
    assert learner.head.consolidation == ("none" if naive else "per_class")
    si = learner.si
    assert len(si.weights) == (convs if c else 0)
    if c:
        assert type(si) is LearningRateSI and (si.c, si.l2, si.max_f, si.xi) == (c, 5e-4, 1e-3, 1e-7)


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
