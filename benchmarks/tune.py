"""The same search of learning rates for every method: which learns best, and with which rates.

    python benchmarks/tune.py standin_79 standin_79_cwr_star --data core50_standin

Each method, a section of the configuration, is run on the first 40 batches of order 1 with every pair of a
learning rate (inc_lr) and a multiple of it for the head (head_lr_mult): the same pairs for all, so that none
has had a better chance. Prints the mean over the tests for each pair, and each method's best. Report results
on other orders than this one.

What has run is kept in --log-dir, so the same command goes on after an interruption, and a method or a rate
may be added later. A pair whose loss is no longer a number counts as tried and failed.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ar1star_lat_replay import run
from harness.checkpoint import RunFailure
from harness.cli import add_settings, overrides
from harness.config import ConfigError, load_config
from harness.console import errors_as_sentences, say
from harness.records import TrainingError

# the papers' pairs, 1e-4 and 3e-4 times 10, are among them
RATES = (1e-4, 3e-4, 1e-3)
MULTIPLES = (1, 10, 100)


def search(method, args):
    """{(inc_lr, head_lr_mult): what run_once says} of a section."""
    given = overrides(args) | {"run": args.order}
    configs = {}        # all are checked before the first one runs
    for lr in args.rates:
        for head in args.multiples:
            pair = {"inc_lr": lr, "head_lr_mult": head}
            configs[lr, head] = load_config(method, args.config, given | pair)
    return {(lr, head): run_once(config, f"{method}_lr{lr:g}_head{head:g}", args)
            for (lr, head), config in configs.items()}


def run_once(config, name, args):
    """Mean accuracy over the tests of a run, 0..1; None where training failed, now or earlier."""
    say(f"{name}: order {args.order}, {args.batches} batches")
    failed = Path(args.log_dir) / f"{name}.failed"
    if failed.exists():
        return None
    try:
        return run(config, name, args.log_dir, args.batches)["mean_accuracy"]
    except (TrainingError, RunFailure) as error:
        if isinstance(error, RunFailure) and "no finite numbers" not in str(error):
            raise       # the disk is full
        say(f"{name}: {error}")
        failed.write_text(f"{error}\n", encoding="utf-8")
        return None


def table(method, found, args):
    """Lines of Markdown: a row a rate, a column a multiple, accuracies in percent."""
    rows = [[method, *(f"head_lr_mult {head:g}" for head in args.multiples)]]
    rows.append(["---"] * len(rows[0]))
    for lr in args.rates:
        values = [found[lr, head] for head in args.multiples]
        cells = ["failed" if value is None else f"{100 * value:.1f}" for value in values]
        rows.append([f"inc_lr {lr:g}", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def best(found):
    """The pair with the highest mean, in words."""
    succeeded = [pair for pair, value in found.items() if value is not None]
    if not succeeded:
        return "all have failed"
    lr, head = max(succeeded, key=found.get)
    return f"inc_lr {lr:g}, head_lr_mult {head:g}: {100 * found[lr, head]:.1f} %"


def compare(args):
    """Searches for every method; prints the table of each, and then the best of all."""
    if args.batches < 2:
        raise ConfigError(f"--batches is {args.batches}; the rates are those after batch 0, so it must be at "
                          "least 2")
    lines = []
    for method in args.methods:
        found = search(method, args)
        print(f"\n{table(method, found, args)}\n", flush=True)
        lines.append(f"{method}: {best(found)}")
    print("best by the mean over the tests:", *lines, sep="\n")


def main(argv=None):
    """Returns the exit status: 0 done, 2 bad input, 1 failure on the way, 130 interrupted."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("methods", nargs="+", metavar="METHOD", help="sections of the configuration")
    add("--rates", nargs="+", type=float, default=RATES, metavar="LR", help="inc_lr (default 1e-4 3e-4 1e-3)")
    add("--multiples", nargs="+", type=float, default=MULTIPLES, metavar="M",
        help="head_lr_mult (default 1 10 100)")
    add("--batches", type=int, default=40, metavar="N", help="(default 40)")
    add("--order", type=int, default=1, metavar="N", help="(default 1)")
    add_settings(parser)
    add("--log-dir", default="logs/tune", metavar="DIR")
    args = parser.parse_args(argv)
    with errors_as_sentences(parser.prog, "stopped; the same command goes on") as outcome:
        compare(args)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
