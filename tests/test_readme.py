"""README and docs/ are followed literally: their commands run, and what they say of the code is there."""
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec

import pytest
import yaml
from PIL import Image

from harness.config import read_experiments
from helpers import REPO, random_images, run_script
from streams.demo import export_demo

README = (REPO / "README.md").read_text(encoding="utf-8")
PAGES = {page.relative_to(REPO).as_posix(): page.read_text(encoding="utf-8")
         for page in (REPO / "README.md", *REPO.glob("docs/**/*.md"))}
MISSING = "CORe50 cannot be downloaded here: the command must say what is missing, and what runs without it"

# Each command, what is added to keep it short, and its exit status. `tests/test_download.py` downloads for
# real, from a server of its own.
BY_CI = "run by .ci/run"
QUICK = "--max-batches 2 --set width=0.1 --set init_train_ep=1"
OWN = "--max-batches 1 --set init_train_ep=1 --set rm_sz=20 --set image_size=48 --weights"
COMMANDS = {
    "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt": BY_CI,
    "python ar1star_lat_replay.py --name demo": (QUICK, 0),
    "python data_loader.py --download --data core50": ("--base-url http://127.0.0.1:9", 1),
    "python ar1star_lat_replay.py": ("", 2),
    "python ar1star_lat_replay.py --teach --weights tflite": ("--port 99999", 2),   # it would not end
    "python ar1star_lat_replay.py --list": ("", 0),
    "python ar1star_lat_replay.py --name ar1star --run 1 --seed 3 --set rm_sz=500 --as ar1star_500": ("", 2),
    "python ar1star_lat_replay.py --name per_class --runs 0-4 --seeds 0-2": ("", 2),
    "tensorboard --logdir logs": ("--help", 0),
    "python ar1star_lat_replay.py --report logs --markdown --plot curves.png": ("", 2),     # no run is done
    "git clone https://github.com/marcusklasson/GroceryStoreDataset": "make_clone, below, makes a tiny one",
    "python benchmarks/lay_out.py GroceryStoreDataset grocery": ("", 0),
    "python ar1star_lat_replay.py --name folder --data grocery --weights tflite": (f"{OWN} none", 0),
    "python ar1star_lat_replay.py --name folder --predict grocery/test/Avocado": ("", 0),
    "python ar1star_lat_replay.py --name folder --data grocery --as resnet18 --set model=resnet18 "
    "--set latent_layer_num=pool --set slda_layer=layer4.0": (f"{OWN} none", 0),
    "python ar1star_lat_replay.py --name cifar100 --data cifar100 --weights tflite --download": ("", 1),
    "python data_loader.py --export-demo demo_images": ("", 0),
    "python data_loader.py --check --data demo_images": ("", 0),
    "python benchmarks/rerun.py grocery --data grocery --weights tflite": ("--results nowhere", 2),
    "python benchmarks/speed.py --end-to-end": ("--device nowhere", 2),
    "python benchmarks/rerun.py published": ("--results nowhere", 2),
    "python benchmarks/peers.py cifar100_pool6 ours --data cifar100 --weights tflite --set units=4 "
    "--batches 100 --every 10 --set inc_lr=3e-4": ("", 2),      # there are no data, here and below
    "python benchmarks/peers.py cifar100_pool6 ar1-pytorch avalanche --data cifar100 --weights tflite "
    "--set units=4 --batches 100 --every 10 --set inc_lr=3e-3 --keep-latents": ("", 2),
    "python benchmarks/peers.py cifar100_pool6 er --data cifar100 --weights tflite --set units=4 "
    "--batches 100 --every 10 --set inc_lr=0.03": ("", 2),
    "python benchmarks/rerun.py closed_forms": ("--results nowhere", 2),
    "python ar1star_lat_replay.py --list-layers --set model=resnet18": ("", 0),
    "python benchmarks/tune.py standin_79_per_class standin_79_conv5_6 standin_79_pool6 standin_79_cwr_star "
    "standin_79_per_pattern standin_79_papers_latent standin_79_native standin_79_no_replay "
    "standin_79_ar1star_lr standin_79_ar1star_penalty standin_79_naive --data core50_standin "
    "--weights tflite": ("", 2),
    "python benchmarks/slda_layers.py standin_79_slda --data core50_standin --weights tflite "
    "--set run=1": ("", 2),
    "python benchmarks/slda_layers.py standin_79_slda --data core50_standin --weights tflite "
    "--set run=1 --layers conv5_4/sep+conv5_6/sep": ("", 2),
    "python ar1star_lat_replay.py --name standin_79_pq_slda --data core50_standin --weights tflite "
    "--run 1": ("", 2),
    "python benchmarks/slda_weight.py logs/standin_79_pq_slda/run1_seed0": ("", 2),     # no such run
    "python benchmarks/draw_memory.py docs/results/rendered docs/results/memories "
    "--out docs/memory_rendered.png": ("", 0 if find_spec("matplotlib") else 2),
    "python ar1star_lat_replay.py --name per_class --as small --set rm_dtype=pq --set rm_mb=30 "
    "--set replayed_per_epoch=1500": ("", 2),
    "python ar1star_lat_replay.py --report docs/results --markdown": ("", 0),
    "python benchmarks/fill_tables.py": ("README.md", 0),
    "python benchmarks/rerun.py rendered --data core50_standin --weights tflite":
        ("--results nowhere", 2),
    "python benchmarks/speed.py": ("--tiny", 0),
    "python benchmarks/speed.py --scale": ("--tiny", 0),
    "python benchmarks/speed.py --against ar1-pytorch avalanche": ("--tiny", 2),    # there is no ar1-pytorch
    "python benchmarks/speed.py --device cuda --full --profile": ("--tiny", None),  # 2 where there is no GPU
}

# What is smaller where they run: the videos, which tests/test_demo.py draws and exports whole, what the speed
# of the machine is measured with, and the pause before a download is tried again.
SMALLER = [
    ("streams/demo.py", r"(T\w+_FRAMES) = \d+", r"\1 = 4"),
    ("benchmarks/limits.py", "else 2048", "else 64"),
    ("benchmarks/limits.py", "else 26", "else 16"),
    ("streams/download.py", "RETRY_SECONDS = 2", "RETRY_SECONDS = 0"),
    ("streams/torchvision_data.py", "(OTHERS =)", r"datasets.CIFAR100.url = 'http://127.0.0.1:9'\n\1"),
]


def test_every_command_is_known_here():
    blocks = [block for page in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", page, re.S)]
    commands = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    assert {" ".join(command.split()) for command in commands} == COMMANDS.keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the repository in which the commands run."""
    top = tmp_path_factory.mktemp("clone") / "repo"
    list_files = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(list_files, cwd=REPO, text=True, capture_output=True, check=True)
    for file in listed.stdout.split():
        needed = file.startswith("docs/results") or not file.startswith(("docs/", "tests/"))
        if needed and (REPO / file).is_file():
            (top / file).parent.mkdir(parents=True, exist_ok=True)
            (top / file).write_bytes((REPO / file).read_bytes())

    for file, pattern, smaller in SMALLER:
        text, n = re.subn(pattern, smaller, (top / file).read_text(encoding="utf-8"))
        assert n, f"{file}: {pattern}"
        (top / file).write_text(text, encoding="utf-8")
    make_clone(top / "GroceryStoreDataset" / "dataset")
    return top


def make_clone(dataset):
    """A clone of Grocery Store with three products and a few photos, in one batch."""
    dataset.mkdir(parents=True)
    names = ["Avocado", "Kiwi", "Lemon"]
    (dataset / "classes.csv").write_text("Class,...\n" + "".join(f"{name},...\n" for name in names))
    for split in ("train", "test"):
        lines = []
        for k, image in enumerate(random_images(12, 40, 30)):
            lines.append(f"{split}_{k}.jpg, {k % 3}, 0")
            Image.fromarray(image).save(dataset / f"{split}_{k}.jpg")
        (dataset / f"{split}.txt").write_text("\n".join(lines))


def learn_own_images(folder):
    """Makes the run that README's command makes, unless that has run before."""
    if not (folder / "grocery").exists():
        run_script(["benchmarks/lay_out.py", "GroceryStoreDataset", "grocery"], folder)
    if not (folder / "logs/folder/run0_seed0/checkpoint.pt").exists():
        run_script(shlex.split(f"ar1star_lat_replay.py --name folder --data grocery {OWN} none"), folder)


@pytest.mark.parametrize("command", [command for command, how in COMMANDS.items() if isinstance(how, tuple)])
def test_commands_run(folder, command):
    added, status = COMMANDS[command]
    words = shlex.split(f"{command} {added}")
    if command.endswith("--check --data demo_images") and not (folder / "demo_images").exists():
        export_demo(folder / "demo_images")     # else the command before it has written them
    if "--predict" in command or "resnet18" in command:
        learn_own_images(folder)

    if words[0] == "python":
        code, _, errors = run_script(words[1:], folder)
    else:
        done = subprocess.run([sys.executable, "-m", "tensorboard.main", *words[1:]], cwd=folder, text=True,
                              capture_output=True, timeout=240, stdin=subprocess.DEVNULL)
        code, errors = done.returncode, done.stderr
    assert "Traceback" not in errors, errors
    assert code == status if status is not None else code in (0, 2), errors
    needs_data = re.match(r"python ar1star_lat_replay.py(?!.*(--report|--teach))", command)
    if code == 2 and needs_data:
        if "core50_standin" in command:
            assert "benchmarks/standin/README.md" in errors, MISSING
        else:
            # the folder is there where the command that fetches CORe50 ran before
            assert "paths.pkl" in errors or "there is no folder core50" in errors, MISSING
            assert "--name demo" in errors, MISSING


def test_the_code_in_readme_learns_as_it_says(folder):
    """On its first three batches, with a quarter of the epochs in the first: all take half a minute."""
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    lines = [line for line in code.splitlines() if line.strip()]
    assert f"These {len(lines)} lines learn" in README

    code = code.replace("for images, labels in stream:", "for images, labels in itertools.islice(stream, 3):")
    code = code.replace("epochs=40", "epochs=10")
    all_frames = "import itertools, streams.demo\nstreams.demo.TRAIN_FRAMES = 36\n"
    status, printed, errors = run_script(["-c", all_frames + code], folder)
    assert status == 0, errors
    assert .15 < float(printed) < .7        # five of ten classes are there by then


def test_the_code_that_names_what_a_photo_shows(folder):
    learn_own_images(folder)
    code = re.search(r"```python\n(.*?)```", PAGES["docs/own_images.md"], re.S)[1]
    photo = "grocery/test/Kiwi/test_1.jpg"
    assert len(code.splitlines()) == 5 and '"photo.jpg"' in code
    status, named, errors = run_script(["-c", code.replace("photo.jpg", photo)], folder)
    assert status == 0, errors
    _, told, _ = run_script(["ar1star_lat_replay.py", "--name", "folder", "--predict", photo], folder)
    assert told.startswith(f"{photo}: {named.strip()} ")


def test_the_pages_are_short_and_name_nothing_that_a_reader_cannot_have():
    assert len(README.splitlines()) <= 160
    assert max(map(len, README.splitlines())) <= 130
    assert sum(len(page.encode()) for name, page in PAGES.items() if name.count("/") < 2) <= 45_000

    for name, page in PAGES.items():
        prose = re.sub(r"\]\([^)]*\)", "", page)       # without links, which may lead to a folder above
        assert "shared" not in re.findall(r"[\w/.]+", page) and "../" not in prose, name


def test_places_that_the_pages_name_exist():
    place = r"\| `([\w/.]+\.py)`, `(\w+)` \|"
    places = [found for page in PAGES.values() for found in re.findall(place, page)]
    assert len(places) >= 15
    for file, name in places:
        text = (REPO / file).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(def|class) {name}\b", text, re.M), f"{file} has no {name}"


@pytest.mark.parametrize("name", PAGES)
def test_files_and_headings_that_a_page_names_exist(name):
    for file in re.findall(r"`([\w/]+\.(?:py|cfg|yml|txt|png))`", PAGES[name]):
        assert (REPO / file).exists(), file

    for link, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#([^)]+))?\)", PAGES[name]):
        target = (REPO / name).parent / link if link else REPO / name
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{link}#{anchor}"


def test_sections_and_settings_that_the_pages_name_exist():
    sections = read_experiments()
    named = [name for page in PAGES.values() for name in re.findall(r"--name (\w+)", page)]
    assert len(named) > 4 and set(named) <= sections.keys()
    starts = [start for page in PAGES.values() for start in re.findall(r"sections `(\w+)\*`", page)]
    assert starts and all(any(name.startswith(start) for name in sections) for start in starts)

    recorded = re.findall(r"^\| `(\w+/\w+)` \|", README, re.M)
    assert recorded and all((REPO / "docs" / "results" / name).is_dir() for name in recorded)
    assert set(re.findall(r"--set (\w+)=", README)) <= sections["DEFAULT"].keys()


def test_environment_yml_uses_the_one_list_of_packages():
    environment = yaml.safe_load((REPO / "environment.yml").read_text())
    assert environment["name"] == "ar1-env"
    assert environment["dependencies"][-1] == {"pip": ["-r requirements.txt"]}
