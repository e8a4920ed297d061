"""The configuration: every experiment loads, and everything that cannot run is answered by one helpful sentence."""
import math
import random
import re
import time
from dataclasses import asdict, fields

import pytest
import yaml

from helpers import REPO
from lab.config import Config, ConfigError, load_config, read_experiments, read_yaml
from models.mobilenet import LAYER_NAMES

PARAMS = REPO / "params.cfg"
TEXT = PARAMS.read_text(encoding="utf-8")
NAMES = [name for name in yaml.safe_load(TEXT)]
WANTED = {"DEFAULT", "nicv2_79", "nicv2_196", "ar1star", "cwr_star", "native_replay", "no_replay", "naive",
          "cumulative", "pool6", "per_class", "standin_79", "standin_391"}


def load(name="DEFAULT", **overrides):
    return load_config(name, PARAMS, overrides)


def refused(call, *says):
    """The text of the ConfigError that a call raises: one sentence, on one line, that says these things."""
    with pytest.raises(ConfigError) as error:
        call()
    text = str(error.value)
    assert text and "\n" not in text and ". " not in text.replace("... ", "") and not text.endswith("."), text
    for part in says:
        assert part in text
    return text


# ---- params.cfg ----

def test_params_has_the_published_experiments():
    assert WANTED <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_loads_and_inherits_what_it_does_not_name(name):
    section, default = yaml.safe_load(TEXT)[name], yaml.safe_load(TEXT)["DEFAULT"]
    config = load(name)
    meant = {"latent": config.latent_layer_num, "auto": 20 if config.dataset == "core50" else 1}
    for key in (f.name for f in fields(Config)):
        value = section.get(key, default[key])
        if key.startswith(("freeze", "inc_freeze")) or key == "test_stride":
            value = meant.get(value, value)
        assert getattr(config, key) == value
    latent, first, later = config.check_layers(LAYER_NAMES)
    assert -1 <= first <= later <= 27 and (config.rm_sz == 0 or latent <= later)
    assert name == "DEFAULT" or section["comment"] != default["comment"]


def test_default_is_the_published_experiment():
    config = load()
    published = dict(scenario="nicv2_391", init_lr=1e-3, inc_lr=5e-5, mb_size=128, init_train_ep=4, inc_train_ep=4,
                     init_update_rate=0.01, inc_update_rate=5e-5, max_r_max=1.25, max_d_max=0.5, inc_step=4.1e-5,
                     rm_sz=1500, momentum=0.9, l2=5e-4, latent_layer_num="conv5_4/dw", freeze_below_layer="conv5_4/dw",
                     reg_lambda=0.0, cwr_consolidation="per_pattern", test_stride=20, run=0)
    assert {key: getattr(config, key) for key in published} == published
    assert config.check_layers(LAYER_NAMES) == (19, 19, 19)


@pytest.mark.parametrize("name, layers", [("pool6", (27, 19, 27)), ("native_replay", (-1, -1, -1)),
                                          ("cwr_star", (27, 19, 27)), ("naive", (19, 19, 19))])
def test_layers_of_the_variants(name, layers):
    assert load(name).check_layers(LAYER_NAMES) == layers


def test_every_key_of_default_is_commented_on_its_line():
    lines = TEXT.split("\n\n# ---- scenarios")[0].splitlines()
    commented = {m[1] for line in lines if (m := re.match(r"  (\w+): +\S.*\s# \S+", line))}
    assert commented | {"comment"} == {f.name for f in fields(Config)} == set(yaml.safe_load(TEXT)["DEFAULT"])


def test_a_config_survives_being_written_and_read(tmp_path):
    config = load("ar1star", rm_sz=7, latent_layer_num=3)
    (tmp_path / "c.cfg").write_text(yaml.safe_dump({"DEFAULT": asdict(config)}))
    assert load_config(path=tmp_path / "c.cfg") == config


# ---- keys, names and types ----

@pytest.mark.parametrize("key, nearest", [("rmsz", "rm_sz"), ("init_Ir", "init_lr"), ("max_rmax", "max_r_max"),
                                          ("latent_layer", "latent_layer_num"), ("lambda", "reg_lambda")])
def test_an_unknown_key_is_answered_with_the_nearest(tmp_path, key, nearest):
    refused(lambda: load(**{key: 1}), f"unknown key {key!r}", f"did you mean {nearest!r}")
    (tmp_path / "my.cfg").write_text(f"{TEXT}\nmine:\n  {key}: 1\n")
    refused(lambda: load_config(path=tmp_path / "my.cfg"), f"unknown key {key!r}", "'mine'", "my.cfg", repr(nearest))


@pytest.mark.parametrize("name, nearest", [("ar1", "ar1star"), ("default", None), ("nicv2_96", "nicv2_196"),
                                           ("native", "naive"), ("standin79", "standin_79"), ("xyz", None), ("", None)])
def test_an_unknown_experiment_is_answered_with_the_nearest(name, nearest):
    text = refused(lambda: load(name), f"unknown experiment {name!r}", "--list")
    assert nearest is None or "did you mean" in text and nearest in NAMES
    assert nearest is None or f"did you mean {nearest!r}" in text


@pytest.mark.parametrize("key, value, expected", [
    ("inc_lr", "5e-5", 5e-5), ("inc_lr", 1, 1.0), ("l2", "0", 0.0), ("reg_lambda", "8.0e+5", 8e5),
    ("latent_layer_num", 13, 13), ("latent_layer_num", "conv1", "conv1"), ("seed", 0, 0), ("fast", False, False)])
def test_values_that_mean_the_right_type_are_taken(key, value, expected):
    found = getattr(load(**{key: value}), key)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("key, value, wanted", [
    ("rm_sz", True, "a whole number"), ("rm_sz", 1500.0, "a whole number"), ("rm_sz", "1500", "a whole number"),
    ("rm_sz", None, "a whole number"), ("seed", False, "a whole number"), ("init_lr", True, "a number"),
    ("init_lr", "fast", "a number"), ("init_lr", None, "a number"), ("init_lr", [1e-3], "a number"),
    ("init_lr", 10**400, "a number"), ("cumulative", 1, "true or false"), ("cumulative", "true", "true or false"),
    ("data", 3, "text"), ("data", None, "text"), ("scenario", 391, "text"), ("weights", True, "text"),
    ("latent_layer_num", True, "a layer's number or name"), ("latent_layer_num", 19.0, "a layer's number or name"),
    ("freeze_below_layer", {"a": 1}, "a layer's number or name"), ("comment", ["a"], "text")])
def test_wrong_types_are_refused(key, value, wanted):
    refused(lambda: load(**{key: value}), f"{key} is ", f"it must be {wanted}")


@pytest.mark.parametrize("key", [f.name for f in fields(Config) if f.type is float])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", "-inf", "1e999"])
def test_numbers_are_finite(key, value):
    refused(lambda: load(**{key: value}), f"{key} is ", "finite")


@pytest.mark.parametrize("key, low, below", [
    ("rm_sz", 0, -1), ("run", 0, -1), ("test_stride", 1, 0), ("start_batch", 0, -1), ("image_size", 32, 31),
    ("mb_size", 2, 1), ("init_lr", 0, -1e-9),
    ("inc_lr", 0, -1.0), ("init_train_ep", 1, 0), ("inc_train_ep", 1, 0), ("momentum", 0, -0.1), ("l2", 0, -1e-4),
    ("init_update_rate", 0, -0.1), ("inc_update_rate", 0, -0.1), ("max_r_max", 1, 0.99), ("max_d_max", 0, -0.1),
    ("inc_step", 0, -1e-5), ("reg_lambda", 0, -1.0), ("seed", 0, -1), ("max_latents_gb", 0, -1.0),
    ("head_lr_mult", 0, -1.0), ("patience", 0, -1)])
def test_values_below_their_smallest_are_refused(key, low, below):
    where = {"dataset": "folder"} if key == "image_size" else {}
    assert getattr(load(**where | {key: low}), key) == low
    refused(lambda: load(**where | {key: below}), f"{key} is {below!r}", str(low))


@pytest.mark.parametrize("key, high, above", [("run", 9, 10), ("momentum", 1, 1.01), ("init_update_rate", 1, 1.5),
                                              ("inc_update_rate", 1, 2), ("checkpoint_share", 1, 1.1),
                                              ("seed", 2**63 - 1, 2**63)])
def test_values_above_their_largest_are_refused(key, high, above):
    assert getattr(load(**{key: high}), key) == high
    refused(lambda: load(**{key: above}), f"{key} is ")


@pytest.mark.parametrize("key, value, choice", [
    ("scenario", "nicv2_390", "'nicv2_391'"), ("dataset", "cifar", "'core50'"),
    ("cwr_consolidation", "per_batch", "'per_class'"), ("si", "none", "'learning_rate'"),
    ("inc_convs", "1x1", "'pointwise'")])
def test_values_outside_their_choices_are_refused(key, value, choice):
    refused(lambda: load(**{key: value}), f"{key} is {value!r}", choice)


# ---- layers ----

@pytest.mark.parametrize("latent, first, later", [(19, 19, 19), ("pool6", "conv5_4/dw", "pool6"), (-1, "images", 5),
                                                  (3, -1, 3), ("conv1", 0, 27)])
def test_possible_layers_give_their_numbers(latent, first, later):
    config = load(latent_layer_num=latent, freeze_below_layer=first, inc_freeze_below_layer=later)
    number = {"pool6": 27, "conv5_4/dw": 19, "images": -1, "conv1": 0}
    assert config.check_layers(LAYER_NAMES) == tuple(number.get(x, x) for x in (latent, first, later))


@pytest.mark.parametrize("key", ["latent_layer_num", "freeze_below_layer", "inc_freeze_below_layer"])
@pytest.mark.parametrize("layer, says", [(28, "27"), (-2, "-1"), ("19", "27"),
                                         ("conv5_4/dv", "did you mean 'conv5_4/dw'")])
def test_a_layer_that_the_network_lacks_is_refused(key, layer, says):
    text = refused(lambda: load(**{key: layer}).check_layers(LAYER_NAMES), f"no layer {layer!r}")
    assert text.startswith(f"{key}: ") and says in text


def test_replayed_latents_may_not_age():
    """Frozen later than batch 0, but below the latent layer: only an error if latents are replayed."""
    layers = dict(latent_layer_num=19, freeze_below_layer=3, inc_freeze_below_layer=18)
    replaying = load(**layers, rm_sz=1)
    refused(lambda: replaying.check_layers(LAYER_NAMES), "inc_freeze_below_layer 18", "latent_layer_num 19")
    assert load(**layers, rm_sz=0).check_layers(LAYER_NAMES) == (19, 3, 18)


def test_what_is_frozen_stays_frozen():
    refused(lambda: load(freeze_below_layer="conv5_5/dw", rm_sz=0).check_layers(LAYER_NAMES),
            "freeze_below_layer 'conv5_5/dw' lies above", "'conv5_4/dw'")


# ---- what follows from other settings, and what means nothing ----

@pytest.mark.parametrize("keys, stride", [({}, 20), ({"dataset": "folder"}, 1), ({"dataset": "demo"}, 1),
                                          ({"dataset": "folder", "test_stride": 20}, 20), ({"test_stride": 4}, 4)])
def test_own_images_and_the_demo_are_tested_on_all_of_theirs(keys, stride):
    assert load(**keys).test_stride == stride


def test_the_latent_layer_is_what_is_frozen_unless_told_otherwise():
    assert load(latent_layer_num="conv5_1/dw").check_layers(LAYER_NAMES) == (13, 13, 13)
    assert load(latent_layer_num=7, freeze_below_layer=3).check_layers(LAYER_NAMES) == (7, 3, 7)
    config = load(model="resnet18", latent_layer_num="layer2.1")
    assert config.check_layers([f"layer{i}.{j}" for i in (1, 2) for j in (0, 1)]) == (3, 3, 3)


def test_all_problems_are_told_at_once():
    refused(lambda: load(rm_sz=-1, scenario="nicv2_390", seed="x", l2=0.1, init_lr=-1), "rm_sz is -1; it must be at least 0",
            "scenario is 'nicv2_390'; it can be", "seed is 'x'; it must be a whole number", "init_lr is -1.0")
    refused(lambda: load(rmsz=1, sed=2), "unknown key 'rmsz'", "unknown key 'sed'; did you mean 'seed'?")


# The keys that mean something only with certain kinds of data; elsewhere a value other than DEFAULT's is refused.
ONLY_WITH = {"data": ("core50", "folder"), "scenario": ("core50",), "run": ("core50", "demo"), "preload": ("core50",),
             "download": ("core50",), "image_size": ("folder",)}
OTHER = {"comment": "x", "data": "x", "scenario": "ni", "run": 1, "start_batch": 1, "cumulative": True, "preload": True,
         "download": True, "test_stride": 3, "image_size": 64}


@pytest.mark.parametrize("dataset", ["core50", "folder", "demo"])
@pytest.mark.parametrize("key", OTHER)
def test_settings_that_would_do_nothing_are_refused(dataset, key):
    if dataset in ONLY_WITH.get(key, ("core50", "folder", "demo")):
        assert getattr(load(dataset=dataset, **{key: OTHER[key]}), key) == OTHER[key]
    else:
        refused(lambda: load(dataset=dataset, **{key: OTHER[key]}), f"do nothing: {key} (with dataset {dataset})")


def test_settings_of_a_method_that_is_off_are_refused():
    refused(lambda: load(reg_clip_negative=True), "do nothing: reg_clip_negative (with reg_lambda 0.0)")
    refused(lambda: load(si_c=.5), "do nothing: si_c (with reg_lambda 0.0)")
    refused(lambda: load(si="learning_rate", reg_lambda=1.0), "do nothing: reg_lambda (with si learning_rate)")
    refused(lambda: load(follow="papers", inc_step=1e-3), "do nothing: inc_step (with follow papers)")
    refused(lambda: load(patience=2, reg_lambda=1.0), "patience is 2, but Synaptic Intelligence counts whole batches")
    assert load(si="learning_rate", si_c=.5).si_c == .5 and load(reg_lambda=1.0, si_c=.5).si_c == .5
    resnet = dict(model="resnet18", latent_layer_num="layer1.0")
    refused(lambda: load(**resnet, width=0.5), "do nothing: width (with model resnet18)")
    assert load("demo", **resnet).width == 0.25     # the section's, which was made for another network


def test_what_a_section_sets_and_an_override_makes_meaningless_is_as_in_default(tmp_path):
    """The user did not write it and cannot leave it out."""
    default = load()
    config = load("standin_79_pq_slda", slda_weight=0, rm_sz=0)
    keys = ("slda_layer", "slda_root", "slda_shrinkage", "rm_dtype", "replayed_per_epoch")
    assert [getattr(config, key) for key in keys] == [getattr(default, key) for key in keys]
    assert not load("ar1star_clipped", reg_lambda=0).reg_clip_negative
    assert load("standin_79_pq_slda", seed=3).slda_layer == "conv5_6/sep"      # which still means something
    idle = "do nothing: slda_root (with slda_weight 0.0)"
    refused(lambda: load("standin_79_pq_slda", slda_weight=0, slda_root=True), idle)
    (tmp_path / "my.cfg").write_text(TEXT + "\nmine:\n  slda_root: true\n", encoding="utf-8")
    for overrides in ({}, {"seed": 3}):     # the section's own mistake
        refused(lambda o=overrides: load_config("mine", tmp_path / "my.cfg", o), idle)


def test_a_part_of_the_memory_is_less_than_the_memory():
    assert load(rm_sz=500, replayed_per_epoch=499).replayed_per_epoch == 499
    assert load(rm_mb=1.0, replayed_per_epoch=9999).replayed_per_epoch == 9999      # its patterns are not known yet
    for replayed in (500, 100000):
        refused(lambda n=replayed: load(rm_sz=500, replayed_per_epoch=n), "do nothing: replayed_per_epoch (with rm_sz 500)")


def test_products_in_bfloat16_are_of_one_network():
    assert load(matmul_precision="low").matmul_precision == "low"
    refused(lambda: load(matmul_precision="low", model="resnet18", latent_layer_num="layer1.0"), "of mobilenet_v1 alone",
            "set it to medium")


def test_what_is_followed():
    assert load().parts() == set() and load(follow="papers").parts() == set(Config.PARTS)
    assert load(follow="bias, decay").parts() == {"bias", "decay"}
    for wrong in ("caffe", "", "papers,bias", "bias,", "bias;decay"):
        refused(lambda wrong=wrong: load(follow=wrong), f"follow is {wrong!r}; it can be")


# ---- files ----

@pytest.mark.parametrize("number", ["010", "0500", "0x10", "0b1", "0o7", "1:30", "1_000", "00", "1__0", "+-3", "٣"])
def test_numbers_are_decimal_or_refused(tmp_path, number):
    """YAML 1.1 reads 010 as 8, 0500 as 320 and 1:30 as 90."""
    assert read_yaml(number) == number
    (tmp_path / "my.cfg").write_text(TEXT.replace("seed: 0 ", f"seed: {number} "), encoding="utf-8")
    refused(lambda: load_config(path=tmp_path / "my.cfg"), f"seed is {number!r}; it must be a whole number")


@pytest.mark.parametrize("text, value", [("12", 12), ("-3", -3), ("+7", 7), ("0", 0), ("0.5", 0.5), (".5", 0.5), ("5.", 5.0),
                                         ("8.0e+5", 8e5), ("1.e-3", 1e-3)])
def test_decimal_numbers_are_taken(text, value):
    assert read_yaml(text) == value and type(read_yaml(text)) is type(value)


@pytest.mark.parametrize("number", ["1_000.5", "0x1p3", "1.5.2", "infinity", "٣.٥", " 5", "--1"])
def test_text_that_python_alone_takes_for_a_number_is_refused(number):
    refused(lambda: load(init_lr=number), f"init_lr is {number!r}; it must be a number")


@pytest.mark.parametrize("added, says", [
    ("mine:\n  seed: 1\n  rm_sz: 5\n  seed: 2\n", "'seed' stands twice, in lines {1} and {3}"),
    ("mine: {seed: 1, seed: 1}\n", "'seed' stands twice, in lines {0} and {0}"),
    ("pool6:\n  seed: 1\n", "'pool6' stands twice, in lines {pool6} and {0}")])
def test_a_key_or_section_that_stands_twice_is_refused(tmp_path, added, says):
    (tmp_path / "my.cfg").write_text(f"{TEXT}\n{added}", encoding="utf-8")
    end, pool6 = len(TEXT.splitlines()) + 2, TEXT.splitlines().index("pool6:") + 1
    says = says.format(*range(end, end + 4), pool6=pool6)
    refused(lambda: load_config(path=tmp_path / "my.cfg"), "my.cfg", says)


def test_a_list_of_sections_is_not_taken_over(tmp_path):
    """Where two of them name a key, PyYAML 6.0.4 takes the last one's value, other versions the first one's."""
    text = f"{TEXT}\none: &one {{seed: 1}}\ntwo: &two {{seed: 2}}\nboth:\n  <<: [*one, *two]\n"
    (tmp_path / "my.cfg").write_text(text, encoding="utf-8")
    refused(lambda: load_config(path=tmp_path / "my.cfg"), "my.cfg", f"line {len(text.splitlines())} takes over a list")


@pytest.mark.parametrize("text, says", [
    ("", "must hold sections"), ("just text", "must hold sections"), ("- a\n- b", "must hold sections"),
    ("DEFAULT: 3", "must hold sections"), ("DEFAULT:\n", "must hold sections"),
    ("mine: {rm_sz: 3}", "no DEFAULT section"), ("DEFAULT: {a: [}", "YAML"), ("DEFAULT:\n\trm_sz: 3", "YAML"),
    ("[" * 3000, "YAML"), ("a: *b", "YAML"), ("\0", "YAML"),
    ("DEFAULT: {rm_sz: !!python/object/apply:os.mkdir [ran]}", "YAML"), ("DEFAULT: {rm_sz: 2001-99-99}", "YAML"),
    ("DEFAULT: {rm_sz: !!int ''}", "YAML"), ("DEFAULT: {rm_sz: !!bool x}", "YAML"),
    ("DEFAULT: {rm_sz: !!timestamp x}", "YAML")])
def test_files_that_are_no_configuration_are_refused(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.cfg").write_text(text)
    with pytest.raises(ConfigError, match=f"my.cfg.*{says}") as error:
        load_config(path="my.cfg")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert [p.name for p in tmp_path.iterdir()] == ["my.cfg"]


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_bytes(b"\xff\xfe\xff")])
def test_files_that_cannot_be_read_are_refused(tmp_path, make):
    make(tmp_path / "my.cfg")
    with pytest.raises(ConfigError, match="my.cfg"):
        load_config(path=tmp_path / "my.cfg")


@pytest.mark.parametrize("key", [f.name for f in fields(Config)])
def test_a_key_missing_in_default_is_named(tmp_path, key):
    sections = yaml.safe_load(TEXT)
    del sections["DEFAULT"][key]
    (tmp_path / "my.cfg").write_text(yaml.safe_dump(sections))
    refused(lambda: load_config("DEFAULT", tmp_path / "my.cfg"), f"lacks {key}")


def test_sections_are_independent(tmp_path):
    (tmp_path / "my.cfg").write_text(TEXT + "\nmine:\n  rm_sz: 3\n7:\n  rm_sz: 4\n")
    assert [load_config(n, tmp_path / "my.cfg").rm_sz for n in ("mine", "7", "DEFAULT")] == [3, 4, 1500]
    experiments = read_experiments(tmp_path / "my.cfg")
    experiments["mine"]["l2"] = 99
    assert experiments["DEFAULT"]["l2"] == 5e-4


TOKENS = ["!!int ''", "!!float", "!!bool x", "!!timestamp 1", "!!binary é", "!!python/name:os.system", "&a", "*a",
          "<<: *a", "? ", ": ", "- ", "[", "{", "}", "]", "'", '"', "|", ">", "\t", "\n", "\n\n  ", "#", "%", "@",
          "null", "~", ".nan", "-.inf", "0x_", "0b", "1:99", "2001-13-45", "9" * 400, "-1", "1e5", "true", "\0",
          "\ud7ff", "\U0001f600", "DEFAULT:", "conv5_4/dw", "..."]


def mutated(text, rng):
    """A text with a few lines or pieces dropped, doubled, moved or replaced."""
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        i = rng.randrange(len(text))
        j = min(len(text), i + rng.choice((0, 1, 3, 20)))
        lines = text.splitlines(keepends=True)
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:i] + rng.choice(TOKENS) + text[j:]
        elif kind == 1:
            text = text[:i] + chr(rng.choice((rng.randrange(32, 127), rng.randrange(1, 0xD7FF)))) + text[j:]
        elif kind == 2:
            del lines[rng.randrange(len(lines))]
            text = "".join(lines) or "a"
        elif kind == 3:
            lines.insert(rng.randrange(len(lines)), rng.choice(lines))
            text = "".join(lines)
        else:       # another value for a key
            k = rng.randrange(len(lines))
            lines[k] = re.sub(r": .*", lambda _: f": {rng.choice(TOKENS)}", lines[k])
            text = "".join(lines)
    return text


def test_no_text_raises_anything_but_a_config_error(tmp_path):
    """Thousands of damaged files: each is a configuration whose values have their types, or a ConfigError."""
    base = TEXT.split("# ---- variants")[0]
    base = "\n".join(line.split("  #")[0].rstrip() for line in base.splitlines() if line.strip())       # short is fast
    path, rng, end = tmp_path / "my.cfg", random.Random(0), time.monotonic() + 8
    loaded, refusals = 0, set()
    for _ in range(3000):
        path.write_text(mutated(base, rng), encoding="utf-8", errors="replace")
        try:
            config = load_config(rng.choice(("DEFAULT", "nicv2_79")), path)
            config.check_layers(LAYER_NAMES)
            assert all(isinstance(getattr(config, f.name), f.type) for f in fields(config))
            loaded += 1
        except ConfigError as error:
            refusals.add(str(error))
        if time.monotonic() > end:
            break
    assert loaded > 5 and len(refusals) > 50
