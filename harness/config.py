"""The configuration: experiments in YAML, sections that inherit from each other, checked before a run.

    config = load_config("ar1star", overrides={"rm_sz": 500})

Every key must exist, keep its type and hold a possible value; the error of a misspelt one names the nearest.
"""
import difflib
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

PARAMS = Path(__file__).parents[1] / "params.cfg"


class ConfigError(ValueError):
    """A configuration that cannot run: what is wrong and what to write instead, in one sentence."""
    exit_status = 2


# ---- the table of keys ----

def key(choices=None, low=None, high=math.inf, needs=(), may_change=False):
    """A key of Config, with its possible values (choices), or the smallest (low) and the largest (high).

    needs: pairs of another key and a condition; unless all of them hold, the key means nothing.
    may_change: whether the continuation of an interrupted run may have another value.
    """
    metadata = {"choices": choices, "low": low, "high": high, "needs": needs, "may_change": may_change}
    return field(metadata=metadata)


CORE50 = ("dataset", lambda config: config.dataset == "core50")
FETCHED = ("dataset", lambda config: config.dataset not in ("folder", "demo"))
TORCHVISION = ("dataset", lambda config: config.dataset not in ("core50", "folder", "demo"))
WHOLE_CLASSES = ("units", lambda config: config.units == 0)
FILES = ("dataset", lambda config: config.dataset != "demo")
ORDERS = ("dataset", lambda config: config.dataset != "folder")
SGD = ("method", lambda config: config.method == "latent_replay")
COVARIANCE = ("method", lambda config: config.method != "ncm")
SLDA = ("slda_weight", lambda config: config.slda_weight > 0 or config.method != "latent_replay")
REPLAY = ("rm_sz", lambda config: config.replays())
PART = ("rm_sz", lambda config: config.rm_mb > 0 or config.replayed_per_epoch < config.rm_sz)
CODES = ("rm_dtype", lambda config: config.rm_dtype == "pq")
PENALTY = ("si", lambda config: config.si == "penalty")
STRENGTH = ("reg_lambda", lambda config: config.reg_lambda > 0)
IMPORTANCES = ("reg_lambda", lambda config: config.reg_lambda > 0 or config.si == "learning_rate")
LINEAR = ("follow", lambda config: "ramp" not in config.parts())        # growth of the limits of BRN


@dataclass(frozen=True)
class Config:
    """The settings of one experiment; params.cfg says what each means and holds the defaults."""
    comment: str = key(may_change=True)
    # data
    dataset: str = key()        # streams/torchvision_data.py knows which names there are
    data: str = key(needs=[FILES], may_change=True)
    scenario: str = key(choices=("ni", "nc", "nic", "nicv2_79", "nicv2_196", "nicv2_391"), needs=[CORE50])
    run: int = key(low=0, high=9, needs=[ORDERS])
    batches: int = key(low=1, needs=[TORCHVISION, WHOLE_CLASSES])
    units: int = key(low=0, needs=[TORCHVISION])
    held_out: float = key(low=0, high=0.9, needs=[TORCHVISION])
    start_batch: int = key(low=0)
    cumulative: bool = key()
    preload: bool = key(needs=[CORE50], may_change=True)
    download: bool = key(needs=[FETCHED], may_change=True)
    test_stride: int = key(low=1)
    image_size: int = key(low=32, high=1024, needs=[FILES])
    mirror: bool = key()
    # network
    model: str = key()
    weights: str = key()
    width: float = key(low=0.01, high=4)
    latent_layer_num: int | str = key()
    freeze_below_layer: int | str = key(needs=[SGD])
    inc_freeze_below_layer: int | str = key(needs=[SGD])
    # training
    mb_size: int = key(low=2, needs=[SGD])
    init_lr: float = key(low=0, needs=[SGD])
    inc_lr: float = key(low=0, needs=[SGD])
    init_train_ep: int = key(low=1, needs=[SGD])
    inc_train_ep: int = key(low=1, needs=[SGD])
    patience: int = key(low=0, needs=[SGD])
    momentum: float = key(low=0, high=1, needs=[SGD])
    l2: float = key(low=0, needs=[SGD])
    head_lr_mult: float = key(low=0, needs=[SGD])
    inc_convs: str = key(choices=("all", "pointwise"), needs=[SGD])
    # Batch Renormalization
    init_update_rate: float = key(low=0, high=1, needs=[SGD])
    inc_update_rate: float = key(low=0, high=1, needs=[SGD])
    max_r_max: float = key(low=1, needs=[SGD])
    max_d_max: float = key(low=0, needs=[SGD])
    inc_step: float = key(low=0, needs=[SGD, LINEAR])
    # method
    method: str = key(choices=("latent_replay", "slda", "ncm"))
    rm_sz: int = key(low=0)
    rm_mb: float = key(low=0, needs=[SGD])
    rm_dtype: str = key(choices=("float32", "float16", "uint8", "pq"), needs=[SGD, REPLAY])
    pq_codes: int = key(low=1, needs=[SGD, REPLAY, CODES])
    rm_policy: str = key(choices=("random", "balanced", "even"), needs=[SGD, REPLAY])
    replayed_per_epoch: int = key(low=0, needs=[SGD, REPLAY, PART])
    cwr_consolidation: str = key(choices=("per_class", "per_pattern", "none"), needs=[SGD])
    si: str = key(choices=("penalty", "learning_rate"), needs=[SGD])
    si_c: float = key(low=0, needs=[SGD, IMPORTANCES])
    reg_lambda: float = key(low=0, needs=[SGD, PENALTY])
    reg_clip_negative: bool = key(needs=[SGD, PENALTY, STRENGTH])
    slda_weight: float = key(low=0, needs=[SGD])
    slda_layer: int | str = key(needs=[SGD, SLDA])
    slda_centre: bool = key(needs=[SGD, SLDA])
    slda_root: bool = key(needs=[SLDA])
    slda_shrinkage: float = key(low=0, high=1, needs=[COVARIANCE, SLDA])
    slda_temperature: float = key(low=0.01, needs=[SGD, SLDA])
    follow: str = key(needs=[SGD])
    # the machine
    seed: int = key(low=0, high=2**63 - 1)
    device: str = key(may_change=True)
    fast: bool = key(needs=[SGD])
    matmul_precision: str = key(choices=("highest", "high", "medium", "low"))
    precision: str = key(choices=("float32", "bf16"), needs=[SGD])
    max_latents_gb: float = key(low=0, may_change=True)
    checkpoint_share: float = key(low=0.001, high=1, may_change=True)

    PARTS = ("ramp", "averages", "moving", "minibatches", "bias", "decay", "counts")      # of `follow`

    def __post_init__(self):
        values = {column.name: getattr(self, column.name) for column in fields(self)}
        for name in ("freeze_below_layer", "inc_freeze_below_layer"):
            if values[name] == "latent":
                values[name] = self.latent_layer_num
        for name in ("data", "weights"):
            if isinstance(values[name], str):
                values[name] = os.path.expanduser(values[name])
        if isinstance(self.dataset, str):
            values["dataset"] = self.dataset.lower()
        if self.test_stride == "auto":
            values["test_stride"] = 20 if values["dataset"] == "core50" else 1

        problems = []
        for column in fields(self):
            try:
                value = _checked(column, values[column.name])
                object.__setattr__(self, column.name, value)
            except ConfigError as error:
                problems.append(str(error))
        if not problems:        # else the values may not even have their types
            problems = list(self._contradictions())
        if problems:
            raise ConfigError("; ".join(problems))

    def _contradictions(self):
        """Sentences on values of which each is possible, but not together."""
        parts = self.parts()
        if not parts <= set(self.PARTS):
            known = ",".join(self.PARTS)
            yield f"follow is {self.follow!r}; it can be pytorch_program, papers or some of {known}"
        if self.patience and (self.si == "learning_rate" or self.reg_lambda > 0):
            yield f"patience is {self.patience}, but Synaptic Intelligence counts whole batches: set it to 0"
        if "minibatches" in parts and self.rm_policy != "random":
            yield f"rm_policy is {self.rm_policy}, but follow {self.follow} has another: set it to random"
        if "moving" in parts and self.rm_dtype != "float32":
            yield f"rm_dtype is {self.rm_dtype}, but follow {self.follow} changes latents: set it to float32"
        if self.matmul_precision == "low" and self.model != "mobilenet_v1":
            yield f"matmul_precision low is of mobilenet_v1 alone: set it to medium for {self.model}"
        if self.method != "latent_replay" and self.rm_sz > 0:
            yield f"rm_sz is {self.rm_sz}, but method {self.method} keeps no memory: set it to 0"

    def replays(self):
        """Whether there is a replay memory."""
        return self.rm_sz > 0 or self.rm_mb > 0

    def parts(self):
        """The names among PARTS of what is done as in the papers' program."""
        named = {part.strip() for part in self.follow.split(",")}
        return set(self.PARTS) if named == {"papers"} else named - {"pytorch_program"}

    def idle(self):
        """{key: why}: the keys that mean nothing with the values of others."""
        idle = {}
        for column in fields(self):
            for other, holds in column.metadata["needs"]:
                if not holds(self):
                    idle.setdefault(column.name, f"with {other} {getattr(self, other)}")
        return idle

    def needs_variants(self):
        """Whether it takes more than the script builds by itself: see harness/variants.py."""
        published = {
            "method": "latent_replay", "follow": "pytorch_program", "si": "penalty", "patience": 0,
            "rm_dtype": "float32", "rm_mb": 0, "rm_policy": "random", "replayed_per_epoch": 0,
            "slda_weight": 0}
        return any(getattr(self, name) != value for name, value in published.items())

    def check_layers(self, names):
        """Numbers of the latent layer and of the last layers frozen in batch 0 and after it.

        names: the network's layer names, bottom up. Raises ConfigError for a layer that is not among them.
        """
        # not above: it brings torch, which settings do without
        from models.split_net import LayerError, layer_number

        numbers = []
        for name in ("latent_layer_num", "freeze_below_layer", "inc_freeze_below_layer"):
            try:
                numbers.append(layer_number(names, getattr(self, name)))
            except LayerError as error:
                raise ConfigError(f"{name}: {error}; --list-layers shows them all") from error
        latent, first, later = numbers

        frozen_later = f"inc_freeze_below_layer {self.inc_freeze_below_layer!r}"
        if first > later:
            raise ConfigError(
                f"freeze_below_layer {self.freeze_below_layer!r} lies above {frozen_later}, and what is "
                "frozen in batch 0 stays frozen: set it to that layer, a lower one, or images (none frozen)")
        if self.replays() and later < latent:
            raise ConfigError(
                f"{frozen_later} lies below latent_layer_num {self.latent_layer_num!r}, so replayed latents "
                "would age: freeze up to the latent layer or replay a lower one")
        return latent, first, later


Config.MAY_CHANGE = tuple(column.name for column in fields(Config) if column.metadata["may_change"])


def _checked(column, value):
    """A value of a key in the key's type. Raises ConfigError if it has another one, or is not possible."""
    name = column.name
    kind = column.type
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    is_text = isinstance(value, str) and DECIMAL.match(value)       # YAML reads 5e-5 as text
    if kind is float and (is_whole or is_text):
        with suppress(OverflowError):
            value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        types = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        wanted = types.get(kind, "a layer's number or name")
        raise ConfigError(f"{name} is {value!r}; it must be {wanted}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; it must be a finite number")

    choices, low, high = (column.metadata[rule] for rule in ("choices", "low", "high"))
    if choices and value not in choices:
        raise ConfigError(f"{name} is {value!r}; it can be {', '.join(choices[:-1])} or {choices[-1]}")
    if low is not None and not low <= value <= high:
        bound = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ConfigError(f"{name} is {value!r}; it must be {bound}")
    return value


# ---- YAML without its traps ----

WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
DECIMAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$")
FLOAT = re.compile(rf"(?=.*\.){DECIMAL.pattern}|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
INT_TAG = "tag:yaml.org,2002:int"
FLOAT_TAG = "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """Whole numbers are decimal (YAML 1.1 reads 010 as 8 and 1:30 as 90), and no key stands twice."""
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (INT_TAG, FLOAT_TAG)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def compose_mapping_node(self, anchor):
        """A mapping, checked for keys that stand in it twice and for YAML's own way of inheriting."""
        node = super().compose_mapping_node(anchor)
        lines = {}
        for written, _ in node.value:
            name = str(written.value)
            line = written.start_mark.line + 1
            if name == "<<":
                raise ConfigError(f"line {line} inherits by <<: write like: NAME, the name of a section")
            if name in lines:
                raise ConfigError(f"{name[:80]!r} stands twice, in lines {lines[name]} and {line}")
            lines[name] = line
        return node


_Loader.add_implicit_resolver(INT_TAG, WHOLE, list("-+0123456789"))
_Loader.add_implicit_resolver(FLOAT_TAG, FLOAT, list("-+0123456789."))


def read_yaml(text):
    """What a text or an open file says. Raises yaml.YAMLError, ValueError, ConfigError and other errors."""
    return yaml.load(text, _Loader)


# ---- files and their sections ----

def read_experiments(path=PARAMS):
    """{name: {key: value}}: the sections of a file and experiments/*.cfg beside it, inheritance done."""
    sections, _ = _read_files(path)
    return {name: _completed(name, sections) for name in sections}


def list_experiments(path=PARAMS):
    """[(file name, [(section, comment), ...]), ...] of the same sections."""
    sections, file_of = _read_files(path)
    listed = {}
    for name, file in file_of.items():
        file_name = file.relative_to(Path(path).parent).as_posix()
        listed.setdefault(file_name, []).append((name, _completed(name, sections)["comment"]))
    return list(listed.items())


def _read_files(path):
    """{name: {key: value}} as the sections say it, and {name: Path of its file}."""
    path = Path(path)
    keys = [column.name for column in fields(Config)]
    sections = {}
    file_of = {}
    for file in (path, *sorted(path.parent.glob("experiments/*.cfg"))):
        for name, section in _read_sections(file).items():
            if name in sections:
                raise ConfigError(f"section {name!r} stands in {file_of[name]} and in {file}: rename one")
            unknown = [word for word in section if word not in keys and word != "like"]
            if unknown:
                near = _nearest(unknown[0], keys)
                raise ConfigError(f"unknown key {unknown[0]!r} in section {name!r} of {file}{near}")
            sections[name] = section
            file_of[name] = file
        if "DEFAULT" not in sections:       # which only the first file can hold
            raise ConfigError(f"{file} has no DEFAULT section, from which all the others inherit")

    missing = [name for name in keys if name not in sections["DEFAULT"]]
    if missing:
        raise ConfigError(f"the DEFAULT section of {path} lacks {', '.join(missing)}")
    return sections, file_of


def _read_sections(path):
    try:
        with open(path, encoding="utf-8") as file:
            sections = read_yaml(file)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}; give one with --config FILE") from None
    except (OSError, yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the configuration file {path} cannot be read as YAML: {reason}") from error
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise ConfigError(f"{path} must hold sections, each with lines 'key: value'")
    return {str(name): section for name, section in sections.items()}


def _completed(name, sections):
    """{key: value} of a section with what it inherits: `like` names the next section, DEFAULT is the last."""
    ancestors = [name]
    while ancestors[-1] != "DEFAULT" or "like" in sections["DEFAULT"]:
        heir = ancestors[-1]
        like = str(sections[heir].get("like", "DEFAULT"))
        if like not in sections:
            raise ConfigError(f"section {heir!r} is like {like!r}, an unknown one{_nearest(like, sections)}")
        if like in ancestors:
            circle = " is like ".join([*ancestors, like])
            raise ConfigError(f"a section cannot inherit from itself: {circle}")
        ancestors.append(like)

    settings = {}
    for ancestor in reversed(ancestors):
        settings |= sections[ancestor]
    settings.pop("like", None)
    return settings


# ---- one experiment ----

def load_config(name="DEFAULT", path=PARAMS, overrides=None):
    """The Config of one experiment. overrides: {key: value}, the command line's, which go over the file's."""
    return config_of(read_experiments(path), name, overrides)


def config_of(experiments, name, overrides=None):
    """As load_config, of what read_experiments returned."""
    overrides = overrides or {}
    if name not in experiments:
        raise ConfigError(f"unknown experiment {name!r}{_nearest(name, experiments)}; --list shows them all")
    section = experiments[name]
    default = experiments["DEFAULT"]
    unknown = [word for word in overrides if word not in default]
    if unknown:
        nearest = "; ".join(f"unknown key {word!r}{_nearest(word, default)}" for word in unknown)
        raise ConfigError(f"{nearest}; params.cfg explains all keys")

    settings = section | overrides
    config = Config(**settings)
    if config.dataset == "core50" and "dataset" not in overrides and holds_own_images(config.data):
        more = {"dataset": "folder"}
        if config.method != "latent_replay":    # what these keep does not grow with the image
            more["image_size"] = experiments.get("folder", default)["image_size"]
        if "data" in overrides:     # the section's test_stride is for data of its own
            more["test_stride"] = default["test_stride"]
        overrides = more | overrides
        settings = section | overrides
        config = Config(**settings)
    idle = {name: why for name, why in config.idle().items() if settings[name] != default[name]}
    of_section = idle.keys() - overrides.keys()
    if overrides and of_section and not of_section & Config(**section).idle().keys():
        # An override took their meaning away: who wrote it did not write them, and cannot leave them out.
        settings |= {name: default[name] for name in of_section}
        config = Config(**settings)
        idle = {name: why for name, why in idle.items() if name in overrides}
    if "width" in overrides and config.model != "mobilenet_v1":     # a section's may be for another model
        idle["width"] = f"with model {config.model}"
    if idle:
        without_effect = ", ".join(f"{name} ({why})" for name, why in idle.items())
        raise ConfigError(f"these settings would do nothing: {without_effect}; leave them out")
    return config


def holds_own_images(data):
    """Whether a folder of data says itself that it is one of own images: by train/, and nothing of CORe50."""
    return (os.path.isdir(os.path.join(data, "train"))
            and not os.path.exists(os.path.join(data, "paths.pkl")))


def _nearest(word, words):
    words = [str(w) for w in words]
    near = [w for w in words if str(word) in w.split("_")][:4]     # lr: init_lr, inc_lr, head_lr_mult
    near = near or difflib.get_close_matches(str(word), words, n=1)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
