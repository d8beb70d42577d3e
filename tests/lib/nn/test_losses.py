"""Losses against numbers worked out by hand; every row is one pair, and pairs do not mix."""

from __future__ import annotations

import math

import pytest
import torch

from lib.nn.losses import area_bce, balanced_bce, box_loss, dice_loss, focal_loss, present_mean, soft_iou

LN2 = math.log(2)
LN3 = math.log(3)
FULL, EMPTY, ONE = [[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]
YES, NO, UNSURE, SURE_ONE = [[99.0] * 2] * 2, [[-99.0] * 2] * 2, [[0.0] * 2] * 2, [[99.0, -99.0], [-99.0, -99.0]]
P75 = [[LN3] * 2] * 2  # probability 3/4 everywhere

DICE = [  # (logits, target, loss): (H, W) = (2, 2)
    (YES, FULL, 0.0),
    (NO, EMPTY, 0.0),
    (SURE_ONE, ONE, 0.0),
    (NO, FULL, 1 - 1 / 5),
    (YES, EMPTY, 1 - 1 / 5),
    (UNSURE, ONE, 1 - 2 / 4),
    (UNSURE, [[0.5, 0.5], [0.0, 0.0]], 1 - 2 / 4),
    (P75, FULL, 1 - 7 / 8),
]
FOCAL = [  # alpha 0.7, gamma 3
    (UNSURE, FULL, 0.7 * 0.125 * LN2),
    (UNSURE, EMPTY, 0.3 * 0.125 * LN2),
    (UNSURE, ONE, (0.7 + 3 * 0.3) / 4 * 0.125 * LN2),
    (P75, FULL, 0.7 * 0.25**3 * -math.log(0.75)),
    (P75, EMPTY, 0.3 * 0.75**3 * -math.log(0.25)),
    (YES, FULL, 0.0),
]
BALANCED = [
    (UNSURE, ONE, LN2),
    (P75, ONE, 0.5 * (-math.log(0.75) - math.log(0.25))),
    (P75, FULL, 0.5 * -math.log(0.75)),
    (P75, EMPTY, 0.5 * -math.log(0.25)),
]
AREA = [
    (UNSURE, FULL, 0.25 * 4 * LN2 / 4.04),
    (UNSURE, ONE, 0.25 * 4 * LN2 / 1.04),
    (UNSURE, EMPTY, 0.25 * 4 * LN2 / 0.04),
    (SURE_ONE, ONE, 0.0),
]
IOU = [(YES, FULL, 1.0), (YES, ONE, 0.25), (NO, ONE, 0.0), (NO, EMPTY, 1.0), (SURE_ONE, FULL, 0.25)]
BOXES = [  # (predicted, true, loss)
    ([0.2, 0.3, 0.6, 0.9], [0.2, 0.3, 0.6, 0.9], 0.0),
    ([0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0], 0.5 + 1.5),  # apart: IoU 0, half of the hull is empty
    ([0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0], 0.125 + 0.5),
    ([0.0, 0.0, 0.5, 1.0], [0.25, 0.0, 0.75, 1.0], 0.125 + 1 - 1 / 3),
]


def focal(logits, target):
    return focal_loss(logits, target, 0.7, 3.0)


@pytest.mark.parametrize(
    "loss, table",
    [(dice_loss, DICE), (focal, FOCAL), (balanced_bce, BALANCED), (area_bce, AREA), (soft_iou, IOU)],
    ids=["dice", "focal", "balanced", "area", "iou"],
)
def test_loss_per_pair_by_hand(loss, table) -> None:
    logits, target = torch.tensor([row[0] for row in table]), torch.tensor([row[1] for row in table])
    expected = torch.tensor([row[2] for row in table])
    assert torch.allclose(loss(logits, target), expected, atol=2e-6)
    for n in range(len(table)):
        assert torch.allclose(loss(logits[n : n + 1], target[n : n + 1]), expected[n : n + 1], atol=2e-6)


def test_box_loss_by_hand() -> None:
    boxes, target = torch.tensor([row[0] for row in BOXES]), torch.tensor([row[1] for row in BOXES])
    assert torch.allclose(box_loss(boxes, target), torch.tensor([row[2] for row in BOXES]), atol=1e-5)


def test_box_loss_pulls_boxes_that_do_not_meet() -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.2, 0.2]], requires_grad=True)
    box_loss(boxes, torch.tensor([[0.6, 0.6, 0.9, 0.9]])).sum().backward()
    assert (boxes.grad < 0).all()  # every edge is to move right or down


@pytest.mark.parametrize(
    "values, present, expected",
    [
        ([1.0, 2.0, 6.0], [1.0, 0.0, 1.0], 3.5),
        ([1.0, 2.0, 6.0], [0.0, 1.0, 0.0], 2.0),
        ([1.0, 2.0, 6.0], [0.0, 0.0, 0.0], 0.0),
        ([1.0, 2.0, 6.0], [True, True, False], 1.5),
        ([], [], 0.0),
    ],
)
def test_present_mean_is_never_nan(values, present, expected) -> None:
    x = torch.tensor(values, requires_grad=True)
    mean = present_mean(x, torch.tensor(present))
    mean.backward()
    assert mean.item() == pytest.approx(expected)
    assert torch.isfinite(x.grad).all()
    assert [bool(g) for g in x.grad] == [bool(p) for p in present]
