"""How fast is it? The default experiment's shapes, timed as a literal program runs them and as ours does.

    python benchmarks/speed.py                  seconds a batch, literal against ours, and the ratio
    python benchmarks/speed.py --scale          ours against rm_sz, latent layer, batch size, batch number
    python benchmarks/speed.py --full           all 391 batches of NICv2-391 with a test after each, too
    python benchmarks/speed.py --profile        and the ten kernels that take the longest
    python benchmarks/speed.py --end-to-end     a run from its command to its last number, reading included
    python benchmarks/speed.py --against DIR    beside other programs of the method, as peers.py knows them

The images are made here (300 of one class a batch, 1500 of ten in batch 0), so no data and no downloads are
needed; --weights FILE takes real weights instead of random ones. That changes the agreement that is printed,
not the times: a network whose statistics do not fit its weights lets differences of rounding grow a hundred
times faster.

The literal program evaluates the formula of Batch Renormalization, encodes the images of a batch anew in each
epoch and the test images after each batch. Ours runs several times: with all products in float32
(matmul_precision: highest), as params.cfg has it (medium), with products in bfloat16 (low), with activations
in bfloat16 (precision: bf16), which are left out on a CPU that has no units for it, and on a GPU with joined
layers (harness/brn_relu.py). All run in one process, alternating, on the same images; the medians are
compared.
"""
import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import end_to_end
from ar1star_lat_replay import build_learner
from experience_replay import Preprocessed
from harness.config import load_config
from harness.console import errors_as_sentences, say
from harness.encoder import Clock, TestSet, cpu_multiplies_bfloat16, pick_device, set_up_kernels
from harness.records import device_name
from limits import print_limits, print_profile
from models.batch_renorm import brn_layers, set_brn_params
from models.mobilenet import MobileNetV1
from peers import Peer, find_peer
from utils import CWRHead, ReplayMemory, evaluate, generator, minibatches, preprocess

PARTS = ("read", "encode", "train", "test")


# ---- images ----

def images(n, classes, seed, size=128):
    """uint8 images (n, size, size, 3), a coarse pattern per class under noise, and their labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.choice(classes, n)).astype(np.int64)
    coarse = np.stack([np.random.default_rng(c).integers(0, 200, (8, 8, 3)) for c in range(50)])
    x = coarse.astype(np.uint8)[labels].repeat(size // 8, 1).repeat(size // 8, 2)
    return x + rng.integers(0, 56, x.shape, dtype=np.uint8), labels


def read(path, labels):
    """The images of a file and their labels, in random order, as data_loader reads a batch."""
    x = np.load(path, mmap_mode="r")
    order = np.random.default_rng(0).permutation(len(x))
    return x[order], labels[order]


# ---- the programs ----

class Literal:
    """The method as its description reads, nothing saved for later: the reference for speed and results."""

    def __init__(self, config, test_x, test_y, device):
        torch.manual_seed(config.seed)
        self.config = config
        self.device = device
        self.clock = Clock(device)
        self.test_x = test_x
        self.test_y = torch.as_tensor(test_y, device=device)
        self.batches = 0        # learned so far

        self.net = MobileNetV1(latent_layer_num=config.latent_layer_num, width=config.width).to(device)
        self.net.freeze_below(config.freeze_below_layer)
        for brn in brn_layers(self.net):
            brn.fused = False
        self.head = CWRHead(self.net.output, config.cwr_consolidation)
        self.memory = ReplayMemory(config.rm_sz, self.net.example_latent(test_x.shape[1]).contiguous())

    def set_up(self):
        """As PyTorch is by default: float32, but TF32 in the convolutions of a GPU."""
        set_up_kernels(False, "high" if self.device.type == "cuda" else "highest")

    def learn(self, x, y):
        """Learns a batch: uint8 (n, H, W, 3), int64 (n,)."""
        c = self.config
        i = self.batches
        x = preprocess(x, self.device).contiguous()
        y = torch.as_tensor(y, device=self.device)
        if i == 0:
            self._enter(c.init_lr, momentum=c.init_update_rate, inc_step=c.inc_step)
        if i == 1:
            self._enter(c.inc_lr, momentum=c.inc_update_rate, r_max=c.max_r_max, d_max=c.max_d_max)

        self.net.train()
        self.head.begin(y, self.memory.y)
        for _ in range(c.inc_train_ep if i else c.init_train_ep):
            plan = minibatches(len(y), len(self.memory), c.mb_size, generator(c.seed, i, "shuffle"))
            for new, old in plan:
                self._step(x[new], y[new], self.memory.x[old], self.memory.y[old])
        self.head.consolidate()

        self.net.eval()
        with torch.no_grad():
            latents = torch.cat([self.net.lat_features(part) for part in x.split(c.mb_size)])
        self.memory.update(latents, y, i, generator(c.seed, i, "memory"))
        self.batches += 1
        self.clock.lap("train")

    def _enter(self, lr, **brn):
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr, self.config.momentum, weight_decay=self.config.l2)
        set_brn_params(self.net.end_features, **brn)

    def _step(self, x, y, latents, labels):
        scores = self.net(x, latents)
        loss = F.cross_entropy(scores, torch.cat((y, labels)))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()     # as for a log, which waits for a GPU

    def test(self):
        """Accuracy on the test images, 0..1."""
        return evaluate(self.net, Preprocessed(self.test_x, self.device), self.test_y, chunk=128)["accuracy"]


class Ours:
    """This repository's program, to be called as Literal is."""

    def __init__(self, config, test_x, test_y, device):
        self.config = config
        self.learner = build_learner(config, 50, test_x.shape[1:3], device)
        self.net = self.learner.net
        self.clock = self.learner.clock
        self.test_set = TestSet(test_x, test_y)
        self.test_set.encode(self.learner)      # once a run

    def set_up(self):
        """The kernels that the configuration asks for."""
        set_up_kernels(True, self.config.matmul_precision)

    def learn(self, x, y):
        """Learns a batch: uint8 (n, H, W, 3), int64 (n,). Returns what Learner.learn does."""
        return self.learner.learn(x, y)

    def test(self):
        """Accuracy on the test images, 0..1."""
        return self.test_set.evaluate(self.learner)["accuracy"]


# ---- literal against ours ----

def compare(config, device, rounds, n_new, n_test, against=(), profile=False):
    """Times the programs batch by batch, those in the folders `against`, too; says how far ours agree."""
    test = images(n_test, range(50), seed=1)
    config = replace(config, init_train_ep=1)       # batch 0 is not timed
    programs = {"literal": Literal(config, *test, device)}
    programs |= programs_of_ours(config, test, device)
    literal_net = programs["literal"].net
    literal_net.load_state_dict(programs["ours, medium"].net.state_dict())
    for where in against:
        peer = Peer(where, config, literal_net, *test, device)
        programs[peer.name] = peer

    batches = [images(config.rm_sz, range(10), 2)]
    batches += [images(n_new, [10 + i], i) for i in range(rounds)]
    seconds, accuracies = time_in_turn(programs, batches)

    title = f"{n_new} new images, {config.rm_sz} latents, {config.inc_train_ep} epochs, test of {n_test}"
    print_table(seconds, title)
    if against:     # which draw at random in their own ways
        listed = "; ".join(f"{name} {accuracy:.1%}" for name, accuracy in accuracies.items())
        print(f"accuracy at the end: {listed}\n")
    print_agreement(programs, test[0], device)
    for precision in ("highest", "medium", "bf16"):
        if f"ours, {precision}" in programs:
            print_limits(programs[f"ours, {precision}"], device, images(n_new, [10], 1)[0])
    if profile:
        print_profile(programs["ours, medium"], device, *images(n_new, [10], 1))


def programs_of_ours(config, test, device):
    """{name: Ours} in all precisions and with all kernels that the device has something for."""
    kinds = {name: {"matmul_precision": name} for name in ("highest", "medium", "low")}
    kinds["bf16"] = {"precision": "bf16"}
    if device.type == "cpu" and not cpu_multiplies_bfloat16():
        del kinds["low"], kinds["bf16"]
        print("left out: low and bf16, since this CPU has no units for bfloat16")
    programs = {f"ours, {name}": Ours(replace(config, **keys), *test, device) for name, keys in kinds.items()}
    if device.type == "cuda":
        with patch("harness.gpu.JOIN_RELUS", True):
            for name in ("medium", "bf16"):
                joined = Ours(replace(config, **kinds[name]), *test, device)
                programs[f"ours, {name}, joined"] = joined
    return programs


def time_in_turn(programs, batches):
    """({program: [{part: seconds} of each batch but the first]}, {program: accuracy at the end})."""
    seconds = {name: [] for name in programs}
    accuracies = dict.fromkeys(programs)
    with tempfile.TemporaryDirectory() as folder:
        for i, (x, y) in enumerate(batches):
            path = Path(folder) / f"{i}.npy"
            np.save(path, x)
            for name in list(programs)[::1 if i % 2 else -1]:
                say(f"batch {i} of {len(batches) - 1}: timing {name}")
                took, accuracies[name] = time_batch(programs[name], partial(read, path, y))
                say(f"batch {i}: {name}: {sum(took.values()):.1f} s")
                seconds[name].append(took)
    return {name: rows[1:] for name, rows in seconds.items()}, accuracies


def time_batch(program, read_it):
    """({part: seconds}, accuracy) of a batch and the test after it. read_it(): its images and labels."""
    program.set_up()
    program.clock.take()
    x, y = read_it()
    program.clock.lap("read")
    program.learn(x, y)
    accuracy = program.test()
    program.clock.lap("test")
    return program.clock.take(), accuracy


def print_table(seconds, title):
    """Medians of {program: [{part: seconds}, ...]} and the ratios of their sums."""
    print(f"\nseconds per incremental batch ({title}; median of {len(seconds['literal'])})")
    print(f"{'':20}" + "".join(f"{part:>9}" for part in (*PARTS, "sum", "ratio")))
    literal_sum = None
    for name, rows in seconds.items():
        medians = [statistics.median(row.get(part, 0) for row in rows) for part in PARTS]
        literal_sum = literal_sum or sum(medians)       # the first of them
        values = "".join(f"{value:9.3f}" for value in (*medians, sum(medians)))
        print(f"{name:20}{values}{literal_sum / sum(medians):9.1f}")
    print()


def print_agreement(programs, test_x, device):
    """How far heads and predictions of our programs are from those of the literal one."""
    set_up_kernels(True, "highest")
    literal = programs["literal"].net
    weight = literal.output.weight
    expected = predictions(literal, test_x, device)
    print("agreement with literal: relative norm of the difference of the head's weights, equal test "
          "predictions")
    for name, program in programs.items():
        if name.startswith("ours, "):
            difference = ((weight - program.net.output.weight).norm() / weight.norm()).item()
            same = (expected == predictions(program.net, test_x, device)).double().mean()
            print(f"{name:20}{difference:9.1e}{same:9.2%}")


def predictions(net, test_x, device):
    """Predicted classes (n,) of uint8 images (n, H, W, 3)."""
    net.eval()
    with torch.no_grad():
        return torch.cat([net(preprocess(part, device)).argmax(1) for part in np.array_split(test_x, 10)])


# ---- ours alone ----

def full_run(config, device):
    """The whole of NICv2-391: 391 batches with a test after each; making the images is not counted."""
    program = Ours(config, *images(2249, range(50), seed=1), device)
    total = dict.fromkeys(PARTS, 0.0)
    for i in range(391):
        n, classes = (300, [i % 50]) if i else (2999, range(0, 50, 5))
        took, _ = time_batch(program, partial(images, n, classes, i))
        for part, seconds in took.items():
            total[part] += seconds
        if i % 10 == 0:
            say(f"batch {i + 1} of 391: {sum(total.values()):.1f} s")
    program.learner.check_frozen()

    counted = {part: total[part] for part in PARTS[1:]}
    listed = ", ".join(f"{part} {seconds:.1f}" for part, seconds in counted.items())
    print(f"391 batches with a test after each, without reading: {sum(counted.values()):.1f} s on "
          f"{device_name(device)} ({listed})")


def scale(config, device, tiny):
    """Seconds of an epoch of a batch of ours, and of the test after it, by one setting after another."""
    n_new, n_test = (20, 40) if tiny else (300, 500)
    settings = [(f"rm_sz {r}", {"rm_sz": r}, n_new, 1) for r in ([60] if tiny else [500, 1500, 5000, 20000])]
    for layer in ("pool6", "conv5_4/dw", "conv4_2/dw", "images"):       # each learns all that lies above it
        keys = dict.fromkeys(("latent_layer_num", "freeze_below_layer", "inc_freeze_below_layer"), layer)
        settings.append((f"latent layer {layer}", keys, n_new, 1))
    settings += [(f"{n} new images", {}, n, 1) for n in ([10] if tiny else [30, 100, 300, 1000, 3000])]
    settings += [(f"batch number {i}", {}, n_new, i) for i in ([1] if tiny else [1, 100, 390])]

    print(f"seconds a batch, 1 epoch, matmul_precision {config.matmul_precision}\n"
          f"{'setting':26}{'encode':>9}{'train':>9}{'test':>9}{'steps':>7}{'ms a step':>11}")
    for name, keys, n, i in settings:
        say(f"timing {name}")
        row, steps = time_one(replace(config, inc_train_ep=1, **keys), device, n, i, n_test)
        values = "".join(f"{row[part]:9.3f}" for part in PARTS[1:])
        print(f"{name:26}{values}{steps:7}{1e3 * row['train'] / steps:11.1f}", flush=True)


def time_one(config, device, n, i, n_test):
    """({part: seconds}, steps) of an epoch over n images as batch i, with a full memory."""
    program = Ours(config, *images(n_test, range(50), seed=1), device)
    learner = program.learner
    learner.enter(learner.later)
    x, y = images(min(300, config.rm_sz), range(10), 3)
    stock = learner.encoder(x)
    y = torch.as_tensor(y, device=device)
    while len(learner.memory) < config.rm_sz:       # the same few images again and again: their number costs
        learner.memory.update(stock, y, 0)

    rows = []
    for k in range(2 if device.type == "cpu" else 4):
        learner.batches = i + k
        took, _ = time_batch(program, partial(images, n, [20], k))
        rows.append(took)
    steps = len(learner.minibatches(n, config.rm_sz, config.mb_size))
    return {part: min(row[part] for row in rows) for part in PARTS[1:]}, steps


# ---- the command line ----

def run(args):
    """What the command line asks for."""
    device = pick_device(args.device)
    for where in args.against:
        find_peer(where)        # before anything takes its time
    changed = {"weights": args.weights, "device": args.device}
    if args.tiny:
        changed |= {"width": 0.25, "rm_sz": 60, "inc_train_ep": 1, "mb_size": 32}
    config = load_config(overrides=changed)
    if args.end_to_end:
        words = [f"--set={key}={value}" for key, value in changed.items()]
        end_to_end.measure(args.batches, args.frames, words)
        return

    print(f"torch {torch.__version__}, {device_name(device)}")
    if args.scale:
        scale(config, device, args.tiny)
        return
    rounds, n_new, n_test = (1, 20, 40) if args.tiny else (args.batches, 300, 2249)
    compare(config, device, rounds, n_new, n_test, args.against, args.profile)
    if args.full:
        full_run(config, device)


def main(argv=None):
    """Returns the exit status: 0 done, 2 bad input, 1 failure on the way, 130 interrupted."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--device", default="auto", metavar="auto|cpu|cuda[:n]")
    add("--batches", type=int, default=3, metavar="N", help="incremental batches timed (default 3)")
    add("--full", action="store_true", help="run all 391 batches of ours")
    add("--profile", action="store_true", help="print which kernels take the longest")
    add("--scale", action="store_true", help="time ours against its settings")
    add("--end-to-end", action="store_true", help="time a whole run, as a process of its own")
    add("--frames", type=int, default=300, metavar="N", help="of a unit, for --end-to-end (default 300)")
    add("--tiny", action="store_true", help="a few images only: shows that it runs, not how fast")
    add("--against", nargs="+", default=[], metavar="DIR", help="time these programs, too: a clone of the "
        "published PyTorch program, a clone of Avalanche, or avalanche where it is installed")
    add("--weights", default="none", metavar="FILE", help="pre-trained weights (default none: random)")
    args = parser.parse_args(argv)
    with errors_as_sentences(parser.prog) as outcome:
        run(args)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
