"""Synaptic Intelligence against numbers worked out by hand."""
import copy

import pytest
import torch
from torch import nn

from models.mobilenet import MobileNetV1
from utils import SynapticIntelligence, trainable_conv_weights


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
      cum = 2 * -.75 / (1 + .25) = -1.2 and 2 * -.05 / (.25 + .25) = -.2
      F = (.5, .2), capped and not; anchor (2, 2.5)
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
    si.penalty().backward()     # 3 / 2 (.5 * 1^2 + .2 * .5^2) = .825; 3 F (w - anchor) = (1.5, -.3)
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
    """Not the normalization, not the head, not what is frozen."""
    net = MobileNetV1(5, 19, width=0.125)
    net.freeze_below(19)
    weights = trainable_conv_weights(net)
    expected = [layer[0].weight for layer in net.layers[20:27]]
    assert len(weights) == 7 and all(a is b for a, b in zip(weights, expected, strict=True))
