"""Which version a training begins with, and the reason where it begins anew."""

from __future__ import annotations

from typing import Any, Optional

import pytest

from lib.errors import ConfigError
from lib.versions.record import Version
from lib.versions.start import why_anew

LABELS = ("RV", "LV")
RECIPE: dict[str, Any] = {"preset": "full", "options": {"tokens": 10}, "lr": 0.001}


def live(**changes: Any) -> Version:
    facts: dict[str, Any] = {
        "method": "sam2rad", "name": "v0003", "created": "2026-01-01T00:00:00+00:00", "sha256": "0" * 64,
        "backbone": "compact", "backbone_digest": "b", "labels": LABELS, "recipe": RECIPE,
        "split": {"a": "train", "b": "val"}, "metrics": {"mean_dice": 0.5},
    }  # fmt: skip
    return Version(**facts | changes)


def why(version: Optional[Version], wanted: str = "live", **changes: Any) -> Optional[str]:
    asked = {"backbone_digest": "b", "labels": list(LABELS), "recipe": {**RECIPE, "lr": 0.1}, "validation": ["b", "c"]}
    return why_anew(wanted, version, **asked | changes)


def test_live_version_that_fits_is_gone_on_with() -> None:
    assert why(live()) is None


@pytest.mark.parametrize(
    ("version", "changes", "words"),
    [
        (None, {}, "no version is live"),
        (live(), {"wanted": "new"}, "the recipe says so"),
        (live(), {"backbone_digest": "c"}, "v0003 belongs to another backbone"),
        (live(), {"labels": ["LV", "RV"]}, "v0003 knows the labels RV, LV"),
        (live(), {"labels": ["RV", "LV", "Myo"]}, "v0003 knows the labels RV, LV"),
        (live(), {"recipe": {**RECIPE, "preset": "frozen"}}, "another preset"),
        (live(), {"recipe": {**RECIPE, "options": {"tokens": 4}}}, "other options"),
        (live(), {"validation": ["a", "b"]}, "v0003 learned from 1 of the cases that validate now"),
    ],
)
def test_what_does_not_fit_begins_anew(version: Optional[Version], changes: dict[str, Any], words: str) -> None:
    assert words in (why(version, **changes) or "")


def test_unknown_word_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"start: expected one of \['live', 'new'\], received 'v0003'"):
        why(live(), "v0003")
