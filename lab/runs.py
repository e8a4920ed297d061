"""What a command line asks for beyond words: the runs, one after the other or a rank's share of them; the table of layers.

    make_runs(run_experiment, experiment, configs, args)

Uses data_loader, lab.config, lab.output, lab.ranks, lab.record, lab.start, models.mobilenet, models.split_net,
models.torchvision_nets.
"""
import math
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

from data_loader import MissingData
from lab.config import ConfigError
from lab.output import PROGRAM
from lab.ranks import print_whole_lines, this_rank
from lab.record import finishing_the_batch
from lab.start import end_imports
from models.mobilenet import WeightsError
from models.split_net import layer_table
from models.torchvision_nets import build_net, empty

try:
    import resource
except ImportError:     # Windows
    resource = None

RIGHT_NOW = f"`python {PROGRAM} --name demo` runs right now, without any download"


def make_runs(run_experiment, experiment, configs, args):
    """Makes the runs of [Config, ...] that are this rank's; of --list-layers, shows the first one's layers instead."""
    end_imports()
    if args.list_layers:
        list_layers(configs[0])
        return
    rank = this_rank()
    if args.fresh and rank.world > 1:
        raise ConfigError("--fresh would start over whenever torchrun starts a rank again: delete the folders of these "
                          "runs, or choose others with --as or --log-dir")
    if not rank.share(configs):
        print(f"rank {rank.number} of {rank.world}, counted from 0, has nothing to do: runs in all: {len(configs)}")
        return
    rank.take_threads()
    if rank.world > 1:
        print_whole_lines()
    threading.excepthook = report_thread
    for config in rank.share(configs):
        if args.runs is not None or args.seeds is not None:
            print(f"order {config.run}, seed {config.seed}:", flush=True)
        with saying_what_runs_instead():
            run_one(run_experiment, experiment, rank.placed(config), args)


@contextmanager
def saying_what_runs_instead():
    """Adds to an error about data or weights that are missing how to go on without them."""
    try:
        yield
    except MissingData as error:
        raise MissingData(f"{error}, or add --download to this command; {RIGHT_NOW}") from error
    except WeightsError as error:
        raise WeightsError(f"{error}; {RIGHT_NOW}") from error


def run_one(run_experiment, experiment, config, args):
    """One run of an experiment, and its final figures in words."""
    if config.dataset == "demo" and config.replays():
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
    method = f"latent replay ({'AR1*' if config.reg_lambda > 0 or config.si == 'learning_rate' else 'AR1*free'})"
    print("Objects come one by one, each seen from one session at a time; all are tested after every batch.\n"
          f"{'batch':>9}  {method:<32}naive fine-tuning")
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
    print(f"{whereabouts(args)}\nAfter {time.perf_counter() - start:.0f} s, {method} knows {ours:.1%} of "
          f"the {rows[-1]['n_test']} test images, naive fine-tuning {theirs:.1%}.")


def report_thread(failure):
    """For threading.excepthook: SummaryWriter's thread hands an OSError on to us, so it needs no traceback of its own."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)
