"""The published results, each with the settings it was made with, and which of them belong beside a run.

    for result in published(run):
        print(result.accuracy, result.source, curve(result))

A result is shown beside a run only if each setting that it needs is the run's own. What cannot change an
accuracy (the machine, fast, ...) and what the sources do not tell is not asked for.
"""
import csv
from pathlib import Path
from typing import NamedTuple

CURVES = Path(__file__).resolve().parents[1] / "docs" / "published" / "core50_nicv2_no_replay.csv"
BATCHES = {"nicv2_79": 79, "nicv2_196": 196, "nicv2_391": 391}
CORE50_TESTS = (2249, 44972)        # frames in the reduced and the full test set of CORe50


class OneOf(tuple):
    """Values of a setting, each of which will do."""


class Result(NamedTuple):
    """A published final accuracy."""
    scenario: str
    method: str                 # the papers' name, that of its curve where there is one
    accuracy: float             # percent
    source: str
    settings: dict              # {key: value or OneOf} that a run must have had
    std: float | None = None    # percent, over ten orders
    about: bool = False         # read off a figure, or told without a decimal


# ---- the settings: a layer goes by its name or its number ----

IMAGES = OneOf(("images", -1))
MIDDLE = OneOf(("conv5_4/dw", 19))
POOLED = OneOf(("pool6", 27))
NO_SI = {"si": "penalty", "reg_lambda": 0}
ALL = {
    "dataset": "core50", "start_batch": 0, "cumulative": False,
    "model": "mobilenet_v1", "width": 1, "weights": "imagenet",
    "mb_size": 128, "init_lr": 1e-3, "init_train_ep": 4, "inc_train_ep": 4, "momentum": .9, "l2": 5e-4,
    "max_r_max": 1.25, "max_d_max": .5,
    "method": "latent_replay", "patience": 0, "rm_mb": 0, "rm_dtype": "float32", "rm_policy": "random",
    "replayed_per_epoch": 0, "slda_weight": 0}

PYTORCH = ALL | NO_SI | {
    "follow": "pytorch_program", "latent_layer_num": MIDDLE, "freeze_below_layer": MIDDLE,
    "inc_freeze_below_layer": MIDDLE, "inc_convs": "all", "cwr_consolidation": "per_pattern", "inc_lr": 5e-5,
    "head_lr_mult": 1, "init_update_rate": .01, "inc_update_rate": 5e-5, "inc_step": 4.1e-5}

# The papers' programs. All layers learn in batch 0; its update rate and how its limits grow are not asked for
PAPERS = ALL | {"follow": "papers", "freeze_below_layer": IMAGES, "inc_convs": "pointwise",
                "cwr_consolidation": "per_class"}
NO_REPLAY = PAPERS | {"rm_sz": 0, "latent_layer_num": IMAGES, "inc_update_rate": 1e-4}
AR1 = NO_REPLAY | {
    "inc_freeze_below_layer": IMAGES, "inc_lr": 1e-4, "head_lr_mult": 10, "si": "learning_rate", "si_c": .5}
CWR = NO_REPLAY | {     # without SI, which finds nothing that learns
    "inc_freeze_below_layer": POOLED, "inc_lr": 1e-3, "head_lr_mult": 1}
NAIVE = NO_REPLAY | NO_SI | {
    "inc_freeze_below_layer": IMAGES, "inc_lr": 3.5e-5, "head_lr_mult": 1, "cwr_consolidation": "none",
    "init_train_ep": 2, "inc_train_ep": 2}
WIDE = {"max_r_max": 1.5, "max_d_max": 2.5}

# with replay their AR1* ran without SI, too
REPLAY = PAPERS | NO_SI | {"inc_lr": 3e-4, "head_lr_mult": 10}
NATIVE = REPLAY | {"latent_layer_num": IMAGES, "inc_freeze_below_layer": IMAGES, "inc_update_rate": 1e-4}
LATENT = REPLAY | {"latent_layer_num": MIDDLE, "inc_freeze_below_layer": MIDDLE, "inc_update_rate": 5e-5}
HEAD = REPLAY | {"latent_layer_num": POOLED, "inc_freeze_below_layer": POOLED, "inc_update_rate": 5e-5,
                 "head_lr_mult": OneOf((1, 10))}    # CWR*'s or AR1*free's: which of them made it is not told

# ---- the results ----

SITE = "CORe50 site, MobileNetV1 without replay, mean and std of 10 orders"
PROGRAM = "published PyTorch program, about 24 minutes on one TitanX"
USER = "the same program, measured by a user of it"
FIGURE = "read off a figure of arXiv 1912.01100"
ABSTRACT = "abstract of arXiv 2007.13631, by some of the same authors"

RESULTS = [
    Result("nicv2_391", "AR1*", 56.3, SITE, AR1 | WIDE, std=1.1),
    Result("nicv2_391", "CWR*", 57.0, SITE, CWR | WIDE, std=1.0),
    Result("nicv2_391", "naive", 8.0, SITE, NAIVE | WIDE),
    Result("nicv2_196", "AR1*", 60.6, SITE, AR1, std=1.4),
    Result("nicv2_196", "CWR*", 56.9, SITE, CWR, std=.9),
    Result("nicv2_196", "naive", 18.9, SITE, NAIVE),
    Result("nicv2_79", "AR1*", 63.5, SITE, AR1, std=1.2),
    Result("nicv2_79", "CWR*", 57.1, SITE, CWR, std=2.0),
    Result("nicv2_79", "naive", 26.8, SITE, NAIVE),
    Result("nicv2_391", "latent replay", 77.0, PROGRAM, PYTORCH | {"rm_sz": 1500}, about=True),
    Result("nicv2_391", "latent replay", 63.6, USER, PYTORCH | {"rm_sz": 500}),
    Result("nicv2_391", "native replay", 77.3, ABSTRACT, NATIVE | {"rm_sz": 1500}, about=True),
    Result("nicv2_391", "latent replay", 72.5, ABSTRACT, LATENT | {"rm_sz": 1500}, about=True),
    Result("nicv2_391", "latent replay", 70.0, FIGURE, LATENT | {"rm_sz": 500}, about=True),
    Result("nicv2_391", "replay at pool6", 58.0, ABSTRACT, HEAD | {"rm_sz": 1500}, about=True),
]


def published(run):
    """[Result, ...] for what a finished report.Run computed: of CORe50 itself, never of stand-in or demo."""
    scenario = run.config.get("scenario")
    if run.last.get("n_test") not in CORE50_TESTS or run.batches != BATCHES.get(scenario):
        return []
    return [result for result in RESULTS if result.scenario == scenario
            and all(_meets(run.config.get(key), needed) for key, needed in result.settings.items())]


def _meets(value, needed):
    return value in needed if isinstance(needed, OneOf) else value == needed


def curve(result):
    """[(mean, std), ...] in 0..1 after each batch, over ten orders; [] where none is known."""
    if result.source != SITE or not CURVES.is_file():
        return []
    with open(CURVES, newline="", encoding="utf-8") as file:        # a method's batches stand in order
        return [(float(row["mean_accuracy_percent"]) / 100, float(row["std_over_10_orders"]) / 100)
                for row in csv.DictReader(file)
                if (row["scenario"], row["method"]) == (result.scenario, result.method)]
