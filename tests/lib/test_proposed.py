"""Points from backbone pixels to voxels, across every axis, and which window tells those of a slice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lib.config import backbone_row, from_mapping
from lib.contracts import BackboneSpec
from lib.data.geometry import from_slice_rc
from lib.proposed import points_by_label
from lib.transform import SliceTransform
from lib.types import Click
from lib.windows import _Nearest, fall_off

SPEC = from_mapping(BackboneSpec, {"name": "tiny", **backbone_row("tiny").spec}, "tiny")


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("geometry", ["squash", "pad_br"])
def test_points_become_the_voxels_they_are_made_of(axis: int, geometry: str) -> None:
    transform = SliceTransform(replace(SPEC, geometry=geometry), (40, 30))
    rc = [(0, 0), (39, 29), (17, 4)]
    xy = transform.points_xy(torch.tensor(rc).numpy())
    points = torch.cat([xy, torch.tensor([[1.0], [0.0], [-1.0]])], 1)  # the last is none
    points = torch.stack([points, torch.full_like(points, -1.0)]).unflatten(0, (1, 2))  # one slice, two labels
    found = points_by_label(points, ("a", "b"), axis, transform)
    first, second = (from_slice_rc(0, row, column, axis) for row, column in rc[:2])
    assert found == {"a": {0: (Click(first, True), Click(second, False))}, "b": {}}


def test_points_in_the_padding_are_left_out() -> None:
    transform = SliceTransform(replace(SPEC, geometry="pad_br"), (40, 20))  # the right half is padding
    points = torch.tensor([[SPEC.input_size * 0.25, 30.0, 1.0], [SPEC.input_size * 0.75, 30.0, 1.0]])
    found = points_by_label(points[None, None], ("a",), 2, transform)
    assert [c.ijk[:2] for c in found["a"][0]] == [(10, 19)]


def test_slice_in_two_windows_has_the_points_of_the_one_that_it_is_nearer_the_middle_of() -> None:
    points, classes = _Nearest(6), 2
    for number, place in enumerate((slice(0, 4), slice(2, 6))):
        points.take(place, fall_off(4), torch.full((4 * classes, 1, 3), float(number)), classes)
    assert points.found is not None and points.found.shape == (12, 1, 3)
    assert points.found[:, 0, 0].view(6, 2)[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    none = _Nearest(6)
    none.take(slice(0, 4), fall_off(4), None, classes)
    assert none.found is None
