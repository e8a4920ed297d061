"""Each fault of CORe50's frames is refused by name, whatever form they have; --check says what a folder holds."""
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import data_loader
from core50_files import IMAGES, LABELS, LUP, PATHS, png, replaced, same_batches, write_data, write_index
from data_loader import CORE50, SCENARIOS, DataError
from helpers import REPO
from streams import download
from streams.download import main


def test_every_truncation_of_a_png_is_refused(tmp_path):
    content, file = png(IMAGES[0]), tmp_path / "frame.png"
    for length in [*range(0, len(content), 499), *range(len(content) - 25, len(content))]:
        file.write_bytes(content[:length])
        with pytest.raises(DataError, match="frame.png"):
            data_loader.read_png(file)
    file.write_bytes(content)
    np.testing.assert_array_equal(data_loader.read_png(file), IMAGES[0])


def test_every_flipped_bit_of_a_png_is_refused(tmp_path):
    """torchvision's decoder alone ends the process with a segmentation fault for some of these."""
    smooth = np.broadcast_to(np.arange(128, dtype=np.uint8)[:, None, None], (128, 128, 3))
    content, file, rng = png(smooth), tmp_path / "frame.png", random.Random(0)
    for at in [*range(70), *rng.sample(range(len(content)), 300), *range(len(content) - 20, len(content))]:
        damaged = bytearray(content)
        damaged[at] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="frame.png"):
            data_loader.read_png(file)


@pytest.mark.parametrize("content, message", [
    (png(IMAGES[0])[:20000], "truncated"), (png(IMAGES[0, ..., 0], colour=0), "greyscale"), (b"", "no PNG"),
    (png(IMAGES[0, :64]), "128x64 pixels"), (png(np.zeros((256, 256, 3), np.uint8)), "256x256 pixels"),
    (png(np.zeros((128, 128, 3), ">u2"), depth=16), "16 bits"),
    (png(np.zeros((128, 128, 4), np.uint8), colour=6), "alpha"),
    (b"\x89PNG\r\n\x1a\n" + png(IMAGES[0])[-12:], "frame"), (b"GIF89a" + bytes(100), "no PNG")])
def test_a_png_of_another_kind_is_refused_by_name(tmp_path, content, message):
    write_data(tmp_path)
    file = tmp_path / "core50_128x128" / PATHS[9]  # in batch 0
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as e:
        next(iter(CORE50(tmp_path)))
    assert str(file) in str(e.value) and "\n" not in str(e.value)
    assert main(["--check", "--full", "--data", str(tmp_path)]) == 2


def test_a_missing_png_is_named(tmp_path):
    write_data(tmp_path)
    (tmp_path / "core50_128x128" / PATHS[9]).unlink()
    with pytest.raises(DataError, match=re.escape(PATHS[9])):
        next(iter(CORE50(tmp_path)))


def test_a_truncated_npz_is_refused_and_leaves_nothing(tmp_path):
    write_data(tmp_path, "npz")
    npz = tmp_path / "core50_imgs.npz"
    content = npz.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        npz.write_bytes(content[:length])
        with pytest.raises(DataError, match="core50_imgs.npz"):
            CORE50(tmp_path)
        assert not list(tmp_path.glob("*.npy*"))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_npz_is_refused_and_leaves_nothing(tmp_path, compressed):
    write_data(tmp_path, "compressed npz" if compressed else "npz")
    npz = tmp_path / "core50_imgs.npz"
    content = bytearray(npz.read_bytes())
    content[len(content) // 2] ^= 1
    npz.write_bytes(content)
    with pytest.raises(DataError, match="core50_imgs.npz is truncated or damaged"):
        CORE50(tmp_path)
    assert not list(tmp_path.glob("*.npy*"))


@pytest.mark.parametrize("array", [
    IMAGES[:-1], IMAGES[..., :1], IMAGES[:, :64], IMAGES.astype(np.int64), IMAGES[:, 0], np.asfortranarray(IMAGES),
    np.array([None]), IMAGES.reshape(-1)])
def test_an_npz_of_another_shape_is_refused(tmp_path, array):
    write_index(tmp_path)
    np.savez(tmp_path / "core50_imgs.npz", x=array)
    with pytest.raises(DataError, match="core50_imgs.npz"):
        CORE50(tmp_path)
    np.savez(tmp_path / "core50_imgs.npz", y=IMAGES)
    with pytest.raises(DataError, match="core50_imgs.npz"):
        CORE50(tmp_path)
    assert not list(tmp_path.glob("*.npy*"))


def test_an_npz_with_a_size_other_than_its_header_is_refused(tmp_path):
    write_data(tmp_path, "npy")
    content = (tmp_path / "core50_imgs.npy").read_bytes()
    (tmp_path / "core50_imgs.npy").unlink()
    for wrong in (content[:-1], content + b"\0", content[:50]):
        with zipfile.ZipFile(tmp_path / "core50_imgs.npz", "w") as z:
            z.writestr("x.npy", wrong)
        with pytest.raises(DataError, match="core50_imgs.npz"):
            CORE50(tmp_path)
        assert not list(tmp_path.glob("*.npy*"))


@pytest.mark.parametrize("chunk", [4096, 1 << 20])  # less and more than the array
def test_the_converted_array_is_reused_and_remade_when_wrong(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(data_loader, "CHUNK", chunk)
    write_data(tmp_path, "npz")
    npy = tmp_path / "core50_imgs.npy"
    CORE50(tmp_path)
    first = npy.stat()
    CORE50(tmp_path)
    assert (npy.stat().st_mtime_ns, npy.stat().st_ino) == (first.st_mtime_ns, first.st_ino)
    content = npy.read_bytes()
    for wrong in (b"", content[:1000], content[:-1], content + b"\0"):  # half-written, in the place of the array
        npy.write_bytes(wrong)
        same_batches(CORE50(tmp_path), LUP[0][:-1], LABELS[0][:-1])
        assert npy.read_bytes() == content
    (tmp_path / "core50_imgs.npy.part").write_bytes(b"left by a kill" * 10**6)
    npy.unlink()
    same_batches(CORE50(tmp_path), LUP[0][:-1], LABELS[0][:-1])
    np.save(npy, IMAGES[::-1])  # same shape, other data: as when the stand-in's array is left beside the official npz
    same_batches(CORE50(tmp_path), LUP[0][:-1], LABELS[0][:-1])
    assert not list(tmp_path.glob("*.part"))


def test_a_wrong_array_without_its_npz_is_refused(tmp_path):
    write_data(tmp_path, "npy")
    content = (tmp_path / "core50_imgs.npy").read_bytes()
    for wrong in (b"", content[:60], content[:-1], content + b"\0"):
        (tmp_path / "core50_imgs.npy").write_bytes(wrong)
        with pytest.raises(DataError, match="core50_imgs.npy"):
            CORE50(tmp_path)


def test_an_array_cut_off_while_in_use_is_an_error_and_no_crash(tmp_path):
    stream = CORE50(write_data(tmp_path, "npy"))
    os.truncate(tmp_path / "core50_imgs.npy", 14 * IMAGES[0].nbytes)
    for _ in stream:
        pass  # these lie before the cut
    with pytest.raises(DataError, match="core50_imgs.npy was cut off"):
        stream.get_test_set(1)


def test_a_kill_during_the_conversion_costs_nothing_but_its_time(tmp_path):
    write_data(tmp_path, "npz")
    code = ("import data_loader, time, sys\nread = data_loader.read_member\ndata_loader.CHUNK = 65536\n"
            "def slow(*a):\n    print(flush=True)\n    time.sleep(.1)\n    return read(*a)\n"
            f"data_loader.read_member = slow\ndata_loader.CORE50({str(tmp_path)!r})")
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert (tmp_path / "core50_imgs.npy.part").exists() and not (tmp_path / "core50_imgs.npy").exists()
    same_batches(CORE50(tmp_path), LUP[0][:-1], LABELS[0][:-1])
    assert not list(tmp_path.glob("*.part"))


def test_two_conversions_at_once_give_the_right_array(tmp_path):
    write_data(tmp_path, "npz")
    with ThreadPoolExecutor(4) as pool:
        streams = list(pool.map(lambda _: CORE50(tmp_path), range(4)))
    for stream in streams:
        same_batches(stream, LUP[0][:-1], LABELS[0][:-1])


def test_the_conversion_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    write_data(tmp_path, "npz")
    usage = data_loader.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(data_loader.shutil, "disk_usage", lambda _: usage._replace(free=IMAGES.nbytes))
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
    write_data(tmp_path, "npz")
    CORE50(tmp_path)
    with open(tmp_path / "core50_imgs.npy", "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(bytes([IMAGES[-1, -1, -1, -1] ^ 1]))
    assert main(["--check", "--full", "--data", str(tmp_path)]) == 2
    assert "core50_imgs.npy differs from core50_imgs.npz" in capsys.readouterr().out


def test_check_refuses_what_is_not(tmp_path, capsys):
    assert main(["--check", "--data", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().out.count("missing, it comes from http") == 3
    write_data(tmp_path)
    table = {s: LABELS for s in SCENARIOS} | {"nc": [LABELS[0], replaced(LABELS, 0, 0, 7)[0]]}  # only in run 1 of nc
    (tmp_path / "labels.pkl").write_bytes(pickle.dumps(table))
    assert main(["--check", "--data", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "nc, run 1: labels 0 to 7" in out and out.count("BAD") == 1 and "NOT usable" in out
    write_index(tmp_path)
    (tmp_path / "core50_128x128" / PATHS[7]).unlink()
    assert main(["--check", "--data", str(tmp_path)]) == 2
    assert f"1 PNG files are missing, such as {PATHS[7]}" in capsys.readouterr().out


def test_an_official_file_is_called_so(tmp_path, capsys, monkeypatch):
    write_data(tmp_path)
    md5 = download.calculate_md5(tmp_path / "LUP.pkl")
    monkeypatch.setitem(data_loader.SOURCES, "LUP.pkl", ("http://nowhere", md5))
    assert main(["--check", "--data", str(tmp_path)]) == 0
    assert re.search(r"LUP.pkl +6 entries, the official file", capsys.readouterr().out)
