"""What the SAM 1 and SAM 2 families share: prompt embedding, taps and canonical paths (METHODS 1.2 to 1.4).

The stock prompt encoders serve as holders of weights only: their forward returns batch 1 when given nothing and cannot
mix pairs with and without a box or mask. Coordinates are backbone input pixels (``_xy``). Torch only; thread-safe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.contracts import BackboneSpec, Features, PromptSet, autocast_off, is_image_tap
from lib.errors import PromptError

NOT_A_POINT = -1
CORNERS = (2, 3)  # labels of a box's first and second corner, as in SAM 2's predictor
ATTENTIONS = {"self": "self_attn", "t2i": "cross_attn_token_to_image", "i2t": "cross_attn_image_to_token"}


class SamBackbone(nn.Module):
    """Base of the backbones that hold stock SAM modules under their official attribute names.

    Args:
        spec: the facts.
        paths: canonical names to module paths.
    """

    prompt_attribute = "prompt_encoder"  # official name of the prompt encoder in this family
    block_channels_first = False  # layout of what goes through ``enc.block[i]``

    def __init__(self, spec: BackboneSpec, paths: dict[str, str]) -> None:
        super().__init__()
        self.spec = spec
        self.paths = paths
        self.weights_id = "random"

    def prompt_modules(self) -> Any:
        """The family's prompt encoder, a holder of SAM's attribute names."""
        return getattr(self, self.prompt_attribute)

    def embed_prompts(self, prompts: PromptSet, pairs: Optional[int] = None) -> tuple[Tensor, Tensor]:
        """Prompts of N pairs to tokens and dense map; an empty set of ``pairs`` gives T = 0 and ``no_mask_embed``.

        Returns:
            ``(sparse (N, T, E), dense (N, E, h, w))`` float32. Tokens are box corners, points, the not-a-point token
            where the family adds one, then free tokens.

        Raises:
            PromptError: if the parts disagree about N, or a mask has the wrong size.
        """
        n = _pairs(self.spec, prompts, pairs)
        encoder = self.prompt_modules()
        return _sparse(self.spec, encoder, prompts, n), _dense(self.spec, encoder, prompts, n)

    def grid_encoding(self) -> Tensor:
        """``(1, E, h, w)`` Fourier encoding of the embedding's cell centres."""
        gaussian = self.prompt_modules().pe_layer.positional_encoding_gaussian_matrix
        centres = (torch.arange(self.spec.grid, device=gaussian.device) + 0.5) / self.spec.grid
        unit_xy = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1)  # (h, w, 2)
        return fourier(gaussian, unit_xy).permute(2, 0, 1)[None]

    def encode(self, x: Tensor, taps: tuple[str, ...] = ()) -> Features:
        """Image to features, with the input itself among the taps where it is asked for.

        Args:
            x: ``(B, 3, S, S)`` float32, normalised.
            taps: out of the spec's pyramid, or :func:`lib.contracts.image_tap`.

        Raises:
            ConfigError: for another tap.
        """
        shapes = {name: self.spec.tap_shape(name) for name in taps}
        features = self.encode_maps(x, tuple(name for name in taps if not is_image_tap(name)))
        for name, shape in shapes.items():
            if is_image_tap(name):
                features.taps[name] = F.interpolate(x, shape[1:], mode="bilinear", align_corners=False, antialias=True)
        return features

    def encode_maps(self, x: Tensor, taps: tuple[str, ...]) -> Features:
        """:meth:`encode` of the family, for taps of the pyramid."""
        raise NotImplementedError


def _pairs(spec: BackboneSpec, prompts: PromptSet, pairs: Optional[int]) -> int:
    parts = (prompts.points_xy, prompts.labels, prompts.boxes_xy, prompts.masks, prompts.tokens, prompts.dense)
    counts = {p.shape[0] for p in parts if p is not None} | ({pairs} if pairs is not None else set())
    if len(counts) > 1:
        raise PromptError(f"All prompts of a call must be for the same number of pairs; received {sorted(counts)}.")
    if (prompts.points_xy is None) != (prompts.labels is None):
        raise PromptError("Points need one label each; received points_xy or labels alone.")
    side = spec.mask_size
    if prompts.masks is not None and tuple(prompts.masks.shape[1:]) != (1, side, side):
        raise PromptError(f"Mask prompts must be (N, 1, {side}, {side}); received {tuple(prompts.masks.shape)}.")
    return counts.pop() if counts else 1


def fourier(gaussian: Tensor, unit_xy: Tensor) -> Tensor:
    with autocast_off(gaussian):  # half precision would move a point by several pixels
        angle = 2 * math.pi * ((2 * unit_xy.float() - 1) @ gaussian.float())
        return torch.cat([angle.sin(), angle.cos()], -1)


def _sparse(spec: BackboneSpec, encoder: Any, prompts: PromptSet, n: int) -> Tensor:
    device = encoder.no_mask_embed.weight.device
    xy, labels = torch.zeros(n, 0, 2, device=device), torch.zeros(n, 0, dtype=torch.long, device=device)
    if prompts.boxes_xy is not None:
        boxes = prompts.boxes_xy.to(device).reshape(n, -1, 4)
        given = torch.isfinite(boxes).all(-1, keepdim=True)  # (N, M, 1)
        kinds = torch.where(given, torch.tensor(CORNERS, device=device), NOT_A_POINT).reshape(n, -1)
        corners = torch.where(given, boxes, torch.zeros_like(boxes)).reshape(n, -1, 2)  # keeps NaN out of the gradient
        xy, labels = torch.cat([xy, corners], 1), torch.cat([labels, kinds], 1)
    if prompts.points_xy is not None and prompts.labels is not None:
        xy = torch.cat([xy, prompts.points_xy.to(device)], 1)
        labels = torch.cat([labels, prompts.labels.to(device).long()], 1)
    if _needs_pad(spec, prompts):
        xy = torch.cat([xy, xy.new_zeros(n, 1, 2)], 1)
        labels = torch.cat([labels, labels.new_full((n, 1), NOT_A_POINT)], 1)
    tokens = _point_tokens(spec, encoder, xy, labels)
    return tokens if prompts.tokens is None else torch.cat([tokens, prompts.tokens.to(tokens)], 1)


def _needs_pad(spec: BackboneSpec, prompts: PromptSet) -> bool:
    if prompts.boxes_xy is not None:
        return spec.box_tokens > len(CORNERS)
    return prompts.points_xy is not None


def _point_tokens(spec: BackboneSpec, encoder: Any, xy: Tensor, labels: Tensor) -> Tensor:
    kinds = torch.cat([e.weight for e in encoder.point_embeddings] + [encoder.not_a_point_embed.weight])  # (5, E)
    position = fourier(encoder.pe_layer.positional_encoding_gaussian_matrix, (xy + 0.5) / spec.input_size)
    real = (labels != NOT_A_POINT)[..., None]
    return torch.where(real, position, torch.zeros_like(position)) + kinds[torch.where(labels < 0, 4, labels)]


def _dense(spec: BackboneSpec, encoder: Any, prompts: PromptSet, n: int) -> Tensor:
    dense = prompts.dense
    if dense is None:
        dense = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(n, -1, spec.grid, spec.grid)
    if prompts.masks is None:
        return dense
    masks = prompts.masks.sigmoid() if spec.mask_prompt_domain == "prob" else prompts.masks
    embedded = encoder.mask_downscaling(masks)
    if prompts.mask_given is None:
        return embedded
    return torch.where(prompts.mask_given.to(embedded.device).bool().reshape(-1, 1, 1, 1), embedded, dense)


def encoder_paths(blocks: Sequence[str], fc1: str, fc2: str) -> dict[str, str]:
    """Canonical names of encoder blocks; ``blocks`` are their module paths, ``fc1`` and ``fc2`` lie inside."""
    paths = {"enc": "image_encoder"}
    for i, block in enumerate(blocks):
        inside = {"": "", ".attn": ".attn", ".attn.qkv": ".attn.qkv", ".attn.proj": ".attn.proj", ".mlp": ".mlp"}
        inside |= {".mlp.fc1": f".{fc1}", ".mlp.fc2": f".{fc2}"}
        paths |= {f"enc.block[{i}]{name}": f"{block}{module}" for name, module in inside.items()}
    return paths


def decoder_paths(root: str, fc1: str, fc2: str, layers: int = 2) -> dict[str, str]:
    """Canonical names of the two-way transformer below ``root``."""
    paths = {"dec": root}
    attentions = {"dec.final": f"{root}.transformer.final_attn_token_to_image"}
    for i in range(layers):
        layer = f"{root}.transformer.layers.{i}"
        paths |= {f"dec.layer[{i}]": layer, f"dec.layer[{i}].mlp": f"{layer}.mlp"}
        paths |= {f"dec.layer[{i}].mlp.fc1": f"{layer}.{fc1}", f"dec.layer[{i}].mlp.fc2": f"{layer}.{fc2}"}
        attentions |= {f"dec.layer[{i}].{short}": f"{layer}.{name}" for short, name in ATTENTIONS.items()}
    for name, module in attentions.items():
        paths |= {name: module} | {f"{name}.{p}": f"{module}.{p}_proj" for p in ("q", "k", "v", "out")}
    return paths
