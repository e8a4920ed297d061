"""Classifiers in closed form: no gradient, no replay, the same result whatever the order of the stream.

    features = Pooled(root=True)(latents)           # (n, 1024, 4, 4) to (n, 1024)
    head = StreamingLDA(nn.Linear(1024, 50))        # or NearestClassMean
    head.update(features, labels)                   # as often as there are batches
    scores = head.linear(features)

`StreamingLDA`: streaming linear discriminant analysis, Hayes and Kanan, CVPR Workshops 2020 (arXiv
1909.01520). `NearestClassMean`: the same with the identity for the covariance. Both are baselines that replay
has to beat.

`SLDABeside` has streaming LDA beside a network that learns and adds the two log-probabilities in the test.
The network adapts and forgets; statistics of features that never change do neither, so they err on different
images.
"""
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import nn

from models.batch_renorm import fold_brn
from utils import as_labels, resize_linear, resized, undone_on_error

UNMET = -1e6        # score of a class that was never met: below all others


class FeaturesError(ValueError):
    """Features that no scores can be computed of."""
    exit_status = 2


class Pooled(nn.Module):
    """Latents (N, C, H, W) or (N, C) to features (N, C): the mean over the map, with `root` the root of it.

    A ReLU leaves channels that are 0 for most images and large for some; the root, sign(x) sqrt(|x|), brings
    such a distribution nearer to the normal one that linear discriminant analysis takes for granted.
    """

    def __init__(self, root=False):
        super().__init__()
        self.root = root

    def forward(self, latents):
        features = latents.flatten(2).mean(2) if latents.dim() > 2 else latents
        if self.root:
            features = features.sign() * features.abs().sqrt()
        return features


class Behind(nn.Module):
    """The values of vectors (N, C + D) behind the first C: (N, D)."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def forward(self, x):
        return x[:, self.first:]


class NearestClassMean:
    """Scores x . mu_c - |mu_c|^2 / 2: the class whose mean is nearest to x has the highest.

    linear: nn.Linear(features, classes), with a bias; update() writes the weights of the scores into it.
    State: `past_j` (classes,) int64, the patterns of each class met, and `mean` (classes, features) float32.
    """

    def __init__(self, linear):
        if linear.bias is None:
            raise ValueError("the scores of class means have a bias: give nn.Linear(features, classes)")
        self.linear = linear
        self.past_j = torch.zeros(linear.out_features, dtype=torch.int64, device=linear.weight.device)
        self.mean = torch.zeros_like(linear.weight, requires_grad=False)
        self._write_scores()

    @torch.no_grad()
    def resize(self, classes, rng=None):
        """Gives it rows for so many classes; new ones are those of classes never met."""
        old = len(self.past_j)
        resize_linear(self.linear, classes)
        self.past_j = resized(self.past_j, classes)
        self.mean = resized(self.mean, classes)
        self.linear.weight[old:] = 0
        self.linear.bias[old:] = UNMET

    @torch.no_grad()
    def update(self, x, y):
        """Takes in features x (n, features), labels y (n,), int64: each class in one step (Chan et al.).

        ValueError where x or y is something else, or FeaturesError, a ValueError, where features are not
        finite or their covariance has no inverse. Whatever raises, nothing is taken in.
        """
        features = self.linear.in_features
        if x.dim() != 2 or x.shape[1] != features:
            raise ValueError(f"features are (n, {features}); these are {tuple(x.shape)}")
        if not x.isfinite().all():
            raise FeaturesError("features that are not finite have no mean: lower the learning rate of the "
                                "network that made them, or leave them out")
        y = as_labels(y, len(x), self.linear)
        x = x.double()
        with undone_on_error(self):
            for j in y.unique().tolist():
                mine = x[y == j]
                n = len(mine)
                past = self.past_j[j].item()
                mu = mine.mean(0)
                old = self.mean[j].double()
                self._scatter(mine - mu, mu - old, past * n / (past + n))
                self.mean[j] = old + (mu - old) * (n / (past + n))
                self.past_j[j] += n
            self._write_scores()

    def _scatter(self, within, between, weight):
        """What one class adds to the scatter within classes; the nearest mean needs none of it."""

    def _solve(self, means):
        """Weights (classes, features) of the scores, float64."""
        return means

    @torch.no_grad()
    def _write_scores(self):
        means = self.mean.double()
        weight = self._solve(means) if self.past_j.any() else means     # which are 0, as all scores are low
        bias = -(weight * means).sum(1) / 2
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(torch.where(self.past_j > 0, bias, UNMET))

    def state_dict(self):
        return {"past_j": self.past_j, "mean": self.mean}

    @torch.no_grad()
    def load_state_dict(self, state):
        self.resize(len(state["past_j"]))
        for name, tensor in state.items():
            getattr(self, name).copy_(tensor)
        self._write_scores()


class StreamingLDA(NearestClassMean):
    """Scores x' S^-1 mu_c - mu_c' S^-1 mu_c / 2 with S = (1 - e) covariance + e I, e = `shrinkage`.

    covariance: of all patterns around the means of their classes, one for all classes. Beside the state of
    NearestClassMean: `scatter` (features, features) float32, the sum of the outer products that it is the
    mean of.
    """

    def __init__(self, linear, shrinkage=1e-4):
        super().__init__(linear)
        self.shrinkage = shrinkage
        self.scatter = torch.zeros((linear.in_features, linear.in_features), dtype=torch.float32,
                                   device=linear.weight.device)

    def _scatter(self, within, between, weight):
        self.scatter += (within.T @ within + weight * torch.outer(between, between)).float()

    def shrunk_covariance(self):
        """S (features, features), float64."""
        covariance = self.scatter.double() / self.past_j.sum().clamp(min=1)
        identity = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
        return (1 - self.shrinkage) * covariance + self.shrinkage * identity

    def _solve(self, means):
        # n patterns around k means leave the covariance with a rank of at most n - k, which rounding may hide
        rank = self.past_j.sum() - (self.past_j > 0).sum()
        with suppress(torch.linalg.LinAlgError):
            if self.shrinkage > 0 or rank >= self.linear.in_features:
                return torch.linalg.solve(self.shrunk_covariance(), means.T).T
        raise FeaturesError(f"the covariance of {self.past_j.sum()} patterns of {self.linear.in_features} "
                            f"features has no inverse with a shrinkage of {self.shrinkage:g}: set "
                            "slda_shrinkage, an argument of StreamingLDA, above 0, such as 1e-4")

    def state_dict(self):
        return super().state_dict() | {"scatter": self.scatter}


class SLDABeside(nn.Module):
    """(log p(class) of the network + weight * log p(class) of streaming LDA) / temperature.

    To be made before anything is learned: the layers of `net`, a SplitNet, from the latent one to `layer`
    (number or name), whose pooled outputs are the features, are copied as they are now. A layer below the
    latent one is possible where latents carry it: net.carry(layer). weight: at least 0; 0 is the network
    alone; root, shrinkage: as in Pooled and StreamingLDA. temperature: above 0; it changes no prediction, but
    takes the probabilities away from 0 and 1, where LDA and the sum of two classifiers put nearly all (Guo et
    al., arXiv 1706.04599). Raises LayerError where there is no such layer, and ValueError where it lies below
    the latent one and is not carried.
    """

    LEAST = -50.0       # no log p counts less, so that a class that was never met leaves the loss finite

    def __init__(self, net, weight, layer="latent", root=False, shrinkage=1e-4, temperature=1.0):
        super().__init__()
        number = net.layer_number(layer)
        above = number - net.latent_layer_num
        if number == net.carried_layer_num:
            layers = nn.Sequential(Behind(net.output.in_features))
        elif above < 0:
            raise ValueError(f"the layer {layer!r} lies below the latent one: let latents carry it by "
                             "net.carry(layer), or choose the latent layer or one above it")
        else:
            layers = nn.Sequential(*net.end_features[:above])
        self.net = net
        self.weight = weight
        self.temperature = temperature
        self.features = fold_brn(layers).append(Pooled(root))

        latent = net.example_latent(64)
        width = self.features(latent).shape[1]
        linear = nn.Linear(width, net.output.out_features, device=latent.device)
        self.lda = StreamingLDA(linear.requires_grad_(False), shrinkage)

    def classify(self, latents):
        """Scores (N, classes) of latents (N, *latent shape)."""
        beside = F.log_softmax(self.lda.linear(self.features(latents)), 1).clamp(min=self.LEAST)
        both = F.log_softmax(self.net.classify(latents), 1) + self.weight * beside
        return both / self.temperature

    def resize(self, classes):
        """Gives it rows for so many classes."""
        self.lda.resize(classes)

    @torch.no_grad()
    def update(self, latents, labels):
        """Takes in a batch: latents (n, *latent shape), indexable by a slice; labels (n,), int64."""
        parts = [self.features(latents[k:k + 128]) for k in range(0, len(labels), 128)]
        self.lda.update(torch.cat(parts), labels)

    def kept(self):
        """{name: tensors} of what later batches need: the copied layers and the statistics."""
        return {"features": self.features.state_dict(), "lda": self.lda.state_dict()}

    def bring_back(self, kept):
        """Takes over what kept() gave."""
        self.features.load_state_dict(kept["features"])
        self.lda.load_state_dict(kept["lda"])
