"""What several test files share."""
import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import traceback
from dataclasses import asdict, replace
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from harness.config import load_config
from models.batch_renorm import BatchRenorm2D
from models.mobilenet import MobileNetV1, published_prefixes

REPO = Path(__file__).resolve().parents[1]
PARAMS = REPO / "params.cfg"
STANDIN = REPO.parent / "shared" / "standin"


def forkserver():
    """What starts processes by forking one that has imported torch, and what they run, already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_kills", "test_readme"])       # counts before the first start alone
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{REPO}{os.pathsep}{REPO / 'tests'}", prepend=os.pathsep)
        ensure_running()
    return context


def run_script(words, folder=REPO, closed=(), encoding="utf-8"):
    """python FILE ..., or -c CODE ..., in a folder, in a forked process that imports our own modules anew.

    closed: which of descriptors 1 and 2 are; encoding: of what it prints. Returns (exit status, what it
    printed, its errors).
    """
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / name for name in ("out", "err")]
        process = forkserver().Process(target=_run_script, args=(words, folder, files, closed, encoding))
        process.start()
        process.join(240)
        process.kill()
        return process.exitcode, *(file.read_text(encoding="utf-8") for file in files)


def _run_script(words, folder, files, closed, encoding):
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        stream = None if number in closed else open(number, "w", encoding=encoding, closefd=False)
        setattr(sys, ("", "stdout", "stderr")[number], stream)
    for number in closed:
        os.close(number)
    for name, module in list(sys.modules.items()):      # so that they are imported from that folder
        if (getattr(module, "__file__", None) or "").startswith(str(REPO)):
            del sys.modules[name]

    torch.set_num_threads(1)
    os.chdir(folder)
    is_code = words[0] == "-c"
    place = folder if is_code else (folder / words[0]).parent
    sys.path[:] = [str(place), *(path for path in sys.path[1:] if str(REPO) not in path)]
    sys.argv = ["-c", *words[2:]] if is_code else words
    status = 0
    try:
        if is_code:
            exec(words[1], {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(status)


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


def make_run(experiment_folder, accuracies, run=0, seed=0, batches=None, n_test=100, name="DEFAULT",
             images="d", last=None, seconds=30.0, **settings):
    """Writes a run of len(accuracies) batches, so many seconds each.

    batches: None: as many as there are, False: not stored; images: what they are recognized by, None: not
    stored; last: {field: value} that the last row has, too; settings: even what load_config refuses.
    """
    config = asdict(replace(load_config(name, PARAMS), run=run, seed=seed)) | settings
    folder = Path(experiment_folder) / f"run{run}_seed{seed}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))

    of_each = {"seconds_read": 1.0, "seconds_train": seconds - 1, "device": "abacus", "n_test": n_test,
               "batches": batches or len(accuracies), "data": images}
    gone = ("batches", "device", "n_test", "data") if batches is False else () if images else ("data",)
    kept = {key: value for key, value in of_each.items() if key not in gone}
    rows = [{"batch": i, "test_accuracy": a} | kept for i, a in enumerate(accuracies)]
    rows[-1:] = [row | (last or {}) for row in rows[-1:]]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_weights(path, width=0.25):
    """Writes weights of MobileNetV1 in the published layout, drawn so that no layer enlarges or shrinks what
    goes through it."""
    net = MobileNetV1(1, "pool6", width=width)
    rng = seeded(0)
    state = {}
    for prefix, layer in zip(published_prefixes(), net.layers):
        conv = layer[0]
        _, channels, height, side = conv.weight.shape
        spread = (2 / (channels * height * side)) ** 0.5
        state[f"{prefix}.conv.weight"] = spread * torch.randn(conv.weight.shape, generator=rng)
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            state[f"{prefix}.bn.{name}"] = torch.full((len(conv.weight),), value)
    torch.save(state, path)
    return path
