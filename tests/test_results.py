"""The results that README and docs tell are those of the records in docs/results; --report has them all."""
import json
import re
import statistics
import sys
from dataclasses import asdict, fields

import pytest
import yaml

from ar1star_lat_replay import check_layers
from harness.cli import configurations, parse_arguments
from harness.config import Config, config_of, read_experiments, read_yaml
from harness.report import report
from helpers import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
from fill_tables import PAGES, fill

RESULTS = REPO / "docs" / "results"
RUNS = sorted(path.parent for path in RESULTS.rglob("results.jsonl"))


def name_of(run):
    return run.parent.relative_to(RESULTS).as_posix()


def records(run):
    return [json.loads(line) for line in (run / "results.jsonl").open(encoding="utf-8")]


def rows_told(page):
    """[{title of a column: cell}, ...] of the rows of a page that tell of a run."""
    rows, titles = [], []
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("| run |"):
            titles = [title.strip().removesuffix(", %") for title in line.strip("|").split("|")]
        elif line.startswith("| `") and titles:
            rows.append(dict(zip(titles, (cell.strip() for cell in line.strip("|").split("|")), strict=True)))
        elif not line.startswith("|"):
            titles = []
    return rows


def test_every_run_is_whole_and_small():
    assert len(RUNS) >= 5
    for run in RUNS:
        assert {file.name for file in run.iterdir()} == {"results.jsonl", "config.yaml"}
        rows = records(run)
        assert len(rows) == rows[-1]["batches"]
    assert sum(file.stat().st_size for file in RESULTS.rglob("*") if file.is_file()) < 3e6


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/results/README.md"])
def test_a_page_tells_what_the_records_say(page):
    rows = rows_told(REPO / page)
    assert rows
    for row in rows:
        runs = [records(run) for run in sorted((RESULTS / row["run"].strip("`")).iterdir())]
        tests = [[100 * batch["test_accuracy"] for batch in run] for run in runs]
        ends = [accuracies[-1] for accuracies in tests]
        expected = {
            "at the end": f"{statistics.fmean(ends):.1f}",
            "last ten tests": f"{statistics.fmean(statistics.fmean(test[-10:]) for test in tests):.1f}",
            "all tests": f"{statistics.fmean(statistics.fmean(test) for test in tests):.1f}",
        }
        expected = {title: value for title, value in expected.items() if title in row}
        assert "at the end" in expected
        if "kept" in row:
            expected["kept"] = f"{runs[0][-1]['kept_mb']:.1f} MB"
        for title in ("each order at the end", "each seed at the end"):
            if title in row:
                expected[title] = " / ".join(f"{end:.1f}" for end in ends) if len(ends) > 1 else ""
        assert {title: row[title] for title in expected} == expected, row["run"]


@pytest.mark.parametrize("page", PAGES)
def test_the_command_that_fills_the_tables_has_nothing_to_change(page):
    text = (REPO / page).read_text(encoding="utf-8")
    assert fill(text, RESULTS) == text


def test_every_run_is_told_of_with_the_command_that_made_it():
    """The settings that make the results, from the section and the command, are those that the run had."""
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    commands = dict(re.findall(r"^\| `(\w+/\w+)` \| `([^`]+)` \|", page, re.M))
    to_run = {name for name in commands if name.startswith(("published/", "closed_forms/"))}    # no records
    assert commands.keys() - to_run == {name_of(run) for run in RUNS}

    free = {column.name for column in fields(Config) if column.metadata["may_change"]}
    free |= {"run", "seed", "weights"}      # weights: the file that "imagenet" stands for
    experiments = read_experiments()
    configs = {}
    for run in RUNS:
        command = commands[name_of(run)]
        words = command.split()
        assert words[words.index("--as") + 1] == run.parent.name
        if command not in configs:
            section = words[words.index("--name") + 1] if "--name" in words else "DEFAULT"
            changes = [words[k + 1].partition("=") for k, word in enumerate(words) if word == "--set"]
            changes = {key: read_yaml(value) for key, _, value in changes}
            configs[command] = asdict(config_of(experiments, section, changes))
        now = configs[command]
        then = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        assert now.keys() == then.keys(), run
        assert {key for key in now if now[key] != then[key]} <= free, run


def test_rows_to_be_run_are_experiments():
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\| `(?:published|closed_forms)/(\w+)` \| `python (\S+) ([^`]+)` \|", page, re.M)
    assert len(commands) == 8
    for name, program, words in commands:
        args = parse_arguments(words.split())
        assert program == "ar1star_lat_replay.py" and args.folder == name and args.download
        config, = configurations(args)
        check_layers(config)


def test_the_report_has_them_all():
    text = report(RESULTS, markdown=True)
    assert "unfinished" not in text
    assert all(run.parent.name.replace("_", "\\_") in text for run in RUNS)
