"""How sure an autonomous answer is: a number per slice and label, and a map.

Frames: logits lie on the backbone's mask grid ``(D, K, 4h, 4w)``, slices in the file's order; the map on the image's
own grid. A label's probability at a place is that of its mask times that of its presence on the slice. Pure functions,
thread-safe. Left out: what a second opinion would say (jittered prompts, turned images: :mod:`lib.active.evidence`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.data.geometry import put_slice
from lib.learned import combine
from lib.transform import SliceTransform

AT_ONCE = 16  # slices in float32 at a time
EPSILON = 1e-6
FLOOR = 25  # percent below which a level says nothing
STEP = 25
LEVELS = {f"uncertain {low} to {low + STEP} %": n for n, low in enumerate(range(FLOOR, 100, STEP), start=1)}


@dataclass(frozen=True)
class Uncertainty:
    """What an answer knows of its own errors.

    Args:
        by_slice: by label and slice index, 0..1: the expected share of the label's area that is wrong (1 - soft Dice);
            where the label is not shown, the probability that it is there after all.
        review: slice indices by label whose number is above the threshold; labels without any are left out.
        percent: ``(I, J, K)`` uint8, 0..100: binary entropy of the most uncertain label; None if nobody asked.
    """

    by_slice: dict[str, dict[int, float]]
    review: dict[str, tuple[int, ...]]
    percent: np.ndarray | None = None

    @classmethod
    def of(cls, masks: Tensor, obj: Tensor, labels: tuple[str, ...], above: float) -> Uncertainty:
        """The numbers of a whole volume.

        Args:
            masks: ``(D, K, 4h, 4w)`` logits.
            obj: ``(D, K)`` objectness logits.
            labels: names of the K classes.
            above: number from which on a slice is listed for review.
        """
        table = doubts(masks, obj).tolist()
        by_slice = {label: {i: row[n] for i, row in enumerate(table)} for n, label in enumerate(labels)}
        review = {label: tuple(i for i, doubt in rows.items() if doubt > above) for label, rows in by_slice.items()}
        return cls(by_slice, {label: slices for label, slices in review.items() if slices})


def doubts(masks: Tensor, obj: Tensor) -> Tensor:
    """``(D, K)`` in 0..1: see :class:`Uncertainty`.

    Args:
        masks: ``(D, K, 4h, 4w)`` logits, any float type.
        obj: ``(D, K)`` objectness logits.
    """
    found = []
    numbers = torch.arange(1, masks.shape[1] + 1)[:, None, None]
    for part, present in _parts(masks, obj):
        own = (combine(part, present)[:, None] == numbers).float()
        probability = _probability(part, present)
        dice = 2 * (probability * own).sum((2, 3)) / ((probability + own).sum((2, 3)) + EPSILON)
        found.append(torch.where(own.any(-1).any(-1), 1 - dice, present.sigmoid()))
    return torch.cat(found).clamp(0, 1)


def entropy_map(
    masks: Tensor, obj: Tensor, transform: SliceTransform, shape: tuple[int, int, int], axis: int
) -> np.ndarray:
    """``(I, J, K)`` uint8 percent of one bit: binary entropy of the most uncertain label.

    Args:
        masks: ``(D, K, 4h, 4w)`` logits.
        obj: ``(D, K)`` objectness logits.
        transform: of the slices.
        shape: of the image.
        axis: of the slices.
    """
    out = np.zeros(shape, np.uint8, order="F")
    index = 0
    for part, present in _parts(masks, obj):
        for one, there in zip(part, present):  # a slice at a time: its own grid may be far larger than the mask grid
            p = _probability(transform.logits(one[None]), there[None])[0]
            bits = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / np.log(2)
            put_slice(out, axis, index, (100 * bits.amax(0)).round().to(torch.uint8).numpy())
            index += 1
    return out


def levels_of(percent: np.ndarray) -> np.ndarray:
    """The map in few steps, which viewers show as segments: numbers of :data:`LEVELS`, 0 below all."""
    steps = np.minimum(percent, 99).astype(np.int16) // STEP - FLOOR // STEP + 1
    return np.maximum(steps, 0).astype(np.uint8)


def _parts(masks: Tensor, obj: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(masks), AT_ONCE):
        yield masks[start : start + AT_ONCE].float(), obj[start : start + AT_ONCE].float()


def _probability(masks: Tensor, obj: Tensor) -> Tensor:
    return masks.sigmoid() * obj.sigmoid()[..., None, None]
