"""A case beside the others of its store: each remark with and without its defect."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

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
    ({"centre_mm": {"liver": (60.0, 5.0, -90.0), "spleen": (-80.0, -30.0, -80.0)}}, []),  # an image of the chest
    ({"centre_mm": {"liver": (60.0, -9.0, 10.0), "spleen": (-80.0, -30.0, 20.0)}}, [("side", "liver", "posterior")]),
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


MIRRORED = {"liver": (-60.0, 5.0, 10.0), "spleen": (80.0, -30.0, 20.0)}


@pytest.mark.parametrize(
    "count, swapped, told",
    [
        (3, 1, 0),
        (4, 1, 1),
        (7, 1, 1),
        (8, 1, 1),
        (8, 2, 2),
        (10, 2, 2),
        (10, 4, 4),
        (10, 5, 0),
        (20, 3, 3),
        (40, 5, 5),
        (12, 6, 0),
    ],
)
def test_exchanged_cases_do_not_hide_each_other(count: int, swapped: int, told: int) -> None:
    cases = {f"c{n}": replace(usual(n), **({"centre_mm": MIRRORED} if n < swapped else {})) for n in range(count)}
    found = compare(cases, RULES)
    assert [case for case, remarks in found.items() if remarks] == [f"c{n}" for n in range(told)]


def test_cases_in_the_middle_do_not_hide_an_exchanged_one() -> None:
    middle = {"liver": (3.0, 5.0, 10.0), "spleen": (-80.0, -30.0, 20.0)}
    cases = {f"c{n}": replace(usual(n), **({"centre_mm": middle} if n in (3, 7) else {})) for n in range(9)}
    cases["c0"] = replace(cases["c0"], centre_mm={**MIRRORED, "spleen": (-80.0, -30.0, 20.0)})
    found = compare(cases, RULES)
    assert [(r.check, r.label) for r in found.pop("c0")] == [("side", "liver")] and not any(found.values())


def test_what_lies_in_the_middle_has_no_side() -> None:
    """As a spine, of bodies that lie more or less in the middle of the table."""
    rng = np.random.default_rng(0)
    cases = {
        f"c{n}": Facts({"spine": 1e5}, {"spine": (x, -40.0, 0.0)}, "LPS") for n, x in enumerate(rng.normal(5, 12, 60))
    }
    assert not any(compare(cases, RULES).values())


def both(left_mm: float, right_mm: float, *names: str, **more: Any) -> Facts:
    """A pair of names and where they lie to the right, in one case."""
    left, right = names or ("kidney_left", "kidney_right")
    return Facts({left: 1e5, right: 1e5}, {left: (left_mm, 0.0, 0.0), right: (right_mm, 0.0, 0.0)}, "LPS", **more)


@pytest.mark.parametrize(
    "facts, pair",
    [
        (both(-50, 50), ""),
        (both(50, -50), "kidney_left lies right of kidney_right"),
        (both(50, -50, "Left Kidney", "Right Kidney"), "Left Kidney lies right of Right Kidney"),
        (both(50, -50, "L kidney", "kidney-R"), "L kidney lies right of kidney-R"),
        (both(50, -50, "KidneyLeft", "KidneyRight"), "KidneyLeft lies right of KidneyRight"),
        (both(90, 20), "kidney_left lies right of kidney_right"),  # an image of one half
        (both(-20, -90), "kidney_left lies right of kidney_right"),
        (both(3, 0), ""),  # one above the other
        (both(50, -50, "lung_left", "kidney_right"), ""),
        (both(50, -50, "kidney_left_2", "kidney_right_1"), ""),
        (both(50, -50, "cleft", "bright"), ""),
        (both(50, -50, "liver", "spleen"), ""),
        (both(50, -50, is_picture=True), ""),
    ],
)
def test_left_lies_left_of_right_in_every_single_case(facts: Facts, pair: str) -> None:
    found = compare({"c": facts}, RULES)["c"]
    wanted = [f"Left and right are exchanged: {pair}."] if pair else []
    assert [(r.check, r.reason) for r in found] == [("side", reason) for reason in wanted]


def test_exchanged_pair_is_told_once() -> None:
    cases = {f"c{n}": both(-50 - n, 50 + n) for n in range(12)}
    cases["c3"] = replace(both(50, -50), model_mm=cases["c3"].centre_mm)
    found = compare(cases, RULES)
    assert [r.reason for r in found.pop("c3")] == [
        "Left and right are exchanged: kidney_left lies right of kidney_right."
    ]
    assert not any(found.values())


MODEL = {"liver": (62.0, 5.0, 10.0), "spleen": (-78.0, -30.0, 20.0)}


@pytest.mark.parametrize(
    "place, told",
    [
        (MIRRORED, True),
        (MODEL, False),
        ({**MODEL, "liver": (-60.0, 5.0, 10.0)}, False),  # one that lies elsewhere is no exchange
        ({"liver": MODEL["liver"]}, False),
    ],
)
def test_names_exchanged_against_the_models_label_are_told_in_a_single_case(place, told: bool) -> None:
    facts = replace(usual(0), centre_mm=place, model_mm=MODEL)
    found = [r.reason for r in compare({"c": facts}, RULES)["c"]]
    assert found == ["Names are exchanged: liver and spleen lie where the model has the other."] * told


@pytest.mark.parametrize("needed", [0, 1])
def test_label_of_a_single_case_is_compared_with_none(needed: int) -> None:
    cases = {"a": usual(0), "b": both(-50, 50)}
    assert all(
        "nan" not in r.reason for found in compare(cases, read_rules({"cases_needed": needed})).values() for r in found
    )


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
    assert facts.orientation == "LAS" and facts.model_mm == {}


def test_values_of_one_name_count_together() -> None:
    voxels = np.zeros((40, 12, 10), np.uint16)
    voxels[0:20], voxels[20:40] = 1, 2
    label = LabelMap(voxels, {1: "liver", 2: "liver"}, np.eye(4), (1.0, 1.0, 1.0), 2)
    facts = facts_of(label, label)
    assert facts.volume_mm3 == {"liver": 4800.0}
    assert facts.centre_mm["liver"] == facts.model_mm["liver"] == pytest.approx((0.0, 0.0, 0.0))


def test_left_and_right_follow_the_affine() -> None:
    voxels = np.zeros((20, 8, 4), np.uint16)
    voxels[2:5, 2:6, 1:3], voxels[14:17, 2:6, 1:3] = 1, 2
    for sign, told in ((1.0, 0), (-1.0, 1)):
        affine = np.diag([3.0 * sign, 3.0, 3.0, 1.0])
        label = LabelMap(voxels, {1: "kidney_left", 2: "kidney_right"}, affine, (3.0, 3.0, 3.0), 2)
        assert len(compare({"c": facts_of(label)}, RULES)["c"]) == told
