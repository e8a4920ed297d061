"""--predict: what a run says of photos, without the images and weights that it was made with."""
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import ar1star_lat_replay as program
from data_loader import lock
from harness import predict
from harness.config import load_config
from tiny import all_files, said, words
from utils import preprocess


@pytest.fixture(scope="module")
def asking(params, tmp_path_factory):
    """The command line that asks a run of two batches, whose images are gone; and the run's folder."""
    top = tmp_path_factory.mktemp("asked")
    shutil.copytree(params.with_name("images"), top / "images")
    command = words(params, top / "logs")[:-2]
    assert program.main([*command, "--max-batches", "2", "--data", str(top / "images")]) == 0
    shutil.rmtree(top / "images")
    return [*command, "--predict"], top / "logs" / "tiny" / "run0_seed0"


@pytest.fixture
def photos(tmp_path):
    """A folder of images of the size that was learned; its files in natural order."""
    names = ["2.png", "10.PNG", "album/1.png", "album/more/x.bmp", "z.png"]
    rng = np.random.default_rng(5)
    for name in (*names, "._2.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).save(tmp_path / "photos" / name)
    (tmp_path / "photos/notes.txt").write_text("no image")
    (tmp_path / "photos/album/round").symlink_to(tmp_path / "photos")
    return [str(tmp_path / "photos" / name) for name in names]


def test_each_image_gets_its_likeliest_classes(asking, params, photos, tmp_path, capfd):
    """Those of the checkpoint's network in evaluation mode; the run may be going on, and is not touched."""
    command, run = asking
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    net = program.build_net(load_config("tiny", params), 3)
    net.load_state_dict(state["net"])
    images = np.stack([np.array(Image.open(photo)) for photo in photos])
    with torch.no_grad():
        expected = net.eval()(preprocess(images)).softmax(1)

    before = {file: file.stat().st_mtime_ns for file in all_files(run)}
    with lock(run / "run.lock"):
        before[run / "run.lock"] = (run / "run.lock").stat().st_mtime_ns
        capfd.readouterr()
        assert program.main([*command, str(tmp_path / "photos"), photos[0], "--json"]) == 0
    assert {file: file.stat().st_mtime_ns for file in all_files(run)} == before

    told = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [image["image"] for image in told] == [*photos, photos[0]]
    for image, probabilities in zip(told, [*expected, expected[0]]):
        found = [(told["class"], told["probability"]) for told in image["classes"]]
        best = sorted(zip("abc", probabilities.tolist()), key=lambda pair: -pair[1])
        assert [name for name, _ in found] == [name for name, _ in best]
        assert [p for _, p in found] == pytest.approx([p for _, p in best], abs=1e-5)

    assert program.main([*command, photos[0]]) == 0
    shown = ", ".join(f"{c['class']} {c['probability']:.1%}" for c in told[0]["classes"])
    assert capfd.readouterr().out == f"{photos[0]}: {shown}\n"


def test_what_cannot_be_read_is_told_and_the_others_go_on(asking, photos, tmp_path, capfd, monkeypatch):
    """Few images at a time, so that any number takes little memory."""
    sizes = []
    scores = program.Learner.scores
    monkeypatch.setattr(program.Learner, "scores",
                        lambda learner, images: sizes.append(len(images)) or scores(learner, images))
    monkeypatch.setattr(predict, "CHUNK", 2)
    Path(photos[1]).write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    capfd.readouterr()
    asked = [str(tmp_path / "nothing.jpg"), str(tmp_path / "empty"), str(tmp_path / "photos")]
    assert program.main([*asking[0], *asked]) == 1
    out, error = capfd.readouterr()
    assert [line.split(": ")[0] for line in out.splitlines()] == [photos[0], *photos[2:]]
    assert "Traceback" not in error and error.count("\n") == 3
    assert all(path in error for path in (*asked[:2], photos[1]))
    assert max(sizes) == 2 and sum(sizes) == 4


def test_classes_never_met_are_left_out_and_the_order_is_that_of_the_scores():
    """Class 1 was never met; of the others' probabilities all but one round to 0."""
    scores = torch.tensor([[-3e4, 9e4, -1e4, -2e4, 0.0], [-1e4, 9e4, -3e4, 0.0, -2e4]])
    learner = SimpleNamespace(head=SimpleNamespace(past_j=torch.tensor([4, 0, 1, 7, 2])), class_names=None,
                              scores=lambda images: scores)
    assert predict.likeliest(learner, None) == [[(4, 1.0), (2, 0.0), (3, 0.0)],
                                                 [(3, 1.0), (0, 0.0), (4, 0.0)]]
    learner.head.past_j = torch.tensor([4, 0, 0, 0, 0])
    learner.class_names = ["ant", "bee", "cow", "dog", "eel"]
    assert predict.likeliest(learner, None) == [[("ant", 1.0)]] * 2


def test_where_nothing_was_learned_the_command_to_run_first_is_told(params, photos, tmp_path, capfd):
    """And the same question is answered afterwards. Of a section of CORe50, on own images."""
    method = ["--set=method=slda", "--set=rm_sz=0", "--set=width=0.1", "--set=latent_layer_num=pool6"]
    question = ["--config", str(params), "--as", "my own", "--seed", "3", "--weights", "none", *method,
                "--log-dir", str(tmp_path / "my logs"), "--data", str(params.with_name("images"))]
    message = said(capfd, 2, [*question, "--predict", photos[0]], "learned", "first")
    assert not (tmp_path / "my logs").exists()
    python, file, *first = shlex.split(message.split("`")[1])
    assert (python, file) == ("python", "ar1star_lat_replay.py")
    for batches in ("1", "2"):      # it goes on, too
        assert program.main([*first, "--max-batches", batches]) == 0
    run = tmp_path / "my logs/my own/run0_seed3"
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["dataset"], settings["test_stride"]) == ("folder", 1)
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [row["n_test"] for row in rows] == [24, 24]
    capfd.readouterr()
    assert program.main([*question, "--predict", photos[0]]) == 0
    assert sorted(part.split()[0] for part in capfd.readouterr().out.split(": ")[1].split(", ")) == [*"abc"]
