"""Latents in fewer bytes: how near they come back, counted bytes, the memory of them, parts of a memory."""
import pytest
import torch

from helpers import seeded
from methods.balanced_memory import BalancedMemory
from methods.compressed_memory import Bytes, CompressedMemory, Half, ProductQuantizer, part_of_memory
from methods.papers import PapersMemory
from methods.papers import minibatches as papers_minibatches
from utils import ReplayMemory, minibatches

LIKE = torch.zeros(1, 8, 3, 3).to(memory_format=torch.channels_last)


def maps(n, seed=0):
    """n latents as a ReLU leaves them."""
    return torch.randn(n, 8, 3, 3, generator=seeded(seed)).relu().to(memory_format=torch.channels_last)


CODECS = {"float16": Half, "uint8": lambda: Bytes(LIKE), "pq": lambda: ProductQuantizer(LIKE, 4)}


def test_bytes_by_hand():
    codec = Bytes(torch.zeros(1, 2))
    codec.fit(torch.tensor([[0.0, 255.0], [3.0, 100.0]]))         # low 0, step 1
    x = torch.tensor([[0.4, 0.6], [254.5, 255.4], [256.0, -3.0]])
    assert codec.encode(x).tolist() == [[0, 1], [254, 255], [255, 0]]       # 254.5 to the even one
    assert codec.decode(codec.encode(x)).tolist() == [[0, 1], [254, 255], [255, 0]]
    assert (codec.clipped.item(), codec.coded.item()) == (4, 12)
    codec.fit(torch.tensor([[-1.0, 50.0]]))
    assert codec.low.item() == -1 and codec.step.item() == pytest.approx(51 / 255)


def test_bytes_are_wrong_by_half_a_step_at_most():
    codec, x = Bytes(LIKE), maps(300)
    codec.fit(x)
    assert codec.low.item() == 0 and codec.step.item() == pytest.approx(x.max().item() / 255)
    error = (codec.decode(codec.encode(x)) - x).abs().max().item()
    assert 0.9 * codec.step.item() / 2 < error <= codec.step.item() / 2 + 1e-6 and codec.clipped.item() == 0


def test_a_layer_without_values_is_stored_as_zeros():
    codec = Bytes(LIKE)
    codec.fit(torch.zeros(3, 8, 3, 3))
    assert codec.decode(codec.encode(torch.zeros(2, 8, 3, 3))).abs().max() == 0


def test_images_keep_every_pixel():
    """The 256 values that a pixel can have, normalized per channel, come back to rounding."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((.485, .456, .406), (.229, .224, .225)))
    pixels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    x = (pixels / 255 - mean) / std
    codec = Bytes(torch.zeros(1, 3, 16, 16), -mean / std, 1 / (255 * std))
    codec.fit(torch.zeros(1, 3, 16, 16))
    assert torch.equal(codec.encode(x).long(), pixels)
    assert (codec.decode(codec.encode(x)) - x).abs().max() < 1e-6


def test_half_is_exact_to_eleven_bits():
    x = maps(50)
    assert ((Half().decode(Half().encode(x)) - x).abs() <= x / 2 ** 11).all()


def test_product_quantization_of_points_that_are_centres_is_exact():
    """Two groups of two channels; each takes no more than 256 different values, so each value is a centre."""
    values = torch.arange(200.0).view(100, 2)
    x = torch.cat((values[torch.randperm(100, generator=seeded(1))], values + 1000), 1)
    codec = ProductQuantizer(x[:1], 2)
    codec.fit(x.repeat(3, 1), seeded(0))
    assert torch.equal(codec.decode(codec.encode(x)), x)


def test_product_quantization_takes_the_nearest_centre_and_centres_are_means():
    x = torch.randn(700, 6, 2, 2, generator=seeded(2)).to(memory_format=torch.channels_last)
    codec = ProductQuantizer(x[:1], 3)
    codec.fit(x, seeded(0))
    assert codec.centres.shape == (3, 256, 2)
    positions = x.permute(0, 2, 3, 1).reshape(-1, 3, 2)
    distances = (positions[:, :, None] - codec.centres).square().sum(3)           # slowly, one by one
    codes = codec.encode(x)
    assert codes.shape == (700, 3, 2, 2)
    assert torch.equal(codes.permute(0, 2, 3, 1).reshape(-1, 3).long(), distances.argmin(2))
    decoded = codec.decode(codes).permute(0, 2, 3, 1).reshape(-1, 3, 2)
    assert torch.allclose((decoded - positions).square().sum(2), distances.amin(2), atol=1e-5)
    assert codec.decode(codes).is_contiguous(memory_format=torch.channels_last)
    before = (decoded - positions).square().sum()
    start = torch.randperm(len(positions), generator=seeded(3))[:256]       # k-means is better than any 256
    assert before < (positions[:, 0, None] - positions[start, 0]).square().sum(2).amin(1).sum() * 3


def test_more_codes_are_nearer():
    x, errors = maps(400, 4), []
    for pq_codes in (1, 2, 4, 8):
        codec = ProductQuantizer(LIKE, pq_codes)
        codec.fit(x, seeded(0))
        errors.append((codec.decode(codec.encode(x)) - x).norm().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < .02 * x.norm()


def test_groups_must_be_equal():
    with pytest.raises(ValueError, match="8 channels.*pq_codes = 3.*1, 2, 4, 8"):
        ProductQuantizer(LIKE, 3)


@pytest.mark.parametrize("name, each, fixed", [
    ("float16", 144, 0), ("uint8", 72, 24), ("pq", 36, 4 * 256 * 2 * 4)])
def test_bytes_of_a_memory(name, each, fixed):
    """72 values a latent, 9 positions of 4 codes; with each pattern two int64; the codec's own beside."""
    memory = CompressedMemory(ReplayMemory, 20, LIKE, CODECS[name]())
    memory.update(maps(50), torch.arange(50) % 5, 0, seeded(0))
    state = memory.state_dict()
    sizes = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    assert sizes(state[key] for key in ("x", "y", "batch")) == 20 * (each + 16)
    assert sizes(state["codec"].values()) == fixed


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("memory_class, more", [
    (ReplayMemory, {}), (BalancedMemory, {}), (PapersMemory, {"mb_size": 16})])
def test_the_memory_keeps_what_its_class_keeps_as_codes(name, memory_class, more):
    """As an uncompressed memory with the same draws (those of the codec aside), each pattern decoded from its
    code; and a state brings all of it back."""
    plain, codec = memory_class(20, LIKE, **more), CODECS[name]()
    memory = CompressedMemory(memory_class, 20, LIKE, codec, **more)
    codec.fit(maps(30, 0), seeded(0))
    codec.fit = lambda latents, rng=None: None
    for i in range(4):
        x, y = maps(30, i), torch.randint(0, 5, (30,), generator=seeded(i))
        plain.update(x, y, i, seeded(i))
        memory.update(x, y, i, seeded(i))
    assert torch.equal(memory.y, plain.y) and torch.equal(memory.batch, plain.batch)
    assert len(memory) == len(memory.x) == 20
    index = torch.tensor([3, 0, 3, 19])
    assert torch.equal(memory.x[index], codec.decode(codec.encode(plain.x[index])))
    assert list(memory.state_dict()) == ["x", "y", "batch", "codec"]
    other = CompressedMemory(memory_class, 20, LIKE, CODECS[name](), **more)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.x[index], memory.x[index]) and torch.equal(other.y, memory.y)
    assert other.x[:5].is_contiguous(memory_format=torch.channels_last)


def test_the_first_batch_fixes_the_codes():
    memory = CompressedMemory(ReplayMemory, 20, LIKE, Bytes(LIKE))
    memory.update(maps(30), torch.zeros(30, dtype=torch.int64), 0, seeded(0))
    step = memory.codec.step.item()
    assert step == pytest.approx(maps(30).max().item() / 255)
    memory.update(10 * maps(30), torch.zeros(30, dtype=torch.int64), 1, seeded(0))
    assert memory.codec.step.item() == step and memory.codec.clipped > 0
    nothing = CompressedMemory(ReplayMemory, 0, LIKE, ProductQuantizer(LIKE, 4))
    nothing.update(maps(30), torch.zeros(30, dtype=torch.int64), 0, seeded(0))
    assert len(nothing) == 0


# ---- parts of a memory ----

@pytest.mark.parametrize("rule", [minibatches, papers_minibatches])
def test_part_of_a_memory(rule):
    """The steps are those of the smaller memory; an epoch replays each pattern of its part as often as the
    rule does its own; epochs have different parts; nothing is asked for that is not there."""
    plan = part_of_memory(500, rule)(200, 16000, 128, seeded(0), 4)
    of_500 = rule(200, 500, 128, seeded(0), 4)
    assert [(len(new), len(old)) for new, old in plan] == [(len(new), len(old)) for new, old in of_500]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(plan, of_500))       # the new images as they were
    steps = len(plan) // 4
    epochs, theirs = ([torch.cat([old for _, old in part[k * steps:(k + 1) * steps]]) for k in range(4)]
                      for part in (plan, of_500))
    assert all(old.min() >= 0 and old.max() < 16000 for old in epochs)
    assert [len(old.unique()) for old in epochs] == [len(old.unique()) for old in theirs]
    assert len(torch.cat(epochs).unique()) > 3.5 * len(epochs[0].unique())


def test_a_memory_that_is_no_larger_is_replayed_whole():
    for m in (0, 300, 500):
        ours, theirs = (rule(200, m, 128, seeded(0), 2) for rule in (part_of_memory(500), minibatches))
        assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(ours, theirs))
