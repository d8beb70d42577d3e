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
ROUNDING = 1e-6  # square mm by which two distances may differ and be the same


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
        excluded = [(number, tuple(stroke.voxels.T)) for number, stroke in self.strokes if not stroke.positive]
        for number, voxels in excluded:
            out[voxels] = np.where(out[voxels] == number, mask[voxels], out[voxels])
        for number, voxels in excluded:  # of some other stroke, or what the autonomous result has there
            out[voxels] = np.where(out[voxels] == number, 0, out[voxels])
        for number, stroke in self.strokes:
            if stroke.positive:  # what is painted twice is there
                out[tuple(stroke.voxels.T)] = number
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
    # no part of a label is thicker than the label, and what was not measured is no larger than what was
    return Claim(ijk, label, radius, min(BALL * min(radius, MOST_MM), thickness[label]))


def radius_mm(mask: np.ndarray, ijk: Index, spacing_mm: Sequence[float], label: Optional[int] = None) -> float:
    """Distance from a voxel to the nearest one with a number, or with another than its own where that is None; inf
    where none is within :data:`MOST_MM`."""
    reach = FIRST_MM
    while True:
        nearest = math.sqrt(_nearest_square(mask, ijk, spacing_mm, label, reach))
        if nearest <= reach:  # what lies outside the window is farther away
            return nearest
        if reach >= MOST_MM:
            return math.inf
        reach *= 2


def _nearest_square(
    mask: np.ndarray, ijk: Index, spacing_mm: Sequence[float], label: Optional[int], reach_mm: float
) -> float:
    """As :func:`radius_mm`, squared, in a window; plane by plane, which may be most of a finely resolved volume."""
    i, j, k = _window(mask.shape, ijk, spacing_mm, reach_mm)
    plane, nearest = _plane(i, j, ijk, spacing_mm), math.inf
    for n in sorted(range(k.start, k.stop), key=lambda n: abs(n - ijk[2])):
        away = ((n - ijk[2]) * spacing_mm[2]) ** 2
        if away >= nearest:
            break
        wanted = mask[i, j, n] != mask[ijk] if label is None else mask[i, j, n] == label
        if wanted.any():
            nearest = min(nearest, float(plane[wanted].min()) + away)
    return nearest


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
        if said:
            _bring(found, out, said, spacing_mm)
    _put_balls(out, said, spacing_mm, flat)
    for claim in said:
        out[claim.ijk] = claim.label
    return out


def _bring(found: np.ndarray, out: np.ndarray, said: Sequence[Claim], spacing_mm: Sequence[float]) -> None:
    """What was found within :data:`FAR` times the radius of a claim, the widest first: most is decided by then."""
    ordered = sorted(said, key=lambda c: -c.radius_mm)
    i, j, k = _hull([_window(out.shape, c.ijk, spacing_mm, FAR * c.radius_mm) for c in ordered])
    left = np.argwhere(found[i, j, k] != out[i, j, k]) + (i.start, j.start, k.start)
    for claim in ordered:
        if not len(left):
            return
        away = ((left - claim.ijk) * np.asarray(spacing_mm)) ** 2
        near = away.sum(1) <= (FAR * claim.radius_mm) ** 2
        place = tuple(left[near].T)
        out[place] = found[place]
        left = left[~near]


def _hull(windows: Sequence[Window]) -> Window:
    """What holds them all; there is at least one."""
    i, j, k = (slice(min(w[a].start for w in windows), max(w[a].stop for w in windows)) for a in range(3))
    return i, j, k


def _put_balls(out: np.ndarray, said: Sequence[Claim], spacing_mm: Sequence[float], flat: Optional[int]) -> None:
    """Every voxel in the ball of the claim that is nearest to it becomes what that one says."""
    around = [_window(out.shape, c.ijk, spacing_mm, c.ball_mm) for c in said if c.ball_mm]
    if not around:
        return
    i, j, k = _hull(around)
    most = max(c.ball_mm for c in said)
    ordered = sorted(said, key=lambda c: (c.label, c.ijk))
    for n in range(k.start, k.stop):
        rivals = [c for c in ordered if abs(n - c.ijk[2]) * spacing_mm[2] < most]
        if any(abs(n - c.ijk[2]) * spacing_mm[2] < c.ball_mm for c in rivals):
            what = _said_on(n, (i, j), rivals, most, spacing_mm, flat)
            part = out[i, j, n]
            part[what >= 0] = what[what >= 0]


def _said_on(
    n: int, area: tuple[slice, slice], rivals: Sequence[Claim], most_mm: float, spacing_mm: Sequence[float],
    flat: Optional[int],
) -> np.ndarray:  # fmt: skip
    """Label of the nearest claim for voxels of a plane of constant k that are in its ball, else -1; of two as near the
    label counts, not the background.

    Args:
        n: the plane.
        area: rows and columns of it.
        rivals: claims within ``most_mm`` of the plane, by label.
        most_mm: radius of the largest ball; who is farther away is nearest to no voxel of any.
        spacing_mm: of the voxels.
        flat: axis across which balls have no extent; None for none.
    """
    nearest = np.full([w.stop - w.start for w in area], np.inf)
    what = np.full(nearest.shape, -1, np.int16)
    for claim in rivals:
        i, j = (
            slice(max(w.start, c - math.ceil(most_mm / s)), min(w.stop, c + math.ceil(most_mm / s) + 1))
            for w, c, s in zip(area, claim.ijk, spacing_mm)
        )
        if i.start >= i.stop or j.start >= j.stop:
            continue
        squares = _plane(i, j, claim.ijk, spacing_mm) + ((n - claim.ijk[2]) * spacing_mm[2]) ** 2
        inside = squares < claim.ball_mm**2
        if flat is not None:
            inside &= _level((i, j, slice(n, n + 1)), claim.ijk, flat)[:, :, 0]
        here = tuple(slice(w.start - a.start, w.stop - a.start) for w, a in zip((i, j), area))
        what[here][squares < nearest[here] - ROUNDING] = -1
        what[here][inside & (squares <= nearest[here] + ROUNDING)] = claim.label
        np.minimum(nearest[here], squares, out=nearest[here])
    return what


def _level(window: Window, ijk: Index, flat: int) -> np.ndarray:
    """Whether voxels of a window lie on the slice of a claim."""
    there = np.arange(window[flat].start, window[flat].stop) == ijk[flat]
    return np.expand_dims(there, tuple(a for a in range(3) if a != flat))


def _window(shape: Sequence[int], ijk: Index, spacing_mm: Sequence[float], reach_mm: float) -> Window:
    steps = [math.ceil(reach_mm / s) for s in spacing_mm]
    i, j, k = (slice(max(0, c - n), min(size, c + n + 1)) for c, n, size in zip(ijk, steps, shape))
    return i, j, k


def _plane(i: slice, j: slice, ijk: Index, spacing_mm: Sequence[float]) -> np.ndarray:
    """Squared distances from a voxel within its plane of constant k."""
    down, across = (((np.arange(w.start, w.stop) - c) * s) ** 2 for w, c, s in zip((i, j), ijk, spacing_mm))
    return down[:, None] + across


def reached(said: Iterable[Claim], count: int, axis: int, spacing_mm: Sequence[float]) -> set[int]:
    """Slices, of ``count`` along an axis, that a claim reaches."""
    found: set[int] = set()
    for claim in said:
        steps = FAR * claim.radius_mm / spacing_mm[axis]
        middle = claim.ijk[axis]
        found |= set(range(count)) if math.isinf(steps) else set(range(middle - int(steps), middle + int(steps) + 1))
    return found & set(range(count))
