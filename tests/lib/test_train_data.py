"""Batches: shares per cell, determinism, kept features and how many fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lib.config import TrainRecipe
from lib.data.samples import TrainingCase, load_case
from lib.engine import Engine
from lib.learned import Learned
from lib.train_data import Batches, all_slices, axis_of, targets
from lib.transform import SliceTransform
from tests.cases import LABELS, cases, learned, recipe, settings, write_case


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(settings(tmp_path_factory.mktemp("engine")))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[TrainingCase]:
    return cases(tmp_path_factory.mktemp("cases"), 2)


@pytest.fixture(scope="module")
def frozen(engine: Engine) -> Learned:
    return learned(engine, "frozen")


# shape of the slice, rows and columns of class 2, cells of the 16 x 16 mask grid with their share
SHARES = [
    ((64, 64), slice(0, 64), slice(0, 34), {(3, 3): 1.0, (8, 8): 0.5, (5, 12): 0.0}),  # the edge is inside cell 8
    ((64, 64), slice(0, 22), slice(0, 64), {(3, 3): 1.0, (5, 8): 0.5, (8, 3): 0.0}),
    ((32, 64), slice(0, 17), slice(0, 64), {(6, 3): 1.0, (8, 8): 0.5, (10, 3): 0.0}),  # squashed: 2 rows per cell
    ((32, 128), slice(0, 17), slice(64, 128), {(6, 12): 1.0, (8, 12): 0.5, (6, 4): 0.0}),
]


@pytest.mark.parametrize(("shape", "rows", "columns", "shares"), SHARES)
def test_targets_are_shares_of_cells(frozen: Learned, shape, rows, columns, shares) -> None:
    classes = np.zeros(shape, np.uint8)
    classes[rows, columns] = 2
    got = targets(classes, 2, SliceTransform(frozen.spec, shape))
    assert got.shape == (2, 16, 16)
    assert got[0].sum() == 0
    assert {cell: float(got[1][cell]) for cell in shares} == pytest.approx(shares)
    assert float(got[1].mean()) == pytest.approx((classes == 2).mean(), abs=0.01)


def test_all_slices_follow_each_volumes_own_axis(tmp_path: Path) -> None:
    flat = load_case(write_case(tmp_path, "flat", 0), LABELS)
    side = load_case(write_case(tmp_path, "side", 1, spacing=(5, 1, 1)), LABELS)
    slices = all_slices([flat, side])
    assert (axis_of(flat), axis_of(side)) == (2, 0)
    assert {(s.case.case, s.axis) for s in slices} == {("flat", 2), ("side", 0)}
    assert slices[-1].pixels().shape == slices[-1].classes().shape
    assert set(slices[-1].pixels().shape) == {36, 6}


@pytest.mark.parametrize("keep", [True, False])
def test_batch_is_a_function_of_seed_and_step(frozen: Learned, found: list[TrainingCase], keep: bool) -> None:
    made = [Batches(frozen, all_slices(found), recipe(seed=s, memory_mb=64 if keep else 0)) for s in (1, 1, 2)]
    for one in made:
        one.prepare()
        assert (one.views > 0) == keep
    (a, ta), (b, tb) = made[0].batch(5), made[1].batch(5)
    assert torch.equal(a.embed, b.embed) and torch.equal(ta, tb)
    for other in (made[0].batch(6), made[2].batch(5)):
        assert not torch.equal(a.embed, other[0].embed)
    assert ta.shape == (4, 2, 16, 16) and a.embed.dtype == ta.dtype == torch.float32


def test_batch_is_no_larger_than_the_slices(frozen: Learned, found: list[TrainingCase]) -> None:
    one = Batches(frozen, all_slices(found)[:3], recipe(batch=8, memory_mb=0))
    assert one.batch(0)[1].shape[0] == 3


def test_kept_features_equal_fresh_ones(frozen: Learned, found: list[TrainingCase]) -> None:
    one = Batches(frozen, all_slices(found), recipe(views=3))
    one.prepare()
    for place, view in ((0, 0), (3, 1), (5, 2)):
        fresh, target = one._encode([(place, view)])
        kept, kept_target = one._kept[place][view]
        assert kept.embed.dtype == torch.float16
        assert torch.allclose(kept.embed.float(), fresh.embed, atol=2e-3, rtol=2e-3)
        assert fresh.high_res is not None and kept.high_res is not None
        for half, full in zip(kept.high_res, fresh.high_res):
            assert torch.allclose(half.float(), full, atol=2e-3, rtol=2e-3)
        assert torch.allclose(kept_target.float(), target, atol=1e-3)
    assert not torch.equal(one._kept[0][0][0].embed, one._kept[0][1][0].embed)  # views differ


def test_kept_features_use_the_positional_encoding_of_inference(frozen: Learned, found: list[TrainingCase]) -> None:
    one = Batches(frozen, all_slices(found), recipe(views=1))
    one.prepare()
    assert torch.equal(one.batch(0)[0].pe, frozen.backbone.grid_encoding())


def test_kept_features_take_the_memory_that_was_planned(frozen: Learned, found: list[TrainingCase]) -> None:
    one = Batches(frozen, all_slices(found), recipe(views=2))
    one.prepare()
    one.prepare()  # twice keeps once
    held = {}
    for views in one._kept:
        for features, target in views:
            for tensor in (features.embed, features.pe, *(features.high_res or ()), target):
                held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    pe = frozen.backbone.grid_encoding()
    assert sum(held.values()) == one._bytes() * len(one.slices) * 2 + pe.numel() * pe.element_size()


# 5120 bytes per view of a slice with two classes: slices, recipe, views, words of the plan
FITS = [
    (10, {"memory_mb": 4096, "views": 6}, 6, "10 slices in 6 views: "),
    (34, {"memory_mb": 1, "views": 6}, 6, "in 6 views: "),
    (35, {"memory_mb": 1, "views": 6}, 5, "in 5 views instead of 6"),
    (204, {"memory_mb": 1, "views": 6}, 1, "in 1 views instead of 6"),
    (205, {"memory_mb": 1, "views": 6}, 0, "do not fit 1 MB, so every step encodes anew"),
    (10, {"memory_mb": 0, "views": 6}, 0, "do not fit 0 MB"),
    (10, {"memory_mb": -5, "views": 6}, 0, "do not fit -5 MB"),
]


@pytest.mark.parametrize(("count", "changes", "views", "words"), FITS)
def test_views_step_down_with_the_memory(frozen: Learned, found, count: int, changes, views: int, words: str) -> None:
    slices = (all_slices(found) * 40)[:count]
    one = Batches(frozen, slices, recipe(**changes))
    assert one.views == views
    assert words in one.plan()


@pytest.mark.parametrize("preset", ["adapters", "full"])
def test_batches_of_a_trained_encoder_are_never_kept(engine: Engine, found: list[TrainingCase], preset: str) -> None:
    model = learned(engine, preset)
    one = Batches(model, all_slices(found), recipe(views=6))
    one.prepare()
    assert one.views == 0 and one._kept == []
    assert "the encoder is trained, so every step encodes 4 of them" in one.plan()
    assert one.batch(0)[0].embed.requires_grad


def test_views_of_a_slice_move_image_and_target_together(frozen: Learned, found: list[TrainingCase]) -> None:
    """The target's cells lie on the bright ones of the image in every view."""
    one = Batches(frozen, all_slices(found), TrainRecipe())
    labelled = next(n for n, s in enumerate(one.slices) if (s.classes() == 1).sum() > 50)
    for view in range(6):
        ((pixels, target),) = one._window(labelled, view)
        grey = torch.nn.functional.avg_pool2d(pixels.mean(0)[None, None], 4)[0, 0]
        inside = target.sum(0) > 0.9
        outside = target.sum(0) == 0
        if inside.any():
            assert grey[inside].mean() > grey[outside].mean() + 0.3


def test_batches_without_room_for_features_are_those_with_it(frozen: Learned, found: list[TrainingCase]) -> None:
    """Memory decides about time, not about the result."""
    room = Batches(frozen, all_slices(found), TrainRecipe(views=3, batch=4))
    tight = Batches(frozen, all_slices(found), TrainRecipe(views=3, batch=4, memory_mb=0))
    for batches in (room, tight):
        batches.prepare()
    assert (room.views, tight.views) == (3, 0)
    for step in range(4):
        (a, targets), (b, anew) = room.batch(step), tight.batch(step)
        assert torch.equal(a.embed, b.embed)
        assert torch.equal(targets, anew)
