"""Runs anew what the tables tell of, and holds each run beside its record.

    python benchmarks/rerun.py rendered --data core50_standin --weights tflite
    python benchmarks/rerun.py rendered/pool6 rendered/naive --data core50_standin --jobs 2

The commands are those of docs/results/README.md, as they stand there. They run in --log-dir, and what each
prints goes into a file there; runs that are finished are not repeated, so the same command goes on after an
interruption. Then it prints, for each run, the accuracy after the last batch and the mean over all tests, in
percent: recorded, now, and the difference. On the kind of device that made the record, differences are a few
tenths of a point at most.
"""
import argparse
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from harness.config import ConfigError
from harness.console import errors_as_sentences, say
from harness.report import find_runs

COMMAND = re.compile(r"^\| `(\w+/\w+)` \| `python ([^`]+)` \|", re.M)
HEADER = """| run | recorded: at the end | all tests | now: at the end | all tests | difference |
|---|---|---|---|---|---|"""


class Failed(Exception):
    """Commands that ended otherwise than they should."""
    exit_status = 1


def commands(results, names):
    """{row: arguments of its command} of the rows that the names, of rows or of data sets, mean."""
    page = Path(results) / "README.md"
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{page}: {error.strerror}; --results names the folder of the records") from error
    rows = {row: shlex.split(command) for row, command in COMMAND.findall(text)}

    found = {}
    for name in names:
        meant = [row for row in rows if name in (row, row.partition("/")[0])]
        if not meant:
            raise ConfigError(f"{page} tells of no {name!r}; it has {', '.join(rows) or 'no rows'}")
        for row in meant:
            found[row] = rows[row]
    return found


def logs_of(row, args):
    """The folder that a row's runs are made in: one for a data set, since rows of two may have one name."""
    return Path(args.log_dir) / row.partition("/")[0]


def run(row, command, args):
    """Runs a row's command to its end; what it prints is appended to a file. Returns its exit status."""
    logs = logs_of(row, args)
    logs.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, str(ROOT / command[0]), *command[1:], "--log-dir", str(logs)]
    for key in ("data", "weights", "device"):
        value = getattr(args, key)
        if value:
            program += [f"--{key}", value]
    environment = dict(os.environ)
    if args.jobs > 1:       # share the cores, unless told otherwise
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))

    printed = logs / f"{row.partition('/')[2]}.log"
    say(f"{row}: begins; what it prints is in {printed}")
    with open(printed, "a", encoding="utf-8") as file:
        done = subprocess.run(program, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
    status = done.returncode
    say(f"{row}: done" if status == 0 else f"{row}: ended with status {status}, see {printed}")
    return status


def compare(row, command, args):
    """Prints a line of the table for each run of a row, of one that has no record yet too."""
    name = command[command.index("--as") + 1]
    runs, _ = find_runs(logs_of(row, args) / name)
    again = {run.folder.name: run for run in runs if run.finished}
    recorded, _ = find_runs(Path(args.results) / row)
    for folder, now in again.items() if not recorded else ():
        cells = f"{100 * now.accuracy():.1f} | {100 * now.mean_accuracy():.1f}"
        print(f"| {row} {folder} | not run | | {cells} | |")
    for then in recorded:
        now = again.get(then.folder.name)
        cells = [then.accuracy(), then.mean_accuracy()]
        if now:
            cells += [now.accuracy(), now.mean_accuracy(), now.accuracy() - then.accuracy()]
        cells = [f"{100 * value:.1f}" for value in cells] + ([] if now else ["not finished", "", ""])
        print(f"| {row} {then.folder.name} | {' | '.join(cells)} |")


def rerun(args):
    """Runs, compares and prints. Raises Failed, at the end, where a command failed."""
    rows = commands(args.results, args.rows)
    with ThreadPoolExecutor(args.jobs) as pool:
        statuses = list(pool.map(lambda row: run(row, rows[row], args), rows))
    print(HEADER)
    for row, command in rows.items():
        compare(row, command, args)
    failed = [row for row, status in zip(rows, statuses, strict=True) if status]
    if failed:
        raise Failed(f"failed: {', '.join(failed)}; see what they printed in {args.log_dir}/{failed[0]}.log")


def main(argv=None):
    """Returns the exit status: 0 done, 1 a command failed, 2 bad input, 130 interrupted."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("rows", nargs="+", metavar="ROW",
        help="all rows of a data set, such as rendered; or rows such as rendered/pool6")
    add("--data", metavar="DIR", help="folder of the data set")
    add("--weights", metavar="FILE", help="pre-trained weights")
    add("--device", metavar="auto|cpu|cuda[:n]")
    add("--jobs", type=int, default=1, metavar="N", help="commands that run at the same time (default 1)")
    add("--log-dir", default="logs_again", metavar="DIR", help="(default logs_again)")
    add("--results", default=ROOT / "docs" / "results", metavar="DIR",
        help="folder of the records (default docs/results)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; it must be at least 1")
    args.log_dir = os.path.abspath(args.log_dir)
    with errors_as_sentences(parser.prog) as outcome:
        rerun(args)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
