"""Checks of one label map by itself: islands, holes, gaps, jumps from slice to slice, values without a name.

Frame: voxels ``(I, J, K)`` as the image's file has them; slices along ``axis`` in the file's order. Pure functions,
thread-safe. A structure of several parts of similar size (two kidneys under one name) is no island; a hole is looked
for in three dimensions, so that a ring that is open at its ends, as a myocardium, has none. Left out is what anatomy
does as well: a tip that lies beside the next slice, a drift from slice to slice, a part that swells in the middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy import ndimage

from lib.quality.rules import Remark, Rules

Slices = tuple[slice, slice, slice]
Finding = tuple[str, list[int], str, float]  # check, slices of the stack, words with a place for them, share


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

    def structures(self) -> Iterator[tuple[str, Slices, np.ndarray]]:
        """Name, box and the mask in it of every structure that has voxels; several values may bear one name."""
        boxes: dict[str, dict[int, Slices]] = {}
        for value, box in enumerate(ndimage.find_objects(self.voxels), start=1):
            if box is not None:
                boxes.setdefault(self.names.get(value, f"value {value}"), {})[value] = box
        for name, parts in boxes.items():
            i, j, k = (slice(min(s.start for s in ends), max(s.stop for s in ends)) for ends in zip(*parts.values()))
            yield name, (i, j, k), np.isin(self.voxels[i, j, k], list(parts))

    def without(self, name: str) -> LabelMap:
        """The same with 0 in place of a structure."""
        values = [value for value, own in self.names.items() if own == name]
        if not values:
            return self
        voxels = np.where(np.isin(self.voxels, values), np.uint16(0), self.voxels)
        return replace(self, voxels=voxels, names={v: own for v, own in self.names.items() if own != name})


def check_map(label: LabelMap, rules: Rules) -> list[Remark]:
    """Everything remarkable about one label map."""
    found = [_unnamed(label)] if label.unnamed else []
    empty = True
    for name, box, mask in label.structures():
        empty = False
        found += [*_islands(mask, name, label, rules), *_holes(mask, label.voxels[box] == 0, name, label, rules)]
        stack = _stack(mask, label, rules)
        first, along = box[label.axis].start, "ijk"[label.axis]
        for check, slices, words, share in (*_gaps(stack), *_jumps(stack)):
            where = tuple(k + first for k in slices)
            reason = f"{name}: {words.format(f'slice {_listed(where)} along {along}')}."
            found.append(Remark(check, reason, name, where, share))
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


@dataclass(frozen=True)
class _Stack:
    """Slices of one structure in a row.

    Args:
        outlines: ``(n, h, w)`` bool; rings as discs, since a thin wall need not overlap the next one.
        area_mm2: ``(n,)``.
        spacing_mm: from slice to slice, and of pixels along h and w.
        rules: thresholds.
    """

    outlines: np.ndarray
    area_mm2: np.ndarray
    spacing_mm: tuple[float, float, float]
    rules: Rules

    def pieces(self) -> list[tuple[int, int]]:
        """First slice and end of every run without an empty slice."""
        return [(s.start, s.stop) for (s,) in ndimage.find_objects(ndimage.label(self.area_mm2 > 0)[0])]

    def part(self, start: int, stop: int) -> _Stack:
        return replace(self, outlines=self.outlines[start:stop], area_mm2=self.area_mm2[start:stop])

    def longest(self) -> int:
        """How many slices can be a fault of the rest: fewer than half."""
        return min(self.rules.jump_slices, (len(self.area_mm2) - 1) // 2)

    def overlap(self, k: int, m: int) -> float:
        """Share of the smaller of two slices that lies over the larger one; both have voxels."""
        one, other = self.outlines[k], self.outlines[m]
        return int((one & other).sum()) / min(int(one.sum()), int(other.sum()))

    def fit(self, k: int, m: int) -> bool:
        small, large = sorted((self.area_mm2[k], self.area_mm2[m]))
        return bool(small >= self.rules.jump_area * large) and self.overlap(k, m) >= self.rules.jump_overlap

    def count(self, k: int, m: int) -> bool:
        """Whether both have enough voxels to say that something does not fit them."""
        return bool(min(self.area_mm2[k], self.area_mm2[m]) >= self.rules.jump_mm2)


def _stack(mask: np.ndarray, label: LabelMap, rules: Rules) -> _Stack:
    outlines = np.stack([ndimage.binary_fill_holes(one) for one in np.moveaxis(mask, label.axis, 0)])
    height, width = (label.spacing_mm[a] for a in range(3) if a != label.axis)
    spacing_mm = label.spacing_mm[label.axis], height, width
    return _Stack(outlines, outlines.sum((1, 2)) * height * width, spacing_mm, rules)


def _gaps(stack: _Stack) -> Iterator[Finding]:
    """Few empty slices wherever the structure goes on, more only inside one object. The longer they are beside what is
    labelled, the less they count."""
    empty: list[int] = []
    share = 0.0
    for before, after in pairwise(stack.pieces()):
        length = after[0] - before[1]
        if length <= stack.rules.gap_slices or _is_cut(stack, before, after):
            empty += range(before[1], after[0])
            share = max(share, min(1.0, (before[1] - before[0]) / length, (after[1] - after[0]) / length))
    if empty:
        yield "gap", empty, "no voxel on {}, inside the object", share


def _is_cut(stack: _Stack, before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether two pieces were one: their ends are broad, while two objects taper, and no farther aside of one another
    than the gap is long, as of an oblique object."""
    ends = before[1] - 1, after[0]
    broad = (
        stack.area_mm2[end] >= stack.rules.gap_end * stack.area_mm2[slice(*piece)].max()
        for end, piece in zip(ends, (before, after))
    )
    if not all(broad):
        return False
    one, other = stack.outlines[list(ends)]
    aside_mm = ndimage.distance_transform_edt(~one, sampling=stack.spacing_mm[1:])[other].min()
    return bool(aside_mm <= (after[0] - before[1]) * stack.spacing_mm[0])


def _jumps(stack: _Stack) -> Iterator[Finding]:
    found: dict[str, list[int]] = {}
    for start, stop in stack.pieces():
        part = stack.part(start, stop)
        strays = _strays(part)
        for words, slices in (
            ("{} fits neither of its neighbours", sorted(strays)),
            ("{} at the object's end is far larger than the one beside it", _swollen(part, strays)),
            ("the object goes on beside itself from {}", [k for k in _shifts(part) if not {k - 1, k} & strays]),
        ):
            found.setdefault(words, []).extend(k + start for k in slices)
    yield from (("jump", slices, words, 1.0) for words, slices in found.items() if slices)


def _strays(part: _Stack) -> set[int]:
    """Slices, one or a few in a row, that fit neither of the two around them, which fit each other: what drifts or
    tapers is no jump, however thick the slices are."""
    broken = [k for k in range(len(part.area_mm2) - 1) if not part.fit(k, k + 1)]
    found: set[int] = set()
    for length in range(1, part.longest() + 1):
        for before in broken:
            after, run = before + length + 1, range(before + 1, before + length + 1)
            if after - 1 not in broken or found & {*run} or not part.count(before, after):
                continue
            if part.fit(before, after) and not any(part.fit(before, k) or part.fit(k, after) for k in run):
                found |= {*run}
    return found


def _swollen(part: _Stack, strays: set[int]) -> list[int]:
    """The first or last slices where they are far larger than what follows, no stray. An object may end broad, but it
    does not swell at its end."""
    found: list[int] = []
    everything = range(len(part.area_mm2))
    for order in (everything, everything[::-1]):
        area = part.area_mm2[order]
        for length in range(1, min(part.longest(), len(area) - 3) + 1):
            beside, next_one = order[length : length + 2]
            is_small = area[length] < part.rules.jump_area * area[length - 1]  # maybe the object's own tip
            if not is_small or beside in strays or area[length:].max() < part.rules.jump_mm2:
                continue
            if part.overlap(beside, next_one) >= part.rules.jump_overlap:
                found += order[:length]
                break
    return sorted(found)


def _shifts(part: _Stack) -> Iterator[int]:
    """Slices that hardly lie over the one before, while two more on either side fit: beside a tip, and where every
    slice moves, that is anatomy."""
    for k in range(3, len(part.area_mm2) - 2):
        apart = part.count(k - 1, k) and part.overlap(k - 1, k) < part.rules.shift_overlap
        if apart and all(part.fit(m, m + 1) for m in (k - 3, k - 2, k, k + 1)):
            yield k


def _size(voxels: int, label: LabelMap) -> str:
    mm3 = int(voxels) * float(np.prod(label.spacing_mm))
    return f"{mm3:.3g} mm³" if mm3 < 1000 else f"{mm3 / 1000:.3g} ml"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(numbers: tuple[int, ...] | list[int], most: int = 8) -> str:
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")
