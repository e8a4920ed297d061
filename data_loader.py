"""CORe50 for continual learning: 128x128 photographs of 50 objects in 11 sessions, served batch after batch.

    from data_loader import CORE50
    stream = CORE50("core50", scenario="nicv2_391", run=0)
    for train_x, train_y in stream:             # uint8 (n, 128, 128, 3), int64 (n,)
        ...
    test_x, test_y = stream.get_test_set()      # every 20th frame of the test sessions 3, 7 and 10

CORe50: Lomonaco and Maltoni, CoRL 2017; the NICv2 scenarios: arXiv 1907.03799. The folder holds paths.pkl,
LUP.pkl and labels.pkl (which frames form which batch) and the frames, as PNG files or as core50_imgs.npz,
which is read where it lies. `Stream` is the base of all streams. This file can be copied alone; its commands
are in harness/data_cli.py.
"""
import errno
import hashlib
import math
import pickle
import re
import shlex
import shutil
import struct
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":  # above the imports that take seconds: --help needs none of them
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out
    if not Path(sys.path[0], "harness", "data_cli.py").is_file():
        sys.exit("data_loader.py: the commands are in harness/data_cli.py, and this is a copy of the file "
                 "alone: run them in a clone of the repository")
    from harness.data_cli import main
    sys.exit(main())

import numpy as np
import torch
import torch.nn.functional as F

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

INDEX_SITE = "https://vlomonaco.github.io/core50/data"
FRAMES_SITE = "http://bias.csr.unibo.it/maltoni/download/core50"
SOURCES = {  # file: (URL, md5)
    "paths.pkl": (f"{INDEX_SITE}/paths.pkl", "b568f86998849184df3ec3465290f1b0"),
    "LUP.pkl": (f"{INDEX_SITE}/LUP.pkl", "33afc26faa460aca98739137fdfa606e"),
    "labels.pkl": (f"{INDEX_SITE}/labels.pkl", "281c95774306a2196f4505f22fd60ab1"),
    "core50_128x128.zip": (f"{FRAMES_SITE}/core50_128x128.zip", "745f3373fed08d69343f1058ee559e13"),
    "core50_imgs.npz": (f"{FRAMES_SITE}/core50_imgs.npz", "3689d65d0a1c760b87821b114c8c4c6c"),
}
INDEX_FILES = ("paths.pkl", "LUP.pkl", "labels.pkl")
ARRAYS = ("core50_imgs.npz", "core50_imgs.npy")  # all frames as one array: the first one counts
SCENARIOS = ("ni", "nc", "nic", "nicv2_79", "nicv2_196", "nicv2_391")
FRAME_PATH = re.compile(r"(?:[\w-]+/)+[\w-]+\.png", re.ASCII)  # s11/o1/C_11_01_000.png
SAMPLES = 16  # frames of batch 0, and of the test set, by whose pixels the images are recognized
DISK_ERRORS = {  # errno: what helps
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make its folder writable"),
    errno.EIO: "check the disk",
    errno.EFBIG: "use a file system for larger files",
}
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)  # of a file system without them
_folders_without_locks = set()  # of which it has been said


class DataError(Exception):
    """The data, or what was asked of them, are wrong. The message says what, where, and what to do."""
    exit_status = 2


class MissingData(DataError):
    """There is no data set, or only a part of it, where one was looked for."""


class FetchError(DataError):
    """The network or the disk failed: the same command may succeed later."""
    exit_status = 1


# ---- streams ----

class Stream:
    """Batches of images and labels, uint8 (n, H, W, 3) and int64 (n,); each iter() begins at start_batch.

    cumulative: batch i holds the images of the batches 0 .. i. DataError if there is no batch `start_batch`.
    A subclass gives `num_classes`, `identity()`, `_read_batches(numbers)`: images and labels of some batches
    in one, and `_read_test(stride)`: those of the test set.
    """
    class_names = None  # where the classes have names: [that of label 0, ...]
    first_classes = property(lambda self: self.num_classes)  # how many a learner begins with

    def __init__(self, n_batches, start_batch=0, cumulative=False):
        if not isinstance(start_batch, int) or start_batch not in range(n_batches):
            raise DataError(f"start_batch {start_batch!r} is not in the stream: choose 0 to {n_batches - 1}")
        self.n_batches = n_batches
        self.start_batch = start_batch
        self.cumulative = cumulative

    def __len__(self):
        """Number of batches that iterating gives: those from start_batch on."""
        return self.n_batches - self.start_batch

    def __iter__(self):
        return (self.read_batch(i) for i in range(self.start_batch, self.n_batches))

    def read_batch(self, i):
        """Batch i of the stream: uint8 (n, H, W, 3), int64 (n,)."""
        first = 0 if self.cumulative else i
        return self._read_batches(range(first, i + 1))

    def get_test_set(self, stride=1):
        """Every stride-th test image (1 = all) and its label, as in a batch."""
        if not isinstance(stride, int) or stride < 1:
            raise DataError(f"test stride {stride!r} is no positive number: choose 1 (all images) or more")
        return self._read_test(stride)

    def identity(self):
        """What the stream is made of, known by its content: the same for a copy in another folder.

        A dict of "data": 16 hex digits for the images, in whatever order; "order": 16 for batches and labels;
        "classes": their names or None; "batches", "test": the images in each batch, and to test on. Where
        batches may be added behind those learned also "content": [[name, 16 digits] of each batch].
        """
        raise NotImplementedError

    def notes(self):
        """What a user should know about these data: a list of sentences."""
        return []


def fingerprint(*parts):
    """16 hex digits that stand for these texts and bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


class CORE50(Stream):
    """A run of a CORe50 scenario: batches of uint8 (n, 128, 128, 3), int64 (n,).

    While one is in use, the next one is read. scenario: one of SCENARIOS. run: 0-9, the order of the batches.
    cumul: batch i holds the batches 0 .. i. preload: read all frames into memory first (8 GB for CORe50).
    image_size: stretch frames to so many pixels a side instead of their own. DataError if the data are
    damaged, MissingData if there are none.
    """

    def __init__(self, root, preload=False, scenario="nicv2_391", cumul=False, run=0, start_batch=0,
                 image_size=None):
        root = Path(root)
        missing = missing_data(root)
        if missing and (root / "train").is_dir():
            raise DataError(f"{root} holds own images (there is a folder train in it): learn them with "
                            "--name folder")
        if missing:
            raise MissingData(missing)

        paths = read_paths(root / "paths.pkl")
        lup = read_pickle(root / "LUP.pkl", dict)
        labels = read_pickle(root / "labels.pkl", dict)
        *self.batches, self.test = read_run(root, object_numbers(paths), lup, labels, scenario, run)
        super().__init__(len(self.batches), start_batch, cumul)
        self.scenario = scenario
        self.run = run
        self.num_classes = 1 + max(int(y.max()) for _, y in self.batches)

        frames = open_frames(root, paths)
        self.image_size = image_size or frames.shape[0]
        self.read_frames = frames.read
        if preload:
            self.read_frames = frames.read(np.arange(len(paths))).__getitem__

    def __iter__(self):
        reader = ThreadPoolExecutor(1)
        ahead = None
        try:
            for i in range(self.start_batch, self.n_batches):
                batch = ahead.result() if ahead else self.read_batch(i)
                more = i + 1 < self.n_batches and not self.cumulative  # two cumulative ones take much memory
                ahead = reader.submit(self.read_batch, i + 1) if more else None
                yield batch
        finally:
            reader.shutdown(wait=False, cancel_futures=True)

    def _read_batches(self, numbers):
        indices = np.concatenate([self.batches[i][0] for i in numbers])
        y = np.concatenate([self.batches[i][1] for i in numbers])
        return stretch_frames(self.read_frames(indices), self.image_size), y

    def _read_test(self, stride):
        indices, y = self.test
        return stretch_frames(self.read_frames(indices[::stride]), self.image_size), y[::stride].copy()

    def get_test_set(self, stride=20):
        """Every stride-th frame of the test sessions (1 = all, 2.2 GB) and its label, as in a batch."""
        return super().get_test_set(stride)

    def identity(self):
        """As Stream.identity; the images are known by a few frames, of batch 0 and of the test set."""
        samples = []
        for indices in (self.batches[0][0], self.test[0]):
            places = np.linspace(0, len(indices) - 1, SAMPLES).astype(int)
            samples.append(self.read_frames(np.sort(indices)[places]).tobytes())
        order = [part.tobytes() for batch in [*self.batches, self.test] for part in batch]
        return {"data": fingerprint(*samples), "order": fingerprint(*order), "classes": self.class_names,
                "batches": [len(y) for _, y in self.batches], "test": len(self.test[1])}


# ---- the index: which frames form which batch ----

def missing_data(root):
    """One sentence on which files a data folder lacks and how to get them; None if all are there."""
    command = f"python data_loader.py --download --data {shlex.quote(str(root))}"
    if not root.is_dir():
        return f"there is no folder {root}: name another one with --data DIR, or get CORe50 by `{command}`"

    missing = [f"{name} ({SOURCES[name][0]})" for name in INDEX_FILES if not (root / name).is_file()]
    if not any(any(root.glob(form)) for form in ("core50_imgs.np[yz]", "core50_128x128", "s[0-9]*")):
        missing.append(f"the frames ({SOURCES['core50_128x128.zip'][0]} or {SOURCES['core50_imgs.npz'][0]})")
    if not missing:
        return None
    return f"{root} lacks {', '.join(missing)}: get them by `{command}`"


def damaged(file, what, error=None):
    """The DataError for a file that has to be fetched again, or made readable, if that was the `error`."""
    if isinstance(error, PermissionError):
        return DataError(f"{file} cannot be read ({error.strerror}): make it readable")
    form = " --form npz" if file.name.startswith("core50_imgs") else ""
    command = f"python data_loader.py --download --data {shlex.quote(str(file.parent))}{form}"
    return DataError(f"{file} {what}: delete it and run `{command}`")


class IndexUnpickler(pickle.Unpickler):
    """Reads lists, tuples, dicts, strings and numbers, and nothing that could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


def read_pickle(file, kind):
    """Content of an index file: a list or dict (`kind`) that is not empty. DataError for anything else."""
    try:
        with open(file, "rb") as f:
            content = IndexUnpickler(f).load()
    except Exception as e:  # a damaged pickle raises nearly anything: ValueError, KeyError, MemoryError, ...
        raise damaged(file, f"is damaged or no index file ({str(e) or type(e).__name__})", e) from e
    if not isinstance(content, kind) or not content:
        raise damaged(file, "holds no list of frames" if kind is list else "holds no table of scenarios")
    return content


def read_paths(file):
    """The frames' paths, relative to the folder of PNG files; the other files hold indices into this list."""
    paths = read_pickle(file, list)
    for path in paths:
        if not isinstance(path, str) or not FRAME_PATH.fullmatch(path):
            raise damaged(file, f"holds {path!r:.60} where a path like s1/o1/C_01_01_000.png is expected")
    if len(set(paths)) < len(paths):
        raise damaged(file, "names a frame twice")
    return paths


def object_numbers(paths):
    """int64 (frames,): the object of each frame, that is its folder (o1, o10, ...), as a number from 0."""
    folders = [path.split("/")[-2] for path in paths]
    return np.unique(folders, return_inverse=True)[1]


def one_run(table, scenario, run, file):
    """The batches of one scenario and run, as the index file holds them. DataError for an unknown one."""
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
    """The batches of a run: [(indices into paths, labels), ...], int64 (n,) each, the last one the test set.

    objects: (frames,), from object_numbers. DataError if the index files do not fit together.
    """
    def wrong(what):
        return damaged(root / "LUP.pkl", f"and labels.pkl do not fit ({scenario}, run {run}: {what})")

    indices_of = one_run(lup, scenario, run, root / "LUP.pkl")
    labels_of = one_run(labels, scenario, run, root / "labels.pkl")
    if len(indices_of) != len(labels_of):
        raise wrong(f"{len(indices_of)} batches of frames, {len(labels_of)} of labels")

    batches = []
    for b, (indices, y) in enumerate(zip(indices_of, labels_of)):
        try:
            indices = integers(indices)
            y = integers(y)
        except Exception as e:  # numpy raises several types for lists that are no arrays
            raise wrong(f"batch {b} holds {e}") from e
        if len(indices) == 0 or len(indices) != len(y):
            raise wrong(f"batch {b} has {len(indices)} frames and {len(y)} labels")
        if indices.min() < 0 or indices.max() >= len(objects):
            raise wrong(f"batch {b} wants frames {indices.min()} to {indices.max()}, "
                        f"there are 0 to {len(objects) - 1}")
        batches.append((indices, y))

    used, y = (np.concatenate(column) for column in zip(*batches))
    if len(np.unique(used)) < len(used):
        raise wrong("a frame stands in it twice")

    n_test = len(batches[-1][0])
    classes = np.unique(y[:-n_test])  # of the training batches
    if not np.array_equal(classes, np.arange(len(classes))) or y.max() >= len(classes):
        raise wrong(f"labels {y.min()} to {y.max()}, but {len(classes)} classes to train")

    label_of = np.full(objects.max() + 1, -1)
    label_of[objects[used]] = y
    if (label_of[objects[used]] != y).any():
        raise wrong("frames of one object have different labels")
    return batches


# ---- the frames: PNG files, or one large array ----

def check_png(data):
    """(bits, colour type) in the bytes of a PNG file, uint8 (n,). ValueError unless its check sums fit.

    torchvision's decoder lets some damage through and crashes on other.
    """
    raw = memoryview(data)
    if raw[:8] != b"\x89PNG\r\n\x1a\n" or raw[12:16] != b"IHDR":
        raise ValueError("no PNG file")

    at = 8
    kind = b""
    while kind != b"IEND":  # a chunk: length of the content (4 bytes), kind (4), content, check sum (4)
        end = at + 12 + int.from_bytes(raw[at:at + 4], "big")
        if end > len(raw):
            raise ValueError("truncated")
        if int.from_bytes(raw[end - 4:end], "big") != zlib.crc32(raw[at + 4:end - 4]):
            raise ValueError("wrong check sum")
        kind = bytes(raw[at + 4:at + 8])
        at = end
    return raw[24], raw[25]


def read_png(file):
    """uint8 (height, width, 3) of an 8-bit RGB PNG file; DataError for anything else."""
    from torchvision.io import decode_png  # not above: it takes seconds, and an npz does without it

    try:
        data = np.fromfile(file, np.uint8)
        bits, colours = check_png(data)
        if (bits, colours) != (8, 2):
            names = {0: "greyscale", 3: "palette", 4: "greyscale with alpha", 6: "RGB with alpha"}
            raise ValueError(f"{names.get(colours, 'RGB')} of {bits} bits instead of RGB of 8")
        return decode_png(torch.from_numpy(data)).permute(1, 2, 0).numpy()
    except (OSError, ValueError, RuntimeError) as e:
        reason = getattr(e, "strerror", e)
        raise DataError(f"{file} is no usable frame ({reason}): delete it and get all missing frames by "
                        "`python data_loader.py --download --data DIR`") from e


class PngFrames:
    """The frames as PNG files, uint8."""

    def __init__(self, folder, paths):
        self.folder = folder
        self.paths = paths
        self.shape = read_png(folder / paths[0]).shape

    def read(self, indices):
        """Frames (n, height, width, 3) of indices (n,) into paths."""
        x = np.empty((len(indices), *self.shape), np.uint8)

        def fill(positions):
            for k in positions:
                file = self.folder / self.paths[indices[k]]
                image = read_png(file)
                if image.shape != self.shape:
                    found, first = (f"{width}x{height}" for height, width, _ in (image.shape, self.shape))
                    raise DataError(f"{file} has {found} pixels, but {self.paths[0]} {first}: replace one")
                x[k] = image

        with ThreadPoolExecutor() as pool:  # the decoder runs outside Python's global lock
            list(pool.map(fill, np.array_split(np.arange(len(indices)), 64)))
        return x


def stretch_frames(x, size):
    """uint8 images (n, height, width, 3) as squares of so many pixels a side: themselves if they are."""
    if x.shape[1:3] == (size, size):
        return x
    out = np.empty((len(x), size, size, 3), np.uint8)
    for k in range(0, len(x), 64):  # as floats they take four times the memory
        pixels = torch.from_numpy(x[k:k + 64].astype(np.float32)).permute(0, 3, 1, 2)     # torch casts slower
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
        out[k:k + 64] = pixels.round().byte().permute(0, 2, 3, 1).numpy()
    return out


class ArrayFrames:
    """The frames as one array, uint8 (frames, height, width, 3), that begins at byte `start` of a file."""

    def __init__(self, file, start, shape):
        self.file = file
        self.start = start
        self.shape = shape[1:]

    def read(self, indices):
        """Frames (n, height, width, 3) of indices (n,) into paths."""
        x = np.empty((len(indices), *self.shape), np.uint8)
        try:
            with open(self.file, "rb", buffering=0) as f:  # pages of a memory map count as resident memory
                for image, i in zip(x, indices.tolist()):
                    f.seek(self.start + i * image.nbytes)
                    if f.readinto(image) != image.nbytes:
                        raise damaged(self.file, "was cut off while in use")
        except OSError as e:
            raise damaged(self.file, f"cannot be read any more ({e.strerror})") from e
        return x


def open_array(file, n_frames):
    """ArrayFrames of core50_imgs.npz or .npy. DataError unless they are n_frames square RGB images."""
    try:
        start, size = (0, file.stat().st_size) if file.suffix == ".npy" else find_member(file)
        with open(file, "rb") as f:
            f.seek(start)
            np.lib.format.read_magic(f)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
            pixels = f.tell()  # where they begin
    except DataError:
        raise
    except Exception as e:  # zipfile and numpy raise nearly anything for damage: KeyError, RuntimeError, ...
        raise damaged(file, f"is truncated, damaged or another file ({e})", e) from e

    square = len(shape) == 4 and shape[1] == shape[2]
    if dtype != np.uint8 or fortran or not square or shape[0] != n_frames or shape[3] != 3:
        found = f"{dtype} {shape}{' in Fortran order' if fortran else ''}"
        raise damaged(file, f"holds {found} instead of the uint8 ({n_frames}, size, size, 3) of paths.pkl")
    expected = pixels - start + math.prod(shape)
    if size != expected:
        raise damaged(file, f"has {size} bytes of frames instead of {expected}")
    return ArrayFrames(file, pixels, shape)


def find_member(npz):
    """(first byte, bytes) of x.npy in core50_imgs.npz, which lies in it as it is. DataError if compressed."""
    with zipfile.ZipFile(npz) as archive, open(npz, "rb") as f:
        entry = archive.getinfo("x.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise DataError(f"{npz} is compressed, so that its frames cannot be read in place: unzip x.npy, "
                            f"name it {npz.with_suffix('.npy')} and move {npz.name} away")
        archive.open(entry).close()  # checks the header before x.npy, and that it is not encrypted
        f.seek(entry.header_offset)
        header = f.read(30)
    name, extra = struct.unpack("<HH", header[26:])  # bytes of what stands between that header and x.npy
    return entry.header_offset + len(header) + name + extra, entry.file_size


def png_folder(root, paths):
    """The folder that paths are relative to: ROOT/core50_128x128, unless the frames lie directly in ROOT."""
    return root if (root / paths[0]).is_file() else root / "core50_128x128"


def open_frames(root, paths):
    """ArrayFrames or PngFrames, whichever the folder holds."""
    for name in ARRAYS:
        if (root / name).exists():
            return open_array(root / name, len(paths))
    return PngFrames(png_folder(root, paths), paths)


# ---- locks and full disks ----

def lock(path, wait=True):
    """The open file `path`, locked: no other process can lock it until it is closed or this process ends.

    While another one holds it: waits, or raises BlockingIOError unless `wait`. Where the file system has no
    locks, says so once a folder and returns the file without one. OSError if the file cannot be opened.
    """
    folder = Path(path).parent
    file = open(path, "w")
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "Windows")
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        if getattr(error, "errno", None) not in NO_LOCKS:
            file.close()
            raise
        if folder not in _folders_without_locks:
            _folders_without_locks.add(folder)
            print(f"{folder} is on a file system without locks ({error.strerror}): a second process in it "
                  "would not be noticed", file=sys.stderr, flush=True)
    return file


@contextmanager
def writing(file, n_bytes=0):
    """Makes sure that n_bytes fit on the disk of file, and turns errors of writing into a FetchError."""
    try:
        free = shutil.disk_usage(file.parent).free
        if free < n_bytes:
            raise OSError(errno.ENOSPC, f"it needs {n_bytes / 1e9:.3f} GB, {free / 1e9:.3f} GB are free")
        yield
    except OSError as e:
        if e.errno not in DISK_ERRORS:
            raise
        raise FetchError(f"{file} cannot be written ({e.strerror}): {DISK_ERRORS[e.errno]} or choose another "
                         "folder, then run the same again") from e
