"""Faults of settings, data, weights, numbers or memory: each is told in one sentence, with its exit status.

It costs no more than the present batch.
"""
import json
import random
import shlex
import shutil

import pytest
import torch

import ar1star_lat_replay as program
from harness import data_cli, encoder
from harness.config import ConfigError
from tiny import all_files, before_learning, said, saved

# ---- weights ----

def test_weights_that_cannot_be_used(command, tmp_path, capfd, monkeypatch, standin_weights):
    """tests/test_mobilenet.py has more of them."""
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    (tmp_path / "noise.pth").write_bytes(random.Random(0).randbytes(5000))
    wide = [*command, "--set", "width=1.0", "--weights"]
    said(capfd, 2, [*wide, str(tmp_path / "noise.pth")], "noise.pth", "fetch the file anew")
    said(capfd, 2, [*wide, "nothing.pth"], "nothing.pth", "does not exist", "--name demo` runs right now")
    for name in ("imagenet", "tflite"):
        said(capfd, 2, [*wide, name], "no network", "--weights FILE", "--name demo` runs right now")
    said(capfd, 2, [*command, "--weights", str(standin_weights)], "another network")     # of width 1.0


# ---- configuration and command line ----

def test_a_configuration_that_cannot_be_read(tmp_path, capfd):
    """tests/test_config.py has more of them."""
    file = tmp_path / "bad.cfg"
    for content, part in ((b"DEFAULT: [", "YAML"), (b"\xff\xfe\x00", "YAML"), (b"a: 1", "sections"),
                          (b"tiny: {}", "no DEFAULT"), (b"!!python/object/apply:os.system [id]", "YAML")):
        file.write_bytes(content)
        for listing in ([], ["--list"]):
            said(capfd, 2, ["--config", str(file), *listing], str(file), part)


@pytest.mark.parametrize("arguments, parts", [
    (["--set", "rm_zs=5"], ["rm_zs", "did you mean 'rm_sz'"]), (["--set", "rm_sz"], ["--set KEY=VALUE"]),
    (["--set", "init_lr=fast"], ["init_lr is 'fast'", "a number"]), (["--set", "init_lr=.nan"], ["finite"]),
    (["--set", "rm_sz=1e9"], ["rm_sz is '1e9'", "a whole number"]), (["--set", "fast=2"], ["true or false"]),
    (["--set", "seed=010"], ["seed is '010'"]), (["--set", "=5"], ["unknown key"]),
    (["--set", "rm_sz=["], ["YAML"]), (["--set", "rm_sz=" + "[" * 1000], ["YAML"]),
    (["--set", "lr=1"], ["'init_lr'", "'inc_lr'", "params.cfg"]),
    (["--set", "zzz=1"], ["unknown key 'zzz'", "params.cfg"]),
    (["--set", "inc_lr=2026-01-01"], ["a number"]), (["--max-batches", "0"], ["at least 1"]),
    (["--seed", "-1"], ["seed"]), (["--run", "10"], ["from 0 to 9"]),
    (["--runs", "0-2"], ["run (with dataset folder)"]), (["--name", "tinny"], ["did you mean 'tiny'"]),
    (["--config", "."], ["cannot be read"]), (["--config", "nothing.cfg"], ["no configuration file"]),
    (["--device", "tpu"], ["device is 'tpu'"]), (["--device", "cuda:99"], ["cuda:99"]),
    (["--set", "latent_layer_num=conv9"], ["latent_layer_num"]), (["--set", "start_batch=6"], ["0 to 5"])])
def test_settings_that_cannot_run(command, capfd, tmp_path, arguments, parts):
    said(capfd, 2, command + arguments, *parts)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("arguments", [
    ["--device", "gpu"], ["--device", "cuda:99"], ["--set", "latent_layer_num=conv9"]])
def test_a_demo_that_cannot_run_does_not_begin(tmp_path, capfd, arguments):
    assert program.main(["--name", "demo", "--log-dir", str(tmp_path / "logs"), *arguments]) == 2
    out, error = capfd.readouterr()
    assert not out and error.count("\n") == 1 and arguments[-1].split("=")[-1] in error


def test_debug_shows_the_traceback(command):
    with pytest.raises(ConfigError):
        program.main([*command, "--set", "rm_sz=x", "--debug"])


def test_an_unforeseen_error_is_one_sentence_too(command, capfd, monkeypatch):
    monkeypatch.setattr(encoder, "evaluate", lambda *_: {}["nothing"])
    said(capfd, 1, command, "unexpected KeyError ('nothing')", "report it", "--debug")


# ---- data ----

def test_missing_data_name_their_source_and_the_ways_to_go_on(params, tmp_path, capfd):
    argv = ["--config", str(params), "--log-dir", str(tmp_path / "logs"), "--data"]
    file = tmp_path / "file"
    file.write_text("")
    for path in (tmp_path / "no thing", file):
        download = f"data_loader.py --download --data {shlex.quote(str(path))}`"
        message = said(capfd, 2, [*argv, str(path)], f"no folder {path}", download, "add --download",
                       "--name demo` runs right now")
        assert "paths.pkl" not in message
        assert data_cli.main(["--check", "--data", str(path)]) == 2
        out, error = capfd.readouterr()
        assert not out and error.count("\n") == 1 and f"no folder {path}" in error and "pkl" not in error
        said(capfd, 2, [*argv, str(path), "--set", "dataset=folder"], "there is no folder")
    (tmp_path / "own" / "Train" / "a").mkdir(parents=True)
    assert data_cli.main(["--check", "--data", str(tmp_path / "own")]) == 2
    out, error = capfd.readouterr()
    assert "Train" in error and "pkl" not in out + error
    empty = tmp_path / "empty folder"
    empty.mkdir()
    said(capfd, 2, [*argv, str(empty)], "paths.pkl (https://", "LUP.pkl (https://", "core50_128x128.zip",
         f"data_loader.py --download --data '{empty}'`", "add --download", "--name demo` runs right now")
    said(capfd, 2, [*argv, str(file), "--download"], "is a file")
    said(capfd, 2, [*argv, str(params.with_name("images")), "--set", "dataset=core50"], "own images",
         "--name folder")
    standin = tmp_path / "core50_standin"
    said(capfd, 2, [*argv, str(standin)], f"data in {standin}:", "benchmarks/standin", "--data DIR")
    standin.mkdir()
    said(capfd, 2, [*argv, str(standin)], f"data in {standin}:", "benchmarks/standin", "--data DIR")


def test_data_that_disappear_in_mid_run(command, params, tmp_path, capfd, monkeypatch):
    root = tmp_path / "images"
    shutil.copytree(params.with_name("images"), root)
    argv = [*command, "--data", str(root)]
    lost = root / "train" / "3" / "a" / "0.png"
    content = lost.read_bytes()

    def lose(i):
        if i == 2:
            lost.unlink(missing_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(program.Learner, "learn", before_learning(lose))
        said(capfd, 2, argv, str(lost))
    assert len(saved(tmp_path / "logs")["rows"]) == 3
    lost.write_bytes(content)
    (root / "train" / "1" / "another").mkdir()     # and now a batch that was learned has one more class
    (root / "train" / "1" / "another" / "a.png").write_bytes(content)
    kept = all_files(tmp_path / "logs")
    said(capfd, 2, argv, "other data", "'1'", "--fresh")
    assert all_files(tmp_path / "logs") == kept


# ---- numbers that are none ----

def assert_finite(logs, batches):
    """So many batches are on the disk, all of them with finite numbers."""
    lines = (logs / "tiny" / "run0_seed0" / "results.jsonl").read_text().splitlines()
    assert len(lines) == batches and not list(logs.rglob("*.tmp"))
    if batches:
        state = saved(logs)
        assert [json.loads(line) for line in lines] == state["rows"]
        assert all(value.isfinite().all() for value in state["net"].values())


@pytest.mark.parametrize("setting, kept", [("init_lr=1e+30", 0), ("inc_lr=1e+30", 1)])
def test_a_loss_that_becomes_nan(command, tmp_path, capfd, setting, kept):
    argv = [*command, "--set", setting]
    message = said(capfd, 1, argv, f"in batch {kept}", "--fresh")
    assert ("the last checkpoint is kept" in message) == bool(kept) and ("nan" in message or "inf" in message)
    assert_finite(tmp_path / "logs", kept)
    if kept:
        assert program.main([*argv, "--max-batches", "1"]) == 0     # the checkpoint is usable
    assert program.main([*command, "--fresh", "--max-batches", "2"]) == 0   # as the message says


def test_weights_that_become_nan_in_the_last_step_are_not_saved(command, tmp_path, capfd, monkeypatch):
    learn = program.Learner.learn

    def spoiling(learner, *batch):
        i, steps = learner.batches, learn(learner, *batch)
        if i == 2:
            learner.net.output.weight.data.fill_(float("nan"))
        return steps
    monkeypatch.setattr(program.Learner, "learn", spoiling)
    said(capfd, 1, command, "the results of batch 2 are no finite numbers", "the last checkpoint is kept")
    assert_finite(tmp_path / "logs", 2)


# ---- memory ----

def test_gpu_out_of_memory_names_the_settings_to_lower(command, ends_as_expected, capfd, monkeypatch):
    def fail(i):
        if i == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 ...")
    with monkeypatch.context() as patch:
        patch.setattr(program.Learner, "learn", before_learning(fail))
        said(capfd, 1, command, "Tried to allocate 2.00 GiB", "rm_sz", "mb_size", "max_latents_gb")
    ends_as_expected()


@pytest.mark.parametrize("rm_sz", [10**12, 10**17, 10**30])
def test_a_memory_that_no_machine_has(command, capfd, rm_sz):
    said(capfd, 1, [*command, "--set", f"rm_sz={rm_sz}"], "out of memory", "lower", "rm_sz")
