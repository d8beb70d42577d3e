"""The shared decoder forward: gather, chunks, hooks. Parity with stock modules is in test_backbone_parity.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib.contracts import Features, Hooks, PromptSet
from lib.decoder import decode
from lib.loading import load_backbone


@pytest.fixture(scope="module")
def tiny():
    return load_backbone("tiny", random_seed=0)


@pytest.fixture
def features(tiny) -> Features:
    side = tiny.spec.input_size
    return tiny.encode(torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def prompts(tiny):
    xy = torch.tensor([[[8.0, 8.0]], [[40.0, 20.0]], [[30.0, 50.0]], [[9.0, 9.0]], [[60.0, 3.0]]])
    return tiny.embed_prompts(PromptSet(points_xy=xy, labels=torch.ones(5, 1, dtype=torch.long)))


INDEX = torch.tensor([0, 1, 0, 1, 1])


def run(tiny, features, prompts, **options):
    return decode(tiny.spec, tiny.mask_decoder, features, prompts, image_index=INDEX, **options)


def test_output_has_the_documented_shapes(tiny, features, prompts) -> None:
    out = run(tiny, features, prompts)
    m, e = tiny.spec.mask_size, tiny.spec.prompt_width
    assert out.masks.shape == (5, 4, m, m)
    assert out.iou.shape == (5, 4) and out.obj.shape == (5, 1) and out.mask_tokens.shape == (5, 4, e)
    assert out.extra_tokens is None


@pytest.mark.parametrize("max_pairs", [1, 2, 5, 64])
def test_chunks_do_not_change_the_result(tiny, features, prompts, max_pairs) -> None:
    hooks = Hooks(token_shift=torch.randn(5, 4, 32), extra_tokens=torch.randn(5, 2, 32))
    whole, parts = (run(tiny, features, prompts, hooks=hooks, max_pairs=n) for n in (64, max_pairs))
    for name in ("masks", "iou", "obj", "mask_tokens", "extra_tokens"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name), atol=1e-5)


def test_pairs_look_at_their_own_image(tiny, features, prompts) -> None:
    out = run(tiny, features, prompts)
    high = tuple(t[1:] for t in features.high_res)
    second = Features(features.embed[1:], features.pe, high)
    alone = decode(tiny.spec, tiny.mask_decoder, second, (prompts[0][3:4], prompts[1][3:4]))
    assert torch.allclose(out.masks[3], alone.masks[0], atol=1e-5)


def test_image_index_defaults_to_the_only_image_or_one_each(tiny, features, prompts) -> None:
    two = (prompts[0][:2], prompts[1][:2])
    each = decode(tiny.spec, tiny.mask_decoder, features, two)
    assert torch.allclose(each.masks, run(tiny, features, prompts).masks[:2], atol=1e-5)
    with pytest.raises(ValueError, match="5 pairs on 2 images need image_index"):
        decode(tiny.spec, tiny.mask_decoder, features, prompts)


def test_zero_shift_is_stock_and_other_shift_is_not(tiny, features, prompts) -> None:
    stock = run(tiny, features, prompts).masks
    assert torch.equal(run(tiny, features, prompts, hooks=Hooks(token_shift=torch.zeros(5, 4, 32))).masks, stock)
    assert not torch.allclose(run(tiny, features, prompts, hooks=Hooks(token_shift=torch.ones(5, 4, 32))).masks, stock)


def test_extra_tokens_come_back_and_take_part(tiny, features, prompts) -> None:
    out = run(tiny, features, prompts, hooks=Hooks(extra_tokens=torch.randn(5, 3, 32)))
    assert out.extra_tokens.shape == (5, 3, 32)
    assert not torch.allclose(out.masks, run(tiny, features, prompts).masks)


def test_own_objectness_wins_over_the_hook(tiny, features, prompts) -> None:
    head = nn.Linear(32, 1)
    own = run(tiny, features, prompts)
    assert torch.equal(run(tiny, features, prompts, hooks=Hooks(obj_head=head)).obj, own.obj)


def test_hook_gives_objectness_where_the_decoder_has_none() -> None:
    pytest.importorskip("segment_anything", reason="needs the segment_anything package")
    from dataclasses import replace

    from lib.backbones.sam import mask_decoder

    spec = replace(
        load_backbone("tiny", random_seed=0).spec, has_obj_score=False, has_high_res=False, iou_reads_masks=False
    )
    decoder = mask_decoder(spec).eval()
    features = Features(torch.randn(1, 32, 4, 4), torch.randn(1, 32, 4, 4))
    prompts = (torch.randn(2, 1, 32), torch.randn(2, 32, 4, 4))
    assert decode(spec, decoder, features, prompts).obj is None
    assert decode(spec, decoder, features, prompts, hooks=Hooks(obj_head=nn.Linear(32, 1))).obj.shape == (2, 1)


def test_no_tokens_at_all_still_gives_masks(tiny, features) -> None:
    out = decode(tiny.spec, tiny.mask_decoder, features, tiny.embed_prompts(PromptSet(), pairs=2))
    assert torch.isfinite(out.masks).all()
