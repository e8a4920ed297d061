"""What an accident on the way costs: each fault of the experiment is injected, and its message, exit status and what must
hold afterwards are checked. Faults of the download are in test_download.py, of the data in test_data_loader.py.

All runs are six tiny batches, each of them saved. Those that are killed run in processes forked from a server that has
imported torch already.
"""
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem
from torchvision.io import write_png

REPO = Path(__file__).resolve().parents[1]
for folder in (REPO, REPO / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import ar1star_lat_replay as program
import utils

BATCHES = 6
TINY = {"dataset": "folder", "image_size": 48, "width": 0.1, "init_train_ep": 1, "inc_train_ep": 1, "rm_sz": 50,
        "mb_size": 32, "checkpoint_share": 1.0, "device": "cpu"}


# ---- running it ----

@pytest.fixture(scope="module")
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


def outcome(logs):
    """What a run leaves: lines of results.jsonl without times and the given number of batches; the checkpoint's state."""
    folder = logs / "tiny" / "run0_seed0"
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert lines == state["rows"]
    return [{k: v for k, v in line.items() if k != "batches" and not k.startswith("seconds")} for line in lines], \
           {k: v for k, v in state.items() if k not in ("rows", "files")}


def same(a, b):
    """Whether two nested things are equal, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def train_steps(folder):
    """The steps of the curve train_loss, over all TensorBoard files of a run."""
    return sorted(event.step for file in folder.glob("events.*") for event in EventFileLoader(str(file)).Load()
                  for value in event.summary.value if value.tag == "train_loss")


@pytest.fixture(scope="module")
def expected(params, tmp_path_factory):
    """Outcome of the run that nothing disturbs."""
    logs = tmp_path_factory.mktemp("undisturbed")
    assert program.main(["--config", str(params), "--name", "tiny", "--log-dir", str(logs), "--max-batches",
                         str(BATCHES)]) == 0
    left = outcome(logs)
    assert train_steps(logs / "tiny" / "run0_seed0") == list(range(left[0][-1]["train_steps"]))
    return left


def some_batches(command, n=3):
    """Runs the first n batches; the checkpoint's file."""
    assert program.main([*command[:-1], str(n)]) == 0
    return Path(command[command.index("--log-dir") + 1]) / "tiny" / "run0_seed0" / "checkpoint.pt"


# ---- processes that are killed ----

def child(argv, output, fault):
    """main(argv) in a forked process, its output into a file. fault: name of a function below and its arguments."""
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if fault:
        globals()[fault[0]](*fault[1:])
    try:
        code = program.main(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def kill_while_saving(phase, n):
    """Kills this process in its n-th saving: with half of the checkpoint written, before, or after it gets its name."""
    saves, save, replace = iter(range(n - 1, -1, -1)), torch.save, os.replace

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def half_save(state, file):
        if next(saves, 0) == 0:
            start = file.tell()
            save(state, file)
            if phase == "half":
                file.truncate((start + file.tell()) // 2)
                kill()
            os.replace = kill_replace
        else:
            save(state, file)

    def kill_replace(source, target):
        if phase == "after":
            replace(source, target)
        kill()
    torch.save = half_save


def stop_in_batch(number, *signals):
    """Sends this process signals while it learns batch `number`."""
    learn = program.learn_batch
    waiting = list(signals)

    def learn_batch(learner, i, *rest):
        while i == number and waiting:
            os.kill(os.getpid(), waiting.pop(0))
            time.sleep(.01)     # the handler runs between two instructions of Python
        return learn(learner, i, *rest)
    program.learn_batch = learn_batch


def wait_in_batch(number, file):
    """Stays in batch `number` until the file has gone."""
    learn, waited = program.learn_batch, []

    def learn_batch(learner, i, *rest):
        if i == number and not waited:
            waited.append(file.touch())
            while file.exists():
                time.sleep(.01)
        return learn(learner, i, *rest)
    program.learn_batch = learn_batch


def unread_output():
    """Standard output is a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(argv, fault=None) -> a running process; .text() is what it printed so far."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO), str(REPO / "tests"), *([path] if path else [])])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults"])
    outputs, started = tmp_path_factory.mktemp("outputs"), []

    def launch(argv, fault=None):
        output = outputs / f"{len(started)}.txt"
        process = context.Process(target=child, args=(argv, output, fault))
        process.start()
        process.text = lambda: output.read_text()
        started.append(process)
        return process
    finished(launch(["--list"]), 0)     # so that the server is ready
    yield launch
    for process in started:
        process.kill()
        process.join()
    if path is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = path


def finished(process, status):
    process.join(60)
    assert process.exitcode == status and "Traceback" not in process.text(), process.text()
    return process.text()


def test_kill_9_at_random_moments_costs_nothing_but_time(start, command, expected, tmp_path):
    """24 kills: 15 at random moments, 9 in the middle of saving; every run that comes to its end is compared."""
    rng, kills, finals, k, reached = random.Random(0), 0, 0, 0, set()
    began = time.monotonic()
    finished(start([*command, "--log-dir", str(tmp_path / "timing")]), 0)
    seconds = time.monotonic() - began      # that a whole run takes; a continued one less
    saving = [("half", 1), ("before", 1), ("after", 1), ("half", 2), ("before", 3), ("after", 2), ("half", 4), ("before", 2),
              ("half", 3)]
    while kills < 24 or finals == 0:
        logs = tmp_path / f"logs{finals}"
        argv = [*command[:command.index("--log-dir") + 1], str(logs), *command[command.index("--log-dir") + 2:]]
        in_saving = saving and k % 5 in (1, 3)
        process = start(argv, ("kill_while_saving", *saving.pop()) if in_saving else None)
        if kills >= 24:
            finished(process, 0)
        elif in_saving:
            process.join(60)
        else:
            process.join(rng.uniform(0, seconds))
            process.kill()
            process.join()
        k += 1
        assert process.exitcode in (0, -signal.SIGKILL) and "Traceback" not in process.text(), process.text()
        kills += process.exitcode == -signal.SIGKILL
        saved = logs / "tiny" / "run0_seed0" / "checkpoint.pt"
        reached.add(len(torch.load(saved, weights_only=True)["rows"]) if saved.exists() else 0)
        if process.exitcode == 0:
            assert same(outcome(logs), expected)
            assert train_steps(logs / "tiny" / "run0_seed0") == list(range(expected[0][-1]["train_steps"]))
            assert not list(logs.rglob("*.tmp"))
            finals += 1
        seconds *= .7 if process.exitcode == 0 and not in_saving else 1.05
    assert len(reached) >= 4, reached   # the kills came at different batches
    print(f"{kills} kills, {finals} runs compared, batches done after a kill: {sorted(reached)}")


def test_the_demo_goes_on_when_a_kill_left_its_two_runs_at_different_batches(tmp_path):
    tiny = {key: value for key, value in TINY.items() if key not in ("dataset", "image_size")} | {"test_stride": 20}
    settings = [word for key, value in tiny.items() for word in ("--set", f"{key}={value}")]
    argv = ["--name", "demo", "--log-dir", str(tmp_path), *settings, "--max-batches"]
    assert program.main([*argv, "1"]) == 0
    program.run_experiment(program.load_config("demo", REPO / "params.cfg", tiny), "demo", tmp_path, 2)
    assert program.main([*argv, "3"]) == 0
    assert [len((tmp_path / name / "run0_seed0" / "results.jsonl").read_text().splitlines())
            for name in ("demo", "demo_naive")] == [3, 3]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_batch_and_the_next_run_goes_on(start, command, expected, tmp_path, number):
    output = finished(start(command, ("stop_in_batch", 2, number)), 130)
    assert "press Ctrl-C again to stop at once" in output
    assert output.endswith("stopped; the same command continues from the last checkpoint\n")
    state = torch.load(tmp_path / "logs" / "tiny" / "run0_seed0" / "checkpoint.pt", weights_only=True)
    assert len(state["rows"]) == 3      # batches 0, 1 and the one in which it came
    finished(start(command), 0)
    assert same(outcome(tmp_path / "logs"), expected)


def test_a_second_ctrl_c_stops_at_once(start, command, expected, tmp_path):
    finished(start(command, ("stop_in_batch", 2, signal.SIGINT, signal.SIGINT)), 130)
    state = torch.load(tmp_path / "logs" / "tiny" / "run0_seed0" / "checkpoint.pt", weights_only=True)
    assert len(state["rows"]) == 2
    finished(start(command), 0)
    assert same(outcome(tmp_path / "logs"), expected)


def test_a_second_process_in_the_same_folder_is_refused_and_disturbs_nothing(start, command, expected, tmp_path, capfd):
    here = tmp_path / "here"
    first = start(command, ("wait_in_batch", 2, here))
    while not here.exists():
        assert first.is_alive(), first.text()
        time.sleep(.02)
    for extra in ([], ["--fresh"]):
        said(capfd, 2, command + extra, "another process is running in", "--seed", "--log-dir")
    here.unlink()
    finished(first, 0)
    assert same(outcome(tmp_path / "logs"), expected)


def test_a_reader_of_the_output_that_goes_away(start, params):
    process = start(["--config", str(params), "--list"], ("unread_output",))
    assert finished(process, 1) == ""


# ---- weights ----

def test_weights_that_cannot_be_used(command, tmp_path, capfd, monkeypatch, standin_weights):
    whole = standin_weights.read_bytes()
    (tmp_path / "short.pth").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "noise.pth").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"features.init_block.conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    for name, part in (("short.pth", "fetch the file anew"), ("noise.pth", "fetch the file anew"),
                       ("empty.pth", "fetch the file anew"), ("other.pth", "another network"),
                       ("", "does not exist"), ("nothing.pth", "does not exist")):
        said(capfd, 2, [*command, "--weights", str(tmp_path / name), "--set", "width=1.0"], str(tmp_path / name), part)
    said(capfd, 2, [*command, "--weights", str(standin_weights)], "another network")     # ours has a width of 0.1
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    said(capfd, 2, [*command, "--weights", "imagenet", "--set", "width=1.0"], "no network", "--weights FILE",
         "--name demo` runs right now, without any download")


# ---- configuration and command line ----

@pytest.mark.parametrize("content, part", [
    ("DEFAULT: [", "cannot be read as YAML"), ("just text", "sections"), ("\0", "YAML"), ("a: 1", "sections"),
    ("tiny: {}", "no DEFAULT"), (b"\xff\xfe\x00", "YAML"), ("!!python/object/apply:os.system [id]", "YAML"),
    ("[" * 1000, "YAML")])
def test_a_configuration_that_cannot_be_read(tmp_path, capfd, content, part):
    file = tmp_path / "bad.cfg"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for listing in ([], ["--list"]):
        said(capfd, 2, ["--config", str(file), *listing], str(file), part)


@pytest.mark.parametrize("arguments, parts", [
    (["--set", "rm_zs=5"], ["rm_zs", "did you mean 'rm_sz'"]), (["--set", "init_lr=nan"], ["init_lr is", "number"]),
    (["--set", "init_lr=.nan"], ["init_lr is nan", "finite"]), (["--set", "init_lr=.inf"], ["finite"]),
    (["--set", "init_lr=fast"], ["init_lr is 'fast'", "a number"]), (["--set", "rm_sz=1.5"], ["a whole number"]),
    (["--set", "rm_sz=1e9"], ["rm_sz is '1e9'", "a whole number"]), (["--set", "rm_sz"], ["--set KEY=VALUE"]),
    (["--set", "=5"], ["unknown key"]), (["--set", "rm_sz=["], ["YAML"]), (["--set", "rm_sz=-1"], ["at least 0"]),
    (["--set", "rm_sz=" + "[" * 1000], ["YAML"]), (["--set", "fast=2"], ["true or false"]),
    (["--set", "inc_lr=2026-01-01"], ["a number"]), (["--max-batches", "0"], ["at least 1"]),
    (["--max-batches", "-3"], ["at least 1"]), (["--seed", "-1"], ["seed"]), (["--run", "10"], ["from 0 to 9"]),
    (["--name", "tinny"], ["did you mean 'tiny'"]), (["--config", "."], ["cannot be read"]),
    (["--config", "nothing.cfg"], ["no configuration file"]), (["--device", "tpu"], ["device is 'tpu'"]),
    (["--device", "cuda:99"], ["cuda:99"]), (["--set", "latent_layer_num=conv9"], ["latent_layer_num"]),
    (["--set", "start_batch=6"], ["choose 0 to 5"]), (["--set", "mb_size=1"], ["at least 2"])])
def test_settings_that_cannot_run(command, capfd, tmp_path, arguments, parts):
    said(capfd, 2, command + arguments, *parts)
    assert not (tmp_path / "logs").exists()


def test_debug_shows_the_traceback(command):
    with pytest.raises(program.ConfigError):
        program.main([*command, "--set", "rm_sz=x", "--debug"])


def test_an_unforeseen_error_is_one_sentence_too(command, capfd, monkeypatch):
    monkeypatch.setattr(program, "evaluate", lambda *_: {}["nothing"])
    said(capfd, 1, command, "unexpected KeyError ('nothing')", "report it", "--debug")


# ---- data ----

def test_missing_data_name_their_source_and_the_ways_to_go_on(params, tmp_path, capfd):
    argv = ["--config", str(params), "--log-dir", str(tmp_path / "logs"), "--data"]
    (tmp_path / "file").write_text("")
    for name in ("nothing", "file"):
        said(capfd, 2, [*argv, str(tmp_path / name)], "paths.pkl (https://", "LUP.pkl (https://", "core50_128x128.zip",
             f"`python data_loader.py --download --data {tmp_path / name}`, or add --download",
             "`python ar1star_lat_replay.py --name demo` runs right now, without any download")
        said(capfd, 2, [*argv, str(tmp_path / name), "--set", "dataset=folder"], "holds no batch folders")
    said(capfd, 2, [*argv, str(tmp_path / "file"), "--download"], "is a file")


def test_data_that_disappear_in_mid_run(command, params, tmp_path, capfd, monkeypatch):
    root = tmp_path / "images"
    shutil.copytree(params.with_name("images"), root)
    argv = [*command, "--data", str(root)]
    learn, lost = program.learn_batch, root / "train" / "3" / "a" / "0.png"
    content = lost.read_bytes()

    def learn_batch(learner, i, *rest):
        if i == 2:
            lost.unlink(missing_ok=True)
        return learn(learner, i, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(program, "learn_batch", learn_batch)
        said(capfd, 2, argv, str(lost))
    folder = tmp_path / "logs" / "tiny" / "run0_seed0"
    assert len(torch.load(folder / "checkpoint.pt")["rows"]) == 3
    lost.write_bytes(content)
    (root / "train" / "4" / "another").mkdir()     # and now there is one more class
    (root / "train" / "4" / "another" / "a.png").write_bytes(content)
    kept = (folder / "checkpoint.pt").read_bytes()
    said(capfd, 2, argv, "the data or the program have changed", "--fresh")
    assert (folder / "checkpoint.pt").read_bytes() == kept


# ---- numbers that are none ----

@pytest.mark.parametrize("arguments, batch, kept", [(["init_lr=1e+30"], 0, 0), (["inc_lr=1e+30"], 1, 1)])
def test_a_loss_that_becomes_nan(command, tmp_path, capfd, arguments, batch, kept):
    argv = [*command, "--set", *arguments]
    message = said(capfd, 1, argv, f"in batch {batch}", "the last checkpoint is kept", "--fresh")
    assert re.search(r"nan|inf|no finite numbers", message)
    folder = tmp_path / "logs" / "tiny" / "run0_seed0"
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert len(lines) == kept and not list(folder.glob("*.tmp"))
    if kept:
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert all(v.isfinite().all() for v in state["net"].values()) and len(state["rows"]) == kept
        assert program.main([*argv, "--max-batches", str(kept)]) == 0       # which is usable
    assert program.main([*command, "--fresh", "--max-batches", "2"]) == 0   # as the message says


def test_weights_that_become_nan_in_the_last_step_of_a_batch_are_not_saved(command, tmp_path, capfd, monkeypatch):
    learn = program.learn_batch

    def learn_batch(learner, i, *rest):
        steps = learn(learner, i, *rest)
        if i == 2:
            learner.net.output.weight.data.fill_(float("nan"))
        return steps
    monkeypatch.setattr(program, "learn_batch", learn_batch)
    said(capfd, 1, command, "the results of batch 2 are no finite numbers", "the last checkpoint is kept")
    folder = tmp_path / "logs" / "tiny" / "run0_seed0"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len(state["rows"]) == 2 and all(v.isfinite().all() for v in state["net"].values())
    assert len((folder / "results.jsonl").read_text().splitlines()) == 2


# ---- checkpoints ----

def all_files(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_damaged_checkpoint_is_refused_and_nothing_is_destroyed(command, tmp_path, capfd):
    file = some_batches(command)
    whole, rng = file.read_bytes(), random.Random(0)
    wrong = [whole[:n] for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)] + [rng.randbytes(n) for n in (10, 5000)]
    for _ in range(30):     # most of it is numbers, in which torch.load would not notice
        k = rng.randrange(len(whole))
        wrong.append(whole[:k] + rng.randbytes(4) + whole[k + 4:])
    refused = 0
    for content in wrong:
        file.write_bytes(content)
        before = all_files(tmp_path / "logs")
        try:
            utils.RunFolder(file.parent, program.load_config("tiny", command[1])).close()
        except utils.CheckpointError as error:
            refused += 1
            assert re.fullmatch(r".*checkpoint.pt is damaged and cannot be continued from: start over .*", str(error))
            assert all_files(tmp_path / "logs") == before
        else:   # padding between the records of the file
            state, good = torch.load(file, weights_only=True), torch.load(_copy(tmp_path, whole), weights_only=True)
            assert same({**state, "files": 0}, {**good, "files": 0})
    assert refused >= len(wrong) - 5
    for content in (rng.randbytes(5000), _saved(tmp_path, {"rows": []}), _saved(tmp_path, [1, 2])):
        file.write_bytes(content)
        said(capfd, 2, command, "checkpoint.pt is damaged", "--fresh")
    assert program.main([*command, "--fresh", "--max-batches", "2"]) == 0


def _copy(folder, content):
    (folder / "copy.pt").write_bytes(content)
    return folder / "copy.pt"


def _saved(folder, thing):
    torch.save(thing, folder / "thing.pt")
    return (folder / "thing.pt").read_bytes()


def test_a_checkpoint_of_other_settings_is_refused(command, expected, tmp_path, capfd):
    some_batches(command)
    before = all_files(tmp_path / "logs")
    said(capfd, 2, [*command, "--set", "rm_sz=60", "--set", "inc_lr=0.5"], "inc_lr (then 0.01, now 0.5)",
         "rm_sz (then 50, now 60)", "put them back", "--log-dir", "--fresh")
    assert all_files(tmp_path / "logs") == before
    assert program.main([*command, "--set", "checkpoint_share=0.5"]) == 0   # which is free to change
    assert same(outcome(tmp_path / "logs")[0], expected[0])


def test_results_that_were_deleted_or_damaged_come_back(command, expected, tmp_path):
    folder = some_batches(command).parent
    (folder / "results.jsonl").unlink()
    for file in folder.glob("events.*"):
        file.unlink()
    (folder / "config.yaml").unlink()
    assert program.main([*command[:-1], "4"]) == 0
    (folder / "results.jsonl").write_bytes((folder / "results.jsonl").read_bytes()[:600] + bytes(500))   # a power failure
    assert program.main(command) == 0
    assert same(outcome(tmp_path / "logs"), expected) and (folder / "config.yaml").exists()


def test_results_without_a_checkpoint_are_not_overwritten(command, tmp_path, capfd):
    some_batches(command).unlink()
    before = all_files(tmp_path / "logs")
    said(capfd, 2, command, "holds results but no checkpoint", "--fresh")
    assert all_files(tmp_path / "logs") == before
    assert program.main([*command, "--fresh", "--max-batches", "1"]) == 0


# ---- the log folder ----

def test_files_where_folders_should_be_and_the_reverse(command, tmp_path, capfd):
    logs = tmp_path / "logs"
    logs.write_text("mine")
    said(capfd, 2, command, str(logs), "--log-dir")
    assert logs.read_text() == "mine"
    logs.unlink()
    folder = logs / "tiny" / "run0_seed0"
    for name in ("run.lock", "checkpoint.pt", "results.jsonl", "config.yaml"):
        (folder / name).mkdir(parents=True)
        said(capfd, 2, command, str(folder))
        (folder / name).rmdir()
    assert program.main([*command, "--max-batches", "1"]) == 0


@pytest.fixture
def disk(tmp_path):
    """disk(options) mounts tmp_path/logs as a small file system, or changes its options."""
    logs, mounted = tmp_path / "logs", []

    def mount(options):
        logs.mkdir(exist_ok=True)
        remount = ["-o", f"remount,{options}"] if mounted else ["-t", "tmpfs", "-o", options, "tmpfs"]
        done = subprocess.run(["mount", *remount, logs], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs the right to mount a small tmpfs ({done.stderr.strip()})")
        mounted.append(options)
        return logs
    yield mount
    if mounted:
        subprocess.run(["umount", "-l", logs], check=True)


def test_a_read_only_log_folder(command, disk, expected, capfd):
    logs = disk("size=20m")
    some_batches(command)
    before = all_files(logs)
    disk("ro,size=20m")
    for extra in ([], ["--fresh"], ["--seed", "5"]):
        said(capfd, 2, command + extra, str(logs), "Read-only file system", "--log-dir")
    assert all_files(logs) == before
    disk("rw,size=20m")
    assert program.main(command) == 0
    assert same(outcome(logs), expected)


def fill(logs, spare):
    """Leaves `spare` bytes on the disk of the folder."""
    with open(logs / "filler", "wb", buffering=0) as f:
        free = os.statvfs(logs)
        f.write(bytes(max(0, free.f_bavail * free.f_frsize - spare)))


@pytest.mark.parametrize("spare", [0, 100_000])
def test_a_disk_that_fills_up(command, disk, expected, capfd, monkeypatch, spare):
    """With 0 bytes left nothing can be written, with 100,000 a line of results, but no checkpoint."""
    logs, learn = disk("size=20m"), program.learn_batch

    def learn_batch(learner, i, *rest):
        if i == 3 and not (logs / "filler").exists():
            fill(logs, spare)
        return learn(learner, i, *rest)
    monkeypatch.setattr(program, "learn_batch", learn_batch)
    said(capfd, 1, command, "No space left on device", "the last checkpoint is kept; make room")
    folder = logs / "tiny" / "run0_seed0"
    assert len(torch.load(folder / "checkpoint.pt", weights_only=True)["rows"]) == 3 and not list(folder.glob("*.tmp"))
    if spare == 0:
        said(capfd, 1, command, "make room")        # still full: said again, nothing lost
        assert len(torch.load(folder / "checkpoint.pt", weights_only=True)["rows"]) == 3
    monkeypatch.undo()
    (logs / "filler").unlink()
    assert program.main(command) == 0
    assert same(outcome(logs), expected)


@pytest.mark.parametrize("victim", ["results", "board", "board at the start"])
def test_a_disk_that_is_full_for_one_file(command, expected, tmp_path, capfd, monkeypatch, victim):
    """What the thread of the TensorBoard writer meets is told by us, not by a traceback, and not swallowed."""
    learn, append = program.learn_batch, LocalFileSystem.append
    full = []

    def fails(*args):
        if full:
            raise OSError(28, "No space left on device")
        return append(*args)

    def learn_batch(learner, i, *rest):
        if i == 3:
            full.append(True)
        return learn(learner, i, *rest)

    def write_row(self, row):
        if full:
            self.results = open("/dev/full", "w")
        return write(self, row)
    write = utils.RunFolder.write_row
    with monkeypatch.context() as patch:
        patch.setattr(program, "learn_batch", learn_batch)
        if victim == "results":
            patch.setattr(utils.RunFolder, "write_row", write_row)
        else:
            patch.setattr(LocalFileSystem, "append", fails)
        if victim == "board at the start":
            some_batches(command)
            patch.setattr(LocalFileSystem, "write", fails)
            full.append(True)
        said(capfd, 1, command, "No space left on device", "make room")
    state = torch.load(tmp_path / "logs" / "tiny" / "run0_seed0" / "checkpoint.pt", weights_only=True)
    assert len(state["rows"]) == 3
    assert program.main(command) == 0
    assert same(outcome(tmp_path / "logs"), expected)


def test_a_log_folder_that_is_deleted_in_mid_run(command, tmp_path, capfd, monkeypatch):
    learn = program.learn_batch

    def learn_batch(learner, i, *rest):
        if i == 2:
            shutil.rmtree(tmp_path / "logs", ignore_errors=True)
        return learn(learner, i, *rest)
    monkeypatch.setattr(program, "learn_batch", learn_batch)
    said(capfd, 1, command, str(tmp_path / "logs"), "No such file or directory")


# ---- memory ----

def test_gpu_out_of_memory_names_the_settings_to_lower(command, expected, tmp_path, capfd, monkeypatch):
    learn = program.learn_batch

    def learn_batch(learner, i, *rest):
        if i == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        return learn(learner, i, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(program, "learn_batch", learn_batch)
        said(capfd, 1, command, "Tried to allocate 2.00 GiB", "rm_sz", "mb_size", "max_latents_gb")
    assert program.main(command) == 0
    assert same(outcome(tmp_path / "logs"), expected)


@pytest.mark.parametrize("rm_sz", [10**12, 10**17, 10**30])
def test_a_memory_that_no_machine_has(command, capfd, rm_sz):
    said(capfd, 1, [*command, "--set", f"rm_sz={rm_sz}"], "out of memory", "lower", "rm_sz")
