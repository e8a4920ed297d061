"""Batch Renormalization against a loop over numbers that is written from the paper."""
import copy
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from helpers import rand, randomize
from models.batch_renorm import BatchRenorm2D, brn_layers, fold_brn, replace_batch_norm, set_brn_params


def make_brn(fused=False, channels=3, **params):
    return randomize(BatchRenorm2D(channels, fused=fused, **params), seed=1).double()


def brn_by_loop(x, state, momentum, eps=1e-5):
    """The formula, one number at a time. state: gamma, beta, mu, sigma (lists), r_max, d_max.

    Returns the output, mu and sigma after they have moved.
    """
    gamma, beta, mu, sigma, r_max, d_max = state
    mu, sigma, y = list(mu), list(sigma), np.empty(x.shape)
    for c in range(x.shape[1]):
        values = [x[n, c, h, w].item() for n, h, w in np.ndindex(x.shape[0], *x.shape[2:])]
        mu_b = sum(values) / len(values)
        sigma_b = math.sqrt(sum((v - mu_b) ** 2 for v in values) / len(values) + eps)
        r = min(max(sigma_b / sigma[c], 1 / r_max), r_max)
        d = min(max((mu_b - mu[c]) / sigma[c], -d_max), d_max)
        for n, h, w in np.ndindex(x.shape[0], *x.shape[2:]):
            y[n, c, h, w] = gamma[c] * ((x[n, c, h, w].item() - mu_b) / sigma_b * r + d) + beta[c]
        mu[c] += momentum * (mu_b - mu[c])
        sigma[c] += momentum * (sigma_b - sigma[c])
    return y, mu, sigma


def state_of(brn):
    lists = [v.tolist() for v in (brn.weight, brn.bias, brn.running_mean, brn.running_std)]
    return (*lists, brn.r_max.item(), brn.d_max.item())


@pytest.mark.parametrize("fused", [False, True])
def test_brn_training_equals_the_loop_over_several_steps(fused):
    """Outputs, statistics, and the growth of r_max and d_max by inc_step x batch size past their maximum."""
    brn = make_brn(fused, momentum=0.2, inc_step=0.02, max_r_max=1.25, max_d_max=0.5)
    gamma, beta, mu, sigma, r_max, d_max = state_of(brn)
    assert (r_max, d_max) == (1, 0)
    growth = {3: 0.06, 5: 0.1, 2: 0.04}
    for step, n in enumerate((3, 5, 5, 2, 3, 5, 5, 5)):
        x = 1.5 * rand(n, 3, 2, 3, seed=step, dtype=torch.float64) + 0.3 * step
        expected, mu, sigma = brn_by_loop(x, (gamma, beta, mu, sigma, r_max, d_max), 0.2)
        np.testing.assert_allclose(brn(x).detach(), expected, rtol=0, atol=1e-7)    # r_max is float32
        np.testing.assert_allclose(brn.running_mean, mu, rtol=1e-9)
        np.testing.assert_allclose(brn.running_std, sigma, rtol=1e-9)
        r_max += growth[n] if r_max < 1.25 else 0
        d_max += growth[n] if d_max < 0.5 else 0
        assert brn.r_max.item() == pytest.approx(r_max) and brn.d_max.item() == pytest.approx(d_max)
    # by hand: .06 + .1 + .1 reach 1.25, and .04 + .06 + .1 + .1 more reach .5
    assert (brn.r_max.item(), brn.d_max.item()) == pytest.approx((1.26, 0.56))


@pytest.mark.parametrize("fused", [False, True])
def test_brn_evaluation_equals_the_formula_and_moves_nothing(fused):
    brn = make_brn(fused, momentum=0.5, inc_step=0.1).eval()
    before = {k: v.clone() for k, v in brn.state_dict().items()}
    x = rand(2, 3, 2, 2, dtype=torch.float64)
    gamma, beta, mu, sigma, _, _ = state_of(brn)
    expected = [[[[gamma[c] * (v - mu[c]) / sigma[c] + beta[c] for v in row] for row in x[n, c].tolist()]
                 for c in range(3)] for n in range(2)]
    np.testing.assert_allclose(brn(x).detach(), expected, rtol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in brn.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("r_max, d_max", [(1, 0), (1.05, 0.1), (100, 100)])
@pytest.mark.parametrize("dtype, atol, average", [
    (torch.float64, 1e-12, "std"), (torch.float64, 1e-12, "variance"), (torch.float32, 2e-6, "std")])
def test_fused_brn_equals_the_formula(training, r_max, d_max, dtype, atol, average):
    """Outputs, the gradients of the input, gamma and beta, and the statistics."""
    results = []
    for fused in (False, True):
        brn = make_brn(fused, momentum=0.3, r_max=r_max, d_max=d_max).to(dtype).train(training)
        brn.average = average
        x = (2 * rand(4, 3, 5, 5, dtype=dtype) + 1).requires_grad_()
        y = brn(x)
        (y * rand(4, 3, 5, 5, seed=1, dtype=dtype) / 10).sum().backward()
        grads = x.grad, brn.weight.grad, brn.bias.grad
        results.append([y, *grads, brn.running_mean, brn.running_std, brn.r_max])
    for formula, fused in zip(*results):
        torch.testing.assert_close(fused, formula, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=atol)


def computed_by(kernel, *values):
    """The results of a GPU's kernel for one channel, its text read as Python, in float64."""
    head, body = re.fullmatch(r"template <typename T>\s+\w+\s+\w+(\(.*?\))\s*{(.*)}", kernel, re.S).groups()
    known = dict(zip(re.findall(r"T&? (\w+)", head), values)) | {"sqrt": math.sqrt}
    for statement in body.replace("::", "").replace("return ", "result = ").split(";")[:-1]:
        name, value = statement.strip().removeprefix("T ").split(" = ")
        known[name] = eval(re.sub(r"(.+) \? (.+) : (.+)", r"\2 if \1 else \3", value), {}, known)
    return [known[name] for name in re.findall(r"T& (\w+)", head) or ["result"]]


@pytest.mark.parametrize("r_max, d_max", [(3.0, 5.0), (1.01, 0.01)])
def test_the_text_of_the_kernels_of_a_gpu_is_the_formula(r_max, d_max):
    """On any machine; tests/test_gpu.py runs them."""
    from harness.gpu import BACKWARD, FORWARD
    brn = make_brn(False, momentum=0.3, r_max=r_max, d_max=d_max, inc_step=0.0).requires_grad_(False)
    before = copy.deepcopy(brn)
    x = 2 * rand(4, 3, 5, 5, dtype=torch.float64) + .3
    brn(x)
    mu_b, var_b = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    for c in range(3):
        values = mu_b, var_b, before.running_mean, before.running_std, brn.weight, brn.bias
        channel = [float(v[c]) for v in values]
        found = computed_by(FORWARD, *channel, float(brn.r_max), float(brn.d_max), 0.3, brn.eps)
        r, d = (float(v[c]) for v in brn.last)
        expected = [r, d, channel[4] * r, channel[4] * d + channel[5], (channel[1] + brn.eps) ** -.5,
                    float(brn.running_mean[c]), float(brn.running_std[c])]
        assert found == pytest.approx(expected, rel=1e-12)
    assert computed_by(BACKWARD, 2.0, 3.0, 5.0, 7.0) == [31.0]


# momentum 0 and no growth, so that gradcheck's repeated calls all see the same layer
STILL = dict(momentum=0.0, inc_step=0.0)


@pytest.mark.parametrize("fused", [False, True])
def test_brn_gradcheck_with_r_and_d_clipped(fused):
    """Clipped, r and d are constants: numerical derivatives by input, gamma and beta are the layer's."""
    brn = make_brn(fused, r_max=1.02, d_max=0.01, **STILL)
    x = (3 * rand(3, 3, 2, 2, dtype=torch.float64) + 4).requires_grad_()
    with torch.no_grad():
        mu_b, sigma_b = x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + brn.eps).sqrt()
        assert (sigma_b / brn.running_std > 1.1).all()
        assert ((mu_b - brn.running_mean) / brn.running_std > 0.1).all()

    def layer(x, weight, bias):
        return torch.func.functional_call(brn, {"weight": weight, "bias": bias}, x)
    assert torch.autograd.gradcheck(layer, (x, brn.weight, brn.bias))


@pytest.mark.parametrize("fused", [False, True])
def test_no_gradient_flows_through_r_and_d(fused):
    """Unclipped, the gradient is that of the formula with constant r and d; through them, gamma / sigma."""
    brn = make_brn(fused, r_max=100.0, d_max=100.0, **STILL)
    x = (rand(3, 3, 2, 2, dtype=torch.float64) + 0.5).requires_grad_()
    weights = rand(3, 3, 2, 2, seed=5, dtype=torch.float64)
    mu, sigma, gamma, beta = (v.detach().view(1, 3, 1, 1)
                              for v in (brn.running_mean, brn.running_std, brn.weight, brn.bias))
    with torch.no_grad():
        r = (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt() / sigma
        d = (x.mean((0, 2, 3), keepdim=True) - mu) / sigma

    def constant_r_d(x):
        mu_b = x.mean((0, 2, 3), keepdim=True)
        sigma_b = (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        return gamma * ((x - mu_b) / sigma_b * r + d) + beta
    assert torch.autograd.gradcheck(constant_r_d, (x,))          # the reference itself
    expected, = torch.autograd.grad((constant_r_d(x) * weights).sum(), x)
    through, = torch.autograd.grad((gamma * (x - mu) / sigma * weights).sum(), x)
    found, = torch.autograd.grad((brn(x) * weights).sum(), x)
    torch.testing.assert_close(found, expected)
    assert (found - through).abs().max() > 0.1
    torch.testing.assert_close(brn(x), gamma * (x - mu) / sigma + beta)     # unclipped, it is the evaluation


def test_brn_with_r_max_1_and_d_max_0_is_batch_normalization():
    brn, bn = BatchRenorm2D(4, inc_step=0.0), nn.BatchNorm2d(4)
    bn.load_state_dict({**bn.state_dict(), "weight": rand(4), "bias": rand(4, seed=1)})
    brn.load_state_dict({**brn.state_dict(), "weight": rand(4), "bias": rand(4, seed=1)})
    x = 3 * rand(6, 4, 5, 5) + 1
    for _ in range(2):
        torch.testing.assert_close(brn(x), bn(x))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_brn_of_low_precision_keeps_its_statistics_in_float32(fused, low):
    """A step of momentum 5e-5 is less than bfloat16 or float16 can add: averages of 1 would never move."""
    exact = BatchRenorm2D(3, fused=fused, momentum=5e-5, r_max=1.5, d_max=1.0).train()
    low_brn = copy.deepcopy(exact).to(low)
    for k in range(50):
        x = (2 + rand(8, 3, 5, 5, seed=k)).to(low)
        y, expected = low_brn(x), exact(x.float())
        assert y.dtype == low and (y.float() - expected).abs().max() < 0.05
    assert low_brn.weight.dtype == low
    for key in ("running_mean", "running_std", "r_max", "d_max"):
        buffer = getattr(low_brn, key)
        assert buffer.dtype == torch.float32 and torch.equal(buffer, getattr(exact, key)), key
    # 50 steps of 5e-5 towards a batch mean near 2, from 0
    assert low_brn.running_mean.mean().item() == pytest.approx(50 * 5e-5 * 2, rel=0.1)
    y = low_brn.eval()(x)
    assert y.dtype == low and (y.float() - exact.eval()(x.float())).abs().max() < 0.05


@pytest.mark.parametrize("fused", [True, False])
def test_brn_works_under_autocast_as_batch_norm_does(fused):
    conv, brn = nn.Conv2d(3, 3, 3), BatchRenorm2D(3, fused=fused, r_max=1.5, d_max=1.0).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = brn(conv(rand(4, 3, 8, 8)))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and conv.weight.grad.dtype == brn.weight.grad.dtype == torch.float32
    assert brn.running_mean.dtype == torch.float32 and brn.running_mean.abs().sum() > 0


def test_brn_state_is_in_buffers_and_follows_dtype():
    brn = BatchRenorm2D(2, momentum=0.5, inc_step=0.01, r_max=1.1, d_max=0.2)
    brn(rand(3, 2, 4, 4) * 2 + 1)
    state = brn.state_dict()
    assert set(state) == {"weight", "bias", "running_mean", "running_std", "r_max", "d_max"}
    assert state["r_max"].item() == pytest.approx(1.13) and state["d_max"].item() == pytest.approx(0.23)
    other = BatchRenorm2D(2, momentum=0.5, inc_step=0.01)
    other.load_state_dict(state)
    x = rand(3, 2, 4, 4, seed=1)
    assert torch.equal(other(x), brn(x)) and torch.equal(other.running_std, brn.running_std)
    assert {v.dtype for v in brn.to(torch.float64).state_dict().values()} == {torch.float64}


@pytest.mark.parametrize("affine", [True, False])
def test_from_batch_norm_keeps_the_evaluation_even_with_a_constant_channel(affine):
    bn = nn.BatchNorm2d(5, eps=1e-3, affine=affine)
    bn.running_mean.copy_(rand(5))
    bn.running_var.copy_(torch.tensor([0.0, 0.5, 1.0, 2.0, 9.0]))
    if affine:
        bn.load_state_dict({**bn.state_dict(), "weight": rand(5, seed=1), "bias": rand(5, seed=2)})
    brn = BatchRenorm2D.from_batch_norm(bn, momentum=0.25, max_r_max=3.0)
    x = rand(2, 5, 3, 3, seed=3)
    x[:, 0] = bn.running_mean[0]
    torch.testing.assert_close(brn.eval()(x), bn.eval()(x))
    assert len(list(brn.parameters())) == (2 if affine else 0)
    assert brn.running_std.tolist() == pytest.approx([math.sqrt(v + 1e-3) for v in (0, 0.5, 1, 2, 9)])
    assert (brn.eps, brn.momentum, brn.max_r_max) == (1e-3, 0.25, 3.0)
    assert (brn.r_max.item(), brn.d_max.item()) == (1.0, 0.0)


def test_replace_batch_norm_reaches_nested_layers_and_keeps_values_and_modes():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ModuleDict({"a": nn.Sequential(nn.BatchNorm2d(4))}),
        nn.ModuleList([nn.ModuleList([nn.BatchNorm2d(7)])]), nn.BatchNorm1d(4))
    randomize(model)
    model[2].eval()
    gammas = [m.weight.tolist() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert replace_batch_norm(model, momentum=0.125) == 3
    layers = brn_layers(model)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert isinstance(model[4], nn.BatchNorm1d)
    assert [m.weight.tolist() for m in layers] == gammas and [m.momentum for m in layers] == [0.125] * 3
    assert layers == [model[1], model[2]["a"][0], model[3][0][0]]
    assert [m.training for m in layers] == [True, False, True]
    assert replace_batch_norm(model) == 0


@pytest.mark.parametrize("name, value", [
    ("momentum", 0.5), ("r_max", 1.2), ("d_max", 0.25), ("max_r_max", 1.5), ("max_d_max", 0.75),
    ("inc_step", 0.5)])
def test_set_brn_params_changes_what_the_next_forward_reads_and_nothing_else(name, value):
    first, second = (make_brn(momentum=0.1, inc_step=0.01) for _ in range(2))
    model = nn.Sequential(first, nn.Sequential(second))
    before = dict(momentum=0.1, r_max=1.0, d_max=0.0, max_r_max=1.25, max_d_max=0.5, inc_step=0.01)
    expected = before | {name: value}
    set_brn_params(model, **{name: value})
    for brn in brn_layers(model):
        assert {n: float(getattr(brn, n)) for n in before} == pytest.approx(expected)
        gamma, beta, mu, sigma, _, _ = state_of(brn)
        x = 2 * rand(30, 3, 1, 2, seed=3, dtype=torch.float64) + 1
        for _ in range(2):      # in the second forward r_max has grown to 1.3 (or 16), d_max to 0.3 (or 15)
            y, mu, sigma = brn_by_loop(x, (gamma, beta, mu, sigma, expected["r_max"], expected["d_max"]),
                                       expected["momentum"])
            np.testing.assert_allclose(brn(x).detach(), y, rtol=0, atol=1e-6)
            for limit in ("r_max", "d_max"):
                if expected[limit] < expected[f"max_{limit}"]:
                    expected = expected | {limit: expected[limit] + 30 * expected["inc_step"]}
            assert brn.r_max.item() == pytest.approx(expected["r_max"])
            assert brn.d_max.item() == pytest.approx(expected["d_max"])
        np.testing.assert_allclose(brn.running_mean, mu, rtol=1e-6)
        expected = expected | {"r_max": 1.0, "d_max": 0.0} | {name: value}


# ---- networks of others ----

class NormalizeAndActivate(nn.BatchNorm2d):
    """As in timm: the rest of its work is done by its children."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        return self.act(super().forward(x))


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@torch.no_grad()
def test_a_normalization_that_also_activates_keeps_its_activation():
    net = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), NormalizeAndActivate(4))).eval()
    x = rand(2, 3, 5, 5)
    bn = net[1]
    mu, var, gamma, beta = (v.view(-1, 1, 1) for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    y = (net[0](x) - mu) / (var + bn.eps).sqrt() * gamma + beta
    assert replace_batch_norm(net) == 1 and not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    torch.testing.assert_close(net(x), y * torch.sigmoid(y))


def test_a_layer_in_two_places_stays_one():
    bn = nn.BatchNorm2d(4)
    net = nn.ModuleDict({"a": nn.Sequential(bn, nn.ReLU()), "b": nn.Sequential(nn.Conv2d(4, 4, 1), bn, bn)})
    assert replace_batch_norm(net) == 1 and len(brn_layers(net)) == 1
    assert net["a"][0] is net["b"][1] is net["b"][2] is brn_layers(net)[0]


@pytest.mark.parametrize("bn, says", [
    (nn.BatchNorm2d(3, track_running_stats=False), "track_running_stats"),
    (nn.LazyBatchNorm2d(), "image"),
    (Doubled(3), "Doubled")])
def test_what_is_no_batch_normalization_alone_is_named_and_nothing_replaced(bn, says):
    net = nn.Sequential(nn.BatchNorm2d(2), nn.ModuleDict({"deep": bn}))
    with pytest.raises(ValueError, match=says) as error:
        replace_batch_norm(net)
    assert "'1.deep'" in str(error.value)
    assert net[1]["deep"] is bn and type(net[0]) is nn.BatchNorm2d


def test_a_batch_normalization_over_processes_is_one_in_a_single_process(monkeypatch):
    net = nn.Sequential(nn.SyncBatchNorm(3))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="several processes"):
        replace_batch_norm(net)
    monkeypatch.undo()
    assert replace_batch_norm(net) == 1 and type(net[0]) is BatchRenorm2D


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_a_batch_without_images_moves_nothing(fused, shape):
    brn = make_brn(fused, r_max=1.1, inc_step=0.01)
    before = copy.deepcopy(brn.state_dict())
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    y = brn(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert all(torch.equal(value, before[key]) for key, value in brn.state_dict().items())
    assert not brn.weight.grad.any()


def test_what_cannot_be_is_refused():
    with pytest.raises(TypeError):
        set_brn_params(nn.Sequential(BatchRenorm2D(2)), r_d_max_inc_step=0.1)
    with pytest.raises(ValueError, match="no BatchRenorm2D"):
        set_brn_params(nn.Sequential(nn.BatchNorm2d(2)), momentum=0.1)


def test_fold_brn_equals_the_evaluation_and_shares_no_memory():
    net = nn.Sequential(
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), BatchRenorm2D(4), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), BatchRenorm2D(4)), BatchRenorm2D(4),
        nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), BatchRenorm2D(6)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = randomize(net).double().train()
    x = rand(2, 3, 8, 8, dtype=torch.float64)
    net.eval()
    expected = net(x.clone())
    folded = fold_brn(net.train())
    assert net.training and not folded.training and not [m for m in folded[1] if isinstance(m, BatchRenorm2D)]
    torch.testing.assert_close(folded(x.clone()), expected)

    def storages(m):
        return {t.untyped_storage().data_ptr() for t in m.state_dict().values()}
    assert not storages(net) & storages(folded) and not any(p.requires_grad for p in folded.parameters())
    with torch.no_grad():
        for value in net.state_dict().values():
            value.mul_(2)
    torch.testing.assert_close(folded(x.clone()), expected)


class Skip(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Standardized(nn.Conv2d):
    """Weight standardization, arXiv 1903.10520."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def hooked():
    conv = nn.Conv2d(4, 4, 1)
    conv.register_forward_hook(lambda module, args, y: 3 * y)
    return conv


@pytest.mark.parametrize("conv", [
    Skip(nn.Conv2d(4, 4, 1), BatchRenorm2D(4)), Standardized(4, 4, 3), Padded(4, 4, 3), hooked(),
    nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.ConvTranspose2d(4, 4, 2)])
@torch.no_grad()
def test_fold_brn_uses_as_they_are_layers_that_do_more_than_convolve(conv):
    net = randomize(nn.Sequential(conv, BatchRenorm2D(4), nn.ReLU(), Skip(BatchRenorm2D(4)))).double().eval()
    x = rand(2, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(fold_brn(net)(x.clone()), net(x))


@torch.no_grad()
def test_fold_brn_folds_layers_without_gamma_and_beta_and_twice_used_ones():
    brn = BatchRenorm2D(4, affine=False)
    brn.running_mean.copy_(rand(4))
    brn.running_std.copy_(rand(4, seed=1).abs() + 0.5)
    conv = nn.Conv2d(4, 4, 1)
    net = nn.Sequential(conv, brn, nn.ReLU(), conv, brn).double().eval()
    x = rand(2, 4, 3, 3, dtype=torch.float64)
    folded = fold_brn(net)
    assert not brn_layers(folded)
    torch.testing.assert_close(folded(x.clone()), net(x))
