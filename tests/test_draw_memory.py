"""The picture of accuracy against memory: which experiments it shows, where, and how they are joined."""
import shutil
import sys

import pytest

from helpers import REPO, make_run

sys.path.insert(0, str(REPO / "benchmarks"))
import draw_memory


def made(folder, name, accuracies, mb, patterns=0, section="per_class", device="cpu, 1 thread", **more):
    """Writes a finished run, whose last record tells of mb and patterns. more: as make_run takes it."""
    last = {"memory_size": patterns, "device": device} | ({} if mb is None else {"kept_mb": mb})
    make_run(folder / name, accuracies, name=section, last=last, **more)


def test_a_point_is_the_mean_of_its_runs_last_ten_tests(tmp_path):
    for run, level in ((0, .5), (2, .7)):
        made(tmp_path, "some", [.1] * 5 + [level] * 10, 4.5, 1500, run=run, seconds=3.5 + run)
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
    coded = {p.curve: p.text for p in found if p.text not in plain}
    assert coded == {("conv5_4/dw", "pq", False): "500, 16 codes"}
    others = {("conv5_4/dw", "pq", False), ("conv5_4/dw", "float32", True), ("pool6", "float32", False)}
    assert {p.curve for p in found} == others | {("conv5_4/dw", "float32", False)}


def test_seconds_on_a_gpu_stand_beside_none_on_a_cpu(tmp_path):
    made(tmp_path, "slow", [.5] * 2, 4.4, 500)
    made(tmp_path, "quick", [.5] * 2, 9.9, 500, device="NVIDIA H200", seconds=.1)
    made(tmp_path, "both", [.5] * 2, 11.0, 500)
    made(tmp_path, "both", [.5] * 2, 11.0, 500, run=1, device="NVIDIA H200", seconds=.1)
    assert [(p.mb, p.seconds) for p in draw_memory.points(tmp_path)] == [(4.4, 30), (9.9, None), (11.0, None)]


def test_methods_in_closed_form_are_points_by_themselves(tmp_path):
    made(tmp_path, "slda", [.5] * 2, 4.4, section="slda")
    made(tmp_path, "ncm", [.4] * 2, .2, section="ncm")
    assert [p.text for p in draw_memory.points(tmp_path)] == ["nearest class mean, pool6", "SLDA, pool6"]


CHANGES = [{"section": "DEFAULT"}, {"follow": "minibatches"}, {"patterns": 0}, {"mb": None}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_is_no_comparison_of_memories_is_left_out(tmp_path, change):
    """Where one run of an experiment is none, the experiment is none."""
    made(tmp_path, "slda", [.5] * 2, 4.4, section="slda")
    made(tmp_path, "other", [.5] * 2, 3.0, 500, run=2)
    made(tmp_path, "other", [.5] * 2, **{"mb": 3.0, "patterns": 500} | change)
    if change.get("section") or change.get("follow"):       # else they are of two experiments
        shutil.rmtree(tmp_path / "other" / "run2_seed0")
    assert [p.text for p in draw_memory.points(tmp_path)] == ["SLDA, pool6"]


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    made(tmp_path / "logs", "slda", [.5] * 2, 4.4, section="slda")
    made(tmp_path / "logs", "other", [.5] * 2, 3.0, 500)
    made(tmp_path / "logs", "quick", [.5] * 2, 9.0, 500, device="NVIDIA H200")
    assert draw_memory.main([str(tmp_path / "logs"), "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_texts_keep_apart(tmp_path):
    """Four points in a corner of the picture and one far away: each text free of all the others."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    figure = Figure()
    axes = figure.subplots()
    axes.set(xlim=(0, 100), ylim=(0, 100))
    for x, y in ((50, 50), (51, 50), (50, 51), (51, 51), (90, 90)):
        axes.annotate("1,500", (x, y), xytext=(0, 0), textcoords="offset points")
    figure.draw_without_rendering()
    draw_memory.keep_apart(axes.texts)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(boxes[a].overlaps(boxes[b]) for a in range(5) for b in range(a))


def test_mistakes_are_one_sentence(tmp_path, capsys, monkeypatch):
    made(tmp_path, "other", [.5] * 2, None, 500)
    assert draw_memory.main([str(tmp_path)]) == 2
    assert "says its MB kept" in capsys.readouterr().err
    made(tmp_path, "slda", [.5] * 2, 4.4, section="slda")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_memory.main([str(tmp_path)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
