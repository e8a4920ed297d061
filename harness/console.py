"""The terminal: safe printing, errors as one sentence each, Ctrl-C, how far a run is. Needs no torch."""
import gc
import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress

from harness.errors import exit_status, explain, is_missing_package

STOPPING = b"\nstopping at the end of this batch; press Ctrl-C again to stop at once\n"
CONTINUES = "the same command continues from the last checkpoint"


# ---- the start of a program ----

def begin_imports():
    """To be called before imports that take seconds: Ctrl-C then ends the program without a traceback.

    No garbage is collected, either: imports leave hardly any, and looking for it among all that torch brings
    takes 0.6 s. Packages are named as name_missing_packages does.
    """
    name_missing_packages()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()


def end_imports():
    """To be called after them: Ctrl-C raises KeyboardInterrupt, and garbage is collected again."""
    with suppress(ValueError):      # not in the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not gc.isenabled():
        gc.enable()
        gc.freeze()     # what has been imported stays


def name_missing_packages():
    """To be called by a program before it imports packages: one that is missing is then told in a sentence
    instead of a traceback. Other errors are told as before."""
    before = sys.excepthook

    def tell(kind, error, traceback):
        if is_missing_package(error):
            print(f"{os.path.basename(sys.argv[0])}: {explain(error)}", file=sys.stderr)
        else:
            before(kind, error, traceback)

    sys.excepthook = tell


def safe_output():
    """Makes printing safe where stdout or stderr is closed, and on a terminal that lacks some letters."""
    # a closed descriptor becomes that of the next file opened, and what is printed would go into that file
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")

    if terminal_has_no_size():      # tqdm reads these when it is imported, and draws nothing without a size
        os.environ.setdefault("TQDM_NCOLS", "80")
        os.environ.setdefault("TQDM_NROWS", "24")

    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):     # a program may have replaced them
            stream.reconfigure(errors="backslashreplace")


def leave_broken_stdout():
    """Where stdout is broken (`| head`, a full disk), prevents a second error when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- errors as sentences ----

class Outcome:
    """How a program ended: `status` is its exit status."""
    status = 0


@contextmanager
def errors_as_sentences(program, stopped="stopped", debug=False):
    """An error inside is printed as one sentence, behind the name of the program, and goes no further.

    Yields an Outcome, whose status is afterwards 0, 130 after Ctrl-C, or the error's `exit_status` (1 where
    it has none). stopped: what is said of a Ctrl-C that brings no words of its own; debug: errors are raised
    instead.
    """
    outcome = Outcome()
    try:
        yield outcome
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        outcome.status = 130
        print(str(error) or stopped, file=sys.stderr)
    except Exception as error:
        if debug:
            raise
        outcome.status = exit_status(error)
        if isinstance(error, OSError):
            leave_broken_stdout()
        if not isinstance(error, BrokenPipeError):      # `| head` has read all that it wants
            print(f"{program}: {explain(error)}", file=sys.stderr)


# ---- Ctrl-C ----

class Stop:
    """True once Ctrl-C or SIGTERM has asked a run to end; while `at_once` is set, they end it right there."""

    def __init__(self):
        self.asked = False
        self.at_once = True

    def __bool__(self):
        return self.asked


@contextmanager
def finishing_the_batch():
    """Ctrl-C (or SIGTERM) inside lets the present batch end, so that it can be saved.

    A second one stops at once. Yields a Stop; while its `at_once` is set, the first one does, too: batch 0 of
    a new run takes long, and there is nothing to save.
    """
    stop = Stop()

    def handle(number, frame):
        if stop.at_once:
            raise KeyboardInterrupt("stopped; no batch had been learned yet, so the same command starts anew")
        if stop.asked:
            raise KeyboardInterrupt(f"stopped at once; {CONTINUES}")
        stop.asked = True
        with suppress(OSError, ValueError):     # no print: the signal may have interrupted another one
            os.write(sys.stderr.fileno(), STOPPING)

    with _on_signal(handle):
        yield stop


def leaving_at_once():
    """Ctrl-C and SIGTERM raise KeyboardInterrupt inside, even within finishing_the_batch."""
    return _on_signal(signal.default_int_handler)


@contextmanager
def _on_signal(handler):
    before = {}
    with suppress(ValueError):      # not in the main thread: signals go elsewhere
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


# ---- what a run says ----

def say(text):
    """One line on what a program is doing, to standard error and at once; a progress bar stays below it."""
    from tqdm import tqdm  # not above: begin_imports has to run where it is missing

    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


@contextmanager
def progress_bar():
    """Yields a function for `run`'s after_batch, which shows how far the run is.

    A bar on a terminal; a line a batch elsewhere (a cluster's log), where processes share a terminal, and
    where it has no size.
    """
    from tqdm import tqdm

    shared = os.environ.get("WORLD_SIZE", "1") != "1"
    with tqdm(unit="batch", disable=shared or terminal_has_no_size() or None) as bar:

        def advance(rows, batches):
            last = rows[-1]
            if bar.disable:
                seconds = sum(value for key, value in last.items() if key.startswith("seconds_"))
                say(f"batch {len(rows)} of {batches}: accuracy {last['test_accuracy']:.1%}, {seconds:.1f} s")
            # the batches that an earlier command learned do not count for this one's pace
            if bar.total is None:
                bar.total = batches
                bar.initial = bar.n = bar.last_print_n = len(rows) - 1
            bar.update(len(rows) - bar.n)
            bar.set_postfix_str(f"accuracy {last['test_accuracy']:.1%}")

        yield advance


def terminal_has_no_size():
    """Whether standard error is a terminal without columns or lines, on which tqdm would show nothing.

    A fresh pseudo-terminal is one: those of containers, of CI and of `script`.
    """
    try:
        return 0 in os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):       # no terminal, or a program has replaced it
        return False


def report_thread(failure):
    """For threading.excepthook: TensorBoard's thread hands an OSError on to the run, which says it."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)
