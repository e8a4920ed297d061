"""What is printed instead of a run (--list, --list-layers, --report), beside and after one, and of an
error."""
import errno
import math
import os
import sys

from harness.config import list_experiments
from harness.console import PROGRAM
from harness.report import report

try:
    import resource
except ImportError:     # Windows
    resource = None

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Storage size calculation "
                                                                            "overflowed",
             "Overflow when unpacking")     # how torch's and Python's errors say it


# ---- instead of a run ----

def print_experiments(path):
    """The experiments of a configuration, file by file, with their comments."""
    files = list_experiments(path)
    width = max(len(name) for _, experiments in files for name, _ in experiments)
    for file, experiments in files:
        print(f"{file}:")
        for name, comment in experiments:
            print(f"  {name:<{width}}  {comment}")


def print_report(folder, markdown=False, plot=None):
    """The table of the runs below a folder; draws their curves into the file `plot`, if one is given."""
    text = report(folder, markdown)
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        text = text.replace("\xb1", "+-")
    print(text, flush=True)
    if plot:        # afterwards: where matplotlib is missing, the table is there all the same
        report(folder, plot=plot)


def print_layers(config):
    """What replay at each layer costs and saves: the papers' table of storage and computation."""
    from models.split_net import layer_table
    from models.torchvision_nets import build_net, empty

    size = {"core50": 128, "demo": 48}.get(config.dataset, config.image_size)
    net = empty(build_net, config.model, 1, "images", "none", config.width)
    print(f"{config.model}, images of {size}x{size}. Replay at a layer stores its output, as float32, and "
          "saves, for\neach replayed pattern, the computation up to it: a share of the multiply-adds of a "
          f"pass through all layers.\n{'no.':>4}  "
          f"{'name':<32}{'output':<14}{'values':>9}{'bytes':>12}{'computation':>13}")
    for number, name, shape, share in layer_table(net, size):
        values = math.prod(shape)
        output = "x".join(map(str, shape))
        print(f"{number:>4}  {name:<32}{output:<14}{values:>9,}{4 * values:>12,}{share:>13.1%}")


# ---- beside a run, and after it ----

def table_beside(method, naive_rows):
    """A function for `run`'s after_batch that prints the demo's table: a method beside naive fine-tuning.

    method: its name; naive_rows: the records of fine-tuning on the same stream.
    """
    first = True

    def print_line(rows, batches):
        nonlocal first
        if first:
            first = False
            print("Objects come one by one, each seen from one session at a time; all are tested after "
                  f"every batch.\n{'batch':>9}  {method:<32}naive fine-tuning")
        n = len(rows)
        if n % 5 == 1 or n == batches:
            ours = rows[-1]["test_accuracy"]
            theirs = naive_rows[n - 1]["test_accuracy"]
            bars = ["#" * round(24 * accuracy) for accuracy in (ours, theirs)]
            print(f"{n:4}/{batches:<4}  {ours:6.1%} {bars[0]:<25}{theirs:6.1%} {bars[1]}", flush=True)

    return print_line


def print_beside(method, results, naive, seconds):
    """The final figures of the demo: of a method and of fine-tuning, as `run` returns them."""
    n_test = results["rows"][-1]["n_test"]
    ours = results["final_accuracy"]
    theirs = naive["final_accuracy"]
    print(f"After {seconds:.0f} s, {method} knows {ours:.1%} of the {n_test} test images, naive fine-tuning "
          f"{theirs:.1%}.")


def print_results(results):
    """The final figures of a run, as `run` returns them."""
    rows = results["rows"]
    last = rows[-1]
    final = results["final_accuracy"]
    mean = results["mean_accuracy"]
    print(f"accuracy after {len(rows)} of {last['batches']} batches, on {last['n_test']:,} test images: "
          f"{final:.2%} (mean over the {len(rows)} tests: {mean:.2%})")


def print_where_curves_are(log_dir):
    """Where the curves and the table of runs are, and what this process took of the main memory at most."""
    memory = ""
    if resource is not None:
        unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20      # macOS counts bytes, Linux KiB
        memory = f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GiB; "
    print(f"{memory}curves: tensorboard --logdir {log_dir}; table: python {PROGRAM} --report {log_dir}")


# ---- errors ----

def explain(error):
    """What is wrong and what to do, in one sentence."""
    text = " ".join(str(error).split()) or type(error).__name__

    if isinstance(error, MemoryError) or any(sign in text for sign in NO_MEMORY):
        return (f"out of memory ({text:.100}); lower max_latents_gb with --set and run the same command "
                "again, or lower rm_sz or mb_size and start over with --fresh")

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (f"the disk is full ({text}): the last checkpoint is kept; make room and run the same command "
                "again")

    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
        return f"cannot use {os.fsdecode(error.filename)} ({error.strerror})"

    if is_of_another_network(error):
        return ("the checkpoint is of another network, so the data or the program have changed since: put "
                "them back, choose another --log-dir, or start over with --fresh")

    # by name: these classes' files bring torch, which errors of the command line do without
    kind = type(error).__name__
    right_now = f"; `python {PROGRAM} --name demo` runs right now, without any download"
    if kind == "MissingData":
        return f"{text}, or add --download to this command{right_now}"
    if kind == "WeightsError":
        return text + right_now

    if hasattr(error, "exit_status") or isinstance(error, OSError):      # its text is one sentence
        return text

    return f"unexpected {kind} ({text:.300}): this is a bug; please report it with what --debug shows"


def exit_status(error):
    """The exit status of a program that an error ends."""
    return getattr(error, "exit_status", 2 if is_of_another_network(error) else 1)


def is_of_another_network(error):
    """Whether a checkpoint did not fit: torch has no type of its own for this error."""
    return isinstance(error, RuntimeError) and "loading state_dict" in str(error)
