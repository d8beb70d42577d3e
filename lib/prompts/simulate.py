"""Prompts drawn from a known mask: random ones for training, the deterministic protocol for benches.

Frames: training works on ``(N, G, G)`` masks of the mask-prompt grid and returns backbone pixels; benches work on a
slice in ``_rc``. Randomness comes from the generator passed in.
"""

from __future__ import annotations

from typing import Optional

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from lib.contracts import PromptSet
from lib.data.augment import neighbour

MAX_POINTS = 9


def next_click(target: np.ndarray, predicted: Optional[np.ndarray] = None) -> Optional[tuple[int, int, bool]]:
    """The click a careful user would make next.

    Args:
        target: ``(H, W)`` bool, the structure.
        predicted: ``(H, W)`` bool, or None before the first click.

    Returns:
        ``(row, column, positive)`` at the point deepest inside the largest wrong component (of the structure itself for
        the first click), or None where nothing is wrong.
    """
    errors = [(target if predicted is None else target & ~predicted, True)]
    if predicted is not None:
        errors.append((predicted & ~target, False))
    found = [(*_deepest(mask), positive) for mask, positive in errors if mask.any()]
    if not found:
        return None
    _, row, column, positive = max(found, key=lambda f: f[0])
    return row, column, positive


def _deepest(mask: np.ndarray) -> tuple[int, int, int]:
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    largest = parts == sizes.argmax()
    depth = ndimage.distance_transform_edt(np.pad(largest, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(sizes.max()), int(row), int(column)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Half-open ``(r0, c0, r1, c1)`` of a non-empty ``(H, W)`` mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def inscribed_ellipse(shape: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """``(H, W)`` bool: the ellipse inside a half-open box, the baseline that looks at no pixel."""
    r0, c0, r1, c1 = box
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    down = (rows + 0.5 - (r0 + r1) / 2) / max((r1 - r0) / 2, 0.5)
    across = (columns + 0.5 - (c0 + c1) / 2) / max((c1 - c0) / 2, 0.5)
    return down**2 + across**2 <= 1


def random_boxes(masks: Tensor, scale: float, jitter: float, rng: torch.Generator) -> Tensor:
    """Boxes around masks, each edge moved by up to ``jitter`` of the side; some are drawn more carefully than others.

    Args:
        masks: ``(N, G, G)`` bool, none empty.
        scale: backbone pixels per cell.
        jitter: fraction of the box side.
        rng: source of randomness.

    Returns:
        ``(N, 4)`` x0 y0 x1 y1 in backbone pixels.
    """
    columns, rows = masks.any(1), masks.any(2)
    size = masks.shape[-1]
    lo = torch.stack([columns.float().argmax(1), rows.float().argmax(1)], 1)
    hi = torch.stack([size - columns.flip(1).float().argmax(1), size - rows.flip(1).float().argmax(1)], 1)
    side = (hi - lo).float().repeat(1, 2)
    care = torch.rand(len(masks), 1, generator=rng)
    noise = ((torch.rand(len(masks), 4, generator=rng) * 2 - 1) * care).to(masks.device)
    return torch.cat([lo, hi], 1) * scale + noise * jitter * side * scale - 0.5


def loosened(boxes: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """A ``share`` of ``(N, 4)`` x0 y0 x1 y1 boxes with every edge moved outwards by 0 to half of the box's side."""
    side = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    chosen = torch.rand(len(boxes), 1, generator=rng) < share
    outwards = torch.rand(len(boxes), 4, generator=rng) * 0.5 * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    return boxes + (chosen * outwards).to(boxes.device) * side


def random_points(masks: Tensor, scale: float, rng: torch.Generator) -> Tensor:
    """``(N, 2)`` one uniformly drawn x, y inside each ``(N, G, G)`` mask, in backbone pixels; NaN for an empty mask."""
    weights = masks.flatten(1).float()
    empty = weights.sum(1) == 0
    picked = torch.multinomial(torch.where(empty[:, None], torch.ones_like(weights), weights).cpu(), 1, generator=rng)
    picked = picked[:, 0].to(masks.device)
    xy = torch.stack([picked % masks.shape[-1], picked // masks.shape[-1]], 1).float()
    xy = (xy + torch.rand(xy.shape, generator=rng).to(xy.device)) * scale - 0.5
    return torch.where(empty[:, None], torch.full_like(xy, torch.nan), xy)


def error_clicks(target: Tensor, predicted: Tensor, scale: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """One corrective click per pair, drawn from the larger kind of error.

    Args:
        target: ``(N, G, G)`` bool.
        predicted: ``(N, G, G)`` bool.
        scale: backbone pixels per cell.
        rng: source of randomness.

    Returns:
        ``(N, 1, 2)`` backbone pixels and ``(N, 1)`` labels, -1 where nothing is wrong.
    """
    missed, extra = target & ~predicted, predicted & ~target
    positive = missed.flatten(1).sum(1) >= extra.flatten(1).sum(1)
    wrong = torch.where(positive[:, None, None], missed, extra)
    core = _core(wrong)
    xy = random_points(core, scale, rng)
    label = torch.where(xy.isnan().any(1), -1, positive.long())
    return torch.nan_to_num(xy)[:, None], label[:, None]


def user_prompts(target: Tensor, predicted: Tensor, scale: float, rng: torch.Generator) -> PromptSet:
    """What a user may add to an automatic result, drawn per pair (METHODS 3.3).

    A box (p 0.5, each edge off by up to 5 % of the side), 1 to 9 points (p 0.5, or where nothing else was drawn), most
    of them inside an error, and a mask as carried from the neighbouring slice (p 0.3).

    Args:
        target: ``(N, G, G)`` bool, none empty.
        predicted: ``(N, G, G)`` bool, the automatic result.
        scale: backbone pixels per cell.
        rng: source of randomness.
    """
    n, device = len(target), target.device
    draw = torch.rand(n, 4, generator=rng).to(device)
    boxed, masked = draw[:, 0] < 0.5, draw[:, 1] < 0.3
    pointed = (draw[:, 2] < 0.5) | ~(boxed | masked)
    count = torch.where(pointed, 1 + (draw[:, 3] * MAX_POINTS).long(), 0)
    boxes = random_boxes(target, scale, 0.05, rng)
    points, labels = [], []
    for number in range(int(count.max()) if n else 0):
        xy, label = error_clicks(target, predicted, scale, rng)
        elsewhere = torch.rand(n, generator=rng).to(device) < 0.3  # also where nothing was wrong
        free = (label[:, 0] < 0) | elsewhere
        xy = torch.where(free[:, None, None], random_points(target, scale, rng)[:, None], xy)
        label = torch.where(free[:, None], 1, label)
        points.append(xy)
        labels.append(torch.where((number < count)[:, None], label, -1))
    return PromptSet(
        points_xy=torch.cat(points, 1) if points else None,
        labels=torch.cat(labels, 1) if labels else None,
        boxes_xy=torch.where(boxed[:, None], boxes, torch.nan),
        masks=torch.where(neighbour(target, rng), 6.0, -6.0)[:, None],
        mask_given=masked,
    )


def _core(masks: Tensor) -> Tensor:
    """The masks without their rim where that leaves something: users click inside an error, not on its edge."""
    eroded = -torch.nn.functional.max_pool2d(-masks[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0
    return torch.where(eroded.flatten(1).any(1)[:, None, None], eroded, masks)
