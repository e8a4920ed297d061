"""Batch Renormalization, the split network and its pre-trained weights, against references written from the papers.

The references here (a loop over numbers, the functional form of each layer, the pytorchcv package) share no code with
the models. Sections are those of the specification of the method: 2 the network, 3 Batch Renormalization.
"""
import copy
import hashlib
import http.client
import io
import math
import os
import pickle
import random
import time
import urllib.error
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import mobilenet
from models.batch_renorm import BatchRenorm2D, brn_layers, fold_brn, replace_batch_norm, set_brn_params
from models.mobilenet import (LAYER_NAMES, GlobalAvgPool, MobileNetV1, PointwiseConv2d, WeightsError,
                              load_imagenet_weights)
from models.split_net import LayerError, SplitNet

# Section 2, by hand: (name, channels, side of the map) for 128x128 images; the last one is pooled.
TABLE = [("conv1", 32, 64), ("conv2_1/dw", 32, 64), ("conv2_1/sep", 64, 64), ("conv2_2/dw", 64, 32),
         ("conv2_2/sep", 128, 32), ("conv3_1/dw", 128, 32), ("conv3_1/sep", 128, 32), ("conv3_2/dw", 128, 16),
         ("conv3_2/sep", 256, 16), ("conv4_1/dw", 256, 16), ("conv4_1/sep", 256, 16), ("conv4_2/dw", 256, 8),
         ("conv4_2/sep", 512, 8), ("conv5_1/dw", 512, 8), ("conv5_1/sep", 512, 8), ("conv5_2/dw", 512, 8),
         ("conv5_2/sep", 512, 8), ("conv5_3/dw", 512, 8), ("conv5_3/sep", 512, 8), ("conv5_4/dw", 512, 8),
         ("conv5_4/sep", 512, 8), ("conv5_5/dw", 512, 8), ("conv5_5/sep", 512, 8), ("conv5_6/dw", 512, 4),
         ("conv5_6/sep", 1024, 4), ("conv6/dw", 1024, 4), ("conv6/sep", 1024, 4), ("pool6", 1024, None)]


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomize(model, seed=0):
    """Gives every normalization (BRN or BN) of a model statistics, gamma and beta of its own."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (BatchRenorm2D, nn.BatchNorm2d)):
                m.weight.uniform_(0.8, 1.3, generator=rng)
                m.bias.uniform_(-0.3, 0.5, generator=rng)
                m.running_mean.uniform_(-0.3, 0.3, generator=rng)
                spread = m.running_std if isinstance(m, BatchRenorm2D) else m.running_var
                spread.uniform_(0.6, 1.6, generator=rng)
    return model


# ---- Batch Renormalization ----

def make_brn(fused=False, channels=3, **params):
    return randomize(BatchRenorm2D(channels, fused=fused, **params), seed=1).double()


def brn_by_loop(x, state, momentum, eps=1e-5):
    """Section 3 in Python floats, one number at a time. state: gamma, beta, mu, sigma (lists), r_max, d_max.

    Returns the output and the state after the running statistics have moved; r_max and d_max are the caller's.
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
    return y, (gamma, beta, mu, sigma, r_max, d_max)


def state_of(brn):
    lists = [v.tolist() for v in (brn.weight, brn.bias, brn.running_mean, brn.running_std)]
    return (*lists, brn.r_max.item(), brn.d_max.item())


@pytest.mark.parametrize("fused", [False, True])
def test_brn_training_equals_the_loop_over_several_steps(fused):
    """Outputs, running statistics, and growth of r_max and d_max by inc_step x batch size up to past their maximum."""
    brn = make_brn(fused, momentum=0.2, inc_step=0.02, max_r_max=1.25, max_d_max=0.5)
    gamma, beta, mu, sigma, r_max, d_max = state_of(brn)
    assert (r_max, d_max) == (1, 0)
    growth = {3: 0.06, 5: 0.1, 2: 0.04}
    for step, n in enumerate((3, 5, 5, 2, 3, 5, 5, 5)):
        x = 1.5 * rand(n, 3, 2, 3, seed=step, dtype=torch.float64) + 0.3 * step
        expected, (_, _, mu, sigma, _, _) = brn_by_loop(x, (gamma, beta, mu, sigma, r_max, d_max), 0.2)
        np.testing.assert_allclose(brn(x).detach(), expected, rtol=0, atol=1e-7)    # r_max grows by a float32 step
        np.testing.assert_allclose(brn.running_mean, mu, rtol=1e-9)
        np.testing.assert_allclose(brn.running_std, sigma, rtol=1e-9)
        r_max, d_max = (r_max + growth[n] if r_max < 1.25 else r_max), (d_max + growth[n] if d_max < 0.5 else d_max)
        assert brn.r_max.item() == pytest.approx(r_max) and brn.d_max.item() == pytest.approx(d_max)
    # by hand: .06 + .1 + .1 reach 1.25, and .04 + .06 + .1 + .1 more reach .5
    assert (brn.r_max.item(), brn.d_max.item()) == pytest.approx((1.26, 0.56))


@pytest.mark.parametrize("fused", [False, True])
def test_brn_evaluation_equals_the_formula_and_moves_nothing(fused):
    brn = make_brn(fused, momentum=0.5, inc_step=0.1).eval()
    before = {k: v.clone() for k, v in brn.state_dict().items()}
    x, (gamma, beta, mu, sigma, _, _) = rand(2, 3, 2, 2, dtype=torch.float64), state_of(brn)
    expected = [[[[gamma[c] * (v - mu[c]) / sigma[c] + beta[c] for v in row] for row in x[n, c].tolist()]
                 for c in range(3)] for n in range(2)]
    np.testing.assert_allclose(brn(x).detach(), expected, rtol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in brn.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("r_max, d_max", [(1, 0), (1.05, 0.1), (100, 100)])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_fused_brn_equals_the_formula(training, r_max, d_max, dtype, atol):
    """Outputs, the gradients of the input, gamma and beta, and the statistics."""
    results = []
    for fused in (False, True):
        brn = make_brn(fused, momentum=0.3, r_max=r_max, d_max=d_max).to(dtype).train(training)
        x = (2 * rand(4, 3, 5, 5, dtype=dtype) + 1).requires_grad_()
        y = brn(x)
        (y * rand(4, 3, 5, 5, seed=1, dtype=dtype) / 10).sum().backward()
        results.append([y, x.grad, brn.weight.grad, brn.bias.grad, brn.running_mean, brn.running_std, brn.r_max])
    for formula, fused in zip(*results):
        torch.testing.assert_close(fused, formula, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=atol)


# momentum 0 and no growth, so that gradcheck's repeated calls all see the same layer
STILL = dict(momentum=0.0, inc_step=0.0)


@pytest.mark.parametrize("fused", [False, True])
def test_brn_gradcheck_with_r_and_d_clipped(fused):
    """Clipped, r and d are constants, so the numerical derivatives are those of the layer: input, gamma and beta."""
    brn = make_brn(fused, r_max=1.02, d_max=0.01, **STILL)
    x = (3 * rand(3, 3, 2, 2, dtype=torch.float64) + 4).requires_grad_()
    with torch.no_grad():
        mu_b, sigma_b = x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + brn.eps).sqrt()
        assert (sigma_b / brn.running_std > 1.1).all() and ((mu_b - brn.running_mean) / brn.running_std > 0.1).all()

    def layer(x, weight, bias):
        return torch.func.functional_call(brn, {"weight": weight, "bias": bias}, x)
    assert torch.autograd.gradcheck(layer, (x, brn.weight, brn.bias))


@pytest.mark.parametrize("fused", [False, True])
def test_no_gradient_flows_through_r_and_d(fused):
    """Unclipped, the gradient is that of the formula with r and d held constant; through them, gamma/sigma."""
    brn = make_brn(fused, r_max=100.0, d_max=100.0, **STILL)
    x = (rand(3, 3, 2, 2, dtype=torch.float64) + 0.5).requires_grad_()
    weights = rand(3, 3, 2, 2, seed=5, dtype=torch.float64)
    mu, sigma, gamma, beta = (v.detach().view(1, 3, 1, 1)
                              for v in (brn.running_mean, brn.running_std, brn.weight, brn.bias))
    with torch.no_grad():
        r = (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt() / sigma
        d = (x.mean((0, 2, 3), keepdim=True) - mu) / sigma

    def constant_r_d(x):
        mu_b, sigma_b = x.mean((0, 2, 3), keepdim=True), (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        return gamma * ((x - mu_b) / sigma_b * r + d) + beta
    assert torch.autograd.gradcheck(constant_r_d, (x,))          # the reference itself
    expected, = torch.autograd.grad((constant_r_d(x) * weights).sum(), x)
    through, = torch.autograd.grad((gamma * (x - mu) / sigma * weights).sum(), x)
    found, = torch.autograd.grad((brn(x) * weights).sum(), x)
    torch.testing.assert_close(found, expected)
    assert (found - through).abs().max() > 0.1
    torch.testing.assert_close(brn(x), gamma * (x - mu) / sigma + beta)     # unclipped, the value is the evaluation's


def test_brn_with_r_max_1_and_d_max_0_is_batch_normalization():
    brn, bn = BatchRenorm2D(4, inc_step=0.0), nn.BatchNorm2d(4)
    bn.load_state_dict({**bn.state_dict(), "weight": rand(4), "bias": rand(4, seed=1)})
    brn.load_state_dict({**brn.state_dict(), "weight": rand(4), "bias": rand(4, seed=1)})
    x = 3 * rand(6, 4, 5, 5) + 1
    for _ in range(2):
        torch.testing.assert_close(brn(x), bn(x))


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
    assert brn.running_std.tolist() == pytest.approx([math.sqrt(v + 1e-3) for v in (0, 0.5, 1, 2, 9)])
    assert (brn.eps, brn.momentum, brn.max_r_max, brn.r_max.item(), brn.d_max.item()) == (1e-3, 0.25, 3.0, 1.0, 0.0)


def test_replace_batch_norm_reaches_nested_layers_and_keeps_values_and_modes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ModuleDict({"a": nn.Sequential(nn.BatchNorm2d(4))}),
                          nn.ModuleList([nn.ModuleList([nn.BatchNorm2d(7)])]), nn.BatchNorm1d(4))
    randomize(model)
    model[2].eval()
    gammas = [m.weight.tolist() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert replace_batch_norm(model, momentum=0.125) == 3
    layers = brn_layers(model)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] and isinstance(model[4], nn.BatchNorm1d)
    assert [m.weight.tolist() for m in layers] == gammas and [m.momentum for m in layers] == [0.125] * 3
    assert layers == [model[1], model[2]["a"][0], model[3][0][0]]
    assert [m.training for m in layers] == [True, False, True]
    assert replace_batch_norm(model) == 0


def test_replace_batch_norm_refuses_layers_without_statistics():
    with pytest.raises(ValueError, match="track_running_stats"):
        replace_batch_norm(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))


@pytest.mark.parametrize("name, value", [("momentum", 0.5), ("r_max", 1.2), ("d_max", 0.25), ("max_r_max", 1.5),
                                         ("max_d_max", 0.75), ("inc_step", 0.5)])
def test_set_brn_params_changes_what_the_next_forward_reads_and_nothing_else(name, value):
    model = nn.Sequential(make_brn(momentum=0.1, inc_step=0.01), nn.Sequential(make_brn(momentum=0.1, inc_step=0.01)))
    names = ("momentum", "r_max", "d_max", "max_r_max", "max_d_max", "inc_step")
    expected = dict(momentum=0.1, r_max=1.0, d_max=0.0, max_r_max=1.25, max_d_max=0.5, inc_step=0.01) | {name: value}
    set_brn_params(model, **{name: value})
    for brn in brn_layers(model):
        assert {n: float(getattr(brn, n)) for n in names} == pytest.approx(expected)
        gamma, beta, mu, sigma, _, _ = state_of(brn)
        x = 2 * rand(30, 3, 1, 2, seed=3, dtype=torch.float64) + 1
        for _ in range(2):      # in the second forward r_max has grown to 1.3 (or 16), d_max to 0.3 (or 15)
            y, (_, _, mu, sigma, _, _) = brn_by_loop(
                x, (gamma, beta, mu, sigma, expected["r_max"], expected["d_max"]), expected["momentum"])
            np.testing.assert_allclose(brn(x).detach(), y, rtol=0, atol=1e-6)
            expected = expected | {b: expected[b] + 30 * expected["inc_step"] * (expected[b] < expected["max_" + b])
                                   for b in ("r_max", "d_max")}
            assert brn.r_max.item() == pytest.approx(expected["r_max"])
            assert brn.d_max.item() == pytest.approx(expected["d_max"])
        np.testing.assert_allclose(brn.running_mean, mu, rtol=1e-6)
        expected = expected | {"r_max": 1.0, "d_max": 0.0} | {name: value}


def test_set_brn_params_refuses_what_nobody_reads():
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


# ---- the split network ----

def small_net(latent_layer=19, width=0.125, classes=5, seed=0, **kwargs):
    torch.manual_seed(seed)
    return randomize(MobileNetV1(classes, latent_layer, width=width, **kwargs), seed)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 5)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_pointwise_convolution_equals_the_sum_over_channels(bias, size, layout):
    """Values and gradients, in either memory layout, which the result keeps."""
    conv = PointwiseConv2d(5, 7, 1, bias=bias).double()
    x = rand(3, 5, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    y = conv(x)
    expected = torch.stack([sum(conv.weight[o, i, 0, 0] * x[:, i] for i in range(5)) + (conv.bias[o] if bias else 0)
                            for o in range(7)], 1)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=layout)
    weights, inputs = rand(*y.shape, seed=1, dtype=torch.float64), (x, *conv.parameters())
    for mine, theirs in zip(torch.autograd.grad((y * weights).sum(), inputs),
                            torch.autograd.grad((expected * weights).sum(), inputs)):
        torch.testing.assert_close(mine, theirs)


def test_global_pooling_is_the_mean_over_the_map():
    x = rand(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
    y = GlobalAvgPool()(x)
    assert y.shape == (2, 3)
    assert y[1, 2].item() == pytest.approx(sum(v for row in x[1, 2].tolist() for v in row) / 20)
    assert torch.autograd.gradcheck(GlobalAvgPool(), (x,))


def test_layers_are_numbered_and_shaped_as_the_table():
    assert list(LAYER_NAMES) == [name for name, _, _ in TABLE] and LAYER_NAMES[19] == "conv5_4/dw"
    net, x = MobileNetV1(50).eval(), rand(1, 3, 128, 128)
    assert net.latent_layer_num == 19 and len(net.lat_features) == 20 and len(net.layers) == 28
    with torch.no_grad():
        for i, (layer, (name, channels, side)) in enumerate(zip(net.layers, TABLE, strict=True)):
            x = layer(x)
            assert x.shape == ((1, channels, side, side) if side else (1, channels)), (i, name)
    assert net.output.weight.shape == (50, 1024) and net.output.bias is None
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 27 and all(m.bias is None for m in convolutions)
    assert len(brn_layers(net)) == 27 and {m.eps for m in brn_layers(net)} == {1e-5}
    assert not [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("latent", range(-1, 28))
def test_joined_forward_equals_the_unsplit_network(latent):
    """New images and replayed latents, joined at any layer, give what all the images give in one piece, in training."""
    net = small_net(latent, inc_step=0.0, r_max=1.1, d_max=0.1)
    net.freeze_below(latent)
    whole = copy.deepcopy(net)
    x, replayed = rand(6, 3, 40, 32), 2
    h = x
    for i, layer in enumerate(whole.layers):
        h = layer.train(i > latent)(h)
        if i == latent:
            stored = h[:replayed]
    stored = x[:replayed] if latent == -1 else stored
    expected = (h @ whole.output.weight.T).roll(-replayed, 0)
    scores, latents = net(x[replayed:], latent_input=stored, return_lat_acts=True)
    torch.testing.assert_close(scores, expected)
    assert latents.shape == (4, *stored.shape[1:])
    for mine, theirs in zip(brn_layers(net), brn_layers(whole), strict=True):
        torch.testing.assert_close(mine.running_mean, theirs.running_mean)


def test_forward_returns_what_it_says():
    net = small_net("conv5_1/sep").eval()
    x, latents = rand(3, 3, 64, 64), rand(2, 64, 4, 4, seed=2)
    plain, joined = net(x), net(x, latents)
    assert plain.shape == (3, 5) and joined.shape == (5, 5)
    torch.testing.assert_close(joined[:3], plain)                               # the images come first,
    torch.testing.assert_close(joined[3:], net.classify(latents))               # then the replayed latents,
    scores, own = net(x, latent_input=latents, return_lat_acts=True)            # and only the images' are returned
    assert torch.equal(own, net.lat_features(x)) and torch.equal(scores, joined)


@pytest.mark.parametrize("size, latent_size", [((96, 96), (6, 6)), ((160, 160), (10, 10)), ((224, 160), (14, 10)),
                                               ((33, 45), (3, 3)), ((32, 32), (2, 2))])
def test_any_image_size_from_32_pixels(size, latent_size):
    net = small_net(classes=7).eval()
    scores, latents = net(rand(2, 3, *size), return_lat_acts=True)
    assert latents.shape == (2, 64, *latent_size)
    pooled = latents
    for layer in list(net.end_features)[:-1]:
        pooled = layer(pooled)
    torch.testing.assert_close(scores, pooled.mean((2, 3)) @ net.output.weight.T)
    assert scores.shape == (2, 7)


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (1, 1)])
def test_too_small_images_are_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels are too small.*32x32"):
        small_net()(rand(1, 3, *size))


@pytest.mark.parametrize("layer, number", [("images", -1), ("conv1", 0), ("conv4_1/sep", 10), ("conv5_4/dw", 19),
                                           ("pool6", 27), (-1, -1), (27, 27)])
def test_layers_go_by_number_or_name(layer, number):
    net = small_net(layer)
    assert net.latent_layer_num == number and len(net.lat_features) == number + 1
    assert net.layer_number(layer) == number


@pytest.mark.parametrize("layer, hint", [("conv5_4/dv", "'conv5_4/dw'"), ("pool", "'pool6'"), ("image", "'images'"),
                                         (28, "-1"), (-2, "-1"), (True, "-1"), (19.0, "-1"), (None, "-1"), ("", "-1")])
def test_an_unknown_layer_is_an_error_that_names_the_nearest(layer, hint):
    with pytest.raises(LayerError, match=hint):
        small_net(layer)
    with pytest.raises(LayerError, match=hint):
        small_net().freeze_below(layer)


@pytest.mark.parametrize("latent, frozen", [(19, -1), (19, 0), (19, "conv5_4/dw"), (19, 27), (-1, 13),
                                            (27, "conv6/sep")])
def test_freeze_below_freezes_exactly_these_layers_for_good(latent, frozen):
    """No gradients, evaluation mode through train(), weights and statistics bit-equal after training; others move."""
    net = small_net(latent, momentum=0.1)
    number = -1 if frozen == -1 else net.layer_number(frozen)
    count = net.freeze_below(frozen)
    net.eval().train()
    for i, layer in enumerate(net.layers):
        assert {p.requires_grad for p in layer.parameters()} <= {i > number}
        assert {m.training for m in layer.modules()} == {i > number}
    assert net.output.weight.requires_grad
    assert count == sum(p.numel() for p in net.parameters() if not p.requires_grad)
    before = copy.deepcopy([layer.state_dict() for layer in net.layers])
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    for step in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(rand(8, 3, 64, 64, seed=step)), torch.arange(8) % 5).backward()
        optimizer.step()
    for i, layer in enumerate(net.layers):
        for key, value in layer.state_dict().items():
            assert torch.equal(value, before[i][key]) == (i <= number), (i, key)
    net.eval()
    net.freeze_below(-1)
    assert all(p.requires_grad for p in net.parameters()) and not any(m.training for m in net.modules())


def test_a_split_net_of_other_layers_works_alone():
    layers = {"a": nn.Linear(3, 4), "b.1": nn.Tanh(), "c": nn.Linear(4, 2)}
    net, x = SplitNet(layers, 2, 6, "b.1"), rand(5, 3)
    expected = layers["c"](torch.tanh(layers["a"](x))) @ net.output.weight.T
    torch.testing.assert_close(net(x[:1], latent_input=net.lat_features(x[1:])), expected)


# ---- pre-trained weights ----

NAME = "mobilenet_w1-0895-7e1d739f.pth"
STAGES = [[64], [128, 128], [256, 256], [512] * 6, [1024, 1024]]       # output channels of each unit, section 2
UNIT_STRIDES = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]


def published_layers(width=0.125):
    """(key prefix, weight shape, stride, groups) of the 27 convolutions in the published file."""
    c_in = int(32 * width)
    layers = [("features.init_block", (c_in, 3, 3, 3), 2, 1)]
    strides = iter(UNIT_STRIDES)
    for s, units in enumerate(STAGES, 1):
        for u, channels in enumerate(units, 1):
            c_out = int(channels * width)
            layers.append((f"features.stage{s}.unit{u}.dw_conv", (c_in, 1, 3, 3), next(strides), c_in))
            layers.append((f"features.stage{s}.unit{u}.pw_conv", (c_out, c_in, 1, 1), 1, 1))
            c_in = c_out
    return layers


def published_state(width=0.125, seed=0):
    """Random weights in the layout of the published file."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for prefix, shape, _, _ in published_layers(width):
        bound = math.sqrt(6 / math.prod(shape[1:]))
        state[f"{prefix}.conv.weight"] = torch.empty(shape).uniform_(-bound, bound, generator=rng)
        for name, low, high in (("weight", .8, 1.2), ("bias", -.2, .5), ("running_mean", -.2, .2),
                                ("running_var", .5, 2)):
            state[f"{prefix}.bn.{name}"] = torch.empty(shape[0]).uniform_(low, high, generator=rng)
        state[f"{prefix}.bn.num_batches_tracked"] = torch.tensor(7)
    return state | {"output.weight": torch.ones(1000, int(1024 * width)), "output.bias": torch.ones(1000)}


def save_zip(path, state, inside=NAME):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(inside, buffer.getvalue())
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["pth", "old pth", "zip", "state_dict inside"])
def test_weights_go_where_the_published_layout_says(tmp_path, form):
    """The loaded network equals conv2d and batch_norm applied with the file's tensors, at every layer."""
    state, path = published_state(), tmp_path / "weights"
    if form == "zip":
        save_zip(path, state)
    else:
        torch.save({"state_dict": state} if form == "state_dict inside" else state, path,
                   _use_new_zipfile_serialization=form != "old pth")
    net = MobileNetV1(5, "conv4_2/dw", weights=str(path), width=0.125).eval()
    h = mine = rand(2, 3, 64, 48)
    for layer, (prefix, _, stride, groups) in zip(net.layers, published_layers()):
        weight = state[f"{prefix}.conv.weight"]
        h = F.conv2d(h, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        bn = [state[f"{prefix}.bn.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        h, mine = F.batch_norm(h, *bn, eps=1e-5).relu(), layer(mine)
        torch.testing.assert_close(mine, h, rtol=1e-4, atol=1e-5)
    assert h.std() > 0.01 and net.output.weight.shape == (5, 128)


@pytest.fixture(scope="module")
def pytorchcv_net():
    model_provider = pytest.importorskip("pytorchcv.model_provider", reason="needs pytorchcv, a test-only package")
    torch.manual_seed(3)
    return randomize(model_provider.get_model("mobilenet_w1", pretrained=False), 3).eval()


@pytest.mark.parametrize("size, latent, form", [
    ((224, 224), 19, "pth"), ((128, 128), 13, "zip"), ((96, 160), -1, "pth"), ((64, 64), 0, "zip"),
    ((128, 96), 27, "pth"), ((33, 65), 24, "zip")])
def test_equal_outputs_to_pytorchcv(pytorchcv_net, tmp_path, size, latent, form):
    """Scores, and the latents at the latent layer, equal those of the package that published the weights."""
    path = tmp_path / f"weights.{form}"
    if form == "zip":
        save_zip(path, pytorchcv_net.state_dict(), inside="weights.pth")
    else:
        torch.save(pytorchcv_net.state_dict(), path)
    net = MobileNetV1(1000, latent, weights=path).eval()
    net.output.weight.data.copy_(pytorchcv_net.output.weight)
    features, h = pytorchcv_net.features, rand(2, 3, *size, seed=latent + 1)
    x, steps = h, [features.init_block]
    for stage in (features.stage1, features.stage2, features.stage3, features.stage4, features.stage5):
        for unit in stage.children():
            steps += [unit.dw_conv, unit.pw_conv]
    with torch.no_grad():
        scores, latents = net(x, return_lat_acts=True)
        for i, step in enumerate([*steps, lambda h: F.adaptive_avg_pool2d(h, 1).flatten(1)]):
            if i == latent + 1:
                expected_latents = h
            h = step(h)
        if latent == 27:
            expected_latents = h
        expected = pytorchcv_net.output(h) - pytorchcv_net.output.bias
        if size == (224, 224):      # the one size that the package's own pooling takes: its forward as it stands
            torch.testing.assert_close(pytorchcv_net(x) - pytorchcv_net.output.bias, expected)
    for mine, theirs in ((scores, expected), (latents, expected_latents)):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    assert expected.std() > 1e-3 * expected.abs().max()


def test_real_weights_load_and_tell_photographs_apart(standin_weights):
    """With ImageNet weights, class means of pool6 features recognize photographs that random weights cannot."""
    photos = standin_weights.parent / "photos_32x32.zip"
    image = pytest.importorskip("PIL.Image")
    if not photos.is_file():
        pytest.skip(f"needs photographs, and {photos} is not there")
    net = MobileNetV1(10, "pool6", weights=standin_weights).eval()
    state = torch.load(standin_weights, weights_only=True)
    brn = net.lat_features[19][1]       # block 10, conv5_4, is unit 5 of stage 4
    assert torch.equal(net.lat_features[19][0].weight, state["features.stage4.unit5.dw_conv.conv.weight"].float())
    assert torch.equal(brn.running_mean, state["features.stage4.unit5.dw_conv.bn.running_mean"])
    classes, shots = (1, 11, 21, 31, 41), 16
    with zipfile.ZipFile(photos) as z:
        pictures = [image.open(io.BytesIO(z.read(f"s1/o{o}/{k:03d}.png"))).resize((96, 96))
                    for o in classes for k in range(2 * shots)]
    x = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def accuracy(net):
        with torch.no_grad():
            z = F.normalize(net.lat_features(x)).view(len(classes), 2, shots, -1)  # class, half, photograph, feature
        guess = (z[:, 1] @ F.normalize(z[:, 0].mean(1)).T).argmax(-1)
        return (guess == torch.arange(len(classes))[:, None]).float().mean().item()
    torch.manual_seed(0)
    assert accuracy(net) > max(0.6, accuracy(MobileNetV1(10, "pool6").eval()) + 0.15)


def damaged(path, fault):
    """Writes a weights file with one fault."""
    state = published_state()
    key = "features.stage4.unit5.dw_conv.bn.running_var"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    match fault:
        case "truncated":
            path.write_bytes(data[:len(data) // 2])
        case "short":
            path.write_bytes(data[:50])
        case "empty":
            path.write_bytes(b"")
        case "random bytes":
            path.write_bytes(random.Random(0).randbytes(5000))
        case "text":
            path.write_text("<html>404 Not Found</html>")
        case "folder":
            path.mkdir()
        case "zip without weights":
            save_zip(path, state, inside="readme.txt")
        case "zip with a damaged middle":
            save_zip(path, state)
            path.write_bytes(path.read_bytes()[:100] + b"\xff" * 20 + path.read_bytes()[120:])
        case "zip with a damaged start":    # of the compressed data, behind 30 bytes of header and the name
            save_zip(path, state, inside=NAME)
            path.write_bytes(path.read_bytes()[:30 + len(NAME)] + b"\xff" * 20 + path.read_bytes()[50 + len(NAME):])
        case "no dictionary":
            torch.save([1, 2], path)
        case "missing key":
            torch.save({k: v for k, v in state.items() if k != key}, path)
        case "a number for a tensor":
            torch.save(state | {key: 1.0}, path)
        case "other width":
            torch.save(published_state(0.25), path)
        case "nan":
            state[key][3] = math.nan
            torch.save(state, path)
        case "infinity":
            state["features.init_block.conv.weight"][0, 0, 0, 0] = math.inf
            torch.save(state, path)
        case "missing":
            pass


@pytest.mark.parametrize("fault", ["missing", "truncated", "short", "empty", "random bytes", "text", "folder",
                                   "zip without weights", "zip with a damaged middle", "zip with a damaged start",
                                   "no dictionary"])
def test_unreadable_weights_are_an_error_that_names_the_file(tmp_path, fault):
    path = tmp_path / "mine.pth"
    damaged(path, fault)
    with pytest.raises(WeightsError, match="mine.pth"):
        MobileNetV1(5, weights=str(path), width=0.125)


@pytest.mark.parametrize("fault, says", [
    ("missing key", "unit5.dw_conv.bn.running_var is missing"),
    ("a number for a tensor", "another network.*running_var"),
    ("other width", r"init_block.conv.weight has shape \(8, 3, 3, 3\) instead of \(4, 3, 3, 3\)"),
    ("nan", "damaged.*running_var.*not finite"), ("infinity", "damaged.*conv.weight.*not finite")])
def test_weights_that_do_not_fit_are_an_error_that_names_file_and_key(tmp_path, fault, says):
    path = tmp_path / "mine.pth"
    damaged(path, fault)
    with pytest.raises(WeightsError, match=f"mine.pth.*{says}"):
        MobileNetV1(5, weights=str(path), width=0.125)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["pickle", "torch", "old torch", "zip"])
def test_code_inside_a_weights_file_does_not_run(tmp_path, form):
    marker, path = tmp_path / "ran", tmp_path / "mine.pth"
    content = published_state() | {"evil": Evil(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif form == "zip":
        save_zip(path, content)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(WeightsError, match="mine.pth"):
        MobileNetV1(5, weights=path, width=0.125)
    assert not marker.exists()
    if form == "pickle":            # the trap works: an unpickler that trusts the file springs it
        pickle.loads(path.read_bytes())
        assert marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_damage_to_a_weights_file_gives_weights_or_a_weights_error(tmp_path):
    """Bytes changed at random, in each of the three file formats: nothing else is ever raised."""
    state, path, forms = {f"layer{i}.weight": rand(4, 3, seed=i) for i in range(5)}, tmp_path / "mine.pth", []
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=new)
        forms.append(buffer.getvalue())
    save_zip(path, state)
    forms.append(path.read_bytes())
    rng, refused, end = random.Random(0), 0, time.monotonic() + 4
    for _ in range(1500):
        data = bytearray(rng.choice(forms))
        for _ in range(rng.choice((1, 2, 5, 40))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[:rng.randrange(len(data))] if rng.random() < 0.3 else data)
        try:
            mobilenet.read_weights(path)
        except WeightsError as error:
            refused += "mine.pth" in str(error)
        if time.monotonic() > end:
            break
    assert refused > 20


class Cache:
    """A hub cache in a temporary folder, whose network hands out `content`, or raises it."""

    def __init__(self, folder, monkeypatch):
        self.content, self.downloads, self.folder = b"", [], folder / "checkpoints"
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))
        monkeypatch.setattr(torch.hub, "download_url_to_file", self.download)

    def download(self, url, dst, hash_prefix=None, progress=True):
        assert url.endswith("/v0.0.155/mobilenet_w1-0895-7e1d739f.pth.zip") and progress
        self.downloads.append(url)
        with open(dst, "wb") as file:
            file.write(self.content if isinstance(self.content, bytes) else b"half")
        if not isinstance(self.content, bytes):
            raise self.content

    @property
    def files(self):
        return sorted(p.name for p in self.folder.iterdir()) if self.folder.exists() else []


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return Cache(tmp_path / "hub", monkeypatch)


def test_published_weights_are_fetched_once_and_checked(cache, tmp_path, monkeypatch):
    state = published_state()
    pth = save_zip(tmp_path / "good.zip", state)
    cache.content = (tmp_path / "good.zip").read_bytes()
    monkeypatch.setattr(mobilenet, "IMAGENET_SHA1", hashlib.sha1(pth).hexdigest()[:8])
    for _ in range(2):
        net = MobileNetV1(5, 3, weights="imagenet", width=0.125)
        assert torch.equal(net.lat_features[0][0].weight, state["features.init_block.conv.weight"])
    assert len(cache.downloads) == 1 and cache.files == [NAME] and (cache.folder / NAME).read_bytes() == pth


def test_a_download_with_a_wrong_sha1_is_refused_and_removed(cache, tmp_path):
    save_zip(tmp_path / "bad.zip", published_state())
    cache.content = (tmp_path / "bad.zip").read_bytes()
    with pytest.raises(WeightsError, match=f"{NAME}.*SHA-1"):
        MobileNetV1(5, weights="imagenet", width=0.125)
    assert len(cache.downloads) == 1 and cache.files == []


@pytest.mark.parametrize("content", [b"no zip", urllib.error.URLError("no network"), TimeoutError("slow"),
                                     http.client.IncompleteRead(b"half")])
def test_a_failed_download_says_what_to_do_and_leaves_nothing(cache, content):
    cache.content = content
    with pytest.raises(WeightsError, match="--weights FILE"):
        MobileNetV1(5, weights="imagenet", width=0.125)
    assert cache.files == []


def test_a_zip_without_or_with_damaged_weights_is_refused_and_removed(cache, tmp_path):
    for fault in ("zip without weights", "zip with a damaged middle", "zip with a damaged start"):
        damaged(tmp_path / "bad.zip", fault)
        cache.content = (tmp_path / "bad.zip").read_bytes()
        with pytest.raises(WeightsError, match="mobilenet_w1-0895-7e1d739f"):
            MobileNetV1(5, weights="imagenet", width=0.125)
        assert cache.files == []


def test_an_interrupted_download_leaves_nothing(cache):
    cache.content = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        MobileNetV1(5, weights="imagenet", width=0.125)
    assert len(cache.downloads) == 1 and cache.files == []


def test_a_damaged_file_in_the_cache_is_named_and_not_used(cache):
    cache.folder.mkdir(parents=True)
    torch.save(published_state(), cache.folder / NAME)
    with pytest.raises(WeightsError, match=f"{NAME} is damaged.*SHA-1.*delete it"):
        MobileNetV1(5, weights="imagenet", width=0.125)
    assert cache.downloads == []


def test_loading_leaves_the_head_alone(tmp_path):
    torch.save(published_state(), tmp_path / "w.pth")
    torch.manual_seed(0)
    net = SplitNet(dict(enumerate_layers()), 128, 5, -1)
    head = net.output.weight.clone()
    load_imagenet_weights(net, tmp_path / "w.pth")
    assert torch.equal(net.output.weight, head)
    assert torch.equal(net.layers[0][0].weight, published_state()["features.init_block.conv.weight"])


def enumerate_layers(width=0.125):
    for prefix, (c_out, c_in, k, _), stride, groups in published_layers(width):
        yield prefix, nn.Sequential(nn.Conv2d(c_in * groups, c_out, k, stride, k // 2, groups=groups, bias=False),
                                    nn.BatchNorm2d(c_out), nn.ReLU())
