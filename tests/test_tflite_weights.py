"""The weights out of Google's 8-bit file: out of one made here, and out of the real one where it is there.

The file made here is written by a writer of its own, which shares no code with the reader.
"""
import os
import pickle
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.standin import make_weights
from helpers import STANDIN, rand, random_images, same
from models import mobilenet, tflite_weights
from models.mobilenet import MobileNetV1, WeightsError, published_prefixes
from models.tflite_weights import convolutions, state_dict
from test_mobilenet import published_layers

# ---- a file made here ----

class Writer:
    """Writes a flatbuffer from its end to its start; a thing is known by how far from the end it begins."""

    def __init__(self):
        self.data = b""

    def write(self, content):
        self.data = content + self.data
        return len(self.data)

    def pointer(self, target):
        """Four bytes that point to a thing, to be written next."""
        return struct.pack("<I", len(self.data) + 4 - target)

    def vector(self, form, values):
        return self.write(struct.pack(f"<I{len(values)}{form}", len(values), *values))

    def pointers(self, targets):
        for target in reversed(targets):
            self.write(self.pointer(target))
        return self.write(struct.pack("<I", len(targets)))

    def table(self, fields):
        """fields: {number: bytes, or what it points to}; the list of their places comes before the table."""
        places, begin = {}, len(self.data)
        for number, value in fields.items():
            places[number] = self.write(value if isinstance(value, bytes) else self.pointer(value))
        count = max(fields, default=-1) + 1
        table = self.write(struct.pack("<i", 4 + 2 * count))
        offsets = [table - places[number] if number in places else 0 for number in range(count)]
        self.write(struct.pack(f"<{2 + count}H", 4 + 2 * count, table - begin, *offsets))
        return table


def tflite(layers):
    """A .tflite file of layers (kind of operator, weights uint8, scale, zero point, bias int32, scale)."""
    w = Writer()
    kinds = sorted({layer[0] for layer in layers}, reverse=True)
    codes = []
    for kind in kinds:
        w.table({})     # lies behind the next one, and begins with a 4, which is a kind of convolution
        codes.append(w.table({0: struct.pack("<b", kind)} if kind else {}))
    codes = w.pointers(codes)
    buffers, tensors, operators = [w.table({})], [], []
    for kind, *both in layers:
        weight, scale, zero, bias, bias_scale = both
        for values, s, z in ((weight, scale, zero), (bias, bias_scale, 0)):
            buffers.append(w.table({0: w.vector("B", values.tobytes())}))
            quantization = w.table({3: w.vector("q", [z]), 2: w.vector("f", [s])})
            tensors.append(w.table({0: w.vector("i", values.shape), 4: quantization,
                                    2: struct.pack("<I", len(buffers) - 1)}))
        inputs = w.vector("i", [7, len(tensors) - 2, len(tensors) - 1])
        code = {0: struct.pack("<I", kinds.index(kind))} if kinds.index(kind) else {}
        operators.append(w.table({1: inputs} | code))
    graph = w.table({0: w.pointers(tensors), 3: w.pointers(operators)})
    model = w.table({1: codes, 2: w.pointers([graph]), 4: w.pointers(buffers), 0: struct.pack("<I", 3)})
    w.write(b"TFL3")
    w.write(w.pointer(model))
    return bytearray(w.data)


def made_layers():
    """A convolution of 3 to 4 channels, a depthwise one of 3x3, an addition, a 1x1 convolution to 5."""
    rng = np.random.default_rng(0)
    layers = []
    for kind, shape in ((3, (4, 3, 3, 3)), (4, (1, 3, 3, 4)), (0, (2, 1, 1, 1)), (3, (5, 1, 1, 4))):
        channels = shape[-1] if kind == 4 else shape[0]
        layers.append((kind, rng.integers(0, 256, shape, dtype=np.uint8), 0.02, int(rng.integers(100, 150)),
                       rng.integers(-5000, 5000, channels, dtype=np.int32), 0.0005))
    return layers


def test_a_file_made_here_is_read():
    layers = made_layers()
    found = convolutions(tflite(layers))
    assert [tuple(w.shape) for w, _ in found] == [(4, 3, 3, 3), (4, 1, 3, 3), (5, 4, 1, 1)]
    assert {t.dtype for pair in found for t in pair} == {torch.float32}
    _, depthwise, _, zero, *_ = layers[1]
    for channel, row, column in ((0, 0, 0), (3, 2, 1), (1, 0, 2)):
        expected = (int(depthwise[0, row, column, channel]) - zero) * 0.02
        assert found[1][0][channel, 0, row, column].item() == pytest.approx(expected, rel=1e-6)
    _, pointwise, _, zero, *_ = layers[3]
    assert found[2][0][4, 1].item() == pytest.approx((int(pointwise[4, 0, 0, 1]) - zero) * 0.02, rel=1e-6)
    for (_, bias), layer in zip(found[1:], (layers[1], layers[3])):
        np.testing.assert_allclose(bias, layer[4] * 0.0005, rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_normalizations_with_any_statistics_give_the_function_of_the_file(seed):
    """From pixels of 0..1 on: the file's own arithmetic against convolutions and batch norm of the state."""
    layers = made_layers()
    statistics = {"mean": rand(13, seed=seed).double(), "var": rand(13, seed=seed + 9).double().square() + .1}
    state = state_dict(tflite(layers), ["a", "b", "c"], statistics)
    assert len(state) == 15 and state["b.conv.weight"].dtype == torch.float16
    assert torch.equal(state["b.bn.running_mean"], statistics["mean"][4:8].float())

    pixels = torch.rand(2, 3, 9, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = (255 * pixels - 128) / 128
    mean, std = torch.tensor([[.485, .456, .406], [.229, .224, .225]], dtype=torch.float64).view(2, 3, 1, 1)
    x = (pixels - mean) / std
    for prefix, layer in zip("abc", [layers[0], layers[1], layers[3]]):
        kind, weight, scale, zero, bias, bias_scale = layer
        groups, order = (4, (3, 0, 1, 2)) if kind == 4 else (1, (0, 3, 1, 2))
        weight = (torch.from_numpy(weight.astype(np.float64).transpose(order)) - zero) * scale
        expected = F.conv2d(expected, weight, torch.from_numpy(bias * bias_scale), groups=groups).relu()

        mine = {key[2:]: value.double() for key, value in state.items() if key.startswith(prefix)}
        bn = [mine[f"bn.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(F.conv2d(x, mine["conv.weight"], groups=groups), *bn).relu()
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-3 * expected.max().item())     # float16
    assert expected.std() > 0.1


def test_another_tflite_file_is_refused(tmp_path):
    path = tmp_path / "mine.tflite"
    path.write_bytes(tflite(made_layers()))
    with pytest.raises(WeightsError, match="mine.tflite.*no copy of mobilenet_v1_1.0_224_quant"):
        MobileNetV1(5, weights=path)


# ---- the real file ----

@pytest.fixture(scope="module")
def real_file():
    """Path of Google's file, beside the stand-in's or where the program fetches it to."""
    hub = os.path.join(torch.hub.get_dir(), "checkpoints")
    for folder in (STANDIN, hub):
        path = os.path.join(folder, mobilenet.TFLITE_FILE)
        if os.path.isfile(path):
            return path
    pytest.skip(f"needs {mobilenet.TFLITE_FILE}, which `--weights tflite` fetches to {hub}")


def test_the_real_file_gives_the_weights_of_the_records(real_file):
    with open(real_file, "rb") as file:
        state = make_weights.whole(state_dict(bytearray(file.read()), published_prefixes()))
    assert make_weights.digest(state) == make_weights.SHA256


def test_the_records_file_has_the_digest_that_the_script_expects(standin_weights):
    state = torch.load(standin_weights, weights_only=True)
    assert make_weights.digest(state) == make_weights.SHA256
    state["output.bias"][7] = 1
    assert make_weights.digest(state) != make_weights.SHA256


def test_the_network_fetches_it_once_and_equals_that_of_the_records(real_file, standin_weights, tmp_path,
                                                                  monkeypatch):
    asked = []

    def fetch(url, to, progress):
        asked.append(url)
        with open(real_file, "rb") as file, open(to, "wb") as out:
            out.write(file.read())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    nets = []
    for weights in ("tflite", "tflite", real_file, standin_weights):
        torch.manual_seed(0)
        nets.append(MobileNetV1(5, "pool6", weights=weights).state_dict())
    assert all(same(net, nets[-1]) for net in nets) and len(asked) == 1
    assert asked[0].startswith("https://raw.githubusercontent.com/google-coral/test_data/")
    assert os.listdir(tmp_path / "checkpoints") == [mobilenet.TFLITE_FILE]


# ---- benchmarks/standin/make_weights.py ----

def test_measured_statistics_are_those_of_batches(monkeypatch, tmp_path):
    """A network with them computes the same by its moving averages as by those of the images themselves."""
    convs = []
    for k, (_, shape, _, _) in enumerate(published_layers()):
        convs.append((rand(*shape, seed=k).half().float(), rand(shape[0], seed=k + 99) * 0.5))
    monkeypatch.setattr(tflite_weights, "convolutions", lambda content: convs)
    images = rand(80, 3, 64, 64)
    state = state_dict(b"", published_prefixes(), make_weights.measure(convs, images))
    torch.save(make_weights.whole(state), tmp_path / "w.pth")
    net = MobileNetV1(5, "pool6", weights=tmp_path / "w.pth", width=0.125, r_max=1.0, d_max=0.0)
    with torch.no_grad():
        torch.testing.assert_close(net.train().lat_features(images), net.eval().lat_features(images),
                                   rtol=1e-3, atol=1e-3)


def test_images_are_found_by_their_pixels_in_either_form(tmp_path):
    images = random_images(6, 32, 32)
    (tmp_path / "png" / "test" / "apple").mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "png" / ("test/apple" if i % 2 else "test") / f"{i}.png")
    archive = tmp_path / "data" / "cifar-100-python"
    archive.mkdir(parents=True)
    for part, some in (("train", images[:4]), ("test", images[4:])):
        rows = some.transpose(0, 3, 1, 2).reshape(len(some), 3072)
        (archive / part).write_bytes(pickle.dumps({"data": rows}))

    sums = [make_weights.crc32(images[i]) for i in (4, 0, 3)]
    png, data = (make_weights.chosen_images(tmp_path / name, sums) for name in ("png", "data"))
    assert torch.equal(png, data) and png.shape == (3, 3, 128, 128)
    left_out = make_weights.chosen_images(tmp_path / "data", sums[1:])
    assert torch.equal(png[1:], left_out)
    (archive / "test").write_bytes(pickle.dumps({"data": rows[1:]}))
    with pytest.raises(SystemExit, match="data lacks 1 of the 3 images"):
        make_weights.chosen_images(tmp_path / "data", sums)


def test_the_statistics_of_the_repository_are_of_768_images_and_of_all_channels():
    with open(tflite_weights.STATISTICS, "rb") as file:
        assert len(file.read()) < 190_000
    statistics = torch.load(tflite_weights.STATISTICS, weights_only=True)
    channels = sum(shape[0] for _, shape, _, _ in published_layers(1.0))
    assert statistics["mean"].shape == statistics["var"].shape == (channels,)
    assert len(set(statistics["crc32"].tolist())) == 768 and statistics["var"].min() == 1e-3
