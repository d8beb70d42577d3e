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


def far_objects(v: np.ndarray) -> None:
    v[:] = 0
    v[10:20, 10:20, 1:5] = v[10:20, 10:20, 12:18] = 1


def moved_slice(v: np.ndarray) -> None:
    v[:, :, 15] = np.roll(v[:, :, 15], 18, axis=0)


def shrunken_slice(v: np.ndarray) -> None:
    v[:, :, 13] *= ellipsoid((40, 44, 1), (3, 3, 1))[:, :, 0]


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
    (moved_slice, "jump", "liver", (15,)),
    (shrunken_slice, "jump", "liver", (13,)),
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
        ({"hole_mm3": "big"}, "hole_mm3: expected a number of at least 0, received 'big'"),
        ({"volume_z": float("nan")}, "volume_z: expected"),
        ({"ilands": 1}, "unknown key 'ilands'"),
        ({"weights": {"holes": 1}}, "weights: expected one for each of"),
        ({"weights": {**dict.fromkeys(CHECKS, 1), "holes": -1}}, "weights.holes: expected a number of at least 0"),
    ],
)
def test_wrong_rule_is_refused(changes, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        read_rules(changes)
