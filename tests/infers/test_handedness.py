"""Prompts counted as 3D Slicer counts the slices of left-handed images."""

from __future__ import annotations

import numpy as np
import pytest

from infers.handedness import mirrored, slicer_reverses
from infers.request import in_file_order
from lib.errors import PromptError
from lib.types import Box, Click, Stroke, UserPrompts, Volume, Window

LEFT, RIGHT = np.diag([-1.0, 1.0, 3.0, 1.0]), np.diag([-1.0, -1.0, 3.0, 1.0])
DRAWN = UserPrompts(
    (Click((1, 2, 0)), Click((4, 5, 3), positive=False)),
    (Box((0, 1, 2), (4, 5, 5)),),
    (Stroke(np.array([[1, 1, 1], [2, 2, 6]]), positive=False),),
)
TURNED = UserPrompts(
    (Click((1, 2, 6)), Click((4, 5, 3), positive=False)),
    (Box((0, 1, 2), (4, 5, 5)),),
    (Stroke(np.array([[1, 1, 5], [2, 2, 0]]), positive=False),),
)


def volume(affine: np.ndarray) -> Volume:
    """Seven slices."""
    return Volume(np.zeros((6, 6, 7), np.float32), affine, (1.0, 1.0, 3.0), Window(0, 1), "")


@pytest.mark.parametrize(
    ("affine", "expected"),
    [
        (np.eye(4), False),
        (RIGHT, False),  # LPS, as DICOM series
        (LEFT, True),  # LAS, as dcm2niix writes axial series
        (LEFT[[1, 2, 0, 3]], True),
        (LEFT[[1, 0, 2, 3]], False),
        (np.diag([1.0, 1.0, -3.0, 1.0]), True),
    ],
)
def test_slicer_reverses_left_handed_images(affine: np.ndarray, expected: bool) -> None:
    assert slicer_reverses(affine) is expected


def test_mirrored_prompts_are_counted_from_the_other_end_and_back() -> None:
    assert mirrored(DRAWN, 7) == TURNED
    assert mirrored(mirrored(DRAWN, 7), 7) == DRAWN


def test_mirrored_box_covers_the_mirrored_voxels() -> None:
    box = mirrored(UserPrompts(boxes=(Box((0, 0, 1), (2, 2, 3)),)), 7).boxes[0]
    assert (box.lo, box.hi) == ((0, 0, 4), (2, 2, 6))  # slices 1 and 2 are 5 and 4


@pytest.mark.parametrize(
    ("request_", "affine", "expected"),
    [
        ({"ijk": "slicer"}, LEFT, TURNED),
        ({"ijk": ["slicer", "file"]}, LEFT, TURNED),
        ({"ijk": "slicer"}, RIGHT, DRAWN),
        ({"ijk": "file"}, LEFT, DRAWN),
        ({}, LEFT, DRAWN),  # scripts count as the file does
    ],
)
def test_in_file_order_mirrors_what_slicer_drew_on_a_left_handed_image(
    request_: dict, affine: np.ndarray, expected: UserPrompts
) -> None:
    assert in_file_order(DRAWN, request_, volume(affine)) == expected


def test_in_file_order_refuses_another_word() -> None:
    with pytest.raises(PromptError, match=r"ijk: expected one of \['slicer', 'file'\], received 'ras'"):
        in_file_order(DRAWN, {"ijk": "ras"}, volume(RIGHT))
