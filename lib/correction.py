"""What of a corrected mask is kept: the change that the user's points lie in, and the points themselves.

A decoder asked with one more click draws the whole structure anew, and of a structure that was nearly right it spoils
about as much as it mends. So of what changed only the connected parts with a point in them are kept (progressive
merging, FocalClick, CVPR 2022), and what a user points at is what the user says, whatever the decoder thinks. Frame:
cells of the mask grid, (row, column). Pure functions on CPU tensors, the same for points in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from lib.contracts import PromptSet
from lib.transform import SliceTransform

EIGHT = np.ones((3, 3))  # neighbours of a cell
OBEYED = 4.0  # logit at a point


@dataclass(frozen=True)
class Points:
    """A user's points on one slice.

    Args:
        cells: ``(P, 2)`` float row and column; integers are the cells' centres.
        positive: ``(P,)`` bool.
        radius: cells around a point that count as pointed at: a voxel, or a cell where that is more.
    """

    cells: Tensor
    positive: Tensor
    radius: float

    @classmethod
    def of(cls, prompts: PromptSet, transform: SliceTransform) -> Points:
        """Those of one pair (N = 1)."""
        side = transform.spec.input_size / transform.spec.mask_size
        voxel = max(inner / size for inner, size in zip(transform.inner, transform.size)) / side
        if prompts.points_xy is None or prompts.labels is None:
            return cls(torch.zeros(0, 2), torch.zeros(0, dtype=torch.bool), max(1.0, voxel))
        cells = (prompts.points_xy[0].flip(1) + 0.5) / side - 0.5
        return cls(cells, prompts.labels[0] > 0, max(1.0, voxel))

    def near(self, size: int, *, positive: bool) -> Tensor:
        """``(size, size)`` distances in cells to the nearest such point; inf where there is none."""
        cells = self.cells[self.positive == positive]
        grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"), 2)
        away = torch.cdist(grid.reshape(-1, 2).float(), cells.float()).reshape(size, size, -1)
        return torch.cat([away, torch.full((size, size, 1), torch.inf)], 2).amin(2)


def near_points(after: Tensor, before: Tensor, points: Points) -> Tensor:
    """The correction where it changes something at a point, and what was there before elsewhere.

    Args:
        after: ``(1, G, G)`` logits with the user's prompts, above 0 what is shown.
        before: ``(1, G, G)`` logits without them.
        points: the user's.
    """
    size = after.shape[-1]
    parts = ndimage.label(((after > 0) != (before > 0))[0].numpy(), EIGHT)[0]
    near = torch.minimum(points.near(size, positive=True), points.near(size, positive=False)) <= points.radius
    there = np.isin(parts, np.setdiff1d(parts[near.numpy()], [0]))
    return torch.where(torch.from_numpy(there), after, before)


def obeyed(logits: Tensor, points: Points) -> Tensor:
    """Logits ``(1, G, G)`` that are on the right side at every point; between two that disagree the nearer one counts,
    and a positive one where both are as near."""
    inside, outside = (points.near(logits.shape[-1], positive=positive) for positive in (True, False))
    found = torch.where((inside <= points.radius) & (inside <= outside), logits.clamp(min=OBEYED), logits)
    return torch.where((outside <= points.radius) & (outside < inside), found.clamp(max=-OBEYED), found)
