"""Slices that a model sees together: windows, how they are blended, training batches and answers of a live version."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.assisted import AssistedEngine
from lib.config import MethodRow
from lib.data.samples import TrainingCase
from lib.engine import Engine
from lib.evaluate import encoded, segmented
from lib.learned import Answer, Learned
from lib.train_data import Batches, Slice, all_slices
from lib.train_loop import Run, fit
from lib.types import Click, UserPrompts
from lib.versions.record import Trained
from lib.windows import answers, fall_off, window_around, windows
from tests.cases import LABELS, cases, recipe, settings, store_at, write_case

SLICES = 4
OPTIONS = {"slices": SLICES}
ROW = MethodRow("self_prompt", "self_prompt", OPTIONS, recipe())


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(settings(tmp_path_factory.mktemp("engine")))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[TrainingCase]:
    return cases(tmp_path_factory.mktemp("cases"), 2)


def model_of(engine: Engine, preset: str = "adapters") -> Learned:
    torch.manual_seed(1)
    return Learned(ROW, engine.warm(), len(LABELS), preset).eval()


@pytest.mark.parametrize(
    "count, depth, expected",
    [
        (8, 8, [(0, 8)]),
        (5, 8, [(0, 5)]),
        (1, 8, [(0, 1)]),
        (9, 8, [(0, 8), (1, 9)]),
        (12, 8, [(0, 8), (4, 12)]),
        (14, 8, [(0, 8), (4, 12), (6, 14)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_windows_overlap_by_half_and_cover_everything(count, depth, expected) -> None:
    assert [(w.start, w.stop) for w in windows(count, depth)] == expected


@pytest.mark.parametrize(
    "index, count, depth, expected",
    [(5, 20, 1, (5, 6)), (10, 20, 8, (6, 14)), (0, 20, 8, (0, 8)), (19, 20, 8, (12, 20)), (2, 5, 8, (0, 5))],
)
def test_window_around_holds_its_slice(index, count, depth, expected) -> None:
    window = window_around(index, count, depth)
    assert (window.start, window.stop) == expected and index in window


def test_fall_off_is_symmetric_and_never_zero() -> None:
    weights = fall_off(8)
    assert torch.equal(weights, weights.flip(0)) and weights.argmax() in (3, 4) and weights.min() >= 1e-3
    assert fall_off(1).tolist() == [1.0]


def scripted(probability: dict[int, list[float]]) -> SimpleNamespace:
    """A model of one class and one cell that gives a window the probabilities written for its first slice."""

    def autonomous(first: int) -> Answer:
        p = torch.tensor(probability[first])
        return Answer(torch.logit(p).view(-1, 1, 1), p, p)

    return SimpleNamespace(slices=2, classes=1, spec=SimpleNamespace(mask_size=1), autonomous=autonomous)


@pytest.mark.parametrize(("classes", "lengths"), [(1, [8, 2]), (8, [8, 2]), (20, [3, 3, 3, 1]), (100, [1] * 10)])
def test_groups_have_fewer_slices_where_there_are_many_classes(classes: int, lengths: list[int]) -> None:
    model = SimpleNamespace(slices=1, classes=classes, autonomous=lambda group: group)
    assert [len(group) for group, _ in answers(model, 10, lambda group: group)] == lengths


def test_blending_averages_probabilities() -> None:
    model = scripted({0: [0.2, 0.4], 1: [0.8, 0.9]})
    ((group, answer),) = answers(model, 3, lambda window: window.start)
    assert list(group) == [0, 1, 2]
    assert answer.masks.sigmoid().flatten().tolist() == pytest.approx([0.2, 0.6, 0.9], abs=1e-5)
    assert answer.iou.tolist() == pytest.approx([0.2, 0.6, 0.9])


def test_training_windows_are_neighbours_of_one_volume(engine: Engine, found: list[TrainingCase]) -> None:
    model = model_of(engine)
    batches = Batches(model, all_slices(found), recipe(batch=8, views=1))
    features, target = batches.batch(3)
    assert batches.depth == features.depth == SLICES
    assert features.embed.shape[0] == target.shape[0] == 8  # two windows
    assert target.shape[1] == len(LABELS)


@pytest.mark.parametrize("index, expected", [(0, [0, 1, 2, 3]), (3, [1, 2, 3, 4]), (5, [2, 3, 4, 5])])
def test_window_of_a_training_slice(engine: Engine, found: list[TrainingCase], index, expected, monkeypatch) -> None:
    batches = Batches(model_of(engine), all_slices(found), recipe())
    batches.slices[0] = Slice(found[0], 2, index)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(batches, "_view", lambda one, place, view: seen.append((one.index, view)))
    batches._window(0, 7)
    assert seen == [(k, 7) for k in expected]  # all moved alike


def test_training_and_validation_see_neighbours(engine: Engine, found: list[TrainingCase], tmp_path: Path) -> None:
    chosen = recipe(epochs=2, steps=3, batch=4, preset="adapters", loss="selfprompt")
    model = model_of(engine)
    run = Run(model, Batches(model, all_slices(found[:1]), chosen), found[1:], LABELS, chosen, tmp_path)
    seen: list[set[str]] = []
    metrics = fit(run, lambda entry: seen.append(set(entry)))
    assert 0 <= metrics["mean_dice"] <= 1 and len(seen) >= 6
    with torch.no_grad():
        once = segmented(model, found[1], encoded(model))
    assert np.array_equal(once, segmented(model, found[1], encoded(model)))


@pytest.mark.parametrize("preset", ["frozen", "adapters"])
def test_live_version_answers_with_windows(engine: Engine, tmp_path: Path, preset: str) -> None:
    model = model_of(engine, preset)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p) if p.requires_grad else 0
    facts = Trained(
        backbone="tiny", backbone_digest=engine.warm().weights_id, labels=LABELS,
        recipe={"preset": preset, "options": OPTIONS}, split={"c0": "val"},
        metrics={"mean_dice": 0.5, "dice": dict.fromkeys(LABELS, 0.5), "cases": {}},
    )  # fmt: skip
    store = store_at(tmp_path)
    store.promote(store.add(model.trained(), facts).name, "test")
    served = AssistedEngine(engine, ROW, store, LABELS)
    case = write_case(tmp_path, "asked", 3)
    volume = served.engine.open(case.image)
    first = served.segment(volume, {})
    assert np.array_equal(first.mask, served.segment(volume, {}).mask)
    trained = TrainingCase("asked", volume, np.zeros(volume.shape, np.uint8))
    expected = segmented(model, trained, encoded(model))
    assert (first.mask != expected).mean() < 0.01  # half precision features where they are cached
    i, j = np.argwhere(first.mask[:, :, 2] != 1)[0].tolist()  # where it is the label already a click changes nothing
    asked = served.segment(volume, {LABELS[0]: UserPrompts((Click((i, j, 2)),))})
    assert 2 in asked.edited[LABELS[0]] and asked.mask[i, j, 2] == 1
    assert not np.array_equal(asked.mask, first.mask)
