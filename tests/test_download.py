"""Fetching the data when all is well, and the commands of data_loader.py."""
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from ar1star_lat_replay import main as experiment
from core50_files import NPZ, PATHS, ZIP, complete, write_data, write_index
from data_loader import DataError
from harness.data_cli import main
from helpers import run_script
from streams import demo
from streams import download as fetching
from streams.download import download, fetch_missing

# ---- when all is well ----

@pytest.mark.parametrize("form", ["png", "npz"])
def test_download_gives_a_usable_folder_and_a_second_one_fetches_nothing(tmp_path, mirror, form):
    root = tmp_path / "new" / "folder"
    download(root, form, mirror.url)
    complete(root, form)
    assert len(mirror.log) == 4 and not (root / ZIP).exists()
    download(root, form, mirror.url + "/")
    assert len(mirror.log) == 4


def test_only_what_is_missing_is_fetched(tmp_path, mirror):
    download(tmp_path, "png", mirror.url)
    (tmp_path / "LUP.pkl").unlink()
    (tmp_path / "core50_128x128" / PATHS[3]).unlink()
    kept = (tmp_path / "core50_128x128" / PATHS[4]).stat().st_mtime_ns
    mirror.log.clear()
    download(tmp_path, "png", mirror.url)
    assert [name for name, _ in mirror.log] == ["LUP.pkl", ZIP]
    assert (tmp_path / "core50_128x128" / PATHS[4]).stat().st_mtime_ns == kept
    complete(tmp_path, "png")


def test_the_command_line_and_the_environment_variable(tmp_path, mirror, monkeypatch, capsys):
    assert main(["--download", "--data", str(tmp_path / "a"), "--form", "npz", "--base-url", mirror.url]) == 0
    out = capsys.readouterr().out
    assert "is usable" in out and re.search("LUP.pkl +6 entries, the official file", out)
    monkeypatch.setenv("CORE50_BASE_URL", mirror.url)
    assert main(["--download", "--data", str(tmp_path / "b")]) == 0
    complete(tmp_path / "b", "png")


def test_the_experiment_fetches_what_it_lacks_if_told_to(tmp_path, mirror, monkeypatch, capsys):
    monkeypatch.setenv("CORE50_BASE_URL", mirror.url)
    settings = ("width=.1", "weights=none", "mb_size=4", "init_train_ep=1", "inc_train_ep=1", "rm_sz=4",
                "test_stride=3", "device=cpu")
    argv = ["--data", str(tmp_path / "data"), "--log-dir", str(tmp_path / "logs"), "--max-batches"]
    argv = [*(word for setting in settings for word in ("--set", setting)), *argv]
    assert experiment([*argv, "1"]) == 2 and "add --download" in capsys.readouterr().err and not mirror.log
    mirror.codes = [404]
    assert experiment([*argv, "1", "--download"]) == 1      # the network's fault, not the user's
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ar1star_lat_replay.py: ") and "404" in error and "--base-url" in error
    assert experiment([*argv, "1", "--download"]) == 0
    complete(tmp_path / "data", "png")
    mirror.log.clear()
    assert experiment([*argv, "2", "--download"]) == 0 and experiment([*argv, "3"]) == 0 and not mirror.log
    assert len((tmp_path / "logs" / "DEFAULT" / "run0_seed0" / "results.jsonl").read_text().splitlines()) == 3
    (tmp_path / "data" / "LUP.pkl").unlink()
    assert experiment([*argv, "4", "--set", "download=true"]) == 0 and mirror.log == [("LUP.pkl", None)]


def test_only_a_download_that_was_broken_off_is_completed(tmp_path, mirror, monkeypatch):
    monkeypatch.setenv("CORE50_BASE_URL", mirror.url)
    write_data(tmp_path / "whole")      # the user's own: not compared with the official files
    (tmp_path / "whole" / "LUP.pkl").write_bytes((tmp_path / "whole" / "LUP.pkl").read_bytes() + b"mine")
    fetch_missing(tmp_path / "whole")
    write_index(tmp_path / "half")
    (tmp_path / "half" / ZIP).write_bytes(mirror.files[ZIP])
    (tmp_path / "half" / "core50_128x128").mkdir()      # unpacking had just begun
    fetch_missing(tmp_path / "half")
    complete(tmp_path / "half", "png")
    assert not mirror.log
    write_index(tmp_path / "part")
    (tmp_path / "part" / f"{NPZ}.part").write_bytes(mirror.files[NPZ][:1000])
    fetch_missing(tmp_path / "part")
    assert mirror.log == [(NPZ, "bytes=1000-")]
    complete(tmp_path / "part", "npz")


def test_several_downloads_at_once_fetch_each_file_once(tmp_path, mirror):
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: download(tmp_path, "png", mirror.url), range(3)))
    assert len(mirror.log) == 4
    complete(tmp_path, "png")


# ---- the command line ----

def test_an_error_is_one_sentence_and_with_debug_a_traceback(tmp_path, capsys):
    command = ["--download", "--data", str(tmp_path), "--base-url", "nonsense"]
    assert main(command) == 2
    assert re.fullmatch(r"error: nonsense/paths.pkl is no address .*\n", capsys.readouterr().err)
    with pytest.raises(DataError, match="no address"):
        main([*command, "--debug"])


def test_data_loader_as_a_program_catches_the_errors_of_its_import(tmp_path):
    """Run as a program it is another module than the one that the modules of streams import."""
    status, _, errors = run_script(["data_loader.py", "--export-demo", str(tmp_path.parent)])
    assert status == 2 and re.fullmatch(r"error: .*\n", errors), errors


def test_ctrl_c_is_no_traceback(tmp_path, mirror, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(fetching, "fetch_rest", interrupt)
    assert main(["--download", "--data", str(tmp_path), "--base-url", mirror.url]) == 130
    assert re.fullmatch(r"interrupted.*\n", capsys.readouterr().err)


def test_a_signal_leaves_a_download_at_once(tmp_path, mirror, monkeypatch, capsys):
    monkeypatch.setenv("CORE50_BASE_URL", mirror.url)
    monkeypatch.setattr(fetching, "fetch_rest", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    argv = ["--data", str(tmp_path / "data"), "--log-dir", str(tmp_path / "logs"), "--download"]
    assert experiment(argv) == 130
    assert capsys.readouterr().err.startswith("stopped") and not (tmp_path / "logs").exists()


def test_export_demo_prints_the_counts(tmp_path, monkeypatch, capsys):
    counts = {"batches": 46, "classes": 10, "train": 1800, "test": 400}
    monkeypatch.setattr(demo, "export_demo", lambda root: counts)
    assert main(["--export-demo", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(str(count) in printed for count in counts.values()) and "--name folder" in printed


@pytest.mark.parametrize("arguments", [[], ["--check"], ["--export-demo"], ["--export-demo", "x", "--check"],
                                       ["--check", "--download", "--data", "x"], ["--form", "jpg"]])
def test_wrong_usage_has_exit_status_2(arguments):
    with pytest.raises(SystemExit) as e:
        main(arguments)
    assert e.value.code == 2
