"""Volumes of several channels from the store to the answer: training, versions, and every infer task."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.exception import MONAILabelException

from infers.interactive import SamTask
from infers.learned import LearnedTask
from lib.assisted import AssistedEngine
from lib.config import TrainRecipe, method_row
from lib.data.samples import common_channels, load_case
from lib.engine import Engine, SegmentOptions
from lib.errors import ConfigError, VolumeError
from lib.evaluate import encoded, evaluate
from lib.learned import Learned, fitted
from lib.train_data import Batches, all_slices
from lib.train_step import step_loss
from lib.types import Click, UserPrompts, Window
from lib.versions.store import open_store
from tests.cases import LABELS, SHAPE, settings, write_case
from trainers.adapt import AdaptTask

ROW = replace(method_row("self_prompt"), options={"slices": 2, "warm_up": 0.0})
RECIPE = TrainRecipe(preset="adapters", loss="selfprompt", batch=4, views=2, lr=5e-3, backbone_lr=5e-3)
SHORT = {"preset": "adapters", "epochs": 1, "steps": 2, "batch": 2, "views": 1}
INFO = {"label_info": [{"name": name, "idx": n} for n, name in enumerate(LABELS, 1)]}
AFFINE = np.diag([1.0, 1.0, 5.0, 1.0])


def store(folder: Path, channels: list[int]) -> LocalDatastore:
    """Upstream's store with one labelled image per number of channels."""
    studies = folder / "studies"
    studies.mkdir()
    for seed, count in enumerate(channels):
        case = write_case(folder / "new", f"c{seed}", seed, channels=count)
        (studies / case.image.name).write_bytes(case.image.read_bytes())
        saved = LocalDatastore(str(studies), extensions=["*.nii.gz"], auto_reload=False)
        saved.save_label(case.case, str(case.label), "final", json.loads(json.dumps(INFO)))
    return LocalDatastore(str(studies), extensions=["*.nii.gz"], auto_reload=False)


def trained(folder: Path, channels: int, preset: str, options: dict[str, Any]) -> float:
    """Mean Dice on a held-out phantom after a minute step count, one slice at a time."""
    cases = [load_case(write_case(folder, f"c{n}", n, channels=channels), LABELS) for n in range(4)]
    row = fitted(replace(ROW, options={"slices": 1, "warm_up": 0.2, **options}), common_channels(cases))
    torch.manual_seed(1)
    model = Learned(row, Engine(settings(folder)).warm(), len(LABELS), preset)
    assert model.spec.channels == options.get("channels", channels)
    recipe = replace(RECIPE, preset=preset)
    batches = Batches(model, all_slices(cases[:3]), recipe)
    optimiser = torch.optim.AdamW(model.groups(recipe.lr, recipe.backbone_lr, 0.0))
    for step in range(50):
        model.train()
        model.progress = step / 50
        optimiser.zero_grad()
        step_loss(model, *batches.batch(step), recipe.loss, step)[0].backward()
        optimiser.step()
    model.eval()
    return evaluate(model, cases[3:], LABELS, encoded(model))["mean_dice"]


@pytest.mark.parametrize(("channels", "preset"), [(2, "adapters"), (4, "full")])
def test_classes_that_only_the_channels_together_show_are_learned(tmp_path: Path, channels: int, preset: str) -> None:
    seen = trained(tmp_path / "all", channels, preset, {})
    reduced = trained(tmp_path / "mean", channels, preset, {"channels": 3})
    assert seen > reduced + 0.1, (seen, reduced)


def test_training_takes_the_channels_of_the_store_and_every_task_answers(tmp_path: Path) -> None:
    saved, state = store(tmp_path, [2, 2, 2]), tmp_path / "state"
    done = AdaptTask(ROW, settings(tmp_path), state)(SHORT, saved)
    versions = open_store(state, ROW.name)
    versions.promote(done["version"], "test")
    live = versions.live()
    assert live is not None and live.recipe["options"] == {**ROW.options, "channels": 2}
    engine = Engine(settings(tmp_path))
    assisted = AssistedEngine(engine, ROW, versions, ("object",))  # the YAML names no channels
    click, image = [16, 18, 3], str(tmp_path / "studies" / "c0.nii.gz")
    asked = {
        SamTask(engine, ("object",), 3): {"foreground": [click]},
        SamTask(engine, ("object",), 2): {"foreground": [click]},
        LearnedTask(assisted, edit=False): {},
        LearnedTask(assisted, edit=True): {"big": [click]},
    }
    for task, prompts in asked.items():
        path, reply = task({"image": image, "result_extension": ".nii.gz", **prompts})
        label = nib.load(path)
        assert label.shape == SHAPE and np.array_equal(label.affine, AFFINE)
        assert [w["source"] for w in (reply["window"], *reply["window"]["rest"])] == ["percentile"] * 2
        json.dumps(reply, allow_nan=False)
        Path(path).unlink()
    other = str(write_case(tmp_path / "grey", "c9", 9).image)
    with pytest.raises(MONAILabelException) as error:
        LearnedTask(assisted, edit=False)({"image": other})
    assert "image with 2 channels" in error.value.msg and "received 1" in error.value.msg


def test_incumbent_of_other_channels_does_not_stand_in_the_way(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    task = AdaptTask(ROW, settings(tmp_path), tmp_path / "state")
    versions = open_store(tmp_path / "state", ROW.name)
    done = task(SHORT, store(first, [2, 2, 2]))
    versions.promote(done["version"], "test")
    assert task(SHORT, store(second, [1, 1, 1]))["version"] == "v0002"


def test_mixed_channels_are_refused_with_their_numbers(tmp_path: Path) -> None:
    saved = store(tmp_path, [1, 2, 1])
    with pytest.raises(MONAILabelException) as error:
        AdaptTask(ROW, settings(tmp_path), tmp_path / "state")(SHORT, saved)
    assert "received 2 with 1 channel and 1 with 2 channels" in error.value.msg


@pytest.mark.parametrize(
    ("method", "options", "channels", "taken"),
    [
        ("self_prompt", {}, 4, 4),
        ("self_prompt", {}, 2, 2),
        ("self_prompt", {}, 3, 3),
        ("self_prompt", {}, 1, 3),
        ("self_prompt", {"channels": 3}, 4, 3),
        ("sam2rad", {}, 4, 3),
    ],
)
@pytest.mark.parametrize("preset", ["adapters", "full", "frozen"])
def test_encoder_takes_what_method_and_images_have(
    tmp_path: Path, method: str, options: dict[str, Any], channels: int, taken: int, preset: str
) -> None:
    row = fitted(replace(method_row(method), options=options), channels)
    backbone = Engine(settings(tmp_path)).warm()
    model = Learned(row, backbone, 1, preset).eval()
    wanted = 3 if preset == "frozen" else taken
    assert (model.spec.channels, model.backbone.spec.channels, backbone.spec.channels) == (wanted, wanted, 3)
    with torch.no_grad():
        x = torch.randn(1, wanted, 64, 64)
        same = x if wanted == 3 else x.mean(1, keepdim=True).expand(-1, 3, -1, -1)  # step 0 is SAM on the mean
        assert torch.allclose(model.encode(x).embed, backbone.encode(same).embed, atol=1e-4)


def test_another_number_of_channels_is_refused(tmp_path: Path) -> None:
    row = replace(ROW, options={"channels": 5})
    with pytest.raises(ConfigError, match=r"channels: expected 2, 3 .* or 4, received 5"):
        Learned(row, Engine(settings(tmp_path)).warm(), 1, "adapters")


@pytest.mark.parametrize("channels", [2, 4])
def test_plain_sam_sees_the_mean_of_the_windowed_channels(tmp_path: Path, channels: int) -> None:
    engine = Engine(settings(tmp_path))
    volume = engine.open(write_case(tmp_path, "c0", 0, channels=channels).image)
    windows = (volume.window, *volume.window.rest)
    parts = [np.clip((volume.array[..., m] - w.lo) / (w.hi - w.lo), 0, 1) for m, w in enumerate(windows)]
    mean = replace(volume, array=np.mean(parts, 0), window=Window(0.0, 1.0), content_hash="mean")
    prompts, one = UserPrompts((Click((16, 18, 3)),)), SegmentOptions(propagate=False)
    found = engine.segment(volume, prompts, one)
    assert np.array_equal(found.mask, engine.segment(mean, prompts, one).mask) and found.mask.any()
    asked = engine.segment(volume, prompts, replace(one, window=(0.0, 1.0)))
    assert asked.cache == {"misses": 1}  # another window is another picture
    assert asked.window == replace(Window(0.0, 1.0), source=asked.window.source, rest=volume.window.rest)


def test_frozen_version_answers_channels_by_their_mean(tmp_path: Path) -> None:
    case = load_case(write_case(tmp_path, "c0", 0, channels=4), LABELS)
    model = Learned(fitted(ROW, 4), Engine(settings(tmp_path)).warm(), len(LABELS), "frozen").eval()
    assert evaluate(model, [case], LABELS, encoded(model))["mean_dice"] >= 0
    model = Learned(fitted(ROW, 2), Engine(settings(tmp_path)).warm(), len(LABELS), "adapters").eval()
    with pytest.raises(VolumeError, match="received 4"):
        evaluate(model, [case], LABELS, encoded(model))
