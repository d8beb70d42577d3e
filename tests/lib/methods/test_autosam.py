"""AutoSAM by numbers: published sizes, identity at step 0, the image tap, the ablation, what is refused (METHODS 2)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lib.config import from_mapping, method_row
from lib.contracts import BackboneSpec, Features, PromptSet, Proposal, image_tap
from lib.decoder import decode
from lib.errors import ConfigError
from lib.learned import Answer, rows
from lib.methods.autosam import LOSSES, Config, MapDecoder, build, light_head, losses, trunk
from lib.nn.hardnet import Block, HarDNet

SPEC = BackboneSpec("x", "sam1", 64, "squash", prompt_width=32)
BACKBONES = ("tiny", "compact", "sam_vit_b", "sam2.1_tiny", "mobile_sam")
LN2 = math.log(2)
# of the printed sizes, what no gradient reaches: the stage at stride 32, and 512 of the decoder
WHOLE, UNUSED, DEAD = 41_558_300, 17_506_176, 512


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def pictures(spec: BackboneSpec, images: int = 2) -> torch.Tensor:
    return torch.randn(images, 3, spec.input_size, spec.input_size, generator=torch.Generator().manual_seed(1))


def test_paper_network_has_the_published_size() -> None:
    with torch.device("meta"):
        network, channels = trunk("hardnet85")
        decoder = MapDecoder(channels, 256, 1)
        coarsest = Block(720, 256, 4)
        assert channels == (192, 320, 720)
        assert count(decoder) == 6_169_088 - DEAD
        assert count(network) == 35_389_212 - (UNUSED - DEAD)
        assert count(network) + count(decoder) == WHOLE - UNUSED
        # the stage that is left out: its block, and the 1x1 convolution to 1280 channels with its norm
        assert count(coarsest) + coarsest.channels * 1280 + 2 * 1280 == UNUSED - DEAD
        assert count(light_head(256)) == 151_809
        assert light_head(256)(torch.zeros(2, 256, 64, 64)).shape == (2, 1, 256, 256)


def test_hardnet_gives_three_strides() -> None:
    with torch.no_grad():
        maps = HarDNet().eval()(torch.zeros(1, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(1, 192, 16, 16), (1, 320, 8, 8), (1, 720, 4, 4)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"classes": 0}, "expected classes >= 1"),
        ({"side": 16}, "side 0 or >= 32"),
        ({"head": "heavy"}, r"autosam.head: expected one of \['sam', 'light'\], received 'heavy'"),
        ({"cnn": "resnet17"}, "expected hardnet85 or the name of a timm model, received 'resnet17'"),
        ({"cnn": "vit_tiny_patch16_224"}, "strides .4, 8, 16., received 'vit_tiny_patch16_224' with .*Take a conv"),
    ],
)
def test_build_refuses_what_does_not_fit(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Config(**{"classes": 1, **options}), SPEC)


def test_yaml_fits_the_config() -> None:
    row = method_row("autosam")
    assert from_mapping(Config, {**row.options, "classes": 2}, "autosam").cnn == "resnet18"
    assert row.recipe.loss in LOSSES and row.recipe.preset == "auto"


@pytest.mark.parametrize("name", BACKBONES)
def test_step_0_is_sam_without_prompts(make, learn, name) -> None:
    backbone = make(name)
    model = learn("autosam", backbone, {})
    x = pictures(model.spec)
    with torch.no_grad():
        features = model.backbone.encode(x, model.method.taps)
        answer = model.autonomous(features)
        index = torch.arange(2).repeat_interleave(3)
        bare = backbone.embed_prompts(PromptSet(), 6)
        stock = decode(model.spec, backbone.mask_decoder, backbone.encode(x), bare, image_index=index)
    assert torch.allclose(answer.masks, stock.masks[:, 0], atol=1e-5)
    assert not answer.obj.any()  # 0 counts as present


@pytest.mark.parametrize("name", BACKBONES)
def test_image_tap_is_the_resized_input(make, name) -> None:
    backbone = make(name)
    side = backbone.spec.input_size
    x = torch.linspace(-2, 2, side).expand(2, 3, side, side)  # a ramp, whose halves are the means of neighbours
    first = backbone.spec.pyramid[0][0]
    taps = backbone.encode(x, (image_tap(side), first, image_tap(side // 2))).taps
    assert torch.allclose(taps[image_tap(side)], x, atol=1e-5)
    half = taps[image_tap(side // 2)][..., 2:-2]
    assert torch.allclose(half, F.avg_pool2d(x, 2)[..., 2:-2], atol=1e-4)
    assert all(tuple(t.shape[1:]) == backbone.spec.tap_shape(tap) for tap, t in taps.items()) and len(taps) == 3
    with pytest.raises(ConfigError, match=r"expected taps out of .* or image<side>, received 'image'"):
        backbone.encode(x, ("image",))


@pytest.mark.parametrize("side, tap", [(256, "image64"), (48, "image48"), (0, "image32")])
def test_network_never_sees_more_pixels_than_the_backbone(side, tap) -> None:
    assert build(Config(classes=1, side=side), SPEC).taps == (tap,)


def test_user_mask_wins_and_clicks_join(learn) -> None:
    model = learn("autosam", "tiny", {})
    torch.nn.init.normal_(model.method.maps.last.weight, std=0.1)
    with torch.no_grad():
        features = model.backbone.encode(pictures(model.spec, 1), model.method.taps)
        proposal, index = model.propose(features), torch.zeros(3, dtype=torch.long)
        mask = torch.full((3, 1, model.spec.mask_size, model.spec.mask_size), 4.0)
        drawn = model.decode(features, proposal, PromptSet(masks=mask), index)[1].masks
        plain = model.decode(features, None, PromptSet(masks=mask), index)[1].masks
        click = PromptSet(points_xy=torch.full((3, 1, 2), 20.0), labels=torch.ones(3, 1, dtype=torch.long))
        joined = model.decode(features, proposal, click, index)[1].masks
        alone = model.decode(features, None, click, index)[1].masks
    assert torch.equal(drawn, plain)
    assert not torch.allclose(joined, alone, atol=1e-3)


def test_light_head_answers_without_sam_until_the_user_speaks(learn) -> None:
    model = learn("autosam", "tiny", {"head": "light"})
    torch.nn.init.normal_(model.method.maps.last.weight, std=0.1)
    features = model.backbone.encode(pictures(model.spec), model.method.taps)
    proposal, index = model.propose(features), torch.arange(2).repeat_interleave(3)
    answer = model.decode(features, proposal, PromptSet(), index)[1]
    assert torch.equal(answer.masks, proposal.masks[:, 0])
    assert torch.equal(rows(proposal, torch.tensor([4])).masks, proposal.masks[4:5])
    click = PromptSet(points_xy=torch.full((6, 1, 2), 20.0), labels=torch.ones(6, 1, dtype=torch.long))
    assert not torch.allclose(model.decode(features, proposal, click, index)[1].masks, answer.masks, atol=1e-3)
    answer.masks.sum().backward()
    assert model.method.light[0].weight.grad.abs().max() > 0 and model.method.maps.last.weight.grad.abs().max() > 0


def test_light_head_learns_where_a_small_thing_is(learn) -> None:
    """With maps that start at zero all masks stay the same everywhere, and shrink to nothing."""
    model = learn("autosam", "tiny", {"head": "light"}).train()
    rng = torch.Generator().manual_seed(1)
    x = 0.1 * torch.randn(4, 3, *(model.spec.input_size,) * 2, generator=rng)
    target = torch.zeros(4, 3, *(model.spec.mask_size,) * 2)
    cell = model.spec.input_size // model.spec.mask_size
    for n, k in ((n, k) for n in range(4) for k in range(3)):
        i, j = 2 + 3 * n, 2 + 4 * k
        target[n, k, i : i + 3, j : j + 3] = 1
        x[n, :, i * cell : (i + 3) * cell, j * cell : (j + 3) * cell] += k - 3.0
    features, flat = model.backbone.encode(x, model.method.taps), target.flatten(0, 1)
    optimiser = torch.optim.AdamW(model.method.parameters(), lr=1e-3)
    for _ in range(80):
        proposal = model.propose(features)
        answer = Answer(proposal.masks[:, 0], torch.ones(12), proposal.obj[:, 0])
        optimiser.zero_grad()
        sum(losses("plain", answer, proposal, flat, model.spec).values()).backward()
        optimiser.step()
    inside = (answer.masks * flat).sum((1, 2)) / flat.sum((1, 2))
    outside = (answer.masks * (1 - flat)).sum((1, 2)) / (1 - flat).sum((1, 2))
    assert (inside - outside).mean() > 0.1


@pytest.mark.parametrize("width", [64, 256])
def test_light_head_starts_with_logits_of_some_spread(width: int) -> None:
    """The norm before its last layer bounds it: with the usual weights there no logit comes above 0 for long."""
    torch.manual_seed(1)
    found = light_head(width)(torch.randn(4, width, 16, 16).tanh())
    assert found.std() > 0.5 and found.mean() < -1


def test_presence_can_be_left_to_sam(learn) -> None:
    model = learn("autosam", "tiny", {"presence": False})
    features = model.backbone.encode(pictures(model.spec), model.method.taps)
    proposal = model.propose(features)
    out, answer = model.decode(features, proposal, PromptSet(), torch.arange(2).repeat_interleave(3))
    assert proposal.obj is None and torch.equal(answer.obj, out.obj[:, 0])
    assert set(losses("plain", answer, proposal, torch.ones_like(answer.masks), model.spec)) == {"mask"}


def test_losses_by_hand() -> None:
    target = torch.zeros(2, 16, 16)
    target[0, 4:8, 4:12] = 1  # 32 of 256 cells; the second pair is absent
    answer = SimpleNamespace(masks=torch.zeros(2, 16, 16), obj=torch.zeros(2))
    proposal = Proposal(PromptSet(), obj=torch.zeros(2, 1))
    found = {k: v.item() for k, v in losses("autosam", answer, proposal, target, SPEC).items()}
    dice, empty = 1 - (2 * 16 + 1) / (128 + 32 + 1), 1 - 1 / (128 + 1)
    assert found == pytest.approx({"mask": LN2 + (dice + empty) / 2, "objectness": LN2}, rel=1e-5)
    found = {k: v.item() for k, v in losses("plain", answer, proposal, target, SPEC).items()}
    assert found == pytest.approx({"mask": dice + 0.25 * 256 * LN2 / (32 + 2.56), "objectness": LN2}, rel=1e-5)
    with pytest.raises(ConfigError, match=r"loss: expected one of \['autosam', 'plain'\], received 'sam2rad'"):
        losses("sam2rad", answer, proposal, target, SPEC)


def test_maps_of_the_official_size() -> None:
    spec = BackboneSpec("x", "sam1", 1024, "pad_br")
    with torch.device("meta"):
        method = build(Config(classes=4, cnn="hardnet85"), spec).eval()
        features = Features(
            torch.zeros(2, 256, 64, 64), torch.zeros(1), None, {"image512": torch.zeros(2, 3, 512, 512)}
        )
        assert method.propose(features).prompts.dense.shape == (8, 256, 64, 64)
