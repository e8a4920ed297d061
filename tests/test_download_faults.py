"""Fetching the data over a network and onto a disk that fail in every way: a server on 127.0.0.1 injects the faults."""
import builtins
import contextlib
import errno
import hashlib
import io
import os
import subprocess
import zipfile

import pytest

import data_loader
from core50_files import IMAGES, LABELS, LUP, NPZ, PATHS, complete, png, same_batches, write_data, write_index
from data_loader import CORE50, DataError, FetchError
from streams import download as fetching
from streams.download import download, main

# ---- faults of the network ----

@pytest.mark.parametrize("form", ["png", "npz"])
def test_a_download_cut_off_goes_on_where_it_was(tmp_path, mirror, distribution, form):
    write_index(tmp_path)
    name = NPZ if form == "npz" else "core50_128x128.zip"
    mirror.cuts = [100_000, 1, 200_000]
    download(tmp_path, form, mirror.url)
    assert mirror.log == [(name, None), (name, "bytes=100000-"), (name, "bytes=100001-"), (name, "bytes=300001-")]
    complete(tmp_path, form)


def test_a_server_that_stays_away_is_left_and_the_next_run_goes_on(tmp_path, mirror, distribution, capsys):
    write_index(tmp_path)
    mirror.cuts = [100_000] + [0] * 100
    assert main(["--download", "--form", "npz", "--data", str(tmp_path), "--base-url", mirror.url]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {mirror.url}/{NPZ}") and error.endswith("it goes on from byte 100000")
    assert len(mirror.log) == 1 + fetching.ATTEMPTS
    assert (tmp_path / f"{NPZ}.part").read_bytes() == distribution[NPZ][:100_000] and not (tmp_path / NPZ).exists()
    mirror.cuts, mirror.log = [], []
    download(tmp_path, "npz", mirror.url)
    assert mirror.log == [(NPZ, "bytes=100000-")]
    assert (tmp_path / NPZ).read_bytes() == distribution[NPZ]
    complete(tmp_path, "npz")


@pytest.mark.parametrize("form", ["png", "npz"])
def test_wrong_bytes_are_refused_and_not_left_in_place(tmp_path, mirror, distribution, form, capsys):
    name = NPZ if form == "npz" else "core50_128x128.zip"
    wrong = bytearray(distribution[name])
    wrong[len(wrong) // 2] ^= 1
    mirror.files[name] = bytes(wrong)
    assert main(["--download", "--form", form, "--data", str(tmp_path), "--base-url", mirror.url]) == 1
    assert "wrong bytes" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(f.name for f in tmp_path.iterdir() if f.name[0] != ".") == sorted(data_loader.INDEX_FILES)
    mirror.files[name] = distribution[name]
    download(tmp_path, form, mirror.url)
    complete(tmp_path, form)


def test_a_server_without_ranges_is_asked_for_everything_again(tmp_path, mirror):
    write_index(tmp_path)
    mirror.ranges, mirror.cuts = False, [100_000, 50_000]
    download(tmp_path, "npz", mirror.url)
    assert [wanted for _, wanted in mirror.log] == [None, "bytes=100000-", "bytes=50000-"]
    complete(tmp_path, "npz")


def test_a_server_without_ranges_that_always_breaks_off_is_left(tmp_path, mirror):
    write_index(tmp_path)
    mirror.ranges, mirror.cuts = False, [100_000] + [50_000, 60_000] * 50
    with pytest.raises(FetchError, match="run the same again"):
        download(tmp_path, "npz", mirror.url)
    assert len(mirror.log) == 1 + fetching.ATTEMPTS


def test_404_is_told_at_once(tmp_path, mirror, capsys):
    del mirror.files["LUP.pkl"]
    assert main(["--download", "--data", str(tmp_path), "--base-url", mirror.url]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{mirror.url}/LUP.pkl" in error and "404" in error and "--base-url" in error
    assert [name for name, _ in mirror.log] == ["paths.pkl", "LUP.pkl"]


def test_an_overloaded_server_is_asked_again(tmp_path, mirror):
    mirror.codes = [503, 429, 500]
    download(tmp_path, "npz", mirror.url)
    assert len(mirror.log) == 7
    complete(tmp_path, "npz")


def test_a_part_that_is_longer_than_the_file_is_dropped(tmp_path, mirror, distribution):
    write_index(tmp_path)
    (tmp_path / f"{NPZ}.part").write_bytes(bytes(len(distribution[NPZ]) + 5))
    download(tmp_path, "npz", mirror.url)
    assert [wanted for _, wanted in mirror.log] == [f"bytes={len(distribution[NPZ]) + 5}-", None]
    complete(tmp_path, "npz")


def test_a_part_that_is_complete_is_taken(tmp_path, mirror, distribution):
    write_index(tmp_path)
    (tmp_path / f"{NPZ}.part").write_bytes(distribution[NPZ])
    download(tmp_path, "npz", mirror.url)
    assert [wanted for _, wanted in mirror.log] == [f"bytes={len(distribution[NPZ])}-"]
    complete(tmp_path, "npz")


def test_a_part_of_another_version_is_found_out(tmp_path, mirror):
    write_index(tmp_path)
    (tmp_path / f"{NPZ}.part").write_bytes(bytes(1000))
    with pytest.raises(FetchError, match="wrong bytes"):
        download(tmp_path, "npz", mirror.url)
    assert not list(tmp_path.glob(f"{NPZ}*"))
    download(tmp_path, "npz", mirror.url)
    complete(tmp_path, "npz")


def test_no_server_and_no_address(tmp_path, mirror, capsys):
    assert main(["--download", "--data", str(tmp_path)]) == 1  # the "official" servers of the fixture: nobody listens
    assert "127.0.0.1:1/official/paths.pkl" in capsys.readouterr().err
    for address in ("nonsense", "http://[", "no://where", "http://a b/"):
        assert main(["--download", "--data", str(tmp_path), "--base-url", address]) in (1, 2)
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and error[0].startswith("error: ") and address in error[0]
    with pytest.raises(DataError, match="choose png or npz"):
        download(tmp_path, "jpg", mirror.url)
    assert mirror.log == []


# ---- faults of the disk ----

def test_too_little_free_space_is_told_before_a_byte_is_written(tmp_path, mirror, distribution, monkeypatch):
    write_index(tmp_path)
    usage = data_loader.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(data_loader.shutil, "disk_usage", lambda _: usage._replace(free=len(distribution[NPZ]) - 1))
    with pytest.raises(FetchError, match="are free.*make room") as e:
        download(tmp_path, "npz", mirror.url)
    assert str(tmp_path) in str(e.value) and not list(tmp_path.glob(f"{NPZ}*"))


class FullDisk:
    """An open file on a disk that takes 100,000 more bytes."""

    def __init__(self, file):
        self.file, self.left = file, 100_000

    def write(self, block):
        n = self.file.write(block[:self.left])
        self.left -= n
        if n < len(block):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return n

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@contextlib.contextmanager
def full_disk(monkeypatch):
    def limited_open(file, mode="r", *rest):
        opened = builtins.open(file, mode, *rest)
        return FullDisk(opened) if str(file).endswith(".part") else opened
    with monkeypatch.context() as patch:
        for module in (data_loader, fetching):
            patch.setattr(module, "open", limited_open, raising=False)
        yield


def test_a_disk_that_fills_up_during_the_download(tmp_path, mirror, monkeypatch, capsys):
    write_index(tmp_path)
    with full_disk(monkeypatch):
        assert main(["--download", "--form", "npz", "--data", str(tmp_path), "--base-url", mirror.url]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{NPZ}.part cannot be written (No space left on device)" in error and "make room" in error
    assert (tmp_path / f"{NPZ}.part").stat().st_size == 100_000 and len(mirror.log) == 1
    download(tmp_path, "npz", mirror.url)
    assert mirror.log[1:] == [(NPZ, "bytes=100000-")]
    complete(tmp_path, "npz")


def test_a_disk_that_fills_up_during_unpacking_and_conversion(tmp_path, mirror, distribution, monkeypatch):
    write_index(tmp_path)
    (tmp_path / "core50_128x128.zip").write_bytes(distribution["core50_128x128.zip"])
    monkeypatch.setattr(FullDisk, "__init__", lambda self, file: self.__dict__.update(file=file, left=30_000))
    with full_disk(monkeypatch), pytest.raises(FetchError, match="No space left"):
        download(tmp_path, "png", mirror.url)
    assert (tmp_path / "core50_128x128.zip").exists() and not list(tmp_path.rglob("*.png"))
    download(tmp_path, "png", mirror.url)
    complete(tmp_path, "png")
    write_data(tmp_path, "npz")
    with full_disk(monkeypatch):
        with pytest.raises(FetchError, match="No space left"):
            CORE50(tmp_path)
        assert main(["--check", "--data", str(tmp_path)]) == 1
    assert not list(tmp_path.glob("*.npy*"))
    same_batches(CORE50(tmp_path), LUP[0][:-1], LABELS[0][:-1])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small tmpfs ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(small_disk, mirror, distribution, monkeypatch, capsys):
    arguments = ["--download", "--form", "npz", "--data", str(small_disk), "--base-url", mirror.url]
    assert main(arguments) == 1  # the file is larger than the disk
    assert "GB are free" in capsys.readouterr().err.splitlines()[-1] and not list(small_disk.glob(f"{NPZ}*"))
    usage = data_loader.shutil.disk_usage(small_disk)
    # as if others filled the disk only after the look at its free space
    monkeypatch.setattr(data_loader.shutil, "disk_usage", lambda _: usage._replace(free=2**40))
    assert main(arguments) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    part = small_disk / f"{NPZ}.part"
    kept = part.read_bytes()
    assert 100_000 < len(kept) < 512 * 1024 and distribution[NPZ].startswith(kept)
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)  # somebody makes room
    mirror.log.clear()
    assert main(arguments) == 0
    assert mirror.log == [(NPZ, f"bytes={len(kept)}-")]
    complete(small_disk, "npz")


def test_a_folder_that_cannot_be_written(tmp_path, mirror, capsys):
    (tmp_path / "file").write_text("")
    for folder, status in (("file", 2), ("file/below", 1)):
        assert main(["--download", "--data", str(tmp_path / folder), "--base-url", mirror.url]) == status
        assert capsys.readouterr().err.startswith("error: ")


def test_a_file_of_the_user_is_never_overwritten(tmp_path, mirror, capsys):
    (tmp_path / "LUP.pkl").write_bytes(b"mine")
    assert main(["--download", "--data", str(tmp_path), "--base-url", mirror.url]) == 2
    assert "LUP.pkl exists, but is not the official file" in capsys.readouterr().err
    assert (tmp_path / "LUP.pkl").read_bytes() == b"mine"


# ---- faults of the archive ----

@pytest.mark.parametrize("name", ["../evil.png", "core50_128x128/../../evil.png", "{absolute}/evil.png",
                                  "C:\\evil.png", "..\\evil.png", "C:evil.png"])
def test_an_archive_that_writes_outside_is_refused_before_it_writes(tmp_path, mirror, monkeypatch, name):
    root, archive = tmp_path / "data", io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("core50_128x128/s1/o1/C_01_01_000.png", png(IMAGES[0]))
        z.writestr(name.format(absolute=tmp_path), "evil")
    mirror.files["core50_128x128.zip"] = archive.getvalue()
    url, md5 = data_loader.SOURCES["core50_128x128.zip"][0], hashlib.md5(archive.getvalue()).hexdigest()
    monkeypatch.setitem(data_loader.SOURCES, "core50_128x128.zip", (url, md5))  # even with the right md5
    with pytest.raises(DataError, match="would write outside"):
        download(root, "png", mirror.url)
    assert not list(tmp_path.rglob("*.png"))


def test_unpacking_goes_on_after_a_kill(tmp_path, mirror, distribution):
    """State after a kill in the middle: the archive, some frames complete, one as .part, one short (power failure)."""
    write_index(tmp_path)
    (tmp_path / "core50_128x128.zip").write_bytes(distribution["core50_128x128.zip"])
    done, short, part = (tmp_path / "core50_128x128" / p for p in PATHS[:3])
    done.parent.mkdir(parents=True)
    part.parent.mkdir(parents=True)
    done.write_bytes(png(IMAGES[0]))
    short.write_bytes(b"")
    part.with_name(part.name + ".part").write_bytes(b"half")
    inode = done.stat().st_ino
    download(tmp_path, "png", mirror.url)
    assert mirror.log == [] and done.stat().st_ino == inode
    complete(tmp_path, "png")


def test_a_truncated_or_incomplete_archive(tmp_path, mirror, distribution, monkeypatch):
    short = io.BytesIO()
    with zipfile.ZipFile(short, "w") as z:
        z.writestr(f"core50_128x128/{PATHS[0]}", png(IMAGES[0]))
    damaged = bytearray(distribution["core50_128x128.zip"])
    damaged[len(damaged) // 2] ^= 1
    for content, message in ((distribution["core50_128x128.zip"][:-100], "truncated"),
                             (short.getvalue(), "lacks 17 frames"), (bytes(damaged), "truncated or damaged")):
        (tmp_path / "core50_128x128.zip").unlink(missing_ok=True)
        mirror.files["core50_128x128.zip"] = content
        md5 = hashlib.md5(content).hexdigest()
        monkeypatch.setitem(data_loader.SOURCES, "core50_128x128.zip", ("http://nowhere", md5))
        with pytest.raises(DataError, match=message):
            download(tmp_path, "png", mirror.url)
