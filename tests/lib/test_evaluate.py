"""Dice on whole volumes: the numbers, the names, the axes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lib import evaluate as module
from lib.data.geometry import put_slice, slice_view
from lib.data.samples import TrainingCase
from lib.engine import Engine
from lib.evaluate import case_dice, encoded, evaluate, kept, segmented, summary
from lib.learned import Learned
from lib.train_data import Slice
from tests.cases import LABELS, cases, learned, settings, trained_tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    found = learned(Engine(settings(tmp_path_factory.mktemp("engine"))))
    found.restore(trained_tensors())
    return found.eval()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[TrainingCase]:
    return cases(tmp_path_factory.mktemp("cases"), 2)


DICE = [
    ([0, 0, 0, 0], [0, 0, 0, 0], [1.0, 1.0]),  # absent from both
    ([1, 1, 0, 0], [1, 1, 0, 0], [1.0, 1.0]),
    ([1, 0, 0, 0], [1, 1, 0, 0], [2 / 3, 1.0]),
    ([1, 2, 0, 0], [2, 1, 0, 0], [0.0, 0.0]),
    ([0, 0, 0, 0], [0, 0, 0, 2], [1.0, 0.0]),  # missed
    ([2, 0, 0, 0], [0, 0, 0, 0], [1.0, 0.0]),  # invented
    ([1, 1, 1, 2], [1, 1, 2, 2], [0.8, 2 / 3]),
]


@pytest.mark.parametrize(("predicted", "truth", "expected"), DICE)
def test_case_dice_table(predicted: list[int], truth: list[int], expected: list[float]) -> None:
    shaped = [np.array(v, np.uint8).reshape(2, 2, 1) for v in (predicted, truth)]
    assert case_dice(*shaped, 2) == pytest.approx(expected)


def test_case_dice_does_not_depend_on_memory_order() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 3, (5, 4, 3)).astype(np.uint8) for _ in range(2))
    assert case_dice(a, b, 2) == case_dice(np.asfortranarray(a), b, 2)


def test_summary_means_by_case_and_label() -> None:
    got = summary({"a": [1.0, 0.0], "b": [0.5, 0.5]}, ("x", "y"))
    assert got["mean_dice"] == 0.5
    assert got["dice"] == {"x": 0.75, "y": 0.25}
    assert got["cases"]["b"] == {"x": 0.5, "y": 0.5}


# labels of the model, what it draws, wanted labels, truth, Dice
NAMES = [
    (("a", "b"), [1, 2, 0], ("a", "b"), [1, 2, 0], [1.0, 1.0]),
    (("b", "a"), [2, 1, 0], ("a", "b"), [1, 2, 0], [1.0, 1.0]),  # another order
    (("b",), [0, 1, 0], ("a", "b"), [1, 2, 0], [0.0, 1.0]),  # a is new: left empty
    (("a", "old"), [1, 2, 0], ("a", "b"), [1, 2, 0], [1.0, 0.0]),  # old is no longer asked for
]


@pytest.mark.parametrize(("own", "drawn", "labels", "truth", "dice"), NAMES)
def test_evaluate_compares_by_name(monkeypatch, found, own, drawn, labels, truth, dice) -> None:
    monkeypatch.setattr(module, "segmented", lambda *_: np.array(drawn, np.uint8).reshape(3, 1, 1))
    case = replace(found[0], target=np.array(truth, np.uint8).reshape(3, 1, 1))
    got = evaluate(None, [case], labels, None, own=own)  # type: ignore[arg-type]
    assert list(got["dice"].values()) == pytest.approx(dice)
    assert list(got["cases"]) == [case.case]


def test_segmented_finds_what_was_learned(model: Learned, found: list[TrainingCase]) -> None:
    scores = evaluate(model, found, LABELS, encoded(model))
    assert scores["mean_dice"] > 0.1
    assert segmented(model, found[0], encoded(model)).shape == found[0].volume.shape


def test_segmented_sagittal_volume_is_the_axial_one_turned(model: Learned, found: list[TrainingCase]) -> None:
    axial = found[0]
    depth = axial.volume.shape[2]
    shape = (depth, *axial.volume.shape[:2])
    if slice_view(np.zeros(shape), 0, 0).shape != slice_view(axial.target, 2, 0).shape:
        shape = (depth, *shape[:0:-1])
    array, target = np.zeros(shape, np.float32), np.zeros(shape, np.uint8)
    for index in range(depth):
        put_slice(array, 0, index, slice_view(axial.volume.array, 2, index))
        put_slice(target, 0, index, slice_view(axial.target, 2, index))
    volume = replace(axial.volume, array=array, spacing_mm=(5.0, 1.0, 1.0), content_hash="turned")
    turned = segmented(model, TrainingCase("turned", volume, target), encoded(model))
    straight = segmented(model, axial, encoded(model))
    assert straight.any()
    for index in range(depth):
        assert np.array_equal(slice_view(turned, 0, index), slice_view(straight, 2, index))


def test_kept_encodes_once_and_keeps_the_encoding_and_device_of_positions(
    model: Learned, found: list[TrainingCase]
) -> None:
    asked: list[int] = []
    fresh = encoded(model)
    remembered = kept(lambda slices: asked.append(len(slices)) or fresh(slices), 1 << 30)  # type: ignore[func-returns-value]
    group = [Slice(found[0], 2, i) for i in range(4)]
    with torch.inference_mode():
        first, again, direct = remembered(group), remembered(group), fresh(group)
        remembered([Slice(found[1], 2, 0)])
    assert asked == [4, 1]
    assert torch.equal(first.embed, again.embed)
    assert torch.allclose(first.embed, direct.embed, atol=2e-3, rtol=2e-3)
    assert torch.equal(again.pe, direct.pe)


def test_kept_beyond_its_limit_encodes_anew(model: Learned, found: list[TrainingCase]) -> None:
    asked: list[int] = []
    fresh = encoded(model)
    first, second = ([Slice(found[n], 2, i) for i in range(4)] for n in (0, 1))
    with torch.inference_mode():
        size = fresh(first).to("cpu", torch.float16).nbytes()
        remembered = kept(lambda slices: asked.append(slices[0].case.case) or fresh(slices), size)  # type: ignore[func-returns-value]
        found_first, found_second = remembered(first), remembered(second)
        assert torch.equal(remembered(first).embed, found_first.embed)
        assert torch.equal(remembered(second).embed, found_second.embed)
    names = [found[n].case for n in (0, 1)]
    assert asked == [*names, names[1]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
def test_kept_features_come_back_to_the_gpu(tmp_path: Path, found: list[TrainingCase]) -> None:
    model = learned(Engine(settings(tmp_path, device="cuda")), "frozen").to("cuda").eval()
    remembered = kept(encoded(model), 1 << 30)
    first = evaluate(model, found, LABELS, remembered)
    assert evaluate(model, found, LABELS, remembered) == first
