"""The configuration: every experiment loads, and what cannot run is refused in one sentence that helps."""
import math
import random
import re
from dataclasses import asdict, fields, replace

import pytest
import yaml

from harness import config as configuration
from harness.config import Config, ConfigError, list_experiments, load_config, read_experiments, read_yaml
from helpers import PARAMS, REPO
from models.mobilenet import LAYER_NAMES

TEXT = PARAMS.read_text(encoding="utf-8")
FILES = [PARAMS, *sorted((REPO / "experiments").glob("*.cfg"))]
OWN = {name: section for file in FILES for name, section in yaml.safe_load(file.read_text("utf-8")).items()}
EXPERIMENTS = read_experiments(PARAMS)


def load(name="DEFAULT", **overrides):
    return configuration.config_of(EXPERIMENTS, name, overrides)


def refused(call, *says):
    """The text of the ConfigError that a call raises: one line, that says these things."""
    with pytest.raises(ConfigError) as error:
        call()
    text = str(error.value)
    assert text and "\n" not in text and not text.endswith("."), text
    for part in says:
        assert str(part) in text
    return text


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# ---- the files of the repository ----

def written(name, key):
    """The value of a key as a reader finds it: in the section, or in the one that it is like."""
    section = OWN[name]
    return section[key] if key in section else written(section.get("like", "DEFAULT"), key)


@pytest.mark.parametrize("name", OWN)
def test_every_experiment_loads_and_inherits_what_it_does_not_name(name):
    config = load(name)
    meant = {"latent": config.latent_layer_num, "auto": 20 if config.dataset == "core50" else 1}
    for key in OWN["DEFAULT"]:
        value = written(name, key)
        if key in ("freeze_below_layer", "inc_freeze_below_layer", "test_stride"):
            value = meant.get(value, value)
        assert getattr(config, key) == value
    latent, first, later = config.check_layers(LAYER_NAMES)
    assert -1 <= first <= later <= 27 and (config.rm_sz == 0 or latent <= later)
    assert name == "DEFAULT" or OWN[name]["comment"] != OWN["DEFAULT"]["comment"]


def test_the_experiments_are_listed_by_file():
    listed = list_experiments(PARAMS)
    assert [file for file, _ in listed] == [file.relative_to(REPO).as_posix() for file in FILES]
    comments = {name: comment for _, sections in listed for name, comment in sections}
    assert comments == {name: section["comment"] for name, section in OWN.items()}
    assert list(comments) == list(EXPERIMENTS)


def test_default_is_the_published_experiment():
    config = load()
    published = dict(
        scenario="nicv2_391", init_lr=1e-3, inc_lr=5e-5, mb_size=128, init_train_ep=4, inc_train_ep=4, run=0,
        init_update_rate=0.01, inc_update_rate=5e-5, max_r_max=1.25, max_d_max=0.5, inc_step=4.1e-5, l2=5e-4,
        rm_sz=1500, momentum=0.9, latent_layer_num="conv5_4/dw", freeze_below_layer="conv5_4/dw",
        reg_lambda=0.0, cwr_consolidation="per_pattern", test_stride=20)
    assert {key: getattr(config, key) for key in published} == published


def test_what_needs_no_variant():
    plain = {"DEFAULT", "nicv2_79", "nicv2_196", "per_class", "ar1star", "ar1star_clipped", "pool6", "naive",
             "native_replay", "no_replay", "cwr_star", "demo", "cifar100_pool6", "cifar100_pool6_500",
             "cifar100_cwr_star", "cifar100_naive"}
    assert {name for name in OWN if not load(name).needs_variants() and "standin" not in name} == plain
    variants = dict(follow="bias", rm_dtype="float16", rm_policy="balanced", replayed_per_epoch=9, rm_mb=1,
                    slda_weight=.1, si="learning_rate", patience=1)
    assert all(load(**{key: value}).needs_variants() for key, value in variants.items())


def test_every_key_of_default_is_commented_on_its_line():
    commented = set(re.findall(r"^  (\w+): +\S.*?\s# \S", TEXT.split("# ---- scenarios")[0], re.MULTILINE))
    assert commented | {"comment"} == {f.name for f in fields(Config)} == set(OWN["DEFAULT"])


def test_a_config_survives_being_written_and_read(tmp_path):
    config = load("ar1star", rm_sz=7, latent_layer_num=3)
    path = write(tmp_path / "c.cfg", yaml.safe_dump({"DEFAULT": asdict(config)}))
    assert load_config(path=path) == config


# ---- keys, names, types and limits ----

def test_every_key_says_what_it_can_be():
    free_text = {"comment", "dataset", "data", "model", "weights", "follow", "device"}
    for field in fields(Config):
        assert (field.metadata["choices"] is not None) == (field.type is str and field.name not in free_text)
        assert (field.metadata["low"] is not None) == (field.type in (int, float))
        assert {other for other, _ in field.metadata["needs"]} <= set(OWN["DEFAULT"])
    assert sorted(Config.MAY_CHANGE) == [
        "checkpoint_share", "comment", "data", "device", "download", "max_latents_gb", "preload"]


@pytest.mark.parametrize("key, nearest", [
    ("rmsz", "rm_sz"), ("init_Ir", "init_lr"), ("max_rmax", "max_r_max"), ("lambda", "reg_lambda"),
    ("latent_layer", "latent_layer_num")])
def test_an_unknown_key_is_answered_with_the_nearest(tmp_path, key, nearest):
    refused(lambda: load(**{key: 1}), repr(key), repr(nearest))
    path = write(tmp_path / "my.cfg", f"{TEXT}\nmine:\n  {key}: 1\n")
    refused(lambda: load_config(path=path), repr(key), "'mine'", path, repr(nearest))


@pytest.mark.parametrize("name, nearest", [("ar1", "'ar1star'"), ("default", ""), ("nicv2_96", "'nicv2_196'"),
                                           ("native", "'native_replay'"), ("standin79", "'standin_79'"),
                                           ("", "")])
def test_an_unknown_experiment_is_answered_with_the_nearest(name, nearest):
    refused(lambda: load(name), repr(name), "--list", nearest)


@pytest.mark.parametrize("key, value, expected", [
    ("inc_lr", "5e-5", 5e-5), ("inc_lr", 1, 1.0), ("l2", "0", 0.0), ("reg_lambda", "8.0e+5", 8e5),
    ("seed", 0, 0), ("latent_layer_num", 13, 13), ("latent_layer_num", "conv1", "conv1"),
    ("fast", False, False)])
def test_values_that_mean_the_right_type_are_taken(key, value, expected):
    found = getattr(load(**{key: value}), key)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("key, wanted, values", [
    ("rm_sz", "a whole number", (True, 1500.0, "1500", None)), ("seed", "a whole number", (False,)),
    ("init_lr", "a number", (True, "fast", None, [1e-3], 10**400, "nan", "-inf", "1_000.5", "0x1p3",
                             "1.5.2", "infinity", "٣.٥", " 5", "--1")),     # some are numbers to Python
    ("cumulative", "true or false", (1, "true")), ("data", "text", (3, None)), ("scenario", "text", (391,)),
    ("weights", "text", (True,)), ("latent_layer_num", "number or name", (True, 19.0)),
    ("freeze_below_layer", "number or name", ({"a": 1},)), ("comment", "text", (["a"],))])
def test_wrong_types_are_refused(key, wanted, values):
    for value in values:
        refused(lambda value=value: load(**{key: value}), f"{key} is {value!r}", wanted)


@pytest.mark.parametrize("key", [f.name for f in fields(Config) if f.type is float])
def test_numbers_are_finite(key):
    for value in (math.nan, math.inf, -math.inf, "1e999"):
        refused(lambda value=value: load(**{key: value}), f"{key} is ", "finite")


@pytest.mark.parametrize("key, last, beyond", [
    ("rm_sz", 0, -1), ("run", 0, -1), ("test_stride", 1, 0), ("start_batch", 0, -1), ("image_size", 32, 31),
    ("mb_size", 2, 1), ("init_lr", 0, -1e-9), ("inc_lr", 0, -1.0), ("init_train_ep", 1, 0),
    ("inc_train_ep", 1, 0), ("momentum", 0, -0.1), ("l2", 0, -1e-4), ("init_update_rate", 0, -0.1),
    ("inc_update_rate", 0, -0.1), ("max_r_max", 1, 0.99), ("max_d_max", 0, -0.1), ("inc_step", 0, -1e-5),
    ("reg_lambda", 0, -1.0), ("seed", 0, -1), ("max_latents_gb", 0, -1.0), ("head_lr_mult", 0, -1.0),
    ("patience", 0, -1), ("run", 9, 10), ("momentum", 1, 1.01), ("init_update_rate", 1, 1.5),
    ("inc_update_rate", 1, 2.0), ("checkpoint_share", 1, 1.1), ("seed", 2**63 - 1, 2**63),
    ("image_size", 1024, 1025), ("scenario", "ni", "nicv2_390"),
    ("batches", 1, 0), ("units", 0, -1), ("held_out", 0, -0.1), ("held_out", 0.9, 0.91),
    ("cwr_consolidation", "none", "per_batch"), ("si", "learning_rate", "none"),
    ("inc_convs", "pointwise", "1x1")])
def test_values_beyond_the_last_possible_one_are_refused(key, last, beyond):
    own = ("image_size", "batches", "units", "held_out")
    where = {"dataset": "cifar100"} if key in own else {}
    assert getattr(load(**where | {key: last}), key) == last
    shown = last if isinstance(last, str) else f"{last:g}"
    refused(lambda: load(**where | {key: beyond}), f"{key} is {beyond!r}", shown)


# ---- layers ----

@pytest.mark.parametrize("name, keys, layers", [
    ("DEFAULT", (), (19, 19, 19)), ("pool6", (), (27, 19, 27)), ("native_replay", (), (-1, -1, -1)),
    ("cwr_star", (), (27, 19, 27)), ("naive", (), (19, 19, 19)), ("DEFAULT", ("conv5_1/dw",), (13, 13, 13)),
    ("DEFAULT", ("pool6", "conv5_4/dw", "pool6"), (27, 19, 27)), ("DEFAULT", (-1, "images", 5), (-1, -1, 5)),
    ("DEFAULT", (3, -1, 3), (3, -1, 3)), ("DEFAULT", ("conv1", 0, 27), (0, 0, 27)),
    ("DEFAULT", (7, 3), (7, 3, 7))])
def test_the_latent_layer_is_what_is_frozen_unless_told_otherwise(name, keys, layers):
    settings = dict(zip(("latent_layer_num", "freeze_below_layer", "inc_freeze_below_layer"), keys))
    config = load(name, **settings)
    assert config.check_layers(LAYER_NAMES) == layers


@pytest.mark.parametrize("key", ["latent_layer_num", "freeze_below_layer", "inc_freeze_below_layer"])
@pytest.mark.parametrize("layer, says", [(28, 27), (-2, -1), ("19", 27), ("conv5_4/dv", "'conv5_4/dw'")])
def test_a_layer_that_the_network_lacks_is_refused(key, layer, says):
    refused(lambda: load(**{key: layer}).check_layers(LAYER_NAMES), f"{key}: ", repr(layer), says)


def test_replayed_latents_may_not_age_and_what_is_frozen_stays_frozen():
    """Frozen later than batch 0, but below the latent layer: only an error if latents are replayed."""
    layers = dict(latent_layer_num=19, freeze_below_layer=3, inc_freeze_below_layer=18)
    replaying = load(**layers, rm_sz=1)
    refused(lambda: replaying.check_layers(LAYER_NAMES), "inc_freeze_below_layer 18", "latent_layer_num 19")
    assert load(**layers, rm_sz=0).check_layers(LAYER_NAMES) == (19, 3, 18)
    thawed = load(freeze_below_layer="conv5_5/dw", rm_sz=0)
    refused(lambda: thawed.check_layers(LAYER_NAMES), "freeze_below_layer 'conv5_5/dw'", "'conv5_4/dw'")


# ---- what follows from other settings, and what means nothing ----

def test_all_problems_are_told_at_once():
    refused(lambda: load(rm_sz=-1, scenario="nicv2_390", seed="x", l2=0.1, init_lr=-1), "rm_sz is -1",
            "scenario is 'nicv2_390'", "seed is 'x'", "init_lr is -1.0")
    refused(lambda: load(rmsz=1, sed=2), "'rmsz'", "'sed'", "'seed'")


# The keys that mean something only with certain kinds of data.
ONLY_WITH = {"data": ("core50", "folder", "cifar100"), "scenario": ("core50",),
             "run": ("core50", "demo", "cifar100"), "preload": ("core50",),
             "download": ("core50", "cifar100"), "image_size": ("core50", "folder", "cifar100"),
             "batches": ("cifar100",), "units": ("cifar100",), "held_out": ("cifar100",)}


@pytest.mark.parametrize("dataset", ["core50", "folder", "demo", "cifar100"])
@pytest.mark.parametrize("key, value", dict(
    comment="x", data="x", scenario="ni", run=1, start_batch=1, cumulative=True, preload=True, download=True,
    test_stride=3, image_size=64, batches=5, units=4, held_out=.1).items())
def test_settings_that_would_do_nothing_are_refused(dataset, key, value):
    if dataset in ONLY_WITH.get(key, dataset):
        assert getattr(load(dataset=dataset, **{key: value}), key) == value
    else:
        refused(lambda: load(dataset=dataset, **{key: value}), f"nothing: {key} (with dataset {dataset})")


RESNET = dict(model="resnet18", latent_layer_num="layer1.0")


@pytest.mark.parametrize("says, keys", [
    ("nothing: batches (with units 4)", dict(dataset="cifar100", units=4, batches=5)),
    ("nothing: reg_clip_negative (with reg_lambda 0.0)", dict(reg_clip_negative=True)),
    ("nothing: si_c (with reg_lambda 0.0)", dict(si_c=.5)),
    ("nothing: reg_lambda (with si learning_rate)", dict(si="learning_rate", reg_lambda=1.0)),
    ("nothing: inc_step (with follow papers)", dict(follow="papers", inc_step=1e-3)),
    ("nothing: rm_dtype (with rm_sz 0)", dict(rm_sz=0, rm_dtype="uint8")),
    ("nothing: replayed_per_epoch (with rm_sz 500)", dict(rm_sz=500, replayed_per_epoch=500)),
    ("nothing: width (with model resnet18)", dict(RESNET, width=0.5)),
    ("matmul_precision", dict(RESNET, matmul_precision="low")),
    ("patience is 2", dict(patience=2, reg_lambda=1.0)),
    ("rm_policy is balanced", dict(follow="papers", rm_policy="balanced")),
    ("rm_dtype is pq", dict(follow="moving", rm_dtype="pq")), ("rm_sz is 1500", dict(method="slda")),
    *[(f"follow is {it!r}", dict(follow=it)) for it in ("caffe", "", "papers,bias", "bias,", "bias;decay")]])
def test_settings_that_do_not_go_together_are_refused(says, keys):
    refused(lambda: load(**keys), says)


@pytest.mark.parametrize("name, keys, more", [
    ("DEFAULT", dict(si="learning_rate", si_c=.5), {}), ("DEFAULT", dict(reg_lambda=1.0, si_c=.5), {}),
    ("DEFAULT", dict(rm_sz=500, replayed_per_epoch=499), {}), ("DEFAULT", dict(matmul_precision="low"), {}),
    ("DEFAULT", dict(rm_mb=1.0, replayed_per_epoch=9999), {}),      # its patterns are not known yet
    ("demo", RESNET, dict(width=.25)),      # the section's, which is for another network
    ("DEFAULT", {}, dict(test_stride=20)), ("DEFAULT", dict(test_stride=4), {}),
    ("DEFAULT", dict(dataset="folder"), dict(test_stride=1)), ("demo", {}, dict(test_stride=1)),
    ("DEFAULT", dict(dataset="folder", test_stride=20), {}),
    ("DEFAULT", {"dataset": "flowers102"}, dict(test_stride=1))])
def test_settings_that_go_together_are_taken_and_others_follow_from_them(name, keys, more):
    config = load(name, **keys)
    assert all(getattr(config, key) == value for key, value in (keys | more).items())


def test_what_a_section_sets_and_an_override_makes_meaningless_is_as_in_default(tmp_path):
    """The user did not write it and cannot leave it out."""
    config = load("standin_79_pq_slda", slda_weight=0, rm_sz=0)
    for key in ("slda_layer", "slda_root", "slda_shrinkage", "rm_dtype", "replayed_per_epoch"):
        assert getattr(config, key) == OWN["DEFAULT"][key]
    assert not load("ar1star_clipped", reg_lambda=0).reg_clip_negative
    assert load("standin_79_pq_slda", seed=3).slda_layer == "conv5_6/sep"      # which still means something
    idle = "nothing: slda_root (with slda_weight 0.0)"
    refused(lambda: load("standin_79_pq_slda", slda_weight=0, slda_root=True), idle)
    path = write(tmp_path / "my.cfg", TEXT + "\nmine:\n  slda_root: true\n")
    for overrides in ({}, {"seed": 3}):     # the section's own mistake
        refused(lambda o=overrides: load_config("mine", path, o), idle)


@pytest.mark.parametrize("name", [name for name in OWN if written(name, "dataset") == "core50"])
def test_a_folder_of_own_images_says_itself_what_it_is(tmp_path, name):
    """Each section keeps its method there, and is tested on all images: its test_stride is for CORe50. What
    is in closed form takes larger images."""
    data = str(tmp_path)
    elsewhere = replace(load(name), data=data)
    assert load(name, data=data) == elsewhere
    (tmp_path / "train").mkdir()
    size = 128 if elsewhere.method == "latent_replay" else 256
    assert load(name, data=data) == replace(
        elsewhere, dataset="folder", test_stride=1, scenario=OWN["DEFAULT"]["scenario"], image_size=size)
    (tmp_path / "paths.pkl").touch()        # CORe50, with another folder beside its frames
    assert load(name, data=data) == elsewhere


def test_what_is_said_of_own_images_counts(tmp_path):
    (tmp_path / "train").mkdir()
    data = str(tmp_path)
    assert load("standin_79_slda", data=data, test_stride=3, image_size=64).test_stride == 3
    assert load("slda", data=data, dataset="core50").dataset == "core50"
    refused(lambda: load("slda", data=data, run=1), "nothing: run (with dataset folder)")
    section = f"\nmine:\n  scenario: nicv2_79\n  test_stride: 3\n  data: {data}\n"
    config = load_config("mine", write(tmp_path / "my.cfg", TEXT + section))
    assert (config.dataset, config.test_stride, config.scenario) == ("folder", 3, "nicv2_391")


def test_what_is_followed():
    assert load().parts() == set() and load(follow="papers").parts() == set(Config.PARTS)
    assert load(follow="bias, decay").parts() == {"bias", "decay"}


# ---- sections and files ----

def test_sections_inherit_across_files(tmp_path):
    path = write(tmp_path / "my.cfg", TEXT + "\nmine:\n  like: 7\n  rm_sz: 3\n")
    write(tmp_path / "experiments" / "b.cfg", "7:\n  like: lower\n  seed: 4\n")
    write(tmp_path / "experiments" / "c.cfg", "lower:\n  inc_lr: 1.0\n  rm_sz: 9\n")
    for name, expected in dict(mine=(3, 4, 1.0), lower=(9, 0, 1.0), DEFAULT=(1500, 0, 5e-5)).items():
        config = load_config(name, path)
        assert (config.rm_sz, config.seed, config.inc_lr) == expected
    files = [file for file, _ in list_experiments(path)]
    assert files == ["my.cfg", "experiments/b.cfg", "experiments/c.cfg"]
    experiments = read_experiments(path)
    experiments["lower"]["l2"] = 99
    assert experiments["7"]["l2"] == experiments["DEFAULT"]["l2"] == 5e-4


@pytest.mark.parametrize("added, says", [
    ("a:\n  like: native_repla\n", ("'a'", "'native_repla'", "'native_replay'")),
    ("a:\n  like: [b]\n", ("'a'",)), ("a:\n  like: a\n", ("a is like a",)),
    ("a:\n  like: b\nb:\n  like: a\n", ("a is like b is like a",)),
    ("a: &a {seed: 1}\nb:\n  <<: *a\n", ("line {3}", "like: NAME")),
    ("a:\n  <<: [{seed: 1}, {seed: 2}]\n", ("line {2}", "like: NAME")),
    ("a:\n  seed: 1\n  rm_sz: 5\n  seed: 2\n", ("'seed' stands twice", "lines {2} and {4}")),
    ("a: {seed: 1, seed: 1}\n", ("'seed' stands twice", "lines {1} and {1}")),
    ("pool6:\n  seed: 1\n", ("'pool6' stands twice", "and {1}"))])
def test_what_a_section_cannot_be(tmp_path, added, says):
    path = write(tmp_path / "my.cfg", TEXT + added)
    numbers = range(TEXT.count("\n"), TEXT.count("\n") + 5)
    refused(lambda: load_config(path=path), *(part.format(*numbers) for part in says))


@pytest.mark.parametrize("name", ["pool6", "DEFAULT"])
def test_a_name_stands_in_one_file_and_default_is_like_nothing(tmp_path, name):
    path = write(tmp_path / "my.cfg", TEXT)
    other = write(tmp_path / "experiments" / "more.cfg", f"{name}:\n  seed: 1\n")
    refused(lambda: read_experiments(path), repr(name), path, other)
    path = write(tmp_path / "circle" / "my.cfg", TEXT.replace("DEFAULT:\n", f"DEFAULT:\n  like: {name}\n"))
    refused(lambda: load_config("demo", path), f"DEFAULT is like {name}")


@pytest.mark.parametrize("number", "010 0500 0x10 0b1 0o7 1:30 1_000 00 1__0 +-3 ٣".split())
def test_numbers_are_decimal_or_refused(tmp_path, number):
    """YAML 1.1 reads 010 as 8, 0500 as 320 and 1:30 as 90."""
    assert read_yaml(number) == number
    path = write(tmp_path / "my.cfg", TEXT.replace("seed: 0 ", f"seed: {number} "))
    refused(lambda: load_config(path=path), f"seed is {number!r}", "a whole number")


@pytest.mark.parametrize("text, value", [
    ("12", 12), ("-3", -3), ("+7", 7), ("0", 0), ("0.5", 0.5), (".5", 0.5), ("5.", 5.0), ("8.0e+5", 8e5),
    ("1.e-3", 1e-3)])
def test_decimal_numbers_are_taken(text, value):
    assert read_yaml(text) == value and type(read_yaml(text)) is type(value)


@pytest.mark.parametrize("text, says", [
    ("", "sections"), ("just text", "sections"), ("- a\n- b", "sections"), ("DEFAULT: 3", "sections"),
    ("DEFAULT:\n", "sections"), ("mine: {rm_sz: 3}", "DEFAULT"), ("DEFAULT: {a: [}", "YAML"), ("\0", "YAML"),
    ("DEFAULT:\n\trm_sz: 3", "YAML"), ("[" * 3000, "YAML"), ("a: *b", "YAML"), ("a: {a: !!int ''}", "YAML"),
    ("DEFAULT: {rm_sz: !!python/object/apply:os.mkdir [ran]}", "YAML"), ("DEFAULT: {a: !!bool x}", "YAML"),
    ("DEFAULT: {a: 2001-99-99}", "YAML"), ("DEFAULT: {a: !!timestamp x}", "YAML"), (b"\xff\xfe\xff", "YAML"),
    (None, "no configuration file")])
def test_files_that_are_no_configuration_are_refused(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "my.cfg").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = list(tmp_path.iterdir())
    assert len(refused(lambda: load_config(path="my.cfg"), "my.cfg", says)) < 400
    assert list(tmp_path.iterdir()) == before
    refused(lambda: load_config(path=tmp_path), tmp_path)       # a folder


def test_keys_missing_in_default_are_named(tmp_path):
    for key in OWN["DEFAULT"]:
        rest = {other: value for other, value in OWN["DEFAULT"].items() if other != key}
        path = write(tmp_path / "my.cfg", yaml.safe_dump({"DEFAULT": rest}))
        refused(lambda path=path: load_config("DEFAULT", path), path, f"lacks {key}")


TOKENS = ["!!int ''", "!!float", "!!bool x", "!!timestamp 1", "!!binary é", "!!python/name:os.system", "&a",
          "*a", "<<: *a", "? ", ": ", "- ", *"[{}]'\"|>\t\n#%@~\0\ud7ff\U0001f600", "\n\n  ", "null",
          ".nan", "-.inf", "-1", "0x_", "0b", "1:99", "2001-13-45", "9" * 400, "1e5", "true", "DEFAULT:",
          "conv5_4/dw", "like: nicv2_79", "like", "..."]


def damaged(text, rng):
    """A text with pieces replaced, or with lines dropped, doubled or given another value."""
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        i = rng.randrange(len(text))
        lines = text.splitlines(keepends=True)
        k = rng.randrange(len(lines))
        token = rng.choice((*TOKENS, chr(rng.randrange(32, 127)), chr(rng.randrange(1, 0xD7FF))))
        other_value = lines[k].split(":")[0] + f": {token}\n"
        text = rng.choice((
            text[:i] + token + text[i + rng.choice((0, 1, 3, 20)):],
            "".join(lines[:k] + lines[k + 1:]) or "a",
            "".join(lines[:k] + [rng.choice(lines)] + lines[k:]),
            "".join(lines[:k] + [other_value] + lines[k + 1:])))
    return text


def test_no_text_raises_anything_but_a_config_error(tmp_path):
    """Hundreds of damaged files: each is a configuration whose values have their types, or a ConfigError."""
    lines = TEXT.split("# ---- variants")[0].splitlines()
    base = "\n".join(line.split("  #")[0].rstrip() for line in lines if line.strip())       # short is fast
    rng, path = random.Random(0), tmp_path / "my.cfg"
    loaded, refusals = 0, set()
    for _ in range(600):
        path.write_text(damaged(base, rng), encoding="utf-8", errors="replace")
        try:
            config = load_config(rng.choice(("DEFAULT", "nicv2_79")), path)
            config.check_layers(LAYER_NAMES)
            assert all(isinstance(getattr(config, f.name), f.type) for f in fields(config))
            loaded += 1
        except ConfigError as error:
            refusals.add(str(error))
    assert loaded > 5 and len(refusals) > 50
