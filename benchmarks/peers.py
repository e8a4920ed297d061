"""Other programs of the same method on our images, for `benchmarks/speed.py --against DIR`.

    python benchmarks/speed.py --against ar1-pytorch    a clone of the published PyTorch program
    python benchmarks/speed.py --against avalanche      Avalanche's AR1, where that is installed

Their code is imported from where it is; each starts with our weights. What the published script does around
its functions is written here, without its curves and its copying of the memory row by row, which leaves it a
little faster than it is. Nothing is downloaded.
"""
import importlib
import importlib.util
import io
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch.nn import CrossEntropyLoss
from torch.utils.data import Dataset

from harness.encoder import Clock, set_up_kernels
from utils import preprocess

ROOT = Path(__file__).resolve().parents[1]


class PeerError(Exception):
    """A program that is not there, or is not the one known here."""
    exit_status = 2


class Peer:
    """A program of others at work, to be called as speed.Literal is. Raises PeerError where it fails.

    where: the folder of a clone, or "avalanche"; net: ours, whose weights it starts with; test_x, test_y:
    arrays, uint8 (n, H, W, 3) and int64 (n,).
    """

    def __init__(self, where, config, net, test_x, test_y, device):
        self.name = Path(where).resolve().name
        self.device = device
        self.clock = Clock(device)
        self.program = self._quietly(find_peer(where), where, config, net, test_x, test_y, device)

    def set_up(self):
        """As PyTorch is by default: float32, but TF32 in the convolutions of a GPU."""
        set_up_kernels(False, "high" if self.device.type == "cuda" else "highest")

    def learn(self, x, y):
        """Learns a batch: uint8 (n, H, W, 3), int64 (n,)."""
        self._quietly(self.program.learn, x, y)
        self.clock.lap("train")

    def test(self):
        """Accuracy on the test images, 0..1."""
        return self._quietly(self.program.test)

    def _quietly(self, work, *args):
        try:
            with redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return work(*args)
        except Exception as error:      # whatever the code of others raises
            told = " ".join(str(error).split())
            raise PeerError(f"{self.name} is not the program that is known here, or not its version: it "
                            f"ended with {type(error).__name__} ({told:.200})") from error


def find_peer(where):
    """The class below that runs the program in a folder, or the one installed under that name."""
    folder = Path(where)
    if (folder / "utils.py").is_file() and (folder / "models" / "mobilenet.py").is_file():
        return Published
    installed = where == "avalanche" and importlib.util.find_spec(where)
    if installed or (folder / "avalanche" / "__init__.py").is_file():
        return Avalanche
    raise PeerError(
        f"{where} holds no program that is known here: --against takes a clone of the published PyTorch "
        "program (with utils.py and models/mobilenet.py), a clone of Avalanche, or the word avalanche where "
        "it is installed (pip install avalanche-lib==0.6.0)")


@torch.no_grad()
def start_with(blocks, layers):
    """Gives a peer's blocks, those with `conv` and `bn`, the weights of our layers."""
    with_weights = [block for block in blocks if hasattr(block, "bn")]
    for block, (conv, brn, _) in zip(with_weights, layers):
        block.conv.weight.copy_(conv.weight)
        block.bn.weight.copy_(brn.weight)
        block.bn.bias.copy_(brn.bias)
        block.bn.running_mean.copy_(brn.running_mean)
        block.bn.running_var.copy_(brn.running_std.square() - block.bn.eps)


# ---- the PyTorch program published with arXiv 1912.01100 ----

@contextmanager
def importing_from(folder):
    """Imports `utils` and `models` from a folder inside, instead of ours, which are back afterwards."""

    def take_out():
        names = [name for name in sys.modules if name.partition(".")[0] in ("utils", "models")]
        return {name: sys.modules.pop(name) for name in names}

    ours = take_out()
    path = list(sys.path)
    sys.path[:] = [str(folder), *(place for place in path if Path(place).resolve() != ROOT)]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        take_out()
        sys.modules.update(ours)


class Published:
    """The published program: its functions, called as its script calls them."""

    def __init__(self, where, config, net, test_x, test_y, device):
        with importing_from(where):
            mobilenet = importlib.import_module("models.mobilenet")
            self.utils = importlib.import_module("utils")
        self.config = c = config
        self.device = device
        self.test_x = test_x.astype(np.float32)
        self.test_y = test_y
        self.batches = 0
        self.memory = None      # (latents, labels), on the CPU
        self.criterion = CrossEntropyLoss()

        number = net.layer_number(c.latent_layer_num)
        self.last_frozen = f"lat_features.{number}.bn.beta"
        self.model = model = mobilenet.MyMobilenetV1(pretrained=False, latent_layer_num=number)
        start_with([*model.lat_features, *model.end_features], net.layers)
        self.utils.replace_bn_with_brn(model, momentum=c.init_update_rate, r_d_max_inc_step=c.inc_step,
                                       max_r_max=c.max_r_max, max_d_max=c.max_d_max)
        model.to(device)
        model.saved_weights = {}
        model.past_j = dict.fromkeys(range(50), 0)
        model.cur_j = dict.fromkeys(range(50), 0)
        np.random.seed(c.seed)

    def learn(self, x, y):
        """Learns a batch: uint8 (n, H, W, 3), int64 (n,)."""
        c = self.config
        utils = self.utils
        model = self.model
        x = utils.preprocess_imgs(x.astype(np.float32))
        y = np.array(y)
        utils.freeze_up_to(model, self.last_frozen, only_conv=False)
        if self.batches == 1:
            utils.change_brn_pars(model, momentum=c.inc_update_rate, r_d_max_inc_step=0, r_max=c.max_r_max,
                                  d_max=c.max_d_max)
        if self.batches < 2:
            lr = c.inc_lr if self.batches else c.init_lr
            self.optimizer = torch.optim.SGD(model.parameters(), lr, c.momentum, weight_decay=c.l2)

        replayed_y = self.memory[1].tolist() if self.memory else []
        all_y = [*y.tolist(), *replayed_y]
        model.cur_j = utils.examples_per_class(all_y)
        model.train()
        model.lat_features.eval()
        utils.reset_weights(model, sorted(set(all_y)))
        if self.memory is None:
            (x, y), _ = utils.pad_data([x, y], c.mb_size)
        utils.shuffle_in_unison([x, y], in_place=True)
        x = torch.from_numpy(x).float()
        y = torch.from_numpy(y)

        latents = self._train(x, y)
        utils.consolidate_weights(model, sorted(set(all_y)))
        self._remember(latents, y)
        utils.set_consolidate_weights(model)
        self.batches += 1

    def _train(self, x, y):
        """The epochs, each of which encodes the images. Returns the latents of the first, on the CPU."""
        c = self.config
        share = c.mb_size       # of the new images in a mini-batch
        if self.memory:
            share = len(y) // ((len(y) + c.rm_sz) // c.mb_size)
        replayed = c.mb_size - share
        kept = []
        for epoch in range(c.inc_train_ep if self.batches else c.init_train_ep):
            for t in range(len(y) // share):
                new = slice(t * share, (t + 1) * share)
                old = slice(t * replayed, (t + 1) * replayed)
                latents = self._step(x[new], y[new], old)
                if epoch == 0:
                    kept.append(latents.detach().cpu())
        return torch.cat(kept)

    def _step(self, x, y, old):
        """One step; old: the slice of the memory that is replayed. Returns the latents of the images."""
        self.optimizer.zero_grad()
        replayed = None
        if self.memory:
            replayed = self.memory[0][old].to(self.device)
            y = torch.cat((y, self.memory[1][old]))
        y = y.to(self.device)
        scores, latents = self.model(x.to(self.device), latent_input=replayed, return_lat_acts=True)
        loss = self.criterion(scores, y)
        loss.item()         # for the script's log, which waits for a GPU
        loss.backward()
        self.optimizer.step()
        return latents

    def _remember(self, latents, y):
        h = min(self.config.rm_sz // (self.batches + 1), len(latents))
        chosen = np.random.choice(len(latents), h, replace=False)
        if self.memory is None:
            self.memory = latents[chosen], y[chosen]
        else:
            replaced = np.random.choice(len(self.memory[1]), h, replace=False)
            self.memory[0][replaced] = latents[chosen]
            self.memory[1][replaced] = y[chosen]

    def test(self):
        """Accuracy on the test images, 0..1; as in the script, counts of classes are added up behind it."""
        _, accuracy, _ = self.utils.get_accuracy(
            self.model, self.criterion, self.config.mb_size, self.test_x, self.test_y,
            use_cuda=self.device.type == "cuda", preproc=self.utils.preprocess_imgs)
        for label, n in self.model.cur_j.items():
            self.model.past_j[label] += n
        return accuracy


# ---- Avalanche ----

class Images(Dataset):
    """Images (n, H, W, 3) and their labels as a data set that normalizes one image at a time."""

    def __init__(self, x, y):
        self.x = x
        self.targets = y.tolist()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        return preprocess(self.x[k:k + 1])[0], self.targets[k]


class Avalanche:
    """Avalanche's AR1, of version 0.6.0."""

    def __init__(self, where, config, net, test_x, test_y, device):
        if Path(where).is_dir():
            sys.path.insert(0, str(Path(where).resolve()))
        from avalanche.benchmarks import dataset_benchmark
        from avalanche.evaluation.metrics import accuracy_metrics
        from avalanche.training.plugins import EvaluationPlugin
        from avalanche.training.supervised import ar1

        self.config = c = config
        self.make_benchmark = dataset_benchmark
        self.test_images = Images(test_x, test_y)
        self.batches = 0
        number = net.layer_number(c.latent_layer_num)
        network_class = ar1.MobilenetV1

        def without_download(pretrained, latent_layer_num):
            network = network_class(pretrained=False, latent_layer_num=latent_layer_num)
            start_with([*network.lat_features, *network.end_features], net.layers)
            return network

        with patch.object(ar1, "MobilenetV1", without_download):
            self.strategy = ar1.AR1(
                lr=c.init_lr, inc_lr=c.inc_lr, momentum=c.momentum, l2=c.l2,
                init_update_rate=c.init_update_rate, inc_update_rate=c.inc_update_rate,
                max_r_max=c.max_r_max, max_d_max=c.max_d_max, inc_step=c.inc_step, rm_sz=c.rm_sz,
                freeze_below_layer=f"lat_features.{number}.bn", latent_layer_num=number,
                train_mb_size=c.mb_size, eval_mb_size=c.mb_size, device=device,
                evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]))

    def learn(self, x, y):
        """Learns a batch: uint8 (n, H, W, 3), int64 (n,)."""
        self.strategy.train_epochs = self.config.inc_train_ep if self.batches else self.config.init_train_ep
        self.benchmark = self.make_benchmark([Images(x, y)], [self.test_images])
        self.strategy.train(self.benchmark.train_stream)
        self.batches += 1

    def test(self):
        """Accuracy on the test images, 0..1."""
        accuracy, = self.strategy.eval(self.benchmark.test_stream).values()
        return accuracy
