"""Every family's encoder behind the modality adapter: shapes, step 0, and that it learns."""

from __future__ import annotations

import pytest
import torch

from lib.learned import PRESETS


@pytest.mark.parametrize("name", ["tiny", "compact", "sam_vit_b", "sam2.1_tiny", "mobile_sam"])
@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "frozen"])
def test_family_takes_channels_and_starts_at_their_mean(make, learn, name: str, channels: int, preset: str) -> None:
    plain = make(name)
    model = learn("self_prompt", plain, {"channels": channels, "slices": 2}, preset)
    side = model.spec.input_size
    x = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))
    found = model.encode(x, depth=2)
    expected = plain.encode(x.mean(1, keepdim=True).expand(-1, 3, -1, -1), model.method.taps)
    assert torch.allclose(found.embed, expected.embed, atol=1e-4)
    assert plain.spec.channels == 3
    found.embed.sum().backward()
    adapter = {n: p for n, p in model.named_parameters() if ".0.out." in n and p.requires_grad}
    assert len(adapter) == 2 and all(float(p.grad.abs().max()) > 0 for p in adapter.values())
