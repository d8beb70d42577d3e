"""Parameter counts, key counts and canonical paths of every official size, on the meta device (METHODS 1.3, 1.4)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib import plugins
from lib.config import backbone_row
from lib.contracts import Backbone

CLASSIFIER = 321_640  # MobileSAM's unused norm and 320 -> 1000 head
OURS = {  # name: (keys, parameters)
    "sam_vit_b": (314, 93_735_472),
    "sam_vit_l": (482, 312_342_832),
    "sam_vit_h": (594, 641_090_608),
    "medsam": (314, 93_735_472),
    "sam_med2d": (386, 271_241_776),
    "mobile_sam": (439 - 4, 10_130_092 - CLASSIFIER),
}
OFFICIAL_SAM2 = {"tiny": ("t", 38.9e6), "small": ("s", 46.0e6), "base_plus": ("b+", 80.8e6), "large": ("l", 224.4e6)}
GLOBAL_BLOCKS = {"sam_vit_b": (2, 5, 8, 11), "sam_vit_l": (5, 11, 17, 23), "sam_vit_h": (7, 15, 23, 31)}


def on_meta(name: str) -> Backbone:
    row = backbone_row(name)
    with torch.device("meta"):
        return plugins.load("backbones", row.module).build(row)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def official_sam2(version: str, size: str) -> torch.nn.Module:
    """The full video model from the package's own YAML, on the meta device."""
    import sam2
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from lib.backbones.sam2 import _LinspaceOnCpu

    file = Path(sam2.__file__).parent / "configs" / version / f"{version}_hiera_{size}.yaml"
    with torch.device("meta"), _LinspaceOnCpu():
        return instantiate(OmegaConf.load(file).model, _recursive_=True)


@pytest.mark.parametrize("name", OURS)
def test_keys_and_parameters_of_sam1(name) -> None:
    backbone = on_meta(name)
    keys, parameters = OURS[name]
    assert len(backbone.state_dict()) == keys
    assert count(backbone) == parameters
    assert count(backbone.mask_decoder) == 4_058_340
    assert count(backbone.mask_decoder.transformer) == 3_291_264
    assert count(backbone.mask_decoder.output_upscaling) == 73_952
    assert count(backbone.mask_decoder.output_hypernetworks_mlps) == 559_232
    assert count(backbone.prompt_encoder) == 6_220
    prefixes = {key.split(".")[0] for key in backbone.state_dict()}
    assert prefixes == {"image_encoder", "prompt_encoder", "mask_decoder"}


@pytest.mark.parametrize("version", ["sam2", "sam2.1"])
@pytest.mark.parametrize("size", OFFICIAL_SAM2)
def test_sam2_holds_the_official_keys_less_the_declared(version, size) -> None:
    letter, parameters = OFFICIAL_SAM2[size]
    official = official_sam2(version, letter)
    assert count(official) == pytest.approx(parameters, rel=0.003)
    ignore = backbone_row(f"{version}_{size}").weights.ignore
    expected = {k: v.shape for k, v in official.state_dict().items() if not k.startswith(ignore)}
    ours = on_meta(f"{version}_{size}")
    assert {k: v.shape for k, v in ours.state_dict().items()} == expected
    assert all(any(k.startswith(p) for k in official.state_dict()) for p in ignore)


def test_sam2_decoder_parts() -> None:
    decoder = on_meta("sam2.1_tiny").mask_decoder
    assert count(decoder) == 4_215_109
    assert count(decoder.conv_s0) + count(decoder.conv_s1) == 24_672
    assert count(decoder.obj_score_token) + count(decoder.pred_obj_score_head) == 132_097


def test_med2d_adapter_has_the_published_size_and_keys() -> None:
    block = on_meta("sam_med2d").image_encoder.blocks[0]
    assert count(block.Adapter) == 15_042_048
    expected = {f"{p}.weight" for p in ("channel.0", "channel.2", "spatial.0", "spatial.2", "norm")} | {"norm.bias"}
    assert set(block.Adapter.state_dict()) == expected
    assert block.attn.rel_pos_h.shape == (27, 64)
    assert on_meta("sam_med2d").image_encoder.blocks[2].attn.rel_pos_h.shape == (31, 64)
    assert on_meta("sam_med2d").image_encoder.pos_embed.shape == (1, 16, 16, 768)


def test_mobile_sam_has_the_official_layout() -> None:
    backbone = on_meta("mobile_sam")
    keys = set(backbone.state_dict())
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 27
    for key in ("patch_embed.seq.2.c.weight", "layers.0.blocks.1.conv3.bn.running_var",
                "layers.0.downsample.conv2.c.weight",
                "layers.2.blocks.5.attn.attention_biases", "layers.1.blocks.0.local_conv.bn.num_batches_tracked",
                "layers.3.blocks.1.mlp.norm.weight", "neck.3.bias"):  # fmt: skip
        assert f"image_encoder.{key}" in keys
    assert backbone.spec.pyramid == (
        ("patch_embed", 4, 64), ("stage0", 8, 128), ("stage1", 16, 160), ("stage2", 16, 320), ("stage3", 16, 320)
    )  # fmt: skip
    assert backbone.paths["enc.block[2]"] == "image_encoder.layers.2.blocks.0"
    assert len([p for p in backbone.paths if p.startswith("enc.block") and p.endswith("]")]) == 10


@pytest.mark.parametrize("name", GLOBAL_BLOCKS)
def test_vit_taps_are_the_global_blocks(name) -> None:
    backbone = on_meta(name)
    blocks = backbone.image_encoder.blocks
    assert tuple(i for i, b in enumerate(blocks) if b.window_size == 0) == GLOBAL_BLOCKS[name]
    assert tuple(tap for tap, _, _ in backbone.spec.pyramid) == tuple(f"block{i}" for i in GLOBAL_BLOCKS[name])


@pytest.mark.parametrize(
    "size, ends",
    [("tiny", [0, 2, 9, 11]), ("small", [0, 2, 13, 15]), ("base_plus", [1, 4, 20, 23]), ("large", [1, 7, 43, 47])],
)
def test_sam2_stage_ends(size, ends) -> None:
    backbone = on_meta(f"sam2.1_{size}")
    assert backbone.image_encoder.trunk.stage_ends == ends
    assert [c for _, _, c in backbone.spec.pyramid] == list(reversed(backbone.image_encoder.trunk.channel_list))
    assert backbone.paths["dec.layer[1].mlp.fc1"] == "sam_mask_decoder.transformer.layers.1.mlp.layers.0"


def test_tiny_is_tiny() -> None:
    assert count(on_meta("tiny")) < 100_000
