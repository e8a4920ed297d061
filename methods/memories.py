"""Which patterns a replay memory keeps, and how many of them an epoch replays: other rules than the published one.

`BalancedMemory` keeps classes and batches of origin in balance; `part_of_memory` lets an epoch replay a part of the memory;
`AroundMemory` is what a memory of another form stands on.

Uses torch, utils.
"""
import torch

from utils import ReplayMemory
from utils import minibatches as of_the_program


def fair_shares(total, available, rng=None):
    """Shares, int64 like `available`, that add up to min(total, available.sum()), each at most what is available, as equal
    as that allows; what cannot be divided goes to some drawn at random."""
    shares, left = torch.zeros_like(available), min(total, int(available.sum()))
    while left:
        hungry = (available > shares).nonzero()[:, 0]
        each = min(left // len(hungry), int((available - shares)[hungry].min()))
        if each == 0:
            hungry, each = hungry[torch.randperm(len(hungry), generator=rng)[:left]], 1
        shares[hungry] += each
        left -= each * len(hungry)
    return shares


class BalancedMemory(ReplayMemory):
    """ReplayMemory that keeps equal numbers of each class met, and within a class of each batch that it came in.

    A new batch gets no more than its share, so a class of many batches is renewed slowly. What is dropped of a group and
    what is taken in from the new one are drawn at random; what was dropped never comes back, so a group may be smaller
    than its share, which the others then divide.
    """

    @torch.no_grad()
    def update(self, latents, labels, i, rng=None):
        """latents: (n, *latent shape), indexable by an int64 tensor; labels: (n,); i: number of the batch."""
        m, n = self.size, len(labels)
        y, batch = (torch.cat((mine.cpu(), new)) for mine, new in ((self.y, torch.as_tensor(labels).cpu()),
                                                                  (self.batch, torch.full((n,), i))))
        kept = torch.zeros(m + n, dtype=torch.bool)     # of those stored, and of the new ones behind them
        classes, counts = y.unique(return_counts=True)
        for j, share in zip(classes, fair_shares(self.rm_sz, counts, rng)):
            origins, sizes = batch[y == j].unique(return_counts=True)
            for origin, part in zip(origins, fair_shares(int(share), sizes, rng)):
                group = ((y == j) & (batch == origin)).nonzero()[:, 0]
                kept[group[torch.randperm(len(group), generator=rng)[:part]]] = True
        chosen = kept[m:].nonzero()[:, 0]
        self.size = int(kept.sum())
        slots = torch.cat(((~kept[:m]).nonzero()[:, 0], torch.arange(m, self.size)))
        self._store(slots, latents, labels, chosen, i)


class AroundMemory:
    """A replay memory that is another one, `inner`, but for what a subclass does in its own way."""

    def __init__(self, inner):
        self.inner = inner

    x = property(lambda self: self.inner.x)
    y = property(lambda self: self.inner.y)
    batch = property(lambda self: self.inner.batch)
    rm_sz = property(lambda self: self.inner.rm_sz)

    def __len__(self):
        return len(self.inner)

    def update(self, latents, labels, i, rng=None):
        """As utils.ReplayMemory.update."""
        self.inner.update(latents, labels, i, rng)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)


def part_of_memory(replayed_per_epoch, rule=of_the_program):
    """A rule of mini-batches as `rule`, for a memory of replayed_per_epoch patterns: each epoch takes others, at random.

    So the steps of a batch stay as many as they are with a memory of that size, however much the memory holds.
    """

    def minibatches(n, m, mb_size=128, rng=None, epochs=1):
        plan = rule(n, min(m, replayed_per_epoch), mb_size, rng, epochs)
        if m <= replayed_per_epoch:
            return plan
        steps = len(plan) // epochs
        parts = [torch.randperm(m, generator=rng)[:replayed_per_epoch] for _ in range(epochs)]
        return [(new, parts[t // steps][old]) for t, (new, old) in enumerate(plan)]

    return minibatches
