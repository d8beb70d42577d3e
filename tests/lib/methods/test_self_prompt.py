"""Self-Prompt-SAM by numbers: published sizes, prompts derived by hand, slices that see each other (METHODS 4)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lib import plugins
from lib.config import backbone_row
from lib.contracts import BackboneSpec, Features, PromptSet, Proposal
from lib.errors import ConfigError
from lib.learned import Learned, spread
from lib.methods.self_prompt import (
    ABSENT,
    ClassAdapter,
    Config,
    Generator,
    _given,
    build,
    chosen_taps,
    class_loss,
    derived,
    injectors,
    log_odds,
    losses,
)
from lib.nn.adapters import clone, inject
from lib.train_step import step_loss

SPEC = BackboneSpec("x", "sam1", 64, "squash", prompt_width=32, pyramid=(("a", 16, 8), ("b", 16, 8)))
CLASSES = 3


def on_meta(name: str):
    row = backbone_row(name)
    with torch.device("meta"):
        return plugins.load("backbones", row.module).build(row)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name, millions", [("sam_vit_b", 1.95), ("medsam", 1.95), ("sam_med2d", 1.95)])
def test_generator_has_the_published_size(name, millions) -> None:
    spec = on_meta(name).spec
    with torch.device("meta"):
        generator = Generator(spec, 4)
    assert round(count(generator) / 1e6, 2) == millions


@pytest.mark.parametrize(
    "slices, kind, encoder, decoder",
    [(16, "fc", 24 * 298_000 + 16 * 768, 0), (16, "fc", 0, 6 * 35_216), (4, "conv1d", None, 0)],
)
def test_adapters_have_the_published_size(slices, kind, encoder, decoder) -> None:
    """Two per block of a ViT-B, three per decoder layer, the depth embedding, and the modality adapter."""
    backbone = clone(on_meta("sam_vit_b"))
    config = Config(classes=3, slices=slices, depth=kind)
    with torch.device("meta"):
        added = set(
            inject(backbone, injectors(config, backbone, decoder=not encoder and bool(decoder), encoder=encoder != 0))
        )
    found = sum(p.numel() for n, p in backbone.named_parameters() if n in added)
    modality = 3 * 9 * 16 + 32 + 16 * 9 * 3 + 3
    if encoder is not None:
        assert found == encoder + decoder + (modality if encoder else 0)
    else:  # two depthwise convolutions of three slices instead of what grows with D
        assert found == 24 * (298_000 - 2_128 + 2 * 4 * 192) + slices * 768 + modality


def test_class_adapter_is_the_identity_at_first() -> None:
    adapter, scores = ClassAdapter(4), torch.randn(2, 4, 8, 8)
    assert torch.equal(adapter(scores), scores)
    assert round(count(adapter) / 1e3, 1) == 1.2


@pytest.mark.parametrize(
    "name, taps",
    [
        ("sam_vit_b", ["block11", "block8", "block5", "block2"]),
        ("sam2.1_tiny", ["stage2", "stage1", "stage0"]),
        ("mobile_sam", ["stage3", "stage0", "patch_embed"]),
        ("compact", ["stride16", "stride8", "stride4"]),
    ],
)
def test_real_fine_maps_are_taken_where_there_are_some(name, taps) -> None:
    assert [tap[0] for tap in chosen_taps(on_meta(name).spec)] == taps


@pytest.mark.parametrize(
    "options, spec, message",
    [
        ({"classes": 0}, SPEC, "classes >= 1"),
        ({"slices": 0}, SPEC, "slices >= 1"),
        ({"warm_up": 1.0}, SPEC, "warm_up"),
        ({"depth": "conv2d"}, SPEC, "expected one of .*conv1d.*, received 'conv2d'"),
        ({"mix": "beside"}, SPEC, "expected one of .*inside.*, received 'beside'"),
        ({"parts": ("taps", "tap")}, SPEC, r"expected some of .*, received \['taps', 'tap'\]"),
        (
            {},
            BackboneSpec("x", "sam1", 64, "squash", pyramid=(("a", 8, 8),)),
            "needs a map of stride 16.*Choose another",
        ),
    ],
)
def test_build_refuses_what_does_not_fit(options, spec, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Config(**{"classes": 1, **options}), spec)


def test_prompts_are_derived_by_hand() -> None:
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    masks[0, 10:21, 4:15] = True  # its middle is row 15, column 9
    masks[0, 30, 30] = True  # 1 of 122 cells: too small for the box
    masks[1, :, :5] = True  # the border counts as outside: the deepest column is the third
    points, boxes = derived(masks, 4.0)
    assert points[0, 0].tolist() == [9.5 * 4 - 0.5, 15.5 * 4 - 0.5]
    assert boxes[0].tolist() == [4 * 4 - 0.5, 10 * 4 - 0.5, 15 * 4 - 0.5, 21 * 4 - 0.5]
    assert points[1, 0, 0].item() == 2.5 * 4 - 0.5
    assert boxes[1].tolist() == [-0.5, -0.5, 5 * 4 - 0.5, 127.5]
    assert boxes[2].isnan().all()


def test_box_of_a_mask_in_crumbs_is_around_the_largest_of_them() -> None:
    """As at the start of a training: none of 256 parts is one per cent of them all."""
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, ::4, ::4] = True
    masks[0, 20, 20:22] = True
    assert derived(masks, 1.0)[1].tolist() == [[19.5, 19.5, 21.5, 20.5]]


def test_log_odds_are_those_of_the_softmax() -> None:
    logits = torch.randn(2, 4, 3, 3)
    assert torch.allclose(log_odds(logits).sigmoid(), logits.softmax(1), atol=1e-6)


def test_given_is_any_kind_of_prompt() -> None:
    nan = torch.full((4, 4), torch.nan)
    boxes = nan.clone()
    boxes[1] = torch.tensor([1.0, 1.0, 2.0, 2.0])
    prompts = PromptSet(
        points_xy=torch.zeros(4, 2, 2),
        labels=torch.tensor([[-1, 0], [-1, -1], [-1, -1], [-1, -1]]),
        boxes_xy=boxes,
        masks=torch.zeros(4, 1, 4, 4),
        mask_given=torch.tensor([False, False, True, False]),
    )
    assert _given(prompts, 4).tolist() == [True, True, True, False]


def bright(model: Learned, logits: torch.Tensor, features: Features) -> Proposal:
    """A proposal from auxiliary logits ``(B, C, 4h, 4w)`` put in the generator's place."""
    model.method.generator.forward = lambda _: [logits[:, :, ::4, ::4], logits[:, :, ::2, ::2], logits]
    return model.propose(features)


@pytest.fixture
def model(learn) -> Learned:
    return learn("self_prompt", "sam_vit_b", {"slices": 4}, "adapters")


@pytest.mark.parametrize("depth", ["fc", "conv1d"])
def test_slices_see_each_other_also_where_only_some_pairs_are_asked_without_learned_prompts(learn, depth: str) -> None:
    model = learn("self_prompt", "sam_vit_b", {"slices": 4, "depth": depth}, "adapters")
    features, pairs = encoded(model, images=4, depth=4), torch.tensor([1, 5])
    point = torch.full((2, 1, 2), 20.0)
    user = PromptSet(points_xy=point, labels=torch.ones(2, 1, dtype=torch.long))
    with torch.no_grad():
        asked = model.corrected(features, None, user, pairs)
        every = torch.arange(4).repeat_interleave(model.classes)
        together = model.decode(features, None, spread(user, pairs, len(every)), every)[1]
    assert torch.equal(asked.masks, together.masks[pairs])


def encoded(model: Learned, images: int = 1, depth: int = 1) -> Features:
    side = model.spec.input_size
    x = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.encode(x, depth)


def auxiliary() -> torch.Tensor:
    """Class 1 in a square, class 2 below it, class 3 nowhere."""
    logits = torch.zeros(1, CLASSES + 1, 16, 16)
    logits[:, 0], logits[:, 3] = 3.0, -9.0
    logits[:, 1, 2:7, 3:8] = 8.0
    logits[:, 2, 9:14, 3:8] = 8.0
    return logits


def test_absent_class_has_no_prompt_and_no_mask(model) -> None:
    features = encoded(model)
    proposal = bright(model, auxiliary(), features)
    prompts = proposal.prompts
    assert prompts.labels.tolist() == [[1], [1], [-1]] and prompts.mask_given.tolist() == [True, True, False]
    assert prompts.boxes_xy.isnan().all(1).tolist() == [False, False, True]
    assert prompts.points_xy[0, 0].tolist() == [5.5 * 4 - 0.5, 4.5 * 4 - 0.5]
    assert prompts.masks.abs().max() <= 10
    assert (proposal.obj[:, 0] > 0).tolist() == [True, True, False]
    with torch.no_grad():
        answer = model.autonomous(features)
        assert (answer.masks[2] == ABSENT).all() and (answer.masks[0] != ABSENT).any()
        said = PromptSet(points_xy=torch.full((1, 1, 2), 20.0), labels=torch.ones(1, 1, dtype=torch.long))
        asked = model.corrected(features, proposal, said, torch.tensor([2]))
    assert (asked.masks != ABSENT).all()  # the user says that it is there


def test_class_logits_are_log_odds_against_background(model) -> None:
    features, logits = encoded(model), auxiliary()
    proposal = bright(model, logits, features)
    every = torch.zeros(CLASSES, dtype=torch.long)
    with torch.no_grad():
        out, answer = model.decode(features, proposal, PromptSet(), every)
    expected = out.masks[:2, 0] - logits[0, 0]
    assert torch.allclose(answer.masks[:2], expected, atol=1e-5)


def test_user_prompt_takes_the_place_of_the_derived_one(model, monkeypatch) -> None:
    features = encoded(model)
    proposal = bright(model, auxiliary(), features)
    seen = []
    embed = model.backbone.embed_prompts
    monkeypatch.setattr(model.backbone, "embed_prompts", lambda p, n: seen.append(p) or embed(p, n))
    point = PromptSet(points_xy=torch.full((1, 1, 2), 40.0), labels=torch.zeros(1, 1, dtype=torch.long))
    box = PromptSet(boxes_xy=torch.tensor([[1.0, 2.0, 30.0, 40.0]]))
    with torch.no_grad():
        model.corrected(features, proposal, point, torch.tensor([1]))
        model.corrected(features, proposal, box, torch.tensor([1]))
    assert seen[0].labels.tolist() == [[1, -1], [-1, 0], [-1, -1]]  # of the pair asked about only
    assert seen[0].boxes_xy.isnan().all(-1).flatten().tolist() == [False, False, True]
    assert seen[1].labels.tolist() == [[1], [1], [-1]]
    assert seen[1].boxes_xy[1].isnan().all(-1).tolist() == [True, False]
    assert proposal.prompts.labels.tolist() == [[1], [1], [-1]]  # not changed in place


def moved(model: Learned, seed: int = 5) -> None:
    """Adapters as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and not p.any():
                p += 0.2 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("name", ["tiny", "sam_vit_b", "sam2.1_tiny", "mobile_sam"])
def test_neighbours_change_a_slice_and_other_volumes_do_not(learn, name) -> None:
    model = learn("self_prompt", name, {"slices": 4}, "adapters")
    side = model.spec.input_size
    x = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[1] += 1.0
    with torch.no_grad():
        same = [model.encode(x, 4).embed[0], model.encode(other, 4).embed[0]]
        assert torch.equal(*same)  # nothing passes between slices at step 0
        moved(model)
        before, after = model.encode(x, 4), model.encode(other, 4)
        change = (before.embed - after.embed).flatten(1).abs().amax(1)
        assert change[:3].min() > 0
        assert change[4:].max() == 0  # the second volume
        alone = model.encode(x[4:], 4)
        assert torch.allclose(before.embed[4:], alone.embed, atol=1e-4)
        apart = [model.encode(x, 1).embed[0], model.encode(other, 1).embed[0]]
        assert torch.equal(*apart)  # unless it is told so


@pytest.mark.parametrize("images, depth", [(8, 4), (3, 3), (2, 1)])
def test_decoder_adapters_pass_between_slices_of_a_class(learn, images, depth) -> None:
    model = learn("self_prompt", "tiny", {"slices": 4}, "adapters")
    moved(model)
    features = encoded(model, images, depth)
    every = torch.arange(images).repeat_interleave(CLASSES)
    points = torch.full((len(every), 1, 2), 20.0)
    asked = [PromptSet(points_xy=points.clone(), labels=torch.ones(len(every), 1, dtype=torch.long)) for _ in range(2)]
    asked[1].points_xy[1] = 50.0  # class 2 on slice 1
    with torch.no_grad():
        first, second = (model.decode(features, None, user, every)[0].masks for user in asked)
    changed = ((first - second).flatten(1).abs().amax(1) > 1e-5).view(images, CLASSES)
    expected = torch.zeros(images, CLASSES, dtype=torch.bool)
    expected[: min(depth, 1 + 2 * 9), 1] = True  # two layers of adapters, three slices wide each
    assert changed[0, 1] and changed[:depth, 1][: min(depth, 2)].all()
    assert not (changed & ~expected).any()


def test_fc_takes_its_number_of_slices_only(learn) -> None:
    model = learn("self_prompt", "tiny", {"slices": 4, "depth": "fc"}, "adapters")
    assert encoded(model, 4, 4).embed.shape[0] == 4
    with pytest.raises(ConfigError, match=r"takes 4 slices .* received 3.*conv1d"):
        encoded(model, 3, 3)


def test_context_is_left_as_it_was(model) -> None:
    volume = model.backbone.volume

    def fails() -> None:
        with volume.spanning(4, 8):
            assert volume.unfolded(24) == (2, 4, 3)
            with volume.spanning(2, 2):
                assert volume.unfolded(2) == (1, 2, 1)
            assert volume.unfolded(8) == (2, 4, 1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert volume.unfolded(24) == (24, 1, 1)
    assert clone(model.backbone).volume is not volume


def test_losses_by_hand() -> None:
    target = torch.zeros(2, 4, 4)  # one image, two classes
    target[0, :2], target[1, 2:] = 1, 1
    level = torch.zeros(1, 3, 4, 4)
    proposal = Proposal(PromptSet(), levels=(level[:, :, ::2, ::2], level[:, :, ::2, ::2], level))
    entropy = math.log(3)
    dice = 1 - (2 * 8 / 3 + 1) / (16 / 3 + 8 + 1)
    small = 1 - (2 * 2 / 3 + 1) / (4 / 3 + 2 + 1)
    parts = losses("selfprompt", None, proposal, target, SPEC)
    assert set(parts) == {"auxiliary"}
    assert parts["auxiliary"].item() == pytest.approx((entropy + dice + 0.75 * (entropy + small)) / 1.75, rel=1e-5)
    sure = SimpleNamespace(masks=torch.where(target > 0, 30.0, -30.0))
    parts = losses("plain", sure, proposal, target, SPEC)
    assert parts["mask"].item() == pytest.approx(0.0, abs=1e-5)
    with pytest.raises(ConfigError, match=r"expected one of .*selfprompt.*, received 'med2d'"):
        losses("med2d", sure, proposal, target, SPEC)


def test_class_loss_falls_where_the_class_is_right() -> None:
    truth = F.one_hot(torch.arange(16).view(1, 4, 4) % 3, 3).movedim(-1, 1).float()
    right, wrong = 5 * truth, 5 * truth.roll(1, 1)
    assert class_loss(right, truth) < class_loss(torch.zeros_like(truth), truth) < class_loss(wrong, truth)


@pytest.mark.parametrize("progress, decoded", [(0.0, False), (0.19, False), (0.2, True), (1.0, True)])
def test_only_the_auxiliary_masks_learn_at_first(learn, progress, decoded) -> None:
    model = learn("self_prompt", "tiny", {"slices": 2}, "adapters").train()
    model.progress = progress
    target = torch.zeros(2, CLASSES, model.spec.mask_size, model.spec.mask_size)
    target[:, 0, 2:9, 2:9] = 1
    loss, parts = step_loss(model, encoded(model, 2, 2), target, "selfprompt", 1)
    assert ("mask" in parts) == ("assisted" in parts) == decoded and "auxiliary" in parts
    loss.backward()
    assert model.method.generator.heads[2].weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["tiny", "sam_vit_b", "sam2.1_tiny"])
def test_decoder_adapters_and_class_adapter_lower_the_loss(learn, name) -> None:
    """With the auxiliary masks held still, so that the prompts stay where they are."""
    model = learn("self_prompt", name, {"slices": 2}, "adapters").train()
    features, every = encoded(model, 2, 2), torch.arange(2).repeat_interleave(CLASSES)
    proposal = bright(model, auxiliary().repeat(2, 1, 1, 1), features)
    target = torch.zeros(2 * CLASSES, 16, 16)
    target[0::3, 3:8, 3:8] = target[1::3, 9:14, 3:8] = 1

    def loss() -> torch.Tensor:
        return losses("selfprompt", model.decode(features, proposal, PromptSet(), every)[1], proposal, target, SPEC)[
            "mask"
        ]

    optimiser, start = torch.optim.AdamW(model.groups(1e-3, 1e-3, 0.0)), float(loss().detach())
    for _ in range(8):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    assert float(loss().detach()) < start
    assert model.backbone.mask_decoder.transformer.layers[0].mlp.adapter.up.weight.any()
    assert model.method.weigh.narrow.weight.any() and model.method.place.slices.any()
