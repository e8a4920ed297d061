"""The configuration: a YAML file of experiments, each section inheriting from DEFAULT, checked before anything runs.

    config = load_config("ar1star", overrides={"rm_sz": 500})

Every key must exist, keep its type and hold a possible value; a misspelt one is answered with the nearest that exists.

Uses models.split_net (for check_layers alone), yaml.
"""
import difflib
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, fields

import yaml


class ConfigError(ValueError):
    """A configuration that cannot run: what is wrong and what to write instead, in one sentence."""
    exit_status = 2


@dataclass(frozen=True)
class Config:
    """The settings of one experiment; params.cfg says what each means, with its unit, and holds the defaults."""
    comment: str
    # data
    dataset: str
    data: str
    scenario: str
    run: int
    start_batch: int
    cumulative: bool
    preload: bool
    download: bool
    test_stride: int
    image_size: int
    # network
    model: str
    weights: str
    width: float
    latent_layer_num: int | str
    freeze_below_layer: int | str
    inc_freeze_below_layer: int | str
    # training
    mb_size: int
    init_lr: float
    inc_lr: float
    init_train_ep: int
    inc_train_ep: int
    patience: int
    momentum: float
    l2: float
    head_lr_mult: float
    inc_convs: str
    # batch renormalization
    init_update_rate: float
    inc_update_rate: float
    max_r_max: float
    max_d_max: float
    inc_step: float
    # method
    method: str
    rm_sz: int
    rm_mb: float
    rm_dtype: str
    pq_codes: int
    rm_policy: str
    replayed_per_epoch: int
    cwr_consolidation: str
    si: str
    si_c: float
    reg_lambda: float
    reg_clip_negative: bool
    slda_weight: float
    slda_layer: int | str
    slda_root: bool
    slda_shrinkage: float
    follow: str
    # the machine
    seed: int
    device: str
    fast: bool
    matmul_precision: str
    max_latents_gb: float
    checkpoint_share: float

    CHOICES = {"method": ("latent_replay", "slda", "ncm"),
               "dataset": ("core50", "folder", "demo"), "cwr_consolidation": ("per_class", "per_pattern", "none"),
               "si": ("penalty", "learning_rate"), "inc_convs": ("all", "pointwise"),
               "matmul_precision": ("highest", "high", "medium", "low"),
               "rm_dtype": ("float32", "float16", "uint8", "pq"), "rm_policy": ("random", "balanced"),
               "scenario": ("ni", "nc", "nic", "nicv2_79", "nicv2_196", "nicv2_391")}
    # (smallest, largest) value allowed, both included
    LIMITS = {"run": (0, 9), "start_batch": (0, math.inf), "test_stride": (1, math.inf), "image_size": (32, 1024),
              "width": (0.01, 4), "mb_size": (2, math.inf),
              "init_lr": (0, math.inf), "inc_lr": (0, math.inf), "init_train_ep": (1, math.inf),
              "inc_train_ep": (1, math.inf), "patience": (0, math.inf), "momentum": (0, 1),
              "l2": (0, math.inf), "head_lr_mult": (0, math.inf),
              "si_c": (0, math.inf), "init_update_rate": (0, 1),
              "inc_update_rate": (0, 1), "max_r_max": (1, math.inf), "max_d_max": (0, math.inf),
              "inc_step": (0, math.inf), "rm_sz": (0, math.inf), "rm_mb": (0, math.inf), "pq_codes": (1, math.inf),
              "replayed_per_epoch": (0, math.inf), "slda_weight": (0, math.inf), "slda_shrinkage": (0, 1),
              "reg_lambda": (0, math.inf), "seed": (0, 2**63 - 1),
              "max_latents_gb": (0, math.inf), "checkpoint_share": (0.001, 1)}
    # what may change between the interruption of a run and its continuation
    FREE = ("comment", "data", "preload", "download", "device", "max_latents_gb", "checkpoint_share")

    TRAINING = ("mb_size", "init_lr", "inc_lr", "init_train_ep", "inc_train_ep", "momentum", "l2", "init_update_rate",
                "inc_update_rate", "max_r_max", "max_d_max", "inc_step", "cwr_consolidation", "reg_lambda", "fast", "si",
                "si_c", "patience", "head_lr_mult", "inc_convs", "follow", "freeze_below_layer", "inc_freeze_below_layer",
                "rm_mb", "rm_dtype", "pq_codes", "rm_policy", "replayed_per_epoch", "slda_weight", "slda_layer")
    # keys that mean nothing with a value of another key: refused where they differ from DEFAULT's (see load_config)
    IDLE = {("dataset", "demo"): ("data", "scenario", "preload", "download", "image_size"),
            ("dataset", "folder"): ("scenario", "run", "preload", "download"),
            ("dataset", "core50"): ("image_size",),
            ("reg_lambda", 0.0): ("reg_clip_negative",),
            ("si", "learning_rate"): ("reg_lambda", "reg_clip_negative"),
            ("method", "slda"): TRAINING, ("method", "ncm"): (*TRAINING, "slda_shrinkage")}
    # what runs did that were made before a setting existed
    SINCE = {"method": "latent_replay", "head_lr_mult": 1.0, "inc_convs": "all", "si": "penalty", "si_c": 1.0, "patience": 0,
             "follow": "pytorch_program", "rm_mb": 0.0, "rm_dtype": "float32", "pq_codes": 32, "rm_policy": "random",
             "replayed_per_epoch": 0, "slda_weight": 0.0, "slda_layer": "last", "slda_root": False,
             "slda_shrinkage": 1e-4}
    PARTS = ("ramp", "averages", "moving", "minibatches", "bias", "decay", "counts")      # of `follow`

    def __post_init__(self):
        set_value = lambda name, value: object.__setattr__(self, name, value)
        for name in ("freeze_below_layer", "inc_freeze_below_layer"):
            if getattr(self, name) == "latent":
                set_value(name, self.latent_layer_num)
        for name in ("data", "weights"):
            if isinstance(getattr(self, name), str):
                set_value(name, os.path.expanduser(getattr(self, name)))
        if self.test_stride == "auto":
            set_value("test_stride", 20 if self.dataset == "core50" else 1)
        problems = []
        for field in fields(self):
            try:
                set_value(field.name, _typed(field.name, getattr(self, field.name), field.type))
                self._check_range(field.name)
            except ConfigError as error:
                problems.append(str(error))
        if not problems and not self.parts() <= set(self.PARTS):
            problems.append(f"follow is {self.follow!r}; it can be 'pytorch_program', 'papers' or some of "
                            f"{', '.join(self.PARTS)}, separated by commas")
        if not problems and self.patience and (self.si == "learning_rate" or self.reg_lambda > 0):
            problems.append(f"patience is {self.patience}, but Synaptic Intelligence counts whole batches: set it to 0")
        if not problems and "minibatches" in self.parts() and self.rm_policy != "random":
            problems.append(f"rm_policy is {self.rm_policy}, but follow {self.follow} has a rule of its own: set it to "
                            "random")
        if not problems and "moving" in self.parts() and self.rm_dtype != "float32":
            problems.append(f"rm_dtype is {self.rm_dtype}, but with follow {self.follow} latents change until they are "
                            "stored: set it to float32")
        if not problems and self.matmul_precision == "low" and self.model != "mobilenet_v1":
            problems.append(f"matmul_precision is low, which is of mobilenet_v1 alone: set it to medium for {self.model}")
        if not problems and self.method != "latent_replay" and self.rm_sz > 0:
            problems.append(f"rm_sz is {self.rm_sz}, but method {self.method} keeps no memory: set it to 0")
        if problems:
            raise ConfigError("; ".join(problems))

    def replays(self):
        """Whether there is a replay memory."""
        return self.rm_sz > 0 or self.rm_mb > 0

    def idle(self):
        """{key: why}: the keys that mean nothing with the values of others."""
        idle = {key: f"with {other} {value}" for (other, value), keys in self.IDLE.items()
                if getattr(self, other) == value for key in keys}
        if self.si == "penalty" and self.reg_lambda == 0:
            idle["si_c"] = "with reg_lambda 0.0"
        if self.method == "latent_replay" and self.slda_weight == 0:
            idle |= dict.fromkeys(("slda_layer", "slda_root", "slda_shrinkage"), "with slda_weight 0.0")
        if self.rm_dtype != "pq":
            idle["pq_codes"] = f"with rm_dtype {self.rm_dtype}"
        if self.rm_mb == 0 and 0 < self.rm_sz <= self.replayed_per_epoch:
            idle["replayed_per_epoch"] = f"with rm_sz {self.rm_sz}"
        if not self.replays():
            idle |= dict.fromkeys(("rm_dtype", "pq_codes", "rm_policy", "replayed_per_epoch"), "without a replay memory")
        if "ramp" in self.parts():
            idle["inc_step"] = f"with follow {self.follow}"
        return idle

    def parts(self):
        """The names among PARTS of what is done as in the papers' program."""
        named = {part.strip() for part in self.follow.split(",")}
        return set(self.PARTS) if named == {"papers"} else named - {"pytorch_program"}

    def _check_range(self, name):
        value, choices = getattr(self, name), self.CHOICES.get(name)
        low, high = self.LIMITS.get(name, (None, None))
        if choices and value not in choices:
            raise ConfigError(f"{name} is {value!r}; it can be {_either(choices)}")
        if low is not None and not low <= value <= high:
            bound = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise ConfigError(f"{name} is {value!r}; it must be {bound}")

    def check_layers(self, names):
        """Numbers of the latent layer and of the layers frozen in batch 0 and after it, for a network's layer names."""
        from models.split_net import LayerError, layer_number  # not above: it brings torch, which settings do without

        numbers = []
        for key in ("latent_layer_num", "freeze_below_layer", "inc_freeze_below_layer"):
            try:
                numbers.append(layer_number(names, getattr(self, key)))
            except LayerError as error:
                raise ConfigError(f"{key}: {error}; --list-layers shows them all") from error
        latent, first, later = numbers
        if first > later:
            raise ConfigError(f"freeze_below_layer {self.freeze_below_layer!r} lies above inc_freeze_below_layer "
                              f"{self.inc_freeze_below_layer!r}, and what is frozen in batch 0 stays frozen: set it to that "
                              "layer, a lower one, or images (nothing is frozen in batch 0)")
        if self.replays() and later < latent:
            raise ConfigError(f"inc_freeze_below_layer {self.inc_freeze_below_layer!r} lies below latent_layer_num "
                              f"{self.latent_layer_num!r}, so the replayed latents would age: freeze up to the latent "
                              "layer or replay a lower one")
        return latent, first, later


def _either(choices):
    return f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}" if len(choices) > 1 else repr(choices[0])


def _typed(name, value, kind):
    """The value in the type that the key wants; whole numbers may stand for decimals, and '5e-5' (text to YAML) too."""
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float and not good and isinstance(value, (int, str)) and not isinstance(value, bool):
        with suppress(OverflowError):
            if isinstance(value, int) or DECIMAL.match(value) or value.lower().lstrip("+-") in ("nan", "inf"):
                value, good = float(value), True
    if not good:
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(
            kind, "a layer's number or name")
        raise ConfigError(f"{name} is {value!r}; it must be {wanted}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; it must be a finite number")
    return value


class _Loader(yaml.SafeLoader):
    """YAML without its traps: whole numbers are decimal (YAML 1.1 takes 010 for 8 and 1:30 for 90), a key stands once, and
    a mapping takes over one other at most (of several, PyYAML 6.0.4 lets the last one count, other versions the first)."""

    def compose_mapping_node(self, anchor):
        """A mapping, checked for keys that stand in it twice and for what it takes over."""
        node, lines = super().compose_mapping_node(anchor), {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                raise ConfigError(f"{name[:80]!r} stands twice, in lines {lines[name]} and {line}")
            if name == "<<" and isinstance(value, yaml.SequenceNode):
                raise ConfigError(f"line {line} takes over a list of sections, and which of them counts depends on PyYAML's "
                                  "version; take over one, and write down what differs")
            lines[name] = line
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
WHOLE, DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)$"), re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", WHOLE, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(
    rf"(?=.*\.){DECIMAL.pattern}|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"), list("-+0123456789."))


def read_yaml(text):
    """What a text or an open file says in YAML. Raises yaml.YAMLError, ValueError, ConfigError and other errors."""
    return yaml.load(text, _Loader)


def read_experiments(path="params.cfg"):
    """{name: {key: value}} of all the sections of a configuration file, each completed from its DEFAULT section."""
    try:
        with open(path, encoding="utf-8") as file:
            sections = read_yaml(file)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}; give its path with --config FILE") from None
    except (OSError, yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the configuration file {path} cannot be read as YAML: {reason}") from error
    if not isinstance(sections, dict) or not all(isinstance(s, dict) for s in sections.values()):
        raise ConfigError(f"{path} must hold sections, each with lines 'key: value'")
    if "DEFAULT" not in sections:
        raise ConfigError(f"{path} has no DEFAULT section, from which all the others inherit")
    keys = [f.name for f in fields(Config)]
    for name, section in sections.items():
        for key in section:
            if key not in keys:
                raise ConfigError(f"unknown key {key!r} in section {name!r} of {path}{_nearest(key, keys)}")
    missing = [key for key in keys if key not in sections["DEFAULT"]]
    if missing:
        raise ConfigError(f"the DEFAULT section of {path} lacks {', '.join(missing)}")
    return {str(name): sections["DEFAULT"] | section for name, section in sections.items()}


def load_config(name="DEFAULT", path="params.cfg", overrides=None):
    """The Config of one experiment. overrides: {key: value}, as given on the command line, go over the file's values."""
    return config_of(read_experiments(path), name, overrides)


def config_of(experiments, name, overrides=None):
    """As load_config, of what read_experiments returned."""
    if name not in experiments:
        raise ConfigError(f"unknown experiment {name!r}{_nearest(name, experiments)}; --list shows them all")
    unknown = [key for key in overrides or {} if key not in experiments[name]]
    if unknown:
        raise ConfigError("; ".join(f"unknown key {key!r}{_nearest(key, experiments[name])}" for key in unknown))
    default, settings = experiments["DEFAULT"], experiments[name] | (overrides or {})
    config = Config(**settings)
    of_the_section = [key for key in config.idle() if settings[key] != default[key] and key not in (overrides or {})]
    if overrides and of_the_section and not set(of_the_section) & Config(**experiments[name]).idle().keys():
        settings |= {key: default[key] for key in of_the_section}      # an override took their meaning away
        config = Config(**settings)
    idle = [f"{key} ({why})" for key, why in config.idle().items() if settings[key] != default[key]]
    if "width" in (overrides or {}) and config.model != "mobilenet_v1":     # a section may have it: its model was changed
        idle.append(f"width (with model {config.model})")
    if idle:
        raise ConfigError(f"these settings would do nothing: {', '.join(idle)}; leave them out")
    return config


def _nearest(word, words):
    near = difflib.get_close_matches(str(word), [str(w) for w in words], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
