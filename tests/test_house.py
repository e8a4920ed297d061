"""The rules of the house: which file may import what, how long things are, and that a file can be copied alone.

Each rule is a function from a folder to the sentences that say where it is broken. Every rule is tested on the
repository, and on a copy of it in which it has been broken on purpose.
"""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
TOP = {"ar1star_lat_replay", "data_loader", "utils"}
PACKAGES = {"benchmarks": 4, "lab": 2, "streams": 2, "methods": 1, "models": 1}         # and the floor of each
FLOORS = {"ar1star_lat_replay": 3, "data_loader": 1, "utils": 1} | PACKAGES
LONGEST = {"ar1star_lat_replay": 300, "data_loader": 400, "utils": 330}                 # lines; 400 for all others
LOOPS = {("ar1star_lat_replay", "learn"): 25, ("ar1star_lat_replay", "train_batch"): 40}     # lines; 60 for all others
LIBRARIES = {"utils": {"numpy", "torch"}, "methods": {"numpy", "torch"}, "models": {"torch", "torchvision"},
             "data_loader": {"numpy", "torch", "torchvision", "tqdm"}}                   # of floor 1
COPIED = [["utils.py"], ["data_loader.py"], ["models/batch_renorm.py"], ["models/split_net.py"],
          ["models/mobilenet.py", "models/batch_renorm.py", "models/split_net.py"]]
STANDARD = {"forward", "state_dict", "load_state_dict", "extra_repr", "backward",
            "find_class"}       # known from the libraries that call them


def modules(root):
    """{dotted name: path} of the program, tests left out."""
    paths = [path for folder in ("", *PACKAGES) for path in sorted((root / folder).glob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(path, names):
    """What a file imports, standard library aside and without what stands under `if __name__ == "__main__"`: modules of
    this program by their full names, libraries by their first."""
    found, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.dump(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & names or {node.module}
    found = {name if name in names else name.split(".")[0] for name in found}
    return found - set(sys.stdlib_module_names)


def graph(root):
    """{module: the modules of this program that it imports}."""
    found = modules(root)
    return {name: imports(path, found.keys()) & found.keys() for name, path in found.items()}


def floor(module):
    return FLOORS[module.split(".")[0]]


def top_level(root):
    allowed = TOP | PACKAGES.keys()
    return [f"{name}.py lies at the top level" for name in modules(root) if "." not in name and name not in allowed]


def upward(root):
    return [f"{name} imports {other}, which lies above it" for name, others in graph(root).items() for other in others
            if floor(other) > floor(name)]


def circles(root):
    """Modules from which imports lead back to themselves."""
    reach = graph(root)
    for _ in reach:
        reach = {name: others.union(*(reach[other] for other in others)) for name, others in reach.items()}
    return [f"imports lead from {name} back to {name}" for name, others in reach.items() if name in others]


def unlisted(root):
    """Files whose docstring does not say what they import, in its last lines."""
    found, broken = modules(root), []
    for name, path in found.items():
        used, doc = imports(path, found.keys()), ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        line = re.search(r"^Uses (.*)\.\Z", doc, re.S | re.M)
        told = set(re.findall(r"[\w.]*\w", re.sub(r"\([^)]*\)", "", line[1]))) if line else set()
        if used != told and not name.startswith("benchmarks"):
            broken.append(f"{name} uses {', '.join(sorted(used))}; its docstring tells of {', '.join(sorted(told))}")
    return broken


def libraries(root):
    found = modules(root)
    return [f"{name} imports {other}" for name, path in found.items() if name.split(".")[0] in LIBRARIES
            for other in imports(path, found.keys()) - found.keys() - LIBRARIES[name.split(".")[0]]]


def lengths(root):
    """Files, functions and loops that do not fit where they should."""
    broken = []
    for name, path in modules(root).items():
        text = path.read_text(encoding="utf-8")
        lines, limit = len(text.splitlines()), LONGEST.get(name, 400)
        if lines > limit:
            broken.append(f"{name} has {lines} lines, {limit} allowed")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                limit = LOOPS.get((name, node.name), 60)
                if node.end_lineno - node.lineno >= limit:
                    broken.append(f"{name}.{node.name} has {node.end_lineno - node.lineno + 1} lines, {limit} allowed")
    for path in (root / "tests").glob("*.py"):
        if len(path.read_text(encoding="utf-8").splitlines()) >= 500:
            broken.append(f"{path.name} has 500 lines or more")
    return broken


def undocumented(root):
    """Public functions, classes and methods without a docstring."""

    def bare(name, node):
        for child in node.body:
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
                if not ast.get_docstring(child) and child.name not in STANDARD:
                    yield f"{name}.{child.name} has no docstring"
                if isinstance(child, ast.ClassDef):
                    yield from bare(f"{name}.{child.name}", child)

    return [sentence for name, path in modules(root).items()
            for sentence in bare(name, ast.parse(path.read_text(encoding="utf-8")))]


def old_pythons(root):
    """A program that an old Python cannot even read, so that it could not name the Python that it needs."""
    try:
        ast.parse((root / "ar1star_lat_replay.py").read_text(encoding="utf-8"), feature_version=(3, 8))
    except SyntaxError as error:
        return [f"ar1star_lat_replay.py: {error}"]
    return []


RULES = [top_level, upward, circles, unlisted, libraries, lengths, undocumented, old_pythons]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    assert rule(REPO) == []


@pytest.mark.parametrize(("rule", "file", "added", "sentence"), [
    (top_level, "board.py", "", "board.py lies at the top level"),
    (upward, "utils.py", "import harness.report", "utils imports harness.report, which lies above it"),
    (upward, "lab/fast.py", "def late():\n    import ar1star_lat_replay", "harness.encoder imports ar1star_lat_replay"),
    (circles, "models/split_net.py", "from models import mobilenet", "from models.split_net back to models.split_net"),
    (circles, "data_loader.py", "from streams import download", "from data_loader back to data_loader"),
    (unlisted, "utils.py", "import yaml", "utils uses numpy, torch, yaml; its docstring tells of numpy, torch"),
    (libraries, "models/split_net.py", "import tqdm", "models.split_net imports tqdm"),
    (lengths, "utils.py", "#\n" * 330, "330 allowed"),
    (lengths, "lab/report.py", "def long():\n" + "    1\n" * 60, "harness.report.long has 61 lines, 60 allowed"),
    (lengths, "tests/test_house.py", "#\n" * 500, "test_house.py has 500 lines or more"),
    (undocumented, "utils.py", "class New:\n    def work(self):\n        pass", "utils.New.work has no docstring"),
    (old_pythons, "ar1star_lat_replay.py", "match 1:\n    case 1:\n        pass", "ar1star_lat_replay.py: "),
])
def test_a_broken_rule_is_found(tmp_path, rule, file, added, sentence):
    for path in [*modules(REPO).values(), Path(__file__)]:
        copy = tmp_path / path.relative_to(REPO)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    with open(tmp_path / file, "a", encoding="utf-8") as out:
        out.write(f"\n{added}\n")
    assert any(sentence in found for found in rule(tmp_path)), rule(tmp_path)


@pytest.mark.parametrize("files", COPIED, ids=lambda files: files[0])
def test_a_file_copied_alone_can_be_imported(tmp_path, files):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(REPO / file, tmp_path / file)
    folder, name = (tmp_path / files[0]).parent, Path(files[0]).stem
    if len(files) > 1:
        folder, name = tmp_path, f"models.{name}"
    subprocess.run([sys.executable, "-c", f"import {name}"], cwd=folder, check=True, timeout=120)


def test_the_program_names_the_python_it_needs():
    first = (REPO / "ar1star_lat_replay.py").read_text(encoding="utf-8").split('"""', 2)[2].split("import math")[0]
    needed = re.search(r"version_info < \((\d+), (\d+)\)", first)
    assert f"Python {needed[1]}.{needed[2]} or newer" in (REPO / "README.md").read_text(encoding="utf-8")
    old = f"import sys\nsys.version_info = (3, 8, 0, 'final', 0)\n{first}\nprint('went on')"
    done = subprocess.run([sys.executable, "-c", old], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "this program needs Python 3.10 or newer, and this is Python 3.8\n"
