"""A learner without training: closed-form statistics of frozen features, with the interface of the experiment's Learner.

Uses lab.data, lab.fast, methods.statistics, torch, utils.
"""
import torch
import torch.nn.functional as F
from torch import nn

from lab.data import as_labels
from lab.fast import Encoder
from methods.statistics import NearestClassMean, Pooled, StreamingLDA
from utils import ReplayMemory, SynapticIntelligence, predict


class StatisticsLearner:
    """Learns with methods.statistics on the pooled outputs of a network's latent layer; the network never changes.

    method: "slda" or "ncm"; net: a SplitNet; root, shrinkage: as methods.statistics takes them. learn, predict, state_dict,
    load_state_dict and check_frozen are those of the experiment's Learner.
    """

    def __init__(self, method, net, max_latents_gb=4, root=False, shrinkage=1e-4):
        self.net, self.device, self.batches = net, net.output.weight.device, 0
        net.output = nn.Linear(net.example_latent(64).shape[1], net.output.out_features, device=self.device)
        net.train()
        net.freeze_below("latent")
        self.frozen = self._frozen_now()
        self.head = StreamingLDA(net.output, shrinkage) if method == "slda" else NearestClassMean(net.output)
        self.pooled = Pooled(root)
        self.classify = nn.Sequential(self.pooled, net.output)
        self.encoder = Encoder(net.to(memory_format=torch.channels_last), self.device, max_bytes=int(max_latents_gb * 2**30))
        self.si = SynapticIntelligence([], 0.0)
        self.memory = ReplayMemory(0, like=torch.zeros((1, net.output.in_features), device=self.device))

    @torch.no_grad()
    def learn(self, images, labels, lap=lambda part: None):
        """Learns one batch: uint8 RGB images (n, H, W, 3), int64 labels (n,). Returns, as of one step: loss, correct
        predictions, patterns; of the batch itself, after it was learned."""
        features, labels = self.pooled(self.encoder(images)[:]), as_labels(labels, len(images), self.net.output)
        lap("encode")
        self.head.update(features, labels)
        scores = self.net.output(features)
        self.batches += 1
        lap("train")
        return (F.cross_entropy(scores, labels)[None], (scores.argmax(1) == labels).sum()[None], torch.tensor([len(labels)]))

    def predict(self, images):
        """The class of each of uint8 RGB images (n, H, W, 3): int64 (n,), on the CPU."""
        return predict(self.classify, self.encoder(images), len(images)).cpu()

    def _frozen_now(self):
        return {key: value.clone() for key, value in self.net.state_up_to("latent").items()}

    def check_frozen(self):
        """Raises unless the network is bit-equal to what it was at first."""
        for key, value in self._frozen_now().items():
            if not torch.equal(value, self.frozen[key]):
                raise AssertionError(f"the frozen {key} has changed during the run: this is a bug, please report it")

    def state_dict(self):
        return {"batches": self.batches, "net": self.net.state_dict(), "head": self.head.state_dict()}

    def load_state_dict(self, state):
        self.net.load_state_dict(state["net"])
        self.frozen = self._frozen_now()
        self.encoder = Encoder(self.net, self.device, max_bytes=self.encoder.max_bytes)
        self.head.load_state_dict(state["head"])
        self.batches = state["batches"]
