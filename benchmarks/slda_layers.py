"""Which layer's outputs serve streaming linear discriminant analysis best: a search on training images alone.

    python benchmarks/slda_layers.py standin_79_slda --data core50_standin \\
        --layers conv5_6/sep conv5_4/sep+conv5_6/sep

The batches of the stream, less batch 0, are dealt to three parts. Each part in turn is tested with the
statistics of all that is not in it; so an object is tested in sessions in which it was not learned, and the
test images are never looked at. Prints the mean accuracy for each layer (with a + between them, outputs side
by side), with and without the root of its pooled outputs, and for each shrinkage; then the best,
as settings for --set where it is a single layer.
"""
import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ar1star_lat_replay import build_net, open_stream
from harness.cli import add_settings, overrides
from harness.config import load_config
from harness.console import errors_as_sentences
from harness.encoder import pick_device
from methods.slda import Pooled, StreamingLDA
from models.batch_renorm import fold_brn
from utils import preprocess

PARTS = 3
LAYERS = ["conv5_5/sep", "conv5_6/dw", "conv5_6/sep", "conv6/dw", "pool6"]


@torch.no_grad()
def pooled_outputs(config, stream, layers, device):
    """([{layer: features (n, channels)} a batch], [labels (n,) a batch]) of a stream, on the CPU."""
    net = build_net(config, num_classes=1).to(device)
    numbers = {name: net.layer_number(name) for layer in layers for name in layer.split("+")}
    highest = max(numbers.values())
    stages = [fold_brn(stage).to(memory_format=torch.channels_last) for stage in net.layers[:highest + 1]]
    pooled = Pooled()

    features = []
    labels = []
    for images, y in tqdm(stream, "encoding", unit="batch", disable=None):
        chunks = {number: [] for number in numbers.values()}
        for k in range(0, len(images), 32):
            x = preprocess(images[k:k + 32], device)
            for number, stage in enumerate(stages):
                x = stage(x)
                if number in chunks:
                    chunks[number].append(pooled(x).cpu())
        outputs = {name: torch.cat(chunks[number]) for name, number in numbers.items()}
        joined = {layer: torch.cat([outputs[name] for name in layer.split("+")], 1) for layer in layers}
        features.append(joined)
        labels.append(torch.as_tensor(y))
    return features, labels


def held_out_accuracies(features, labels, classes, root, shrinkages):
    """[mean accuracy (0..1) over the parts for each shrinkage].

    features: [(n, channels) a batch]; labels: [(n,) a batch]. Batch 0 is never held out, and of what is held
    out, only classes that the rest knows count.
    """
    pooled = Pooled(root)
    x = [pooled(f) for f in features]
    sums = [0.0] * len(shrinkages)
    for part in range(PARTS):
        held = [i for i in range(1, len(labels)) if i % PARTS == part]
        rest = [i for i in range(len(labels)) if i not in held]
        head = StreamingLDA(nn.Linear(x[0].shape[1], classes).requires_grad_(False))
        head.update(torch.cat([x[i] for i in rest]), torch.cat([labels[i] for i in rest]))

        held_x = torch.cat([x[i] for i in held])
        held_y = torch.cat([labels[i] for i in held])
        known = head.past_j[held_y] > 0
        statistics = head.state_dict()
        for k, shrinkage in enumerate(shrinkages):
            head.shrinkage = shrinkage
            head.load_state_dict(statistics)        # solves anew, with the same statistics
            right = head.linear(held_x[known]).argmax(1) == held_y[known]
            sums[k] += right.double().mean().item()
    return [total / PARTS for total in sums]


def search(args):
    """Prints the table and the best settings."""
    config = load_config(args.name, args.config, overrides(args))
    features, labels = pooled_outputs(config, open_stream(config), args.layers, pick_device(config.device))
    classes = int(torch.cat(labels).max()) + 1
    found = {}

    print("| layer | root | " + " | ".join(f"shrinkage {e:g}" for e in args.shrinkages) + " |")
    print("|---" * (2 + len(args.shrinkages)) + "|")
    for layer in args.layers:
        of_layer = [f[layer] for f in features]
        for root in (False, True):
            accuracies = held_out_accuracies(of_layer, labels, classes, root, args.shrinkages)
            for shrinkage, accuracy in zip(args.shrinkages, accuracies):
                found[layer, root, shrinkage] = accuracy
            cells = " | ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)
            print(f"| {layer} | {'yes' if root else 'no'} | {cells} |", flush=True)

    layer, root, shrinkage = max(found, key=found.get)
    place = f"{layer}, side by side:" if "+" in layer else f"--set latent_layer_num={layer}"
    print(f"\nbest: {place} --set slda_root={str(root).lower()} --set slda_shrinkage={shrinkage:g}")


def main(argv=None):
    """Returns the exit status: 0 done, 2 bad input, 1 failure on the way, 130 interrupted."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("name", metavar="SECTION", help="section of the configuration: its data and network")
    add("--layers", nargs="+", default=LAYERS, metavar="LAYER")
    add("--shrinkages", nargs="+", type=float, default=[1e-4, 1e-3, 1e-2], metavar="E")
    add_settings(parser)
    args = parser.parse_args(argv)
    with errors_as_sentences(parser.prog) as outcome:
        search(args)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
