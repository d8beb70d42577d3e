"""Simulated prompts: the bench protocol by numbers, the random ones by their promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.contracts import PromptSet
from lib.prompts.simulate import (
    MAX_POINTS,
    box_of,
    error_clicks,
    inscribed_ellipse,
    loosened,
    next_click,
    random_boxes,
    random_points,
    user_prompts,
)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def square(r0: int, c0: int, r1: int, c1: int) -> np.ndarray:
    mask = np.zeros((40, 40), bool)
    mask[r0:r1, c0:c1] = True
    return mask


def test_next_click_first_is_deepest_in_largest_part() -> None:
    assert next_click(square(10, 10, 19, 19) | square(30, 30, 33, 33)) == (14, 14, True)


def test_next_click_corrects_larger_error() -> None:
    target = square(10, 10, 30, 20)
    assert next_click(target, square(10, 10, 30, 15)) == (12, 17, True)
    assert next_click(target, square(10, 10, 30, 35))[2] is False  # type: ignore[index]
    assert next_click(target, target) is None


def test_next_click_border_counts_as_outside() -> None:
    assert next_click(square(0, 0, 9, 9)) == (4, 4, True)


def test_box_of_is_half_open() -> None:
    assert box_of(square(3, 5, 9, 11)) == (3, 5, 9, 11)


def test_inscribed_ellipse_area() -> None:
    assert inscribed_ellipse((40, 40), (0, 0, 40, 40)).sum() / 1600 == pytest.approx(np.pi / 4, abs=0.01)
    assert inscribed_ellipse((40, 40), (3, 5, 4, 6)).sum() == 1


def test_loosened_boxes_hold_the_tight_ones_and_grow_by_at_most_half_a_side_each_way() -> None:
    tight = torch.tensor([[10.0, 20.0, 30.0, 28.0]]).repeat(200, 1)
    loose = loosened(tight, 0.5, torch.Generator().manual_seed(0))
    grown = (loose - tight) * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    assert (grown >= 0).all() and (grown <= torch.tensor([10.0, 4.0, 10.0, 4.0])).all()
    assert 60 < int((grown.amax(1) > 0).sum()) < 140


def test_random_boxes_without_jitter_are_exact() -> None:
    masks = torch.from_numpy(np.stack([square(3, 5, 9, 11), square(0, 0, 40, 40)]))
    boxes = random_boxes(masks, 4.0, 0.0, torch.Generator().manual_seed(0))
    assert boxes.tolist() == [[19.5, 11.5, 43.5, 35.5], [-0.5, -0.5, 159.5, 159.5]]


def test_random_points_lie_inside() -> None:
    rng, mask = torch.Generator().manual_seed(0), torch.from_numpy(square(3, 5, 9, 11))
    for x, y in random_points(mask.expand(50, -1, -1), 1.0, rng).tolist():
        assert mask[int(y + 0.5), int(x + 0.5)]
    assert random_points(torch.zeros(1, 8, 8, dtype=torch.bool), 1.0, rng).isnan().all()


def test_error_clicks_labels() -> None:
    target = torch.from_numpy(np.stack([square(10, 10, 30, 30)] * 3))
    predicted = torch.from_numpy(np.stack([square(10, 10, 30, 15), square(5, 5, 35, 35), square(10, 10, 30, 30)]))
    _, labels = error_clicks(target, predicted, 1.0, torch.Generator().manual_seed(0))
    assert labels[:, 0].tolist() == [1, 0, -1]


def drawn(seed: int, count: int = 40) -> tuple[torch.Tensor, torch.Tensor, PromptSet]:
    """Targets, predictions and prompts of pairs that are all wrong in another way, the last one not at all."""
    rng = np.random.default_rng(seed)
    corners, sides = rng.integers(0, 22, (2, count, 2)), rng.integers(5, 18, (2, count, 2))
    target, predicted = (
        torch.from_numpy(np.stack([square(r, c, r + h, c + w) for (r, c), (h, w) in zip(at, size)]))
        for at, size in zip(corners, sides)
    )
    predicted[-1] = target[-1]
    return target, predicted, user_prompts(target, predicted, 4.0, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_user_prompts_give_every_pair_something(seed) -> None:
    target, _, prompts = drawn(seed)
    pointed, boxed = (prompts.labels >= 0).any(1), prompts.boxes_xy.isfinite().all(1)
    assert (pointed | boxed | prompts.mask_given).all()
    assert set(prompts.labels.unique().tolist()) == {-1, 0, 1}
    assert ((prompts.labels >= 0).sum(1) <= MAX_POINTS).all()
    assert torch.equal(prompts.boxes_xy.isnan().any(1), prompts.boxes_xy.isnan().all(1))
    assert prompts.masks.shape == (len(target), 1, 40, 40) and set(prompts.masks.unique().tolist()) == {-6.0, 6.0}
    assert (prompts.masks > 0).flatten(1).any(1).all()
    assert prompts.pairs == len(target)


def test_user_prompts_are_drawn_as_often_as_promised() -> None:
    sets = [drawn(seed)[2] for seed in range(15)]  # 600 pairs: three standard errors are 0.06
    boxed = torch.cat([p.boxes_xy.isfinite().all(1) for p in sets]).float().mean()
    masked = torch.cat([p.mask_given for p in sets]).float().mean()
    pointed = torch.cat([(p.labels >= 0).any(1) for p in sets]).float().mean()
    assert float(boxed) == pytest.approx(0.5, abs=0.06)
    assert float(masked) == pytest.approx(0.3, abs=0.06)
    assert float(pointed) == pytest.approx(1 - 0.5 * (1 - 0.5 * 0.7), abs=0.06)


@pytest.mark.parametrize("seed", range(5))
def test_user_prompts_boxes_are_within_five_per_cent(seed) -> None:
    target, _, prompts = drawn(seed)
    for mask, box in zip(target.numpy(), prompts.boxes_xy.numpy()):
        if np.isfinite(box).all():
            r0, c0, r1, c1 = (4 * edge for edge in box_of(mask))
            slack = 0.05 * np.array([c1 - c0, r1 - r0] * 2) + 1e-3
            assert (np.abs(box + 0.5 - [c0, r0, c1, r1]) <= slack).all()


@pytest.mark.parametrize("seed", range(5))
def test_user_prompts_points_tell_the_truth(seed) -> None:
    target, predicted, prompts = drawn(seed)
    for n, p in (prompts.labels >= 0).nonzero().tolist():
        x, y = ((prompts.points_xy[n, p] + 0.5) / 4).long().tolist()
        assert bool(target[n, y, x]) == (prompts.labels[n, p] == 1)
        if prompts.labels[n, p] == 0:
            assert predicted[n, y, x]
    assert prompts.points_xy.isfinite().all()
    assert (prompts.labels[-1] != 0).all()  # nothing is wrong there


def test_user_prompts_are_a_function_of_the_generator() -> None:
    first, again, other = drawn(3)[2], drawn(3)[2], drawn(3)
    for name, value in vars(first).items():
        same = getattr(again, name)
        assert (value is None and same is None) or torch.equal(torch.nan_to_num(value), torch.nan_to_num(same)), name
    changed = user_prompts(other[0], other[1], 4.0, torch.Generator().manual_seed(99))
    assert not torch.equal(torch.nan_to_num(first.boxes_xy), torch.nan_to_num(changed.boxes_xy))
