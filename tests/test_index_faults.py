"""Each fault of CORe50's index files is refused by name, and none of them can run code."""
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core50_files import LABELS, LUP, PATHS, damage, replaced, same_batches, write_data, write_index
from data_loader import CORE50, DataError
from harness.data_cli import main


class RunsCode:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("name", ["paths", "LUP", "labels"])
def test_a_pickle_that_runs_code_is_refused_before_it_runs_and_every_truncated_one(tmp_path, name):
    file = write_data(tmp_path, "npy") / f"{name}.pkl"
    content, effect = file.read_bytes(), tmp_path / "effect"
    pickle.loads(pickle.dumps(RunsCode(effect), 2))
    effect.rmdir()  # the pickle does what it is meant to
    for protocol in range(6):
        file.write_bytes(pickle.dumps({"nicv2_391": RunsCode(effect)}, protocol))
        with pytest.raises(DataError, match=rf"{name}\.pkl.*mkdir"):
            CORE50(tmp_path)
        assert not effect.exists()
    for length in range(0, len(content), max(1, len(content) // 150)):
        file.write_bytes(content[:length])
        with pytest.raises(DataError, match=f"{name}.pkl"):
            CORE50(tmp_path)


@pytest.mark.parametrize("lup, labels, message", [
    (replaced(LUP, 1, 0, 18), LABELS, "batch 1 wants frames .* to 18, there are 0 to 17"),
    (replaced(LUP, 5, 0, 2**40), LABELS, "there are 0 to 17"),
    (replaced(LUP, 0, 0, -1), LABELS, "wants frames -1"),
    *((replaced(LUP, 0, 0, value), LABELS, "batch 0") for value in (2**70, 1.0, "1", [1])),
    (replaced(LUP, 0, 0, 0), LABELS, "twice"),
    (replaced(LUP, 3, 0, 12), LABELS, "twice"),  # a frame of the test set
    *((LUP, replaced(LABELS, 1, 0, float(value)), "batch 1") for value in ("nan", "inf")),
    (LUP, replaced(LABELS, 1, 0, -1), "labels -1 to 2"),
    (LUP, replaced(LABELS, 1, 0, 50), "labels 0 to 50, but 4 classes"),
    (LUP, replaced(LABELS, 5, 0, 10**9), "labels 0 to 1000000000, but 3 classes"),
    (LUP, replaced(LABELS, 1, 0, 0), "different labels"),
    (LUP, replaced(LABELS, 5, 0, 1), "different labels"),
    (LUP, [[LABELS[0][0][:-1], *LABELS[0][1:]]], "batch 0 has 4 frames and 3 labels"),
    (LUP, [LABELS[0][1:]], "6 batches of frames, 5 of labels"),
    ([[*LUP[0][:2], [], *LUP[0][3:]]], [[*LABELS[0][:2], [], *LABELS[0][3:]]], "batch 2 has 0 frames"),
    ([LUP[0][-1:]], LABELS, "no batches"), ([5], LABELS, "no batches"), (None, LABELS, "no list of runs"),
    ([[5, *LUP[0][1:]]], LABELS, "batch 0"), ("runs", LABELS, "no list of runs")])
def test_an_index_that_does_not_fit_is_refused(tmp_path, lup, labels, message):
    write_data(tmp_path, "npy")
    write_index(tmp_path, PATHS, lup, labels)
    with pytest.raises(DataError, match=message) as e:
        CORE50(tmp_path)
    assert "LUP.pkl" in str(e.value)


@pytest.mark.parametrize("paths, message", [
    ([], "no list"), ({}, "no list"), (PATHS[:-1], "there are 0 to 16"), ([*PATHS[:-1], 5], "holds 5"),
    ([*PATHS[:-1], PATHS[0]], "twice"), ([*PATHS[:-1], "../../etc/s1/o1/C.png"], "etc"),
    ([*PATHS[:-1], "/o3/a.png"], "/o3"),
    ([*PATHS[:-1], "C_01_01_000.png"], "expected"), ([*PATHS[:-1], "s1/o1/a\0.png"], "expected")])
def test_wrong_paths_are_refused(tmp_path, paths, message):
    write_data(tmp_path, "png")
    write_index(tmp_path, paths)
    with pytest.raises(DataError, match=message):
        CORE50(tmp_path)


@pytest.mark.parametrize("name", ["LUP", "labels"])
def test_a_table_of_another_kind_is_refused(tmp_path, name):
    write_data(tmp_path, "npy")
    for content in ([], 5, "nicv2_391", None, {1: 2}):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=f"{name}.pkl"):
            CORE50(tmp_path)
        assert main(["--check", "--data", str(tmp_path)]) == 2


OPCODES = list(b"()[]{}.NIFLUVXKMJ012lstdepbhjgqrc\x80\x81\x85\x88\x8a\x93\x95\xff")  # of the pickle language


def test_only_data_errors_come_out_of_damaged_index_files(tmp_path):
    """Of files with random damage. The memory limit is for lengths of gigabytes that some of them state."""
    write_data(tmp_path, "npy")
    rng, refused = np.random.default_rng(0), 0
    tables = {"paths.pkl": PATHS, "LUP.pkl": {"nicv2_391": LUP}, "labels.pkl": {"nicv2_391": LABELS}}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    try:
        for _ in range(1500):
            name = rng.choice(list(tables))
            good = (tmp_path / name).read_bytes()
            content = pickle.dumps(tables[name], rng.choice((0, 2, 4)))
            for _ in range(rng.choice((1, 1, 2, 4, 16))):
                at = rng.integers(len(content))
                inserted = content[:at] + bytes(rng.choice(OPCODES, 4).tolist()) + content[at:]
                content = (inserted if rng.integers(3) == 0 else damage(content, rng)) or b"\0"
            (tmp_path / name).write_bytes(content)
            try:
                CORE50(tmp_path)
            except DataError as e:
                assert ".pkl" in str(e) or "frame" in str(e)
                refused += 1
            (tmp_path / name).write_bytes(good)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert refused > 750


# anything that plain pickles can hold, nested like an index
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
PLAIN = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner)
                     | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=12)


@settings(max_examples=200)
@given(name=st.sampled_from(["paths.pkl", "LUP.pkl", "labels.pkl"]), content=PLAIN, depth=st.integers(0, 4))
def test_only_data_errors_come_out_of_any_plain_content(tmp_path, name, content, depth):
    if not (tmp_path / "core50_imgs.npy").exists():
        write_data(tmp_path, "npy")
    original = (tmp_path / name).read_bytes()
    inner = table = {"": pickle.loads(original)}
    where = ["", "nicv2_391", 0, 1, 0][:1 if name == "paths.pkl" else depth + 1]
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = content
    (tmp_path / name).write_bytes(pickle.dumps(table[""]))
    try:
        stream = CORE50(tmp_path)
        if name != "paths.pkl":  # what is accepted can only be the same index again
            same_batches(stream)
    except DataError:
        pass
    finally:
        (tmp_path / name).write_bytes(original)
