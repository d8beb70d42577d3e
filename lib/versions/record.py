"""What is known about one trained version, checked when it is made and when it is read. No torch, no disk.

Immutable. Case names stay in the file; messages and logs never carry them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from numbers import Integral, Real
from typing import Any, NoReturn, Optional

from lib.config import from_mapping
from lib.errors import ConfigError, WeightsError

VERSION = "version.json"
TRAIN = "train"  # the part of ``Trained.split`` whose cases gave gradients
NAME = re.compile(r"v[0-9]{4,9}")
METHOD = re.compile(r"[a-z][a-z0-9_]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training knows about its result.

    Args:
        backbone: name of the backbone's row.
        backbone_digest: ``weights_id`` of the frozen backbone; the tensors fit no other.
        labels: names of the classes; the position is the class number inside the model.
        recipe: training configuration, as JSON values.
        split: case name to part; the part ``train`` gave gradients.
        metrics: ``mean_dice``, ``dice`` by label and ``cases`` on pinned validation; NaN becomes None.
        parent: the version that was live when this one was trained.

    Raises:
        ConfigError: for an empty or malformed field.
    """

    backbone: str
    backbone_digest: str
    labels: tuple[str, ...]
    recipe: dict[str, Any]
    split: dict[str, str]
    metrics: dict[str, Any]
    parent: Optional[str] = None

    def __post_init__(self) -> None:
        for key in ("backbone", "backbone_digest"):
            _check(isinstance(getattr(self, key), str) and bool(getattr(self, key)), key, "a text", getattr(self, key))
        named = isinstance(self.labels, tuple) and all(isinstance(label, str) and label for label in self.labels)
        _check(named and len(set(self.labels)) == len(self.labels) > 0, "labels", "distinct names", self.labels)
        for key in ("recipe", "split", "metrics"):
            _check(isinstance(getattr(self, key), dict), key, "a mapping", type(getattr(self, key)).__name__)
        _check(all(isinstance(part, str) for part in self.split.values()), "split", "case to part", "other values")
        mean = self.metrics.get("mean_dice", "nothing")
        _check(mean is None or (isinstance(mean, Real) and not isinstance(mean, bool)), "mean_dice", "a number", mean)
        _check(self.parent is None or matches(NAME, self.parent), "parent", "a name like v0001", self.parent)


@dataclass(frozen=True, kw_only=True)
class Version(Trained):
    """One stored version: what training knew and what the store adds.

    Args:
        name: ``v0001`` and up.
        method: the learning method; the store's folder name.
        created: ISO time in UTC.
        sha256: digest of ``model.safetensors``.

    Raises:
        ConfigError: for an empty or malformed field.
    """

    name: str
    method: str
    created: str
    sha256: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name)
        _check(matches(METHOD, self.method), "method", "a module name", self.method)
        _check(matches(_SHA256, self.sha256), "sha256", "64 hex digits", self.sha256)
        _check(_is_time(self.created), "created", "an ISO time with zone", self.created)

    @property
    def mean_dice(self) -> Optional[float]:
        """Mean Dice on pinned validation; None where it could not be computed."""
        return self.metrics["mean_dice"]

    @property
    def trained_on(self) -> int:
        """Number of cases that gave gradients."""
        return sum(part == TRAIN for part in self.split.values())

    def to_json(self) -> str:
        """The text of ``version.json``; NaN and infinity become null.

        Raises:
            ConfigError: if a field holds something other than JSON values.
        """
        return json.dumps(plain(asdict(self)), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, where: str = VERSION) -> Version:
        """The version that :meth:`to_json` wrote.

        Args:
            text: content of a ``version.json``.
            where: its place, for messages.

        Raises:
            WeightsError: if the text is not JSON, or a field is missing, unknown or malformed.
        """
        try:
            values = json.loads(text, parse_constant=_refuse_constant)
            if not isinstance(values, dict):
                raise ConfigError(f"expected a mapping, received {type(values).__name__}.")
            return from_mapping(cls, values, where)
        except (ValueError, ConfigError) as error:
            raise WeightsError(f"{where} is damaged: {error} Restore the folder from a copy or delete it.") from error


def check_name(name: str) -> str:
    """``name`` if it is a version's; anything else, such as a path, is refused.

    Raises:
        ConfigError: for a malformed name.
    """
    _check(matches(NAME, name), "version", "a name like v0001", name)
    return name


def check_method(method: str) -> str:
    """``method`` if it can be a method's name; anything else, such as a path, is refused.

    Raises:
        ConfigError: for a malformed name.
    """
    _check(matches(METHOD, method), "method", "lower-case letters, digits and _", method)
    return method


def _check(good: bool, what: str, expected: str, received: Any) -> None:
    if not good:
        raise ConfigError(f"{what}: expected {expected}, received {received!r}.")


def matches(pattern: re.Pattern[str], text: Any) -> bool:
    return isinstance(text, str) and pattern.fullmatch(text) is not None


def _is_time(text: Any) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number.")


def plain(value: Any) -> Any:
    """JSON values: tuples as lists, numpy's scalars as numbers, NaN and infinity as None."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(held) for held in value]
    raise ConfigError(f"A version's fields hold JSON values with texts as keys, received {type(value).__name__}.")
