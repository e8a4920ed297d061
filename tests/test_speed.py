"""The benchmark: what it counts, how it calls other programs of the method, what it says of unknown ones."""
import re
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from harness.config import load_config
from helpers import REPO
from models.mobilenet import MobileNetV1

sys.path.insert(0, str(REPO / "benchmarks"))
import limits
import peers
import speed

CPU = torch.device("cpu")
SMALL = {"weights": "none", "width": 0.05, "rm_sz": 60, "init_train_ep": 1, "inc_train_ep": 2, "mb_size": 32,
         "device": "cpu"}
TEST = speed.images(40, range(50), seed=1, size=32)


@pytest.fixture
def config():
    return load_config(overrides=SMALL)


# ---- our two programs ----

def test_ours_computes_what_the_literal_program_does(config):
    ours = speed.Ours(speed.replace(config, matmul_precision="highest"), *TEST, CPU)
    literal = speed.Literal(config, *TEST, CPU)
    literal.net.load_state_dict(ours.net.state_dict())
    for i, classes in enumerate(([0, 1], [2], [3])):
        x, y = speed.images(60, classes, i, size=32)
        for program in (ours, literal):
            program.set_up()
            program.learn(x, y)
            assert program.clock.take()["train"] > 0
    a, b = (program.net.output.weight for program in (ours, literal))
    assert (a - b).norm() < 1e-2 * b.norm()     # rounding grows fast where statistics do not fit the weights
    assert torch.equal(ours.learner.memory.y, literal.memory.y)
    assert 0 <= literal.test() <= 1


# ---- the machine's limit ----

def test_operations_and_bytes_by_hand():
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
    linear = nn.Linear(5, 7)
    x = torch.ones(3, 4, 8, 5)
    counted = limits.operations([nn.Sequential(conv, linear)], lambda: linear(conv(x)))
    assert counted == [2 * 3 * 6 * 8 * 5 * (2 * 3 * 3), 2 * 3 * 6 * 8 * 7 * 5]
    assert not conv._forward_hooks and not linear._forward_hooks
    assert limits.bytes_moved(lambda: x.view(-1).add(1).mul_(2)) == 4 * x.numel() * (2 + 2)


@pytest.fixture
def ours(config):
    """Our program after two batches."""
    program = speed.Ours(config, *TEST, CPU)
    for i in range(2):
        program.learn(*speed.images(60, [i], i, size=32))
    return program


def test_a_profile_names_what_takes_the_longest(ours, capsys):
    """The ten, in order; what all of them take is less than the time that passes."""
    limits.print_profile(ours, CPU, *speed.images(60, [1], 1, size=32))
    for part in capsys.readouterr().out.split("\n\n"):
        passed, number, busy = re.search(r"batch: (.*) ms; ([\d,]+) operators: (.*) ms", part).groups()
        rows = re.findall(r"^ *(\S+) ms +(\d+) times  (.*)$", part, re.M)
        times = [float(row[0]) for row in rows]
        assert len(rows) == 10 and times == sorted(times, reverse=True) and times[0] > 0
        assert sum(times) <= float(busy) + 0.1 and float(busy) <= float(passed)
        assert sum(int(row[1]) for row in rows) < int(number.replace(",", ""))
        assert "aten::mm" in [row[2] for row in rows]


def test_each_part_of_a_batch_is_counted_and_timed(ours, capsys, monkeypatch):
    """Encoding and test in the operations that torch counts; a step in the three products of each layer."""
    images, _ = speed.images(16, [1], 1, size=32)
    encoding, step, test = limits.parts_of_a_batch(ours, images)
    assert [part.precision for part in (encoding, step, test)] == ["highest", "medium", "medium"]
    for part in (encoding, step, test):
        with FlopCounterMode(display=False) as counter:
            part.work()
        if part is not step:    # torch counts the gradient of a grouped convolution as if it had one group
            assert part.operations == counter.get_total_flops()
        assert limits.bytes_moved(part.plain) > 1e4
    mini_batch = ours.learner.memory.x[:32]
    first, = limits.operations([ours.net.end_features[0]], lambda: ours.net.classify(mini_batch))
    assert step.operations == 3 * test.operations * 32 / 40 - first

    monkeypatch.setattr(limits, "product_rate", lambda device, precision: 1e9)
    monkeypatch.setattr(limits, "copy_rate", lambda device: 1e9)
    limits.print_limits(ours, CPU, images)
    printed = capsys.readouterr().out
    for name in ("encoding", "step", "test"):
        assert f"\n{name}, medium: " in printed
    assert printed.count("% of it\n") == 3 and printed.count("product, highest") == 1


# ---- other programs ----

FAKE_MODEL = """
import peer_log
from torch import cat, nn

class Block(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv, self.bn = conv, nn.BatchNorm2d(conv.out_channels)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()

class MyMobilenetV1(nn.Module):
    def __init__(self, pretrained=True, latent_layer_num=20):
        super().__init__()
        assert not pretrained, "that would be a download"
        blocks = [Block(conv) for conv in peer_log.convs()]
        self.lat_features = nn.Sequential(*blocks[:latent_layer_num + 1])
        self.end_features = nn.Sequential(*blocks[latent_layer_num + 1:], nn.AdaptiveAvgPool2d(1))
        self.output = nn.Linear(blocks[-1].bn.num_features, 50, bias=False)
        peer_log.model = self

    def forward(self, x, latent_input=None, return_lat_acts=False):
        latents = self.lat_features(x)
        peer_log.calls.append(("images", len(x), "latents", 0 if latent_input is None else len(latent_input)))
        joined = latents if latent_input is None else cat((latents, latent_input))
        scores = self.output(self.end_features(joined).flatten(1))
        return (scores, latents) if return_lat_acts else scores
"""
FAKE_UTILS = """
import numpy as np
import peer_log
from models import mobilenet        # theirs, and not ours

def told(name):
    def function(*args, **kwargs):
        print("something on the way")
        peer_log.calls.append((name, *(a for a in args[1:] if isinstance(a, (str, list))), *kwargs.values()))
    return function

for name in ("replace_bn_with_brn", "change_brn_pars", "freeze_up_to", "reset_weights", "consolidate_weights",
             "set_consolidate_weights"):
    globals()[name] = told(name)

def examples_per_class(labels):
    return {j: labels.count(j) for j in range(50)}

def preprocess_imgs(images):
    return (images / 255).transpose(0, 3, 1, 2)

def pad_data(data, mb_size):
    short = -len(data[0]) % mb_size
    return [np.concatenate((part[:short], part)) for part in data], -(-len(data[0]) // mb_size)

def shuffle_in_unison(data, in_place):
    order = np.random.permutation(len(data[0]))
    for part in data:
        part[:] = part[order]

def get_accuracy(model, criterion, mb_size, test_x, test_y, use_cuda, preproc):
    assert test_x.dtype == np.float32 and not use_cuda
    peer_log.past = dict(model.past_j)
    return 0.0, 0.25, [0.25] * 50
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder like the published program's, with a small network; what it was called with is in `calls`."""
    net = MobileNetV1(50, width=SMALL["width"])
    log = types.ModuleType("peer_log")
    log.calls, log.folder, log.net = [], tmp_path / "ar1-fake", net
    convs = [layer[0] for layer in net.layers[:-1]]
    log.convs = lambda: [nn.Conv2d(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding,
                                   groups=c.groups, bias=False) for c in convs]
    monkeypatch.setitem(sys.modules, "peer_log", log)
    (log.folder / "models").mkdir(parents=True)
    (log.folder / "models" / "mobilenet.py").write_text(FAKE_MODEL)
    (log.folder / "utils.py").write_text(FAKE_UTILS)
    return log


def peer_of(fake, config, where=None):
    return peers.Peer(str(where or fake.folder), config, fake.net, *TEST, CPU)


def test_the_published_program_is_run_as_its_script_runs_it(fake, config, capsys):
    """60 images in batch 0, padded to 64; then 20 and 60 replayed: (20 + 60) // 32 = 2 steps of 10 and 22.

    Of the memory it consolidates the class of each pattern.
    """
    before = {name: sys.modules[name] for name in ("utils", "models", "models.mobilenet")}
    path = list(sys.path)
    peer = peer_of(fake, config)
    assert {name: sys.modules[name] for name in before} == before and sys.path == path
    blocks = [*fake.model.lat_features, *fake.model.end_features][:-1]
    assert len(fake.model.lat_features) == 20
    for block, layer in zip(blocks, fake.net.layers):
        assert torch.equal(block.conv.weight, layer[0].weight)
        assert torch.equal(block.bn.weight, layer[1].weight)
        torch.testing.assert_close(block.bn.running_var + 1e-5, layer[1].running_std ** 2)

    for i, (n, classes) in enumerate(((60, [0, 1]), (20, [7]))):
        x, y = speed.images(n, classes, i, size=32)
        kept = y.copy()
        peer.learn(x, y)
        assert peer.test() == 0.25 and peer.clock.take()["train"] > 0
        assert np.array_equal(y, kept)          # other programs get the same labels
    frozen = ("freeze_up_to", "lat_features.19.bn.beta", False)
    consolidated = fake.calls[-2][1]
    assert len(consolidated) == 61 and set(consolidated) == {0, 1, 7} and consolidated.count(7) == 1
    assert fake.calls == [
        ("replace_bn_with_brn", 0.01, 4.1e-5, 1.25, 0.5),
        frozen, ("reset_weights", [0, 1]), *[("images", 32, "latents", 0)] * 2,
        ("consolidate_weights", [0, 1]), ("set_consolidate_weights",),
        frozen, ("change_brn_pars", 5e-5, 0, 1.25, 0.5), ("reset_weights", consolidated),
        *[("images", 10, "latents", 22)] * 4,
        ("consolidate_weights", consolidated), ("set_consolidate_weights",)]
    assert fake.past[0] + fake.past[1] == 60 and fake.past[7] == 0      # in the test: of earlier batches
    assert capsys.readouterr().out == ""


def test_classes_are_counted_in_batches_without_a_test_too(fake, config):
    peer = peer_of(fake, config)
    for i, (n, classes) in enumerate(((60, [0, 1]), (20, [7]), (20, [7]))):
        peer.learn(*speed.images(n, classes, i, size=32))
    peer.test()
    peer.test()
    assert fake.past[0] + fake.past[1] > 60 and fake.past[7] == 20


@pytest.mark.parametrize("units", [True, False])
def test_it_is_timed_beside_ours(units, fake, config, capsys, monkeypatch):
    """And of ours what the CPU has units for."""
    monkeypatch.setattr(speed, "cpu_multiplies_bfloat16", lambda: units)
    monkeypatch.setattr(speed, "print_limits", lambda *args: None)
    speed.compare(config, CPU, 1, 20, 40, [str(fake.folder)])
    printed = capsys.readouterr()
    row, = (line.split() for line in printed.out.splitlines() if line.startswith("ar1-fake"))
    assert len(row) == 7 and float(row[5]) > 0
    timed = {name for name in ("highest", "medium", "low", "bf16") if f"timing ours, {name}\n" in printed.err}
    assert timed == {"highest", "medium"} | ({"low", "bf16"} if units else set())
    assert ("left out: low" in printed.out) != units
    assert "; ar1-fake 25.0%" in printed.out and "something on the way" not in printed.out
    assert "batch 1 of 1: timing ar1-fake" in printed.err and "batch 1 of 1: timing literal" in printed.err


@pytest.mark.parametrize("file, old, new, says", [
    ("utils.py", "def pad_data", "def pad", "pad_data"),
    ("utils.py", "import peer_log", "import peer_logs", "No module named 'peer_logs'"),
    ("models/mobilenet.py", "latent_layer_num=20", "latent=20", "TypeError")])
def test_another_version_is_one_sentence(fake, config, file, old, new, says):
    path = fake.folder / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(peers.PeerError, match=says) as error:
        peer_of(fake, config).learn(*speed.images(20, [0], 0, size=32))
    assert "\n" not in str(error.value) and hasattr(sys.modules["utils"], "CWRHead")


def test_another_program_is_said_before_anything_is_timed(tmp_path, capsys):
    assert speed.main(["--tiny", "--device", "cpu", "--against", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "holds no program" in printed.err


def test_avalanche_where_it_is_installed(config):
    pytest.importorskip("avalanche")
    test = speed.images(8, range(50), 1)        # of 128 pixels, which its pooling needs
    peer = peers.Peer("avalanche", speed.replace(config, width=1.0), MobileNetV1(50), *test, CPU)
    for i, (n, classes) in enumerate(((60, [0, 1]), (20, [7]))):
        peer.learn(*speed.images(n, classes, i))
        assert 0 <= peer.test() <= 1
