"""3D Slicer's voxel indices and the file's, which differ in images whose axes i, j, k are left-handed in space.

Since 5.8 Slicer reverses the slices of such an image when it reads it, a NIfTI in LAS order for example, and counts k
from the other end. Its clicks, ROIs, slices and label maps all do, so prompts are read as they come and then mirrored
as a whole. A request says whose indices it has by the option ``ijk``, which Slicer sends back out of its options table;
requests without it have the file's. Pure functions, thread-safe. Left out: Slicer up to 5.6, whose users choose
``file``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lib.types import Box, Click, Stroke, UserPrompts

ORDERS = ("slicer", "file")


def slicer_reverses(affine: np.ndarray) -> bool:
    """Whether Slicer reverses the slices of an image with this ``(4, 4)`` affine."""
    return bool(np.linalg.det(affine[:3, :3]) < 0)


def mirrored(prompts: UserPrompts, depth: int) -> UserPrompts:
    """The same prompts in an image whose slices are counted from the other end.

    Args:
        prompts: as drawn.
        depth: voxels along k.
    """
    clicks = tuple(Click((c.ijk[0], c.ijk[1], depth - 1 - c.ijk[2]), c.positive) for c in prompts.clicks)
    boxes = tuple(Box((b.lo[0], b.lo[1], depth - b.hi[2]), (b.hi[0], b.hi[1], depth - b.lo[2])) for b in prompts.boxes)
    strokes = tuple(Stroke(np.abs(s.voxels - [0, 0, depth - 1]), s.positive) for s in prompts.strokes)
    return replace(prompts, clicks=clicks, boxes=boxes, strokes=strokes)
