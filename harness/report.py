"""All the runs below a log folder as one table, beside the published numbers, and as a plot.

    python ar1star_lat_replay.py --report logs --markdown --plot curves.png
    text = report("logs", markdown=True, plot="curves.png")

A run is a folder EXPERIMENT/run{R}_seed{S} with results.jsonl and config.yaml. Finished runs of one
experiment that differ in nothing but order and seed (and in what cannot change a result) are averaged.
"""
import json
import math
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import yaml

from harness.config import Config, ConfigError
from harness.published import curve, published

LAST_TESTS = 10     # a single test swings by some points
DASHES = ("-", "--", ":", "-.")

EXPLANATION = (
    f"Accuracy on the test set after the last batch; its mean over the last {LAST_TESTS} tests, as a single "
    "one swings by some points; its mean over all tests. Forgetting: what a class had at its best minus "
    "what it has at the end, mean over the classes. Worst class: the lowest accuracy of a class at the end. "
    "MB kept: all that is stored for later batches (memory, head, statistics). Seconds a batch: of those "
    "after the first, tests included. Minutes: of a run. Means over the runs, +- sample standard deviation "
    "over orders (each the mean of its seeds) and over the seeds of an order.")


class ReportError(ConfigError):
    """A report that cannot be made: what is missing, in one sentence."""


class Run(NamedTuple):
    """A run folder: its settings and its records."""
    folder: Path
    config: dict
    rows: dict      # {batch: line of results.jsonl}, in order of the batches

    @property
    def last(self):
        """The record of the last batch; {} where there is none."""
        return self.rows[max(self.rows)] if self.rows else {}

    @property
    def batches(self):
        """How many batches its stream has."""
        return self.last.get("batches")

    @property
    def finished(self):
        """Whether all of them have been learned."""
        return bool(self.rows) and max(self.rows) + 1 == self.batches

    @property
    def on_cpu(self):
        """Whether its times are those of a CPU, as far as its records say."""
        return str(self.last.get("device", "cpu")).startswith("cpu")

    def accuracy(self, learned=None):
        """Accuracy in 0..1 after so many batches (None: all), or the nearest before whose record is there."""
        tested = [batch for batch in self.rows if learned is None or batch < learned] or [min(self.rows)]
        return self.rows[tested[-1]]["test_accuracy"]

    def mean_accuracy(self, tests=0):
        """Mean over the last so many tests (0: over all), in 0..1."""
        return statistics.fmean(row["test_accuracy"] for row in list(self.rows.values())[-tests:])

    def told(self, key):
        """A number of the last batch's record; None where it has no such number."""
        value = self.last.get(key)
        return value if _is_number(value) else None

    def worst_class(self):
        """Accuracy in 0..1 on the class with the lowest one at the end; None where no class's is stored."""
        return min(filter(_is_number, self.last.get("per_class") or []), default=None)

    def seconds(self):
        """{batch: seconds that it took, its test included}."""
        return {batch: sum(value for key, value in row.items() if key.startswith("seconds_"))
                for batch, row in self.rows.items()}

    def minutes(self):
        """Minutes that its batches took, tests included."""
        return sum(self.seconds().values()) / 60

    def seconds_a_batch(self):
        """Mean over the batches after the large first one, tests included; None where there is none."""
        later = [seconds for batch, seconds in self.seconds().items() if batch > 0]
        return statistics.fmean(later) if later else None


# ---- finding the runs ----

def find_runs(log_dir):
    """([Run, ...], [note, ...]) of everything below log_dir; a note says what is damaged and left out."""
    runs = []
    notes = []
    for results in sorted(Path(log_dir).rglob("results.jsonl")):
        folder = results.parent
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            if not isinstance(config, dict) or not {"run", "seed"} <= config.keys():
                raise ValueError("its config.yaml holds no settings")
            rows, damaged = read_rows(results.read_text(encoding="utf-8", errors="replace"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            notes.append(f"{folder} is left out: {_one_line(error)}")
            continue

        if damaged:
            notes.append(f"{results}: damaged lines are left out: {ranges(damaged)}")
        runs.append(Run(folder, config, rows))
    return runs, notes


def read_rows(text):
    """({batch: row} in order of the batches, numbers of the damaged lines) of a results.jsonl."""
    rows = {}
    damaged = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            if type(row["batch"]) is not int or row["batch"] < 0 or not 0 <= row["test_accuracy"] <= 1:
                raise ValueError("not the record of a batch")
            rows[row["batch"]] = row
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged.append(number)
    return dict(sorted(rows.items())), damaged


def group(runs, log_dir):
    """([(label, [Run, ...]), ...], [note, ...]) of finished runs, those of one experiment together.

    A label is the experiment's name; where that is not enough, its folder, and then the settings that differ.
    """
    groups = {}     # {(name, settings as text): {(order, seed): Run}}
    notes = []
    for run in runs:
        key = run.folder.parent.name, json.dumps(_settings(run), sort_keys=True, default=str)
        twin = groups.setdefault(key, {}).setdefault((run.config["run"], run.config["seed"]), run)
        if twin is not run:
            notes.append(f"{run.folder} is left out: it has settings, order and seed of {twin.folder}")
    alike = [[run for _, run in sorted(by_order.items())] for by_order in groups.values()]

    labels = [name for name, _ in groups]
    if len(set(labels)) < len(labels):      # then all get their folders: half of them with one reads badly
        labels = [", ".join(sorted({run.folder.parent.relative_to(log_dir).as_posix() for run in runs}))
                  for runs in alike]

    experiments = []
    for label, runs in zip(labels, alike, strict=True):
        settings = _settings(runs[0])
        others = [_settings(other[0]) for name, other in zip(labels, alike, strict=True) if name == label]
        differing = [f"{key}={settings[key]}" for key in sorted(settings)
                     if any(other.get(key) != settings[key] for other in others)]
        if differing:
            label += f" ({', '.join(differing)})"
        experiments.append((label, runs))
    return sorted(experiments, key=lambda experiment: experiment[0]), notes


def _settings(run):
    """What runs of one experiment have in common."""
    may_differ = ("run", "seed", *Config.MAY_CHANGE)
    settings = {key: value for key, value in run.config.items() if key not in may_differ}
    return settings | {key: run.last.get(key) for key in ("data", "n_test", "batches")}


# ---- the table ----

COLUMNS = {     # {header: the cell of an experiment's runs}
    "runs": lambda runs: str(len(runs)),
    "orders": lambda runs: ranges({run.config["run"] for run in runs}),
    "seeds": lambda runs: ranges({run.config["seed"] for run in runs}),
    "batches": lambda runs: str(runs[0].batches),
    "test images": lambda runs: str(runs[0].last.get("n_test", "-")),
    "final accuracy %": lambda runs: spread(runs, Run.accuracy),
    f"mean of last {LAST_TESTS} tests %":
        lambda runs: spread(runs, lambda run: run.mean_accuracy(LAST_TESTS)),
    "mean of all tests %": lambda runs: spread(runs, Run.mean_accuracy),
    "forgetting %": lambda runs: spread(runs, lambda run: run.told("forgetting")),
    "worst class %": lambda runs: spread(runs, Run.worst_class),
    "MB kept": lambda runs: mean(runs, lambda run: run.told("kept_mb"), ".1f"),
    "seconds a batch": lambda runs: mean(runs, Run.seconds_a_batch, ".2f"),
    "minutes": lambda runs: mean(runs, Run.minutes, ".1f"),
    "device": lambda runs: ", ".join(sorted({str(run.last.get("device", "-")) for run in runs})),
}


def table(experiments):
    """(header, lines, footnotes): lists of text; accuracies in percent, "-" where no record says it."""
    lines = []
    numbers = {}    # {source: number of its footnote}
    for label, runs in experiments:
        beside = []
        for result in published(runs[0]):
            number = numbers.setdefault(result.source, len(numbers) + 1)
            about = "~" if result.about else ""
            std = f" +- {result.std:g}" if result.std else ""
            beside.append(f"{about}{result.accuracy:g}{std} [{number}]")
        lines.append([label, *(cell(runs) for cell in COLUMNS.values()), ", ".join(beside) or "-"])
    footnotes = [f"[{number}] {source}" for source, number in numbers.items()]
    return ["experiment", *COLUMNS, "published"], lines, footnotes


def mean(runs, number, digits):
    """The mean of number(run) as text; "-" if one is None, as the others' mean is not the experiment's."""
    values = [number(run) for run in runs]
    return "-" if None in values else f"{statistics.fmean(values):{digits}}"


def spread(runs, share):
    """The mean of share(run), in 0..1, as text in percent, with its sample standard deviations: over orders
    (each the mean of its seeds), and over the seeds of an order. "-" if one is None."""
    shares = [share(run) for run in runs]
    if None in shares:
        return "-"
    values = [100 * value for value in shares]
    orders = {}     # {order: values of its seeds}
    for run, value in zip(runs, values, strict=True):
        orders.setdefault(run.config["run"], []).append(value)

    stds = []
    if len(orders) > 1:
        stds.append(f"+- {statistics.stdev(map(statistics.fmean, orders.values())):.1f} over orders")
    if len(values) > len(orders):
        squares = sum((value - statistics.fmean(seeds)) ** 2 for seeds in orders.values() for value in seeds)
        stds.append(f"+- {math.sqrt(squares / (len(values) - len(orders))):.1f} over seeds")
    return f"{statistics.fmean(values):.1f} {', '.join(stds)}".rstrip()


def ranges(numbers):
    """ "0-2, 5" of whole numbers 0, 1, 2, 5. """
    spans = []
    for n in sorted(numbers):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


def report(log_dir, markdown=False, plot=None):
    """The report of all runs below log_dir, as text or Markdown. plot: file to draw curves into, or None."""
    runs, notes = find_runs(log_dir)
    if not runs:
        why = f" ({notes[0]})" if notes else ""
        raise ReportError(f"there are no runs below {log_dir}: give --report the folder of --log-dir{why}")
    experiments, more_notes = group([run for run in runs if run.finished], log_dir)
    if plot is not None:
        draw(experiments, plot)

    header, lines, sources = table(experiments)
    layout = _markdown if markdown else _aligned
    parts = [
        layout(header, lines) if lines else "No run has finished yet.",
        EXPLANATION if lines else "",
        "\n".join(sources),
        _listed("unfinished", [_progress(run) for run in runs if not run.finished]),
        _listed("notes", notes + more_notes),
    ]
    text = ("\n\n" if markdown else "\n").join(part for part in parts if part)
    return text.replace("+-", "±") if markdown else text


def _progress(run):
    if not run.rows:
        return f"{run.folder}: no batch yet"
    return f"{run.folder}: {max(run.rows) + 1} of {run.batches} batches, {run.accuracy():.1%}"


def _listed(title, items):
    return "\n".join([f"{title}:", *(f"- {item}" for item in items)]) if items else ""


def _aligned(header, lines):
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in [header, *lines])


def _markdown(header, lines):
    escaped = [[re.sub(r"([|*_])", r"\\\1", cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *escaped])


def _one_line(error):
    return " ".join(str(error).split())[:120]


def _is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


# ---- the plot ----

def draw(experiments, path):
    """Mean accuracy after each batch, a curve for each experiment, in a band of its runs' standard deviation.

    Gray and thin behind them: the published curves of the settings that these have. Needs matplotlib.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        raise ReportError("--plot needs matplotlib: pip install matplotlib, or leave --plot out") from None
    if not experiments:
        raise ReportError("there is nothing to plot: no run has finished yet")

    best_first = sorted(experiments, key=lambda e: -statistics.fmean(run.accuracy() for run in e[1]))
    behind = {f"published {result.method} on {result.scenario}, 10 orders": curve(result)
              for _, runs in best_first for result in published(runs[0]) if curve(result)}
    longest = max(map(len, [*behind, *(label for label, _ in experiments)]))
    figure = Figure(figsize=(7.2 + .07 * longest, 4.2), layout="constrained")
    axes = figure.subplots()

    in_batches = len({runs[0].batches for _, runs in experiments}) == 1     # else x is their share
    for k, (label, points) in enumerate(behind.items()):
        _draw_curve(axes, in_batches, points, label, "gray", DASHES[k % 4], width=1, zorder=1)
    for k, (label, runs) in enumerate(best_first):
        points = []
        for learned in range(1, runs[0].batches + 1):
            values = [run.accuracy(learned) for run in runs]
            points.append((statistics.fmean(values), statistics.stdev(values) if len(runs) > 1 else 0))
        number = f", {len(runs)} runs" if len(runs) > 1 else ""
        color = colormaps["tab10"](k % 10)
        _draw_curve(axes, in_batches, points, label + number, color, DASHES[k // 10 % 4], width=1.8, zorder=3)

    axes.set(xlabel=f"{'' if in_batches else 'share of the '}incremental batches learned",
             ylabel="accuracy on the test set", ylim=(0, None), xlim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if not in_batches:
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=.25)
    figure.legend(frameon=False, loc="outside right upper")
    save(figure, path, dpi=150)


def _draw_curve(axes, in_batches, points, label, color, dashes, width, zorder):
    """One curve of [(mean, std), ...] in 0..1, a point after each batch, in a band where there is a std."""
    x = [k if in_batches else k / len(points) for k in range(1, len(points) + 1)]
    mean, std = zip(*points, strict=True)
    label = f"{label}: {mean[-1]:.1%}"
    axes.plot(x, mean, label=label, color=color, linestyle=dashes, linewidth=width, zorder=zorder)
    if any(std):
        low = [m - s for m, s in points]
        high = [m + s for m, s in points]
        axes.fill_between(x, low, high, color=color, alpha=.2, linewidth=0, zorder=zorder - .5)


def save(figure, path, dpi):
    """Writes a figure of matplotlib into a file; raises ReportError where that fails."""
    try:
        figure.savefig(path, dpi=dpi)
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot write the plot to {path}: {_one_line(error)}") from error
