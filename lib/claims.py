"""What a user's points and strokes say of voxels, and how far each point reaches.

Somebody who corrects a result points at the middle of what is wrong, so the distance from a point to the nearest voxel
where the result is what the user says is about how large the error is. Inside most of that distance the whole ball is
what the user says, whatever the decoder thinks; beyond :data:`FAR` times that distance nothing changes, whatever the
decoder thinks. Frame: voxels ``(i, j, k)`` of the volume, distances in mm. Pure functions on numpy arrays, the same for
points in any order.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
from scipy import ndimage

from lib.data.geometry import from_slice_rc, rows_columns, slice_view
from lib.prompts.user import SlicePrompts
from lib.types import Index, Stroke

Window = tuple[slice, slice, slice]

FAR = 3.0  # of a claim's radius
BALL = 0.8  # of it: nobody points at the very middle
MOST_MM = 32.0  # farther than that nothing is measured: the point stands for a part of its own
LOOKED_AT = 64  # slices on which the thickness of a label is looked for: up to 2 ms of a click each
FIRST_MM = 4.0  # of the window that is searched first


@dataclass(frozen=True)
class Claim:
    """What is said of a voxel.

    Args:
        ijk: the voxel.
        label: class number that it has, 0 for background.
        radius_mm: to the nearest voxel that has this label in the autonomous result, or for background to the nearest
            that has not the one it has there; 0 where the result agrees, inf where nothing is within :data:`MOST_MM`.
        ball_mm: radius in which everything is what the user says; a voxel is inside where it is nearer than that.
    """

    ijk: Index
    label: int
    radius_mm: float
    ball_mm: float


@dataclass(frozen=True)
class Said:
    """Everything that a request says of voxels.

    Args:
        claims: of its points.
        strokes: with their class numbers.
        bounded: False where a box speaks of a whole label: then nothing is too far.
        axis: of the slices.
        spacing_mm: of the voxels.
    """

    claims: Sequence[Claim]
    strokes: Sequence[tuple[int, Stroke]]
    bounded: bool
    axis: int
    spacing_mm: Sequence[float]

    @classmethod
    def of(
        cls,
        corrections: Mapping[int, Mapping[int, SlicePrompts]],
        strokes: Sequence[tuple[int, Stroke]],
        mask: np.ndarray,
        axis: int,
        spacing_mm: Sequence[float],
    ) -> Said:
        """Of a request with prompts by class (from 0) and slice, on an autonomous result."""
        boxed = any(p.box_rc is not None for slices in corrections.values() for p in slices.values())
        return cls(claims(corrections, mask, axis, spacing_mm), strokes, not boxed, axis, spacing_mm)

    def reach(self, count: int) -> Container[int]:
        """Slices, of ``count``, that a correction may change."""
        return reached(self.claims, count, self.axis, self.spacing_mm) if self.bounded else range(count)

    def settled(self, found: np.ndarray, mask: np.ndarray, *, walks: bool) -> np.ndarray:
        """``(I, J, K)`` what is shown: :func:`settled`, with every stroke in it.

        Args:
            found: class numbers with the decoder's corrections.
            mask: those of the autonomous result.
            walks: whether corrections may leave their slices.
        """
        flat = None if walks else self.axis
        out = settled(found, mask, self.claims, self.spacing_mm, bounded=self.bounded, flat=flat)
        for number, stroke in sorted(self.strokes, key=lambda s: s[1].positive):  # what is painted twice is there
            i, j, k = stroke.voxels.T
            there = mask[i, j, k]
            excluded = np.where(out[i, j, k] == number, np.where(there == number, 0, there), out[i, j, k])
            out[i, j, k] = number if stroke.positive else excluded
        return out


def claims(
    corrections: Mapping[int, Mapping[int, SlicePrompts]], mask: np.ndarray, axis: int, spacing_mm: Sequence[float]
) -> list[Claim]:
    """Those of all points of a request.

    Args:
        corrections: prompts by class (from 0) and slice.
        mask: ``(I, J, K)`` class numbers of the autonomous result.
        axis: of the slices.
        spacing_mm: of the voxels.
    """
    said: dict[Index, int] = {}
    for inside in (False, True):  # a voxel that is said to be a label and not to be another is that label
        for number, slices in corrections.items():
            for index, prompts in slices.items():
                for row, column, positive in prompts.points_rc:
                    if positive == inside:
                        ijk = from_slice_rc(index, row, column, axis)
                        said[ijk] = _label(said.get(ijk, int(mask[ijk])), number + 1, positive)
    thickness: dict[int, float] = {}
    return [_claim(ijk, label, mask, axis, spacing_mm, thickness) for ijk, label in said.items()]


def _label(before: int, number: int, positive: bool) -> int:
    if positive:
        return number
    return 0 if before == number else before


def _claim(
    ijk: Index, label: int, mask: np.ndarray, axis: int, spacing_mm: Sequence[float], thickness: dict[int, float]
) -> Claim:
    if int(mask[ijk]) == label:
        return Claim(ijk, label, 0.0, 0.0)
    if not label:
        radius = radius_mm(mask, ijk, spacing_mm)
        return Claim(ijk, label, radius, BALL * radius if math.isfinite(radius) else 0.0)
    radius = radius_mm(mask, ijk, spacing_mm, label)
    if label not in thickness:
        thickness[label] = thickness_mm(mask, label, axis, spacing_mm)
    # no part of a label is thicker than the label
    return Claim(ijk, label, radius, min(BALL * radius, thickness[label]))


def radius_mm(mask: np.ndarray, ijk: Index, spacing_mm: Sequence[float], label: Optional[int] = None) -> float:
    """Distance from a voxel to the nearest one with a number, or with another than its own where that is None; inf
    where none is within :data:`MOST_MM`."""
    reach = FIRST_MM
    while True:
        window, squares = _around(mask.shape, ijk, spacing_mm, reach)
        wanted = mask[window] != mask[ijk] if label is None else mask[window] == label
        nearest = math.sqrt(squares[wanted].min()) if wanted.any() else math.inf
        if nearest <= reach:  # what lies outside the window is farther away
            return nearest
        if reach >= MOST_MM:
            return math.inf
        reach *= 2


def thickness_mm(mask: np.ndarray, label: int, axis: int, spacing_mm: Sequence[float]) -> float:
    """Largest distance to the rim on the slice that shows most of a label, of :data:`LOOKED_AT` evenly spread ones; 0
    where none shows any."""
    count = mask.shape[axis]
    areas = {n: np.count_nonzero(slice_view(mask, axis, n) == label) for n in range(0, count, -(-count // LOOKED_AT))}
    most = max(areas, key=areas.__getitem__)
    if not areas[most]:
        return 0.0
    area = slice_view(mask, axis, most) == label
    rows, columns = ndimage.find_objects(area.astype(np.uint8))[0]
    sides = [spacing_mm[a] for a in rows_columns(axis)]
    return float(ndimage.distance_transform_edt(np.pad(area[rows, columns], 1), sampling=sides).max())


def settled(
    found: np.ndarray,
    mask: np.ndarray,
    said: Sequence[Claim],
    spacing_mm: Sequence[float],
    *,
    bounded: bool = True,
    flat: Optional[int] = None,
) -> np.ndarray:
    """The corrected result with every claim in it, and without what lies too far from all of them.

    Args:
        found: ``(I, J, K)`` class numbers with the decoder's corrections.
        mask: ``(I, J, K)`` those of the autonomous result.
        said: the claims.
        spacing_mm: of the voxels.
        bounded: False leaves what is far as it was found.
        flat: axis across which balls have no extent; None for none.
    """
    if not bounded or any(math.isinf(c.radius_mm) for c in said):
        out = np.array(found, order="F")
    else:
        out = np.array(mask, order="F")
        for claim in said:
            _copy(found, out, claim.ijk, FAR * claim.radius_mm, spacing_mm)
    for claim in sorted(said, key=lambda c: (c.label, c.ijk)):  # of two as near the label counts, not the background
        window, inside = _ball(claim, said, mask.shape, spacing_mm, flat)
        out[window][inside] = claim.label
    for claim in said:
        out[claim.ijk] = claim.label
    return out


def _copy(source: np.ndarray, to: np.ndarray, ijk: Index, radius_mm: float, spacing_mm: Sequence[float]) -> None:
    """All voxels within a distance; slice by slice, as the ball may be most of a large volume."""
    i, j, k = _window(to.shape, ijk, spacing_mm, radius_mm)
    plane = _squares((i, j, slice(ijk[2], ijk[2] + 1)), ijk, spacing_mm)[:, :, 0]
    for n in range(k.start, k.stop):
        near = plane <= radius_mm**2 - ((n - ijk[2]) * spacing_mm[2]) ** 2
        to[i, j, n][near] = source[i, j, n][near]


def _ball(
    claim: Claim, said: Sequence[Claim], shape: Sequence[int], spacing_mm: Sequence[float], flat: Optional[int]
) -> tuple[Window, np.ndarray]:
    """A window and the voxels in it that are inside a claim's ball and no nearer to another claim."""
    window, squares = _around(shape, claim.ijk, spacing_mm, claim.ball_mm)
    inside = squares < claim.ball_mm**2
    if flat is not None:
        level = np.arange(window[flat].start, window[flat].stop) == claim.ijk[flat]
        inside &= np.expand_dims(level, tuple(a for a in range(3) if a != flat))
    for other in said:
        if other.ijk != claim.ijk and math.dist(*_places(claim, other, spacing_mm)) < 2 * claim.ball_mm:
            inside &= squares <= _squares(window, other.ijk, spacing_mm)
    return window, inside


def _places(one: Claim, other: Claim, spacing_mm: Sequence[float]) -> tuple[list[float], list[float]]:
    return [n * s for n, s in zip(one.ijk, spacing_mm)], [n * s for n, s in zip(other.ijk, spacing_mm)]


def _around(
    shape: Sequence[int], ijk: Index, spacing_mm: Sequence[float], reach_mm: float
) -> tuple[Window, np.ndarray]:
    """The window that holds everything within a distance of a voxel, and the squared distances in it."""
    window = _window(shape, ijk, spacing_mm, reach_mm)
    return window, _squares(window, ijk, spacing_mm)


def _window(shape: Sequence[int], ijk: Index, spacing_mm: Sequence[float], reach_mm: float) -> Window:
    steps = [math.ceil(reach_mm / s) for s in spacing_mm]
    i, j, k = (slice(max(0, c - n), min(size, c + n + 1)) for c, n, size in zip(ijk, steps, shape))
    return i, j, k


def _squares(window: Window, ijk: Index, spacing_mm: Sequence[float]) -> np.ndarray:
    i, j, k = (((np.arange(w.start, w.stop) - c) * s) ** 2 for w, c, s in zip(window, ijk, spacing_mm))
    return i[:, None, None] + j[:, None] + k


def reached(said: Iterable[Claim], count: int, axis: int, spacing_mm: Sequence[float]) -> set[int]:
    """Slices, of ``count`` along an axis, that a claim reaches."""
    found: set[int] = set()
    for claim in said:
        steps = FAR * claim.radius_mm / spacing_mm[axis]
        middle = claim.ijk[axis]
        found |= set(range(count)) if math.isinf(steps) else set(range(middle - int(steps), middle + int(steps) + 1))
    return found & set(range(count))
