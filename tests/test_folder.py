"""Your own images as a stream: their order, labels and formats, and each fault of a folder of images."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torchvision.io import write_jpeg, write_png

from core50_files import permissions, png
from data_loader import DataError
from helpers import REPO
from streams.download import main
from streams.folder import FolderStream, read_image


def save(path, value, size=(6, 5)):
    """A grey RGB image of one value, with the writer that fits the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = torch.full((3, *size), value, dtype=torch.uint8)
    (write_png if path.suffix == ".png" else write_jpeg)(image, str(path))


@pytest.fixture
def root(tmp_path):
    """A small stream: batches 2 and 10, classes a1, a2, a10 (a2 only in test); an image's value tells its origin."""
    for value, name in ((10, "train/2/a10/x.png"), (20, "train/2/a1/10.png"), (30, "train/2/a1/9.png"),
                        (40, "train/10/a1/x.jpg"), (50, "test/a2/x.jpeg"), (60, "test/a10/x.png"),
                        (70, "test/a10/y.png")):
        save(tmp_path / name, value)
    (tmp_path / "test/a10/x.png").rename(tmp_path / "test/a10/x.PNG")  # upper case, as cameras write it
    return tmp_path


def origins(x):
    """The value of each image, checked to be the same all over (JPEG may be off by one)."""
    assert np.ptp(x.reshape(len(x), -1), axis=1).max() <= 1
    return (x[:, 0, 0, 0].round(-1)).tolist()


def test_folder_order_labels_and_formats(root):
    (root / "train/.hidden").mkdir()  # as left by other programs
    (root / "train/2/a1/notes.txt").write_text("left out")
    stream = FolderStream(root, image_size=8)
    assert stream.class_names == ["a1", "a2", "a10"] and stream.image_size == 8  # natural order
    (x2, y2), (x10, y10) = stream  # 2 before 10
    assert origins(x2) == [30, 20, 10] and y2.tolist() == [0, 0, 2]  # 9.png before 10.png, a1 before a10
    assert origins(x10) == [40] and y10.tolist() == [0]
    x, y = stream.get_test_set()
    assert x.shape == (3, 8, 8, 3) and origins(x) == [50, 60, 70] and y.tolist() == [1, 2, 2]
    assert origins(stream.get_test_set(stride=2)[0]) == [50, 70]


def test_start_batch_and_restart(root):
    stream = FolderStream(root, image_size=8, start_batch=1)
    assert len(stream) == 1 and stream.start_batch == 1
    assert [origins(x) for x, _ in stream] == [origins(x) for x, _ in stream] == [[40]]


def test_grey_palette_alpha_and_deep_images_become_rgb(root):
    flat = lambda value, kind=np.uint8: np.broadcast_to(np.array(value, kind), (8, 8, *np.shape(value)))
    images = {"grey": png(flat(90), colour=0), "palette": png(flat(1), colour=3, palette=bytes([0, 0, 0, 9, 80, 200])),
              "alpha": png(flat([9, 80, 200, 0]), colour=6), "grey_alpha": png(flat([90, 128]), colour=4),
              "deep": png(flat(90 * 256 + 200, ">u2"), depth=16, colour=0)}  # of 65,535
    colours = {"grey": 90, "palette": [9, 80, 200], "alpha": [9, 80, 200], "grey_alpha": 90, "deep": 90}  # 0 to 255
    for name, data in images.items():
        (root / "train/10/a1/x.jpg").unlink(missing_ok=True)
        (root / f"train/10/a1/{name}.png").write_bytes(data)
        x, _ = FolderStream(root, image_size=8).read_batch(1)
        assert x.shape == (1, 8, 8, 3) and (x == colours[name]).all(), name
        (root / f"train/10/a1/{name}.png").unlink()


def test_resizing_smooths(root):
    board = torch.zeros(3, 64, 32, dtype=torch.uint8)
    board[:, ::4] = 200  # one row in each of the target's: without antialias it would be missed
    board[:, :, 16:] //= 2  # and darker on the right
    write_png(board, str(root / "train/10/a1/x.png"))
    (root / "train/10/a1/x.jpg").unlink()
    (x, _), = FolderStream(root, image_size=16, start_batch=1)
    assert x.shape == (1, 16, 16, 3)
    assert np.abs(x[0, 1:-1, :6].astype(int) - 50).max() < 10 and np.abs(x[0, 1:-1, 10:].astype(int) - 25).max() < 10


@pytest.mark.parametrize("content, cause", [
    (b"", r" \(the file is empty\)"), (b"no image", r" \(no PNG, JPEG, WebP or GIF\)"), (None, ""),
    (b"BM" + bytes(60), r" \(no PNG, JPEG, WebP or GIF\)"), (b"II*\0" + bytes(60), r" \(no PNG, JPEG, WebP or GIF\)")])
def test_damaged_image_is_named_when_its_turn_comes(root, content, cause):
    path = root / "train/10/a1/x.jpg"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    batches = iter(FolderStream(root, image_size=8))
    assert len(next(batches)[0]) == 3  # read lazily: batch 2 is whole
    with pytest.raises(DataError, match=rf"train/10/a1/x\.jpg cannot be read as an image{cause}: replace or remove it"):
        next(batches)


def gif(n_frames, size, data=b"\x02\x44\x01\x00"):
    """A GIF of so many frames of one pixel, on a screen of size x size pixels."""
    side = size.to_bytes(2, "little")
    frame = b"," + bytes(4) + b"\1\0\1\0\0\x02" + data
    return b"GIF89a" + side + side + b"\x80\0\0" + b"\xff" * 6 + frame * n_frames + b";"


def test_an_animation_is_told_before_it_fills_the_memory(root):
    """As one array the 2,000 frames would take 24 GB."""
    path = root / "train/10/a1/x.jpg"
    path.write_bytes(gif(1, 2))
    assert read_image(path, 2).shape == (2, 2, 3)
    path.write_bytes(gif(2000, 2000))
    with pytest.raises(DataError, match=r"x.jpg cannot be read as an image \(an animation of 2000 frames\): replace or"):
        read_image(path, 8)
    path.write_bytes(gif(1, 2)[:-1] + b"\x07;")
    with pytest.raises(DataError, match=r"x.jpg cannot be read as an image \(a GIF with a damaged block\): replace or"):
        read_image(path, 8)


def test_an_animated_webp_is_called_an_animation(root):
    image = pytest.importorskip("PIL.Image")
    first, *others = [image.new("RGB", (9, 7), (k, 99, 99)) for k in (0, 90, 180)]
    for name in ("x.webp", "x.png"):
        first.save(root / "train/10/a1" / name, "webp", save_all=True, append_images=others)
        with pytest.raises(DataError, match=rf"{name} cannot be read as an image \(an animation\): replace or remove it$"):
            read_image(root / "train/10/a1" / name, 8)


def test_what_may_not_be_read_is_named_with_the_cause(open_folder, capsys):
    for name in ("train/1/a/x.png", "train/1/b/x.jpg", "test/a/x.png", "test/b/x.png"):
        save(open_folder / name, 90)
    for name in ("train/1/b/x.jpg", "train/1/b", "train/1", "train", "test"):
        with permissions(0, open_folder / name):
            assert main(["--check", "--data", str(open_folder)]) == 2
        told = "".join(capsys.readouterr())
        assert f"{open_folder / name} cannot be read (Permission denied): make it readable" in told, told
    with permissions(0, open_folder):
        assert main(["--check", "--data", str(open_folder)]) == 1
    assert re.search(rf"error: cannot use {open_folder}/\w+ \(Permission denied\): make it ", capsys.readouterr().err)


def test_a_folder_in_the_place_of_an_image_and_a_link_to_nothing(root):
    (root / "train/10/a1/z.png").mkdir()
    (root / "train/10/a1/y.png").symlink_to("nowhere")
    stream = FolderStream(root, image_size=8)
    assert stream.notes()[-1].endswith(f"not read, a folder inside a class folder: {root}/train/10/a1/z.png")
    with pytest.raises(DataError, match=r"train/10/a1/y.png cannot be read \(No such file or directory\): make it readable"):
        stream.read_batch(1)


@pytest.mark.parametrize("closed", [(), (1,), (2,), (1, 2), (0, 1, 2)])
def test_check_as_a_command_with_closed_outputs(root, closed):
    """With descriptor 2 closed what libjpeg says could not be caught: usable folders were refused."""
    unread = root / "test/a10/notes.bmp"
    unread.write_bytes(b"BM")
    command = f"exec '{sys.executable}' data_loader.py --check --data '{root}' {' '.join(f'{k}>&-' for k in closed)}"
    for status in (0, 2):
        done = subprocess.run(["bash", "-c", command], cwd=REPO, capture_output=True, text=True, timeout=60)
        assert done.returncode == status and done.stderr == "", done
        if 1 not in closed:
            assert f"not read, of a kind that is not read: convert it to PNG or JPEG: {unread}" in done.stdout
            assert f"{root} is {'NOT ' * (status == 2)}usable\n" in done.stdout
        (root / "train/10/a1/x.jpg").write_bytes(b"")


def test_images_are_read_where_nothing_can_be_printed(root):
    before = os.dup(2)
    try:
        os.close(2)
        x, _ = FolderStream(root, image_size=8).read_batch(1)
        with pytest.raises(OSError):
            os.fstat(2)         # still closed
    finally:
        os.dup2(before, 2)
        os.close(before)
    assert origins(x) == [40]


@pytest.mark.parametrize("missing, message", [
    ("", r"there is no folder .*"), ("train", r"train holds no batch folders"),
    ("test", r"test holds no class folders"), ("train/10/a1", r"train/10 holds no class folders"),
    ("train/10/a1/x.jpg", r"train/10/a1 holds no \.png, \.jpg, \.jpeg, \.webp or \.gif image"),
    ("test/a2/x.jpeg", r"test/a2 holds no \.png, \.jpg, \.jpeg, \.webp or \.gif image")])
def test_missing_folders_show_the_layout(root, missing, message):
    FolderStream(root)  # whole before
    (root / missing).rename(root.with_name(root.name + "_gone"))
    with pytest.raises(DataError, match=message + r": lay the images out as ROOT/train/<batch>/<class>/\*\.png and"):
        FolderStream(root)
