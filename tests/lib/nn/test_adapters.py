"""Adapters: identity at the start, their own place, nothing shared that is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib.loading import load_backbone
from lib.nn.adapters import (
    BesideMlp,
    BottleneckBefore,
    LightParallelAdapter,
    LoraLinear,
    ParallelAdapter,
    bottleneck,
    clone,
    inject,
    lora,
    parallel,
    unshare,
)

BLOCKS = r"enc\.block\[\d+\]"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny():
    return load_backbone("tiny", random_seed=0)


def image(backbone) -> torch.Tensor:
    side = backbone.spec.input_size
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))


def embed(backbone) -> torch.Tensor:
    with torch.no_grad():
        return backbone.encode(image(backbone)).embed


def test_lora_by_hand() -> None:
    layer = LoraLinear(nn.Linear(2, 2), rank=1)
    x = torch.tensor([[1.0, 2.0]])
    assert torch.equal(layer(x), layer.base(x))
    with torch.no_grad():
        layer.down.copy_(torch.tensor([[3.0, 4.0]]))
        layer.up.copy_(torch.tensor([[1.0], [-1.0]]))
    assert torch.allclose(layer(x), layer.base(x) + torch.tensor([[11.0, -11.0]]))


@pytest.mark.parametrize("channels_first", [True, False])
def test_bottleneck_is_identity_until_it_is_trained(channels_first) -> None:
    torch.manual_seed(0)
    shape = (2, 6, 3, 5) if channels_first else (2, 3, 5, 6)
    part, x = BottleneckBefore(nn.Identity(), 6, 4, channels_first), torch.randn(shape)
    assert torch.equal(part(x), x)
    with torch.no_grad():
        part.up.bias.fill_(1.0)
    gelu_of_1 = 0.8413447
    assert torch.allclose(part(x), x + gelu_of_1)


def test_bottleneck_layouts_agree() -> None:
    torch.manual_seed(0)
    first = BottleneckBefore(nn.Identity(), 6, 4, True)
    last = BottleneckBefore(nn.Identity(), 6, 4, False)
    for p in first.parameters():
        nn.init.normal_(p)
    last.load_state_dict(first.state_dict())
    x = torch.randn(2, 6, 3, 5)
    assert torch.allclose(first(x), last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), atol=1e-6)
    assert not torch.allclose(first(x), x, atol=0.1)


def test_bottleneck_in_compact_keeps_and_then_changes_features() -> None:
    plain = load_backbone("compact", random_seed=0)
    changed = clone(plain)
    added = inject(changed, bottleneck(BLOCKS, changed, 8))
    assert len(added) == 4 * 4
    assert torch.equal(embed(changed), embed(plain))
    with torch.no_grad():
        changed.get_parameter(next(n for n in added if n.endswith("up.bias"))).fill_(1.0)
    assert not torch.allclose(embed(changed), embed(plain), atol=1e-3)


@pytest.mark.parametrize("pattern", ["nowhere", "de", r"dec\.layer\[7\]\.self\.q", r"dec\.fina"])  # matched whole
def test_pattern_that_matches_nothing_is_refused(tiny, pattern) -> None:
    with pytest.raises(ValueError, match="tiny has no layer"):
        inject(clone(tiny), [lora(pattern, 2)])


@pytest.mark.parametrize("pattern", ["nowhere", r"enc\.block\[9\]", r"enc\.block\[()\]"])
def test_bottleneck_that_matches_nothing_is_refused(tiny, pattern) -> None:
    with pytest.raises(ValueError, match="tiny has no layer"):
        bottleneck(pattern, tiny)


def test_inject_names_what_it_adds(tiny) -> None:
    copy = clone(tiny)
    names = inject(copy, [lora(r"dec\.final\.[qv]", 2), *bottleneck(BLOCKS, copy, 3)])
    final = "mask_decoder.transformer.final_attn_token_to_image"
    assert set(names) == {
        *(f"{final}.{p}_proj.{part}" for p in "qv" for part in ("down", "up")),
        *(f"image_encoder.stage16.0.{layer}.{part}" for layer in ("down", "up") for part in ("weight", "bias")),
    }
    shapes = {n: tuple(copy.get_parameter(n).shape) for n in names}
    assert shapes[f"{final}.q_proj.down"] == (2, 32) and shapes[f"{final}.q_proj.up"] == (16, 2)
    assert shapes["image_encoder.stage16.0.down.weight"] == (3, 32)
    assert all(copy.get_parameter(n).requires_grad for n in names)


def test_clones_are_independent(tiny) -> None:
    before, layout = embed(tiny), list(tiny.state_dict())
    one, two = clone(tiny), clone(tiny)
    for copy in (one, two):
        inject(copy, bottleneck(BLOCKS, copy, 3))
    first, second = ({id(p) for p in copy.parameters()} - {id(p) for p in tiny.parameters()} for copy in (one, two))
    assert len(first) == len(second) == 4 and not first & second
    with torch.no_grad():
        one.get_parameter("image_encoder.stage16.0.up.bias").fill_(1.0)
    assert not torch.allclose(embed(one), before, atol=1e-3)
    assert torch.equal(embed(two), before) and torch.equal(embed(tiny), before)
    assert list(tiny.state_dict()) == layout


def test_clone_shares_tensors_and_nothing_else(tiny) -> None:
    copy = clone(tiny)
    theirs = {n: t.data_ptr() for n, t in tiny.state_dict().items()}
    assert {n: t.data_ptr() for n, t in copy.state_dict().items()} == theirs
    assert not {id(m) for m in copy.modules()} & {id(m) for m in tiny.modules()}
    copy.paths["enc"] = "elsewhere"
    assert tiny.paths["enc"] == "image_encoder"


def test_unshare_gives_own_equal_trainable_tensors(tiny) -> None:
    copy, name = clone(tiny), "mask_decoder.mask_tokens.weight"
    unshare(copy, [name])
    own, theirs = copy.get_parameter(name), tiny.get_parameter(name)
    assert torch.equal(own, theirs) and own.data_ptr() != theirs.data_ptr()
    assert own.requires_grad and not theirs.requires_grad
    assert [n for n, p in copy.named_parameters() if p.requires_grad] == [name]


ADAPTERS = [LightParallelAdapter(8, 4), ParallelAdapter(8)]


@pytest.mark.parametrize("wide, parameters", [(True, 15_042_048), (False, 383_232)])
def test_parallel_adapters_have_the_published_size(wide, parameters) -> None:
    with torch.device("meta"):
        adapter = ParallelAdapter(768) if wide else LightParallelAdapter(768)
    assert sum(p.numel() for p in adapter.parameters()) == parameters


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("name", ["tiny", "compact"])
def test_parallel_adapter_keeps_and_then_changes_features(name, wide) -> None:
    plain = load_backbone(name, random_seed=0)
    changed = clone(plain)
    added = inject(changed, parallel(BLOCKS, changed, wide=wide))
    assert torch.equal(embed(changed), embed(plain))
    zero = [n for n in added if not changed.get_parameter(n).any() and not n.endswith("bias")]
    assert len(zero) == len([n for n in plain.paths if n.startswith("enc.block") and n.endswith("]")])
    with torch.no_grad():
        changed.get_parameter(zero[0]).fill_(1.0)
    assert not torch.allclose(embed(changed), embed(plain), atol=1e-4)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("side", [1, 3, 4, 5])
def test_parallel_adapter_takes_odd_sides_and_flat_tokens(adapter, side) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.1 * torch.randn_like(p)
        x = torch.randn(2, side, side, 8)
        found = BesideMlp(nn.Identity(), adapter)(x)
        assert found.shape == x.shape and not torch.allclose(found, x)
        flat = BesideMlp(nn.Identity(), adapter)(x.flatten(1, 2))
    assert torch.allclose(flat.view(x.shape), found, atol=1e-6)


def test_parallel_adapter_that_matches_nothing_is_refused(tiny) -> None:
    with pytest.raises(ValueError, match="tiny has no layer"):
        parallel("nowhere", tiny)
