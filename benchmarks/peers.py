"""Other programs on our images: how well they learn here, how fast in `benchmarks/speed.py --against DIR`.

    python benchmarks/peers.py cifar100_pool6 ours ar1-pytorch avalanche avalanche_slda er --data cifar100
    python benchmarks/peers.py cifar100_pool6 er --data cifar100 --set units=4 --batches 100 --set inc_lr=0.03

ours is the section itself; ar1-pytorch a clone of the published PyTorch program; avalanche and avalanche_slda
are Avalanche's AR1 and StreamingLDA, where that is installed; er is experience_replay.py at the section's
inc_lr, with as many bytes of images as the section has of latents. All learn the section's batches, from its
weights on, and are tested on every --test-stride-th test image after every --every-th batch and the last.

Code of others is imported from where it is. What the published script does around its functions is written
here, without its curves and its copying of the memory row by row, which leaves it a little faster than it is.
With --keep-latents frozen layers encode an image once, whoever asks: the results are the same, the seconds
less. Nothing is downloaded but weights.
"""
import argparse
import hashlib
import importlib
import importlib.util
import io
import sys
import time
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.nn import CrossEntropyLoss
from torch.utils.data import Dataset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ar1star_lat_replay import build_learner, build_net, check_layers, open_stream
from experience_replay import ExperienceReplay
from harness.cli import add_settings, overrides
from harness.config import ConfigError, load_config
from harness.console import errors_as_sentences, say
from harness.encoder import Clock, TestSet, pick_device, set_up_kernels
from harness.records import kept_mb
from methods.slda import Pooled
from models.batch_renorm import fold_brn
from utils import preprocess


class PeerError(Exception):
    """A program that is not there, or is not the one known here."""
    exit_status = 2


class Peer:
    """A program of others at work, to be called as speed.Literal is. Raises PeerError where it fails.

    where: the folder of a clone, or a name as find_peer knows them; net: ours, whose weights it starts with;
    test_x, test_y: arrays, uint8 (n, H, W, 3) and int64 (n,); keep: frozen layers encode an image once.
    """

    def __init__(self, where, config, net, test_x, test_y, device, keep=False):
        self.name = Path(where).resolve().name
        self.device = device
        self.clock = Clock(device)
        self.program = self._quietly(find_peer(where), where, config, net, test_x, test_y, device)
        layers = getattr(self.program, "encoding", None)
        if keep and layers is not None:
            remember_latents(layers)

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

    def kept_mb(self):
        """MB (10^6 bytes) that it keeps of what it has learned, its network not counted."""
        return self.program.kept_bytes() / 1e6

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
    """The class below that runs the program in a folder, or the one of that name."""
    if where == "ours":
        return Ours
    if where == "er":
        return ExperienceReplay
    folder = Path(where)
    if (folder / "utils.py").is_file() and (folder / "models" / "mobilenet.py").is_file():
        return Published
    installed = where in ("avalanche", "avalanche_slda") and importlib.util.find_spec("avalanche")
    if installed and where == "avalanche_slda":
        return AvalancheSLDA
    if installed or (folder / "avalanche" / "__init__.py").is_file():
        return Avalanche
    raise PeerError(
        f"{where} holds no program that is known here: name a clone of the published PyTorch program (with "
        "utils.py and models/mobilenet.py), a clone of Avalanche, or, where that is installed (pip install "
        "avalanche-lib==0.6.0), the word avalanche or avalanche_slda")


def remember_latents(layers):
    """Has frozen layers keep what they make of an image, for the next time that it comes.

    Images are told apart by every fourth pixel.
    """
    forward = layers.forward
    kept = {}

    def remembered(x):
        if torch.is_grad_enabled() and any(p.requires_grad for p in layers.parameters()):
            return forward(x)       # they learn
        seen = x.detach()[..., ::4, ::4].cpu().contiguous().numpy()
        names = [hashlib.blake2b(image.data, digest_size=16).digest() for image in seen]
        new = [k for k, name in enumerate(names) if name not in kept]
        if new:
            with torch.no_grad():
                kept.update(zip([names[k] for k in new], forward(x[new]).cpu().clone(), strict=True))
        return torch.stack([kept[name] for name in names]).to(x.device)

    layers.forward = remembered


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


class Ours:
    """This repository's program."""

    def __init__(self, where, config, net, test_x, test_y, device):
        self.learner = build_learner(config, net.output.out_features, test_x.shape[1:3], device)
        self.test_set = TestSet(test_x, test_y)

    def learn(self, x, y):
        """Learns a batch: uint8 (n, H, W, 3), int64 (n,)."""
        self.learner.learn(x, y)

    def test(self):
        """Accuracy on the test images, 0..1."""
        return self.test_set.evaluate(self.learner)["accuracy"]

    def kept_bytes(self):
        """As Peer.kept_mb, in bytes."""
        return 1e6 * kept_mb(self.learner)


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


def classes_to_consolidate(y, replayed_y):
    """What the published script consolidates in turn: each class of the new images, and that of each pattern.

    The script makes a set of the memory's labels, but they are tensors, so equal ones all stay in it.
    y: int64 array (n,) of the new images; replayed_y: int64 tensor (m,) of the memory. A list of numbers.
    """
    return [*sorted(set(y.tolist())), *replayed_y.tolist()]


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
        self.model = model = mobilenet.MyMobilenetV1(pretrained=False, latent_layer_num=number)
        classes = net.output.out_features       # it knows of CORe50's 50 alone
        model.output = nn.Linear(model.output.in_features, classes, bias=False)
        start_with([*model.lat_features, *model.end_features], net.layers)
        self.utils.replace_bn_with_brn(model, momentum=c.init_update_rate, r_d_max_inc_step=c.inc_step,
                                       max_r_max=c.max_r_max, max_d_max=c.max_d_max)
        model.to(device)
        self.encoding = model.lat_features
        last = [name for name, _ in model.named_parameters() if name.startswith("lat_features")][-1]
        self.last_frozen = last.rpartition(".")[0] + ".beta"
        model.saved_weights = {}
        model.past_j = dict.fromkeys(range(classes), 0)
        model.cur_j = dict.fromkeys(range(classes), 0)
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

        replayed_y = self.memory[1] if self.memory else torch.zeros(0, dtype=torch.int64)
        for label, n in model.cur_j.items():    # as the script does behind its test of each batch
            model.past_j[label] += n
        model.cur_j = dict.fromkeys(model.past_j, 0)
        for label in [*y.tolist(), *replayed_y.tolist()]:
            model.cur_j[label] += 1
        cur_class = classes_to_consolidate(y, replayed_y)
        model.train()
        model.lat_features.eval()
        utils.reset_weights(model, cur_class)
        if self.memory is None:
            (x, y), _ = utils.pad_data([x, y], c.mb_size)
        utils.shuffle_in_unison([x, y], in_place=True)
        x = torch.from_numpy(x).float()
        y = torch.from_numpy(y)

        latents = self._train(x, y)
        utils.consolidate_weights(model, cur_class)
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
        """Accuracy on the test images, 0..1."""
        _, accuracy, _ = self.utils.get_accuracy(
            self.model, self.criterion, self.config.mb_size, self.test_x, self.test_y,
            use_cuda=self.device.type == "cuda", preproc=self.utils.preprocess_imgs)
        return accuracy

    def kept_bytes(self):
        """As Peer.kept_mb, in bytes."""
        return self.memory[0].nbytes


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
        learns = "output" if number == len(net.layers) - 1 else f"lat_features.{number}.bn"
        network_class = ar1.MobilenetV1

        def without_download(pretrained, latent_layer_num):
            network = network_class(pretrained=False, latent_layer_num=latent_layer_num)
            start_with([*network.lat_features, *network.end_features], net.layers)
            network.output = nn.Linear(network.output.in_features, net.output.out_features, bias=False)
            return network

        with patch.object(ar1, "MobilenetV1", without_download):
            self.strategy = ar1.AR1(
                lr=c.init_lr, inc_lr=c.inc_lr, momentum=c.momentum, l2=c.l2,
                init_update_rate=c.init_update_rate, inc_update_rate=c.inc_update_rate,
                max_r_max=c.max_r_max, max_d_max=c.max_d_max, inc_step=c.inc_step, rm_sz=c.rm_sz,
                freeze_below_layer=learns, latent_layer_num=number,
                train_mb_size=c.mb_size, eval_mb_size=c.mb_size, device=device,
                evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]))
        self.encoding = self.strategy.model.lat_features

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

    def kept_bytes(self):
        """As Peer.kept_mb, in bytes."""
        return self.strategy.rm[0].nbytes


class AvalancheSLDA(Avalanche):
    """Avalanche's StreamingLDA, on the outputs that ours takes."""

    def __init__(self, where, config, net, test_x, test_y, device):
        from avalanche.benchmarks import dataset_benchmark
        from avalanche.evaluation.metrics import accuracy_metrics
        from avalanche.training.plugins import EvaluationPlugin
        from avalanche.training.supervised import StreamingLDA

        self.make_benchmark = dataset_benchmark
        self.test_images = Images(test_x, test_y)
        layers = fold_brn(net.lat_features)
        self.encoding = nn.Sequential(layers, Pooled(config.slda_root)).requires_grad_(False)
        self.strategy = StreamingLDA(
            slda_model=self.encoding, criterion=CrossEntropyLoss(), num_classes=net.output.out_features,
            input_size=net.example_latent(*test_x.shape[1:3]).shape[1], shrinkage_param=config.slda_shrinkage,
            train_mb_size=config.mb_size, eval_mb_size=config.mb_size, device=device,
            evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]))

    def learn(self, x, y):
        """Learns a batch: uint8 (n, H, W, 3), int64 (n,)."""
        self.benchmark = self.make_benchmark([Images(x, y)], [self.test_images])
        self.strategy.train(self.benchmark.train_stream)

    def kept_bytes(self):
        """As Peer.kept_mb, in bytes."""
        return self.strategy.muK.nbytes + self.strategy.cK.nbytes + self.strategy.Sigma.nbytes


# ---- how well they learn ----

def measure(where, config, args):
    """Has a program learn the stream; prints a row of the table."""
    device = pick_device(args.device)
    torch.manual_seed(config.seed)
    stream = open_stream(config)
    test = stream.get_test_set(args.test_stride)
    peer = Peer(where, config, build_net(config, stream.num_classes), *test, device, args.keep_latents)
    if where == "ours":
        set_up_kernels(True, config.matmul_precision)
    else:
        peer.set_up()

    batches = min(args.batches or len(stream), len(stream))
    accuracies = []
    seconds = 0.0
    for i, (x, y) in enumerate(stream, 1):
        began = time.perf_counter()
        peer.learn(x, y)
        seconds += time.perf_counter() - began
        if i % args.every == 0 or i == batches:
            accuracies.append(peer.test())
            say(f"{peer.name}: batch {i} of {batches}: accuracy {accuracies[-1]:.1%}, {seconds:.0f} s of "
                "learning")
        if i == batches:
            break
    mean = sum(accuracies) / len(accuracies)
    cells = [f"{100 * accuracies[-1]:.1f}", f"{100 * mean:.1f}", f"{peer.kept_mb():.1f}", f"{seconds:.0f}"]
    print(f"| {peer.name} | {' | '.join(cells)} |", flush=True)


def main(argv=None):
    """Returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("section", help="section of the configuration")
    add("programs", nargs="+", metavar="PROGRAM", help="ours, avalanche, avalanche_slda, er, or a folder")
    add("--batches", type=int, metavar="N", help="learn only so many")
    add("--every", type=int, default=1, metavar="N", help="test after every n-th batch (default 1)")
    add("--test-stride", type=int, default=5, metavar="N", help="test on every n-th test image (default 5)")
    add("--keep-latents", action="store_true", help="frozen layers encode an image once")
    add("--device", default="auto", metavar="auto|cpu|cuda[:n]")
    add_settings(parser)
    args = parser.parse_args(argv)
    with errors_as_sentences(parser.prog) as outcome:
        if min(args.batches or 1, args.every, args.test_stride) < 1:
            raise ConfigError("--batches, --every and --test-stride must be at least 1")
        config = load_config(args.section, args.config, overrides(args))
        check_layers(config)
        for where in args.programs:     # an unknown one is said before anything is learned
            find_peer(where)
        print("| program | at the end, % | mean of the tests, % | MB kept | seconds |\n|---|---|---|---|---|")
        for where in args.programs:
            measure(where, config, args)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
