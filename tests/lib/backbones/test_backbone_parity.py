"""Our encode, embed_prompts and decode against the stock packages, float32, random weights, to 1e-4 (METHODS 7.1)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib import plugins
from lib.config import BackboneRow, backbone_row
from lib.contracts import Backbone, PromptSet
from lib.decoder import decode

TOLERANCE = 1e-4


def randomised(row: BackboneRow, seed: int = 0) -> Backbone:
    """Built and shaken, so that zero-initialised parts (position embeddings, biases, statistics) take part."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = plugins.load("backbones", row.module).build(row)
        for name, value in backbone.state_dict().items():
            if value.is_floating_point():
                value += 0.02 * torch.rand_like(value) if name.endswith("var") else 0.02 * torch.randn_like(value)
    return backbone


def prompt_sets(spec) -> dict[str, PromptSet]:
    """One prompt of each geometry for one pair."""
    s, m = spec.input_size, spec.mask_size
    points = {"points_xy": torch.tensor([[[0.3 * s, 0.4 * s], [0.8 * s, 0.1 * s]]]), "labels": torch.tensor([[1, 0]])}
    box = {"boxes_xy": torch.tensor([[0.1 * s, 0.2 * s, 0.7 * s, 0.9 * s]])}
    mask = {"masks": 4 * torch.randn(1, 1, m, m, generator=torch.Generator().manual_seed(3))}
    padded = {"points_xy": points["points_xy"], "labels": torch.tensor([[1, -1]])}
    sets = {"none": {}, "points": points, "padded": padded, "box": box, "points+box": points | box}
    sets |= {"mask": mask, "points+mask": points | mask, "all": points | box | mask}
    return {name: PromptSet(**parts) for name, parts in sets.items()}


def picture(spec, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, spec.input_size, spec.input_size, generator=torch.Generator().manual_seed(5))


def ours(backbone: Backbone, features, prompts: PromptSet):
    return decode(backbone.spec, backbone.mask_decoder, features, backbone.embed_prompts(prompts))


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    scale = max(1.0, float(b.abs().max()))
    assert float((a - b).abs().max()) < TOLERANCE * scale


# --- SAM 1 ---------------------------------------------------------------------------------------------------------


def stock_sam1(backbone: Backbone, size: dict):
    """The package's own encoder, prompt encoder and decoder with our weights."""
    from functools import partial

    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer

    spec = backbone.spec
    e, grid, side = spec.prompt_width, spec.grid, spec.input_size
    encoder = ImageEncoderViT(
        img_size=side, patch_size=16, embed_dim=size["embed_dim"], depth=size["depth"], num_heads=size["num_heads"],
        mlp_ratio=4, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), qkv_bias=True, use_rel_pos=True,
        global_attn_indexes=size["global_blocks"], window_size=14, out_chans=e,
    )  # fmt: skip
    prompt = PromptEncoder(
        embed_dim=e, image_embedding_size=(grid, grid), input_image_size=(side, side), mask_in_chans=16
    )
    decoder = MaskDecoder(
        num_multimask_outputs=3, transformer_dim=e, iou_head_depth=3, iou_head_hidden_dim=256,
        transformer=TwoWayTransformer(depth=2, embedding_dim=e, mlp_dim=2048, num_heads=8),
    )  # fmt: skip
    for module, ours_ in (
        (encoder, backbone.image_encoder),
        (prompt, backbone.prompt_encoder),
        (decoder, backbone.mask_decoder),
    ):
        module.load_state_dict(ours_.state_dict())
        module.eval()
    return encoder, prompt, decoder


def stock_sam1_decode(prompt, decoder, embed, prompts: PromptSet, prob: bool):
    points = None if prompts.points_xy is None else (prompts.points_xy, prompts.labels)
    masks = prompts.masks if prompts.masks is None or not prob else prompts.masks.sigmoid()
    sparse, dense = prompt(points=points, boxes=prompts.boxes_xy, masks=masks)
    arguments = {"image_embeddings": embed, "image_pe": prompt.get_dense_pe(), "sparse_prompt_embeddings": sparse}
    single = decoder(**arguments, dense_prompt_embeddings=dense, multimask_output=False)
    multi = decoder(**arguments, dense_prompt_embeddings=dense, multimask_output=True)
    return torch.cat([single[0], multi[0]], 1), torch.cat([single[1], multi[1]], 1)


@torch.no_grad()
def check_sam1(row: BackboneRow) -> None:
    backbone = randomised(row)
    encoder, prompt, decoder = stock_sam1(backbone, row.size)
    x = picture(backbone.spec)
    features = backbone.encode(x)
    assert_close(features.embed, encoder(x))
    assert_close(features.pe, prompt.get_dense_pe())
    for prompts in prompt_sets(backbone.spec).values():
        masks, iou = stock_sam1_decode(
            prompt, decoder, features.embed, prompts, row.spec.get("mask_prompt_domain") == "prob"
        )
        out = ours(backbone, features, prompts)
        assert_close(out.masks, masks)
        assert_close(out.iou, iou)
        assert out.obj is None


@pytest.mark.parametrize("name", ["sam_vit_b", "medsam"])
def test_small_sam_equals_stock(small_row, name) -> None:
    check_sam1(small_row(name))


def test_real_vit_b_at_256_equals_stock() -> None:
    row = backbone_row("sam_vit_b")
    check_sam1(replace(row, spec={**row.spec, "input_size": 256}, size={**row.size, "image_size": 256}))


@torch.no_grad()
def test_sam1_other_side_resizes_the_position_embedding(small_row) -> None:
    """Parameters made for 64, input 128: as the stock encoder with its embedding resized by hand."""
    row = small_row("sam_vit_b", input_size=128)
    backbone = randomised(row)
    from lib.backbones.sam import Sam, SamSize

    at_128 = Sam(backbone.spec, SamSize(**{**row.size, "image_size": 128})).eval().image_encoder
    state = backbone.image_encoder.state_dict()
    maps = F.interpolate(state["pos_embed"].permute(0, 3, 1, 2), (8, 8), mode="bicubic").permute(0, 2, 3, 1)
    at_128.pos_embed.data = maps
    for key, value in state.items():
        if key.startswith("blocks") and "rel_pos" in key:
            new = at_128.get_parameter(key)
            new.data = F.interpolate(value.T[None], new.shape[0], mode="linear")[0].T
        elif key != "pos_embed":
            at_128.state_dict()[key].copy_(value)
    x = picture(backbone.spec)
    assert_close(backbone.encode(x).embed, at_128(x))


@torch.no_grad()
def test_sam1_several_images_in_one_batch_equal_stock_one_by_one(small_row) -> None:
    row = small_row("sam_vit_b")
    backbone = randomised(row)
    _, prompt, decoder = stock_sam1(backbone, row.size)
    features = backbone.encode(picture(backbone.spec, 2))
    xy = torch.tensor([[[5.0, 9.0]], [[50.0, 40.0]], [[20.0, 30.0]]])
    prompts = PromptSet(points_xy=xy, labels=torch.tensor([[1], [0], [1]]))
    index = torch.tensor([1, 0, 1])
    out = decode(
        backbone.spec, backbone.mask_decoder, features, backbone.embed_prompts(prompts), image_index=index, max_pairs=2
    )
    for pair, image in enumerate(index):
        alone = PromptSet(points_xy=xy[pair : pair + 1], labels=prompts.labels[pair : pair + 1])
        masks, iou = stock_sam1_decode(prompt, decoder, features.embed[image : image + 1], alone, prob=False)
        assert_close(out.masks[pair : pair + 1], masks)
        assert_close(out.iou[pair : pair + 1], iou)


@torch.no_grad()
def test_med2d_block_equals_the_written_formula(small_row) -> None:
    """x + attention, then x + MLP(LN x) + Adapter(LN x), against stock blocks and functional calls (METHODS 5.1)."""
    from segment_anything.modeling.image_encoder import Block

    backbone = randomised(small_row("sam_med2d"))
    for block, window in zip(backbone.image_encoder.blocks, (14, 0, 14, 0)):
        size = (4, 4) if window == 0 else (14, 14)
        stock = Block(dim=32, num_heads=2, use_rel_pos=True, window_size=window, input_size=(4, 4))
        stock.norm1.eps = stock.norm2.eps = 1e-6
        state = block.state_dict()
        stock.load_state_dict({k: v for k, v in state.items() if not k.startswith("Adapter")})
        assert stock.attn.rel_pos_h.shape[0] == 2 * size[0] - 1
        x = torch.randn(2, 4, 4, 32)
        seen = {}
        stock.norm2.register_forward_hook(lambda m, i, o, seen=seen: seen.update(normed=o))
        plain = stock(x)
        assert_close(block(x), plain + written_adapter(state, seen["normed"]))


def written_adapter(state, x: torch.Tensor) -> torch.Tensor:
    nchw = x.permute(0, 3, 1, 2)
    pooled = F.adaptive_avg_pool2d(nchw, 1).flatten(1)
    gate = torch.sigmoid(F.relu(pooled @ state["Adapter.channel.0.weight"].T) @ state["Adapter.channel.2.weight"].T)
    spatial = F.relu(F.conv2d(nchw * gate[:, :, None, None], state["Adapter.spatial.0.weight"], stride=2, padding=1))
    spatial = F.relu(F.conv_transpose2d(spatial, state["Adapter.spatial.2.weight"], stride=2, padding=1))
    added = (nchw + spatial).permute(0, 2, 3, 1)
    return F.layer_norm(added, (32,), state["Adapter.norm.weight"], state["Adapter.norm.bias"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["sam_med2d", "mobile_sam"])
def test_prompts_and_decoder_of_other_encoders_equal_stock(small_row, name) -> None:
    row = small_row(name)
    backbone = randomised(row)
    prompt, decoder = stock_prompt_and_decoder(backbone)
    features = backbone.encode(picture(backbone.spec))
    for prompts in prompt_sets(backbone.spec).values():
        masks, iou = stock_sam1_decode(prompt, decoder, features.embed, prompts, prob=name == "sam_med2d")
        out = ours(backbone, features, prompts)
        assert_close(out.masks, masks)
        assert_close(out.iou, iou)


def stock_prompt_and_decoder(backbone: Backbone):
    size = {"embed_dim": 16, "depth": 1, "num_heads": 1, "global_blocks": [0]}
    holder = type("Holder", (), {})()
    holder.spec, holder.prompt_encoder, holder.mask_decoder = (
        backbone.spec,
        backbone.prompt_encoder,
        backbone.mask_decoder,
    )
    from lib.backbones.sam import SamSize, _image_encoder

    holder.image_encoder = _image_encoder(
        SamSize(**size, image_size=backbone.spec.input_size), backbone.spec.prompt_width
    )
    return stock_sam1(holder, size)[1:]


# --- MobileSAM -----------------------------------------------------------------------------------------------------


def timm_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Our keys under timm's names."""
    renames = ((".c.", ".conv."), ("seq.0.", "conv1."), ("seq.2.", "conv2."))
    state = {}
    for key, value in module.state_dict().items():
        key = f".{key}"
        for a, b in renames:
            key = key.replace(a, b)
        state[key[1:]] = value
    return state


@torch.no_grad()
def test_tiny_vit_parts_equal_timm(small_row) -> None:
    from timm.models import tiny_vit

    encoder = randomised(small_row("mobile_sam")).image_encoder
    gelu = torch.nn.GELU
    block = encoder.layers[1].blocks[0]
    pairs = (
        (encoder.patch_embed, tiny_vit.PatchEmbed(3, 8, gelu), (2, 3, 64, 64)),
        (encoder.layers[0].blocks[0], tiny_vit.MBConv(8, 8, 4.0, gelu, 0.0), (2, 8, 16, 16)),
        (encoder.layers[0].downsample, tiny_vit.PatchMerging(8, 8, gelu), (2, 8, 16, 16)),
        (block, tiny_vit.TinyVitBlock(8, 1, window_size=7), (2, 10, 12, 8)),
        (encoder.layers[2].blocks[0], tiny_vit.TinyVitBlock(16, 2, window_size=14), (1, 14, 14, 16)),
    )
    for mine, theirs, shape in pairs:
        theirs.load_state_dict(timm_state(mine))
        theirs.eval()
        x = torch.randn(shape)
        assert_close(mine(x.clone()), theirs(x.clone()))


@torch.no_grad()
def test_mobile_sam_merging_into_the_last_widths_keeps_resolution(small_row) -> None:
    encoder = randomised(small_row("mobile_sam")).image_encoder
    strides = [encoder.layers[i].downsample.conv2.c.stride[0] for i in range(3)]
    assert strides == [2, 2, 1]


@torch.no_grad()
def test_batch_norm_statistics_survive_train_mode(small_row) -> None:
    backbone = randomised(small_row("mobile_sam"))
    x = picture(backbone.spec)
    before = backbone.encode(x).embed
    backbone.train()
    backbone.encode(x)
    assert torch.equal(backbone.eval().encode(x).embed, before)


# --- SAM 2 ---------------------------------------------------------------------------------------------------------


def stock_sam2(backbone: Backbone, version: str, letter: str) -> torch.nn.Module:
    """The package's whole model from its own YAML with our image weights."""
    import sam2
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    file = Path(sam2.__file__).parent / "configs" / version / f"{version}_hiera_{letter}.yaml"
    config = OmegaConf.load(file).model
    config.image_size = backbone.spec.input_size
    model = instantiate(config, _recursive_=True).eval()
    wrong = model.load_state_dict(backbone.state_dict(), strict=False).unexpected_keys
    assert not wrong
    return model


@pytest.mark.parametrize("version, size, letter", [("sam2.1", "tiny", "t"), ("sam2", "tiny", "t")])
@torch.no_grad()
def test_hiera_tiny_at_256_equals_the_stock_image_predictor(version, size, letter) -> None:
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    row = backbone_row(f"{version}_{size}")
    backbone = randomised(replace(row, spec={**row.spec, "input_size": 256}))
    predictor = SAM2ImagePredictor(stock_sam2(backbone, version, letter))
    predictor._bb_feat_sizes = [(64, 64), (32, 32), (16, 16)]  # fixed to 1024 in the package
    pixels = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    predictor.set_image(pixels)
    x = predictor._transforms(pixels)[None]
    features = backbone.encode(x)
    assert_close(features.embed, predictor._features["image_embed"])
    for mine, theirs in zip(features.high_res, predictor._features["high_res_feats"]):
        assert_close(mine, theirs)
    for prompts in prompt_sets(backbone.spec).values():
        arguments = (prompts.points_xy, prompts.labels, prompts.boxes_xy, prompts.masks)
        single = predictor._predict(*arguments, multimask_output=False, return_logits=True)
        multi = predictor._predict(*arguments, multimask_output=True, return_logits=True)
        out = ours(backbone, features, prompts)
        assert_close(out.masks.clamp(-32, 32), torch.cat([single[2], multi[2]], 1))
        assert_close(out.iou, torch.cat([single[1], multi[1]], 1))


@torch.no_grad()
def test_sam2_objectness_equals_stock_decoder(small_row) -> None:
    backbone = randomised(small_row("sam2.1_tiny"))
    features = backbone.encode(picture(backbone.spec, 2))
    xy = torch.tensor([[[5.0, 9.0]], [[50.0, 40.0]]])
    prompts = PromptSet(points_xy=xy, labels=torch.ones(2, 1, dtype=torch.long))
    sparse, dense = backbone.embed_prompts(prompts)
    masks, iou, tokens, obj = backbone.mask_decoder(
        image_embeddings=features.embed, image_pe=features.pe, sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense, multimask_output=True, repeat_image=False,
        high_res_features=list(features.high_res),
    )  # fmt: skip
    out = ours(backbone, features, prompts)
    assert_close(out.masks[:, 1:], masks)
    assert_close(out.iou[:, 1:], iou)
    assert_close(out.mask_tokens[:, 1:], tokens)
    assert_close(out.obj, obj)


@torch.no_grad()
def test_sam2_box_as_two_tokens_equals_boxes_argument_of_stock(small_row) -> None:
    backbone = randomised(small_row("sam2.1_tiny", box_tokens=2))
    boxes = torch.tensor([[3.0, 4.0, 50.0, 60.0]])
    sparse, dense = backbone.embed_prompts(PromptSet(boxes_xy=boxes))
    stock = backbone.sam_prompt_encoder(points=None, boxes=boxes, masks=None)
    assert_close(sparse, stock[0])
    assert_close(dense, stock[1])


@torch.no_grad()
def test_mask_logits_beyond_32_are_clamped_for_sam2(small_row) -> None:
    backbone = randomised(small_row("sam2.1_tiny"))
    strong = torch.full((1, 1, 16, 16), 100.0)
    dense = [backbone.embed_prompts(PromptSet(masks=m))[1] for m in (strong, strong.clamp(max=32.0))]
    assert torch.equal(*dense)
