"""The gate: a better mean wins, unless a class got lost; nothing is compared that was scored on other cases."""

from __future__ import annotations

import math
from typing import Any, Optional

import pytest

from lib.errors import ConfigError
from lib.versions.gate import beats, by_case, dropped, paired

TOLERANCE = 0.02


def scores(mean: Optional[float], cases: Any = ("a", "b"), labels: tuple[str, ...] = ("RV", "LV")) -> dict[str, Any]:
    return {"mean_dice": mean, "dice": dict.fromkeys(labels, mean), "cases": cases}


def by_label(rv: Optional[float], lv: Optional[float]) -> dict[str, Any]:
    return {"mean_dice": ((rv or 0.0) + (lv or 0.0)) / 2, "dice": {"RV": rv, "LV": lv}, "cases": ["a"]}


@pytest.mark.parametrize(
    ("new", "old", "won", "text"),
    [
        (0.81, 0.80, True, "Mean Dice 0.8100 beats 0.8000 (+0.01) on the same 2 cases."),
        (0.795, 0.80, False, "Mean Dice 0.7950 does not beat 0.8000 (-0.005) on the same 2 cases."),
        (0.80, 0.80, False, "does not beat"),
        (math.nextafter(0.8, 1.0), 0.8, True, "(+1.1e-16)"),
        (math.nan, 0.1, False, "no mean Dice"),
        (None, None, False, "no mean Dice"),
        (math.inf, 0.1, False, "no mean Dice"),
        (0.1, math.nan, True, "the live version has no score"),
        (0.0, None, False, "is too low"),
    ],
)
def test_gate_lets_only_strictly_greater_win(new, old, won, text) -> None:
    found, sentence = beats(scores(new), scores(old, cases={"b": 1, "a": 2}), tolerance=TOLERANCE)
    assert found is won and text in sentence


@pytest.mark.parametrize(("new", "won"), [(0.01, True), (0.0, False), (math.nan, False), (None, False)])
def test_gate_without_live_version_wants_more_than_nothing(new, won) -> None:
    found, sentence = beats(scores(new), None, tolerance=TOLERANCE)
    assert found is won and "2 cases" in sentence and "same" not in sentence


# new RV and LV, old RV and LV, tolerance, won, words
BY_LABEL = [
    ((0.95, 0.785), (0.80, 0.80), 0.02, True, "beats"),  # LV loses less
    ((0.95, 0.78), (0.80, 0.80), 0.02, True, "beats"),  # just as much
    (
        (0.95, 0.77), (0.80, 0.80), 0.02, False,
        "beats 0.8000 (+0.06) on the same 1 case, but LV drops from 0.8000 to 0.7700, more than the 0.02 that a class"
        " may lose.",
    ),
    ((0.95, 0.77), (0.80, 0.80), 0.03, True, "beats"),
    ((0.95, 0.77), (0.80, 0.80), 0.0, False, "LV drops"),
    ((0.90, 0.80), (0.80, 0.80), 0.0, True, "beats"),
    ((0.10, 0.20), (0.80, 0.80), 0.02, False, "and RV drops from 0.8000 to 0.1000, LV drops from 0.8000 to 0.2000,"),
    ((0.95, None), (0.50, 0.10), 0.02, False, "LV drops from 0.1000 to 0.0000"),
    ((0.95, 0.10), (0.50, None), 0.02, True, "beats"),  # nothing to lose
]  # fmt: skip


@pytest.mark.parametrize(("new", "old", "tolerance", "won", "words"), BY_LABEL)
def test_gate_blocks_what_loses_a_class_even_if_the_mean_rises(new, old, tolerance, won, words) -> None:
    found, sentence = beats(by_label(*new), by_label(*old), tolerance=tolerance)
    assert found is won and words in sentence
    assert won is ("drops" not in sentence)


def rows(**cases: tuple[float, float]) -> dict[str, Any]:
    """Scores of RV and LV by case."""
    dice = {name: sum(row[k] for row in cases.values()) / len(cases) for k, name in enumerate(("RV", "LV"))}
    table = {case: dict(zip(dice, row)) for case, row in cases.items()}
    return {"mean_dice": sum(dice.values()) / 2, "dice": dice, "cases": table}


def test_label_that_no_case_has_decides_nothing() -> None:
    """A stray voxel in one of three cases is a Dice of 0 there, an empty answer one of 1."""
    new = rows(a=(0.95, 0.0), b=(0.95, 1.0), c=(0.95, 1.0))
    old = rows(a=(0.90, 1.0), b=(0.90, 1.0), c=(0.90, 1.0))
    assert not beats(new, old, tolerance=TOLERANCE)[0]
    won, sentence = beats(new, old, tolerance=TOLERANCE, absent=["LV"])
    assert won and "Mean Dice 0.9500 beats 0.9000" in sentence and "3 better, 0 worse" in sentence
    assert sentence.endswith("In no validation case, so not judged: LV.")
    assert beats(old, new, tolerance=TOLERANCE, absent=["LV"])[0] is False
    assert beats(new, None, tolerance=TOLERANCE, absent=["LV"])[1].startswith("Mean Dice 0.9500 on 3 cases wins")


def test_labels_that_no_case_has_count_where_there_are_no_others() -> None:
    won, sentence = beats(rows(a=(1.0, 1.0)), rows(a=(0.0, 1.0)), tolerance=TOLERANCE, absent=["RV", "LV"])
    assert won and "Mean Dice 1.0000 beats 0.5000" in sentence


def test_dropped_names_the_worst_first() -> None:
    assert [label for label, *_ in dropped(by_label(0.5, 0.1), by_label(0.9, 0.9), 0.02)] == ["LV", "RV"]


def test_gate_tells_how_the_cases_differ_without_naming_them() -> None:
    new = {**by_label(0.9, 0.7), "cases": {c: {"RV": 0.9, "LV": 0.7} for c in ("anna", "bert", "carl")}}
    old = {**by_label(0.8, 0.7), "cases": {"anna": {"RV": 0.5, "LV": 0.7}, "bert": {"RV": 0.9, "LV": 0.9}}}
    old["cases"]["carl"] = {"RV": 0.9, "LV": 0.7}
    won, sentence = beats(new, old, tolerance=TOLERANCE)
    assert won and sentence.endswith(
        "Case by case 1 better, 1 worse, 1 equal: from -0.1000 to +0.2000, median +0.0000."
    )
    assert not any(name in sentence for name in new["cases"])


ROWS = {"a": {"RV": 0.5, "LV": 0.7}, "b": {"RV": 0.2, "LV": None}}
PAIRED = [
    ({"cases": ROWS}, {"cases": ROWS}, {"a": 0.0, "b": 0.0}),
    ({"cases": ROWS}, {"cases": {"a": {"RV": 0.1, "LV": 0.7}}}, {"a": 0.2}),
    ({"cases": ROWS}, {"cases": {"b": {"RV": 0.5, "LV": 0.5}}}, {"b": -0.3}),  # LV was not scored
    ({"cases": ROWS}, {"cases": {"a": {"other": 0.1}}}, {}),
    ({"cases": ROWS}, {"cases": ["a", "b"]}, {}),
    ({"cases": {"a": 0.5}}, {"cases": {"a": 0.5}}, {}),
    ({}, {"cases": ROWS}, {}),
]


@pytest.mark.parametrize(("new", "old", "expected"), PAIRED)
def test_paired_takes_cases_and_labels_that_both_have(new, old, expected) -> None:
    assert paired(new, old) == pytest.approx(expected)


def test_by_case_leaves_out_what_is_no_number() -> None:
    assert by_case({"cases": {"a": {"RV": math.nan, "LV": 1}, "b": 0.5}}) == {"a": {"LV": 1.0}}


@pytest.mark.parametrize(
    ("new", "old", "text"),
    [
        (scores(0.9), scores(0.8, cases=("a", "c")), "same cases, received 2 and 2 with 1 in common"),
        (scores(0.9), scores(0.8, cases=("a",)), "same cases, received 2 and 1"),
        (scores(0.9, labels=("RV",)), scores(0.8), "same labels, received 1 and 2"),
        ({"dice": {}, "cases": []}, None, "mean_dice"),
    ],
)
def test_gate_refuses_what_cannot_be_compared(new, old, text) -> None:
    with pytest.raises(ConfigError, match=text):
        beats(new, old, tolerance=TOLERANCE)
