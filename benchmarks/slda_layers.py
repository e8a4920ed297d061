"""Which layer's outputs serve streaming linear discriminant analysis best: a search on training images alone.

    python benchmarks/slda_layers.py standin_79_slda --data core50_standin --layers conv5_6/sep conv5_4/sep+conv5_6/sep

The batches of the stream, less batch 0, are dealt to three parts. Each part in turn is tested with the statistics of all
that is not in it; so an object is tested in sessions in which it was not learned, and the test images are never looked at.
Prints the mean accuracy for each layer (with a + between them, several layers' outputs side by side), with and without the
root of its pooled outputs, and for each shrinkage; then the best, as settings for --set where it is a single layer.
"""
import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.command_line import add_settings, overrides, status_of
from lab.config import load_config
from lab.data import open_stream
from lab.ranks import pick_device
from methods.statistics import Pooled, StreamingLDA
from models.batch_renorm import fold_brn
from models.torchvision_nets import build_net
from utils import preprocess

PARTS = 3


@torch.no_grad()
def pooled_outputs(config, stream, layers, device):
    """([{layer: features (n, channels)} a batch], [labels (n,) a batch]) of (images, labels) a batch, on the CPU."""
    net = build_net(config.model, 1, config.latent_layer_num, config.weights, config.width).to(device)
    numbers = {net.layer_number(layer): layer for layer in {part for joined in layers for part in joined.split("+")}}
    stages = [fold_brn(layer).to(memory_format=torch.channels_last) for layer in net.layers[:max(numbers) + 1]]
    features, labels, pooled = [], [], Pooled()
    for images, y in tqdm(stream, "encoding", unit="batch", disable=None):
        chunks = {layer: [] for layer in numbers.values()}
        for k in range(0, len(images), 32):
            x = preprocess(images[k:k + 32], device)
            for number, stage in enumerate(stages):
                x = stage(x)
                if number in numbers:
                    chunks[numbers[number]].append(pooled(x).cpu())
        whole = {layer: torch.cat(parts) for layer, parts in chunks.items()}
        features.append({joined: torch.cat([whole[layer] for layer in joined.split("+")], 1) for joined in layers})
        labels.append(torch.as_tensor(y))
    return features, labels


def held_out_accuracies(features, labels, classes, root, shrinkages):
    """Mean accuracy (0..1) over the parts for each shrinkage. features: [(n, channels) a batch]; labels: [(n,) a batch];
    batch 0 is never held out, and of what is held out, only classes that the rest knows count."""
    pooled, sums = Pooled(root), [0.0] * len(shrinkages)
    x = [pooled(f) for f in features]
    for part in range(PARTS):
        held = [i for i in range(1, len(labels)) if i % PARTS == part]
        rest = [i for i in range(len(labels)) if i not in held]
        head = StreamingLDA(nn.Linear(x[0].shape[1], classes).requires_grad_(False))
        head.update(torch.cat([x[i] for i in rest]), torch.cat([labels[i] for i in rest]))
        held_x, held_y = torch.cat([x[i] for i in held]), torch.cat([labels[i] for i in held])
        known, statistics = head.past_j[held_y] > 0, head.state_dict()
        for k, shrinkage in enumerate(shrinkages):
            head.shrinkage = shrinkage
            head.load_state_dict(statistics)        # solves anew; the statistics are the same for every shrinkage
            right = head.linear(held_x[known]).argmax(1) == held_y[known]
            sums[k] += right.double().mean().item()
    return [total / PARTS for total in sums]


def search(args):
    """Prints the table and the best settings."""
    config = load_config(args.name, args.config, overrides(args))
    features, labels = pooled_outputs(config, open_stream(config), args.layers, pick_device(config.device))
    classes, found = int(torch.cat(labels).max()) + 1, {}
    print("| layer | root | " + " | ".join(f"shrinkage {e:g}" for e in args.shrinkages) + " |")
    print("|---|---" + "|---" * len(args.shrinkages) + "|")
    for layer in args.layers:
        for root in (False, True):
            row = held_out_accuracies([f[layer] for f in features], labels, classes, root, args.shrinkages)
            found |= {(layer, root, e): accuracy for e, accuracy in zip(args.shrinkages, row)}
            cells = [layer, "yes" if root else "no", *(f"{100 * accuracy:.1f}" for accuracy in row)]
            print("| " + " | ".join(cells) + " |", flush=True)
    layer, root, e = max(found, key=found.get)
    place = f"{layer}, side by side:" if "+" in layer else f"--set latent_layer_num={layer}"
    print(f"\nbest: {place} --set slda_root={str(root).lower()} --set slda_shrinkage={e:g}")


def main(argv=None):
    """Returns the exit status: 0 done, 2 bad input, 1 failure on the way, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", metavar="SECTION", help="section of the configuration file: its data and network")
    add("--layers", nargs="+", default=["conv5_5/sep", "conv5_6/dw", "conv5_6/sep", "conv6/dw", "pool6"], metavar="LAYER")
    add("--shrinkages", nargs="+", type=float, default=[1e-4, 1e-3, 1e-2], metavar="E")
    add_settings(parser)
    args = parser.parse_args(argv)
    return status_of(parser.prog, lambda: search(args))


if __name__ == "__main__":
    sys.exit(main())
