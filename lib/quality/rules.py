"""What counts as remarkable, and remarks in words. Immutable, thread-safe; no torch, no server.

The numbers lie in ``configs/quality.yaml`` with meaning and unit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from lib.config import CONFIG_DIR, from_mapping, read_yaml
from lib.errors import ConfigError

CHECKS = (
    "unreadable", "grid", "empty", "unknown", "side", "orientation", "missing", "volume", "gap", "jump", "islands",
    "holes", "disagreement",
)  # fmt: skip
SHARES = (
    "island_share", "gap_end", "jump_overlap", "jump_area", "shift_overlap", "majority", "side_majority",
    "agreement_dice", "review_above",
)  # fmt: skip
DIVISORS = ("volume_spread",)


@dataclass(frozen=True)
class Remark:
    """One thing that a person should look at.

    Args:
        check: one of :data:`CHECKS`.
        reason: a sentence without the case's name.
        label: the structure, or empty for the whole case.
        slices: indices in the file's order along the slice axis, where that helps.
        share: of the check's weight, 0..1.
    """

    check: str
    reason: str
    label: str = ""
    slices: tuple[int, ...] = ()
    share: float = 1.0


@dataclass(frozen=True)
class Rules:
    """Thresholds and weights; meanings and units in ``configs/quality.yaml``.

    Raises:
        ConfigError: for a number out of its range, or weights that are not one for each check.
    """

    island_share: float
    hole_mm3: float
    gap_slices: int
    gap_end: float
    jump_slices: int
    jump_overlap: float
    jump_area: float
    jump_mm2: float
    shift_overlap: float
    cases_needed: int
    volume_z: float
    volume_spread: float
    majority: float
    side_mm: float
    side_spread: float
    side_cases: int
    side_majority: float
    agreement_dice: float
    review_above: float
    weights: dict[str, float]

    def __post_init__(self) -> None:
        numbers = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "weights"}
        numbers |= {f"weights.{check}": weight for check, weight in _weights(self.weights).items()}
        for key, number in numbers.items():
            most = 1 if key in SHARES else math.inf
            plain = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not (plain and 0 <= number <= most and math.isfinite(number) and (number or key not in DIVISORS)):
                limit = "from 0 to 1" if most == 1 else "above 0" if key in DIVISORS else "of at least 0"
                raise ConfigError(f"quality.yaml {key}: expected a number {limit}, received {number!r}.")


def _weights(values: Any) -> Mapping[str, Any]:
    if not isinstance(values, Mapping) or set(values) != set(CHECKS):
        received = sorted(values) if isinstance(values, Mapping) else values
        raise ConfigError(f"quality.yaml weights: expected one for each of {sorted(CHECKS)}, received {received!r}.")
    return values


def read_rules(changes: Optional[Mapping[str, Any]] = None) -> Rules:
    """The rules in the YAML.

    Args:
        changes: thresholds of one run in place of the YAML's.

    Raises:
        ConfigError: for an unknown key or a wrong value.
    """
    return from_mapping(Rules, {**read_yaml(CONFIG_DIR / "quality.yaml"), **(changes or {})}, "quality.yaml")
