"""`edge-ilseg.toml`: what a workspace is about. Parsed once, strictly; what is parsed is trusted from then on.

1. An unknown key, or an unknown word where a few are allowed, is an error that names it, its place and the nearest
   known one.
2. Every value has a default but the data set and the base classes; a file that this program writes shows every value
   that is set, whether it is the default or not.
3. What training would refuse of the settings alone (method, cut point, loss weights, range of scales) is refused here,
   and when an option changes a setting.
4. A relative `root` of the data set is taken from the workspace's folder, wherever the command is run.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from edge_ilseg import methods
from edge_ilseg.data.transforms import Augmentation, check_augmentation
from edge_ilseg.errors import ConfigError, choice_hint
from edge_ilseg.files import disk_error
from edge_ilseg.methods import SWITCHES, Method, resolve_method
from edge_ilseg.models.freezing import parse_freeze
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.scenario import Setup

CONFIG_NAME = "edge-ilseg.toml"
CONFIG_VERSION = 1

Positive = Annotated[int, Meta(ge=1)]
PositiveFloat = Annotated[float, Meta(gt=0)]
DataOptions = dict[str, int | float | str | bool | list[str]]
"""Options of a data set by name, as plain values; `edge_ilseg.data.option_types` says which there are."""


Geometry = Literal["stretch", "native"]
FeatureDtype = Literal["float32", "float16", "int8"]


class DataConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where images and masks are, and what a step may see of them."""

    kind: str
    root: str | None = None
    train_split: str = "train"
    eval_split: str = "val"
    setup: Setup = "sequential"
    partition_seed: Annotated[int, Meta(ge=0)] = 0
    """Of the setup `partitioned`, which draws with it; a plan must have one seed in all its steps."""
    options: DataOptions = {}


class ClassesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The classes of step 0, in channel order; a data set's background is added in front."""

    base: tuple[str, ...]


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a network is trained. Optimiser and schedule start anew at each step.

    SGD with momentum, weight decay on convolution weights alone, and a polynomial schedule from `learning_rate` to
    `learning_rate_end` (arXiv 1907.13372, section 5); the decoder's rate is `decoder_rate_factor` times as high. The
    defaults were chosen on MSRC-v2's validation split (docs/log.md).
    """

    iterations: Annotated[int, Meta(ge=0)] = 1500
    """0 in the record of a step whose head was solved for, and nowhere else."""
    batch_size: Positive = 8
    learning_rate: PositiveFloat = 0.01
    learning_rate_end: Annotated[float, Meta(ge=0)] = 1e-6
    decoder_rate_factor: PositiveFloat = 10.0
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Meta(ge=0)] = 1e-4
    schedule_power: PositiveFloat = 0.9
    batch_norm: Literal["train", "eval"] = "train"
    scale_min: PositiveFloat = 0.5
    scale_max: PositiveFloat = 1.5
    flip: bool = True
    geometry: Geometry = "stretch"
    """`stretch`: as the device sees an image (docs/adr/0002); `native`: crops of the image in its own size, and scores
    of whole images, as in the literature."""
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    seed: Annotated[int, Meta(ge=0)] = 0
    augment_views: Annotated[int, Meta(ge=0)] = 0
    """Augmented views of each image that are shown again and again, with their features cached, under a frozen encoder;
    0: every sample is a new view. See `edge_ilseg.feature_cache`."""
    feature_cache_dtype: FeatureDtype = "float16"
    feature_cache_mib: Positive = 4096
    statistics: bool = True
    """Leave `statistics.safetensors` beside the weights where it holds, so that a later step can be `analytic`."""


class StepConfig(TrainConfig, frozen=True, forbid_unknown_fields=True):
    """How an incremental step is trained: `TrainConfig` with a method. Batch norm keeps the teacher's statistics.

    What is None is as the method's preset has it (`edge_ilseg.methods`).
    """

    iterations: Positive = 600
    learning_rate: PositiveFloat = 0.0005
    decoder_rate_factor: PositiveFloat = 100.0
    batch_norm: Literal["train", "eval"] = "eval"
    method: str = "freeze+kd-output"
    freeze: str | None = None
    losses: dict[str, float] = {}
    cross_entropy: methods.CrossEntropy | None = None
    logit_adjustment: methods.AdjustmentFactor | None = None
    smallest_frequency: methods.Share | None = None
    new_share: methods.Share | None = None
    pseudo_labels: methods.PseudoLabels | None = None
    kd_softmax: methods.Softmax | None = None
    kd_mask: methods.Mask | None = None
    kd_classes: methods.OverClasses | None = None
    kd_temperature: methods.Factor | None = None
    kd_alpha: methods.Factor | None = None
    similarity_layer: methods.SimilarityLayer | None = None
    similarity_pooling: methods.SimilarityPooling | None = None
    head_init: methods.HeadInit | None = None
    head_fit: methods.HeadFit | None = None
    ridge: methods.Factor | None = None
    balance: methods.ShareOrNone | None = None


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    data: DataConfig
    classes: ClassesConfig
    model: ModelSpec = ModelSpec()
    weights: str = "imagenet"
    train: TrainConfig = TrainConfig()
    step: StepConfig = StepConfig()
    format_version: int = CONFIG_VERSION


def default_weights(backbone: str) -> str:
    """Where an encoder's first weights come from unless told: `imagenet` where a package has them, else `none`."""
    return "imagenet" if backbone.startswith("efficientnet") else "none"


def _check_table(table: dict[str, Any], struct: type[msgspec.Struct], where: str) -> None:
    """Refuse keys and words that `struct` does not have, down through nested tables (rule 1)."""
    hints = get_type_hints(struct)
    for key, value in table.items():
        if key not in struct.__struct_fields__:
            raise ConfigError(
                "unknown key",
                where=where,
                found=repr(key),
                expected=", ".join(struct.__struct_fields__),
                hint=choice_hint(key, struct.__struct_fields__),
            )
        _check_choice(value, hints[key], f"{where} {key}".strip())
        if isinstance(value, dict) and isinstance(hints[key], type) and issubclass(hints[key], msgspec.Struct):
            _check_table(value, hints[key], f"{where} [{key}]")


def _check_choice(value: object, hint: object, where: str) -> None:
    """Refuse a value that is not among those of a `Literal` (rule 1)."""
    literal = next((item for item in (hint, *get_args(hint)) if get_origin(item) is Literal), None)
    choices = get_args(literal)
    if choices and value not in choices:
        raise ConfigError(
            "unknown value",
            where=where,
            found=repr(value),
            expected=f"one of {', '.join(str(choice) for choice in choices)}",
            hint=choice_hint(str(value), [str(choice) for choice in choices]),
        )


def _check_settings(settings: TrainConfig) -> None:
    """Refuse settings that no training could use (rule 3)."""
    check_augmentation(Augmentation(settings.scale_min, settings.scale_max, settings.flip))
    if not settings.iterations:
        raise ConfigError(
            "training needs an iteration",
            where="iterations",
            found=0,
            expected="1 or more",
            hint="raise iterations (--iterations, or in edge-ilseg.toml)",
        )
    if isinstance(settings, StepConfig):
        step_method(settings)


def step_method(settings: StepConfig) -> Method:
    """The method that a step's settings describe.

    Raises:
        ConfigError: the method, a loss term or the cut point is unknown, or the combination cannot work.
    """
    method = resolve_method(
        settings.method,
        freeze=settings.freeze,
        losses=settings.losses,
        **{name: getattr(settings, name) for name in SWITCHES},
    )
    parse_freeze(method.freeze)
    return method


def parse_config(text: str, *, where: object = CONFIG_NAME) -> Config:
    """Turn the text of `edge-ilseg.toml` into a `Config`.

    Raises:
        ConfigError: not TOML, another version, an unknown key, a value of the wrong type or out of range, or settings
            that no training could use (rule 3).
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            "the configuration is not valid TOML", where=where, found=str(error), hint="correct this line of the file"
        ) from error
    if table.get("format_version", CONFIG_VERSION) != CONFIG_VERSION:
        raise ConfigError(
            "the configuration has a version that this program does not read",
            where=where,
            found=table["format_version"],
            expected=CONFIG_VERSION,
            hint="update edge-ilseg, or make the workspace again: edge-ilseg init DIR",
        )
    _check_table(table, Config, str(where))
    try:
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(
            "a value of the configuration cannot be used",
            where=where,
            found=str(error),
            hint="correct the value at this path of the file",
        ) from error
    for name, settings in (("train", config.train), ("step", config.step)):
        try:
            _check_settings(settings)
        except ConfigError as error:
            place = f"{where} [{name}] {error.where or ''}".rstrip()
            raise ConfigError(
                error.what, where=place, found=error.found, expected=error.expected, hint=error.hint
            ) from error
    return config


def read_config(path: Path) -> Config:
    """Read and parse a configuration file, and find a relative data root from its folder (rule 4).

    Raises:
        ConfigError: it is not there or cannot be used.
        EdgeIlsegError: the disk refuses to read it.
    """
    try:
        config = parse_config(path.read_text(encoding="utf-8"), where=path)
    except FileNotFoundError as error:
        raise ConfigError(
            "this folder is no workspace: it has no edge-ilseg.toml",
            where=path.parent,
            hint="make one: edge-ilseg init DIR --dataset KIND --root FOLDER --base-classes A,B,...",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            "the configuration is not UTF-8 text", where=path, found=str(error), hint="save it as UTF-8"
        ) from error
    except OSError as error:
        raise disk_error(error, path) from error
    if not config.data.root:
        return config
    data = msgspec.structs.replace(config.data, root=str((path.parent / config.data.root).resolve()))
    return msgspec.structs.replace(config, data=data)


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def render_config(config: Config) -> str:
    """The text of `edge-ilseg.toml`: every table with every value that is set (rule 2); TOML cannot say "none"."""
    plain: dict[str, Any] = msgspec.to_builtins(config)
    top = {key: value for key, value in plain.items() if not isinstance(value, dict)}
    lines = ["# Read by edge-ilseg; every key is explained in docs/workspace-format.md."]
    lines += [f"{key} = {_toml_value(value)}" for key, value in sorted(top.items())]
    for name in ("data", "classes", "model", "train", "step"):
        lines += ["", f"[{name}]"]
        tables = {key: value for key, value in plain[name].items() if isinstance(value, dict)}
        for key, value in plain[name].items():
            if value is not None and key not in tables:
                lines.append(f"{key} = {_toml_value(value)}")
        for key, value in tables.items():
            if value:
                lines += ["", f"[{name}.{key}]", *(f"{k} = {_toml_value(v)}" for k, v in value.items())]
    return "\n".join(lines) + "\n"


def override(struct: Any, /, **changes: Any) -> Any:
    """`struct` with the changes that are not None, checked against the field types.

    Raises:
        ConfigError: a value is unknown, of the wrong type or out of range, or training could not use it (rule 3).
    """
    given = {key: value for key, value in changes.items() if value is not None}
    hints = get_type_hints(type(struct))
    for key, value in given.items():
        _check_choice(value, hints[key], key)
    try:
        changed = msgspec.convert({**msgspec.to_builtins(struct), **given}, type(struct))
    except msgspec.ValidationError as error:
        raise ConfigError(
            "an option has a value that cannot be used",
            found=str(error),
            hint="give the option of this name a value of this type",
        ) from error
    if isinstance(changed, TrainConfig):
        _check_settings(changed)
    return changed
