"""Where the lines go that a program prints, and its name in them."""
import os
import sys
from contextlib import suppress

PROGRAM = "ar1star_lat_replay.py"


def mend_output():
    """Lets what is printed go somewhere: a closed descriptor would become that of the next file opened, and a terminal
    that has no sign for a letter shows its code instead of ending the program."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):     # a program may have put something of its own there
            stream.reconfigure(errors="backslashreplace")


def leave_broken_stdout():
    """If what we print cannot go anywhere (`| head`, a full disk), prevents a second complaint when the program ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
