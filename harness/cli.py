"""The command line of ar1star_lat_replay.py: its arguments, and the runs they ask for. Needs no torch."""
import argparse
import os
import re
import shlex
import sys

import yaml

from harness.config import PARAMS, ConfigError, config_of, read_experiments, read_yaml
from harness.console import errors_as_sentences, safe_output
from harness.errors import PROGRAM

ABOUT = """AR1* with Latent Replay on CORe50 NICv2-391: the experiment of arXiv 1912.01100, from one command.

    python ar1star_lat_replay.py                          the published experiment (needs CORe50, see README)
    python ar1star_lat_replay.py --list                   every experiment of params.cfg and experiments/
    python ar1star_lat_replay.py --name ar1star --seed 1 --set rm_sz=500
    torchrun --nproc-per-node 4 ar1star_lat_replay.py --runs 0-4 --seeds 0-2      15 runs in 4 processes
"""
MOST_SEEDS = 1000       # of --seeds


# ---- arguments ----

def parse_arguments(argv=None):
    """The arguments of a command line, as argparse gives them; their values are checked later."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=ABOUT,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--name", default="DEFAULT", metavar="EXPERIMENT", help="section of the configuration")
    add_settings(parser)
    add("--list", action="store_true", help="list the experiments with their comments, and stop")
    add("--list-layers", action="store_true", help="list the network's layers: bytes a pattern, computation")
    add("--run", type=int, metavar="N", help="order of the batches, 0-9")
    add("--runs", metavar="N-M", help="several orders in turn, or shared among ranks of torchrun: 0-4, or "
                                      "0,2,5")
    add("--seed", type=int, metavar="N", help="seed of everything random")
    add("--seeds", metavar="N-M", help="several seeds, each with every order: 0-2, or 0,5,7")
    add("--download", action="store_true", default=None, help="fetch the data set into that folder if it "
                                                              "is not there")
    add("--device", metavar="auto|cpu|cuda[:n]")
    add("--as", dest="folder", metavar="NAME", help="folder of the run below --log-dir (default: --name's)")
    add("--log-dir", default="logs", metavar="DIR", help="(default logs)")
    add("--max-batches", type=int, metavar="N", help="stop after N batches; the same command without it goes "
                                                     "on")
    add("--fresh", action="store_true", help="start over, ignoring a checkpoint (and deleting it)")
    add("--predict", nargs="+", metavar="IMAGE", help="say what the run sees in image files, or in all those "
                                                      "of folders, and stop")
    add("--json", action="store_true", help="what --predict says as JSON, an object a line")
    add("--teach", nargs="?", const="taught", metavar="DIR",
        help="serve a page on which a camera teaches objects, kept in DIR (default taught); with --predict: "
             "what these objects are in other images")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="where that page is served (default: only to "
                                                               "this machine)")
    add("--port", type=int, default=8000, metavar="N", help="(default 8000)")
    add("--report", nargs="?", const="", metavar="LOGDIR",
        help="show the runs below LOGDIR (default: --log-dir), and stop")
    add("--markdown", action="store_true", help="the report as Markdown")
    add("--plot", metavar="FILE.png", help="draw the report's curves into FILE.png (needs matplotlib)")
    add("--debug", action="store_true", help="show the traceback of an error")

    args = parser.parse_args(argv)
    for name in ("log_dir", "config", "report", "plot", "teach"):
        path = getattr(args, name)
        if path:        # the shell does not expand the ~ in --log-dir=~/logs
            setattr(args, name, os.path.expanduser(path))
    return args


def add_settings(parser):
    """Adds the arguments that say which configuration is read, and what is changed in it (see overrides)."""
    parser.add_argument("--config", default=str(PARAMS), metavar="FILE", help="(default params.cfg)")
    parser.add_argument("--data", metavar="DIR", help="folder of the data set")
    parser.add_argument("--weights", metavar="FILE",
                        help="pre-trained weights: imagenet or tflite, which are fetched, none, or a file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="change any key of the experiment; repeatable")


def overrides(args):
    """{key: value} of the configuration from a command line, which may lack arguments other than --set."""
    values = {}
    for key in ("run", "seed", "data", "download", "weights", "device"):
        if getattr(args, key, None) is not None:
            values[key] = getattr(args, key)

    for setting in args.set:
        key, value = parse_setting(setting)
        several = key in ("run", "seed") and getattr(args, f"{key}s", None) is not None
        if key in values or several:
            raise ConfigError(f"{key} is given twice on the command line, once by --set {setting}: "
                              "give it once")
        values[key] = value
    return values


def parse_setting(setting):
    """(key, value) of the text KEY=VALUE that --set takes."""
    key, equals, text = setting.partition("=")
    if not equals:
        raise ConfigError(f"--set {setting} lacks a value: write --set KEY=VALUE")
    try:
        return key.strip(), read_yaml(text)
    except (ConfigError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {setting} has a value that YAML cannot read") from error


def parse_runs(text):
    """The orders that --runs names, ascending: "0-4", "0,2,5" or both mixed."""
    return _numbers(text, "[0-9]", f"--runs is {text!r}; write orders from 0 to 9 as 0-4 or 0,2,5")


def parse_seeds(text):
    """The seeds that --seeds names, ascending: "0-2", "0,5,7" or both mixed."""
    error = f"--seeds is {text[:80]!r}; write whole numbers, {MOST_SEEDS:,} at most, as 0-2 or 0,5,7"
    return _numbers(text, "0|[1-9][0-9]{0,18}", error)


def _numbers(text, number, error):
    """The numbers of "0-2", "0,5,7" or both mixed, ascending. number: regular expression of one of them."""
    found = set()
    for part in text.split(","):
        span = re.fullmatch(rf"\s*({number})(?:-({number}))?\s*", part)
        if span is None:
            raise ConfigError(error)
        low = int(span[1])
        high = int(span[2] or span[1])
        if not low <= high < low + MOST_SEEDS:
            raise ConfigError(error)
        found.update(range(low, high + 1))
    if len(found) > MOST_SEEDS:
        raise ConfigError(error)
    return sorted(found)


# ---- the start ----

def answer_without_torch():
    """To be called before torch is imported. Ends the program if the command line asks for no run (--help,
    --list, --report), or for an impossible one."""
    safe_output()
    args = parse_arguments()
    with errors_as_sentences(PROGRAM, debug=args.debug) as outcome:
        if not answered(args):
            configurations(args)
            return
    sys.exit(outcome.status)


def answered(args):
    """Whether the command line asks for --list or --report, which is then printed."""
    if args.list or args.report is not None:
        from harness import printing
        if args.list:
            printing.print_experiments(args.config)
        else:
            printing.print_report(args.report or args.log_dir, args.markdown, args.plot)
        return True
    return False


# ---- the runs ----

def configurations(args):
    """The Config of each run that the command line asks for: every order with every seed."""
    if args.markdown or args.plot:
        raise ConfigError("--markdown and --plot belong to --report: add it")
    if args.json and not args.predict:
        raise ConfigError("--json belongs to --predict: add it")
    if args.predict and (args.runs is not None or args.seeds is not None):
        raise ConfigError("--predict asks one run: name it by --run and --seed")
    if args.teach is not None:
        if args.data or args.folder or args.runs is not None or args.seeds is not None:
            raise ConfigError("--teach keeps all in its own DIR: leave out --data, --as, --runs and --seeds")
        args.data = args.teach
        args.log_dir = args.teach
        args.folder = "teach"
        if args.name == "DEFAULT":
            args.name = "teach"
    elif args.host != "127.0.0.1" or args.port != 8000:
        raise ConfigError("--host and --port belong to --teach: add it")
    if args.max_batches is not None and args.max_batches < 1:
        raise ConfigError(f"--max-batches is {args.max_batches}; it must be at least 1")
    for one, some, what in (("run", "runs", "orders"), ("seed", "seeds", "seeds")):
        if getattr(args, one) is not None and getattr(args, some) is not None:
            raise ConfigError(f"--{one} and --{some} exclude each other: the second names several {what}")

    orders = [{}] if args.runs is None else [{"run": run} for run in parse_runs(args.runs)]
    seeds = [{}] if args.seeds is None else [{"seed": seed} for seed in parse_seeds(args.seeds)]
    given = overrides(args)
    experiments = read_experiments(args.config)
    return [config_of(experiments, args.name, given | order | seed) for order in orders for seed in seeds]


def command_of_run(config, args):
    """The command that makes the run that a command line names."""
    if args.teach is not None:
        return shlex.join(["python", PROGRAM, "--teach", args.teach])
    data = None if config.dataset == "demo" else args.data or config.data
    named = {"--config": args.config, "--name": args.name, "--as": args.folder, "--data": data,
             "--weights": args.weights, "--run": args.run, "--seed": args.seed, "--log-dir": args.log_dir}
    left_out = {"--config": str(PARAMS), "--log-dir": "logs"}
    words = ["python", PROGRAM]
    for option, value in named.items():
        if value is not None and value != left_out.get(option):
            words += [option, str(value)]
    for setting in args.set:
        words += ["--set", setting]
    return shlex.join(words)


def of_this_process(configs, args):
    """Yields those of [Config, ...] that this process runs: all, or under torchrun its share."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from harness import torchrun
        configs = torchrun.share_of(configs, args.fresh)
    for config in configs:
        if args.runs is not None or args.seeds is not None:
            print(f"order {config.run}, seed {config.seed}:", flush=True)
        yield config
