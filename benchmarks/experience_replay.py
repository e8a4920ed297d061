"""Experience replay as mammoth has it (github.com/aimagelab/mammoth: models/er.py, its buffer), written here.

All layers learn, with their Batch Normalization. A step is of 32 new images and 32 replayed ones, and each is
new once. SGD without momentum or decay. The memory is a reservoir of images.
"""
import numpy as np
import torch
from torch import nn

from models.batch_renorm import set_brn_params
from utils import evaluate, preprocess


class ExperienceReplay:
    """A program beside ours, to be called as the others of peers.py are.

    config.rm_sz latents of net's latent layer say how many bytes of images are kept; inc_lr is the rate.
    """

    NEW = REPLAYED = 32     # images in a step

    def __init__(self, where, config, net, test_x, test_y, device):
        self.device = device
        self.rng = torch.Generator().manual_seed(config.seed)
        self.test_x = test_x
        self.test_y = torch.as_tensor(test_y, device=device)

        latent_bytes = net.example_latent(*test_x.shape[1:3]).nbytes
        self.image_bytes = stored_bytes(config)
        self.most = config.rm_sz * latent_bytes // self.image_bytes
        self.x = np.empty((self.most, *test_x.shape[1:]), np.uint8)
        self.y = torch.zeros(self.most, dtype=torch.int64)
        self.seen = 0           # images so far

        self.net = net.to(memory_format=torch.channels_last)
        set_brn_params(net, momentum=0.1, r_max=1, d_max=0, inc_step=0)     # then it is Batch Normalization
        net.freeze_below("images")
        self.optimizer = torch.optim.SGD(net.parameters(), config.inc_lr)

    def learn(self, x, y):
        """Learns a batch once: uint8 (n, H, W, 3), int64 (n,)."""
        self.net.train()
        y = torch.as_tensor(y)
        for new in torch.randperm(len(y), generator=self.rng).split(self.NEW):
            kept = min(self.seen, self.most)
            old = torch.randperm(kept, generator=self.rng)[:self.REPLAYED]
            images = np.concatenate((x[new], self.x[old]))
            labels = torch.cat((y[new], self.y[old])).to(self.device)
            scores = self.net(self._moved(preprocess(images, self.device)))
            loss = nn.functional.cross_entropy(scores, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            for k in new.tolist():
                self._remember(x[k], y[k])

    def _moved(self, x):
        """Images shifted by up to an eighth of their side, half of them mirrored, as mammoth does."""
        pad = x.shape[-1] // 8
        size = x.shape[-1]
        wide = nn.functional.pad(x, [pad] * 4)
        top, left = torch.randint(2 * pad + 1, (2, len(x)), generator=self.rng).tolist()
        moved = [image[:, t:t + size, at:at + size] for image, t, at in zip(wide, top, left, strict=True)]
        mirrored = torch.rand(len(x), generator=self.rng) < 0.5
        moved = [image.flip(2) if flip else image for image, flip in zip(moved, mirrored, strict=True)]
        return torch.stack(moved).contiguous(memory_format=torch.channels_last)

    def _remember(self, image, label):
        """Reservoir sampling: of all images seen, each is kept with the same probability."""
        place = self.seen
        if self.seen >= self.most:
            place = int(torch.randint(self.seen + 1, (1,), generator=self.rng))
        if place < self.most:
            self.x[place] = image
            self.y[place] = label
        self.seen += 1

    def test(self):
        """Accuracy on the test images, 0..1."""
        self.net.eval()
        return evaluate(self.net, Preprocessed(self.test_x, self.device), self.test_y, chunk=128)["accuracy"]

    def kept_bytes(self):
        """As Peer.kept_mb, in bytes."""
        return self.most * self.image_bytes


class Preprocessed:
    """Images (n, H, W, 3), of which those that a slice asks for are preprocessed."""

    def __init__(self, x, device):
        self.x = x
        self.device = device

    def __getitem__(self, part):
        return preprocess(self.x[part], self.device).contiguous()


def stored_bytes(config):
    """Bytes of an image as it would be kept: CIFAR's have 32 x 32 pixels, which are stretched anew."""
    side = 32 if config.dataset.startswith("cifar") else config.image_size
    return 3 * side * side
