"""The command line of an experiment: its arguments, what they ask for, and every error as one sentence.

    sys.exit(command_line(run_experiment, experiment))      # status 0 done, 1 failure, 2 bad input, 130 interrupted

Uses data_loader, lab.config, lab.ranks, lab.record, lab.report, models.mobilenet, models.split_net,
models.torchvision_nets, streams.download, torch, yaml.
"""
import argparse
import errno
import math
import os
import re
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from data_loader import MissingData
from lab.config import ConfigError, load_config, read_experiments, read_yaml
from lab.ranks import print_whole_lines, this_rank
from lab.record import finishing_the_batch
from lab.report import report
from models.mobilenet import WeightsError
from models.split_net import layer_table
from models.torchvision_nets import build_net, empty
from streams.download import mend_output

try:
    import resource
except ImportError:     # Windows
    resource = None

ABOUT = """AR1* with Latent Replay on CORe50 NICv2-391: the experiment of arXiv 1912.01100, from one command.

    python ar1star_lat_replay.py                          the published experiment (needs CORe50, see README)
    python ar1star_lat_replay.py --list                   every experiment of params.cfg
    python ar1star_lat_replay.py --name ar1star --seed 1 --set rm_sz=500
    torchrun --nproc-per-node 4 ar1star_lat_replay.py --runs 0-4 --seeds 0-2      15 runs, shared among 4 processes
"""
PROGRAM = "ar1star_lat_replay.py"
PARAMS = Path(__file__).parents[1] / "params.cfg"
MOST_SEEDS = 1000       # of --seeds
NO_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed", "Overflow when unpacking")


def parse_arguments(argv=None):
    """The arguments of a command line, as argparse gives them; their values are checked later."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--name", default="DEFAULT", metavar="EXPERIMENT", help="section of the configuration file (default DEFAULT)")
    add("--config", default=str(PARAMS), metavar="FILE", help="(default params.cfg)")
    add("--list", action="store_true", help="list the experiments with their comments, and stop")
    add("--list-layers", action="store_true", help="list the network's layers: shape, bytes a pattern, computation")
    add("--run", type=int, metavar="N", help="order of the batches, 0-9")
    add("--runs", metavar="N-M", help="several orders one after the other, or shared among ranks of torchrun: 0-4, or 0,2,5")
    add("--seed", type=int, metavar="N", help="seed of everything random")
    add("--seeds", metavar="N-M", help="several seeds, each with every order: 0-2, or 0,5,7")
    add("--data", metavar="DIR", help="folder of the data set")
    add("--download", action="store_true", default=None, help="fetch CORe50 into that folder if it is not there")
    add("--weights", metavar="FILE", help="pre-trained weights, instead of fetching the published ones")
    add("--device", metavar="auto|cpu|cuda[:n]")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change any key of the experiment; repeatable")
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


def overrides(args):
    """{key: value} of the configuration from the command line."""
    values = {key: getattr(args, key) for key in ("run", "seed", "data", "download", "weights", "device")}
    values = {key: value for key, value in values.items() if value is not None}
    for setting in args.set:
        key, value = parse_setting(setting)
        if key in values or key in ("run", "seed") and getattr(args, f"{key}s") is not None:
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


def run_from(args, run_experiment, experiment):
    """What the command line asks for."""
    if args.list:
        experiments = read_experiments(args.config)
        for name, section in experiments.items():
            print(f"{name:<{max(map(len, experiments))}}  {section['comment']}")
        return
    if args.report is not None:
        text = report(args.report or args.log_dir, args.markdown, args.plot)
        print(text if (sys.stdout.encoding or "").lower().startswith("utf") else text.replace("\xb1", "+-"))
        return
    if args.markdown or args.plot:
        raise ConfigError("--markdown and --plot belong to --report: add it")
    if args.max_batches is not None and args.max_batches < 1:
        raise ConfigError(f"--max-batches is {args.max_batches}; it must be at least 1")
    rank, configs = this_rank(), configurations(args)
    if args.list_layers:
        list_layers(configs[0])
        return
    if args.fresh and rank.world > 1:
        raise ConfigError("--fresh would start over whenever torchrun starts a rank again: delete the folders of these "
                          "runs, or choose others with --as or --log-dir")
    if not rank.share(configs):
        print(f"rank {rank.number} of {rank.world}, counted from 0, has nothing to do: runs in all: {len(configs)}")
        return
    rank.take_threads()
    if rank.world > 1:
        print_whole_lines()
    for config in rank.share(configs):
        if args.runs is not None or args.seeds is not None:
            print(f"order {config.run}, seed {config.seed}:", flush=True)
        run_one(run_experiment, experiment, rank.placed(config), args)


def configurations(args):
    """The Config of each run that the command line asks for: every order with every seed."""
    for one, some, what in (("run", "runs", "orders"), ("seed", "seeds", "seeds")):
        if getattr(args, one) is not None and getattr(args, some) is not None:
            raise ConfigError(f"--{one} and --{some} exclude each other: --{some} names several {what}, --{one} one")
    orders = [{}] if args.runs is None else [{"run": run} for run in parse_runs(args.runs)]
    seeds = [{}] if args.seeds is None else [{"seed": seed} for seed in parse_seeds(args.seeds)]
    given = overrides(args)
    return [load_config(args.name, args.config, given | order | seed) for order in orders for seed in seeds]


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


def run_one(run_experiment, experiment, config, args):
    """One run of an experiment, and its final figures in words."""
    if config.dataset == "demo" and config.rm_sz > 0:
        run_beside_naive(experiment, config, args)
        return
    results = run_experiment(config, args.folder or args.name, args.log_dir, args.max_batches, args.fresh)
    n, last = len(results["rows"]), results["rows"][-1]
    print(f"{peak_memory()}{whereabouts(args)}")
    print(f"accuracy after {n} of {last['batches']} batches, on {last['n_test']:,} test images: "
          f"{results['final_accuracy']:.2%} (mean over the {n} tests: {results['mean_accuracy']:.2%})")


def whereabouts(args):
    """Where the curves and the table of runs are."""
    return f"curves: tensorboard --logdir {args.log_dir}; table: python {PROGRAM} --report {args.log_dir}"


def peak_memory():
    """What this process took of the main memory at most, in words; nothing where the system does not tell."""
    if resource is None:
        return ""
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20      # macOS counts bytes, Linux KiB
    return f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GiB; "


def list_layers(config):
    """Prints what replay at each layer costs and saves: the papers' table of storage and computation."""
    size = {"core50": 128, "demo": 48}.get(config.dataset, config.image_size)
    net = empty(build_net, config.model, 1, "images", "none", config.width)
    print(f"{config.model}, images of {size}x{size}. Replay at a layer stores its output, as float32, and saves, for each\n"
          "replayed pattern, the computation up to it: a share of the multiply-adds of a pass through all layers.\n"
          f"{'no.':>4}  {'name':<32}{'output':<14}{'values':>9}{'bytes':>12}{'computation':>13}")
    for number, name, shape, share in layer_table(net, size):
        values = math.prod(shape)
        print(f"{number:>4}  {name:<32}{'x'.join(map(str, shape)):<14}{values:>9,}{4 * values:>12,}{share:>13.1%}")


def run_beside_naive(experiment, config, args):
    """The demo: the experiment and, batch by batch beside it, naive fine-tuning on the same stream; prints both curves."""
    start, naive = time.perf_counter(), replace(
        config, rm_sz=0, rm_mb=0.0, slda_weight=0.0, cwr_consolidation="none", reg_lambda=0.0,
        comment="fine-tuning without replay, beside the demo")
    print("Objects come one by one, each seen from one session at a time; all are tested after every batch.\n"
          f"{'batch':>9}  {'AR1* with latent replay':<32}naive fine-tuning")
    name = args.folder or args.name
    with finishing_the_batch() as stop:
        runs = [experiment(c, folder, args.log_dir, args.max_batches, args.fresh, stop)
                for c, folder in ((config, name), (naive, f"{name}_naive"))]
        (rows, batches), (naive_rows, _) = map(next, runs)
        while True:
            n = min(len(rows), len(naive_rows))     # a kill may have left one of them behind the other
            ours, theirs = rows[n - 1]["test_accuracy"], naive_rows[n - 1]["test_accuracy"]
            if n % 5 == 1 or n == batches:
                print(f"{n:4}/{batches:<4}  {ours:6.1%} {'#' * round(24 * ours):<25}{theirs:6.1%} "
                      f"{'#' * round(24 * theirs)}", flush=True)
            if None in [next(run, None) for run, done in zip(runs, (rows, naive_rows)) if len(done) == n]:
                break
    print(f"{whereabouts(args)}\nAfter {time.perf_counter() - start:.0f} s, AR1* with latent replay knows {ours:.1%} of the "
          f"{rows[-1]['n_test']} test images, naive fine-tuning {theirs:.1%}.")


def command_line(run_experiment, experiment, argv=None):
    """Does what the arguments ask for and returns the exit status; errors are printed, each as one sentence.

    run_experiment(config, name, log_dir, max_batches, fresh) makes a run and returns its results; experiment(...,
    stopped) is the same as a generator, batch by batch. argv: the arguments, default: those of this process.
    """
    mend_output()
    with suppress(ValueError):      # not in the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)
    args = parse_arguments(argv)
    threading.excepthook = report_thread
    try:
        run_from(args, run_experiment, experiment)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        if isinstance(error, OSError):
            leave_broken_stdout()
        if not isinstance(error, BrokenPipeError):      # `| head` has all that it wants
            print(f"{PROGRAM}: {explain(error)}", file=sys.stderr)
        return getattr(error, "exit_status", 2 if of_another_network(error) else 1)


def report_thread(failure):
    """For threading.excepthook: SummaryWriter's thread hands an OSError on to us, so it needs no traceback of its own."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def leave_broken_stdout():
    """If what we print cannot go anywhere (`| head`, a full disk), prevents a second complaint when the program ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def of_another_network(error):
    """Whether a checkpoint did not fit: torch has no type of its own for this error."""
    return isinstance(error, RuntimeError) and "loading state_dict" in str(error)


def explain(error):
    """One sentence: what is wrong and what to do."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(sign in text for sign in NO_MEMORY):
        return f"out of memory ({text:.100}); lower max_latents_gb with --set and run the same command again, or lower " \
               "rm_sz or mb_size and start over with --fresh"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({text}): the last checkpoint is kept; make room and run the same command again"
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
        return f"cannot use {os.fsdecode(error.filename)} ({error.strerror})"
    if isinstance(error, MissingData):
        return f"{text}, or add --download to this command; `python {PROGRAM} --name demo` runs right now, " \
               "without any download"
    if isinstance(error, WeightsError):
        return f"{text}; `python {PROGRAM} --name demo` runs right now, without any download"
    if of_another_network(error):
        return "the checkpoint is of another network, so the data or the program have changed since: put them back, " \
               "choose another --log-dir, or start over with --fresh"
    if hasattr(error, "exit_status") or isinstance(error, OSError):      # its text is one sentence
        return text
    return f"unexpected {type(error).__name__} ({text:.300}): this is a bug; please report it with what --debug shows"
