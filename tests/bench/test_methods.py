"""Rows, resuming and tables of the comparison of methods, and the memory that training takes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench import memory, methods
from bench.common import Report
from bench.ladder import ENTRIES, LADDER, LADDER_PAIRS, METHOD_PAIRS, METHODS, REPEATED, Entry, recipe_row
from lib.config import method_names
from lib.errors import ConfigError
from lib.learned import Learned
from lib.loading import load_backbone

CLASSES = 3


def result(*means: float) -> dict[str, Any]:
    """Of two patients with two volumes each, whose Dice differ by 0.2 around the means of two labels."""
    dice = {
        f"patient{p:03}_frame{f:02}": [m + (0.1 if p else -0.1) + (0.05 if f else -0.05) for m in means]
        for p in range(2)
        for f in range(2)
    }
    facts = {"parameters": 1234, "train_s": 10.0, "volume_s": 0.5, "peak_mb": 900.0, "labels": ["a", "b"]}
    return {**facts, "dice": dice}


def options(work: Path, **changes: Any) -> SimpleNamespace:
    facts = {"work": work, "minutes": 5.0, "clock": "wall", "cases": None, "seeds": [1], "methods": None}
    return SimpleNamespace(**{**facts, "ladder": False, **changes})


def test_every_method_is_compared_with_its_own_recipe() -> None:
    assert {e.method for e in METHODS if e.name == e.method} == set(method_names())
    assert {name for pair in (*METHOD_PAIRS, *LADDER_PAIRS) for name in pair} <= set(ENTRIES)
    slugs = [e.slug for e in ENTRIES.values()]
    assert len(set(slugs)) == len(slugs) == len(METHODS) + len(LADDER)


def built(entry: Entry) -> Learned:
    row = entry.row()
    return Learned(row, load_backbone("tiny"), CLASSES, row.recipe.preset)


def test_rungs_add_one_part_after_the_other() -> None:
    models = [built(rung) for rung in LADDER]
    assert [m.changes_encoder for m in models] == [False, False] + [True] * 7
    names = [set(m.trained()) for m in models]
    mixed = [{n for n in found if ".mix." in n} for found in names]
    assert [bool(m) for m in mixed] == [False] * 3 + [True] * 6
    assert mixed[3] == mixed[4] == mixed[5]  # the same layers, elsewhere
    for smaller, larger in ((0, 1), (1, 2), (2, 5), (6, 8)):
        assert len(names[smaller]) < len(names[larger])
    added = [names[n + 1] - names[n] for n in range(5, 8)]
    assert any("place" in n for n in added[0]) and any("stem" in n for n in added[1])
    assert all(n.startswith("method.weigh.") for n in added[2])
    assert names[8] == set(built(ENTRIES["self_prompt"]).trained())  # the last rung is the method
    assert [ENTRIES[name].options["mix"] for name in REPEATED] == ["none", "none", "inside"]


@pytest.mark.parametrize("rung", LADDER, ids=lambda r: r.slug)
def test_every_rung_starts_as_the_plain_encoder_and_answers(rung: Entry) -> None:
    model = built(rung).eval()
    plain, x = load_backbone("tiny"), torch.randn(4, 3, model.spec.input_size, model.spec.input_size)
    with torch.no_grad():
        features = model.encode(x, 4)
        assert torch.equal(features.embed, plain.encode(x, ()).embed)
        assert model.autonomous(features).masks.shape == (4 * CLASSES, model.spec.mask_size, model.spec.mask_size)


@pytest.mark.parametrize(
    "entry, expected", [("sam2rad", "full"), ("self_prompt", "adapters"), ("promise frozen", "frozen")]
)
def test_auto_is_what_the_train_task_makes_of_it(entry: str, expected: str) -> None:
    assert ENTRIES[entry].row().recipe.preset == expected
    assert recipe_row("sam2rad", auto="adapters").recipe.preset == "adapters"  # its file says auto
    with pytest.raises(ConfigError, match="no learned method"):
        ENTRIES["DynUNet"].row()


def test_finished_rows_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def child(options: Any, entry: Entry, name: str, seed: int, path: Path) -> bool:
        asked.append((entry.name, seed))
        if entry.name == "DynUNet":
            return False  # it failed
        path.write_text(json.dumps(result(0.5, 0.7)))
        return True

    monkeypatch.setattr(methods, "_child", child)
    chosen = [ENTRIES["sam2rad"], ENTRIES["DynUNet"]]
    first = list(methods.results(options(tmp_path / "work", seeds=[1, 2]), chosen, "acdc"))
    assert [(name, seed) for name, seed, _ in first] == [("sam2rad", 1), ("sam2rad", 2)]
    assert asked == [("sam2rad", 1), ("DynUNet", 1), ("sam2rad", 2), ("DynUNet", 2)]
    asked.clear()
    again = list(methods.results(options(tmp_path / "work", seeds=[1, 2]), chosen, "acdc"))
    assert again == first and asked == [("DynUNet", 1), ("DynUNet", 2)]
    asked.clear()
    for changes in ({"minutes": 4.0}, {"clock": "cpu"}, {"cases": 3}):  # measured under other conditions
        list(methods.results(options(tmp_path / "work", **changes), chosen[:1], "acdc"))
    assert asked == [("sam2rad", 1)] * 3


def test_volumes_of_a_patient_count_once() -> None:
    np.testing.assert_allclose(methods.by_patient(result(0.5, 0.7)), [[0.4, 0.6], [0.6, 0.8]])
    found = {("x", 1): result(0.5, 0.7), ("x", 2): result(0.7, 0.9), ("y", 1): result(0.1, 0.1)}
    np.testing.assert_allclose(methods.mean_of_seeds(found, "x"), [[0.5, 0.7], [0.7, 0.9]])


def test_tables_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("Methods", tmp_path / "out.md")
    found = {("sam2rad", 1): result(0.6, 0.8), ("autosam", 1): result(0.5, 0.6), ("DynUNet", 1): result(0.5, 0.5)}
    methods.score_table(report, "acdc", found)
    methods.difference_table(report, found, METHOD_PAIRS)
    methods.goal(report, found)
    lines = [" ".join(line.split()) for line in (tmp_path / "out.md").read_text().splitlines()]
    assert "| sam2rad | 1 | 0.600 | 0.800 | 0.700 (0.600 to 0.800) | 1,234 | - | 10 | 0.50 | 900 | - |" in lines
    tenth = "+0.100 (+0.100 to +0.100)"
    assert f"| sam2rad - DynUNet | {tenth} | +0.300 (+0.300 to +0.300) | +0.200 (+0.200 to +0.200) |" in lines
    assert not any(line.startswith("| promise -") for line in lines)  # not trained
    assert "Mean Dice of at least 0.65: sam2rad; 1 of 2." in lines
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", method_names())
def test_training_at_batch_2_fits_a_laptop(method: str) -> None:
    peak = memory.peak_gb(method)
    print(f"{method}: {peak:.2f} GB at its peak")
    assert peak < memory.LIMITS_GB["cpu"]


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", method_names())
def test_training_at_batch_2_and_1024_pixels_fits_a_gpu(method: str) -> None:
    peak = memory.peak_gb(method, "sam2.1_tiny", "cuda")
    print(f"{method}: {peak:.2f} GB at its peak")
    assert peak < memory.LIMITS_GB["cuda"]
