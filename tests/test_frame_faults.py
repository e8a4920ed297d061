"""Each fault of CORe50's frames is refused by name, whatever their form; --check says what a folder holds."""
import os
import pickle
import random
import zipfile

import numpy as np
import pytest

import data_loader
from core50_files import IMAGES, LABELS, NPY, NPZ, PATHS, permissions, png, replaced, same_batches, write_data
from data_loader import CORE50, SCENARIOS, DataError
from harness.data_cli import main

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

@pytest.mark.parametrize("name", [NPZ, NPY])
def test_an_array_that_is_cut_off_is_refused_even_while_it_is_in_use(tmp_path, name):
    file = write_data(tmp_path, name[-3:]) / name
    stream, content = CORE50(tmp_path), file.read_bytes()
    os.truncate(file, len(content) - 3 * IMAGES[0].nbytes)
    assert len(list(stream)) == 5  # these lie before the cut
    with pytest.raises(DataError, match=f"{name} was cut off"):
        stream.get_test_set(1)
    for wrong in (*(content[:n] for n in (0, 1, 60, 100, len(content) // 2, len(content) - 1)), b"no array"):
        file.write_bytes(wrong)
        with pytest.raises(DataError, match=name):
            CORE50(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=f"{name} cannot be read any more"):
        stream.read_batch(0)


def test_damaged_headers_of_an_npz_are_refused_or_change_nothing(tmp_path):
    """Header of the zip file, of the array (in front of the pixels), directory (behind them)."""
    npz, rng, refused = write_data(tmp_path, "npz") / NPZ, random.Random(0), 0
    content = npz.read_bytes()
    first = content.index(IMAGES[0].tobytes())
    after = first + IMAGES.nbytes
    for _ in range(400):
        at = rng.choice((rng.randrange(first), rng.randrange(after, len(content))))
        flipped, more = bytes([content[at] ^ 1 << rng.randrange(8)]), rng.randrange(1, 30)
        npz.write_bytes(content[:at] + rng.choice((flipped + content[at + 1:], content[at + more:])))
        try:
            same_batches(CORE50(tmp_path))
        except DataError as e:
            assert NPZ in str(e) and "\n" not in str(e)
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("array", [
    IMAGES[:-1], IMAGES[..., :1], IMAGES[:, :64], IMAGES.astype(np.int64), IMAGES[:, 0], IMAGES.reshape(-1),
    np.asfortranarray(IMAGES), np.array([None])])
def test_an_array_of_another_shape_is_refused(tmp_path, array):
    write_data(tmp_path, "npz")
    np.savez(tmp_path / NPZ, x=array)
    with pytest.raises(DataError, match=NPZ):
        CORE50(tmp_path)


def test_an_array_of_another_size_than_its_header_says_or_of_another_name_is_refused(tmp_path):
    content = (write_data(tmp_path, "npy") / NPY).read_bytes()
    for wrong in (content[:-1], content + b"\0"):
        (tmp_path / NPY).write_bytes(wrong)
        with pytest.raises(DataError, match=f"{NPY} has .* bytes"):
            CORE50(tmp_path)
    for name, wrong in (("x", content[:-1]), ("x", content + b"\0"), ("x", content[:50]), ("y", content)):
        with zipfile.ZipFile(tmp_path / NPZ, "w") as z:
            z.writestr(f"{name}.npy", wrong)
        with pytest.raises(DataError, match=NPZ):
            CORE50(tmp_path)


def test_an_encrypted_npz_and_one_that_may_not_be_read(open_folder):
    npz = write_data(open_folder, "npz") / NPZ
    with permissions(0, npz), pytest.raises(DataError, match=f"{NPZ} cannot be read .*make it readable"):
        CORE50(open_folder)
    content = bytearray(npz.read_bytes())
    for flags in (6, content.rindex(b"PK\1\2") + 8):  # in the header and in the directory
        content[flags] |= 1
    npz.write_bytes(content)
    with pytest.raises(DataError, match="encrypted"):
        CORE50(open_folder)


def test_a_compressed_npz_is_refused_and_read_once_it_is_unzipped(tmp_path, capsys):
    npz = write_data(tmp_path, "compressed npz") / NPZ
    with pytest.raises(DataError, match=f"{NPZ} is compressed.*unzip x.npy.*{tmp_path / NPY}.*away"):
        CORE50(tmp_path)
    assert main(["--check", "--data", str(tmp_path)]) == 2
    with zipfile.ZipFile(npz) as z:
        z.extract("x.npy", tmp_path)
    (tmp_path / "x.npy").rename(tmp_path / NPY)
    npz.unlink()
    same_batches(CORE50(tmp_path))


def test_an_npz_is_read_where_it_lies_wherever_that_is_in_the_file(tmp_path):
    npz = write_data(tmp_path, "npz") / NPZ
    with zipfile.ZipFile(npz, "w") as z:  # another array first, and no ZIP64 field in the header
        for name, array in (("a.npy", IMAGES[:1]), ("x.npy", IMAGES)):
            np.save(tmp_path / name, array)
            z.write(tmp_path / name, name)
    np.save(tmp_path / NPY, IMAGES[::-1])  # other data beside the npz, such as the stand-in's: not read
    before = sorted(tmp_path.iterdir())
    with open(npz, "r+b") as f:
        content = b"in front of the zip file" + f.read()
        same_batches(CORE50(tmp_path))
        f.seek(0)
        f.write(content)
    same_batches(CORE50(tmp_path))
    assert sorted(tmp_path.iterdir()) == before


# ---- --check ----

@pytest.mark.parametrize("form", ["png", "png in root", "npz", "npy"])
def test_check_accepts_what_is_usable(tmp_path, form, capsys):
    write_data(tmp_path, form)
    for full in ([], ["--full"]):
        assert main(["--check", "--data", str(tmp_path), *full]) == 0
        out = capsys.readouterr().out
        assert "18 entries, not the official file" in out and out.count(" ok\n") == 10 and "128x128" in out
        assert "2 runs of 5 batches, 12 frames to train, 6 to test" in out and "NOT" not in out


def test_check_full_finds_one_wrong_bit_of_an_npz(tmp_path, capsys):
    npz = write_data(tmp_path, "npz") / NPZ
    content = bytearray(npz.read_bytes())
    content[len(content) // 2] ^= 1
    npz.write_bytes(content)
    assert main(["--check", "--data", str(tmp_path)]) == 0
    assert main(["--check", "--full", "--data", str(tmp_path)]) == 2
    assert f"{NPZ} is truncated or damaged" in capsys.readouterr().out


def test_check_refuses_what_is_not(tmp_path, capsys):
    assert main(["--check", "--data", str(tmp_path)]) == 2
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
