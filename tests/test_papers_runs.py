"""Runs of the papers' programs, and with memories of other kinds, on the demo's stream: stopped and continued they give the
same bits, and nothing is lost."""
import pytest
import torch

import ar1star_lat_replay as program
from helpers import REPO, same
from lab.config import load_config
from test_experiment import one_stream  # noqa: F401  (all runs here share one drawn stream, too)

SMALL = dict(follow="papers", width=0.1, init_train_ep=2, inc_train_ep=2, rm_sz=60, mb_size=32, test_stride=10, device="cpu",
             checkpoint_share=1.0, freeze_below_layer="images", cwr_consolidation="per_class", inc_convs="pointwise",
             head_lr_mult=10.0)
KINDS = {"latent replay": dict(si="learning_rate"), "native replay": dict(latent_layer_num="images"),
         "cwr": dict(latent_layer_num="pool6", head_lr_mult=1.0),
         "no replay": dict(rm_sz=0, latent_layer_num="images", si="learning_rate", si_c=.5),
         "naive": dict(rm_sz=0, latent_layer_num="images", cwr_consolidation="none"),
         "until flat": dict(follow="pytorch_program", patience=1)}
KINDS |= {kind: dict(follow="pytorch_program") | keys for kind, keys in {
    "uint8 images": dict(rm_dtype="uint8", latent_layer_num="images"),
    "pq balanced": dict(rm_dtype="pq", pq_codes=1, rm_mb=0.05, replayed_per_epoch=60, rm_policy="balanced"),
    "float16 with a second opinion": dict(rm_dtype="float16", slda_weight=0.25, slda_layer="conv5_6/sep", slda_root=True),
}.items()}


def learned(tmp_path, name, steps, **keys):
    """(records without times, state of the last checkpoint) of a run that stops after each number of batches in `steps`."""
    config = load_config("demo", REPO / "params.cfg", SMALL | keys)
    for batches in steps:
        results = program.run_experiment(config, name, tmp_path, batches)
    state = torch.load(results["folder"] / "checkpoint.pt", weights_only=True)
    rows = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in results["rows"]]
    return rows, {k: v for k, v in state.items() if k not in ("rows", "files")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_continues_with_the_same_bits(tmp_path, kind):
    whole, state = learned(tmp_path, "whole", [4], **KINDS[kind])
    parts, again = learned(tmp_path, "parts", [1, 2, 4], **KINDS[kind])
    assert parts == whole and same(again, state)
    assert ("si_saturated" in whole[0]) == (KINDS[kind].get("si") == "learning_rate") and whole[-1]["kept_mb"] > 0
