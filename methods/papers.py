"""What the papers' own programs, written for Caffe, do otherwise than the published PyTorch program.

[FG] arXiv 1907.03799 was made without replay, [LR] arXiv 1912.01100 with it; where they differ it says so.

`Ramp`: limits of Batch Renormalization in batch 0; `minibatches`: their mini-batches; `PapersHead`: biases,
and what counts as a pattern; `LearningRateSI`: the regularization of their AR1*; `FirstSeen`, `pass_again`,
`PapersMemory`: latents of layers whose moving averages still move. Each can be used without the others.
"""
import torch

from utils import CWRHead, ReplayMemory, SynapticIntelligence, resized, undone_on_error
from utils import minibatches as published_minibatches

# ---- the limits of Batch Renormalization in batch 0 ----

class Ramp:
    """Sets r_max and d_max of BatchRenorm2D layers for step t = 0, 1, ... of batch 0:

        r_max = 1 + max(0, t - 47) / 24    up to 3          d_max = 5 max(0, t - 47) / 48    up to 5

    A hook of an optimizer: optimizer.register_step_post_hook(Ramp(layers)). The limits are set at once for
    the first step, and after each step for the next one: layers below the latent one see the next mini-batch
    before that step begins.
    """

    START = 47
    R_MAX = 3.0
    D_MAX = 5.0

    def __init__(self, layers):
        self.layers = list(layers)
        self.t = 0
        self.set_limits()

    def __call__(self, optimizer, args, kwargs):
        self.t += 1
        self.set_limits()

    def set_limits(self):
        """Sets the limits of the step that is to come."""
        steps = max(0, self.t - self.START)
        for brn in self.layers:
            brn.r_max.fill_(min(1 + steps / 24, self.R_MAX))
            brn.d_max.fill_(min(5 * steps / 48, self.D_MAX))


# ---- mini-batches ----

def padded(n, part):
    """0 .. n - 1 and again from 0, int64, so that their number is a multiple of `part`; n > 0."""
    return torch.arange(-(-n // part) * part) % n


def share_of_new(n, m, mb_size):
    """How many of mb_size patterns are new where n new images meet a memory of m patterns."""
    if m == 0:
        return mb_size
    return min(max(round(mb_size * n / (n + m)), 1), mb_size - 1)


def minibatches(n, m, mb_size=128, rng=None, epochs=1, device="cpu"):
    """The mini-batches of all epochs, [(indices of new images, of the memory), ...], by the rule of [LR].

    Of n new images and m patterns in the memory a mini-batch takes c = round(mb_size n / (n + m)) and r =
    mb_size - c. Each list is padded to a multiple of its share with its first entries, shuffled once, and
    gone through independently of the other over all the epochs, of ceil((n + m) / mb_size) mini-batches each.
    Without a memory, as in [FG], it is the rule of utils.minibatches. The indices are int64 tensors on
    `device`.
    """
    if m == 0 or n < 1 or mb_size < 2:      # it says what is wrong with impossible sizes, too
        return published_minibatches(n, m, mb_size, rng, epochs, device)

    def parts(size, share):
        entries = padded(size, share)
        shuffled = entries[torch.randperm(len(entries), generator=rng)]
        return shuffled.to(device).split(share)

    c = share_of_new(n, m, mb_size)
    new = parts(n, c)
    old = parts(m, mb_size - c)
    steps = -(-(n + m) // mb_size) * epochs
    return [(new[t % len(new)], old[t % len(old)]) for t in range(steps)]


# ---- the head ----

class PapersHead(CWRHead):
    """CWRHead whose linear layer may have a bias, which is set and never trained.

    In the test it is 1 for the classes of batch 0, 0 for all others. In training: the same for the classes
    present, 1 for the absent ones, whose weights are 0. consolidation "none" (naive fine-tuning) lets weights
    and bias learn instead. linear: nn.Linear(features, classes), with or without a bias; pad_to: None, or the
    mini-batch size, where the padded labels of a batch are counted: [FG], 384 patterns of a batch of 300.
    """

    takes_bias = True

    def __init__(self, linear, consolidation="per_class", pad_to=None):
        super().__init__(linear, consolidation)
        if linear.bias is not None:
            linear.bias.requires_grad_(consolidation == "none")
        self.pad_to = pad_to
        self.first = torch.zeros_like(self.past_j, dtype=torch.bool)        # the classes of batch 0

    def resize(self, classes, rng=None):
        """As CWRHead.resize."""
        super().resize(classes, rng)
        self.first = resized(self.first, classes)

    def begin(self, new_y, memory_y):
        """Before training: as CWRHead.begin; sets the biases, too."""
        if self.pad_to:
            new_y = new_y[padded(len(new_y), self.pad_to).to(new_y.device)]
        in_batch_0 = not self.past_j.any()
        super().begin(new_y, memory_y)
        present = self.cur_j > 0
        if in_batch_0:
            self.first = present
        self._set_bias(present, absent=1.0)

    def consolidate(self):
        """After training: as CWRHead.consolidate; sets the biases, too."""
        super().consolidate()
        self._set_bias(self.past_j > 0, absent=0.0)

    @torch.no_grad()
    def _set_bias(self, rows, absent):
        if self.linear.bias is not None and self.consolidation != "none":
            self.linear.bias.copy_(torch.where(rows, self.first.to(self.cw.dtype), absent))

    def state_dict(self):
        return super().state_dict() | {"first": self.first}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.first.copy_(state["first"])


# ---- Synaptic Intelligence ----

class LearningRateSI(SynapticIntelligence):
    """AR1* of [FG] and [LR]: an important weight learns more slowly, and nothing pulls it back.

    Each step multiplies the gradient g_k of a weight, decay included, by 1 - F_k / max_f, before the
    momentum:

        g_k <- (g_k + l2 theta_k) (1 - F_k / max_f)

    and at the end of a batch

        cum_k += c sum_steps (change of theta_k)^2 / ((theta_k - theta_k at the batch's start)^2 + xi)
        F_k = min(cum_k, max_f), so 0 <= F_k

    weights: trainable ones; l2: the optimizer's weight decay, which it adds itself; c: 0.5 in [FG], 1 in
    [LR].
    """

    def __init__(self, weights, l2, c=1.0, max_f=1e-3, xi=1e-7):
        super().__init__(weights, 0.0, c, max_f, xi=xi)
        self.l2 = l2

    def penalty(self):
        """0: there is nothing to add to the loss."""
        return 0.0

    @torch.no_grad()
    def before_step(self):
        """Between backward() and the optimizer's step, whose l2 theta is taken off here beforehand."""
        super().before_step()
        for w, f in zip(self.weights, self.importance):
            w.grad.add_(w, alpha=self.l2).mul_(1 - f / self.max_f).sub_(w, alpha=self.l2)

    @torch.no_grad()
    def after_step(self):
        """After the optimizer's step."""
        for w, before, trajectory in zip(self.weights, self.before, self.trajectory):
            trajectory += (w - before).square()

    @torch.no_grad()
    def end_batch(self):
        """After a batch's last step: importances of the next one."""
        for w, start, trajectory, cum in zip(self.weights, self.start, self.trajectory, self.cum):
            cum += self.c * trajectory / ((w - start).square() + self.xi)
        self._set_importance()

    def _set_importance(self):
        for cum, f in zip(self.cum, self.importance):
            f.copy_(cum.clamp(max=self.max_f))

    def state_dict(self):
        return {"cum": self.cum}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._set_importance()


# ---- latents of layers whose moving averages move ----

class FirstSeen:
    """Latents computed anew for each training step, while the memory gets them as training first saw them.

    With gradients, latents[index] is computed, and kept while the list of the images is gone through for the
    first time; without gradients, what has been kept is given as it was. In a list of n images that is padded
    with its first ones, image k also stands at the places k + n, k + 2 n, ...: each place keeps a latent of
    its own. latents: of length n, indexable by an int64 tensor or a slice.
    """

    def __init__(self, latents):
        self.latents = latents
        self.kept = [[] for _ in range(len(latents))]       # of each image, a latent for each of its places

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, index):
        n = len(self)
        if isinstance(index, slice):
            index = torch.arange(n)[index]
        if torch.is_grad_enabled():
            latents = self.latents[index]
            self.keep(index, latents.detach())
            return latents

        places = index.tolist()
        if not all(self.kept[k % n] for k in places):
            return self.latents[index % n]
        # where training did not come to a place, the latent of the image's place before
        return torch.stack([self.kept[k % n][:k // n + 1][-1] for k in places])

    def keep(self, index, latents):
        """Keeps latents (k, *latent shape) of the images with numbers `index` (k,), unless all are known.

        Padding is shorter than a mini-batch, so that each mini-batch of the first time through the list has
        an image that is not known, and none of a later time.
        """
        images = index.tolist()
        if not all(self.kept[k] for k in images):
            for k, latent in zip(images, latents):
                self.kept[k].append(latent)


@torch.no_grad()
def pass_again(net, images, mb_size, rng):
    """Passes the images of batch 0 through the network once more, in training mode; the latents of that pass.

    net: a SplitNet; images: what gives latents when indexed; the layers' moving averages move, with the
    limits and the momentum that they have at that time.
    """
    if isinstance(images, FirstSeen):       # it would give what training has seen, without a pass
        images = images.latents
    latents = FirstSeen(images)
    order = padded(len(images), mb_size)
    shuffled = order[torch.randperm(len(order), generator=rng)]
    for part in shuffled.split(mb_size):
        x = images[part]
        net.classify(x)
        latents.keep(part, x)
    return latents


class PapersMemory(ReplayMemory):
    """ReplayMemory with the rule of [LR]: new patterns stand in front, those kept of the others behind them.

    min(R // (i + 1), n) of a batch are drawn from its padded list of length n: an image that pads it may come
    twice, with the latent of each place where latents are a FirstSeen. mb_size: of the mini-batches;
    last_pass: None, or what turns batch 0's latents into those to be stored, called with them and a
    generator.
    """

    def __init__(self, rm_sz, like, mb_size=128, last_pass=None):
        super().__init__(rm_sz, like)
        self.mb_size = mb_size
        self.last_pass = last_pass

    @torch.no_grad()
    def update(self, latents, labels, i, rng=None):
        """As ReplayMemory.update; a memory that is not full takes what it has room for."""
        if i == 0 and self.last_pass is not None:
            latents = self.last_pass(latents, rng)
        n = len(labels)
        m = self.size
        entries = padded(n, share_of_new(n, m, self.mb_size))
        h = min(max(self.rm_sz // (i + 1), self.rm_sz - m), len(entries))
        chosen = torch.randperm(len(entries), generator=rng)[:h]        # places of the padded list
        if not isinstance(latents, FirstSeen):
            chosen = entries[chosen]        # an image has one latent, whatever its place
        kept = torch.randperm(m, generator=rng)[:self.rm_sz - h].to(self._y.device)

        size = h + len(kept)
        with undone_on_error(self):
            for mine in (self._x, self._y, self._batch):
                mine[h:size] = mine[kept]           # the right side is a copy
            self._store(torch.arange(h), latents, labels[entries.to(labels.device)], chosen, i, size)
