"""The ideas for a head on pooled features: what is drawn from statistics, how rows start, and the table that is printed."""
import sys

import pytest
import torch
from torch import nn

from helpers import REPO, seeded
from methods.statistics import StreamingLDA
from utils import CWRHead

sys.path.insert(0, str(REPO / "benchmarks"))
import feature_ideas

MIX = torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 0, .5]])


def two_blobs():
    """Features around two means, with the covariance MIX MIX' in both, and their labels 0 and 3 of four classes."""
    y = torch.tensor([0, 3]).repeat(4000)
    mean = torch.where((y == 3)[:, None], torch.tensor([5.0, -1, 2]), torch.tensor([0.0, 1, 0]))
    return mean + torch.randn(8000, 3, generator=seeded(1)) @ MIX.T, y


def test_what_is_drawn_has_the_means_and_the_covariance_of_what_was_seen():
    lda = StreamingLDA(nn.Linear(3, 4).requires_grad_(False), shrinkage=0.0)
    x, y = two_blobs()
    lda.update(x, y)
    drawn_x, drawn_y = feature_ideas.drawn(lda, 8000, seeded(2))
    assert drawn_y.bincount(minlength=4).tolist() == [4000, 0, 0, 4000]
    for j, mean in ((0, [0.0, 1, 0]), (3, [5.0, -1, 2])):
        assert torch.allclose(drawn_x[drawn_y == j].mean(0), torch.tensor(mean), atol=.15)
        assert torch.allclose(drawn_x[drawn_y == j].T.cov(), MIX @ MIX.T, atol=.35)


def test_only_rows_of_new_classes_start_anew_along_their_means():
    head = CWRHead(nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[7.0, 7], [8, 8], [9, 9]]))
    head.past_j[0] = 5
    feature_ideas.start_rows(head, torch.tensor([[9.0, 9], [3, 0], [3, 8]]), torch.tensor([0, 2, 2]))
    # class 2: the mean (3, 4) has length 5
    expected = [[7, 7], [8, 8], [feature_ideas.START * .6, feature_ideas.START * .8]]
    assert torch.allclose(head.linear.weight, torch.tensor(expected))


@pytest.mark.parametrize("idea", feature_ideas.IDEAS)
def test_each_idea_learns_what_can_be_told_apart(idea):
    """Four classes, one a batch after the first two, each around a mean of its own."""
    means = 3 * torch.eye(4)
    batches = [(means[y] + .3 * torch.randn(len(y), 4, generator=seeded(i)), y)
               for i, y in enumerate([torch.arange(60) % 2, torch.full((60,), 2), torch.full((60,), 3)])]
    linear = list(feature_ideas.learn(idea, .1, batches, 4, 60, 32, 0))[-1]
    assert (linear(means).argmax(1) == torch.arange(4)).all()


def test_features_are_standardized_by_batch_0_alone():
    batches = [(torch.tensor([[0.0, 1], [2, 5]]), None), (torch.tensor([[100.0, 100]]), None)]
    (first, later), test_x = feature_ideas.standardized(batches, torch.tensor([[1.0, 3]]))
    assert torch.allclose(first[0], torch.tensor([[-1.0, -1], [1, 1]]) / 2 ** .5, atol=1e-3)
    assert torch.allclose(later[0], torch.tensor([[99 / 2 ** .5, 97 / 8 ** .5]]), atol=.1)
    assert torch.equal(test_x, torch.zeros(1, 2))


def test_the_command_prints_every_idea_on_both_layers(capsys):
    small = "demo --set width=0.1 --set latent_layer_num=conv5_6/sep --patterns 30 --rates 0.1".split()
    assert feature_ideas.main([*small, "--set", "device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("SLDA alone on conv5_6/sep: ")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    ideas = [[layer, idea] for layer in ("pool6", "conv5_6/sep") for idea in feature_ideas.IDEAS]
    assert [row[:2] for row in cells] == ideas
    assert all(0 <= float(value) <= 100 for row in cells for cell in row[2:] for value in cell.split(" / "))
    assert feature_ideas.main(["no_such_section"]) == 2
