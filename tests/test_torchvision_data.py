"""torchvision's data sets as streams: a tiny archive in CIFAR's format and torchvision's FakeData."""
import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms.functional import resize

import ar1star_lat_replay as program
from benchmarks import pack_cifar
from data_loader import DataError, FetchError, MissingData
from harness.data_cli import main
from streams import torchvision_data
from streams.torchvision_data import TorchvisionStream, mixed
from tiny import SMALL, said

CLASSES = 20
OF_EACH = 8         # training images; 2 test images
NAMES = [f"name {c:02d}" for c in range(CLASSES)]


def part(of_each):
    """A file of CIFAR-100: of each class so many images, mixed; a pixel's value tells its place."""
    n = CLASSES * of_each
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), of_each))
    pixels = np.random.default_rng(of_each).integers(0, 256, (n, 3072), np.uint8)
    pixels[:, 0] = np.arange(n)
    return {"data": pixels, "fine_labels": labels.tolist()}


TRAIN = part(OF_EACH)
TEST = part(2)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with CIFAR-100 in small, whose check sums torchvision takes for those of the archive."""
    folder = tmp_path / "data" / "cifar-100-python"
    folder.mkdir(parents=True)
    sums = {}
    for name, content in {"train": TRAIN, "test": TEST, "meta": {"fine_label_names": NAMES}}.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5(pickle.dumps(content)).hexdigest()
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", datasets.CIFAR100.meta | {"md5": sums["meta"]})
    return folder.parent


class FakeData(datasets.FakeData):
    """60 grey images of five classes, without parts and without a list of labels."""
    def __init__(self, transform=None, target_transform=None):
        super().__init__(60, (1, 9, 7), 5)


def classes_of(stream, i):
    return set(stream.read_batch(i)[1].tolist())


def places(stream):
    """The place of each training image, batch by batch, as its pixels tell it."""
    return [x[:, 0, 0, 0].tolist() for x, _ in stream]


# ---- the two ways to make a stream ----

def test_classes_come_in_their_own_order_and_in_nine_mixed_ones(root):
    orders = []
    for run in range(10):
        stream = TorchvisionStream("CIFAR100", root, 32, batches=6, run=run)
        assert sorted(sum(places(stream), [])) == list(range(CLASSES * OF_EACH))
        groups = [classes_of(stream, i) for i in range(6)]
        assert sorted(map(len, groups)) == [3, 3, 3, 3, 4, 4]
        assert [len(x) for x, _ in stream] == [OF_EACH * len(group) for group in groups]
        orders.append(groups)
    assert sorted(orders[0], key=min) == orders[0] and all(max(g) - min(g) < 4 for g in orders[0])
    assert len({repr(order) for order in orders}) == 10


@pytest.mark.parametrize("units", [1, 3, 8])
def test_units_are_learned_one_by_one_after_a_tenth_of_the_classes(root, units):
    first = []
    later = []
    for run in range(10):
        stream = TorchvisionStream("cifar100", root, 32, units=units, run=run)
        assert len(stream) == 1 + CLASSES * units - 2       # a tenth of 20 classes is in batch 0
        found = places(stream)
        assert sorted(sum(found, [])) == list(range(CLASSES * OF_EACH))
        groups = [classes_of(stream, i) for i in range(len(stream))]
        assert len(groups[0]) == 2 and {len(group) for group in groups[1:]} == {1}
        assert {len(batch) for batch in found[1:]} <= {OF_EACH // units, -(-OF_EACH // units)}
        first.append(tuple(groups[0]))
        later.append([min(group) for group in groups[1:]])
        assert later[-1] != sorted(later[-1])       # mixed, in order 0, too
    assert first[0] == (0, 1) and len(set(first)) > 5 and len(set(map(tuple, later))) == 10
    again = TorchvisionStream("cifar100", root, 32, units=units, run=9)
    assert places(again) == found


def test_of_few_classes_two_are_in_batch_0(monkeypatch):
    monkeypatch.setattr(datasets, "FakeData", FakeData)
    assert len(classes_of(TorchvisionStream("fakedata", "", 32, units=2), 0)) == 2


def test_orders_are_the_same_everywhere():
    """random.Random(seed).random() is promised to give the same numbers in every version of Python."""
    assert "".join(mixed("abcdefgh", 0)) == "dhfcebga"     # .844 .758 .421 .259 .511 .405 .784 .303
    assert sorted(mixed(range(50), 3)) == list(range(50)) != mixed(range(50), 3)


def test_labels_images_and_names_are_torchvisions(root):
    stream = TorchvisionStream("cifar100", root, 32)
    assert stream.class_names == NAMES and stream.num_classes == stream.first_classes == CLASSES
    x, y = stream.read_batch(0)
    places = x[:, 0, 0, 0]
    assert x.dtype == np.uint8 and y.dtype == np.int64
    assert np.array_equal(y, np.array(TRAIN["fine_labels"])[places])
    planes = TRAIN["data"][places].reshape(-1, 3, 32, 32)
    assert np.array_equal(x, planes.transpose(0, 2, 3, 1))
    larger = resize(torch.from_numpy(planes[:3]), [48, 48], antialias=True).permute(0, 2, 3, 1)
    assert np.array_equal(TorchvisionStream("cifar100", root, 48).read_batch(0)[0][:3], larger.numpy())
    x, y = stream.get_test_set(7)
    assert x[:, 0, 0, 0].tolist() == list(range(0, 40, 7)) and y.tolist() == TEST["fine_labels"][::7]
    both = TorchvisionStream("cifar100", root, 32, start_batch=1, cumulative=True)
    assert len(both) == 9 and len(next(iter(both))[0]) == 2 * len(stream.read_batch(1)[0])


@pytest.mark.parametrize("how", [{"batches": 5}, {"units": 3}])
def test_a_share_of_each_class_is_held_out_in_all_orders(root, how):
    tests = []
    for run in (0, 4):
        stream = TorchvisionStream("cifar100", root, 32, run=run, held_out=.25, **how)
        x, y = stream.get_test_set()
        assert np.bincount(y).tolist() == [OF_EACH // 4] * CLASSES
        assert y.tolist() == [TRAIN["fine_labels"][place] for place in x[:, 0, 0, 0]]
        tests.append(x[:, 0, 0, 0].tolist())
        assert sorted(sum(places(stream), tests[-1])) == list(range(CLASSES * OF_EACH))
        assert "40 of" in stream.notes()[0]
    assert tests[0] == tests[1] and TorchvisionStream("cifar100", root).notes() == []


def test_data_without_parts_are_tested_on_a_fifth_of_each_class(monkeypatch):
    monkeypatch.setattr(datasets, "FakeData", FakeData)
    stream = TorchvisionStream("FAKEDATA", "", 32, batches=3)
    counts = np.bincount([label for _, label in FakeData()], minlength=5)
    x, y = stream.get_test_set()
    assert np.bincount(y).tolist() == [round(n / 5) for n in counts]
    learned = sum((y.tolist() for _, y in stream), [])
    assert np.bincount(learned).tolist() == [n - round(n / 5) for n in counts]
    assert x.shape == (len(y), 32, 32, 3) and (x[..., :1] == x).all() and stream.class_names is None
    places = sorted(np.concatenate([*stream.batches, stream.test]))
    assert places == list(range(60)) and stream.num_classes == 5


def test_files_are_read_when_their_batch_comes(tmp_path):
    """Of torchvision's ImageFolder: any folder of classes."""
    for name in "abc":
        (tmp_path / name).mkdir()
        for k in range(5):
            Image.new("RGB", (9, 9), (10 * k, 0, 0)).save(tmp_path / name / f"{k}.png")
    stream = TorchvisionStream("imagefolder", tmp_path, 32, batches=3)
    assert stream.class_names == ["a", "b", "c"] and len(stream.test) == 3
    for k in range(5):
        (tmp_path / "b" / f"{k}.png").write_text("damaged")
    batches = iter(stream)
    next(batches)
    with pytest.raises(DataError, match="of ImageFolder cannot be read .*fetch them anew"):
        next(batches)
    assert len(list(stream.unreadable())) == 5


# ---- how torchvision's classes are opened ----

def test_parts_are_found_by_the_constructor(root, monkeypatch):
    """Of a class with split= instead of train=, whose names for its parts are not given anywhere."""
    seen = []

    def split_in(*names):
        class Split(datasets.CIFAR100):
            def __init__(self, root, split="train", transform=None, target_transform=None, download=False):
                if split not in names:
                    raise ValueError(f"Unknown value '{split}' for argument split. Valid values are {names}.")
                seen.append((split, download))
                super().__init__(root, train=split.startswith("train"))
        return Split

    for names, expected in (
            (("train", "trainval", "val", "test"), ["trainval", "test"]),
            (("train", "extra", "test"), ["train", "test"]), (("train", "val"), ["train", "val"])):
        monkeypatch.setattr(datasets, "SVHN", split_in(*names))
        assert len(TorchvisionStream("svhn", root, download=True).test) == 40
        assert seen == [(name, True) for name in expected]
        seen.clear()
    monkeypatch.setattr(datasets, "SVHN", split_in("train"))
    with pytest.raises(DataError, match="has no part test or val"):
        TorchvisionStream("svhn", root)


@pytest.mark.parametrize("name", [
    "CocoDetection", "VOCSegmentation", "Kinetics", "MovingMNIST", "Sintel", "VisionDataset", "LFWPairs",
    "SBU"])
def test_what_is_no_classification_is_refused(name, tmp_path, monkeypatch):
    class Captions(datasets.FakeData):      # what SBU and LFWPairs give, without their files
        def __init__(self, transform=None, target_transform=None):
            super().__init__(8, (3, 4, 4))

        def __getitem__(self, index):
            return (super().__getitem__(index)[0], "a dog") if name == "SBU" else (1, 2, 3)

    if name in ("SBU", "LFWPairs"):
        monkeypatch.setattr(datasets, name, Captions)
    with pytest.raises(DataError, match="no classification|cannot be opened by a folder alone") as error:
        TorchvisionStream(name, tmp_path)
    assert "cifar100" in str(error.value)


@pytest.mark.parametrize("name", [
    "CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "QMNIST", "USPS", "SVHN", "STL10", "GTSRB",
    "Flowers102", "OxfordIIITPet", "Food101", "DTD", "FGVCAircraft", "Country211", "EuroSAT", "Caltech101",
    "Caltech256", "SUN397", "RenderedSST2", "Omniglot", "SEMEION"])
def test_data_that_are_not_there_are_missing_and_nothing_is_fetched(name, tmp_path):
    with pytest.raises(MissingData, match=str(tmp_path)) as error:
        TorchvisionStream(name, tmp_path / "nothing")
    assert "--data DIR" in str(error.value) and "\n" not in str(error.value)


def test_sentences(root, tmp_path, monkeypatch):
    for call, says in (
            (lambda: TorchvisionStream("cifar1000", root), "unknown .*'cifar1000'.*did you mean 'cifar100'"),
            (lambda: TorchvisionStream("foldr", root), "did you mean 'folder'"),
            (lambda: TorchvisionStream("cifar100", root, batches=21), "20 classes.*21 batches"),
            (lambda: TorchvisionStream("cifar100", root, units=9), "8 training images.*9 units"),
            (lambda: TorchvisionStream("cifar100", root, units=7, held_out=.25), "6 training images"),
            (lambda: TorchvisionStream("places365", tmp_path), "does not hold Places365"),
            (lambda: TorchvisionStream("stanfordcars", tmp_path, download=True), "StanfordCars")):
        with pytest.raises(DataError, match=says):
            call()

    def offline(self):
        raise OSError("no\nnetwork")
    monkeypatch.setattr(datasets.CIFAR10, "download", offline)
    with pytest.raises(FetchError, match="CIFAR10 cannot be fetched.*no network.*same command again"):
        TorchvisionStream("cifar10", tmp_path, download=True)

    def without_scipy(self, *args, **keys):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
    monkeypatch.setattr(datasets.CIFAR10, "__init__", without_scipy)
    with pytest.raises(DataError, match="unknown|pip install scipy|no classification"):
        TorchvisionStream("cifar10", tmp_path)


def test_identity_is_of_the_content(root, tmp_path, monkeypatch):
    first = TorchvisionStream("cifar100", root).identity()
    assert first["batches"] == [16] * 10 and first["test"] == 40 and first["classes"] == NAMES
    assert TorchvisionStream("CIFAR100", root, 48, start_batch=3).identity() == first
    for how in ({"run": 1}, {"units": 2}, {"batches": 2}, {"held_out": .1}):
        other = TorchvisionStream("cifar100", root, **how).identity()
        assert other["order"] != first["order"] and other["data"] == first["data"]
    monkeypatch.setitem(TEST, "data", TEST["data"] ^ 1)
    (root / "cifar-100-python" / "test").write_bytes(pickle.dumps(TEST))
    monkeypatch.setattr(datasets.CIFAR100, "test_list",
                        [["test", hashlib.md5(pickle.dumps(TEST)).hexdigest()]])
    assert TorchvisionStream("cifar100", root).identity()["data"] != first["data"]


# ---- commands ----

def test_a_run_learns_them_and_its_learner_names_the_classes(root, params, tmp_path, capfd):
    logs = tmp_path / "logs"
    words = ["--config", str(params), "--name", "DEFAULT", "--data", str(root), "--log-dir", str(logs)]
    settings = SMALL | {"dataset": "CIFAR100", "image_size": 32, "units": 2, "weights": "none"}
    words += [f"--set={key}={value}" for key, value in settings.items()]
    assert program.main([*words, "--max-batches", "2"]) == 0
    assert program.main([*words, "--max-batches", "3"]) == 0        # goes on
    learner = program.load_learner(logs / "DEFAULT/run0_seed0")
    assert learner.class_names == NAMES and learner.image_size == 32 and learner.batches == 3
    nowhere = ["--fresh", "--data", str(tmp_path / "none")]
    said(capfd, 2, [*words, *nowhere], "does not hold CIFAR100", "--download")
    said(capfd, 2, [*words, "--set=start_batch=999"], "start_batch 999")


def test_the_check_tells_what_a_folder_holds(root, tmp_path, capsys):
    words = ["--check", "--dataset", "cifar100", "--data"]
    assert main([*words, str(root)]) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in ("160 images to train", "40 to test", "20 classes: name 00, name 01"))
    assert main([*words, str(root), "--full"]) == 0 and main([*words, str(tmp_path)]) == 2
    assert "--download" in capsys.readouterr().err


# ---- CIFAR-100 from PNG files ----

def test_png_files_are_packed_as_torchvision_reads_them(tmp_path, monkeypatch):
    clone = tmp_path / "clone"
    images = {}
    for part, n in (("train", 3), ("test", 1)):
        for label, name in enumerate(("bee", "ant")):       # numbered in the order of their names
            (clone / part / name).mkdir(parents=True)
            for k in range(n):
                pixels = np.random.default_rng(10 * label + k).integers(0, 256, (32, 32, 3), np.uint8)
                images[part, 1 - label, k] = pixels
                Image.fromarray(pixels).save(clone / part / name / f"{k}.png")
    packed = torchvision_data.PackedCIFAR100
    with pytest.raises(DataError, match="clone"):
        pack_cifar.pack(tmp_path, tmp_path / "data")
    pack_cifar.pack(clone, tmp_path / "data")
    with pytest.raises(DataError, match="exists"):
        pack_cifar.pack(clone, tmp_path / "data")
    with pytest.raises(MissingData):        # neither the archive nor the clone that is known
        TorchvisionStream("cifar100", tmp_path / "data")

    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest()
            for file in (tmp_path / "data" / "cifar-100-python").iterdir()}
    monkeypatch.setattr(packed, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(packed, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(packed, "meta", packed.meta | {"md5": sums["meta"]})
    stream = TorchvisionStream("cifar100", tmp_path / "data", 32, batches=2)
    assert stream.class_names == ["ant", "bee"] and "pack_cifar.py" in stream.notes()[0]
    for label, (x, y) in enumerate(stream):
        assert y.tolist() == [label] * 3
        assert all(np.array_equal(x[k], images["train", label, k]) for k in range(3))
    assert np.array_equal(stream.get_test_set()[0][1], images["test", 1, 0])


def test_the_pickle_names_numpy_as_all_versions_know_it():
    data = pack_cifar.dumped({"data": np.zeros((2, 3072), np.uint8)})
    assert b"numpy.core.multiarray" in data and b"_core" not in data
    assert np.array_equal(pickle.loads(data)["data"], np.zeros((2, 3072), np.uint8))
