"""What a head alone, and statistics of features, can do beside SLDA: ideas that a learner may be built on, tried in minutes.

    python benchmarks/feature_ideas.py standin_79_slda_middle --data core50_standin --set run=1

No layer below the head learns, so each image becomes its pooled features once. The head learns by SGD, with CWR* (per_class)
and mini-batches as everywhere here; its features are standardized by the mean and deviation of batch 0. The ideas:

    stored    patterns from a replay memory of 500, the method as it is
    started   the same, and the row of a new class begins at the direction of its mean
    drawn     500 patterns drawn each batch from the statistics of SLDA, a normal distribution a class; none is stored

each on the last layer's features, and on those that the section's settings (latent_layer_num, slda_root) name. Prints the
accuracy at the end and the mean of all tests, for each learning rate, of the head alone and with the log-probabilities of
SLDA on the section's features added, and of that SLDA alone.
"""
import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from lab.command_line import add_settings, overrides, status_of
from lab.config import load_config
from lab.data import open_stream
from lab.ranks import pick_device
from methods.second_opinion import SecondOpinion
from methods.statistics import Pooled, StreamingLDA
from slda_layers import pooled_outputs
from utils import CWRHead, ReplayMemory, generator, minibatches

IDEAS = ("stored", "started", "drawn")
EPOCHS, MOMENTUM, L2, START = 4, 0.9, 5e-4, 0.05        # START: length of the row that a new class begins with


def drawn(lda, n, rng):
    """n patterns (n, features) and labels (n,), as many of each class met as that allows, from the class means and the one
    covariance that a StreamingLDA keeps."""
    met = (lda.past_j > 0).nonzero()[:, 0]
    y = met[torch.arange(n) % len(met)]
    root = torch.linalg.cholesky(lda.shrunk_covariance()).float()
    return lda.mean[y] + torch.randn((n, len(root)), generator=rng) @ root.T, y


@torch.no_grad()
def start_rows(head, x, y):
    """Rows of the classes that are new in this batch, x (n, features) and y (n,): the direction of their mean."""
    for j in y.unique():
        if head.past_j[j] == 0:
            head.linear.weight[j] = START * F.normalize(x[y == j].mean(0), dim=0)


def learn(idea, lr, batches, classes, patterns, mb_size, seed):
    """Yields the head, nn.Linear, after each batch of [(features, labels), ...]."""
    linear = nn.Linear(batches[0][0].shape[1], classes, bias=False)
    nn.init.zeros_(linear.weight)
    head, memory = CWRHead(linear), ReplayMemory(patterns, like=batches[0][0][:1])
    lda = StreamingLDA(nn.Linear(*linear.weight.shape[::-1]).requires_grad_(False), 1e-3)
    optimizer = torch.optim.SGD(linear.parameters(), lr, MOMENTUM, weight_decay=L2)
    for i, (x, y) in enumerate(batches):
        old_x, old_y = memory.x, memory.y
        if idea == "drawn" and i:
            old_x, old_y = drawn(lda, patterns, generator(seed, i, "drawn"))
        head.begin(y, old_y)
        if idea == "started":
            start_rows(head, x, y)
        for new, old in minibatches(len(y), len(old_y), mb_size, generator(seed, i, "shuffle"), EPOCHS):
            loss = F.cross_entropy(linear(torch.cat((x[new], old_x[old]))), torch.cat((y[new], old_y[old])))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        head.consolidate()
        if idea == "drawn":
            lda.update(x, y)
        else:
            memory.update(x, y, i, generator(seed, i, "memory"))
        yield linear


@torch.no_grad()
def opinions(batches, classes, test_x, shrinkage):
    """[log p (n, classes) of the test features after each batch] of SLDA on the batches' features."""
    lda = StreamingLDA(nn.Linear(test_x.shape[1], classes).requires_grad_(False), shrinkage)
    told = []
    for x, y in batches:
        lda.update(x, y)
        told.append(F.log_softmax(lda.linear(test_x), 1).clamp(min=SecondOpinion.LEAST))
    return told


def summary(scores, labels):
    """ "at the end / mean of all tests" of [scores (n, classes) a test], in percent."""
    values = [100 * (s.argmax(1) == labels).double().mean().item() for s in scores]
    return f"{values[-1]:.1f} / {statistics.fmean(values):.1f}"


def standardized(batches, test_x):
    """Both with mean 0 and deviation 1 a channel, as measured in batch 0."""
    first = batches[0][0]
    mean, deviation = first.mean(0), first.std(0) + 1e-3
    return [((x - mean) / deviation, y) for x, y in batches], (test_x - mean) / deviation


def try_all(args):
    """Prints the table."""
    config = load_config(args.name, args.config, overrides(args))
    stream, device, layers = open_stream(config), pick_device(config.device), ["pool6", config.latent_layer_num]
    features, labels = pooled_outputs(config, stream, layers, device)
    (test,), (test_y,) = pooled_outputs(config, [stream.get_test_set(config.test_stride)], layers, device)
    sources = {"pool6": ("pool6", False), "lower": (config.latent_layer_num, config.slda_root)}
    data = {name: ([(Pooled(root)(x[layer]), y) for x, y in zip(features, labels)], Pooled(root)(test[layer]))
            for name, (layer, root) in sources.items()}
    told = opinions(data["lower"][0], stream.num_classes, data["lower"][1], config.slda_shrinkage)
    print(f"SLDA alone on {layers[1]}: {summary(told, test_y)}\n\n| features | idea | " + " | ".join(
        f"{lr:g}{beside}" for lr in args.rates for beside in ("", ", SLDA beside it")) + " |")
    print("|---|---" + "|---" * 2 * len(args.rates) + "|")
    for name, (layer, _) in sources.items():
        batches, test_x = standardized(*data[name])
        for idea in IDEAS:
            cells = []
            for lr in tqdm(args.rates, f"{layer}, {idea}", leave=False, disable=None):
                with_gradient = learn(idea, lr, batches, stream.num_classes, args.patterns, config.mb_size, config.seed)
                alone = [F.log_softmax(linear(test_x).detach(), 1) for linear in with_gradient]
                both = [a + args.weight * b for a, b in zip(alone, told, strict=True)]
                cells += [summary(alone, test_y), summary(both, test_y)]
            print(f"| {layer} | {idea} | " + " | ".join(cells) + " |", flush=True)


def main(argv=None):
    """Returns the exit status: 0 done, 2 bad input, 1 failure on the way, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", metavar="SECTION", help="section of the configuration file: its data, network and features")
    add("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3], metavar="LR", help="of the head")
    add("--patterns", type=int, default=500, metavar="N", help="stored, or drawn for each batch (default 500)")
    add("--weight", type=float, default=0.35, metavar="W", help="of SLDA beside the head (default 0.35)")
    add_settings(parser)
    args = parser.parse_args(argv)
    return status_of(parser.prog, lambda: try_all(args))


if __name__ == "__main__":
    sys.exit(main())
