"""Training curves out of the TensorBoard files that a run leaves. No torch; TensorBoard is imported when asked.

A run that was killed and went on wrote some steps twice; the later value counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOSS, DICE = "loss", "val_mean_dice"  # the tags of lib.train_loop

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Curves:
    """What a run did over its epochs.

    Args:
        loss: epoch and mean loss of its steps.
        dice: epoch and mean Dice on the validation cases.
    """

    loss: Curve
    dice: Curve


def read_curves(folder: Path, steps_per_epoch: int) -> Curves:
    """Curves of a run; empty ones where it left none.

    Args:
        folder: of its event files.
        steps_per_epoch: optimiser steps, by which losses are averaged.
    """
    found = _scalars(sorted(folder.glob("events.out.tfevents.*")))
    dice = sorted((float(epoch), value) for epoch, value in found[DICE].items())
    return Curves(_by_epoch(found[LOSS], max(1, steps_per_epoch)), dice)


def _scalars(files: Sequence[Path]) -> dict[str, dict[int, float]]:
    """Value by tag and step, the latest that was written."""
    found: dict[str, dict[int, float]] = {LOSS: {}, DICE: {}}
    if not files:
        return found
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    events = [event for file in files for event in EventFileLoader(str(file)).Load()]
    for event in sorted(events, key=lambda event: event.wall_time):
        for value in event.summary.value:
            if value.tag in found:
                found[value.tag][event.step] = float(make_ndarray(value.tensor))
    return found


def _by_epoch(loss: dict[int, float], steps: int) -> Curve:
    epochs: dict[int, list[float]] = {}
    for step, value in loss.items():
        epochs.setdefault((step - 1) // steps + 1, []).append(value)
    return [(float(epoch), sum(values) / len(values)) for epoch, values in sorted(epochs.items())]


@dataclass(frozen=True)
class Drawing:
    """A curve as SVG, in a box of :data:`WIDTH` by :data:`HEIGHT`.

    Args:
        points: of a polyline.
        dots: their places one by one.
        low: the smallest value.
        high: the largest value.
        last: the last epoch.
    """

    points: str
    dots: list[tuple[float, float]]
    low: float
    high: float
    last: int


WIDTH, HEIGHT = 380.0, 150.0


def drawing(curve: Curve) -> Drawing | None:
    """The polyline of a curve, its lowest value at the bottom; None where there is no finite value."""
    found = [(x, y) for x, y in curve if math.isfinite(y)]
    if not found:
        return None
    (first, last), (low, high) = ((min(v), max(v)) for v in zip(*found))
    across, up = last - first or 1.0, high - low or 1.0
    dots = [(round(WIDTH * (x - first) / across, 1), round(HEIGHT * (1 - (y - low) / up), 1)) for x, y in found]
    return Drawing(" ".join(f"{x},{y}" for x, y in dots), dots, low, high, int(last))
