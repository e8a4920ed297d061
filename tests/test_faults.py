"""Each fault of the configuration, the data, the weights, the numbers or the memory is told in one sentence, with its exit
status, and costs no more than the present batch."""
import random
import re
import shutil

import pytest
import torch

import ar1star_lat_replay as program
from helpers import same
from lab import fast
from lab.config import ConfigError
from tiny import before_learning, outcome, said

# ---- weights ----

def test_weights_that_cannot_be_used(command, tmp_path, capfd, monkeypatch, standin_weights):
    whole = standin_weights.read_bytes()
    (tmp_path / "short.pth").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "noise.pth").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"features.init_block.conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    for name, part in (("short.pth", "fetch the file anew"), ("noise.pth", "fetch the file anew"),
                       ("empty.pth", "is an empty file"), ("other.pth", "another network"),
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
    with pytest.raises(ConfigError):
        program.main([*command, "--set", "rm_sz=x", "--debug"])


def test_an_unforeseen_error_is_one_sentence_too(command, capfd, monkeypatch):
    monkeypatch.setattr(fast, "evaluate", lambda *_: {}["nothing"])
    said(capfd, 1, command, "unexpected KeyError ('nothing')", "report it", "--debug")


# ---- data ----

def test_missing_data_name_their_source_and_the_ways_to_go_on(params, tmp_path, capfd):
    argv = ["--config", str(params), "--log-dir", str(tmp_path / "logs"), "--data"]
    (tmp_path / "file").write_text("")
    for name in ("nothing", "file"):
        said(capfd, 2, [*argv, str(tmp_path / name)], "paths.pkl (https://", "LUP.pkl (https://", "core50_128x128.zip",
             f"`python data_loader.py --download --data {tmp_path / name}`, or add --download",
             "`python ar1star_lat_replay.py --name demo` runs right now, without any download")
        said(capfd, 2, [*argv, str(tmp_path / name), "--set", "dataset=folder"], "there is no folder")
    said(capfd, 2, [*argv, str(tmp_path / "file"), "--download"], "is a file")
    said(capfd, 2, [*argv, str(params.with_name("images"))], "own images", "--name folder")
    said(capfd, 2, [*argv, str(tmp_path / "core50_standin")], "no stand-in data", "benchmarks/standin", "--data DIR")


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
    folder = tmp_path / "logs" / "tiny" / "run0_seed0"
    assert len(torch.load(folder / "checkpoint.pt")["rows"]) == 3
    lost.write_bytes(content)
    (root / "train" / "4" / "another").mkdir()     # and now there is one more class
    (root / "train" / "4" / "another" / "a.png").write_bytes(content)
    kept = (folder / "checkpoint.pt").read_bytes()
    said(capfd, 2, argv, "was made from other data: its classes have changed ('another' came)", "--fresh")
    assert (folder / "checkpoint.pt").read_bytes() == kept


# ---- numbers that are none ----

@pytest.mark.parametrize("arguments, batch, kept", [(["init_lr=1e+30"], 0, 0), (["inc_lr=1e+30"], 1, 1)])
def test_a_loss_that_becomes_nan(command, tmp_path, capfd, arguments, batch, kept):
    argv = [*command, "--set", *arguments]
    message = said(capfd, 1, argv, f"in batch {batch}", "--fresh")
    assert ("the last checkpoint is kept" in message) == bool(kept)
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
    learn = program.Learner.learn

    def spoiling(learner, *batch):
        i, steps = learner.batches, learn(learner, *batch)
        if i == 2:
            learner.net.output.weight.data.fill_(float("nan"))
        return steps
    monkeypatch.setattr(program.Learner, "learn", spoiling)
    said(capfd, 1, command, "the results of batch 2 are no finite numbers", "the last checkpoint is kept")
    folder = tmp_path / "logs" / "tiny" / "run0_seed0"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len(state["rows"]) == 2 and all(v.isfinite().all() for v in state["net"].values())
    assert len((folder / "results.jsonl").read_text().splitlines()) == 2


# ---- memory ----

def test_gpu_out_of_memory_names_the_settings_to_lower(command, expected, tmp_path, capfd, monkeypatch):
    def fail(i):
        if i == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
    with monkeypatch.context() as patch:
        patch.setattr(program.Learner, "learn", before_learning(fail))
        said(capfd, 1, command, "Tried to allocate 2.00 GiB", "rm_sz", "mb_size", "max_latents_gb")
    assert program.main(command) == 0
    assert same(outcome(tmp_path / "logs"), expected)


@pytest.mark.parametrize("rm_sz", [10**12, 10**17, 10**30])
def test_a_memory_that_no_machine_has(command, capfd, rm_sz):
    said(capfd, 1, [*command, "--set", f"rm_sz={rm_sz}"], "out of memory", "lower", "rm_sz")
