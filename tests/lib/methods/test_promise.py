"""ProMISe by numbers: published sizes, where points start, modes, absence, losses, what is refused (METHODS 6)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lib import plugins
from lib.config import backbone_row, from_mapping, method_row
from lib.contracts import BackboneSpec, PromptSet, Proposal
from lib.decoder import decode
from lib.errors import ConfigError
from lib.methods.promise import LOSSES, MODES, POINTS, Config, build, losses
from lib.nn.losses import point_loss
from lib.nn.points import LoneNorm, anchor_grid

SPEC = BackboneSpec("x", "sam1", 64, "squash", prompt_width=32, pyramid=(("a", 16, 8), ("b", 16, 8)))
LN2 = math.log(2)
# of the printed sizes, what never gets a gradient: second heads, and one layer norm in each of the cross form's layers
DEAD_HEAD, DEAD_CROSS = 525_312, 3 * 2 * 768 + 2 * 768 + 2


def spec_of(name: str) -> BackboneSpec:
    row = backbone_row(name)
    with torch.device("meta"):
        return plugins.load("backbones", row.module).build(row).spec


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def encoded(model, images: int = 2):
    x = torch.randn(images, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.backbone.encode(x, model.method.taps)


def test_parts_have_the_published_size() -> None:
    spec = spec_of("sam_vit_b")
    with torch.device("meta"):
        resnet, cross, light = (build(Config(classes=1, form=form), spec) for form in ("resnet", "cross", "light"))
    assert resnet.taps == cross.taps == ("block5", "block8", "block11") and light.taps == ()
    assert count(resnet.points.fuse) == 6_488_832
    assert count(resnet.points) - count(resnet.points.fuse) == 22_227_616 - DEAD_HEAD
    assert count(cross.points) == 44_310_532 - DEAD_CROSS
    assert count(light.points) == 445_200
    assert count(light.pattern) - count(light.pattern.presence) == 1_312_768


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "gt"}, r"promise.mode: expected one of \['apm', 'ips', 'apm_ips'\], received 'gt'"),
        ({"form": "vit"}, r"promise.form: expected one of \['resnet', 'cross', 'light'\], received 'vit'"),
        ({"classes": 0}, "expected classes and points per class >= 1"),
        ({"positive": 0, "negative": 0}, "points per class >= 1"),
        ({"positive": -1}, "points per class >= 1"),
        ({"mask_token": 4}, "expected 0 to 3, received 4"),
    ],
)
def test_build_refuses_what_does_not_fit(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Config(**{"classes": 1, **options}), SPEC)


@pytest.mark.parametrize("form", ["resnet", "cross"])
def test_backbone_without_maps_is_refused(form) -> None:
    bare = BackboneSpec("bare", "sam1", 64, "squash", prompt_width=32)
    with pytest.raises(ConfigError, match=f"'{form}' reads maps that bare does not give; use 'light'"):
        build(Config(classes=1, form=form), bare)
    assert build(Config(classes=1, form="light"), bare).taps == ()
    assert build(Config(classes=1, form=form, mode="ips"), bare).points is None


def test_yaml_fits_the_config() -> None:
    row = method_row("promise")
    assert from_mapping(Config, {**row.options, "classes": 2}, "promise").form == "light"
    assert row.recipe.loss in LOSSES and row.recipe.preset == "auto"


@pytest.mark.parametrize("points, side", [(1, 1), (3, 3), (5, 3), (16, 5)])
def test_anchors_are_different_cells_nearest_first(points, side) -> None:
    anchors = anchor_grid(points)
    far = (anchors - 0.5).norm(dim=1)
    assert anchors[0].tolist() == [0.5, 0.5] and len(anchors.unique(dim=0)) == points
    assert torch.allclose((anchors * side) % 1, torch.tensor(0.5), atol=1e-4)
    assert (far.diff() >= -1e-6).all()


@pytest.mark.parametrize("form", POINTS)
@pytest.mark.parametrize("positive, negative", [(1, 2), (2, 3), (8, 8)])
def test_points_start_spread_over_the_image_whatever_it_shows(learn, form, positive, negative) -> None:
    model = learn("promise", "tiny", {"form": form, "positive": positive, "negative": negative})
    with torch.no_grad():
        prompts = model.propose(encoded(model)).prompts
    assert prompts.labels.tolist() == [[1] * positive + [0] * negative] * 6
    expected = anchor_grid(positive + negative) * 64 - 0.5
    # a light point is the mean of a spot that the grid of four cells shows coarsely and its rim cuts off
    atol = 9.0 if form == "light" else 1e-3
    assert torch.allclose(prompts.points_xy, expected.expand(6, -1, -1), atol=atol)


@pytest.mark.parametrize("mode", MODES)
def test_step_0_is_sam_with_the_starting_points(make, learn, mode) -> None:
    backbone = make("sam_vit_b")
    model = learn("promise", backbone, {"mode": mode, "form": "light"})
    features, index = encoded(model), torch.arange(2).repeat_interleave(3)
    with torch.no_grad():
        proposal, answer = model.propose(features), model.autonomous(features)
        start = backbone.embed_prompts(proposal.prompts, 6)
        stock = decode(model.spec, backbone.mask_decoder, features, start, image_index=index)
    assert (proposal.prompts.points_xy is None) == (mode == "ips")
    assert (proposal.hooks.token_shift is None) == (mode == "apm")
    assert torch.allclose(answer.masks, stock.masks[:, 1], atol=1e-5)
    assert not answer.obj.any()  # 0 counts as present


@pytest.mark.parametrize("mode", MODES)
def test_one_step_lowers_the_loss_in_every_mode(learn, mode) -> None:
    model = learn("promise", "tiny", {"mode": mode, "form": "light"}).train()
    features, index = encoded(model), torch.arange(2).repeat_interleave(3)
    target = torch.zeros(6, model.spec.mask_size, model.spec.mask_size)
    target[:, 3:9, 4:12] = 1
    optimiser, found = torch.optim.AdamW(model.groups(1e-3, 1e-4, 0.1)), []
    for _ in range(2):
        optimiser.zero_grad()
        proposal = model.propose(features)
        answer = model.decode(features, proposal, PromptSet(), index)[1]
        total = torch.stack(list(losses("promise", answer, proposal, target, model.spec).values())).sum()
        total.backward()
        optimiser.step()
        found.append(float(total.detach()))
    assert found[1] < found[0]


def test_points_of_an_absent_class_say_nothing(learn) -> None:
    model = learn("promise", "tiny", {"form": "light"})
    with torch.no_grad():
        model.method.pattern.presence.bias.copy_(torch.tensor([2.0, -2.0, 0.0]))
        proposal = model.propose(encoded(model, 1))
        taught = model.train().method.propose(encoded(model, 1)).prompts.labels
    assert (proposal.prompts.labels[1] == -1).all() and (proposal.prompts.labels[[0, 2]] >= 0).all()
    assert proposal.obj[:, 0].tolist() == [2.0, -2.0, 0.0]
    assert (taught >= 0).all()  # else a wrong guess of presence would keep them from learning


@pytest.mark.parametrize("form", POINTS)
def test_mask_loss_moves_the_points(learn, form) -> None:
    """Coordinates have no loss of their own in the paper: what the decoder makes of them teaches them."""
    model = learn("promise", "tiny", {"form": form, "mode": "apm"})
    answer = model.autonomous(encoded(model))
    answer.masks.square().sum().backward()
    assert model.method.points.head.weight.grad.abs().max() > 0


def test_norm_takes_a_single_value_per_channel() -> None:
    norm = LoneNorm(4).train()
    x = torch.randn(1, 4, 1, 1)
    assert torch.allclose(norm(x), x, atol=1e-4)  # the running statistics, which are 0 and 1
    assert torch.allclose(norm(torch.cat([x, -x])).mean(0), torch.zeros(4, 1, 1), atol=1e-5)


def proposal(xy: list[list[float]], labels: list[int]) -> Proposal:
    points = torch.tensor([xy, xy], requires_grad=True)
    return Proposal(PromptSet(points_xy=points, labels=torch.tensor([labels, labels])), obj=torch.zeros(2, 1))


def half(pairs: int = 2) -> Tensor:
    """The left half of the image."""
    target = torch.zeros(pairs, 16, 16)
    target[:, :, :8] = 1
    return target


@pytest.mark.parametrize(
    "x, label, expected", [(7.5, 1, 0.0), (7.5, 0, -math.log(0.01)), (55.5, 0, 0.0), (31.5, 1, LN2), (7.5, -1, 0.0)]
)
def test_point_loss_by_hand(x, label, expected) -> None:
    found = point_loss(torch.tensor([[[x, 31.5]]]), torch.tensor([[label]]), half(1), 64)
    assert found.item() == pytest.approx(expected, abs=1e-3)


def test_point_loss_pulls_a_point_to_its_side() -> None:
    points = torch.tensor([[[33.0, 31.5]]], requires_grad=True)
    point_loss(points, torch.tensor([[1]]), half(1), 64).sum().backward()
    assert points.grad[0, 0, 0] > 0 and points.grad[0, 0, 1] == 0  # downhill is to the left


def test_losses_by_hand() -> None:
    target = half()
    target[1] = 0  # the second pair is absent
    answer = SimpleNamespace(masks=torch.zeros(2, 16, 16), obj=torch.zeros(2))
    made = proposal([[7.5, 31.5], [31.5, 31.5]], [1, 0])
    dice, empty = 1 - (2 * 64 + 1) / (128 + 128 + 1), 1 - 1 / (128 + 1)
    found = {k: v.item() for k, v in losses("promise", answer, made, target, SPEC).items()}
    assert found == pytest.approx({"mask": LN2 + (dice + empty) / 2, "objectness": LN2}, rel=1e-5)
    found = {k: v.item() for k, v in losses("plain", answer, made, target, SPEC).items()}
    mask = dice + 0.25 * 256 * LN2 / (128 + 2.56)
    assert found == pytest.approx({"mask": mask, "objectness": LN2, "points": 0.1 * LN2 / 2}, rel=1e-3)
    with pytest.raises(ConfigError, match=r"loss: expected one of \['promise', 'plain'\], received 'autosam'"):
        losses("autosam", answer, made, target, SPEC)
