"""Fetching CORe50 and checking a data folder: the commands of data_loader.py.

    python data_loader.py --download --data core50          fetch the distribution (PNG files; --form npz: one big file)
    python data_loader.py --check --data core50 [--full]    say whether a data folder is usable
    python data_loader.py --export-demo DIR                 write the demo's images, as a model for your own

From a program: `download("core50")`, `check("core50")`. A download goes on where an earlier one ended, however it ended;
what arrives is compared with the md5 sums of data_loader.SOURCES before it gets its name.

Uses data_loader, lab.output, lab.start, numpy, streams.arguments, streams.demo, streams.folder, torchvision, tqdm.
"""
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PureWindowsPath

import numpy as np
from torchvision.datasets.utils import calculate_md5
from tqdm import tqdm

from data_loader import (
    CHUNK,
    INDEX_FILES,
    SCENARIOS,
    SOURCES,
    DataError,
    FetchError,
    PngFrames,
    damaged,
    locked,
    missing_data,
    object_numbers,
    open_frames,
    open_npz,
    png_folder,
    read_member,
    read_paths,
    read_pickle,
    read_run,
    writing,
)
from lab.output import mend_output
from lab.start import end_imports
from streams import demo
from streams.arguments import parse_arguments
from streams.folder import FolderStream

ATTEMPTS = 5  # connections tried without a single new byte before a download gives up
RETRY_SECONDS = 2  # pause before the next attempt


def size_of(file):
    """Bytes of a file, 0 where there is none."""
    return file.stat().st_size if file.exists() else 0


def progress(total, what, initial=0):
    """A progress bar in bytes."""
    return tqdm(total=total, initial=initial, desc=what, unit="B", unit_scale=True, unit_divisor=1024)


# ---- getting the data ------------------------------------------------------------------------------------------------

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
        with (writing(part, (total or have) - have), open(part, "ab" if have else "wb") as out,
              progress(total, part.stem, have) as bar):
            while block := response.read(CHUNK):
                bar.update(out.write(block))
            out.flush()
            os.fsync(out.fileno())
    if total is not None and size_of(part) != total:
        raise ConnectionError(f"closed at byte {size_of(part)} of {total}")


def fetch(url, file, md5):
    """Download url to file, going on where an earlier try ended. The file appears with this md5 or not at all."""
    part = file.with_name(file.name + ".part")
    idle, most = 0, size_of(part)
    while idle < ATTEMPTS:
        try:
            fetch_rest(url, part)
            break
        except (ValueError, http.client.InvalidURL) as e:
            raise DataError(f"{url} is no address ({e}): correct --base-url or CORE50_BASE_URL") from e
        except (OSError, http.client.HTTPException) as e:
            reason = e
            if 400 <= getattr(e, "code", 500) < 500 and e.code not in (408, 429):
                raise FetchError(f"{url} cannot be had ({e}): try later, or another source by --base-url") from e
            idle, most = (0, size_of(part)) if size_of(part) > most else (idle + 1, most)
            time.sleep(RETRY_SECONDS)
    else:
        raise FetchError(f"{url} fails ({reason or type(reason).__name__}): run the same again, it goes on from byte "
                         f"{size_of(part)}") from reason
    found = calculate_md5(part)
    if found != md5:
        part.unlink()
        raise FetchError(f"{url} gave wrong bytes (md5 {found}, not {md5}), which were deleted: run the same again, or "
                         "use another source by --base-url")
    os.replace(part, file)


def fetch_once(file, base_url):
    """Download a file of SOURCES unless it is there. A file of that name but other content is left alone."""
    url, md5 = SOURCES[file.name]
    if not file.exists():
        fetch(f"{base_url.rstrip('/')}/{file.name}" if base_url else url, file, md5)
    elif calculate_md5(file) != md5:
        raise DataError(f"{file} exists, but is not the official file: move it away or choose another folder")


def missing_frames(root, paths):
    """The paths, out of `paths`, whose PNG files a data folder lacks."""
    folder = png_folder(root, paths)
    return [path for path in paths if not (folder / path).is_file()]


def unpack(archive, root):
    """Unpack a zip archive into root; files that are there in full size are skipped, the others appear complete."""
    try:
        with zipfile.ZipFile(archive) as z:
            members = [m for m in z.infolist() if not m.is_dir()]
            for name in (m.filename for m in members):
                if PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts:
                    raise damaged(archive, f"would write outside {root} ({name!r})")
            members = [m for m in members if size_of(root / m.filename) != m.file_size]
            with writing(root / "core50_128x128", sum(m.file_size for m in members)):
                for m in tqdm(members, desc=f"unpacking {archive.name}", unit="file"):
                    file = root / m.filename
                    part = file.with_name(file.name + ".part")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with z.open(m) as stream, open(part, "wb") as out:
                        while block := read_member(stream, archive):
                            out.write(block)
                    os.replace(part, file)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as e:
        raise damaged(archive, f"is truncated or damaged ({e})") from e


def download(root, form="png", base_url=None):
    """Fetch what the folder root lacks: the index and the frames, as PNG files ("png") or one big file ("npz").

    base_url: a mirror that holds all files under their names; default: environment variable CORE50_BASE_URL, then the
    official servers. Can be called again after any failure and goes on from there. Raises DataError, FetchError.
    """
    root, base_url = Path(root), base_url or os.environ.get("CORE50_BASE_URL")
    if form not in ("png", "npz"):
        raise DataError(f"form {form!r} is unknown: choose png or npz")
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file, but the data need a folder: name another one")
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        for name in INDEX_FILES:
            fetch_once(root / name, base_url)
        paths, archive = read_paths(root / "paths.pkl"), root / "core50_128x128.zip"
        if form == "npz":
            fetch_once(root / "core50_imgs.npz", base_url)
        elif missing_frames(root, paths):
            fetch_once(archive, base_url)
            unpack(archive, root)
            if missing := missing_frames(root, paths):
                raise damaged(archive, f"lacks {len(missing)} frames, such as {missing[0]}")
            if hasattr(os, "sync"):
                os.sync()  # the frames must be on the disk before the archive goes
            archive.unlink()


def fetch_missing(root):
    """Download into the folder root if data are missing, or if the PNG files' archive was left half unpacked."""
    root = Path(root)
    left_over = any(root.glob("core50_128x128.zip*")) and not any(root.glob("core50_imgs.np[yz]"))
    if missing_data(root) or left_over:
        download(root, "npz" if any(root.glob("core50_imgs.np*")) else "png")


# ---- checking a data folder ------------------------------------------------------------------------------------------

def check_frames(root, paths, full):
    """What frames a folder holds, in words; DataError if they cannot be used. full: look at every image."""
    npz, npy = root / "core50_imgs.npz", root / "core50_imgs.npy"
    if not npz.exists() and not npy.exists() and (missing := missing_frames(root, paths)):
        raise DataError(f"{len(missing)} PNG files are missing, such as {missing[0]}: get them by "
                        f"`python data_loader.py --download --data {root}`")
    frames = open_frames(root, paths)
    for block in tqdm(np.array_split(np.arange(len(paths)), 200), desc="reading all frames") if full else ():
        frames.read(block)
    if full and npz.exists():
        crc = 0
        with open(npy, "rb") as f:
            while block := f.read(CHUNK):
                crc = zlib.crc32(block, crc)
        if crc != open_npz(npz)[1].CRC:
            raise damaged(npy, f"differs from {npz.name}")
    return f"{'PNG files' if isinstance(frames, PngFrames) else npy.name}, {frames.shape[1]}x{frames.shape[0]} pixels"


def check_folder(root):
    """Print what a folder of own images holds, what is left out and what is damaged. True if a run can learn from it."""
    stream = FolderStream(root)
    train, test = sum(map(len, stream.listing)), len(stream.test_listing)
    print(f"{root}: own images, {train} in {len(stream)} batches to train with, {test} to test with, {stream.num_classes} "
          f"classes: {', '.join(stream.class_names)}")
    damaged = list(stream.unreadable())
    print("\n".join([*stream.notes(), *(f"BAD: {message}" for message in damaged),
                     f"{root} is {'NOT ' * bool(damaged)}usable"]))
    return not damaged


def check(root, full=False):
    """Print a table of what a data folder holds. True if all six scenarios can run from it. full: read all images."""
    root, tables, usable = Path(root), {}, True
    if (root / "train").is_dir() and not (root / "paths.pkl").exists():
        return check_folder(root)

    def row(item, look, *args):
        nonlocal usable
        try:
            print(f"{item:12} {look(*args):60} ok", flush=True)
        except FetchError:  # the disk is full: says nothing about the data
            raise
        except DataError as e:
            usable = False
            print(f"{item:12} {'':60} BAD: {e}", flush=True)

    def index(name):
        url, md5 = SOURCES[name]
        if not (root / name).is_file():
            raise DataError(f"missing, it comes from {url}")
        tables[name] = read_paths(root / name) if name == "paths.pkl" else read_pickle(root / name, dict)
        official = calculate_md5(root / name) == md5
        return f"{len(tables[name])} entries, {'the' if official else 'not the'} official file"

    def scenario(name):
        files = root, objects, tables["LUP.pkl"], tables["labels.pkl"], name
        *train, test = [len(y) for _, y in read_run(*files, 0)]
        n_runs = len(tables["LUP.pkl"][name])
        for run in range(1, n_runs):
            read_run(*files, run)
        return f"{n_runs} runs of {len(train)} batches, {sum(train)} frames to train, {test} to test"

    print(f"{'item':12} {'found':60} status")
    for name in INDEX_FILES:
        row(name, index, name)
    if usable:
        objects = object_numbers(tables["paths.pkl"])
        for name in SCENARIOS:
            row(name, scenario, name)
        row("frames", check_frames, root, tables["paths.pkl"], full)
    print(f"{root} is {'usable' if usable else 'NOT usable'}")
    return usable


def export_demo(root):
    """Writes the demo's images into a new folder and says what is in it."""
    counts = demo.export_demo(root)
    print(f"{root} holds {counts['train']} images of {counts['classes']} classes in {counts['batches']} batches to train "
          f"with, {counts['test']} to test with: `python ar1star_lat_replay.py --name folder --data {root}`")


def explain(error):
    """A DataError or OSError in one sentence."""
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
        return f"cannot use {os.fsdecode(error.filename)} ({error.strerror}): make it usable or choose another folder"
    return str(error)


def main(argv=None):
    """The commands of data_loader.py. Returns the exit status: 0 done, 1 failure, 2 bad input, 130 interrupted."""
    mend_output()
    args = parse_arguments(argv)
    try:
        end_imports()
        if args.export_demo is not None:
            export_demo(args.export_demo)
            return 0
        if args.download:
            download(args.data, args.form, args.base_url)
        return 0 if check(args.data, args.full) else 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    except (DataError, OSError) as e:
        if args.debug:
            raise
        print(f"error: {explain(e)}", file=sys.stderr)
        return getattr(e, "exit_status", 1)


if __name__ == "__main__":
    sys.exit(main())
