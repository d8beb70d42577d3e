"""Carries a segmentation from prompted slices to their neighbours, both ways, until it stops being believable.

Every seed walks up and down to the middle between it and the next seed, so each slice has one answer whatever the order
of the prompts. Pure: what a slice looks like is the caller's business. Thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Optional

from torch import Tensor


@dataclass(frozen=True)
class SliceResult:
    """One segmented slice.

    Args:
        low_res: ``(1, 1, 4h, 4w)`` float32 logits.
        quality: predicted IoU, 0..1.
        objectness: logit, or None where the backbone has none.
    """

    low_res: Tensor
    quality: float
    objectness: Optional[float] = None


@dataclass(frozen=True)
class StopRule:
    """When a walk ends: the slice that breaks the rule is left empty, and so are those behind it.

    Args:
        quality: least predicted IoU.
        overlap: least Dice with the slice before; organs do not jump.
        growth: most times that the area may grow or shrink from one slice to the next.
    """

    quality: float = 0.5
    overlap: float = 0.3
    growth: float = 3.0

    def breaks(self, before: SliceResult, after: SliceResult) -> bool:
        """True where ``after`` is not a believable continuation of ``before``."""
        if after.quality < self.quality or (after.objectness is not None and after.objectness < 0):
            return True
        was, now = before.low_res > 0, after.low_res > 0
        area_was, area_now = int(was.sum()), int(now.sum())
        if not area_now or not area_was:
            return True
        if not area_was / self.growth <= area_now <= area_was * self.growth:
            return True
        return 2 * int((was & now).sum()) / (area_was + area_now) < self.overlap


Step = Callable[[int, SliceResult], SliceResult]


def propagate(
    seeds: Mapping[int, SliceResult], bounds: range, step: Step, rule: StopRule, keep_on: range = range(0)
) -> dict[int, SliceResult]:
    """Results of the seeds and of every slice that a walk reached.

    Args:
        seeds: results on prompted slices.
        bounds: slices that may be reached.
        step: segments a slice given the result of the slice before.
        rule: when to stop.
        keep_on: slices where the user said that the structure is (a box): the rule does not end a walk there, only an
            empty mask does.
    """
    found = dict(seeds)
    order = sorted(seeds)
    for position, seed in enumerate(order):
        below = order[position - 1] if position else None
        above = order[position + 1] if position + 1 < len(order) else None
        first = bounds.start if below is None else (below + seed) // 2 + 1
        last = bounds.stop - 1 if above is None else (seed + above) // 2
        for path in (range(seed + 1, last + 1), range(seed - 1, first - 1, -1)):
            found |= _walk(seeds[seed], path, step, rule, keep_on)
    return found


def _walk(result: SliceResult, path: range, step: Step, rule: StopRule, keep_on: range) -> dict[int, SliceResult]:
    found: dict[int, SliceResult] = {}
    if not bool((result.low_res > 0).any()):
        return found
    for index in path:
        after = step(index, result)
        empty = not bool((after.low_res > 0).any())
        if empty or (index not in keep_on and rule.breaks(result, after)):
            break
        found[index] = result = after
    return found
