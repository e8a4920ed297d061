"""Fetching the data over a network and onto a disk that fail in every way, by a server on 127.0.0.1."""
import contextlib
import io
import resource
import zipfile

import pytest

import data_loader
from core50_files import IMAGES, NPZ, PATHS, ZIP, complete, declare_official, png, write_index
from data_loader import DataError, FetchError
from harness.data_cli import main
from streams import download as fetching
from streams.download import download


@pytest.fixture
def command(tmp_path, mirror):
    """The arguments of a download of the npz into tmp_path, which holds the index."""
    write_index(tmp_path)
    return ["--download", "--form", "npz", "--data", str(tmp_path), "--base-url", mirror.url]


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


# ---- faults of the network ----

@pytest.mark.parametrize("form, name", [("png", ZIP), ("npz", NPZ)])
def test_a_download_cut_off_goes_on_where_it_was(tmp_path, mirror, form, name):
    write_index(tmp_path)
    mirror.cuts = [100_000, 1, 200_000]
    download(tmp_path, form, mirror.url)
    assert mirror.log == [(name, wanted and f"bytes={wanted}-") for wanted in (None, 100000, 100001, 300001)]
    complete(tmp_path, form)


def test_a_server_that_stays_away_is_left_and_the_next_run_goes_on(command, tmp_path, mirror, capsys):
    mirror.cuts = [100_000] + [0] * 100
    assert main(command) == 1
    error = last_line(capsys)
    assert error.startswith(f"error: {mirror.url}/{NPZ}") and "100000" in error
    assert len(mirror.log) == 1 + fetching.ATTEMPTS
    assert (tmp_path / f"{NPZ}.part").read_bytes() == mirror.files[NPZ][:100_000]
    assert not (tmp_path / NPZ).exists()
    mirror.cuts, mirror.log = [], []
    download(tmp_path, "npz", mirror.url)
    assert mirror.log == [(NPZ, "bytes=100000-")] and (tmp_path / NPZ).read_bytes() == mirror.files[NPZ]
    complete(tmp_path, "npz")


@pytest.mark.parametrize("form, name", [("png", ZIP), ("npz", NPZ)])
def test_wrong_bytes_are_refused_and_not_left_in_place(tmp_path, mirror, distribution, form, name, capsys):
    wrong = bytearray(distribution[name])
    wrong[len(wrong) // 2] ^= 1
    mirror.files[name] = bytes(wrong)
    assert main(["--download", "--form", form, "--data", str(tmp_path), "--base-url", mirror.url]) == 1
    assert "wrong bytes" in last_line(capsys)
    assert sorted(f.name for f in tmp_path.iterdir() if f.name[0] != ".") == sorted(data_loader.INDEX_FILES)
    mirror.files[name] = distribution[name]
    download(tmp_path, form, mirror.url)
    complete(tmp_path, form)


def test_a_server_without_ranges_is_asked_for_everything_again(command, tmp_path, mirror):
    mirror.ranges, mirror.cuts = False, [100_000] + [50_000, 60_000] * 50
    with pytest.raises(FetchError, match="run the same again"):     # it always breaks off
        download(tmp_path, "npz", mirror.url)
    assert len(mirror.log) == 1 + fetching.ATTEMPTS
    (tmp_path / f"{NPZ}.part").unlink()
    mirror.cuts, mirror.log = [100_000, 50_000], []
    download(tmp_path, "npz", mirror.url)
    assert [wanted for _, wanted in mirror.log] == [None, "bytes=100000-", "bytes=50000-"]
    complete(tmp_path, "npz")


def test_404_is_told_at_once_and_an_overloaded_server_is_asked_again(tmp_path, mirror, distribution, capsys):
    del mirror.files["LUP.pkl"]
    assert main(["--download", "--data", str(tmp_path), "--base-url", mirror.url]) == 1
    error = last_line(capsys)
    assert f"{mirror.url}/LUP.pkl" in error and "404" in error and "--base-url" in error
    assert [name for name, _ in mirror.log] == ["paths.pkl", "LUP.pkl"]
    mirror.files, mirror.codes, mirror.log = distribution, [503, 429, 500], []
    download(tmp_path, "npz", mirror.url)
    assert len(mirror.log) == 3 + 3
    complete(tmp_path, "npz")


def test_parts_that_are_complete_or_of_another_version(command, tmp_path, mirror, distribution):
    part, whole = tmp_path / f"{NPZ}.part", distribution[NPZ]
    for content, status, later in ((whole, 0, []), (whole + b"more", 0, [None]), (bytes(1000), 1, [])):
        mirror.log.clear()
        part.write_bytes(content)
        assert main(command) == status
        assert [wanted for _, wanted in mirror.log] == [f"bytes={len(content)}-", *later]
        if status:  # wrong bytes
            assert not list(tmp_path.glob(f"{NPZ}*"))
            assert main(command) == 0
        complete(tmp_path, "npz")
        (tmp_path / NPZ).unlink()


def test_no_server_and_no_address(tmp_path, mirror, capsys):
    assert main(["--download", "--data", str(tmp_path)]) == 1  # the "official" servers of the fixture
    assert "127.0.0.1:1/official/paths.pkl" in capsys.readouterr().err
    for address in ("nonsense", "http://[", "no://where", "http://a b/"):
        assert main(["--download", "--data", str(tmp_path), "--base-url", address]) in (1, 2)
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and error[0].startswith("error: ") and address in error[0]
    with pytest.raises(DataError, match="choose png or npz"):
        download(tmp_path, "jpg", mirror.url)
    assert mirror.log == []


# ---- faults of the disk ----

@pytest.fixture
def pretend_free(monkeypatch):
    """pretend_free(n): from now on disks say that n bytes are free."""
    usage = data_loader.shutil.disk_usage("/")
    return lambda n: monkeypatch.setattr(data_loader.shutil, "disk_usage", lambda _: usage._replace(free=n))


def test_too_little_free_space_is_told_before_a_byte_is_written(command, tmp_path, mirror, distribution,
                                                                pretend_free):
    pretend_free(len(distribution[NPZ]) - 1)
    with pytest.raises(FetchError, match="are free.*make room") as e:
        download(tmp_path, "npz", mirror.url)
    assert str(tmp_path) in str(e.value) and not list(tmp_path.glob(f"{NPZ}*"))


@contextlib.contextmanager
def small_files(size):
    """Inside, no file can grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_system_that_takes_no_more(command, tmp_path, mirror, distribution, capsys):
    with small_files(100_000):
        assert main(command) == 1
    error = last_line(capsys)
    assert f"{NPZ}.part" in error and "File too large" in error and "another folder" in error
    assert (tmp_path / f"{NPZ}.part").stat().st_size == 100_000 and len(mirror.log) == 1
    download(tmp_path, "npz", mirror.url)
    assert mirror.log[1:] == [(NPZ, "bytes=100000-")]
    complete(tmp_path, "npz")

    (tmp_path / NPZ).unlink()
    (tmp_path / ZIP).write_bytes(distribution[ZIP])
    with small_files(30_000), pytest.raises(FetchError, match="File too large"):
        download(tmp_path, "png", mirror.url)
    assert (tmp_path / ZIP).exists() and not list(tmp_path.rglob("*.png"))
    download(tmp_path, "png", mirror.url)
    complete(tmp_path, "png")


def test_a_disk_that_is_really_full(command, tmp_path, mirror, capsys):
    part = tmp_path / f"{NPZ}.part"
    part.symlink_to("/dev/full")
    assert main(command) == 1
    error = last_line(capsys)
    assert str(part) in error and "No space left on device" in error and "make room" in error
    part.unlink()
    assert main(command) == 0
    complete(tmp_path, "npz")


def test_a_folder_that_cannot_be_written_and_a_file_of_the_user(tmp_path, mirror, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "LUP.pkl").write_bytes(b"mine")
    for folder, status, said in (("file", 2, "file"), ("file/below", 1, "file"), ("", 2, "LUP.pkl exists")):
        assert main(["--download", "--data", str(tmp_path / folder), "--base-url", mirror.url]) == status
        assert last_line(capsys).startswith(f"error: {tmp_path / said}" if status == 2 else "error: ")
    assert (tmp_path / "LUP.pkl").read_bytes() == b"mine"


# ---- faults of the archive ----

def zipped(**contents):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        for name, content in contents.items():
            z.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize("name", ["../evil.png", "core50_128x128/../../evil.png", "{absolute}/evil.png",
                                  "C:\\evil.png", "..\\evil.png", "C:evil.png"])
def test_an_archive_that_writes_outside_is_refused_before_it_writes(tmp_path, mirror, monkeypatch, name):
    frames = {"core50_128x128/s1/o1/C_01_01_000.png": png(IMAGES[0]), name.format(absolute=tmp_path): "evil"}
    mirror.files[ZIP] = zipped(**frames)
    declare_official(monkeypatch, ZIP, mirror.files[ZIP])       # even with the right md5
    with pytest.raises(DataError, match="would write outside"):
        download(tmp_path / "data", "png", mirror.url)
    assert not list(tmp_path.rglob("*.png"))


def test_unpacking_goes_on_after_a_kill(tmp_path, mirror, distribution):
    """As after a kill: the archive, one frame complete, one as .part, one short (power failure)."""
    write_index(tmp_path)
    (tmp_path / ZIP).write_bytes(distribution[ZIP])
    done, short, part = (tmp_path / "core50_128x128" / p for p in PATHS[:3])
    for file in (done, part):
        file.parent.mkdir(parents=True)
    done.write_bytes(png(IMAGES[0]))
    short.write_bytes(b"")
    part.with_name(part.name + ".part").write_bytes(b"half")
    inode = done.stat().st_ino
    download(tmp_path, "png", mirror.url)
    assert mirror.log == [] and done.stat().st_ino == inode
    complete(tmp_path, "png")


def test_a_truncated_a_damaged_and_an_incomplete_archive(tmp_path, mirror, distribution, monkeypatch):
    damaged = bytearray(distribution[ZIP])
    damaged[len(damaged) // 2] ^= 1
    short = zipped(**{f"core50_128x128/{PATHS[0]}": png(IMAGES[0])})
    for content, message in ((distribution[ZIP][:-100], "truncated"), (short, "lacks 17 frames"),
                             (bytes(damaged), "truncated or damaged")):
        (tmp_path / ZIP).unlink(missing_ok=True)
        mirror.files[ZIP] = content
        declare_official(monkeypatch, ZIP, content)
        with pytest.raises(DataError, match=message):
            download(tmp_path, "png", mirror.url)
