"""SAM-Med2D's checkpoint as its authors save it: keys, pickled optimiser, prompts in its own domain (METHODS 5)."""

from __future__ import annotations

import pytest
import torch

from lib import plugins
from lib.config import backbone_row
from lib.contracts import PromptSet
from lib.decoder import decode
from lib.errors import WeightsError
from lib.loading import load_into, load_state

ADAPTER = {  # official name inside a block to its shape at C = 768
    "Adapter.channel.0.weight": (192, 768),
    "Adapter.channel.2.weight": (768, 192),
    "Adapter.spatial.0.weight": (768, 768, 3, 3),
    "Adapter.spatial.2.weight": (768, 768, 4, 4),
    "Adapter.norm.weight": (768,),
    "Adapter.norm.bias": (768,),
}


def built(row, device: str = "cpu"):
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(4)
        return plugins.load("backbones", row.module).build(row)


def masks(backbone) -> torch.Tensor:
    side = backbone.spec.input_size
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2))
    prompts = PromptSet(points_xy=torch.tensor([[[9.0, 20.0]]]), labels=torch.tensor([[1]]))
    with torch.no_grad():
        return decode(backbone.spec, backbone.mask_decoder, backbone.encode(x), backbone.embed_prompts(prompts)).masks


def test_official_names_and_shapes() -> None:
    state = built(backbone_row("sam_med2d"), "meta").state_dict()
    for block in range(12):
        inside = f"image_encoder.blocks.{block}."
        found = {k.removeprefix(inside): tuple(v.shape) for k, v in state.items() if k.startswith(f"{inside}Adapter.")}
        assert found == ADAPTER
    assert tuple(state["image_encoder.pos_embed"].shape) == (1, 16, 16, 768)
    assert tuple(state["image_encoder.blocks.2.attn.rel_pos_h"].shape) == (31, 64)


def test_official_format_loads_and_answers_the_same(small_row, tmp_path) -> None:
    row = small_row("sam_med2d")
    source = built(row)
    steps = torch.optim.Adam(source.mask_decoder.parameters(), lr=1e-4)
    torch.save({"model": source.state_dict(), "optimizer": steps}, tmp_path / row.weights.file)
    loaded = built(row, "meta")
    load_into(loaded, load_state(tmp_path / row.weights.file, row.weights), row.weights, digest="d")
    assert loaded.weights_id == "d" and not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(masks(loaded), masks(source))


def test_checkpoint_without_adapters_is_refused_and_says_why(small_row) -> None:
    row = small_row("sam_med2d")
    state = {k: v for k, v in built(row).state_dict().items() if ".Adapter." not in k}
    with pytest.raises(WeightsError, match=r"24 missing: .*Adapter.*Choose the backbone that the file was made for"):
        load_into(built(row), state, row.weights, digest="d")


def test_mask_prompt_is_read_as_probability(small_row) -> None:
    backbone = built(small_row("sam_med2d"))
    logits = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        dense = backbone.embed_prompts(PromptSet(masks=logits))[1]
        assert torch.equal(dense, backbone.prompt_encoder.mask_downscaling(logits.sigmoid()))
