"""User prompts by slice."""

from __future__ import annotations

import numpy as np
import pytest

from lib.config import backbone_row
from lib.contracts import BackboneSpec
from lib.errors import PromptError
from lib.prompts.scribble import stroke_points
from lib.prompts.user import SlicePrompts, by_slice, prompt_set
from lib.transform import SliceTransform
from lib.types import Box, Click, Stroke, UserPrompts

SHAPE = (10, 20, 30)


def test_by_slice_sorts_clicks_of_each_axis() -> None:
    prompts = UserPrompts((Click((3, 4, 5)), Click((6, 7, 5), positive=False), Click((1, 2, 2))))
    assert by_slice(prompts, SHAPE, 2) == {
        2: SlicePrompts([(2, 1, True)]),
        5: SlicePrompts([(4, 3, True), (7, 6, False)]),
    }
    assert sorted(by_slice(prompts, SHAPE, 0)) == [1, 3, 6]


def test_by_slice_box_stands_on_every_slice() -> None:
    slices = by_slice(UserPrompts(boxes=(Box((1, 2, 3), (5, 8, 6)),)), SHAPE, 2)
    assert slices == {k: SlicePrompts(box_rc=(2, 1, 8, 5)) for k in (3, 4, 5)}


# axis, points by slice of a stroke on two k slices
STROKE = Stroke(np.array([(1, 2, 3), (1, 2, 4), (2, 2, 3), (1, 2, 3)]))
STROKES = [
    (0, {1: [(3, 2, True), (4, 2, True)], 2: [(3, 2, True)]}),
    (1, {2: [(3, 1, True), (3, 2, True), (4, 1, True)]}),
    (2, {3: [(2, 1, True), (2, 2, True)], 4: [(2, 1, True)]}),
]


@pytest.mark.parametrize(("axis", "expected"), STROKES)
def test_by_slice_stroke_becomes_points_on_each_slice(axis: int, expected: dict) -> None:
    found = by_slice(UserPrompts(strokes=(STROKE,)), SHAPE, axis)
    assert found == {index: SlicePrompts(points) for index, points in expected.items()}


def test_by_slice_long_stroke_is_thinned_and_joins_clicks() -> None:
    voxels = np.array([(i, j, 7) for i in range(10) for j in range(20)])
    prompts = UserPrompts((Click((0, 0, 7)),), (Box((0, 0, 7), (5, 5, 8)),), (Stroke(voxels, positive=False),))
    (found,) = by_slice(prompts, SHAPE, 2).values()
    assert found.points_rc[0] == (0, 0, True)
    assert found.points_rc[1:] == [(r, c, False) for r, c in stroke_points(voxels[:, [1, 0]]).tolist()]
    assert len(found.points_rc) == 9
    assert found.box_rc == (0, 0, 5, 5)


def test_by_slice_corrections_may_be_negative_alone() -> None:
    clicks = UserPrompts((Click((1, 2, 3), positive=False),), strokes=(Stroke(np.array([[1, 2, 4]]), positive=False),))
    expected = {k: SlicePrompts([(2, 1, False)]) for k in (3, 4)}
    assert by_slice(clicks, SHAPE, 2, corrections=True) == expected
    with pytest.raises(PromptError, match="received none"):
        by_slice(UserPrompts(), SHAPE, 2, corrections=True)


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        (UserPrompts(), "received none"),
        (UserPrompts(strokes=(Stroke(np.array([[1, 1, 1]]), positive=False),)), "negative clicks only"),
        (UserPrompts(strokes=(Stroke(np.array([[1, 1, 1], [1, 1, 30]])),)), r"received \(1, 1, 30\)"),
        (UserPrompts(strokes=(Stroke(np.array([[1, -1, 1], [1, 1, 1]])),)), r"received \(1, -1, 1\)"),
        (UserPrompts((Click((1, 1, 1), positive=False),)), "negative clicks only"),
        (UserPrompts((Click((10, 0, 0)),)), r"received \(10, 0, 0\)"),
        (UserPrompts((Click((-1, 0, 0)),)), r"received \(-1, 0, 0\)"),
        (UserPrompts(boxes=(Box((0, 0, 0), (11, 5, 5)),)), "received"),
        (UserPrompts(boxes=(Box((0, 0, 0), (5, 5, 5)), Box((1, 1, 1), (6, 6, 6)))), "one box per slice"),
    ],
)
def test_by_slice_refuses(prompts: UserPrompts, text: str) -> None:
    with pytest.raises(PromptError, match=text):
        by_slice(prompts, SHAPE, 2)


def test_prompt_set_is_in_backbone_pixels() -> None:
    row = backbone_row("compact")
    transform = SliceTransform(BackboneSpec(name="compact", **row.spec), (128, 256))
    side = row.spec["input_size"]
    found = prompt_set(SlicePrompts([(0, 255, True), (127, 0, False)], (0, 0, 128, 256)), transform)
    assert found.points_xy is not None
    assert found.boxes_xy is not None
    assert found.points_xy[0, 0].tolist() == pytest.approx([side * 255.5 / 256 - 0.5, side * 0.5 / 128 - 0.5])
    assert found.labels is not None
    assert found.labels.tolist() == [[1, 0]]
    assert found.boxes_xy[0].tolist() == [-0.5, -0.5, side - 0.5, side - 0.5]
