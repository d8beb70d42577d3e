"""Every backbone found in ``lib/backbones`` keeps the contract; a new one is tested without editing this file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib import plugins
from lib.config import WeightsEntry, backbone_names, backbone_row
from lib.contracts import Backbone, PromptSet
from lib.decoder import decode
from lib.errors import ConfigError, PromptError
from lib.loading import load_into

NAMES = backbone_names()
SAM_NAMES = [name for name in NAMES if backbone_row(name).module not in ("compact", "tiny")]


@pytest.fixture
def make(small_row):
    def build(name: str) -> Backbone:
        row = small_row(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            backbone = plugins.load("backbones", row.module).build(row)
            for p in backbone.parameters():  # zero-initialised parts would hide mistakes
                p.data += 0.02 * torch.randn_like(p)
        return backbone

    return build


def image(backbone: Backbone, count: int = 1) -> torch.Tensor:
    side = backbone.spec.input_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def click(x: float, y: float, label: int = 1) -> PromptSet:
    return PromptSet(points_xy=torch.tensor([[[x, y]]]), labels=torch.tensor([[label]]))


def masks(backbone: Backbone, prompts: PromptSet, count: int = 1) -> torch.Tensor:
    with torch.no_grad():
        features = backbone.encode(image(backbone, count))
        return decode(backbone.spec, backbone.mask_decoder, features, backbone.embed_prompts(prompts)).masks


def test_every_module_has_a_row() -> None:
    assert {backbone_row(name).module for name in NAMES} == set(plugins.names("backbones"))


@pytest.mark.parametrize("name", NAMES)
def test_encode_gives_features_of_the_spec(make, name) -> None:
    backbone = make(name)
    spec, e = backbone.spec, backbone.spec.prompt_width
    features = backbone.encode(image(backbone, 2))
    assert isinstance(backbone, Backbone)
    assert features.embed.shape == (2, e, spec.grid, spec.grid)
    assert features.pe.shape == (1, e, spec.grid, spec.grid)
    assert features.taps == {}
    assert (features.high_res is not None) == spec.has_high_res
    if features.high_res is not None:
        shapes = [tuple(t.shape) for t in features.high_res]
        assert shapes == [(2, e // 8, 4 * spec.grid, 4 * spec.grid), (2, e // 4, 2 * spec.grid, 2 * spec.grid)]


@pytest.mark.parametrize("name", NAMES)
def test_taps_match_the_pyramid(make, name) -> None:
    backbone = make(name)
    spec = backbone.spec
    taps = backbone.encode(image(backbone), tuple(tap for tap, _, _ in spec.pyramid)).taps
    expected = {t: (1, c, spec.input_size // s, spec.input_size // s) for t, s, c in spec.pyramid}
    assert expected and {tap: tuple(value.shape) for tap, value in taps.items()} == expected


@pytest.mark.parametrize("name", SAM_NAMES)
def test_unknown_tap_is_refused(make, name) -> None:
    backbone = make(name)
    with pytest.raises(ConfigError, match="expected taps out of"):
        backbone.encode(image(backbone), ("nowhere",))


@pytest.mark.parametrize("name", NAMES)
def test_click_changes_the_mask(make, name) -> None:
    backbone = make(name)
    side = backbone.spec.input_size
    here, there = masks(backbone, click(8, 8)), masks(backbone, click(side - 8, 20))
    assert (here - there).abs().max() > 1e-4
    assert (here - masks(backbone, click(8, 8, label=0))).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_second_call_equals_first(make, name) -> None:
    backbone, prompts = make(name), click(10, 30)
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    first = masks(backbone, prompts)
    assert torch.equal(first, masks(backbone, prompts))
    assert torch.equal(prompts.points_xy, torch.tensor([[[10.0, 30.0]]]))
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_batch_equals_one_by_one(make, name) -> None:
    backbone = make(name)
    xy = torch.tensor([[[8.0, 8.0]], [[40.0, 20.0]], [[30.0, 50.0]]])
    prompts = PromptSet(points_xy=xy, labels=torch.ones(3, 1, dtype=torch.long))
    x = image(backbone, 3)
    with torch.no_grad():
        together = decode(backbone.spec, backbone.mask_decoder, backbone.encode(x), backbone.embed_prompts(prompts))
        for i in range(3):
            alone = backbone.embed_prompts(PromptSet(points_xy=xy[i : i + 1], labels=prompts.labels[i : i + 1]))
            out = decode(backbone.spec, backbone.mask_decoder, backbone.encode(x[i : i + 1]), alone)
            assert torch.allclose(out.masks[0], together.masks[i], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_empty_prompts_are_batched(make, name) -> None:
    backbone = make(name)
    spec = backbone.spec
    sparse, dense = backbone.embed_prompts(PromptSet(), pairs=3)
    assert sparse.shape == (3, 0, spec.prompt_width)
    assert dense.shape == (3, spec.prompt_width, spec.grid, spec.grid)
    none = (
        backbone.prompt_modules() if isinstance(backbone, nn.Module) and name in SAM_NAMES else backbone.prompt_encoder
    )
    assert torch.equal(dense[2, :, 0, 0], none.no_mask_embed.weight[0])


@pytest.mark.parametrize("name", NAMES)
def test_free_tokens_and_dense_pass_through(make, name) -> None:
    backbone = make(name)
    spec = backbone.spec
    tokens = torch.randn(2, 3, spec.prompt_width)
    dense = torch.randn(2, spec.prompt_width, spec.grid, spec.grid)
    sparse, out = backbone.embed_prompts(PromptSet(tokens=tokens, dense=dense))
    assert torch.equal(sparse, tokens) and torch.equal(out, dense)


@pytest.mark.parametrize("name", NAMES)
def test_mask_given_falls_back_per_pair(make, name) -> None:
    backbone = make(name)
    spec = backbone.spec
    given = PromptSet(masks=torch.randn(2, 1, spec.mask_size, spec.mask_size), mask_given=torch.tensor([True, False]))
    learned = torch.randn(2, spec.prompt_width, spec.grid, spec.grid)
    _, plain = backbone.embed_prompts(PromptSet(), pairs=2)
    _, mixed = backbone.embed_prompts(given)
    assert torch.equal(mixed[1], plain[1]) and not torch.allclose(mixed[0], plain[0])
    _, replaced = backbone.embed_prompts(PromptSet(masks=given.masks, mask_given=given.mask_given, dense=learned))
    assert torch.equal(replaced[1], learned[1]) and torch.equal(replaced[0], mixed[0])


@pytest.mark.parametrize("name", SAM_NAMES)
def test_nan_box_becomes_not_a_point(make, name) -> None:
    backbone = make(name)
    boxes = torch.tensor([[4.0, 5.0, 30.0, 40.0], [float("nan")] * 4])
    sparse, _ = backbone.embed_prompts(PromptSet(boxes_xy=boxes))
    nothing = backbone.prompt_modules().not_a_point_embed.weight[0]
    assert sparse.shape[1] == backbone.spec.box_tokens
    assert torch.equal(sparse[1], nothing.expand_as(sparse[1]))
    assert not torch.allclose(sparse[0, 0], nothing)


@pytest.mark.parametrize("name", SAM_NAMES)
def test_prompts_of_unequal_count_or_size_are_refused(make, name) -> None:
    backbone = make(name)
    with pytest.raises(PromptError, match="same number of pairs"):
        backbone.embed_prompts(PromptSet(boxes_xy=torch.zeros(2, 4), tokens=torch.zeros(3, 1, 32)))
    with pytest.raises(PromptError, match="Mask prompts must be"):
        backbone.embed_prompts(PromptSet(masks=torch.zeros(1, 1, 7, 7)))
    with pytest.raises(PromptError, match="one label each"):
        backbone.embed_prompts(PromptSet(points_xy=torch.zeros(1, 1, 2)))


@pytest.mark.parametrize("name", NAMES)
def test_coordinates_have_finite_gradients(make, name) -> None:
    backbone = make(name)
    xy = torch.tensor([[[8.0, 8.0]], [[40.0, 20.0]]], requires_grad=True)
    boxes = torch.tensor([[4.0, 5.0, 30.0, 40.0], [float("nan")] * 4], requires_grad=True)
    prompts = PromptSet(points_xy=xy, labels=torch.ones(2, 1, dtype=torch.long), boxes_xy=boxes)
    sparse, dense = backbone.embed_prompts(prompts)
    (sparse.pow(2).sum() + sparse.sum() + dense.sum()).backward()
    assert torch.isfinite(xy.grad).all() and xy.grad.abs().max() > 0
    assert torch.isfinite(boxes.grad[0]).all() and boxes.grad[0].abs().max() > 0
    assert torch.equal(boxes.grad[1], torch.zeros(4))


@pytest.mark.parametrize("name", NAMES)
def test_paths_name_modules(make, name) -> None:
    backbone = make(name)
    paths = backbone.paths
    assert all(isinstance(backbone.get_submodule(path), nn.Module) for path in paths.values())
    for canonical in (
        "enc.block[0].attn.qkv",
        "enc.block[0].attn.proj",
        "enc.block[0].mlp.fc1",
        "enc.block[0].mlp.fc2",
    ):
        assert isinstance(backbone.get_submodule(paths[canonical]), nn.Linear)
    for attention in ("dec.layer[0].self", "dec.layer[1].t2i", "dec.layer[1].i2t", "dec.final"):
        assert all(
            isinstance(backbone.get_submodule(paths[f"{attention}.{p}"]), nn.Linear) for p in ("q", "k", "v", "out")
        )
    assert backbone.get_submodule(paths["dec"]) is backbone.mask_decoder


@pytest.mark.parametrize("name", [n for n in NAMES if n != "compact"])
def test_build_is_frozen(small_row, name) -> None:
    row = small_row(name)
    backbone = plugins.load("backbones", row.module).build(row)
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_meta_build_filled_from_state_gives_the_same_masks(make, small_row, name) -> None:
    source, row = make(name), small_row(name)
    with torch.device("meta"):
        copy = plugins.load("backbones", row.module).build(row)
    assert all(p.is_meta for p in copy.parameters())
    load_into(copy, source.state_dict(), WeightsEntry("x.pt"), digest="abc")
    assert copy.weights_id == "abc"
    assert torch.equal(masks(source, click(9, 9)), masks(copy, click(9, 9)))
