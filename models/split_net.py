"""A network cut in two at its latent layer, for Latent Replay (arXiv 1912.01100).

    images -> lat_features -> latents -> end_features -> (N, num_features) -> output -> (N, num_classes)
                                ^ latents replayed from the memory join here

Layers are numbered from 0; layer -1, "images", stands before the first one. Usable alone: copy this file.
"""
import difflib
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

IMAGES = -1     # the "layer" before the first one: latent replay there is native replay of images


class LayerError(ValueError):
    """A layer number or name that the network does not have."""


class SplitNet(nn.Module):
    """A sequence of named layers split at the latent layer, with a linear head without bias.

    layers: {name: module}, in order; the last one must return (N, num_features).
    latent_layer_num: number (-1 to len(layers) - 1) or name of the last layer of `lat_features`; "images" is
    -1.
    """

    def __init__(self, layers, num_features, num_classes, latent_layer_num):
        super().__init__()
        self.layer_names = list(layers)
        self.latent_layer_num = self.layer_number(latent_layer_num)
        self.frozen_layer_num = IMAGES      # layers 0 .. frozen_layer_num are frozen
        self.moving = False                 # whether their moving averages move all the same
        self.carried_layer_num = None       # of `carry`
        self.bf16 = False                   # True: layers above the latent one compute under autocast
        self.bf16 = False                   # True: layers above the latent one compute under autocast

        items = list(layers.items())
        cut = self.latent_layer_num + 1
        self.lat_features = _sequential(items[:cut])
        self.end_features = _sequential(items[cut:])
        self.output = nn.Linear(num_features, num_classes, bias=False)

    def forward(self, x, latent_input=None, return_lat_acts=False):
        """Class scores of images and, behind them, of replayed latents.

        x: float (n, 3, H, W), preprocessed images; latent_input: float (r, *latent shape) or None.
        Returns scores (n + r, num_classes); with return_lat_acts also the latents of x alone, (n, *latent
        shape).
        """
        latents = self.lat_features(x)                                  # (n, *latent shape)
        joined = latents if latent_input is None else torch.cat((latents, latent_input))
        scores = self.classify(joined)                                  # (n + r, num_classes)
        return (scores, latents) if return_lat_acts else scores

    def classify(self, latents):
        """Class scores (N, num_classes) of latents (N, *latent shape)."""
        if self.carried_layer_num is not None:
            latents = latents[:, :self.output.in_features]
        if not self.bf16:
            return self.output(self.end_features(latents))

        with torch.autocast(latents.device.type, torch.bfloat16):
            features = self.end_features(latents)
        return self.output(features.to(self.output.weight.dtype))

    @property
    def layers(self):
        """All layers below the head, in order."""
        return [*self.lat_features, *self.end_features]

    def layer_number(self, layer):
        """The number of a layer given by number, by name or as "latent"; LayerError if there is none."""
        return self.latent_layer_num if layer == "latent" else layer_number(self.layer_names, layer)

    def example_latent(self, height, width=None):
        """Zeros (1, *latent shape) with shape, dtype, device and memory format of the latent of an image.

        height, width: of the image in pixels; width=None: a square one.
        """
        like = self.output.weight
        x = torch.zeros((1, 3, height, width or height), dtype=like.dtype, device=like.device)
        with _evaluating(self):     # statistics must not move
            return torch.zeros_like(self.lat_features(x.to(memory_format=torch.channels_last)))

    def carry(self, layer, centre=False):
        """Lets latents carry the outputs of a lower layer (number or name) behind their own values.

        For a classifier beside the network whose features lie below the latent layer. Latents (N, C) become
        (N, C + D), D the channels of that layer, averaged over the map, or with `centre` over the middle half
        of its height and width; `classify` takes the first C. ValueError unless the latent layer is the last
        one and `layer` lies below it.
        """
        number = self.layer_number(layer)
        if len(self.end_features) or not IMAGES < number < self.latent_layer_num:
            raise ValueError(f"the layer {layer!r} lies below the latent one, whose outputs are all that is "
                             "at hand: choose the latent layer or one above it, or make the last layer the "
                             "latent one, which can carry another")
        self.carried_layer_num = number
        self.lat_features = Carrying(self.lat_features[:number + 1], self.lat_features[number + 1:], centre)

    # ---- freezing ----

    def freeze_below(self, layer, convs="all", moving=False):
        """Freezes layers 0 .. `layer` (number or name), it included: no gradients, evaluation mode.

        Layers above become trainable; of their convolutions, with convs="pointwise", those of 1x1 alone.
        moving=True leaves the normalization of frozen layers in training mode. Returns the number of frozen
        parameters.
        """
        self.frozen_layer_num = self.layer_number(layer)
        self.moving = moving
        for i, module in enumerate(self.layers):
            module.requires_grad_(i > self.frozen_layer_num)
            for conv in module.modules():
                if convs == "pointwise" and isinstance(conv, nn.Conv2d) and max(conv.kernel_size) > 1:
                    conv.weight.requires_grad_(False)
        self.train(self.training)
        return sum(p.numel() for module in self.layers for p in module.parameters() if not p.requires_grad)

    def train(self, mode=True):
        """As nn.Module.train, but frozen layers stay in evaluation mode, unless their averages move."""
        super().train(mode)
        for module in self.layers[:self.frozen_layer_num + 1]:
            module.train(mode and self.moving)
        return self

    def copy_up_to(self, layer):
        """{key: copy} of weights and statistics of the layers 0 .. `layer` (number or name)."""
        state = nn.ModuleList(self.layers[:self.layer_number(layer) + 1]).state_dict()
        return {key: value.clone() for key, value in state.items()}

    def check_unchanged(self, copy):
        """AssertionError unless weights and statistics still are, bit by bit, what copy_up_to copied."""
        state = nn.ModuleList(self.layers).state_dict()
        for key, value in copy.items():
            if not torch.equal(state[key], value):
                raise AssertionError(f"the frozen {key} has changed during the run: this is a bug, please "
                                     "report it")


class Carrying(nn.Module):
    """upper(lower(x)), (N, C), and behind it what lower(x) is on average over the map, or over its middle:
    (N, C + D)."""

    def __init__(self, lower, upper, centre):
        super().__init__()
        self.lower = lower
        self.upper = upper
        self.centre = centre

    def __iter__(self):
        return iter([*self.lower, *self.upper])

    def forward(self, x):
        below = self.lower(x)                                           # (N, D, H, W)
        above = self.upper(below)
        if self.centre:
            height, width = below.shape[2:]
            top, left = height // 4, width // 4
            below = below[:, :, top:height - top, left:width - left]
        return torch.cat((above, below.flatten(2).mean(2)), 1)

    def fold(self, fold_brn):
        """As batch_renorm.fold_brn, which calls it."""
        return Carrying(fold_brn(self.lower), fold_brn(self.upper), self.centre).eval()


def _sequential(items):
    sequential = nn.Sequential()
    for name, module in items:
        key = name.replace(".", "_")
        while hasattr(sequential, key):     # "a.b" beside "a_b", or the name of a method
            key += "_"
        sequential.add_module(key, module)
    return sequential


@contextmanager
def _evaluating(net):
    # as utils.evaluating, which a file that can be copied alone cannot import
    modes = [(m, m.training) for m in net.modules()]
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def layer_table(net, image_size):
    """[(number, name, shape of one latent, share of the multiply-adds up to there), ...], "images" first.

    net: a SplitNet; on the meta device nothing is computed. image_size: height and width in pixels. The share
    is 1 at the last layer: the head is left out.
    """
    x = torch.empty((1, 3, image_size, image_size), device=net.output.weight.device)
    rows = [(IMAGES, "images", tuple(x.shape[1:]), 0)]
    with _evaluating(net), FlopCounterMode(display=False) as counter:
        for number, (name, layer) in enumerate(zip(net.layer_names, net.layers)):
            x = layer(x)
            rows.append((number, name, tuple(x.shape[1:]), counter.get_total_flops()))

    total = counter.get_total_flops()
    return [(*row, flops / total) for *row, flops in rows]


def layer_number(names, layer):
    """Number of `layer` (an int or a name) among `names`; LayerError says which ones there are."""
    if layer == "images":
        return IMAGES
    if isinstance(layer, str) and layer in names:
        return names.index(layer)
    if isinstance(layer, int) and not isinstance(layer, bool) and IMAGES <= layer < len(names):
        return layer

    near = difflib.get_close_matches(str(layer), ["images", *names], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise LayerError(f"no layer {layer!r}: layers are -1 ('images') to {len(names) - 1} ({names[-1]!r}), or "
                     f"their names ({', '.join(names[:3])}, ... {names[-1]}){hint}")
