"""Draws accuracy against the MB that are kept, and against the seconds of a batch, from the records of runs.

    python benchmarks/draw_memory.py docs/results/rendered docs/results/memories --out docs/memory_rendered.png

A point is an experiment: the mean of its runs' last ten tests. A curve joins those with replay that store latents of the
same layer in the same form, from the smallest memory to the largest, and beside each stands how many patterns it holds.
Drawn are latent replay with the consolidation of the papers on the PyTorch program's rules, and methods in closed form.
Needs matplotlib.
"""
import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.command_line import status_of
from lab.report import LAST_TESTS, ReportError, find_runs, group, save

CLOSED = {"slda": "SLDA", "ncm": "nearest class mean"}
FORMS = {"float32": "-", "float16": "-.", "uint8": "--", "pq": ":"}     # the dashes of a curve
SIDES = [((x, y), {1: "left", 0: "center", -1: "right"}[x], {1: "bottom", 0: "center", -1: "top"}[y])     # of a point
         for x, y in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))]


class Point(NamedTuple):
    """An experiment: (layer, form, whether beside SLDA) of its curve, MB kept, seconds a batch (None: not those of a CPU, so
    not to be compared with the others), accuracy in 0..1, text."""
    curve: tuple
    mb: float
    seconds: float | None
    accuracy: float
    text: str


def points(*folders):
    """[Point, ...] of the finished experiments below the folders that belong into the picture, by their MB."""
    found = []
    for folder in folders:
        experiments, _ = group([run for run in find_runs(folder)[0] if run.finished], folder)
        found += [point(runs) for _, runs in experiments if all(map(belongs, runs))]
    if not found:
        raise ReportError(f"no finished run below {' or '.join(map(str, folders))} is one to draw and says its MB kept")
    return sorted(found, key=lambda p: p.mb)


def belongs(run):
    """Whether a run is drawn."""
    config = run.config
    if None in (run.told("kept_mb"), run.seconds_a_batch()):
        return False
    as_drawn = config.get("cwr_consolidation") == "per_class" and config.get("follow") == "pytorch_program"
    return config["method"] in CLOSED or as_drawn and bool(run.told("memory_size"))


def point(runs):
    """The Point of an experiment's runs."""
    config, patterns = runs[0].config, runs[0].told("memory_size")
    layer, form = str(config["latent_layer_num"]), config["rm_dtype"]
    if config["method"] in CLOSED:
        form, text = CLOSED[config["method"]], f"{CLOSED[config['method']]}, {layer}"
    else:
        text = f"{patterns:,}" + (f", {config['pq_codes']} codes" if form == "pq" else "")
    mean = lambda of: statistics.fmean(map(of, runs))
    return Point((layer, form, config["slda_weight"] > 0), mean(lambda run: run.told("kept_mb")),
                 mean(lambda run: run.seconds_a_batch()) if all(run.on_cpu for run in runs) else None,
                 mean(lambda run: run.mean_accuracy(LAST_TESTS)), text)


def draw(found, path):
    """Writes the picture of [Point, ...]: on the left the MB, on the right the seconds."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        raise ReportError("the picture needs matplotlib: pip install matplotlib") from None
    layers = sorted({p.curve[0] for p in found})
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for curve in sorted({p.curve for p in found}):
        layer, form, beside = curve
        mine = [p for p in found if p.curve == curve]
        closed = form not in FORMS
        style = dict(color="black" if closed else colormaps["tab10"](layers.index(layer)), marker="*" if beside else "o",
                     linestyle=FORMS.get(form, ""), markersize=9 if beside else 5, linewidth=1.4,
                     label=None if closed else f"{layer}, {form}{', SLDA beside it' if beside else ''}")
        for panel, measured in zip(axes, ("mb", "seconds"), strict=True):
            shown = [(getattr(p, measured), p) for p in mine if getattr(p, measured) is not None]
            panel.plot([at for at, _ in shown], [p.accuracy for _, p in shown], **style)
            for at, p in shown:
                panel.annotate(p.text, (at, p.accuracy), xytext=(0, 0), textcoords="offset points", fontsize=7,
                               color=style["color"])
    for panel, name in zip(axes, ("MB kept for later batches", "seconds a batch, test included"), strict=True):
        panel.set(xscale="log", xlabel=name)
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


def keep_apart(texts):
    """Puts each annotation to that side of its point where it covers the least of the points and of the texts before it."""
    from matplotlib.transforms import Bbox

    def area(a, b):
        common = Bbox.intersection(a, b)
        return common.width * common.height if common else 0.0

    def put(text, side):
        (x, y), ha, va = side
        text.xyann = 5 * x, 5 * y
        text.set(ha=ha, va=va)
        return text.get_window_extent()

    places = [text.axes.transData.transform(text.xy) for text in texts]
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for text in texts:
        put(text, min(SIDES, key=lambda side: sum(area(put(text, side), box) for box in taken)))
        taken.append(text.get_window_extent())


def main(argv=None):
    """Returns the exit status: 0 done, 2 bad input, 1 failure on the way, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder of runs")
    parser.add_argument("--out", default="memory.png", metavar="FILE.png", help="(default memory.png)")
    args = parser.parse_args(argv)
    return status_of(parser.prog, lambda: draw(points(*args.folders), args.out))


if __name__ == "__main__":
    sys.exit(main())
