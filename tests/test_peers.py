"""Programs beside ours: experience replay against a plain network's step, and the command that compares."""
import sys

import numpy as np
import pytest
import torch
from torch import nn

from harness.config import load_config
from helpers import REPO
from models.mobilenet import MobileNetV1
from utils import preprocess

sys.path.insert(0, str(REPO / "benchmarks"))
import peers
from experience_replay import ExperienceReplay, stored_bytes

RNG = np.random.default_rng(0)
SETTINGS = ["--set", "width=0.1", "--set", "weights=none", "--batches", "2", "--device", "cpu"]


def images(n):
    return RNG.integers(0, 256, (n, 32, 32, 3), np.uint8)


@pytest.fixture
def replay():
    settings = {"dataset": "cifar100", "rm_sz": 30, "inc_lr": 0.1, "width": 0.1}
    config = load_config("DEFAULT", overrides=settings)
    torch.manual_seed(0)
    net = MobileNetV1(5, "pool6", width=0.1)
    return ExperienceReplay("er", config, net, images(8), np.arange(8) % 5, torch.device("cpu"))


def with_batch_norm(net):
    """The network with PyTorch's BatchNorm2d in place of each Batch Renormalization."""
    layers = []
    for block in net.layers:
        if not hasattr(block, "__getitem__"):
            layers.append(block)
            continue
        conv, brn, relu = block
        norm = nn.BatchNorm2d(brn.num_features, eps=brn.eps)
        plain = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
                          groups=conv.groups, bias=False)
        plain.load_state_dict(conv.state_dict())
        norm.load_state_dict({"weight": brn.weight, "bias": brn.bias, "running_mean": brn.running_mean,
                              "running_var": brn.running_std.square() - brn.eps,
                              "num_batches_tracked": torch.tensor(0)})
        layers.append(nn.Sequential(plain, norm, nn.ReLU()))
    head = nn.Linear(net.output.in_features, net.output.out_features, bias=net.output.bias is not None)
    head.load_state_dict(net.output.state_dict())
    return nn.Sequential(*layers, head)


def test_a_step_is_that_of_a_network_with_batch_normalization(replay, monkeypatch):
    monkeypatch.setattr(replay, "_moved", torch.Tensor.double)
    replay.net.double()
    plain = with_batch_norm(replay.net).double().train()
    x, y = images(32), np.arange(32) % 5
    loss = nn.functional.cross_entropy(plain(preprocess(x, "cpu").double()), torch.as_tensor(y))
    gradients = torch.autograd.grad(loss, list(plain.parameters()))
    expected = [p - 0.1 * g for p, g in zip(plain.parameters(), gradients, strict=True)]
    replay.learn(x, y)
    found = dict(replay.net.named_parameters())
    assert len(found) == len(expected)
    for value, goal in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(value, goal, rtol=1e-6, atol=1e-8)


def test_its_memory_is_a_reservoir_of_as_many_bytes(replay):
    assert replay.most == 30 * replay.net.example_latent(32).nbytes // 3072
    replay.most = 3
    kept = np.zeros(60)
    for _ in range(800):
        replay.seen = 0
        for label in range(60):
            replay._remember(images(1)[0] * 0, torch.tensor(label))
        kept += np.bincount(replay.y, minlength=60)
    assert kept.sum() == 2400 and abs(kept - 40).max() < 5 * 6.2       # 800 draws at 1/20: deviation 6.2


def test_images_are_shifted_and_mirrored(replay):
    x = preprocess(images(20), "cpu")
    moved = replay._moved(x)
    assert moved.shape == x.shape
    for image, seen in zip(x, moved, strict=True):
        wide = nn.functional.pad(image, [4] * 4)
        windows = [wide[:, t:t + 32, left:left + 32] for t in range(9) for left in range(9)]
        assert any(torch.equal(seen, w) or torch.equal(seen, w.flip(2)) for w in windows)


def test_bytes_of_an_image():
    assert stored_bytes(load_config("cifar100")) == 3072
    assert stored_bytes(load_config("folder")) == 3 * 256 * 256


def test_frozen_layers_encode_an_image_once():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).requires_grad_(False)
    passed = []
    layers.register_forward_hook(lambda *_: None)
    forward = layers.forward
    layers.forward = lambda x: passed.append(len(x)) or forward(x)
    x = torch.randn(6, 3, 16, 16)
    expected = forward(x)
    peers.remember_latents(layers)
    assert torch.equal(layers(x[:4]), expected[:4]) and torch.equal(layers(x), expected)
    assert torch.equal(layers(x.flip(0)), expected.flip(0)) and passed == [4, 2]
    layers.requires_grad_(True)
    assert layers(x).requires_grad and passed == [4, 2, 6]


def test_the_published_script_consolidates_a_class_once_for_each_pattern():
    """As it writes its set down."""
    y = np.array([3, 5, 3, 3, 0])
    replayed_y = torch.tensor([5, 1, 1, 5, 5, 2])
    found = peers.classes_to_consolidate(y, replayed_y)
    assert sorted(found) == sorted(int(label) for label in set(y).union(set(replayed_y)))
    assert sorted(found) == [0, 1, 1, 2, 3, 5, 5, 5, 5]
    assert peers.classes_to_consolidate(y, replayed_y[:0]) == [0, 3, 5]


def test_the_command_prints_a_row_for_each_program(params, capsys):
    command = ["tiny", "ours", "er", "--config", str(params), *SETTINGS, "--set", "inc_lr=0.01"]
    assert peers.main(command) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| ours", "| er"]
    for row in rows:
        end, mean, kept, seconds = map(float, row.strip("| ").split(" | ")[1:])
        assert 0 <= end <= 100 and 0 <= mean <= 100 and kept > 0 and seconds >= 0


@pytest.mark.parametrize("change, says", [
    (["--every", "0"], "at least 1"), (["nothing_here"], "no program that is known"),
    (["--set", "rmsz=3"], "rm_sz")])
def test_bad_input_is_one_sentence(params, change, says, capsys):
    assert peers.main(["tiny", "ours", *change, "--config", str(params)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
