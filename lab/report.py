"""All the runs below a log folder as one table, beside the published numbers, and as a plot.

    python ar1star_lat_replay.py --report logs --markdown --plot curves.png
    text = report("logs", markdown=True, plot="curves.png")

A run is a folder with results.jsonl and config.yaml, EXPERIMENT/run{R}_seed{S}. Runs of one experiment that differ in
nothing but order and seed (and in what cannot change a result) are averaged. Only finished runs enter the table.

Uses lab.config, matplotlib (for --plot alone), yaml.
"""
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import yaml

from lab.config import Config, ConfigError

SOURCES = ("CORe50 site, MobileNetV1 without replay, mean and std of 10 runs; on NICv2-391 AR1* and CWR* pass 27.8, 39.2, "
           "49.5 % after batches 100, 200, 300",
           "published PyTorch program, about 24 minutes on one TitanX",
           "the same program, measured by a user of it",
           "read off a figure of arXiv 1912.01100")
# (scenario, method): [(final accuracy %, std or None, about?, index into SOURCES)]
PUBLISHED = {
    ("nicv2_391", "AR1*"): [(56.3, 1.1, False, 0)], ("nicv2_391", "CWR*"): [(57.0, 1.0, False, 0)],
    ("nicv2_391", "naive"): [(8.0, None, False, 0)],
    ("nicv2_196", "AR1*"): [(60.6, 1.4, False, 0)], ("nicv2_196", "CWR*"): [(56.9, 0.9, False, 0)],
    ("nicv2_196", "naive"): [(18.9, None, False, 0)],
    ("nicv2_79", "AR1*"): [(63.5, 1.2, False, 0)], ("nicv2_79", "CWR*"): [(57.1, 2.0, False, 0)],
    ("nicv2_79", "naive"): [(26.8, None, False, 0)],
    ("nicv2_391", "latent replay 1500"): [(77.0, None, True, 1)],
    ("nicv2_391", "latent replay 500"): [(63.6, None, False, 2), (70.0, None, True, 3)],
}
BATCHES = {"ni": 8, "nc": 9, "nic": 79, "nicv2_79": 79, "nicv2_196": 196, "nicv2_391": 391}
CORE50_TESTS = (2249, 44972)        # frames in the reduced and the full test set of CORe50
QUARTERS = (.25, .5, .75, 1)
SAME_EXPERIMENT = ("run", "seed", *Config.FREE)     # settings that may differ between the runs of one experiment


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

    def mean_accuracy(self):
        """Mean over all tests, in 0..1."""
        return statistics.fmean(row["test_accuracy"] for row in self.rows.values())

    def minutes(self):
        """Minutes that its batches took, tests included."""
        return sum(value for row in self.rows.values() for key, value in row.items()
                   if key.startswith("seconds_") and _is_number(value)) / 60


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
    experiments = []
    for (name, settings), alike in groups.items():
        rivals = [key for key in groups if key[0] == name and key[1] != settings]
        label = name
        if rivals:
            label = _with_parents(alike, log_dir)
            close = [key for key in rivals if _with_parents(groups[key], log_dir) == label]
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

def published(run):
    """[(accuracy %, std, about?, source), ...] for what a run computes: of CORe50 itself, never of stand-in or demo."""
    config, last = run.config, run.last
    real = (config.get("dataset") == "core50" and config.get("weights") == "imagenet"
            and last.get("n_test") in CORE50_TESTS and run.batches == BATCHES.get(config.get("scenario"))
            and config.get("width") == 1 and config.get("model") == "mobilenet_v1" and not config.get("start_batch"))
    return PUBLISHED.get((config.get("scenario"), method(config)), []) if real else []


def method(config):
    """The papers' name of what a configuration (a dict) computes; None where section PUBLISHED has no name for it."""
    get = config.get
    if get("cumulative") or get("method") != "latent_replay":
        return None
    replay, consolidated = get("rm_sz") != 0, get("cwr_consolidation") != "none"
    if not replay and get("reg_lambda"):
        return "AR1*" if consolidated else None
    if not replay and not consolidated:
        return "naive"
    if not replay:
        return "CWR*" if get("inc_freeze_below_layer") in ("pool6", 27) else None
    program = get("cwr_consolidation") == "per_pattern" and get("latent_layer_num") in ("conv5_4/dw", 19)
    return f"latent replay {get('rm_sz')}" if program and not get("reg_lambda") else None


def table(experiments):
    """(header, lines, footnotes): lists of text; accuracies in percent."""
    header = ["experiment", "runs", "orders", "seeds", "batches", "test images", "25 %", "50 %", "75 %", "final accuracy %",
              "mean of all tests %", "minutes", "device", "published"]
    lines, used = [], []
    for label, runs in experiments:
        first, *_ = runs
        numbers = published(first)
        used += [source for *_, source in numbers if source not in used]
        minutes = statistics.fmean(run.minutes() for run in runs)
        lines.append([
            label, str(len(runs)), *(ranges({_order(run)[k] for run in runs}) for k in (0, 1)),
            str(first.batches or len(first.rows)), f"{first.last.get('n_test', '-')}",
            *(f"{100 * statistics.fmean(run.accuracy(share) for run in runs):.1f}" for share in QUARTERS[:-1]),
            spread(runs, [100 * run.accuracy() for run in runs]), spread(runs, [100 * run.mean_accuracy() for run in runs]),
            f"{minutes:.1f}" if minutes else "-", ", ".join(sorted({str(run.last.get("device", "-")) for run in runs})),
            ", ".join(f"{'~' * about}{accuracy:g}{f' +- {std:g}' if std else ''} [{used.index(source) + 1}]"
                      for accuracy, std, about, source in numbers) or "-"])
    return header, lines, [f"[{k}] {SOURCES[source]}" for k, source in enumerate(used, 1)]


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
             "Accuracy on the test set after 25, 50, 75 and 100 % of the batches, and its mean over all tests; means over "
             "the runs, +- sample standard deviation over orders (each the mean of its seeds) and over the seeds of an "
             "order; minutes per run." if lines else "",
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
    """Mean accuracy over the batches, one curve per experiment, shaded by its standard deviation. Needs matplotlib."""
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
    figure = Figure(figsize=(7.2 + .07 * max(len(e.label) for e in experiments), 4.2), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(experiments, key=lambda e: -statistics.fmean(run.accuracy() for run in e.runs))
    for k, (label, runs) in enumerate(ordered):
        style = dict(color=colormaps["tab10"](k % 10), linestyle=("-", "--", ":", "-.")[k // 10 % 4])
        batches = max(max(run.rows) + 1 for run in runs)
        ends = [(b + 1) / batches for b in range(batches)]
        curves = [[run.accuracy(end) for run in runs] for end in ends]
        x = [b + 1 if scale else end for b, end in enumerate(ends)]
        mean = [statistics.fmean(values) for values in curves]
        number = f", {len(runs)} runs" if len(runs) > 1 else ""
        axes.plot(x, mean, linewidth=1.8, label=f"{label}{number}: {mean[-1]:.1%}", **style)
        if len(runs) > 1:
            std = [statistics.stdev(values) for values in curves]
            axes.fill_between(x, [m - s for m, s in zip(mean, std, strict=True)],
                              [m + s for m, s in zip(mean, std, strict=True)], color=style["color"], alpha=.2, linewidth=0)
    axes.set(xlabel="incremental batches learned" if scale else "share of the incremental batches learned",
             ylabel="accuracy on the test set", ylim=(0, None), xlim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if not scale:
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=.25)
    figure.legend(frameon=False, loc="outside right upper")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot write the plot to {path}: {' '.join(str(error).split())[:120]}") from error
