"""Pictures of the worst slice: which slice, the right way up for a radiologist, outlines where the masks are."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lib.data.geometry import slice_view
from lib.versions.pictures import (
    BOTH,
    FOUND,
    LONG_SIDE,
    TRUTH,
    outline,
    overlay_png,
    turned,
    turned_spacing,
    worst_slice,
)


def opened(png: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("number", "expected"), [(1, 3), (2, 1), (3, 0)])
def test_worst_slice_is_where_most_voxels_of_the_class_are_wrong(axis, number, expected) -> None:
    truth, found = np.zeros((2, 6, 6, 6), np.uint8)
    for index, wrong, value in ((3, 4, 1), (4, 3, 1), (1, 2, 2), (2, 6, 5)):
        slice_view(truth, axis, index)[0, :wrong] = value
    slice_view(truth, axis, 5)[:] = slice_view(found, axis, 5)[:] = 1  # large and right
    assert worst_slice(found, truth, axis, number) == expected


def _affine(codes: str) -> np.ndarray:
    """Voxel axes that run towards these directions, such as ``RAS``."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, code in enumerate(codes):
        world = next(n for n, pair in enumerate(("LR", "PA", "IS")) if code in pair)
        affine[world, axis] = 1.0 if code in "RAS" else -1.0
    return affine


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "RPI", "SAR", "ASL", "PIR", "IRP"])
@pytest.mark.parametrize(("world", "corner"), [(0, "AS"), (1, "RS"), (2, "RA")])
def test_turned_puts_right_front_and_head_at_the_upper_left(codes: str, world: int, corner: str) -> None:
    """``corner``: the two directions in which the marked voxel lies, which the upper left corner must show."""
    axis = next(n for n, code in enumerate(codes) if code in ("LR", "PA", "IS")[world])
    array = np.zeros((3, 3, 3))
    place = [1 if n == axis else (2 if code in corner else 0) for n, code in enumerate(codes)]
    array[tuple(place)] = 1
    shown = turned(slice_view(array, axis, 1), axis, _affine(codes))
    assert shown.sum() == 1 and shown[0, 0] == 1


@pytest.mark.parametrize(
    ("codes", "axis", "expected"),
    [("RAS", 2, (3.0, 2.0)), ("ARS", 2, (2.0, 3.0)), ("RAS", 0, (5.0, 3.0)), ("RSA", 0, (3.0, 5.0))],
)
def test_turned_spacing_follows_the_swap(codes, axis, expected) -> None:
    assert turned_spacing((2.0, 3.0, 5.0), axis, _affine(codes)) == expected


def test_overlay_has_square_pixels_and_outlines_of_one_class() -> None:
    truth, found = np.zeros((2, 20, 30), np.uint8)
    truth[5:15, 5:15], found[5:15, 10:20], truth[0:3, 0:3] = 1, 1, 2
    shown = opened(overlay_png(np.full((20, 30), 0.5), truth, found, 1, (3.0, 1.0)))
    assert shown.shape == (LONG_SIDE, LONG_SIDE // 2, 3)
    across, down = LONG_SIDE // 60, LONG_SIDE // 20
    assert tuple(shown[10 * down, 5 * across]) == TRUTH
    assert tuple(shown[10 * down, 20 * across - 1]) == FOUND
    assert tuple(shown[5 * down, 12 * across]) == BOTH
    assert tuple(shown[10 * down, 12 * across]) == (128, 128, 128)  # inside, and label 2 is not drawn:
    assert not {TRUTH, FOUND, BOTH} & {tuple(p) for p in shown[: 4 * down].reshape(-1, 3)}


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.full((4, 4), 2.0), (255, 255, 255)),
        (np.full((4, 4), np.nan), (0, 0, 0)),
        (np.tile([1.0, 0.5, 0.0], (4, 4, 1)), (255, 128, 0)),
        (np.tile([0.5, 1.0], (4, 4, 1)), (128, 128, 128)),  # two channels: the first
        (np.tile([0.5, 1.0, 1.0, 1.0], (4, 4, 1)), (128, 128, 128)),
    ],
)
def test_overlay_takes_grey_colour_and_channels(pixels, expected) -> None:
    empty = np.zeros((4, 4), np.uint8)
    assert tuple(opened(overlay_png(pixels, empty, empty, 1, (1.0, 1.0)))[9, 9]) == expected


def test_outline_is_the_rim_alone() -> None:
    mask = np.zeros((12, 12), bool)
    mask[2:10, 2:10] = True
    rim = outline(mask)
    assert rim.sum() == 64 - 16 and not rim[5, 5] and rim[2, 2]
