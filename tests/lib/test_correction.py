"""Parts of a correction that are kept, and points that are obeyed."""

from __future__ import annotations

import pytest
import torch

from lib.contracts import BackboneSpec, PromptSet
from lib.correction import OBEYED, Points, near_points, obeyed
from lib.transform import SliceTransform

G = 16
SPEC = BackboneSpec("x", "sam1", 64, "pad_br")


def logits(*parts: tuple[slice, slice]) -> torch.Tensor:
    found = torch.full((1, G, G), -3.0)
    for part in parts:
        found[0][part] = 3.0
    return found


def points(*places: tuple[float, float, bool], radius: float = 1.0) -> Points:
    cells = torch.tensor([p[:2] for p in places], dtype=torch.float32).reshape(-1, 2)
    return Points.at(cells, torch.tensor([p[2] for p in places], dtype=torch.bool), radius, G)


A, B, C = (slice(1, 4), slice(1, 4)), (slice(8, 12), slice(8, 12)), (slice(8, 12), slice(1, 4))


@pytest.mark.parametrize(
    ("places", "kept"),
    [
        ([(2, 2, True)], [A, C]),  # the new part with the click; the other new one and the lost one are not wanted
        ([(9, 9, True)], [B, C]),
        ([(2, 2, True), (9, 9, True)], [A, B, C]),
        ([(9, 2, False)], []),  # the lost part
        ([(2, 2, True), (9, 2, False)], [A]),
        ([(2, 5, True)], [C]),  # two cells beside a part
        ([(2, 4, True)], [A, C]),  # on its rim
        ([], [C]),
    ],
)
def test_change_is_kept_where_a_point_lies(places, kept) -> None:
    found = near_points(logits(A, B), logits(C), points(*places))
    assert torch.equal(found > 0, logits(*kept) > 0)


def test_parts_that_touch_at_a_corner_are_one() -> None:
    one, other = (slice(2, 4), slice(2, 4)), (slice(4, 6), slice(4, 6))
    assert torch.equal(near_points(logits(one, other), logits(), points((2, 2, True))), logits(one, other))


def test_logits_without_a_change_stay_what_they_were() -> None:
    after, before = logits(A) * 2, logits(A)
    assert torch.equal(near_points(after, before, points((2, 2, True))), before)


def test_points_are_obeyed_within_their_radius() -> None:
    found = obeyed(logits(A), points((2, 2, False), (9, 9, True), radius=1.5))
    assert found[0, 2, 2] == -OBEYED and found[0, 9, 9] == OBEYED and found[0, 8, 8] == OBEYED
    assert found[0, 9, 11] == -3.0 and ((found > 0) != (logits(A) > 0)).sum() == 18


def test_stronger_logits_stay() -> None:
    assert torch.equal(obeyed(logits(A) * 9, points((2, 2, True))), logits(A) * 9)


def test_nearer_of_two_that_disagree_counts_in_any_order() -> None:
    places = [(5, 5, True), (5, 6, False)]
    first, second = (obeyed(logits(), points(*p, radius=3.0)) for p in (places, places[::-1]))
    assert torch.equal(first, second)
    assert first[0, 5, 5] > 0 > first[0, 5, 6] and first[0, 5, 3] > 0 > first[0, 5, 8]


def test_same_place_said_both_ways_is_inside() -> None:
    assert obeyed(logits(), points((5, 5, True), (5, 5, False)))[0, 5, 5] > 0


@pytest.mark.parametrize("size", [(16, 16), (200, 320), (40, 10)])
def test_points_of_voxels_lie_in_their_cells(size: tuple[int, int]) -> None:
    transform = SliceTransform(SPEC, size)
    corner = torch.tensor([[0.0, 0.0], [size[0] - 1.0, size[1] - 1.0]]).numpy()
    found = Points.of(PromptSet(points_xy=transform.points_xy(corner)[None], labels=torch.tensor([[1, 0]])), transform)
    grid = transform.spec.mask_size
    mask = torch.zeros(2, 1, *size)
    mask[0, 0, 0, 0] = mask[1, 0, -1, -1] = 1.0
    covered = transform.coverage(mask)[:, 0]
    for distances, share in zip((found.inside, found.outside), covered):
        at = distances.argmin()
        assert distances.shape == (grid, grid) and distances.min() <= 0.71
        assert share.flatten()[at] >= 0.5 * share.max() and distances.flatten()[share.argmax()] <= found.radius


def test_no_points_are_none() -> None:
    found = Points.of(PromptSet(), SliceTransform(SPEC, (20, 20)))
    assert torch.isinf(found.inside).all() and torch.equal(obeyed(logits(A), found), logits(A))
