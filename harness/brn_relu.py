"""On a GPU, Batch Renormalization and the ReLU behind it as one: 8 passes over the activations instead of 13.

Triton's kernels, three forward and three backward. Triton comes with PyTorch's builds for CUDA.
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn
from torch.autograd.function import once_differentiable

from models.batch_renorm import BatchRenorm2D

# a map (N, C, H, W) with channels last is N H W rows of C values; a program takes a tile of so many
ROWS = tl.constexpr(256)
CHANNELS = tl.constexpr(32)
WARPS = 8       # of a tile's program
AT_ONCE = tl.constexpr(32)      # tiles whose sums are added at a time


def join_relus(layers):
    """Lets each BatchRenorm2D below `layers` compute the ReLU that follows it in an nn.Sequential, too."""
    for module in layers.modules():
        if type(module) is nn.Sequential:
            for i in range(len(module) - 1):
                if type(module[i]) is BatchRenorm2D and type(module[i + 1]) is nn.ReLU:
                    module[i].__class__ = BatchRenormReLU       # parameters and the keys of a state stay
                    module[i + 1] = nn.Identity()


class BatchRenormReLU(BatchRenorm2D):
    """relu(BatchRenorm2D(x)); while it trains, of maps with channels last, 32 or 64 ..., by the kernels."""
    devices = ("cuda",)     # "cpu" where Triton interprets kernels, for a test

    def forward(self, x):
        """x and result: floating point (N, C, H, W), of one type."""
        rows = x.permute(0, 2, 3, 1)
        fits = rows.is_contiguous() and x.numel() > 0 and x.shape[1] % CHANNELS.value == 0
        if not (self.training and self.average == "std" and x.device.type in self.devices and fits):
            return F.relu(super().forward(x))

        y = _RenormalizeReLU.apply(rows, *self._gamma_beta(), self)
        if self.inc_step:
            self._grow_limits(self.inc_step * x.shape[0])
        return y.permute(0, 3, 1, 2)


class _RenormalizeReLU(torch.autograd.Function):
    """Of x (..., C), with its gradient, in which r and d are constants. Moves mu and sigma of `brn`."""

    @staticmethod
    def forward(ctx, x, gamma, beta, brn):
        tiles, n, c = _tiles(x)
        sums = gamma.new_empty(tiles[0], 2, c)
        table = gamma.new_empty(6, c)
        y = torch.empty_like(x)
        with torch.cuda.device_of(x):
            _sum[tiles](x, sums, n, c, num_warps=WARPS)
            _renormalize[tiles[1],](x, sums, table, gamma, beta, brn.running_mean, brn.running_std, brn.r_max,
                                    brn.d_max, brn.momentum, brn.eps, n, c)
            _normalize[tiles](x, y, table, n, c, num_warps=WARPS)
        brn.last = table[0], table[1]
        ctx.save_for_backward(x, table)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, table = ctx.saved_tensors
        dy = dy.contiguous()
        tiles, n, c = _tiles(x)
        sums = table.new_empty(tiles[0], 2, c)
        gradients = table.new_empty(3, c)
        dx = torch.empty_like(x)
        with torch.cuda.device_of(x):
            _sum_of_gradients[tiles](x, dy, sums, table, n, c, num_warps=WARPS)
            _gradients[tiles[1],](sums, table, gradients, n, c)
            _gradient[tiles](x, dy, dx, table, gradients, n, c, num_warps=WARPS)
        return dx, gradients[0], gradients[1], None


def _tiles(x):
    """((tiles of rows, of channels), rows n, channels c) of x (..., c)."""
    c = x.shape[-1]
    n = x.numel() // c
    return (triton.cdiv(n, ROWS.value), c // CHANNELS.value), n, c


# ---- the kernels; a table (6, c): r, d, mu_B, 1 / sigma_B, weight = gamma r, bias = gamma d + beta ----

@triton.jit
def _place(n, c):
    """(channels, places in the map, which of these there are) of a tile."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return channels, rows * c + channels, rows < n


@triton.jit
def _total(sums, n, c):
    """(channels, the two sums of all tiles), added in a fixed order: equal inputs give equal bits."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.zeros([AT_ONCE, CHANNELS], sums.dtype.element_ty)
    second = tl.zeros([AT_ONCE, CHANNELS], sums.dtype.element_ty)
    tiles = tl.cdiv(n, ROWS)
    for start in range(0, tiles, AT_ONCE):
        tile = start + tl.arange(0, AT_ONCE)[:, None]
        first += tl.load(sums + tile * 2 * c + channels, tile < tiles, 0)
        second += tl.load(sums + tile * 2 * c + c + channels, tile < tiles, 0)
    return channels, tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def _sum(x, sums, n, c):
    """Sums of x and of its square, less the first row: far from 0 the latter would keep no digits."""
    channels, place, there = _place(n, c)
    origin = tl.load(x + channels).to(sums.dtype.element_ty)
    moved = tl.where(there, tl.load(x + place, there, 0).to(origin.dtype) - origin, 0)
    sums += tl.program_id(0) * 2 * c + channels
    tl.store(sums, tl.sum(moved, 0))
    tl.store(sums + c, tl.sum(moved * moved, 0))


@triton.jit
def _renormalize(x, sums, table, gamma, beta, running_mean, running_std, r_max, d_max, momentum, eps, n, c):
    """The table, by Algorithm 1 of arXiv 1702.03275; then moves the averages."""
    channels, first, second = _total(sums, n, c)
    mu_b = first / n + tl.load(x + channels)
    sigma_b = tl.sqrt(tl.maximum(second / n - first / n * (first / n), 0) + eps)
    mu = tl.load(running_mean + channels)
    sigma = tl.load(running_std + channels)
    r = tl.minimum(tl.maximum(sigma_b / sigma, 1 / tl.load(r_max)), tl.load(r_max))
    d = tl.minimum(tl.maximum((mu_b - mu) / sigma, -tl.load(d_max)), tl.load(d_max))
    tl.store(running_mean + channels, mu + momentum * (mu_b - mu))
    tl.store(running_std + channels, sigma + momentum * (sigma_b - sigma))

    table += channels
    tl.store(table, r)
    tl.store(table + c, d)
    tl.store(table + 2 * c, mu_b)
    tl.store(table + 3 * c, 1 / sigma_b)
    tl.store(table + 4 * c, tl.load(gamma + channels) * r)
    tl.store(table + 5 * c, tl.load(gamma + channels) * d + tl.load(beta + channels))


@triton.jit
def _standardized(x, table, c, place, there):
    """(x - mu_B) / sigma_B of a tile, and y before the ReLU; table: at the tile's channels."""
    x_hat = tl.load(x + place, there, 0).to(table.dtype.element_ty) - tl.load(table + 2 * c)
    x_hat *= tl.load(table + 3 * c)
    return x_hat, x_hat * tl.load(table + 4 * c) + tl.load(table + 5 * c)


@triton.jit
def _normalize(x, y, table, n, c):
    channels, place, there = _place(n, c)
    x_hat, before = _standardized(x, table + channels, c, place, there)
    tl.store(y + place, tl.maximum(before, 0), there)


@triton.jit
def _sum_of_gradients(x, dy, sums, table, n, c):
    """Sums of g, the gradient by y before the ReLU, and of g (x - mu_B) / sigma_B."""
    channels, place, there = _place(n, c)
    x_hat, before = _standardized(x, table + channels, c, place, there)
    g = tl.where(before > 0, tl.load(dy + place, there, 0).to(before.dtype), 0)
    sums += tl.program_id(0) * 2 * c + channels
    tl.store(sums, tl.sum(g, 0))
    tl.store(sums + c, tl.sum(g * x_hat, 0))


@triton.jit
def _gradients(sums, table, gradients, n, c):
    """Those by gamma, by beta, and by weight."""
    channels, dbias, dweight = _total(sums, n, c)
    r = tl.load(table + channels)
    d = tl.load(table + c + channels)
    tl.store(gradients + channels, dweight * r + dbias * d)
    tl.store(gradients + c + channels, dbias)
    tl.store(gradients + 2 * c + channels, dweight)


@triton.jit
def _gradient(x, dy, dx, table, gradients, n, c):
    channels, place, there = _place(n, c)
    table += channels
    gradients += channels
    x_hat, before = _standardized(x, table, c, place, there)
    g = tl.where(before > 0, tl.load(dy + place, there, 0).to(before.dtype), 0)
    g -= tl.load(gradients + c) / n + x_hat * (tl.load(gradients + 2 * c) / n)
    tl.store(dx + place, g * tl.load(table + 4 * c) * tl.load(table + 3 * c), there)
