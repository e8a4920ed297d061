"""Which layer's outputs serve streaming linear discriminant analysis best: a search on training images alone.

    python benchmarks/slda_layers.py standin_79_slda --data core50_standin --layers conv5_5/sep conv5_6/sep pool6

The batches of the stream, less batch 0, are dealt to three parts. Each part in turn is tested with the statistics of all
that is not in it; so an object is tested in sessions in which it was not learned, and the test images are never looked at.
Prints the mean accuracy for each layer, with and without the root of its pooled outputs, and for each shrinkage; then the
best as settings for --set.
"""
import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.command_line import explain, parse_setting
from lab.config import load_config
from lab.data import open_stream
from lab.ranks import pick_device
from methods.statistics import Pooled, StreamingLDA
from models.batch_renorm import fold_brn
from models.torchvision_nets import build_net
from utils import preprocess

PARTS = 3


@torch.no_grad()
def pooled_outputs(config, layers, device):
    """([{layer: features (n, channels)} a batch], [labels (n,) a batch]) of the stream's batches, on the CPU."""
    stream = open_stream(config)
    net = build_net(config.model, stream.num_classes, config.latent_layer_num, config.weights, config.width).to(device)
    numbers = {net.layer_number(layer): layer for layer in layers}
    stages = [fold_brn(layer).to(memory_format=torch.channels_last) for layer in net.layers[:max(numbers) + 1]]
    features, labels, pooled = [], [], Pooled()
    for images, y in tqdm(stream, "encoding", unit="batch", disable=None):
        chunks = {layer: [] for layer in layers}
        for k in range(0, len(images), 32):
            x = preprocess(images[k:k + 32], device)
            for number, stage in enumerate(stages):
                x = stage(x)
                if number in numbers:
                    chunks[numbers[number]].append(pooled(x).cpu())
        features.append({layer: torch.cat(parts) for layer, parts in chunks.items()})
        labels.append(torch.as_tensor(y))
    return features, labels


def held_out_accuracy(features, labels, classes, root, shrinkage):
    """Mean accuracy (0..1) over the parts. features: [(n, channels) a batch]; labels: [(n,) a batch]; batch 0 is never held
    out, and of what is held out, only classes that the rest knows count."""
    pooled, accuracies = Pooled(root), []
    for part in range(PARTS):
        held = [i for i in range(1, len(labels)) if i % PARTS == part]
        rest = [i for i in range(len(labels)) if i not in held]
        head = StreamingLDA(nn.Linear(features[0].shape[1], classes).requires_grad_(False), shrinkage)
        head.update(pooled(torch.cat([features[i] for i in rest])), torch.cat([labels[i] for i in rest]))
        x, y = torch.cat([features[i] for i in held]), torch.cat([labels[i] for i in held])
        known = head.past_j[y] > 0
        accuracies.append((head.linear(pooled(x[known])).argmax(1) == y[known]).double().mean().item())
    return sum(accuracies) / PARTS


def main(argv=None):
    """Returns the exit status: 0 done, 2 bad input, 1 failure on the way, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", metavar="SECTION", help="section of the configuration file: its data and network")
    add("--layers", nargs="+", default=["conv5_5/sep", "conv5_6/dw", "conv5_6/sep", "conv6/dw", "pool6"], metavar="LAYER")
    add("--shrinkages", nargs="+", type=float, default=[1e-4, 1e-3, 1e-2], metavar="E")
    add("--data", metavar="DIR")
    add("--weights", metavar="FILE")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change any key of the section; repeatable")
    add("--config", default=str(ROOT / "params.cfg"), metavar="FILE")
    args = parser.parse_args(argv)
    try:
        changes = {key: value for key, value in (("data", args.data), ("weights", args.weights)) if value is not None}
        config = load_config(args.name, args.config, dict(map(parse_setting, args.set)) | changes)
        features, labels = pooled_outputs(config, args.layers, pick_device(config.device))
        classes, found = int(torch.cat(labels).max()) + 1, {}
        print("| layer | root | " + " | ".join(f"shrinkage {e:g}" for e in args.shrinkages) + " |")
        print("|---|---" + "|---" * len(args.shrinkages) + "|")
        for layer in args.layers:
            for root in (False, True):
                row = {(layer, root, e): held_out_accuracy([f[layer] for f in features], labels, classes, root, e)
                       for e in args.shrinkages}
                found |= row
                cells = [layer, "yes" if root else "no", *(f"{100 * a:.1f}" for a in row.values())]
                print("| " + " | ".join(cells) + " |", flush=True)
        layer, root, e = max(found, key=found.get)
        print(f"\nbest: --set latent_layer_num={layer} --set slda_root={str(root).lower()} --set slda_shrinkage={e:g}")
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"{parser.prog}: {explain(error)}", file=sys.stderr)
        return getattr(error, "exit_status", 1)


if __name__ == "__main__":
    sys.exit(main())
