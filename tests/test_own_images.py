"""Own images as people have them: other kinds of files, odd names, folders in the wrong place."""
import hashlib
import io
import shutil

import numpy as np
import pytest
import torch
from torchvision.io import encode_png

from data_loader import DataError
from harness.data_cli import main
from streams import folder as own
from streams.folder import FolderStream, read_image

Image = pytest.importorskip("PIL.Image")


def picture(k):
    return np.random.default_rng(k).integers(0, 256, (9, 7, 3), np.uint8)


def put(path, k=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(torch.from_numpy(picture(k)).permute(2, 0, 1)).numpy().tobytes())


@pytest.fixture
def root(tmp_path):
    """Two batches of two classes, and a test set."""
    for k, name in enumerate(("train/1/cat/a", "train/1/dog/a", "train/2/cat/a", "train/2/dog/b",
                              "test/cat/a", "test/dog/a")):
        put(tmp_path / "own" / f"{name}.png", k)
    return tmp_path / "own"


def saved(kind, frames=1, **options):
    file = io.BytesIO()
    first, *others = [Image.fromarray(picture(k)) for k in range(frames)]
    first.save(file, kind, **({"save_all": True, "append_images": others} if others else {}), **options)
    return file.getvalue()


# ---- kinds of files ----

@pytest.mark.parametrize("name, kind", [("x.webp", "webp"), ("x.gif", "gif"), ("x.jpg", "webp")])
def test_webp_and_gif_are_read_but_no_animations(tmp_path, name, kind):
    (tmp_path / name).write_bytes(saved(kind, **({"lossless": True} if kind == "webp" else {})))
    expected = np.asarray(Image.open(tmp_path / name).convert("RGB"))
    found = own.decode(np.fromfile(tmp_path / name, np.uint8)).permute(1, 2, 0).numpy()
    assert np.array_equal(found, expected) and read_image(tmp_path / name, 8).shape == (8, 8, 3)
    (tmp_path / name).write_bytes(saved(kind, 3))
    with pytest.raises(DataError, match=rf"{name} cannot be read as an image \(an animation"):
        read_image(tmp_path / name, 8)


def test_what_libjpeg_only_prints_is_an_error(tmp_path, capfd):
    data = bytearray(saved("jpeg", quality=95))
    data[-2:-2] = b"\x12" * 40      # behind the last block, before the end
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(DataError, match=r"x.jpg cannot be read as an image \(Corrupt JPEG data: \d+ ext"):
        read_image(tmp_path / "x.jpg", 8)
    assert capfd.readouterr().err == ""


# ---- names of classes ----

def test_an_umlaut_in_one_sign_or_in_two_is_one_class(root):
    """macOS writes the second form, most others the first."""
    for part, name in (("train/1", "K\u00e4fer"), ("train/2", "Ka\u0308fer"), ("test", "Ka\u0308fer")):
        put(root / part / name / "a.png")
    stream = FolderStream(root)
    assert stream.class_names == ["K\u00e4fer", "cat", "dog"] and stream.notes() == []
    for _, y in [*stream, stream.get_test_set()]:
        assert y.tolist().count(0) == 1


def test_names_that_differ_in_case_alone_are_refused_and_classes_of_one_part_named(root):
    put(root / "train/2/bird/a.png")
    put(root / "test/fish/a.png")
    assert FolderStream(root).notes() == ["only in train, not in test: the class bird",
                                          "only in test, not in train: the class fish"]
    put(root / "test/Cat/a.png")
    with pytest.raises(DataError, match="'Cat' and 'cat', which differ in case"):
        FolderStream(root)


# ---- what is not read ----

def test_everything_that_is_left_out_is_named(root):
    put(root / "train/1/cat/inner.png/a.png")
    put(root / "train/1/loose.png")
    put(root / "train/early.png")
    (root / "test/cat/b.bmp").write_bytes(saved("bmp"))
    (root / "test/dog/b.TIFF").write_bytes(saved("tiff"))
    put(root / "test/cat/.hidden.png")
    (root / "train/2/cat/nothing.png").symlink_to("nowhere")
    stream = FolderStream(root)
    assert {path.relative_to(root).as_posix(): why for path, why in stream.left_out} == {
        "train/1/cat/inner.png": "a folder inside a class folder", "train/1/loose.png": "in no class folder",
        "train/early.png": "in no batch folder", "test/cat/b.bmp": own.NOT_READ,
        "test/dog/b.TIFF": own.NOT_READ}
    notes = "\n".join(stream.notes())
    assert all(str(path) in notes for path, _ in stream.left_out) and "hidden" not in notes
    with pytest.raises(DataError, match=r"nothing.png cannot be read \(No such file or directory\)"):
        stream.read_batch(1)


def test_check_tells_what_a_folder_holds(root, capsys):
    assert main(["--check", "--data", str(root)]) == 0
    told = capsys.readouterr().out
    assert "4 in 2 batches to train with, 2 to test with, 2 classes: cat, dog" in told
    assert f"{root} is usable" in told
    (root / "train/2/dog/b.png").write_bytes(b"no image")
    (root / "test/cat/c.bmp").write_bytes(saved("bmp"))
    assert main(["--check", "--data", str(root)]) == 2
    told = capsys.readouterr().out
    assert f"BAD: {root}/train/2/dog/b.png cannot be read" in told and f"{root} is NOT usable" in told
    assert f"not read, {own.NOT_READ}: {root}/test/cat/c.bmp" in told


# ---- recognizing them ----

def test_images_are_known_by_what_they_are(root, tmp_path):
    first = FolderStream(root).identity()
    one, two, test = ([(file.parent.name, file.name, file.stat().st_size)
                       for file in sorted((root / part).glob("*/*"))]
                      for part in ("train/1", "train/2", "test"))
    digits = hashlib.sha256(repr(([one, two], test)).encode()).hexdigest()[:16]
    assert first == {"data": digits, "order": digits, "classes": ["cat", "dog"], "batches": [2, 2], "test": 2}
    shutil.copytree(root, tmp_path / "copy")
    assert FolderStream(tmp_path / "copy").identity() == first
    changes = {
        "a class renamed": lambda r: [p.rename(p.with_name("cow")) for p in sorted(r.glob("**/cat"))],
        "an image added": lambda r: put(r / "train/1/cat/b.png"),
        "an image replaced": lambda r: (r / "test/dog/a.png").write_bytes(b"x"),
        "an image in another class": lambda r: (r / "train/2/dog/b.png").rename(r / "train/2/cat/b.png")
        and put(r / "train/2/dog/c.png"),
        "batches in another order": lambda r: [(r / "train/1").rename(r / "train/3")]}
    for k, (what, change) in enumerate(changes.items()):
        copy = tmp_path / f"changed{k}"
        shutil.copytree(root, copy)
        change(copy)
        assert FolderStream(copy).identity()["data"] != first["data"], what
