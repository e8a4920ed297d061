"""What a Learner is given by hand, and would learn nonsense from, is answered before anything is learned."""
import numpy as np
import pytest
import torch

from ar1star_lat_replay import FIRST, LATER, Learner
from harness.variants import ClosedFormLearner
from helpers import random_images, same
from models.mobilenet import MobileNetV1
from utils import CWRHead, ReplayMemory, SynapticIntelligence, preprocess, trainable_conv_weights

IMAGES, LABELS = random_images(6, 32, 32), np.array([0, 1, 2, 3, 4, 0])
LARGER = random_images(6, 64, 64)       # in whose deepest maps there is something to normalize
WRONG = {"from 0 to 1": (IMAGES / np.float32(255), LABELS, r"uint8.*float32 \(6, 32, 32, 3\)"),
         "channels first": (IMAGES.transpose(0, 3, 1, 2), LABELS, r"height, width, 3\).*\(6, 3, 32, 32\)"),
         "one image": (IMAGES[0], LABELS[:1], r"\(32, 32, 3\)"),
         "no image": (IMAGES[:0], LABELS[:0], r"n > 0"),
         "too few labels": (IMAGES, LABELS[:3], r"6 images.*\(3,\)"),
         "one hot": (IMAGES, np.eye(6), r"labels.*float64 \(6, 6\)"),
         "floats": (IMAGES, LABELS / 1.0, r"whole numbers.*float64"),
         "negative": (IMAGES, LABELS - 1, r"from -1 to 3")}


def small_net(latent_layer="conv3_2/dw"):
    torch.manual_seed(0)
    return MobileNetV1(5, latent_layer, weights=None, width=0.1)


def make_learner(net=None, size=32):
    net = net or small_net()
    memory = ReplayMemory(6, like=net.example_latent(size))
    phases = FIRST._replace(epochs=1), LATER._replace(epochs=1)
    return Learner(net, CWRHead(net.output), memory, None, *phases, mb_size=4)


@pytest.mark.parametrize("images, labels, says", WRONG.values(), ids=WRONG)
def test_a_wrong_batch_is_refused_and_changes_nothing(images, labels, says):
    net = MobileNetV1(5, "pool6", weights=None, width=0.1)
    for learner in (make_learner(), ClosedFormLearner("slda", net)):
        before = {key: value.clone() for key, value in learner.net.state_dict().items()}
        with pytest.raises(ValueError, match=says):
            learner.learn(images, labels)
        assert same(before, learner.net.state_dict()) and learner.batches == 0
    with pytest.raises(ValueError, match="uint8"):
        make_learner().predict(images / 255)


@pytest.mark.parametrize("make", [make_learner, lambda: ClosedFormLearner("slda", small_net("pool6"))])
def test_labels_beyond_the_head_give_it_rows_and_a_state_brings_them_along(make):
    learner = make()
    learner.learn(IMAGES, LABELS)
    learner.learn(IMAGES[:3], LABELS[:3] + 6)       # 6 to 8: nothing has label 5
    assert learner.net.output.weight.shape[0] == learner.net.output.out_features == 9
    assert (learner.head.past_j > 0).tolist() == [True] * 5 + [False] + [True] * 3
    assert not learner.head.linear.weight[5].any()
    other = make()
    other.load_state_dict(learner.state_dict())
    assert same(other.state_dict(), learner.state_dict())
    for one in (learner, other):
        one.learn(IMAGES, LABELS + 5)
    assert same(other.state_dict(), learner.state_dict()) and len(learner.head.past_j) == 10
    assert torch.equal(other.predict(IMAGES), learner.predict(IMAGES))


def test_a_head_that_cannot_grow_refuses_labels_beyond_its_rows():
    class Fixed(CWRHead):
        resize = property()

    net = small_net()
    learner = Learner(net, Fixed(net.output), ReplayMemory(6, like=net.example_latent(32)), mb_size=4)
    with pytest.raises(ValueError, match="from 0 to 4.*from 1 to 5"):
        learner.learn(IMAGES, LABELS + 1)


NUMBERS = ["uint8", "int32", "uint16", "uint32", "uint64"]
TAKEN = [(IMAGES, LABELS.tolist()), (list(IMAGES), LABELS), (tuple(torch.as_tensor(IMAGES)), LABELS),
         (torch.as_tensor(IMAGES), torch.as_tensor(LABELS)), (IMAGES, LABELS.astype(">i8")),
         *((IMAGES, LABELS.astype(name)) for name in NUMBERS),
         *((IMAGES, torch.as_tensor(LABELS).to(getattr(torch, name))) for name in NUMBERS)]


def test_arrays_tensors_and_lists_of_all_whole_numbers_give_the_same():
    expected, closed = make_learner(), ClosedFormLearner("slda", small_net("pool6"))
    expected.learn(IMAGES, LABELS)
    closed.learn(IMAGES, LABELS)
    for images, labels in TAKEN:
        learner, other = make_learner(), ClosedFormLearner("slda", small_net("pool6"))
        learner.learn(images, labels)
        other.learn(images, labels)
        assert same(expected.state_dict(), learner.state_dict())
        assert same(closed.head.state_dict(), other.head.state_dict())
        assert torch.equal(expected.predict(IMAGES), learner.predict(images))


@pytest.fixture
def default_type():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def learned(dtype, default_type=None, default=None):
    """What a Learner and a ClosedFormLearner have learned with networks of a type, built in float32."""
    learners = (make_learner(small_net().to(dtype), 64),
                ClosedFormLearner("ncm", small_net("pool6").to(dtype)))
    if default:
        default_type(default)
    for learner in learners:
        learner.learn(LARGER, LABELS)
        assert learner.net.output.weight.dtype == learner.memory.x.dtype == dtype
        assert len(learner.predict(LARGER)) == len(LARGER)
    return [value.to(torch.float32) for learner in learners for value in learner.net.state_dict().values()]


@pytest.mark.parametrize("dtype, default", [
    (torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float64, torch.float64)])
def test_the_networks_type_decides_whatever_torchs_default_is(dtype, default, default_type):
    """All learn the same up to the rounding of float32."""
    expected, pixels = learned(torch.float32), preprocess(LARGER)
    found = learned(dtype, default_type, default)
    assert torch.equal(preprocess(LARGER), pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_synaptic_intelligence_over_frozen_weights_is_named():
    """Listed before the network is frozen, they are all the convolutions."""
    net = MobileNetV1(5, "conv3_2/dw", weights=None, width=0.1)
    head, memory = CWRHead(net.output), ReplayMemory(6, like=net.example_latent(32))
    learner = Learner(net, head, memory, SynapticIntelligence(trainable_conv_weights(net), 1.0), mb_size=4)
    with pytest.raises(ValueError, match="leave out what net.freeze_below froze"):
        learner.learn(IMAGES, LABELS)
    net.freeze_below("latent")
    si = SynapticIntelligence(trainable_conv_weights(net), 1.0)
    Learner(net, head, memory, si, mb_size=4).learn(IMAGES, LABELS)
