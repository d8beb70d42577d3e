"""Each check of a label map on a phantom with the defect and on one without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lib.errors import ConfigError
from lib.quality.checks import LabelMap, check_map
from lib.quality.rules import CHECKS, read_rules
from tests.phantoms import ellipsoid

RULES = read_rules()
SHAPE = (40, 44, 20)


def a_map(voxels: np.ndarray, axis: int = 2, **more: Any) -> LabelMap:
    names = more.pop("names", {1: "liver", 2: "spleen"})
    return LabelMap(voxels.astype(np.uint16), names, np.diag([1.0, 1.0, 2.0, 1.0]), (1.0, 1.0, 2.0), axis, **more)


def whole() -> np.ndarray:
    """A large ellipsoid with a smaller one of another label inside."""
    voxels = ellipsoid(SHAPE, (14, 15, 8)).astype(np.uint16)
    voxels[ellipsoid(SHAPE, (6, 6, 3))] = 2
    return voxels


def island(v: np.ndarray) -> None:
    v[1:4, 1:3, 2] = 1


def second_object(v: np.ndarray) -> None:
    v[:] = 0
    v[2:12, 2:12, 2:12] = v[25:35, 25:35, 2:12] = 1


def hole(v: np.ndarray) -> None:
    v[10:13, 22:24, 9:11] = 0


def pinhole(v: np.ndarray) -> None:
    v[10, 22, 10] = 0


def ring(v: np.ndarray) -> None:
    """A tube that is open at both ends, as a myocardium."""
    v[:] = 0
    v[8:30, 8:30, 4:16] = 1
    v[12:26, 12:26, 4:16] = 0


def gap(v: np.ndarray) -> None:
    v[:, :, 13] = 0


def long_gap(v: np.ndarray) -> None:
    v[:, :, 7:14] = 0


def far_objects(v: np.ndarray) -> None:
    v[:] = 0
    v[2:8, 10:20, 1:5] = v[30:38, 10:20, 12:18] = 1


def cut_oblique_object(v: np.ndarray) -> None:
    """As a hippocampus in axial slices: what lies on either side of the gap does not overlap."""
    v[:] = 0
    for k in (*range(2, 8), *range(13, 19)):
        v[2 * k : 2 * k + 6, 10:16, k] = 1


def tapering_objects(v: np.ndarray) -> None:
    """Two kidneys under one name in sagittal slices."""
    v[:] = 0
    v[:, :, 1:8] = v[:, :, 13:] = ellipsoid((40, 44, 7), (12, 12, 3.3))


def moved_slice(v: np.ndarray) -> None:
    v[:, :, 15] = np.roll(v[:, :, 15], 18, axis=0)


def shrunken_slice(v: np.ndarray) -> None:
    v[:, :, 13] *= ellipsoid((40, 44, 1), (3, 3, 1))[:, :, 0]


def strange_slices(v: np.ndarray) -> None:
    """Two in a row."""
    v[:, :, 14:16] = np.roll(v[:, :, 14:16], 18, axis=0)


def whole_slice(v: np.ndarray, *slices: int) -> None:
    v[:, :, slices] = 1


def whole_first_slice(v: np.ndarray) -> None:
    v[:, :, 2] = 0
    whole_slice(v, 3)


def whole_slice_before_the_tip(v: np.ndarray) -> None:
    whole_slice(v, 1)


def whole_last_slices(v: np.ndarray) -> None:
    v[:, :, 17:] = 0
    whole_slice(v, 17, 18)


def lasting_shift(v: np.ndarray) -> None:
    """By 13 of 15 voxels."""
    v[:] = 0
    v[2:17, 10:25, 2:10] = v[15:30, 10:25, 10:18] = 1


def moved_part(v: np.ndarray) -> None:
    """Four slices elsewhere, and back."""
    v[:] = 0
    v[2:17, 10:25, 2:18] = 1
    v[:, :, 8:12] = np.roll(v[:, :, 8:12], 20, axis=0)


def growing_from_a_tip(v: np.ndarray) -> None:
    """A cone whose tip lies off its axis."""
    v[:] = 0
    for k in range(3, 17):
        v[20 - k : 20 + k, 20 - k : 20 + k, k] = 1
    v[14:17, 14:17, 2] = 1


def broad_base(v: np.ndarray) -> None:
    """A ventricle, cut at its base."""
    v[:, :, 10:] = 0


def bent_tip(v: np.ndarray) -> None:
    """The last slice lies beside the one before, as a ventricle's apex on thick slices."""
    v[:, :, 17:] = 0
    v[30:36, 20:26, 17] = 1


def part_that_swells(v: np.ndarray) -> None:
    """A bladder on its urethra."""
    v[:] = 0
    v[18:23, 20:25, 0:4] = 1
    v[5:35, 5:40, 4:18] = 1


def drifting(v: np.ndarray) -> None:
    """A vessel that moves by more than its width from slice to slice, and hardly hangs together."""
    v[:] = 0
    for k in range(3, 17):
        v[2 * k : 2 * k + 6, 10 + k : 16 + k, k] = 1
        v[2 * k : 2 * k + 4, 4 + k : 10 + k, k] = 1


def thin_ring(v: np.ndarray) -> None:
    """A wall thinner than the shift from slice to slice."""
    v[:] = 0
    for k in range(4, 16):
        v[6 + k : 22 + k, 10:26, k] = 1
        v[7 + k : 21 + k, 11:25, k] = 0


def nothing(v: np.ndarray) -> None:
    v[:] = 0


def same(v: np.ndarray) -> None:
    pass


# defect, check that must speak (or None), its structure, its slices
DEFECTS: list[tuple[Callable, str | None, str, tuple[int, ...]]] = [
    (same, None, "", ()),
    (island, "islands", "liver", ()),
    (second_object, None, "", ()),
    (hole, "holes", "liver", ()),
    (pinhole, None, "", ()),
    (ring, None, "", ()),
    (gap, "gap", "liver", (13,)),
    (far_objects, None, "", ()),
    (cut_oblique_object, "gap", "liver", (8, 9, 10, 11, 12)),
    (tapering_objects, None, "", ()),
    (moved_slice, "jump", "liver", (15,)),
    (shrunken_slice, "jump", "liver", (13,)),
    (strange_slices, "jump", "liver", (14, 15)),
    (whole_first_slice, "jump", "liver", (3,)),
    (whole_slice_before_the_tip, "jump", "liver", (1,)),
    (whole_last_slices, "jump", "liver", (17, 18)),
    (lasting_shift, "jump", "liver", (10,)),
    (moved_part, "jump", "liver", (8, 9, 10, 11)),
    (growing_from_a_tip, None, "", ()),
    (broad_base, None, "", ()),
    (bent_tip, None, "", ()),
    (part_that_swells, None, "", ()),
    (drifting, None, "", ()),
    (thin_ring, None, "", ()),
    (nothing, "empty", "", ()),
]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("defect, check, label, slices", DEFECTS, ids=[d[0].__name__ for d in DEFECTS])
def test_a_defect_is_told_and_nothing_else(defect, check, label, slices, axis: int) -> None:
    voxels = whole()
    defect(voxels)
    one = a_map(voxels)
    turned = {0: (2, 1, 0), 1: (0, 2, 1), 2: (0, 1, 2)}[axis]
    spacing = tuple(one.spacing_mm[a] for a in turned)
    one = replace(one, voxels=voxels.transpose(turned), spacing_mm=spacing, axis=axis)
    found = check_map(one, RULES)
    assert [(r.check, r.label, r.slices) for r in found] == ([(check, label, slices)] if check else [])
    for remark in found:
        assert remark.reason.endswith(".") and label in remark.reason


def drum(*empty: slice) -> np.ndarray:
    """22 equal slices of which some are empty."""
    voxels = np.zeros((20, 20, 24), np.uint16)
    voxels[5:15, 5:15, 1:23] = 1
    for gone in empty:
        voxels[:, :, gone] = 0
    return voxels


# empty slices, share of the weight: labelled slices beside them over theirs
GAPS = [((slice(10, 12),), 1.0), ((slice(10, 14),), 1.0), ((slice(9, 15),), 1.0), ((slice(7, 17),), 0.6)]
GAPS += [((slice(4, 10),), 0.5), ((slice(5, 10), slice(16, 17)), 1.0)]


@pytest.mark.parametrize("empty, share", GAPS)
def test_every_gap_inside_an_object_is_told_the_less_the_longer(empty: tuple[slice, ...], share: float) -> None:
    (found,) = check_map(a_map(drum(*empty)), RULES)
    assert found.check == "gap" and found.share == pytest.approx(share)
    assert found.slices == tuple(k for gone in empty for k in range(gone.start, gone.stop))


def test_values_of_one_name_are_one_structure() -> None:
    voxels = drum()
    voxels[voxels * (np.arange(24) % 2) > 0] = 2  # each value by itself has gaps
    assert check_map(a_map(voxels, names={1: "liver", 2: "liver"}), RULES) == []
    ((name, box, mask),) = a_map(voxels, names={1: "liver", 2: "liver"}).structures()
    assert (name, box, int(mask.sum())) == ("liver", (slice(5, 15), slice(5, 15), slice(1, 23)), 2200)


def test_structure_that_is_left_out_is_background() -> None:
    label = a_map(whole(), names={1: "background", 2: "spleen"})
    left = label.without("background")
    assert left.names == {2: "spleen"} and left.voxels.dtype == np.uint16
    assert [name for name, *_ in left.structures()] == ["spleen"]
    assert left.without("liver") is left
    assert [r.check for r in check_map(left.without("spleen"), RULES)] == ["empty"]


def test_values_without_a_name_are_told() -> None:
    voxels = whole()
    voxels[20, 22, 10] = 7
    found = check_map(a_map(voxels, unnamed=(7,)), RULES)
    assert [r.reason for r in found] == ["Voxel values without a name: 7."]


def test_picture_has_holes_and_no_slices() -> None:
    flat = ellipsoid((40, 44, 1), (12, 12, 1)).astype(np.uint16)
    assert check_map(a_map(flat), RULES) == []
    flat[18:22, 20:24] = 0
    assert [r.check for r in check_map(a_map(flat), RULES)] == ["holes"]


def test_label_at_the_image_border_has_no_hole() -> None:
    voxels = np.zeros(SHAPE, np.uint16)
    voxels[:, :, 5:15] = 1
    voxels[10:14, 0, 8:10] = 0  # a notch at the border
    assert check_map(a_map(voxels), RULES) == []


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"island_share": 2}, "island_share: expected a number from 0 to 1, received 2"),
        ({"hole_mm3": "big"}, "hole_mm3: expected a number.*received 'big'"),
        ({"volume_spread": 0}, "volume_spread: expected a number above 0, received 0"),
        ({"volume_z": float("nan")}, "volume_z: expected"),
        ({"ilands": 1}, "unknown key 'ilands'"),
        ({"weights": {"holes": 1}}, "weights: expected one for each of"),
        ({"weights": {**dict.fromkeys(CHECKS, 1), "holes": -1}}, "weights.holes: expected a number of at least 0"),
    ],
)
def test_wrong_rule_is_refused(changes, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        read_rules(changes)
