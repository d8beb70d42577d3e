"""SAM ViT-B, L and H, MedSAM and SAM-Med2D (METHODS 1.3, 5.1, 5.2), from the ``segment_anything`` package's modules.

Official key layout: ``image_encoder.``, ``prompt_encoder.``, ``mask_decoder.``. Encoder blocks are NHWC. Another input
side than the one the weights were made for is served by resizing ``pos_embed``. Thread-safe in eval mode: no state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import Block, window_partition, window_unpartition
from torch import Tensor, nn

from lib.backbones._common import SamBackbone, decoder_paths, encoder_paths
from lib.config import BackboneRow, from_mapping
from lib.contracts import BackboneSpec, Features, no_grad_eval
from lib.nn.adapters import ParallelAdapter

PATCH = 16


@dataclass(frozen=True)
class SamSize:
    """Numbers of one ViT.

    Args:
        embed_dim: channels C of the blocks.
        depth: number of blocks.
        num_heads: attention heads.
        global_blocks: blocks that attend globally; their outputs are the taps.
        image_size: input side in pixels for which the parameters were made.
        adapter: True adds SAM-Med2D's adapter to every block.
        window: side of the local attention windows in tokens.
    """

    embed_dim: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]
    image_size: int
    adapter: bool = False
    window: int = 14


def build(row: BackboneRow) -> Sam:
    """The backbone of one YAML row with random weights, frozen; works under ``torch.device("meta")``.

    Raises:
        ConfigError: if the row has an unknown or missing key.
    """
    size = from_mapping(SamSize, row.size, f"{row.name}.size")
    spec = from_mapping(BackboneSpec, {"name": row.name, **row.spec}, f"{row.name}.spec")
    pyramid = tuple((f"block{i}", PATCH, size.embed_dim) for i in size.global_blocks)
    backbone = Sam(replace(spec, pyramid=pyramid), size)
    no_grad_eval(backbone)
    return backbone


class Sam(SamBackbone):
    """ViT encoder, prompt encoder and mask decoder behind :class:`lib.contracts.Backbone`."""

    def __init__(self, spec: BackboneSpec, size: SamSize) -> None:
        blocks = [f"image_encoder.blocks.{i}" for i in range(size.depth)]
        paths = encoder_paths(blocks, "mlp.lin1", "mlp.lin2") | {"enc.stem": "image_encoder.patch_embed"}
        paths |= decoder_paths("mask_decoder", "mlp.lin1", "mlp.lin2")
        super().__init__(spec, paths)
        self.image_encoder = _image_encoder(size, spec.prompt_width)
        self.prompt_encoder = prompt_encoder(spec)
        self.mask_decoder = mask_decoder(spec)

    def encode_maps(self, x: Tensor, taps: tuple[str, ...]) -> Features:
        """Image to embedding.

        Args:
            x: ``(B, 3, S, S)`` float32, normalised.
            taps: out of ``block<i>`` for the globally attending blocks, each ``(B, C, h, w)``.
        """
        encoder, kept = self.image_encoder, {}
        tokens = encoder.patch_embed(x)  # (B, h, w, C)
        tokens = tokens + _resized(encoder.pos_embed, tokens.shape[1])
        for i, block in enumerate(encoder.blocks):
            tokens = block(tokens)
            if f"block{i}" in taps:
                kept[f"block{i}"] = tokens.permute(0, 3, 1, 2)
        return Features(encoder.neck(tokens.permute(0, 3, 1, 2)), self.grid_encoding(), None, kept)


def prompt_encoder(spec: BackboneSpec) -> PromptEncoder:
    """SAM 1's prompt encoder for this input side and width."""
    grid, side = (spec.grid,) * 2, (spec.input_size,) * 2
    return PromptEncoder(
        embed_dim=spec.prompt_width, image_embedding_size=grid, input_image_size=side, mask_in_chans=16
    )


def mask_decoder(spec: BackboneSpec) -> MaskDecoder:
    """SAM 1's mask decoder for this width."""
    transformer = TwoWayTransformer(depth=2, embedding_dim=spec.prompt_width, mlp_dim=2048, num_heads=8)
    return MaskDecoder(transformer_dim=spec.prompt_width, transformer=transformer)


def neck(channels: int, width: int) -> nn.Sequential:
    """Encoder channels to prompt width: 1x1 and 3x3 convolution, each with a channel norm."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 1, bias=False),
        LayerNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        LayerNorm2d(width),
    )


def _image_encoder(size: SamSize, width: int) -> ImageEncoderViT:
    encoder = ImageEncoderViT(
        img_size=size.image_size,
        patch_size=PATCH,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        out_chans=width,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=size.window,
        global_attn_indexes=size.global_blocks,
    )
    if size.adapter:
        grid = size.image_size // PATCH
        encoder.blocks = nn.ModuleList(_adapter_block(size, i, grid) for i in range(size.depth))
    return encoder


def _resized(pos_embed: Tensor, grid: int) -> Tensor:
    if pos_embed.shape[1] == grid:
        return pos_embed
    maps = pos_embed.permute(0, 3, 1, 2)  # (1, C, h, w)
    return F.interpolate(maps, (grid, grid), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


class AdapterBlock(Block):
    """A ViT block with :class:`ParallelAdapter` beside its MLP (METHODS 5.1)."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, h, w, C)`` to the same shape."""
        attended, side = self.norm1(x), x.shape[1:3]
        if self.window_size > 0:
            attended, padded = window_partition(attended, self.window_size)
        attended = self.attn(attended)
        if self.window_size > 0:
            attended = window_unpartition(attended, self.window_size, padded, side)
        x = x + attended
        normed = self.norm2(x)
        return x + self.mlp(normed) + self.Adapter(normed)


def _adapter_block(size: SamSize, index: int, grid: int) -> AdapterBlock:
    block = AdapterBlock(
        dim=size.embed_dim,
        num_heads=size.num_heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=0 if index in size.global_blocks else size.window,
        input_size=(grid, grid),
    )
    block.Adapter = ParallelAdapter(size.embed_dim)  # the official spelling, so that released weights fit
    return block
