"""How much SLDA should weigh beside a network: the test accuracy of a run's last checkpoint for each weight.

    python ar1star_lat_replay.py --name standin_79_pq_slda --data core50_standin --run 1
    python benchmarks/slda_weight.py logs/standin_79_pq_slda/run1_seed0

The run must have had slda_weight above 0, any will do: the weight changes no training, only the test. Take an
order whose results are not reported. The first line is the network alone, the last one SLDA alone.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ar1star_lat_replay import load_learner, open_stream
from harness.checkpoint import load_run
from harness.config import ConfigError
from harness.console import errors_as_sentences
from harness.encoder import TestSet
from utils import evaluate

WEIGHTS = [.05, .1, .15, .25, .35, .5, .7, 1.0, 2.0]


def accuracies(folder, weights, data=None):
    """([test accuracy in 0..1 for each weight], that of SLDA alone) of the learner in a run's folder.

    data: where the images are now; None: where the run had them. ConfigError where it has no SLDA.
    """
    config, _ = load_run(folder)
    learner = load_learner(folder)
    beside = learner.beside
    if beside is None:
        raise ConfigError(f"{folder} is of a run with slda_weight 0: there is no SLDA beside its network")

    stream = open_stream(replace(config, data=data or config.data))
    test = TestSet(*stream.get_test_set(config.test_stride))
    found = []
    for weight in weights:
        beside.weight = weight
        found.append(test.evaluate(learner)["accuracy"])
    alone = nn.Sequential(beside.features, beside.lda.linear)
    return found, evaluate(alone, test.latents, test.labels)["accuracy"]


def search(args):
    """Prints the table and the best weight."""
    weights = [0.0, *args.weights]
    found, alone = accuracies(args.folder, weights, args.data)
    names = ["0, the network alone", *(f"{weight:g}" for weight in args.weights), "SLDA alone"]
    print("| slda_weight | accuracy % |\n|---|---|")
    for name, accuracy in zip(names, [*found, alone], strict=True):
        print(f"| {name} | {100 * accuracy:.1f} |")
    _, best = max(zip(found, weights, strict=True))
    print(f"\nbest: --set slda_weight={best:g}")


def main(argv=None):
    """Returns the exit status: 0 done, 2 bad input, 1 failure on the way, 130 interrupted."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("folder", metavar="RUN", help="folder of the run: LOGDIR/EXPERIMENT/run1_seed0")
    add("--weights", nargs="+", type=float, default=WEIGHTS, metavar="W")
    add("--data", metavar="DIR", help="folder of the data set, if it is not where the run had it")
    args = parser.parse_args(argv)
    with errors_as_sentences(parser.prog) as outcome:
        search(args)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
