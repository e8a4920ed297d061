"""The search for the layer of the statistics: what it holds out, and what it prints."""
import re
import sys

import pytest
import torch

from ar1star_lat_replay import open_stream
from harness.config import load_config
from helpers import REPO, seeded

sys.path.insert(0, str(REPO / "benchmarks"))
import slda_layers

LAYERS = ["conv3_2/sep", "pool6"]


@pytest.fixture
def arguments(params):
    return ["tiny", "--config", str(params), "--shrinkages", "0.1", "0.5", "--layers", *LAYERS]


def test_a_session_is_tested_without_having_been_learned():
    """The classes are told apart by a value that all batches share, or by one that each batch has its own way
    round, which is of no use."""
    y = torch.arange(40) % 2
    noise = [torch.randn(40, 3, generator=seeded(i)) for i in range(7)]
    shared = [x + 6 * y[:, None] for x in noise]
    own = [x + 60 * (y if i % 2 else 1 - y)[:, None] for i, x in enumerate(noise)]
    assert slda_layers.held_out_accuracies(shared, [y] * 7, 2, False, [.1])[0] > .99
    assert slda_layers.held_out_accuracies(own, [y] * 7, 2, False, [.1])[0] < .9


def test_classes_that_the_rest_never_met_do_not_count():
    y = [torch.tensor(pair * 9) for pair in ([0, 1], [0, 2], [0, 1], [1, 0])]
    noise = [.1 * torch.randn(18, 3, generator=seeded(i)) for i in range(4)]
    x = [10.0 * torch.eye(3)[labels] + some for labels, some in zip(y, noise)]
    assert slda_layers.held_out_accuracies(x, y, 3, False, [.1]) == [1.0]


def test_each_shrinkage_is_solved_as_if_it_were_the_only_one():
    y = [torch.arange(30) % 3 for _ in range(7)]
    x = [torch.randn(30, 5, generator=seeded(i)) + labels[:, None] for i, labels in enumerate(y)]
    together = slda_layers.held_out_accuracies(x, y, 3, True, [.9, 1e-4, .5])
    assert together == [slda_layers.held_out_accuracies(x, y, 3, True, [e])[0] for e in (.9, 1e-4, .5)]
    assert len(set(together)) > 1


def test_it_prints_a_table_and_the_best(arguments, capsys):
    assert slda_layers.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| layer | root | shrinkage 0.1 | shrinkage 0.5 |" and len(lines) == 8
    rows = [line.strip("| ").split(" | ") for line in lines[2:6]]
    cells = {(layer, root): list(map(float, values)) for layer, root, *values in rows}
    assert set(cells) == {(layer, root) for layer in LAYERS for root in ("no", "yes")}
    best = re.search(r"latent_layer_num=(\S+) --set slda_root=(true|false)", lines[-1])
    named = cells[best[1], "yes" if best[2] == "true" else "no"]
    assert max(named) == max(map(max, cells.values()))      # several may share the highest, once rounded
    assert all(0 <= value <= 100 for row in cells.values() for value in row)


def test_layers_side_by_side(params):
    config = load_config("tiny", params)
    both = "+".join(LAYERS)
    layers = [*LAYERS, both]
    features, labels = slda_layers.pooled_outputs(config, open_stream(config), layers, torch.device("cpu"))
    assert all(torch.equal(x[both], torch.cat([x[layer] for layer in LAYERS], 1)) for x in features)
    assert [len(x["pool6"]) for x in features] == [len(y) for y in labels]


@pytest.mark.parametrize("more, says", [(["--layers", "conv9"], "conv9"), (["--set", "rmsz=1"], "rm_sz")])
def test_bad_input_is_one_sentence(arguments, capsys, more, says):
    assert slda_layers.main([*arguments, *more]) in (1, 2)
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error
