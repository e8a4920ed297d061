"""The results that README and docs tell are those of the records in docs/results, and --report makes them anew."""
import json
import re
import statistics
import sys
from dataclasses import asdict

import pytest
import yaml

from helpers import PARAMS, REPO
from lab.config import Config, load_config
from lab.report import report

sys.path.insert(0, str(REPO / "benchmarks"))
from fill_tables import fill

RESULTS = REPO / "docs" / "results"
RUNS = sorted(path.parent for path in RESULTS.rglob("results.jsonl"))
PAGES = [REPO / "README.md", *(REPO / "docs" / f"{name}.md" for name in ("findings", "memory", "speed"))]
# a row: run, method, at the end, last ten tests, all tests; of several orders the means, then each one's end, as 1.0 / 2.0
ROW = re.compile(r"^\| `(\w+/\w+)` \|.*?\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|"
                 r"(?: ([\d.]+(?: / [\d.]+)+)? ?\|)?(?:(?: [\d.]+ \|)* ([\d.]+) MB \|)?", re.M)


def accuracies(run):
    return [100 * json.loads(line)["test_accuracy"] for line in (run / "results.jsonl").open()]


def name_of(run):
    return run.parent.relative_to(RESULTS).as_posix()


def test_every_run_is_whole_and_small():
    assert len(RUNS) >= 5
    for run in RUNS:
        assert {file.name for file in run.iterdir()} == {"results.jsonl", "config.yaml"}
        assert len(accuracies(run)) == json.loads((run / "results.jsonl").read_text().splitlines()[-1])["batches"]
    assert sum(file.stat().st_size for file in RESULTS.rglob("*") if file.is_file()) < 3e6


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_tells_what_the_records_say(page):
    rows = ROW.findall(page.read_text(encoding="utf-8"))
    assert rows
    for name, *told, ends, mb in rows:
        runs = sorted((RESULTS / name).iterdir())
        values = [accuracies(run) for run in runs]
        each = [(v[-1], statistics.fmean(v[-10:]), statistics.fmean(v)) for v in values]
        assert told == [f"{statistics.fmean(column):.1f}" for column in zip(*each)], name
        assert ends == (" / ".join(f"{v[-1]:.1f}" for v in values) if len(runs) > 1 else ""), name
        last = json.loads((runs[0] / "results.jsonl").read_text().splitlines()[-1])
        assert mb == "" or mb == f"{last['kept_mb']:.1f}", name


@pytest.mark.parametrize("page", [*PAGES, RESULTS / "README.md"], ids=lambda page: page.parent.name + "/" + page.name)
def test_the_command_that_fills_the_tables_has_nothing_to_change(page):
    text = page.read_text(encoding="utf-8")
    assert fill(text, RESULTS) == text


@pytest.mark.parametrize("name", ["papers_ar1star", "papers_cwr_star"])
def test_a_large_drop_is_a_new_class_that_takes_the_others(name):
    """What docs/findings.md says of drops by more than 7 points."""
    rows = [json.loads(line) for line in (RESULTS / "photographs" / name / "run0_seed0" / "results.jsonl").open()]
    met, drops = set(rows[0]["classes"]), 0
    for before, row in zip(rows, rows[1:]):
        new, met = set(row["classes"]) - met, met | set(row["classes"])
        if row["test_accuracy"] < before["test_accuracy"] - .07:
            drops += 1
            assert new and all(row["per_class"][j] == 1.0 for j in new)
    assert drops >= 5


def test_every_run_is_told_of_with_the_command_that_made_it():
    """The settings that make the results, from params.cfg and the command, are those that the run had."""
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    commands = dict(re.findall(r"^\| `(\w+/\w+)` \| `([^`]+)` \|", page, re.M))
    assert commands.keys() == {name_of(run) for run in RUNS}
    for run in RUNS:
        words = commands[name_of(run)].split()
        changes = [words[k + 1].partition("=") for k, word in enumerate(words) if word == "--set"]
        changes = {key: yaml.safe_load(value) for key, _, value in changes}
        now = asdict(load_config(words[words.index("--name") + 1], PARAMS, changes))
        then = Config.SINCE | yaml.safe_load((run / "config.yaml").read_text())
        assert words[words.index("--as") + 1] == run.parent.name
        free = ("run", "seed", "weights", "device", *Config.FREE)       # weights: the file that "imagenet" stands for
        assert {k: v for k, v in now.items() if k not in free} == {k: v for k, v in then.items() if k not in free}, run


def test_the_report_has_them_all():
    text = report(RESULTS, markdown=True)
    assert "unfinished" not in text and all(run.parent.name.replace("_", "\\_") in text for run in RUNS)
