"""Parts of a correction that are kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.contracts import BackboneSpec, PromptSet
from lib.correction import Points, near_points
from lib.transform import SliceTransform

G = 16
SPEC = BackboneSpec("x", "sam1", 64, "pad_br")


def logits(*parts: tuple[slice, slice]) -> torch.Tensor:
    found = torch.full((1, G, G), -3.0)
    for part in parts:
        found[0][part] = 3.0
    return found


def points(*places: tuple[float, float]) -> Points:
    return Points.at(torch.tensor(places, dtype=torch.float32).reshape(-1, 2), 1.0, G)


A, B, C = (slice(1, 4), slice(1, 4)), (slice(8, 12), slice(8, 12)), (slice(8, 12), slice(1, 4))


@pytest.mark.parametrize(
    ("places", "kept"),
    [
        ([(2, 2)], [A, C]),  # the new part with the click; the other new one and the lost one are not wanted
        ([(9, 9)], [B, C]),
        ([(2, 2), (9, 9)], [A, B, C]),
        ([(9, 2)], []),  # the lost part
        ([(2, 2), (9, 2)], [A]),
        ([(2, 5)], [C]),  # two cells beside a part
        ([(2, 4)], [A, C]),  # on its rim
        ([], [C]),
    ],
)
def test_change_is_kept_where_a_point_lies(places, kept) -> None:
    found = near_points(logits(A, B), logits(C), points(*places))
    assert torch.equal(found > 0, logits(*kept) > 0)


def test_parts_that_touch_at_a_corner_are_one() -> None:
    one, other = (slice(2, 4), slice(2, 4)), (slice(4, 6), slice(4, 6))
    assert torch.equal(near_points(logits(one, other), logits(), points((2, 2))), logits(one, other))


def test_logits_without_a_change_stay_what_they_were() -> None:
    after, before = logits(A) * 2, logits(A)
    assert torch.equal(near_points(after, before, points((2, 2))), before)


@pytest.mark.parametrize("last", [False, True], ids=["first voxel", "last voxel"])
@pytest.mark.parametrize("size", [(16, 16), (200, 320), (40, 10)])
def test_point_of_a_voxel_lies_in_its_cells(size: tuple[int, int], last: bool) -> None:
    transform = SliceTransform(SPEC, size)
    place = (size[0] - 1, size[1] - 1) if last else (0, 0)
    prompts = PromptSet(points_xy=transform.points_xy(np.array([place], float))[None], labels=torch.tensor([[1]]))
    found = Points.of(prompts, transform)
    mask = torch.zeros(1, 1, *size)
    mask[0, 0, place[0], place[1]] = 1.0
    share = transform.coverage(mask)[0, 0]
    assert found.distance.shape == (transform.spec.mask_size,) * 2 and found.distance.min() <= 0.71
    assert share.flatten()[found.distance.argmin()] >= 0.5 * share.max()
    assert found.distance.flatten()[share.argmax()] <= found.radius


def test_no_points_are_none() -> None:
    found = Points.of(PromptSet(), SliceTransform(SPEC, (20, 20)))
    assert torch.isinf(found.distance).all() and torch.equal(near_points(logits(A), logits(B), found), logits(B))
