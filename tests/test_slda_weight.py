"""The search for the weight of SLDA beside a network."""
import shutil
import sys

import pytest

import ar1star_lat_replay as program
from helpers import REPO
from lab.config import load_config

sys.path.insert(0, str(REPO / "benchmarks"))
import slda_weight

SMALL = {"width": .1, "device": "cpu", "init_train_ep": 12, "rm_sz": 40}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{slda_weight: (folder, results)} of three batches of the demo."""
    top, made = tmp_path_factory.mktemp("logs"), {}
    for weight in (0.0, .5):
        config = load_config("demo", REPO / "params.cfg", SMALL | {"slda_weight": weight})
        made[weight] = top / f"w{weight:g}" / "run0_seed0", program.run_experiment(config, f"w{weight:g}", top, 3)
    return made


def test_each_weight_gives_what_a_run_with_it_gives(runs):
    """A run with another weight trains alike; so its network alone is that of the run without SLDA."""
    folder, results = runs[.5]
    (alone, half), slda = slda_weight.accuracies(folder, [0.0, .5])
    assert half == results["final_accuracy"]
    assert alone == runs[0.0][1]["final_accuracy"]
    learner = program.load_learner(folder, "cpu")
    test = slda_weight.TestSet(*slda_weight.open_stream(load_config("demo", REPO / "params.cfg")).get_test_set())
    opinion = learner.memory.observer
    by_hand = opinion.lda.linear(opinion.features(learner.encoder(test.images)[:])).argmax(1)
    assert slda == pytest.approx((by_hand == test.labels).double().mean().item())
    assert len({alone, half, slda}) > 1


def test_it_prints_a_table_and_the_best(runs, capsys):
    assert slda_weight.main([str(runs[.5][0]), "--weights", "0.5", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:6]] == ["0, the network alone", "0.5", "1", "SLDA alone"]
    values = [float(line.split(" | ")[1].strip(" |")) for line in lines[2:6]]
    chosen = float(lines[-1].split("=")[1])
    assert values[[0, .5, 1].index(chosen)] == max(values[:3])


def test_mistakes_are_one_sentence(runs, tmp_path, capsys):
    assert slda_weight.main([str(runs[0.0][0])]) == 2
    assert "slda_weight 0" in capsys.readouterr().err
    shutil.copytree(runs[.5][0], tmp_path / "run0_seed0")
    (tmp_path / "run0_seed0" / "checkpoint.pt").unlink()
    assert slda_weight.main([str(tmp_path / "run0_seed0")]) in (1, 2)
    assert "no checkpoint.pt" in capsys.readouterr().err
