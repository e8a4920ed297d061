"""Training on a batch until it stops helping.

    train = EarlyStopping(train_batch, patience=3)
    train(learner, latents, labels, epochs, rng)        # as train_batch, with at most that many epochs

Bounds need it: with a fixed number of epochs, a method that sees all images at once may end below one that
sees them batch by batch.
"""
import copy

import torch

from utils import Mapped, evaluate


class EarlyStopping:
    """Trains epoch by epoch until the accuracy on patterns held back has not risen for `patience` epochs.

    The network is then that of the best epoch. A share of a batch is held back, drawn at random; of fewer
    than 1 / share patterns nothing can be, and all epochs are made. train_batch: called with (learner,
    latents, labels, 1, rng), returns a tuple of 1-d tensors over its steps.
    """

    def __init__(self, train_batch, patience, share=0.1):
        self.train_batch = train_batch
        self.patience = patience
        self.share = share

    def __call__(self, learner, latents, labels, epochs, rng):
        order = torch.randperm(len(labels), generator=rng).to(labels.device)
        held, used = order.tensor_split([int(self.share * len(labels))])
        if len(held) == 0:
            return self.train_batch(learner, latents, labels, epochs, rng)

        learned = Mapped(used, latents.__getitem__)
        tested = Mapped(held, latents.__getitem__)
        steps = []
        best = -1.0
        since = 0       # epochs since the best one
        for _ in range(epochs):
            steps.append(self.train_batch(learner, learned, labels[used], 1, rng))
            accuracy = evaluate(learner.net.classify, tested, labels[held])["accuracy"]
            since += 1
            if accuracy > best:
                best = accuracy
                since = 0
                state = copy.deepcopy(learner.net.state_dict())
            if since >= self.patience:
                break
        learner.net.load_state_dict(state)
        return tuple(torch.cat(parts) for parts in zip(*steps, strict=True))
