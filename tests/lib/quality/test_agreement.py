"""Dice and surface distances by structure, against numbers known beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from lib.quality.agreement import agreement, changed_voxels, dice_by_label, summary
from lib.quality.checks import LabelMap

SPACING = (1.0, 2.0, 3.0)


def a_map(*boxes: tuple[int, slice, slice, slice], names=None, declared: bool = True, shape=(20, 20, 10)) -> LabelMap:
    voxels = np.zeros(shape, np.uint16)
    for value, *box in boxes:
        voxels[tuple(box)] = value
    return LabelMap(voxels, names or {1: "a", 2: "b"}, np.diag([*SPACING, 1.0]), SPACING, 2, (), declared)


A = (1, slice(2, 8), slice(2, 8), slice(2, 6))
B = (2, slice(10, 16), slice(2, 8), slice(2, 6))


def test_perfect_match_of_two_labels_is_one() -> None:
    found = agreement(a_map(A, B), a_map(A, B))
    assert found == {n: {"dice": 1.0, "hd95_mm": 0.0, "mean_mm": 0.0} for n in ("a", "b")}


def test_labels_match_by_name_whatever_their_values() -> None:
    swapped = a_map((2, *A[1:]), (1, *B[1:]), names={1: "b", 2: "a"})
    assert dice_by_label(a_map(A, B), swapped) == {"a": 1.0, "b": 1.0}
    assert changed_voxels(a_map(A, B), swapped) == 0


@pytest.mark.parametrize("axis, shift_mm", [(0, 1.0), (1, 2.0), (2, 3.0)])
def test_shift_by_a_voxel_is_measured_in_mm(axis: int, shift_mm: float) -> None:
    box = list(A)
    box[axis + 1] = slice(A[axis + 1].start + 1, A[axis + 1].stop + 1)
    found = agreement(a_map(A), a_map(tuple(box)))["a"]
    length = A[axis + 1].stop - A[axis + 1].start
    assert found["dice"] == pytest.approx((length - 1) / length)
    assert found["hd95_mm"] == pytest.approx(shift_mm)
    assert 0 < found["mean_mm"] < shift_mm
    assert changed_voxels(a_map(A), a_map(tuple(box))) == 2 * 6 * 6 * 4 // length


def test_structure_in_one_only_has_dice_zero_and_no_distance() -> None:
    assert agreement(a_map(A), a_map(A, B))["b"] == {"dice": 0.0, "hd95_mm": None, "mean_mm": None}
    assert agreement(a_map(A), a_map(A))["b"]["dice"] == 1.0  # declared, in neither


def test_only_what_the_model_was_asked_for_counts() -> None:
    assert dice_by_label(a_map(A, B), a_map(A, names={1: "a"})) == {"a": 1.0}
    assert dice_by_label(a_map(A, B), a_map(A, names={1: "a"}, declared=False)) == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize("undeclared", [0, 1])
def test_values_without_names_count_by_the_other_maps_names(undeclared: int) -> None:
    made_up = {1: "label_1", 2: "label_2"}
    maps = [a_map(A, B, names=made_up, declared=False) if n == undeclared else a_map(A, B) for n in (0, 1)]
    assert dice_by_label(*maps) == {"a": 1.0, "b": 1.0}
    assert agreement(*maps)["b"] == {"dice": 1.0, "hd95_mm": 0.0, "mean_mm": 0.0}
    assert changed_voxels(*maps) == 0


def test_values_without_names_that_the_other_map_lacks_keep_theirs() -> None:
    made_up = a_map(A, (3, *B[1:]), names={1: "label_1", 3: "label_3"}, declared=False)
    assert dice_by_label(made_up, a_map(A, B)) == {"a": 1.0, "b": 0.0}
    assert changed_voxels(made_up, a_map(A, B)) == 6 * 6 * 4
    assert dice_by_label(made_up, made_up) == {"label_1": 1.0, "label_3": 1.0}


def test_picture_is_measured_in_its_plane() -> None:
    one = a_map((1, slice(2, 8), slice(2, 8), 0), shape=(20, 20, 1))
    other = a_map((1, slice(4, 10), slice(2, 8), 0), shape=(20, 20, 1))
    assert agreement(one, other)["a"]["hd95_mm"] == pytest.approx(2.0)


def test_label_at_the_border_is_measured() -> None:
    one, other = (a_map((1, slice(0, n), slice(0, 20), slice(0, 10))) for n in (5, 7))
    assert agreement(one, other)["a"]["hd95_mm"] == pytest.approx(2.0)


def test_summary_means_what_is_there() -> None:
    row = {"dice": 0.5, "hd95_mm": None, "mean_mm": None}
    other = {"dice": 1.0, "hd95_mm": 2.0, "mean_mm": 1.0}
    found = summary({"x": {"a": row}, "y": {"a": other, "b": row}})
    assert found["a"] == {"cases": 2, "dice": 0.75, "hd95_mm": 2.0, "mean_mm": 1.0}
    assert found["b"]["hd95_mm"] is None
