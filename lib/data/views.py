"""The augmentation of training slices: what the paper of Sam2Rad does (METHODS 3.5, row Augmentation), per slice.

All moves are one affine map and one resampling. Frame: pixels of the slice, ``_rc`` from its centre, whatever their
spacing, as the network sees them. Thread-safe and deterministic: every random number comes from the seed and no global
generator is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin
from typing import Optional

import numpy as np

PROBABILITY = 0.5  # of each move by itself
# Ours, not the paper's: scanners differ in contrast more than a fixed window evens out.
INTENSITY_PROBABILITY = 0.3
GAMMA = 0.25  # exponent exp(-0.25)..exp(0.25)
BRIGHTNESS = 0.1  # factor 0.9..1.1


@dataclass(frozen=True)
class Moves:
    """How far a view may differ from its slice.

    Args:
        flips: mirrored along rows and along columns.
        shift: of height and width, either way.
        rotation: in radians, either way.
        crop: least side of the window that is enlarged to the whole slice.
        intensity: also a mild gamma and brightness with probability 0.3.
    """

    flips: bool = True
    shift: float = 0.2
    rotation: float = pi / 2
    crop: float = 0.8
    intensity: bool = False


# "paper" is what the paper of Sam2Rad does. Slices of a volume keep their orientation, left and right included, and a
# short training learns it: "mild" leaves it as it is.
MOVES = {"paper": Moves(), "mild": Moves(flips=False, shift=0.1, rotation=pi / 12, crop=0.85, intensity=True)}


def augmented(
    pixels: np.ndarray, target: np.ndarray, seed: int, moves: Moves = MOVES["paper"]
) -> tuple[np.ndarray, np.ndarray]:
    """A slice and its target, moved alike: flips, shift, rotation and crop, each with probability 0.5.

    Args:
        pixels: ``(H, W)`` or ``(H, W, 3)`` float in 0..1.
        target: ``(H, W)`` uint8 class numbers.
        seed: not negative; equal seeds give equal results.
        moves: how far it may differ.

    Returns:
        New arrays of the same shape: float32 in 0..1, bilinear, and uint8, nearest; 0 where the view leaves the slice.
        A structure may leave it too and is then absent from the target.
    """
    rng = np.random.default_rng(seed)
    matrix = _matrix(rng, (target.shape[0], target.shape[1]), moves)
    colour = _recolouring(rng)
    image = np.atleast_3d(pixels).transpose(2, 0, 1)  # (C, H, W)
    moved = _resampled(image, matrix, "bilinear").transpose(1, 2, 0).reshape(pixels.shape)
    moved = np.clip(moved, 0, 1)
    if moves.intensity and colour is not None:
        gamma, factor = colour
        moved = np.clip(moved**gamma * factor, 0, 1)
    classes = _resampled(target[None], matrix, "nearest")[0]
    return np.ascontiguousarray(moved, dtype=np.float32), np.rint(classes).astype(np.uint8)


def _matrix(rng: np.random.Generator, size: tuple[int, int], moves: Moves) -> np.ndarray:
    """``(3, 3)`` map from a pixel of the result to the pixel it is read from, both from the centre of the slice."""
    use = rng.random(5) < PROBABILITY
    draw = rng.uniform(-1, 1, 6)  # always all, so that one move's use does not change another's size
    extent = np.array(size, np.float64)
    side = 1 - (1 - moves.crop) * (draw[0] + 1) / 2 if use[0] else 1.0
    crop = np.diag([side, side, 1.0])
    crop[:2, 2] = draw[1:3] * (1 - side) / 2 * extent
    angle = draw[3] * moves.rotation if use[1] else 0.0
    turn = np.array([[cos(angle), -sin(angle), 0.0], [sin(angle), cos(angle), 0.0], [0.0, 0.0, 1.0]])
    shift = np.eye(3)
    shift[:2, 2] = draw[4:6] * moves.shift * extent * use[2]
    flips = np.diag([-1.0 if moves.flips and turned else 1.0 for turned in use[3:]] + [1.0])
    return flips @ turn @ shift @ crop


def _recolouring(rng: np.random.Generator) -> Optional[tuple[float, float]]:
    use, gamma, factor = rng.random(), rng.uniform(-GAMMA, GAMMA), rng.uniform(-BRIGHTNESS, BRIGHTNESS)
    return (float(np.exp(gamma)), float(1 + factor)) if use < INTENSITY_PROBABILITY else None


def _resampled(channels: np.ndarray, matrix: np.ndarray, mode: str) -> np.ndarray:
    """``(C, H, W)`` float32 on the same grid, zero outside."""
    import torch
    from monai.transforms import Affine

    move = Affine(affine=matrix, mode=mode, padding_mode="zeros", image_only=True)
    return np.asarray(move(torch.from_numpy(np.ascontiguousarray(channels, dtype=np.float32))))
