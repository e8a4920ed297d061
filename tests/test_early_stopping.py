"""Training until it stops helping, with a training of scripted success."""
import torch
from torch import nn

from helpers import seeded
from methods.early_stopping import EarlyStopping
from utils import Mapped


class Scripted:
    """A learner whose network gets script[k] of ten patterns right after epoch k."""

    def __init__(self, script):
        self.script, self.epochs, self.seen = script, 0, []
        self.net = nn.Linear(1, 2, bias=False)
        self.net.classify = self.classify
        self.net.state = nn.Parameter(torch.tensor(-1.0))

    def classify(self, x):
        rank = (x[:, 0].argsort().argsort() < self.script[int(self.net.state)]).long()
        return nn.functional.one_hot(rank, 2).float()

    def train(self, learner, latents, labels, epochs, rng):
        assert learner is self and epochs == 1 and len(latents) == len(labels) == 90
        self.seen.append(latents[torch.arange(90)][:, 0].long().tolist())
        with torch.no_grad():
            self.net.state.fill_(self.epochs)
        self.epochs += 1
        return torch.full((3,), float(self.epochs)), torch.ones(3)


def test_it_stops_when_it_no_longer_helps_and_goes_back_to_the_best(monkeypatch):
    monkeypatch.setattr("methods.early_stopping.evaluate", lambda model, inputs, labels: {
        "accuracy": model(inputs[:]).argmax(1).double().mean().item()})
    for script, patience, made, best in (([3, 5, 4, 5, 9, 9], 2, 4, 1), ([3, 5, 4, 5, 9, 9], 3, 6, 4),
                                          ([1, 2, 3, 4, 5, 6], 2, 6, 5)):
        learner = Scripted(script)
        train = EarlyStopping(learner.train, patience)
        latents, labels = torch.arange(100.)[:, None], torch.ones(100, dtype=torch.int64)
        steps = train(learner, latents, labels, 6, seeded(0))
        assert learner.epochs == made and learner.net.state.item() == best
        assert steps[0].tolist() == [float(e + 1) for e in range(made) for _ in range(3)]
        # the same patterns are held back in all epochs
        assert all(sorted(seen) == sorted(learner.seen[0]) for seen in learner.seen)
        assert len(set(learner.seen[0])) == 90


def test_nothing_is_held_back_of_a_tiny_batch():
    train = EarlyStopping(lambda *given: given, 1)
    assert train("learner", torch.zeros(9), torch.zeros(9), 4, None)[3] == 4


def test_chosen_latents_are_indexed_by_tensors_and_slices():
    subset = Mapped(torch.tensor([7, 3, 5]), torch.arange(10.).__getitem__)
    assert len(subset) == 3
    assert subset[torch.tensor([2, 0])].tolist() == [5, 7] and subset[1:].tolist() == [3, 5]
