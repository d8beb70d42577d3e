"""Points that a method proposed, in its reply; and what is kept between the clicks of one that sees neighbours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from infers.learned import LearnedTask
from lib.assisted import AssistedEngine
from lib.config import method_row
from lib.engine import Engine
from lib.learned import Learned
from lib.types import Click, UserPrompts
from lib.versions.record import Trained
from lib.versions.store import open_store
from tests.cases import LABELS, SHAPE, draw, settings

PER_PAIR = {"promise": 16, "self_prompt": 1}


def assisted(folder: Path, name: str) -> AssistedEngine:
    """A method that was never trained but answers; every tensor says something."""
    row, engine, store = method_row(name), Engine(settings(folder)), open_store(folder / "state", name)
    torch.manual_seed(1)
    preset = "adapters" if name == "self_prompt" else "frozen"
    tensors = Learned(row, engine.warm(), len(LABELS), preset).trained()
    tensors = {k: t + 0.05 * torch.randn_like(t) if t.is_floating_point() else t for k, t in tensors.items()}
    facts = Trained(
        backbone="tiny", backbone_digest=engine.warm().weights_id, labels=LABELS,
        recipe={"preset": preset, "options": row.options}, split={},
        metrics={"mean_dice": 0.5, "dice": dict.fromkeys(LABELS, 0.5), "cases": {}},
    )  # fmt: skip
    store.promote(store.add(tensors, facts).name, "test")
    return AssistedEngine(engine, row, store, ("object",))


def image(folder: Path, handed: int = 1) -> str:
    path = folder / f"image{handed}.nii.gz"
    nib.save(nib.Nifti1Image(draw(3)[0], np.diag([handed, 1, 5, 1.0])), path)
    return str(path)


def reply(engine: AssistedEngine, **request: Any) -> dict[str, Any]:
    return LearnedTask(engine, edit=False)({"result_write_to_file": False, **request})[1]


@pytest.mark.parametrize("name", PER_PAIR)
def test_points_are_told_as_voxels_where_they_are_asked_for(tmp_path: Path, name: str) -> None:
    engine, path = assisted(tmp_path, name), image(tmp_path)
    assert "points" not in reply(engine, image=path)
    found = reply(engine, image=path, points=True)
    json.dumps(found, allow_nan=False)
    told = [
        (label, int(index), ijk) for label, rows in found["points"].items() for index, p in rows.items() for ijk in p
    ]
    assert told and {label for label, _, _ in told} <= set(LABELS)
    for _, index, ijk in told:
        assert ijk[2] == index and all(0 <= v < n for v, n in zip(ijk, SHAPE))
    assert bool(found["negative_points"]) == (name == "promise")
    most = max(len(p) for rows in found["points"].values() for p in rows.values())
    assert most <= PER_PAIR[name]


def test_points_are_counted_as_slicer_counts_where_it_asks(tmp_path: Path) -> None:
    engine, path = assisted(tmp_path, "promise"), image(tmp_path, handed=-1)
    file, slicer = (reply(engine, image=path, points=True, ijk=order)["points"] for order in ("file", "slicer"))
    assert file.keys() == slicer.keys() and file
    for label, rows in file.items():
        for index, points in rows.items():
            assert slicer[label][index] == [[i, j, SHAPE[2] - 1 - k] for i, j, k in points]


@pytest.mark.parametrize("name", ["sam2rad", "autosam"])
def test_method_without_points_tells_none(tmp_path: Path, name: str) -> None:
    assert "points" not in reply(assisted(tmp_path, name), image=image(tmp_path), points=True)


def test_second_click_on_a_slice_encodes_nothing_and_answers_as_the_first(tmp_path: Path, monkeypatch) -> None:
    engine = assisted(tmp_path, "self_prompt")
    volume = engine.engine.open(image(tmp_path))
    one, two = ({"big": UserPrompts(tuple(Click(p) for p in at))} for at in ([(16, 18, 3)], [(16, 18, 3), (9, 9, 3)]))
    engine.segment(volume, {})
    first = engine.segment(volume, one)
    assert first.cache["misses"] > 0
    monkeypatch.setattr(engine.engine, "together", None)  # whoever encodes now fails
    again, other = engine.segment(volume, one), engine.segment(volume, two)
    assert np.array_equal(first.mask, again.mask) and first.quality == again.quality
    assert again.cache["window_hits"] > 0 and not again.cache.get("misses")
    assert other.edited and not other.cache.get("misses")


def test_what_is_kept_of_windows_is_bounded_and_changes_no_answer(tmp_path: Path, monkeypatch) -> None:
    prompts = {"big": UserPrompts((Click((16, 18, 3)),))}
    kept = assisted(tmp_path / "kept", "self_prompt")
    monkeypatch.setattr("lib.assisted.WINDOWS_MB", 0)
    bare = assisted(tmp_path / "bare", "self_prompt")
    found = [e.segment(e.engine.open(image(tmp_path)), prompts) for e in (kept, kept, bare, bare)]
    assert len(kept._windows) > 0 and len(bare._windows) == 0
    assert found[3].cache["misses"] > 0
    assert all(np.array_equal(found[0].mask, one.mask) and found[0].quality == one.quality for one in found)
