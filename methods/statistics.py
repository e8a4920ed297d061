"""Classifiers in closed form on frozen features: no gradient, no replay, the same result whatever the order of the stream.

    features = Pooled(root=True)(latents)           # (n, 1024, 4, 4) to (n, 1024)
    head = StreamingLDA(nn.Linear(1024, 50))        # or NearestClassMean
    head.update(features, labels)                   # as often as there are batches
    scores = head.linear(features)

`StreamingLDA`: streaming linear discriminant analysis, Hayes and Kanan, CVPR Workshops 2020 (arXiv 1909.01520).
`NearestClassMean`: the same with the identity for the covariance. Both are baselines that a method with replay has to beat.

Uses torch.
"""
import torch
from torch import nn

UNMET = -1e6        # score of a class that was never met: below all others


class Pooled(nn.Module):
    """Latents (N, C, H, W), or (N, C), to features (N, C): the mean over the map, and with `root` the root of it.

    A ReLU leaves channels that are 0 for most images and large for some; the root, sign(x) sqrt(|x|), brings such a
    distribution nearer to the normal one that linear discriminant analysis takes for granted.
    """

    def __init__(self, root=False):
        super().__init__()
        self.root = root

    def forward(self, latents):
        features = latents.flatten(2).mean(2) if latents.dim() > 2 else latents
        return features.sign() * features.abs().sqrt() if self.root else features


class NearestClassMean:
    """Scores x . mu_c - |mu_c|^2 / 2: the class whose mean is nearest to x has the highest.

    linear: nn.Linear(features, classes), with a bias; update() writes the scores' weights into it. State: `past_j`
    (classes,) int64, the patterns of each class met, and `mean` (classes, features) float32.
    """

    def __init__(self, linear):
        if linear.bias is None:
            raise ValueError("the scores of class means have a bias: give nn.Linear(features, classes)")
        self.linear = linear
        self.past_j = torch.zeros(linear.out_features, dtype=torch.int64, device=linear.weight.device)
        self.mean = torch.zeros_like(linear.weight, requires_grad=False)

    @torch.no_grad()
    def update(self, x, y):
        """Takes features x (n, features) and labels y (n,), int64, into account, each class's in one step (Chan et al.)."""
        x = x.double()
        for j in y.unique().tolist():
            mine = x[y == j]
            mu, past = mine.mean(0), self.past_j[j].item()
            old = self.mean[j].double()
            self._scatter(mine - mu, mu - old, past * len(mine) / (past + len(mine)))
            self.mean[j] = old + (mu - old) * (len(mine) / (past + len(mine)))
            self.past_j[j] += len(mine)
        self._write(self._solve(self.mean.double()))

    def _scatter(self, within, between, weight):
        """What one class adds to the scatter within classes; the nearest mean needs none of it."""

    def _solve(self, means):
        """Weights (classes, features) of the scores, float64."""
        return means

    def _write(self, weight):
        bias = -(weight * self.mean.double()).sum(1) / 2
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(torch.where(self.past_j > 0, bias, UNMET))

    def state_dict(self):
        return {"past_j": self.past_j, "mean": self.mean}

    @torch.no_grad()
    def load_state_dict(self, state):
        for name, tensor in state.items():
            getattr(self, name).copy_(tensor)
        self._write(self._solve(self.mean.double()))


class StreamingLDA(NearestClassMean):
    """Scores x' S^-1 mu_c - mu_c' S^-1 mu_c / 2 with S = (1 - e) covariance + e I, e = `shrinkage`.

    covariance: of all patterns around the means of their classes, one for all classes. Beside the state of
    NearestClassMean: `scatter` (features, features) float32, the sum of the outer products that it is the mean of.
    """

    def __init__(self, linear, shrinkage=1e-4):
        super().__init__(linear)
        self.shrinkage = shrinkage
        self.scatter = torch.zeros((linear.in_features, linear.in_features), device=linear.weight.device)

    def _scatter(self, within, between, weight):
        self.scatter += (within.T @ within + weight * torch.outer(between, between)).float()

    def shrunk_covariance(self):
        """S (features, features), float64."""
        covariance = self.scatter.double() / self.past_j.sum().clamp(min=1)
        identity = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
        return (1 - self.shrinkage) * covariance + self.shrinkage * identity

    def _solve(self, means):
        return torch.linalg.solve(self.shrunk_covariance(), means.T).T

    def state_dict(self):
        return super().state_dict() | {"scatter": self.scatter}
