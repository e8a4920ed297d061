"""Training steps on a CUDA device: a step replayed as a CUDA graph, and the kernels of Batch Renormalization.

Imported where a run trains on such a device; elsewhere nothing needs it.
"""
from functools import cache

import torch

from harness.console import say
from models.batch_renorm import BatchRenorm2D, brn_layers

WARM_UP = 3     # ordinary steps before a capture, so that gradients, momentum and workspaces exist

# whether brn_relu.py's kernels are used. Nobody has timed them on a GPU yet: benchmarks/speed.py does, and
# once they pay, what Batch Renormalization computes per channel below need not be here any more
JOIN_RELUS = False


class CapturedStep:
    """A training step, replayed as a CUDA graph: the same kernels, without the time that Python takes to
    launch each.

    step(x, y): trains net on latents x (N, *latent shape) and labels y (N,) with the optimizer and si,
    returns (loss, correct) and makes no choice that depends on data. After a few ordinary steps it is
    captured; further steps of that shape replay the capture, steps of another shape stay ordinary ones. The
    first replay is checked against an ordinary step from the same state; where they differ, or nothing can be
    captured, all steps stay ordinary ones, and a line says so. When a number that the capture holds fast (a
    learning rate, ...) changes, the step is captured anew.
    """

    def __init__(self, step, optimizer, net, si):
        self.step = step
        self.optimizer = optimizer
        self.net = net
        self.si = si
        self.layers = brn_layers(net)
        self.graph = None
        self.settings = None
        self.steps_before = 0       # ordinary steps since the start, or since the settings changed
        self.useless = False
        self.side_stream = None

    def __call__(self, x, y):
        if self.useless:
            return self.step(x, y)

        with torch.cuda.device(x.device):       # streams and graphs are made on the current device
            if self.graph is not None and self.settings != self._settings():
                self.graph = None
                self.steps_before = 0

            if self.graph is not None:
                return self._replay(x, y) if x.shape == self.x.shape else self.step(x, y)

            if self.steps_before < WARM_UP:
                self.steps_before += 1
                return self._on_side_stream(x, y)
            return self._capture_and_check(x, y)

    def _replay(self, x, y):
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.loss.clone(), self.correct.clone()

    def _on_side_stream(self, x, y):
        """An ordinary step on another stream, which is what PyTorch wants of the steps before a capture."""
        if self.side_stream is None:
            self.side_stream = torch.cuda.Stream()
        self.side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side_stream):
            result = self.step(x, y)
        torch.cuda.current_stream().wait_stream(self.side_stream)
        return result

    def _capture_and_check(self, x, y):
        try:
            self._capture(x, y)
        except RuntimeError as error:
            self._give_up(f"this step cannot be captured ({' '.join(str(error).split()):.100})")
            return self.step(x, y)

        before = self._copied_state()
        result = self.step(x, y)
        after = self._copied_state()
        self._restore(before)
        replayed = self._replay(x, y)

        if all(map(_close, [*replayed, *self._state()], [*result, *after])):
            return replayed
        self._restore(after)
        self._give_up("its first replay gave other results than an ordinary step")
        return result

    def _capture(self, x, y):
        self.x = x.clone()
        self.y = y.clone()
        self.settings = self._settings()
        self.graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        with torch.cuda.graph(self.graph):      # records the step, does not run it
            self.loss, self.correct = self.step(self.x, self.y)

    def _give_up(self, why):
        say(f"training goes on without a CUDA graph, with the same results but more slowly: {why}")
        self.graph = None
        self.useless = True

    def _settings(self):
        """The numbers that a capture holds fast."""
        groups = [{key: value for key, value in group.items() if key != "params"}
                  for group in self.optimizer.param_groups]
        layers = [(brn.momentum, brn.inc_step, brn.max_r_max, brn.max_d_max, brn.average, brn.training)
                  for brn in self.layers]
        si = {key: value for key, value in vars(self.si).items() if isinstance(value, float)}
        return groups, layers, si, self.net.output.out_features

    def _state(self):
        """All that a step changes."""
        momenta = [value for state in self.optimizer.state.values() for value in state.values()
                   if isinstance(value, torch.Tensor)]
        return [*self.net.state_dict().values(), *momenta, *self.si.trajectory, *self.si.before]

    def _copied_state(self):
        return [t.clone() for t in self._state()]

    @torch.no_grad()
    def _restore(self, state):
        for mine, theirs in zip(self._state(), state, strict=True):
            mine.copy_(theirs)


def _close(a, b):
    """Whether two tensors agree to 1e-5 of the largest value."""
    a = a.double()
    b = b.double()
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


# ---- what Batch Renormalization computes per channel, as one kernel forward and one backward ----

FORWARD = """template <typename T>
void renormalize(T mu_b, T var_b, T mu, T sigma, T gamma, T beta, T r_max, T d_max, T momentum, T eps,
                 T& r, T& d, T& weight, T& bias, T& inv_sigma_b, T& new_mu, T& new_sigma) {
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

# the gradient by gamma, from those by weight = gamma * r and bias = gamma * d + beta
BACKWARD = """template <typename T>
T renormalize_gamma(T dweight, T dbias, T r, T d) {
    return dweight * r + dbias * d;
}"""


def use_kernels(net):
    """From now on Batch Renormalization on a GPU computes with these kernels, where they can be compiled, and
    with JOIN_RELUS that above the latent layer of net with those of brn_relu.py."""
    BatchRenorm2D.gpu_kernels = compile_kernels()
    if JOIN_RELUS and relus_can_be_joined():
        from harness.brn_relu import join_relus
        join_relus(net.end_features)


@cache
def compile_kernels():
    """(FORWARD, BACKWARD) as functions of tensors on a GPU, or None where PyTorch cannot compile them."""
    try:        # the library that compiles them comes with PyTorch
        jiterator = torch.cuda.jiterator
        forward = jiterator._create_multi_output_jit_fn(FORWARD, num_outputs=7, momentum=0.0, eps=0.0)
        backward = jiterator._create_jit_fn(BACKWARD)

        # they are compiled when they are first called
        one = torch.ones(1, device="cuda")
        forward(*8 * [one])
        backward(*4 * [one])
    except (AttributeError, RuntimeError):
        return None
    return forward, backward


@cache
def relus_can_be_joined():
    """Whether Triton compiles the kernels of brn_relu.py here, and they give what operators give."""
    results = []
    try:
        from harness.brn_relu import BatchRenormReLU
        for joined in (True, False):
            brn = BatchRenormReLU(64).cuda()
            x = torch.linspace(-1, 1, 64 * 600, device="cuda").sin().view(6, 10, 10, 64).permute(0, 3, 1, 2)
            x.requires_grad_()
            y = brn(x) if joined else torch.relu(BatchRenorm2D.forward(brn, x))
            y.square().sum().backward()
            results.append([y, x.grad, brn.weight.grad, brn.bias.grad, brn.running_mean, brn.running_std])
        why = "" if all(map(_close, *results)) else "they give other results than PyTorch's operators"
    except Exception as error:      # without Triton, without the C compiler that it needs, ...
        why = " ".join(str(error).split()) or type(error).__name__
    if why:
        say(f"training goes on without joined kernels, more slowly: {why:.100}")
    return not why
