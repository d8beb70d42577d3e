"""From a model's own opinion of its result to the Dice that it really had on validation cases, per label.

A straight line, drawn towards "the opinion is right" where there are few cases: a version has as few as one to validate
on, where a free line or steps (isotonic regression) would follow the noise, and steps would make ties of different
images. The line rises always, so the order of images is the opinion's. No torch, no state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CALIBRATION = "calibration"  # key in a version's metrics: label -> pairs of raw score and Dice, no case names
PRIOR = 0.01  # weight of slope 1, in squared raw scores: as much as four cases that differ by 0.05
LEAST_SLOPE = 0.1


@dataclass(frozen=True)
class Line:
    """``Dice = offset + slope * raw``, kept in 0..1."""

    offset: float = 0.0
    slope: float = 1.0

    def __call__(self, raw: float) -> float:
        """Predicted Dice."""
        return min(1.0, max(0.0, self.offset + self.slope * raw))


def fit(pairs: Sequence[Sequence[float]]) -> Line:
    """The line through pairs of raw score and Dice; the identity where there are none.

    Args:
        pairs: each ``(raw, Dice)`` in 0..1; those that are no finite numbers are passed over.
    """
    table = np.array([p for p in pairs if len(p) == 2 and all(_is_number(v) for v in p)], float).reshape(-1, 2)
    if not len(table):
        return Line()
    raw, dice = table.T
    centred, error = raw - raw.mean(), dice - raw
    slope = 1 + float((centred * (error - error.mean())).sum() / ((centred**2).sum() + PRIOR))
    slope = max(LEAST_SLOPE, slope)
    return Line(float(dice.mean() - slope * raw.mean()), slope)


def lines(metrics: Mapping[str, Any]) -> dict[str, Line]:
    """The lines of a version's labels; none for a version that was trained before there were any."""
    held = metrics.get(CALIBRATION)
    return {label: fit(pairs) for label, pairs in held.items()} if isinstance(held, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
