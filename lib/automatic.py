"""What a model says of a whole volume while nobody clicks, and what corrections make of it.

Frames: slices along the axis that the result was made for; ``mask`` on the volume's voxels. Values; thread-safe. Left
out: how corrections come about (:mod:`lib.assisted`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lib.data.geometry import put_slice, slice_view
from lib.learned import Answer, combine
from lib.transform import SliceTransform


@dataclass(frozen=True)
class Automatic:
    """Autonomous result of one volume along one axis.

    Args:
        mask: ``(I, J, K)`` uint8 class numbers.
        masks: ``(D, K, 4h, 4w)`` float16 logits.
        iou: ``(D, K)``.
        obj: ``(D, K)`` objectness logits.
        points: ``(D, K, P, 3)``, see :class:`lib.learned.Answer`, or None.
    """

    mask: np.ndarray
    masks: Tensor
    iou: Tensor
    obj: Tensor
    points: Tensor | None = None

    def nbytes(self) -> int:
        """Size in memory."""
        tensors = (self.masks, self.iou, self.obj, *(() if self.points is None else (self.points,)))
        return self.mask.nbytes + sum(t.numel() * t.element_size() for t in tensors)

    def logits(self, index: int, number: int) -> Tensor:
        """``(1, 4h, 4w)`` of a class (from 0) on a slice, as they are shown."""
        return gated(self.masks[index, number][None].float(), self.obj[index, number])

    def edited(self, edits: Mapping[tuple[int, int], Answer], axis: int, transform: SliceTransform) -> np.ndarray:
        """``(I, J, K)`` with other answers for some (slice, class); the autonomous mask itself where there are none."""
        if not edits:
            return self.mask
        mask = np.array(self.mask, order="F")
        for index in {i for i, _ in edits}:
            masks, obj = self.masks[index].float()[None], self.obj[index].clone()[None]
            for (i, number), answer in edits.items():
                if i == index:
                    masks[0, number], obj[0, number] = answer.masks[0], answer.obj[0]
            put_slice(mask, axis, index, combine(transform.logits(masks), obj)[0].numpy())
        return mask


def changed_pairs(before: np.ndarray, after: np.ndarray, axis: int) -> set[tuple[int, int]]:
    """(slice, class) pairs whose voxels differ between two results."""
    found: set[tuple[int, int]] = set()
    for index in range(before.shape[axis]) if after is not before else ():
        was, now = slice_view(before, axis, index), slice_view(after, axis, index)
        differs = was != now
        if differs.any():
            found |= {(index, n - 1) for n in np.union1d(was[differs], now[differs]).tolist() if n}
    return found


def gated(masks: Tensor, obj: Tensor) -> Tensor:
    """The logits as they are shown: an absent pair has none above 0."""
    return masks if bool(obj >= 0) else masks.clamp(max=-1.0)
