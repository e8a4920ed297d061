"""Latents kept on disk for the next run: they are the encoder's own bits, and used where they fit."""
import sys

import numpy as np
import pytest
import torch

from harness.encoder import Encoder
from helpers import REPO
from models.mobilenet import MobileNetV1

sys.path.insert(0, str(REPO / "benchmarks"))
import encode_once

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)


@pytest.fixture
def keep(monkeypatch, tmp_path):
    """Call it as a new process begins: then Encoders keep latents in tmp_path. Returns what they encode."""
    plain = Encoder.__call__
    encoded = []

    def counted(self, images):
        encoded.append(len(images))
        return plain(self, images)

    def begin():
        monkeypatch.setattr(Encoder, "__call__", counted)
        encode_once.keep_latents(tmp_path)
        return encoded

    return begin


def encoder(latent="conv5_4/dw", seed=0, **options):
    torch.manual_seed(seed)
    net = MobileNetV1(2, latent, width=0.1)
    net.freeze_below("latent")
    return Encoder(net, "cpu", **options)


@pytest.mark.parametrize("latent", ["conv5_4/dw", "pool6"])
def test_they_are_the_encoders_own_bits(keep, latent):
    expected = encoder(latent)(IMAGES)
    encoded = keep()
    for _ in range(2):
        found = encoder(latent)(IMAGES)
        assert torch.equal(found, expected) and found.stride() == expected.stride()
    assert encoded == [40]
    keep()      # another process finds them on disk, in any order, and encodes what is new
    order = torch.randperm(40)
    assert torch.equal(encoder(latent)(torch.from_numpy(IMAGES)[order]), expected[order])
    other = np.concatenate((IMAGES[:5], 255 - IMAGES[:3]))
    assert torch.equal(encoder(latent)(other)[:5], expected[:5]) and encoded == [40, 3]


def test_other_layers_weights_or_sizes_have_latents_of_their_own(keep):
    encoded = keep()
    encoder()(IMAGES)
    encoder("conv5_3/dw")(IMAGES)
    encoder(seed=1)(IMAGES)
    encoder(mirror=True)(IMAGES)
    encoder()(IMAGES[:, :, :16])
    assert encoded == [40] * 5


def test_what_was_cut_off_does_not_count(keep, tmp_path):
    keep()
    expected = encoder()(IMAGES)
    for names in tmp_path.rglob("*.names.npy"):
        names.unlink()      # they come last
    keep()
    assert torch.equal(encoder()(IMAGES), expected)


def test_layers_that_learn_and_sets_too_large_are_encoded_as_ever(keep, tmp_path):
    keep()
    learning = encoder()
    learning.net.freeze_below("images")
    Encoder(learning.net, "cpu")(IMAGES)
    assert not list(tmp_path.iterdir())
    assert len(encoder(max_bytes=1000)(IMAGES)[torch.arange(3)]) == 3
    assert not list(tmp_path.rglob("*.npy"))


def test_it_runs_a_program_with_its_arguments(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text("import sys\nsys.exit(','.join(sys.argv[1:]))\n")
    monkeypatch.setattr(Encoder, "__call__", Encoder.__call__)      # put back at the end
    with pytest.raises(SystemExit, match="a,--b"):
        encode_once.main([str(tmp_path / "latents"), str(program), "a", "--b"])
    with pytest.raises(SystemExit, match="python benchmarks/encode_once.py latents"):
        encode_once.main(["latents"])
