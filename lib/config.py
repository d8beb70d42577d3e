"""YAML and ``--conf`` strings become frozen dataclasses here and nowhere else.

Unknown keys are errors that name the nearest valid spelling. Environment variables would be read here and only here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import types as pytypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, TypeVar, Union, get_args, get_origin, get_type_hints

from lib.errors import ConfigError
from lib.plugins import did_you_mean
from lib.train_rules import Rules

CONFIG_DIR = Path(__file__).resolve().parents[1] / "apps" / "autosam_label" / "configs"

T = TypeVar("T")


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
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
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
KINDS = {int: "a whole number", float: "a number", str: "text"}


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


UPSTREAM_CONF = ("server_mode",)  # the one key of --conf that MONAI Label's own base class reads
SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True)
class AppSettings:
    """What the server was started with: ``configs/app.yaml`` overridden by ``--conf``.

    Args:
        backbone: name of a file in ``configs/backbones``.
        labels: names that clients offer for new segments and that training learns; empty: ``object`` is offered, and
            training takes what the saved labels declare.
        models: learned methods that are offered, names of files in ``configs/methods``.
        train_default: the one of them that OHIF's *Update Model* and the schedule train; empty: the first.
        train_at: when the schedule trains, a time of day or five cron fields; empty: never.
        train_after: new final labels after which it trains; 0: never.
        train_min_interval: minutes from one scheduled start to the next at least.
        train_hours: hours of the day in which it may start one, such as ``20:00-06:00``; empty: always.
        train_idle: minutes that nobody must have used the server before it starts one.
        train_minutes: minutes that one may take, as ``minutes`` of a train request; 0: no limit.
        modalities: DICOM modalities that a PACS's images are offered of, such as CT; empty: every image.
        state_dir: folder of trained versions; None means ``.autosam`` inside the studies, or for a DICOMweb address a
            folder of its own in the user's data folder.
        gate_tolerance: Dice that a class may lose on the validation cases when a new version's mean is better.
        keep_versions: so many of the newest versions are kept, and of those to roll back to; 0 keeps all.
        lease_minutes: how long an image that was handed out is offered to nobody else; 0: not at all.
        score_images: at most so many unlabelled images are scored in the background for active learning; 0: none.
        score_fetches: images that a PACS is asked for only to score them, from when a client first asks for the next.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``mps``, ``cuda`` or ``cuda:N``.
        weights_dir: folder of checkpoints; None means the user's data folder.
        download: False forbids every download.
        cache_dir: folder of the embedding cache's disk tier.
        cache_memory_mb: limit of the memory tier in MiB.
        cache_disk_mb: limit of the disk tier in MiB; 0 switches it off.
        volumes_memory_mb: limit of opened images that are kept, in MiB.
        prefetch: True encodes neighbouring slices in the background after a click.
        prefetch_slices: at most so many neighbours on each side of the clicked slice.
    """

    backbone: str
    labels: tuple[str, ...]
    models: tuple[str, ...]
    train_default: str
    train_at: str
    train_after: int
    train_min_interval: float
    train_hours: str
    train_idle: float
    train_minutes: float
    modalities: tuple[str, ...]
    state_dir: Optional[Path]
    gate_tolerance: float
    keep_versions: int
    lease_minutes: float
    score_images: int
    score_fetches: int
    device: str
    weights_dir: Optional[Path]
    download: bool
    cache_dir: Path
    cache_memory_mb: int
    cache_disk_mb: int
    volumes_memory_mb: int
    prefetch: bool
    prefetch_slices: int

    @classmethod
    def from_conf(cls, conf: Mapping[str, str]) -> AppSettings:
        """The defaults with ``--conf`` on top.

        Args:
            conf: strings, as MONAI Label hands them to the app.

        Raises:
            ConfigError: for an unknown key or backbone, or a value that does not convert.
        """
        values = read_yaml(CONFIG_DIR / "app.yaml")
        hints = get_type_hints(cls)
        for key, text in conf.items():
            if key in UPSTREAM_CONF:
                continue
            if key not in hints:
                near = did_you_mean(key, list(hints))
                raise ConfigError(f"--conf: unknown key {key!r}; valid keys are {sorted(hints)}.{near}")
            values[key] = _from_text(hints[key], str(text).strip(), f"--conf {key}")
        values["cache_dir"] = Path(values["cache_dir"] or _user_cache()).expanduser().absolute()
        for key in ("weights_dir", "state_dir"):
            values[key] = Path(values[key]).expanduser().absolute() if values[key] else None
        settings = from_mapping(cls, values, "app.yaml")
        settings._check()
        return settings

    @property
    def rules(self) -> Rules:
        """Of the training schedule."""
        return Rules(
            self.train_at,
            self.train_after,
            self.train_min_interval,
            self.train_hours,
            self.train_idle,
            self.train_minutes,
        )

    @property
    def offered(self) -> tuple[str, ...]:
        """Names that clients offer for new segments."""
        return self.labels or ("object",)

    def versions_dir(self, studies: str) -> Path:
        """Folder of trained versions: with the studies, so that another study set cannot be answered with them."""
        if self.state_dir is not None:
            return self.state_dir
        if "://" not in studies:
            return Path(studies).expanduser().absolute() / ".autosam"
        return _user_data() / f"state-{hashlib.sha256(studies.encode()).hexdigest()[:12]}"

    def _check(self) -> None:
        backbone_row(self.backbone)
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device: expected auto, cpu, mps, cuda or cuda:N, received {self.device!r}.")
        for model in self.models:
            method_row(model)
        if self.train_default and self.train_default not in self.models:
            raise ConfigError(f"train_default: expected one of {list(self.models)}, received {self.train_default!r}.")
        if not 0 <= self.gate_tolerance <= 1:
            raise ConfigError(f"gate_tolerance: expected a Dice from 0 to 1, received {self.gate_tolerance}.")
        if self.rules.enabled and not self.models:
            raise ConfigError("models: expected one that the schedule can train, received none. Unset train_at/after.")
        if not all(self.labels) or len(set(self.labels)) < len(self.labels):
            raise ConfigError(f"labels: expected different names, separated by commas, received {self.labels!r}.")
        for name, least in (
            ("cache_memory_mb", 1),
            ("cache_disk_mb", 0),
            ("volumes_memory_mb", 1),
            ("prefetch_slices", 0),
            ("keep_versions", 0),
            ("lease_minutes", 0),
            ("score_images", 0),
            ("score_fetches", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected {least} or more, received {getattr(self, name)}.")


def _user_cache() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("autosam_label", appauthor=False)


def _user_data() -> Path:
    import platformdirs

    return platformdirs.user_data_path("autosam_label", appauthor=False)


def _from_text(hint: Any, text: str, where: str) -> Any:
    """One ``--conf`` string as the type of its setting."""
    try:
        if hint is bool:
            return SWITCH[text.lower()]
        if hint in (int, float):
            return hint(text)
    except (KeyError, ValueError):
        wanted = "true or false" if hint is bool else KINDS[hint]
        raise ConfigError(f"{where}: expected {wanted}, received {text!r}.") from None
    return tuple(part.strip() for part in text.split(",")) if get_origin(hint) is tuple else text
