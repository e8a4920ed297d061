"""Draws accuracy against the MB that are kept, and against the seconds of a batch, from the records of runs.

    python benchmarks/draw_memory.py docs/results/rendered docs/results/memories --out memory.png

A point is an experiment: the mean of its runs' last ten tests. A curve joins those with replay that store
latents of the same layer in the same form, from the smallest memory to the largest, and each says how many
patterns it holds. Drawn are latent replay with the consolidation of the papers on the PyTorch program's
rules, and methods in closed form. Needs matplotlib.
"""
import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from harness.console import errors_as_sentences
from harness.report import LAST_TESTS, ReportError, find_runs, group, save

CLOSED = {"slda": "SLDA", "ncm": "nearest class mean"}
FORMS = {"float32": "-", "float16": "-.", "uint8": "--", "pq": ":"}     # the dashes of a curve
PANELS = {"mb": "MB kept for later batches", "seconds": "seconds a batch, test included"}
SIDES = [(1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)]      # (x, y) of a point's text
HORIZONTAL = {1: "left", 0: "center", -1: "right"}
VERTICAL = {1: "bottom", 0: "center", -1: "top"}


# ---- what is drawn ----

class Point(NamedTuple):
    """An experiment."""
    curve: tuple                # (layer, form, whether SLDA is beside it)
    mb: float                   # kept
    seconds: float | None       # a batch; None: not on a CPU, so not to be compared with the others
    accuracy: float             # 0..1
    text: str


def points(*folders):
    """[Point, ...] of the finished experiments below the folders that are drawn, by their MB."""
    found = []
    for folder in folders:
        finished = [run for run in find_runs(folder)[0] if run.finished]
        experiments, _ = group(finished, folder)
        found += [point(runs) for _, runs in experiments if all(map(belongs, runs))]
    if not found:
        where = " or ".join(map(str, folders))
        raise ReportError(f"no finished run below {where} is one to draw and says its MB kept")
    return sorted(found, key=lambda p: p.mb)


def belongs(run):
    """Whether a run is drawn."""
    config = run.config
    if run.told("kept_mb") is None or run.seconds_a_batch() is None:
        return False
    if config["method"] in CLOSED:
        return True
    published = config["cwr_consolidation"] == "per_class" and config["follow"] == "pytorch_program"
    return published and bool(run.told("memory_size"))


def point(runs):
    """The Point of an experiment's runs."""
    config = runs[0].config
    layer = str(config["latent_layer_num"])
    form = config["rm_dtype"]
    if config["method"] in CLOSED:
        form = CLOSED[config["method"]]
        text = f"{form}, {layer}"
    else:
        text = f"{runs[0].told('memory_size'):,}"
        if form == "pq":
            text += f", {config['pq_codes']} codes"

    on_cpu = all(run.on_cpu for run in runs)
    return Point(
        curve=(layer, form, config["slda_weight"] > 0),
        mb=statistics.fmean(run.told("kept_mb") for run in runs),
        seconds=statistics.fmean(run.seconds_a_batch() for run in runs) if on_cpu else None,
        accuracy=statistics.fmean(run.mean_accuracy(LAST_TESTS) for run in runs),
        text=text)


# ---- the picture ----

def draw(found, path):
    """Writes the picture of [Point, ...]: on the left the MB, on the right the seconds."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        raise ReportError("the picture needs matplotlib: pip install matplotlib") from None

    figure = Figure(figsize=(12, 5.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for panel, measured in zip(axes, PANELS, strict=True):
        draw_curves(panel, found, measured)
        panel.set(xscale="log", xlabel=PANELS[measured])
        panel.margins(x=.15)
        panel.yaxis.set_major_formatter(PercentFormatter(1))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=.25)
    axes[0].set_ylabel(f"accuracy, mean of the last {LAST_TESTS} tests")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside right upper")

    figure.draw_without_rendering()     # from here on, points and texts have their places
    for panel in axes:
        keep_apart(panel.texts)
    save(figure, path, dpi=130)


def draw_curves(panel, found, measured):
    """The curves of [Point, ...] over what is measured: "mb" or "seconds"."""
    from matplotlib import colormaps

    layers = sorted({p.curve[0] for p in found})
    for curve in sorted({p.curve for p in found}):
        layer, form, beside = curve
        shown = [p for p in found if p.curve == curve and getattr(p, measured) is not None]
        closed = form not in FORMS
        color = "black" if closed else colormaps["tab10"](layers.index(layer))
        label = f"{layer}, {form}{', SLDA beside it' if beside else ''}"
        x = [getattr(p, measured) for p in shown]
        y = [p.accuracy for p in shown]
        panel.plot(x, y, color=color, linestyle=FORMS.get(form, ""), linewidth=1.4,
                   marker="*" if beside else "o", markersize=9 if beside else 5,
                   label=None if closed else label)
        for at, p in zip(x, shown, strict=True):
            panel.annotate(p.text, (at, p.accuracy), xytext=(0, 0), textcoords="offset points", fontsize=7,
                           color=color)


def keep_apart(texts):
    """Puts each text to that side of its point where it covers the least of points and earlier texts."""
    from matplotlib.transforms import Bbox

    taken = []
    for text in texts:
        x, y = text.axes.transData.transform(text.xy)
        taken.append(Bbox.from_extents(x - 4, y - 4, x + 4, y + 4))

    def put(text, side):
        x, y = side
        text.xyann = 5 * x, 5 * y
        text.set(ha=HORIZONTAL[x], va=VERTICAL[y])
        return text.get_window_extent()

    def covered(text, side):
        box = put(text, side)
        common = [Bbox.intersection(box, other) for other in taken]
        return sum(both.width * both.height for both in common if both)

    for text in texts:
        best = min(SIDES, key=lambda side: covered(text, side))
        taken.append(put(text, best))


def main(argv=None):
    """Returns the exit status: 0 done, 2 bad input, 1 failure on the way, 130 interrupted."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder of runs")
    parser.add_argument("--out", default="memory.png", metavar="FILE.png", help="(default memory.png)")
    args = parser.parse_args(argv)
    with errors_as_sentences(parser.prog) as outcome:
        draw(points(*args.folders), args.out)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
