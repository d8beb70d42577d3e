"""The line from raw quality to Dice: numbers worked out by hand, few cases, and files of other hands."""

from __future__ import annotations

import math

import pytest

from lib.active.calibration import Line, fit, lines

NAN = math.nan


@pytest.mark.parametrize(
    ("pairs", "raw", "dice"),
    [
        ([], 0.7, 0.7),  # nothing known: the opinion itself
        ([(0.8, 0.6)], 0.8, 0.6),  # one case shifts
        ([(0.8, 0.6)], 0.7, 0.5),
        ([(0.2, 0.1), (0.8, 0.4)], 0.5, 0.25),  # the middle is met
        ([(0.2, 0.9), (0.8, 0.1)], 0.5, 0.5),  # a falling line is not believed
        ([(0.9, 0.9), (0.9, 0.9)], 2.0, 1.0),
        ([(0.9, 0.1), (0.9, 0.1)], 0.0, 0.0),
        ([(0.8, 0.6), (NAN, 0.1), (0.5,), (None, 1.0)], 0.8, 0.6),
    ],
)
def test_prediction_of_pairs(pairs, raw: float, dice: float) -> None:
    assert fit(pairs)(raw) == pytest.approx(dice, abs=1e-9)


def test_line_rises_and_follows_many_cases() -> None:
    exact = fit([(x / 100, 0.1 + 0.5 * x / 100) for x in range(100)])
    assert exact.slope == pytest.approx(0.5, abs=0.01)
    assert exact(0.4) == pytest.approx(0.3, abs=0.01)
    assert fit([(0.2, 0.9), (0.8, 0.1)]).slope > 0


def test_lines_of_a_version() -> None:
    assert lines({"mean_dice": 0.5}) == {}
    assert lines({"calibration": None}) == {}
    found = lines({"calibration": {"a": [[0.5, 0.6]], "b": []}})
    assert found["a"](0.5) == pytest.approx(0.6) and found["b"] == Line()
