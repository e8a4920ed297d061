"""Fetching CORe50, and examining what a data folder holds.

    download("core50")                              # called again after a failure, it goes on from there
    for item, found, error in examine("core50"):    # error: None, or what is wrong with it
        print(item, found, error)

What arrives is compared with the md5 sums of data_loader.SOURCES before it gets its name.
"""
import http.client
import os
import shlex
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath

import numpy as np
from torchvision.datasets.utils import calculate_md5
from tqdm import tqdm

from data_loader import (
    ARRAYS,
    INDEX_FILES,
    SCENARIOS,
    SOURCES,
    DataError,
    FetchError,
    damaged,
    lock,
    missing_data,
    object_numbers,
    open_frames,
    png_folder,
    read_paths,
    read_pickle,
    read_run,
    writing,
)

ATTEMPTS = 5  # connections tried without a single new byte before a download gives up
RETRY_SECONDS = 2  # pause before the next attempt
CHUNK = 1 << 20  # bytes read or written at a time


def size_of(file):
    """Bytes of a file, 0 where there is none."""
    return file.stat().st_size if file.exists() else 0


def read_member(stream, archive):
    """Next bytes of a file inside a zip archive. DataError where it is damaged: no error of writing."""
    try:
        return stream.read(CHUNK)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as e:
        raise damaged(archive, f"is truncated or damaged ({e})") from e


@contextmanager
def locked(root):
    """Keeps other processes from fetching data into root."""
    path = root / ".lock"
    with writing(path):
        try:
            held = lock(path, wait=False)
        except BlockingIOError:
            print(f"waiting for another process that fetches data into {root}", file=sys.stderr, flush=True)
            held = lock(path)
        with held:
            yield


# ---- getting the data ----

def fetch_rest(url, part):
    """Add to the file part what it lacks of url. Raises OSError or HTTPException if the connection fails."""
    have = size_of(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as e:
        if e.code != 416 or not have:
            raise
        if e.headers.get("Content-Range", "").endswith(f"/{have}"):
            return  # nothing was missing
        part.unlink()  # longer than the file: of another version
        return fetch_rest(url, part)

    with response:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # a server without ranges sends everything
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        mode = "ab" if have else "wb"
        with (writing(part, int(length or 0)), open(part, mode) as out,
              tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True) as bar):
            while block := response.read(CHUNK):
                bar.update(out.write(block))
            out.flush()
            os.fsync(out.fileno())
    if total is not None and size_of(part) != total:
        raise ConnectionError(f"closed at byte {size_of(part)} of {total}")


def fetch(url, file, md5):
    """Download url to file, going on where an earlier try ended. It appears with this md5 or not at all."""
    part = file.with_name(file.name + ".part")
    idle = 0  # attempts since the last new byte
    most = size_of(part)
    while True:
        try:
            fetch_rest(url, part)
            break
        except (ValueError, http.client.InvalidURL) as e:
            raise DataError(f"{url} is no address ({e}): correct --base-url or CORE50_BASE_URL") from e
        except (OSError, http.client.HTTPException) as e:
            if 400 <= getattr(e, "code", 500) < 500 and e.code not in (408, 429):
                raise FetchError(f"{url} cannot be had ({e}): try later, or another --base-url") from e
            idle = 0 if size_of(part) > most else idle + 1
            most = max(most, size_of(part))
            if idle == ATTEMPTS:
                raise FetchError(f"{url} fails ({str(e) or type(e).__name__}): run the same again, it goes "
                                 f"on from byte {size_of(part)}") from e
            time.sleep(RETRY_SECONDS)

    found = calculate_md5(part)
    if found != md5:
        part.unlink()
        raise FetchError(f"{url} gave wrong bytes (md5 {found}, not {md5}), which were deleted: run the same "
                         "again, or use another --base-url")
    os.replace(part, file)


def fetch_once(file, base_url):
    """Download a file of SOURCES unless it is there. A file of that name but other content is left alone."""
    url, md5 = SOURCES[file.name]
    if base_url:
        url = f"{base_url.rstrip('/')}/{file.name}"
    if not file.exists():
        fetch(url, file, md5)
    elif calculate_md5(file) != md5:
        raise DataError(f"{file} exists, but is not the official file: move it away or choose another folder")


def missing_frames(root, paths):
    """The paths, out of `paths`, whose PNG files a data folder lacks."""
    folder = png_folder(root, paths)
    return [path for path in paths if not (folder / path).is_file()]


def unpack(archive, root):
    """Unpack a zip archive into root, without the files that are there in full size."""
    try:
        with zipfile.ZipFile(archive) as z:
            members = [m for m in z.infolist() if not m.is_dir()]
            for m in members:
                path = PureWindowsPath(m.filename)  # knows / and \\, drives and roots
                if path.anchor or ".." in path.parts:
                    raise damaged(archive, f"would write outside {root} ({m.filename!r})")

            members = [m for m in members if size_of(root / m.filename) != m.file_size]
            with writing(root / "core50_128x128", sum(m.file_size for m in members)):
                for m in tqdm(members, desc=f"unpacking {archive.name}", unit="file"):
                    unpack_member(z, m, archive, root / m.filename)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as e:
        raise damaged(archive, f"is truncated or damaged ({e})") from e


def unpack_member(z, member, archive, file):
    """Unpack one member of the open archive z: its file appears complete or not at all."""
    part = file.with_name(file.name + ".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    with z.open(member) as stream, open(part, "wb") as out:
        while block := read_member(stream, archive):
            out.write(block)
    os.replace(part, file)


def download(root, form="png", base_url=None):
    """Fetch what the folder root lacks of the index and of the frames, PNG files ("png") or one file ("npz").

    base_url: a mirror that holds all files under their names; default: $CORE50_BASE_URL, then the official
    servers. DataError, FetchError; called again after any failure, it goes on from there.
    """
    root = Path(root)
    base_url = base_url or os.environ.get("CORE50_BASE_URL")
    if form not in ("png", "npz"):
        raise DataError(f"form {form!r} is unknown: choose png or npz")
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file, but the data need a folder: name another one")
    root.mkdir(parents=True, exist_ok=True)

    with locked(root):
        for name in INDEX_FILES:
            fetch_once(root / name, base_url)
        paths = read_paths(root / "paths.pkl")
        if form == "npz":
            fetch_once(root / "core50_imgs.npz", base_url)
        elif missing_frames(root, paths):
            archive = root / "core50_128x128.zip"
            fetch_once(archive, base_url)
            unpack(archive, root)
            if missing := missing_frames(root, paths):
                raise damaged(archive, f"lacks {len(missing)} frames, such as {missing[0]}")
            if hasattr(os, "sync"):
                os.sync()  # the frames must be on the disk before the archive goes
            archive.unlink()


def fetch_missing(root):
    """Download into the folder root if data are missing, or if the PNG files were only half unpacked."""
    root = Path(root)
    left_over = any(root.glob("core50_128x128.zip*")) and not any(root.glob("core50_imgs.np[yz]"))
    if missing_data(root) or left_over:
        download(root, "npz" if any(root.glob("core50_imgs.np*")) else "png")


# ---- examining a data folder ----

def examine(root, full=False):
    """Yields (item, what was found, DataError or None) for the index files, scenarios and frames of a folder.

    Ends after an index file that is unusable. full: read every frame. FetchError where the disk is full.
    """
    root = Path(root)
    tables = {}
    for name in INDEX_FILES:
        yield attempt(name, examine_index, root / name, tables)
    if len(tables) < len(INDEX_FILES):
        return

    paths, lup, labels = (tables[name] for name in INDEX_FILES)
    objects = object_numbers(paths)
    for scenario in SCENARIOS:
        yield attempt(scenario, examine_scenario, root, objects, lup, labels, scenario)
    yield attempt("frames", examine_frames, root, paths, full)


def attempt(item, look, *args):
    """(item, what look(*args) returns, None), or (item, "", the DataError that it raises)."""
    try:
        return item, look(*args), None
    except FetchError:  # the disk is full: says nothing about the data
        raise
    except DataError as error:
        return item, "", error


def examine_index(file, tables):
    """In words, what an index file holds; tables gets its content under its name. DataError if unusable."""
    url, md5 = SOURCES[file.name]
    if not file.is_file():
        raise DataError(f"missing, it comes from {url}")
    tables[file.name] = read_paths(file) if file.name == "paths.pkl" else read_pickle(file, dict)
    official = calculate_md5(file) == md5
    return f"{len(tables[file.name])} entries, {'the' if official else 'not the'} official file"


def examine_scenario(root, objects, lup, labels, scenario):
    """In words, what the runs of a scenario hold. DataError if one is unusable."""
    *train, test = [len(y) for _, y in read_run(root, objects, lup, labels, scenario, run=0)]
    n_runs = len(lup[scenario])
    for run in range(1, n_runs):
        read_run(root, objects, lup, labels, scenario, run)
    return f"{n_runs} runs of {len(train)} batches, {sum(train)} frames to train, {test} to test"


def examine_frames(root, paths, full):
    """In words, what frames a folder holds. DataError if they cannot be used."""
    array = any((root / name).exists() for name in ARRAYS)
    if not array and (missing := missing_frames(root, paths)):
        raise DataError(f"{len(missing)} PNG files are missing, such as {missing[0]}: get them by "
                        f"`python data_loader.py --download --data {shlex.quote(str(root))}`")

    frames = open_frames(root, paths)
    npz = root / "core50_imgs.npz"
    if full and npz.exists():
        with (zipfile.ZipFile(npz) as archive, archive.open("x.npy") as stream,
              tqdm(total=npz.stat().st_size, desc="reading all frames", unit="B", unit_scale=True) as bar):
            while block := read_member(stream, npz):  # at the end zipfile compares the check sum
                bar.update(len(block))
    elif full:
        for start in tqdm(range(0, len(paths), 1000), desc="reading all frames"):
            frames.read(np.arange(start, min(start + 1000, len(paths))))
    form = frames.file.name if array else "PNG files"
    return f"{form}, {frames.shape[1]}x{frames.shape[0]} pixels"
