"""Training on a batch until it stops helping, for bounds that are bounds: with a fixed number of epochs, a method that sees
all images at once may end below one that sees them batch by batch.

    train = UntilFlat(train_batch, patience=3)
    train(learner, latents, labels, epochs, rng)        # as train_batch, `epochs` being the most that are made

Uses torch, utils.
"""
import copy

import torch

from utils import evaluate


class Part:
    """Some of something that an int64 tensor indexes: latents[index] of the chosen ones. chosen: int64 (k,)."""

    def __init__(self, latents, chosen):
        self.latents, self.chosen = latents, chosen

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, index):
        return self.latents[self.chosen[index.to(self.chosen.device) if isinstance(index, torch.Tensor) else index]]


class UntilFlat:
    """Holds back a share of a batch's patterns at random, trains on the others epoch by epoch, and stops once the accuracy
    on those held back has not risen for `patience` epochs; the network is then that of the best epoch.

    train: called with (learner, latents, labels, 1, rng), returns a tuple of 1-d tensors over its steps. A batch of fewer
    than 1 / share patterns is trained for all its epochs, since nothing can be held back.
    """

    def __init__(self, train, patience, share=0.1):
        self.train, self.patience, self.share = train, patience, share

    def __call__(self, learner, latents, labels, epochs, rng):
        order = torch.randperm(len(labels), generator=rng).to(labels.device)
        held, used = order.tensor_split([int(self.share * len(labels))])
        if not len(held):
            return self.train(learner, latents, labels, epochs, rng)
        steps, best, since, state = [], -1.0, 0, None
        for _ in range(epochs):
            steps.append(self.train(learner, Part(latents, used), labels[used], 1, rng))
            accuracy = evaluate(learner.net.classify, Part(latents, held), labels[held])["accuracy"]
            since += 1
            if accuracy > best:
                best, since, state = accuracy, 0, copy.deepcopy(learner.net.state_dict())
            if since >= self.patience:
                break
        learner.net.load_state_dict(state)
        return tuple(torch.cat(parts) for parts in zip(*steps, strict=True))
