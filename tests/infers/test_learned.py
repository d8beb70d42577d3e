"""The two tasks of a learned method as clients meet them: ``/info/``, replies and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.infer_v2 import InferType

from infers.learned import LearnedTask
from lib.assisted import AssistedEngine
from lib.engine import Engine
from tests.cases import LABELS, ROW, add_version, settings, store_at, write_case

STAGES = {"pre", "infer", "write", "total", "autonomous", "assisted", "assemble", "segment"}


@pytest.fixture
def assisted(tmp_path: Path) -> AssistedEngine:
    return AssistedEngine(Engine(settings(tmp_path)), ROW, store_at(tmp_path), ("object",))


@pytest.fixture
def promote(assisted: AssistedEngine) -> Callable[..., Any]:
    return lambda **how: add_version(assisted.store, assisted.engine, **how)


@pytest.fixture
def image(tmp_path: Path) -> str:
    return str(write_case(tmp_path, "asked", 3).image)


def tasks(assisted: AssistedEngine) -> tuple[LearnedTask, LearnedTask]:
    return LearnedTask(assisted, edit=False), LearnedTask(assisted, edit=True)


def test_info_without_a_version(assisted: AssistedEngine) -> None:
    alone, edit = tasks(assisted)
    assert (alone.is_valid(), edit.is_valid()) == (False, True)
    assert (alone.type, edit.type) == (InferType.SEGMENTATION, InferType.DEEPEDIT)
    info = edit.info()
    assert (info["labels"], info["version_live"], info["dimension"]) == ({"object": 1}, None, 3)
    assert set(info["config"]) == {"axis", "propagate", "ijk", "window", "save"}
    assert set(alone.info()["config"]) == {"axis", "window", "save", "uncertainty"}
    json.dumps(info, allow_nan=False)


def test_info_follows_the_live_version(assisted: AssistedEngine, promote) -> None:
    alone, edit = tasks(assisted)
    promote()
    for task in (alone, edit):
        assert task.is_valid()
        assert task.info()["labels"] == {"big": 1, "small one": 2}
        assert task.info()["version_live"] == "v0001"
    promote(noise=0.05, labels=("liver", "spleen"))
    assert edit.info()["labels"] == {"liver": 1, "spleen": 2}
    assert edit.info()["version_live"] == "v0002"


def test_autonomous_reply(assisted: AssistedEngine, promote, image: str) -> None:
    promote()
    path, facts = tasks(assisted)[0]({"image": image, "result_extension": ".nii.gz"})
    assert path is not None
    mask = np.asarray(nib.load(path).dataobj)
    Path(path).unlink()
    assert mask.dtype == np.uint8 and mask.any()
    assert np.array_equal(mask, assisted.segment(assisted.engine.open(image), {}).mask)
    assert facts["label_names"] == {"big": 1, "small one": 2}
    assert (facts["version"], facts["edited"], facts["warnings"], facts["axis"]) == ("v0001", {}, [], "k")
    assert set(facts["presence"]) == set(facts["quality"]) == set(LABELS)
    assert list(facts["presence"]["big"]) == [str(k) for k in range(6)]
    assert set(facts["latencies"]) >= STAGES
    assert facts["cache"] == {"misses": 6, "automatic_hits": 0}
    assert (facts["backbone"], facts["weights_id"]) == ("tiny", "random-0")
    json.dumps(facts, allow_nan=False)


def test_uncertainty_of_slices_on_request(assisted: AssistedEngine, promote, image: str) -> None:
    promote(noise=0.1)
    task, request = tasks(assisted)[0], {"image": image, "result_write_to_file": False}
    plain = task(request)[1]
    assert "uncertainty" not in plain and "review" not in plain
    facts = task({**request, "uncertainty": "slices"})[1]
    assert facts["cache"]["automatic_hits"] == 1
    assert {k: facts[k] for k in ("quality", "presence", "label_names")} == {
        k: plain[k] for k in ("quality", "presence", "label_names")
    }
    assert set(facts["uncertainty"]) == set(LABELS)
    for label, rows in facts["uncertainty"].items():
        assert list(rows) == [str(k) for k in range(6)] and all(0 <= doubt <= 1 for doubt in rows.values())
        assert facts["review"].get(label, []) == [int(k) for k, doubt in rows.items() if doubt > 0.3]
    assert facts["review"]  # with noise on what it learned it is not sure
    assert facts["latencies"]["uncertainty"] >= 0
    json.dumps(facts, allow_nan=False)


def test_uncertainty_map_is_the_label_file_and_costs_no_second_run(assisted, promote, image: str) -> None:
    promote()
    task = tasks(assisted)[0]
    found = assisted.segment(assisted.engine.open(image), {}).mask
    maps = {}
    for wish in ("map", "levels"):
        path, facts = task({"image": image, "result_extension": ".nii.gz", "uncertainty": wish})
        stored = nib.load(path)
        maps[wish] = np.asarray(stored.dataobj)
        Path(path).unlink()
        assert facts["cache"]["automatic_hits"] == 1 and facts["file"] == "uncertainty"
        assert np.array_equal(stored.affine, nib.load(image).affine) and maps[wish].shape == found.shape
    assert maps["map"].dtype == np.uint8 and 25 < maps["map"].max() <= 100
    assert facts["label_names"] == {"uncertain 25 to 50 %": 1, "uncertain 50 to 75 %": 2, "uncertain 75 to 100 %": 3}
    assert np.array_equal(maps["levels"] == 3, maps["map"] >= 75)
    edge = (found != np.roll(found, 1, 0)) | (found != np.roll(found, 1, 1))
    assert maps["map"][edge].mean() > 2 * maps["map"][~edge].mean()  # uncertain where labels end
    assert np.array_equal(assisted.segment(assisted.engine.open(image), {}).mask, found)


def test_task_with_prompts_pays_no_heed_to_uncertainty(assisted, promote, image: str) -> None:
    promote()
    facts = tasks(assisted)[1]({"image": image, "result_write_to_file": False, "uncertainty": "map"})[1]
    assert "uncertainty" not in facts and facts["label_names"] == {"big": 1, "small one": 2}


def test_empty_is_about_the_segmentation_where_the_file_is_a_map(assisted, promote, image: str, monkeypatch) -> None:
    promote()
    task = tasks(assisted)[0]
    request = {"image": image, "uncertainty": "levels", "result_extension": ".nii.gz"}
    assert task(request)[1]["empty"] is False
    real = assisted.doubted

    def nothing_found(*args: Any, **kwargs: Any) -> Any:
        found, doubt = real(*args, **kwargs)
        return replace(found, mask=np.zeros_like(found.mask)), doubt

    monkeypatch.setattr(assisted, "doubted", nothing_found)
    assert task(request)[1]["empty"] is True


def test_edit_reply(assisted: AssistedEngine, promote, image: str) -> None:
    promote()
    alone, edit = tasks(assisted)
    request = {"image": image, "result_write_to_file": False}
    first = alone(request)[1]
    assert edit(request)[1]["presence"] == first["presence"]
    path, facts = edit({**request, "small one": [[9, 28, 3]], "propagate": False})
    assert path is None
    assert 3 in facts["edited"]["small one"]
    assert facts["presence"]["small one"]["3"] >= 0.5
    assert facts["cache"]["automatic_hits"] == 1


def test_autonomous_task_pays_no_heed_to_clicks(assisted: AssistedEngine, promote, image: str) -> None:
    promote()
    task = tasks(assisted)[0]
    request = {"image": image, "result_write_to_file": False}
    clicked = task({**request, "big": [[1, 1, 1]], "label": "nothing", "foreground": [[999, 0, 0]]})[1]
    assert clicked["presence"] == task(request)[1]["presence"] and clicked["edited"] == {}


def test_edit_without_a_version_is_plain_sam(assisted: AssistedEngine, image: str) -> None:
    facts = tasks(assisted)[1]({"image": image, "foreground": [[16, 18, 3]], "result_write_to_file": False})[1]
    assert facts["version"] is None
    assert facts["label_names"] == {"object": 1}
    assert any("this is plain SAM" in sentence for sentence in facts["warnings"])


def test_warnings_of_prompts_and_answer_come_together(assisted: AssistedEngine, image: str) -> None:
    request = {"image": image, "foreground": [[16, 18, 3]], "roi": [-5, 20, 4, 30, 3, 3], "result_write_to_file": False}
    warnings = tasks(assisted)[1](request)[1]["warnings"]
    assert any("cut off at its border" in w for w in warnings) and any("plain SAM" in w for w in warnings)


# which task, whether a version is live, request, words, code
ERRORS = [
    (0, False, {}, r"No trained version of sam2rad is live\. Label some images and train first", "INVALID_INPUT"),
    (1, False, {}, "needs a positive click or a box", "INVALID_INPUT"),
    (1, True, {"big": [[99, 0, 0]]}, "big.*expected a voxel inside", "INVALID_INPUT"),
    (1, True, {"label": "liver", "foreground": [[1, 1, 1]]}, "expected one of the labels", "INVALID_INPUT"),
    (0, True, {"axis": "z"}, "axis: expected one of", "INVALID_INPUT"),
    (0, True, {"uncertainty": "maps"}, "uncertainty: expected one of.*Did you mean 'map'", "INVALID_INPUT"),
    (0, True, {"uncertainty": "map", "save": "final"}, "Keep the map by save draft", "INVALID_INPUT"),
    (0, True, {"uncertainty": "levels", "save_label": True}, "Keep the map by save draft", "INVALID_INPUT"),
    (0, False, {"uncertainty": "slices"}, r"No trained version of sam2rad is live", "INVALID_INPUT"),
    (0, True, {"image": "/nowhere/x.nii.gz"}, "cannot be found", "INVALID_INPUT"),
]


@pytest.mark.parametrize(("number", "live", "request_", "words", "code"), ERRORS)
def test_errors_become_the_servers(assisted, promote, image: str, number, live, request_, words, code) -> None:
    if live:
        promote()
    with pytest.raises(MONAILabelException, match=words) as caught:
        tasks(assisted)[number]({"image": image, **request_})
    assert caught.value.error == MONAILabelError[code]


def test_version_of_another_backbone_is_the_operators_error(assisted: AssistedEngine, promote, image: str) -> None:
    promote(digest="f" * 64)
    with pytest.raises(MONAILabelException, match="was trained on tiny with weights") as caught:
        tasks(assisted)[0]({"image": image})
    assert caught.value.error == MONAILabelError.APP_ERROR


@pytest.mark.parametrize("file", ["live.json", "versions/v0001/version.json"])
def test_damaged_store_is_told_to_who_asks_and_hides_nothing_else(assisted, promote, image: str, file: str) -> None:
    promote()
    (assisted.store.folder / file).write_text("{")
    alone, edit = tasks(assisted)  # the app still starts
    assert (alone.is_valid(), edit.is_valid()) == (False, True)
    assert (edit.info()["version_live"], edit.info()["labels"]) == (None, {"object": 1})
    for task in (alone, edit):
        with pytest.raises(MONAILabelException, match="is damaged") as caught:
            task({"image": image})
        assert caught.value.error == MONAILabelError.APP_ERROR
