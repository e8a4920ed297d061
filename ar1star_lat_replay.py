"""AR1* with Latent Replay on CORe50 NICv2-391: the experiment of arXiv 1912.01100, from one command.

    python ar1star_lat_replay.py                          the published experiment (needs CORe50, see README)
    python ar1star_lat_replay.py --name ar1star --seed 1 --set rm_sz=500

A stream of small batches, each of one class in one session, is learned one after the other: SGD on the layers above the
latent one, on mini-batches that join the batch's latents with latents replayed from a memory; Batch Renormalization;
CWR* consolidation of the head; Synaptic Intelligence if reg_lambda > 0. After every batch all 50 classes are tested.

To be read from `learn`, the loop over the batches, to `Learner.learn`, one batch, and `train_batch`, its mini-batches.

Uses lab.baselines, lab.command_line, lab.data, lab.fast, lab.pieces, lab.ranks, lab.record, lab.run_folder,
methods.until_flat, models.batch_renorm, models.torchvision_nets, torch, utils.
"""
import sys

if sys.version_info < (3, 10):
    sys.exit("this program needs Python 3.10 or newer, and this is Python %d.%d" % sys.version_info[:2])

import os

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))     # python -I and PYTHONSAFEPATH leave it out
    from lab.start import begin_imports
    begin_imports()         # they take seconds, in which Ctrl-C ends the program without a traceback
    from lab.command_line import answer_at_once
    answer_at_once()        # --help, --list, --report and mistakes need no torch

from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lab.baselines import StatisticsLearner
from lab.command_line import command_line
from lab.data import as_labels, identify, notes, open_stream
from lab.fast import CapturedStep, Encoder, TestSet, gather, restore_optimizer, set_up_kernels
from lab.pieces import phases, pieces
from lab.ranks import pick_device
from lab.record import Clock, Stop, finishing_the_batch, progress_bar, record, results_of, say
from lab.run_folder import RunFolder, load_run, run_path
from methods.until_flat import UntilFlat
from models.batch_renorm import brn_layers, set_brn_params
from models.torchvision_nets import build_net
from utils import SynapticIntelligence, generator, minibatches, parameter_groups, predict


class Phase(NamedTuple):
    """What differs between batch 0 and the batches after it."""
    lr: float
    epochs: int
    brn: dict                               # parameters of the Batch Renormalization layers, as set_brn_params takes them
    frozen_layer: int | str = "latent"      # layers up to this one are frozen
    head_lr_mult: float = 1.0               # the head learns this many times as fast as the rest
    convs: str = "all"                      # convolutions that learn: "all", or "pointwise", those of 1x1
    decay_all: bool = True                  # False: no weight decay of gamma and beta
    moving: bool = False                    # True: moving averages of frozen layers move
    ramp: type | None = None                # called with step and BRN layers; a step that sets their limits beforehand


# as published for CORe50 NICv2-391
FIRST = Phase(1e-3, 4, dict(momentum=0.01, max_r_max=1.25, max_d_max=0.5, inc_step=4.1e-5))
LATER = Phase(5e-5, 4, dict(momentum=5e-5, r_max=1.25, d_max=0.5, inc_step=0.0))


class Learner:
    """AR1* with Latent Replay: a network that learns one batch of images after the other, Alg. 1 of [LR].

        net = MobileNetV1(50, "conv5_4/dw", weights="imagenet")
        learner = Learner(net, CWRHead(net.output), ReplayMemory(1500, like=net.example_latent(128)))
        for images, labels in stream:           # uint8 (n, H, W, 3), int64 (n,)
            learner.learn(images, labels)
        classes = learner.predict(images)       # int64 (n,)

    net: a SplitNet on its device; head: CWRHead of net.output; memory: ReplayMemory of net's latents; si: None
    (AR1*free), or SynapticIntelligence over weights that stay trainable, listed after net.freeze_below (AR1*); first, later:
    the Phase of batch 0 and of the batches after it; train: instead of train_batch; minibatches: their rule; classify:
    latents to scores in the test, instead of net.classify; mb_size, momentum, l2: of SGD; fast: False computes as the method
    reads, several times slower; max_latents_gb: GiB that one set's latents may take before they are encoded when needed.
    """

    def __init__(self, net, head, memory, si=None, first=FIRST, later=LATER, *, train=None, minibatches=minibatches,
                 classify=None, mb_size=128, momentum=0.9, l2=5e-4, seed=0, fast=True, max_latents_gb=4):
        self.net = net.to(memory_format=torch.channels_last) if fast else net
        for brn in brn_layers(net):
            brn.fused = fast
        self.head, self.memory, self.first, self.later = head, memory, first, later
        self.si = SynapticIntelligence([], 0.0) if si is None else si
        self.train, self.minibatches, self.classify = train or train_batch, minibatches, classify or net.classify
        self.mb_size, self.momentum, self.l2, self.seed = mb_size, momentum, l2, seed
        self.fast, self.max_latents_gb, self.device = fast, max_latents_gb, net.output.weight.device
        self.batches, self.encoder, self.frozen = 0, None, self._frozen_from_the_start()     # batches: learned so far
        self.enter(first)

    def enter(self, phase):
        """Freezes the layers of a phase, sets the Batch Renormalization parameters and makes the optimizer."""
        net = self.net.train()
        net.freeze_below(phase.frozen_layer, phase.convs, phase.moving)
        normalizing = torch.nn.ModuleList(net.layers[0 if phase.moving else net.frozen_layer_num + 1:])
        if brn_layers(normalizing):
            set_brn_params(normalizing, **phase.brn)
        if self.encoder is None or not self.encoder.frozen:     # else latents that were made with it still hold
            self.encoder = Encoder(net, self.device, self.fast, int(self.max_latents_gb * 2**30))
        groups = parameter_groups(net, phase.lr, self.l2, phase.head_lr_mult, phase.decay_all)
        on_gpu = self.fast and self.device.type == "cuda"
        self.optimizer = torch.optim.SGD(groups, phase.lr, self.momentum, fused=on_gpu or None)
        self.step = partial(train_step, net, self.optimizer, self.si)
        if phase.ramp:
            self.step = phase.ramp(self.step, brn_layers(net))
        if on_gpu and self.encoder.frozen and phase is self.later:
            self.step = CapturedStep(self.step, self.optimizer, net, self.si)

    def learn(self, images, labels, lap=lambda part: None):
        """Learns one batch: uint8 RGB images (n, H, W, 3) and int64 labels (n,), or ValueError. Returns train_batch's.

        lap: called with "encode" and "train" when these parts are done. Seeds torch's global random generator.
        """
        i, phase = self.batches, self.later if self.batches else self.first
        latents, labels = self.encoder(images), as_labels(labels, len(images), self.net.output)
        lap("encode")
        self.head.begin(labels, self.memory.y)              # CWR*: reload the rows of the classes present
        torch.manual_seed(generator(self.seed, i, "dropout").initial_seed())    # of networks that have any
        steps = self.train(self, latents, labels, phase.epochs, generator(self.seed, i, "shuffle"))
        self.head.consolidate()
        if i == 0:
            self.enter(self.later)
        self.memory.update(latents, labels, i, generator(self.seed, i, "memory"))
        self.batches += 1
        lap("train")
        return steps

    def predict(self, images):
        """The class of each of uint8 RGB images (n, H, W, 3): int64 (n,), on the CPU. Learns nothing from them."""
        return predict(self.classify, self.encoder(images), len(images)).cpu()

    def _frozen_from_the_start(self):
        layer = "images" if self.first.moving else self.first.frozen_layer
        return {key: value.clone() for key, value in self.net.state_up_to(layer).items()}

    def check_frozen(self):
        """Raises unless all that is frozen from batch 0 on, weights and statistics, is bit-equal to what it was at first."""
        for key, value in self._frozen_from_the_start().items():
            if not torch.equal(value, self.frozen[key]):
                raise AssertionError(f"the frozen {key} has changed during the run: this is a bug, please report it")

    def state_dict(self):
        """All that a checkpoint has to bring back after batch 0 or later."""
        parts = {"net": self.net, "optimizer": self.optimizer, "head": self.head, "memory": self.memory, "si": self.si}
        return {"batches": self.batches} | {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state):
        """Brings back a state, frozen layers included; the state itself is copied."""
        self.net.load_state_dict(state["net"])
        self.frozen, self.encoder = self._frozen_from_the_start(), None
        self.enter(self.later)
        restore_optimizer(self.optimizer, state["optimizer"])
        for name in ("head", "memory", "si"):
            getattr(self, name).load_state_dict(state[name])
        self.batches = state["batches"]


def train_batch(learner, latents, labels, epochs, rng):
    """Trains on one batch of n images and the replay memory.

    latents: (n, *latent shape), indexable; labels: int64 (n,). Returns, per step: loss, correct predictions, patterns;
    three 1-d tensors, of which the first two are still on the device.
    """
    step, memory, si = learner.step, learner.memory, learner.si
    losses, corrects, sizes = [], [], []
    on_device = cache(lambda index: index.to(labels.device))        # epochs that repeat a mini-batch repeat its tensors
    plan = [(on_device(new), on_device(old))
            for new, old in learner.minibatches(len(labels), len(memory), learner.mb_size, rng, epochs)]
    si.begin_batch()
    for new, old in plan:
        x, y = gather(step, (latents, labels, new), (memory.x, memory.y, old))      # (mb_size, *latent shape), (mb_size,)
        loss, correct = step(x, y)
        losses.append(loss)
        corrects.append(correct)
        sizes.append(len(y))
    si.end_batch()
    return torch.stack(losses), torch.stack(corrects), torch.tensor(sizes)


def train_step(net, optimizer, si, x, y):
    """One step of SGD on the layers above the latent one: latents x (N, *latent shape), int64 labels y (N,).

    Returns (loss, correct predictions), scalars that stay on the device.
    """
    scores = net.classify(x)                                            # (N, classes)
    loss = F.cross_entropy(scores, y)
    optimizer.zero_grad()
    (loss + si.penalty()).backward()
    si.before_step()
    optimizer.step()
    si.after_step()
    return loss.detach(), (scores.detach().argmax(1) == y).sum()


def learn(learner, stream, test, folder, rows, batches, stop):
    """Learns the batches len(rows) .. batches - 1 and tests after each; appends their records to rows and yields."""
    clock = Clock(learner.device)
    stop.at_once = not rows
    for train_x, train_y in stream:
        clock.lap("read")
        steps = learner.learn(train_x, train_y, clock.lap)
        result = test(learner)
        clock.lap("test")
        rows.append(record(folder, learner, rows, batches, steps, train_x, train_y, result, clock.take()))
        last = len(rows) == batches or bool(stop)
        if last:
            learner.check_frozen()
        folder.save({"rows": rows, "image_size": list(train_x.shape[1:3]), **learner.state_dict()}, force=last)
        stop.at_once = False
        yield
        if last:
            break
        clock.take()        # the time that records, checkpoint and caller took is not the next batch's
    if len(rows) < batches:
        raise KeyboardInterrupt(f"stopped after batch {len(rows)} of {batches}; the same command continues from there")


# ---- from a configuration to a run ----

def build_learner(config, num_classes, image_size, device):
    """The learner that a Config describes, before it has learned anything. image_size: (height, width) in pixels."""
    torch.manual_seed(config.seed)
    set_up_kernels(config.fast, config.matmul_precision)
    net = build_net(config.model, num_classes, config.latent_layer_num, config.weights, config.width).to(device)
    if config.method != "latent_replay":
        return StatisticsLearner(config.method, net, config.max_latents_gb, config.slda_root, config.slda_shrinkage)
    first, later = (Phase(**phase) for phase in phases(config))
    return Learner(net, first=first, later=later, **pieces(config, net, image_size),
                   train=UntilFlat(train_batch, config.patience) if config.patience else train_batch,
                   mb_size=config.mb_size, momentum=config.momentum, l2=config.l2, seed=config.seed, fast=config.fast,
                   max_latents_gb=config.max_latents_gb)


def load_learner(run_folder, device="auto"):
    """The Learner of a run, as its last checkpoint has it: ready to predict, and to learn further batches.

    run_folder: LOGDIR/EXPERIMENT/run{R}_seed{S}. Raises CheckpointError where there is no usable checkpoint.
    """
    config, state = load_run(run_folder)        # which holds the weights
    learner = build_learner(replace(config, weights="none"), len(state["head"]["past_j"]), state["image_size"],
                            pick_device(device))
    learner.load_state_dict(state)
    return learner


def experiment(config, name, log_dir, max_batches=None, fresh=False, stop=None, say=lambda text: None):
    """run_experiment as a generator: (records of the batches learned so far, batches in all) after each batch.

    Yields once where there is nothing left to learn. Ends early, with a checkpoint and KeyboardInterrupt, when `stop` (a
    Stop) becomes true. say: called with a line on what is being done."""
    stop, device, path = Stop() if stop is None else stop, pick_device(config.device), run_path(config, name, log_dir)
    phases(config)      # impossible layers are an error before any data is touched
    stream = open_stream(config)
    folder = RunFolder(path, config, fresh, identify(stream))
    try:
        rows, batches = folder.state["rows"] if folder.state else [], min(max_batches or len(stream), len(stream))
        if len(rows) >= batches:
            say(f"{path}: finished, {len(rows)} of {len(stream)} batches are learned; --fresh starts over")
            yield rows, len(rows)
            return
        say("\n".join([*notes(stream, config), "reading the test images"]))
        test = TestSet(*stream.get_test_set(config.test_stride))
        learner = build_learner(config, stream.num_classes, test.images.shape[1:3], device)
        if rows:
            learner.load_state_dict({"batches": len(rows), "si": learner.si.state_dict()} | folder.state)
            stream = open_stream(config, len(rows))
        folder.begin()
        folder.state = None     # its tensors are the learner's now
        say(f"encoding {len(test.labels):,} test images")
        test.encode(learner)
        say(f"continuing after batch {len(rows)} of {len(rows) + len(stream)}" if rows else "learning the large first batch")
        for _ in learn(learner, stream, test, folder, rows, batches, stop):
            yield rows, batches
    finally:
        folder.close()


def run_experiment(config, name="DEFAULT", log_dir="logs", max_batches=None, fresh=False):
    """Runs the experiment of a Config, or continues it from its checkpoint, in log_dir/name/run{run}_seed{seed}/.

    Returns {"rows": the lines of results.jsonl, "final_accuracy", "mean_accuracy" (over all tests): 0..1, "folder"}."""
    with finishing_the_batch() as stop, progress_bar() as advance:
        for rows, batches in experiment(config, name, log_dir, max_batches, fresh, stop, say):
            advance(rows, batches)
    return results_of(rows, run_path(config, name, log_dir))


def main(argv=None):
    """The command line. Returns the exit status: 0 done, 1 failure on the way, 2 bad input, 130 interrupted."""
    return command_line(run_experiment, experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
