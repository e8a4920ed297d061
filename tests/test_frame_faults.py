"""Each fault of CORe50's frames is refused by name, whatever their form; --check says what a folder holds."""
import os
import pickle
import random
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import data_loader
from core50_files import IMAGES, LABELS, NPY, NPZ, PATHS, png, replaced, same_batches, write_data
from data_loader import CORE50, SCENARIOS, DataError
from harness.data_cli import main
from helpers import REPO


def refused(root, name=NPZ):
    """Asserts that CORE50 refuses a folder, naming a file, and that nothing half-written is left."""
    with pytest.raises(DataError, match=name):
        CORE50(root)
    assert name == NPY or not list(root.glob(f"{NPY}*"))


# ---- PNG files ----

def test_every_truncation_and_flipped_bit_of_a_png_is_refused(tmp_path):
    """torchvision's decoder alone ends the process with a segmentation fault for some flipped bits."""
    file, rng = tmp_path / "frame.png", random.Random(0)
    content = png(IMAGES[0])
    wrong = [content[:n] for n in [*range(0, len(content), 499), *range(len(content) - 25, len(content))]]
    smooth = png(np.broadcast_to(np.arange(128, dtype=np.uint8)[:, None, None], (128, 128, 3)))
    for at in [*range(70), *rng.sample(range(len(smooth)), 300), *range(len(smooth) - 20, len(smooth))]:
        wrong.append(smooth[:at] + bytes([smooth[at] ^ 1 << rng.randrange(8)]) + smooth[at + 1:])
    for data in wrong:
        file.write_bytes(data)
        with pytest.raises(DataError, match="frame.png"):
            data_loader.read_png(file)
    file.write_bytes(content)
    np.testing.assert_array_equal(data_loader.read_png(file), IMAGES[0])


@pytest.mark.parametrize("content, message", [
    (png(IMAGES[0])[:20000], "truncated"), (png(IMAGES[0, ..., 0], colour=0), "greyscale"), (b"", "no PNG"),
    (png(IMAGES[0, :64]), "128x64 pixels"), (png(np.zeros((256, 256, 3), np.uint8)), "256x256 pixels"),
    (png(np.zeros((128, 128, 3), ">u2"), depth=16), "16 bits"), (None, "No such file"),
    (png(np.zeros((128, 128, 4), np.uint8), colour=6), "alpha"),
    (b"\x89PNG\r\n\x1a\n" + png(IMAGES[0])[-12:], "frame"), (b"GIF89a" + bytes(100), "no PNG")])
def test_a_png_of_another_kind_is_refused_by_name(tmp_path, content, message):
    file = write_data(tmp_path) / "core50_128x128" / PATHS[9]  # in batch 0
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(DataError, match=message) as e:
        next(iter(CORE50(tmp_path)))
    assert str(file) in str(e.value) and "\n" not in str(e.value)
    assert main(["--check", "--full", "--data", str(tmp_path)]) == 2


# ---- one array ----

@pytest.mark.parametrize("form", ["npz", "compressed npz"])
def test_a_truncated_or_damaged_npz_is_refused_and_leaves_nothing(tmp_path, form):
    npz = write_data(tmp_path, form) / NPZ
    content = npz.read_bytes()
    half = len(content) // 2
    flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1:]
    for wrong in (flipped, *(content[:n] for n in (0, 1, 100, half, len(content) - 1))):
        npz.write_bytes(wrong)
        refused(tmp_path)


@pytest.mark.parametrize("array", [
    IMAGES[:-1], IMAGES[..., :1], IMAGES[:, :64], IMAGES.astype(np.int64), IMAGES[:, 0], IMAGES.reshape(-1),
    np.asfortranarray(IMAGES), np.array([None])])
def test_an_npz_of_another_shape_is_refused(tmp_path, array):
    write_data(tmp_path, "npz")
    np.savez(tmp_path / NPZ, x=array)
    refused(tmp_path)


def test_an_npz_with_another_size_than_its_header_or_another_member_is_refused(tmp_path):
    content = (write_data(tmp_path, "npy") / NPY).read_bytes()
    (tmp_path / NPY).unlink()
    for name, wrong in (("x", content[:-1]), ("x", content + b"\0"), ("x", content[:50]), ("y", content)):
        with zipfile.ZipFile(tmp_path / NPZ, "w") as z:
            z.writestr(f"{name}.npy", wrong)
        refused(tmp_path)


@pytest.mark.parametrize("chunk", [4096, 1 << 20])  # less and more than the array
def test_the_converted_array_is_reused_and_remade_when_wrong(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(data_loader, "CHUNK", chunk)
    npy = write_data(tmp_path, "npz") / NPY
    CORE50(tmp_path)
    first = npy.stat()
    CORE50(tmp_path)
    assert (npy.stat().st_mtime_ns, npy.stat().st_ino) == (first.st_mtime_ns, first.st_ino)
    content = npy.read_bytes()
    for wrong in (b"", content[:1000], content[:-1], content + b"\0"):  # half-written, in its place
        npy.write_bytes(wrong)
        same_batches(CORE50(tmp_path))
        assert npy.read_bytes() == content
    (tmp_path / f"{NPY}.part").write_bytes(b"left by a kill" * 10**6)
    npy.unlink()
    same_batches(CORE50(tmp_path))
    np.save(npy, IMAGES[::-1])  # same shape, other data: the stand-in's array beside the official npz
    same_batches(CORE50(tmp_path))
    assert not list(tmp_path.glob("*.part"))


def test_a_wrong_array_without_its_npz_is_refused(tmp_path):
    npy = write_data(tmp_path, "npy") / NPY
    stream, content = CORE50(tmp_path), npy.read_bytes()
    os.truncate(npy, 14 * IMAGES[0].nbytes)     # while it is in use
    assert len(list(stream)) == 5       # these lie before the cut
    with pytest.raises(DataError, match=f"{NPY} was cut off"):
        stream.get_test_set(1)
    for wrong in (b"", content[:60], content[:-1], content + b"\0"):
        npy.write_bytes(wrong)
        refused(tmp_path, NPY)


def test_a_kill_during_the_conversion_costs_nothing_but_its_time(tmp_path):
    write_data(tmp_path, "npz")
    code = ("import data_loader, time, sys\nread = data_loader.read_member\ndata_loader.CHUNK = 65536\n"
            "def slow(*a):\n    print(flush=True)\n    time.sleep(.1)\n    return read(*a)\n"
            f"data_loader.read_member = slow\ndata_loader.CORE50({str(tmp_path)!r})")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert (tmp_path / f"{NPY}.part").exists() and not (tmp_path / NPY).exists()
    same_batches(CORE50(tmp_path))
    assert not list(tmp_path.glob("*.part"))


def test_several_conversions_at_once_give_the_right_array(tmp_path):
    write_data(tmp_path, "npz")
    with ThreadPoolExecutor(4) as pool:
        for stream in pool.map(lambda _: CORE50(tmp_path), range(4)):
            same_batches(stream)


def test_the_conversion_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    write_data(tmp_path, "npz")
    usage = data_loader.shutil.disk_usage(tmp_path)._replace(free=IMAGES.nbytes)
    monkeypatch.setattr(data_loader.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="are free.*make room") as e:  # the header does not fit
        CORE50(tmp_path)
    assert e.value.exit_status == 1 and not list(tmp_path.glob("*.npy*"))


# ---- --check ----

@pytest.mark.parametrize("form", ["png", "png in root", "npz", "npy"])
def test_check_accepts_what_is_usable(tmp_path, form, capsys):
    write_data(tmp_path, form)
    for full in ([], ["--full"]):
        assert main(["--check", "--data", str(tmp_path), *full]) == 0
        out = capsys.readouterr().out
        assert "18 entries, not the official file" in out and out.count(" ok\n") == 10 and "128x128" in out
        assert "2 runs of 5 batches, 12 frames to train, 6 to test" in out and "NOT" not in out


def test_check_full_finds_one_wrong_bit_of_the_converted_array(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_loader, "CHUNK", 4096)  # every opening compares the first CHUNK of npz and npy
    CORE50(write_data(tmp_path, "npz"))
    with open(tmp_path / NPY, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(bytes([IMAGES[-1, -1, -1, -1] ^ 1]))
    assert main(["--check", "--full", "--data", str(tmp_path)]) == 2
    assert f"{NPY} differs from {NPZ}" in capsys.readouterr().out


def test_check_refuses_what_is_not(tmp_path, capsys):
    assert main(["--check", "--data", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().out.count("missing, it comes from http") == 3
    write_data(tmp_path)
    wrong = [LABELS[0], replaced(LABELS, 0, 0, 7)[0]]  # only in run 1
    table = dict.fromkeys(SCENARIOS, LABELS) | {"nc": wrong}
    (tmp_path / "labels.pkl").write_bytes(pickle.dumps(table))
    assert main(["--check", "--data", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "nc, run 1: labels 0 to 7" in out and out.count("BAD") == 1 and "NOT usable" in out
    write_data(tmp_path)
    (tmp_path / "core50_128x128" / PATHS[7]).unlink()
    assert main(["--check", "--data", str(tmp_path)]) == 2
    assert f"1 PNG files are missing, such as {PATHS[7]}" in capsys.readouterr().out
