"""Six tiny batches, each of them saved: the run into which tests of the experiment inject their faults."""
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torchvision.io import write_png

import ar1star_lat_replay as program
from helpers import REPO, same
from streams.demo import DemoStream

BATCHES = 6
SMALL = {"width": 0.1, "init_train_ep": 1, "inc_train_ep": 1, "rm_sz": 50, "mb_size": 32, "device": "cpu",
         "checkpoint_share": 1.0}
# the same for the demo, whose words are those of the command line
SMALL_DEMO = SMALL | {"test_stride": 20}
DEMO_WORDS = ["--name", "demo", *(f"--set={key}={value}" for key, value in SMALL_DEMO.items())]
NAIVE_WORDS = [*DEMO_WORDS, "--set=cwr_consolidation=none"]
NAIVE_WORDS[NAIVE_WORDS.index("--set=rm_sz=50")] = "--set=rm_sz=0"      # and nothing runs beside it
DRAWN = {}      # what the demo's streams have drawn in this process


@pytest.fixture(scope="module")
def drawn_once():
    """All runs of the demo share what is drawn, which takes longer than they do."""
    draw = DemoStream.draw

    def draw_once(self, *unit):
        key = (self.seed, *unit)
        if key not in DRAWN:
            DRAWN[key] = draw(self, *unit)
        return DRAWN[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DemoStream, "draw", draw_once)
        yield


@pytest.fixture(scope="session")
def params(tmp_path_factory):
    """A params.cfg with a section `tiny`: images of noise, in six batches of three classes."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for part in (*(f"train/{i}" for i in range(BATCHES)), "test"):
        for label in "abc":
            (folder / "images" / part / label).mkdir(parents=True)
            for k in range(20 if part == "train/0" else 8):
                noise = torch.from_numpy(rng.integers(0, 256, (3, 48, 48), np.uint8))
                write_png(noise, str(folder / "images" / part / label / f"{k}.png"))
    sections = yaml.safe_load((REPO / "params.cfg").read_text(encoding="utf-8"))
    own = {"dataset": "folder", "image_size": 48, "data": str(folder / "images")}
    tiny = sections["demo"] | SMALL | own
    (folder / "params.cfg").write_text(yaml.safe_dump({"DEFAULT": sections["DEFAULT"], "tiny": tiny}))
    return folder / "params.cfg"


def words(params, logs):
    """The command line of the tiny experiment; --max-batches and its number stand last."""
    return ["--config", str(params), "--name", "tiny", "--log-dir", str(logs), "--max-batches", str(BATCHES)]


@pytest.fixture
def command(params, tmp_path):
    """The arguments of the tiny experiment; its logs are in tmp_path/logs."""
    return words(params, tmp_path / "logs")


@pytest.fixture(scope="session")
def expected(params, tmp_path_factory):
    """Outcome of the tiny experiment that nothing disturbs."""
    logs = tmp_path_factory.mktemp("undisturbed")
    assert program.main(words(params, logs)) == 0
    left = outcome(logs)
    assert train_steps(logs / "tiny" / "run0_seed0") == list(range(left[0][-1]["train_steps"]))
    return left


@pytest.fixture
def ends_as_expected(command, expected, tmp_path):
    """ends_as_expected(): runs the rest of the tiny experiment, which must end as if nothing had happened."""
    def check():
        assert program.main(command) == 0
        assert same(outcome(tmp_path / "logs"), expected)
    return check


def said(capfd, status, argv, *parts):
    """Runs main(argv); its message, checked for status, being one line without a traceback, and the parts."""
    capfd.readouterr()
    assert program.main(argv) == status
    error = capfd.readouterr().err
    message = error.strip().splitlines()[-1]
    assert "Traceback" not in error and message.startswith("ar1star_lat_replay.py: "), error
    for part in parts:
        assert part in message, message
    return message


def saved(logs, run="run0_seed0"):
    """What the checkpoint of the tiny experiment holds."""
    return torch.load(logs / "tiny" / run / "checkpoint.pt", weights_only=True)


def without_seconds(rows):
    """What equal runs share of their records: not their times, nor how many batches each was asked for."""
    return [{k: v for k, v in row.items() if k != "batches" and not k.startswith("seconds")} for row in rows]


def outcome(logs, run="run0_seed0"):
    """What a run leaves: its records without_seconds, and the checkpoint's state."""
    lines = [json.loads(line) for line in (logs / "tiny" / run / "results.jsonl").read_text().splitlines()]
    state = saved(logs, run)
    assert lines == state["rows"]
    return without_seconds(lines), {k: v for k, v in state.items() if k not in ("rows", "files")}


def train_steps(folder):
    """The steps of the curve train_loss, over all TensorBoard files of a run."""
    return sorted(event.step for file in folder.glob("events.*")
                  for event in EventFileLoader(str(file)).Load()
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


class Terminal(io.StringIO):
    """Takes the place of a stderr that is a terminal."""
    encoding = "utf-8"
    isatty = lambda self: True
