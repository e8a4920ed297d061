"""A replay memory that stores latents in fewer bytes, and how many of its patterns an epoch replays.

    memory = CompressedMemory(ReplayMemory, 16000, like=latent, codec=ProductQuantizer(latent, pq_codes=32))
    memory.update(latents, labels, i, rng)      # float32 latents go in
    memory.x[index]                             # and come out, as near to what they were as the codec allows

A codec has `fit(latents, rng)`, called once with the latents of batch 0; `encode` and `decode`;
`example(latent)`, the codes of one latent; and a state. Product-quantized features are replayed by REMIND
(arXiv 1910.02509), latents of eight bits in arXiv 2110.10486. The first batch fixes the codes, since what is
stored can never be coded anew.
"""
import torch
import torch.nn.functional as F

from utils import Mapped, copied, memory_format
from utils import minibatches as published_minibatches

# ---- codecs ----

class Half:
    """float16: two bytes a value, 11 bits of precision up to 65,504."""

    def fit(self, latents, rng=None):
        """Nothing to find out."""

    def example(self, latent):
        """The codes of a latent of zeros (1, *latent shape)."""
        return torch.zeros_like(latent, dtype=torch.float16)

    def encode(self, latents):
        """float32 (k, *latent shape) to float16."""
        return latents.to(torch.float16)

    def decode(self, codes):
        """And back."""
        return codes.to(torch.float32)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Bytes:
    """One byte a value: x is stored as the nearest of low + step * {0, ..., 255}, wrong by at most step / 2.

    low, step: None, to be taken from batch 0, from its smallest value (0 where none is below 0, as behind a
    ReLU) to its largest, one for the whole layer (finer than one a channel: a channel's largest value in
    batch 0 is a bad guess of its largest ever); or tensors that (k, *latent shape) can be added to, where the
    range is known. `clipped` of `coded` values (int64 scalars) lay outside the range.
    """

    def __init__(self, latent, low=None, step=None):
        device = latent.device
        self.known = low is not None
        self.low = torch.as_tensor(low if self.known else 0.0, dtype=torch.float32).to(device)
        self.step = torch.as_tensor(step if self.known else 1.0, dtype=torch.float32).to(device)
        self.clipped = torch.zeros((), dtype=torch.int64, device=device)
        self.coded = torch.zeros((), dtype=torch.int64, device=device)

    def fit(self, latents, rng=None):
        """Takes the range of latents (n, *latent shape), indexable by a slice, unless it is known."""
        if self.known:
            return
        lowest = 0.0
        highest = -float("inf")
        for k in range(0, len(latents), 256):
            part = latents[k:k + 256]
            lowest = min(lowest, part.min().item())
            highest = max(highest, part.max().item())
        self.low.fill_(lowest)
        self.step.fill_(max((highest - self.low.item()) / 255, torch.finfo(torch.float32).tiny))

    def example(self, latent):
        """The codes of a latent of zeros (1, *latent shape)."""
        return torch.zeros_like(latent, dtype=torch.uint8)

    def encode(self, latents):
        """float32 (k, *latent shape) to uint8."""
        codes = ((latents - self.low) / self.step).round()
        self.clipped += ((codes < 0) | (codes > 255)).sum()
        self.coded += codes.numel()
        return codes.clamp(0, 255).to(torch.uint8)

    def decode(self, codes):
        """And back."""
        return codes * self.step + self.low

    def state_dict(self):
        return {"low": self.low, "step": self.step, "clipped": self.clipped, "coded": self.coded}

    def load_state_dict(self, state):
        for name, value in state.items():
            getattr(self, name).copy_(value)


class ProductQuantizer:
    """Product quantization (Jegou et al., 2011): `pq_codes` bytes for the C channels of a position of a map.

    The channels are cut into pq_codes groups; a byte says which of 256 centres its group is nearest to.
    `centres` (pq_codes, 256, C / pq_codes), one set for all positions, are found by k-means among the latents
    of batch 0. latent: (1, C) or (1, C, H, W), C a multiple of pq_codes.
    """

    CENTRES = 256
    POSITIONS = 25_600      # k-means looks at about so many
    ITERATIONS = 10
    CHUNK = 2048            # positions whose distances to all centres are in memory at a time

    def __init__(self, latent, pq_codes=32):
        channels = latent.shape[1]
        if channels % pq_codes:
            good = ", ".join(str(k) for k in range(1, channels + 1) if channels % k == 0)
            raise ValueError(f"the {channels} channels of a latent cannot be cut into pq_codes = {pq_codes} "
                             f"equal groups; it can be {good}")
        self.centres = torch.zeros((pq_codes, self.CENTRES, channels // pq_codes), device=latent.device)

    @torch.no_grad()
    def fit(self, latents, rng=None):
        """k-means in each group, over positions of latents drawn at random from (n, *latent shape)."""
        n = len(latents)
        area = latents[:1][0, 0].numel()
        images = torch.randperm(n, generator=rng)[:-(-self.POSITIONS // area)]
        x = self._grouped(latents[images.to(self.centres.device)])         # (groups, positions, channels)

        start = torch.randperm(x.shape[1], generator=rng)[torch.arange(self.CENTRES) % x.shape[1]]
        self.centres.copy_(x[:, start.to(x.device)])
        for _ in range(self.ITERATIONS):
            nearest = self._nearest(x)[..., None]                           # (groups, positions, 1)
            sums = torch.zeros_like(self.centres)
            sums.scatter_add_(1, nearest.expand_as(x), x)
            counts = torch.zeros_like(self.centres[..., :1])
            counts.scatter_add_(1, nearest, torch.ones_like(x[..., :1]))
            self.centres.copy_(torch.where(counts > 0, sums / counts.clamp(min=1), self.centres))

    def _grouped(self, latents):
        """(k, C, ...) to (groups, positions, channels of a group)."""
        groups, _, channels = self.centres.shape
        return latents.movedim(1, -1).reshape(-1, groups, channels).transpose(0, 1).contiguous()

    def _nearest(self, x):
        """Numbers (groups, positions), int64, of the centres nearest to x (groups, positions, channels)."""
        squares = self.centres.square().sum(2)[:, None]
        nearest = []
        for part in x.split(self.CHUNK, 1):
            distances = torch.baddbmm(squares, part, self.centres.transpose(1, 2), alpha=-2)
            nearest.append(distances.argmin(2))     # |x|^2, which is missing, is the same for all centres
        return torch.cat(nearest, 1)

    def example(self, latent):
        """The codes of a latent of zeros: (1, pq_codes, *map)."""
        shape = (1, len(self.centres), *latent.shape[2:])
        codes = torch.zeros(shape, dtype=torch.uint8, device=latent.device)
        return codes.contiguous(memory_format=memory_format(latent))

    @torch.no_grad()
    def encode(self, latents):
        """float32 (k, C, *map) to uint8 (k, pq_codes, *map)."""
        codes = self._nearest(self._grouped(latents)).to(torch.uint8).T                 # (positions, groups)
        return codes.reshape(len(latents), *latents.shape[2:], -1).movedim(-1, 1)

    def decode(self, codes):
        """And back; channels are last in memory."""
        groups, centres, _ = self.centres.shape
        rows = codes.movedim(1, -1).long() + centres * torch.arange(groups, device=codes.device)
        return F.embedding(rows, self.centres.flatten(0, 1)).flatten(-2).movedim(-1, 1)

    def state_dict(self):
        return {"centres": self.centres}

    def load_state_dict(self, state):
        self.centres.copy_(state["centres"])


# ---- the memory ----

class CompressedMemory:
    """A replay memory whose latents are stored as a codec's codes.

    memory_class: utils.ReplayMemory or a class made from it, which chooses the patterns to keep; rm_sz, like
    and `more`: what it takes. `x` gives latents when it is indexed, decoded; all else is as in memory_class.
    """

    def __init__(self, memory_class, rm_sz, like, codec, **more):
        self.codes = memory_class(rm_sz, codec.example(like), **more)
        self.codec = codec

    x = property(lambda self: Mapped(self.codes.x, self.codec.decode))
    y = property(lambda self: self.codes.y)
    batch = property(lambda self: self.codes.batch)
    rm_sz = property(lambda self: self.codes.rm_sz)

    def __len__(self):
        return len(self.codes)

    @torch.no_grad()
    def update(self, latents, labels, i, rng=None):
        """As ReplayMemory.update, with latents of float32; the first ones fit the codec."""
        before = copied(self.codec.state_dict())
        try:
            if len(self) == 0 and self.rm_sz:
                self.codec.fit(latents, rng)
            self.codes.update(Mapped(latents, self.codec.encode), labels, i, rng)
        except BaseException:
            if not (self.batch == i).any():     # the codes are as they were
                self.codec.load_state_dict(before)
            raise

    def state_dict(self):
        return self.codes.state_dict() | {"codec": self.codec.state_dict()}

    def load_state_dict(self, state):
        self.codec.load_state_dict(state["codec"])
        self.codes.load_state_dict(state)


# ---- how many patterns an epoch replays ----

def part_of_memory(replayed_per_epoch, rule=published_minibatches):
    """A rule of mini-batches as `rule` for a memory of replayed_per_epoch patterns; each epoch draws others.

    So the steps of a batch stay as many as they are with a memory of that size, however much the memory
    holds.
    """

    def minibatches(n, m, mb_size=128, rng=None, epochs=1, device="cpu"):
        plan = rule(n, min(m, replayed_per_epoch), mb_size, rng, epochs, device)
        if m <= replayed_per_epoch:
            return plan

        steps = len(plan) // epochs
        parts = [torch.randperm(m, generator=rng)[:replayed_per_epoch].to(device) for _ in range(epochs)]
        return [(new, parts[t // steps][old]) for t, (new, old) in enumerate(plan)]

    return minibatches
