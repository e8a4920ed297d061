"""A network cut in two at its latent layer: the part that Latent Replay (arXiv 1912.01100) freezes, and the part it trains.

    images -> lat_features -> latents -> end_features -> (N, num_features) -> output -> (N, num_classes)
                                ^ latents replayed from the memory join here

Layers are numbered from 0; layer -1, "images", stands before the first one.

Uses torch.
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
    latent_layer_num: number (-1 to len(layers) - 1) or name of the last layer of `lat_features`; "images" is -1.
    """

    def __init__(self, layers, num_features, num_classes, latent_layer_num):
        super().__init__()
        self.layer_names = list(layers)
        self.latent_layer_num = self.layer_number(latent_layer_num)
        self.frozen_layer_num = IMAGES      # layers 0 .. frozen_layer_num are frozen
        self.moving = False                 # whether their moving averages move all the same
        items, cut = list(layers.items()), self.latent_layer_num + 1
        self.lat_features = _sequential(items[:cut])
        self.end_features = _sequential(items[cut:])
        self.output = nn.Linear(num_features, num_classes, bias=False)

    def forward(self, x, latent_input=None, return_lat_acts=False):
        """Class scores of images and, behind them, of replayed latents.

        x: float (n, 3, H, W), preprocessed images; latent_input: float (r, *latent shape) or None.
        Returns scores (n + r, num_classes); with return_lat_acts also the latents of x alone, (n, *latent shape).
        """
        latents = self.lat_features(x)
        joined = latents if latent_input is None else torch.cat((latents, latent_input))
        scores = self.classify(joined)
        return (scores, latents) if return_lat_acts else scores

    def classify(self, latents):
        """Class scores (N, num_classes) of latents (N, *latent shape)."""
        return self.output(self.end_features(latents))

    @property
    def layers(self):
        """All layers below the head, in order."""
        return [*self.lat_features, *self.end_features]

    def layer_number(self, layer):
        """The number of a layer given by number or name, "latent" being the latent one; LayerError if there is none."""
        return self.latent_layer_num if layer == "latent" else layer_number(self.layer_names, layer)

    def state_up_to(self, layer):
        """The state_dict of the layers 0 .. `layer` (number or name): weights and statistics, not copied."""
        return nn.ModuleList(self.layers[:self.layer_number(layer) + 1]).state_dict()

    def example_latent(self, height, width=None):
        """Zeros like one latent of an image of that size in pixels: (1, *latent shape), type, device, memory format."""
        x = torch.zeros((1, 3, height, width or height), device=self.output.weight.device)
        with _evaluating(self):     # statistics must not move
            return torch.zeros_like(self.lat_features(x.to(memory_format=torch.channels_last)))

    def freeze_below(self, layer, convs="all", moving=False):
        """Freezes layers 0 .. `layer` (number or name): no gradients, normalization in evaluation mode for good.

        Layers above become trainable; of their convolutions, with convs="pointwise", those of 1x1 alone. moving=True leaves
        the normalization of frozen layers in training mode. Returns the number of frozen parameters.
        """
        self.frozen_layer_num, self.moving = self.layer_number(layer), moving
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


def _sequential(items):
    sequential = nn.Sequential()
    for name, module in items:
        sequential.add_module(name.replace(".", "_"), module)
    return sequential


@contextmanager
def _evaluating(net):
    modes = [(m, m.training) for m in net.modules()]
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def layer_table(net, image_size):
    """[(number, name, shape of one latent, share of the multiply-adds up to there), ...] of a SplitNet, "images" first.

    image_size: height and width in pixels. The share is 1 at the last layer: the head is left out. On the meta device
    nothing is computed.
    """
    x = torch.empty((1, 3, image_size, image_size), device=net.output.weight.device)
    rows = [(IMAGES, "images", tuple(x.shape[1:]), 0)]
    with _evaluating(net), FlopCounterMode(display=False) as counter:
        for number, (name, layer) in enumerate(zip(net.layer_names, net.layers)):
            x = layer(x)
            rows.append((number, name, tuple(x.shape[1:]), counter.get_total_flops()))
    return [(*row, flops / rows[-1][3]) for *row, flops in rows]


def layer_number(names, layer):
    """Number of `layer` (an int or a name) among `names`; "images" is -1. LayerError says which ones there are."""
    if isinstance(layer, str) and layer in ("images", *names):
        return [*names, "images"].index(layer) if layer != "images" else IMAGES
    if isinstance(layer, int) and not isinstance(layer, bool) and IMAGES <= layer < len(names):
        return layer
    near = difflib.get_close_matches(str(layer), ["images", *names], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise LayerError(f"no layer {layer!r}: layers are -1 ('images') to {len(names) - 1} ({names[-1]!r}), or their names "
                     f"({', '.join(names[:3])}, ... {names[-1]}){hint}")
