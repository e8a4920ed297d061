"""Own images as a stream: order, labels, kinds of files, odd names, and each fault of such a folder."""
import errno
import hashlib
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.io import write_jpeg, write_png
from torchvision.transforms.functional import resize

from core50_files import permissions, png
from data_loader import DataError
from harness.data_cli import main
from helpers import run_script, seeded
from streams import folder
from streams.folder import FolderStream, read_image


def save(path, value=90, size=(6, 5)):
    """A grey RGB image of one value, with the writer that fits the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = torch.full((3, *size), value, dtype=torch.uint8)
    (write_png if path.suffix == ".png" else write_jpeg)(image, str(path))


@pytest.fixture
def root(tmp_path):
    """Batches 2 and 10, classes a1, a2 (only in test) and a10; an image's value tells its origin."""
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
    assert stream.class_names == ["a1", "a10", "a2"] and stream.image_size == 8  # natural order, test at last
    (x2, y2), (x10, y10) = stream  # 2 before 10
    assert origins(x2) == [30, 20, 10] and y2.tolist() == [0, 0, 1]  # 9.png before 10.png, a1 before a10
    assert origins(x10) == [40] and y10.tolist() == [0]
    x, y = stream.get_test_set()
    assert x.shape == (3, 8, 8, 3) and origins(x) == [50, 60, 70] and y.tolist() == [2, 1, 1]
    assert origins(stream.get_test_set(stride=2)[0]) == [50, 70] and stream.num_classes == 3
    assert [FolderStream(root, 8, start).first_classes for start in (0, 1)] == [2, 2]


def test_grey_palette_alpha_and_deep_images_become_rgb(tmp_path):
    flat = lambda value, kind=np.uint8: np.broadcast_to(np.array(value, kind), (8, 8, *np.shape(value)))
    for data, colour in (
            (png(flat(90), colour=0), 90), (png(flat([90, 128]), colour=4), 90),        # grey, with alpha
            (png(flat(90 * 256 + 200, ">u2"), depth=16, colour=0), 90),                 # of 65,535
            (png(flat([2313, 20560, 51400], ">u2"), depth=16), [9, 80, 200]),           # each times 257
            (png(flat(1), colour=3, palette=bytes([0, 0, 0, 9, 80, 200])), [9, 80, 200]),
            (png(flat([9, 80, 200, 0]), colour=6), [9, 80, 200])):
        (tmp_path / "x.png").write_bytes(data)
        x = read_image(tmp_path / "x.png", 8)
        assert x.shape == (8, 8, 3) and (x == colour).all(), colour


def test_resizing_smooths(tmp_path):
    board = torch.zeros(3, 64, 32, dtype=torch.uint8)
    board[:, ::4] = 200  # one row in each of the target's: without antialias it would be missed
    board[:, :, 16:] //= 2  # and darker on the right
    write_png(board, str(tmp_path / "x.png"))
    x = read_image(tmp_path / "x.png", 16).astype(int)
    assert x.shape == (16, 16, 3)
    assert np.abs(x[1:-1, :6] - 50).max() < 10 and np.abs(x[1:-1, 10:] - 25).max() < 10


@pytest.mark.parametrize("size", [(33, 20), (9, 7), (5, 60)])
def test_resizing_is_that_of_torchvision_bit_for_bit(tmp_path, size):
    image = torch.randint(0, 256, (3, *size), generator=seeded(1), dtype=torch.uint8)
    write_png(image, str(tmp_path / "x.png"))
    expected = resize(image, [16, 16], antialias=True).permute(1, 2, 0).numpy()
    assert np.array_equal(read_image(tmp_path / "x.png", 16), expected)


def gif(n_frames, size, end=b";"):
    """A GIF of so many frames of one pixel, on a screen of size x size pixels."""
    side = size.to_bytes(2, "little")
    frame = b"," + bytes(4) + b"\1\0\1\0\0\x02\x02\x44\x01\x00"
    return b"GIF89a" + side + side + b"\x80\0\0" + b"\xff" * 6 + frame * n_frames + end


@pytest.mark.parametrize("content, cause", [
    (b"", "the file is empty"), (b"no image", "no PNG, JPEG, WebP, GIF or BMP"), (None, "runcated"),
    (b"BM" + bytes(60), ""), (b"II*\0" + bytes(60), "no PNG, JPEG, WebP, GIF or BMP"),
    (b"\0\0\0\x18ftypheic" + bytes(60), "no PNG, JPEG, WebP, GIF or BMP"),
    (png(np.zeros((8, 8, 3), np.uint8)).replace(b"IDAT", b"JDAT"), "wrong check sum"),
    (gif(2000, 2000), "an animation"),       # as one array they would take 24 GB
    (gif(1, 2)[:-5], "truncated")])
def test_damaged_image_is_named_when_its_turn_comes(root, content, cause):
    path = root / "train/10/a1/x.jpg"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    batches = iter(FolderStream(root, image_size=8))
    assert len(next(batches)[0]) == 3  # read lazily: batch 2 is whole
    with pytest.raises(DataError, match=rf"train/10/a1/x\.jpg .*{cause}.*: replace or remove it"):
        next(batches)
    path.write_bytes(gif(1, 2))
    assert read_image(path, 2).shape == (2, 2, 3)


def test_what_may_not_be_read_is_named_with_the_cause(open_folder, capsys, monkeypatch):
    for name in ("train/1/a/x.png", "train/1/b/x.jpg", "test/a/x.png", "test/b/x.png"):
        save(open_folder / name, 90)
    for name in ("train/1/b/x.jpg", "train/1/b", "train/1", "train", "test"):
        with permissions(0, open_folder / name):
            assert main(["--check", "--data", str(open_folder)]) == 2
        told = "".join(capsys.readouterr())
        assert f"{open_folder / name} cannot be read (Permission denied): make it readable" in told, told
    with permissions(0, open_folder):
        assert main(["--check", "--data", str(open_folder)]) == 1
    assert re.search(rf"error: cannot use {open_folder}\S* \(Permission denied\)", capsys.readouterr().err)

    def refuse(path, *_):
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"x.png cannot be read \(Input/output error\): make it readable"):
        FolderStream(open_folder).read_batch(0)


@pytest.mark.parametrize("closed, status", [((1,), 2), ((2,), 0)])
def test_check_as_a_command_with_closed_outputs(root, closed, status):
    if status:
        (root / "train/10/a1/x.jpg").write_bytes(b"")
    unread = root / "test/a10/photo.heic"
    unread.write_bytes(b"ftypheic")
    found, told, errors = run_script(["data_loader.py", "--check", "--data", str(root)], closed=closed)
    assert found == status and errors == ""
    if 1 not in closed:
        assert "not read" in told and str(unread) in told
        assert f"{root} is {'NOT ' if status else ''}usable\n" in told


@pytest.mark.parametrize("missing, found, expected", [
    ("", "there is no folder {}", ""), ("train", "{} holds test/", "train and test"),
    ("test", "{} holds train/", "train and test"),
    ("train/10/a1", "{}/train/10 holds nothing", "class folders"),
    ("train/10/a1/x.jpg", "{}/train/10/a1 holds nothing", "images (.png, "),
    ("test/a2/x.jpeg", "{}/test/a2 holds nothing", "images (.png, ")])
def test_missing_folders_show_the_layout(root, missing, found, expected):
    FolderStream(root)  # whole before
    (root / missing).rename(root.with_name(root.name + "_gone"))
    parts = (found.format(root), expected, "ROOT/train/<batch>/<class>/*", "ROOT/test/<class>/*")
    assert_said(root, *parts)


def assert_said(root, *parts):
    """Asserts that FolderStream(root) is refused in a sentence with these parts."""
    with pytest.raises(DataError) as refused:
        FolderStream(root)
    assert all(part in str(refused.value) for part in parts), refused.value


def test_a_folder_of_another_layout_is_told_what_it_holds(pets):
    assert_said(pets / "train", f"{pets}/train holds 1/, 2/", "train and test", f"give {pets}")
    assert_said(pets / "train/1", f"{pets}/train/1 holds cat/, dog/", "train and test", "ROOT/train/<batch>")

    (pets / "train").rename(pets / "Train")
    assert_said(pets, f"{pets} holds Train/, test/", "train and test, in small letters")
    (pets / "Train/1").rename(pets / "train")       # classes, and no batches
    assert_said(pets, f"{pets}/train/cat holds a.png", "class folders", "ROOT/train/<batch>/<class>/*")

    shutil.rmtree(pets / "train")
    (pets / "Train").rename(pets / "train")
    (pets / "test").rename(pets / "1")
    (pets / "test").mkdir()
    (pets / "1").rename(pets / "test/1")            # batches in the test set
    assert_said(pets, f"{pets}/test/1 holds cat/, dog/", "images (.png, ", "ROOT/test/<class>/*")


def test_a_class_of_images_that_are_not_read_is_told_to_convert_them(pets):
    (pets / "train/1/cat/a.png").rename(pets / "train/1/cat/IMG_1.HEIC")
    assert_said(pets, f"{pets}/train/1/cat holds IMG_1.HEIC", ".png, .jpg", "convert them to PNG or JPEG")


# ---- other kinds of files, odd names, what is not read ----

@pytest.fixture
def pets(tmp_path):
    """Two batches of two classes, and a test set."""
    for name in ("train/1/cat/a", "train/1/dog/a", "train/2/cat/a", "train/2/dog/b", "test/cat/a",
                 "test/dog/a"):
        save(tmp_path / "own" / f"{name}.png")
    return tmp_path / "own"


def saved(kind, frames=1, **options):
    """The bytes of a file of random pictures, as Pillow writes them."""
    file = io.BytesIO()
    pictures = np.random.default_rng(0).integers(0, 256, (frames, 9, 7, 3), np.uint8)
    first, *others = map(Image.fromarray, pictures)
    first.save(file, kind, **({"save_all": True, "append_images": others} if others else {}), **options)
    return file.getvalue()


@pytest.mark.parametrize("name, kind", [("x.webp", "webp"), ("x.gif", "gif"), ("x.jpg", "webp"),
                                        ("x.png", "png"), ("x.bmp", "bmp")])
def test_other_kinds_are_read_but_no_animations(tmp_path, name, kind):
    (tmp_path / name).write_bytes(saved(kind, **({"lossless": True} if kind == "webp" else {})))
    expected = np.asarray(Image.open(tmp_path / name).convert("RGB"))
    assert np.array_equal(folder.decode((tmp_path / name).read_bytes()), expected)
    assert read_image(tmp_path / name, 8).shape == (8, 8, 3)
    if kind == "bmp":
        return
    (tmp_path / name).write_bytes(saved(kind, 3))
    with pytest.raises(DataError, match=rf"{name} cannot be read as an image \(an animation"):
        read_image(tmp_path / name, 8)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_images_stand_upright(kind):
    """EXIF's eight orientations: where row 0 and column 0 of the stored pixels belong."""
    lossless = {"lossless": True} if kind == "webp" else {}
    stored = np.asarray(folder.decode(saved(kind, **lossless)))
    flat, turned = stored, stored.swapaxes(0, 1)
    upright = {1: flat, 2: flat[:, ::-1], 3: flat[::-1, ::-1], 4: flat[::-1],
               5: turned, 6: turned[:, ::-1], 7: turned[::-1, ::-1], 8: turned[::-1]}
    for orientation, expected in upright.items():
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        found = folder.decode(saved(kind, exif=exif, **lossless))
        assert np.array_equal(found, expected), orientation


def test_whole_images_with_an_oddity_are_taken(capfd):
    """Other revisions of JFIF, bytes between the parts or behind the end, EXIF data that are none, phones."""
    jpeg = saved("jpeg")
    revision = jpeg.index(b"JFIF\0") + 5
    between = jpeg.index(b"\xff\xc0")
    odd = [jpeg[:revision] + b"\0\0" + jpeg[revision + 2:], jpeg[:revision] + b"\2\1" + jpeg[revision + 2:],
           jpeg[:between] + b"\x12\x34" + jpeg[between:], jpeg + b"\0", saved("jpeg", exif=b"Exif\0\0no"),
           saved("mpo", 2)]     # a phone's JPEG with a second picture behind the first
    for data in odd:
        assert np.array_equal(folder.decode(data), folder.decode(jpeg))
    webp = saved("webp")
    assert np.array_equal(folder.decode(webp + b"\0"), folder.decode(webp))
    assert "".join(capfd.readouterr()) == ""


# ---- names of classes ----

def test_an_umlaut_in_one_sign_or_in_two_is_one_class(pets):
    """macOS writes the second form, most others the first."""
    for part, name in (("train/1", "K\u00e4fer"), ("train/2", "Ka\u0308fer"), ("test", "Ka\u0308fer")):
        save(pets / part / name / "a.png")
    stream = FolderStream(pets)
    assert stream.class_names == ["K\u00e4fer", "cat", "dog"] and stream.notes() == []
    for _, y in [*stream, stream.get_test_set()]:
        assert y.tolist().count(0) == 1


def test_names_that_differ_in_case_alone_are_refused_and_classes_of_one_part_named(pets):
    save(pets / "train/2/bird/a.png")
    save(pets / "test/fish/a.png")
    assert FolderStream(pets).notes() == ["only in train, not in test: the class bird",
                                          "only in test, not in train: the class fish"]
    save(pets / "test/Cat/a.png")
    with pytest.raises(DataError, match="'Cat' and 'cat', which differ in case"):
        FolderStream(pets)


# ---- what is not read ----

def test_everything_that_is_left_out_is_named(pets):
    save(pets / "train/1/cat/inner.png/a.png")
    save(pets / "train/1/loose.png")
    save(pets / "train/early.png")
    (pets / "test/cat/b.heic").write_bytes(b"ftypheic")
    (pets / "test/dog/b.TIFF").write_bytes(saved("tiff"))
    save(pets / "test/cat/.hidden.png")
    (pets / "train/2/cat/nothing.png").symlink_to("nowhere")
    stream = FolderStream(pets)
    assert {path.relative_to(pets).as_posix(): why for path, why in stream.left_out} == {
        "train/1/cat/inner.png": "a folder inside a class folder", "train/1/loose.png": "in no class folder",
        "train/early.png": "in no batch folder", "test/cat/b.heic": folder.NOT_READ,
        "test/dog/b.TIFF": folder.NOT_READ}
    notes = "\n".join(stream.notes())
    assert all(str(path) in notes for path, _ in stream.left_out) and "hidden" not in notes
    with pytest.raises(DataError, match=r"nothing.png cannot be read \(No such file or directory\)"):
        stream.read_batch(1)


def test_check_tells_what_a_folder_holds(pets, capsys):
    assert main(["--check", "--data", str(pets)]) == 0
    told = capsys.readouterr().out
    assert "4 in 2 batches to train with, 2 to test with, 2 classes: cat, dog" in told
    assert f"{pets} is usable" in told
    (pets / "train/2/dog/b.png").write_bytes(b"no image")
    (pets / "test/cat/c.tif").write_bytes(saved("tiff"))
    assert main(["--check", "--data", str(pets)]) == 2
    told = capsys.readouterr().out
    assert f"BAD: {pets}/train/2/dog/b.png cannot be read" in told and f"{pets} is NOT usable" in told
    assert f"not read, {folder.NOT_READ}: {pets}/test/cat/c.tif" in told


# ---- recognizing them ----

def test_images_are_known_by_what_they_are(pets, tmp_path):
    first = FolderStream(pets).identity()
    one, two, test = ([(file.parent.name, file.name, file.stat().st_size)
                       for file in sorted((pets / part).glob("*/*"))]
                      for part in ("train/1", "train/2", "test"))
    digits, of_one, of_two = (hashlib.sha256(repr(part).encode()).hexdigest()[:16]
                              for part in (([one, two], test), one, two))
    assert first == {"data": digits, "order": digits, "classes": ["cat", "dog"], "batches": [2, 2], "test": 2,
                     "content": [["1", of_one], ["2", of_two]]}
    shutil.copytree(pets, tmp_path / "copy")
    assert FolderStream(tmp_path / "copy").identity() == first
    changes = {
        "a class renamed": lambda r: [p.rename(p.with_name("cow")) for p in sorted(r.glob("**/cat"))],
        "an image added": lambda r: save(r / "train/1/cat/b.png"),
        "an image replaced": lambda r: (r / "test/dog/a.png").write_bytes(b"x"),
        "an image in another class": lambda r: (r / "train/2/dog/b.png").rename(r / "train/2/cat/b.png")
        and save(r / "train/2/dog/c.png"),
        "batches in another order": lambda r: [(r / "train/1").rename(r / "train/3")]}
    for k, (what, change) in enumerate(changes.items()):
        copy = tmp_path / f"changed{k}"
        shutil.copytree(pets, copy)
        change(copy)
        assert FolderStream(copy).identity()["data"] != first["data"], what
