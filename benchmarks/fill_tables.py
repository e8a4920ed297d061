"""Fills the tables of results in README and docs with the numbers of the records.

    python benchmarks/fill_tables.py                                    all pages
    python benchmarks/fill_tables.py docs/memory.md --results docs/results

A table of results has `run` as its first column; a row of it names a folder of runs below --results, as `rendered/pool6`.
Columns that begin with a name of COLUMNS are filled, all others are left as they are. Accuracies are in percent, means over
the folder's runs where there are several.
"""
import argparse
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.command_line import status_of
from lab.record import say
from lab.report import LAST_TESTS, ReportError, find_runs

PAGES = ("README.md", "docs/findings.md", "docs/memory.md", "docs/speed.md", "docs/results/README.md")
NAME = re.compile(r"`(\w+/\w+)`")
CELLS = re.compile(r"(?<!\\)\|")        # between two cells; \| is text


def mean(of, digits=".1f", scale=1):
    """A column: the mean of a number that `of` takes from a Run, as text."""
    return lambda runs: f"{scale * statistics.fmean(map(of, runs)):{digits}}"


def on_gpu(column):
    """A column of times, which says so where they are not those of a CPU."""
    return lambda runs: column(runs) + " (GPU)" * (not runs[0].on_cpu)


COLUMNS = {
    "at the end": mean(lambda run: run.accuracy(), scale=100),
    "last ten": mean(lambda run: run.mean_accuracy(LAST_TESTS), scale=100),
    "all": mean(lambda run: run.mean_accuracy(), scale=100),
    "each": lambda runs: " / ".join(f"{run.accuracy():.1%}".strip("%") for run in runs) if len(runs) > 1 else "",
    "forgetting": mean(lambda run: run.told("forgetting"), scale=100),
    "worst class": mean(lambda run: run.worst_class(), scale=100),
    "kept": lambda runs: mean(lambda run: run.told("kept_mb"))(runs) + " MB",
    "seconds a batch": on_gpu(mean(lambda run: run.seconds_a_batch())),
    "minutes": on_gpu(lambda runs: f"{max(1, round(statistics.fmean(run.minutes() for run in runs)))}"),
}


def fill(text, results):
    """The text of a page, its tables filled from the records below `results`. ReportError names a row without records."""
    lines, columns = text.split("\n"), []
    for k, line in enumerate(lines):
        if not line.startswith("|"):
            columns = []
        cells = [cell.strip() for cell in CELLS.split(line)[1:-1]]
        if cells[:1] == ["run"]:
            columns = [next((fn for name, fn in COLUMNS.items() if cell.startswith(name)), None) for cell in cells]
        elif columns and (name := NAME.fullmatch(cells[0])):
            runs = [run for run in find_runs(Path(results) / name[1])[0] if run.finished]
            if not runs:
                raise ReportError(f"{name[1]} has no finished run below {results}")
            filled = [column(runs) if column else cell for column, cell in zip(columns, cells, strict=True)]
            lines[k] = "|" + "|".join(f" {cell} " if cell else " " for cell in filled) + "|"
    return "\n".join(lines)


def fill_pages(pages, results):
    """Writes the pages whose numbers are not those of the records, and says which."""
    for page in map(Path, pages):
        try:
            old = page.read_text(encoding="utf-8")
        except OSError as error:
            raise ReportError(f"{page}: {error.strerror}") from error
        if (new := fill(old, results)) != old:
            page.write_text(new, encoding="utf-8")
        say(f"{page}: {sum(a != b for a, b in zip(old.split(chr(10)), new.split(chr(10))))} rows changed")


def main(argv=None):
    """Returns the exit status: 0 done, 2 bad input, 1 failure on the way, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE.md", help="(default: all pages that have such tables)")
    parser.add_argument("--results", default=ROOT / "docs" / "results", metavar="DIR", help="(default docs/results)")
    args = parser.parse_args(argv)
    pages = args.pages or [ROOT / page for page in PAGES]
    return status_of(parser.prog, lambda: fill_pages(pages, args.results))


if __name__ == "__main__":
    sys.exit(main())
