"""The published results, each with the settings it was made with, and which of them belong beside a run.

    for result in published(run):
        print(result.accuracy, result.source, curve(result))

A result is shown beside a run only if each setting that it needs is the run's own: NEEDED below, as data. What cannot
change an accuracy (the machine, fast, ...) and what the sources do not tell is not asked for.
"""
import csv
import functools
from pathlib import Path
from typing import NamedTuple

CURVES = Path(__file__).resolve().parents[1] / "docs" / "published" / "core50_nicv2_no_replay.csv"
BATCHES = {"ni": 8, "nc": 9, "nic": 79, "nicv2_79": 79, "nicv2_196": 196, "nicv2_391": 391}
CORE50_TESTS = (2249, 44972)        # frames in the reduced and the full test set of CORe50
BEFORE = {"start_batch": 0, "cumulative": False}    # of runs made before these settings; for later ones see Config.SINCE


class OneOf(tuple):
    """Values of a setting, each of which will do."""


class Result(NamedTuple):
    """A published final accuracy."""
    scenario: str
    method: str             # the papers' name, that of its curve where there is one
    accuracy: float         # percent
    std: float | None       # percent, over ten orders
    about: bool             # read off a figure, or told without a decimal
    source: str
    settings: dict          # {key: value or OneOf} that a run must have had


# ---- the settings: a layer goes by its name or its number ----

IMAGES, MIDDLE, POOLED = OneOf(("images", -1)), OneOf(("conv5_4/dw", 19)), OneOf(("pool6", 27))
NO_SI = {"si": "penalty", "reg_lambda": 0}
ALL = {"dataset": "core50", "weights": "imagenet", "model": "mobilenet_v1", "width": 1, "start_batch": 0,
       "cumulative": False, "method": "latent_replay", "patience": 0, "mb_size": 128, "init_lr": 1e-3, "momentum": .9,
       "l2": 5e-4, "init_train_ep": 4, "inc_train_ep": 4, "max_r_max": 1.25, "max_d_max": .5, "rm_mb": 0,
       "rm_dtype": "float32", "rm_policy": "random", "replayed_per_epoch": 0, "slda_weight": 0}

PYTORCH = ALL | NO_SI | {
    "follow": "pytorch_program", "latent_layer_num": MIDDLE, "freeze_below_layer": MIDDLE, "inc_freeze_below_layer": MIDDLE,
    "inc_convs": "all", "cwr_consolidation": "per_pattern", "inc_lr": 5e-5, "head_lr_mult": 1, "init_update_rate": .01,
    "inc_update_rate": 5e-5, "inc_step": 4.1e-5}

# The papers' programs. All layers learn in batch 0; its update rate is not known, and its limits grow by a rule of theirs.
PAPERS = ALL | {"follow": "papers", "freeze_below_layer": IMAGES, "inc_convs": "pointwise", "cwr_consolidation": "per_class"}
NO_REPLAY = PAPERS | {"rm_sz": 0, "latent_layer_num": IMAGES, "inc_update_rate": 1e-4}
METHODS = {
    "AR1*": {"inc_freeze_below_layer": IMAGES, "inc_lr": 1e-4, "head_lr_mult": 10, "si": "learning_rate", "si_c": .5},
    "CWR*": {"inc_freeze_below_layer": POOLED, "inc_lr": 1e-3, "head_lr_mult": 1},      # SI finds nothing that learns
    "naive": NO_SI | {"inc_freeze_below_layer": IMAGES, "inc_lr": 3.5e-5, "head_lr_mult": 1, "cwr_consolidation": "none",
                      "init_train_ep": 2, "inc_train_ep": 2}}
LIMITS = {"nicv2_391": {"max_r_max": 1.5, "max_d_max": 2.5}, "nicv2_196": {}, "nicv2_79": {}}

# with replay their AR1* ran without SI, too
REPLAY = PAPERS | NO_SI | {"inc_lr": 3e-4, "head_lr_mult": 10}
NATIVE = REPLAY | {"latent_layer_num": IMAGES, "inc_freeze_below_layer": IMAGES, "inc_update_rate": 1e-4}
LATENT = REPLAY | {"latent_layer_num": MIDDLE, "inc_freeze_below_layer": MIDDLE, "inc_update_rate": 5e-5}
HEAD = REPLAY | {"latent_layer_num": POOLED, "inc_freeze_below_layer": POOLED, "inc_update_rate": 5e-5,
                 "head_lr_mult": OneOf((1, 10))}        # CWR*'s or AR1*free's: which of them made it is not told

# ---- the results ----

SITE = "CORe50 site, MobileNetV1 without replay, mean and std of 10 orders"
PROGRAM = "published PyTorch program, about 24 minutes on one TitanX"
USER = "the same program, measured by a user of it"
FIGURE = "read off a figure of arXiv 1912.01100"
ABSTRACT = "abstract of arXiv 2007.13631, by some of the same authors"

RESULTS = [Result(scenario, name, accuracy, std, False, SITE, NO_REPLAY | LIMITS[scenario] | METHODS[name])
           for scenario, name, accuracy, std in (
               ("nicv2_391", "AR1*", 56.3, 1.1), ("nicv2_391", "CWR*", 57.0, 1.0), ("nicv2_391", "naive", 8.0, None),
               ("nicv2_196", "AR1*", 60.6, 1.4), ("nicv2_196", "CWR*", 56.9, .9), ("nicv2_196", "naive", 18.9, None),
               ("nicv2_79", "AR1*", 63.5, 1.2), ("nicv2_79", "CWR*", 57.1, 2.0), ("nicv2_79", "naive", 26.8, None))]
RESULTS += [Result("nicv2_391", name, accuracy, None, about, source, settings | {"rm_sz": patterns})
            for name, patterns, accuracy, about, source, settings in (
                ("latent replay", 1500, 77.0, True, PROGRAM, PYTORCH), ("latent replay", 500, 63.6, False, USER, PYTORCH),
                ("native replay", 1500, 77.3, True, ABSTRACT, NATIVE), ("latent replay", 1500, 72.5, True, ABSTRACT, LATENT),
                ("latent replay", 500, 70.0, True, FIGURE, LATENT), ("replay at pool6", 1500, 58.0, True, ABSTRACT, HEAD))]


def published(run):
    """[Result, ...] for what a finished run computed: of CORe50 itself, never of stand-in or demo. run: a report.Run."""
    settings, scenario = BEFORE | run.config, run.config.get("scenario")
    if run.last.get("n_test") not in CORE50_TESTS:
        return []
    return [result for result in RESULTS if result.scenario == scenario and run.batches == BATCHES[scenario]
            and all(_meets(settings.get(key), needed) for key, needed in result.settings.items())]


def _meets(value, needed):
    return value in needed if isinstance(needed, OneOf) else value == needed


def curve(result):
    """[(mean, std), ...] in 0..1 after each batch, over ten orders; [] where none is published, or its file is missing."""
    return _curves(CURVES).get((result.scenario, result.method), []) if result.source == SITE else []


@functools.cache
def _curves(path):
    """{(scenario, method): [(mean, std), ...]} of a file of curves."""
    curves = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):        # a method's batches stand in order
                point = float(row["mean_accuracy_percent"]) / 100, float(row["std_over_10_orders"]) / 100
                curves.setdefault((row["scenario"], row["method"]), []).append(point)
    except OSError:
        return {}
    return curves
