"""YAML becomes frozen dataclasses: backbones, methods, recipes; the tools for it serve :mod:`lib.settings` too.

Unknown keys are errors that name the nearest valid spelling.
"""

from __future__ import annotations

import dataclasses
import math
import types as pytypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, TypeVar, Union, get_args, get_origin, get_type_hints

from lib.errors import ConfigError
from lib.plugins import did_you_mean

CONFIG_DIR = Path(__file__).resolve().parents[1] / "apps" / "autosam_label" / "configs"

T = TypeVar("T")
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
SCALARS: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}


@dataclass(frozen=True)
class WeightsEntry:
    """One line of the weights manifest.

    Args:
        file: file name inside the weights folder.
        url: official address, or empty where only an offline file exists.
        bytes: expected size, 0 where the authors publish none.
        sha256: expected digest; None is recorded on first use and enforced from then on.
        unwrap: key that holds the state dict inside the file (``model``), or empty for a plain dict.
        prefix_map: official key prefix to the prefix in our module, in order; everything else must be in ``ignore``.
        ignore: official key prefixes that image segmentation does not use (memory modules of SAM 2, classifier heads).
        hint: where a person finds the file when there is no url.
    """

    file: str
    url: str = ""
    bytes: int = 0
    sha256: Optional[str] = None
    unwrap: str = ""
    prefix_map: dict[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    hint: str = ""


@dataclass(frozen=True)
class BackboneRow:
    """One backbone size: which module builds it, its facts, its numbers and its weights.

    Args:
        name: key for ``--conf backbone``; the YAML's file name.
        module: module in ``lib/backbones``.
        spec: fields of :class:`lib.contracts.BackboneSpec` without the name.
        size: numbers for the module's ``build`` (widths, depths, stages).
        weights: where the official tensors come from.
    """

    name: str
    module: str
    spec: dict[str, Any]
    size: dict[str, Any]
    weights: WeightsEntry


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Builds dataclass ``cls`` from a mapping, nested dataclasses and tuples included.

    Args:
        cls: a dataclass.
        values: what YAML gave.
        where: name of the file or option, for messages.

    Raises:
        ConfigError: on an unknown or missing key.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(
                f"{where}: unknown key {key!r}; valid keys are {sorted(fields)}.{did_you_mean(key, list(fields))}"
            )
    hints = get_type_hints(cls)
    given = {k: _convert(hints[k], v, f"{where}.{k}") for k, v in values.items()}
    try:
        return cls(**given)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_mapping(hint, value, where)  # type: ignore[arg-type]
    origin = get_origin(hint)
    if origin in (Union, pytypes.UnionType) and value is not None:
        return _convert(next(a for a in get_args(hint) if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, received {value!r}.")
        return tuple(value)
    if hint in SCALARS and (not isinstance(value, SCALARS[hint]) or isinstance(value, bool) is not (hint is bool)):
        quotes = " Put it in quotes." if hint is str and value is not None else ""  # YAML takes 22:30 for a number
        raise ConfigError(f"{where}: expected {KINDS[hint]}, received {value!r}.{quotes}")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: if the file is missing, is not YAML, or does not hold a mapping.
    """
    import yaml  # not at the top: pretraining imports this module on machines with only torch and numpy

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"Cannot read the configuration {path.name}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name}: expected a mapping of keys to values, received {type(values).__name__}.")
    return values


def backbone_names() -> list[str]:
    """Names that ``--conf backbone`` accepts, sorted."""
    return sorted(p.stem for p in (CONFIG_DIR / "backbones").glob("*.yaml"))


def backbone_row(name: str) -> BackboneRow:
    """The row of one backbone.

    Raises:
        ConfigError: for an unknown name.
    """
    known = backbone_names()
    if name not in known:
        raise ConfigError(f"Expected a backbone out of {known}, received {name!r}.{did_you_mean(name, known)}")
    values = read_yaml(CONFIG_DIR / "backbones" / f"{name}.yaml")
    return from_mapping(BackboneRow, {"name": name, **values}, f"backbones/{name}.yaml")


@dataclass(frozen=True)
class TrainRecipe:
    """How a method is trained.

    Args:
        preset: ``frozen``, ``adapters``, ``full``, or ``auto``: ``full`` for ``compact``, else ``adapters`` on a GPU,
            ``frozen`` without one.
        start: ``live`` begins with the live version where that fits (:mod:`lib.versions.start`), ``new`` never.
        loss: name of a loss preset of the method.
        augment: ``mild``, or ``paper``: flips and turns of up to 90 degrees too.
        epochs: at most; early stopping ends sooner.
        minutes: of wall-clock, after which the epoch under way ends with its validation; 0 sets no limit. A run with a
            limit is not repeatable: how many steps fit depends on the machine.
        steps: optimiser steps per epoch; 0 takes as many as the slices fill batches, at least 20.
        batch: slices per step.
        views: per slice, the original and augmented ones, whose features are kept where the encoder is frozen.
        lr: of the method; cosine to a tenth.
        backbone_lr: of adapters and backbone.
        weight_decay: of matrices.
        patience: validations without a better Dice before it stops.
        memory_mb: for kept features; views are fewer, and at last none is kept, where they do not fit.
        seed: of weights, order and augmentation.
    """

    preset: str = "auto"
    start: str = "live"
    loss: str = "plain"
    augment: str = "mild"
    epochs: int = 30
    minutes: float = 0.0
    steps: int = 0
    batch: int = 8
    views: int = 6
    lr: float = 5e-4
    backbone_lr: float = 1e-4
    weight_decay: float = 0.1
    patience: int = 10
    memory_mb: int = 4096
    seed: int = 1


def override(recipe: TrainRecipe, request: Mapping[str, Any]) -> TrainRecipe:
    """The recipe with what a train request sets; other keys of the request are not ours.

    Raises:
        ConfigError: for a value that is not of its setting's kind, or out of its range.
    """
    changed: dict[str, Any] = {}
    for key, hint in get_type_hints(TrainRecipe).items():
        value = request.get(key)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if value in (None, ""):
            continue
        try:
            changed[key] = hint(str(value).strip())
        except ValueError:
            raise ConfigError(f"{key}: expected {KINDS[hint]}, received {value!r}.") from None
    found = dataclasses.replace(recipe, **changed)
    for key, value in dataclasses.asdict(found).items():
        above = key in ABOVE_ZERO
        if not isinstance(value, str) and not (math.isfinite(value) and (value > 0 if above else value >= 0)):
            raise ConfigError(f"{key}: expected a number {'above 0' if above else 'of at least 0'}, received {value}.")
    return found


ABOVE_ZERO = ("epochs", "batch", "lr", "backbone_lr", "patience")


@dataclass(frozen=True)
class MethodRow:
    """One learned method as it is offered.

    Args:
        name: key for ``--conf models``; the YAML's file name.
        module: module in ``lib/methods``.
        options: fields of the module's ``Config`` without the number of classes.
        recipe: how it is trained.
    """

    name: str
    module: str
    options: dict[str, Any]
    recipe: TrainRecipe


def method_names() -> list[str]:
    """Names that ``--conf models`` accepts, sorted."""
    return sorted(p.stem for p in (CONFIG_DIR / "methods").glob("*.yaml"))


def method_row(name: str) -> MethodRow:
    """The row of one method.

    Raises:
        ConfigError: for an unknown name.
    """
    known = method_names()
    if name not in known:
        raise ConfigError(f"Expected a model out of {known}, received {name!r}.{did_you_mean(name, known)}")
    values = read_yaml(CONFIG_DIR / "methods" / f"{name}.yaml")
    return from_mapping(MethodRow, {"name": name, **values}, f"methods/{name}.yaml")
