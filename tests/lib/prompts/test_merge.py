"""Learned and user prompts become one set, and every family embeds it: more boxes, missing boxes, a user's mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

import pytest
import torch
from torch import Tensor

from lib import plugins
from lib.config import backbone_row
from lib.contracts import PromptSet, no_grad_eval
from lib.prompts.merge import merge

N = 2
YES, NO = True, False


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def full(value: float, *shape: int) -> Tensor:
    return torch.full((N, *shape), value)


def mask(value: float) -> Tensor:
    return full(value, 1, 4, 4)


LEARNED = PromptSet(boxes_xy=full(1, 4), masks=mask(1), tokens=full(1, 3, 8))
CLICKS = PromptSet(points_xy=full(2, 2, 2), labels=torch.tensor([[1, 0], [1, -1]]))
BOX = PromptSet(boxes_xy=full(2, 4))
SHAPES = [  # (learned, user, points, boxes, tokens): lengths of the second axis, None where there is none
    (PromptSet(), PromptSet(), None, None, None),
    (LEARNED, PromptSet(), None, 1, 3),
    (PromptSet(), CLICKS, 2, None, None),
    (PromptSet(), BOX, None, 1, None),
    (LEARNED, CLICKS, 2, 1, 3),
    (LEARNED, BOX, None, 2, 3),
    (CLICKS, CLICKS, 4, None, None),
    (replace(LEARNED, boxes_xy=full(1, 2, 4)), replace(BOX, tokens=full(2, 1, 8)), None, 3, 4),
]


@pytest.mark.parametrize("learned, user, points, boxes, tokens", SHAPES)
def test_merge_concatenates(learned, user, points, boxes, tokens) -> None:
    merged = merge(learned, user)
    parts = {"points_xy": (points, 2), "labels": (points,), "boxes_xy": (boxes, 4), "tokens": (tokens, 8)}
    for name, (count, *rest) in parts.items():
        value = getattr(merged, name)
        assert value is None if count is None else tuple(value.shape) == (N, count, *rest), name
    assert merged.pairs == (None if learned.pairs is None and user.pairs is None else N)


def test_merge_puts_learned_ones_first_and_keeps_labels_with_points() -> None:
    learned = PromptSet(
        points_xy=full(1, 1, 2), labels=torch.tensor([[0], [0]]), boxes_xy=full(1, 4), tokens=full(1, 1, 8)
    )
    user = replace(CLICKS, boxes_xy=full(2, 4), tokens=full(2, 1, 8))
    merged = merge(learned, user)
    assert merged.points_xy[:, :, 0].tolist() == [[1, 2, 2]] * N
    assert merged.labels.tolist() == [[0, 1, 0], [0, 1, -1]]
    assert merged.boxes_xy[:, :, 0].tolist() == [[1, 2]] * N
    assert merged.tokens[:, :, 0].tolist() == [[1, 2]] * N


MASKS = [  # (learned mask, its mask_given, user mask, its mask_given, values per pair; None where no mask reaches it)
    (None, None, None, None, [None, None]),
    (1, None, None, None, [1, 1]),
    (1, [YES, NO], None, None, [1, None]),
    (None, None, 2, None, [2, 2]),
    (None, None, 2, [NO, YES], [None, 2]),
    (1, None, 2, None, [2, 2]),
    (1, None, 2, [NO, YES], [1, 2]),
    (1, None, 2, [NO, NO], [1, 1]),
    (1, [YES, NO], 2, [NO, YES], [1, 2]),
    (1, [NO, NO], 2, [NO, YES], [None, 2]),
    (1, [YES, YES], 2, [NO, YES], [1, 2]),
    (1, [NO, YES], 2, None, [2, 2]),
]


def masked(value: Optional[float], given: Optional[list[bool]]) -> PromptSet:
    masks = None if value is None else mask(value)
    return PromptSet(masks=masks, mask_given=None if given is None else torch.tensor(given))


@pytest.mark.parametrize("learned, learned_given, user, user_given, expected", MASKS)
def test_merge_lets_a_users_mask_win(learned, learned_given, user, user_given, expected) -> None:
    merged = merge(masked(learned, learned_given), masked(user, user_given))
    found: list[Optional[float]] = [None] * N
    if merged.masks is not None:
        given = torch.ones(N, dtype=torch.bool) if merged.mask_given is None else merged.mask_given
        found = [m.unique().item() if g else None for m, g in zip(merged.masks, given)]
    assert found == expected


@pytest.mark.parametrize(
    "learned, user, expected", [(None, None, None), (1.0, None, 1.0), (None, 2.0, 2.0), (1.0, 2.0, 2.0)]
)
def test_merge_of_dense(learned, user, expected) -> None:
    first, second = (PromptSet(dense=None if v is None else full(v, 8, 1, 1)) for v in (learned, user))
    dense = merge(first, second).dense
    assert dense is None if expected is None else dense.unique().item() == expected


def test_merge_changes_neither() -> None:
    learned, user = replace(LEARNED, masks=mask(1)), PromptSet(masks=mask(2), mask_given=torch.tensor([NO, YES]))
    merge(learned, user)
    assert learned.masks.unique().item() == 1 and user.masks.unique().item() == 2
    assert learned.boxes_xy.shape == (N, 4)


@pytest.fixture(params=["tiny", "compact", "sam_vit_b", "sam2.1_tiny", "mobile_sam"])
def backbone(request):
    row = backbone_row(request.param)
    small = {"sam_vit_b": {"embed_dim": 16, "depth": 1, "num_heads": 1, "global_blocks": [0]}}
    row = replace(row, size={**row.size, **small.get(request.param, {})}, spec={**row.spec, "input_size": 64})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return no_grad_eval(plugins.load("backbones", row.module).build(row))


def nobody(backbone) -> Tensor:
    """The not-a-point token."""
    box = torch.full((1, 4), torch.nan)
    return backbone.embed_prompts(PromptSet(boxes_xy=box))[0][0, 0]


def test_every_box_gives_two_corner_tokens(backbone) -> None:
    pad = backbone.spec.box_tokens - 2
    torch.manual_seed(0)
    boxes = 60 * torch.rand(N, 3, 4)
    sparse, _ = backbone.embed_prompts(PromptSet(boxes_xy=boxes))
    assert sparse.shape[:2] == (N, 2 * 3 + pad)
    for m in range(3):
        one, _ = backbone.embed_prompts(PromptSet(boxes_xy=boxes[:, m]))
        assert one.shape[:2] == (N, 2 + pad)
        assert torch.allclose(sparse[:, 2 * m : 2 * m + 2], one[:, :2], atol=1e-6)
    assert not torch.allclose(sparse[:, 0], sparse[:, 2], atol=1e-3)
    assert not torch.allclose(sparse[:, 0], sparse[:, 1], atol=1e-3)


def test_missing_box_becomes_not_a_point(backbone) -> None:
    boxes = torch.tensor([[[5.0, 6, 40, 50], [torch.nan] * 4], [[torch.nan] * 4, [5.0, 6, 40, 50]]])
    sparse, dense = backbone.embed_prompts(PromptSet(boxes_xy=boxes))
    assert torch.isfinite(sparse).all() and torch.isfinite(dense).all()
    empty = nobody(backbone)
    for pair, tokens in ((0, (2, 3)), (1, (0, 1))):
        assert all(torch.equal(sparse[pair, t], empty) for t in tokens)
    assert torch.equal(sparse[0, :2], sparse[1, 2:4]) and not torch.allclose(sparse[0, 0], empty, atol=1e-3)
    assert torch.equal(dense[0], dense[1])  # where a box is drawn, the missing one is not


def test_merged_boxes_and_clicks_are_embedded_together(backbone) -> None:
    e, side = backbone.spec.prompt_width, backbone.spec.mask_size
    torch.manual_seed(0)
    learned = PromptSet(
        boxes_xy=torch.tensor([[5.0, 6, 40, 50]] * N), masks=torch.randn(N, 1, side, side), tokens=torch.randn(N, 8, e)
    )
    user = replace(CLICKS, boxes_xy=torch.tensor([[9.0, 9, 30, 30], [torch.nan] * 4]))
    sparse, dense = backbone.embed_prompts(merge(learned, user), N)
    assert sparse.shape == (N, 2 * 2 + 2 + (backbone.spec.box_tokens - 2) + 8, e)
    assert torch.equal(sparse[:, -8:], learned.tokens)
    assert dense.shape == (N, e, backbone.spec.grid, backbone.spec.grid)
    # a padding point and a missing box are the same token
    assert sum(torch.equal(t, nobody(backbone)) for t in sparse[1]) == 3 + backbone.spec.box_tokens - 2


def test_learned_points_and_boxes_give_way_pair_by_pair() -> None:
    learned = PromptSet(points_xy=full(1, 1, 2), labels=torch.ones(N, 1, dtype=torch.long), boxes_xy=full(1, 4))
    points = PromptSet(points_xy=full(2, 1, 2), labels=torch.tensor([[0], [-1]]))
    boxes = PromptSet(boxes_xy=torch.tensor([[torch.nan] * 4, [2.0] * 4]))
    merged = merge(learned, points, yields=True)
    assert merged.labels.tolist() == [[-1, 0], [1, -1]] and merged.boxes_xy.tolist() == [[[1.0] * 4]] * 2
    merged = merge(learned, boxes, yields=True)
    assert merged.boxes_xy.isnan().all(-1).tolist() == [[False, True], [True, False]]
    assert merged.labels.tolist() == [[1], [1]]
    assert learned.labels.tolist() == [[1], [1]] and not learned.boxes_xy.isnan().any()
    assert merge(learned, PromptSet(), yields=True).labels.tolist() == [[1], [1]]
