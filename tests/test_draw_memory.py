"""The picture of accuracy against memory: which experiments it shows, where, and how they are joined."""
import json
import sys
from dataclasses import asdict, replace

import pytest
import yaml

from helpers import REPO
from lab.config import load_config

sys.path.insert(0, str(REPO / "benchmarks"))
import draw_memory


def made(folder, name, accuracies, mb, patterns=0, run=0, seconds=2.0, section="per_class", **settings):
    """Writes a finished run; its last record tells of mb and patterns."""
    config = asdict(replace(load_config(section, REPO / "params.cfg"), run=run, **settings))
    place = folder / name / f"run{run}_seed0"
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"batch": i, "batches": len(accuracies), "test_accuracy": a, "seconds_train": seconds, "seconds_test": .5,
             "n_test": 10, "data": "d"} for i, a in enumerate(accuracies)]
    rows[-1] |= {"memory_size": patterns} | ({} if mb is None else {"kept_mb": mb})
    (place / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_point_is_the_mean_of_its_runs_last_ten_tests(tmp_path):
    for run, level in ((0, .5), (2, .7)):
        made(tmp_path, "some", [.1] * 5 + [level] * 10, 4.5, 1500, run=run, seconds=3 + run)
    point, = draw_memory.points(tmp_path)
    assert point.accuracy == pytest.approx(.6) and point.mb == 4.5
    assert point.seconds == pytest.approx((3.5 + 5.5) / 2)
    assert point.curve == ("conv5_4/dw", "float32", False) and point.text == "1,500"


def test_a_curve_goes_from_the_smallest_memory_to_the_largest_of_one_form(tmp_path):
    for patterns in (500, 4000, 60):
        made(tmp_path, f"n{patterns}", [.5] * 2, patterns / 10, patterns, rm_sz=patterns)
    made(tmp_path, "coded", [.6] * 2, 3.0, 500, rm_dtype="pq", pq_codes=16)
    made(tmp_path, "beside", [.6] * 2, 7.0, 500, slda_weight=.25)
    made(tmp_path, "pool6", [.6] * 2, 2.0, 500, latent_layer_num="pool6")
    found = draw_memory.points(tmp_path)
    plain = [p.text for p in found if p.curve == ("conv5_4/dw", "float32", False)]
    assert plain == ["60", "500", "4,000"]
    assert {p.curve: p.text for p in found if p.text not in plain} == {("conv5_4/dw", "pq", False): "500, 16 codes"}
    assert {p.curve for p in found} == {("conv5_4/dw", "float32", False), ("conv5_4/dw", "pq", False),
                                        ("conv5_4/dw", "float32", True), ("pool6", "float32", False)}


def test_methods_in_closed_form_are_points_by_themselves(tmp_path):
    made(tmp_path, "slda", [.5] * 2, 4.4, section="slda")
    made(tmp_path, "ncm", [.4] * 2, .2, section="ncm")
    assert [p.text for p in draw_memory.points(tmp_path)] == ["nearest class mean, pool6", "SLDA, pool6"]


@pytest.mark.parametrize("change", [dict(section="DEFAULT"), dict(follow="minibatches"), dict(patterns=0), dict(mb=None)],
                         ids=str)
def test_what_is_no_comparison_of_memories_is_left_out(tmp_path, change):
    made(tmp_path, "slda", [.5] * 2, 4.4, section="slda")
    made(tmp_path, "other", [.5] * 2, **{"mb": 3.0, "patterns": 500} | change)
    assert [p.text for p in draw_memory.points(tmp_path)] == ["SLDA, pool6"]


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    made(tmp_path / "logs", "slda", [.5] * 2, 4.4, section="slda")
    made(tmp_path / "logs", "other", [.5] * 2, 3.0, 500)
    assert draw_memory.main([str(tmp_path / "logs"), "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_one_sentence(tmp_path, capsys, monkeypatch):
    made(tmp_path, "other", [.5] * 2, None, 500)
    assert draw_memory.main([str(tmp_path)]) == 2
    assert "says how many MB" in capsys.readouterr().err
    made(tmp_path, "slda", [.5] * 2, 4.4, section="slda")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_memory.main([str(tmp_path)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
