"""AR1* with Latent Replay on CORe50 NICv2-391: the experiment of arXiv 1912.01100, from one command.

    python ar1star_lat_replay.py                          the published experiment (needs CORe50, see README)
    python ar1star_lat_replay.py --list                   every experiment of params.cfg
    python ar1star_lat_replay.py --name ar1star --seed 1 --set rm_sz=500

A stream of small batches, each of one class in one session, is learned one after the other: SGD on the layers above the
latent one, on mini-batches that join the batch's latents with latents replayed from a memory; Batch Renormalization;
CWR* consolidation of the head; Synaptic Intelligence if reg_lambda > 0. After every batch all 50 classes are tested.
"""
import argparse
import math
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from tqdm import tqdm

from config import ConfigError, load_config, read_experiments
from data_loader import CORE50, DataError
from demo_data import DemoStream, FolderStream
from models.batch_renorm import brn_layers, set_brn_params
from models.mobilenet import LAYER_NAMES, MobileNetV1, WeightsError
from utils import (CheckpointError, CWRHead, Encoder, ReplayMemory, RunFolder, SynapticIntelligence, TrainStep, evaluate,
                   generator, minibatches, trainable_conv_weights)


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
    _, first, later = config.check_layers(LAYER_NAMES)
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
        net = MobileNetV1(num_classes, config.latent_layer_num, None if config.weights == "none" else config.weights,
                          config.width).to(device)
        self.net = net.to(memory_format=torch.channels_last) if config.fast else net
        for brn in brn_layers(net):
            brn.fused = config.fast
        self.first, self.later = phases(config)
        self.pretrained = {k: v.clone() for k, v in self._frozen_from_the_start().items()}
        self.enter(self.first)
        self.head = CWRHead(net.output, config.cwr_consolidation)
        self.memory = ReplayMemory(config.rm_sz, like=self.test[:1].detach())

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
        rows.append(record(folder, learner, rows, steps, len(train_y), test, clock.take()))
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
    steps = train_batch(learner, latents, labels, phase.epochs, generator(seed, i, "shuffle"))
    head.consolidate()
    if i == 0:
        learner.enter(learner.later)
    memory.update(latents, labels, i, generator(seed, i, "memory"))
    clock.lap("train")
    return steps


def record(folder, learner, rows, steps, n_train, test, seconds):
    """Writes one batch's line of results.jsonl and its curves, and returns the line. rows: those of earlier batches."""
    i, first_step = len(rows), rows[-1]["train_steps"] if rows else 0
    losses, corrects, sizes = (t.double().cpu() for t in steps)
    if not losses.isfinite().all():
        raise TrainingError(f"the training loss became {losses[~losses.isfinite()][0]:g} in batch {i}: the last checkpoint "
                            f"is kept; lower {'init_lr' if i == 0 else 'inc_lr'} and start over with --fresh")
    row = {"batch": i, "test_accuracy": test["accuracy"], "test_loss": test["loss"],
           "train_accuracy": (corrects.sum() / sizes.sum()).item(),
           "train_loss": ((losses * sizes).sum() / sizes.sum()).item(),
           "n_train": n_train, "classes_seen": int((learner.head.past_j > 0).sum()), "memory_size": len(learner.memory),
           "train_steps": first_step + len(losses)}
    row |= {f"seconds_{part}": round(value, 4) for part, value in seconds.items()}
    folder.write_row(row)
    for k, (loss, accuracy) in enumerate(zip(losses.tolist(), (corrects / sizes).tolist()), first_step):
        folder.board.add_scalar("train_loss", loss, k)
        folder.board.add_scalar("train_accuracy", accuracy, k)
    folder.board.add_scalar("test_loss", test["loss"], i)
    folder.board.add_scalar("test_accuracy", test["accuracy"], i)
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
        print("\nstopping after this batch; press Ctrl-C again to stop at once", file=sys.stderr)

    try:
        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:      # not in the main thread: signals go elsewhere
        before = {}
    try:
        yield stopped
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
    add("--run", type=int, metavar="N", help="order of the batches, 0-9")
    add("--seed", type=int, metavar="N", help="seed of everything random")
    add("--data", metavar="DIR", help="folder of the data set")
    add("--weights", metavar="FILE", help="pre-trained weights, instead of fetching the published ones")
    add("--device", metavar="auto|cpu|cuda[:n]")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change any key of the experiment; repeatable")
    add("--log-dir", default="logs", metavar="DIR", help="(default logs)")
    add("--max-batches", type=int, metavar="N", help="stop after N incremental batches; the same command without it goes on")
    add("--fresh", action="store_true", help="start over, ignoring a checkpoint (and deleting it)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def overrides(args):
    """{key: value} of the configuration from the command line."""
    values = {key: getattr(args, key) for key in ("run", "seed", "data", "weights", "device")}
    values = {key: value for key, value in values.items() if value is not None}
    for setting in args.set:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting} lacks a value: write --set KEY=VALUE")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"--set {setting} has a value that YAML cannot read") from error
    return values


def run_from(args):
    """What the command line asks for."""
    if args.list:
        for name, section in read_experiments(args.config).items():
            print(f"{name:<16}{section['comment']}")
        return
    if args.max_batches is not None and args.max_batches < 1:
        raise ConfigError(f"--max-batches is {args.max_batches}; it must be at least 1")
    config = load_config(args.name, args.config, overrides(args))
    if config.dataset == "demo" and config.rm_sz > 0:
        run_beside_naive(config, args)
        return
    results = run_experiment(config, args.name, args.log_dir, args.max_batches, args.fresh)
    n = len(results["rows"])
    print(f"curves: tensorboard --logdir {args.log_dir}")
    print(f"accuracy after {n} batches: {results['final_accuracy']:.2%} (mean over the {n} tests: "
          f"{results['mean_accuracy']:.2%})")


def run_beside_naive(config, args):
    """The demo: the experiment and, batch by batch beside it, naive fine-tuning on the same stream; prints both curves."""
    naive = replace(config, rm_sz=0, cwr_consolidation="none", reg_lambda=0.0)
    print("Objects come one by one, each seen from one session at a time; all are tested after every batch.\n"
          f"{'batch':>9}  {'AR1* with latent replay':<32}naive fine-tuning")
    with finishing_the_batch() as stopped:
        pair = (experiment(c, name, args.log_dir, args.max_batches, args.fresh, stopped)
                for c, name in ((config, args.name), (naive, f"{args.name}_naive")))
        for (rows, batches), (naive_rows, _) in zip(*pair, strict=True):
            ours, theirs = rows[-1]["test_accuracy"], naive_rows[-1]["test_accuracy"]
            if len(rows) % 5 == 1 or len(rows) == batches:
                print(f"{len(rows):4}/{batches:<4}  {ours:6.1%} {'#' * round(24 * ours):<25}{theirs:6.1%} "
                      f"{'#' * round(24 * theirs)}", flush=True)
    print(f"AR1* with latent replay ends at {ours:.1%} of the test images, naive fine-tuning at {theirs:.1%}: "
          f"replaying {config.rm_sz} stored latents keeps what earlier batches taught.")


BAD_INPUT = (ConfigError, DataError, WeightsError, CheckpointError)


def main(argv=None):
    """Exit status: 0 done, 1 failure on the way, 2 bad input, 130 interrupted."""
    args = parse_arguments(argv)
    try:
        run_from(args)
        return 0
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        if not isinstance(error, (*BAD_INPUT, TrainingError, torch.cuda.OutOfMemoryError, MemoryError, OSError)):
            raise
        print(f"{Path(__file__).name}: {explain(error)}", file=sys.stderr)
        return 2 if isinstance(error, BAD_INPUT) else 1


def explain(error):
    """One sentence: what is wrong and what to do."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return f"out of memory ({str(error).splitlines()[0] if str(error) else 'no details'}); lower rm_sz, mb_size or " \
               "max_latents_gb with --set, and run the same command again"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
