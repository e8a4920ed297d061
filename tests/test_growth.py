"""Own images to which batches are added: the run goes on, and ends as if all had been there at the start."""
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.io import write_png

import ar1star_lat_replay as program
from harness.checkpoint import changed_batch
from helpers import REPO, same
from streams.folder import FolderStream
from test_kills import finished, start  # noqa: F401
from tiny import SMALL, all_files, outcome, said, saved, some_batches, without_seconds, words

# class "d" comes before "c"; "q" is in no batch
TRAIN = {"0": "ab", "1": "a", "2": "bd", "3": "ac", "4": "b", "5": "e"}
STAGES = {3: "abdq", 5: "abcdq", 6: "abcdeq"}       # batches there are: classes to test
METHODS = {
    "latent replay": {},
    "AR1*": {"reg_lambda": 100.0, "head_lr_mult": 2.0},
    "pool6": {"latent_layer_num": "pool6"},
    "codes with SLDA": {"rm_dtype": "pq", "pq_codes": 13, "slda_weight": 1.0, "slda_root": True},
    "SLDA": {"method": "slda", "latent_layer_num": "pool6", "rm_sz": 0},
    "fine-tuning": {"rm_sz": 0, "cwr_consolidation": "none"},
    "with biases": {"rm_sz": 0, "cwr_consolidation": "none", "follow": "bias"},
}
SECTION = SMALL | {"dataset": "folder", "image_size": 32, "rm_sz": 20, "mb_size": 16, "init_train_ep": 2}
OF_ALL = ("dataset", "image_size", "width", "device", "checkpoint_share")    # without training


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """All the batches, and the test images of all classes."""
    root = tmp_path_factory.mktemp("growing") / "images"
    rng = np.random.default_rng(0)
    folders = [f"train/{batch}/{name}" for batch, names in TRAIN.items() for name in names]
    for folder in [*folders, *(f"test/{name}" for name in STAGES[6])]:
        (root / folder).mkdir(parents=True)
        for k in range(8):
            noise = torch.from_numpy(rng.integers(0, 256, (3, 32, 32), np.uint8))
            noise[ord(folder[-1]) % 3] //= 4        # not noise alone
            write_png(noise, str(root / folder / f"{k}.png"))
    return root


def config_of(folder, settings):
    """A params.cfg in a folder, whose section `tiny` has these settings, and learns the folder's images."""
    sections = yaml.safe_load((REPO / "params.cfg").read_text(encoding="utf-8"))
    tiny = sections["demo"] | SECTION
    if "method" in settings:        # which has no training
        tiny = {key: SECTION[key] for key in OF_ALL} | {"weights": "none"}
    tiny |= {"data": str(folder / "images")} | settings
    file = folder / "params.cfg"
    file.write_text(yaml.safe_dump({"DEFAULT": sections["DEFAULT"], "tiny": tiny}))
    return file


def grow_to(images, root, n):
    """Makes root what it is when n batches have arrived."""
    shutil.rmtree(root, ignore_errors=True)
    for batch in list(TRAIN)[:n]:
        shutil.copytree(images / "train" / batch, root / "train" / batch)
    for name in STAGES[n]:
        shutil.copytree(images / "test" / name, root / "test" / name)


def learned(logs):
    """What a run knows at the end, its last test included."""
    rows, state = outcome(logs)
    return rows[-1], {key: value for key, value in state.items() if key != "config"}


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """whole(settings): the logs of a run to which all batches were there at the start; made once."""
    made = {}

    def once(settings):
        key = str(settings)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            grow_to(images, made[key] / "images", 6)
            assert program.main(words(config_of(made[key], settings), made[key])) == 0
        return made[key]
    return once


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_a_run_cut_in_three_by_the_arrival_of_data_ends_bit_equal(images, whole, tmp_path, capsys, settings):
    """And says both accuracies each time."""
    command = words(config_of(tmp_path, settings), tmp_path / "cut")
    for n in STAGES:
        grow_to(images, tmp_path / "images", n)
        capsys.readouterr()
        assert program.main(command) == 0
        rows = saved(tmp_path / "cut")["rows"]
        assert len(rows) == n
        last, told = rows[-1], capsys.readouterr().out
        assert f"on {last['n_test']} test images: {last['test_accuracy']:.2%}" in told
        assert f"{last['n_test_seen']} test images of the {last['classes_seen']} classes" in told
        assert f"{last['accuracy_seen']:.2%}" in told
    assert same(learned(tmp_path / "cut"), learned(whole(settings)))
    assert program.main(["--report", str(tmp_path / "cut")]) == 0
    assert f"{last['n_test']}" in capsys.readouterr().out

    state = saved(tmp_path / "cut")
    assert state["data"]["classes"] == ["a", "b", "d", "c", "e", "q"]
    assert len(state["net"]["output.weight"]) == len(state["head"]["past_j"]) == 5
    assert (state["head"]["past_j"] > 0).all()
    assert [row["classes_seen"] for row in rows] == [2, 2, 3, 4, 4, 5]
    assert [row["n_test"] for row in rows] == [32, 32, 32, 40, 40, 48]
    assert [row["n_test_seen"] for row in rows] == [16, 16, 24, 32, 32, 40]
    for row in rows:        # images of classes not met count as wrong
        right = row["accuracy_seen"] * row["n_test_seen"]
        assert row["test_accuracy"] == pytest.approx(right / row["n_test"])
        assert np.isfinite(row["test_loss"])

    learner = program.load_learner(tmp_path / "cut" / "tiny" / "run0_seed0", "cpu")
    x, y = FolderStream(tmp_path / "images", 32).get_test_set()
    assert (learner.predict(x).numpy() == y).mean() == pytest.approx(rows[-1]["test_accuracy"])


# ---- what may have changed ----

@settings(max_examples=60)
@given(contents=st.lists(st.integers(0, 3), min_size=1, max_size=6), learned=st.integers(0, 6),
       change=st.sampled_from(["none", "append", "insert", "remove", "change"]), place=st.integers(0, 6))
def test_only_what_is_as_it_was_and_stands_in_front_goes_on(contents, learned, change, place):
    """Batches with contents that may be the same, against a comparison of lists."""
    then = [[f"{2 * k}", content] for k, content in enumerate(contents)]
    learned = min(learned, len(then))
    place = min(place, len(then) - 1)
    now = [list(batch) for batch in then]
    named = None
    if change == "append":
        now += [["98", 0], ["99", 1]]
    elif change == "insert":
        now.insert(place, [f"{2 * place - 1}", 7])
        named = f"{2 * place - 1}"
    elif change == "remove":
        del now[place]
        named = f"{2 * place}"
    elif change == "change":
        now[place][1] = 7
        named = f"{2 * place}"

    why = changed_batch(then[:learned], now)
    goes_on = [content for _, content in now[:learned]] == [content for _, content in then[:learned]]
    assert (why is None) == goes_on
    if why and not (change == "remove" and contents[place] in contents[:place] + contents[place + 1:]):
        assert repr(named) in why, why


def test_a_batch_inserted_removed_or_changed_is_refused_and_named(images, tmp_path, capfd):
    root = tmp_path / "images"
    command = words(config_of(tmp_path, {}), tmp_path / "logs")
    grow_to(images, root, 6)
    some_batches(command, 4)
    before = all_files(tmp_path / "logs")
    changes = {
        "'1b'": lambda: shutil.copytree(root / "train/1", root / "train/1b"),
        "'2'": lambda: shutil.rmtree(root / "train/2"),
        "'3'": lambda: (root / "train/3/c/0.png").unlink(),
        "'0'": lambda: (root / "train/0/a/0.png").rename(root / "train/0/b/9.png"),
    }
    for named, change in changes.items():
        grow_to(images, root, 6)
        change()
        said(capfd, 2, command, "other data", named, "--fresh")
        assert all_files(tmp_path / "logs") == before
    grow_to(images, root, 6)
    (root / "train/4/b/0.png").unlink()     # not learned yet
    (root / "test/a/0.png").unlink()
    assert program.main(command) == 0
    assert len(saved(tmp_path / "logs")["rows"]) == 6


@pytest.mark.parametrize("phase, number", [("half", 3), ("after", 4)])
def test_a_kill_as_the_head_grows_costs_nothing(start, images, whole, tmp_path, phase, number):  # noqa: F811
    """The third and fourth batch bring a class each; then the fifth and sixth arrive."""
    command = words(config_of(tmp_path, {}), tmp_path / "killed")
    grow_to(images, tmp_path / "images", 5)
    killed = start(command, ("kill_while_saving", phase, number))
    finished(killed, -signal.SIGKILL)
    grow_to(images, tmp_path / "images", 6)
    finished(start(command), 0)
    logs = [tmp_path / "killed", whole({})]
    assert same(*map(learned, logs))
    lines = [without_seconds(saved(folder)["rows"][:number]) for folder in logs]
    keys = ("train_loss", "classes_seen", "memory_size")
    assert same(*([[row[key] for key in keys] for row in rows] for rows in lines))
