"""Closed-form statistics beside a network that learns: their log-probabilities are added to the network's, at test time.

    opinion = SecondOpinion(net, weight=0.25)                   # before anything is learned: it copies net's upper layers
    memory = ObservedMemory(ReplayMemory(500, like), opinion)   # the memory sees each batch, so the statistics do
    learner = Learner(net, head, memory, classify=opinion.forward)

The network adapts and forgets; streaming linear discriminant analysis (methods.statistics) on features that never
change does neither, so they err on different images.

Uses methods.memories, methods.statistics, models.batch_renorm, torch.
"""
import torch
import torch.nn.functional as F
from torch import nn

from methods.memories import AroundMemory
from methods.statistics import Pooled, StreamingLDA
from models.batch_renorm import fold_brn


class SecondOpinion(nn.Module):
    """log p(class) of the network + weight * log p(class) of streaming linear discriminant analysis.

    net: a SplitNet; its layers from the latent one to `layer` (number or name), whose pooled outputs are the features, are
    copied as they are now. weight: at least 0; 0 is the network alone; root, shrinkage: as methods.statistics takes them.
    No class's log p counts less than LEAST, so that one that was never met does not make the loss infinite. Raises
    LayerError where there is no such layer, and ValueError where it lies below the latent one.
    """

    LEAST = -50.0

    def __init__(self, net, weight, layer="latent", root=False, shrinkage=1e-4):
        super().__init__()
        above = net.layer_number(layer) - net.latent_layer_num
        if above < 0:
            raise ValueError(f"the layer {layer!r} lies below the latent one, whose outputs are all that is at hand: "
                             "choose the latent layer or one above it")
        self.net, self.weight = net, weight
        self.features = fold_brn(nn.Sequential(*net.end_features[:above])).append(Pooled(root))
        latent = net.example_latent(64)
        head = nn.Linear(self.features(latent).shape[1], net.output.out_features, device=latent.device)
        self.lda = StreamingLDA(head.requires_grad_(False), shrinkage)

    def forward(self, latents):
        """Scores (N, classes) of latents (N, *latent shape): sums of log-probabilities."""
        statistics = F.log_softmax(self.lda.linear(self.features(latents)), 1).clamp(min=self.LEAST)
        return F.log_softmax(self.net.classify(latents), 1) + self.weight * statistics

    @torch.no_grad()
    def update(self, latents, labels):
        """Takes in a batch: latents (n, *latent shape), indexable by a slice; labels (n,), int64."""
        parts = [self.features(latents[k:k + 128]) for k in range(0, len(labels), 128)]
        self.lda.update(torch.cat(parts), labels)

    def kept(self):
        """{name: tensor or a dict of them} of what it needs for later batches: the copied layers and the statistics."""
        return {"features": self.features.state_dict(), "lda": self.lda.state_dict()}

    def bring_back(self, kept):
        """Takes over what kept() gave."""
        self.features.load_state_dict(kept["features"])
        self.lda.load_state_dict(kept["lda"])


class ObservedMemory(AroundMemory):
    """A replay memory and someone who takes in every batch that it sees.

    memory: utils.ReplayMemory or what behaves like one; observer: has update(latents, labels), kept() and bring_back().
    """

    def __init__(self, memory, observer):
        super().__init__(memory)
        self.observer = observer

    def update(self, latents, labels, i, rng=None):
        """As the memory's update."""
        super().update(latents, labels, i, rng)
        self.observer.update(latents, labels)

    def state_dict(self):
        return super().state_dict() | {"observer": self.observer.kept()}

    def load_state_dict(self, state):
        self.observer.bring_back(state["observer"])
        super().load_state_dict(state)
