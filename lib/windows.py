"""A volume's slices in groups, and the answers for all of them with a learned model (METHODS 4.3).

A model that looks at slices one by one gets them in plain batches. One that sees neighbours gets windows of its number
of slices, half of each inside the next; where windows overlap, their softmax is averaged with weights that fall off
from a window's middle. Thread-safe: no state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Optional

import torch
from torch import Tensor

from lib.contracts import Features
from lib.decoder import MAX_PAIRS
from lib.learned import Answer, Learned

BATCH = 8  # slices at once, fewer where they have many classes
LEAST = 1e-6  # probability, bounds the log-odds


def windows(count: int, depth: int) -> list[range]:
    """Ranges of ``depth`` slices, half overlapping, the last flush with the end; all slices where there are fewer."""
    last = max(0, count - depth)
    starts = [*range(0, last, max(1, depth // 2)), last]
    return [range(start, min(start + depth, count)) for start in starts]


def window_around(index: int, count: int, depth: int) -> range:
    """The window with a slice in its middle, or as near to it as the volume's ends allow."""
    start = min(max(0, index - depth // 2), max(0, count - depth))
    return range(start, min(start + depth, count))


def answers(model: Learned, count: int, features_of: Callable[[range], Features]) -> Iterator[tuple[range, Answer]]:
    """Groups of slices in order and the answers for their pairs, nobody clicks.

    Args:
        model: in eval mode.
        count: slices of the volume.
        features_of: of consecutive slices, their depth set for a model that sees neighbours.
    """
    batch = max(1, min(BATCH, MAX_PAIRS // model.classes))
    groups = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    if model.slices == 1:
        yield from ((group, model.autonomous(features_of(group))) for group in groups)
        return
    blended = _blended(model, count, features_of)
    for group in groups:
        pairs = slice(group.start * model.classes, group.stop * model.classes)
        points = None if blended.points is None else blended.points[pairs]
        yield group, Answer(blended.masks[pairs], blended.iou[pairs], blended.obj[pairs], points)


def _blended(model: Learned, count: int, features_of: Callable[[range], Features]) -> Answer:
    classes, side = model.classes, model.spec.mask_size
    total, prob = torch.zeros(count), torch.zeros(count, classes + 1, side, side)
    said = torch.zeros(2, count, classes)
    points = _Nearest(count)
    for window in windows(count, model.slices):
        answer, place = model.autonomous(features_of(window)), slice(window.start, window.stop)
        weight = fall_off(len(window))
        points.take(place, weight, answer.points, classes)
        odds = answer.masks.cpu().unflatten(0, (-1, classes))
        total[place] += weight
        prob[place] += weight.view(-1, 1, 1, 1) * torch.cat([torch.zeros_like(odds[:, :1]), odds], 1).softmax(1)
        said[:, place] += weight[:, None] * torch.stack([answer.iou, answer.obj]).cpu().unflatten(1, (-1, classes))
    prob = (prob / total.view(-1, 1, 1, 1)).clamp_min(LEAST).log()
    iou, obj = (said / total[:, None]).flatten(1)
    return Answer((prob[:, 1:] - prob[:, :1]).flatten(0, 1), iou, obj, points.found)


class _Nearest:
    """The points of every slice from the window in whose middle it is: points have no mean."""

    def __init__(self, count: int) -> None:
        self.weight = torch.zeros(count)
        self.found: Optional[Tensor] = None

    def take(self, place: slice, weight: Tensor, points: Optional[Tensor], classes: int) -> None:
        """Those of one window, ``(D * K, P, 3)``."""
        if points is None:
            return
        if self.found is None:
            self.found = torch.zeros(len(self.weight) * classes, *points.shape[1:])
        nearer = weight > self.weight[place]
        self.weight[place] = torch.maximum(weight, self.weight[place])
        mine = self.found.unflatten(0, (-1, classes))[place]  # a view
        mine[nearer] = points.cpu().unflatten(0, (-1, classes))[nearer]


def fall_off(depth: int) -> Tensor:
    """``(D,)`` Gaussian weights around the middle, its deviation an eighth of the window, none below a thousandth."""
    place = torch.arange(depth) - (depth - 1) / 2
    return torch.exp(-0.5 * (place / max(1.0, depth / 8)) ** 2).clamp_min(1e-3)
