"""Depth-fused parts: by hand along the slices, identity at the start, and the modality adapter's channels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib.loading import load_backbone
from lib.nn.adapters import clone, inject
from lib.nn.depth import MIXES, Behind, Beside, DepthEmbedding, DepthFusedAdapter, DepthMix, ModalityAdapter, modality
from lib.nn.volume import VolumeContext


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("channels, parameters", [(768, 298_000), (256, 35_216)])
def test_adapter_has_the_published_size(channels, parameters) -> None:
    assert count(DepthFusedAdapter(channels, "fc", 16, VolumeContext())) == parameters


@pytest.mark.parametrize("kind", ["conv1d", "fc"])
@pytest.mark.parametrize("place", MIXES)
def test_parts_are_the_identity_until_they_are_trained(kind, place) -> None:
    volume, x = VolumeContext(), torch.randn(8, 3, 3, 8)
    adapter = DepthFusedAdapter(8, kind, 4, volume, place)
    with volume.spanning(4, 8):
        assert torch.equal(Behind(nn.Identity(), adapter)(x), x)
        assert torch.equal(Beside(nn.Identity(), adapter)(x), x)
        nn.init.ones_(adapter.up.bias)
        nn.init.zeros_(adapter.up.weight)
        assert torch.allclose(Behind(nn.Identity(), adapter)(x), x + 1)
        assert torch.allclose(Beside(nn.Identity(), adapter)(x), x + 0.5)


@pytest.mark.parametrize("place, added", [("none", 0.0), ("before", 2.0), ("inside", 4.0), ("after", 8.0)])
def test_depth_layer_stands_where_it_should(place, added) -> None:
    """It adds a constant, which passes the GELU only where the layer stands before it."""
    adapter, x = DepthFusedAdapter(4, "conv1d", 3, VolumeContext(), place), torch.randn(3, 4)
    with torch.no_grad():
        for p in adapter.parameters():
            p.zero_()
        adapter.down.weight[0, 0] = adapter.up.weight[0, 0] = 1.0
        if adapter.mix is not None:
            adapter.mix.second.bias[0] = added
        with adapter.volume.spanning(3, 3):
            found = adapter(x)[:, 0]
    gelu = torch.nn.functional.gelu
    torch.testing.assert_close(found, gelu(x[:, 0] + added) if place == "before" else gelu(x[:, 0]) + added)


def test_mix_by_hand() -> None:
    """Two volumes of three slices with two windows each: every window looks at the same window of the next slices."""
    mix = DepthMix(1, "conv1d", 3)
    with torch.no_grad():
        mix.first.weight.zero_()
        mix.first.bias.fill_(1.0)  # a constant, so that only what second adds is seen
        mix.second.weight.copy_(torch.tensor([[[0.0, 0.0, 2.0]]]))  # from the slice after
        x = torch.randn(12, 1)
        found = mix(x, (2, 3, 2)).view(2, 3, 2)
        gelu_of_1 = 0.8413447
        change = found - x.view(2, 3, 2)
        assert torch.allclose(change[:, :2], torch.full((2, 2, 2), 2 * gelu_of_1))
        assert torch.equal(change[:, 2], torch.zeros(2, 2))  # none comes after the last
        mix.first.weight[..., 1], mix.first.bias[:] = 1.0, 0.0
        found = mix(x, (2, 3, 2)).view(2, 3, 2) - x.view(2, 3, 2)
        after = 2 * torch.nn.functional.gelu(x.view(2, 3, 2)[:, 1:])
        assert torch.allclose(found[:, :2], after, atol=1e-6)


@pytest.mark.parametrize(
    "depth, expected", [(4, [0.0, 1.0, 2.0, 3.0]), (2, [0.5, 2.5]), (1, [1.5]), (8, [0, 0.25, 0.75, 1.25])]
)
def test_embedding_is_stretched(depth, expected) -> None:
    embedding = DepthEmbedding(1, 4)
    with torch.no_grad():
        embedding.slices.copy_(torch.arange(4.0)[:, None])
        assert embedding(depth).flatten()[: len(expected)].tolist() == pytest.approx(expected)


def test_modality_adapter_has_the_published_size() -> None:
    assert round(count(ModalityAdapter(1, 2)) / 1e3, 1) == 8.9


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("doublings", [0, 2])
def test_modality_adapter_starts_as_the_mean(channels, doublings) -> None:
    x = torch.randn(2, channels, 16, 16)
    with torch.no_grad():
        found = ModalityAdapter(channels, doublings)(x)
    assert found.shape == (2, 3, 16 * 2**doublings, 16 * 2**doublings)
    if not doublings:
        assert torch.equal(found, x if channels == 3 else x.mean(1, keepdim=True).expand(-1, 3, -1, -1))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_backbone_takes_as_many_channels_as_its_modality_adapter(channels) -> None:
    plain = load_backbone("tiny", random_seed=0)
    copy = clone(plain)
    added = inject(copy, [modality(channels)])
    side = plain.spec.input_size
    x = torch.randn(2, channels, side, side)
    with torch.no_grad():
        found, expected = copy.encode(x).embed, plain.encode(x.mean(1, keepdim=True).repeat(1, 3, 1, 1)).embed
    assert torch.allclose(found, expected, atol=1e-5)
    assert added and all(n.startswith("image_encoder.stem.0.") for n in added)
