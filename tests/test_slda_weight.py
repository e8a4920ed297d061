"""The search for the weight of SLDA beside a network."""
import shutil
import sys

import pytest
import torch

import ar1star_lat_replay as program
from harness.config import load_config
from helpers import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import slda_weight


@pytest.fixture(scope="module")
def runs(params, tmp_path_factory):
    """{slda_weight: (folder, results)} of three batches of noise."""
    top = tmp_path_factory.mktemp("logs")
    made = {}
    for weight in (0.0, .5):
        beside = {"slda_weight": weight, "slda_layer": "latent", "slda_root": True} if weight else {}
        config = load_config("tiny", params, beside)
        name = f"w{weight:g}"
        made[weight] = top / name / "run0_seed0", program.run(config, name, top, 3)
    return made


def test_each_weight_gives_what_a_run_with_it_gives(runs, params):
    """A run with another weight trains alike; so its network alone is that of the run without SLDA."""
    folder, results = runs[.5]
    (alone, half, much), slda = slda_weight.accuracies(folder, [0.0, .5, 1e4])
    assert half == results["final_accuracy"]
    assert alone == runs[0.0][1]["final_accuracy"] != half

    learner = program.load_learner(folder, "cpu")
    images, labels = program.open_stream(load_config("tiny", params)).get_test_set()
    features = learner.beside.features(learner.encoder(images)[:])
    by_hand = learner.beside.lda.linear(features).argmax(1)
    assert slda == pytest.approx((by_hand == torch.as_tensor(labels)).double().mean().item()) == much


def test_it_prints_a_table_and_the_best(runs, capsys):
    assert slda_weight.main([str(runs[.5][0]), "--weights", "0.5", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names, values = zip(*(line.strip("| ").split(" | ") for line in lines[2:6]))
    assert names == ("0, the network alone", "0.5", "1", "SLDA alone")
    values = list(map(float, values))
    chosen = float(lines[-1].split("=")[1])
    assert values[[0, .5, 1].index(chosen)] == max(values[:3])


def test_mistakes_are_one_sentence(runs, tmp_path, capsys):
    assert slda_weight.main([str(runs[0.0][0])]) == 2
    assert "slda_weight 0" in capsys.readouterr().err
    shutil.copytree(runs[.5][0], tmp_path / "run0_seed0")
    (tmp_path / "run0_seed0" / "checkpoint.pt").unlink()
    assert slda_weight.main([str(tmp_path / "run0_seed0")]) in (1, 2)
    assert "no checkpoint.pt" in capsys.readouterr().err
