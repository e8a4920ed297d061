"""How people start the program, and where: closed outputs, odd paths, isolated Python, no locks."""
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from harness import checkpoint
from harness.config import load_config
from helpers import REPO, run_script
from streams.download import locked
from tiny import DEMO_WORDS as DEMO
from tiny import NAIVE_WORDS as ALONE
from tiny import said

RUN = ["ar1star_lat_replay.py"]
LIST = [*RUN, "--list"]
CHECK = ["data_loader.py", "--check", "--data"]
ASCII = {"PYTHONIOENCODING": "ascii"}
OLD = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def start(words, folder=REPO, python=(), shell_end="", **variables):
    """Runs python with these words through a shell; the finished process, its outputs as bytes."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "PYTHONPATH")}
    command = ["bash", "-c", f'"$@" {shell_end}', "bash", sys.executable, *python, *words]
    return subprocess.run(command, cwd=folder, env=environment | variables, capture_output=True, timeout=120,
                          stdin=subprocess.DEVNULL)


def with_few_frames(module, words):
    """The main of a module, on two images of each of the demo's videos, from a terminal that knows ASCII."""
    code = "import sys; from streams import demo; demo.TRAIN_FRAMES = demo.TEST_FRAMES = 2; " \
           f"from {module} import main; sys.exit(main())"
    return run_script(["-c", code, *words], encoding="ascii")


# ---- what is printed, and where ----

def test_a_terminal_that_knows_ascii_alone(tmp_path):
    logs = tmp_path / "caf\xe9"
    words = [*DEMO, "--max-batches", "1", "--log-dir", str(logs)]
    status, out, error = with_few_frames("ar1star_lat_replay", words)
    assert status == 0 and "Traceback" not in error, error
    assert "knows" in out and "caf" in out and out.isascii()
    (tmp_path / "cafe").symlink_to(logs)
    for name, variables in (("caf\xe9", ASCII), ("cafe", OLD)):
        told = start([*RUN, "--report", str(tmp_path / name), "--markdown"], **variables)
        assert told.returncode == 0 and told.stdout.isascii() and b"1 of 46 batches" in told.stdout, told


def test_a_log_folder_whose_name_is_not_utf_8_is_refused(tmp_path, command, capfd):
    said(capfd, 2, [*command, "--log-dir", os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")], "not UTF-8")
    words = [*RUN, *ALONE, "--log-dir", os.fsdecode(os.fsencode(tmp_path) + b"/caf\xc3\xa9")]
    done = start(words, **OLD)      # where what is UTF-8 does not count as such
    assert done.returncode == 2 and b"not UTF-8" in done.stderr and done.stderr.count(b"\n") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_demo_is_exported_into_a_folder_of_any_name(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/b\xfccher")
    status, out, error = with_few_frames("harness.data_cli", ["--export-demo", folder])
    assert status == 0 and "holds 100 images" in out, error
    status, out, error = with_few_frames("harness.data_cli", ["--check", "--data", folder])
    assert status == 0 and "is usable" in out, error


@pytest.mark.parametrize("closed, status", [(" >&-", 0), (" 2>&-", 0), (" | true; exit ${PIPESTATUS[0]}", 1)])
def test_an_output_that_is_closed_or_that_nobody_reads_brings_no_traceback(closed, status):
    done = start(LIST, shell_end=closed)
    assert done.returncode == status and not done.stderr, done


def test_closed_outputs_are_not_written_into_the_files_of_a_run(tmp_path):
    """The next files that are opened get their descriptors, unless somebody takes these first."""
    words = [sys.executable, *RUN, *ALONE, "--log-dir", str(tmp_path)]
    command = ["bash", "-c", 'exec "$@" >&- 2>&-', "bash", *words]
    process = subprocess.Popen(command, cwd=REPO, env=os.environ | OLD)
    folder = tmp_path / "demo" / "run0_seed0"
    records = folder / "results.jsonl"
    end = time.monotonic() + 60
    while not (records.exists() and records.read_bytes().count(b"\n") > 1):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(.02)
    process.send_signal(signal.SIGTERM)     # whose message is written without Python's help
    assert process.wait(60) == 130
    assert (folder / "run.lock").read_bytes() == b"" and (folder / "checkpoint.pt").is_file()
    assert [json.loads(line)["batch"] for line in records.read_text().splitlines()][:2] == [0, 1]


# ---- how Python is started ----

@pytest.mark.parametrize("python", [["-I"], ["-P"]] if sys.version_info >= (3, 11) else [["-I"]])
def test_an_isolated_python_runs_it(tmp_path, python):
    assert start(LIST, python=python).returncode == 0
    assert start([REPO / LIST[0], "--list"], tmp_path, python).returncode == 0
    assert start([REPO / CHECK[0], "--help"], tmp_path, python).returncode == 0


def test_a_safe_path_and_links_to_the_programs(tmp_path):
    for name in (LIST[0], CHECK[0]):
        (tmp_path / name).symlink_to(REPO / name)
    for variables in ({}, {"PYTHONSAFEPATH": "1"}):
        assert start([tmp_path / LIST[0], "--list"], tmp_path, **variables).returncode == 0
        assert start([tmp_path / CHECK[0], "--help"], tmp_path, **variables).returncode == 0
    done = start([tmp_path / CHECK[0], *CHECK[1:], "nothing"], tmp_path, python=["-I"])
    assert done.returncode == 2 and b"no folder nothing" in done.stderr, done.stderr


# ---- file systems without locks, and others that hold one ----

@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_and_said_once(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    checkpoint.RunFolder(tmp_path / "run", load_config()).close()
    assert f"{tmp_path / 'run'} is on a file system without locks" in capsys.readouterr().err
    for line in (1, 0):
        with locked(tmp_path):
            assert capsys.readouterr().err.count(f"{tmp_path} is on a file system without locks") == line


def test_waiting_for_another_process_is_said_obeys_signals_and_ends_with_it(tmp_path, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / ".lock"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    before = signal.signal(signal.SIGTERM, stop)
    timer = threading.Timer(.2, os.kill, (os.getpid(), signal.SIGTERM))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt), locked(tmp_path):
            pass
        assert "waiting for another process" in capsys.readouterr().err
        threading.Timer(.2, other.kill).start()
        with locked(tmp_path):
            pass
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
        other.kill()
        other.wait()
