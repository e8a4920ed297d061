"""What several test files share."""
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.batch_renorm import BatchRenorm2D
from models.mobilenet import MobileNetV1

REPO = Path(__file__).resolve().parents[1]
STANDIN = REPO.parent / "shared" / "standin"


def same(a, b):
    """Whether two nested things are equal, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def random_images(n=5, h=6, w=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


def randomize(model, seed=0):
    """Gives every normalization (BRN or BN) of a model statistics, gamma and beta of its own."""
    rng = seeded(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (BatchRenorm2D, nn.BatchNorm2d)):
                m.weight.uniform_(0.8, 1.3, generator=rng)
                m.bias.uniform_(-0.3, 0.5, generator=rng)
                m.running_mean.uniform_(-0.3, 0.3, generator=rng)
                spread = m.running_std if isinstance(m, BatchRenorm2D) else m.running_var
                spread.uniform_(0.6, 1.6, generator=rng)
    return model


def small_net(latent_layer=19, width=0.125, classes=5, seed=0, **kwargs):
    torch.manual_seed(seed)
    return randomize(MobileNetV1(classes, latent_layer, width=width, **kwargs), seed)
