"""Running sums over groups of slices: quality and distance of label maps on the mask grid, mean of embeddings.

Nothing of a volume's size is kept. Not thread-safe: one of each per volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lib.learned import Answer

EPSILON = 1e-6


class Quality:
    """Running sums of both opinions; a label that is nowhere counts by how sure that is."""

    def __init__(self, classes: int) -> None:
        self._overlap, self._sum, self._absent = torch.zeros(classes), torch.zeros(classes), torch.zeros(classes)
        self._found, self._said, self._slices = torch.zeros(classes), torch.zeros(classes), 0

    def add(self, answer: Answer, shown: Tensor) -> None:
        """Slices with what is shown of them, ``(B, 4h, 4w)``."""
        classes = len(self._sum)
        present = answer.obj.float().sigmoid().view(-1, classes)
        probability = answer.masks.float().sigmoid().unflatten(0, (-1, classes)) * present[..., None, None]
        own = (shown[:, None] == torch.arange(1, classes + 1, device=shown.device)[:, None, None]).float()
        self._overlap += (probability * own).sum((0, 2, 3)).cpu()
        self._sum += (probability + own).sum((0, 2, 3)).cpu()
        area, iou = own.sum((2, 3)), answer.iou.float().view(-1, classes)
        self._found += area.sum(0).cpu()
        self._said += (area * 2 * iou / (1 + iou)).sum(0).cpu()
        self._absent += (1 - present).sum(0).cpu()
        self._slices += len(shown)

    def found(self) -> Tensor:
        """``(K,)`` in 0..1."""
        dice = self._overlap / (self._sum + EPSILON) + self._said / (2 * self._found + EPSILON)
        return torch.where(self._found > 0, dice, self._absent / max(1, self._slices)).clamp(0, 1)


class Distance:
    """Running sums of Dice distances of other answers from the first."""

    def __init__(self, classes: int) -> None:
        self._numbers = torch.arange(1, classes + 1)[:, None, None]
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, shown: Tensor, others: Sequence[Tensor]) -> None:
        """Label maps ``(B, 4h, 4w)`` of the same slices."""
        numbers = self._numbers.to(shown.device)
        own = shown[:, None] == numbers
        if not self._parts:
            nothing = torch.zeros(len(numbers))
            self._parts = [(nothing.clone(), nothing.clone()) for _ in others]
        for (overlap, total), other in zip(self._parts, others):
            theirs = other[:, None] == numbers
            overlap += (own & theirs).sum((0, 2, 3)).cpu()
            total += (own.sum((0, 2, 3)) + theirs.sum((0, 2, 3))).cpu()

    def found(self) -> float:
        """Mean over answers and labels; a label that neither has agrees."""
        each = [torch.where(total > 0, 1 - 2 * overlap / total.clamp_min(1), 0.0) for overlap, total in self._parts]
        return float(torch.stack(each).mean())


class Pooled:
    """Running mean and deviation of embeddings."""

    def __init__(self) -> None:
        self._sum: Any = 0.0
        self._squares: Any = 0.0
        self._count = 0

    def add(self, embed: Tensor) -> None:
        """``(B, E, h, w)``."""
        values = embed.float()
        self._sum = self._sum + values.sum((0, 2, 3)).cpu()
        self._squares = self._squares + (values**2).sum((0, 2, 3)).cpu()
        self._count += values.shape[0] * values.shape[2] * values.shape[3]

    def found(self) -> Tensor:
        """``(2E,)``."""
        mean = self._sum / self._count
        return torch.cat([mean, (self._squares / self._count - mean**2).clamp_min(0).sqrt()])
