"""MobileNetV1 and its pre-trained weights, against the functional form of each layer and the pytorchcv
package.

The references share no code with the network.
"""
import hashlib
import http.client
import io
import math
import os
import pickle
import random
import urllib.error
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import rand, randomize, small_net
from models import mobilenet
from models.batch_renorm import brn_layers
from models.mobilenet import (
    LAYER_NAMES,
    GlobalAvgPool,
    MobileNetV1,
    PointwiseConv2d,
    WeightsError,
    load_imagenet_weights,
)
from models.split_net import SplitNet

# by hand: (name, channels, side of the map) for 128x128 images; the last one is pooled
TABLE = [("conv1", 32, 64), ("conv2_1/dw", 32, 64), ("conv2_1/sep", 64, 64), ("conv2_2/dw", 64, 32),
         ("conv2_2/sep", 128, 32), ("conv3_1/dw", 128, 32), ("conv3_1/sep", 128, 32), ("conv3_2/dw", 128, 16),
         ("conv3_2/sep", 256, 16), ("conv4_1/dw", 256, 16), ("conv4_1/sep", 256, 16), ("conv4_2/dw", 256, 8),
         ("conv4_2/sep", 512, 8), ("conv5_1/dw", 512, 8), ("conv5_1/sep", 512, 8), ("conv5_2/dw", 512, 8),
         ("conv5_2/sep", 512, 8), ("conv5_3/dw", 512, 8), ("conv5_3/sep", 512, 8), ("conv5_4/dw", 512, 8),
         ("conv5_4/sep", 512, 8), ("conv5_5/dw", 512, 8), ("conv5_5/sep", 512, 8), ("conv5_6/dw", 512, 4),
         ("conv5_6/sep", 1024, 4), ("conv6/dw", 1024, 4), ("conv6/sep", 1024, 4), ("pool6", 1024, None)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 5)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_pointwise_convolution_equals_the_sum_over_channels(bias, size, layout):
    """Values and gradients, in either memory layout, which the result keeps."""
    conv = PointwiseConv2d(5, 7, 1, bias=bias).double()
    x = rand(3, 5, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    y = conv(x)
    expected = [sum(conv.weight[o, i, 0, 0] * x[:, i] for i in range(5)) for o in range(7)]
    expected = torch.stack([e + conv.bias[o] if bias else e for o, e in enumerate(expected)], 1)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=layout)
    weights = rand(*y.shape, seed=1, dtype=torch.float64)
    inputs = (x, *conv.parameters())
    torch.testing.assert_close(torch.autograd.grad((y * weights).sum(), inputs),
                               torch.autograd.grad((expected * weights).sum(), inputs))


def test_global_pooling_is_the_mean_over_the_map():
    x = rand(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
    y = GlobalAvgPool()(x)
    assert y.shape == (2, 3)
    assert y[1, 2].item() == pytest.approx(sum(v for row in x[1, 2].tolist() for v in row) / 20)
    assert torch.autograd.gradcheck(GlobalAvgPool(), (x,))


def test_layers_are_numbered_and_shaped_as_the_table():
    assert list(LAYER_NAMES) == [name for name, _, _ in TABLE] and LAYER_NAMES[19] == "conv5_4/dw"
    net, x = MobileNetV1(50).eval(), rand(1, 3, 128, 128)
    assert net.latent_layer_num == 19 and len(net.lat_features) == 20 and len(net.layers) == 28
    with torch.no_grad():
        for i, (layer, (name, channels, side)) in enumerate(zip(net.layers, TABLE, strict=True)):
            x = layer(x)
            assert x.shape == ((1, channels, side, side) if side else (1, channels)), (i, name)
    assert net.output.weight.shape == (50, 1024) and net.output.bias is None
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 27 and all(m.bias is None for m in convolutions)
    assert len(brn_layers(net)) == 27 and {m.eps for m in brn_layers(net)} == {1e-5}
    assert not [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("size, latent_size", [
    ((96, 96), (6, 6)), ((224, 160), (14, 10)), ((33, 45), (3, 3)), ((32, 32), (2, 2))])
def test_any_image_size_from_32_pixels(size, latent_size):
    net = small_net(classes=7).eval()
    scores, latents = net(rand(2, 3, *size), return_lat_acts=True)
    assert latents.shape == (2, 64, *latent_size)
    pooled = latents
    for layer in list(net.end_features)[:-1]:
        pooled = layer(pooled)
    torch.testing.assert_close(scores, pooled.mean((2, 3)) @ net.output.weight.T)
    assert scores.shape == (2, 7)


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (1, 1)])
def test_too_small_images_are_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels are too small.*32x32"):
        small_net()(rand(1, 3, *size))


# ---- pre-trained weights ----

NAME = "mobilenet_w1-0895-7e1d739f.pth"
TFLITE = "mobilenet_v1_1.0_224_quant_embedding_extractor.tflite"
STAGES = [[64], [128, 128], [256, 256], [512] * 6, [1024, 1024]]       # output channels of each unit
UNIT_STRIDES = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]


def published_layers(width=0.125):
    """(key prefix, weight shape, stride, groups) of the 27 convolutions in the published file."""
    c_in = int(32 * width)
    layers = [("features.init_block", (c_in, 3, 3, 3), 2, 1)]
    strides = iter(UNIT_STRIDES)
    for s, units in enumerate(STAGES, 1):
        for u, channels in enumerate(units, 1):
            c_out = int(channels * width)
            layers.append((f"features.stage{s}.unit{u}.dw_conv", (c_in, 1, 3, 3), next(strides), c_in))
            layers.append((f"features.stage{s}.unit{u}.pw_conv", (c_out, c_in, 1, 1), 1, 1))
            c_in = c_out
    return layers


def published_state(width=0.125, seed=0):
    """Random weights in the layout of the published file."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for prefix, shape, _, _ in published_layers(width):
        bound = math.sqrt(6 / math.prod(shape[1:]))
        state[f"{prefix}.conv.weight"] = torch.empty(shape).uniform_(-bound, bound, generator=rng)
        ranges = ("weight", .8, 1.2), ("bias", -.2, .5), ("running_mean", -.2, .2), ("running_var", .5, 2)
        for name, low, high in ranges:
            state[f"{prefix}.bn.{name}"] = torch.empty(shape[0]).uniform_(low, high, generator=rng)
        state[f"{prefix}.bn.num_batches_tracked"] = torch.tensor(7)
    return state | {"output.weight": torch.ones(1000, int(1024 * width)), "output.bias": torch.ones(1000)}


def save_zip(path, state, inside=NAME):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(inside, buffer.getvalue())
    return buffer.getvalue()


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


FORMS = {
    "pth": lambda state: state,
    "old pth": lambda state: state,
    "zip": lambda state: state,
    "state_dict inside": lambda state: {"epoch": 3, "state_dict": state},
    "DataParallel": lambda state: prefixed("module.", state),
    "DataParallel inside": lambda state: {"model": prefixed("module.", state), "epoch": 3},
    "two deep": lambda state: {"state_dict": {"model": prefixed("module._orig_mod.", state)}},
    "AveragedModel": lambda state: prefixed("module.", state) | {"n_averaged": torch.tensor(3)},
    "Lightning": lambda state: {"state_dict": prefixed("model.", state), "loops": {}}}


@pytest.mark.parametrize("form", FORMS)
def test_weights_go_where_the_published_layout_says(tmp_path, form):
    """The loaded network equals conv2d and batch_norm applied with the file's tensors, at every layer."""
    state, path = published_state(), tmp_path / "weights"
    if form == "zip":
        save_zip(path, state)
    else:
        torch.save(FORMS[form](state), path, _use_new_zipfile_serialization=form != "old pth")
    net = MobileNetV1(5, "conv4_2/dw", weights=str(path), width=0.125).eval()
    h = mine = rand(2, 3, 64, 48)
    for layer, (prefix, _, stride, groups) in zip(net.layers, published_layers()):
        weight = state[f"{prefix}.conv.weight"]
        h = F.conv2d(h, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        bn = [state[f"{prefix}.bn.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        h, mine = F.batch_norm(h, *bn, eps=1e-5).relu(), layer(mine)
        torch.testing.assert_close(mine, h, rtol=1e-4, atol=1e-5)
    assert h.std() > 0.01 and net.output.weight.shape == (5, 128)


@pytest.fixture(scope="module")
def pytorchcv_net():
    model_provider = pytest.importorskip("pytorchcv.model_provider", reason="needs pytorchcv")
    torch.manual_seed(3)
    return randomize(model_provider.get_model("mobilenet_w1", pretrained=False), 3).eval()


@pytest.mark.parametrize("size", [(224, 224), (128, 128), (96, 160), (33, 65)])
@torch.no_grad()
def test_equal_outputs_to_pytorchcv(pytorchcv_net, tmp_path, size):
    """Scores equal those of the package that published the weights."""
    torch.save(pytorchcv_net.state_dict(), tmp_path / "weights.pth")
    net = MobileNetV1(1000, weights=tmp_path / "weights.pth").eval()
    net.output.weight.data.copy_(pytorchcv_net.output.weight)
    x = h = rand(2, 3, *size)
    *features, _ = pytorchcv_net.features.children()    # the last one is pooling, of 7x7
    for part in features:
        h = part(h)
    expected = pytorchcv_net.output(h.mean((2, 3))) - pytorchcv_net.output.bias
    if size == (224, 224):
        torch.testing.assert_close(pytorchcv_net(x) - pytorchcv_net.output.bias, expected)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert expected.std() > 1e-3 * expected.abs().max()


def test_real_weights_load_and_tell_photographs_apart(standin_weights):
    """With ImageNet weights, class means of pool6 recognize photographs that random weights cannot."""
    photos = standin_weights.parent / "photos_32x32.zip"
    image = pytest.importorskip("PIL.Image")
    if not photos.is_file():
        pytest.skip(f"needs photographs, and {photos} is not there")
    net = MobileNetV1(10, "pool6", weights=standin_weights).eval()
    state = torch.load(standin_weights, weights_only=True)
    conv, brn, _ = net.lat_features[19]       # block 10, conv5_4, is unit 5 of stage 4
    assert torch.equal(conv.weight, state["features.stage4.unit5.dw_conv.conv.weight"].float())
    assert torch.equal(brn.running_mean, state["features.stage4.unit5.dw_conv.bn.running_mean"])
    classes, shots = (1, 11, 21, 31, 41), 8
    with zipfile.ZipFile(photos) as z:
        pictures = [image.open(io.BytesIO(z.read(f"s1/o{o}/{k:03d}.png"))).resize((96, 96))
                    for o in classes for k in range(2 * shots)]
    x = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)

    def accuracy(net):
        with torch.no_grad():
            z = F.normalize(net.lat_features(x)).view(len(classes), 2, shots, -1)
        guess = (z[:, 1] @ F.normalize(z[:, 0].mean(1)).T).argmax(-1)
        return (guess == torch.arange(len(classes))[:, None]).float().mean().item()
    torch.manual_seed(0)
    assert accuracy(net) > max(0.6, accuracy(MobileNetV1(10, "pool6").eval()) + 0.15)


def damaged(path, fault):
    """Writes a weights file with one fault."""
    state = published_state()
    key = "features.stage4.unit5.dw_conv.bn.running_var"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    match fault:
        case "truncated":
            path.write_bytes(data[:len(data) // 2])
        case "short of its end":
            path.write_bytes(data[:-100])
        case "random bytes":
            path.write_bytes(random.Random(0).randbytes(5000))
        case "folder":
            path.mkdir()
        case "zip without weights":
            save_zip(path, state, inside="readme.txt")
        case "zip with a damaged start":    # of the compressed data, behind 30 bytes of header and the name
            save_zip(path, state)
            data, start = path.read_bytes(), 30 + len(NAME)
            path.write_bytes(data[:start] + b"\xff" * 20 + data[start + 20:])
        case "no dictionary":
            torch.save([1, 2], path)
        case "a network":
            torch.save(nn.Linear(2, 2), path)
        case "missing key":
            torch.save({k: v for k, v in state.items() if k != key}, path)
        case "a number for a tensor":
            torch.save(state | {key: 1.0}, path)
        case "other width":
            torch.save(published_state(0.25), path)
        case "nan":
            state[key][3] = math.nan
            torch.save(state, path)
        case "infinity":
            state["features.init_block.conv.weight"][0, 0, 0, 0] = math.inf
            torch.save(state, path)


@pytest.mark.parametrize("fault, says", [
    ("missing", "does not exist.*--weights FILE"), ("truncated", "fetch the file anew"),
    ("short of its end", "ends early.*fetch the file anew"), ("random bytes", "damaged.*fetch the file anew"),
    ("folder", ""), ("zip without weights", ""),
    ("zip with a damaged start", "fetch the file anew"), ("no dictionary", "state_dict"),
    ("a network", r"torch.nn.modules.linear.Linear.*could run code.*--weights FILE.*state_dict\(\)"),
    ("missing key", "unit5.dw_conv.bn.running_var is missing"),
    ("a number for a tensor", "another network.*running_var"),
    ("other width", r"init_block.conv.weight.*\(8, 3, 3, 3\).*\(4, 3, 3, 3\).*init_block.bn.weight.*\(8,\)"
                    r".*init_block.bn.bias.*132 more"),
    ("nan", "damaged.*running_var.*not finite"), ("infinity", "damaged.*conv.weight.*not finite")])
def test_weights_that_cannot_be_used_are_an_error_that_names_file_and_reason(tmp_path, fault, says):
    path = tmp_path / "mine.pth"
    damaged(path, fault)
    with pytest.raises(WeightsError, match=f"mine.pth.*{says}") as error:
        MobileNetV1(5, weights=str(path), width=0.125)
    assert str(error.value).count("features.") <= 3
    assert "weights_only" not in str(error.value)       # torch's advice to run a file nevertheless


@pytest.mark.parametrize("content, kind", [
    (b'\x02\x00\x00\x00\x00\x00\x00\x00{}', "safetensors"), (b"<!DOCTYPE html><title>Not found", "web page"),
    (b"\n <html>", "web page"), (b"\xef\xbb\xbf<!DOCTYPE html>", "web page"), (b"", "empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "text"), (b'{"message": ""}', "text"),
    (b"\x93NUMPY\x01\x00v\x00{'descr'", "NumPy array"), (b"\x89HDF\r\n\x1a\n\x00", "HDF5"),
    (b"\x1f\x8b\x08\x00\x00", "gzip"), ("m/constants.pkl", "TorchScript"), ("x.npy", "NumPy archive")])
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, content, kind):
    path = tmp_path / "weights.pth"
    if isinstance(content, str):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(content, b"")
    else:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"weights.pth is an? {kind}.*--weights FILE") as error:
        MobileNetV1(5, weights=str(path), width=0.1)
    assert "\n" not in str(error.value)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["pickle", "torch", "old torch", "zip"])
def test_code_inside_a_weights_file_does_not_run(tmp_path, form):
    marker, path = tmp_path / "ran", tmp_path / "mine.pth"
    content = published_state() | {"evil": Evil(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif form == "zip":
        save_zip(path, content)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(WeightsError, match="mine.pth"):
        MobileNetV1(5, weights=path, width=0.125)
    assert not marker.exists()
    if form == "pickle":            # the trap works: an unpickler that trusts the file springs it
        pickle.loads(path.read_bytes())
        assert marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_damage_to_a_weights_file_gives_weights_or_a_weights_error(tmp_path):
    """Bytes changed at random, in each of the three file formats: nothing else is ever raised."""
    state = {f"layer{i}.weight": rand(4, 3, seed=i) for i in range(5)}
    path, forms = tmp_path / "mine.pth", []
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=new)
        forms.append(buffer.getvalue())
    save_zip(path, state)
    forms.append(path.read_bytes())
    rng, refused = random.Random(0), 0
    for _ in range(400):
        data = bytearray(rng.choice(forms))
        for _ in range(rng.choice((1, 2, 5, 40))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[:rng.randrange(len(data))] if rng.random() < 0.3 else data)
        try:
            mobilenet.read_weights(path)
        except WeightsError as error:
            refused += "mine.pth" in str(error)
    assert refused > 20


class Cache:
    """A hub cache in a temporary folder, whose network hands out `content`, or raises it."""

    def __init__(self, folder, monkeypatch):
        self.content, self.downloads, self.folder = b"", [], folder / "checkpoints"
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))
        monkeypatch.setattr(torch.hub, "download_url_to_file", self.download)

    def download(self, url, dst, hash_prefix=None, progress=True):
        assert url.endswith((f"/v0.0.155/{NAME}.zip", f"/104342d2d3480b3e66203073dac24f4e2dbb4c41/{TFLITE}"))
        assert progress
        self.downloads.append(url)
        with open(dst, "wb") as file:
            file.write(self.content if isinstance(self.content, bytes) else b"half")
        if not isinstance(self.content, bytes):
            raise self.content

    @property
    def files(self):
        return sorted(p.name for p in self.folder.iterdir()) if self.folder.exists() else []


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return Cache(tmp_path / "hub", monkeypatch)


def test_published_weights_are_fetched_once_and_checked(cache, tmp_path, monkeypatch):
    state = published_state()
    pth = save_zip(tmp_path / "good.zip", state)
    cache.content = (tmp_path / "good.zip").read_bytes()
    known = (*mobilenet.PUBLISHED["imagenet"][:3], hashlib.sha1(pth).hexdigest()[:8])
    monkeypatch.setitem(mobilenet.PUBLISHED, "imagenet", known)
    for _ in range(2):
        net = MobileNetV1(5, 3, weights="imagenet", width=0.125)
        assert torch.equal(net.lat_features[0][0].weight, state["features.init_block.conv.weight"])
    with pytest.raises(WeightsError, match=f"{NAME} holds the weights of another network.*set width to 1"):
        MobileNetV1(5, weights="imagenet", width=0.25)
    assert len(cache.downloads) == 1 and cache.files == [NAME] and (cache.folder / NAME).read_bytes() == pth


def test_a_download_with_a_wrong_sha1_is_refused_and_removed(cache, tmp_path):
    save_zip(tmp_path / "bad.zip", published_state())
    cache.content = (tmp_path / "bad.zip").read_bytes()
    with pytest.raises(WeightsError, match=f"{NAME}.*SHA-1"):
        MobileNetV1(5, weights="imagenet", width=0.125)
    assert len(cache.downloads) == 1 and cache.files == []


@pytest.mark.parametrize("content", [b"no zip", urllib.error.URLError("no network"), TimeoutError("slow"),
                                     http.client.IncompleteRead(b"half"), KeyboardInterrupt()])
@pytest.mark.parametrize("weights, other", [("imagenet", "tflite"), ("tflite", "imagenet")])
def test_a_failed_download_says_what_to_do_and_leaves_nothing(cache, content, weights, other):
    cache.content = content
    with pytest.raises((WeightsError, KeyboardInterrupt)) as error:
        MobileNetV1(5, weights=weights, width=0.125)
    message = str(error.value)
    told = cache.downloads[0] in message and "--weights FILE" in message and f"--weights {other}" in message
    assert error.type is KeyboardInterrupt or told
    assert len(cache.downloads) == 1 and cache.files == []


def test_an_archive_with_the_wrong_contents_is_refused_and_removed(cache, tmp_path):
    for fault in ("zip without weights", "zip with a damaged start"):
        damaged(tmp_path / "bad.zip", fault)
        cache.content = (tmp_path / "bad.zip").read_bytes()
        with pytest.raises(WeightsError, match="mobilenet_w1-0895-7e1d739f"):
            MobileNetV1(5, weights="imagenet", width=0.125)
        assert cache.files == []


@pytest.mark.parametrize("weights, name, sha", [("imagenet", NAME, "SHA-1 .*7e1d739f"),
                                                ("tflite", TFLITE, "SHA-256 .*f409ef4f")])
def test_a_damaged_file_in_the_cache_is_named_and_not_used(cache, weights, name, sha):
    cache.folder.mkdir(parents=True)
    torch.save(published_state(), cache.folder / name)
    with pytest.raises(WeightsError, match=f"{name} is damaged.*{sha}.*delete it"):
        MobileNetV1(5, weights=weights, width=0.125)
    assert cache.downloads == []


def test_loading_leaves_the_head_alone(tmp_path):
    torch.save(published_state(), tmp_path / "w.pth")
    torch.manual_seed(0)
    net = SplitNet(layers_with_batch_norm(), 128, 5, -1)
    head = net.output.weight.clone()
    load_imagenet_weights(net, tmp_path / "w.pth")
    assert torch.equal(net.output.weight, head)
    assert torch.equal(net.layers[0][0].weight, published_state()["features.init_block.conv.weight"])


def layers_with_batch_norm(width=0.125):
    layers = {}
    for prefix, (c_out, c_in, k, _), stride, groups in published_layers(width):
        conv = nn.Conv2d(c_in * groups, c_out, k, stride, k // 2, groups=groups, bias=False)
        layers[prefix] = nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())
    return layers
