"""Simulated prompts: the bench protocol by numbers, the random ones by their promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib.prompts.simulate import box_of, error_clicks, inscribed_ellipse, next_click, random_boxes, random_points


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
