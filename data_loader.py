"""CORe50 for continual learning: 128x128 photographs of 50 objects in 11 sessions, served batch after batch.

    from data_loader import CORE50
    stream = CORE50("core50", scenario="nicv2_391", run=0)
    train_x, train_y = next(iter(stream))       # uint8 (n, 128, 128, 3), int64 (n,); or: for train_x, train_y in stream
    test_x, test_y = stream.get_test_set()      # every 20th frame of the test sessions 3, 7 and 10

CORe50: Lomonaco and Maltoni, CoRL 2017; the NICv2 scenarios: arXiv 1907.03799. The folder holds paths.pkl, LUP.pkl and
labels.pkl (which frames form which batch) and the frames, either as PNG files or as core50_imgs.npz. Reading needs this
file alone; `python data_loader.py --download | --check | --export-demo` is in streams/download.py.

Uses numpy, torch, torchvision, tqdm.
"""
import contextlib
import errno
import os
import pickle
import re
import shutil
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out
    from streams.arguments import answer_at_once
    answer_at_once()  # --help and mistakes need no torch
    from streams.download import main  # imports this module by its name: there is one DataError, whoever raises it
    raise SystemExit(main())

import numpy as np
import torch
from torchvision.io import decode_png
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: two processes must not fetch or convert the same data at the same time
    fcntl = None

SOURCES = {name: (f"http{site}/{name}", md5) for site, name, md5 in (  # file: (URL, md5)
    ("s://vlomonaco.github.io/core50/data", "paths.pkl", "b568f86998849184df3ec3465290f1b0"),
    ("s://vlomonaco.github.io/core50/data", "LUP.pkl", "33afc26faa460aca98739137fdfa606e"),
    ("s://vlomonaco.github.io/core50/data", "labels.pkl", "281c95774306a2196f4505f22fd60ab1"),
    ("://bias.csr.unibo.it/maltoni/download/core50", "core50_128x128.zip", "745f3373fed08d69343f1058ee559e13"),
    ("://bias.csr.unibo.it/maltoni/download/core50", "core50_imgs.npz", "3689d65d0a1c760b87821b114c8c4c6c"))}
INDEX_FILES = ("paths.pkl", "LUP.pkl", "labels.pkl")
SCENARIOS = ("ni", "nc", "nic", "nicv2_79", "nicv2_196", "nicv2_391")
FRAME_PATH = re.compile(r"(?:[\w-]+/)+[\w-]+\.png", re.ASCII)  # s11/o1/C_11_01_000.png
WITHOUT_LOCKS = set()  # the folders of which this has been said
CHUNK = 1 << 20  # bytes read or written at a time
DISK_ERRORS = {errno.EIO: "", errno.EFBIG: "", **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room or "),  # what helps
               **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make its folder writable or ")}


class DataError(Exception):
    """The data, or what was asked of them, are wrong. The message says what, where, and what to do."""
    exit_status = 2


class MissingData(DataError):
    """There is no data set, or only a part of it, where one was looked for."""


class FetchError(DataError):
    """The network or the disk failed: the same command may succeed later."""
    exit_status = 1


def damaged(file, what, error=None):
    """The DataError for a file that has to be fetched again; if the error behind it is one of permission, that."""
    if isinstance(error, PermissionError):
        return DataError(f"{file} cannot be read ({error.strerror}): make it readable")
    return DataError(f"{file} {what}: delete it and run `python data_loader.py --download --data {file.parent}"
                     f"{' --form npz' * file.name.startswith('core50_imgs')}`")


class IndexUnpickler(pickle.Unpickler):
    """Knows lists, tuples, dicts, strings and numbers. A pickle that names anything else could run code: refused."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}; only lists, dicts, strings and numbers are allowed")


def read_pickle(file, kind):
    """Content of an index file: a `kind`, list or dict, that is not empty. Raises DataError for anything else."""
    try:
        with open(file, "rb") as f:
            content = IndexUnpickler(f).load()
    except Exception as e:  # a damaged pickle can raise nearly anything: ValueError, KeyError, MemoryError, ...
        raise damaged(file, f"is damaged or no index file ({e or type(e).__name__})", e) from e
    if not isinstance(content, kind) or not content:
        raise damaged(file, "holds no list of frames" if kind is list else "holds no table of scenarios")
    return content


def read_paths(file):
    """List of the frames' paths, relative to the folder of PNG files; indices of the other files point into it."""
    paths = read_pickle(file, list)
    for path in paths:
        if not isinstance(path, str) or not FRAME_PATH.fullmatch(path):
            raise damaged(file, f"holds {path!r:.60} where a path like s1/o1/C_01_01_000.png is expected")
    if len(set(paths)) < len(paths):
        raise damaged(file, "names a frame twice")
    return paths


def object_numbers(paths):
    """int64 (frames,): the object of each frame, that is its folder (o1, o10, ...), as a number from 0."""
    return np.unique([path.split("/")[-2] for path in paths], return_inverse=True)[1]


def one_run(table, scenario, run, file):
    """The batches of one scenario and run, as the index file holds them. Raises DataError for an unknown one."""
    if not isinstance(scenario, str) or scenario not in table:
        choices = ", ".join(sorted(s for s in table if isinstance(s, str)))
        raise DataError(f"scenario {scenario!r} is not in {file}: choose one of {choices}")
    runs = table[scenario]
    if not isinstance(runs, (list, tuple)) or not runs:
        raise damaged(file, f"holds no list of runs for {scenario}")
    if not isinstance(run, int) or run not in range(len(runs)):
        raise DataError(f"run {run!r} is not in {file}: choose 0 to {len(runs) - 1}")
    if not isinstance(runs[run], (list, tuple)) or len(runs[run]) < 2:
        raise damaged(file, f"holds no batches for {scenario}, run {run}")
    return runs[run]


def integers(values):
    """int64 (n,) of a list of plain integers; ValueError for anything else."""
    array = np.asarray(values)
    if not isinstance(values, (list, tuple)) or array.ndim != 1 or array.size and array.dtype.kind != "i":
        raise ValueError("something else than a list of integers")
    return array.astype(np.int64)


def read_run(root, objects, lup, labels, scenario, run):
    """Checked batches of a run: list of (indices into paths, labels), int64 (n,) each; the last one is the test set.
    objects: (frames,), from object_numbers. Raises DataError if the index files do not fit together."""
    indices_of = one_run(lup, scenario, run, root / "LUP.pkl")
    labels_of = one_run(labels, scenario, run, root / "labels.pkl")
    wrong = lambda what: damaged(root / "LUP.pkl", f"and labels.pkl do not fit ({scenario}, run {run}: {what})")
    if len(indices_of) != len(labels_of):
        raise wrong(f"{len(indices_of)} batches of frames, {len(labels_of)} of labels")
    batches = []
    for b, (indices, y) in enumerate(zip(indices_of, labels_of, strict=True)):
        try:
            indices, y = integers(indices), integers(y)
        except Exception as e:  # numpy raises several types for lists that are no arrays
            raise wrong(f"batch {b} holds {e}") from e
        if len(indices) == 0 or len(indices) != len(y):
            raise wrong(f"batch {b} has {len(indices)} frames and {len(y)} labels")
        if indices.min() < 0 or indices.max() >= len(objects):
            raise wrong(f"batch {b} wants frames {indices.min()} to {indices.max()}, there are 0 to {len(objects) - 1}")
        batches.append((indices, y))
    used, y = (np.concatenate(column) for column in zip(*batches, strict=True))
    if len(np.unique(used)) < len(used):
        raise wrong("a frame stands in it twice")
    classes = np.unique(y[:len(used) - len(batches[-1][0])])  # of the training batches
    if not np.array_equal(classes, np.arange(len(classes))) or y.max() >= len(classes):
        raise wrong(f"labels {y.min()} to {y.max()}, but {len(classes)} classes to train")
    label_of = np.full(objects.max() + 1, -1)
    label_of[objects[used]] = y
    if (label_of[objects[used]] != y).any():
        raise wrong("frames of one object have different labels")
    return batches


def check_png(data):
    """(bits, colour type) in the bytes of a PNG file, uint8 (n,). ValueError if its check sums do not fit: torchvision's
    decoder lets some damage through and crashes on other."""
    raw, at, kind = memoryview(data), 8, b""
    if raw[:8] != b"\x89PNG\r\n\x1a\n" or raw[12:16] != b"IHDR":
        raise ValueError("no PNG file")
    while kind != b"IEND":
        if at + 12 > len(raw) or at + 12 + (length := int.from_bytes(raw[at:at + 4], "big")) > len(raw):
            raise ValueError("truncated")
        if int.from_bytes(raw[at + 8 + length:at + 12 + length], "big") != zlib.crc32(raw[at + 4:at + 8 + length]):
            raise ValueError("wrong check sum")
        at, kind = at + 12 + length, bytes(raw[at + 4:at + 8])
    return raw[24], raw[25]


def read_png(file):
    """uint8 (height, width, 3) of an 8-bit RGB PNG file; DataError for anything else."""
    try:
        data = np.fromfile(file, np.uint8)
        if (kind := check_png(data)) != (8, 2):
            names = {0: "greyscale", 3: "palette", 4: "greyscale with alpha", 6: "RGB with alpha"}
            raise ValueError(f"{names.get(kind[1], 'RGB')} of {kind[0]} bits instead of RGB of 8")
        return decode_png(torch.from_numpy(data)).permute(1, 2, 0).numpy()
    except (OSError, ValueError, RuntimeError) as e:
        raise DataError(f"{file} is no usable frame ({getattr(e, 'strerror', e)}): delete it and get all missing frames by "
                        "`python data_loader.py --download --data DIR`") from e


class PngFrames:
    """The frames as PNG files, uint8."""

    def __init__(self, folder, paths):
        self.folder, self.paths, self.shape = folder, paths, read_png(folder / paths[0]).shape

    def read(self, indices):
        """Frames (n, height, width, 3) of indices (n,) into paths."""
        x = np.empty((len(indices), *self.shape), np.uint8)

        def fill(positions):
            for k in positions:
                file = self.folder / self.paths[indices[k]]
                if (image := read_png(file)).shape != self.shape:
                    raise DataError(f"{file} has {image.shape[1]}x{image.shape[0]} pixels, but {self.paths[0]} has "
                                    f"{self.shape[1]}x{self.shape[0]}: replace the wrong one")
                x[k] = image

        with ThreadPoolExecutor() as pool:  # the decoder runs outside Python's global lock
            list(pool.map(fill, np.array_split(np.arange(len(indices)), 64)))
        return x


class NpyFrames:
    """The frames as one array on disk, uint8 (frames, height, width, 3)."""

    def __init__(self, file, n_frames):
        with open(file, "rb") as f:
            self.file, self.shape, self.start = file, npy_shape(f, file.stat().st_size, n_frames, file)[1:], f.tell()

    def read(self, indices):
        """Frames (n, height, width, 3) of indices (n,) into paths."""
        x = np.empty((len(indices), *self.shape), np.uint8)
        try:
            with open(self.file, "rb", buffering=0) as f:  # no memory map: its pages would count as resident memory
                for image, i in zip(x, indices.tolist()):
                    f.seek(self.start + i * image.nbytes)
                    if f.readinto(image) != image.nbytes:
                        raise damaged(self.file, "was cut off while in use")
        except OSError as e:
            raise damaged(self.file, f"cannot be read any more ({e.strerror})") from e
        return x


def npy_shape(stream, size, n_frames, file):
    """Shape in the header of a .npy stream of so many bytes. DataError unless it is an array of n_frames images."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except Exception as e:  # numpy, zipfile and zlib each have their own errors for damage
        raise damaged(file, f"has a damaged header ({e})") from e
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[0] != n_frames or shape[1] != shape[2] or shape[3] != 3:
        what = f"{dtype} {shape}{' in Fortran order' * fortran}"
        raise damaged(file, f"holds {what} instead of the uint8 ({n_frames}, size, size, 3) of paths.pkl")
    if size != stream.tell() + np.prod(shape):
        raise damaged(file, f"has {size} bytes instead of {stream.tell() + np.prod(shape)}")
    return shape


def open_npz(npz):
    """The member x.npy of core50_imgs.npz as a stream, and its zip entry."""
    try:
        archive = zipfile.ZipFile(npz)
        return archive.open("x.npy"), archive.getinfo("x.npy")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, KeyError) as e:
        raise damaged(npz, f"is truncated, damaged or another file ({e})", e) from e


def read_member(stream, archive):
    """Next bytes of a file inside a zip archive. Damage is a DataError, so not taken for an error of writing."""
    try:
        return stream.read(CHUNK)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as e:
        raise damaged(archive, f"is truncated or damaged ({e})") from e


def convert_npz(npz, npy, n_frames):
    """Write the array of core50_imgs.npz to the file npy, which can be read in part. Needs little memory, once."""
    part = npy.with_name(npy.name + ".part")
    stream, entry = open_npz(npz)
    with stream, locked(npy.parent, npy):
        if npy_is_current(npz, npy):
            return  # another process has done it
        npy_shape(stream, entry.file_size, n_frames, npz)
        stream.seek(0)
        part.unlink(missing_ok=True)  # left by a killed process
        try:
            with (writing(part, entry.file_size), open(part, "wb") as out,
                  tqdm(total=entry.file_size, desc=npy.name, unit="B", unit_scale=True) as bar):
                while block := read_member(stream, npz):
                    bar.update(out.write(block))
                out.flush()
                os.fsync(out.fileno())
            os.replace(part, npy)
        finally:
            part.unlink(missing_ok=True)


def npy_is_current(npz, npy):
    """Whether npy begins with the same MB as the array inside npz: a file of the same shape may be of other data."""
    if not npy.exists():
        return False
    stream, entry = open_npz(npz)
    with stream, open(npy, "rb") as f:
        return entry.file_size == npy.stat().st_size and f.read(CHUNK) == read_member(stream, npz)


def png_folder(root, paths):
    """The folder that paths are relative to: ROOT/core50_128x128, unless the frames lie directly in ROOT."""
    return root if (root / paths[0]).is_file() else root / "core50_128x128"


def open_frames(root, paths):
    """NpyFrames or PngFrames, whichever the data folder holds; the npz is converted if that was not done before."""
    npz, npy = root / "core50_imgs.npz", root / "core50_imgs.npy"
    if npz.exists() and not npy_is_current(npz, npy):
        convert_npz(npz, npy, len(paths))
    return NpyFrames(npy, len(paths)) if npy.exists() else PngFrames(png_folder(root, paths), paths)


class CORE50:
    """A run of a CORe50 scenario: iterate over its training batches; each iter() starts at start_batch.

    A batch is (train_x, train_y): uint8 (n, 128, 128, 3), int64 (n,); while one is in use, the next one is read.
    scenario: one of SCENARIOS. run: 0-9, the order of the batches. cumul: batch i holds the batches 0..i.
    preload: read all frames into memory first (8 GB for all of CORe50). Raises DataError."""

    def __init__(self, root, preload=False, scenario="nicv2_391", cumul=False, run=0, start_batch=0):
        self.root, self.scenario, self.run, self.cumul = Path(root), scenario, run, cumul
        if missing := missing_data(self.root):
            raise MissingData(missing)
        paths = read_paths(self.root / "paths.pkl")
        lup, labels = (read_pickle(self.root / name, dict) for name in ("LUP.pkl", "labels.pkl"))
        *self.batches, self.test = read_run(self.root, object_numbers(paths), lup, labels, scenario, run)
        if not isinstance(start_batch, int) or start_batch not in range(len(self.batches)):
            raise DataError(f"start_batch {start_batch!r} is not in {scenario}: choose 0 to {len(self.batches) - 1}")
        self.start_batch, self.num_classes = start_batch, 1 + int(max(y.max() for _, y in self.batches))
        frames = open_frames(self.root, paths)
        self.image_size = frames.shape[0]
        self.read_frames = frames.read(np.arange(len(paths))).__getitem__ if preload else frames.read

    def __len__(self):
        return len(self.batches) - self.start_batch

    def __iter__(self):
        reader, ahead = ThreadPoolExecutor(1), None
        try:
            for i in range(self.start_batch, len(self.batches)):
                batch = ahead.result() if ahead else self.read_batch(i)
                ahead = reader.submit(self.read_batch, i + 1) if i + 1 < len(self.batches) and not self.cumul else None
                yield batch
        finally:
            reader.shutdown(wait=False, cancel_futures=True)

    def read_batch(self, i):
        """Training batch i of the run: uint8 (n, 128, 128, 3), int64 (n,)."""
        indices, y = (np.concatenate(column) for column in zip(*self.batches[0 if self.cumul else i:i + 1], strict=True))
        return self.read_frames(indices), y

    def get_test_set(self, stride=20):
        """Every stride-th frame of the test sessions (1 = all, 2.2 GB) and its labels, as in a training batch."""
        if not isinstance(stride, int) or stride < 1:
            raise DataError(f"test stride {stride!r} is no positive number: choose 1 (all frames) or more")
        return self.read_frames(self.test[0][::stride]), self.test[1][::stride].copy()


def missing_data(root):
    """One sentence that says which files of the data folder are missing and how to get them; None if all are there."""
    missing = [f"{name} ({SOURCES[name][0]})" for name in INDEX_FILES if not (Path(root) / name).is_file()]
    if not any(any(Path(root).glob(form)) for form in ("core50_imgs.np[yz]", "core50_128x128", "s[0-9]*")):
        missing.append(f"the frames ({SOURCES['core50_128x128.zip'][0]} or {SOURCES['core50_imgs.npz'][0]})")
    how = f"get them by `python data_loader.py --download --data {root}`"
    return f"{root} lacks {', '.join(missing)}: {how}" if missing else None


@contextlib.contextmanager
def locked(root, file=None):
    """While this is held, no other process fetches or converts data in root, to write file there; it waits instead."""
    with writing(file or root / ".lock"), open(root / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back by the system even if the process is killed
        except BlockingIOError:
            print(f"waiting for another process that fetches or converts data in {root}", file=sys.stderr, flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        except (OSError, AttributeError):  # on some file systems, on Windows
            if root not in WITHOUT_LOCKS:
                print(f"{root} has no locks: another process in it would not be noticed", file=sys.stderr, flush=True)
            WITHOUT_LOCKS.add(root)
        yield


@contextlib.contextmanager
def writing(file, n_bytes=0):
    """Makes sure that n_bytes fit on the disk of file, and turns errors of writing into a FetchError."""
    try:
        if (free := shutil.disk_usage(file.parent).free) < n_bytes:
            raise OSError(errno.ENOSPC, f"it needs {n_bytes / 1e9:.3f} GB, {free / 1e9:.3f} GB are free")
        yield
    except OSError as e:
        if e.errno not in DISK_ERRORS:
            raise
        how = f"{DISK_ERRORS[e.errno]}choose another folder"
        raise FetchError(f"{file} cannot be written ({e.strerror}): {how}, then run the same again") from e
