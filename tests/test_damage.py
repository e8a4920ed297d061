"""2,000 damaged images of each kind: none crashes or hangs the program; none that can be told is taken.

PNG has check sums: every damage is refused, or changes no pixel. The others have none, and the damage that is
left to them gives another picture that is as possible as the right one; only a comparison would tell:
- JPEG: a changed entry of a quantization or Huffman table, and codes that stand for other coefficients.
  libjpeg complains of some of these, but so it does of whole pictures, and Pillow passes no complaint on.
- WebP: nearly all within the coded pixels: its arithmetic code takes any bits. What remains is a missing end.
- GIF: a changed colour of the palette, more than half of a small file, and codes that stand for as many other
  pixels, or for more of them.
- BMP: all but the header; its pixels are not coded.
A file that ends early is refused, unless all its pixels are there, as in a GIF without its end mark.
The share of each kind that is taken with other pixels is bounded here.
"""
import io
import json
import resource

import numpy as np
import pytest
import torch
from PIL import Image

from core50_files import damage, in_another_process
from data_loader import DataError
from streams.folder import decode, read_image

N = 2000
# share of damaged images that may be taken though their pixels are others: as measured here, with a margin
UNTOLD = {"png": 0, "jpeg": .37, "webp": .48, "gif": .41, "bmp": .59}
VARIANTS = {    # the mode of the pixels, and how Pillow saves them
    "png": [("RGB", {}), ("P", {}), ("L", {}), ("RGBA", {}), ("I;16", {})],
    "jpeg": [("RGB", {"quality": 85}), ("RGB", {"progressive": True}), ("L", {}), ("CMYK", {}),
             ("RGB", {"restart_marker_blocks": 1})],
    "webp": [("RGB", {"quality": 85}), ("RGB", {"lossless": True}), ("RGBA", {})],
    "gif": [("RGB", {}), ("L", {}), ("P", {"transparency": 3}), ("RGB", {"interlace": 0})],
    "bmp": [("RGB", {}), ("L", {}), ("P", {}), ("1", {})]}


def encoded(kind, k, size=24):
    """A smooth picture with some noise, as photographs are, in one variant of a kind of file."""
    rng, (mode, options) = np.random.default_rng(k), VARIANTS[kind][k % len(VARIANTS[kind])]
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((size, size), Image.BICUBIC)
    noisy = np.asarray(coarse) * .9 + rng.integers(0, 25, (size, size, 3))
    picture = Image.fromarray(noisy.astype(np.uint8))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L"), np.uint16) * 257)
    picture = picture.convert(mode)
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(rng.integers(0, 256, (size, size), np.uint8)))
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pixels(data):
    """The image in these bytes; None where they are refused."""
    try:
        return np.array(decode(data))
    except Exception:
        return None


def try_all(kind, folder):
    """Decodes N damaged images, each of which lies in the file `fatal` meanwhile. Writes `counts.json`."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    whole = [encoded(kind, k) for k in range(20)]
    right = [pixels(data) for data in whole]
    assert all(image is not None for image in right)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = {"refused": 0, "same": 0, "other": 0}
    for k in range(N):
        data = damage(whole[k % 20], rng)
        (folder / "fatal").write_bytes(data)
        found = pixels(data)
        same = data == whole[k % 20] or np.array_equal(found, right[k % 20])
        counts["refused" if found is None else "same" if same else "other"] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert grown < 500, f"took {grown} MiB"
    (folder / "counts.json").write_text(json.dumps(counts))


@pytest.mark.parametrize("kind", VARIANTS)
def test_damaged_images_are_refused_or_at_least_do_no_harm(kind, tmp_path):
    status, printed = in_another_process(try_all, kind, tmp_path)
    assert status == 0, f"{tmp_path}/fatal hangs (None), crashes (negative) or fails: {status} {printed}"
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert sum(counts.values()) == N and counts["other"] <= UNTOLD[kind] * N, counts
    assert counts["refused"] > N / 3
    assert printed == ""  # no decoder complains on the terminal


@pytest.mark.parametrize("kind", VARIANTS)
def test_an_image_cut_off_anywhere_is_refused_unless_all_its_pixels_are_there(kind):
    for k in range(len(VARIANTS[kind])):
        data = encoded(kind, k)
        whole = pixels(data)
        taken = [n for n in range(len(data)) if pixels(data[:n]) is not None]
        assert all(np.array_equal(pixels(data[:n]), whole) for n in taken)
        assert len(data) - min(taken, default=len(data)) <= {"gif": 2, "bmp": 3}.get(kind, 0)


def with_size(data, width, height):
    """The bytes of a GIF or JPEG that state another size."""
    data = bytearray(data)
    if data[:3] == b"GIF":
        data[6:10] = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    else:
        at = next(at for at in range(len(data)) if data[at] == 0xff and data[at + 1] in (0xc0, 0xc2))
        data[at + 5:at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize("kind, k", [("gif", 0), ("jpeg", 0), ("jpeg", 1), ("jpeg", 2)])
def test_a_damaged_size_costs_no_gigabytes(tmp_path, kind, k):
    """A GIF of which two bits are wrong would be taken as 12.9 GB of black, a JPEG refused after as much."""
    data = encoded(kind, k)
    assert np.array_equal(pixels(with_size(data, 24, 24)), pixels(data))
    for side, told in ((12000, f"{len(data)} bytes that claim 12000x12000"), (65500, "4290250000 pixels")):
        (tmp_path / f"x.{kind}").write_bytes(with_size(data, side, side))
        with pytest.raises(DataError, match=rf"x.{kind} .*{told}"):
            read_image(tmp_path / f"x.{kind}", 8)


@pytest.mark.parametrize("kind", ["gif", "jpeg", "webp", "png"])
def test_a_large_image_of_one_colour_is_read(kind):
    """The most pixels for a byte that real encoders reach."""
    options = {"jpeg": {"progressive": True, "optimize": True, "quality": 5, "subsampling": 2},
               "webp": {"lossless": True}}
    for mode, colour in (("RGB", 0), ("RGB", (200, 30, 90)), ("1", 1)):
        for chosen in [{}, options[kind]] if kind in options else [{}]:
            file = io.BytesIO()
            Image.new(mode, (3000, 2000), colour).save(file, kind, **chosen)
            assert pixels(file.getvalue()).shape == (2000, 3000, 3), (kind, chosen, len(file.getvalue()))


def test_a_photo_of_a_hundred_megapixels_is_read(recwarn):
    """Pillow warns of it."""
    file = io.BytesIO()
    Image.new("L", (11000, 9100), 90).save(file, "jpeg")
    assert decode(file.getvalue()).size == (11000, 9100) and not recwarn.list
