"""What is kept of a version's worst cases: the right ones, the right slice, pictures that hold together."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib import worst_cases as module
from lib.versions.pictures import FOUND, TRUTH
from lib.worst_cases import keep_worst
from tests.cases import LABELS, cases

DICE = {"c0": (0.9, 0.8), "c1": (0.2, 0.9), "c2": (0.9, 0.0), "c3": (0.9, 0.9), "c4": (0.4, 0.6), "gone": (0.0, 0.0)}
SCORES = {"cases": {case: dict(zip(LABELS, row)) for case, row in DICE.items()}}


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict], dict[str, np.ndarray]]:
    """What a model that misses everything on slice 3 leaves behind."""
    found = cases(tmp_path / "cases", 5)

    def missing(model: object, case: object, features: object) -> np.ndarray:
        drawn = case.target.copy()  # type: ignore[attr-defined]
        drawn[:, :, 3] = 0
        return drawn

    monkeypatch.setattr(module, "segmented", missing)
    monkeypatch.setattr(module, "encoded", lambda model: None)
    keep_worst(None, found, SCORES, LABELS, tmp_path)  # type: ignore[arg-type]
    pictures = {p.name: np.array(Image.open(io.BytesIO(p.read_bytes()))) for p in tmp_path.glob("*.png")}
    return json.loads((tmp_path / "worst.json").read_text()), pictures


def test_worst_cases_are_kept_worst_first_with_their_worst_label(shown) -> None:
    facts, pictures = shown
    assert [(f["case"], f["label"], f["dice"]) for f in facts] == [
        ("c2", "small one", 0.0),
        ("c4", "big", 0.4),
        ("c1", "big", 0.2),
    ]
    assert {(f["axis"], f["slice"]) for f in facts} == {("k", 3)}
    assert {f["file"] for f in facts} == set(pictures)


def test_pictures_show_the_missed_object(shown) -> None:
    for picture in shown[1].values():
        colours = {tuple(p) for p in picture.reshape(-1, 3)}
        assert TRUTH in colours and FOUND not in colours


def test_no_scores_by_case_keep_an_empty_list(tmp_path: Path) -> None:
    keep_worst(None, cases(tmp_path / "cases", 1), {"cases": ["c0"]}, LABELS, tmp_path)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "worst.json").read_text()) == []


def test_colour_pictures_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = cases(tmp_path / "cases", 1)
    colour = np.zeros((*case.volume.shape, 3), np.uint8)
    case = replace(case, volume=replace(case.volume, array=colour))
    monkeypatch.setattr(module, "segmented", lambda *_: case.target)
    monkeypatch.setattr(module, "encoded", lambda model: None)
    keep_worst(None, [case], SCORES, LABELS, tmp_path)  # type: ignore[arg-type]
    assert (tmp_path / "worst-1.png").is_file()
