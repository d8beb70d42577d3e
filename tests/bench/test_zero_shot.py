"""Zero-shot bench: the classical baselines work from the same prompts, and clicks follow the protocol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import classical, zero_shot
from lib.config import backbone_row
from lib.prompts.simulate import box_of
from lib.prompts.user import SlicePrompts
from tests.serving import dice

Classic = Callable[[np.ndarray, SlicePrompts], np.ndarray]
METHODS: list[Classic] = [classical.random_walk, classical.graph_cut]
CENTRE = (30, 40)


@pytest.fixture(params=["grey", "colour"])
def disc(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """A bright disc of radius 10 on noise, ``(64, 72[, 3])`` in 0..1, and its mask."""
    rows, columns = np.mgrid[:64, :72]
    mask = np.hypot(rows - CENTRE[0], columns - CENTRE[1]) <= 10
    pixels = np.where(mask, 0.75, 0.25) + np.random.default_rng(0).normal(0, 0.03, mask.shape)
    pixels = pixels.clip(0, 1).astype(np.float32)
    return (np.repeat(pixels[..., None], 3, 2) if request.param == "colour" else pixels), mask


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["box", "click"])
def test_classical_finds_a_disc(method: Classic, kind: str, disc: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, mask = disc
    prompts = SlicePrompts(box_rc=box_of(mask)) if kind == "box" else SlicePrompts([(*CENTRE, True)])
    found = method(pixels, prompts)
    assert found.dtype == bool
    assert found.shape == mask.shape
    assert dice(found, mask) > 0.8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("box", [False, True])
def test_classical_leaves_a_negative_click_out(method: Classic, box: bool, disc: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, mask = disc
    away = (CENTRE[0] + 5, CENTRE[1] - 6)
    clicks = [(*CENTRE, True), (*away, False)]
    found = method(pixels, SlicePrompts(clicks, box_of(mask) if box else None))
    assert mask[away] and not found[away]
    assert found[CENTRE]


@pytest.mark.parametrize("method", METHODS)
def test_classical_without_a_certain_inside_is_empty(method: Classic, disc: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, mask = disc
    found = method(pixels, SlicePrompts([(*CENTRE, True), (*CENTRE, False)]))
    assert found.shape == mask.shape and not found.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", [2, 3, 4, 5, 6, 8])
def test_classical_stays_in_a_small_box(method: Classic, side: int) -> None:
    # even boxes of up to 6 pixels had no inner seed, and the random walker then filled the whole window
    pixels, mask = np.full((50, 36), 0.2, np.float32), np.zeros((50, 36), bool)
    mask[20 : 20 + side, 15 : 15 + side] = True
    pixels[mask] = 0.8
    assert dice(method(pixels, SlicePrompts(box_rc=box_of(mask))), mask) > 0.8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("click", [(0, 0), (0, 71), (63, 0), (63, 71)])
def test_classical_answers_a_click_in_the_corner(method: Classic, click: tuple[int, int]) -> None:
    pixels = np.full((64, 72), 0.5, np.float32)
    assert method(pixels, SlicePrompts([(*click, True)])).shape == (64, 72)


# protocol


def square() -> np.ndarray:
    target = np.zeros((20, 20), bool)
    target[5:15, 5:15] = True
    return target


def test_click_dice_asks_ten_times_at_most() -> None:
    asked: list[int] = []

    def ask(prompts: SlicePrompts) -> np.ndarray:
        asked.append(len(prompts.points_rc))
        return np.zeros((20, 20), bool)

    scores = zero_shot.click_dice(ask, square())
    assert asked == list(range(1, 11))
    assert scores == {"1 clicks": 0.0, "3 clicks": 0.0, "5 clicks": 0.0, "10 clicks": 0.0}


def test_click_dice_stops_asking_where_nothing_is_wrong() -> None:
    asked: list[SlicePrompts] = []

    def ask(prompts: SlicePrompts) -> np.ndarray:
        asked.append(prompts)
        return square()

    assert set(zero_shot.click_dice(ask, square()).values()) == {1.0}
    assert len(asked) == 1


def test_click_dice_clicks_into_the_last_answer() -> None:
    too_much = np.ones((20, 20), bool)
    too_much[:, 12:] = False
    answers = [too_much, square()]

    def ask(prompts: SlicePrompts) -> np.ndarray:
        seen.append(prompts.points_rc[-1])
        return answers[len(seen) - 1]

    seen: list[tuple[int, int, bool]] = []
    scores = zero_shot.click_dice(ask, square())
    row, column, positive = seen[1]
    assert len(seen) == 2 and seen[0][2] and not positive
    assert too_much[row, column] and not square()[row, column]
    assert scores["1 clicks"] < scores["3 clicks"] == 1.0


def test_model_ask_feeds_the_previous_mask_back() -> None:
    lows = [torch.full((1, 1, 4, 4), float(n)) for n in range(3)]
    given: list[object] = []

    def answer(prompts: SlicePrompts, previous: object = None) -> tuple[np.ndarray, torch.Tensor, float]:
        given.append(previous)
        return square(), lows[len(given) - 1], 0.1 * len(given)

    ask, quality = zero_shot.model_ask(SimpleNamespace(ask=answer))  # type: ignore[arg-type]
    for _ in range(3):
        ask(SlicePrompts([(10, 10, True)]))
    assert given[0] is None and given[1] is lows[0] and given[2] is lows[1]
    assert quality == pytest.approx([0.1, 0.2, 0.3])


def test_model_answers_clicks_and_boxes() -> None:
    from lib.loading import load_backbone

    model_of = load_backbone("compact", random_seed=0)
    with torch.inference_mode():
        model = zero_shot.Prompted(model_of, np.random.default_rng(0).random((40, 30), np.float32))
        mask, low, quality = model.ask(SlicePrompts([(10, 10, True)]))
        again, _, _ = model.ask(SlicePrompts([(10, 10, True)], (5, 5, 20, 20)), low)
    assert mask.shape == again.shape == (40, 30) and mask.dtype == bool
    assert low.shape[:2] == (1, 1) and low.abs().max() <= 32
    assert 0 <= quality <= 1


def test_available_lists_compact_first_and_once(tmp_path: Path) -> None:
    assert zero_shot.available(tmp_path) == ["compact"]
    for name in ("compact", "sam_vit_b", "mobile_sam"):
        (tmp_path / backbone_row(name).weights.file).touch()
    assert zero_shot.available(tmp_path) == ["compact", "mobile_sam", "sam_vit_b"]
