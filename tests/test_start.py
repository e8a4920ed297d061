"""The start: what needs no torch is answered without it, and Ctrl-C ends the imports without a traceback.

A package that calls itself torch stands first on the import path: it tells that it is imported, and how long
that takes depends on no machine.
"""
import gc
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

import ar1star_lat_replay as program
from harness import data_cli
from harness.console import begin_imports
from helpers import REPO

IMPORTED = 99       # exit status of a process that imports one of HEAVY
HEAVY = ("torch", "torchvision", "tensorboard", "numpy", "matplotlib")
RUN, DATA = ["ar1star_lat_replay.py"], ["data_loader.py"]
CHECK = ["--check", "--data", "nothing"]
# it says that it is imported, and goes on for hours in a loop that calls no Python handler of signals
ENDLESS = "import os\nprint(os.getpid(), flush=True)\nsum(range(10 ** 13))\n"


def with_packages(folder, code):
    """The environment in which the packages of HEAVY are this code."""
    for name in HEAVY:
        (folder / f"{name}.py").write_text(code)
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.fixture
def start(tmp_path):
    """start(words): runs Python with them, where importing one of HEAVY ends the process; what came of it."""
    environment = with_packages(tmp_path, f"import os\nos._exit({IMPORTED})\n")
    return lambda words: subprocess.run([sys.executable, *words], cwd=REPO, env=environment, text=True,
                                        capture_output=True, timeout=60)


# ---- without torch ----

def test_help_and_lists_take_no_torch(start):
    for words, part in ((RUN, "--list-layers"), (DATA, "--export-demo")):
        done = start([*words, "--help"])
        assert done.returncode == 0 and part in done.stdout and not done.stderr, done
    done = start([*RUN, "--list"])
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 15 and not done.stderr, done


@pytest.mark.parametrize("form", [[], ["--markdown"]])
def test_a_report_takes_no_torch_and_is_the_same(start, capsys, form):
    folder = "docs/results/rendered/slda"
    done = start([*RUN, "--report", folder, *form])
    assert program.main(["--report", str(REPO / folder), *form]) == 0
    assert done.returncode == 0 and "slda" in done.stdout and not done.stderr, done
    assert done.stdout == capsys.readouterr().out.replace(f"{REPO}{os.sep}", "")


@pytest.mark.parametrize("argv, part", [
    (["--rnu", "3"], "error: unrecognized arguments: --rnu 3"),
    (["--report", "tests"], "no runs below tests"),
    (["--name", "dmeo"], "'dmeo'; did you mean 'demo'?"),
    (["--name", "demo", "--set", "rm_sz=-1"], "rm_sz is -1; it must be at least 0"),
    (["--markdown"], "--markdown and --plot belong to --report"),
    (["--json"], "--json belongs to --predict"),
    (["--predict", "x", "--seeds", "0-1"], "--predict asks one")])
def test_a_mistake_takes_no_torch(start, argv, part):
    done = start([*RUN, *argv])
    message = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and message.startswith("ar1star_lat_replay.py: ") and part in message, done
    assert not done.stdout


def test_what_computes_goes_on_to_torch(start):
    """So the tests above would notice it."""
    for words in ([*RUN, "--name", "demo"], [*RUN, "--list-layers"], [*DATA, *CHECK]):
        done = start(words)
        assert (done.returncode, done.stdout, done.stderr) == (IMPORTED, "", "")


@pytest.mark.parametrize("words, package", [
    ([*RUN, "--list"], "yaml"), ([*RUN, "--name", "demo"], "torch"), ([*DATA, *CHECK], "torchvision")])
def test_a_forgotten_virtual_environment_is_one_sentence(tmp_path, words, package):
    """The first package that a program needs is named; tqdm, which our own files need, is missing as well."""
    for name in (package, "tqdm"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No {name}', name='{name}')")
    done = subprocess.run([sys.executable, *words], cwd=REPO, env=os.environ | {"PYTHONPATH": str(tmp_path)},
                          text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
    install = re.search("```bash\n(.*)\n", (REPO / "README.md").read_text(encoding="utf-8"))[1]
    assert f" {package} is missing" in done.stderr and install in done.stderr


def test_other_errors_at_the_start_keep_their_traceback(tmp_path):
    (tmp_path / "yaml.py").write_text("import no_package_of_ours")
    done = subprocess.run([sys.executable, *RUN, "--list"], cwd=REPO, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=60)
    assert done.returncode == 1 and "Traceback" in done.stderr and "no_package_of_ours" in done.stderr


def test_a_copy_of_the_data_loader_alone_says_where_its_commands_are(tmp_path):
    copy = shutil.copy(REPO / "data_loader.py", tmp_path)
    done = subprocess.run([sys.executable, copy, *CHECK], text=True, capture_output=True, timeout=60)
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
    assert "harness/data_cli.py" in done.stderr and "clone" in done.stderr


# ---- Ctrl-C ----

@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash, to see what a shell sees")
@pytest.mark.parametrize("words", [[*RUN, "--name", "demo"], [*DATA, *CHECK]])
def test_ctrl_c_ends_the_imports_at_once_and_without_a_word(tmp_path, words):
    environment = with_packages(tmp_path, ENDLESS)
    shell = subprocess.Popen(["bash", "-c", '"$@"; echo status $?', "bash", sys.executable, *words], cwd=REPO,
                             env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pid = int(shell.stdout.readline())
    try:
        os.kill(pid, signal.SIGINT)
        out, error = shell.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        os.kill(pid, signal.SIGKILL)
        raise
    assert (out, error) == ("status 130\n", "")


@pytest.mark.parametrize("main, argv, status", [
    (program.main, ["--list-layers", "--name", "demo"], 0), (data_cli.main, CHECK, 2)])
def test_after_the_imports_ctrl_c_is_an_exception_and_garbage_is_collected(main, argv, status):
    before = signal.getsignal(signal.SIGINT)
    try:
        begin_imports()
        assert main(argv) == status
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert gc.isenabled() and gc.get_freeze_count() > 0
    finally:
        gc.enable()
        gc.unfreeze()
        signal.signal(signal.SIGINT, before)
