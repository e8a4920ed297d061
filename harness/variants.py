"""What goes beyond the published program: the parts of a learner that settings exchange.

Imported only where a setting does. `exchanged_parts` gives those of a Learner; `ClosedFormLearner` stands in
place of one. What each part must be able to do is said in ar1star_lat_replay.Learner. A memory of your own is
one file in methods/, one line in MEMORIES, and its name among the choices of rm_policy in harness/config.py.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from harness.config import ConfigError
from harness.encoder import Clock, Encoder
from harness.records import n_bytes
from methods import papers
from methods.balanced_memory import BalancedMemory, EvenTraining
from methods.compressed_memory import Bytes, CompressedMemory, Half, ProductQuantizer, part_of_memory
from methods.early_stopping import EarlyStopping
from methods.slda import NearestClassMean, Pooled, SLDABeside, StreamingLDA
from models.batch_renorm import brn_layers, set_brn_params
from utils import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ReplayMemory,
    SynapticIntelligence,
    as_labels,
    predict,
    scores,
    trainable_conv_weights,
    undone_on_error,
)

MEMORIES = {"random": ReplayMemory, "balanced": BalancedMemory, "even": BalancedMemory}     # of rm_policy


def exchanged_parts(config, net, image_size, first, later, train_batch, rule):
    """{argument of Learner: what the settings put there}.

    net: a SplitNet on its device, whose head gets a bias where the papers' has one; image_size: (height,
    width) in pixels; first, later: the Phase of batch 0 and of the batches after it; train_batch: the
    script's; rule: of the mini-batches, where the papers' is not asked for.
    """
    papers_parts = config.parts()
    slda_layer = net.layer_names[-1] if config.slda_layer == "last" else config.slda_layer
    try:
        if config.slda_weight and net.layer_number(slda_layer) < net.latent_layer_num:
            net.carry(slda_layer, config.slda_centre)       # before the memory sees what a latent is
        elif config.slda_centre:
            raise ConfigError("slda_centre is for an slda_layer below the latent one: choose such a layer, "
                              "or set slda_centre to false")
    except ValueError as error:
        raise ConfigError(f"slda_layer: {error}") from error

    first, later = papers_phases(config, net, first, later)
    parts = {"first": first, "later": later}

    if config.si == "learning_rate":
        net.freeze_below(later.frozen_layer, later.convs)       # a weight that is fixed then cannot forget
        weights = trainable_conv_weights(net)
        if not weights:
            raise ConfigError("si is learning_rate, but no convolution learns after batch 0: set it to "
                              "penalty, or freeze less")
        parts["si"] = papers.LearningRateSI(weights, config.l2, config.si_c)

    pad_to = config.mb_size if "counts" in papers_parts and not config.replays() else None
    if "bias" in papers_parts:
        classes, features = net.output.weight.shape
        net.output = nn.Linear(features, classes, device=net.output.weight.device)
        if config.cwr_consolidation == "none":      # it learns from where Caffe's filler `msra` begins
            nn.init.kaiming_normal_(net.output.weight, nonlinearity="relu")     # std = sqrt(2 / features)
            nn.init.zeros_(net.output.bias)
    if "bias" in papers_parts or pad_to:
        parts["head"] = papers.PapersHead(net.output, config.cwr_consolidation, pad_to)

    parts["memory"] = make_memory(config, net, image_size, first, later)

    if "minibatches" in papers_parts:
        rule = papers.minibatches
    if config.replayed_per_epoch:
        rule = part_of_memory(config.replayed_per_epoch, rule)
    parts["minibatches"] = rule

    if config.rm_policy == "even":
        parts["training"] = train_batch = EvenTraining(train_batch)
    if config.patience:
        parts["training"] = EarlyStopping(train_batch, config.patience)
    if config.slda_weight:
        parts["beside"] = SLDABeside(net, config.slda_weight, slda_layer, config.slda_root,
                                     config.slda_shrinkage, config.slda_temperature)
    return parts


# ---- the papers' own programs ----

def papers_phases(config, net, first, later):
    """The two Phases as the parts of `follow` change them."""
    parts = config.parts()
    both = {"moving": "moving" in parts, "decay_all": "decay" not in parts}
    first = first._replace(**both)
    later = later._replace(**both)

    if "averages" in parts:
        first = first._replace(brn=first.brn | {"average": "variance"})
        later = later._replace(brn=later.brn | {"average": "variance"})
    if "ramp" in parts:
        fixed = {key: value for key, value in first.brn.items() if not key.startswith("max_")}
        first = first._replace(brn=fixed | {"r_max": 1.0, "d_max": 0.0, "inc_step": 0.0},
                               after_step=papers.Ramp(brn_layers(net)))
    return first, later


class AgeingEncoder(Encoder):
    """An Encoder for layers that are frozen but for their moving averages, so that an image's latent ages.

    What training has computed of an image first is what the memory stores.
    """

    def __call__(self, images):
        latents = super().__call__(images)
        learns = any(p.requires_grad for p in self.net.lat_features.parameters())
        return papers.FirstSeen(latents) if self.averages_move and not learns else latents


# ---- the memory ----

def make_memory(config, net, image_size, first, later):
    """The replay memory: which patterns it keeps, how many, and as what."""
    like = net.example_latent(*image_size)
    memory_class = MEMORIES[config.rm_policy]
    more = {}
    if "minibatches" in config.parts():
        memory_class = papers.PapersMemory
        more = {"mb_size": config.mb_size, "last_pass": None}
        if first.moving and brn_layers(net.lat_features):
            more["last_pass"] = partial(pass_once_more, config, net, first, later)

    codec = make_codec(config, net, like)
    if codec is None:
        return memory_class(capacity(config, like), like, **more)
    rm_sz = capacity(config, codec.example(like), codec.state_dict())
    return CompressedMemory(memory_class, rm_sz, like, codec, **more)


def pass_once_more(config, net, first, later, latents, rng):
    """The latents of batch 0 that the papers' program stores: of one more pass, with the settings of batch 0
    and the limits that its last step left, since the pass counts no steps."""
    set_brn_params(net, **first.brn)
    if first.after_step is not None:
        first.after_step.set_limits()
    latents = papers.pass_again(net, latents, config.mb_size, rng)
    set_brn_params(net, **later.brn)
    return latents


def make_codec(config, net, like):
    """How latents are stored in fewer bytes; None: as they are."""
    if config.rm_dtype == "float16":
        return Half()
    if config.rm_dtype == "pq":
        try:
            return ProductQuantizer(like, config.pq_codes)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if config.rm_dtype == "uint8":
        if net.latent_layer_num >= 0:
            return Bytes(like)
        mean = torch.tensor(IMAGENET_MEAN, device=like.device).view(3, 1, 1)
        std = torch.tensor(IMAGENET_STD, device=like.device).view(3, 1, 1)
        # of images: exactly the values of their pixels
        return Bytes(like, low=-mean / std, step=1 / (255 * std))
    return None


def capacity(config, stored, kept_once=()):
    """rm_sz; or how many patterns, `stored` and two int64 numbers each, fit into rm_mb beside `kept_once`."""
    if config.rm_mb == 0:
        return config.rm_sz
    fixed = n_bytes(kept_once)
    each = n_bytes(stored) + 16
    patterns = int((config.rm_mb * 1e6 - fixed) // each)
    if patterns < 1:
        codebooks = f", and its codebooks {fixed:,}" if fixed else ""
        raise ConfigError(f"rm_mb is {config.rm_mb:g}, and not one pattern fits into it: one takes {each:,} "
                          f"bytes{codebooks}")
    return patterns


# ---- closed-form statistics: beside the network, and in its place ----

class ClosedFormLearner:
    """SLDA or the nearest class mean on the pooled outputs of a network's latent layer, which never change.

    method: "slda" or "ncm"; net: a SplitNet; root, shrinkage: as methods.slda takes them; mirror: as Encoder
    does. Its methods are those of the script's Learner.
    """
    class_names = None      # these two: of a run's learner, as load_learner says
    image_size = None

    def __init__(self, method, net, max_latents_gb=4, root=False, shrinkage=1e-4, mirror=False):
        self.net = net
        self.device = net.output.weight.device
        self.clock = Clock(self.device)
        self.batches = 0

        net.output = nn.Linear(net.example_latent(64).shape[1], net.output.out_features, device=self.device,
                               dtype=net.output.weight.dtype)
        net.train()
        net.freeze_below("latent")
        self.frozen_at_start = net.copy_up_to("latent")
        net.to(memory_format=torch.channels_last)
        self.max_latents_bytes = int(max_latents_gb * 2**30)
        self.encoder = Encoder(net, self.device, max_bytes=self.max_latents_bytes, mirror=mirror)

        self.head = StreamingLDA(net.output, shrinkage) if method == "slda" else NearestClassMean(net.output)
        self.pooled = Pooled(root)
        self.classify = nn.Sequential(self.pooled, net.output)

        # what a record asks of a learner, and this one does not have
        self.si = SynapticIntelligence([], 0.0)
        self.memory = ReplayMemory(0, like=self.head.mean[:1])
        self.beside = None

    @torch.no_grad()
    def learn(self, images, labels):
        """Learns one batch: uint8 RGB images (n, H, W, 3) and whole numbers (n,) as labels, or ValueError.

        Returns, as of one step: loss, correct predictions, patterns; of the batch itself, after it was
        learned.
        """
        features = self.pooled(self.encoder(images)[:])
        labels = as_labels(labels, len(images), self.net.output, grows=True)
        self.clock.lap("encode")

        with undone_on_error(self.head):
            if labels.max() >= self.net.output.out_features:
                self.head.resize(int(labels.max()) + 1)
            self.head.update(features, labels)
            scores = self.net.output(features)
        self.batches += 1
        self.clock.lap("train")
        correct = (scores.argmax(1) == labels).sum()
        return F.cross_entropy(scores, labels)[None], correct[None], torch.tensor([len(labels)])

    def predict(self, images):
        """The class of each of uint8 RGB images (n, H, W, 3): int64 (n,), on the CPU."""
        return predict(self.classify, self.encoder(images), len(images)).cpu()

    def scores(self, images):
        """Scores of all classes for uint8 RGB images (n, H, W, 3): float32 (n, classes), on the CPU.

        Their softmax are the probabilities; classes never met have scores, too.
        """
        return scores(self.classify, self.encoder(images), len(images)).cpu()

    def check_frozen(self):
        """Raises unless the network is bit-equal to what it was at first."""
        self.net.check_unchanged(self.frozen_at_start)

    def state_dict(self):
        """All that a checkpoint has to bring back."""
        return {"batches": self.batches, "net": self.net.state_dict(), "head": self.head.state_dict()}

    def load_state_dict(self, state):
        """Brings back a state, the number of classes included."""
        self.head.resize(len(state["head"]["past_j"]))
        self.net.load_state_dict(state["net"])
        self.frozen_at_start = self.net.copy_up_to("latent")
        self.encoder = Encoder(self.net, self.device, max_bytes=self.max_latents_bytes,
                               mirror=self.encoder.mirror)
        self.head.load_state_dict(state["head"])
        self.batches = state["batches"]
