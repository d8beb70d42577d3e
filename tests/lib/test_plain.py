"""Overlapping answers of plain SAM as one label map."""

from __future__ import annotations

import numpy as np
import pytest

from lib.plain import label_map
from lib.types import Box, Click, Prediction, Stroke, UserPrompts

SPACING = (1.0, 1.0, 1.0)


def answer(*ranges: tuple[int, int]) -> Prediction:
    """A block in the middle slice of a small volume."""
    mask = np.zeros((20, 20, 3), np.uint8)
    mask[(*(slice(*r) for r in ranges), 1)] = 1
    return Prediction(mask, {1: 0.9}, axis=2)


def at(*points: tuple[int, int, int], positive: bool = True) -> UserPrompts:
    return UserPrompts(tuple(Click(p, positive) for p in points))


def test_one_label_is_plain_sam() -> None:
    found = {2: answer((2, 9), (2, 9))}
    assert np.array_equal(label_map(found, {2: at((15, 15, 1))}, SPACING, walks=True), found[2].mask * 2)


def test_contested_voxel_goes_to_the_nearest_prompt_whichever_label_comes_first() -> None:
    outer, inner = answer((2, 18), (2, 18)), answer((7, 13), (7, 13))
    prompts = {1: at((3, 3, 1)), 2: at((10, 10, 1))}
    found = label_map({1: outer, 2: inner}, prompts, SPACING, walks=True)
    assert np.array_equal(found == 2, inner.mask > 0)
    assert np.array_equal(found > 0, outer.mask > 0)
    other = label_map({2: outer, 1: inner}, {2: prompts[1], 1: prompts[2]}, SPACING, walks=True)
    assert np.array_equal(other, np.array([0, 2, 1])[found])


def test_distance_is_in_mm() -> None:
    both = {1: answer((0, 20), (0, 20)), 2: answer((0, 20), (0, 20))}
    prompts = {1: at((10, 4, 1)), 2: at((4, 10, 1))}
    assert label_map(both, prompts, (1.0, 1.0, 1.0), walks=True)[5, 5, 1] in (1, 2)
    assert label_map(both, prompts, (1.0, 5.0, 1.0), walks=True)[10, 9, 1] == 2
    assert label_map(both, prompts, (5.0, 1.0, 1.0), walks=True)[10, 9, 1] == 1


@pytest.mark.parametrize("first", [1, 2])
def test_what_was_said_is_there(first: int) -> None:
    """Also where the decoder disobeyed: a click on a label's inside that its own answer leaves out."""
    second = 3 - first
    found = {first: answer((2, 18), (2, 18)), second: answer((14, 17), (14, 17))}
    prompts = {
        first: UserPrompts((Click((3, 3, 1)), Click((5, 15, 1), positive=False))),
        second: UserPrompts((Click((10, 10, 1)),), (), (Stroke(np.array([(8, 4, 1), (9, 4, 1)]), True),)),
    }
    mask = label_map(found, prompts, SPACING, walks=True)
    assert mask[10, 10, 1] == mask[8, 4, 1] == mask[9, 4, 1] == second
    assert mask[5, 15, 1] == 0 and mask[3, 3, 1] == first


def test_box_counts_by_its_middle() -> None:
    found = {1: answer((2, 18), (2, 18)), 2: answer((2, 18), (2, 18))}
    prompts = {1: UserPrompts(boxes=(Box((2, 2, 1), (18, 18, 2)),)), 2: at((3, 3, 1))}
    mask = label_map(found, prompts, SPACING, walks=True)
    assert mask[9, 9, 1] == 1 and mask[4, 4, 1] == 2
