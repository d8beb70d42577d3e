"""A case beside the others of its store: each remark with and without its defect."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from lib.quality.across import Facts, compare, facts_of, orientation_of
from lib.quality.checks import LabelMap
from lib.quality.rules import read_rules

RULES = read_rules()


def usual(number: int) -> Facts:
    """A liver on the right, a spleen on the left, of volumes that differ by some percent."""
    size = 1 + 0.05 * np.sin(number)
    return Facts(
        {"liver": 1.5e6 * size, "spleen": 2e5 * size},
        {"liver": (60.0 + number, 5.0, 10.0), "spleen": (-80.0, -30.0 + number, 20.0)},
        "LPS",
    )


# change of one case, (check, label, words)
CHANGES = [
    ({}, []),
    ({"volume_mm3": {"liver": 1.5e7, "spleen": 2e5}}, [("volume", "liver", "15e\\+03 ml|1.5e\\+04 ml")]),
    ({"volume_mm3": {"liver": 1.5e6, "spleen": 2e4}}, [("volume", "spleen", "robust z -")]),
    ({"volume_mm3": {"liver": 1.5e6}}, [("missing", "spleen", "12 of 12 other cases")]),
    ({"orientation": "RPS"}, [("orientation", "", "mirror image: check that left is left")]),
    ({"orientation": "RAS"}, [("orientation", "", "in 12 of 12 other cases to LPS.$")]),
    (
        {"centre_mm": {"liver": (-60.0, 5.0, 10.0), "spleen": (80.0, -30.0, 20.0)}},
        [("side", "liver", "lies left .* 12 of 12 other cases right"), ("side", "spleen", "lies right")],
    ),
    ({"centre_mm": {"liver": (-4.0, 5.0, 10.0), "spleen": (-80.0, -30.0, 20.0)}}, []),  # hardly on a side
    ({"centre_mm": {"liver": (60.0, 5.0, -10.0), "spleen": (-80.0, -30.0, 20.0)}}, [("side", "liver", "inferior")]),
    ({"volume_mm3": {}, "centre_mm": {}}, []),  # empty: the case itself says so
]


@pytest.mark.parametrize("change, wanted", CHANGES)
def test_odd_case_is_told_and_no_other(change, wanted) -> None:
    cases = {f"c{n}": usual(n) for n in range(13)}
    cases["c4"] = replace(cases["c4"], **change)
    found = compare(cases, RULES)
    assert [(r.check, r.label) for r in found.pop("c4")] == [(check, label) for check, label, _ in wanted]
    assert not any(found.values())
    for remark, (_, _, words) in zip(compare(cases, RULES)["c4"], wanted):
        assert re.search(words, remark.reason), remark.reason


@pytest.mark.parametrize("count, told", [(7, False), (8, True)])
def test_few_cases_are_not_compared(count: int, told: bool) -> None:
    cases = {f"c{n}": usual(n) for n in range(count)}
    cases["c0"] = replace(cases["c0"], volume_mm3={"liver": 1.5e7, "spleen": 2e5})
    assert bool(compare(cases, RULES)["c0"]) is told


def test_no_majority_no_remark() -> None:
    cases = {f"c{n}": replace(usual(n), orientation="LPS" if n % 2 else "RAS") for n in range(12)}
    assert not any(compare(cases, RULES).values())


@pytest.mark.parametrize(
    "directions, code",
    [
        (np.diag([1, 1, 1]), "RAS"),
        (np.diag([-1, -1, 1]), "LPS"),
        (np.diag([-1, 1, 3]), "LAS"),
        ([[0, 0, 2], [0.7, 0, 0], [0, -0.7, 0]], "AIR"),
        ([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]], "RAS"),
    ],
)
def test_orientation_of(directions, code: str) -> None:
    affine = np.eye(4)
    affine[:3, :3] = directions
    assert orientation_of(affine) == code


def test_facts_are_in_mm_from_the_images_middle() -> None:
    voxels = np.zeros((21, 11, 5), np.uint16)
    voxels[0:3, 5, 2] = 1
    affine = np.diag([-2.0, 1.0, 3.0, 1.0])
    affine[:3, 3] = 500  # the table's place does not count
    facts = facts_of(LabelMap(voxels, {1: "liver", 2: "spleen"}, affine, (2.0, 1.0, 3.0), 2))
    assert facts.volume_mm3 == {"liver": 18.0}
    assert facts.centre_mm["liver"] == pytest.approx((18.0, 0.0, 0.0))
    assert facts.orientation == "LAS"
