"""All the runs below a log folder as one table, beside the published numbers, and as a plot.

    python ar1star_lat_replay.py --report logs --markdown --plot curves.png
    text = report("logs", markdown=True, plot="curves.png")

A run is a folder with results.jsonl and config.yaml, EXPERIMENT/run{R}_seed{S}. Runs of one experiment that differ in
nothing but order and seed (and in what cannot change a result) are averaged. Only finished runs enter the table.

Uses lab.config, yaml; matplotlib for --plot.
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
    folder: Path
    config: dict
    rows: dict              # {batch: line of results.jsonl}
    batches: int | None     # in all; None where nothing says it

    @property
    def finished(self):
        return bool(self.rows) and self.batches in (None, max(self.rows) + 1)

    def accuracy(self, share=1.0):
        """Accuracy in 0..1 after this share of the batches."""
        last = math.ceil(share * (max(self.rows) + 1) - 1e-9) - 1
        return self.rows[max((b for b in self.rows if b <= last), default=min(self.rows))]["test_accuracy"]

    def mean_accuracy(self):
        return statistics.fmean(row["test_accuracy"] for row in self.rows.values())

    def minutes(self):
        return sum(value for row in self.rows.values() for key, value in row.items()
                   if key.startswith("seconds_") and _is_number(value)) / 60


class Experiment(NamedTuple):
    label: str
    runs: list      # of Run, finished, alike but for SAME_EXPERIMENT


# ---- finding the runs ----

def find_runs(log_dir, defaults=None):
    """([Run, ...], [note, ...]) of everything below log_dir. defaults: settings that older runs did not store yet."""
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
        config = (defaults or {}) | config
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
    if type(told) is int:
        return told
    if config.get("dataset") == "core50" and config.get("scenario") in BATCHES:     # a run of an older program
        return BATCHES[config["scenario"]] - (config.get("start_batch") or 0)
    return None


def group(runs, log_dir):
    """([Experiment, ...], [note, ...]) of finished runs. Equal names of unlike experiments get what tells them apart."""
    groups, notes = {}, []
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in SAME_EXPERIMENT}
        key = (run.folder.parent.name, json.dumps(settings | {"batches": run.batches}, sort_keys=True, default=str))
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
    return ", ".join(f"{k}={v}" for k, v in mine.items() if any(other.get(k) != v for other in others))


# ---- the table ----

def published(run):
    """[(accuracy %, std, about?, source), ...] for what a run computes: of CORe50 itself, never of stand-in or demo."""
    config, last = run.config, run.rows[max(run.rows)]
    real = (config.get("dataset") == "core50" and config.get("weights") == "imagenet"
            and last.get("n_test") in CORE50_TESTS and run.batches == BATCHES.get(config.get("scenario"))
            and config.get("width") == 1 and not config.get("start_batch"))
    return PUBLISHED.get((config.get("scenario"), method(config)), []) if real else []


def method(config):
    """The papers' name of what a configuration (a dict) computes; None where section PUBLISHED has no name for it."""
    get = config.get
    if get("cumulative"):
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
    header = ["experiment", "runs", "order", "seed", "25 %", "50 %", "75 %", "final accuracy %", "all tests", "minutes",
              "device", "published"]
    lines, used = [], []
    for label, runs in experiments:
        first, *_ = runs
        numbers = published(first)
        used += [source for *_, source in numbers if source not in used]
        final = [100 * run.accuracy() for run in runs]
        minutes = statistics.fmean(run.minutes() for run in runs)
        lines.append([
            label, str(len(runs)), *(ranges({_order(run)[k] for run in runs}) for k in (0, 1)),
            *(f"{100 * statistics.fmean(run.accuracy(share) for run in runs):.1f}" for share in QUARTERS[:-1]),
            f"{statistics.fmean(final):.1f} +- {f'{statistics.stdev(final):.1f}' if len(final) > 1 else '-'}",
            f"{100 * statistics.fmean(run.mean_accuracy() for run in runs):.1f}", f"{minutes:.1f}" if minutes else "-",
            ", ".join(sorted({str(run.rows[max(run.rows)].get("device", "-")) for run in runs})),
            ", ".join(f"{'~' * about}{accuracy:g}{f' +- {std:g}' if std else ''} [{used.index(source) + 1}]"
                      for accuracy, std, about, source in numbers) or "-"])
    return header, lines, [f"[{k}] {SOURCES[source]}" for k, source in enumerate(used, 1)]


def ranges(numbers):
    """ "0-2, 5" of whole numbers 0, 1, 2, 5. """
    spans = []
    for n in sorted(numbers):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


def report(log_dir, markdown=False, plot=None, defaults=None):
    """The report of all runs below log_dir as text, or as Markdown; draws the curves into the file `plot` if given."""
    runs, notes = find_runs(log_dir, defaults)
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
             "Accuracy on the test set after 25, 50, 75 and 100 % of the batches, and its mean over all tests; mean +- "
             "sample standard deviation over the runs; minutes per run." if lines else "",
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
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        raise ReportError("--plot needs matplotlib: pip install matplotlib, or leave --plot out") from None
    if not experiments:
        raise ReportError("there is nothing to plot: no run has finished yet")
    lengths = {max(run.rows) + 1 for e in experiments for run in e.runs}
    scale = 1 if len(lengths) == 1 else 0       # batches where all have as many, else the share of them
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for label, runs in sorted(experiments, key=lambda e: -statistics.fmean(run.accuracy() for run in e.runs)):
        batches = max(max(run.rows) + 1 for run in runs)
        ends = [(b + 1) / batches for b in range(batches)]
        curves = [[run.accuracy(end) for run in runs] for end in ends]
        x = [b + 1 if scale else end for b, end in enumerate(ends)]
        mean = [statistics.fmean(values) for values in curves]
        number = f", {len(runs)} runs" if len(runs) > 1 else ""
        line, = axes.plot(x, mean, linewidth=1.8, label=f"{label}{number}: {mean[-1]:.1%}")
        if len(runs) > 1:
            std = [statistics.stdev(values) for values in curves]
            axes.fill_between(x, [m - s for m, s in zip(mean, std, strict=True)],
                              [m + s for m, s in zip(mean, std, strict=True)], color=line.get_color(), alpha=.2, linewidth=0)
    axes.set(xlabel="incremental batches learned" if scale else "share of the incremental batches learned",
             ylabel="accuracy on the test set", ylim=(0, None), xlim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if not scale:
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=.25)
    axes.legend(frameon=False, loc="upper left")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot write the plot to {path}: {' '.join(str(error).split())[:120]}") from error
