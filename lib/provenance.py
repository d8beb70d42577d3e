"""How a label came about: one record for the reply, the store and DICOM. No torch, no server, no disk.

Immutable. It names software and counts prompts; nothing in it identifies a patient. Left out: the prompts themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Optional

from lib.config import from_mapping
from lib.errors import ConfigError
from lib.types import Window, WindowSource

TEXTS = ("task", "method", "version", "backbone", "weights_id")


class Kind(Enum):
    """Who drew it; the values are DICOM's terms for Segment Algorithm Type (0062,0008)."""

    AUTOMATIC = "AUTOMATIC"
    SEMIAUTOMATIC = "SEMIAUTOMATIC"
    MANUAL = "MANUAL"


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a label came about.

    Args:
        kind: a model without prompts, a model with a user's prompts, or saved by a client.
        task: the task that answered, such as ``sam2rad``.
        method: the learning method; empty for plain SAM.
        version: of the trained method; empty for plain SAM.
        backbone: name of the backbone's row.
        weights_id: digest of the weights in use.
        prompts: how many clicks, boxes, strokes and masks the user gave.
        window: intensities that the model saw.
        created: time in UTC.

    Raises:
        ConfigError: for a malformed field, or prompts that do not fit the kind.
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

    def __post_init__(self) -> None:
        _check(isinstance(self.kind, Kind), "kind", f"one of {[k.value for k in Kind]}", self.kind)
        for key in TEXTS:
            _check(isinstance(getattr(self, key), str), key, "a text", getattr(self, key))
        count = isinstance(self.prompts, int) and not isinstance(self.prompts, bool) and self.prompts >= 0
        _check(count, "prompts", "a count of at least 0", self.prompts)
        fits = self.kind is Kind.MANUAL or (self.kind is Kind.SEMIAUTOMATIC) == (self.prompts > 0)
        _check(fits, "prompts", f"a count that fits {self.kind.value}", self.prompts)
        _check(self.window is None or isinstance(self.window, Window), "window", "a window or none", self.window)
        zoned = isinstance(self.created, datetime) and self.created.tzinfo is not None
        _check(zoned, "created", "a time with zone", self.created)

    @classmethod
    def answered(cls, *, prompts: int, **known: Any) -> Provenance:
        """The record of a model's answer: automatic without a prompt, semi-automatic with one.

        Args:
            prompts: how many the user gave.
            known: other fields.

        Raises:
            ConfigError: for a malformed field.
        """
        return cls(kind=Kind.SEMIAUTOMATIC if prompts else Kind.AUTOMATIC, prompts=prompts, **known)

    def to_json(self) -> dict[str, Any]:
        """JSON values; :meth:`from_json` gives an equal record."""
        window = self.window and {"lo": self.window.lo, "hi": self.window.hi, "source": self.window.source.value}
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


def _window(values: Mapping[str, Any]) -> Window:
    return Window(float(values["lo"]), float(values["hi"]), WindowSource(values["source"]))


def _check(good: bool, what: str, expected: str, received: Any) -> None:
    if not good:
        raise ConfigError(f"provenance {what}: expected {expected}, received {received!r}.")
