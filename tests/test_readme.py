"""README is followed literally: every command in it runs here, and what it says of the code is there."""
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
STANDIN = REPO.parent / "shared" / "standin"
MISSING = "CORe50 cannot be downloaded here: the command must say what is missing, and what runs without it"

# Each command of README, what is added to keep it short, and its exit status. `tests/test_download.py` downloads for real,
# from a server of its own.
QUICK = "--max-batches 2 --set width=0.1 --set init_train_ep=1"
COMMANDS = {
    "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt": "run by .ci/run",
    "python -m pytest": "run by .ci/run",
    "python ar1star_lat_replay.py --name demo": (QUICK, 0),
    "python data_loader.py --download --data core50": ("--base-url http://127.0.0.1:9", 1),
    "python data_loader.py --check --data core50": ("", 2),
    "python ar1star_lat_replay.py": ("", 2),
    "python ar1star_lat_replay.py --list": ("", 0),
    "python ar1star_lat_replay.py --name ar1star --run 1 --seed 3 --set rm_sz=500": ("", 2),
    "python ar1star_lat_replay.py --name per_class --runs 0-4": ("", 2),
    "tensorboard --logdir logs": ("--help", 0),
    "python ar1star_lat_replay.py --report logs --markdown": ("", 0),
    "python ar1star_lat_replay.py --report logs --plot curves.png": ("", None),     # 2 where matplotlib is absent
    "python data_loader.py --export-demo demo_images": ("", 0),
    "python ar1star_lat_replay.py --name demo --log-dir logs/own --set dataset=folder --set data=demo_images "
    "--set image_size=48": (QUICK, 0),
    "python ar1star_lat_replay.py --list-layers --set model=resnet18": ("", 0),
    "python ar1star_lat_replay.py --name demo --log-dir logs/resnet18 --set model=resnet18 "
    "--set latent_layer_num=layer2.1 --set inc_freeze_below_layer=layer2.1":
        ("--max-batches 1 --set init_train_ep=1 --set mb_size=64", 0),
    "python ../shared/standin/make_standin.py core50_standin": ("--frames 1", 0),
    "python ar1star_lat_replay.py --name standin_79": ("--max-batches 2 --set test_stride=40", 0),
    "python benchmarks/speed.py": ("--tiny", 0),
    "python benchmarks/speed.py --scale": ("--tiny", 0),
    "python benchmarks/speed.py --device cuda --full": ("--tiny", None),            # 2 where there is no GPU
}


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


def test_every_command_of_readme_is_known_here():
    assert {" ".join(c.split()) for c in readme_commands()} == COMMANDS.keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the repository in which the commands run one after the other, in README's order."""
    top = tmp_path_factory.mktemp("clone")
    files = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=REPO, text=True,
                           capture_output=True, check=True).stdout.split()
    for file in files:
        if not file.startswith("docs/"):
            (top / "repo" / file).parent.mkdir(parents=True, exist_ok=True)
            (top / "repo" / file).write_bytes((REPO / file).read_bytes())
    if STANDIN.is_dir():
        (top / "shared").symlink_to(STANDIN.parent)
    return top / "repo"


@pytest.mark.parametrize("command", [c for c, how in COMMANDS.items() if not isinstance(how, str)])
def test_commands_of_readme_run(folder, command):
    added, status = COMMANDS[command]
    if "standin" in command and not STANDIN.is_dir():
        pytest.skip(f"needs the stand-in photographs, and {STANDIN} is not there")
    words = shlex.split(f"{command} {added}")
    if words[0] == "python":
        words[0] = sys.executable
    else:
        words = [sys.executable, "-m", "tensorboard.main", *words[1:]]
    done = subprocess.run(words, cwd=folder, text=True, capture_output=True, timeout=240, stdin=subprocess.DEVNULL)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == status if status is not None else done.returncode in (0, 2), done.stderr
    if done.returncode == 2 and command.startswith("python ar1star_lat_replay.py") and "--report" not in command:
        assert "paths.pkl" in done.stderr and "--name demo" in done.stderr, MISSING


def test_the_core_of_use_it_in_your_project_runs(folder):
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    subprocess.run([sys.executable, "-c", code + "\nassert len(memory) == 100 and loss.isfinite()"], cwd=folder,
                   check=True, timeout=120)


def test_places_that_the_table_of_differences_names_exist():
    places = re.findall(r"\| `([\w/.]+\.py)`, `(\w+)` \|", README)
    assert len(places) >= 8
    for file, name in places:
        assert re.search(rf"^\s*(def|class) {name}\b", (REPO / file).read_text(), re.M), f"{file} has no {name}"


def test_files_that_readme_names_exist():
    for file in re.findall(r"`([\w/]+\.(?:py|cfg|yml|txt|png))`", README) + re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (REPO / file).exists(), file


def test_environment_yml_uses_the_one_list_of_packages():
    environment = yaml.safe_load((REPO / "environment.yml").read_text())
    assert environment["name"] == "ar1-env"
    assert environment["dependencies"][-1] == {"pip": ["-r requirements.txt"]}
