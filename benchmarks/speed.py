"""How fast is it? The default experiment's shapes, timed as a literal program would run them and as ours does.

    python benchmarks/speed.py                          one table: seconds a batch, literal against ours, and the ratio
    python benchmarks/speed.py --scale                  ours against rm_sz, latent layer, batch size and batch number
    python benchmarks/speed.py --device cuda --full     all 391 batches of NICv2-391 with a test after each, on a GPU
    python benchmarks/speed.py --profile                and the ten kernels that take the longest
    python benchmarks/speed.py --against DIR            beside other programs of the same method, as peers.py knows them

The images are made here (300 of one class a batch, 1500 of ten in batch 0), so no data and no downloads are needed;
--weights FILE takes real weights instead of random ones. That changes the agreement that is printed, not the times: a
network whose statistics do not fit its weights makes differences of rounding grow a hundred times faster.
The literal program evaluates the formula of Batch Renormalization, encodes the images of a batch anew in each epoch and
the test images after each batch. Ours runs three times: with all products in float32 (matmul_precision: highest), as
params.cfg has it (medium), and with products in bfloat16 (low). All run in one process, alternating, on the same images; the
medians are compared.
"""
import argparse
import io
import statistics
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import trange

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from ar1star_lat_replay import build_learner
from lab.config import ConfigError, load_config
from lab.fast import TestSet, set_up_kernels
from lab.ranks import pick_device
from lab.record import Clock, say
from limits import print_limits, print_profile
from models.batch_renorm import brn_layers, set_brn_params
from models.mobilenet import MobileNetV1
from peers import PeerError, find_peer
from utils import CWRHead, ReplayMemory, evaluate, generator, minibatches, preprocess

PARTS = ("read", "encode", "train", "test")


def images(n, classes, seed, size=128):
    """n uint8 images (n, size, size, 3), no two alike, and their labels: a coarse pattern per class under noise."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.choice(classes, n)).astype(np.int64)
    coarse = np.stack([np.random.default_rng(c).integers(0, 200, (8, 8, 3)) for c in range(50)]).astype(np.uint8)
    x = coarse[labels].repeat(size // 8, 1).repeat(size // 8, 2)
    return x + rng.integers(0, 56, x.shape, dtype=np.uint8), labels


class ReadFrom:
    """Batches read from an array on disk, as data_loader reads them."""

    def __init__(self, folder, batches):
        self.folder = Path(folder)
        for b, (x, _) in enumerate(batches):
            np.save(self.folder / f"{b}.npy", x)
        self.labels = [y for _, y in batches]

    def __getitem__(self, b):
        x = np.load(self.folder / f"{b}.npy", mmap_mode="r")
        return x[np.random.default_rng(b).permutation(len(x))], self.labels[b]


class Literal:
    """The method as its description reads, nothing saved for later: the reference for speed and for results."""

    def __init__(self, config, device):
        torch.manual_seed(config.seed)
        self.config, self.device = config, device
        self.net = MobileNetV1(latent_layer_num=config.latent_layer_num, width=config.width).to(device)
        self.net.freeze_below(config.freeze_below_layer)
        for brn in brn_layers(self.net):
            brn.fused = False
        self.head, self.memory = CWRHead(self.net.output, config.cwr_consolidation), None

    def set_up(self):
        """As PyTorch is by default: float32, but TF32 in the convolutions of a GPU."""
        set_up_kernels(False, "high" if self.device.type == "cuda" else "highest")

    def learn(self, i, train_x, train_y, clock):
        """Learns batch i: uint8 (n, H, W, 3), int64 (n,)."""
        c, net = self.config, self.net
        images, labels = preprocess(train_x, self.device).contiguous(), torch.as_tensor(train_y, device=self.device)
        if i < 2:
            self.optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad],
                                             c.inc_lr if i else c.init_lr, c.momentum, weight_decay=c.l2)
            rates = dict(momentum=c.inc_update_rate, r_max=c.max_r_max, d_max=c.max_d_max) if i else \
                dict(momentum=c.init_update_rate, inc_step=c.inc_step)
            set_brn_params(net.end_features, **rates)
        net.train()
        memory_y = self.memory.y if self.memory else labels[:0]
        self.head.begin(labels, memory_y)
        for _ in range(c.inc_train_ep if i else c.init_train_ep):
            seen = []
            for new, old in minibatches(len(labels), len(memory_y), c.mb_size, generator(c.seed, i, "shuffle")):
                replayed = self.memory.x[old] if len(old) else None
                scores, latents = net(images[new], replayed, return_lat_acts=True)
                y = torch.cat((labels[new], memory_y[old]))
                loss = F.cross_entropy(scores, y)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                seen.append((loss.item(), latents))
        self.head.consolidate()
        net.eval()
        with torch.no_grad():
            latents = torch.cat([net.lat_features(part) for part in images.split(c.mb_size)])
        self.memory = self.memory or ReplayMemory(c.rm_sz, like=latents[:1])
        self.memory.update(latents, labels, i, generator(c.seed, i, "memory"))
        clock.lap("train")

    def test(self, test_x, test_y):
        """What utils.evaluate says of the test images."""
        return evaluate(self.net, LazyImages(test_x, self.device), test_y, chunk=128)


class Ours:
    """This repository's program, to be called as Literal is."""

    def __init__(self, config, test, device):
        self.config, self.learner, self.test_set = config, build_learner(config, 50, test.images.shape[1:3], device), test
        self.net = self.learner.net
        test(self.learner)      # encodes the test images: once a run

    def set_up(self):
        """The kernels that the configuration asks for."""
        set_up_kernels(True, self.config.matmul_precision)

    def learn(self, i, train_x, train_y, clock):
        """Learns batch i: uint8 (n, H, W, 3), int64 (n,)."""
        self.learner.learn(train_x, train_y, clock.lap)

    def test(self, test_x, test_y):
        """What utils.evaluate says of the test images."""
        return self.test_set(self.learner)


class Peer:
    """A program of others at work, to be called as Literal is. PeerError where it does not run as it is known in peers.py.

    where: the folder of a clone, or "avalanche"; net: ours, whose weights it starts with.
    """

    def __init__(self, where, config, net, test_x, test_y, device):
        self.name, self.device, number = Path(where).resolve().name, device, net.layer_number(config.latent_layer_num)
        self.run = find_peer(where)(where, config, device, net.layers, number, test_x, test_y)
        self._go_on(None)

    def set_up(self):
        """As PyTorch is by default: float32, but TF32 in the convolutions of a GPU."""
        set_up_kernels(False, "high" if self.device.type == "cuda" else "highest")

    def learn(self, i, train_x, train_y, clock):
        """Learns batch i: uint8 (n, H, W, 3), int64 (n,)."""
        self._go_on((train_x, train_y))
        clock.lap("train")

    def test(self, test_x, test_y):
        """{"accuracy": 0..1} of the test images, which it has had from the start."""
        return {"accuracy": self._go_on(None)}

    def _go_on(self, batch):
        try:
            with redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self.run.send(batch)
        except PeerError:
            raise
        except Exception as error:      # whatever the code of others raises
            raise PeerError(f"{self.name} is not the program that is known here, or not its version: it ended with "
                            f"{type(error).__name__} ({' '.join(str(error).split()):.200})") from error


class LazyImages:
    """Preprocesses the test images that a slice asks for."""

    def __init__(self, x, device):
        self.x, self.device = x, device

    def __getitem__(self, part):
        return preprocess(self.x[part], self.device).contiguous()


def make_learner(config, device, n_test=2249):
    """(Learner, TestSet of n_test images) of a configuration."""
    test = TestSet(*images(n_test, range(50), seed=1))
    learner = build_learner(config, 50, test.images.shape[1:3], device)
    test(learner)       # encodes the test images: once a run
    return learner, test


def compare(config, device, rounds, n_new, n_test, against=(), profile=False):
    """Times the programs batch by batch in turn, those in the folders `against`, too; checks that ours agree."""
    test_x, test_y = images(n_test, range(50), seed=1)
    test_y = torch.as_tensor(test_y, device=device)
    config = replace(config, init_train_ep=1)       # batch 0 is not timed
    highest, medium, low = (Ours(replace(config, matmul_precision=p), TestSet(test_x, test_y), device)
                            for p in ("highest", "medium", "low"))
    literal = Literal(config, device)
    literal.net.load_state_dict(highest.net.state_dict())
    programs = {"literal": literal, "ours, highest": highest, "ours, medium": medium, "ours, low": low}
    peers = [Peer(where, config, literal.net, test_x, test_y.cpu().numpy(), device) for where in against]
    programs |= {peer.name: peer for peer in peers}
    seconds, accuracies = {name: [] for name in programs}, {}
    with tempfile.TemporaryDirectory() as folder:
        stream = ReadFrom(folder, [images(config.rm_sz, range(10), 2)] + [images(n_new, [10 + i], i) for i in range(rounds)])
        for i in range(rounds + 1):
            for name, program in list(programs.items())[::1 if i % 2 else -1]:
                say(f"batch {i} of {rounds}: timing {name}")
                program.set_up()
                clock = Clock(device)
                x, y = stream[i]
                clock.lap("read")
                program.learn(i, x, y, clock)
                accuracies[name] = program.test(test_x, test_y)["accuracy"]
                clock.lap("test")
                seconds[name].append(clock.take())
            say(f"batch {i}: " + "; ".join(f"{name}: {sum(rows[-1].values()):.1f} s" for name, rows in seconds.items()))
    print_table({name: rows[1:] for name, rows in seconds.items()},
                f"{n_new} new images, {config.rm_sz} latents, {config.inc_train_ep} epochs, test of {n_test}")
    if peers:       # which draw at random in their own ways
        print("accuracy at the end: " + "; ".join(f"{name} {accuracies[name]:.1%}" for name in programs) + "\n")
    print_agreement(programs, test_x, device)
    for program in (highest, medium):
        print_limits(program, device, images(n_new, [10], 1)[0])
    if profile:
        print_profile(medium, device, *images(n_new, [10], 1))


def print_agreement(programs, test_x, device):
    """How far heads and predictions of the programs are from those of the literal one."""
    set_up_kernels(True, "highest")
    nets = {name: programs[name].net for name in programs if name == "literal" or name.startswith("ours, ")}
    expected, weight = predictions(nets["literal"], test_x, device), nets.pop("literal").output.weight
    print("agreement with literal: relative norm of the difference of the head's weights, equal test predictions")
    for name, net in nets.items():
        difference = ((weight - net.output.weight).norm() / weight.norm()).item()
        same = (expected == predictions(net, test_x, device)).double().mean()
        print(f"{name:14}{difference:9.1e}{same:9.2%}")


def predictions(net, test_x, device):
    """Predicted classes (n,) of uint8 images (n, H, W, 3)."""
    net.eval()
    with torch.no_grad():
        return torch.cat([net(preprocess(part, device)).argmax(1) for part in np.array_split(test_x, 10)])


def print_table(seconds, title):
    """Medians of {program: [{part: seconds}, ...]} and the ratios of their sums."""
    medians = {name: {part: statistics.median(row.get(part, 0) for row in rows) for part in PARTS}
               for name, rows in seconds.items()}
    sums = {name: sum(row.values()) for name, row in medians.items()}
    print(f"\nseconds per incremental batch ({title}; median of {len(seconds['literal'])})")
    print(f"{'':14}" + "".join(f"{part:>9}" for part in (*PARTS, "sum", "ratio")))
    for name, row in medians.items():
        print(f"{name:14}" + "".join(f"{v:9.3f}" for v in (*row.values(), sums[name])) +
              f"{sums['literal'] / sums[name]:9.1f}")
    print()


def full_run(config, device):
    """The whole of NICv2-391: 391 batches with a test after each; making the images is not counted."""
    learner, test = make_learner(config, device)
    total = {part: 0.0 for part in PARTS}
    for i in trange(391, desc="the whole of NICv2-391", unit="batch", disable=None):
        x, y = images(2999, range(0, 50, 5), i) if i == 0 else images(300, [i % 50], i)
        clock = Clock(device)
        learner.learn(x, y, clock.lap)
        test(learner)
        clock.lap("test")
        for part, seconds in clock.take().items():
            total[part] += seconds
        if i % 50 == 0:
            say(f"batch {i + 1} of 391: {sum(total.values()):.1f} s")
    learner.check_frozen()
    counted = sum(total[part] for part in PARTS[1:])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"391 batches with a test after each, without reading: {counted:.1f} s on {name} "
          f"({', '.join(f'{part} {total[part]:.1f}' for part in PARTS[1:])})")


def scale(config, device, tiny):
    """Seconds of one epoch of one batch of ours, and of the test after it, as one setting after another changes."""
    print(f"seconds a batch, 1 epoch, matmul_precision {config.matmul_precision}\n"
          f"{'setting':26}{'encode':>9}{'train':>9}{'test':>9}{'steps':>7}{'ms a step':>11}")
    n_new, n_test = (20, 40) if tiny else (300, 500)
    rm_sizes, news = ([60], [10]) if tiny else ([500, 1500, 5000, 20000], [30, 100, 300, 1000, 3000])
    settings = [(f"rm_sz {r}", {"rm_sz": r}, n_new, 1) for r in rm_sizes]
    for layer in ("pool6", "conv5_4/dw", "conv4_2/dw", "images"):       # each learns all that lies above it
        layers = dict.fromkeys(("latent_layer_num", "freeze_below_layer", "inc_freeze_below_layer"), layer)
        settings.append((f"latent layer {layer}", layers, n_new, 1))
    settings += [(f"{n} new images", {}, n, 1) for n in news]
    settings += [(f"batch number {i}", {}, n_new, i) for i in ((1, 390) if tiny else (1, 100, 390))]
    for name, keys, n, i in settings:
        say(f"timing {name}")
        row, steps = time_one(replace(config, inc_train_ep=1, **keys), device, n, i, n_test)
        print(f"{name:26}" + "".join(f"{row[part]:9.3f}" for part in PARTS[1:]) +
              f"{steps:7}{1e3 * row['train'] / steps:11.1f}", flush=True)


def time_one(config, device, n, i, n_test):
    """({part: seconds}, steps) of an epoch over n images as batch i, with a full memory."""
    learner, test = make_learner(config, device, n_test)
    learner.enter(learner.later)
    x, y = images(300, range(10), 3)
    stock = learner.encoder(x)
    while len(learner.memory) < config.rm_sz:       # the same few images again and again: their number is what costs
        learner.memory.update(stock, torch.as_tensor(y, device=device), 0)
    rows = []
    for k in range(2 if device.type == "cpu" else 4):
        clock = Clock(device)
        learner.batches = i + k
        steps = len(learner.learn(*images(n, [20], k), clock.lap)[0])
        test(learner)
        clock.lap("test")
        rows.append(clock.take())
    return {part: min(row[part] for row in rows) for part in PARTS[1:]}, steps


def main(argv=None):
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batches", type=int, default=3, help="incremental batches timed (default 3)")
    parser.add_argument("--full", action="store_true", help="run all 391 batches of ours")
    parser.add_argument("--profile", action="store_true", help="print which kernels take the longest")
    parser.add_argument("--scale", action="store_true", help="time ours against its settings")
    parser.add_argument("--tiny", action="store_true", help="a few images only: shows that it runs, not how fast")
    parser.add_argument("--against", nargs="+", default=[], metavar="DIR", help="time these programs, too: a clone of the "
                        "published PyTorch program, a clone of Avalanche, or avalanche where it is installed")
    parser.add_argument("--weights", default="none", metavar="FILE", help="pre-trained weights (default none: random)")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
        for where in args.against:
            find_peer(where)        # before anything takes its time
    except (ConfigError, PeerError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    keys = {"weights": args.weights, "device": args.device}
    config = load_config(path=ROOT / "params.cfg",
                         overrides=keys | ({"rm_sz": 60, "inc_train_ep": 1, "mb_size": 32} if args.tiny else {}))
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {machine}")
    if args.scale:
        scale(config, device, args.tiny)
        return 0
    try:
        compare(config, device, 1 if args.tiny else args.batches, *((20, 40) if args.tiny else (300, 2249)), args.against,
                args.profile)
    except PeerError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    if args.full:
        full_run(config, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
