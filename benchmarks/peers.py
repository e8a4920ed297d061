"""Other programs of the same method on our images, for `benchmarks/speed.py --against DIR`.

    python benchmarks/speed.py --against ar1-pytorch    a clone of the published PyTorch program
    python benchmarks/speed.py --against avalanche      Avalanche's AR1, where that is installed

Each is a function, a generator, that builds its model with our weights and runs its training loop on the batches that it is
sent: `x, y = yield accuracy` takes a batch, the `yield` after it says that the batch is learned, and the test follows. Their
code is imported from where it is. What the published script does around its functions is written here, without its curves
and its copying of the memory row by row, which leaves it a little faster than it is. Nothing is downloaded.
"""
import importlib.util
import sys
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch.nn import CrossEntropyLoss

from utils import preprocess

ROOT = Path(__file__).resolve().parents[1]
OF_PUBLISHED = {"models.mobilenet": ["MyMobilenetV1"],
                "utils": ["replace_bn_with_brn", "change_brn_pars", "freeze_up_to", "reset_weights", "consolidate_weights",
                          "set_consolidate_weights", "examples_per_class", "preprocess_imgs", "pad_data",
                          "shuffle_in_unison", "get_accuracy"]}


class PeerError(Exception):
    """A program that is not there, or is not the one known here."""


def find_peer(where):
    """The function below that runs the program in a folder, or the one installed under that name."""
    folder = Path(where)
    if all((folder / f"{name.replace('.', '/')}.py").is_file() for name in OF_PUBLISHED):
        return published
    if (folder / "avalanche" / "__init__.py").is_file() or where == "avalanche" and importlib.util.find_spec(where):
        return avalanche
    raise PeerError(f"{where} holds no program that is known here: --against takes a clone of the published PyTorch program "
                    "(with utils.py and models/mobilenet.py), a clone of Avalanche, or the word avalanche where it is "
                    "installed (pip install avalanche-lib==0.6.0)")


@contextmanager
def importing_from(folder, names):
    """Imports from `folder` inside, though modules of ours have the same names; ours are back afterwards."""
    tops = {name.split(".")[0] for name in names}
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in tops}
    path = list(sys.path)
    sys.path[:] = [str(folder), *(place for place in path if Path(place).resolve() != ROOT)]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        for name in [name for name in sys.modules if name.split(".")[0] in tops]:
            del sys.modules[name]
        sys.modules.update(ours)


@torch.no_grad()
def start_with(blocks, layers):
    """Gives a peer's blocks, each with `conv` and `bn`, the weights of our layers; its last block, the mean, has none."""
    for block, (conv, brn, _) in zip([b for b in blocks if hasattr(b, "bn")], layers):
        block.conv.weight.copy_(conv.weight)
        for mine, theirs in ((brn.weight, block.bn.weight), (brn.bias, block.bn.bias),
                             (brn.running_mean, block.bn.running_mean)):
            theirs.copy_(mine)
        block.bn.running_var.copy_(brn.running_std.square() - block.bn.eps)


def published(where, c, device, layers, number, test_x, test_y):
    """The PyTorch program published with arXiv 1912.01100. c: the Config; number: of the latent layer."""
    with importing_from(where, OF_PUBLISHED):
        mobilenet, utils = (importlib.import_module(name) for name in OF_PUBLISHED)
    for module, (name, wanted) in zip((mobilenet, utils), OF_PUBLISHED.items()):
        if missing := [function for function in wanted if not hasattr(module, function)]:
            raise PeerError(f"{where} is not the published PyTorch program as it is known here: {name} has no "
                            f"{', '.join(missing)}")
    model = mobilenet.MyMobilenetV1(pretrained=False, latent_layer_num=number)
    start_with([*model.lat_features, *model.end_features], layers)
    utils.replace_bn_with_brn(model, momentum=c.init_update_rate, r_d_max_inc_step=c.inc_step, max_r_max=c.max_r_max,
                              max_d_max=c.max_d_max)
    model.to(device)
    model.saved_weights, model.past_j, model.cur_j = {}, dict.fromkeys(range(50), 0), dict.fromkeys(range(50), 0)
    criterion, accuracy, memory = CrossEntropyLoss(), None, None
    np.random.seed(c.seed)
    for i in count():
        x, y = yield accuracy
        x, y = utils.preprocess_imgs(x.astype(np.float32)), np.array(y)
        utils.freeze_up_to(model, f"lat_features.{number}.bn.beta", only_conv=False)
        if i == 1:
            utils.change_brn_pars(model, momentum=c.inc_update_rate, r_d_max_inc_step=0, r_max=c.max_r_max,
                                  d_max=c.max_d_max)
        if i < 2:
            optimizer = torch.optim.SGD(model.parameters(), lr=c.inc_lr if i else c.init_lr, momentum=c.momentum,
                                        weight_decay=c.l2)
        all_y = [*y.tolist(), *(memory[1].tolist() if memory else [])]
        model.cur_j = utils.examples_per_class(all_y)
        model.train()
        model.lat_features.eval()
        utils.reset_weights(model, sorted(set(all_y)))
        if memory is None:
            (x, y), _ = utils.pad_data([x, y], c.mb_size)
        utils.shuffle_in_unison([x, y], in_place=True)
        x, y = torch.from_numpy(x).float(), torch.from_numpy(y)
        share = len(y) // ((len(y) + c.rm_sz) // c.mb_size) if memory else c.mb_size
        latents = train(model, optimizer, criterion, x, y, memory, share, c.mb_size - share,
                        c.inc_train_ep if i else c.init_train_ep, device)
        utils.consolidate_weights(model, sorted(set(all_y)))
        h = min(c.rm_sz // (i + 1), len(latents))
        chosen = np.random.choice(len(latents), h, replace=False)
        if memory is None:
            memory = latents[chosen], y[chosen]
        else:
            replaced = np.random.choice(len(memory[1]), h, replace=False)
            memory[0][replaced], memory[1][replaced] = latents[chosen], y[chosen]
        utils.set_consolidate_weights(model)
        yield
        _, accuracy, _ = utils.get_accuracy(model, criterion, c.mb_size, test_x.astype(np.float32), test_y,
                                            use_cuda=device.type == "cuda", preproc=utils.preprocess_imgs)
        for label, n in model.cur_j.items():
            model.past_j[label] += n


def train(model, optimizer, criterion, x, y, memory, share, replayed, epochs, device):
    """The published program's epochs over one batch: images are encoded in each. Returns the latents of the first, on the
    CPU."""
    kept, correct = [], 0
    for epoch in range(epochs):
        for t in range(len(y) // share):
            new, old = slice(t * share, (t + 1) * share), slice(t * replayed, (t + 1) * replayed)
            optimizer.zero_grad()
            target = (torch.cat((y[new], memory[1][old])) if memory else y[new]).to(device)
            scores, latents = model(x[new].to(device), latent_input=memory[0][old].to(device) if memory else None,
                                    return_lat_acts=True)
            if epoch == 0:
                kept.append(latents.detach().cpu())
            correct += (scores.max(1)[1] == target).sum()
            loss = criterion(scores, target)
            loss.item()
            loss.backward()
            optimizer.step()
            correct.item()
    return torch.cat(kept)


class Images(torch.utils.data.Dataset):
    """Images (n, H, W, 3) and their labels as a data set that normalizes one image at a time."""

    def __init__(self, x, y):
        self.x, self.targets = x, y.tolist()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        return preprocess(self.x[k:k + 1])[0], self.targets[k]


def avalanche(where, c, device, layers, number, test_x, test_y):
    """Avalanche's AR1, written for version 0.6.0. The arguments are those of `published`."""
    if Path(where).is_dir():
        sys.path.insert(0, str(Path(where).resolve()))
    try:
        from avalanche.benchmarks import dataset_benchmark
        from avalanche.evaluation.metrics import accuracy_metrics
        from avalanche.training.plugins import EvaluationPlugin
        from avalanche.training.supervised import ar1
    except ImportError as error:
        raise PeerError(f"Avalanche's AR1 of version 0.6.0 cannot be imported ({error})") from error
    network = ar1.MobilenetV1

    def without_download(pretrained, latent_layer_num):
        net = network(pretrained=False, latent_layer_num=latent_layer_num)
        start_with([*net.lat_features, *net.end_features], layers)
        return net

    test = Images(test_x, test_y)
    with patch.object(ar1, "MobilenetV1", without_download):
        strategy = ar1.AR1(lr=c.init_lr, inc_lr=c.inc_lr, momentum=c.momentum, l2=c.l2, init_update_rate=c.init_update_rate,
                           inc_update_rate=c.inc_update_rate, max_r_max=c.max_r_max, max_d_max=c.max_d_max,
                           inc_step=c.inc_step, rm_sz=c.rm_sz, freeze_below_layer=f"lat_features.{number}.bn",
                           latent_layer_num=number, train_mb_size=c.mb_size, eval_mb_size=c.mb_size, device=device,
                           evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]))
    accuracy = None
    for i in count():
        x, y = yield accuracy
        strategy.train_epochs = c.inc_train_ep if i else c.init_train_ep
        batch = dataset_benchmark([Images(x, y)], [test])
        strategy.train(batch.train_stream)
        yield
        accuracy, = strategy.eval(batch.test_stream).values()
