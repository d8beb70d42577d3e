"""Strokes to a few points per slice, which every SAM backbone takes. Frame: ``_rc`` of one slice. Pure, thread-safe."""

from __future__ import annotations

import numpy as np

STROKE_POINTS = 8  # per stroke and slice: about as many as a user would click along it


def stroke_points(stroke_rc: np.ndarray, limit: int = STROKE_POINTS) -> np.ndarray:
    """Pixels that stand for a stroke on one slice, by farthest-point sampling.

    The first is the pixel nearest the centroid, each next one the pixel farthest from all before, ties going to the
    upper and then the left pixel: the order in which pixels were drawn, and drawing them twice, changes nothing.

    Args:
        stroke_rc: ``(M, 2)`` rows and columns, M > 0.
        limit: at most so many points, at least 1.

    Returns:
        ``(min(limit, different pixels), 2)`` of these pixels, in the order of choice.
    """
    pixels = _different(np.asarray(stroke_rc, np.int64))
    chosen = [int(_squared(pixels, pixels.mean(0)).argmin())]
    distance = _squared(pixels, pixels[chosen[0]])
    while len(chosen) < min(limit, len(pixels)):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, _squared(pixels, pixels[chosen[-1]]))
    return pixels[chosen]


def _different(pixels: np.ndarray) -> np.ndarray:
    """Each pixel once, by row, then column; as one number each, ten times faster than numpy's unique rows."""
    low = pixels.min(0)
    width = int(pixels[:, 1].max() - low[1]) + 1
    rows, columns = np.divmod(np.unique((pixels[:, 0] - low[0]) * width + pixels[:, 1] - low[1]), width)
    return np.stack([rows, columns], 1) + low


def _squared(pixels: np.ndarray, point: np.ndarray) -> np.ndarray:
    return ((pixels - point) ** 2).sum(1)
