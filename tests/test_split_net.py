"""The split network: what goes through it and where, which layers it freezes, and what they are called."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import rand, random_images, same, small_net
from models.batch_renorm import brn_layers, fold_brn
from models.split_net import LayerError, SplitNet
from utils import memory_format, preprocess


@pytest.mark.parametrize("latent", range(-1, 28))
def test_joined_forward_equals_the_unsplit_network(latent):
    """New images and replayed latents, joined at any layer, train as all the images do in one piece."""
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


def test_bf16_rounds_what_layers_above_the_latent_one_compute_and_nothing_else():
    """By hand: bfloat16 has 8 digits, so 1 + 2^-9 becomes 1, and 1 + 2^-7 stays."""
    little, enough = 1 + 2**-9, 1 + 2**-7
    layers = {name: nn.Conv2d(1, 1, 1, bias=False) for name in ("below", "above")}
    net = SplitNet(layers | {"flat": nn.Flatten()}, 1, 1, "below")
    for parameter in net.parameters():
        nn.init.constant_(parameter, little)
    x = torch.full((1, 1, 1, 1), enough)
    net.bf16 = True
    scores, latents = net(x, return_lat_acts=True)
    assert latents.item() == enough * little                    # in float32
    assert scores.item() == enough * 1 * little                 # the latent, rounded; the layer's 1; the head
    scores.backward()
    assert scores.dtype == net.output.weight.dtype == net.output.weight.grad.dtype == torch.float32
    assert net.output.weight.grad.item() == enough              # float32 features of a bfloat16 layer
    assert layers["above"].weight.grad.dtype == torch.float32
    net.bf16 = False
    assert net(x).item() == pytest.approx(enough * little**3, rel=1e-6) != enough * little


def test_forward_returns_what_it_says():
    net = small_net("conv5_1/sep").eval()
    x, latents = rand(3, 3, 64, 64), rand(2, 64, 4, 4, seed=2)
    plain, joined = net(x), net(x, latents)
    assert plain.shape == (3, 5) and joined.shape == (5, 5)
    torch.testing.assert_close(joined[:3], plain)                               # the images come first,
    torch.testing.assert_close(joined[3:], net.classify(latents))               # then the replayed latents,
    scores, own = net(x, latent_input=latents, return_lat_acts=True)      # and only the images' return
    assert torch.equal(own, net.lat_features(x)) and torch.equal(scores, joined)


@pytest.mark.parametrize("layer, number", [
    ("images", -1), ("conv1", 0), ("conv4_1/sep", 10), ("conv5_4/dw", 19), ("pool6", 27), (-1, -1), (27, 27)])
def test_layers_go_by_number_or_name(layer, number):
    net = small_net(layer)
    assert net.latent_layer_num == number and len(net.lat_features) == number + 1
    assert net.layer_number(layer) == net.layer_number("latent") == number


@pytest.mark.parametrize("layer, hint", [
    ("conv5_4/dv", "'conv5_4/dw'"), ("pool", "'pool6'"), ("image", "'images'"), (28, "-1"), (-2, "-1"),
    (True, "-1"), (19.0, "-1"), (None, "-1"), ("", "-1")])
def test_an_unknown_layer_is_an_error_that_names_the_nearest(layer, hint):
    with pytest.raises(LayerError, match=hint):
        small_net(layer)
    with pytest.raises(LayerError, match=hint):
        small_net().freeze_below(layer)


@pytest.mark.parametrize("latent, frozen", [(19, -1), (19, 0), (19, "conv5_4/dw"), (19, 27), (-1, 13),
                                            (27, "conv6/sep")])
def test_freeze_below_freezes_exactly_these_layers_for_good(latent, frozen):
    """No gradients, evaluation mode; weights and statistics are bit-equal after training, all others move."""
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
    frozen_copy, whole_copy = net.copy_up_to(frozen), net.copy_up_to(27)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    for step in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(rand(8, 3, 64, 64, seed=step)), torch.arange(8) % 5).backward()
        optimizer.step()
    for i, layer in enumerate(net.layers):
        for key, value in layer.state_dict().items():
            assert torch.equal(value, before[i][key]) == (i <= number), (i, key)
    net.check_unchanged(frozen_copy)
    if number < 26:         # the last layer, pooling, has no state
        with pytest.raises(AssertionError, match="the frozen .* has changed.*bug"):
            net.check_unchanged(whole_copy)
    net.eval()
    net.freeze_below(-1)
    assert all(p.requires_grad for p in net.parameters()) and not any(m.training for m in net.modules())


def test_a_copy_up_to_a_layer_holds_these_layers_and_no_others():
    """Weights and statistics; -1 is nothing."""
    net = small_net()
    copied = net.copy_up_to("conv2_1/sep")
    expected = [value.clone() for layer in net.layers[:3] for value in layer.state_dict().values()]
    with torch.no_grad():
        net.layers[0][0].weight.zero_()
    assert len(copied) == 3 * 7 and same(list(copied.values()), expected)
    assert len(net.copy_up_to("latent")) == 20 * 7 and net.copy_up_to(-1) == {}


def test_a_split_net_of_other_layers_works_alone():
    layers = {"a": nn.Linear(3, 4), "b.1": nn.Tanh(), "c": nn.Linear(4, 2)}
    net, x = SplitNet(layers, 2, 6, "b.1"), rand(5, 3)
    expected = layers["c"](torch.tanh(layers["a"](x))) @ net.output.weight.T
    torch.testing.assert_close(net(x[:1], latent_input=net.lat_features(x[1:])), expected)


def test_layers_whose_names_differ_by_a_dot_are_both_kept():
    layers = {"a.b": nn.Linear(3, 4), "a_b": nn.Linear(4, 5), "forward": nn.Tanh()}
    net, x = SplitNet(layers, 5, 2, "forward"), rand(2, 3)
    assert net.layers == list(layers.values()) and net.layer_names == list(layers)
    torch.testing.assert_close(net.lat_features(x), torch.tanh(layers["a_b"](layers["a.b"](x))))


def test_latents_carry_a_lower_layers_outputs_averaged_over_the_map():
    net, x = small_net("pool6").eval(), rand(3, 3, 32, 64)
    latents, scores = net.lat_features(x), net(x)
    layers = net.layers
    number = net.layer_number("conv5_6/sep")
    expected = torch.nn.Sequential(*layers[:number + 1])(x).mean((2, 3))
    net.carry("conv5_6/sep")
    assert net.layers == layers and net.example_latent(32).shape == (1, 128 + 128)
    torch.testing.assert_close(net.lat_features(x), torch.cat((latents, expected), 1))
    assert torch.equal(net(x), scores)
    net.freeze_below("latent")
    assert not any(p.requires_grad for layer in layers for p in layer.parameters())
    torch.testing.assert_close(fold_brn(net.lat_features)(x), net.lat_features(x), rtol=1e-4, atol=1e-5)
    for latent, layer in (("conv6/sep", "conv5_4/dw"), ("pool6", "images")):
        with pytest.raises(ValueError, match=f"{layer}.*below the latent"):
            small_net(latent).carry(layer)


def test_latents_carry_the_middle_half_of_a_lower_layers_map():
    """Of a map of 4 rows and 8 columns: rows 1 and 2, columns 2 to 5."""
    net, x = small_net("pool6").eval(), rand(2, 3, 64, 128)
    below = torch.nn.Sequential(*net.layers[:net.layer_number("conv5_5/sep") + 1])(x)
    latents = net.lat_features(x)
    net.carry("conv5_5/sep", centre=True)
    expected = torch.cat((latents, below[:, :, 1:3, 2:6].mean((2, 3))), 1)
    assert below.shape[2:] == (4, 8)
    torch.testing.assert_close(net.lat_features(x), expected)
    net.freeze_below("latent")
    torch.testing.assert_close(fold_brn(net.lat_features)(x), expected, rtol=1e-4, atol=1e-5)


# ---- the example of a latent ----

@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("layer", ["images", "conv1", "conv2_2/sep", "conv5_4/dw", "conv6/sep", "pool6"])
@pytest.mark.parametrize("size", [(32,), (64, 48)])
def test_example_latent_is_zeros_like_a_real_latent(layout, layer, size):
    net = small_net(layer).to(memory_format=layout)
    latent = net.example_latent(*size)
    with torch.no_grad():
        real = net.eval().lat_features(preprocess(random_images(1, size[0], size[-1])))
    assert (latent.shape, latent.dtype, latent.device) == (real.shape, real.dtype, real.device)
    assert memory_format(latent) == memory_format(real)
    assert not latent.any() and not latent.requires_grad and real.abs().max() > 0


@pytest.mark.parametrize("frozen", [-1, "conv3_1/sep", "conv5_4/dw"])
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_example_latent_leaves_statistics_and_modes_alone(frozen, mode):
    net = small_net(r_max=1.1, inc_step=0.01, momentum=0.5)
    net.freeze_below(frozen)
    net.train(mode != "eval")
    net.layers[20].train(mode == "train")
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    net.example_latent(32)
    assert same(net.state_dict(), state) and [m.training for m in net.modules()] == modes
    assert torch.is_grad_enabled()
