"""Strokes, and the points that stand for them."""

from __future__ import annotations

import numpy as np
import pytest

from lib.errors import PromptError
from lib.prompts.scribble import stroke_points
from lib.types import Click, Stroke, UserPrompts

ROW = [(3, c) for c in range(9)]
CORNERS = [(r, c) for r in range(5) for c in range(5)]

# pixels, limit, points in order of choice
POINTS = [
    ([(2, 7)], 8, [(2, 7)]),
    ([(2, 7), (2, 7)], 8, [(2, 7)]),
    (ROW, 1, [(3, 4)]),
    (ROW, 3, [(3, 4), (3, 0), (3, 8)]),
    (ROW, 5, [(3, 4), (3, 0), (3, 8), (3, 2), (3, 6)]),
    (CORNERS, 5, [(2, 2), (0, 0), (0, 4), (4, 0), (4, 4)]),
    # an arc's centroid lies off it: the start still is one of its pixels
    ([(0, 0), (0, 4), (4, 0)], 8, [(0, 0), (0, 4), (4, 0)]),
    # two parts of one stroke
    ([(0, 0), (0, 1), (0, 2), (9, 9)], 2, [(0, 2), (9, 9)]),
]


@pytest.mark.parametrize(("pixels", "limit", "expected"), POINTS)
def test_stroke_points_table(pixels: list, limit: int, expected: list) -> None:
    found = stroke_points(np.array(pixels), limit)
    assert found.tolist() == [list(p) for p in expected]


def test_stroke_points_ignore_the_order_of_pixels() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 60, (300, 2))
    expected = stroke_points(pixels)
    assert len(expected) == 8
    assert {tuple(p) for p in expected.tolist()} <= {tuple(p) for p in pixels.tolist()}
    for _ in range(5):
        assert (stroke_points(rng.permutation(pixels).astype(np.uint16)) == expected).all()


def test_stroke_is_a_value() -> None:
    voxels = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    stroke, same = Stroke(voxels), Stroke(voxels.tolist())
    voxels[:] = 0
    assert stroke == same and hash(stroke) == hash(same)
    assert (
        stroke != Stroke(same.voxels, positive=False)
        and stroke != Stroke(same.voxels[:1])
        and stroke != Click((1, 2, 3))
    )
    assert UserPrompts(strokes=(stroke,)) == UserPrompts(strokes=(same,))
    assert UserPrompts(strokes=(stroke,)) and not UserPrompts()
    with pytest.raises(ValueError, match="read-only"):
        stroke.voxels[0, 0] = 1


@pytest.mark.parametrize("voxels", [np.zeros((0, 3), int), np.zeros((2, 2), int), np.zeros(3, int), np.zeros((2, 3))])
def test_stroke_refuses_other_arrays(voxels: np.ndarray) -> None:
    with pytest.raises(PromptError, match=r"Expected a stroke of voxel indices, whole numbers \(M, 3\); received"):
        Stroke(voxels)
