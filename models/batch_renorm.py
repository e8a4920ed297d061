"""Batch Renormalization (Ioffe, arXiv 1702.03275) for convolutional networks.

    from models.batch_renorm import replace_batch_norm, set_brn_params
    replace_batch_norm(model)                                   # every BatchNorm2d becomes a BatchRenorm2D
    set_brn_params(model, momentum=5e-5, r_max=1.25, d_max=0.5)

Usable alone: copy this file.
"""
import copy

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

    gamma, beta are the parameters `weight`, `bias` (C,), or 1 and 0 where affine is False; mu, sigma the
    buffers `running_mean`, `running_std` (C,); `r_max`, `d_max` are scalar buffers. r_max = 1, d_max = 0 is
    plain batch normalization. A batch without images moves nothing, as in BatchNorm2d.

    `average`: "std", as above; "variance" moves the unbiased variance instead, sigma = sqrt(variance + eps),
    as the papers' program for CORe50 does (arXiv 1907.03799).

    `fused=True` computes the same with the library's batch normalization kernels. False evaluates the formula
    as it stands above, several times slower: the reference that the fast path is tested against.

    Under autocast, and after .half() or .bfloat16(), the buffers and what moves them stay float32: a step of
    momentum is smaller than what those types can add.
    """

    # (forward, backward): one GPU kernel for _by_operators, one for the gradient by gamma, as harness/gpu.py
    # compiles them; None does without
    gpu_kernels = None

    def __init__(self, num_features, eps=1e-5, momentum=0.01, r_max=1.0, d_max=0.0, max_r_max=1.25,
                 max_d_max=0.5, inc_step=4.1e-5, fused=True, affine=True):
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.max_r_max = max_r_max
        self.max_d_max = max_d_max
        self.inc_step = inc_step
        self.fused = fused
        self.average = "std"
        self.last = None    # (r, d) of the last training forward, (C,) each, for whoever wants to watch them

        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))
        self.register_buffer("r_max", torch.tensor(float(r_max)))
        self.register_buffer("d_max", torch.tensor(float(d_max)))

    @classmethod
    def from_batch_norm(cls, bn, **brn_params):
        """A BatchRenorm2D that inherits gamma, beta, the running mean and running standard deviation of `bn`.

        sigma = sqrt(running_var + eps) includes eps, as sigma_B does: the network's evaluation stays exactly
        what it was, and channels that are constant do not divide by zero.
        """
        brn = cls(bn.num_features, eps=bn.eps, affine=bn.affine, **brn_params).to(bn.running_mean)
        with torch.no_grad():
            if bn.affine:
                brn.weight.copy_(bn.weight).requires_grad_(bn.weight.requires_grad)
                if bn.bias is None:     # PyTorch can leave it out
                    brn.bias = None
                else:
                    brn.bias.copy_(bn.bias).requires_grad_(bn.bias.requires_grad)
            brn.running_mean.copy_(bn.running_mean)
            brn.running_std.copy_((bn.running_var + bn.eps).sqrt())
        return brn

    def _apply(self, fn, *args, **kwargs):
        # called by .to(), .half(), .cuda(), ...
        before = dict(self._buffers)
        super()._apply(fn, *args, **kwargs)
        for name, buffer in self._buffers.items():
            if buffer.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before[name].to(buffer.device, torch.float32)
        return self

    def forward(self, x):
        """x and result: floating point (N, C, H, W), of one type."""
        if not self.training or x.numel() == 0:
            return self._evaluate(x)

        y = self._train_fused(x) if self.fused else self._train_formula(x)
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
            tiny = torch.finfo(torch.float32).tiny      # adds nothing; PyTorch 2.11 refuses an eps of 0
            return F.batch_norm(x, self.running_mean, self.running_std.square(), gamma, beta, eps=tiny)

        mu, sigma, gamma, beta = _per_channel(self.running_mean, self.running_std, gamma, beta)
        return (gamma * (x - mu) / sigma + beta).to(x.dtype)

    def _gamma_beta(self):
        """gamma and beta (C,), of the type of the moving averages."""
        mu = self.running_mean
        gamma = torch.ones_like(mu) if self.weight is None else self.weight.to(mu.dtype)
        beta = torch.zeros_like(mu) if self.bias is None else self.bias.to(mu.dtype)
        return gamma, beta

    def _train_formula(self, x):
        exact = x.to(self.running_mean.dtype)
        mu_b = exact.mean((0, 2, 3))
        sigma_b = (exact.var((0, 2, 3), correction=0) + self.eps).sqrt()
        r, d = self._correct(mu_b.detach(), sigma_b.detach(), x.numel() // x.shape[1])

        mu_b, sigma_b, r, d, gamma, beta = _per_channel(mu_b, sigma_b, r, d, *self._gamma_beta())
        return (gamma * ((exact - mu_b) / sigma_b * r + d) + beta).to(x.dtype)

    def _train_fused(self, x):
        dtype = self.running_mean.dtype
        exact = x.detach()
        if not x.is_cuda:       # GPUs sum in float32 anyway
            exact = exact.to(dtype)
        mu_b, var_b = torch.batch_norm_update_stats(exact, None, None, 0.0)     # 10 times as fast as var_mean
        mu_b = mu_b.to(dtype)
        var_b = var_b.to(dtype)

        gamma, beta = self._gamma_beta()
        values = gamma.detach(), beta.detach()
        if x.is_cuda and self.average == "std" and self.gpu_kernels is not None:
            affine = self._by_one_kernel(mu_b, var_b, *values)
        else:
            affine = self._by_operators(mu_b, var_b, *values, x.numel() // x.shape[1])
        return _Renormalize.apply(x, gamma, beta, *affine, mu_b, var_b, self.eps)

    @torch.no_grad()
    def _by_operators(self, mu_b, var_b, gamma, beta, n):
        """(r, d, gamma * r, gamma * d + beta, 1 / sigma_B), all (C,); moves mu and sigma.

        mu_b, var_b: the statistics of n values a channel.
        """
        above_zero = var_b + self.eps
        r, d = self._correct(mu_b, above_zero.sqrt(), n)
        return r, d, gamma * r, gamma * d + beta, above_zero.rsqrt()

    @torch.no_grad()
    def _by_one_kernel(self, mu_b, var_b, gamma, beta):
        """The same with the average "std", by one kernel of a GPU in place of a dozen."""
        forward, _ = self.gpu_kernels
        with torch.cuda.device_of(mu_b):        # it runs on the current device, which may be another
            *result, mu, sigma = forward(mu_b, var_b, self.running_mean, self.running_std, gamma, beta,
                                         self.r_max, self.d_max, momentum=self.momentum, eps=self.eps)
        torch._foreach_copy_([self.running_mean, self.running_std], [mu, sigma])    # one kernel for the two
        self.last = tuple(result[:2])
        return result

    @torch.no_grad()
    def _correct(self, mu_b, sigma_b, n):
        """r and d (C,) of a batch of n values a channel; then moves mu and sigma towards its statistics."""
        r = (sigma_b / self.running_std).clamp(self.r_max.reciprocal(), self.r_max)
        d = ((mu_b - self.running_mean) / self.running_std).clamp(-self.d_max, self.d_max)
        self.last = r, d

        self.running_mean.lerp_(mu_b, self.momentum)
        if self.average == "std":
            self.running_std.lerp_(sigma_b, self.momentum)
        else:
            unbiased = (sigma_b.square() - self.eps) * (n / max(1, n - 1)) + self.eps
            self.running_std.copy_(self.running_std.square().lerp_(unbiased, self.momentum).sqrt_())
        return r, d

    def extra_repr(self):
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class _Renormalize(torch.autograd.Function):
    """gamma * ((x - mu_B) / sigma_B * r + d) + beta, with its gradient, in which r and d are constants.

    It is batch normalization with weight = gamma * r and bias = gamma * d + beta, and so is its gradient by
    x. The gradient by gamma is r times that by this weight plus d times that by this bias. mean and var (C,)
    must be the batch statistics of x, and inv_sigma = 1 / sqrt(var + eps): F.batch_norm would compute the
    statistics, which r and d need beforehand, once more.
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

        if dy.is_cuda and BatchRenorm2D.gpu_kernels is not None:
            _, by_gamma = BatchRenorm2D.gpu_kernels
            dgamma = by_gamma(dweight, dbias, r, d)
        else:
            dgamma = dweight * r + dbias * d
        return dx, dgamma, dbias, *8 * [None]


def _per_channel(*values):
    """Values (C,) as (1, C, 1, 1), to be combined with (N, C, H, W)."""
    return [v.view(1, -1, 1, 1) for v in values]


def replace_batch_norm(model, **brn_params):
    """Replaces, in place, every BatchNorm2d below `model` by a BatchRenorm2D that inherits its state.

    A layer that stands in several places stays one. A SyncBatchNorm counts as a BatchNorm2d, which it is in a
    single process. A subclass that computes more behind the normalization, by its children (timm's
    BatchNormAct2d: an activation), becomes a Sequential of a BatchRenorm2D and these.

    brn_params: keyword arguments of BatchRenorm2D. Returns the number of layers replaced. ValueError, before
    anything is replaced, names a normalization that this cannot be done with.
    """
    replacement = {}
    places = []
    for path, module in model.named_modules():
        for name, child in module._modules.items():     # named_children leaves out a second place
            if _is_batch_norm_2d(child):
                if child not in replacement:
                    replacement[child] = _in_place_of(child, f"{path}.{name}".lstrip("."), brn_params)
                places.append((module, name, child))

    for module, name, child in places:
        setattr(module, name, replacement[child].train(child.training))
    return len(replacement)


def _is_batch_norm_2d(module):
    other = nn.BatchNorm1d, nn.BatchNorm3d
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, other)


def _in_place_of(bn, name, brn_params):
    """The module that takes the place of a batch normalization called `name`; ValueError if none can."""
    kind = f"the {type(bn).__name__} {name!r}"
    if isinstance(bn, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(f"{kind} has no size yet: pass an image through the network first")
    if isinstance(bn, nn.SyncBatchNorm) and _several_processes():
        raise ValueError(f"{kind} normalizes over several processes, and a BatchRenorm2D over its own: build "
                         "the network with BatchNorm2d")
    if bn.running_mean is None:
        raise ValueError(f"{kind} keeps no running statistics that a BatchRenorm2D could inherit: build it "
                         "with track_running_stats=True")

    brn = BatchRenorm2D.from_batch_norm(bn, **brn_params)
    if type(bn) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return brn
    taken_apart = nn.Sequential(brn, *bn.children()) if list(bn.children()) else brn
    if not _evaluate_alike(bn, taken_apart):
        raise ValueError(f"{kind} computes more than a BatchNorm2d and what it contains: replace it by a "
                         "BatchNorm2d with the rest behind it")
    return taken_apart


def _several_processes():
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@torch.no_grad()
def _evaluate_alike(bn, other):
    """Whether two modules over the channels of a BatchNorm2d give the same in evaluation, up to rounding."""
    mu = bn.running_mean
    noise = torch.randn((2, len(mu), 5, 5), generator=torch.Generator().manual_seed(0))
    x = mu.view(-1, 1, 1) + 3 * (bn.running_var + bn.eps).sqrt().view(-1, 1, 1) * noise.to(mu)
    try:        # of copies: in-place activations aside, nothing of the network may change
        y, z = (copy.deepcopy(module).eval()(x.clone()) for module in (bn, other))
    except RuntimeError:
        return False
    return y.shape == z.shape and torch.allclose(y, z, rtol=1e-4, atol=1e-5)


def brn_layers(model):
    """The BatchRenorm2D layers of a model, in order."""
    return [m for m in model.modules() if isinstance(m, BatchRenorm2D)]


def set_brn_params(model, *, momentum=None, r_max=None, d_max=None, max_r_max=None, max_d_max=None,
                   inc_step=None, average=None):
    """Changes parameters of all the BatchRenorm2D layers of a model; what is not named stays as it is."""
    layers = brn_layers(model)
    if not layers:
        raise ValueError("the model has no BatchRenorm2D layer: call replace_batch_norm first")

    attributes = {"momentum": momentum, "max_r_max": max_r_max, "max_d_max": max_d_max,
                  "inc_step": inc_step, "average": average}
    for brn in layers:
        for name, value in attributes.items():
            if value is not None:
                setattr(brn, name, value)
        if r_max is not None:
            brn.r_max.fill_(r_max)
        if d_max is not None:
            brn.d_max.fill_(d_max)


def fold_brn(module):
    """A copy of a network, for evaluation alone, with each BatchRenorm2D folded into the convolution before.

    In evaluation BRN is affine, gamma * (x - mu) / sigma + beta, so it folds into the convolution's weight
    and bias. Looks into nested nn.Sequential. Anything else is copied as it is, also a subclass of Sequential
    or Conv2d, and what has hooks: they may compute more than their type says. A convolution class whose
    forward is that of Conv2d by other means says so by `folds_as_conv = True`; a module that knows better
    has a method fold(fold_brn). The copy shares no memory with the original.
    """
    if hasattr(module, "fold"):
        return module.fold(fold_brn)
    if not _is_exactly(module, nn.Sequential):
        return copy.deepcopy(module).eval().requires_grad_(False)

    folded = []
    original = None     # of folded[-1]
    for child in module:
        behind_conv = original is not None and _is_plain_conv(original)
        if behind_conv and _is_exactly(child, BatchRenorm2D):
            folded[-1] = _fold_pair(folded[-1], child)
            continue
        if behind_conv and _is_exactly(child, nn.ReLU):
            folded.append(nn.ReLU(inplace=True))    # on the convolution's own output: nobody else holds it
        else:
            folded.append(fold_brn(child))
        original = child
    return nn.Sequential(*folded).eval()


def _is_exactly(module, kind):
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)


def _is_plain_conv(module):
    kind = type(module)
    plain = kind is nn.Conv2d or isinstance(module, nn.Conv2d) and vars(kind).get("folds_as_conv", False)
    return plain and _is_exactly(module, kind)


@torch.no_grad()
def _fold_pair(conv, brn):
    folded = nn.utils.skip_init(
        nn.Conv2d, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
        conv.dilation, conv.groups, bias=True, padding_mode=conv.padding_mode, device=conv.weight.device,
        dtype=conv.weight.dtype)
    gamma, beta = brn._gamma_beta()
    scale = gamma / brn.running_std
    folded.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
    bias = beta - brn.running_mean * scale
    folded.bias.copy_(bias if conv.bias is None else bias + conv.bias * scale)
    return folded.requires_grad_(False)
