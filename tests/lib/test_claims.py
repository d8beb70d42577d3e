"""What points say of voxels, and how far they reach."""

from __future__ import annotations

import math
import time
import tracemalloc

import numpy as np
import pytest

from lib.claims import BALL, FAR, MOST_MM, Claim, Said, claims, radius_mm, reached, settled, thickness_mm
from lib.data.geometry import to_slice_rc
from lib.prompts.user import SlicePrompts
from lib.types import Stroke

SPACING = (1.0, 1.0, 2.0)


@pytest.fixture
def mask() -> np.ndarray:
    """Label 1 fills i < 10 up to j < 20, label 2 i >= 30; in between and above is background."""
    found = np.zeros((40, 30, 8), np.uint8)
    found[:10, :20], found[30:] = 1, 2
    return found


def at(*points: tuple[int, int, bool], index: int = 4) -> dict[int, SlicePrompts]:
    """Points ``(i, j, positive)`` of one class on one slice across k."""
    return {index: SlicePrompts([(j, i, positive) for i, j, positive in points])}


def ball(shape: tuple[int, ...], ijk: tuple[int, int, int], radius: float) -> np.ndarray:
    places = np.indices(shape)
    return sum(((p - c) * s) ** 2 for p, c, s in zip(places, ijk, SPACING)) < radius**2


# ---------------------------------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize(
    ("ijk", "radius"),
    [((9, 5, 4), 1), ((4, 5, 4), 6), ((0, 0, 0), 10), ((20, 5, 4), 10), ((12, 5, 4), 3), ((30, 5, 4), 1)],
)
def test_radius_is_the_distance_to_the_next_other_label(mask: np.ndarray, ijk, radius: float) -> None:
    assert radius_mm(mask, ijk, SPACING) == radius


def test_radius_counts_millimetres_across_slices() -> None:
    mask = np.zeros((20, 20, 10), np.uint8)
    mask[:, :, 7:] = 1
    assert radius_mm(mask, (10, 10, 4), (1.0, 1.0, 2.5)) == 7.5
    assert radius_mm(mask, (10, 10, 4), (0.1, 0.1, 0.2)) == pytest.approx(0.6)


def test_radius_ends_somewhere() -> None:
    mask = np.zeros((200, 3, 3), np.uint8)
    mask[-1] = 1
    assert radius_mm(mask, (int(199 - MOST_MM), 1, 1), (1.0, 1.0, 1.0)) == MOST_MM
    assert math.isinf(radius_mm(mask, (int(198 - MOST_MM), 1, 1), (1.0, 1.0, 1.0)))


def test_radius_agrees_with_the_distance_of_every_voxel() -> None:
    mask = np.random.default_rng(0).integers(0, 3, (9, 10, 5)).astype(np.uint8)
    mask[2:7, 2:8, 1:4] = 1
    places = np.argwhere(np.ones(mask.shape))
    for ijk in places[::7]:
        for label, wanted in ((None, mask != mask[tuple(ijk)]), (2, mask == 2)):
            nearest = np.sqrt((((places[wanted.ravel()] - ijk) * SPACING) ** 2).sum(1).min())
            assert radius_mm(mask, tuple(ijk.tolist()), SPACING, label) == pytest.approx(nearest)


def test_thickness_is_that_of_the_slice_that_shows_most(mask: np.ndarray) -> None:
    assert thickness_mm(mask, 1, 2, SPACING) == 5
    assert thickness_mm(mask, 1, 0, SPACING) == 8  # 20 voxels of 1 mm by 8 of 2 mm
    assert thickness_mm(mask, 7, 2, SPACING) == 0


# ------------------------------------------------------------------------------------------------------------- claims


@pytest.mark.parametrize(
    ("corrections", "expected"),
    [
        ({0: at((13, 5, True))}, [Claim((13, 5, 4), 1, 4.0, 4.0 * BALL)]),  # label 1 is missing
        ({0: at((25, 5, True))}, [Claim((25, 5, 4), 1, 16.0, 5.0)]),  # no thicker than label 1 is
        ({0: at((4, 5, False))}, [Claim((4, 5, 4), 0, 6.0, 6.0 * BALL)]),  # too much of it
        ({0: at((4, 5, True))}, [Claim((4, 5, 4), 1, 0.0, 0.0)]),  # right already
        ({1: at((4, 5, False))}, [Claim((4, 5, 4), 1, 0.0, 0.0)]),  # not label 2, which it is not
        ({1: at((4, 5, True)), 0: at((4, 5, False))}, [Claim((4, 5, 4), 2, 26.0, 5.0)]),  # another label
        ({0: at((4, 5, False)), 1: at((4, 5, False))}, [Claim((4, 5, 4), 0, 6.0, 6.0 * BALL)]),  # background
        ({0: at((15, 5, False)), 1: at((15, 5, False))}, [Claim((15, 5, 4), 0, 0.0, 0.0)]),
        ({2: at((20, 5, True))}, [Claim((20, 5, 4), 3, math.inf, 0.0)]),  # of a label that is nowhere nothing is known
        ({}, []),
    ],
)
def test_what_points_say(mask: np.ndarray, corrections, expected: list[Claim]) -> None:
    assert claims(corrections, mask, 2, SPACING) == expected


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_points_mean_voxels_along_every_axis(mask: np.ndarray, axis: int) -> None:
    index, row, column = to_slice_rc((4, 5, 6), axis)
    (claim,) = claims({0: {index: SlicePrompts([(row, column, False)])}}, mask, axis, SPACING)
    assert claim.ijk == (4, 5, 6)


# ------------------------------------------------------------------------------------------------------------ settling


def test_ball_is_what_the_user_says(mask: np.ndarray) -> None:
    said = claims({0: at((13, 5, True))}, mask, 2, SPACING)
    found = settled(mask, mask, said, SPACING)
    np.testing.assert_array_equal(found == 1, (mask == 1) | ball(mask.shape, (13, 5, 4), 4.0 * BALL))
    np.testing.assert_array_equal(found == 2, mask == 2)


def test_ball_stays_on_its_slice_where_nothing_is_carried(mask: np.ndarray) -> None:
    said = claims({0: at((4, 5, False))}, mask, 2, SPACING)
    found = settled(mask, mask, said, SPACING, flat=2)
    np.testing.assert_array_equal(found[:, :, 4] != mask[:, :, 4], ball(mask.shape, (4, 5, 4), 6.0 * BALL)[:, :, 4])
    np.testing.assert_array_equal(np.delete(found, 4, 2), np.delete(mask, 4, 2))


def test_what_is_far_stays_as_it_was(mask: np.ndarray) -> None:
    said = claims({0: at((11, 5, True))}, mask, 2, SPACING)  # 2 mm
    everything = np.full_like(mask, 3)
    found = settled(everything, mask, said, SPACING)
    near = ball(mask.shape, (11, 5, 4), 2 * FAR + 1e-6)
    np.testing.assert_array_equal(found == 3, near & ~ball(mask.shape, (11, 5, 4), 2.0 * BALL))
    np.testing.assert_array_equal(found[~near], mask[~near])
    assert (settled(everything, mask, said, SPACING, bounded=False) == 3).sum() > (found == 3).sum()


def test_part_of_its_own_has_no_bound() -> None:
    mask = np.zeros((90, 8, 8), np.uint8)
    mask[0] = 1
    said = claims({0: at((80, 4, True))}, mask, 2, SPACING)
    found = settled(np.full_like(mask, 1), mask, said, SPACING)
    assert (found == 1).all()
    assert reached(said, 8, 2, SPACING) == set(range(8))


def test_ball_of_a_point_too_far_to_measure_is_no_larger_than_of_a_measured_one() -> None:
    mask = np.zeros((200, 120, 3), np.uint8)
    mask[:110] = 1  # 55 mm to the rim
    far, near = (claims({0: at((i, 60, True), index=1)}, mask, 2, (1.0, 1.0, 1.0))[0] for i in (160, 141))
    assert math.isinf(far.radius_mm) and near.radius_mm == MOST_MM
    assert far.ball_mm == near.ball_mm == BALL * MOST_MM


def test_points_of_a_stroke_over_many_slices_settle_at_once() -> None:
    """Every voxel is asked about once, not once per point: 40 s became less than one."""
    mask = np.zeros((200, 200, 60), np.uint8, order="F")
    mask[20:90, 20:90, 5:55] = 1
    corrections = {0: {10 + n: SlicePrompts([(150 + 4 * m, 130 + n, True) for m in range(8)]) for n in range(40)}}
    said = claims(corrections, mask, 2, (0.7, 0.7, 2.0))
    started = time.perf_counter()
    found = settled(mask, mask, said, (0.7, 0.7, 2.0))
    assert time.perf_counter() - started < 10
    assert (found != mask).sum() > 100_000


def test_radius_in_a_finely_resolved_volume_takes_little_memory() -> None:
    mask = np.zeros((400, 400, 200), np.uint8, order="F")
    mask[:100] = 1
    tracemalloc.start()
    assert radius_mm(mask, (399, 200, 100), (0.1, 0.1, 0.1)) == pytest.approx(30.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
@pytest.mark.parametrize(("there", "shown", "expected"), [(1, 2, 0), (2, 2, 0), (3, 2, 3), (1, 1, 0), (3, 3, 3)])
def test_voxels_painted_as_no_part_of_labels_are_none_of_them(order, there: int, shown: int, expected: int) -> None:
    mask, found = np.full((2, 2, 1), there, np.uint8), np.full((2, 2, 1), shown, np.uint8)
    painted = Stroke(np.array([[1, 1, 0]]), positive=False)
    said = Said([], [(number, painted) for number in order], False, 2, SPACING)
    settled_there = said.settled(found, mask, walks=True)
    assert settled_there[1, 1, 0] == expected and settled_there[0, 0, 0] == shown


def test_clicked_voxel_is_always_what_was_said(mask: np.ndarray) -> None:
    wrong = np.full_like(mask, 2)
    corrections = {0: at((4, 5, True), (15, 5, True), (30, 2, True)), 1: at((35, 5, False), (20, 20, False))}
    found = settled(wrong, mask, claims(corrections, mask, 2, SPACING), SPACING)
    assert [found[i, j, 4] for i, j in ((4, 5), (15, 5), (30, 2), (35, 5), (20, 20))] == [1, 1, 1, 0, 0]


def test_nearest_point_counts_in_any_order(mask: np.ndarray) -> None:
    corrections = {0: at((4, 5, False), (15, 10, True)), 1: at((6, 5, True), (15, 14, True), (20, 10, False))}
    said = claims(corrections, mask, 2, SPACING)
    first, second = (settled(mask, mask, one, SPACING) for one in (said, said[::-1]))
    np.testing.assert_array_equal(first, second)
    assert (first[4, 5, 4], first[6, 5, 4], first[3, 5, 4], first[7, 5, 4]) == (0, 2, 0, 2)
    assert (first[15, 11, 4], first[15, 13, 4]) == (1, 2)


def test_point_that_agrees_keeps_what_is_nearer_to_it(mask: np.ndarray) -> None:
    said = claims({0: at((4, 5, False), (7, 5, True))}, mask, 2, SPACING)
    found = settled(mask, mask, said, SPACING)
    assert found[5, 5, 4] == 0 and found[6, 5, 4] == 1


def test_nothing_said_changes_nothing(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(settled(np.full_like(mask, 1), mask, [], SPACING), mask)


def test_arguments_are_not_changed(mask: np.ndarray) -> None:
    before, found = mask.copy(), np.full_like(mask, 1)
    mask.setflags(write=False)
    settled(found, mask, claims({0: at((13, 5, True))}, mask, 2, SPACING), SPACING)
    np.testing.assert_array_equal(mask, before)
    assert (found == 1).all()


def test_slices_that_are_reached() -> None:
    said = [Claim((5, 5, 2), 1, 1.0, 1.0), Claim((5, 5, 7), 0, 0.0, 0.0)]
    assert reached(said, 10, 2, SPACING) == {1, 2, 3, 7}
    assert reached(said[:1], 2, 2, SPACING) == {1}
    assert reached([], 10, 2, SPACING) == set()
