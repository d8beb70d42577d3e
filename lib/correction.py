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
    """Where a user's points lie on one slice.

    Args:
        inside: ``(G, G)`` distances in cells to the nearest positive point; inf where there is none.
        outside: the same of negative ones.
        radius: cells around a point that count as pointed at: a voxel, or a cell where that is more.
    """

    inside: Tensor
    outside: Tensor
    radius: float

    @classmethod
    def of(cls, prompts: PromptSet, transform: SliceTransform) -> Points:
        """Those of one pair (N = 1)."""
        grid = transform.spec.mask_size
        side = transform.spec.input_size / grid
        voxel = max(inner / size for inner, size in zip(transform.inner, transform.size)) / side
        if prompts.points_xy is None or prompts.labels is None:
            return cls.at(torch.zeros(0, 2), torch.zeros(0, dtype=torch.bool), max(1.0, voxel), grid)
        cells = (prompts.points_xy[0].flip(1) + 0.5) / side - 0.5
        return cls.at(cells, prompts.labels[0] > 0, max(1.0, voxel), grid)

    @classmethod
    def at(cls, cells: Tensor, positive: Tensor, radius: float, grid: int) -> Points:
        """Points at ``(P, 2)`` row and column, integers being the centres of cells, of which ``(P,)`` are positive."""
        return cls(_distances(cells[positive], grid), _distances(cells[~positive], grid), radius)


def _distances(cells: Tensor, grid: int) -> Tensor:
    if not len(cells):
        return torch.full((grid, grid), torch.inf)
    every = torch.arange(grid, dtype=torch.float32)
    down, across = every[:, None] - cells[:, 0], every[:, None] - cells[:, 1]  # (G, P) each
    return (down[:, None] ** 2 + across[None] ** 2).amin(2).sqrt()


def near_points(after: Tensor, before: Tensor, points: Points) -> Tensor:
    """The correction where it changes something at a point, and what was there before elsewhere.

    Args:
        after: ``(1, G, G)`` logits with the user's prompts, above 0 what is shown.
        before: ``(1, G, G)`` logits without them.
        points: the user's.
    """
    parts, count = ndimage.label(((after > 0) != (before > 0))[0].numpy(), EIGHT)
    kept = np.zeros(count + 1, bool)
    kept[parts[(torch.minimum(points.inside, points.outside) <= points.radius).numpy()]] = True
    kept[0] = False  # where nothing changed
    return torch.where(torch.from_numpy(kept[parts]), after, before)


def obeyed(logits: Tensor, points: Points) -> Tensor:
    """Logits ``(1, G, G)`` that are on the right side at every point; between two that disagree the nearer one counts,
    and a positive one where both are as near."""
    inside, outside, radius = points.inside, points.outside, points.radius
    found = torch.where((inside <= radius) & (inside <= outside), logits.clamp(min=OBEYED), logits)
    return torch.where((outside <= radius) & (outside < inside), found.clamp(max=-OBEYED), found)
