"""From a configuration to the pieces of a learner: its phases, head, memory and Synaptic Intelligence.

Uses lab.config, methods.papers, models.batch_renorm, models.torchvision_nets, torch, utils.
"""
import math

from torch import nn

from lab.config import ConfigError
from methods.papers import LearningRateSI, PapersHead, PapersMemory, Ramp, pass_again
from methods.papers import minibatches as papers_minibatches
from models.batch_renorm import brn_layers, set_brn_params
from models.torchvision_nets import layer_names
from utils import CWRHead, ReplayMemory, SynapticIntelligence, minibatches, trainable_conv_weights


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
    """{"head", "memory", "si", "minibatches"}: what ar1star_lat_replay.Learner takes beside a network and its phases.

    net: a SplitNet on its device, whose head gets a bias where the papers' does; image_size: (height, width) in pixels.
    """
    parts, (first, later) = config.parts(), phases(config)
    return {"si": _si(config, net, later["frozen_layer"]), "head": _head(config, net, parts),
            "memory": _memory(config, net, image_size, parts, first["brn"], later["brn"]),
            "minibatches": papers_minibatches if "minibatches" in parts else minibatches}


def _head(config, net, parts):
    pad_to = config.mb_size if "counts" in parts and config.rm_sz == 0 else None
    if "bias" in parts:
        net.output = nn.Linear(net.output.in_features, net.output.out_features, device=net.output.weight.device)
    if "bias" in parts or pad_to:
        return PapersHead(net.output, config.cwr_consolidation, pad_to)
    return CWRHead(net.output, config.cwr_consolidation)


def _memory(config, net, image_size, parts, first, later):
    like = net.example_latent(*image_size)
    if "minibatches" not in parts:
        return ReplayMemory(config.rm_sz, like)

    def last_pass(latents, rng):
        set_brn_params(net, **first | {"r_max": Ramp.R_MAX, "d_max": Ramp.D_MAX})
        latents = pass_again(net, latents, config.mb_size, rng)
        set_brn_params(net, **later)
        return latents

    ageing = "moving" in parts and brn_layers(net.lat_features)
    return PapersMemory(config.rm_sz, like, config.mb_size, last_pass if ageing else None)


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
