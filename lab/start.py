"""The start of a program whose imports take seconds: a quiet end on Ctrl-C, and no time lost on garbage.

    begin_imports()
    import torch
    end_imports()
"""
import gc
import signal
from contextlib import suppress


def begin_imports():
    """From now on Ctrl-C ends the program without a traceback (a shell sees status 130), and no garbage is looked for.

    Imports leave hardly any, and looking for it among all that torch brings takes 0.6 s, and 0.8 s more at the end.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()


def end_imports():
    """From now on Ctrl-C raises KeyboardInterrupt, and garbage is looked for, but not among what has been imported."""
    with suppress(ValueError):      # not in the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not gc.isenabled():
        gc.enable()
        gc.freeze()
