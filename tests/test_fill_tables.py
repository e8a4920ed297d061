"""benchmarks/fill_tables.py writes into the tables of a page what the records say, and nothing else."""
import sys

import pytest

from harness.report import ReportError
from helpers import REPO, make_run

sys.path.insert(0, str(REPO / "benchmarks"))
from fill_tables import fill, main

PAGE = """# Results
| run | what | at the end, % | last ten | all, % | each order | forgetting | worst class \
| kept | seconds a batch | minutes |
|---|---|---|---|---|---|---|---|---|---|---|
| `g/two` | a \\| b | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |
| `g/one` | alone | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |
| neither | | 0 | | | | | | | | |

`g/one` is told of here too.

| name | at the end |
|---|---|
| `g/one` | 7 |
"""


def write_run(folder, accuracies, device="cpu, 1 thread", run=0):
    """A finished run of 12 batches of 8.5 s: the given accuracies after the last ones, 0 before."""
    last = {"per_class": [.5, .125, None], "forgetting": .25, "kept_mb": 1.25 + run, "device": device}
    make_run(folder, [0.0] * (12 - len(accuracies)) + accuracies, run, last=last, seconds=8.5)


@pytest.fixture
def results(tmp_path):
    write_run(tmp_path / "results" / "g" / "two", [.25, .5])
    write_run(tmp_path / "results" / "g" / "two", [.5, .75], run=2)
    write_run(tmp_path / "results" / "g" / "one", [.6], "NVIDIA H200")
    return tmp_path / "results"


def test_the_columns_are_filled_and_nothing_else_is_changed(results):
    filled, before = fill(PAGE, results).splitlines(), PAGE.splitlines()
    assert [k for k, (new, old) in enumerate(zip(filled, before, strict=True)) if new != old] == [3, 4]
    # by hand: (50 + 75) / 2; (75 + 125) / 2 / 10 tests; the same / 12; 1.25, 3.25 MB; 12 * 8.5 / 60 minutes
    two = "| `g/two` | a \\| b | 62.5 | 10.0 | 8.3 | 50.0 / 75.0 | 25.0 | 12.5 | 2.2 MB | 8.5 | 2 |"
    one = "| `g/one` | alone | 60.0 | 6.0 | 5.0 | | 25.0 | 12.5 | 1.2 MB | 8.5 (GPU) | 2 (GPU) |"
    assert filled[3:5] == [two, one]


def test_the_command_writes_the_page_once(results, capfd, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert main([str(page), "--results", str(results)]) == 0 and page.read_text() == fill(PAGE, results)
    assert "2 rows changed" in capfd.readouterr().err
    assert main([str(page), "--results", str(results)]) == 0
    assert "0 rows changed" in capfd.readouterr().err


def test_a_row_without_records_is_named(results, capfd, tmp_path):
    (results / "g" / "one" / "run0_seed0" / "results.jsonl").unlink()
    with pytest.raises(ReportError, match="g/one"):
        fill(PAGE, results)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert main([str(page), "--results", str(results)]) == 2 and page.read_text() == PAGE
    assert main([str(tmp_path / "no.md")]) == 2
    assert "no.md" in capfd.readouterr().err
