"""Classical interactive segmentation from the same prompts: random walker and a GrabCut-like graph cut.

Both work on a window around the prompts, at most half the slice wide for clicks, whose border is taken for background:
a help that the promptable models do not get. Slices are ``(H, W[, 3])`` in 0..1; prompts in ``_rc``.
"""

from __future__ import annotations

import warnings

import numpy as np

from lib.prompts.simulate import inscribed_ellipse
from lib.prompts.user import SlicePrompts

RADIUS = 2  # of a click's seed, in pixels
BINS = 24
# weight of the cut's length, for a box and for clicks, and its contrast: best of six on 36 `adapt` structures
BOX_LAMBDA, CLICK_LAMBDA, GRAPH_SIGMA = 0.3, 1.0, 0.2


def random_walk(pixels: np.ndarray, prompts: SlicePrompts) -> np.ndarray:
    """``(H, W)`` bool by scikit-image's random walker (Grady 2006)."""
    from skimage.segmentation import random_walker

    grey = pixels.mean(2) if pixels.ndim == 3 else pixels
    window, inside, outside = _seeds(grey.shape, prompts)
    if not inside[window].any():  # scikit-image would take the only label left for the first one
        return np.zeros(grey.shape, bool)
    seeds = np.where(inside, 1, np.where(outside, 2, 0))[window]
    out = np.zeros(grey.shape, bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about solvers that are not installed
        out[window] = random_walker(grey[window], seeds, beta=200, mode="cg_j", tol=1e-2) == 1
    return out


def graph_cut(pixels: np.ndarray, prompts: SlicePrompts, rounds: int = 3) -> np.ndarray:
    """``(H, W)`` bool: histograms of inside and outside and a minimal cut, in turns (Rother et al. 2004)."""
    from numpymaxflow import maxflow

    grey = pixels.mean(2) if pixels.ndim == 3 else pixels
    window, inside, outside = _seeds(grey.shape, prompts)
    image, inside, outside = grey[window].astype(np.float32), inside[window], outside[window]
    levels = np.clip((image * BINS).astype(int), 0, BINS - 1)
    mask = _first_guess(image.shape, inside, outside, window, prompts)
    length = BOX_LAMBDA if prompts.box_rc else CLICK_LAMBDA
    for _ in range(rounds):
        odds = _histogram(levels[mask | inside])[levels], _histogram(levels[~mask | outside])[levels]
        prob = odds[0] / (odds[0] + odds[1])
        prob = np.where(inside, 1.0, np.where(outside, 0.0, prob)).clip(1e-4, 1 - 1e-4)
        both = np.stack([1 - prob, prob]).astype(np.float32)
        mask = maxflow(image[None], both, length, GRAPH_SIGMA, connectivity=8)[0] > 0.5
    out = np.zeros(grey.shape, bool)
    out[window] = mask
    return out


def _histogram(values: np.ndarray) -> np.ndarray:
    counts = np.bincount(values, minlength=BINS) + 0.5
    return counts / counts.sum()


def _first_guess(
    shape: tuple[int, ...], inside: np.ndarray, outside: np.ndarray, window: tuple[slice, slice], prompts: SlicePrompts
) -> np.ndarray:
    if prompts.box_rc is not None:
        return ~outside
    from scipy.ndimage import distance_transform_edt

    reach = 0.15 * max(shape)
    return (distance_transform_edt(~inside) < reach) & ~outside


def _seeds(shape: tuple[int, ...], prompts: SlicePrompts) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """Window, certain foreground and certain background, both on the whole slice."""
    inside, outside = np.zeros(shape, bool), np.ones(shape, bool)
    if prompts.box_rc is not None:
        r0, c0, r1, c1 = prompts.box_rc
        window = tuple(slice(max(0, lo - 6), min(n, hi + 6)) for lo, hi, n in ((r0, r1, shape[0]), (c0, c1, shape[1])))
        outside[r0:r1, c0:c1] = False
        down, across = 0.4 * (r1 - r0), 0.4 * (c1 - c0)
        inside = inscribed_ellipse(shape, (r0 + down, c0 + across, r1 - down, c1 - across))  # type: ignore[arg-type]
        inside[(r0 + r1) // 2, (c0 + c1) // 2] = True  # in boxes of up to 6 pixels the ellipse can miss every centre
    else:
        row, column, _ = prompts.points_rc[0]
        window = tuple(
            slice(max(0, at - n // 4), min(n, at + n // 4)) for at, n in ((row, shape[0]), (column, shape[1]))
        )
        outside[window[0].start + 1 : window[0].stop - 1, window[1].start + 1 : window[1].stop - 1] = False
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    for row, column, positive in prompts.points_rc:
        spot = (rows - row) ** 2 + (columns - column) ** 2 <= RADIUS**2
        inside, outside = (inside | spot, outside & ~spot) if positive else (inside & ~spot, outside | spot)
    return window, inside, outside & ~inside  # type: ignore[return-value]
