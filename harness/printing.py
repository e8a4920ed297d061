"""What is printed instead of a run (--list, --list-layers, --report), beside one and after it."""
import math
import shlex
import sys

from harness.config import list_experiments
from harness.errors import PROGRAM
from harness.report import report

try:
    import resource
except ImportError:     # Windows
    resource = None


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

    size = 48 if config.dataset == "demo" else config.image_size
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
    tests = f"the {len(rows)} tests" if len(rows) > 1 else "this one test"
    print(f"accuracy after {len(rows)} of {last['batches']} batches, on {last['n_test']:,} test images: "
          f"{final:.2%} (mean over {tests}: {mean:.2%})")
    seen = last.get("n_test_seen", last["n_test"])
    if seen < last["n_test"]:
        print(f"on the {seen:,} test images of the {last['classes_seen']} classes met so far: "
              f"{last['accuracy_seen']:.2%}")


def print_where_curves_are(log_dir):
    """Where the curves and the table of runs are, and what this process took of the main memory at most."""
    memory = ""
    if resource is not None:
        unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20      # macOS counts bytes, Linux KiB
        memory = f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GiB; "
    folder = shlex.quote(str(log_dir))
    print(f"{memory}curves: tensorboard --logdir {folder}; table: python {PROGRAM} --report {folder}")
