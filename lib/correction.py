"""What of a corrected slice is kept: the change that the user's points lie in.

A decoder asked with one more click draws the whole structure anew, and of a structure that was nearly right it spoils
about as much as it mends. So of what changed only the connected parts with a point in them are kept (progressive
merging, FocalClick, CVPR 2022). What the points themselves say of the volume: :mod:`lib.claims`. Frame: cells of the
mask grid, (row, column). Pure functions on CPU tensors, the same for points in any order.
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


@dataclass(frozen=True)
class Points:
    """Where a user's points lie on one slice.

    Args:
        distance: ``(G, G)`` in cells to the nearest of them; inf where there is none.
        radius: cells around a point that count as pointed at: a voxel, or a cell where that is more.
    """

    distance: Tensor
    radius: float

    @classmethod
    def of(cls, prompts: PromptSet, transform: SliceTransform) -> Points:
        """Those of one pair (N = 1)."""
        grid = transform.spec.mask_size
        side = transform.spec.input_size / grid
        voxel = max(inner / size for inner, size in zip(transform.inner, transform.size)) / side
        xy = torch.zeros(0, 2) if prompts.points_xy is None else prompts.points_xy[0]
        return cls.at((xy.flip(1) + 0.5) / side - 0.5, max(1.0, voxel), grid)

    @classmethod
    def at(cls, cells: Tensor, radius: float, grid: int) -> Points:
        """Points at ``(P, 2)`` row and column, integers being the centres of cells."""
        if not len(cells):
            return cls(torch.full((grid, grid), torch.inf), radius)
        every = torch.arange(grid, dtype=torch.float32)
        down, across = every[:, None] - cells[:, 0], every[:, None] - cells[:, 1]  # (G, P) each
        return cls((down[:, None] ** 2 + across[None] ** 2).amin(2).sqrt(), radius)


def near_points(after: Tensor, before: Tensor, points: Points) -> Tensor:
    """The correction where it changes something at a point, and what was there before elsewhere.

    Args:
        after: ``(1, G, G)`` logits with the user's prompts, above 0 what is shown.
        before: ``(1, G, G)`` logits without them.
        points: the user's.
    """
    parts, count = ndimage.label(((after > 0) != (before > 0))[0].numpy(), EIGHT)
    kept = np.zeros(count + 1, bool)
    kept[parts[(points.distance <= points.radius).numpy()]] = True
    kept[0] = False  # where nothing changed
    return torch.where(torch.from_numpy(kept[parts]), after, before)
