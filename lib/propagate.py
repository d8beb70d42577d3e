"""Carries a segmentation from prompted slices to their neighbours, both ways, until it stops being believable.

Every seed walks up and down to the middle between it and the next seed, and on from there where the other's walk ended
early. Each slice has one answer, whatever the order of the prompts. Pure: what a slice looks like is the caller's
business. Thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
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
        quality: least predicted IoU as a fraction of the seed's: heads are calibrated differently from model to model
            and modality to modality, but a fall within one walk means the same everywhere.
        overlap: least Dice with the slice before; organs do not jump.
        growth: most times that the area may grow or shrink from one slice to the next.
    """

    quality: float = 0.6
    overlap: float = 0.3
    growth: float = 3.0

    def breaks(self, seed: SliceResult, before: SliceResult, after: SliceResult) -> bool:
        """True where ``after`` is not a believable continuation of ``before`` on a walk from ``seed``."""
        if after.quality < self.quality * seed.quality or (after.objectness is not None and after.objectness < 0):
            return True
        was, now = before.low_res > 0, after.low_res > 0
        area_was, area_now = int(was.sum()), int(now.sum())
        if not area_now or not area_was:
            return True
        if not area_was / self.growth <= area_now <= area_was * self.growth:
            return True
        return 2 * int((was & now).sum()) / (area_was + area_now) < self.overlap


Step = Callable[[int, SliceResult], SliceResult]
Walk = Callable[..., dict[int, SliceResult]]


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
    walk = partial(_walk, step=step, rule=rule, keep_on=keep_on)
    found |= walk(seeds[order[0]], range(order[0] - 1, bounds.start - 1, -1))
    found |= walk(seeds[order[-1]], range(order[-1] + 1, bounds.stop))
    for below, above in pairwise(order):
        found |= _between(seeds[below], seeds[above], range(below + 1, above), walk)
    return found


def _between(low: SliceResult, high: SliceResult, gap: range, walk: Walk) -> dict[int, SliceResult]:
    """Both seeds walk to the middle; where one stops early, the other goes on into what it left."""
    middle = gap.start + len(gap) // 2
    up, down = walk(low, range(gap.start, middle)), walk(high, range(gap.stop - 1, middle - 1, -1))
    up_last, down_last = gap.start + len(up), gap.stop - 1 - len(down)
    if len(up) < middle - gap.start and down_last < middle:
        down |= walk(high, range(down_last, up_last - 1, -1), before=down.get(down_last + 1, high))
    elif len(down) < gap.stop - middle and up_last >= middle:
        up |= walk(low, range(up_last, down_last + 1), before=up.get(up_last - 1, low))
    return up | down


def _walk(
    seed: SliceResult,
    path: range,
    before: Optional[SliceResult] = None,
    *,
    step: Step,
    rule: StopRule,
    keep_on: range,
) -> dict[int, SliceResult]:
    found: dict[int, SliceResult] = {}
    before = before or seed
    if not bool((seed.low_res > 0).any()):
        return found
    for index in path:
        after = step(index, before)
        empty = not bool((after.low_res > 0).any())
        if empty or (index not in keep_on and rule.breaks(seed, before, after)):
            break
        found[index] = before = after
    return found
