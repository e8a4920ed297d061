"""Latents stored in fewer bytes: float16, one byte a value, or product quantization, and the memory that keeps them so.

    memory = CompressedMemory(ReplayMemory, 16000, like=latent, codec=ProductQuantizer(latent, pq_codes=32))
    memory.update(latents, labels, i, rng)      # float32 latents go in
    memory.x[index]                             # and come out, as near to what they were as the codec allows

A codec has `fit(latents, rng)`, called once with the latents of batch 0; `encode` and `decode`; `example(latent)`, one
latent's codes; and a state. Product-quantized features are replayed by REMIND (arXiv 1910.02509), latents of eight bits in
arXiv 2110.10486. The first batch fixes the codes, since what is stored can never be coded anew.

Uses methods.memories, torch, utils.
"""
import torch
import torch.nn.functional as F

from methods.memories import AroundMemory
from utils import memory_format


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
    """One byte a value: x is stored as the nearest of low + step * {0, ..., 255}, wrong by at most step / 2 in between.

    low, step: None, to be taken from batch 0, from its smallest value (0 where none is below 0, as behind a ReLU) to its
    largest, one for the whole layer (finer than one a channel: a channel's largest value in batch 0 is a bad guess of
    its largest ever); or tensors that (k, *latent shape) can be added to, where the range is known. `clipped` of `coded`
    values (int64 scalars) lay outside the range.
    """

    def __init__(self, latent, low=None, step=None):
        self.known = low is not None
        scalar = lambda value: torch.as_tensor(value, dtype=torch.float32).to(latent.device)
        self.low, self.step = scalar(0.0 if low is None else low), scalar(1.0 if step is None else step)
        self.clipped, self.coded = (torch.zeros((), dtype=torch.int64, device=latent.device) for _ in range(2))

    def fit(self, latents, rng=None):
        """Takes the range of latents (n, *latent shape), indexable by a slice, unless it is known."""
        if self.known:
            return
        parts = (latents[k:k + 256] for k in range(0, len(latents), 256))
        lows, highs = zip(*((part.min().item(), part.max().item()) for part in parts))
        self.low.fill_(min(0.0, *lows))
        self.step.fill_(max((max(highs) - self.low.item()) / 255, torch.finfo(torch.float32).tiny))

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
    """Product quantization (Jegou et al., 2011): `pq_codes` bytes for the C channels of each position of a map.

    The channels are cut into pq_codes groups; a byte says which of 256 centres its group is nearest to. `centres`
    (pq_codes, 256, C / pq_codes), one set for all positions, are found by k-means among the latents of batch 0.
    latent: (1, C) or (1, C, H, W), C a multiple of pq_codes.
    """

    CENTRES, POSITIONS, ITERATIONS, CHUNK = 256, 25_600, 10, 2048

    def __init__(self, latent, pq_codes=32):
        channels = latent.shape[1]
        if channels % pq_codes:
            good = ", ".join(str(k) for k in range(1, channels + 1) if channels % k == 0)
            raise ValueError(f"the {channels} channels of a latent cannot be cut into pq_codes = {pq_codes} equal groups; "
                             f"it can be {good}")
        self.centres = torch.zeros((pq_codes, self.CENTRES, channels // pq_codes), device=latent.device)

    @torch.no_grad()
    def fit(self, latents, rng=None):
        """k-means in each group, over at most POSITIONS positions drawn at random from latents (n, *latent shape)."""
        n = len(latents)
        area = latents[:1][0, 0].numel()
        images = torch.randperm(n, generator=rng)[:-(-self.POSITIONS // area)].to(self.centres.device)
        x = self._grouped(latents[images])
        start = torch.randperm(x.shape[1], generator=rng)[torch.arange(self.CENTRES) % x.shape[1]]
        self.centres.copy_(x[:, start.to(x.device)])
        for _ in range(self.ITERATIONS):
            nearest = self._nearest(x)[..., None]                                           # (groups, positions, 1)
            sums = torch.zeros_like(self.centres).scatter_add_(1, nearest.expand_as(x), x)
            counts = torch.zeros_like(self.centres[..., :1]).scatter_add_(1, nearest, torch.ones_like(x[..., :1]))
            self.centres.copy_(torch.where(counts > 0, sums / counts.clamp(min=1), self.centres))

    def _grouped(self, latents):
        """(k, C, ...) to (groups, positions, channels of a group)."""
        return latents.movedim(1, -1).reshape(-1, len(self.centres), self.centres.shape[2]).transpose(0, 1).contiguous()

    def _nearest(self, x):
        """Numbers (groups, positions), int64, of the centres that are nearest to x (groups, positions, channels)."""
        squares = self.centres.square().sum(2)[:, None]
        return torch.cat([torch.baddbmm(squares, part, self.centres.transpose(1, 2), alpha=-2).argmin(2)
                          for part in x.split(self.CHUNK, 1)], 1)

    def example(self, latent):
        """The codes of a latent of zeros: (1, pq_codes, *map)."""
        codes = torch.zeros((1, len(self.centres), *latent.shape[2:]), dtype=torch.uint8, device=latent.device)
        return codes.contiguous(memory_format=memory_format(latent))

    @torch.no_grad()
    def encode(self, latents):
        """float32 (k, C, *map) to uint8 (k, pq_codes, *map)."""
        codes = self._nearest(self._grouped(latents)).to(torch.uint8).T                     # (positions, groups)
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


class Through:
    """What gives one thing when indexed, seen through a function: Through(codes, decode)[index] = decode(codes[index])."""

    def __init__(self, inner, function):
        self.inner, self.function = inner, function

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return self.function(self.inner[index])


class CompressedMemory(AroundMemory):
    """A replay memory whose latents are stored as a codec's codes, with whatever rule of what is kept.

    rule: utils.ReplayMemory, or a class made from it; rm_sz, like, and whatever else the rule takes: as it takes them.
    `y`, `batch` and `update` are the rule's; `x` gives latents when it is indexed, decoded.
    """

    def __init__(self, rule, rm_sz, like, codec, **more):
        super().__init__(rule(rm_sz, codec.example(like), **more))
        self.codec = codec

    x = property(lambda self: Through(self.inner.x, self.codec.decode))

    @torch.no_grad()
    def update(self, latents, labels, i, rng=None):
        """As the rule's update, with latents of float32; the first ones fit the codec."""
        if len(self) == 0 and self.rm_sz:
            self.codec.fit(latents, rng)
        super().update(Through(latents, self.codec.encode), labels, i, rng)

    def state_dict(self):
        return super().state_dict() | {"codec": self.codec.state_dict()}

    def load_state_dict(self, state):
        self.codec.load_state_dict(state["codec"])
        super().load_state_dict(state)
