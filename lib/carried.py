"""A correction's walk from the slice with its prompts over the neighbours, and what several walks make of a slice.

A slice changes only near where the slice before did, until the change has faded. Where two walks meet, each speaks of
the cells near its own change, and of cells that both speak of the one that comes from nearer. Frame: cells of the mask
grid, (row, column), of slices along the result's axis. Pure functions; thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.automatic import Automatic, gated
from lib.contracts import PromptSet
from lib.learned import Answer
from lib.propagate import SliceResult, StopRule

REACH = 5  # cells of the mask grid across which a change may spread from one slice to the next
FADED = 0.1  # of the change on the prompted slice: below it a walk ends

Pair = tuple[int, int]  # (slice, class from 0)


@dataclass(frozen=True)
class Step:
    """What a walk makes of one slice.

    Args:
        pair: slice and class.
        seed: slice with the prompts.
        near: ``(1, 4h, 4w)`` cells that the walk speaks of.
        answer: the autonomous result with the carried change in it.
    """

    pair: Pair
    seed: int
    near: Tensor
    answer: Answer


def carry(
    automatic: Automatic, seed: Pair, answer: Answer, path: Iterable[int], ask: Callable[..., Answer], rule: StopRule
) -> Iterator[Step]:
    """A walk, until it ends by itself or its path does.

    Args:
        automatic: the autonomous result.
        seed: slice with the prompts, and class.
        answer: the corrected one there.
        path: slices in one direction.
        ask: ``(index, number, PromptSet, said=...)`` to the answer on a slice.
        rule: when a mask is no believable continuation of the slice before.
    """
    start, number = seed
    before = replace(answer, masks=gated(answer.masks, answer.obj))
    changed = (before.masks > 0) != (automatic.logits(start, number) > 0)
    first = int(changed.sum())
    for index in path if first else ():
        near = F.max_pool2d(changed.float(), REACH, 1, REACH // 2) > 0
        prompt = PromptSet(masks=before.masks[:, None].clamp(-32, 32))
        carried = ask(index, number, prompt, said=bool(before.obj > 0))
        base = automatic.logits(index, number)
        merged = torch.where(near, gated(carried.masks, carried.obj), base)
        changed = (merged > 0) != (base > 0)
        if int(changed.sum()) <= max(2, FADED * first) or _jumps(before, merged, carried.iou, rule):
            break
        before = _shown(merged, carried.iou, carried.obj)
        yield Step((index, number), start, near, before)


def combined(automatic: Automatic, steps: Iterable[Step]) -> dict[Pair, Answer]:
    """Answers by (slice, class), the same for steps in any order."""
    found: dict[Pair, Answer] = {}
    for step in sorted(steps, key=lambda s: (-abs(s.pair[0] - s.seed), s.seed)):
        base = found[step.pair].masks if step.pair in found else automatic.logits(*step.pair)
        masks = torch.where(step.near, step.answer.masks, base)
        found[step.pair] = _shown(masks, step.answer.iou, step.answer.obj)
    return found


def _shown(masks: Tensor, iou: Tensor, obj: Tensor) -> Answer:
    """What is left of the label, or far from the change, is there whatever this call says of the whole slice."""
    return Answer(masks, iou, obj.clamp(min=0.0) if bool((masks > 0).any()) else obj)


def _jumps(before: Answer, merged: Tensor, iou: Tensor, rule: StopRule) -> bool:
    """Whether a mask is no believable continuation of the slice before; one that vanishes is."""
    if not bool((merged > 0).any()) or not bool((before.masks > 0).any()):
        return False
    was, now = SliceResult(before.masks[:, None], float(before.iou)), SliceResult(merged[:, None], float(iou))
    return rule.breaks(was, was, now)
