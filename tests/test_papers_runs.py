"""Runs of all that goes beyond the published program: stopped and continued they give the same bits."""
import pytest
import torch

import ar1star_lat_replay as program
from harness.config import load_config
from helpers import same

SMALL = dict(follow="papers", width=0.1, init_train_ep=1, inc_train_ep=2, rm_sz=60, mb_size=32, device="cpu",
             test_stride=10, checkpoint_share=1.0, freeze_below_layer="images", cwr_consolidation="per_class",
             inc_convs="pointwise", head_lr_mult=10.0)
PUBLISHED = dict(follow="pytorch_program")
KINDS = {
    "latent replay": dict(si="learning_rate"),
    "native replay": dict(latent_layer_num="images"),
    "cwr": dict(latent_layer_num="pool6", head_lr_mult=1.0),
    "no replay": dict(rm_sz=0, latent_layer_num="images", si="learning_rate", si_c=.5),
    "naive": dict(rm_sz=0, latent_layer_num="images", cwr_consolidation="none"),
    "early stopping": PUBLISHED | dict(patience=1),
    "uint8 images": PUBLISHED | dict(rm_dtype="uint8", latent_layer_num="images"),
    "pq balanced": PUBLISHED | dict(rm_dtype="pq", pq_codes=1, rm_mb=0.05, replayed_per_epoch=60,
                                    rm_policy="balanced"),
    "float16 and slda beside": PUBLISHED | dict(rm_dtype="float16", slda_weight=0.25, slda_root=True,
                                                slda_layer="conv5_6/sep")}


pytestmark = pytest.mark.usefixtures("drawn_once")


def learned(tmp_path, name, steps, **keys):
    """(records without times, state of the last checkpoint) of a run that stops after each of `steps`."""
    config = load_config("demo", overrides=SMALL | keys)
    for batches in steps:
        results = program.run(config, name, tmp_path, batches)
    state = torch.load(results["folder"] / "checkpoint.pt", weights_only=True)
    rows = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in results["rows"]]
    return rows, {k: v for k, v in state.items() if k not in ("rows", "files")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_continues_with_the_same_bits(tmp_path, kind):
    whole, state = learned(tmp_path, "whole", [3], **KINDS[kind])
    parts, again = learned(tmp_path, "parts", [1, 3], **KINDS[kind])
    assert parts == whole and same(again, state)
    assert ("si_saturated" in whole[0]) == (KINDS[kind].get("si") == "learning_rate")
    assert whole[-1]["kept_mb"] > 0
