"""How much SLDA should weigh beside a network: the test accuracy of a run's last checkpoint for one weight after the other.

    python ar1star_lat_replay.py --name standin_79_pq_slda --data core50_standin --run 1
    python benchmarks/slda_weight.py logs/standin_79_pq_slda/run1_seed0

The run must have had slda_weight above 0, any will do: the weight changes no training, only the test. Take an order whose
results are not reported. The first line is the network alone, the last one SLDA alone.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ar1star_lat_replay import load_learner
from lab.command_line import status_of
from lab.config import ConfigError
from lab.data import open_stream
from lab.fast import TestSet
from lab.run_folder import load_run
from methods.second_opinion import ObservedMemory
from utils import evaluate


def accuracies(folder, weights, data=None):
    """[accuracy in 0..1 on the test images for each weight], and of SLDA alone, of the learner in a run's folder.

    data: where the images are now; None: where the run had them. Raises ConfigError where no SLDA stands beside the network.
    """
    config, _ = load_run(folder)
    learner = load_learner(folder)
    if not isinstance(learner.memory, ObservedMemory):
        raise ConfigError(f"{folder} is of a run with slda_weight 0: there is no SLDA beside its network")
    config = replace(config, data=data or config.data)
    test, opinion, found = TestSet(*open_stream(config).get_test_set(config.test_stride)), learner.memory.observer, []
    for weight in weights:
        opinion.weight = weight
        found.append(test(learner)["accuracy"])
    alone = torch.nn.Sequential(opinion.features, opinion.lda.linear)
    return found, evaluate(alone, test.latents, test.labels)["accuracy"]


def search(args):
    """Prints the table and the best weight."""
    weights = [0.0, *args.weights]
    found, alone = accuracies(args.folder, weights, args.data)
    print("| slda_weight | accuracy % |\n|---|---|")
    names = ["0, the network alone", *(f"{weight:g}" for weight in args.weights), "SLDA alone"]
    for name, accuracy in zip(names, [*found, alone], strict=True):
        print(f"| {name} | {100 * accuracy:.1f} |")
    print(f"\nbest: --set slda_weight={max(zip(found, weights, strict=True))[1]:g}")


def main(argv=None):
    """Returns the exit status: 0 done, 2 bad input, 1 failure on the way, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", metavar="RUN", help="folder of the run: LOGDIR/EXPERIMENT/run1_seed0")
    add("--weights", nargs="+", type=float, default=[.05, .1, .15, .25, .35, .5, .7, 1.0, 2.0], metavar="W")
    add("--data", metavar="DIR", help="folder of the data set, if it is not where the run had it")
    args = parser.parse_args(argv)
    return status_of(parser.prog, lambda: search(args))


if __name__ == "__main__":
    sys.exit(main())
