"""Sam2Rad by numbers: published sizes, losses by hand, what is refused (METHODS 3)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lib import plugins
from lib.config import backbone_row
from lib.contracts import BackboneSpec, Features, PromptSet, Proposal
from lib.errors import ConfigError
from lib.methods.sam2rad import LOSSES, Config, build, injectors, losses
from lib.nn.adapters import clone, decoder_parameters, inject

SPEC = BackboneSpec("x", "sam1", 64, "squash", prompt_width=32, pyramid=(("a", 16, 8), ("b", 16, 8)))
LN2 = math.log(2)


def on_meta(name: str):
    row = backbone_row(name)
    with torch.device("meta"):
        return plugins.load("backbones", row.module).build(row)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "name, form, parameters",
    [
        ("sam_vit_b", "linear", 1_896_389),
        ("sam2.1_tiny", "linear", 1_896_389),
        ("sam2.1_tiny", "high_res", 5_080_517),
        ("sam2.1_large", "high_res", 5_080_517),
        ("sam_vit_b", "high_res", 5_449_157),
        ("sam_vit_l", "high_res", 5_580_229),
        ("sam_vit_h", "high_res", 5_711_301),
        ("mobile_sam", "high_res", 5_219_781),
    ],
)
def test_predictor_has_the_published_size(name, form, parameters) -> None:
    spec = on_meta(name).spec
    with torch.device("meta"):
        method = build(Config(classes=3, form=form), spec)
    assert count(method.predictor) == parameters
    assert [count(block) for block in method.predictor.blocks] == [1_579_520] * (3 if form == "high_res" else 1)
    assert count(method.predictor.box_head) == 132_356
    assert count(method.predictor.mask_head) == 184_513
    head = 0 if spec.has_obj_score else 256 * 256 + 256 + 256 + 1
    assert count(method) == parameters + 3 * 10 * 256 + head


@pytest.mark.parametrize(
    "name, options, decoder, encoder, parameters",
    [
        ("sam2.1_tiny", {}, True, False, 47_104),
        ("sam_vit_b", {}, True, False, 188_416),
        ("mobile_sam", {}, True, False, 188_416),
        ("sam_vit_b", {"lora_rank": 8}, True, False, 47_104),
        ("sam2.1_tiny", {}, False, True, 520_896),
        ("sam_vit_b", {"last_blocks": 5}, False, True, 495_680),
        ("sam_vit_b", {}, False, True, 12 * 99_136),
        ("sam2.1_tiny", {}, True, True, 47_104 + 520_896),
        ("sam2.1_tiny", {}, False, False, 0),
    ],
)
def test_adapters_have_the_published_size(name, options, decoder, encoder, parameters) -> None:
    backbone = clone(on_meta(name))
    with torch.device("meta"):
        config = Config(classes=1, **options)
        added = set(inject(backbone, injectors(config, backbone, decoder=decoder, encoder=encoder)))
    assert sum(p.numel() for n, p in backbone.named_parameters() if n in added) == parameters


@pytest.mark.parametrize(
    "name, parameters", [("sam_vit_b", 634_208), ("sam2.1_tiny", 73_952 + 559_232 + 1024 + 132_097)]
)
def test_decoder_parts_trained_as_a_whole(name, parameters) -> None:
    backbone = on_meta(name)
    names = set(decoder_parameters(backbone))
    assert sum(p.numel() for n, p in backbone.named_parameters() if n in names) == parameters


@pytest.mark.parametrize(
    "options, message",
    [
        ({"form": "quadratic"}, "expected linear or high_res, received 'quadratic'"),
        ({"classes": 0}, "expected classes >= 1"),
        ({"tokens": 1}, "tokens >= 2"),
        ({"max_level": 3}, "max_level"),
        ({"max_level": -1}, "max_level"),
        ({"last_blocks": -1}, "last_blocks"),
        ({"lora_rank": -1}, "lora_rank"),
        ({"bottleneck_width": 0}, "bottleneck_width"),
    ],
)
def test_build_refuses_what_does_not_fit(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Config(**{"classes": 1, **options}), SPEC)


@pytest.mark.parametrize("level, taps, blocks", [(0, (), 1), (1, ("a",), 2), (2, ("a", "b"), 3)])
def test_max_level_limits_the_maps(level, taps, blocks) -> None:
    method = build(Config(classes=1, form="high_res", max_level=level), SPEC)
    assert method.taps == taps and len(method.predictor.blocks) == blocks


def features(count: int = 2) -> Features:
    return Features(torch.randn(count, 32, 4, 4), torch.zeros(1, 32, 4, 4))


def test_proposal_before_training_is_the_middle_of_the_image() -> None:
    torch.manual_seed(0)
    method = build(Config(classes=3), SPEC).eval()
    with torch.no_grad():
        method.predictor.box_head[2].weight.zero_()
        proposal = method.propose(features())
    assert torch.allclose(proposal.boxes, torch.tensor([0.25, 0.25, 0.75, 0.75]).expand(6, 4))
    assert torch.allclose(proposal.prompts.boxes_xy, torch.tensor([15.5, 15.5, 47.5, 47.5]).expand(6, 4))
    assert proposal.prompts.tokens.shape == (6, 8, 32)
    assert proposal.prompts.masks.shape == (6, 1, 16, 16)


def test_boxes_stay_sorted_and_inside() -> None:
    torch.manual_seed(0)
    method = build(Config(classes=2), SPEC).eval()
    for bias in ([9.0, 9.0, 9.0, 9.0], [-9.0, -9.0, -9.0, -9.0], [9.0, -9.0, -9.0, 9.0]):
        with torch.no_grad():
            method.predictor.box_head[2].bias.copy_(torch.tensor(bias))
            boxes = method.propose(features()).boxes
        assert (boxes >= 0).all() and (boxes <= 1).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_checkpointed_levels_give_the_same_gradient() -> None:
    torch.manual_seed(0)
    method = build(Config(classes=2, form="high_res"), SPEC).eval()
    taps = {"a": torch.randn(1, 8, 4, 4), "b": torch.randn(1, 8, 4, 4)}
    maps = Features(torch.randn(1, 32, 4, 4), torch.zeros(1, 32, 4, 4), None, taps)
    with torch.no_grad():
        plain = method.propose(maps)
    kept = method.propose(maps)
    assert torch.allclose(plain.masks, kept.masks, atol=1e-6) and torch.allclose(plain.boxes, kept.boxes, atol=1e-6)
    kept.masks.sum().backward()
    assert method.predictor.blocks[0].mlp[0].weight.grad.abs().max() > 0


def answer(masks: Tensor, obj: list[float]) -> SimpleNamespace:
    return SimpleNamespace(masks=masks.requires_grad_(), obj=torch.tensor(obj, requires_grad=True))


def proposal(boxes: list[list[float]], masks: Tensor) -> Proposal:
    return Proposal(PromptSet(), boxes=torch.tensor(boxes, requires_grad=True), masks=masks.requires_grad_())


@pytest.mark.parametrize("preset", LOSSES)
def test_losses_of_absent_classes_teach_objectness_only(preset) -> None:
    said, made = answer(torch.randn(2, 16, 16), [0.0, 2.0]), proposal(
        [[0.1, 0.1, 0.9, 0.9]] * 2, torch.randn(2, 1, 16, 16)
    )
    parts = losses(preset, said, made, torch.zeros(2, 16, 16), SPEC)
    total = torch.stack(list(parts.values())).sum()
    assert torch.isfinite(total)
    assert {k: v.item() for k, v in parts.items() if k != "objectness"} == {"mask": 0.0, "box": 0.0, "interim": 0.0}
    assert parts["objectness"].item() == pytest.approx(
        (LN2 + 0.05 * -math.log(0.880797) + 0.95 * -math.log(0.119203)) / 2, rel=1e-4
    )
    total.backward()
    assert all(not t.grad.any() for t in (said.masks, made.boxes, made.masks))
    assert (said.obj.grad > 0).all()  # both are to fall


def test_losses_by_hand() -> None:
    target = torch.zeros(2, 16, 16)
    target[0, 4:8, 4:12] = 1  # 32 of 256 cells
    said, made = answer(torch.zeros(2, 16, 16), [0.0, 0.0]), proposal(
        [[0.25, 0.25, 0.75, 0.5]] * 2, torch.zeros(2, 1, 16, 16)
    )
    parts = {k: v.item() for k, v in losses("sam2rad", said, made, target, SPEC).items()}
    dice = 1 - (2 * 16 + 1) / (128 + 32 + 1)
    focal = (0.7 * 32 + 0.3 * 224) / 256 * 0.125 * LN2
    interim = (0.6 * 32 + 0.4 * 224) / 256 * 0.125 * LN2
    assert parts == pytest.approx(
        {"mask": 0.5 * (dice + 10 * focal), "objectness": LN2, "box": 0.0, "interim": 100 * interim}, rel=1e-5, abs=1e-5
    )
    area = 0.25 * 256 * LN2 / (32 + 2.56)
    plain = {k: v.item() for k, v in losses("plain", said, made, target, SPEC).items()}
    assert plain == pytest.approx(
        {"mask": dice + area, "objectness": LN2, "box": 0.0, "interim": dice + LN2}, rel=1e-5, abs=1e-5
    )


@pytest.mark.parametrize("value, counts", [(0.5, False), (1.0, True)])
def test_class_of_a_few_pixels_teaches_objectness_only(value, counts) -> None:
    target = torch.zeros(1, 16, 16)
    target[0, 3, 3] = value  # 16 input pixels per cell
    said, made = answer(torch.zeros(1, 16, 16), [3.0]), proposal([[0.1, 0.1, 0.9, 0.9]], torch.zeros(1, 1, 16, 16))
    parts = losses("sam2rad", said, made, target, SPEC)
    assert all((parts[k].item() > 0) == counts for k in ("mask", "box", "interim"))
    parts["objectness"].backward()
    assert float(said.obj.grad) == pytest.approx(torch.sigmoid(torch.tensor(3.0)).item() - 0.95, abs=1e-6)


def test_losses_average_over_present_pairs_only() -> None:
    target = torch.zeros(3, 16, 16)
    target[0, 2:9, 2:9] = 1
    torch.manual_seed(0)
    masks, interim, boxes = torch.randn(3, 16, 16), torch.randn(3, 1, 16, 16), [[0.1, 0.2, 0.5, 0.9]] * 3
    whole = losses("sam2rad", answer(masks.clone(), [0.0] * 3), proposal(boxes, interim.clone()), target, SPEC)
    alone = losses(
        "sam2rad", answer(masks[:1].clone(), [0.0]), proposal(boxes[:1], interim[:1].clone()), target[:1], SPEC
    )
    assert all(whole[k].item() == pytest.approx(alone[k].item(), rel=1e-5) for k in ("mask", "box", "interim"))


def test_losses_without_interim_parts() -> None:
    said = answer(torch.zeros(1, 16, 16), [0.0])
    assert set(losses("plain", said, Proposal(PromptSet()), torch.ones(1, 16, 16), SPEC)) == {"mask", "objectness"}


def test_unknown_loss_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss: expected one of .*sam2rad.*, received 'promise'"):
        losses("promise", answer(torch.zeros(1, 16, 16), [0.0]), Proposal(PromptSet()), torch.ones(1, 16, 16), SPEC)


@pytest.mark.parametrize(
    "part, trained",
    [
        ("boxes_xy", "predictor.box_head.2.weight"),
        ("masks", "predictor.mask_head.6.weight"),
        ("tokens", "predictor.blocks.0.mlp.2.weight"),
    ],
)
def test_prompts_carry_the_gradient(part, trained) -> None:
    """Beside the losses on box and interim mask, what the decoder makes of the prompts teaches them."""
    torch.manual_seed(0)
    method = build(Config(classes=2), SPEC)
    prompts = method.propose(features()).prompts
    getattr(prompts, part).square().sum().backward()
    assert method.get_parameter(trained).grad.abs().max() > 0
    assert method.queries.grad.flatten(1).abs().amax(1).min() > 0  # of every class
