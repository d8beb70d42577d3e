"""SAM-Med2D by numbers: the loss by hand, what every round trains, which mask is read (METHODS 5)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lib import plugins
from lib.config import backbone_row
from lib.contracts import BackboneSpec, DecoderOut, PromptSet, Proposal
from lib.errors import ConfigError
from lib.learned import read_token
from lib.methods import sam2rad
from lib.methods.sam_med2d import (
    POINTS,
    Config,
    _drawn,
    _plan,
    _shifted,
    build,
    decoder_parameters,
    error_points,
    first_prompts,
    injectors,
    losses,
)  # fmt: skip
from lib.nn.adapters import ParallelAdapter, clone, inject, parallel
from lib.nn.losses import dice_loss, focal_loss
from lib.train_step import losses_of

SPEC = BackboneSpec("x", "sam1", 64, "squash", prompt_width=32, pyramid=(("a", 16, 8), ("b", 16, 8)))
BLOCKS = r"enc\.block\[\d+\]"


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def on_meta(name: str):
    row = backbone_row(name)
    with torch.device("meta"):
        return plugins.load("backbones", row.module).build(row)


def count(named) -> int:
    return sum(p.numel() for _, p in named)


@pytest.mark.parametrize(
    "name, wide, parameters",
    [
        ("sam_vit_b", True, 12 * 15_042_048),
        ("sam_vit_b", False, 12 * 383_232),  # about 0.38 M per block
        ("medsam", True, 12 * 15_042_048),
        ("sam2.1_tiny", False, None),
        ("mobile_sam", False, None),
    ],
)
def test_adapters_have_the_published_size(name, wide, parameters) -> None:
    backbone = clone(on_meta(name))
    with torch.device("meta"):
        added = set(inject(backbone, parallel(BLOCKS, backbone, wide=wide)))
    found = count((n, p) for n, p in backbone.named_parameters() if n in added)
    assert found == parameters or (parameters is None and found > 0)


def test_released_backbone_trains_its_own_adapters() -> None:
    backbone = on_meta("sam_med2d")
    assert injectors(Config(classes=1), backbone, decoder=True, encoder=True) == []
    names = set(decoder_parameters(backbone))
    own = {n: p for n, p in backbone.named_parameters() if ".Adapter." in n}
    assert count(own.items()) == 12 * 15_042_048
    assert set(own) <= names
    rest = [(n, p) for n, p in backbone.named_parameters() if n in names - set(own)]
    assert count(rest) == 4_058_340 + 6_220


@pytest.mark.parametrize("name", ["sam_vit_b", "sam2.1_tiny", "mobile_sam", "compact"])
def test_other_backbones_train_decoder_and_prompt_encoder_as_they_are(name) -> None:
    backbone = on_meta(name)
    names = set(decoder_parameters(backbone))
    wanted = {id(p) for m in (backbone.mask_decoder, backbone.prompt_modules()) for p in m.parameters()}
    assert {id(p) for n, p in backbone.named_parameters() if n in names} == wanted
    assert len(injectors(Config(classes=1), backbone, decoder=True, encoder=True)) > 0
    assert injectors(Config(classes=1), backbone, decoder=True, encoder=False) == []


@pytest.mark.parametrize("kind", ["light", "wide"])
def test_adapters_on_the_released_backbone_are_its_own(learn, kind) -> None:
    model = learn("sam_med2d", "sam_med2d", {"adapter": kind}, "adapters")
    names = {n for n in model.trained() if ".Adapter." in n}
    assert len(names) == 4 * 6 and model.changes_encoder
    assert not any(".adapter." in n for n in model.trained())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"adapter": "narrow"}, "expected one of .*light.*, received 'narrow'"),
        ({"iterations": -1}, "iterations >= 0"),
        ({"masks": 0}, "masks >= 1"),
        ({"classes": 0}, "classes >= 1"),
        ({"form": "cubic"}, "received 'cubic'"),
    ],
)
def test_build_refuses_what_does_not_fit(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Config(**{"classes": 1, **options}), SPEC)


@pytest.mark.parametrize("iou, best", [([9.0, 0.1, 0.3, 0.2], 2), ([0.0, 0.4, 0.3, 0.2], 1), ([0.0, 0.1, 0.1, 0.5], 3)])
def test_mask_of_the_largest_predicted_iou_is_read(iou, best) -> None:
    masks = torch.arange(4.0).view(1, 4, 1, 1)
    out = DecoderOut(masks, torch.tensor([iou]), None, torch.zeros(1, 4, 2))
    found, quality = read_token(out, None)
    assert found.item() == best and quality.item() == pytest.approx(iou[best])
    assert read_token(out, 0)[0].item() == 0


def test_loss_by_hand() -> None:
    target = torch.zeros(2, 16, 16)
    target[0, 4:8, 4:12] = 1
    answer = SimpleNamespace(masks=torch.randn(2, 16, 16, generator=rng()), obj=torch.zeros(2))
    proposal = Proposal(PromptSet(), boxes=torch.tensor([[0.1, 0.1, 0.9, 0.9]] * 2), masks=torch.zeros(2, 1, 16, 16))
    parts = losses("med2d", answer, proposal, target, SPEC)
    logits = answer.masks[:1]
    expected = 20 * focal_loss(logits, target[:1], 0.25, 2.0) + dice_loss(logits, target[:1])
    assert parts["mask"].item() == pytest.approx(expected.item())
    plain = sam2rad.losses("plain", answer, proposal, target, SPEC)
    assert {k: v for k, v in parts.items() if k != "mask"} == {k: v for k, v in plain.items() if k != "mask"}
    with pytest.raises(ConfigError, match="received 'promise'"):
        losses("promise", answer, proposal, target, SPEC)


def test_pairs_are_drawn_out_of_the_present_ones() -> None:
    target = torch.zeros(3, 2, 4, 4)
    target[0, 1, 1:3, 1:3] = target[2, :, 0, 0] = 1
    pairs = _drawn(target, 5, rng())
    assert pairs.shape == (10,)
    assert pairs[:5].tolist() == [1] * 5 and set(pairs[5:].tolist()) == {4, 5}
    assert len(_drawn(torch.zeros(2, 2, 4, 4), 5, rng())) == 0


@pytest.mark.parametrize("seed", range(5))
def test_plan_has_the_mask_alone_at_one_place_and_at_the_last(seed) -> None:
    plan = _plan(8, rng(seed))
    assert len(plan) == 8 and plan[-1] == 0 and plan.count(0) in (1, 2)
    assert set(plan) <= {0, *POINTS}
    assert _plan(0, rng()) == []


def test_first_prompts_are_one_box_or_one_point_inside() -> None:
    target = torch.zeros(4, 16, 16, dtype=torch.bool)
    target[:, 4:8, 6:12] = True
    kinds = set()
    for seed in range(12):
        prompts = first_prompts(target, 4.0, rng(seed))
        kinds.add(prompts.boxes_xy is None)
        if prompts.boxes_xy is None:
            cell = ((prompts.points_xy[:, 0] + 0.5) / 4).long()
            assert target[torch.arange(4), cell[:, 1], cell[:, 0]].all() and (prompts.labels == 1).all()
        else:
            moved = prompts.boxes_xy - (torch.tensor([24.0, 16.0, 48.0, 32.0]) - 0.5)
            assert torch.allclose(moved[:, :2], moved[:, 2:], atol=1e-4) and moved.abs().max() <= 5  # as a whole
            assert moved.unique().numel() > 4
    assert kinds == {True, False}


def test_small_boxes_move_by_half_their_short_side() -> None:
    boxes = torch.tensor([[10.0, 10.0, 14.0, 90.0]]).repeat(200, 1)
    moved = (_shifted(boxes, rng()) - boxes).abs()
    assert 1.8 < moved.max() <= 2.0


def test_error_points_lie_in_the_error_and_say_which() -> None:
    target, predicted = torch.zeros(3, 8, 8, dtype=torch.bool), torch.zeros(3, 8, 8, dtype=torch.bool)
    target[:2, 2:4, 2:6], predicted[1:2, 2:4, 2:6] = True, True  # missed whole; nothing wrong; too much
    predicted[2, 6, 1] = True
    xy, labels = error_points(target, predicted, 9, 8.0, rng())
    assert xy.shape == (3, 9, 2) and torch.isfinite(xy).all()
    assert [set(row) for row in labels.tolist()] == [{1}, {-1}, {0}]
    column, row = ((xy + 0.5) / 8).long().unbind(-1)
    assert ((row[0] >= 2) & (row[0] < 4) & (column[0] >= 2) & (column[0] < 6)).all()
    assert (row[2] == 6).all() and (column[2] == 1).all()


def batch(model):
    side = model.spec.mask_size
    target = torch.zeros(2, 3, side, side)
    for n in range(5):
        target[n // 3, n % 3, n : n + side // 2, 2 : 2 + side // 3] = 1
    x = torch.randn(2, 3, model.spec.input_size, model.spec.input_size, generator=rng(1))
    return model.backbone.encode(x, model.method.taps), target


@pytest.mark.parametrize("seed", [1, 2, 3, 4])  # with learned prompts and without
def test_first_round_trains_everything_and_the_others_the_decoder(learn, seed) -> None:
    model = learn("sam_med2d", "sam_vit_b", {"iterations": 3}, "adapters").train()
    features, target = batch(model)
    encoder, decoder = (model.backbone.paths[k] for k in ("enc", "dec"))
    for number, (loss, parts) in enumerate(losses_of(model, features, target, "med2d", seed)):
        assert torch.isfinite(loss)
        model.zero_grad()
        loss.backward()
        reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        parents = {n.split(".")[0] if n.startswith("method") else n.split(".")[1] for n in reached}
        assert parents == ({"method", encoder, decoder, "prompt_encoder"} if number == 0 else {decoder})
        assert ("corrected" in parts) == (number > 0) and ("asked" in parts) == (number == 0)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad if p.grad is not None else 0
    assert number == 3


def test_rounds_are_left_out_where_the_decoder_is_frozen_and_where_nothing_is_present(learn) -> None:
    model = learn("sam_med2d", "tiny", {}, "frozen").train()
    features, target = batch(model)
    assert len(list(losses_of(model, features, target, "med2d", 1))) == 1
    model = learn("sam_med2d", "tiny", {}, "adapters").train()
    found = list(losses_of(model, *batch(model)[:1], torch.zeros_like(target), "med2d", 1))
    assert len(found) == 1 and "asked" not in found[0][1]


def test_corrections_lower_their_loss(learn) -> None:
    model = learn("sam_med2d", "tiny", {"iterations": 8}, "adapters").train()
    optimiser = torch.optim.AdamW(model.groups(1e-3, 2e-3, 0.0))
    seen = []
    for step in range(3):
        for loss, parts in losses_of(model, *batch(model), "med2d", step):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            seen += [parts["corrected"]] if "corrected" in parts else []
    assert len(seen) == 24 and sum(seen[-8:]) < sum(seen[:8])


def test_injected_wide_adapter_is_the_released_block(make) -> None:
    """The released tensors beside the MLP of a stock block: the same block."""
    released = make("sam_med2d").image_encoder.blocks[1]
    stock = make("sam_vit_b")
    copy = clone(stock)
    inject(copy, parallel(BLOCKS, copy, wide=True))
    block = copy.image_encoder.blocks[1]
    state = released.state_dict()
    adapter = {k.removeprefix("Adapter."): v for k, v in state.items() if k.startswith("Adapter.")}
    with torch.no_grad():
        block.mlp.adapter.load_state_dict(adapter)
        block.mlp.mlp.load_state_dict({k.removeprefix("mlp."): v for k, v in state.items() if k.startswith("mlp.")})
        for part in ("norm1", "norm2", "attn"):
            own = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
            getattr(block, part).load_state_dict(own)
        x = torch.randn(2, 4, 4, 32, generator=rng())
        assert isinstance(block.mlp.adapter, ParallelAdapter) and isinstance(block.mlp, nn.Module)
        assert torch.allclose(block(x), released(x), atol=1e-5)
