"""The annotator of the labelling session: where it clicks next, and when it is content.

It clicks at the voxel deepest inside the largest error of any structure below the target, an error being a connected
part of what is missing from that structure or of what is too much, and never twice on a voxel. Frame: (i, j, k) of the
stored image, depths in mm. Pure functions, thread-safe. Left out: boxes and strokes, clicks that miss, and second
thoughts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
from scipy import ndimage

from tests.serving import dice

TARGET, MOST = 0.90, 20  # Dice of every structure, clicks per case
Index = tuple[int, int, int]
Ask = Callable[[Sequence["Click"]], np.ndarray]


@dataclass(frozen=True)
class Click:
    """One click.

    Args:
        ijk: voxel.
        structure: from 0, whose error it mends.
        missing: True where the structure is missing there, False where it is too much.
        true_structure: what is there, from 0; None for background.
    """

    ijk: Index
    structure: int
    missing: bool
    true_structure: Optional[int]


@dataclass(frozen=True)
class Outcome:
    """What one case took.

    Args:
        clicks: made; :data:`MOST` for a case that never reached the target.
        reached: whether every structure did.
        proposed: Dice of every structure before the first click.
        dice: at the end.
        course: mean Dice after 0, 1, ... clicks.
    """

    clicks: int
    reached: bool
    proposed: list[float]
    dice: list[float]
    course: list[float]


def annotate(truth: np.ndarray, structures: int, spacing_mm: Sequence[float], ask: Ask) -> Outcome:
    """Clicks until every structure has the target's Dice, or there were :data:`MOST` clicks.

    Args:
        truth: ``(I, J, K)`` numbers, 0 background, structures from 1.
        structures: how many.
        spacing_mm: of the voxels.
        ask: gives ``(structures, I, J, K)`` bool for all clicks so far; for none, what is proposed.
    """
    targets = np.stack([truth == n + 1 for n in range(structures)])
    clicks: list[Click] = []
    found = ask(clicks)
    proposed = scores = [dice(f, t) for f, t in zip(found, targets)]
    course = [float(np.mean(scores))]
    while min(scores) < TARGET and len(clicks) < MOST:
        wrong = [n for n, score in enumerate(scores) if score < TARGET]
        click = next_click(targets, found, wrong, spacing_mm, {c.ijk for c in clicks})
        if click is None:  # the whole error was clicked on
            break
        clicks.append(click)
        found = ask(clicks)
        scores = [dice(f, t) for f, t in zip(found, targets)]
        course.append(float(np.mean(scores)))
    reached = min(scores) >= TARGET
    return Outcome(len(clicks) if reached else MOST, reached, rounded(proposed), rounded(scores), rounded(course))


def next_click(
    targets: np.ndarray,
    found: np.ndarray,
    wrong: Sequence[int],
    spacing_mm: Sequence[float],
    clicked: Collection[Index],
) -> Optional[Click]:
    """The click on the largest error.

    Args:
        targets: ``(structures, I, J, K)`` bool.
        found: the same.
        wrong: structures that count.
        spacing_mm: of the voxels.
        clicked: voxels that are not clicked again.

    Returns:
        None where nothing is wrong but voxels that were clicked.
    """
    errors = [(targets[n] & ~found[n], n, True) for n in wrong] + [(found[n] & ~targets[n], n, False) for n in wrong]
    parts = [(*_largest(mask), n, missing) for mask, n, missing in errors if mask.any()]
    for _, part, n, missing in sorted(parts, key=lambda p: -p[0]):
        ijk = _deepest(part, spacing_mm, clicked)
        if ijk is not None:
            there = np.flatnonzero(targets[(slice(None), *ijk)])
            return Click(ijk, n, missing, int(there[0]) if len(there) else None)
    return None


def _largest(mask: np.ndarray) -> tuple[int, np.ndarray]:
    """Voxels of the largest connected part, and the part."""
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return int(sizes.max()), parts == sizes.argmax()


def _deepest(part: np.ndarray, spacing_mm: Sequence[float], clicked: Collection[Index]) -> Optional[Index]:
    """The voxel farthest from the part's rim; the image's border counts as rim."""
    box = ndimage.find_objects(part.astype(np.uint8))[0]
    depth = ndimage.distance_transform_edt(np.pad(part[box], 1), sampling=spacing_mm)[1:-1, 1:-1, 1:-1]
    corner = [s.start for s in box]
    for ijk in clicked:
        place = tuple(n - start for n, start in zip(ijk, corner))
        if all(0 <= n < size for n, size in zip(place, depth.shape)):
            depth[place] = 0
    if not depth.any():
        return None
    i, j, k = (int(n) + start for n, start in zip(np.unravel_index(int(depth.argmax()), depth.shape), corner))
    return i, j, k


def rounded(values: Sequence[float]) -> list[float]:
    """For the record."""
    return [round(v, 4) for v in values]
