"""Fills the tables of results in README and docs with the numbers of the records.

    python benchmarks/fill_tables.py                                    all pages
    python benchmarks/fill_tables.py docs/memory.md --results docs/results

A table of results has `run` as its first column; a row of it names a folder of runs below --results, as
`rendered/pool6`. Columns whose title begins with a name of COLUMNS are filled, all others stay as they are.
Accuracies are in percent, means over the folder's runs where there are several.
"""
import argparse
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from harness.console import errors_as_sentences, say
from harness.report import LAST_TESTS, ReportError, find_runs

PAGES = ("README.md", "docs/findings.md", "docs/memory.md", "docs/own_images.md", "docs/results/README.md",
         "docs/results/cifar100.md", "docs/results/tables.md")
NAME = re.compile(r"`(\w+/\w+)`")
CELLS = re.compile(r"(?<!\\)\|")        # between two cells; \| is text


def percent(number_of):
    """A column: the mean over the runs of a number in 0..1, in percent."""
    return lambda runs: f"{100 * statistics.fmean(map(number_of, runs)):.1f}"


def each(runs):
    """The accuracy of each run at the end; nothing where there is one run alone."""
    if len(runs) == 1:
        return ""
    return " / ".join(f"{100 * run.accuracy():.1f}" for run in runs)


def kept(runs):
    """MB kept for later batches."""
    return f"{statistics.fmean(run.told('kept_mb') for run in runs):.1f} MB"


def seconds(runs):
    """Seconds a batch, after the large first one."""
    return f"{statistics.fmean(run.seconds_a_batch() for run in runs):.1f}" + device(runs)


def minutes(runs):
    """Minutes of one run, at least 1."""
    mean = statistics.fmean(run.minutes() for run in runs)
    return f"{max(1, round(mean))}" + device(runs)


def device(runs):
    """What stands behind a time that is not that of a CPU."""
    return "" if runs[0].on_cpu else " (GPU)"


COLUMNS = {
    "at the end": percent(lambda run: run.accuracy()),
    "last ten": percent(lambda run: run.mean_accuracy(LAST_TESTS)),
    "all": percent(lambda run: run.mean_accuracy()),
    "each": each,
    "forgetting": percent(lambda run: run.told("forgetting")),
    "worst class": percent(lambda run: run.worst_class()),
    "kept": kept,
    "seconds a batch": seconds,
    "minutes": minutes,
}


def column_of(title):
    """The function that fills a column with this title: runs to text. None: it is left as it is."""
    return next((fill_in for name, fill_in in COLUMNS.items() if title.startswith(name)), None)


def fill(text, results):
    """The text of a page, its tables filled from the records below `results`. ReportError: a row has none."""
    lines = text.split("\n")
    columns = []        # of the table that the line is in; [] outside of tables of results

    for k, line in enumerate(lines):
        if not line.startswith("|"):
            columns = []
            continue

        cells = [cell.strip() for cell in CELLS.split(line)[1:-1]]
        if cells[:1] == ["run"]:
            columns = [column_of(title) for title in cells]
            continue

        name = NAME.fullmatch(cells[0]) if columns else None
        if name:
            runs = [run for run in find_runs(Path(results) / name[1])[0] if run.finished]
            if not runs:
                raise ReportError(f"{name[1]} has no finished run below {results}")
            cells = [column(runs) if column else cell for column, cell in zip(columns, cells, strict=True)]
            lines[k] = "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"

    return "\n".join(lines)


def fill_pages(pages, results):
    """Writes the pages whose numbers are not those of the records, and says how many rows have changed."""
    for page in map(Path, pages):
        try:
            old = page.read_text(encoding="utf-8")
        except OSError as error:
            raise ReportError(f"{page}: {error.strerror}") from error

        new = fill(old, results)
        if new != old:
            page.write_text(new, encoding="utf-8")
        changed = sum(a != b for a, b in zip(old.split("\n"), new.split("\n"), strict=True))
        say(f"{page}: {changed} rows changed")


def main(argv=None):
    """Returns the exit status: 0 done, 2 bad input, 1 failure on the way, 130 interrupted."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("pages", nargs="*", metavar="PAGE.md", help="(default: all pages that have such tables)")
    add("--results", default=ROOT / "docs" / "results", metavar="DIR", help="(default docs/results)")
    args = parser.parse_args(argv)

    pages = args.pages or [ROOT / page for page in PAGES]
    with errors_as_sentences(parser.prog) as outcome:
        fill_pages(pages, args.results)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
