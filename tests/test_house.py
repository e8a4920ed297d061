"""The rules of the house: which file may import what, how long things are, which files can be copied alone.

Each rule is a function from a folder to the sentences that say where it is broken. Every rule is tested on
the repository, and on a copy of it in which it has been broken on purpose.
"""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import REPO, run_script

SCRIPT = "ar1star_lat_replay"
PACKAGES = {"benchmarks": 4, "teach": 4, "harness": 2, "streams": 2, "methods": 1, "models": 1}
FLOORS = {SCRIPT: 3, "data_loader": 1, "utils": 1} | PACKAGES
TORCH = {"numpy", "torch"}
ALLOWED = {     # what files of the first two floors may import, by package or module
    "utils": TORCH,
    "data_loader": TORCH | {"torchvision", "tqdm"},
    "models": {"torch", "torchvision", "models"},
    "methods": TORCH | {"utils"},
    "methods.slda": TORCH | {"utils", "models.batch_renorm"},
}
# what data_loader.py and the script hand over to, each in one place
COMMANDS = "harness.data_cli"
PAGE = "teach.server"
COPIED = [["utils.py"], ["data_loader.py"], ["models/batch_renorm.py"], ["models/split_net.py"],
          ["models/mobilenet.py", "models/batch_renorm.py", "models/split_net.py"],
          ["methods/slda.py", "utils.py", "models/batch_renorm.py"],
          *([f"methods/{path.name}", "utils.py"] for path in sorted((REPO / "methods").glob("[a-z]*.py"))
            if path.name != "slda.py")]
# methods that libraries call, which say what they do
STANDARD = {"forward", "backward", "state_dict", "load_state_dict", "extra_repr", "find_class"}


# ---- reading the program ----

def modules(root):
    """{dotted name: path} of the program, tests left out."""
    paths = [path for folder in ("", *PACKAGES) for path in sorted((root / folder).glob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
            for path in paths}


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def graph(root):
    """{module: what it imports}: our modules by their full names, libraries by their first."""
    names = modules(root)
    found = {}
    for name, path in names.items():
        tree = parsed(path)
        if name == "data_loader":       # hands its commands over
            for block in tree.body:
                if isinstance(block, ast.If) and "__main__" in ast.dump(block.test):
                    block.body = [node for node in block.body if getattr(node, "module", "") != COMMANDS]
        if name == SCRIPT:
            for block in ast.walk(tree):
                if isinstance(block, ast.If) and "attr='teach'" in ast.dump(block.test):
                    block.body = [node for node in block.body if getattr(node, "module", "") != PAGE]
        used = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                used |= inner & names.keys() or {node.module}
        used = {other if other in names else other.split(".")[0] for other in used}
        found[name] = used - set(sys.stdlib_module_names)
    return found


def inner_graph(root):
    """{module: the modules of this program that it imports}."""
    found = graph(root)
    return {name: others & found.keys() for name, others in found.items()}


# ---- the rules ----

def top_level(root):
    return [f"{path.name} lies at the top level" for path in root.glob("*.py") if path.stem not in FLOORS]


def upward(root):
    """Imports from above; of streams, all but those of each other and of data_loader."""
    broken = []
    for name, others in inner_graph(root).items():
        room = name.split(".")[0]
        for other in others:
            theirs = other.split(".")[0]
            strange = room == "streams" and theirs not in ("streams", "data_loader")
            if strange or FLOORS[theirs] > FLOORS[room]:
                broken.append(f"{name} imports {other}, which is not below it")
    return broken


def circles(root):
    """Modules from which imports lead back to themselves."""
    reach = inner_graph(root)
    for _ in reach:
        reach = {name: others.union(*(reach[other] for other in others)) for name, others in reach.items()}
    return [f"imports lead from {name} back to {name}" for name, others in reach.items() if name in others]


def first_floor(root):
    """Files that can be copied, which import more than that allows."""
    broken = []
    for name, others in graph(root).items():
        allowed = ALLOWED.get(name, ALLOWED.get(name.split(".")[0]))
        if allowed is not None:
            broken += [f"{name} imports {other}" for other in others
                       if other not in allowed and other.split(".")[0] not in allowed]
    return broken


def long_functions(root):
    return [f"{name}.{node.name} has 60 lines or more" for name, path in modules(root).items()
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 59]


def long_loops(root):
    return [f"the loop in line {node.lineno} of {SCRIPT} has more than 25 lines"
            for node in ast.walk(parsed(root / f"{SCRIPT}.py"))
            if isinstance(node, (ast.For, ast.While)) and node.end_lineno - node.lineno >= 25]


def wide_lines(root):
    paths = [*modules(root).values(), *(root / "tests").glob("*.py")]
    return [f"{path.relative_to(root)} has a line of more than 110 characters" for path in paths
            if max(map(len, path.read_text(encoding="utf-8").splitlines()), default=0) > 110]


def pressed(root):
    """A script whose lines of code hold too much: more than 10.5 nodes of syntax each, docstrings aside."""
    text = (root / f"{SCRIPT}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    can_have = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [node.body[0] for node in nodes if isinstance(node, can_have) and ast.get_docstring(node)]
    lines = [line.strip() for line in text.splitlines()]
    for docstring in docstrings:
        for k in range(docstring.lineno - 1, docstring.end_lineno):
            lines[k] = ""
    code = [line for line in lines if line and not line.startswith("#")]
    share = (len(nodes) - len(docstrings)) / len(code)
    return [f"{SCRIPT}.py has {share:.1f} nodes of syntax a line"] if share > 10.5 else []


def undocumented(root):
    """Public functions, classes and methods without a docstring."""

    def bare(name, node):
        for child in node.body:
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
                if not ast.get_docstring(child) and child.name not in STANDARD:
                    yield f"{name}.{child.name} has no docstring"
                if isinstance(child, ast.ClassDef):
                    yield from bare(f"{name}.{child.name}", child)

    return [sentence for name, path in modules(root).items() for sentence in bare(name, parsed(path))]


def old_pythons(root):
    """A program that an old Python cannot even read, so that it could not name the Python that it needs."""
    try:
        ast.parse((root / f"{SCRIPT}.py").read_text(encoding="utf-8"), feature_version=(3, 8))
    except SyntaxError as error:
        return [f"{SCRIPT}.py: {error}"]
    return []


RULES = [top_level, upward, circles, first_floor, long_functions, long_loops, wide_lines, pressed,
         undocumented, old_pythons]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    assert rule(REPO) == []


LATE = 'if __name__ == "__main__":\n    import '


@pytest.mark.parametrize(("rule", "file", "added", "sentence"), [
    (top_level, "board.py", "", "board.py lies at the top level"),
    (upward, "utils.py", "import harness.report", "utils imports harness.report"),
    (upward, "utils.py", LATE + "harness.report", "utils imports harness.report"),
    (upward, "harness/gpu.py", f"def late():\n    import {SCRIPT}", f"harness.gpu imports {SCRIPT}"),
    (upward, f"{SCRIPT}.py", "import teach.server", f"{SCRIPT} imports teach.server"),
    (upward, "data_loader.py", LATE + "harness.report", "data_loader imports harness.report"),
    (upward, "data_loader.py", "import harness.data_cli", "data_loader imports harness.data_cli"),
    (upward, "streams/demo.py", "import harness.report", "streams.demo imports harness.report"),
    (circles, "models/split_net.py", "from models import mobilenet", "from models.split_net back to"),
    (circles, "data_loader.py", "from streams import download", "from data_loader back to data_loader"),
    (first_floor, "models/split_net.py", "import tqdm", "models.split_net imports tqdm"),
    (first_floor, "methods/papers.py", "import models.split_net", "methods.papers imports models.split_net"),
    (first_floor, "methods/slda.py", "import models.split_net", "methods.slda imports models.split_net"),
    (long_functions, "harness/report.py", "def long():\n" + "    1\n" * 59, "harness.report.long has 60"),
    (long_loops, f"{SCRIPT}.py", "while True:\n" + "    1\n" * 25, "has more than 25 lines"),
    (wide_lines, "tests/test_house.py", "#" * 111, "test_house.py has a line"),
    (pressed, f"{SCRIPT}.py", "a = [[[[[" + "1," * 4000 + "]]]]]", "nodes of syntax a line"),
    (undocumented, "utils.py", "class New:\n    def work(self):\n        pass", "utils.New.work has no doc"),
    (old_pythons, f"{SCRIPT}.py", "match 1:\n    case 1:\n        pass", f"{SCRIPT}.py: "),
])
def test_a_broken_rule_is_found(tmp_path, rule, file, added, sentence):
    for path in [*modules(REPO).values(), Path(__file__)]:
        copy = tmp_path / path.relative_to(REPO)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    with open(tmp_path / file, "a", encoding="utf-8") as out:
        out.write(f"\n{added}\n")
    assert any(sentence in found for found in rule(tmp_path)), rule(tmp_path)


def test_the_top_level_holds_what_the_layout_names_alone():
    """A package, a log or a picture that lay there, too, came in by `git add --all`."""
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, text=True, capture_output=True, check=True)
    found = {file.partition("/")[0] for file in listed.stdout.splitlines()}
    assert found - {f"{SCRIPT}.py", "data_loader.py", "utils.py", *PACKAGES} == {
        ".ci", ".gitignore", "LICENSE", "README.md", "docs", "environment.yml", "experiments", "params.cfg",
        "pyproject.toml", "requirements.txt", "tests"}


# ---- what can be run ----

IMPORT_EACH = """
import importlib, sys
before = set(sys.modules)
for folder, module in (line.split("=") for line in sys.argv[1:]):
    sys.path[0] = folder
    importlib.invalidate_caches()
    importlib.import_module(module)
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("data_loader", "utils", "methods", "models", module):
            del sys.modules[name]
"""


def test_a_file_copied_alone_can_be_imported(tmp_path):
    """Each in a folder of its own, with those that it names; in one process."""
    commands = []
    for number, files in enumerate(COPIED):
        for file in files:
            copy = tmp_path / str(number) / (file if len(files) > 1 else Path(file).name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / file, copy)
        module = Path(files[0]).stem if len(files) == 1 else files[0].removesuffix(".py").replace("/", ".")
        commands.append(f"{tmp_path / str(number)}={module}")
    status, _, errors = run_script(["-c", IMPORT_EACH, *commands], tmp_path)
    assert status == 0, errors


def test_the_program_names_the_python_it_needs():
    text = (REPO / f"{SCRIPT}.py").read_text(encoding="utf-8")
    first = text.split('"""', 2)[2].split("import os")[0]
    needed = re.search(r"version_info < \((\d+), (\d+)\)", first)
    assert f"Python {needed[1]}.{needed[2]}" in (REPO / "README.md").read_text(encoding="utf-8")
    old = f"import sys\nsys.version_info = (3, 8, 0, 'final', 0)\n{first}\nprint('went on')"
    done = subprocess.run([sys.executable, "-c", old], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stdout
    assert "3.10 or newer" in done.stderr and "3.8" in done.stderr and done.stderr.count("\n") == 1
