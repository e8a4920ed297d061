"""All the runs below a log folder as one table, beside the published numbers, and as a plot.

    python ar1star_lat_replay.py --report logs --markdown --plot curves.png
    text = report("logs", markdown=True, plot="curves.png")

A run is a folder with results.jsonl and config.yaml, EXPERIMENT/run{R}_seed{S}. Runs of one experiment that differ in
nothing but order and seed (and in what cannot change a result) are averaged. Only finished runs enter the table.

Uses lab.config, lab.published, matplotlib (for --plot alone), yaml.
"""
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import yaml

from lab.config import Config, ConfigError
from lab.published import BATCHES, curve, published

LAST_TESTS = 10     # a single test swings by some points
SAME_EXPERIMENT = ("run", "seed", *Config.FREE)     # settings that may differ between the runs of one experiment

EXPLANATION = (
    f"Accuracy on the test set after the last batch; its mean over the last {LAST_TESTS} tests, as a single one swings by "
    "some points; its mean over all tests. Forgetting: what a class had at its best minus what it has at the end, mean over "
    "the classes. Worst class: the lowest accuracy of a class at the end. MB kept: all that is stored for later batches "
    "(memory, head, statistics). Seconds a batch: of those after the first, tests included. Minutes: of a run. Means over "
    "the runs, +- sample standard deviation over orders (each the mean of its seeds) and over the seeds of an order.")


class ReportError(ConfigError):
    """A report that cannot be made: what is missing, in one sentence."""


class Run(NamedTuple):
    """A run folder: its settings and its records."""
    folder: Path
    config: dict
    rows: dict              # {batch: line of results.jsonl}
    batches: int | None     # in all; None where nothing says it

    @property
    def last(self):
        """The record of the last batch."""
        return self.rows[max(self.rows)]

    @property
    def finished(self):
        """Whether all its batches have been learned."""
        return bool(self.rows) and self.batches in (None, max(self.rows) + 1)

    def accuracy(self, share=1.0):
        """Accuracy in 0..1 after this share of the batches."""
        last = math.ceil(share * (max(self.rows) + 1) - 1e-9) - 1
        return self.rows[max((b for b in self.rows if b <= last), default=min(self.rows))]["test_accuracy"]

    def mean_accuracy(self, tests=None):
        """Mean over the last so many tests (None: over all), in 0..1."""
        return statistics.fmean(self.rows[b]["test_accuracy"] for b in sorted(self.rows)[-(tests or 0):])

    def told(self, key):
        """A number of the last batch's record; None where it has no such number, as those of older programs."""
        value = self.last.get(key)
        return value if _is_number(value) else None

    @property
    def on_cpu(self):
        """Whether its times are those of a CPU, as far as its records say."""
        return str(self.last.get("device", "cpu")).startswith("cpu")

    def worst_class(self):
        """Accuracy in 0..1 on the class with the lowest one at the end; None where no class's is stored."""
        classes = self.last.get("per_class")
        return min(filter(_is_number, classes if isinstance(classes, list) else []), default=None)

    def seconds(self):
        """[seconds, ...] that its batches took, tests included, in order of the batches."""
        return [sum(value for key, value in self.rows[b].items() if key.startswith("seconds_") and _is_number(value))
                for b in sorted(self.rows)]

    def minutes(self):
        """Minutes that its batches took, tests included; None where nothing says it."""
        return sum(self.seconds()) / 60 or None

    def seconds_a_batch(self):
        """Mean over the batches after the large first one, tests included; None where nothing says it."""
        later = [seconds for b, seconds in zip(sorted(self.rows), self.seconds(), strict=True) if b > 0]
        return statistics.fmean(later or [0]) or None


class Experiment(NamedTuple):
    """Runs of one row of the report."""
    label: str
    runs: list      # of Run, finished, alike but for SAME_EXPERIMENT


# ---- finding the runs ----

def find_runs(log_dir):
    """([Run, ...], [note, ...]) of everything below log_dir."""
    runs, notes = [], []
    for path in sorted(Path(log_dir).rglob("results.jsonl")):
        try:
            config = yaml.safe_load((path.parent / "config.yaml").read_text(encoding="utf-8"))
            text = path.read_text(encoding="utf-8", errors="replace")
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            notes.append(f"{path.parent} is left out: {' '.join(str(error).split())[:120]}")
            continue
        if not isinstance(config, dict):
            notes.append(f"{path.parent} is left out: its config.yaml holds no settings")
            continue
        rows, damaged = read_rows(text)
        if damaged:
            notes.append(f"{path}: damaged and left out: line{'s' * (len(damaged) > 1)} {ranges(damaged)}")
        config = Config.SINCE | config
        runs.append(Run(path.parent, config, rows, _batches(config, rows)))
    return runs, notes


def read_rows(text):
    """({batch: row}, numbers of the damaged lines) of a results.jsonl."""
    rows, damaged = {}, []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            good = type(row["batch"]) is int and row["batch"] >= 0 and 0 <= row["test_accuracy"] <= 1
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if good:
            rows[row["batch"]] = row
        else:
            damaged.append(number)
    return rows, damaged


def _batches(config, rows):
    told = rows[max(rows)].get("batches") if rows else None
    told = told if type(told) is int else None
    if not rows or "data" in rows[max(rows)]:
        return told
    # a run of an older program told of the batches that it was asked for, or of none
    scenario = BATCHES.get(config.get("scenario")) if config.get("dataset") == "core50" else None
    return max(told or 0, scenario - (config.get("start_batch") or 0)) if scenario else told


def group(runs, log_dir):
    """([Experiment, ...], [note, ...]) of finished runs. Equal names of unlike experiments get what tells them apart."""
    groups, notes = {}, []
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in SAME_EXPERIMENT}
        settings |= {key: run.last.get(key) for key in ("data", "n_test")} | {"batches": run.batches}
        key = (run.folder.parent.name, json.dumps(settings, sort_keys=True, default=str))
        alike = groups.setdefault(key, [])
        twin = next((r for r in alike if _order(r) == _order(run)), None)
        if twin:
            notes.append(f"{run.folder} is left out: it has the settings, the order and the seed of {twin.folder}")
        else:
            alike.append(run)
    experiments, names = [], [name for name, _ in groups]
    ambiguous = len(set(names)) < len(names)        # then all get their folders: half of them with one reads badly
    for (name, settings), alike in groups.items():
        label = _with_parents(alike, log_dir) if ambiguous else name
        close = [key for key in groups if key[0] == name and key[1] != settings
                 and _with_parents(groups[key], log_dir) == label]
        if close:
            label += f" ({_differences(settings, [key[1] for key in close])})"
        experiments.append(Experiment(label, sorted(alike, key=_order)))
    return sorted(experiments, key=lambda e: e.label), notes


def _order(run):
    return tuple(run.config.get(key) if type(run.config.get(key)) is int else -1 for key in ("run", "seed"))


def _with_parents(runs, log_dir):
    return ", ".join(sorted({run.folder.parent.relative_to(log_dir).as_posix() for run in runs}))


def _differences(settings, others):
    mine, others = json.loads(settings), [json.loads(other) for other in others]
    keys = [k for k in mine | dict.fromkeys(k for other in others for k in other)
            if any(k in other and other[k] != mine.get(k) or k in mine and k not in other for other in others)]
    return ", ".join(f"{k}={mine[k]}" if k in mine else f"{k} not stored" for k in keys)


# ---- the table ----

def table(experiments):
    """(header, lines, footnotes): lists of text; accuracies in percent, "-" where a run's records do not say it."""
    header = ["experiment", "runs", "orders", "seeds", "batches", "test images", "final accuracy %",
              f"mean of last {LAST_TESTS} tests %", "mean of all tests %", "forgetting %", "worst class %", "MB kept",
              "seconds a batch", "minutes", "device", "published"]
    lines, used = [], []
    for label, runs in experiments:
        first, *_ = runs
        results = published(first)
        used += [source for source in dict.fromkeys(result.source for result in results) if source not in used]
        shares = ([run.accuracy() for run in runs], [run.mean_accuracy(LAST_TESTS) for run in runs],
                  [run.mean_accuracy() for run in runs], [run.told("forgetting") for run in runs],
                  [run.worst_class() for run in runs])
        lines.append([
            label, str(len(runs)), *(ranges({_order(run)[k] for run in runs}) for k in (0, 1)),
            str(first.batches or len(first.rows)), f"{first.last.get('n_test', '-')}",
            *("-" if None in values else spread(runs, [100 * value for value in values]) for values in shares),
            _mean([run.told("kept_mb") for run in runs], ".1f"), _mean([run.seconds_a_batch() for run in runs], ".2f"),
            _mean([run.minutes() for run in runs], ".1f"),
            ", ".join(sorted({str(run.last.get("device", "-")) for run in runs})),
            ", ".join(f"{'~' * result.about}{result.accuracy:g}{f' +- {result.std:g}' if result.std else ''} "
                      f"[{used.index(result.source) + 1}]" for result in results) or "-"])
    return header, lines, [f"[{k}] {source}" for k, source in enumerate(used, 1)]


def _mean(values, digits):
    """The mean as text; "-" where a run does not say its own: that of the others would pass for the experiment's."""
    return "-" if None in values else f"{statistics.fmean(values):{digits}}"


def spread(runs, values):
    """The mean of one value a run, and its sample standard deviation over orders and, within an order, over seeds."""
    groups = {}
    for run, value in zip(runs, values, strict=True):
        groups.setdefault(_order(run)[0], []).append(value)
    means, parts = [statistics.fmean(group) for group in groups.values()], [f"{statistics.fmean(values):.1f}"]
    if len(groups) > 1:
        parts.append(f"+- {statistics.stdev(means):.1f} over orders")
    if len(values) > len(groups):
        squares = sum((value - statistics.fmean(group)) ** 2 for group in groups.values() for value in group)
        parts.append(f"+- {math.sqrt(squares / (len(values) - len(groups))):.1f} over seeds")
    return ", ".join([" ".join(parts[:2]), *parts[2:]])


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
    """The report of all runs below log_dir as text, or as Markdown; draws the curves into the file `plot` if given."""
    runs, notes = find_runs(log_dir)
    if not runs:
        raise ReportError(f"there are no runs below {log_dir}: give --report the folder that --log-dir had"
                          + "".join(f" ({note})" for note in notes[:1]))
    experiments, more_notes = group([run for run in runs if run.finished], log_dir)
    unfinished = [f"{run.folder}: {_progress(run)}" for run in runs if not run.finished]
    if plot is not None:
        draw(experiments, plot)
    header, lines, sources = table(experiments)
    layout = _markdown if markdown else _aligned
    parts = [layout(header, lines) if lines else "No run has finished yet.",
             EXPLANATION if lines else "",
             "\n".join(sources), _listed("unfinished", unfinished), _listed("notes", notes + more_notes)]
    text = ("\n\n" if markdown else "\n").join(part for part in parts if part)
    return text.replace("+-", "±") if markdown else text


def _progress(run):
    if not run.rows:
        return "no batch yet"
    done = max(run.rows) + 1
    return f"{done} of {run.batches} batches, {run.accuracy():.1%}"


def _listed(title, items):
    return "\n".join([f"{title}:", *(f"- {item}" for item in items)]) if items else ""


def _aligned(header, lines):
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
                     for line in [header, *lines])


def _markdown(header, lines):
    escape = lambda cell: cell.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")
    body = [[escape(cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *body])


def _is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


# ---- the plot ----

def draw(experiments, path):
    """Mean accuracy over the batches, one curve per experiment, shaded by its standard deviation. Needs matplotlib.

    Gray and thin behind them: the published curves of their methods, where they have the settings of these.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        raise ReportError("--plot needs matplotlib: pip install matplotlib, or leave --plot out") from None
    if not experiments:
        raise ReportError("there is nothing to plot: no run has finished yet")
    lengths = {max(run.rows) + 1 for e in experiments for run in e.runs}
    scale = 1 if len(lengths) == 1 else 0       # batches where all have as many, else the share of them
    ordered = sorted(experiments, key=lambda e: -statistics.fmean(run.accuracy() for run in e.runs))
    behind = {(result.scenario, result.method): curve(result) for e in ordered for result in published(e.runs[0])}
    behind = {f"published {name} on {scenario}, 10 orders": points for (scenario, name), points in behind.items() if points}
    longest = max(map(len, [*behind, *(e.label for e in experiments)]))
    figure = Figure(figsize=(7.2 + .07 * longest, 4.2), layout="constrained")
    axes = figure.subplots()
    for k, (label, points) in enumerate(behind.items()):
        mean, std = zip(*points, strict=True)
        _draw_curve(axes, scale, mean, std, label, dict(color="gray", linestyle=_dashes(k), linewidth=1, zorder=1))
    for k, (label, runs) in enumerate(ordered):
        batches = max(max(run.rows) + 1 for run in runs)
        curves = [[run.accuracy((b + 1) / batches) for run in runs] for b in range(batches)]
        mean = [statistics.fmean(values) for values in curves]
        std = [statistics.stdev(values) for values in curves] if len(runs) > 1 else None
        number = f", {len(runs)} runs" if len(runs) > 1 else ""
        style = dict(color=colormaps["tab10"](k % 10), linestyle=_dashes(k // 10), linewidth=1.8, zorder=3)
        _draw_curve(axes, scale, mean, std, f"{label}{number}", style)
    axes.set(xlabel="incremental batches learned" if scale else "share of the incremental batches learned",
             ylabel="accuracy on the test set", ylim=(0, None), xlim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if not scale:
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=.25)
    figure.legend(frameon=False, loc="outside right upper")
    save(figure, path, dpi=150)


def save(figure, path, dpi):
    """Writes a figure of matplotlib into a file; raises ReportError where that fails."""
    try:
        figure.savefig(path, dpi=dpi)
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot write the plot to {path}: {' '.join(str(error).split())[:120]}") from error


def _draw_curve(axes, scale, mean, std, label, style):
    """One curve of accuracies in 0..1 after each batch, and a band around it where std is given."""
    x = [b + 1 if scale else (b + 1) / len(mean) for b in range(len(mean))]
    axes.plot(x, mean, label=f"{label}: {mean[-1]:.1%}", **style)
    if std:
        low, high = zip(*((m - s, m + s) for m, s in zip(mean, std, strict=True)), strict=True)
        axes.fill_between(x, low, high, color=style["color"], alpha=.2, linewidth=0, zorder=style["zorder"] - .5)


def _dashes(k):
    return ("-", "--", ":", "-.")[k % 4]
