"""Six tiny batches, each of them saved: the run into which the tests of the experiment inject their faults."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torchvision.io import write_png

import ar1star_lat_replay as program
from helpers import REPO

BATCHES = 6
TINY = {"dataset": "folder", "image_size": 48, "width": 0.1, "init_train_ep": 1, "inc_train_ep": 1, "rm_sz": 50,
        "mb_size": 32, "checkpoint_share": 1.0, "device": "cpu"}


@pytest.fixture(scope="session")
def params(tmp_path_factory):
    """A params.cfg with a section `tiny`: images of noise, in six batches of three classes."""
    folder, rng = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0)
    for part in (*(f"train/{i}" for i in range(BATCHES)), "test"):
        for label in "abc":
            (folder / "images" / part / label).mkdir(parents=True)
            for k in range(20 if part == "train/0" else 8):
                write_png(torch.from_numpy(rng.integers(0, 256, (3, 48, 48), np.uint8)),
                          str(folder / "images" / part / label / f"{k}.png"))
    sections = yaml.safe_load((REPO / "params.cfg").read_text(encoding="utf-8"))
    tiny = sections["demo"] | TINY | {"data": str(folder / "images")}
    (folder / "params.cfg").write_text(yaml.safe_dump({"DEFAULT": sections["DEFAULT"], "tiny": tiny}))
    return folder / "params.cfg"


@pytest.fixture
def command(params, tmp_path):
    """The arguments of the tiny experiment; its logs are in tmp_path/logs."""
    return ["--config", str(params), "--name", "tiny", "--log-dir", str(tmp_path / "logs"), "--max-batches", str(BATCHES)]


@pytest.fixture(scope="session")
def expected(params, tmp_path_factory):
    """Outcome of the tiny experiment that nothing disturbs."""
    logs = tmp_path_factory.mktemp("undisturbed")
    assert program.main(["--config", str(params), "--name", "tiny", "--log-dir", str(logs), "--max-batches",
                         str(BATCHES)]) == 0
    left = outcome(logs)
    assert train_steps(logs / "tiny" / "run0_seed0") == list(range(left[0][-1]["train_steps"]))
    return left


def said(capfd, status, argv, *parts):
    """Runs main(argv); its message, checked for status, being one line without a traceback, and containing the parts."""
    capfd.readouterr()
    assert program.main(argv) == status
    error = capfd.readouterr().err
    message = error.strip().splitlines()[-1]
    assert "Traceback" not in error and message.startswith("ar1star_lat_replay.py: "), error
    for part in parts:
        assert part in message, message
    return message


def outcome(logs, run="run0_seed0"):
    """What a run leaves: lines of results.jsonl without times and the given number of batches; the checkpoint's state."""
    folder = logs / "tiny" / run
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert lines == state["rows"]
    return [{k: v for k, v in line.items() if k != "batches" and not k.startswith("seconds")} for line in lines], \
           {k: v for k, v in state.items() if k not in ("rows", "files")}


def train_steps(folder):
    """The steps of the curve train_loss, over all TensorBoard files of a run."""
    return sorted(event.step for file in folder.glob("events.*") for event in EventFileLoader(str(file)).Load()
                  for value in event.summary.value if value.tag == "train_loss")


def some_batches(command, n=3):
    """Runs the first n batches; the checkpoint's file."""
    assert program.main([*command[:-1], str(n)]) == 0
    return Path(command[command.index("--log-dir") + 1]) / "tiny" / "run0_seed0" / "checkpoint.pt"


def before_learning(act):
    """A Learner.learn that first calls act(number of the batch)."""
    learn = program.Learner.learn

    def acting(learner, *batch):
        act(learner.batches)
        return learn(learner, *batch)
    return acting


def all_files(folder):
    """{path: content} of all files below a folder."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
