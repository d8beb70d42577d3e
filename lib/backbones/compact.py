"""``compact``: the small promptable model that ships with its weights, so that everything runs offline at once.

SAM-2 family layout (hierarchical encoder, stride-4 and stride-8 maps into the mask upscaling, objectness token), own
modules, torch only. Two departures, both for learning from little: prompts are drawn into the dense map as well as
given as tokens (guidance maps as in RITM and DeepGrow; METHODS 1.2 "order of fusion"), and the mask upscaling starts
with a convolution that sees image and prompts together. Works at any input side that is a multiple of 32.
Thread-safe in eval mode: no state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.backbones._common import SamBackbone, decoder_paths, fourier
from lib.config import BackboneRow, from_mapping
from lib.contracts import BackboneSpec, Features, PromptSet


@dataclass(frozen=True)
class CompactSize:
    """Numbers of one size.

    Args:
        widths: channels at strides 4, 8 and 16.
        depths: blocks at strides 4, 8 and 16.
        heads: attention heads at stride 16.
        decoder_heads: attention heads of the mask decoder.
        decoder_mlp: hidden width of its MLPs.
    """

    widths: tuple[int, int, int] = (32, 64, 160)
    depths: tuple[int, int, int] = (1, 2, 4)
    heads: int = 5
    decoder_heads: int = 8
    decoder_mlp: int = 512


def build(row: BackboneRow) -> Compact:
    """The backbone of one YAML row with random weights; works under ``torch.device("meta")``."""
    size = from_mapping(CompactSize, row.size, f"{row.name}.size")
    return Compact(BackboneSpec(name=row.name, **row.spec), size)


class Compact(SamBackbone):
    """Encoder, prompt encoder and mask decoder behind :class:`lib.contracts.Backbone`."""

    block_channels_first = True

    def __init__(self, spec: BackboneSpec, size: CompactSize) -> None:
        super().__init__(spec, _paths(size))
        self.image_encoder = Encoder(size, spec.prompt_width)
        self.prompt_encoder = PromptEncoder(spec)
        self.mask_decoder = MaskDecoder(spec.prompt_width, size)
        self.eval()

    def encode_maps(self, x: Tensor, taps: tuple[str, ...]) -> Features:
        """``x (B, 3, S, S)`` to features; ``taps`` out of ``stride4``, ``stride8``, ``stride16``."""
        maps = self.image_encoder(x)
        embed, s1, s0 = self.image_encoder.fuse(maps)
        high = (self.mask_decoder.conv_s0(s0), self.mask_decoder.conv_s1(s1))
        named = dict(zip(("stride4", "stride8", "stride16"), maps))
        return Features(embed, self.grid_encoding(), high, {name: named[name] for name in taps})

    def grid_encoding(self) -> Tensor:
        """``(1, E, h, w)`` Fourier encoding of the embedding's cell centres."""
        return self.prompt_encoder.grid_encoding()

    def embed_prompts(self, prompts: PromptSet, pairs: Optional[int] = None) -> tuple[Tensor, Tensor]:
        """``(sparse (N, T, E), dense (N, E, h, w))``, see :class:`lib.contracts.Backbone`."""
        return self.prompt_encoder(prompts, prompts.pairs or pairs or 1)


def _paths(size: CompactSize) -> dict[str, str]:
    paths = {"enc": "image_encoder", "enc.stem": "image_encoder.stem"}
    parts = {"attn.qkv": "qkv", "attn.proj": "proj", "mlp": "mlp", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    for i in range(size.depths[2]):
        block = f"image_encoder.stage16.{i}"
        paths |= {f"enc.block[{i}]": block} | {f"enc.block[{i}].{name}": f"{block}.{p}" for name, p in parts.items()}
    return paths | decoder_paths("mask_decoder", "mlp.0", "mlp.2")


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, channels // 16), channels)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over ``(B, heads, T, C)``; spelled out on CPUs, where torch's fused kernel trains 40 % slower."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


class ConvBlock(nn.Module):
    """Residual pair of 3x3 convolutions at constant width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), _norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), _norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class WideBlock(nn.Module):
    """Residual 5x5 depthwise convolution and MLP: a quarter of a ``ConvBlock``'s arithmetic, since it runs per pair."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = _norm(width)
        self.mlp = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(self.spread(x)))


class AttentionBlock(nn.Module):
    """Depthwise convolution for position, global self-attention for context, MLP; all residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.ReLU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = (x + self.position(x)).flatten(2).transpose(1, 2)  # (B, hw, C)
        qkv = self.qkv(self.norm1(tokens)).view(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attended = attend(*qkv.unbind(0)).transpose(1, 2).reshape(b, h * w, c)
        tokens = tokens + self.proj(attended)
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.transpose(1, 2).reshape(b, c, h, w)


class Encoder(nn.Module):
    """Image to maps at strides 4, 8, 16 and a top-down fusion of width E."""

    def __init__(self, size: CompactSize, width: int) -> None:
        super().__init__()
        w4, w8, w16 = size.widths
        self.stem = nn.Sequential(nn.Conv2d(3, w4, 7, stride=4, padding=3, bias=False), _norm(w4), nn.ReLU())
        self.stage4 = nn.Sequential(*[ConvBlock(w4) for _ in range(size.depths[0])])
        self.down8 = nn.Sequential(nn.Conv2d(w4, w8, 2, stride=2, bias=False), _norm(w8))
        self.stage8 = nn.Sequential(*[ConvBlock(w8) for _ in range(size.depths[1])])
        self.down16 = nn.Sequential(nn.Conv2d(w8, w16, 2, stride=2, bias=False), _norm(w16))
        self.stage16 = nn.Sequential(*[AttentionBlock(w16, size.heads) for _ in range(size.depths[2])])
        self.lateral4, self.lateral8 = nn.Conv2d(w4, width // 2, 1), nn.Conv2d(w8, width, 1)
        self.lateral16 = nn.Conv2d(w16, width, 1)
        self.top8, self.top4 = nn.Conv2d(width, width, 1), nn.Conv2d(width, width // 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, 3, S, S)`` to maps at strides 4, 8 and 16."""
        m4 = self.stage4(self.stem(x))
        m8 = self.stage8(self.down8(m4))
        return m4, m8, self.stage16(self.down16(m8))

    def fuse(self, maps: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Feature pyramid: ``(embed (B,E,h,w), s1 (B,E,2h,2w), s0 (B,E/2,4h,4w))``."""
        m4, m8, m16 = maps
        embed = self.lateral16(m16)
        s1 = self.lateral8(m8) + F.interpolate(self.top8(embed), scale_factor=2.0, mode="nearest")
        s0 = self.lateral4(m4) + F.interpolate(self.top4(s1), scale_factor=2.0, mode="nearest")
        return embed, s1, s0


def _downscale(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width // 8, 2, stride=2), nn.ReLU(),
        nn.Conv2d(width // 8, width // 2, 2, stride=2), nn.ReLU(),
        nn.Conv2d(width // 2, width, 3, padding=1),
    )  # fmt: skip


class PromptEncoder(nn.Module):
    """Points, boxes and masks to tokens and a dense map that also shows where the points and boxes are."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        width = spec.prompt_width
        self.spec = spec
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.randn(2, width // 2))
        self.kinds = nn.Embedding(5, width)  # negative, positive, box corner 0, box corner 1, not a point
        self.no_mask_embed = nn.Embedding(1, width)
        self.mask_downscaling = _downscale(1, width)
        self.guide_downscaling = _downscale(3, width)

    def forward(self, prompts: PromptSet, pairs: int) -> tuple[Tensor, Tensor]:
        return self._sparse(prompts, pairs), self._dense(prompts, pairs)

    def grid_encoding(self) -> Tensor:
        """``(1, E, h, w)`` Fourier encoding of the cell centres."""
        centres = (torch.arange(self.spec.grid, device=self.frequencies.device) + 0.5) / self.spec.grid
        grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1)  # (h, w, 2), x first
        return fourier(self.frequencies, grid).permute(2, 0, 1)[None]

    def _tokens(self, xy: Tensor, kind: Tensor) -> Tensor:
        known = (kind != 4)[..., None]
        xy = torch.where(known, xy, torch.zeros_like(xy))
        position = fourier(self.frequencies, (xy + 0.5) / self.spec.input_size)
        return self.kinds(kind) + torch.where(known, position, torch.zeros_like(position))

    def _sparse(self, prompts: PromptSet, pairs: int) -> Tensor:
        parts = []
        if prompts.points_xy is not None and prompts.labels is not None:
            kind = torch.where(prompts.labels < 0, 4, prompts.labels)
            parts.append(self._tokens(prompts.points_xy, kind))
        if prompts.boxes_xy is not None:
            corners = prompts.boxes_xy.reshape(pairs, -1, 2)
            kind = torch.tensor([2, 3], device=corners.device).repeat(pairs, corners.shape[1] // 2)
            parts.append(self._tokens(corners, torch.where(corners.isnan().any(-1), 4, kind)))
        if prompts.tokens is not None:
            parts.append(prompts.tokens)
        return torch.cat(parts, 1) if parts else self.kinds.weight.new_zeros(pairs, 0, self.spec.prompt_width)

    def _dense(self, prompts: PromptSet, pairs: int) -> Tensor:
        side = self.spec.grid
        dense = prompts.dense
        if dense is None:
            dense = self.no_mask_embed.weight.view(1, -1, 1, 1).expand(pairs, -1, side, side)
        if prompts.masks is not None:
            masked = self.mask_downscaling(prompts.masks.clamp(-8, 8) / 4)
            given = prompts.mask_given
            dense = masked if given is None else torch.where(given.view(-1, 1, 1, 1), masked, dense)
        guide = self.guidance(prompts, pairs)
        return dense if guide is None else dense + self.guide_downscaling(guide)

    def guidance(self, prompts: PromptSet, pairs: int) -> Optional[Tensor]:
        """``(N, 3, 4h, 4w)`` in 0..1: positive points, negative points, box; differentiable in the coordinates.

        None without points and boxes: no prompts means no guidance, so learned dense prompts arrive unchanged.
        """
        if prompts.points_xy is None and prompts.boxes_xy is None:
            return None
        side = self.spec.mask_size
        device = self.frequencies.device
        at = (torch.arange(side, device=device) + 0.5) * (self.spec.input_size / side)
        out = torch.zeros(pairs, 3, side, side, device=device)
        if prompts.points_xy is not None and prompts.labels is not None:
            spots = self._spots(prompts.points_xy + 0.5, at)
            for channel, label in ((0, 1), (1, 0)):
                shown = (prompts.labels == label)[..., None, None] * spots
                out[:, channel] = shown.amax(1) if shown.shape[1] else out[:, channel]
        if prompts.boxes_xy is not None:
            out[:, 2] = self._filled(_last_box(prompts.boxes_xy.reshape(pairs, -1, 4)) + 0.5, at)
        return out

    def _spots(self, xy: Tensor, at: Tensor) -> Tensor:
        sigma = self.spec.input_size / 40  # 6 px at 256: as wide as a careful click is uncertain
        across = torch.exp(-((at - xy[..., :1]) ** 2) / (2 * sigma**2))  # (N, P, 4w)
        down = torch.exp(-((at - xy[..., 1:]) ** 2) / (2 * sigma**2))
        return down[..., :, None] * across[..., None, :]

    def _filled(self, xyxy: Tensor, at: Tensor) -> Tensor:
        soft = self.spec.input_size / 128
        given = ~xyxy.isnan().any(-1)
        known = torch.where(given[:, None], xyxy, torch.zeros_like(xyxy))  # keeps NaN out of the gradient
        x0, y0, x1, y1 = known.unbind(-1)
        across = torch.sigmoid((at - x0[:, None]) / soft) * torch.sigmoid((x1[:, None] - at) / soft)
        down = torch.sigmoid((at - y0[:, None]) / soft) * torch.sigmoid((y1[:, None] - at) / soft)
        return given[:, None, None] * down[:, :, None] * across[:, None, :]


def _last_box(boxes: Tensor) -> Tensor:
    """``(N, M, 4)`` to ``(N, 4)``: the last box that is given; a learned one comes before the user's."""
    found = boxes[:, 0]
    for box in boxes[:, 1:].unbind(1):
        found = torch.where(box.isnan().any(-1, keepdim=True), found, box)
    return found


class Attention(nn.Module):
    """Multi-head attention with an inner width that may be smaller than the token width."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, inner), nn.Linear(width, inner)
        self.v_proj, self.out_proj = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self._split(p(t)) for p, t in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v)))
        x = attend(q, k, v)
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)


class TwoWayLayer(nn.Module):
    """Tokens look at themselves and at the image, then the image looks at the tokens."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, width)
        self.cross_attn_token_to_image = Attention(width, heads, width // 2)
        self.cross_attn_image_to_token = Attention(width, heads, width // 2)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.ReLU(), nn.Linear(mlp, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))

    def forward(self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor) -> tuple[Tensor, Tensor]:
        q = tokens + token_pe
        tokens = self.norms[0](tokens + self.self_attn(q, q, tokens))
        tokens = self.norms[1](tokens + self.cross_attn_token_to_image(tokens + token_pe, image + image_pe, image))
        tokens = self.norms[2](tokens + self.mlp(tokens))
        seen = self.cross_attn_image_to_token(image + image_pe, tokens + token_pe, tokens)
        return tokens, self.norms[3](image + seen)


class TwoWayTransformer(nn.Module):
    """Two layers and a last look of the tokens at the image."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayLayer(width, heads, mlp) for _ in range(2))
        self.final_attn_token_to_image = Attention(width, heads, width // 2)
        self.norm_final = nn.LayerNorm(width)

    def forward(self, image: Tensor, image_pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``image (N, E, h, w)``, ``tokens (N, T, E)`` to ``(tokens (N, T, E), image (N, hw, E))``."""
        keys, pe = image.flatten(2).transpose(1, 2), image_pe.flatten(2).transpose(1, 2)
        queries = tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, pe)
        seen = self.final_attn_token_to_image(queries + tokens, keys + pe, keys)
        return self.norm_final(queries + seen), keys


class Head(nn.Sequential):
    """Three-layer perceptron."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


class QualityHead(nn.Module):
    """Predicted IoU of the four masks from the IoU token and from how sure each mask is of itself.

    For a calibrated mask the expected IoU is the sum of min(p, m) over that of max(p, m), with m = p thresholded; the
    token adds what the image says. From the token alone the head did not transfer to unseen domains (Spearman 0.1).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token, self.stats = nn.Linear(width, 64), nn.Linear(8, 64)
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        self.trust = nn.Parameter(torch.ones(4))

    def forward(self, iou_token: Tensor, masks: Tensor) -> Tensor:
        """``iou_token (N, E)``, ``masks (N, 4, 4h, 4w)`` logits to ``(N, 4)`` in 0..1; no gradient into the masks."""
        p = masks.detach().float().sigmoid().flatten(2)
        m = (p > 0.5).float()
        expected = (torch.minimum(p, m).sum(2) + 1e-3) / (torch.maximum(p, m).sum(2) + 1e-3)  # (N, 4)
        sure = torch.logit(expected.clamp(0.02, 0.98))
        hidden = self.token(iou_token) + self.stats(torch.cat([sure, m.mean(2).sqrt()], 1).to(iou_token.dtype))
        return torch.sigmoid(self.out(hidden) + self.trust * sure)


class MaskDecoder(nn.Module):
    """Modules under SAM's attribute names; :func:`lib.decoder.decode` is their forward."""

    def __init__(self, width: int, size: CompactSize) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(width, size.decoder_heads, size.decoder_mlp)
        self.obj_score_token, self.iou_token = nn.Embedding(1, width), nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(4, width)
        self.conv_s0, self.conv_s1 = nn.Conv2d(width // 2, width // 8, 1), nn.Conv2d(width, width // 4, 1)
        # five parts, as the shared forward expects: up, norm, activation, up, activation
        self.output_upscaling = nn.Sequential(
            nn.Sequential(WideBlock(width), nn.ConvTranspose2d(width, width // 4, 2, stride=2)),
            _norm(width // 4),
            nn.ReLU(),
            nn.Sequential(ConvBlock(width // 4), nn.ConvTranspose2d(width // 4, width // 8, 2, stride=2)),
            nn.Sequential(nn.ReLU(), ConvBlock(width // 8)),  # edges: the stride-4 image map meets the prompts here
        )
        self.output_hypernetworks_mlps = nn.ModuleList(Head(width, width // 8) for _ in range(4))
        self.iou_prediction_head = QualityHead(width)
        self.pred_obj_score_head = Head(width, 1)
