"""SAM 2 and SAM 2.1, image parts only, from the ``sam2`` package's modules (METHODS 1.3).

Official key layout: ``image_encoder.{trunk,neck}``, ``sam_prompt_encoder``, ``sam_mask_decoder``, ``no_mem_embed``; the
video parts of a checkpoint are declared as ignored in the YAML row. Importing ``sam2`` initialises Hydra globally
(and costs about a second), so it happens inside ``build``, never at import; ``build_sam`` and its device default are
not used. The stability fallback is off: it makes training and evaluation differ. Thread-safe in eval mode: no state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lib.backbones._common import SamBackbone, decoder_paths, encoder_paths
from lib.config import BackboneRow, from_mapping
from lib.contracts import BackboneSpec, Features, PromptSet, no_grad_eval

STRIDES = (4, 8, 16, 32)
SCALP = 1  # the stride-32 map feeds the pyramid but is not handed on
MASK_LOGIT_LIMIT = 32.0  # the official predictor clamps low-resolution masks before it reuses them


@dataclass(frozen=True)
class HieraSize:
    """Numbers of one Hiera trunk.

    Args:
        embed_dim: channels of the first stage; they double per stage.
        num_heads: attention heads of the first stage; they double per stage.
        stages: blocks per stage.
        global_blocks: blocks that attend globally.
        windows: window side per stage.
        pos_grid: side of the learned background position map.
    """

    embed_dim: int
    num_heads: int
    stages: tuple[int, int, int, int]
    global_blocks: tuple[int, ...]
    windows: tuple[int, int, int, int]
    pos_grid: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels per stage, finest first."""
        return tuple(self.embed_dim * 2**i for i in range(len(self.stages)))


def build(row: BackboneRow) -> Sam2:
    """The backbone of one YAML row with random weights, frozen; works under ``torch.device("meta")``.

    Side effect: the first call imports ``sam2``, which initialises Hydra for the process.

    Raises:
        ConfigError: if the row has an unknown or missing key.
    """
    size = from_mapping(HieraSize, row.size, f"{row.name}.size")
    spec = from_mapping(BackboneSpec, {"name": row.name, **row.spec}, f"{row.name}.spec")
    pyramid = tuple((f"stage{i}", STRIDES[i], width) for i, width in enumerate(size.widths))
    backbone = Sam2(replace(spec, pyramid=pyramid), size)
    no_grad_eval(backbone)
    return backbone


class Sam2(SamBackbone):
    """Hiera encoder, prompt encoder and mask decoder behind :class:`lib.contracts.Backbone`."""

    prompt_attribute = "sam_prompt_encoder"

    image_encoder: Any
    sam_mask_decoder: Any

    def __init__(self, spec: BackboneSpec, size: HieraSize) -> None:
        blocks = [f"image_encoder.trunk.blocks.{i}" for i in range(sum(size.stages))]
        fc = ("mlp.layers.0", "mlp.layers.1")
        stem = {"enc.stem": "image_encoder.trunk.patch_embed"}
        super().__init__(spec, encoder_paths(blocks, *fc) | stem | decoder_paths("sam_mask_decoder", *fc))
        self.image_encoder = _image_encoder(size, spec.prompt_width)
        self.sam_prompt_encoder = _prompt_encoder(spec)
        self.sam_mask_decoder = _mask_decoder(spec)
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, spec.prompt_width))
        nn.init.trunc_normal_(self.no_mem_embed, std=0.02)

    @property
    def mask_decoder(self) -> nn.Module:
        """The decoder, under the name of the contract."""
        return self.sam_mask_decoder

    def encode_maps(self, x: Tensor, taps: tuple[str, ...]) -> Features:
        """Image to embedding and high-resolution maps.

        Args:
            x: ``(B, 3, S, S)`` float32, normalised; S is a multiple of 32.
            taps: out of ``stage0`` to ``stage3`` (strides 4 to 32), each ``(B, C, S/stride, S/stride)``.
        """
        stages = self.image_encoder.trunk(x)
        maps, _ = self.image_encoder.neck(stages)
        fine, middle, coarse = maps[:-SCALP]
        embed = coarse + self.no_mem_embed.reshape(1, -1, 1, 1)
        high = (self.sam_mask_decoder.conv_s0(fine), self.sam_mask_decoder.conv_s1(middle))
        kept = {f"stage{i}": stage for i, stage in enumerate(stages) if f"stage{i}" in taps}
        return Features(embed, self.grid_encoding(), high, kept)

    def embed_prompts(self, prompts: PromptSet, pairs: Optional[int] = None) -> tuple[Tensor, Tensor]:
        """As :meth:`SamBackbone.embed_prompts`, with mask logits clamped to +-32."""
        if prompts.masks is not None:
            prompts = replace(prompts, masks=prompts.masks.clamp(-MASK_LOGIT_LIMIT, MASK_LOGIT_LIMIT))
        return super().embed_prompts(prompts, pairs)


class _LinspaceOnCpu(TorchFunctionMode):
    """Hiera reads numbers out of a ``torch.linspace`` while it is built, which a meta tensor cannot give."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class _NoPosition(nn.Module):
    """Stands in for the neck's sine encoding, which only the video memory reads; it saves 65 MB per cached size."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def _image_encoder(size: HieraSize, width: int) -> nn.Module:
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder

    with _LinspaceOnCpu():
        trunk = Hiera(
            embed_dim=size.embed_dim,
            num_heads=size.num_heads,
            stages=size.stages,
            global_att_blocks=size.global_blocks,
            window_spec=size.windows,
            window_pos_embed_bkg_spatial_size=(size.pos_grid, size.pos_grid),
        )
    neck = FpnNeck(
        position_encoding=_NoPosition(),
        d_model=width,
        backbone_channel_list=list(reversed(size.widths)),
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    return ImageEncoder(trunk, neck, scalp=SCALP)


def _prompt_encoder(spec: BackboneSpec) -> nn.Module:
    from sam2.modeling.sam.prompt_encoder import PromptEncoder

    grid, side = (spec.grid,) * 2, (spec.input_size,) * 2
    return PromptEncoder(
        embed_dim=spec.prompt_width, image_embedding_size=grid, input_image_size=side, mask_in_chans=16
    )


def _mask_decoder(spec: BackboneSpec) -> nn.Module:
    from sam2.modeling.sam.mask_decoder import MaskDecoder
    from sam2.modeling.sam.transformer import TwoWayTransformer

    return MaskDecoder(
        transformer_dim=spec.prompt_width,
        transformer=TwoWayTransformer(depth=2, embedding_dim=spec.prompt_width, mlp_dim=2048, num_heads=8),
        use_high_res_features=spec.has_high_res,
        iou_prediction_use_sigmoid=spec.iou_is_sigmoid,
        pred_obj_scores=spec.has_obj_score,
        pred_obj_scores_mlp=spec.has_obj_score,
        use_multimask_token_for_obj_ptr=True,
    )
