"""The papers' programs against a slow reference, from their description: four batches of a tiny network.

The reference shares nothing with the program but the random draws: its forward pass, Batch Renormalization,
SGD, CWR*, SI and memory are its own, loops over layers, classes and steps. In float64, weights, averages,
head, memory and predictions agree to 1e-9 after every batch.
"""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ar1star_lat_replay as program
import harness.encoder
from harness.config import load_config
from methods.papers import Ramp
from models.batch_renorm import brn_layers
from utils import generator, preprocess

CLASSES, MB, EPS = 5, 16, 1e-5
LATENT = 4      # conv2_2/sep
START = 3       # the step after which r_max and d_max grow: 47 in the papers, a little sooner here
STREAM = [(40, [0, 1, 2]), (10, [3]), (13, [1, 4]), (21, [2])]      # images of a batch, its classes


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    monkeypatch.setattr(harness.encoder, "preprocess", lambda *images: preprocess(*images).double())
    monkeypatch.setattr(Ramp, "START", START)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batches():
    rng = np.random.default_rng(0)
    for n, classes in STREAM:
        labels = torch.as_tensor(rng.permutation(np.resize(classes, n)))
        yield rng.integers(0, 256, (n, 32, 32, 3), np.uint8), labels


def pad(entries, part):
    """The list, and its first entries again, up to a multiple of `part`."""
    entries = list(entries)
    return [entries[k % len(entries)] for k in range(math.ceil(len(entries) / part) * part)]


def shuffled(entries, rng):
    return [entries[k] for k in torch.randperm(len(entries), generator=rng).tolist()]


class Reference:
    """The papers' program, slowly. net: its start; method: naive, cwr, free or ar1; latent: a layer."""

    def __init__(self, net, config, method, latent):
        self.c, self.method, self.latent = config, method, latent
        self.layers = []
        for conv, brn, _ in net.layers[:-1]:
            self.layers.append({
                "w": conv.weight.detach().clone(), "stride": conv.stride, "groups": conv.groups,
                "gamma": brn.weight.detach().clone(), "beta": brn.bias.detach().clone(),
                "mean": brn.running_mean.clone(), "var": brn.running_std.square() - EPS})
        self.head = {"w": net.output.weight.detach().clone(), "b": net.output.bias.detach().clone()}
        self.cw, self.past = torch.zeros_like(self.head["w"]), [0] * CLASSES
        self.first_classes, self.memory, self.velocity = set(), [], {}
        self.cum = {k: torch.zeros_like(layer["w"]) for k, layer in enumerate(self.layers)}

    # ---- the network ----

    def normalize(self, layer, x, training, m=0.0, r_max=1.0, d_max=0.0):
        view = lambda v: v.view(1, -1, 1, 1)
        sigma = torch.sqrt(layer["var"] + EPS)
        if not training:
            return view(layer["gamma"]) * (x - view(layer["mean"])) / view(sigma) + view(layer["beta"])
        n = x.shape[0] * x.shape[2] * x.shape[3]
        mu_b = x.sum((0, 2, 3)) / n
        var_b = (x - view(mu_b)).square().sum((0, 2, 3)) / n
        sigma_b = torch.sqrt(var_b + EPS)
        r = (sigma_b / sigma).detach().clamp(1 / r_max, r_max)
        d = ((mu_b - layer["mean"]) / sigma).detach().clamp(-d_max, d_max)
        layer["mean"] = (1 - m) * layer["mean"] + m * mu_b.detach()
        layer["var"] = (1 - m) * layer["var"] + m * var_b.detach() * n / (n - 1)
        normalized = (x - view(mu_b)) / view(sigma_b) * view(r) + view(d)
        return view(layer["gamma"]) * normalized + view(layer["beta"])

    def through(self, x, first, last, training, *brn):
        for layer in self.layers[first:last + 1]:
            x = F.conv2d(x, layer["w"], None, layer["stride"], layer["w"].shape[-1] // 2, 1, layer["groups"])
            x = F.relu(self.normalize(layer, x, training, *brn))
        return x

    def scores(self, latents, training, *brn):
        x = self.through(latents, self.latent + 1, 26, training, *brn)
        x = x.mean((2, 3)) if x.dim() == 4 else x
        return x @ self.head["w"].T + self.head["b"]

    def lower(self, images, training, *brn):
        x = self.through(preprocess(images).double(), 0, min(self.latent, 26), training, *brn)
        return x.mean((2, 3)) if self.latent == 27 else x

    # ---- one batch ----

    def learn(self, i, images, labels):
        c, replay = self.c, self.c.rm_sz > 0
        rng, labels, m = generator(c.seed, i, "shuffle"), labels.tolist(), len(self.memory)
        epochs, lr = (c.init_train_ep, c.init_lr) if i == 0 else (c.inc_train_ep, c.inc_lr)
        share = min(max(round(MB * len(labels) / (len(labels) + m)), 1), MB - 1) if m else MB
        new = shuffled(pad(range(len(labels)), share), rng)
        new = [new[k:k + share] for k in range(0, len(new), share)]
        old = shuffled(pad(range(m), MB - share), rng) if m else []
        old = [old[k:k + MB - share] for k in range(0, len(old), MB - share)] if m else [[]]
        steps = math.ceil((len(labels) + m) / MB) if m else len(new)

        counted = labels + [y for _, y in self.memory] if replay else pad(labels, MB)
        present = set(counted)
        if i == 0:
            self.first_classes = present
        if i == 1:
            self.velocity = {}
        if self.method != "naive":
            for j in range(CLASSES):
                self.head["w"][j] = self.cw[j] if j in present and self.past[j] else 0
                self.head["b"][j] = float(j not in present or j in self.first_classes)

        first_seen, begin = {}, {k: layer["w"].clone() for k, layer in enumerate(self.layers)}
        trajectory = {k: torch.zeros_like(w) for k, w in begin.items()}
        for t in range(steps * epochs):
            brn = c.inc_update_rate, c.max_r_max, c.max_d_max
            if i == 0:
                brn = c.init_update_rate, 1 + max(0, t - START) / 24, 5 * max(0, t - START) / 48
            chosen, replayed = new[t % len(new)], old[t % len(old)]
            y = [labels[k] for k in chosen]
            self.step(i, lr, images, chosen, y, replayed, brn, first_seen, trajectory)

        for k, layer in enumerate(self.layers):
            self.cum[k] += c.si_c * trajectory[k] / ((layer["w"] - begin[k]).square() + 1e-7)
        self.consolidate(present, counted)
        if replay:
            self.store(i, images, labels, share, first_seen)

    def learning(self, i):
        """[(name, where it is, its key, times the learning rate, decay)] of what learns in batch i."""
        rows = []
        for k, layer in enumerate(self.layers):
            if i > 0 and (k <= self.latent or self.method == "cwr"):
                continue
            if i == 0 or layer["w"].shape[-1] == 1:
                rows.append((f"{k}w", layer, "w", 1, 5e-4))
            rows += [(f"{k}gamma", layer, "gamma", 1, 0), (f"{k}beta", layer, "beta", 1, 0)]
        mult = self.c.head_lr_mult if i > 0 else 1
        rows.append(("w", self.head, "w", mult, 5e-4))
        return rows + ([("b", self.head, "b", 2 * mult, 0)] if self.method == "naive" else [])

    def step(self, i, lr, images, chosen, labels, replayed, brn, first_seen, trajectory):
        rows = self.learning(i)
        for _, where, key, *_ in rows:
            where[key] = where[key].detach().requires_grad_()
        lower = self.lower(images[chosen], True, *brn)
        for k, latent in zip(chosen, lower.detach()):
            first_seen.setdefault(k, []).append(latent)
        x = torch.cat([lower, *(self.memory[k][0][None] for k in replayed)])
        y = torch.tensor(labels + [self.memory[k][1] for k in replayed])
        loss = F.cross_entropy(self.scores(x, True, *brn), y)
        gradients = torch.autograd.grad(loss, [where[key] for _, where, key, *_ in rows])
        for (name, where, key, mult, decay), g in zip(rows, gradients):
            theta = where[key].detach()
            g = g + decay * theta
            si = self.method == "ar1" and name[-1] == "w" and name != "w"
            if si and int(name[:-1]) > self.latent:
                g = g * (1 - self.importance[int(name[:-1])] / .001)
            self.velocity[name] = .9 * self.velocity[name] + g if name in self.velocity else g
            where[key] = theta - lr * mult * self.velocity[name]
            if si:
                trajectory[int(name[:-1])] += (where[key] - theta) ** 2

    @property
    def importance(self):
        if not hasattr(self, "_f"):
            self._f = {k: torch.zeros_like(v) for k, v in self.cum.items()}
        return self._f

    def consolidate(self, present, counted):
        self._f = {k: v.clamp(max=.001) for k, v in self.cum.items()}
        if self.method != "naive":
            rows = sorted(present)
            mean = sum(self.head["w"][j].mean().item() for j in rows) / len(rows)
            for j in rows:
                t = self.head["w"][j] - mean
                s = math.sqrt(self.past[j] / counted.count(j))
                self.cw[j] = (self.cw[j] * s + t) / (s + 1) if self.past[j] else t
        for j in counted:
            self.past[j] += 1
        if self.method != "naive":
            for j in range(CLASSES):
                self.head["w"][j] = self.cw[j] if self.past[j] else 0
                self.head["b"][j] = float(self.past[j] > 0 and j in self.first_classes)

    def store(self, i, images, labels, share, first_seen):
        rng = generator(self.c.seed, i, "memory")
        if self.latent < 0:
            first_seen = {k: [x, x] for k, x in enumerate(preprocess(images).double())}
        elif i == 0:        # once more, in training mode
            order, first_seen = shuffled(pad(range(len(labels)), MB), rng), {}
            t = self.c.init_train_ep * len(order) // MB         # steps so far; these are none
            grown = max(0, t - START)
            brn = self.c.init_update_rate, min(1 + grown / 24, 3), min(5 * grown / 48, 5)
            for k in range(0, len(order), MB):
                lower = self.lower(images[order[k:k + MB]], True, *brn)
                self.scores(lower, True, *brn)
                for j, latent in zip(order[k:k + MB], lower):
                    first_seen.setdefault(j, []).append(latent)
        n = len(labels)
        places = range(len(pad(range(n), share)))       # of the padded list, image k at k, k + n, ...
        rm_sz = self.c.rm_sz
        h = min(rm_sz if i == 0 else max(rm_sz // (i + 1), rm_sz - len(self.memory)), len(places))
        chosen = shuffled(places, rng)[:h]
        kept = shuffled(self.memory, rng)[:rm_sz - h]
        self.memory = [(first_seen[k % n][k // n], labels[k % n]) for k in chosen] + kept


# ---- the two, side by side ----

METHODS = {"papers_ar1star": "ar1", "papers_cwr_star": "cwr", "papers_naive": "naive",
           "papers_native_replay": "free", "papers_native_replay_ar1star": "ar1",
           "papers_native_replay_cwr_star": "cwr", "papers_latent_replay": "free",
           "papers_latent_replay_ar1star": "ar1", "papers_latent_replay_cwr_star": "cwr"}
FAST = ["papers_ar1star", "papers_latent_replay_ar1star", "papers_latent_replay_cwr_star"]


def pair(section, fast):
    """(Learner, Reference) of a section, from the same weights."""
    # larger learning rates are chaotic in so small a network
    changes = {"mb_size": MB, "width": .06, "weights": "none", "init_train_ep": 3, "inc_train_ep": 2,
               "inc_update_rate": .01, "init_lr": 1e-5, "inc_lr": 1e-5, "fast": fast, "device": "cpu"}
    if section == "papers_naive":       # its head starts at random
        changes |= {"init_lr": 3e-7, "inc_lr": 1e-6}
    if "replay" in section:
        changes |= {"rm_sz": 20}
    if section in ("papers_latent_replay", "papers_latent_replay_ar1star"):
        changes |= {"latent_layer_num": LATENT}
    config = load_config(section, overrides=changes)
    learner = program.build_learner(config, CLASSES, (32, 32), torch.device("cpu"))
    net = learner.net
    for brn in brn_layers(net):
        torch.nn.init.uniform_(brn.weight, .5, 1.5)
        torch.nn.init.uniform_(brn.bias, -.5, .5)
        brn.running_mean.uniform_(-.5, .5)
        brn.running_std.uniform_(.5, 1.5)
    return learner, Reference(net, config, METHODS[section], net.latent_layer_num)


def equal(ours, theirs):
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("section, fast", [
    *((section, False) for section in METHODS), *((section, True) for section in FAST)])
def test_the_program_equals_the_reference(section, fast):
    learner, reference = pair(section, fast)
    for i, (images, labels) in enumerate(batches()):
        learner.learn(images, labels)
        reference.learn(i, images, labels)
        for (conv, brn, _), layer in zip(learner.net.layers[:-1], reference.layers):
            equal(conv.weight, layer["w"])
            equal(brn.weight, layer["gamma"])
            equal(brn.bias, layer["beta"])
            equal(brn.running_mean, layer["mean"])
            equal(brn.running_std, torch.sqrt(layer["var"] + EPS))
        equal(learner.net.output.weight, reference.head["w"])
        equal(learner.net.output.bias, reference.head["b"])
        assert learner.head.past_j.tolist() == reference.past
        assert learner.memory.y.tolist() == [y for _, y in reference.memory]
        for ours, (theirs, _) in zip(learner.memory.x, reference.memory):
            equal(ours, theirs)
        with torch.no_grad():
            scores = reference.scores(reference.lower(images, False), False)
        assert learner.predict(images).tolist() == scores.argmax(1).tolist()
