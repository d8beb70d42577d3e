"""Plain SAM's answers for several labels as one label map, while nothing is trained.

SAM is asked for one structure at a time, so labels that lie in or beside each other come out overlapping, and in a
label map one of them has the voxel: the one whose prompt is nearest. What was pointed at or painted is what the user
said, as after training (:mod:`lib.claims`). With prompts of one label it is exactly plain SAM. Frame: voxels ``(i, j,
k)`` of the volume, distances in mm. Pure functions, the same for labels in any order but for ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.spatial import cKDTree

from lib.claims import Said
from lib.prompts.user import by_slice
from lib.types import Prediction, UserPrompts


def label_map(
    found: Mapping[int, Prediction], prompts: Mapping[int, UserPrompts], spacing_mm: Sequence[float], *, walks: bool
) -> np.ndarray:
    """``(I, J, K)`` uint8 class numbers.

    Args:
        found: plain SAM's answers by class number from 1, at least one.
        prompts: by the same numbers.
        spacing_mm: of the voxels.
        walks: whether a point may speak for slices beside its own.
    """
    mask = _nearest(found, prompts, spacing_mm)
    if len(found) == 1:
        return mask
    axis = next(iter(found.values())).axis
    shape = (mask.shape[0], mask.shape[1], mask.shape[2])
    points = {number - 1: by_slice(p, shape, axis, corrections=True) for number, p in prompts.items()}
    strokes = [(number, stroke) for number, p in prompts.items() for stroke in p.strokes]
    return Said.of(points, strokes, mask, axis, spacing_mm).settled(mask, mask, walks=walks)


def _nearest(
    found: Mapping[int, Prediction], prompts: Mapping[int, UserPrompts], spacing_mm: Sequence[float]
) -> np.ndarray:
    """Each voxel's label; where several want it, that of the nearest positive prompt."""
    first, *others = found.values()
    mask, wanted = np.zeros(first.mask.shape, np.uint8, order="F"), first.mask.astype(np.uint8)
    for other in others:
        wanted += other.mask
    for number, answer in found.items():
        mask[answer.mask > 0] = number
    contested = np.argwhere(wanted > 1)
    if not len(contested):
        return mask
    nearest = np.full(len(contested), np.inf)
    for number, answer in found.items():
        distance, _ = cKDTree(_places(prompts[number]) * spacing_mm).query(contested * np.asarray(spacing_mm))
        mine = (answer.mask[tuple(contested.T)] > 0) & (distance < nearest)
        nearest[mine] = distance[mine]
        mask[tuple(contested[mine].T)] = number
    return mask


def _places(prompts: UserPrompts) -> np.ndarray:
    """``(N, 3)`` voxels of what is positive; of a box its middle."""
    clicks = [click.ijk for click in prompts.clicks if click.positive]
    boxes = [[(lo + hi - 1) / 2 for lo, hi in zip(box.lo, box.hi)] for box in prompts.boxes]
    painted = [voxel for stroke in prompts.strokes if stroke.positive for voxel in stroke.voxels.tolist()]
    return np.array([*clicks, *boxes, *painted], float)
