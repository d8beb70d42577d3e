"""How well two label maps of one image agree, structure by structure.

Frame: both on the image's grid; distances in mm with the image's spacing. A structure that is in neither counts Dice 1,
one that is only in one counts 0 and has no distance. Values count by their names; in a map that declares none, by the
names that the other map has for them. Thread-safe: no state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Optional

import numpy as np

from lib.quality.checks import LabelMap


def dice_by_label(first: LabelMap, second: LabelMap) -> dict[str, float]:
    """Dice by structure, of those that ``second``, the model's map, declares; where it declares none, of all there are.

    What the model was never asked for is no disagreement.
    """
    return {name: _dice(a, b) for name, a, b in _pairs(first, second)}


def agreement(first: LabelMap, second: LabelMap) -> dict[str, dict[str, Optional[float]]]:
    """``dice``, ``hd95_mm`` (95th percentile of the Hausdorff distance) and ``mean_mm`` (average symmetric surface
    distance) of the structures of :func:`dice_by_label`, by name.

    Args:
        first: one map.
        second: the other, on the same grid.
    """
    return {name: {"dice": _dice(a, b), **_surface(a, b, first.spacing_mm)} for name, a, b in _pairs(first, second)}


def changed_voxels(first: LabelMap, second: LabelMap) -> int:
    """How many voxels have another name in the one than in the other."""
    first, second = _by_number(first, second), _by_number(second, first)
    names = sorted({*first.names.values(), *second.names.values()})
    one, other = (_numbered(label, names) for label in (first, second))
    return int((one != other).sum())


def _pairs(first: LabelMap, second: LabelMap) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Two masks for every name, one name at a time; several values may bear one name."""
    first, second = _by_number(first, second), _by_number(second, first)
    own = {name for value, name in second.names.items() if value not in second.unnamed}
    names = sorted(own if second.declared else own | {*first.names.values()})
    one, other = (_numbered(label, names) for label in (first, second))
    for n, name in enumerate(names, start=1):
        yield name, one == n, other == n


def _by_number(label: LabelMap, other: LabelMap) -> LabelMap:
    """A map that declares no names, with the other's; training reads a store of both kinds so."""
    if label.declared or not other.declared:
        return label
    theirs = {value: name for value, name in other.names.items() if value not in other.unnamed}
    return replace(label, names=label.names | theirs)


def _numbered(label: LabelMap, names: list[str]) -> np.ndarray:
    table = np.zeros(max([int(label.voxels.max()), *label.names]) + 1, np.uint16)
    for value, name in label.names.items():
        table[value] = names.index(name) + 1 if name in names else 0
    return table[label.voxels]


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


def _surface(a: np.ndarray, b: np.ndarray, spacing_mm: tuple[float, float, float]) -> dict[str, Optional[float]]:
    if not (a.any() and b.any()):
        return {"hd95_mm": None, "mean_mm": None}
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance  # seconds to import

    real = [axis for axis in range(3) if a.shape[axis] > 1]  # across one voxel, every voxel would be surface
    box = tuple(slice(lo, hi) if axis in real else 0 for axis, (lo, hi) in enumerate(_box(a | b)))
    spacing = [spacing_mm[axis] for axis in real]
    one, other = (torch.from_numpy(np.ascontiguousarray(mask[box]))[None, None].float() for mask in (a, b))
    hd95 = compute_hausdorff_distance(one, other, include_background=True, percentile=95, spacing=spacing)
    mean = compute_average_surface_distance(one, other, include_background=True, symmetric=True, spacing=spacing)
    return {"hd95_mm": _finite(float(hd95)), "mean_mm": _finite(float(mean))}


def _box(mask: np.ndarray) -> list[tuple[int, int]]:
    """Ends of the voxels along each axis, and one voxel more, so that no surface lies on the crop's edge."""
    found = []
    for axis in range(3):
        where = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        found.append((max(int(where[0]) - 1, 0), int(where[-1]) + 2))
    return found


def _finite(number: float) -> Optional[float]:
    return number if math.isfinite(number) else None


def summary(cases: dict[str, dict[str, dict[str, Optional[float]]]]) -> dict[str, dict[str, Any]]:
    """Mean Dice and distances by label over the cases, with how many cases have the label."""
    found: dict[str, dict[str, Any]] = {}
    for label in sorted({label for rows in cases.values() for label in rows}):
        rows = [one[label] for one in cases.values() if label in one]
        means = {key: _mean([row[key] for row in rows]) for key in ("dice", "hd95_mm", "mean_mm")}
        found[label] = {"cases": len(rows), **means}
    return found


def _mean(values: list[Optional[float]]) -> Optional[float]:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
