"""Batch Renormalization (Ioffe, arXiv 1702.03275) for convolutional networks, and the surgery that brings it into one.

    from models.batch_renorm import replace_batch_norm, set_brn_params
    replace_batch_norm(model)                                   # every BatchNorm2d becomes a BatchRenorm2D
    set_brn_params(model, momentum=5e-5, r_max=1.25, d_max=0.5)

Usable alone: copy this file.

Uses torch.
"""
import copy
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class BatchRenorm2D(nn.Module):
    """Batch Renormalization over the channels of (N, C, H, W), Algorithm 1 of arXiv 1702.03275.

    Training, with batch statistics mu_B and sigma_B = sqrt(biased variance + eps) over N, H, W:

        r = clip(sigma_B / sigma, 1 / r_max, r_max)              no gradient flows through r and d
        d = clip((mu_B - mu) / sigma, -d_max, d_max)
        y = gamma * ((x - mu_B) / sigma_B * r + d) + beta
        mu += momentum * (mu_B - mu);  sigma += momentum * (sigma_B - sigma)

    and then, while r_max (d_max) is below max_r_max (max_d_max), it grows by inc_step * N.
    Evaluation: y = gamma * (x - mu) / sigma + beta.

    gamma, beta are the parameters `weight`, `bias` (C,); mu, sigma the buffers `running_mean`, `running_std` (C,);
    `r_max`, `d_max` are scalar buffers, so that all of them reach `state_dict` and follow `.to(device)`.
    r_max = 1, d_max = 0 is plain batch normalization with moving averages.

    `average`: "std", as above; "variance" moves the unbiased variance instead, sigma = sqrt(variance + eps), as the papers'
    program for CORe50 does (arXiv 1907.03799).

    `fused=True` computes the same through the library's batch normalization kernels, and on a GPU all that is done per
    channel in one kernel of its own, FORWARD; False evaluates the formula as it stands above, several times slower: the
    reference that the fast path is tested against.

    Under autocast, and after .half() or .bfloat16(), the buffers and what moves them stay float32: a step of momentum is
    smaller than what those types can add.
    """

    def __init__(self, num_features, eps=1e-5, momentum=0.01, r_max=1.0, d_max=0.0, max_r_max=1.25, max_d_max=0.5,
                 inc_step=4.1e-5, fused=True):
        super().__init__()
        self.num_features, self.eps, self.fused = num_features, eps, fused
        self.momentum, self.max_r_max, self.max_d_max, self.inc_step = momentum, max_r_max, max_d_max, inc_step
        self.average = "std"
        self.last = None    # (r, d) of the last training forward, (C,) each, for whoever wants to watch them
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))
        self.register_buffer("r_max", torch.tensor(float(r_max)))
        self.register_buffer("d_max", torch.tensor(float(d_max)))

    @classmethod
    def from_batch_norm(cls, bn, **brn_params):
        """A BatchRenorm2D that inherits gamma, beta, the running mean and the running standard deviation of `bn`.

        sigma = sqrt(running_var + eps), eps included: sigma is from now on a moving average of sigma_B, which includes
        it, the network's evaluation stays exactly what it was, and channels that are constant do not divide by zero.
        """
        brn = cls(bn.num_features, eps=bn.eps, **brn_params).to(bn.running_mean)
        with torch.no_grad():
            if bn.affine:
                brn.weight.copy_(bn.weight).requires_grad_(bn.weight.requires_grad)
                brn.bias.copy_(bn.bias).requires_grad_(bn.bias.requires_grad)
            brn.running_mean.copy_(bn.running_mean)
            brn.running_std.copy_((bn.running_var + bn.eps).sqrt())
        return brn

    def _apply(self, fn, *args, **kwargs):
        before = dict(self._buffers)
        super()._apply(fn, *args, **kwargs)
        for name, buffer in self._buffers.items():
            if buffer.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before[name].to(buffer.device, torch.float32)
        return self

    def forward(self, x):
        """x and result: floating point (N, C, H, W), of one type."""
        if not self.training:
            return self._evaluate(x)
        normalize = self._train_fused if self.fused else self._train_formula
        y = normalize(x)
        if self.inc_step:
            self._grow_limits(self.inc_step * x.shape[0])
        return y

    @torch.no_grad()
    def _grow_limits(self, step):
        self.r_max += step * (self.r_max < self.max_r_max)
        self.d_max += step * (self.d_max < self.max_d_max)

    def _evaluate(self, x):
        gamma, beta = self._gamma_beta()
        if self.fused:
            tiny = torch.finfo(torch.float32).tiny      # adds nothing; some versions of PyTorch refuse an eps of 0
            return F.batch_norm(x, self.running_mean, self.running_std.square(), gamma, beta, eps=tiny)
        mu, sigma, gamma, beta = map(_per_channel, (self.running_mean, self.running_std, gamma, beta))
        return (gamma * (x - mu) / sigma + beta).to(x.dtype)

    def _gamma_beta(self):
        return self.weight.to(self.running_mean.dtype), self.bias.to(self.running_mean.dtype)

    def _train_formula(self, x):
        exact = x.to(self.running_mean.dtype)
        mu_b = exact.mean((0, 2, 3))
        sigma_b = (exact.var((0, 2, 3), correction=0) + self.eps).sqrt()
        r, d = self._correct(mu_b.detach(), sigma_b.detach(), x.numel() // x.shape[1])
        mu_b, sigma_b, r, d, gamma, beta = map(_per_channel, (mu_b, sigma_b, r, d, *self._gamma_beta()))
        return (gamma * ((exact - mu_b) / sigma_b * r + d) + beta).to(x.dtype)

    def _train_fused(self, x):
        exact = x.detach() if x.is_cuda else x.detach().to(self.running_mean.dtype)     # GPUs sum in float32 anyway
        stats = torch.batch_norm_update_stats(exact, None, None, 0.0)                   # ten times faster than var_mean
        mu_b, var_b = (s.to(self.running_mean.dtype) for s in stats)
        gamma, beta = self._gamma_beta()
        one_kernel = x.is_cuda and self.average == "std" and gpu_kernels()
        per_channel = self._by_one_kernel if one_kernel else self._by_operators
        values = per_channel(mu_b, var_b, gamma.detach(), beta.detach(), x.numel() // x.shape[1])
        return _Renormalize.apply(x, gamma, beta, *values, mu_b, var_b, self.eps)

    @torch.no_grad()
    def _by_operators(self, mu_b, var_b, gamma, beta, n):
        """(r, d, gamma * r, gamma * d + beta, 1 / sigma_B), all (C,), of n values a channel; moves mu and sigma."""
        above_zero = var_b + self.eps
        r, d = self._correct(mu_b, above_zero.sqrt(), n)
        weight, shift = torch._foreach_mul([gamma, gamma], [r, d])
        return r, d, weight, shift + beta, above_zero.rsqrt()

    @torch.no_grad()
    def _by_one_kernel(self, mu_b, var_b, gamma, beta, n):
        """The same with the average "std", by one kernel of a GPU in place of a dozen."""
        forward, _ = gpu_kernels()
        with torch.cuda.device_of(mu_b):        # such a kernel runs on the current device, which may be another
            *result, mu, sigma = forward(mu_b, var_b, self.running_mean, self.running_std, gamma, beta, self.r_max,
                                         self.d_max, momentum=self.momentum, eps=self.eps)
        torch._foreach_copy_([self.running_mean, self.running_std], [mu, sigma])
        self.last = tuple(result[:2])
        return result

    @torch.no_grad()
    def _correct(self, mu_b, sigma_b, n):
        """r and d (C,) of this batch of n values a channel; then moves mu and sigma towards its statistics."""
        r, d = torch._foreach_div([sigma_b, mu_b - self.running_mean], [self.running_std, self.running_std])
        r, d = r.clamp(self.r_max.reciprocal(), self.r_max), d.clamp(-self.d_max, self.d_max)
        self.last = r, d
        if self.average == "std":
            torch._foreach_lerp_([self.running_mean, self.running_std], [mu_b, sigma_b], self.momentum)
        else:
            self.running_mean.lerp_(mu_b, self.momentum)
            unbiased = (sigma_b.square() - self.eps) * (n / max(1, n - 1)) + self.eps
            self.running_std.copy_(self.running_std.square().lerp_(unbiased, self.momentum).sqrt_())
        return r, d

    def extra_repr(self):
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class _Renormalize(torch.autograd.Function):
    """gamma * ((x - mu_B) / sigma_B * r + d) + beta, with its gradient, in which r and d are constants.

    It is batch normalization with weight = gamma * r and bias = gamma * d + beta, and so is its gradient by x. The
    gradient by gamma is r times that by this weight plus d times that by this bias. mean and var (C,) must be the batch
    statistics of x, and inv_sigma = 1 / sqrt(var + eps): F.batch_norm would do the same, but compute the statistics, which r
    and d need beforehand, once more. A torch._foreach function is one kernel on a GPU for what would be two.
    """

    @staticmethod
    def forward(ctx, x, gamma, beta, r, d, weight, bias, inv_sigma, mean, var, eps):
        ctx.save_for_backward(x, weight, r, d, mean, inv_sigma)
        ctx.eps = eps
        if x.is_cuda:
            return torch.batch_norm_elemt(x, weight, bias, mean, inv_sigma, eps)
        return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, r, d, mean, inv_sigma = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, inv_sigma, True, ctx.eps, [True, True, True])
        if dy.is_cuda and gpu_kernels():
            _, by_gamma = gpu_kernels()
            dgamma = by_gamma(dweight, dbias, r, d)
        else:
            by_weight, by_bias = torch._foreach_mul([dweight, dbias], [r, d])
            dgamma = by_weight + by_bias
        return dx, dgamma, dbias, *8 * [None]


FORWARD = """template <typename T> void renormalize(T mu_b, T var_b, T mu, T sigma, T gamma, T beta, T r_max, T d_max,
        T momentum, T eps, T& r, T& d, T& weight, T& bias, T& inv_sigma_b, T& new_mu, T& new_sigma) {
    T sigma_b = ::sqrt(var_b + eps);
    T r_min = 1 / r_max;
    r = sigma_b / sigma;
    r = r < r_min ? r_min : r;
    r = r > r_max ? r_max : r;
    d = (mu_b - mu) / sigma;
    d = d < -d_max ? -d_max : d;
    d = d > d_max ? d_max : d;
    weight = gamma * r;
    bias = gamma * d + beta;
    inv_sigma_b = 1 / sigma_b;
    new_mu = mu + momentum * (mu_b - mu);
    new_sigma = sigma + momentum * (sigma_b - sigma);
}"""
BACKWARD = "template <typename T> T renormalize_gamma(T dweight, T dbias, T r, T d) { return dweight * r + dbias * d; }"


@cache
def gpu_kernels():
    """(FORWARD, BACKWARD) as functions of tensors on a GPU, or None where PyTorch cannot compile them there."""
    try:        # the library that compiles them comes with PyTorch
        forward = torch.cuda.jiterator._create_multi_output_jit_fn(FORWARD, num_outputs=7, momentum=0.0, eps=0.0)
        backward = torch.cuda.jiterator._create_jit_fn(BACKWARD)
        one = torch.ones(1, device="cuda")
        forward(*8 * [one])
        backward(*4 * [one])
    except (AttributeError, RuntimeError):
        return None
    return forward, backward


def _per_channel(v):
    return v.view(1, -1, 1, 1)


def replace_batch_norm(model, **brn_params):
    """Replaces, in place, every BatchNorm2d below `model` by a BatchRenorm2D that inherits its state.

    brn_params: keyword arguments of BatchRenorm2D (momentum, r_max, ...). Returns the number of layers replaced.
    """
    replaced = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                if child.running_mean is None:
                    raise ValueError(f"the BatchNorm2d {name!r} keeps no running statistics that a BatchRenorm2D could "
                                     "inherit: build it with track_running_stats=True")
                setattr(module, name, BatchRenorm2D.from_batch_norm(child, **brn_params).train(child.training))
                replaced += 1
    return replaced


def brn_layers(model):
    """The BatchRenorm2D layers of a model, in order."""
    return [m for m in model.modules() if isinstance(m, BatchRenorm2D)]


def set_brn_params(model, *, momentum=None, r_max=None, d_max=None, max_r_max=None, max_d_max=None, inc_step=None,
                   average=None):
    """Changes parameters of all the BatchRenorm2D layers of a model; what is not named stays as it is."""
    layers = brn_layers(model)
    if not layers:
        raise ValueError("the model has no BatchRenorm2D layer: call replace_batch_norm first")
    for brn in layers:
        for name, value in (("momentum", momentum), ("max_r_max", max_r_max), ("max_d_max", max_d_max),
                            ("inc_step", inc_step), ("average", average)):
            if value is not None:
                setattr(brn, name, value)
        for buffer, value in ((brn.r_max, r_max), (brn.d_max, d_max)):
            if value is not None:
                buffer.fill_(value)


def fold_brn(module):
    """An evaluation-only copy of a network in which each convolution has absorbed the BatchRenorm2D that follows it.

    In evaluation BRN is affine, gamma * (x - mu) / sigma + beta, so it folds into the convolution's weight and bias.
    Looks into nested nn.Sequential; anything else is copied as it is. The copy shares no memory with the original.
    """
    if not isinstance(module, nn.Sequential):
        return copy.deepcopy(module).eval().requires_grad_(False)
    folded = []
    for child in module:
        previous = folded[-1] if folded else None
        if isinstance(child, BatchRenorm2D) and isinstance(previous, nn.Conv2d):
            folded[-1] = _fold_pair(previous, child)
        elif isinstance(child, nn.ReLU) and isinstance(previous, nn.Conv2d):
            folded.append(nn.ReLU(inplace=True))               # on the convolution's own output: nobody else holds it
        else:
            folded.append(fold_brn(child))
    return nn.Sequential(*folded).eval()


@torch.no_grad()
def _fold_pair(conv, brn):
    scale = brn.weight / brn.running_std
    folded = nn.utils.skip_init(nn.Conv2d, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                                conv.padding, conv.dilation, conv.groups, bias=True, padding_mode=conv.padding_mode,
                                device=conv.weight.device, dtype=conv.weight.dtype)
    folded.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
    bias = brn.bias - brn.running_mean * scale
    folded.bias.copy_(bias if conv.bias is None else bias + conv.bias * scale)
    return folded.requires_grad_(False)
