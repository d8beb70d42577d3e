"""One mask-decoder forward for every SAM family (METHODS 1.2, 1.3 and 7.1).

It reuses the stock modules and their weights but not their ``forward``: images are gathered per pair, so B images with
N prompt sets work; all four mask tokens are returned; SAM 2's hidden stability fallback is left out, because it makes
training and evaluation differ. Thread-safe: no state.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from lib.contracts import BackboneSpec, DecoderOut, Features, Hooks

MAX_PAIRS = 64  # bounds memory: one 64x64 map of width 256 is 4 MiB per pair in float32, and several live at once


def decode(
    spec: BackboneSpec,
    mask_decoder: Any,
    features: Features,
    prompts: tuple[Tensor, Tensor],
    *,
    image_index: Optional[Tensor] = None,
    hooks: Optional[Hooks] = None,
    max_pairs: int = MAX_PAIRS,
) -> DecoderOut:
    """Runs the decoder on N pairs, in chunks.

    Args:
        spec: facts of the backbone.
        mask_decoder: module with SAM's attribute names (see :class:`lib.contracts.Backbone`).
        features: of B images.
        prompts: ``(sparse (N, T, E), dense (N, E, h, w))`` from ``embed_prompts``.
        image_index: ``(N,)`` long, which image each pair looks at; None means image 0 for all if B is 1, else pair n is
            image n.
        hooks: a method's token shifts, extra tokens and objectness head.
        max_pairs: chunk size.

    Returns:
        Masks, IoU and objectness of all N pairs, in order.
    """
    sparse, dense = prompts
    index = _image_index(image_index, sparse.shape[0], features.embed.shape[0]).to(features.embed.device)
    hooks = hooks or Hooks()
    chunks = [slice(i, i + max_pairs) for i in range(0, sparse.shape[0], max_pairs)]
    outs = [_decode_chunk(spec, mask_decoder, features, index[c], sparse[c], dense[c], _cut(hooks, c)) for c in chunks]
    return outs[0] if len(outs) == 1 else _join(outs)


def _image_index(index: Optional[Tensor], pairs: int, images: int) -> Tensor:
    if index is not None:
        return index
    if images == 1:
        return torch.zeros(pairs, dtype=torch.long)
    if images != pairs:
        raise ValueError(f"{pairs} pairs on {images} images need image_index to say which pair looks at which image.")
    return torch.arange(pairs)


def _cut(hooks: Hooks, part: slice) -> Hooks:
    shift = None if hooks.token_shift is None else hooks.token_shift[part]
    extra = None if hooks.extra_tokens is None else hooks.extra_tokens[part]
    place = None if hooks.place is None else hooks.place[part]
    return Hooks(shift, extra, hooks.obj_head, place)


def _join(outs: list[DecoderOut]) -> DecoderOut:
    def cat(name: str) -> Any:
        parts = [getattr(o, name) for o in outs]
        return None if parts[0] is None else torch.cat(parts)

    return DecoderOut(cat("masks"), cat("iou"), cat("obj"), cat("mask_tokens"), cat("extra_tokens"))


def _decode_chunk(
    spec: BackboneSpec, md: Any, features: Features, index: Tensor, sparse: Tensor, dense: Tensor, hooks: Hooks
) -> DecoderOut:
    n, first = sparse.shape[0], int(spec.has_obj_score)
    tokens = _tokens(md, sparse, hooks, spec.has_obj_score)  # (N, [obj] + iou + 4 + T + F, E)
    src = features.embed[index] + dense
    pe = features.pe if hooks.place is None else features.pe + hooks.place
    queries, keys = md.transformer(src, pe, tokens)
    iou_token, mask_tokens = queries[:, first], queries[:, first + 1 : first + 5]
    upscaled = _upscale(md, keys.transpose(1, 2).reshape(src.shape), features, index)  # (N, E/8, 4h, 4w)
    hyper = torch.stack([mlp(mask_tokens[:, i]) for i, mlp in enumerate(md.output_hypernetworks_mlps)], 1)
    masks = (hyper @ upscaled.flatten(2)).view(n, -1, *upscaled.shape[-2:])
    obj = md.pred_obj_score_head(queries[:, 0]) if spec.has_obj_score else None
    if obj is None and hooks.obj_head is not None:
        obj = hooks.obj_head(iou_token)
    extra = None if hooks.extra_tokens is None else queries[:, -hooks.extra_tokens.shape[1] :]
    iou = md.iou_prediction_head(iou_token, masks) if spec.iou_reads_masks else md.iou_prediction_head(iou_token)
    return DecoderOut(masks, iou, obj, mask_tokens, extra)


def _tokens(md: Any, sparse: Tensor, hooks: Hooks, has_obj: bool) -> Tensor:
    n = sparse.shape[0]
    masks = md.mask_tokens.weight.expand(n, -1, -1)
    if hooks.token_shift is not None:
        masks = masks + hooks.token_shift
    parts = [md.obj_score_token.weight.expand(n, -1, -1)] if has_obj else []
    parts += [md.iou_token.weight.expand(n, -1, -1), masks, sparse]
    if hooks.extra_tokens is not None:
        parts.append(hooks.extra_tokens)
    return torch.cat(parts, 1)


def _upscale(md: Any, src: Tensor, features: Features, index: Tensor) -> Tensor:
    if features.high_res is None:
        return md.output_upscaling(src)
    up1, norm, act1, up2, act2 = md.output_upscaling
    s0, s1 = features.high_res
    return act2(up2(act1(norm(up1(src) + s1[index]))) + s0[index])
