"""Are latents right with other networks? Prints the table of docs/results/networks.md.

For networks of torchvision and, where it is installed, of timm: the largest difference between latents as a
Learner's encoder makes them and as the network's own layers do, as a share of the largest latent, at a layer
in the middle and at the last one; and how far a network's own output moves when its BatchNorm2d become
BatchRenorm2D. Weights are random, statistics those of the images, so that nothing need be fetched.
"""
import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torchvision import models

from harness.encoder import Encoder
from models.batch_renorm import replace_batch_norm
from models.split_net import SplitNet
from models.torchvision_nets import split_layers
from utils import preprocess

TORCHVISION = [
    "resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2",
    "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "efficientnet_b1",
    "efficientnet_v2_s", "densenet121", "densenet169", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0",
    "regnet_x_400mf", "regnet_y_400mf", "regnet_y_800mf", "mnasnet0_5", "mnasnet1_0",
    "vgg11_bn", "vgg13_bn", "vgg16_bn"]
TIMM = ["resnet18", "mobilenetv2_100", "efficientnet_b0"]
SIZE = 96       # height and width of the images, in pixels


def timm_layers(net):
    """({layer name: module}, num_features) of a timm network that is its children one after the other."""
    layers = {}
    for name, child in net.named_children():
        if isinstance(child, nn.Sequential):
            layers |= {f"{name}.{key}": block for key, block in child.named_children()}
        elif child is not net.get_classifier():
            layers[name] = child
    return layers, net.num_features


def build(library, name):
    """(network with random weights, its layers, its number of features)."""
    if library == "torchvision":
        net = models.get_model(name, weights=None)
        return net, *split_layers(name, net)
    import timm
    net = timm.create_model(name)
    return net, *timm_layers(net)


@torch.no_grad()
def adapt_statistics(net, x):
    """Sets the moving averages of a network to the statistics of the images x."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    net.train()
    net(x)
    net.eval()


@torch.no_grad()
def largest_differences(library, name, images):
    """(share by which latents differ at most, share by which the output differs with BatchRenorm2D)."""
    torch.manual_seed(0)
    net, layers, num_features = build(library, name)
    x = preprocess(images)
    adapt_statistics(net, x)
    renormalized = copy.deepcopy(net)
    replace_batch_norm(renormalized)
    outputs = share(renormalized(x), net(x))

    shares = []
    for latent in (len(layers) // 2, len(layers) - 1):
        split = SplitNet(copy.deepcopy(layers), num_features, 10, latent)
        replace_batch_norm(split)
        split.freeze_below("latent")
        split.to(memory_format=torch.channels_last)
        encoder = Encoder(split, "cpu")
        latents = encoder(images)
        if not isinstance(latents, torch.Tensor):
            raise AssertionError(f"{library}'s {name} was not encoded by the faster copy")
        shares.append(share(latents, split.lat_features(x)))
    return max(shares), outputs


def share(found, expected):
    """The largest difference as a share of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def main():
    """Prints the table, a row a network."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, SIZE, SIZE, 3), dtype=torch.uint8, generator=rng)
    print("| library | network | latents | output |\n|---|---|---|---|")
    for library, names in (("torchvision", TORCHVISION), ("timm", TIMM)):
        for name in names:
            latents, output = largest_differences(library, name, images)
            print(f"| {library} | `{name}` | {latents:.0e} | {output:.0e} |", flush=True)


if __name__ == "__main__":
    main()
