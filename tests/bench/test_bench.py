"""What the benches compute themselves; the numbers they measure belong to no test."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import common
from bench.common import Report, Verdict
from bench.corrections import left_alone
from bench.manual_prompts import Case, Score, inscribed_ellipsoid, judge, rows
from lib import assisted
from lib.correction import near_points
from lib.prompts.simulate import inscribed_ellipse


@pytest.mark.parametrize(
    ("measured", "limit", "least", "holds"),
    [(1.0, 1.5, False, True), (1.6, 1.5, False, False), (20.0, 20.0, True, True), (19.9, 20.0, True, False)],
)
def test_verdict_compares_the_two_numbers(measured: float, limit: float, least: bool, holds: bool) -> None:
    assert Verdict("x", measured, limit, least).holds is holds


@pytest.mark.parametrize("least", [True, False])
def test_verdict_of_nothing_measured_is_a_miss(least: bool) -> None:
    assert not Verdict("x", math.nan, 1.0, least).holds


def test_report_is_written_as_it_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("Title", tmp_path / "new" / "out.md")
    report.table("Numbers", ("a", "b"), [(1, "wide cell")])
    text = (tmp_path / "new" / "out.md").read_text(encoding="utf-8")
    assert text == capsys.readouterr().out
    assert "| 1 | wide cell |" in text
    assert "cores, " in text and "other load" in text


@pytest.mark.parametrize(
    ("times", "text"),
    [
        ([], "-"),
        ([0.1234], "123 ms"),
        ([0.1, 0.2, 0.3], "200 ms (100-300, n=3)"),
        ([2.0, 4.0], "3.00 s (2.00-4.00, n=2)"),
    ],
)
def test_seconds_shows_median_and_range(times: list[float], text: str) -> None:
    assert common.seconds(times) == text


def test_random_weights_are_accepted_by_the_copied_app_alone(tmp_path: Path) -> None:
    app = common.own_app(tmp_path)
    common.accept_any_weights(app)
    row = Path("configs") / "backbones" / f"{common.SAM2_ROW}.yaml"
    copied, ours = (folder / row for folder in (app, common.ROOT / "apps" / "autosam_label"))
    assert "sha256" in ours.read_text() and "sha256" not in copied.read_text()
    assert "file: sam2.1_hiera_tiny.pt" in copied.read_text()
    assert not (app / "logs").exists()


@pytest.fixture
def case() -> Case:
    truth = np.zeros((12, 10, 6), bool)
    truth[2:9, 3:8, 1:5] = True
    return Case("data", "image", "part", truth)


def test_boxes_are_sent_as_slicer_sends_them(case: Case) -> None:
    assert case.roi(case.middle) == [2, 8, 3, 7, 3, 3]
    assert case.whole_roi() == [2, 8, 3, 7, 1, 4]


def test_ellipsoid_has_the_ellipse_of_its_box_in_the_middle(case: Case) -> None:
    flat = Case("data", "image", "part", case.truth[:, :, 1:2])
    expected = inscribed_ellipse((10, 12), (3, 2, 8, 9))
    np.testing.assert_array_equal(inscribed_ellipsoid(flat)[:, :, 0].T, expected)


def test_empty_and_full_masks_are_told_apart(case: Case) -> None:
    nothing, everything = np.zeros_like(case.truth), np.ones_like(case.truth)
    one_full_slice = nothing.copy()
    one_full_slice[:, :, 3] = True
    assert judge(nothing, case.truth) == Score(0.0, is_empty=True)
    assert judge(everything, case.truth).is_full
    assert judge(one_full_slice, case.truth).is_full
    assert judge(case.truth, case.truth) == Score(1.0)


def test_rows_give_every_structure_and_the_mean_of_its_dataset(case: Case) -> None:
    names = ("box", "ellipse", "1 click", "3 clicks", "flat box", "whole box", "1 click 3-D", "ellipsoid")
    found = {name: Score(0.5) for name in names}
    other = Case("data", "image", "other", case.truth)
    lines = list(rows([(case, found), (other, {**found, "box": Score(1.0, is_full=True)})]))
    assert [line[:4] for line in lines] == [
        ["data", "part", 1, "0.500"],
        ["data", "other", 1, "1.000"],
        ["data", "**mean**", 2, "0.750"],
    ]
    assert [line[-2:] for line in lines] == [[0, 0], [0, 1], [0, 1]]


def test_corrections_know_what_they_leave_away() -> None:
    with left_alone():  # every name that it replaces is there
        assert assisted.near_points(1, 2, 3) == 1
    assert assisted.near_points is near_points


@pytest.mark.parametrize("name", ["click_latency", "corrections", "startup", "manual_prompts", "zero_shot"])
def test_every_bench_explains_itself(name: str) -> None:
    told = subprocess.run(
        [sys.executable, "-m", f"bench.{name}", "--help"], cwd=common.ROOT, capture_output=True, text=True, check=True
    )
    assert "--out" in told.stdout and f"python -m bench.{name}" in told.stdout
