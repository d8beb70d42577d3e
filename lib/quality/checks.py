"""Checks of one label map by itself: islands, holes, gaps, jumps from slice to slice, values without a name.

Frame: voxels ``(I, J, K)`` as the image's file has them; slices along ``axis`` in the file's order. Pure functions,
thread-safe. A structure of several parts of similar size (two kidneys under one name) is no island; a hole is looked
for in three dimensions, so that a ring that is open at its ends, as a myocardium, has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lib.quality.rules import Remark, Rules

Slices = tuple[slice, slice, slice]


@dataclass(frozen=True)
class LabelMap:
    """A label on its image's grid.

    Args:
        voxels: ``(I, J, K)`` uint16.
        names: voxel value to name, of every value that occurs and of those that were declared.
        affine: ``(4, 4)`` voxel index to RAS mm.
        spacing_mm: voxel edge along i, j, k.
        axis: slice axis 0, 1 or 2.
        unnamed: values that occur without a name, where names were declared.
        declared: whether names were declared; else they are made of the values.
    """

    voxels: np.ndarray
    names: dict[int, str]
    affine: np.ndarray
    spacing_mm: tuple[float, float, float]
    axis: int
    unnamed: tuple[int, ...] = ()
    declared: bool = True

    def structures(self) -> Iterator[tuple[int, str, Slices]]:
        """Value, name and box of every structure that has voxels."""
        for value, box in enumerate(ndimage.find_objects(self.voxels), start=1):
            if box is not None:
                yield value, self.names.get(value, f"value {value}"), box


def check_map(label: LabelMap, rules: Rules) -> list[Remark]:
    """Everything remarkable about one label map."""
    found = [_unnamed(label)] if label.unnamed else []
    empty = True
    for value, name, box in label.structures():
        empty = False
        mask = label.voxels[box] == value
        first = box[label.axis].start
        free = label.voxels[box] == 0
        found += [*_islands(mask, name, label, rules), *_holes(mask, free, name, label, rules)]
        found += [*_gaps(mask, name, first, label.axis, rules), *_jumps(mask, name, first, label, rules)]
    return [Remark("empty", "The label is empty.")] if empty else found


def _unnamed(label: LabelMap) -> Remark:
    return Remark("unknown", f"Voxel values without a name: {_listed(label.unnamed)}.")


def _islands(mask: np.ndarray, name: str, label: LabelMap, rules: Rules) -> Iterator[Remark]:
    pieces, count = ndimage.label(mask, np.ones((3, 3, 3)))
    if count < 2:
        return
    sizes = np.bincount(pieces.ravel())[1:]
    small = sizes[sizes < rules.island_share * sizes.max()]
    if len(small):
        text = f"{name}: {_count(len(small), 'island')} of {_size(small.sum(), label)} in all."
        yield Remark("islands", text, name)


def _holes(mask: np.ndarray, free: np.ndarray, name: str, label: LabelMap, rules: Rules) -> Iterator[Remark]:
    """Pieces of the rest that do not reach the box's faces; voxels of other labels in them are no hole."""
    flat = [axis for axis, n in enumerate(label.voxels.shape) if n == 1]  # a picture
    mask, free = np.squeeze(mask, tuple(flat)), np.squeeze(free, tuple(flat))
    pieces, count = ndimage.label(~mask)
    if not count:
        return
    outside = {0}
    for axis in range(pieces.ndim):
        outside |= {*np.unique(pieces.take(0, axis)), *np.unique(pieces.take(-1, axis))}
    sizes = np.bincount(pieces[free], minlength=count + 1)
    sizes[list(outside)] = 0
    holes = sizes[(sizes > 0) & (sizes * float(np.prod(label.spacing_mm)) >= rules.hole_mm3)]
    if len(holes):
        yield Remark("holes", f"{name}: {_count(len(holes), 'hole')} of {_size(holes.sum(), label)} in all.", name)


def _gaps(mask: np.ndarray, name: str, first: int, axis: int, rules: Rules) -> Iterator[Remark]:
    runs, count = ndimage.label(~mask.any(axis=_others(axis)))
    empty: list[int] = []
    for run in range(1, count + 1):
        where = np.flatnonzero(runs == run)
        empty += (where + first).tolist() if len(where) <= rules.gap_slices else []
    if empty:
        reason = f"{name}: no voxel on slice {_listed(empty)} along {'ijk'[axis]}, inside the object."
        yield Remark("gap", reason, name, tuple(empty))


def _jumps(mask: np.ndarray, name: str, first: int, label: LabelMap, rules: Rules) -> Iterator[Remark]:
    """Slices that fit neither of their neighbours, which fit each other: what drifts or tapers is no jump, however
    thick the slices are. Rings count as discs, since a thin wall need not overlap the next one."""
    outlines = [ndimage.binary_fill_holes(one).ravel() for one in np.moveaxis(mask, label.axis, 0)]
    pixel_mm2 = float(np.prod([label.spacing_mm[a] for a in _others(label.axis)]))

    def fit(a: np.ndarray, b: np.ndarray) -> bool:
        small, large = sorted((int(a.sum()), int(b.sum())))
        return small > 0 and small >= rules.jump_area * large and int((a & b).sum()) >= rules.jump_overlap * small

    where = [
        first + k
        for k, (before, here, after) in enumerate(zip(outlines, outlines[1:], outlines[2:]), start=1)
        if here.any() and min(before.sum(), after.sum()) * pixel_mm2 >= rules.jump_mm2
        and fit(before, after) and not fit(before, here) and not fit(here, after)
    ]  # fmt: skip
    if where:
        reason = f"{name}: slice {_listed(where)} along {'ijk'[label.axis]} fits neither of its neighbours."
        yield Remark("jump", reason, name, tuple(where))


def _size(voxels: int, label: LabelMap) -> str:
    mm3 = int(voxels) * float(np.prod(label.spacing_mm))
    return f"{mm3:.3g} mm³" if mm3 < 1000 else f"{mm3 / 1000:.3g} ml"


def _others(axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(3) if a != axis)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(numbers: tuple[int, ...] | list[int], most: int = 8) -> str:
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")
