"""A data set of 18 frames in CORe50's layout, and a server that hands out such files.

Its pictures are written by a PNG encoder of 10 lines, not by the library that reads them.
"""
import contextlib
import hashlib
import http.server
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

import data_loader
from data_loader import CORE50, SCENARIOS
from helpers import STANDIN, forkserver
from streams import download

# Two frames each of three objects in three sessions; session 3 is the test set. Frames are numbered as here.
PATHS = [f"s{s}/o{o}/C_{s:02d}_{o:02d}_{f:03d}.png" for s in (2, 1, 3) for o in (1, 2, 3) for f in (0, 1)]
TEST = [12, 13, 14, 15, 16, 17]
LUP = [[[6, 9, 8, 7], [11, 10], [3, 2], [0, 1], [4, 5], TEST],  # batch 0 has objects 1 and 2 of session 1
       [[6, 9, 8, 7], [5, 4], [10, 11], [1, 0], [2, 3], TEST]]
LABELS = [[[0, 1, 1, 0], [2, 2], [1, 1], [0, 0], [2, 2], [0, 0, 1, 1, 2, 2]],
          [[0, 1, 1, 0], [2, 2], [2, 2], [0, 0], [1, 1], [0, 0, 1, 1, 2, 2]]]
IMAGES = np.random.default_rng(0).integers(0, 256, (18, 128, 128, 3)).astype(np.uint8)
NPZ, NPY, ZIP = "core50_imgs.npz", "core50_imgs.npy", "core50_128x128.zip"


def png(pixels, depth=8, colour=2, palette=b""):
    """PNG file of pixels (height, width, channels), or (height, width) where there is one channel.

    colour: 0 grey, 2 RGB, 3 numbers of the palette's colours, 4 grey with alpha, 6 RGB with it.
    """
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, colour, 0, 0, 0)
    colours = chunk(b"PLTE", palette) if palette else b""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + colours + chunk(b"IDAT", zlib.compress(rows, 1))
            + chunk(b"IEND", b""))


def write_index(root, paths=PATHS, lup=LUP, labels=LABELS):
    root.mkdir(parents=True, exist_ok=True)
    for name, content in (("paths", paths), ("LUP", dict.fromkeys(SCENARIOS, lup)),
                          ("labels", dict.fromkeys(SCENARIOS, labels))):
        (root / f"{name}.pkl").write_bytes(pickle.dumps(content, 2))


def write_data(root, form="png"):
    """The data set in one of the forms that a data folder can have."""
    write_index(root)
    if form in ("png", "png in root"):
        folder = root / "core50_128x128" if form == "png" else root
        for path, image in zip(PATHS, IMAGES):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(png(image))
    elif form == "npy":
        np.save(root / NPY, IMAGES)
    else:
        {"npz": np.savez, "compressed npz": np.savez_compressed}[form](root / NPZ, x=IMAGES)
    return root


@pytest.fixture(scope="session")
def standin(tmp_path_factory):
    """The stand-in at two frames a unit: as PNG files, and as an npz of what Pillow reads from them."""
    if not STANDIN.is_dir():
        pytest.skip(f"needs the stand-in data in {STANDIN}")
    Image = pytest.importorskip("PIL.Image")
    folders = {form: tmp_path_factory.mktemp(form) for form in ("png", "npz")}
    command = [sys.executable, STANDIN / "make_standin.py", folders["png"], "--frames", "2"]
    subprocess.run(command, check=True, capture_output=True)
    for name in data_loader.INDEX_FILES:
        shutil.copy(folders["png"] / name, folders["npz"])
    paths = pickle.loads((folders["png"] / "paths.pkl").read_bytes())
    frames = [np.asarray(Image.open(folders["png"] / "core50_128x128" / path)) for path in paths]
    np.savez(folders["npz"] / NPZ, x=np.stack(frames))
    return folders


def same_batches(stream, indices=LUP[0][:-1], labels=LABELS[0][:-1]):
    """Asserts that a stream consists of these frames of IMAGES, with these labels."""
    batches = list(stream)
    assert len(batches) == len(indices)
    for (x, y), i, expected in zip(batches, indices, labels):
        assert x.dtype == np.uint8 and y.dtype == np.int64
        np.testing.assert_array_equal(x, IMAGES[i])
        np.testing.assert_array_equal(y, expected)


def replaced(table, batch, position, value):
    """A copy of LUP or LABELS with another value in one place of run 0."""
    table = [[list(b) for b in run] for run in table]
    table[0][batch][position] = value
    return table


def complete(root, form):
    """Asserts that a download into the folder root has come to its end."""
    same_batches(CORE50(root))
    assert not list(root.rglob("*.part"))
    assert (root / NPZ).exists() == (form == "npz")


@pytest.fixture
def open_folder():
    """A folder that every user of this machine may enter, unlike tmp_path."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def in_another_process(function, *args):
    """(exit status: negative after a crash, None after 60 s; what it prints) of function(*args)."""
    with tempfile.NamedTemporaryFile("r") as printed:
        process = forkserver().Process(target=print_into, args=(printed.name, function, *args))
        process.start()
        process.join(60)
        status = process.exitcode
        process.kill()
        return status, printed.read()


def print_into(file, function, *args):
    for descriptor in (1, 2):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    function(*args)


def damage(data, rng):
    """The bytes of a file with one kind of damage, as disks, networks and programs do it."""
    start = int(rng.integers(0, len(data)))
    end = start + int(rng.integers(1, 64))
    before, part, after = data[:start], data[start:end], data[end:]
    noise = rng.integers(0, 256, len(part), np.uint8).tobytes()
    flipped = bytes([part[0] ^ 1 << int(rng.integers(0, 8))]) + part[1:]
    choices = flipped + after, noise + after, bytes(len(part)) + after, b"", after, noise + part + after
    return before + choices[rng.integers(0, len(choices))]


@contextlib.contextmanager
def permissions(mode, *paths):
    """Inside, these files and folders have this mode and it counts, even for tests that run as root."""
    b"".decode("cp437")     # zipfile's: Python itself may lie where nobody else may read
    before = [path.stat().st_mode for path in paths]
    for path in paths:
        path.chmod(mode)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in zip(paths, before):
            path.chmod(mode)


class Mirror(http.server.ThreadingHTTPServer):
    """Serves `files`; each request is logged as (name, Range header)."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.log = files, []
        self.ranges = True  # whether parts of a file can be asked for
        self.cuts = []  # bytes after which the next answers break off; None: not
        self.codes = []  # status codes of the next answers, before anything else
        self.url = f"http://127.0.0.1:{self.server_port}/core50"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        mirror, name = self.server, self.path.removeprefix("/core50/")
        mirror.log.append((name, self.headers.get("Range")))
        if mirror.codes or name not in mirror.files:
            return self.send_error(mirror.codes.pop(0) if mirror.codes else 404)
        content = mirror.files[name]
        wanted = self.headers.get("Range") if mirror.ranges else None
        start = int(re.match(r"bytes=(\d+)-$", wanted)[1]) if wanted else 0
        if wanted and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            return self.end_headers()
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][:mirror.cuts.pop(0) if mirror.cuts else None])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def distribution(tmp_path_factory):
    """The five files of the distribution for the small data set: {name: bytes}."""
    root = write_data(tmp_path_factory.mktemp("distribution"), "npz")
    with zipfile.ZipFile(root / ZIP, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("core50_128x128/", "")
        for path, image in zip(PATHS, IMAGES):
            z.writestr(f"core50_128x128/{path}", png(image))
    return {file.name: file.read_bytes() for file in root.iterdir()}


@pytest.fixture
def mirror(distribution, monkeypatch):
    """A running mirror; what it serves counts as the official files."""
    monkeypatch.setattr(download, "RETRY_SECONDS", 0)
    monkeypatch.delenv("CORE50_BASE_URL", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name, content in distribution.items():
        declare_official(monkeypatch, name, content)
    server = Mirror(dict(distribution))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": .02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def declare_official(monkeypatch, name, content):
    """From now on this is the content that the md5 sum of a file in SOURCES belongs to."""
    url = f"http://127.0.0.1:1/official/{name}"     # where nobody listens
    monkeypatch.setitem(data_loader.SOURCES, name, (url, hashlib.md5(content).hexdigest()))
