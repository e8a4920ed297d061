"""README's first picture: what it shows agrees with CORe50's index, and it can be drawn."""
import importlib.util
import sys

import numpy as np
import pytest

from core50_files import write_index
from helpers import REPO, STANDIN

sys.path.insert(0, str(REPO / "benchmarks"))
import draw_stream

SAMPLE = STANDIN.parent / "core50_sample"
pytestmark = pytest.mark.skipif(not (SAMPLE.is_dir() and STANDIN.is_dir()),
                                reason=f"needs frames and the index of CORe50, and {SAMPLE} or {STANDIN} is not there")
FRAMES = {"/".join(file.parts[-3:]) for file in SAMPLE.glob("core50_128x128/*/*/*.png")}
VIDEOS = {frame.rsplit("/", 1)[0] for frame in FRAMES}


@pytest.fixture(scope="module")
def index():
    """(paths, [(indices, labels) of each batch]) of order 0 of NICv2-391, and last its test set."""
    spec = importlib.util.spec_from_file_location("make_standin", STANDIN / "make_standin.py")
    maker = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    spec.loader.exec_module(maker)
    sys.dont_write_bytecode = before
    index = maker.Index(STANDIN / "core50_index.npz")
    return index.paths, [(indices, labels.astype(np.int64)) for indices, labels in index.run("nicv2_391", 0)]


@pytest.fixture(scope="module")
def videos_of(index):
    """The videos of each training batch: [{"s1/o1", ...}]."""
    paths, batches = index
    return [{paths[k].rsplit("/", 1)[0] for k in indices} for indices, _ in batches[:-1]]


def shown(index, videos=VIDEOS):
    return draw_stream.columns(index[0], index[1][:-1], videos)


def test_every_frame_belongs_to_the_batch_under_which_it_stands(index, videos_of):
    found = shown(index)
    assert [column.batch for column in found] == list(draw_stream.SHOWN) and len(found) == 5
    for column in found:
        assert {column.video} == videos_of[column.batch] and column.frames == len(index[1][column.batch][0])
        assert FRAMES & {index[0][k] for k in index[1][column.batch][0]}, "the very frame is one of the batch's"


def test_what_is_replayed_comes_from_the_batches_that_are_named_all_of_them_earlier(index, videos_of):
    for column in shown(index):
        assert len(dict(column.replayed)) == len(column.replayed) == 6
        for video, batch in column.replayed:
            assert batch < column.batch and video in videos_of[batch] and video in VIDEOS


def test_the_memory_has_something_of_every_earlier_batch(index, videos_of, monkeypatch):
    """About fifteen patterns of each batch are left after a hundred; of one of batch 0's ten videos there may be none."""
    monkeypatch.setattr(draw_stream, "REPLAYED", 1500)
    for column in shown(index):
        earlier = {(video, batch) for batch in range(1, column.batch) for video in videos_of[batch] & VIDEOS}
        assert earlier <= set(column.replayed) <= earlier | {(video, 0) for video in videos_of[0] & VIDEOS}


def test_new_is_what_no_earlier_batch_had(index):
    batches = index[1][:-1]
    new = draw_stream.new_classes(batches)
    first = np.unique(np.concatenate([labels for _, labels in batches]), return_index=True)[1]
    of_pattern = np.repeat(np.arange(len(batches)), [len(labels) for _, labels in batches])
    assert new == np.bincount(of_pattern[first], minlength=len(batches)).tolist()
    assert new[0] == 10 and sum(new) == 50 and [new[i] for i in draw_stream.SHOWN] == [0, 0, 0, 0, 1]


def test_a_batch_without_a_frame_is_an_error(index):
    with pytest.raises(draw_stream.DataError, match="there is no frame to show of batch 103: s1/o43"):
        shown(index, VIDEOS - {"s1/o43"})


def test_a_missing_index_is_one_sentence(tmp_path, capsys):
    assert draw_stream.main(["--data", str(tmp_path), "--out", str(tmp_path / "x.png")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path} lacks paths.pkl, LUP.pkl, labels.pkl: `python data_loader.py --download" in said


def test_it_is_drawn(index, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    paths, batches = index
    write_index(tmp_path, paths, *([[part.tolist() for part in parts]] for parts in zip(*batches)))
    argv = ["--data", str(tmp_path), "--sample", str(SAMPLE), "--out"]
    assert draw_stream.main([*argv, str(tmp_path / "stream.png")]) == 0
    drawn, kept = (file.read_bytes() for file in (tmp_path / "stream.png", REPO / "docs" / "stream.png"))
    assert drawn[16:24] == kept[16:24] and len(kept) < 200_000      # its width and height
    assert draw_stream.main([*argv, str(tmp_path / "no" / "stream.png")]) == 1
    assert "No such file or directory" in capsys.readouterr().err
