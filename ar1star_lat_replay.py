"""AR1* with Latent Replay on CORe50 NICv2-391: the experiment of arXiv 1912.01100, from one command.

    python ar1star_lat_replay.py                    the published experiment (needs CORe50, see README)
    python ar1star_lat_replay.py --name demo        needs no data: 54 to 84 %, fine-tuning 2 to 18 %
    python ar1star_lat_replay.py --name ar1star --seed 1 --set rm_sz=500

NICv2-391 takes 26 s on an NVIDIA H200 and 50 minutes on 2 CPU cores with AMX, reading images not counted.
The published PyTorch program reports about 77 %; this one has not been run on CORe50 yet.

Small batches, here of one class in one session each, are learned one after the other: SGD on the layers above
the latent one, on mini-batches that join the batch's latents with latents replayed from a memory; Batch
Renormalization; CWR* consolidation of the head; Synaptic Intelligence if reg_lambda > 0. After every batch
all 50 classes are tested.

To be read from `run`, the loop over the batches, to `Learner.learn`, one batch, `train_batch`, its
mini-batches, and `train_step`, one step. `Learner.enter` sets what differs between batch 0 and the others.
"""
import sys

if sys.version_info < (3, 10):
    sys.exit("this program needs Python 3.10 or newer, and this is Python %d.%d" % sys.version_info[:2])

import os

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))     # python -I leaves it out
    from harness.console import begin_imports
    begin_imports()         # from here on Ctrl-C ends the program without a traceback
    from harness.cli import answer_without_torch
    answer_without_torch()  # --help, --list, --report and mistakes end here; importing torch takes seconds

import copy
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data_loader import CORE50
from harness import cli, console, printing
from harness.checkpoint import RunFolder, load_run, run_path
from harness.config import ConfigError
from harness.console import end_imports, errors_as_sentences, finishing_the_batch, leaving_at_once, say
from harness.encoder import Clock, Encoder, TestSet, pick_device, precision_on, set_up_kernels
from harness.errors import PROGRAM
from harness.records import check_losses, record
from models import mobilenet
from models.batch_renorm import brn_layers, set_brn_params
from utils import (
    CWRHead,
    ReplayMemory,
    SynapticIntelligence,
    as_images,
    as_labels,
    copied,
    generator,
    minibatches,
    parameter_groups,
    predict,
    resized,
    scores,
    trainable_conv_weights,
)


class Phase(NamedTuple):
    """What differs between batch 0 and the batches after it."""
    lr: float                               # learning rate
    epochs: int
    brn: dict                               # of Batch Renormalization, as set_brn_params takes it
    frozen_layer: int | str = "latent"      # layers up to this one are frozen
    head_lr_mult: float = 1.0               # the head learns this many times as fast as the rest
    convs: str = "all"                      # convolutions that learn: "all", or "pointwise", those of 1x1
    decay_all: bool = True                  # False: no weight decay of gamma and beta
    moving: bool = False                    # True: moving averages of frozen layers move
    after_step: Callable | None = None      # called after each step, as torch.optim's step hooks are


# as published for CORe50 NICv2-391
FIRST = Phase(
    lr=1e-3, epochs=4, brn={"momentum": 0.01, "max_r_max": 1.25, "max_d_max": 0.5, "inc_step": 4.1e-5})
LATER = Phase(
    lr=5e-5, epochs=4, brn={"momentum": 5e-5, "r_max": 1.25, "d_max": 0.5, "inc_step": 0.0})


# ---- the loop over the batches ----

def run(config, name="DEFAULT", log_dir="logs", max_batches=None, fresh=False, after_batch=None):
    """Runs the experiment of a Config, or continues it, in log_dir/name/run{run}_seed{seed}/.

    max_batches: how many batches are learned at most, those of an earlier command included; fresh: starts
    over; after_batch: called after each batch with the records so far and the number of batches in all.
    Returns {"rows": the lines of results.jsonl, "final_accuracy", "mean_accuracy" (over all tests): 0..1,
    "folder"}.
    """
    with finishing_the_batch() as stop:
        device = pick_device(config.device)
        path = run_path(config, name, log_dir)
        check_layers(config)        # an impossible layer is an error before any data is read
        stream = open_stream(config)

        with RunFolder(path, config, fresh, stream.identity()) as folder:
            rows = folder.state["rows"] if folder.state else []
            batches = min(max_batches or len(stream), len(stream))
            if len(rows) >= batches:
                say(f"{path}: finished, {len(rows)} of {len(stream)} batches learned; --fresh starts over")
                return results_of(rows, path)

            learner, test = start_or_continue(config, stream, folder, device)
            if rows:
                stream.start_batch += len(rows)
            stop.at_once = not rows     # before batch 0 is learned there is nothing to save

            for images, labels in stream:
                learner.clock.lap("read")
                steps = learner.learn(images, labels)       # losses, correct predictions, sizes
                result = test.evaluate(learner)
                learner.clock.lap("test")

                rows.append(record(folder, learner, rows, batches, steps, images, labels, result))
                last = len(rows) == batches or bool(stop)
                if last:
                    learner.check_frozen()
                state = {"rows": rows, "image_size": list(images.shape[1:3]), **learner.state_dict()}
                folder.save(state, force=last)
                stop.at_once = False
                if after_batch is not None:
                    after_batch(rows, batches)
                if last:
                    break
                learner.clock.take()    # the time that records and checkpoint took is not the next batch's

        if stop:
            then = "the same command continues from there" if len(rows) < batches else "this run is finished"
            raise KeyboardInterrupt(f"stopped after batch {len(rows)} of {batches}; {then}")
        return results_of(rows, path)


def start_or_continue(config, stream, folder, device):
    """(Learner, TestSet) of a run: new ones, or as the folder's checkpoint has them."""
    for note in stream.notes():
        say(note)
    if config.weights == "none" and config.freeze_below_layer not in ("images", -1):
        say(f"the layers up to {config.freeze_below_layer} are frozen at random values (weights: none): "
            "give weights, or set freeze_below_layer to images, so that batch 0 trains them")

    say("reading the test images")
    test = TestSet(*stream.get_test_set(config.test_stride))
    learner = build_learner(config, stream.first_classes, test.images.shape[1:3], device)
    folder.check_weights(learner.net)
    doing = "learning the large first batch"
    if folder.state:
        learner.load_state_dict(folder.state)
        doing = f"continuing after batch {learner.batches} of {len(stream)}"
    folder.begin()
    folder.state = None     # frees what the learner has copied

    say(f"encoding {len(test.labels):,} test images")
    test.encode(learner)
    say(doing)
    learner.clock.take()
    return learner, test


def results_of(rows, path):
    """What `run` returns of its records."""
    accuracies = [row["test_accuracy"] for row in rows]
    mean = sum(accuracies) / len(accuracies)
    return {"rows": rows, "final_accuracy": accuracies[-1], "mean_accuracy": mean, "folder": path}


# ---- one batch ----

class Learner:
    """AR1* with Latent Replay: a network that learns one batch of images after the other, Alg. 1 of [LR].

        net = MobileNetV1(50, "conv5_4/dw", weights="imagenet")
        head = CWRHead(net.output, "per_pattern")
        learner = Learner(net, head, ReplayMemory(1500, like=net.example_latent(128)))
        for images, labels in stream:           # uint8 (n, H, W, 3), int64 (n,)
            learner.learn(images, labels)
        classes = learner.predict(images)       # int64 (n,)
        scores = learner.scores(images)         # float32 (n, classes): scores.softmax(1) are probabilities

    net: a SplitNet on its device; first, later: the Phase of batch 0 and of the batches after it; mb_size:
    patterns in a mini-batch; momentum, l2: of SGD; seed: of everything random; fast: False computes as the
    method reads, several times slower; max_latents_gb: GiB that one set's latents may take before they are
    encoded when needed; mirror: True takes the mean latent of an image and its mirror image.

    The other arguments can be exchanged for your own, which must be able to do this (for a memory that the
    command line can name, see harness/variants.py):

    head            begin(new_y, memory_y) before training, consolidate() after it; linear, the nn.Linear;
                    past_j, int64 (classes,), above 0 for classes met; state_dict(), load_state_dict(state);
                    if labels beyond its rows may come: resize(classes, rng), rng for new weights
    memory          len(); x, its latents, indexed by an int64 tensor, also an empty one; y, batch: int64, the
                    labels and the batches they came in; update(latents, labels, i, rng) after training, where
                    latents may be anything that an int64 tensor indexes, and which leaves it as it was if it
                    raises; state_dict(), load_state_dict(state)
    si              as utils.SynapticIntelligence, on which one of your own is best built
    minibatches     (n, m, mb_size, rng, epochs, device) -> [(indices of new images, of patterns), ...],
                    equally many of each epoch
    training        what train_batch does, with the same arguments
    beside          classify(latents) in net's place; update(latents, labels); kept(), bring_back(kept);
                    resize(classes)
    """
    class_names = None      # these two: of a run's learner, as load_learner says
    image_size = None

    def __init__(self, net, head, memory, si=None, first=FIRST, later=LATER, *, minibatches=minibatches,
                 training=None, beside=None, mb_size=128, momentum=0.9, l2=5e-4, seed=0, fast=True,
                 max_latents_gb=4, mirror=False):
        self.net = net.to(memory_format=torch.channels_last) if fast else net
        self.head = head
        self.memory = memory
        self.si = SynapticIntelligence([], 0.0) if si is None else si
        self.first = first
        self.later = later
        self.minibatches = minibatches
        self.training = training
        self.beside = beside
        self.classify = net.classify if beside is None else beside.classify

        self.mb_size = mb_size
        self.momentum = momentum
        self.l2 = l2
        self.seed = seed
        self.fast = fast
        self.max_latents_bytes = int(max_latents_gb * 2**30)
        self.mirror = mirror
        self.device = net.output.weight.device
        self.on_gpu = fast and self.device.type == "cuda"
        self.clock = Clock(self.device)
        self.batches = 0        # learned so far

        for brn in brn_layers(net):
            brn.fused = fast
        if self.on_gpu:
            from harness import gpu
            gpu.use_kernels(net)
        self.encoder = None     # enter makes it
        self.frozen_at_start = self._copy_of_frozen_layers()
        self.enter(first)

    def enter(self, phase):
        """Before batch 0 and after it: freezes layers, sets Batch Renormalization, makes the optimizer."""
        net = self.net.train()
        net.freeze_below(phase.frozen_layer, phase.convs, phase.moving)
        lowest = 0 if phase.moving else net.frozen_layer_num + 1
        normalizing = torch.nn.ModuleList(net.layers[lowest:])
        if brn_layers(normalizing):
            set_brn_params(normalizing, **phase.brn)

        # kept where its latents were fixed already, so that the test images need not be encoded again
        if self.encoder is None or not self.encoder.latents_are_fixed:
            self.encoder = self._make_encoder(phase)

        groups = parameter_groups(net, phase.lr, self.l2, phase.head_lr_mult, phase.decay_all)
        self.optimizer = torch.optim.SGD(groups, phase.lr, self.momentum, fused=self.on_gpu or None)
        if phase.after_step is not None:
            self.optimizer.register_step_post_hook(phase.after_step)

        # what train_batch calls: train_step, or on a GPU a recording of it
        self.step = partial(train_step, net, self.optimizer, self.si)
        if self.on_gpu and self.encoder.latents_are_fixed and phase is self.later:
            from harness import gpu
            self.step = gpu.CapturedStep(self.step, self.optimizer, net, self.si)

    def _make_encoder(self, phase):
        arguments = self.net, self.device, self.fast, self.max_latents_bytes, self.mirror
        if phase.moving:
            from harness.variants import AgeingEncoder
            return AgeingEncoder(*arguments)
        return Encoder(*arguments)

    def learn(self, images, labels):
        """Learns one batch: uint8 RGB images (n, H, W, 3) and int64 labels (n,), or ValueError.

        Labels beyond the head's rows give it more. Returns what train_batch does. Seeds torch's global random
        generator. Whatever raises, Ctrl-C included, leaves the learner as it was; a loss that is no finite
        number raises TrainingError.
        """
        i = self.batches
        images = as_images(images)
        epochs = self.later.epochs if i else self.first.epochs      # `enter` has set the rest of the phase
        # (n, *latent shape): a tensor where the layers that make latents are frozen; else an EncodedOnDemand,
        # which passes images through the layers as they are then, with gradients, when it is indexed
        latents = self.encoder(images)
        self._check_latents(latents, images.shape[1:3])
        labels = as_labels(labels, len(images), self.net.output, grows=hasattr(self.head, "resize"))
        self.clock.lap("encode")

        with self._undone_on_error():
            self.resize(max(self.net.output.out_features, int(labels.max()) + 1))
            self.head.begin(labels, self.memory.y)      # CWR*: reload the rows of the classes present
            # of dropout, in networks that have any
            torch.manual_seed(generator(self.seed, i, "dropout").initial_seed())
            train = self.training or train_batch
            steps = train(self, latents, labels, epochs, generator(self.seed, i, "shuffle"))
            check_losses(steps[0], i)
            self.head.consolidate()

            if i == 0:
                self.enter(self.later)      # before the memory takes latents: those of layers as they stay
            if self.beside is not None:
                self.beside.update(latents, labels)
            self.memory.update(latents, labels, i, generator(self.seed, i, "memory"))
            self.batches += 1
        self.clock.lap("train")
        return steps

    def _check_latents(self, latents, size):
        """ValueError unless images of this (height, width) have latents such as the memory keeps."""
        if isinstance(latents, torch.Tensor):
            found = tuple(latents.shape[1:])
        elif len(self.memory):
            found = tuple(self.net.example_latent(*size).shape[1:])
        else:
            return      # where training stumbles over it, nothing is lost
        kept = tuple(self.memory.x[self.memory.y[:0]].shape[1:])
        if found != kept:
            raise ValueError(f"images of {size[0]}x{size[1]} pixels have latents of {found}, and the memory "
                             f"keeps {kept}: give images of the size that it was made for")

    @contextmanager
    def _undone_on_error(self):
        """Where what is done inside raises, the learner is as it was.

        The memory, which may be large, sees to itself and changes last: where it has taken in the batch, as
        an interruption may find it, the batch is learned.
        """
        batches = self.batches
        lowest = 0 if self.net.moving else self.net.frozen_layer_num + 1
        moving = torch.nn.ModuleList([*self.net.layers[lowest:], self.net.output])
        classes = self.net.output.out_features
        encoder = self.encoder
        before = copied({"moving": moving.state_dict(), **self._state_beside_layers()})
        try:
            yield
        except BaseException:       # Ctrl-C, too
            if (self.memory.batch == batches).any():
                self.batches = batches + 1
            else:
                self.batches = batches
                self.resize(classes)
                self.encoder = encoder
                self._take_over(before, self.later if batches else self.first)
                moving.load_state_dict(before["moving"])
            raise

    def predict(self, images):
        """The class of each of uint8 RGB images (n, H, W, 3): int64 (n,), on the CPU."""
        return predict(self.classify, self.encoder(images), len(images)).cpu()

    def scores(self, images):
        """Scores of all classes for uint8 RGB images (n, H, W, 3): float32 (n, classes), on the CPU.

        Their softmax are the probabilities; classes never met have scores, too.
        """
        return scores(self.classify, self.encoder(images), len(images)).cpu()

    def resize(self, classes):
        """Gives the head, and what belongs to it, rows for so many classes."""
        if classes == self.net.output.out_features:
            return
        self.head.resize(classes, generator(self.seed, self.batches, "head"))
        if self.beside is not None:
            self.beside.resize(classes)
        for parameter in self.net.output.parameters():
            momentum = self.optimizer.state.get(parameter, {})
            for name, buffer in momentum.items():
                if buffer is not None:
                    momentum[name] = resized(buffer, classes)

    def _copy_of_frozen_layers(self):
        return self.net.copy_up_to("images" if self.first.moving else self.first.frozen_layer)

    def check_frozen(self):
        """Raises unless what is frozen from batch 0 on, weights and statistics, is bit-equal to the start."""
        self.net.check_unchanged(self.frozen_at_start)

    def state_dict(self):
        """All that a checkpoint has to bring back after batch 0 or later."""
        return {"batches": self.batches, "net": self.net.state_dict(), "memory": self.memory.state_dict(),
                **self._state_beside_layers()}

    def _state_beside_layers(self):
        """Of what `_take_over` takes over."""
        state = {name: getattr(self, name).state_dict() for name in ("optimizer", "head", "si")}
        if self.beside is not None:
            state["beside"] = self.beside.kept()
        return state

    def _take_over(self, state, phase):
        """Enters a phase with a state of the optimizer, the head, si and what is beside the network."""
        self.enter(phase)
        optimizer = copy.deepcopy(state["optimizer"])       # or it would go on in the state's tensors
        for group in optimizer["param_groups"]:
            group["fused"] = self.optimizer.defaults["fused"]       # the state may come from another device
        self.optimizer.load_state_dict(optimizer)

        self.head.load_state_dict(state["head"])
        self.si.load_state_dict(state["si"])
        if self.beside is not None:
            self.beside.bring_back(state["beside"])

    def load_state_dict(self, state):
        """Brings back a state, frozen layers and number of classes included; the state itself is copied."""
        self.resize(len(state["net"]["output.weight"]))
        self.net.load_state_dict(state["net"])
        self.frozen_at_start = self._copy_of_frozen_layers()
        self.encoder = None     # the old one's latents are those of other weights
        self._take_over(state, self.later)
        self.memory.load_state_dict(state["memory"])
        self.batches = state["batches"]


# ---- its mini-batches, and one step ----

def train_batch(learner, latents, labels, epochs, rng):
    """Trains on one batch of n images and the replay memory.

    latents: (n, *latent shape), indexable; labels: int64 (n,), on the device. Returns, per step: loss,
    correct predictions, patterns; three 1-d tensors, of which the first two are still on the device.
    """
    memory = learner.memory
    plan = learner.minibatches(len(labels), len(memory), learner.mb_size, rng, epochs, labels.device)
    losses, corrects, sizes = [], [], []

    learner.si.begin_batch()
    for new, old in plan:
        x = torch.cat((latents[new], memory.x[old]))        # (mb_size, *latent shape)
        y = torch.cat((labels[new], memory.y[old]))         # (mb_size,)
        loss, correct = learner.step(x, y)
        losses.append(loss)
        corrects.append(correct)
        sizes.append(len(y))
    learner.si.end_batch()

    return torch.stack(losses), torch.stack(corrects), torch.tensor(sizes)


def train_step(net, optimizer, si, x, y):
    """One step of SGD on all layers that are not frozen: latents x (N, *latent shape), int64 labels y (N,).

    Where layers up to the latent one learn, too, x carries its graph. Returns (loss, correct predictions),
    scalars that stay on the device.
    """
    scores = net.classify(x)                                            # (N, classes)
    loss = F.cross_entropy(scores, y)
    optimizer.zero_grad()
    (loss + si.penalty()).backward()
    si.before_step()
    optimizer.step()
    si.after_step()
    return loss.detach(), (scores.detach().argmax(1) == y).sum()


# ---- from a configuration to a stream and a learner ----

def open_stream(config):
    """The data that a Config names: gives (images, labels) of one batch after the other."""
    start = config.start_batch
    if config.dataset == "demo":
        from streams.demo import DemoStream
        return DemoStream(config.seed, config.run, start_batch=start, cumulative=config.cumulative)
    if config.dataset == "folder":
        from streams.folder import FolderStream
        return FolderStream(config.data, config.image_size, start, config.cumulative)
    if config.dataset != "core50":
        from streams.torchvision_data import TorchvisionStream
        with leaving_at_once():     # it may be fetched first
            return TorchvisionStream(
                config.dataset, config.data, config.image_size, config.batches, config.units, config.run,
                config.held_out, config.download, start, config.cumulative)

    if config.download:
        from streams.download import fetch_missing
        with leaving_at_once():     # a download goes on from there the next time
            fetch_missing(config.data)
    return CORE50(config.data, config.preload, config.scenario, config.cumulative, config.run, start,
                  config.image_size)


def check_layers(config):
    """Raises ConfigError unless the layers that a Config names exist and can be frozen in that order."""
    if config.model == "mobilenet_v1":
        return config.check_layers(mobilenet.LAYER_NAMES)
    from models.torchvision_nets import layer_names
    return config.check_layers(layer_names(config.model))


def build_net(config, num_classes):
    """The network of a Config, split at its latent layer, on the CPU."""
    if config.model == "mobilenet_v1":
        weights = None if config.weights == "none" else config.weights
        return mobilenet.MobileNetV1(num_classes, config.latent_layer_num, weights, config.width)
    from models import torchvision_nets
    return torchvision_nets.build_net(config.model, num_classes, config.latent_layer_num, config.weights)


def build_learner(config, num_classes, image_size, device):
    """The learner of a Config, before it has learned anything. image_size: (height, width) in pixels."""
    torch.manual_seed(config.seed)
    config = precision_on(device, config)
    set_up_kernels(config.fast, config.matmul_precision)
    net = build_net(config, num_classes).to(device)
    net.bf16 = config.precision == "bf16"
    if config.method != "latent_replay":
        from harness.variants import ClosedFormLearner
        return ClosedFormLearner(config.method, net, config.max_latents_gb, config.slda_root,
                                 config.slda_shrinkage, config.mirror)

    r = config.max_r_max
    d = config.max_d_max
    first = Phase(
        lr=config.init_lr,
        epochs=config.init_train_ep,
        brn={"momentum": config.init_update_rate, "max_r_max": r, "max_d_max": d,
             "inc_step": config.inc_step},
        frozen_layer=config.freeze_below_layer,
    )
    later = Phase(
        lr=config.inc_lr,
        epochs=config.inc_train_ep,
        brn={"momentum": config.inc_update_rate, "r_max": r, "d_max": d, "inc_step": 0.0},
        frozen_layer=config.inc_freeze_below_layer,
        head_lr_mult=config.head_lr_mult,
        convs=config.inc_convs,
    )
    rule = minibatches
    if config.dataset not in ("core50", "demo"):    # of few images it would leave out half of the memory
        rule = partial(minibatches, whole=True)
    parts = {"first": first, "later": later, "minibatches": rule}
    if config.needs_variants():
        from harness.variants import exchanged_parts
        parts = exchanged_parts(config, net, image_size, first, later, train_batch, rule)

    # what no setting has exchanged is as published
    if "si" not in parts and config.reg_lambda > 0:
        parts["si"] = build_si(config, net, later)
    if "head" not in parts:
        parts["head"] = CWRHead(net.output, config.cwr_consolidation)
    if "memory" not in parts:
        parts["memory"] = ReplayMemory(config.rm_sz, like=net.example_latent(*image_size))

    return Learner(net, **parts, mb_size=config.mb_size, momentum=config.momentum, l2=config.l2,
                   seed=config.seed, fast=config.fast, max_latents_gb=config.max_latents_gb,
                   mirror=config.mirror)


def build_si(config, net, later):
    """AR1*: Synaptic Intelligence over the convolutions that learn after batch 0."""
    net.freeze_below(later.frozen_layer, later.convs)       # only to see which: Learner.enter sets it anew
    weights = trainable_conv_weights(net)
    if not weights:
        raise ConfigError("reg_lambda is above 0, but no convolution learns after batch 0: set it to 0, or "
                          "freeze less")
    min_f = 0.0 if config.reg_clip_negative else -float("inf")
    return SynapticIntelligence(weights, config.reg_lambda, config.si_c, min_f=min_f)


def load_learner(run_folder, device="auto"):
    """The Learner of a run, as its last checkpoint has it: ready to predict, and to learn further batches.

    run_folder: LOGDIR/EXPERIMENT/run{R}_seed{S}. The learner has two more attributes: class_names, a list, or
    None where classes are numbers, and image_size, the side in pixels of the square images that it learned.
    Raises CheckpointError where there is no usable checkpoint.
    """
    config, state = load_run(run_folder)
    config = replace(config, weights="none")        # the checkpoint holds them
    num_classes = len(state["head"]["past_j"])
    learner = build_learner(config, num_classes, state["image_size"], pick_device(device))
    learner.load_state_dict(state)
    learner.class_names = state["data"]["classes"]
    learner.image_size = state["image_size"][0]
    return learner


# ---- the command line ----

def run_and_print(config, args):
    """One run of the command line, and its final figures."""
    name = args.folder or args.name
    options = {"log_dir": args.log_dir, "max_batches": args.max_batches, "fresh": args.fresh}
    if config.dataset == "demo" and config.replays():
        run_demo(config, name, options)
        return

    with console.progress_bar() as advance:
        results = run(config, name, **options, after_batch=advance)
    printing.print_where_curves_are(args.log_dir)
    printing.print_results(results)


def run_demo(config, name, options):
    """The demo: plain fine-tuning, and then the method, as a table of both."""
    pick_device(config.device)      # an impossible device or layer is an error before anything is said
    check_layers(config)
    start = time.perf_counter()
    star = config.reg_lambda > 0 or config.si == "learning_rate"
    method = f"latent replay ({'AR1*' if star else 'AR1*free'})"
    naive = replace(config, rm_sz=0, rm_mb=0.0, slda_weight=0.0, cwr_consolidation="none", reg_lambda=0.0,
                    comment="fine-tuning without replay, beside the demo")

    say("first, plain fine-tuning on the same stream:")
    with console.progress_bar() as advance:
        beside = run(naive, f"{name}_naive", **options, after_batch=advance)
    results = run(config, name, **options, after_batch=printing.table_beside(method, beside["rows"]))
    printing.print_where_curves_are(options["log_dir"])
    printing.print_beside(method, results, beside, time.perf_counter() - start)


def predict_and_print(config, args):
    """What a run has learned to see in images of the command line; returns the exit status."""
    from harness.predict import print_classes

    path = run_path(config, args.folder or args.name, args.log_dir)
    if not (path / "checkpoint.pt").is_file():
        raise ConfigError(f"no run has learned anything in {path} yet: first run "
                          f"`{cli.command_of_run(config, args)}`")
    return print_classes(load_learner(path, config.device), args.predict, args.json)


def main(argv=None):
    """The command line. Returns the exit status: 0 done, 1 failure, 2 bad input, 130 interrupted."""
    console.safe_output()
    threading.excepthook = console.report_thread
    args = cli.parse_arguments(argv)
    stopped = "stopped" if args.predict else f"stopped; {console.CONTINUES}"
    with errors_as_sentences(PROGRAM, stopped, args.debug) as outcome:
        if not cli.answered(args):      # --list, --report
            end_imports()
            configs = cli.configurations(args)
            if args.list_layers:
                printing.print_layers(configs[0])
            elif args.predict:
                outcome.status = predict_and_print(configs[0], args)
            elif args.teach is not None:
                from teach.server import serve
                serve(configs[0], args.host, args.port)
            else:
                for config in cli.of_this_process(configs, args):
                    run_and_print(config, args)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
