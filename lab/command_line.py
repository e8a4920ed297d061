"""The command line of an experiment: its arguments, what they ask for, and every error as one sentence.

    answer_at_once()                                        # before torch is imported: what needs none of it
    sys.exit(command_line(run_experiment, experiment))      # status 0 done, 1 failure, 2 bad input, 130 interrupted

Uses lab.config, lab.output, lab.report, lab.runs (for command_line alone), yaml.
"""
import argparse
import errno
import os
import re
import sys
from functools import partial
from pathlib import Path

import yaml

from lab.config import ConfigError, config_of, read_experiments, read_yaml
from lab.output import PROGRAM, leave_broken_stdout, mend_output
from lab.report import report

ABOUT = """AR1* with Latent Replay on CORe50 NICv2-391: the experiment of arXiv 1912.01100, from one command.

    python ar1star_lat_replay.py                          the published experiment (needs CORe50, see README)
    python ar1star_lat_replay.py --list                   every experiment of params.cfg
    python ar1star_lat_replay.py --name ar1star --seed 1 --set rm_sz=500
    torchrun --nproc-per-node 4 ar1star_lat_replay.py --runs 0-4 --seeds 0-2      15 runs, shared among 4 processes
"""
PARAMS = Path(__file__).parents[1] / "params.cfg"
MOST_SEEDS = 1000       # of --seeds
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Storage size calculation overflowed",
             "Overflow when unpacking")     # how torch's and Python's errors say it


def parse_arguments(argv=None):
    """The arguments of a command line, as argparse gives them; their values are checked later."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--name", default="DEFAULT", metavar="EXPERIMENT", help="section of the configuration file (default DEFAULT)")
    add_settings(parser)
    add("--list", action="store_true", help="list the experiments with their comments, and stop")
    add("--list-layers", action="store_true", help="list the network's layers: shape, bytes a pattern, computation")
    add("--run", type=int, metavar="N", help="order of the batches, 0-9")
    add("--runs", metavar="N-M", help="several orders one after the other, or shared among ranks of torchrun: 0-4, or 0,2,5")
    add("--seed", type=int, metavar="N", help="seed of everything random")
    add("--seeds", metavar="N-M", help="several seeds, each with every order: 0-2, or 0,5,7")
    add("--download", action="store_true", default=None, help="fetch CORe50 into that folder if it is not there")
    add("--device", metavar="auto|cpu|cuda[:n]")
    add("--as", dest="folder", metavar="NAME", help="folder of the run below --log-dir (default: the experiment's name)")
    add("--log-dir", default="logs", metavar="DIR", help="(default logs)")
    add("--max-batches", type=int, metavar="N", help="stop after N batches; the same command without it goes on")
    add("--fresh", action="store_true", help="start over, ignoring a checkpoint (and deleting it)")
    add("--report", nargs="?", const="", metavar="LOGDIR", help="show the runs below LOGDIR (default: --log-dir), and stop")
    add("--markdown", action="store_true", help="the report as Markdown")
    add("--plot", metavar="FILE.png", help="draw the report's curves into FILE.png (needs matplotlib)")
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    for path in ("log_dir", "config", "report", "plot"):        # the shell leaves the ~ in --log-dir=~/logs alone
        setattr(args, path, os.path.expanduser(getattr(args, path)) if getattr(args, path) else getattr(args, path))
    return args


def add_settings(parser):
    """Adds the arguments that say which configuration file is read, and what is changed in it (see overrides)."""
    parser.add_argument("--config", default=str(PARAMS), metavar="FILE", help="(default params.cfg)")
    parser.add_argument("--data", metavar="DIR", help="folder of the data set")
    parser.add_argument("--weights", metavar="FILE", help="pre-trained weights, instead of fetching the published ones")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="change any key of the experiment; repeatable")


def overrides(args):
    """{key: value} of the configuration from a command line, which may lack arguments other than --set."""
    values = {key: getattr(args, key, None) for key in ("run", "seed", "data", "download", "weights", "device")}
    values = {key: value for key, value in values.items() if value is not None}
    for setting in args.set:
        key, value = parse_setting(setting)
        if key in values or key in ("run", "seed") and getattr(args, f"{key}s", None) is not None:
            raise ConfigError(f"{key} is given twice on the command line, once by --set {setting}: give it once")
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


def answered(args):
    """Whether a command line is done with, having asked for words alone; what it asked for is printed."""
    if args.list:
        experiments = read_experiments(args.config)
        for name, section in experiments.items():
            print(f"{name:<{max(map(len, experiments))}}  {section['comment']}")
    elif args.report is not None:
        folder = args.report or args.log_dir
        text = report(folder, args.markdown)
        print(text if (sys.stdout.encoding or "").lower().startswith("utf") else text.replace("\xb1", "+-"), flush=True)
        if args.plot:       # afterwards: where matplotlib is missing, the table is there all the same
            report(folder, plot=args.plot)
    return args.list or args.report is not None


def configurations(args):
    """The Config of each run that the command line asks for: every order with every seed."""
    if args.markdown or args.plot:
        raise ConfigError("--markdown and --plot belong to --report: add it")
    if args.max_batches is not None and args.max_batches < 1:
        raise ConfigError(f"--max-batches is {args.max_batches}; it must be at least 1")
    for one, some, what in (("run", "runs", "orders"), ("seed", "seeds", "seeds")):
        if getattr(args, one) is not None and getattr(args, some) is not None:
            raise ConfigError(f"--{one} and --{some} exclude each other: --{some} names several {what}, --{one} one")
    orders = [{}] if args.runs is None else [{"run": run} for run in parse_runs(args.runs)]
    seeds = [{}] if args.seeds is None else [{"seed": seed} for seed in parse_seeds(args.seeds)]
    given, experiments = overrides(args), read_experiments(args.config)
    return [config_of(experiments, args.name, given | order | seed) for order in orders for seed in seeds]


def parse_runs(text):
    """The orders that --runs names, ascending: "0-4", "0,2,5" or both mixed."""
    return _numbers(text, "[0-9]", f"--runs is {text!r}; write orders from 0 to 9 as 0-4 or 0,2,5")


def parse_seeds(text):
    """The seeds that --seeds names, ascending: "0-2", "0,5,7" or both mixed."""
    return _numbers(text, "0|[1-9][0-9]{0,18}", f"--seeds is {text[:80]!r}; write whole numbers, {MOST_SEEDS:,} at most, as "
                    "0-2 or 0,5,7")


def _numbers(text, number, error):
    """The numbers of "0-2", "0,5,7" or both mixed, ascending. number: regular expression of one of them."""
    spans = [re.fullmatch(rf"\s*({number})(?:-({number}))?\s*", part) for part in text.split(",")]
    spans = [(int(span[1]), int(span[2] or span[1])) for span in spans] if all(spans) else []
    if not spans or any(low > high for low, high in spans) or sum(high - low + 1 for low, high in spans) > MOST_SEEDS:
        raise ConfigError(error)
    return sorted({n for low, high in spans for n in range(low, high + 1)})


def answer_at_once():
    """Ends the program if its command line asks for no run (--help, --list, --report), or for an impossible one.

    Has no need of torch, whose import takes longer than all of this.
    """
    runs = []
    status = attend(lambda configs, args: runs.extend(configs))
    if not runs:
        sys.exit(status)


def command_line(run_experiment, experiment, argv=None):
    """Does what the arguments ask for and returns the exit status; errors are printed, each as one sentence.

    run_experiment(config, name, log_dir, max_batches, fresh) makes a run and returns its results; experiment(...,
    stopped) is the same as a generator, batch by batch. argv: the arguments, default: those of this process.
    """
    from lab.runs import make_runs  # not above: it brings torch, and answer_at_once does without

    return attend(partial(make_runs, run_experiment, experiment), argv)


def attend(make_runs, argv=None):
    """As command_line; make_runs(configs, args) is called if runs are asked for."""
    mend_output()
    args = parse_arguments(argv)

    def act():
        if not answered(args):
            make_runs(configurations(args), args)

    return status_of(PROGRAM, act, "stopped; the same command continues from the last checkpoint", args.debug)


def status_of(program, act, stopped="stopped", debug=False):
    """Calls act() and returns the exit status of the program: 0 done, 130 interrupted, else that of the error.

    What went wrong is printed, as one sentence; `stopped` is that of a Ctrl-C without words; debug: the traceback instead.
    """
    try:
        act()
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as error:
        print(str(error) or stopped, file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError):
            leave_broken_stdout()
        if not isinstance(error, BrokenPipeError):      # `| head` has all that it wants
            print(f"{program}: {explain(error)}", file=sys.stderr)
        return getattr(error, "exit_status", 2 if of_another_network(error) else 1)


def of_another_network(error):
    """Whether a checkpoint did not fit: torch has no type of its own for this error."""
    return isinstance(error, RuntimeError) and "loading state_dict" in str(error)


def explain(error):
    """One sentence: what is wrong and what to do."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or any(sign in text for sign in NO_MEMORY):
        return f"out of memory ({text:.100}); lower max_latents_gb with --set and run the same command again, or lower " \
               "rm_sz or mb_size and start over with --fresh"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({text}): the last checkpoint is kept; make room and run the same command again"
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
        return f"cannot use {os.fsdecode(error.filename)} ({error.strerror})"
    if of_another_network(error):
        return "the checkpoint is of another network, so the data or the program have changed since: put them back, " \
               "choose another --log-dir, or start over with --fresh"
    if hasattr(error, "exit_status") or isinstance(error, OSError):      # its text is one sentence
        return text
    return f"unexpected {type(error).__name__} ({text:.300}): this is a bug; please report it with what --debug shows"
