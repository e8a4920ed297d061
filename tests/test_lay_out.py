"""Collections as own images: a clone of Grocery Store with five products, and class folders, made here."""
import pytest

from benchmarks.lay_out import lay_out
from data_loader import DataError

NAMES = ["Apple", "Pear", "Milk", "Kiwi", "Leek"]


@pytest.fixture
def clone(tmp_path):
    dataset = tmp_path / "clone" / "dataset"
    dataset.mkdir(parents=True)
    rows = [f"{name},{k},Coarse,0,path,path" for k, name in enumerate(NAMES)]
    (dataset / "classes.csv").write_text("\n".join(["Class Name (str),...", *rows]))
    for split in ("train", "val", "test"):
        lines = []
        for k, name in enumerate(NAMES):
            photo = dataset / split / "Kind" / f"{name}_1.jpg"
            photo.parent.mkdir(parents=True, exist_ok=True)
            photo.write_text(f"{split} {k}")
            lines.append(f"{photo.relative_to(dataset)}, {k}, 0")
        (dataset / f"{split}.txt").write_text("\n".join(lines))
    return dataset.parent


def class_folders(tmp_path):
    for part, n in (("train", 3), ("validation", 2)):
        for name in ("shoes", "hat"):
            for k in range(n):
                photo = tmp_path / "collection" / part / name / f"{k}.jpg"
                photo.parent.mkdir(parents=True, exist_ok=True)
                photo.write_text(f"{part} {name} {k}")
    return tmp_path / "collection"


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.jpg")}


def test_products_come_in_batches_and_are_tested_on_their_own_photographs(clone, tmp_path):
    lay_out(clone, tmp_path / "own", classes=2)
    assert files(tmp_path / "own") == {
        **{f"train/{k // 2:02d}/{name}/{name}_1.jpg": f"train {k}" for k, name in enumerate(NAMES)},
        **{f"test/{name}/{name}_1.jpg": f"test {k}" for k, name in enumerate(NAMES)}}
    with pytest.raises(DataError, match="own exists"):
        lay_out(clone, tmp_path / "own")
    with pytest.raises(DataError, match="own where train.*git clone"):
        lay_out(tmp_path, tmp_path / "other")


def test_another_order_deals_all_products_to_other_batches(clone, tmp_path):
    lay_out(clone, tmp_path / "a", classes=2)
    lay_out(clone, tmp_path / "b", classes=2, order=1, test="val")
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert len(a) == len(b) == 10 and a.keys() != b.keys()
    train = [sorted(text for path, text in found.items() if path.startswith("train")) for found in (a, b)]
    assert train[0] == train[1] and b["test/Milk/Milk_1.jpg"] == "val 2"


def test_class_folders_are_laid_out_with_at_most_so_many_images(tmp_path):
    source = class_folders(tmp_path)
    lay_out(source, tmp_path / "own", classes=1, images=2, test="validation", tests=1)
    assert files(tmp_path / "own") == {
        **{f"train/{batch:02d}/{name}/{k}.jpg": f"train {name} {k}"
           for batch, name in enumerate(("hat", "shoes")) for k in range(2)},
        **{f"test/{name}/0.jpg": f"validation {name} 0" for name in ("hat", "shoes")}}
    with pytest.raises(DataError, match="train, validation where test/"):
        lay_out(source, tmp_path / "other")
