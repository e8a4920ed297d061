"""The search for the layer of the statistics: what it holds out, and what it prints."""
import sys

import pytest
import torch

from helpers import REPO, seeded
from lab.config import load_config
from lab.data import open_stream

sys.path.insert(0, str(REPO / "benchmarks"))
import slda_layers

SMALL = ["demo", "--set", "width=0.1", "--set", "device=cpu", "--shrinkages", "0.1", "0.5"]


def test_a_session_is_tested_without_having_been_learned():
    """A class looks another way in each batch, and the classes are told apart by a value that all batches share, or by one
    that only its own batch knows: that one is of no use."""
    y = torch.arange(40) % 2
    shared = [torch.randn(40, 3, generator=seeded(i)) + 6 * y[:, None] for i in range(7)]
    own = [torch.randn(40, 3, generator=seeded(i)) + 60 * (y[:, None] if i % 2 else 1 - y[:, None]) for i in range(7)]
    (of_shared,), (of_own,) = (slda_layers.held_out_accuracies(x, [y] * 7, 2, False, [.1]) for x in (shared, own))
    assert of_shared > .99
    assert of_own < .9


def test_classes_that_the_rest_never_met_do_not_count():
    y = [torch.tensor([0, 1] * 9), torch.tensor([0, 2] * 9), torch.tensor([0, 1] * 9), torch.tensor([1, 0] * 9)]
    x = [10.0 * torch.eye(3)[labels] + .1 * torch.randn(18, 3, generator=seeded(i)) for i, labels in enumerate(y)]
    assert slda_layers.held_out_accuracies(x, y, 3, False, [.1]) == [1.0]


def test_each_shrinkage_is_solved_as_if_it_were_the_only_one():
    y = [torch.arange(30) % 3 for _ in range(7)]
    x = [torch.randn(30, 5, generator=seeded(i)) + labels[:, None] for i, labels in enumerate(y)]
    together = slda_layers.held_out_accuracies(x, y, 3, True, [.9, 1e-4, .5])
    assert together == [slda_layers.held_out_accuracies(x, y, 3, True, [e])[0] for e in (.9, 1e-4, .5)]
    assert len(set(together)) > 1


def test_it_prints_a_table_and_the_best(capsys):
    assert slda_layers.main([*SMALL, "--layers", "conv3_2/sep", "pool6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| layer | root | shrinkage 0.1 | shrinkage 0.5 |" and len(lines) == 8
    cells = {tuple(line.split(" | ")[:2]): [float(c) for c in line.strip("| ").split(" | ")[2:]] for line in lines[2:6]}
    assert set(cells) == {("| conv3_2/sep", "no"), ("| conv3_2/sep", "yes"), ("| pool6", "no"), ("| pool6", "yes")}
    layer, root = max(cells, key=lambda key: max(cells[key]))
    assert f"latent_layer_num={layer[2:]} --set slda_root={'true' if root == 'yes' else 'false'}" in lines[-1]
    assert all(0 <= value <= 100 for row in cells.values() for value in row)


def test_layers_side_by_side():
    config = load_config("demo", REPO / "params.cfg", {"width": .1, "device": "cpu"})
    layers = ["conv3_2/sep", "pool6", "conv3_2/sep+pool6"]
    features, labels = slda_layers.pooled_outputs(config, open_stream(config), layers, torch.device("cpu"))
    assert all(torch.equal(x[layers[2]], torch.cat([x[layers[0]], x[layers[1]]], 1)) for x in features)
    assert [len(x["pool6"]) for x in features] == [len(y) for y in labels]


@pytest.mark.parametrize("more, says", [(["--layers", "conv9"], "no layer 'conv9'"), (["--set", "rmsz=1"], "did you mean")])
def test_bad_input_is_one_sentence(capsys, more, says):
    assert slda_layers.main([*SMALL, *more]) in (1, 2)
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error
