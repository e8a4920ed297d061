"""From a configuration to the pieces of a learner: its phases, head, memory and Synaptic Intelligence.

Uses lab.config, lab.record, methods.codecs, methods.memories, methods.papers, methods.second_opinion,
models.batch_renorm, models.torchvision_nets, torch, utils.
"""
import math

import torch
from torch import nn

from lab.config import ConfigError
from lab.record import n_bytes
from methods.codecs import Bytes, CompressedMemory, Half, ProductQuantizer
from methods.memories import BalancedMemory, part_of_memory
from methods.papers import LearningRateSI, PapersHead, PapersMemory, Ramp, pass_again
from methods.papers import minibatches as papers_minibatches
from methods.second_opinion import ObservedMemory, SecondOpinion
from models.batch_renorm import brn_layers, set_brn_params
from models.torchvision_nets import layer_names
from utils import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CWRHead,
    ReplayMemory,
    SynapticIntelligence,
    minibatches,
    trainable_conv_weights,
)


def phases(config):
    """What ar1star_lat_replay.Phase takes for batch 0 and for all later batches of a Config: two dicts.

    Raises ConfigError where the layers that they freeze are impossible.
    """
    _, first, later = config.check_layers(layer_names(config.model))
    parts, r, d = config.parts(), config.max_r_max, config.max_d_max
    average = {"average": "variance"} if "averages" in parts else {}
    growing = {"max_r_max": r, "max_d_max": d, "inc_step": config.inc_step}
    if "ramp" in parts:
        growing = {"r_max": 1.0, "d_max": 0.0, "inc_step": 0.0}
    fixed = {"r_max": r, "d_max": d, "inc_step": 0.0}
    both = {"moving": "moving" in parts, "decay_all": "decay" not in parts}
    return ({"lr": config.init_lr, "epochs": config.init_train_ep, "frozen_layer": first,
             "brn": {"momentum": config.init_update_rate, **growing, **average}, **both,
             "ramp": Ramp if "ramp" in parts else None},
            {"lr": config.inc_lr, "epochs": config.inc_train_ep, "frozen_layer": later,
             "brn": {"momentum": config.inc_update_rate, **fixed, **average}, **both,
             "head_lr_mult": config.head_lr_mult, "convs": config.inc_convs})


def pieces(config, net, image_size):
    """{"head", "memory", "si", "minibatches", "classify"}: what ar1star_lat_replay.Learner takes beside its network.

    net: a SplitNet on its device, whose head gets a bias where the papers' does; image_size: (height, width) in pixels.
    """
    parts, (first, later) = config.parts(), phases(config)
    rule = papers_minibatches if "minibatches" in parts else minibatches
    made = {"si": _si(config, net, later["frozen_layer"]), "head": _head(config, net, parts),
            "memory": _memory(config, net, image_size, parts, first["brn"], later["brn"]), "classify": net.classify,
            "minibatches": part_of_memory(config.replayed_per_epoch, rule) if config.replayed_per_epoch else rule}
    if config.slda_weight:
        layer = net.layer_names[-1] if config.slda_layer == "last" else config.slda_layer
        try:
            opinion = SecondOpinion(net, config.slda_weight, layer, config.slda_root, config.slda_shrinkage)
        except ValueError as error:
            raise ConfigError(f"slda_layer: {error}") from error
        made |= {"memory": ObservedMemory(made["memory"], opinion), "classify": opinion.forward}
    return made


def _head(config, net, parts):
    pad_to = config.mb_size if "counts" in parts and not config.replays() else None
    if "bias" in parts:
        net.output = nn.Linear(net.output.in_features, net.output.out_features, device=net.output.weight.device)
    if "bias" in parts or pad_to:
        return PapersHead(net.output, config.cwr_consolidation, pad_to)
    return CWRHead(net.output, config.cwr_consolidation)


def _memory(config, net, image_size, parts, first, later):
    like = net.example_latent(*image_size)
    rule, more = BalancedMemory if config.rm_policy == "balanced" else ReplayMemory, {}
    if "minibatches" in parts:

        def last_pass(latents, rng):
            set_brn_params(net, **first | {"r_max": Ramp.R_MAX, "d_max": Ramp.D_MAX})
            latents = pass_again(net, latents, config.mb_size, rng)
            set_brn_params(net, **later)
            return latents

        ageing = "moving" in parts and brn_layers(net.lat_features)
        rule, more = PapersMemory, {"mb_size": config.mb_size, "last_pass": last_pass if ageing else None}
    codec = _codec(config, net, like)
    if codec is None:
        return rule(_rm_sz(config, like), like, **more)
    return CompressedMemory(rule, _rm_sz(config, codec.example(like), codec.state_dict()), like, codec, **more)


def _codec(config, net, like):
    if config.rm_dtype == "pq":
        try:
            return ProductQuantizer(like, config.pq_codes)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if config.rm_dtype == "uint8":
        if net.latent_layer_num >= 0:
            return Bytes(like)
        mean, std = (torch.tensor(v, device=like.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return Bytes(like, -mean / std, 1 / (255 * std))    # images: exactly the values of their pixels
    return Half() if config.rm_dtype == "float16" else None


def _rm_sz(config, stored, kept_once=()):
    """rm_sz; or how many patterns, each `stored` and two int64 numbers, fit into rm_mb beside what a codec keeps once."""
    if config.rm_mb == 0:
        return config.rm_sz
    fixed, each = n_bytes(kept_once), n_bytes(stored) + 16
    if (patterns := int((config.rm_mb * 1e6 - fixed) // each)) < 1:
        raise ConfigError(f"rm_mb is {config.rm_mb:g}, and not one pattern fits into it: one takes {each:,} bytes"
                          f"{f', and its codebooks {fixed:,}' * (fixed > 0)}")
    return patterns


def _si(config, net, frozen_layer):
    """Over the convolutions that learn after batch 0: a weight frozen then cannot forget."""
    if config.si == "penalty" and config.reg_lambda == 0:
        return SynapticIntelligence([], 0.0)
    net.freeze_below(frozen_layer, config.inc_convs)
    weights = trainable_conv_weights(net)
    if not weights:
        what, off = ("reg_lambda is above 0", "0") if config.si == "penalty" else (f"si is {config.si}", "penalty")
        raise ConfigError(f"{what}, but no convolution learns after batch 0: set it to {off}, or freeze less")
    if config.si == "learning_rate":
        return LearningRateSI(weights, config.l2, config.si_c)
    return SynapticIntelligence(weights, config.reg_lambda, config.si_c,
                                min_f=0.0 if config.reg_clip_negative else -math.inf)
