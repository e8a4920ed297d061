"""Networks of torchvision as backbones: their layers, weights, and latent replay with them from end to end.

The reference is torchvision's own forward pass, caught where its classifier begins. No downloads: weights are
files written here, or a stand-in for the download.
"""
import math
import urllib.error

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.io import write_png

from ar1star_lat_replay import build_learner, main, run
from harness.config import ConfigError, load_config
from helpers import rand, randomize, same
from models.batch_renorm import brn_layers
from models.mobilenet import LAYER_NAMES, WeightsError
from models.split_net import layer_table
from models.torchvision_nets import ModelError, build_net, empty, layer_names, split_layers
from streams.demo import DemoStream

FAMILIES = ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121",
            "shufflenet_v2_x0_5", "regnet_y_400mf", "mnasnet0_5"]


def images(n=2, size=48):
    return rand(n, 3, size, size)


def original(model, seed=0):
    torch.manual_seed(seed)
    return randomize(models.get_model(model, weights=None), seed)


def classifier_input(net, x):
    given = []
    with list(net.children())[-1].register_forward_pre_hook(lambda _, args: given.append(args[0])):
        net.eval()(x)
    return given[0]


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and not text.endswith(".") and ". " not in text.replace("... ", ""), text
    return text


# ---- the rule ----

@pytest.mark.parametrize("model", FAMILIES)
@torch.no_grad()
def test_split_networks_compute_what_torchvision_computes(model, tmp_path):
    theirs = original(model)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    x = images(size=32)
    layers, width = split_layers(model, theirs)
    assert torch.equal(nn.Sequential(*layers.values()).eval()(x), classifier_input(theirs, x))
    x = x.double()
    expected = classifier_input(theirs.double(), x)
    assert expected.shape == (2, width) and expected.std() > 1e-3
    for latent in (-1, len(layers) // 2, len(layers) - 2):
        net = build_net(model, 7, latent, str(tmp_path / "w.pth")).double().eval()
        assert net.training is False and not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
        latents = net.lat_features(x)
        kept = latents.clone()
        # sigma = sqrt(var + eps) is stored in float32
        torch.testing.assert_close(net.end_features(latents), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(latents, kept)       # no layer above works in place on what the memory holds
        assert net.classify(latents).shape == (2, 7) and net.output.bias is None
    for layer in net.layers:
        before = x.clone()
        y = layer(x)
        assert torch.equal(x, before)
        x = y


def stages(*numbers):
    return [f"layer{s}.{b}" for s, n in enumerate(numbers, 1) for b in range(n)]


@pytest.mark.parametrize("model, number, names", [
    ("mobilenet_v2", 20, [*(f"features.{i}" for i in range(19)), "pool"]),
    ("resnet18", 11, ["conv1", "maxpool", *stages(2, 2, 2, 2), "pool"]),
    ("resnet50", 19, ["conv1", "maxpool", *stages(3, 4, 6, 3), "pool"]),
    ("vgg11_bn", 14, [*(f"features.{i}" for i in (0, 3, 4, 7, 8, 11, 14, 15, 18, 21, 22, 25, 28)), "pool"]),
    ("mobilenet_v1", 28, LAYER_NAMES)])
def test_layer_names(model, number, names):
    assert list(layer_names(model)) == names and len(names) == number


@pytest.mark.parametrize("model, reason, suggestion", [
    ("resnet19", "no network 'resnet19'", "resnet18"), ("mobilenetv2", "no network", "mobilenet_v2"),
    ("", "no network", ""), ("vgg16", "no BatchNorm2d", "vgg16_bn"),
    ("vit_b_16", "no BatchNorm2d", "mobilenet_v1"), ("googlenet", "not a list of layers", ""),
    ("inception_v3", "not a list", ""), ("maxvit_t", "not a list", "")])
def test_networks_that_do_not_fit_are_refused_with_others_that_do(model, reason, suggestion):
    with pytest.raises(ModelError) as error:
        layer_names(model)
    text = one_sentence(error)
    assert reason in text and suggestion in text
    others = text.split("; use ")[1].removesuffix(", for example").split(" or ")
    assert model not in others and all(layer_names(name) for name in others)


def test_a_network_whose_forward_does_more_than_its_layers_is_refused(monkeypatch):
    whole = models.ResNet._forward_impl
    monkeypatch.setattr(models.ResNet, "_forward_impl", lambda self, x: whole(self, 2 * x + 1))
    with pytest.raises(ModelError, match="resnet18 computes more than its layers"):
        build_net("resnet18", 5, "layer1.1")


def test_the_names_leave_the_random_numbers_alone():
    layer_names.cache_clear()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    layer_names("regnet_y_400mf")
    layer_names("resnet18")
    assert torch.equal(torch.rand(4), expected)


def test_brn_keeps_each_networks_own_epsilon():
    assert {brn.eps for brn in brn_layers(build_net("mobilenet_v3_small", 5, "images"))} == {1e-3}


# ---- weights ----

@pytest.fixture(scope="module")
def resnet():
    return original("resnet18", seed=5)


def test_weights_of_the_networks_own_enum(resnet, monkeypatch):
    asked = []

    def fetched(self, *args, **kwargs):
        asked.append(self.name)
        return resnet.state_dict()
    monkeypatch.setattr(models._api.WeightsEnum, "get_state_dict", fetched)
    for name in ("IMAGENET1K_V1", "DEFAULT", "imagenet"):
        net = build_net("resnet18", 5, "layer1.1", name)
        assert torch.equal(net.layers[0][0].weight, resnet.conv1.weight)
    assert asked == ["IMAGENET1K_V1"] * 3       # the others are names of that one


@pytest.mark.parametrize("failure", [
    urllib.error.URLError("no route"), RuntimeError("invalid hash value"), EOFError("Ran out of input")])
def test_a_download_that_fails_names_the_file_to_fetch(failure, monkeypatch):
    def fail(self, *args, **kwargs):
        raise failure
    monkeypatch.setattr(models._api.WeightsEnum, "get_state_dict", fail)
    with pytest.raises(WeightsError, match="https://.*/resnet18-.*--weights FILE") as error:
        build_net("resnet18", 5, "layer1.1", "DEFAULT")
    one_sentence(error)


def test_a_fine_tuned_network_of_other_classes_is_taken(resnet, tmp_path):
    state = {k: v for k, v in resnet.state_dict().items() if not k.endswith("num_batches_tracked")}
    state["fc.weight"], state["fc.bias"] = torch.zeros(3, 512), torch.zeros(3)
    state = {f"module.{key}": value for key, value in state.items()}        # DataParallel's
    torch.save({"model": state, "epoch": 3}, tmp_path / "w.pth")
    net = build_net("resnet18", 5, "layer1.1", str(tmp_path / "w.pth"))
    x = images()
    torch.testing.assert_close(net.eval().end_features(net.lat_features(x)), classifier_input(resnet, x))


def test_densenet_files_with_the_published_names(tmp_path):
    theirs = original("densenet121")
    state = {}
    for key, value in theirs.state_dict().items():
        for part in ("norm", "conv"):
            key = key.replace(f"{part}1", f"{part}.1").replace(f"{part}2", f"{part}.2")
        state[key] = value
    torch.save(state, tmp_path / "w.pth")
    net = build_net("densenet121", 5, "images", str(tmp_path / "w.pth"))
    assert torch.equal(net.layers[2].get_submodule("0.denselayer1.conv1").weight,
                       theirs.features.denseblock1.denselayer1.conv1.weight)


def damaged(state):
    state["layer3.0.conv1.weight"][0, 0, 0, 0] = math.nan
    return state


@pytest.mark.parametrize("change, says", [
    (damaged, ["is damaged", "layer3.0.conv1.weight"]),
    (lambda s: {k: v for k, v in s.items() if k != "bn1.weight"}, ["resnet18", "bn1.weight is missing"]),
    (lambda s: s | {"conv1.weight": torch.zeros(64, 3, 3, 3)},
     ["conv1.weight has shape (64, 3, 3, 3)", "(64, 3, 7, 7)"]),
    (lambda s: {f"encoder.{key}": value for key, value in s.items()},
     ["conv1.weight is missing", "encoder.conv1.weight (64, 3, 7, 7)"]),
    (lambda s: s | models.resnet34().state_dict(), ["layer1.2.conv1.weight (64, 64, 3, 3)", "unexpected"]),
    (lambda s: [1], ["cannot read weights"]),
    (lambda s: s | {7: "x", "conv1.weight": "y"}, ["conv1.weight has shape ()"])])
def test_files_that_do_not_fit_are_refused(change, says, resnet, tmp_path):
    torch.save(change({k: v.clone() for k, v in resnet.state_dict().items()}), tmp_path / "w.pth")
    with pytest.raises(WeightsError) as error:
        build_net("resnet18", 5, "layer1.1", str(tmp_path / "w.pth"))
    assert all(part in one_sentence(error) for part in ("w.pth", *says))


@pytest.mark.parametrize("model, weights, says", [
    ("resnet18", "imagenet_v1", ["no weights 'imagenet_v1'", "IMAGENET1K_V1", "DEFAULT", "none"]),
    ("resnet50", "IMAGENET1K_V3", ["did you mean 'IMAGENET1K_V"]),
    ("resnet18", "no/such.pth", ["no/such.pth"]),
    ("efficientnet_v2_l", "DEFAULT", ["another normalization"])])
def test_weights_that_do_not_exist_are_answered_with_those_that_do(model, weights, says):
    with pytest.raises(WeightsError) as error:
        build_net(model, 5, "images", weights)
    assert all(part in one_sentence(error) for part in says)


# ---- the table of layers ----

def test_table_of_mobilenet_v1_against_multiplications_counted_by_hand():
    total, c_in, side = 3 * 9 * 32 * 64 ** 2, 32, 64        # conv1: 32 maps of 64x64, 27 products each
    done = [total]
    blocks = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2),
              (1024, 1)]
    for c_out, stride in blocks:
        side //= stride
        for products in (9 * c_in, c_in * c_out):
            total += products * side ** 2
            done.append(total)
        c_in = c_out
    rows = layer_table(empty(build_net, "mobilenet_v1", 50, "images"), 128)
    assert [row[:2] for row in rows] == list(enumerate(["images", *LAYER_NAMES], -1))
    assert rows[0][2:] == ((3, 128, 128), 0) and rows[20][2] == (512, 8, 8)
    assert [row[3] for row in rows[1:]] == pytest.approx([*(d / total for d in done), 1])


def test_table_of_resnet18_against_multiplications_counted_by_hand():
    products = [3 * 49 * 64 * 32 ** 2, 0, *[2 * 9 * 64 * 64 * 16 ** 2] * 2]         # images of 64x64
    for c, side in ((128, 8), (256, 4), (512, 2)):
        products += [(9 * c * c // 2 + 9 * c * c + c * c // 2) * side ** 2, 2 * 9 * c * c * side ** 2]
    net = build_net("resnet18", 3, "layer2.0")
    net.lat_features.eval()
    modes = [m.training for m in net.modules()]
    rows = layer_table(net, 64)
    assert [m.training for m in net.modules()] == modes
    shares = [sum(products[:k + 1]) / sum(products) for k in range(10)]
    assert [row[3] for row in rows[1:-1]] == pytest.approx(shares)
    assert [row[2] for row in rows[-3:]] == [(512, 2, 2), (512, 2, 2), (512,)]


@pytest.mark.parametrize("arguments, lines", [
    (["--data", "/nowhere"], ["mobilenet_v1, images of 128x128", "-1 images 3x128x128 49,152",
                              "19 conv5_4/dw 512x8x8 32,768 131,072 68.0%"]),
    (["--name", "demo", "--set", "model=resnet18"],
     ["resnet18, images of 48x48", "5 layer2.1 128x6x6 4,608 18,432 46.5%"]),
    (["--name", "folder", "--data", "/nowhere", "--set", "image_size=64", "--set", "model=mobilenet_v2"],
     ["10 features.10 64x4x4 1,024"])])
def test_list_layers_needs_neither_data_nor_weights_nor_right_layers(arguments, lines, capsys):
    assert main(["--list-layers", *arguments]) == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert all(any(found.startswith(line) for found in printed) for line in lines), printed


def test_layers_are_looked_up_in_the_configured_network(tmp_path, capsys):
    layers = {"latent_layer_num": "layer3.0", "freeze_below_layer": "layer1.1",
              "inc_freeze_below_layer": "layer3.0"}
    names = layer_names("resnet18")
    assert load_config(overrides={"model": "resnet18"} | layers).check_layers(names) == (6, 3, 6)
    with pytest.raises(ConfigError, match="no layer 'conv5_4/dw'.*layer1.0.*--list-layers"):
        load_config(overrides={"model": "resnet18"}).check_layers(names)
    for model, says in (("resnet18", "--list-layers"), ("vgg16", "use vgg16_bn")):
        assert main(["--set", f"model={model}", "--log-dir", str(tmp_path), "--data", "/nowhere"]) == 2
        assert says in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


# ---- end to end ----

@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Four batches of the demo as own images of 32x32, nine frames a video; tested on other frames."""
    root, stream = tmp_path_factory.mktemp("videos"), DemoStream(image_size=32)
    for i, unit in enumerate(stream.units[:4]):
        for session, label in unit:
            frames = torch.from_numpy(stream.draw(session, label)).permute(0, 3, 1, 2).contiguous()
            for part, chosen in ((f"train/{i}", slice(0, None, 4)), ("test", slice(2, None, 8))):
                target = root / part / stream.class_names[label]
                target.mkdir(parents=True, exist_ok=True)
                for k, image in enumerate(frames[chosen]):
                    write_png(image, str(target / f"{session}_{k:03}.png"))
    return root


def backbone(model, latent, videos, **more):
    return load_config("demo", overrides=dict(
        dataset="folder", data=str(videos), image_size=32, model=model, latent_layer_num=latent,
        inc_freeze_below_layer=latent, init_lr=.02, inc_lr=.005, init_train_ep=4, inc_train_ep=2,
        init_update_rate=.3, inc_update_rate=.05, mb_size=16, rm_sz=40, device="cpu",
        checkpoint_share=1) | more)


@pytest.mark.parametrize("model, latent", [("resnet18", "layer2.1"), ("mobilenet_v2", "features.6")])
def test_latent_replay_learns_with_other_backbones(model, latent, videos, tmp_path):
    config = backbone(model, latent, videos, freeze_below_layer=0, init_train_ep=3, inc_train_ep=1,
                      checkpoint_share=.01)
    results = run(config, "x", tmp_path)
    state = torch.load(results["folder"] / "checkpoint.pt", weights_only=True)
    fresh = build_learner(config, 5, (32, 32), torch.device("cpu")).net
    frozen = f"lat_features.{fresh.layer_names[0].replace('.', '_')}."
    unchanged = {key: torch.equal(value, state["net"][key]) for key, value in fresh.state_dict().items()
                 if not key.endswith(("r_max", "d_max"))}
    assert sum(unchanged.values()) >= 5
    assert all(equal == key.startswith(frozen) for key, equal in unchanged.items())
    accuracies = [row["test_accuracy"] for row in results["rows"]]
    assert len(accuracies) == 4 and accuracies[-1] > 0.7       # chance is 0.2
    assert state["memory"]["x"].shape[1:] == fresh.lat_features(images(1, 32)).shape[1:]
    assert results["rows"][-1]["memory_size"] == 40


def test_a_backbone_with_stochastic_depth_resumes_bit_by_bit(videos, tmp_path):
    config = backbone("efficientnet_b0", "features.2.1", videos, init_train_ep=1, inc_train_ep=1,
                      freeze_below_layer=3, max_latents_gb=0)
    straight = run(config, "straight", tmp_path, 2)
    run(config, "resumed", tmp_path, 1)
    torch.rand(5)       # what happens in between
    resumed = run(config, "resumed", tmp_path, 2)
    files = [results["folder"] / "checkpoint.pt" for results in (straight, resumed)]
    assert same(*(torch.load(file, weights_only=True)["net"] for file in files))
    assert straight["rows"][-1]["train_loss"] == resumed["rows"][-1]["train_loss"]
