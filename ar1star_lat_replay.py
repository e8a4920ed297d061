"""AR1* with Latent Replay on CORe50 NICv2-391: the experiment of arXiv 1912.01100, from one command.

    python ar1star_lat_replay.py                          the published experiment (needs CORe50, see README)
    python ar1star_lat_replay.py --list                   every experiment of params.cfg
    python ar1star_lat_replay.py --name ar1star --seed 1 --set rm_sz=500

A stream of small batches, each of one class in one session, is learned one after the other: SGD on the layers above the
latent one, on mini-batches that join the batch's latents with latents replayed from a memory; Batch Renormalization;
CWR* consolidation of the head; Synaptic Intelligence if reg_lambda > 0. After every batch all 50 classes are tested.
"""
import argparse
import errno
import math
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from tqdm import tqdm

import board
from config import ConfigError, load_config, read_experiments
from data_loader import CORE50, DataError, MissingData
from demo_data import DemoStream, FolderStream
from download import fetch_missing
from models.batch_renorm import brn_layers, set_brn_params
from models.mobilenet import WeightsError
from models.split_net import layer_table
from models.torchvision_nets import ModelError, build_net, empty, layer_names
from report import report
from utils import (CheckpointError, CWRHead, Encoder, ReplayMemory, RunFolder, SynapticIntelligence, TrainStep, evaluate,
                   generator, minibatches, set_up_kernels, trainable_conv_weights)


try:
    import resource
except ImportError:     # Windows
    resource = None


class TrainingError(Exception):
    """Training that cannot go on, such as a loss that is no longer a number."""


class Phase(NamedTuple):
    """What differs between batch 0 and the batches after it."""
    lr: float
    epochs: int
    frozen_layer: int       # layers up to this one are frozen
    brn: dict               # parameters of the Batch Renormalization layers


def phases(config):
    """(Phase of batch 0, Phase of all later batches)."""
    _, first, later = config.check_layers(layer_names(config.model))
    growing = dict(momentum=config.init_update_rate, max_r_max=config.max_r_max, max_d_max=config.max_d_max,
                   inc_step=config.inc_step)
    fixed = dict(momentum=config.inc_update_rate, r_max=config.max_r_max, d_max=config.max_d_max, inc_step=0.0)
    return (Phase(config.init_lr, config.init_train_ep, first, growing),
            Phase(config.inc_lr, config.inc_train_ep, later, fixed))


class Learner:
    """The network, its head, the replay memory and the regularization: all that a checkpoint has to bring back."""

    def __init__(self, config, num_classes, test_x, device):
        self.config, self.device, self.test_x, self.encoder = config, device, test_x, None
        torch.manual_seed(config.seed)
        set_up_kernels(config.fast, config.matmul_precision)
        net = build_net(config.model, num_classes, config.latent_layer_num, config.weights, config.width).to(device)
        self.net = net.to(memory_format=torch.channels_last) if config.fast else net
        for brn in brn_layers(net):
            brn.fused = config.fast
        self.first, self.later = phases(config)
        self.pretrained = {k: v.clone() for k, v in self._frozen_from_the_start().items()}
        self.enter(self.first)
        self.head = CWRHead(net.output, config.cwr_consolidation)
        self.net.eval()         # the example must not enter the moving averages of layers that still learn
        with torch.no_grad():
            self.memory = ReplayMemory(config.rm_sz, like=self.test[:1])
        self.net.train()

    def enter(self, phase):
        """Makes the optimizer of a phase, freezes its layers and sets the Batch Renormalization parameters."""
        self.net.train()
        self.net.freeze_below(phase.frozen_layer)
        above = torch.nn.ModuleList(self.net.layers[phase.frozen_layer + 1:])
        if brn_layers(above):
            set_brn_params(above, **phase.brn)
        if self.encoder is None or not self.encoder.frozen:     # else the latents of the test set still hold
            self.encoder = Encoder(self.net, self.device, self.config.fast, int(self.config.max_latents_gb * 2**30))
            self.test = self.encoder(self.test_x)
        self.optimizer = torch.optim.SGD([p for p in self.net.parameters() if p.requires_grad], phase.lr,
                                         self.config.momentum, weight_decay=self.config.l2)
        if phase is self.first:
            # over what stays trainable: a weight frozen after batch 0 cannot forget
            lasting = torch.nn.ModuleList(self.net.layers[self.later.frozen_layer + 1:])
            self.si = SynapticIntelligence(trainable_conv_weights(lasting), self.config.reg_lambda,
                                           min_f=0.0 if self.config.reg_clip_negative else -math.inf) \
                if self.config.reg_lambda > 0 else None
        graph = self.config.fast and self.device.type == "cuda" and self.encoder.frozen and phase is self.later
        self.step = TrainStep(self.net, self.optimizer, self.si, graph)

    def _frozen_from_the_start(self):
        return torch.nn.ModuleList(self.net.layers[:self.first.frozen_layer + 1]).state_dict()

    def check_frozen(self):
        """Raises unless everything frozen from batch 0 on is bit-equal to the pre-trained weights and statistics."""
        for key, value in self._frozen_from_the_start().items():
            if not torch.equal(value, self.pretrained[key]):
                raise AssertionError(f"the frozen {key} has changed during the run: this is a bug, please report it")

    def state_dict(self):
        parts = {"net": self.net, "optimizer": self.optimizer, "head": self.head, "memory": self.memory, "si": self.si}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state):
        """Brings back a state saved after batch 0 or later."""
        self.net.load_state_dict(state["net"])
        self.enter(self.later)
        self.optimizer.load_state_dict(state["optimizer"])
        self.head.load_state_dict(state["head"])
        self.memory.load_state_dict(state["memory"])
        if self.si is not None:
            self.si.load_state_dict(state["si"])


def train_batch(learner, latents, labels, epochs, rng):
    """Trains on one batch of n images and the replay memory.

    latents: (n, *latent shape), indexable; labels: int64 (n,). Returns, per step: loss, correct predictions, patterns;
    three 1-d tensors, of which the first two are still on the device.
    """
    step, memory, si = learner.step, learner.memory, learner.si
    losses, corrects, sizes = [], [], []
    plan = [(new.to(labels.device), old.to(labels.device))
            for new, old in minibatches(len(labels), len(memory), learner.config.mb_size, rng)]
    if si is not None:
        si.begin_batch()
    for _ in range(epochs):
        for new, old in plan:
            x = torch.cat((latents[new], memory.x[old]))        # (mb_size, *latent shape)
            y = torch.cat((labels[new], memory.y[old]))
            loss, correct = step(x, y)
            losses.append(loss)
            corrects.append(correct)
            sizes.append(len(y))
    if si is not None:
        si.end_batch()
    return torch.stack(losses), torch.stack(corrects), torch.tensor(sizes)


def open_stream(config, done=0):
    """The data set that a configuration names, less the `done` batches learned already: an iterable of (images, labels)."""
    start = config.start_batch + done
    if config.dataset == "demo":
        return DemoStream(config.seed, config.run, start_batch=start)
    if config.dataset == "folder":
        return FolderStream(config.data, config.image_size, start)
    if config.download:
        with on_signal(signal.default_int_handler):     # a download is left at once: it goes on from there the next time
            fetch_missing(config.data)
    return CORE50(config.data, config.preload, config.scenario, config.cumulative, config.run, start)


def run_experiment(config, name="DEFAULT", log_dir="logs", max_batches=None, fresh=False):
    """Runs an experiment, or continues it from its checkpoint, and returns its results.

    config: a Config. Everything is written into log_dir/name/run{run}_seed{seed}/. Returns {"rows": the lines of
    results.jsonl, "final_accuracy", "mean_accuracy" (over all tests): 0..1, "folder"}.
    """
    with finishing_the_batch() as stopped, tqdm(unit="batch", disable=None) as bar:
        for rows, bar.total in experiment(config, name, log_dir, max_batches, fresh, stopped):
            bar.update(len(rows) - bar.n)
            bar.set_postfix_str(f"accuracy {rows[-1]['test_accuracy']:.1%}")
    return results_of(rows, run_path(config, name, log_dir))


def results_of(rows, folder):
    accuracies = [row["test_accuracy"] for row in rows]
    return {"rows": rows, "final_accuracy": accuracies[-1], "mean_accuracy": sum(accuracies) / len(accuracies),
            "folder": folder}


def run_path(config, name, log_dir):
    return Path(log_dir) / name / f"run{config.run}_seed{config.seed}"


def experiment(config, name, log_dir, max_batches=None, fresh=False, stopped=()):
    """The experiment as a generator: (records of the batches learned so far, batches in all) after each batch.

    Yields once where there is nothing left to learn. Ends early, with a checkpoint and KeyboardInterrupt, when something
    is put into `stopped`.
    """
    device = pick_device(config.device)
    phases(config)      # impossible layers are an error before any data is touched
    stream = open_stream(config)
    test_x, test_y = stream.get_test_set(config.test_stride)
    batches = len(stream) if max_batches is None else min(max_batches, len(stream))
    folder = RunFolder(run_path(config, name, log_dir), config, fresh)
    try:
        rows = folder.state["rows"] if folder.state else []
        if len(rows) >= batches:
            yield rows, len(rows)
            return
        learner = Learner(config, stream.num_classes, test_x, device)
        if rows:
            learner.load_state_dict(folder.state)
            stream = open_stream(config, len(rows))
        folder.state = None     # its tensors are the learner's now
        for _ in learn(learner, stream, torch.as_tensor(test_y, device=device), folder, rows, batches, stopped):
            yield rows, batches
    finally:
        folder.close()


def learn(learner, stream, test_y, folder, rows, batches, stopped):
    """Learns the batches len(rows) .. batches - 1, with a test after each; appends their records to rows and yields."""
    clock = Clock(learner.device)
    for i, (train_x, train_y) in enumerate(stream, len(rows)):
        clock.lap("read")
        steps = learn_batch(learner, i, train_x, train_y, clock)
        test = evaluate(learner.net.classify, learner.test, test_y)
        clock.lap("test")
        rows.append(record(folder, learner, rows, batches, steps, train_x, train_y, test, clock.take()))
        last = i + 1 == batches or bool(stopped)
        if last:
            learner.check_frozen()
        folder.save({"rows": rows, **learner.state_dict()}, force=last)
        yield
        if last:
            break
        clock.take()        # the time that records, checkpoint and caller took is not the next batch's
    if len(rows) < batches:
        raise KeyboardInterrupt


def learn_batch(learner, i, train_x, train_y, clock):
    """Learns incremental batch i: uint8 images (n, H, W, 3) and int64 labels (n,). Returns what train_batch returns."""
    head, memory, seed = learner.head, learner.memory, learner.config.seed
    phase = learner.first if i == 0 else learner.later
    latents, labels = learner.encoder(train_x), torch.as_tensor(train_y, device=learner.device)
    clock.lap("encode")
    head.begin(labels, memory.y)                # CWR*: reload the rows of the classes present
    torch.manual_seed(generator(seed, i, "dropout").initial_seed())     # of networks that have any
    steps = train_batch(learner, latents, labels, phase.epochs, generator(seed, i, "shuffle"))
    head.consolidate()
    if i == 0:
        learner.enter(learner.later)
    memory.update(latents, labels, i, generator(seed, i, "memory"))
    clock.lap("train")
    return steps


def record(folder, learner, rows, batches, steps, train_x, train_y, test, seconds):
    """Writes one batch's line of results.jsonl, curves and pictures; returns the line. rows: those of earlier batches."""
    i, first_step = len(rows), rows[-1]["train_steps"] if rows else 0
    head, memory, device, confusion = learner.head, learner.memory, learner.device, test["confusion"]
    losses, corrects, sizes = (t.double().cpu() for t in steps)
    if not losses.isfinite().all():
        raise TrainingError(f"the training loss became {losses[~losses.isfinite()][0]:g} in batch {i}: the last checkpoint "
                            f"is kept; lower {'init_lr' if i == 0 else 'inc_lr'} and start over with --fresh")
    met = (head.past_j > 0).cpu()
    row = {"batch": i, "test_accuracy": test["accuracy"], "test_loss": test["loss"],
           "train_accuracy": (corrects.sum() / sizes.sum()).item(),
           "train_loss": ((losses * sizes).sum() / sizes.sum()).item(),
           "n_train": len(train_y), "classes_seen": int(met.sum()), "memory_size": len(memory),
           "train_steps": first_step + len(losses)}
    row |= {f"seconds_{part}": round(value, 4) for part, value in seconds.items()}
    row |= {"accuracy_seen": confusion.diagonal()[met].sum().item() / max(1, confusion[met].sum().item()),
            "per_class": [None if math.isnan(a) else round(a, 4) for a in test["per_class"]],
            "classes": torch.as_tensor(train_y).unique().tolist(), "n_test": len(learner.test_x), "batches": batches,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"cpu, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"}
    folder.write_row(row)
    board.write_steps(folder.board, first_step, losses.tolist(), (corrects / sizes).tolist())
    board.write_batch(folder.board, row, confusion, head, memory, brn_layers(learner.net))
    if board.picture_due(i, batches):
        board.write_pictures(folder.board, [*rows, row], batches, confusion, head, memory, train_x,
                             memory_has_images=learner.net.latent_layer_num < 0)
    if i + 1 == batches:
        board.write_hparams(folder.board, learner.config, [*rows, row])
    return row


class Clock:
    """Wall-clock seconds per part of a batch; waits for the device, so that each part is charged with its own work."""

    def __init__(self, device):
        self.device, self.seconds, self.last = device, {}, time.perf_counter()

    def lap(self, name):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now

    def take(self):
        taken, self.seconds, self.last = self.seconds, {}, time.perf_counter()
        return taken


@contextmanager
def finishing_the_batch():
    """Ctrl-C (or SIGTERM) inside lets the present batch end; a second one stops at once. Yields a list, filled by then."""
    stopped = []

    def stop(number, _):
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)
        with suppress(OSError):     # no print: it may have interrupted another
            os.write(2, b"\nstopping after this batch; press Ctrl-C again to stop at once\n")

    with on_signal(stop):
        yield stopped


@contextmanager
def on_signal(handler):
    """Ctrl-C and SIGTERM call handler(number, frame) inside."""
    try:
        before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:      # not in the main thread: signals go elsewhere
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pick_device(name):
    """torch.device of "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:n"."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; it can be auto, cpu, cuda or cuda:n")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"there is no device {name!r} on this machine, which has {torch.cuda.device_count()} CUDA "
                          "devices; use --device auto or cpu")
    return device


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--name", default="DEFAULT", metavar="EXPERIMENT", help="section of the configuration file (default DEFAULT)")
    add("--config", default=str(Path(__file__).with_name("params.cfg")), metavar="FILE", help="(default params.cfg)")
    add("--list", action="store_true", help="list the experiments with their comments, and stop")
    add("--list-layers", action="store_true", help="list the network's layers: shape, bytes a pattern, computation")
    add("--run", type=int, metavar="N", help="order of the batches, 0-9")
    add("--runs", metavar="N-M", help="several orders one after the other: 0-4, or 0,2,5")
    add("--seed", type=int, metavar="N", help="seed of everything random")
    add("--data", metavar="DIR", help="folder of the data set")
    add("--download", action="store_true", default=None, help="fetch CORe50 into that folder if it is not there")
    add("--weights", metavar="FILE", help="pre-trained weights, instead of fetching the published ones")
    add("--device", metavar="auto|cpu|cuda[:n]")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change any key of the experiment; repeatable")
    add("--log-dir", default="logs", metavar="DIR", help="(default logs)")
    add("--max-batches", type=int, metavar="N", help="stop after N incremental batches; the same command without it goes on")
    add("--fresh", action="store_true", help="start over, ignoring a checkpoint (and deleting it)")
    add("--report", nargs="?", const="", metavar="LOGDIR", help="show the runs below LOGDIR (default: --log-dir), and stop")
    add("--markdown", action="store_true", help="the report as Markdown")
    add("--plot", metavar="FILE.png", help="draw the report's curves into FILE.png (needs matplotlib)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def overrides(args):
    """{key: value} of the configuration from the command line."""
    values = {key: getattr(args, key) for key in ("run", "seed", "data", "download", "weights", "device")}
    values = {key: value for key, value in values.items() if value is not None}
    for setting in args.set:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting} lacks a value: write --set KEY=VALUE")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"--set {setting} has a value that YAML cannot read") from error
    return values


def run_from(args):
    """What the command line asks for."""
    if args.list:
        for name, section in read_experiments(args.config).items():
            print(f"{name:<16}{section['comment']}")
        return
    if args.report is not None:
        print(report(args.report or args.log_dir, args.markdown, args.plot, read_experiments(args.config)["DEFAULT"]))
        return
    if args.markdown or args.plot:
        raise ConfigError("--markdown and --plot belong to --report: add it")
    if args.max_batches is not None and args.max_batches < 1:
        raise ConfigError(f"--max-batches is {args.max_batches}; it must be at least 1")
    if args.runs is not None and args.run is not None:
        raise ConfigError("--run and --runs exclude each other: --runs names several orders, --run one")
    orders = [{}] if args.runs is None else [{"run": run} for run in parse_runs(args.runs)]
    configs = [load_config(args.name, args.config, overrides(args) | order) for order in orders]
    if args.list_layers:
        list_layers(configs[0])
        return
    for config in configs:
        if args.runs is not None:
            print(f"order {config.run}:", flush=True)
        run_one(config, args)


def parse_runs(text):
    """The orders that --runs names, ascending: "0-4", "0,2,5" or both mixed."""
    spans = [re.fullmatch(r"\s*([0-9])(?:-([0-9]))?\s*", part) for part in text.split(",")]
    if not all(spans) or any(span[2] and span[2] < span[1] for span in spans):
        raise ConfigError(f"--runs is {text!r}; write orders from 0 to 9 as 0-4 or 0,2,5")
    return sorted({run for span in spans for run in range(int(span[1]), int(span[2] or span[1]) + 1)})


def run_one(config, args):
    """One run of an experiment, and its final figures in words."""
    if config.dataset == "demo" and config.rm_sz > 0:
        run_beside_naive(config, args)
        return
    results = run_experiment(config, args.name, args.log_dir, args.max_batches, args.fresh)
    n = len(results["rows"])
    print(f"{peak_memory()}curves: tensorboard --logdir {args.log_dir}")
    print(f"accuracy after {n} batches: {results['final_accuracy']:.2%} (mean over the {n} tests: "
          f"{results['mean_accuracy']:.2%})")


def peak_memory():
    """What this process took of the main memory at most, in words; nothing where the system does not tell."""
    if resource is None:
        return ""
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20      # macOS counts bytes, Linux KiB
    return f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GiB; "


def list_layers(config):
    """Prints what replay at each layer costs and saves: the papers' table of storage and computation."""
    size = {"core50": 128, "demo": 48}.get(config.dataset, config.image_size)
    net = empty(build_net, config.model, 1, "images", "none", config.width)
    print(f"{config.model}, images of {size}x{size}. Replay at a layer stores its output, as float32, and saves, for each\n"
          "replayed pattern, the computation up to it: a share of the multiply-adds of a pass through all layers.\n"
          f"{'no.':>4}  {'name':<32}{'output':<14}{'values':>9}{'bytes':>12}{'computation':>13}")
    for number, name, shape, share in layer_table(net, size):
        values = math.prod(shape)
        print(f"{number:>4}  {name:<32}{'x'.join(map(str, shape)):<14}{values:>9,}{4 * values:>12,}{share:>13.1%}")


def run_beside_naive(config, args):
    """The demo: the experiment and, batch by batch beside it, naive fine-tuning on the same stream; prints both curves."""
    start, naive = time.perf_counter(), replace(config, rm_sz=0, cwr_consolidation="none", reg_lambda=0.0)
    print("Objects come one by one, each seen from one session at a time; all are tested after every batch.\n"
          f"{'batch':>9}  {'AR1* with latent replay':<32}naive fine-tuning")
    with finishing_the_batch() as stopped:
        runs = [experiment(c, name, args.log_dir, args.max_batches, args.fresh, stopped)
                for c, name in ((config, args.name), (naive, f"{args.name}_naive"))]
        (rows, batches), (naive_rows, _) = map(next, runs)
        while True:
            n = min(len(rows), len(naive_rows))     # a kill may have left one of them behind the other
            ours, theirs = rows[n - 1]["test_accuracy"], naive_rows[n - 1]["test_accuracy"]
            if n % 5 == 1 or n == batches:
                print(f"{n:4}/{batches:<4}  {ours:6.1%} {'#' * round(24 * ours):<25}{theirs:6.1%} "
                      f"{'#' * round(24 * theirs)}", flush=True)
            if None in [next(run, None) for run, done in zip(runs, (rows, naive_rows)) if len(done) == n]:
                break
    print(f"After {time.perf_counter() - start:.0f} s, AR1* with latent replay knows {ours:.1%} of the test images, naive "
          f"fine-tuning {theirs:.1%}.")


BAD_INPUT = (ConfigError, DataError, WeightsError, ModelError, CheckpointError)
NO_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed", "Overflow when unpacking")


def main(argv=None):
    """Exit status: 0 done, 1 failure on the way, 2 bad input, 130 interrupted."""
    args = parse_arguments(argv)
    threading.excepthook = report_thread
    try:
        run_from(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        if isinstance(error, OSError):
            leave_broken_stdout()
        if not isinstance(error, BrokenPipeError):      # `| head` has all that it wants
            print(f"{Path(__file__).name}: {explain(error)}", file=sys.stderr)
        return getattr(error, "exit_status", 2 if isinstance(error, BAD_INPUT) or of_another_network(error) else 1)


def report_thread(failure):
    """For threading.excepthook: SummaryWriter's thread hands an OSError on to us, so it needs no traceback of its own."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def leave_broken_stdout():
    """If what we print cannot go anywhere (`| head`, a full disk), prevents a second complaint when the program ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def of_another_network(error):
    """Whether a checkpoint did not fit: torch has no type of its own for this error."""
    return isinstance(error, RuntimeError) and "loading state_dict" in str(error)


def explain(error):
    """One sentence: what is wrong and what to do."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(sign in text for sign in NO_MEMORY):
        return f"out of memory ({text:.100}); lower max_latents_gb with --set and run the same command again, or lower " \
               "rm_sz or mb_size and start over with --fresh"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({text}): the last checkpoint is kept; make room and run the same command again"
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
        return f"cannot use {os.fsdecode(error.filename)} ({error.strerror})"
    if isinstance(error, MissingData):
        return f"{text}, or add --download to this command; `python {Path(__file__).name} --name demo` runs right now, " \
               "without any download"
    if isinstance(error, WeightsError):
        return f"{text}; `python {Path(__file__).name} --name demo` runs right now, without any download"
    if of_another_network(error):
        return "the checkpoint is of another network, so the data or the program have changed since: put them back, " \
               "choose another --log-dir, or start over with --fresh"
    if isinstance(error, (*BAD_INPUT, TrainingError, OSError)):
        return text
    return f"unexpected {type(error).__name__} ({text:.300}): this is a bug; please report it with what --debug shows"


if __name__ == "__main__":
    sys.exit(main())
