"""``compact``: batching changes nothing, prompts reach the dense map, and nothing given adds nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lib.backbones.compact import Compact, QualityHead
from lib.contracts import Features, PromptSet
from lib.decoder import decode
from lib.loading import load_backbone


@pytest.fixture(scope="module")
def compact() -> Compact:
    backbone = load_backbone("compact", random_seed=0)
    assert isinstance(backbone, Compact)
    backbone.spec = replace(backbone.spec, input_size=128)
    backbone.prompt_encoder.spec = backbone.spec
    return backbone


def some_prompts(n: int, side: int) -> PromptSet:
    rng = torch.Generator().manual_seed(1)
    boxes = (torch.rand(n, 2, 2, generator=rng) * side).sort(1).values.flatten(1)
    boxes[1] = torch.nan
    return PromptSet(
        points_xy=torch.rand(n, 3, 2, generator=rng) * side,
        labels=torch.tensor([[1, 0, -1]] * n),
        boxes_xy=boxes,
        masks=torch.randn(n, 1, side // 4, side // 4, generator=rng) * 5,
        mask_given=torch.arange(n) % 2 == 0,
    )


def rows(prompts: PromptSet, n: int) -> PromptSet:
    return replace(prompts, **{k: v[n : n + 1] for k, v in vars(prompts).items() if v is not None})


def test_batch_equals_naive_loop(compact: Compact) -> None:
    side, index = compact.spec.input_size, torch.tensor([0, 0, 1, 1, 1])
    with torch.inference_mode():
        features = compact.encode(torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2)))
        prompts = some_prompts(5, side)
        embedded = compact.embed_prompts(prompts)
        together = decode(compact.spec, compact.mask_decoder, features, embedded, image_index=index, max_pairs=2)
        for n in range(5):
            i = int(index[n])
            one = Features(features.embed[i : i + 1], features.pe, tuple(h[i : i + 1] for h in features.high_res))
            alone = decode(compact.spec, compact.mask_decoder, one, compact.embed_prompts(rows(prompts, n)))
            for name in ("masks", "iou", "obj", "mask_tokens"):
                torch.testing.assert_close(getattr(together, name)[n], getattr(alone, name)[0], atol=1e-4, rtol=1e-4)


def test_guidance_shows_points_and_box(compact: Compact) -> None:
    side = compact.spec.input_size
    prompts = PromptSet(
        points_xy=torch.tensor([[[20.0, 60.0], [100.0, 8.0]]]),
        labels=torch.tensor([[1, 0]]),
        boxes_xy=torch.tensor([[15.5, 31.5, 79.5, 95.5]]),
    )
    guide = compact.prompt_encoder.guidance(prompts, 1)
    assert guide is not None
    positive, negative, box = guide[0]
    cell = side // positive.shape[0]
    assert divmod(int(positive.argmax()), positive.shape[1]) == (60 // cell, 20 // cell)
    assert divmod(int(negative.argmax()), negative.shape[1]) == (8 // cell, 100 // cell)
    assert (box > 0.5).sum() == (64 // cell) ** 2


def test_no_prompts_give_no_guidance(compact: Compact) -> None:
    sparse, dense = compact.embed_prompts(PromptSet(), pairs=3)
    assert sparse.shape == (3, 0, compact.spec.prompt_width)
    assert torch.equal(dense, compact.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand_as(dense))


def test_guidance_is_differentiable_in_the_coordinates(compact: Compact) -> None:
    points = torch.tensor([[[40.0, 50.0]]], requires_grad=True)
    boxes = torch.tensor([[20.0, 30.0, 80.0, 90.0]], requires_grad=True)
    _, dense = compact.embed_prompts(PromptSet(points_xy=points, labels=torch.tensor([[1]]), boxes_xy=boxes))
    dense.square().sum().backward()
    assert points.grad is not None
    assert boxes.grad is not None
    assert points.grad.abs().sum() > 0
    assert boxes.grad.abs().sum() > 0


def test_nan_box_equals_no_box_in_the_dense_map(compact: Compact) -> None:
    points = {"points_xy": torch.tensor([[[40.0, 50.0]]]), "labels": torch.tensor([[1]])}
    _, without = compact.embed_prompts(PromptSet(**points))
    _, with_nan = compact.embed_prompts(PromptSet(**points, boxes_xy=torch.full((1, 4), torch.nan)))
    torch.testing.assert_close(without, with_nan)


BOX, OTHER = [20.0, 30.0, 80.0, 90.0], [50.0, 10.0, 110.0, 40.0]


@pytest.mark.parametrize(
    ("boxes", "shown"),
    [
        ([BOX, [torch.nan] * 4], BOX),
        ([[torch.nan] * 4, BOX], BOX),
        ([BOX, OTHER], OTHER),
        ([BOX, OTHER, [torch.nan] * 4], OTHER),
        ([BOX], BOX),
    ],
)
def test_guidance_shows_the_last_box_that_is_given(compact: Compact, boxes: list[list[float]], shown: list) -> None:
    several = compact.prompt_encoder.guidance(PromptSet(boxes_xy=torch.tensor([boxes, [BOX] * len(boxes)])), 2)
    one = compact.prompt_encoder.guidance(PromptSet(boxes_xy=torch.tensor([shown, BOX])), 2)
    assert several is not None and one is not None
    assert torch.equal(several, one)


def test_several_boxes_without_any_given_show_none(compact: Compact) -> None:
    guide = compact.prompt_encoder.guidance(PromptSet(boxes_xy=torch.full((1, 2, 4), torch.nan)), 1)
    assert guide is not None
    assert not guide.any()


def test_every_box_has_two_tokens(compact: Compact) -> None:
    nan = [torch.nan] * 4
    both, _ = compact.embed_prompts(PromptSet(boxes_xy=torch.tensor([[BOX, OTHER], [BOX, nan]])))
    first, _ = compact.embed_prompts(PromptSet(boxes_xy=torch.tensor([BOX])))
    second, _ = compact.embed_prompts(PromptSet(boxes_xy=torch.tensor([OTHER])))
    assert both.shape == (2, 4, compact.spec.prompt_width)
    torch.testing.assert_close(both[0], torch.cat([first[0], second[0]]))
    torch.testing.assert_close(both[1, :2], first[0])
    not_a_point = compact.prompt_encoder.kinds.weight[4]
    torch.testing.assert_close(both[1, 2:], not_a_point.expand(2, -1))


def test_gradient_of_the_shown_box_is_finite_beside_nan(compact: Compact) -> None:
    boxes = torch.tensor([[BOX, [torch.nan] * 4]], requires_grad=True)
    _, dense = compact.embed_prompts(PromptSet(boxes_xy=boxes))
    dense.square().sum().backward()
    assert boxes.grad is not None
    assert boxes.grad[0, 0].isfinite().all() and boxes.grad[0, 0].abs().sum() > 0
    assert not boxes.grad[0, 1].any()


@pytest.mark.parametrize("seed", range(5))
def test_quality_of_a_sure_mask_is_higher_at_init(seed: int) -> None:
    torch.manual_seed(seed)
    head = QualityHead(32)
    disc = ((torch.arange(32) - 16) ** 2 + (torch.arange(32)[:, None] - 14) ** 2 < 100).float() * 2 - 1
    sure, unsure = (disc.expand(1, 4, -1, -1) * scale for scale in (8.0, 0.3))
    token = torch.randn(1, 32)
    with torch.inference_mode():
        confident, hesitant = head(token, sure), head(token, unsure)
    assert confident.shape == (1, 4)
    assert (confident > hesitant + 0.2).all()
    assert hesitant.min() >= 0 and confident.max() <= 1


@pytest.mark.parametrize("fill", [-30.0, 30.0, 0.0])
def test_quality_of_an_empty_or_full_mask_is_finite(fill: float) -> None:
    quality = QualityHead(32)(torch.zeros(2, 32), torch.full((2, 4, 8, 8), fill))
    assert quality.isfinite().all()


def test_quality_sends_no_gradient_into_the_masks() -> None:
    token = torch.randn(2, 32, requires_grad=True)
    masks = torch.randn(2, 4, 8, 8, requires_grad=True)
    head = QualityHead(32)
    head(token, masks).sum().backward()
    assert masks.grad is None
    assert token.grad is not None and token.grad.abs().sum() > 0
    assert head.trust.grad is not None and head.trust.grad.abs().sum() > 0


def test_parameters_fit_the_shipping_limit(compact: Compact) -> None:
    assert 2 * sum(p.numel() for p in compact.parameters()) <= 15e6  # bytes in float16
