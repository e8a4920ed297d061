"""Networks of torchvision.models as lists of layers that a SplitNet can cut at any of them.

    net = build_net("resnet18", num_classes=50, latent_layer_num="layer3.1", weights="IMAGENET1K_V1")

The rule, which 55 of torchvision's 80 networks fit: a network is its children one after the other, the last
of them a classifier of pooled features. Its layers are the blocks inside the other children, under
torchvision's names (features.0, layer1.0); a convolution begins a layer of its own, and the normalization and
activation behind it belong to it; pooling is a layer too, the last of which, "pool", returns (N,
num_features). Its classifier is dropped, its BatchNorm2d become BatchRenorm2D. Where the layers do not
compute what the network computes, it is refused.
"""
import difflib
import functools
import os
import re
import warnings

import torch
from torch import nn
from torchvision import models

from models import mobilenet
from models.batch_renorm import replace_batch_norm
from models.mobilenet import MobileNetV1, WeightsError, copy_weights, read_weights
from models.split_net import SplitNet

IMAGENET_MEAN = [0.485, 0.456, 0.406]       # as in utils.py; models/ can be copied without it


class ModelError(ValueError):
    """A network that does not exist, or that is no list of layers with batch normalization."""
    exit_status = 2


def build_net(model, num_classes, latent_layer_num, weights="none", width=1.0, **brn_params):
    """The SplitNet of a name: "mobilenet_v1", with `width` times its channels, or one of torchvision.models.

    weights: "none" (random), "imagenet" or a member of the network's weights enum, such as "IMAGENET1K_V2"
    (fetched once), or the path of its state_dict; for mobilenet_v1 see MobileNetV1. brn_params: keyword
    arguments of BatchRenorm2D.
    """
    if model == "mobilenet_v1":
        return MobileNetV1(num_classes, latent_layer_num, None if weights == "none" else weights, width,
                           **brn_params)

    layer_names(model)      # refuses a network that does not fit, before anything is fetched
    original = _get(model, weights)
    layers, num_features = split_layers(model, original)
    if not next(original.parameters()).is_meta:
        _check_same(model, original, layers)
    net = SplitNet(layers, num_features, num_classes, latent_layer_num)
    replace_batch_norm(net, **brn_params)
    return net.train()


# ---- layers ----

@functools.cache
def layer_names(model):
    """The names of a model's layers, in order; needs neither weights nor data."""
    try:
        return _layer_names(model)
    except ModelError as error:
        near = difflib.get_close_matches(model, ["mobilenet_v1", *models.list_models(module=models)], n=8)
        others = [name for name in near if _fits(name)][:2] or ["mobilenet_v1", "resnet18"]
        raise ModelError(f"{error}; use {' or '.join(others)}, for example") from None


def _layer_names(model):
    if model == "mobilenet_v1":
        return tuple(mobilenet.LAYER_NAMES)
    layers, _ = split_layers(model, empty(_get, model))
    return tuple(layers)


def _fits(model):
    try:
        return bool(_layer_names(model))
    except ModelError:
        return False


def empty(build, *args):
    """build(*args) on torch's meta device, without memory for weights, where that is possible."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build(*args)
        except NotImplementedError:     # RegNet computes its widths with tensors
            return build(*args)


def split_layers(model, net):
    """({layer name: module}, num_features) of a torchvision network; ModelError where it does not fit."""
    *body, (_, classifier) = net.named_children()
    if not any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
        raise ModelError(f"{model} has no BatchNorm2d for Batch Renormalization to replace")

    first = next((m for m in classifier.modules() if not isinstance(m, (nn.Sequential, nn.Dropout))), None)
    pool = nn.AdaptiveAvgPool2d(1)
    if isinstance(body[-1][1], nn.AdaptiveAvgPool2d):
        _, pool = body.pop()
    other_pools_or_lists = any(isinstance(m, (nn.AdaptiveAvgPool2d, nn.ModuleList)) for _, m in body)
    if not isinstance(first, nn.Linear) or other_pools_or_lists:
        raise ModelError(f"{model} is not a list of layers with a classifier of pooled features behind it")

    layers = {}
    for name, module in [part for child in body for part in _parts(*child)]:
        begins_layer = list(module.children()) or isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d))
        if begins_layer or not layers:
            layer = layers[name] = nn.Sequential(module)
        else:
            layer.append(module)
    preactivated = isinstance(module, nn.BatchNorm2d)   # DenseNet applies its last ReLU outside its modules
    layers["pool"] = nn.Sequential(*[nn.ReLU()] * preactivated, pool, nn.Flatten())
    return layers, first.in_features


def _parts(name, module):
    """(name, module) of the blocks inside containers, in order."""
    container = isinstance(module, nn.Sequential) and (
        type(module) is nn.Sequential or all(list(child.children()) for child in module))
    parts = []
    if container:
        for key, child in module.named_children():
            parts += _parts(f"{name}.{key}", child)
    return parts or [(name, module)]


@torch.no_grad()
def _check_same(model, net, layers):
    """Raises unless the layers give, bit by bit, what the network's own classifier is given."""
    given = []
    x = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    classifier = list(net.children())[-1]
    with classifier.register_forward_pre_hook(lambda _, args: given.append(args[0])):
        net.eval()(x)
    if not torch.equal(nn.Sequential(*layers.values()).eval()(x), given[0]):
        raise ModelError(f"{model} computes more than its layers one after the other")


# ---- weights ----

def _get(model, weights="none"):
    """The torchvision network of a name, with its weights."""
    if model not in models.list_models(module=models):
        raise ModelError(f"there is no network {model!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # of networks that are about to be refused
        if weights == "none":
            return models.get_model(model, weights=None)

        members = models.get_model_weights(model).__members__
        if any(list(member.transforms().mean) != IMAGENET_MEAN for member in members.values()):
            raise WeightsError(f"the weights of {model} expect images of another normalization than this "
                               "program's: use weights none")
        if weights == "imagenet":
            weights = "DEFAULT"
        if weights in members:
            return _fetch(model, members[weights])
        if os.path.isfile(weights):
            return load_state(models.get_model(model, weights=None), model, weights)

    near = difflib.get_close_matches(weights, members, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise WeightsError(f"{model} has no weights {weights!r}, nor is there such a file: weights can be none, "
                       f"imagenet, {', '.join(members)} or the path of its state_dict{hint}")


def _fetch(model, member):
    try:
        return models.get_model(model, weights=member)
    except Exception as error:      # no connection, a file of another hash, or one damaged in the cache
        raise WeightsError(f"cannot fetch the weights {member.name} of {model} ({error}): download "
                           f"{member.url} by other means and give its path with --weights FILE") from error


def load_state(net, model, path):
    """The torchvision network `net` with the weights of a state_dict file; its classifier is left alone."""
    state = read_weights(path)
    classifier = list(net.named_children())[-1][0]
    own = {key: value for key, value in net.state_dict().items()
           if not key.startswith(f"{classifier}.") and not key.endswith("num_batches_tracked")}
    for key in [key for key in state if key not in own]:    # DenseNet files have names of before torch 0.4
        state[re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", key)] = state.pop(key)

    copy_weights(state, own, path, than=f" than {model}")
    return net
