"""The same search of learning rates for every method: which section of params.cfg learns best, and with which rates.

    python benchmarks/tune.py standin_79 standin_79_cwr_star --data core50_standin

Each method is run on the first 40 batches of order 1 with every pair of a learning rate (inc_lr) and a multiple of it for
the head (head_lr_mult): the same pairs for all, so that none has had a better chance. Prints the mean over the tests
for each pair, and each method's best. Report results on other orders than this one.

What has run is kept in --log-dir, so the same command goes on after an interruption, and a method or a rate may be added
later. A pair whose loss is no longer a number counts as tried and failed.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ar1star_lat_replay import run_experiment
from lab.command_line import add_settings, overrides, status_of
from lab.config import ConfigError, load_config
from lab.record import TrainingError, say
from lab.run_folder import RunFailure

RATES, MULTIPLES = (1e-4, 3e-4, 1e-3), (1, 10, 100)    # the papers' pairs, 1e-4 and 3e-4 times 10, are among them


def search(method, args):
    """{(inc_lr, head_lr_mult): mean accuracy over the tests, 0..1, or None where training failed} of a section."""
    found, settings = {}, overrides(args)
    pairs = [(lr, head) for lr in args.rates for head in args.multiples]
    configs = [load_config(method, args.config, settings | {"run": args.order, "inc_lr": lr, "head_lr_mult": head})
               for lr, head in pairs]
    for (lr, head), config in zip(pairs, configs, strict=True):
        name = f"{method}_lr{lr:g}_head{head:g}"
        say(f"{name}: order {args.order}, {args.batches} batches")
        failed = Path(args.log_dir) / f"{name}.failed"
        try:
            found[lr, head] = None if failed.exists() else \
                run_experiment(config, name, args.log_dir, args.batches)["mean_accuracy"]
        except (TrainingError, RunFailure) as error:
            if isinstance(error, RunFailure) and "no finite numbers" not in str(error):
                raise
            say(f"{name}: {error}")
            failed.write_text(f"{error}\n", encoding="utf-8")
            found[lr, head] = None
    return found


def table(method, found, args):
    """Lines of Markdown: a row a rate, a column a multiple, accuracies in percent."""
    cell = lambda value: "failed" if value is None else f"{100 * value:.1f}"
    rows = [[f"inc_lr {lr:g}", *(cell(found[lr, head]) for head in args.multiples)] for lr in args.rates]
    header = [method, *(f"head_lr_mult {head:g}" for head in args.multiples)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def best(found):
    """The pair with the highest mean; None where all have failed."""
    return max((pair for pair, value in found.items() if value is not None), key=found.get, default=None)


def compare(args):
    """Searches for every method; prints the table of each, and then the best of all."""
    if args.batches < 2:
        raise ConfigError(f"--batches is {args.batches}; the rates are those after batch 0, so it must be at least 2")
    lines = []
    for method in args.methods:
        found = search(method, args)
        pair = best(found)
        choice = "all have failed" if pair is None else \
            f"inc_lr {pair[0]:g}, head_lr_mult {pair[1]:g}: {100 * found[pair]:.1f} %"
        lines.append(f"{method}: {choice}")
        print(f"\n{table(method, found, args)}\n", flush=True)
    print("best by the mean over the tests:", *lines, sep="\n")


def main(argv=None):
    """Returns the exit status: 0 done, 2 bad input, 1 failure on the way, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("methods", nargs="+", metavar="METHOD", help="sections of the configuration file")
    add("--rates", nargs="+", type=float, default=RATES, metavar="LR", help="inc_lr (default 1e-4 3e-4 1e-3)")
    add("--multiples", nargs="+", type=float, default=MULTIPLES, metavar="M", help="head_lr_mult (default 1 10 100)")
    add("--batches", type=int, default=40, help="(default 40)")
    add("--order", type=int, default=1, help="(default 1)")
    add_settings(parser)
    add("--log-dir", default="logs/tune", metavar="DIR")
    args = parser.parse_args(argv)
    return status_of(parser.prog, lambda: compare(args), "stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
