"""Every method found in ``lib/methods`` keeps the contract on every family; a new one is tested without an edit here.

A method's other forms are added to ``FORMS``; tensors that cannot get a gradient are named in ``NO_GRADIENT``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from lib import plugins
from lib.config import MethodRow, TrainRecipe, backbone_row
from lib.contracts import Features, Method, PromptSet
from lib.decoder import decode
from lib.errors import WeightsError
from lib.learned import PRESETS, Learned, read_token
from lib.train_step import step_loss

CLASSES = 3
BACKBONES = ("tiny", "compact", "sam_vit_b", "sam2.1_tiny", "mobile_sam")
FORMS: dict[str, list[dict[str, Any]]] = {
    "sam2rad": [{}, {"form": "high_res"}],
    "sam_med2d": [{}, {"adapter": "wide"}],
    "promise": [{"form": "light"}, {"form": "cross", "positive": 1, "negative": 2}],
}
# softmax ignores what is the same for all keys, or for all cells of a heat map
NO_GRADIENT = {"sam2rad": (".k.bias",), "sam_med2d": (".k.bias",), "promise": ("points.head.bias",)}
EVERY = [(m, o) for m in plugins.names("methods") for o in FORMS.get(m, [{}])]
METHODS = pytest.mark.parametrize("method, options", EVERY)
BACKBONE = pytest.mark.parametrize("name", BACKBONES)
PRESET = pytest.mark.parametrize("preset", PRESETS)


def image(model: Learned, count: int = 2) -> Tensor:
    side = model.spec.input_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def encoded(model: Learned, count: int = 2) -> Features:
    with torch.no_grad():
        return model.backbone.encode(image(model, count), model.method.taps)


def target(model: Learned, count: int = 2) -> Tensor:
    """Another rectangle per pair, all present."""
    side = model.spec.mask_size
    masks = torch.zeros(count, CLASSES, side, side)
    for n in range(count * CLASSES):
        masks[n // CLASSES, n % CLASSES, n % 5 : n % 5 + side // 2, n % 3 + 2 : n % 3 + 2 + side // 3] = 1
    return masks


def clicks(model: Learned, pairs: int, at: float = 0.3, label: int = 1) -> PromptSet:
    xy = torch.full((pairs, 1, 2), at * model.spec.input_size)
    return PromptSet(points_xy=xy, labels=torch.full((pairs, 1), label))


def answered(model: Learned, features: Features, user: PromptSet) -> Tensor:
    images = features.embed.shape[0]
    index = torch.arange(images).repeat_interleave(CLASSES)
    with torch.no_grad():
        return model.decode(features, model.propose(features), user, index)[1].masks


def loss_of(model: Learned, features: Features | None = None) -> Tensor:
    if features is None:
        features = model.backbone.encode(image(model), model.method.taps)
    return step_loss(model, features, target(model), "plain", 7)[0]


def train(model: Learned, steps: int) -> None:
    optimiser = torch.optim.AdamW(model.groups(3e-4, 1e-4, 0.1))
    for step in range(steps):
        model.train()
        torch.manual_seed(step)
        optimiser.zero_grad()
        loss_of(model).backward()
        optimiser.step()
    model.eval()


def training_loss(model: Learned) -> float:
    """As the optimiser sees it: three steps are too few for the averages that batch norms use afterwards."""
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        found = float(loss_of(model))
    model.eval()
    return found


def shake(model: Learned) -> None:
    """Lets every layer of the method that starts at zero say something."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.method.parameters():
            p += 0.0 if p.any() else 0.1 * torch.randn(p.shape, generator=rng)


def parts(proposal: Any) -> dict[str, Tensor]:
    hooks = {k: getattr(proposal.hooks, k) for k in ("token_shift", "extra_tokens")}
    found = {**vars(proposal.prompts), **hooks, "boxes": proposal.boxes, "interim": proposal.masks, "obj": proposal.obj}
    return {k: v.float().nan_to_num() for k, v in found.items() if v is not None}  # a pair without a box has NaN


@METHODS
@BACKBONE
def test_propose_gives_pairs_image_by_image(learn, method, options, name) -> None:
    model = learn(method, name, options)
    shake(model)  # some propose the same for all classes at step 0
    both = encoded(model)
    with torch.no_grad():
        together = parts(model.propose(both))
        alone = [parts(model.propose(both.row(b))) for b in range(2)]
        assert isinstance(model.method, Method) and model.classes == CLASSES
        assert together and all(len(v) == 2 * CLASSES for v in together.values())
        for key, value in together.items():
            assert torch.allclose(value, torch.cat([a[key] for a in alone]), atol=1e-4), key
        apart = [max(float((v[n] - v[m]).abs().max()) for v in together.values()) for n, m in ((0, 1), (0, CLASSES))]
        assert min(apart) > 1e-4  # classes differ, and so do images
        masks = model.autonomous(both).masks
        ones = torch.cat([model.autonomous(both.row(b)).masks for b in range(2)])
        assert torch.allclose(masks, ones, atol=1e-3)
        one = model.corrected(both, model.propose(both), PromptSet(), torch.tensor([4])).masks
        assert torch.allclose(masks[4], one[0], atol=1e-3)


@METHODS
@BACKBONE
@PRESET
def test_step_0_is_the_plain_backbone(make, learn, method, options, name, preset) -> None:
    plain = make(name)
    model = learn(method, plain, options, preset)
    with torch.no_grad():
        features, expected = encoded(model), plain.encode(image(model), model.method.taps)
        assert torch.equal(features.embed, expected.embed)
        if expected.high_res is not None:
            assert all(torch.equal(a, b) for a, b in zip(features.high_res, expected.high_res))
        assert all(torch.equal(features.taps[t], expected.taps[t]) for t in model.method.taps)
        user, index = clicks(model, 2), torch.arange(2)
        out, answer = model.decode(features, None, user, index)
        stock = decode(plain.spec, plain.mask_decoder, expected, plain.embed_prompts(user, 2), image_index=index)
    assert torch.equal(out.masks, stock.masks) and torch.equal(out.iou, stock.iou)
    assert torch.equal(answer.masks, read_token(stock, model.method.mask_token)[0])
    assert torch.equal(answer.obj, torch.zeros(2) if stock.obj is None else stock.obj[:, 0])  # 0 counts as present


@METHODS
@BACKBONE
@PRESET
def test_trained_tensors_are_the_only_own_ones(make, learn, method, options, name, preset) -> None:
    plain = make(name)
    model = learn(method, plain, options, preset)
    stored = set(model.trained())
    named = dict(model.named_parameters())
    assert {n for n, p in named.items() if p.requires_grad} == stored & set(named)
    assert not any(p.requires_grad for p in plain.parameters())
    kept = {p.data_ptr() for p in plain.parameters()}
    backbone = {n: p for n, p in named.items() if n.startswith("backbone.")}
    assert {n for n, p in backbone.items() if p.data_ptr() not in kept} == stored & set(backbone)
    if preset == "frozen":
        assert not stored & set(backbone) and {p.data_ptr() for p in backbone.values()} == kept
    if preset == "adapters":
        assert 0 < len(stored & set(backbone)) < len(backbone)
    if preset == "full":
        assert set(backbone) <= stored and len(backbone) == len(list(plain.parameters()))
    assert model.changes_encoder == (preset != "frozen")


@METHODS
@BACKBONE
@PRESET
def test_training_lowers_the_loss_and_leaves_the_original(make, learn, method, options, name, preset) -> None:
    plain = make(name)
    before = {n: t.clone() for n, t in plain.state_dict().items()}
    paths = dict(plain.paths)
    model = learn(method, plain, options, preset)
    model.progress = 0.0  # as a training begins
    start = training_loss(model)
    train(model, 3)
    assert training_loss(model) < start
    assert plain.paths == paths
    assert list(plain.state_dict()) == list(before)
    assert all(torch.equal(t, before[n]) for n, t in plain.state_dict().items())


@METHODS
@BACKBONE
@PRESET
def test_restored_model_predicts_the_same(make, learn, method, options, name, preset) -> None:
    plain = make(name)
    model, fresh = learn(method, plain, options, preset), learn(method, plain, options, preset, seed=2)
    train(model, 1)
    expected = answered(model, encoded(model), clicks(model, 2 * CLASSES))
    assert not torch.allclose(expected, answered(fresh, encoded(fresh), clicks(fresh, 2 * CLASSES)))
    fresh.restore(load(save(model.trained())))
    assert torch.equal(expected, answered(fresh, encoded(fresh), clicks(fresh, 2 * CLASSES)))
    assert {n: p.requires_grad for n, p in fresh.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


@METHODS
@PRESET
@pytest.mark.parametrize("damage", ["missing", "unexpected", "reshaped", "another preset"])
def test_restore_refuses_what_does_not_fit(learn, method, options, preset, damage) -> None:
    model = learn(method, "tiny", options, preset)
    tensors = {n: t.clone() for n, t in model.trained().items()}
    first = sorted(tensors)[0]
    if damage == "missing":
        del tensors[first]
    elif damage == "unexpected":
        tensors["method.nowhere"] = torch.zeros(1)
    elif damage == "reshaped":
        tensors[first] = tensors[first][None]
    else:
        tensors = learn(method, "tiny", options, {"frozen": "full"}.get(preset, "frozen")).trained()
    before = {n: t.clone() for n, t in model.trained().items()}
    with pytest.raises(WeightsError, match="do not fit the preset"):
        model.restore(tensors)
    assert all(torch.equal(t, before[n]) for n, t in model.trained().items())


@METHODS
@BACKBONE
def test_click_changes_the_mask(learn, method, options, name) -> None:
    model = learn(method, name, options)
    features, pairs = encoded(model), 2 * CLASSES
    asked = [PromptSet(), clicks(model, pairs), clicks(model, pairs, at=0.8), clicks(model, pairs, label=0)]
    found = [answered(model, features, user) for user in asked]
    for i, first in enumerate(found):
        for second in found[i + 1 :]:
            assert (first - second).flatten(1).abs().amax(1).min() > 1e-4  # of every pair


@METHODS
@BACKBONE
def test_no_user_prompt_is_autonomous(learn, method, options, name) -> None:
    model = learn(method, name, options)
    features = encoded(model)
    with torch.no_grad():
        expected = model.autonomous(features).masks
    assert torch.equal(answered(model, features, PromptSet()), expected)
    masks = torch.full((2 * CLASSES, 1, model.spec.mask_size, model.spec.mask_size), 9.0)
    nobody = PromptSet(masks=masks, mask_given=torch.zeros(2 * CLASSES, dtype=torch.bool))
    assert torch.allclose(answered(model, features, nobody), expected, atol=1e-5)  # another memory layout
    everybody = PromptSet(masks=masks)
    assert not torch.allclose(answered(model, features, everybody), expected, atol=1e-4)


@METHODS
@BACKBONE
def test_second_call_equals_the_first(learn, method, options, name) -> None:
    model = learn(method, name, options, "adapters")
    features, user = encoded(model), clicks(model, 2 * CLASSES)
    held = [features.embed, features.pe, *(features.high_res or ()), *features.taps.values(), user.points_xy]
    before = [t.clone() for t in held]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    first = answered(model, features, user)
    assert torch.equal(answered(model, features, user), first)
    assert all(torch.equal(a, b) for a, b in zip(held, before))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@METHODS
@BACKBONE
@PRESET
def test_train_keeps_what_is_frozen_in_eval_mode(learn, method, options, name, preset) -> None:
    model = learn(method, name, options, preset).train()
    assert model.method.training and model.training
    modes = {m.training for m in model.backbone.modules()}
    assert modes == {False} if preset != "full" else model.backbone.training
    buffers = {n: t.clone() for n, t in model.backbone.named_buffers()}
    with torch.no_grad():
        model.backbone.encode(image(model))
    assert all(torch.equal(t, buffers[n]) for n, t in model.backbone.named_buffers())
    model.eval()
    assert not any(m.training for m in model.modules())


@METHODS
@BACKBONE
def test_gradient_reaches_every_tensor_of_the_method(learn, method, options, name) -> None:
    model = learn(method, name, options).train()
    shake(model)  # layers that start at zero let no gradient pass
    torch.manual_seed(3)
    loss_of(model, encoded(model)).backward()
    reached = {n: float(p.grad.abs().max()) for n, p in model.method.named_parameters() if p.grad is not None}
    exempt = NO_GRADIENT.get(method, ())
    expected = {n for n, _ in model.method.named_parameters() if not n.endswith(exempt)}
    assert sorted(n for n in expected if not reached.get(n, 0) > 0) == []
    assert all(p.grad is None for p in model.backbone.parameters())


@METHODS
@BACKBONE
def test_gradient_reaches_the_backbone_parts_that_are_trained(make, learn, method, options, name) -> None:
    """At step 0 layers of adapters that start at zero, and all others once these are not zero."""
    plain = make(name)
    model = learn(method, plain, options, "adapters").train()
    before = dict(plain.named_parameters())
    added = {n: p for n, p in model.backbone.named_parameters() if p.requires_grad and n not in before}
    zero = {n for n, p in added.items() if not p.any()}
    loss_of(model).backward()
    assert zero and zero & _reached(added)
    train(model, 3)
    model.zero_grad()
    loss_of(model).backward()
    assert sorted(added.keys() - _reached(added)) == []


def _reached(named: dict[str, torch.nn.Parameter]) -> set[str]:
    return {n for n, p in named.items() if p.grad is not None and p.grad.abs().max() > 0}


@METHODS
@pytest.mark.parametrize("name", ["sam_vit_b", "sam2.1_tiny", "mobile_sam"])
def test_official_size_gives_shapes_on_meta(method, options, name) -> None:
    row = backbone_row(name)
    with torch.device("meta"), torch.no_grad():
        backbone = plugins.load("backbones", row.module).build(row)
        model = Learned(MethodRow(method, method, options, TrainRecipe()), backbone, CLASSES, "adapters").eval()
        spec = model.spec
        e, h = spec.prompt_width, spec.grid
        taps = {tap: torch.zeros(1, *spec.tap_shape(tap)) for tap in model.method.taps}
        high = (torch.zeros(1, e // 8, 4 * h, 4 * h), torch.zeros(1, e // 4, 2 * h, 2 * h))
        features = Features(torch.zeros(1, e, h, h), torch.zeros(1, e, h, h), high if spec.has_high_res else None, taps)
        found = model.propose(features)
    assert (spec.input_size, e, h) == (1024, 256, 64)
    shapes = {"boxes_xy": (CLASSES, 4), "masks": (CLASSES, 1, 256, 256), "dense": (CLASSES, 256, 64, 64)}
    shapes |= {"token_shift": (CLASSES, 4, 256), "obj": (CLASSES, 1)}
    given = {k: tuple(v.shape) for k, v in parts(found).items()}
    assert given and all(given.get(k, shape) == shape for k, shape in shapes.items())
    assert "tokens" not in given or given["tokens"][::2] == (CLASSES, 256)
