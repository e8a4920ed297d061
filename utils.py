"""AR1* with Latent Replay: the pieces of the method, each usable alone.

`CWRHead`, `ReplayMemory`, `minibatches`, `SynapticIntelligence`; images to the network's input: `preprocess`;
the test: `evaluate`; everything random: `generator`.

Papers: [LR] arXiv 1912.01100 Latent Replay; [CWR*] arXiv 1907.03799; [AR1] Neural Networks 116, 2019;
[SI] arXiv 1703.04200. Batch numbers count from 0; n is a number of images, R = rm_sz the capacity of the
memory. Usable alone: copy this file.
"""
import zlib
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)       # of RGB in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)


def generator(seed, batch, purpose):
    """A CPU random generator for one purpose in one batch: a change in one draw leaves all the others alone.

    Nothing random lives longer than a batch, so the number of the batch is all the random state that a
    checkpoint holds.
    """
    words = np.random.SeedSequence([seed, batch, zlib.crc32(purpose.encode())]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


def copied(state):
    """A state, of tensors in dicts and lists, with copies of the tensors: faster than copy.deepcopy."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [copied(value) for value in state]
    return state


@contextmanager
def undone_on_error(part):
    """Where what is done inside raises, Ctrl-C included, an object with state_dict() and load_state_dict() is
    brought back to the state that it had."""
    before = copied(part.state_dict())
    try:
        yield
    except BaseException:
        part.load_state_dict(before)
        raise


# ---- the head: CWR* ----

class CWRHead:
    """CWR* consolidation of a linear head without bias, Alg. 1 of [CWR*].

    linear: nn.Linear(features, classes, bias=False). State: `cw` (classes, features), the consolidated
    weights, and `past_j` (classes,) int64, the sum over earlier batches of cur_j, the patterns of each class
    in a batch: new images and the whole replay memory, in which a pattern counts again each time.

    consolidation: "per_class" counts each class of a batch once, as the papers do; "per_pattern" counts it
    n_j times, n_j = its patterns in the replay memory + 1 if it is among the new images, as the published
    PyTorch program does; "none" leaves the head alone (naive fine-tuning).
    """

    takes_bias = False

    def __init__(self, linear, consolidation="per_class"):
        if consolidation not in ("per_class", "per_pattern", "none"):
            raise ValueError(f"consolidation is 'per_class', 'per_pattern' or 'none', not {consolidation!r}")
        if linear.bias is not None and not self.takes_bias:
            raise ValueError("CWR* consolidates weights alone: give nn.Linear(features, classes, bias=False)")
        self.linear = linear
        self.consolidation = consolidation
        self.cw = torch.zeros_like(linear.weight, requires_grad=False)
        self.past_j = torch.zeros(linear.out_features, dtype=torch.int64, device=linear.weight.device)

    def resize(self, classes, rng=None):
        """Gives the head rows for so many classes, the linear layer's new ones as resize_linear says."""
        resize_linear(self.linear, classes, rng)
        self.cw = resized(self.cw, classes)
        self.past_j = resized(self.past_j, classes)

    @torch.no_grad()
    def begin(self, new_y, memory_y):
        """Before training: rows of classes present get their consolidated weights, others 0 (lines 4-7).

        new_y, memory_y: int64 labels on the head's device, of the new images and of the whole replay memory.
        """
        classes = self.linear.out_features
        new = torch.bincount(new_y, minlength=classes)
        memory = torch.bincount(memory_y, minlength=classes)

        self.cur_j = new + memory
        if self.consolidation == "per_pattern":
            self.n_j = memory + (new > 0)
        else:
            self.n_j = (self.cur_j > 0).long()

        if self.consolidation != "none":
            self._load_and_zero_others((self.cur_j > 0) & (self.past_j > 0))

    @torch.no_grad()
    def consolidate(self):
        """After training: merges the trained rows into `cw` (lines 9-16), and loads `cw` of every class met.

        t: the trained rows less their mean weight, so that rows of different batches can be compared. Each
        class present is merged n_j times, cw <- (cw s + t) / (s + 1) with s = sqrt(past_j / cur_j), which is

            cw <- t + (cw - t) (s / (s + 1))^n_j
        """
        if self.consolidation == "none":
            self.past_j += self.cur_j
            return

        present = self.cur_j > 0
        n_j = self.n_j.to(self.cw.dtype)
        w = self.linear.weight
        mean = (n_j / n_j.sum()) @ w.mean(1)            # one scalar, over the rows of the classes present
        t = w - mean                                    # (classes, features)

        s = (self.past_j / self.cur_j.clamp(min=1)).sqrt().to(w.dtype)
        # share of the old weights; 0 for a class not met before
        kept = ((s / (s + 1)) ** n_j)[:, None]
        self.cw = torch.where(present[:, None], t + (self.cw - t) * kept, self.cw)

        self.past_j += self.cur_j
        self._load_and_zero_others(self.past_j > 0)

    def _load_and_zero_others(self, rows):
        self.linear.weight.copy_(torch.where(rows[:, None], self.cw, 0))

    def state_dict(self):
        return {"cw": self.cw, "past_j": self.past_j}

    def load_state_dict(self, state):
        self.cw.copy_(state["cw"])
        self.past_j.copy_(state["past_j"])


def resized(tensor, rows):
    """The first so many rows of a tensor, as a copy; where it has fewer, rows of zeros stand behind them."""
    missing = max(0, rows - len(tensor))
    return torch.cat((tensor[:rows], tensor.new_zeros((missing, *tensor.shape[1:]))))


@torch.no_grad()
def resize_linear(linear, rows, rng=None):
    """Gives an nn.Linear so many outputs; its parameters stay the same objects.

    New weights are drawn from where nn.Linear begins with them, new biases are 0. rng: a CPU generator.
    """
    old = len(linear.weight)
    linear.out_features = rows      # first: whoever is interrupted here can tell
    for parameter in linear.parameters():
        parameter.data = resized(parameter, rows)
        parameter.grad = None       # has the old shape
    limit = linear.in_features ** -0.5
    new = torch.rand((max(0, rows - old), linear.in_features), generator=rng)
    linear.weight[old:] = limit * (2 * new - 1).to(linear.weight)


# ---- latent replay ----

class ReplayMemory:
    """R latents with their labels, class-blind, each batch's share replaced at random: Alg. 1 of [LR].

    `x` (size, *latent shape), `y` (size,) int64 and `batch` (size,) int64 (the batch it came in) are views of
    what is stored: pattern k is x[k] with label y[k]. like: one latent (1, *latent shape), whose device, type
    and memory format the storage takes.
    """

    def __init__(self, rm_sz, like):
        self.rm_sz = rm_sz
        self.size = 0
        self._x = torch.empty((rm_sz, *like.shape[1:]), dtype=like.dtype, device=like.device,
                              memory_format=memory_format(like))
        self._y = torch.zeros(rm_sz, dtype=torch.int64, device=like.device)
        self._batch = torch.zeros_like(self._y)

    x = property(lambda self: self._x[:self.size])
    y = property(lambda self: self._y[:self.size])
    batch = property(lambda self: self._batch[:self.size])

    def __len__(self):
        return self.size

    @torch.no_grad()
    def update(self, latents, labels, i, rng=None):
        """Takes in h = min(max(R // (i + 1), free slots), n) of the n latents of batch i.

        They are drawn without replacement; they fill the free slots, and replace random others. latents:
        (n, *latent shape), indexable by an int64 tensor; labels: (n,); rng: a CPU generator. What raises on
        the way, as latents may, leaves the memory as it was.
        """
        n = len(labels)
        free = self.rm_sz - self.size
        h = min(max(self.rm_sz // (i + 1), free), n)
        chosen = torch.randperm(n, generator=rng)[:h]

        fill = min(free, h)
        replaced = torch.randperm(self.size, generator=rng)[:h - fill]
        slots = torch.cat((torch.arange(self.size, self.size + fill), replaced))

        self._store(slots, latents, labels, chosen, i, self.size + fill)

    def _store(self, slots, latents, labels, chosen, i, size):
        """Slot slots[k] <- pattern chosen[k] of batch i, for all k, of a memory of `size` patterns from then
        on."""
        stored = (self._x, self._y, self._batch)
        replaced = slots[slots < self.size].to(self._y.device)
        before = [values[replaced] for values in stored]
        try:
            # in parts: where latents are encoded when they are asked for, all at once would take much memory
            for k in range(0, len(slots), 256):
                slot = slots[k:k + 256].to(self._y.device)
                pattern = chosen[k:k + 256].to(self._y.device)
                self._x[slot] = latents[pattern]
                self._y[slot] = labels[pattern]
                self._batch[slot] = i
        except BaseException:
            for values, old in zip(stored, before):
                values[replaced] = old
            raise
        self.size = size

    def state_dict(self):
        return {"x": self.x, "y": self.y, "batch": self.batch}

    def load_state_dict(self, state):
        self.size = len(state["y"])
        self.x.copy_(state["x"])
        self.y.copy_(state["y"])
        self.batch.copy_(state["batch"])


class Mapped:
    """Items passed through a function when indexed: Mapped(codes, decode)[index] = decode(codes[index])."""

    def __init__(self, items, function):
        self.items = items
        self.function = function

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.function(self.items[index])


def minibatches(n, m, mb_size=128, rng=None, epochs=1, device="cpu", whole=False):
    """The mini-batches of all epochs: int64 tensors [(indices of new images, of memory patterns), ...].

    n: new images; m: patterns in the memory. As in [LR] and the published program:

        k = (n + m) // mb_size      iterations are aimed at
        c = n // k                  new images go into each; n // c iterations are run
        r = mb_size - c             patterns of the memory go into each

    With n = 300 and m = 1500: k = 14, c = 21, r = 107; 6 images are not trained on, 2 patterns not replayed.
    New images are shuffled (once per batch: every epoch is the same), the memory is taken in the order of its
    slots. Where the rule is silent: at least one new image and one iteration; a memory that runs out starts
    again from slot 0; if it gives more than mb_size patterns (a tiny memory), n / (mb_size - 1) iterations,
    so that there is room for one replayed pattern.

    Without a memory all images are used: padded to a multiple of mb_size with the first ones, then shuffled.

    whole=True: where these iterations leave out some of the memory, which with few new images may be half of
    it, k is rounded up, and each epoch replays every pattern.
    """
    if n < 1:
        raise ValueError("a batch needs at least one image")
    if mb_size < 2 and m > 0:
        raise ValueError("a mini-batch of new and replayed patterns needs an mb_size of at least 2")
    if m == 0:
        padded = torch.arange(-(-n // mb_size) * mb_size) % n
        order = padded[torch.randperm(len(padded), generator=rng)].to(device)
        nothing = order[:0]
        return [(new, nothing) for new in order.split(mb_size)] * epochs

    k = max(1, (n + m) // mb_size)
    if n // k >= mb_size:               # no room for replay: more iterations
        k = -(-n // (mb_size - 1))
    c = max(1, n // k)
    r = min(mb_size - c, m)
    steps = n // c
    if whole and steps * r < m:
        k = -(-(n + m) // mb_size)
        c = max(1, n // k)
        r = min(mb_size - c, m)
        steps = max(n // c, -(-m // r))     # fewer images than mini-batches come more than once

    order = torch.randperm(n, generator=rng).to(device)
    epoch = []
    for t in range(steps):
        new = order[torch.arange(t * c, (t + 1) * c, device=device) % n]
        old = torch.arange(t * r, (t + 1) * r, device=device) % m
        epoch.append((new, old))
    return epoch * epochs


# ---- Synaptic Intelligence ----

class SynapticIntelligence:
    """The regularization of AR1*: Synaptic Intelligence [SI] as [AR1] uses it, over a list of weights.

    Per weight k, with F_k its importance, and the anchor the weights at the end of the last batch:

        penalty = reg_lambda / 2 sum_k F_k (theta_k - anchor_k)^2                       added to the loss
        trajectory_k = sum over a batch's steps of grad_k * (change of theta_k in that step)
        cum_k += c * trajectory_k / ((theta_k - theta_k at the batch's start)^2 + xi)   after each batch
        F_k = min(-cum_k, max_f)

    As published, F_k may fall below 0, without limit: about a quarter of the weights end a batch with a
    positive trajectory (momentum carries them uphill), and the penalty then drives them away from their
    anchor. min_f=0 ends that. No weights: AR1*free.
    """

    def __init__(self, weights, reg_lambda, c=1.0, max_f=1e-3, min_f=-float("inf"), xi=1e-7):
        self.weights = list(weights)
        self.reg_lambda = reg_lambda
        self.c = c
        self.min_f = min_f
        self.max_f = max_f
        self.xi = xi

        copies = lambda: [w.detach().clone() for w in self.weights]
        zeros = lambda: [torch.zeros_like(w.detach()) for w in self.weights]
        self.anchor = copies()          # weights at the end of the last batch
        self.start = copies()           # weights at the start of this batch
        self.before = copies()          # weights before this step
        self.trajectory = zeros()
        self.cum = zeros()
        self.importance = zeros()
        self.begin_batch()

    def penalty(self):
        """The scalar to add to the loss."""
        terms = [(f * (w - a).square()).sum() for w, f, a in zip(self.weights, self.importance, self.anchor)]
        return self.reg_lambda / 2 * sum(terms)

    @torch.no_grad()
    def begin_batch(self):
        """Before a batch's first step. ValueError where a weight is frozen."""
        if not all(w.requires_grad for w in self.weights):
            raise ValueError("Synaptic Intelligence takes trainable weights only: leave out what "
                             "net.freeze_below froze")
        for w, start, trajectory in zip(self.weights, self.start, self.trajectory):
            start.copy_(w)
            trajectory.zero_()

    @torch.no_grad()
    def before_step(self):
        """Between backward() and the optimizer's step."""
        for w, before in zip(self.weights, self.before):
            before.copy_(w)

    @torch.no_grad()
    def after_step(self):
        """After the optimizer's step, while weights still have their gradients, the penalty's included."""
        for w, before, trajectory in zip(self.weights, self.before, self.trajectory):
            trajectory += w.grad * (w - before)

    @torch.no_grad()
    def end_batch(self):
        """After a batch's last step: importances and anchor of the next one."""
        for k, w in enumerate(self.weights):
            self.cum[k] += self.c * self.trajectory[k] / ((w - self.start[k]).square() + self.xi)
            self.importance[k].copy_((-self.cum[k]).clamp(self.min_f, self.max_f))
            self.anchor[k].copy_(w)

    def state_dict(self):
        return {"cum": self.cum, "importance": self.importance, "anchor": self.anchor}

    def load_state_dict(self, state):
        for name, tensors in state.items():
            for mine, theirs in zip(getattr(self, name), tensors, strict=True):
                mine.copy_(theirs)


def trainable_conv_weights(model):
    """The weights that [AR1] regularizes: those of convolutions that are not frozen."""
    return [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.requires_grad]


# ---- the optimizer ----

def parameter_groups(net, lr, l2, head_lr_mult=1.0, decay_all=True):
    """The trainable parameters of a network with a head `output`, as torch.optim takes them.

    head_lr_mult: how many times as fast the head learns (its bias, if that learns, twice as fast again,
    without decay); decay_all: False spares gamma and beta the weight decay l2. One group where nothing of
    this is asked for.
    """
    head = list(net.output.parameters())
    body = [p for p in net.parameters() if p.requires_grad and all(p is not h for h in head)]
    if head_lr_mult == 1 and decay_all and len(head) == 1:
        return [{"params": body + head, "lr": lr, "weight_decay": l2}]

    decaying = [p for p in body if decay_all or p.dim() > 1]
    others = [p for p in body if not decay_all and p.dim() == 1]        # gamma and beta
    weight = [p for p in head if p.dim() > 1]
    bias = [p for p in head if p.dim() == 1 and p.requires_grad]
    groups = [
        {"params": decaying, "lr": lr, "weight_decay": l2},
        {"params": others, "lr": lr, "weight_decay": 0.0},
        {"params": weight, "lr": lr * head_lr_mult, "weight_decay": l2},
        {"params": bias, "lr": lr * 2 * head_lr_mult, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# ---- images on the device ----

def as_images(images):
    """uint8 RGB images (n, H, W, 3), array or tensor, as they are; a list of them as one array. ValueError
    unless n > 0 and they are such."""
    if isinstance(images, (list, tuple)):
        images = np.stack(images)
    dtype = _dtype_name(images)
    if dtype != "uint8" or images.ndim != 4 or images.shape[3] != 3 or len(images) == 0:
        raise ValueError("images are RGB values 0 to 255 in uint8, (n, height, width, 3), n > 0; these "
                         f"are {dtype} {tuple(getattr(images, 'shape', ()))}")
    return images


def preprocess(images, device="cpu"):
    """Images as as_images takes them to normalized float32 (n, 3, H, W), channels last."""
    x = torch.as_tensor(as_images(images)).to(device, non_blocking=True).permute(0, 3, 1, 2).to(torch.float32)
    mean = torch.tensor(IMAGENET_MEAN, dtype=torch.float32, device=device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, dtype=torch.float32, device=device).view(1, 3, 1, 1)
    return x.div_(255).sub_(mean).div_(std)


def as_whole_numbers(labels):
    """Labels (n,), a tensor, array or list of whole numbers of any type, as int64, or ValueError."""
    if not isinstance(labels, torch.Tensor):
        labels = np.asarray(labels)
        if labels.dtype.kind in "iu":
            labels = torch.from_numpy(labels.astype(np.int64))
    dtype = _dtype_name(labels)
    if not dtype.startswith(("int", "uint")) or labels.ndim != 1:
        raise ValueError(f"labels are whole numbers, (n,); these are {dtype} {tuple(labels.shape)}")
    return labels.to(torch.int64)


def as_labels(labels, n, head, grows=False):
    """Labels of n images as int64 on the device of a head, nn.Linear; ValueError unless all are its classes,
    or, where the head grows, numbers from 0 on."""
    y = as_whole_numbers(labels)
    classes = head.out_features
    if len(y) != n or not bool(((y >= 0) & ((y < classes) | grows)).all()):
        found = f"{tuple(y.shape)}"
        if y.numel():
            found += f" from {y.min()} to {y.max()}"
        upper = "on" if grows else f"to {classes - 1}"
        raise ValueError(f"{n} images need as many whole numbers from 0 {upper} as labels; these are {found}")
    return y.to(head.weight.device)


def _dtype_name(values):
    return str(getattr(values, "dtype", type(values).__name__)).removeprefix("torch.")


def memory_format(x):
    """The memory format of x: channels last for images and maps that are so, else contiguous."""
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


# ---- the test ----

@contextmanager
def evaluating(model):
    """Evaluation mode, without gradients, inside; afterwards every module is in the mode that it was in.

    model: a module, or a method of one.
    """
    module = getattr(model, "__self__", model)      # of a method, the module that it belongs to
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, mode in modes:
            m.training = mode


def evaluate(model, inputs, labels, chunk=None, classes=0):
    """{"accuracy": 0..1, "loss": mean cross-entropy, "per_class": accuracies (NaN: none in the set),
    "confusion": int64 (true, predicted)}.

    model: a module or a method of one (net.classify), mapping inputs[a:b] to scores; inputs: whatever slices
    give it; labels: (n,), n > 0, as as_whole_numbers takes them, on the device; chunk: how many of them at a
    time; classes: how many there are, where some may have no column of scores yet, so that none of their
    images is right. Leaves the mode as it was.
    """
    labels = as_whole_numbers(labels)
    n = len(labels)
    if n == 0:
        raise ValueError("there is nothing to evaluate: the set is empty")
    if chunk is None:
        chunk = 128 if labels.device.type == "cpu" else 1125        # twice 1125: the test images of CORe50

    pairs = []
    loss = 0.0
    with evaluating(model):
        for k in range(0, n, chunk):
            y = labels[k:k + chunk]
            columns = _padded(model(inputs[k:k + chunk]), classes)  # (chunk, classes)
            width = columns.shape[1]
            loss = loss + F.cross_entropy(columns, y, reduction="sum").double()
            pairs.append(y * width + columns.argmax(1))             # (true, predicted) as one number

    everything = torch.cat((*pairs, loss[None])).cpu()              # the only place where a GPU is waited for
    pairs, loss = everything[:n].long(), everything[n].item()
    confusion = torch.bincount(pairs, minlength=width ** 2).view(width, width)
    right = confusion.diagonal().double()
    total = confusion.sum(1)
    return {
        "accuracy": (right.sum() / total.sum()).item(),
        "loss": loss / n,
        "per_class": (right / total).tolist(),
        "confusion": confusion,
    }


def scores(model, inputs, n, chunk=128):
    """The scores of each of n > 0 inputs: (n, classes). model, inputs, chunk: as in evaluate."""
    parts = []
    with evaluating(model):
        for k in range(0, n, chunk):
            parts.append(model(inputs[k:min(k + chunk, n)]))
    return torch.cat(parts)


def _padded(scores, classes):
    """Scores (N, columns) with a column for each class: those of classes not met are low, not -infinity, so
    that the loss of their images is 50."""
    missing = classes - scores.shape[1]
    if missing <= 0:
        return scores
    low = scores.amax(1, keepdim=True) - 50
    return torch.cat((scores, low.expand(-1, missing)), 1)


def predict(model, inputs, n, chunk=128):
    """The class with the highest score of each of n > 0 inputs: int64 (n,). model, inputs, chunk: as in
    evaluate."""
    return scores(model, inputs, n, chunk).argmax(1)
