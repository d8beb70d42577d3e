"""How a label came about: one record for the reply, the store and DICOM. No torch, no server, no disk.

Immutable. It names software and who worked, and counts prompts; nothing in it identifies a patient. Left out: the
prompts themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Optional

from lib.config import from_mapping
from lib.errors import ConfigError
from lib.types import Window, WindowSource

TEXTS = ("task", "method", "version", "backbone", "weights_id", "user")

SINCE = ("answer", "original")


class Kind(Enum):
    """Who drew it; the values are DICOM's terms for Segment Algorithm Type (0062,0008)."""

    AUTOMATIC = "AUTOMATIC"
    SEMIAUTOMATIC = "SEMIAUTOMATIC"
    MANUAL = "MANUAL"


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Change:
    """How much a person changed of what the model said.

    Args:
        since: ``answer``, the model's last answers to this image, or ``original``, its stored label.
        dice: between both by the model's structures; 1 is unchanged.
        voxels: how many have another structure now.
    """

    since: str
    dice: dict[str, float]
    voxels: int

    def __post_init__(self) -> None:
        _check(self.since in SINCE, "changed since", f"one of {list(SINCE)}", self.since)
        shares = isinstance(self.dice, Mapping) and all(isinstance(d, (int, float)) for d in self.dice.values())
        _check(shares, "changed dice", "Dice by structure", self.dice)
        _check(isinstance(self.voxels, int) and self.voxels >= 0, "changed voxels", "a count", self.voxels)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a label came about.

    Args:
        kind: a model without prompts, a model with a user's work on it, or a person without any model.
        task: the task that answered, such as ``sam2rad``.
        method: the learning method; empty for plain SAM.
        version: of the trained method; empty for plain SAM.
        backbone: name of the backbone's row.
        weights_id: digest of the weights in use.
        prompts: how many clicks, boxes, strokes and masks the user gave.
        window: intensities that the model saw.
        created: time in UTC.
        saved: whether a person saved it out of a client, and so answers for it.
        user: who did: the authenticated name or, without authentication, what the client calls itself.
        declared: whether the client alone says who the user is.
        seconds_spent: of work on the image until it was saved, without long pauses; None if not known.
        changed: how much a person changed of the model's label; None without one, or until it is computed.
        live: the versions that were live when it was saved, by method.
        asked: whether a model was asked about what the label shows; None if not known.

    Raises:
        ConfigError: for a malformed field, or prompts or ``asked`` that do not fit the kind.
    """

    kind: Kind
    task: str = ""
    method: str = ""
    version: str = ""
    backbone: str = ""
    weights_id: str = ""
    prompts: int = 0
    window: Optional[Window] = None
    created: datetime = field(default_factory=_now)
    saved: bool = False
    user: str = ""
    declared: bool = False
    seconds_spent: Optional[float] = None
    changed: Optional[Change] = None
    live: dict[str, str] = field(default_factory=dict)
    asked: Optional[bool] = None

    def __post_init__(self) -> None:
        _check(isinstance(self.kind, Kind), "kind", f"one of {[k.value for k in Kind]}", self.kind)
        for key in TEXTS:
            _check(isinstance(getattr(self, key), str), key, "a text", getattr(self, key))
        count = isinstance(self.prompts, int) and not isinstance(self.prompts, bool) and self.prompts >= 0
        _check(count, "prompts", "a count of at least 0", self.prompts)
        worked = self.saved or self.prompts > 0  # whoever saves a model's label has looked at it
        fits = self.kind is Kind.MANUAL or (self.kind is Kind.SEMIAUTOMATIC) == worked
        _check(fits, "prompts", f"a count that fits {self.kind.value}", self.prompts)
        _check(self.window is None or isinstance(self.window, Window), "window", "a window or none", self.window)
        zoned = isinstance(self.created, datetime) and self.created.tzinfo is not None
        _check(zoned, "created", "a time with zone", self.created)
        seconds = self.seconds_spent
        known = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 <= seconds < math.inf
        _check(seconds is None or known, "seconds_spent", "seconds or none", seconds)
        _check(self.changed is None or isinstance(self.changed, Change), "changed", "a change or none", self.changed)
        _check(isinstance(self.live, Mapping), "live", "versions by method", self.live)
        drawn = self.kind is Kind.MANUAL
        _check(self.asked in (None, not drawn), "asked", f"none or what fits {self.kind.value}", self.asked)

    @classmethod
    def answered(cls, *, prompts: int, **known: Any) -> Provenance:
        """The record of a model's answer: automatic without a prompt, semi-automatic with one.

        Args:
            prompts: how many the user gave.
            known: other fields.

        Raises:
            ConfigError: for a malformed field.
        """
        return cls(kind=Kind.SEMIAUTOMATIC if prompts else Kind.AUTOMATIC, prompts=prompts, asked=True, **known)

    def to_json(self) -> dict[str, Any]:
        """JSON values; :meth:`from_json` gives an equal record."""
        window = self.window and _window_json(self.window)
        created = self.created.astimezone(UTC).isoformat(timespec="microseconds")
        return {**asdict(replace(self, window=None)), "kind": self.kind.value, "window": window, "created": created}

    @classmethod
    def from_json(cls, values: Any) -> Provenance:
        """The record that :meth:`to_json` gave.

        Raises:
            ConfigError: if a field is missing, unknown or malformed.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"provenance: expected a mapping, received {type(values).__name__}.")
        read = dict(values)
        try:
            if read.get("window") is not None:
                read["window"] = _window(read["window"])
            for key, convert in (("kind", Kind), ("created", datetime.fromisoformat)):
                if key in read:
                    read[key] = convert(read[key])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"provenance: expected the fields of a record, received {error}.") from None
        return from_mapping(cls, read, "provenance")


def _window_json(window: Window) -> dict[str, Any]:
    rest = {"rest": [_window_json(one) for one in window.rest]} if window.rest else {}
    return {"lo": window.lo, "hi": window.hi, "source": window.source.value, **rest}


def _window(values: Mapping[str, Any]) -> Window:
    first = Window(float(values["lo"]), float(values["hi"]), WindowSource(values["source"]))
    return replace(first, rest=tuple(_window(one) for one in values.get("rest", ())))


def _check(good: bool, what: str, expected: str, received: Any) -> None:
    if not good:
        raise ConfigError(f"provenance {what}: expected {expected}, received {received!r}.")
