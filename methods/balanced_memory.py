"""A replay memory that keeps classes, and the batches in which they came, in balance.

    memory = BalancedMemory(1500, like=latent)
    memory.update(latents, labels, i, rng)

And training that takes no more of a new class than such a memory keeps of it.

    train = EvenTraining(train_batch)
    train(learner, latents, labels, epochs, rng)        # as train_batch
"""
import torch

from utils import Mapped, ReplayMemory


def fair_shares(total, available, rng=None):
    """Shares as equal as possible: int64 like `available`, each at most what is available.

    They add up to min(total, available.sum()); what cannot be divided goes to some drawn at random.
    """
    shares = torch.zeros_like(available)
    left = min(total, int(available.sum()))
    while left:
        hungry = (available > shares).nonzero()[:, 0]
        each = min(left // len(hungry), int((available - shares)[hungry].min()))
        if each == 0:       # fewer are left than are hungry: one for each of `left` drawn ones
            hungry = hungry[torch.randperm(len(hungry), generator=rng)[:left]]
            each = 1
        shares[hungry] += each
        left -= each * len(hungry)
    return shares


class BalancedMemory(ReplayMemory):
    """ReplayMemory that keeps as many of each class met and, within a class, of each batch that it came in.

    A new batch gets no more than its share, so a class of many batches is renewed slowly. What is dropped of
    a group and what is taken in from the new one are drawn at random; what was dropped never comes back, so a
    group may be smaller than its share, which the others then divide.
    """

    @torch.no_grad()
    def update(self, latents, labels, i, rng=None):
        """latents: (n, *latent shape), indexable by an int64 tensor; labels: (n,); i: number of the batch."""
        m = self.size
        n = len(labels)
        y = torch.cat((self.y.cpu(), torch.as_tensor(labels).cpu()))        # (m + n,): stored, then new
        batch = torch.cat((self.batch.cpu(), torch.full((n,), i)))

        kept = torch.zeros(m + n, dtype=torch.bool)
        classes, counts = y.unique(return_counts=True)
        for j, share in zip(classes, fair_shares(self.rm_sz, counts, rng)):
            origins, sizes = batch[y == j].unique(return_counts=True)
            for origin, part in zip(origins, fair_shares(int(share), sizes, rng)):
                group = ((y == j) & (batch == origin)).nonzero()[:, 0]
                drawn = torch.randperm(len(group), generator=rng)[:part]
                kept[group[drawn]] = True

        chosen = kept[m:].nonzero()[:, 0]
        freed = (~kept[:m]).nonzero()[:, 0]
        size = int(kept.sum())
        slots = torch.cat((freed, torch.arange(m, size)))
        self._store(slots, latents, labels, chosen, i, size)


class EvenTraining:
    """Trains on no more new images of a class than its share of a balanced memory, drawn at random.

    Otherwise a batch of hundreds of images of one class teaches a head that most images are of this class.
    train_batch: called with (learner, latents, labels, epochs, rng), whose memory has a capacity rm_sz.
    """

    def __init__(self, train_batch):
        self.train_batch = train_batch

    def __call__(self, learner, latents, labels, epochs, rng):
        y = labels.cpu()
        classes, counts = torch.cat((learner.memory.y.cpu(), y)).unique(return_counts=True)
        shares = fair_shares(learner.memory.rm_sz, counts, rng).clamp(min=1)

        order = torch.randperm(len(y), generator=rng)
        chosen = torch.cat([order[y[order] == j][:share] for j, share in zip(classes, shares)])
        chosen = chosen.to(labels.device)
        return self.train_batch(learner, Mapped(chosen, latents.__getitem__), labels[chosen], epochs, rng)
