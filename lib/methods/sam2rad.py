"""Sam2Rad: class queries look at the image and become a box, free tokens and a mask prompt (METHODS 3).

Forms: ``linear`` is the paper's single block on the embedding; ``high_res`` walks three levels coarse to fine and is
opt-in, because it keeps sixteen times the activations (it stops at ``max_level`` and trains under checkpointing).
Frame: boxes in 0..1 of the backbone's input, x right, y down. No state between calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib.contracts import BackboneSpec, Features, Hooks, PromptSet, Proposal
from lib.errors import ConfigError
from lib.nn.adapters import Injector, standard
from lib.nn.losses import balanced_bce, box_loss, dice_loss, focal_loss, plain_loss, present_mean

BOX_TOKENS = 2
HEADS = 8


@dataclass(frozen=True)
class Config:
    """Numbers of the method.

    Args:
        classes: K.
        form: ``linear`` or ``high_res``.
        tokens: T, two box tokens and T - 2 free ones.
        max_level: finest level of ``high_res``: 0 the embedding, 1 the next finer map, 2 the finest.
        lora_rank: of the decoder's adapters; 0 takes 8 for decoders with high-resolution maps, else 32.
        bottleneck_width: of the encoder's adapters.
        last_blocks: of the encoder get adapters; 0 means all.
    """

    classes: int
    form: str = "linear"
    tokens: int = 10
    max_level: int = 2
    lora_rank: int = 0
    bottleneck_width: int = 64
    last_blocks: int = 0


def build(config: Config, spec: BackboneSpec) -> Sam2Rad:
    """The method for one backbone.

    Raises:
        ConfigError: for a number that does not fit.
    """
    if config.form not in ("linear", "high_res"):
        raise ConfigError(f"sam2rad.form: expected linear or high_res, received {config.form!r}.")
    if config.classes < 1 or config.tokens < BOX_TOKENS:
        raise ConfigError(f"sam2rad: expected classes >= 1 and tokens >= {BOX_TOKENS}, received {config}.")
    if not 0 <= config.max_level <= 2 or min(config.lora_rank, config.last_blocks) < 0 or config.bottleneck_width < 1:
        raise ConfigError(
            "sam2rad: expected max_level 0 to 2, lora_rank and last_blocks >= 0 and bottleneck_width >= 1, received "
            f"{config}."
        )
    return Sam2Rad(config, spec)


class Sam2Rad(nn.Module):
    """Class queries and the prompt predictor."""

    mask_token = 0
    picks = True

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__()
        self.config, self.spec, self.classes = config, spec, config.classes
        names = [name for name, _, _ in finer_maps(spec)] if config.form == "high_res" else []
        self.taps = tuple(name for name in names[: config.max_level] if not name.startswith("high_res"))
        self.queries = nn.Parameter(
            torch.randn(config.classes, config.tokens, spec.prompt_width) / spec.prompt_width**0.5
        )
        self.predictor = PromptPredictor(config, spec)
        width = spec.prompt_width
        # SAM 1 has no objectness: a head on the post-transformer IoU token leaves the frozen decoder as it is
        self.obj_head = (
            None if spec.has_obj_score else nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        )

    def propose(self, features: Features, classes: Optional[Tensor] = None) -> Proposal:
        """Prompts of all classes for B images, or of ``(B,)`` one class each."""
        images = features.embed.shape[0]
        queries = self.queries.repeat(images, 1, 1) if classes is None else self.queries[classes]  # classes inside
        tokens, masks, boxes = self.predictor(features, queries)
        side = self.spec.input_size
        prompts = PromptSet(boxes_xy=boxes * side - 0.5, masks=masks, tokens=tokens[:, BOX_TOKENS:])
        return Proposal(prompts, Hooks(obj_head=self.obj_head), boxes, masks)


class PromptPredictor(nn.Module):
    """Two-way blocks, then box head and mask head."""

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__()
        width = spec.prompt_width
        levels = finer_maps(spec)[: config.max_level] if config.form == "high_res" else []
        self.names = [name for name, _, _ in levels]
        self.blocks = nn.ModuleList(TwoWayBlock(width) for _ in range(1 + len(levels)))
        self.project = nn.ModuleList(nn.Conv2d(channels, width, 1) for _, _, channels in levels)
        self.box_head = nn.Sequential(nn.Linear(BOX_TOKENS * width, width), nn.ReLU(), nn.Linear(width, 4))
        with torch.no_grad():  # the first boxes are the middle half of the image, not its lower right quarter
            self.box_head[2].bias.copy_(torch.tensor([-math.log(3.0), -math.log(3.0), 0.0, 0.0]))  # type: ignore[operator]
        self.mask_head = _mask_head(width)
        self.mask_size = spec.mask_size

    def forward(self, features: Features, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(tokens (N, T, E), mask logits (N, 1, 4h, 4w), boxes (N, 4) in 0..1)``."""
        classes = queries.shape[0] // features.embed.shape[0]
        maps = [features.embed, *(proj(_named(features, n)) for n, proj in zip(self.names, self.project))]
        place, image = _sine_1d(queries.shape[1], queries.shape[2], queries), None
        for number, (block, level) in enumerate(zip(self.blocks, maps)):
            image = _level_input(level.repeat_interleave(classes, 0), image)
            if torch.is_grad_enabled() and number:  # a fine level keeps megabytes per pair
                queries, image = checkpoint(block, queries, image, place, number == 0, use_reentrant=False)
            else:
                queries, image = block(queries, image, place, number == 0)
        masks = F.interpolate(self.mask_head(image), (self.mask_size,) * 2, mode="bilinear", align_corners=False)
        return queries, masks, _corners(self.box_head(queries[:, :BOX_TOKENS].flatten(1)).sigmoid())


def _level_input(level: Tensor, previous: Optional[Tensor]) -> Tensor:
    if previous is None:
        return level
    return level + F.interpolate(previous, level.shape[-2:], mode="nearest")


def _corners(xywh: Tensor) -> Tensor:
    """x, y, width, height in 0..1 to sorted corners that stay inside the image."""
    x, y, w, h = xywh.unbind(-1)
    return torch.stack([x, y, (x + w).clamp(max=1.0), (y + h).clamp(max=1.0)], -1)


def _mask_head(width: int) -> nn.Sequential:
    inner = width // 4
    head = nn.Sequential(
        nn.Conv2d(width, inner, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.1),
        nn.Conv2d(inner, inner, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.1),
        nn.Conv2d(inner, 1, 1),
    )  # fmt: skip
    for layer in head:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return head


class Attention(nn.Module):
    """Multi-head attention with an inner width that may be smaller than the token width."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        split = (p(t).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p, t in ((self.q, q), (self.k, k), (self.v, v)))
        q, k, v = split
        x = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(x.transpose(1, 2).flatten(2))


class TwoWayBlock(nn.Module):
    """Queries look at themselves and the image, then the image looks at the queries."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, width)
        self.to_image, self.to_tokens = Attention(width, width // 2), Attention(width, width // 2)
        self.mlp = nn.Sequential(nn.Linear(width, 8 * width), nn.ReLU(), nn.Linear(8 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))

    def forward(self, queries: Tensor, image: Tensor, place: Tensor, first: bool) -> tuple[Tensor, Tensor]:
        """``queries (N, T, E)``, ``image (N, E, H, W)``, ``place (T, E)``; both are returned updated."""
        size = image.shape[-2:]
        keys = image.flatten(2).transpose(1, 2)  # (N, HW, E)
        grid = _sine_2d(size[0], size[1], keys.shape[-1], keys)
        if first:  # as in SAM's decoder: neither encoding nor residual
            queries = self.norms[0](self.self_attn(queries, queries, queries))
        else:
            q = queries + place
            queries = self.norms[0](queries + self.self_attn(q, q, queries))
        queries = self.norms[1](queries + self.to_image(queries + place, keys + grid, keys))
        queries = self.norms[2](queries + self.mlp(queries))
        keys = self.norms[3](keys + self.to_tokens(keys + grid, queries + place, queries))
        return queries, keys.transpose(1, 2).unflatten(2, size)


def _sine(position: Tensor, width: int) -> Tensor:
    """``(P,)`` positions in radians to ``(P, width)`` sines and cosines, temperature 10,000."""
    half = torch.arange(width // 2, device=position.device, dtype=torch.float32)
    angle = position[:, None] / 10_000 ** (2 * half / width)
    return torch.cat([angle.sin(), angle.cos()], 1)


def _sine_1d(count: int, width: int, like: Tensor) -> Tensor:
    return _sine(torch.arange(count, device=like.device, dtype=torch.float32), width).to(like.dtype)


def _sine_2d(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """``(HW, channels)``: half the channels tell the row, half the column, both normalised to 2 pi."""
    rows = _sine((torch.arange(height, device=like.device) + 0.5) / height * 2 * math.pi, channels // 2)
    columns = _sine((torch.arange(width, device=like.device) + 0.5) / width * 2 * math.pi, channels // 2)
    both = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], -1)
    return both.flatten(0, 1).to(like.dtype)


def finer_maps(spec: BackboneSpec) -> list[tuple[str, int, int]]:
    """``(name, stride, channels)`` of the two maps that ``high_res`` adds, coarse to fine.

    SAM 2 and ``compact``: the high-resolution maps that the decoder gets. SAM 1: the last two taps.
    """
    if spec.has_high_res:
        return [("high_res.1", 8, spec.prompt_width // 4), ("high_res.0", 4, spec.prompt_width // 8)]
    return list(spec.pyramid[-2:])


def _named(features: Features, name: str) -> Tensor:
    if name.startswith("high_res."):
        return features.high_res[int(name[-1])]  # type: ignore[index]
    return features.taps[name]


def losses(preset: str, answer: Any, proposal: Proposal, target: Tensor, spec: BackboneSpec) -> dict[str, Tensor]:
    """Weighted parts of the loss of N pairs (METHODS 3.5).

    Args:
        preset: ``sam2rad`` (Dice and focal) or ``plain``: Dice and cross entropy scaled by the object's area, and
            class-balanced cross entropy on the interim mask, which leaves the empty mask within a few steps.
        answer: masks ``(N, 4h, 4w)`` and objectness of the decoder call.
        proposal: of the same pairs.
        target: ``(N, 4h, 4w)`` in 0..1.
        spec: facts of the backbone.
    """
    cell = (spec.input_size / spec.mask_size) ** 2
    area = target.flatten(1).sum(1)
    counted = (area * cell > 10).float()  # a class of a few pixels teaches objectness only
    if preset not in LOSSES:
        raise ConfigError(f"loss: expected one of {list(LOSSES)}, received {preset!r}.")
    mask_loss, interim_loss = LOSSES[preset]
    smooth = 0.05 + 0.9 * (area > 0).float()
    parts = {
        "mask": present_mean(mask_loss(answer.masks, target), counted),
        "objectness": F.binary_cross_entropy_with_logits(answer.obj.clamp(-10, 10), smooth),
    }
    if proposal.boxes is not None and proposal.masks is not None:
        parts["box"] = present_mean(box_loss(proposal.boxes, _true_boxes(target)), counted)
        parts["interim"] = present_mean(interim_loss(proposal.masks[:, 0].float(), target), counted)
    return parts


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "sam2rad": (
        lambda x, y: 0.5 * (dice_loss(x, y) + 10 * focal_loss(x, y, 0.7, 3.0)),
        lambda x, y: 100 * focal_loss(x, y, 0.6, 3.0),
    ),
    "plain": (plain_loss, lambda x, y: dice_loss(x, y) + balanced_bce(x, y)),
}


def _true_boxes(target: Tensor) -> Tensor:
    """``(N, 4)`` x0 y0 x1 y1 in 0..1 around what is above one half; the whole image for an empty target."""
    hard = target > 0.5
    hard = torch.where(hard.flatten(1).any(1)[:, None, None], hard, target > 0)
    columns, rows = hard.any(1).float(), hard.any(2).float()
    width, height = columns.shape[1], rows.shape[1]
    x0, y0 = columns.argmax(1) / width, rows.argmax(1) / height
    x1, y1 = 1 - columns.flip(1).argmax(1) / width, 1 - rows.flip(1).argmax(1) / height
    return torch.stack([x0, y0, x1, y1], 1)


def injectors(config: Config, backbone: Any, *, decoder: bool, encoder: bool) -> list[Injector]:
    """The adapters that the app's other methods get too, in the sizes of the configuration."""
    return standard(
        backbone, decoder=decoder, encoder=encoder,
        rank=config.lora_rank, width=config.bottleneck_width, last_blocks=config.last_blocks,
    )  # fmt: skip
