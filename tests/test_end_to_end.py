"""The benchmark of a whole run: the data that it makes, and that what it tells of a run adds up."""
import re
import sys

import numpy as np
import pytest

from data_loader import CORE50
from helpers import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import end_to_end

SMALL = [f"--set={word}" for word in ("weights=none", "width=0.1", "rm_sz=20", "mb_size=16", "device=cpu",
                                      "init_train_ep=1", "inc_train_ep=1")]


def test_both_forms_hold_the_same_frames_wherever_a_run_reads(tmp_path):
    paths, batches = end_to_end.make_index(tmp_path, frames=2)
    assert len(paths) == 1100 and [len(batches), len(batches[0]), len(batches[-1])] == [392, 20, 300]
    used = end_to_end.frames_read(batches, 2)
    assert len(used) < 100
    served = []
    for make in end_to_end.MAKERS.values():
        make(tmp_path, paths, used)
        stream = CORE50(tmp_path)
        assert len(stream) == 391 and len(stream.test[1]) == 300
        served.append([stream.identity()["data"], stream.get_test_set()[0],
                       *(stream.read_batch(i)[0] for i in range(3))])
    for png, npz in zip(*served):
        assert np.array_equal(png, npz)
    blocks = (tmp_path / "core50_imgs.npz").stat().st_blocks
    assert 512 * blocks < 0.5 * 1100 * 128 * 128 * 3        # holes take no room


def test_the_parts_of_a_run_add_up_to_its_seconds(tmp_path, capsys):
    paths, batches = end_to_end.make_index(tmp_path, frames=2)
    end_to_end.make_png(tmp_path, paths, end_to_end.frames_read(batches, 1))
    whole, seconds, rows = end_to_end.time_run(tmp_path, ["--max-batches", 2, *SMALL])
    assert [len(rows), len(seconds["record"]), len(seconds["checkpoint"])] == [2, 2, 2]
    assert all(seconds[part][0] > 0 for part in (*end_to_end.ONCE, "end"))
    end_to_end.print_run("PNG files", whole, seconds, rows)
    printed = capsys.readouterr().out
    other = float(re.search(r"other (\S+)", printed)[1])
    assert 0 <= other < 0.2 * whole and "all batches" in printed


def test_a_run_that_fails_is_one_sentence(tmp_path):
    with pytest.raises(end_to_end.RunFailed, match="there is no folder"):
        end_to_end.time_run(tmp_path / "nowhere", SMALL)
