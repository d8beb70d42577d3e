"""User prompts by slice."""

from __future__ import annotations

import pytest

from lib.config import backbone_row
from lib.contracts import BackboneSpec
from lib.errors import PromptError
from lib.prompts.user import SlicePrompts, by_slice, prompt_set
from lib.transform import SliceTransform
from lib.types import Box, Click, UserPrompts

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


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        (UserPrompts(), "received none"),
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
