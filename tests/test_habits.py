"""How people start the program, and what surrounds it: closed outputs, odd paths, isolated Python, no locks."""
import contextlib
import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

import data_loader
from helpers import REPO
from lab import run_folder
from lab.config import load_config

DEMO = ["ar1star_lat_replay.py", "--name", "demo", "--max-batches", "1", "--set", "width=0.1", "--set", "init_train_ep=1",
        "--set", "test_stride=20"]


def start(words, folder=REPO, python=(), shell_end="", **variables):
    """Runs python with these words through a shell; the finished process, its outputs as bytes."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "PYTHONPATH")} | variables
    command = b" ".join(b"'" + os.fsencode(w) + b"'" for w in (sys.executable, *python, *words)) + shell_end.encode()
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, timeout=120,
                          stdin=subprocess.DEVNULL)


# ---- what is printed, and where ----

ASCII = {"PYTHONIOENCODING": "ascii"}
OLD = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("variables", [ASCII, OLD])
def test_a_terminal_that_knows_ascii_alone(tmp_path, variables):
    logs = str(tmp_path / ("caf\xe9" if variables is ASCII else "cafe"))
    done = start([*DEMO, "--log-dir", logs], **variables)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert b"knows" in done.stdout and b"caf" in done.stdout and done.stdout.isascii()
    assert (os.path.isfile(os.path.join(logs, "demo", "run0_seed0", "results.jsonl")))
    told = start(["ar1star_lat_replay.py", "--report", logs, "--markdown"], **variables)
    assert told.returncode == 0 and told.stdout.isascii() and b"1 of 46 batches" in told.stdout, told


@pytest.mark.parametrize("name, variables", [(b"caf\xe9", {}), (b"caf\xe9", ASCII), (b"caf\xc3\xa9", OLD)])
def test_a_log_folder_whose_name_is_not_utf_8_is_refused(tmp_path, name, variables):
    done = start([*DEMO, "--log-dir", os.fsdecode(os.fsencode(tmp_path) + b"/" + name)], **variables)
    assert done.returncode == 2 and b"not UTF-8" in done.stderr and done.stderr.count(b"\n") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [b"b\xc3\xbccher", b"b\xfccher"])
def test_the_demo_is_exported_into_a_folder_of_any_name(tmp_path, name):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    done = start(["data_loader.py", "--export-demo", folder], PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"holds 1800 images" in done.stdout, done.stderr
    assert start(["data_loader.py", "--check", "--data", folder], PYTHONIOENCODING="ascii").returncode == 0


@pytest.mark.parametrize("closed", [" >&-", " 2>&-", " >&- 2>&-"])
def test_a_closed_output_changes_nothing(tmp_path, closed):
    done = start([*DEMO, "--log-dir", str(tmp_path)], shell_end=closed)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done
    folder = tmp_path / "demo" / "run0_seed0"
    assert (folder / "run.lock").read_bytes() == b"" and (folder / "results.jsonl").read_text().count("\n") == 1


def test_the_message_of_a_signal_is_not_written_into_the_lock(tmp_path):
    """With 2>&- descriptor 2 is the next file that is opened, unless somebody takes it first."""
    words = " ".join(f"'{word}'" for word in (sys.executable, *DEMO[:3], "--log-dir", str(tmp_path), *DEMO[5:]))
    process = subprocess.Popen(["bash", "-c", f"exec {words} 2>&-"], cwd=REPO, stdout=subprocess.DEVNULL)
    records = tmp_path / "demo" / "run0_seed0" / "results.jsonl"
    end = time.monotonic() + 60
    while not (records.exists() and records.read_bytes().count(b"\n") > 1):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert (records.parent / "run.lock").read_bytes() == b"" and (records.parent / "checkpoint.pt").is_file()


# ---- how Python is started ----

SAFE = [["-I"], ["-P"]] if sys.version_info >= (3, 11) else [["-I"]]


@pytest.mark.parametrize("python", SAFE)
def test_an_isolated_python_runs_it(tmp_path, python):
    assert start(["ar1star_lat_replay.py", "--list"], python=python).returncode == 0
    assert start([REPO / "ar1star_lat_replay.py", "--list"], tmp_path, python).returncode == 0
    done = start([REPO / "data_loader.py", "--check", "--data", "nothing"], tmp_path, python)
    assert done.returncode == 2 and b"NOT usable" in done.stdout, done.stderr


def test_a_safe_path_and_links_to_the_programs(tmp_path):
    for name in ("ar1star_lat_replay.py", "data_loader.py"):
        (tmp_path / name).symlink_to(REPO / name)
    for variables in ({}, {"PYTHONSAFEPATH": "1"}):
        assert start([tmp_path / "ar1star_lat_replay.py", "--list"], tmp_path, **variables).returncode == 0
        assert start([tmp_path / "data_loader.py", "--check", "--data", "nothing"], tmp_path, **variables).returncode == 2


# ---- file systems without locks, and others that hold one ----

def no_locks(number):
    def flock(*_):
        raise OSError(number, os.strerror(number))
    return flock


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_and_said(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(fcntl, "flock", no_locks(number))
    folder = run_folder.RunFolder(tmp_path / "run", load_config(path=REPO / "params.cfg"))
    folder.close()
    assert re.search(r"without locks \(.*\): a second process in it would not be noticed\n$", capsys.readouterr().err)
    with data_loader.locked(tmp_path):
        assert "has no locks: another process in it would not be noticed" in capsys.readouterr().err


@contextlib.contextmanager
def held(path):
    """The lock of a folder in another process."""
    code = f"import fcntl, time; f = open({str(path / '.lock')!r}, 'w'); fcntl.flock(f, 2); print(flush=True); " \
           "time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_waiting_for_another_process_is_said_and_ends_with_it(tmp_path, capsys):
    with held(tmp_path) as other:
        threading.Timer(.5, other.kill).start()
        with data_loader.locked(tmp_path):
            assert "waiting for another process that fetches or converts data" in capsys.readouterr().err


def test_waiting_for_another_process_obeys_signals(tmp_path):
    def stop(*_):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with held(tmp_path):
            threading.Timer(.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            with pytest.raises(KeyboardInterrupt), data_loader.locked(tmp_path):
                pass
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_folder_that_is_not_writable_is_told_from_a_full_disk(tmp_path):
    for number, says in ((errno.EACCES, "make its folder writable"), (errno.EROFS, "make its folder writable"),
                         (errno.ENOSPC, "make room")):
        with pytest.raises(data_loader.FetchError, match=f"{says} or choose another folder"), \
                data_loader.writing(tmp_path / "core50_imgs.npy"):
            raise OSError(number, os.strerror(number))
