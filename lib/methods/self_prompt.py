"""Self-Prompt-SAM: a small segmenter on the encoder's taps prompts SAM with points, boxes and masks (METHODS 4).

Auxiliary masks (background and K classes, softmax) come from :class:`Generator`; every class that is on a slice becomes
its deepest point, its box and its log-odds as mask prompt. A user's point, box or mask takes the place of the derived
one of that kind. The decoder's masks and the auxiliary background are then weighed against each other by a small
convolution; the answer's logits are log-odds of class against background, so that the best one above 0 is the softmax's
choice. Encoder and decoder get adapters that see neighbouring slices (:mod:`lib.nn.depth`).
Frames: points and boxes in pixels of the backbone's input. No state between calls. Left out: the source's SGD
schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from lib.contracts import BackboneSpec, Features, Hooks, PromptSet, Proposal
from lib.errors import ConfigError
from lib.nn.adapters import Injector
from lib.nn.depth import KINDS, MIXES, DepthEmbedding, depth_fused, depth_placed, modality

ABSENT = -10.0  # logit of a class that nothing points at
SURE = 10.0  # bound of the mask prompt's log-odds
SMALL = 0.01  # components below this share of their class do not widen its box
LOSSES = ("selfprompt", "plain")
PARTS = ("taps", "adapters", "place", "modality", "weigh")


@dataclass(frozen=True)
class Config:
    """Numbers of the method.

    Args:
        classes: K.
        slices: D, of a volume that are seen together.
        depth: how adapters mix slices: ``conv1d`` over three neighbours, or ``fc`` over exactly D.
        warm_up: share of the training in which only the auxiliary masks learn, since poor ones make useless prompts.
        mix: where adapters mix slices, one of :data:`lib.nn.depth.MIXES`; all but ``inside`` are for comparison.
        parts: what there is of :data:`PARTS`, all unless for comparison: finer taps in the generator, adapters, depth
            embeddings, the modality adapter, the weighing of classes.
        channels: M, 2 or 4 of an image's own; 3 takes what SAM takes, and the mean of two or four. Training sets it to
            what the images have.
    """

    classes: int
    slices: int = 8
    depth: str = "conv1d"
    warm_up: float = 0.2
    mix: str = "inside"
    parts: tuple[str, ...] = PARTS
    channels: int = 3


def build(config: Config, spec: BackboneSpec) -> SelfPrompt:
    """The method for one backbone.

    Raises:
        ConfigError: for a number that does not fit, or a backbone without a tap at the embedding's stride.
    """
    if config.classes < 1 or config.slices < 1 or not 0 <= config.warm_up < 1:
        raise ConfigError(
            f"self_prompt: expected classes >= 1, slices >= 1 and warm_up from 0 to below 1, received {config}."
        )
    if config.depth not in KINDS:
        raise ConfigError(f"self_prompt.depth: expected one of {list(KINDS)}, received {config.depth!r}.")
    if config.mix not in MIXES:
        raise ConfigError(f"self_prompt.mix: expected one of {list(MIXES)}, received {config.mix!r}.")
    if not set(config.parts) <= set(PARTS):
        raise ConfigError(f"self_prompt.parts: expected some of {list(PARTS)}, received {list(config.parts)}.")
    return SelfPrompt(config, spec)


class SelfPrompt(nn.Module):
    """The generator of auxiliary masks, and what turns them into prompts and decoder masks into classes."""

    mask_token = 0

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__()
        self.config, self.spec, self.classes = config, spec, config.classes
        self.slices, self.warm_up = config.slices, config.warm_up
        self.generator = Generator(spec, config.classes + 1, finer="taps" in config.parts)
        self.taps = self.generator.taps
        self.weigh = ClassAdapter(config.classes + 1) if "weigh" in config.parts else nn.Identity()
        self.place = DepthEmbedding(spec.prompt_width, config.slices) if "place" in config.parts else None

    def propose(self, features: Features) -> Proposal:
        """Prompts of all classes for B images, which are ``features.depth`` slices of each volume."""
        levels = self.generator(features)
        logits = levels[-1]  # (B, C, 4h, 4w)
        odds = log_odds(logits)[:, 1:].flatten(0, 1)  # (N, 4h, 4w)
        with torch.no_grad():
            masks = F.one_hot(logits.argmax(1), self.classes + 1).movedim(-1, 1)[:, 1:].flatten(0, 1).bool()
            points, boxes = derived(masks, self.spec.input_size / masks.shape[-1])
            present = masks.flatten(1).any(1)
        labels, masks = torch.where(present, 1, -1)[:, None], odds.clamp(-SURE, SURE)[:, None]
        prompts = PromptSet(points, labels, boxes, masks, present)
        obj = _margin(logits)[:, 1:].flatten(0, 1).flatten(1).amax(1, keepdim=True)  # above 0 where it wins somewhere
        return Proposal(
            prompts,
            Hooks(place=self._placed(features)),
            masks=odds[:, None],
            obj=obj,
            yields=True,
            levels=tuple(levels),
            refine=lambda found, given, index: self._refined(logits[:, 0], found, given, index),
        )

    def _placed(self, features: Features) -> Optional[Tensor]:
        """``(N, E, 1, 1)``: every pair's slice, for the encoding of the image."""
        if self.place is None:
            return None
        volumes = features.embed.shape[0] // features.depth
        place = self.place(features.depth).repeat(volumes, 1).repeat_interleave(self.classes, 0)
        return place[..., None, None]

    def _refined(self, background: Tensor, found: Tensor, prompts: PromptSet, index: Tensor) -> Tensor:
        """Decoder masks ``(N, 4h, 4w)`` to log-odds of each class against background.

        Classes are weighed against each other where all of them were asked about, image by image.
        """
        given = _given(prompts, len(found)).view(-1, 1, 1)
        found = torch.where(given, found, ABSENT)
        every = torch.arange(len(background), device=index.device).repeat_interleave(self.classes)
        if torch.equal(index, every):
            scores = self.weigh(torch.cat([background[:, None], found.unflatten(0, (-1, self.classes))], 1))
            odds = (scores[:, 1:] - scores[:, :1]).flatten(0, 1)
        else:
            odds = found - background[index]
        return torch.where(given, odds, ABSENT)


class Level(nn.Module):
    """Twice the side of the level before, joined with a tap, two convolutions."""

    def __init__(self, before: int, width: int, tap: Optional[tuple[int, int]], *, up: bool) -> None:
        """``tap``: its channels and how often its side is doubled."""
        super().__init__()
        self.up = nn.ConvTranspose2d(before, width, 2, stride=2) if up else None
        self.tap = None if tap is None else _lifted(tap[0], width, tap[1])
        self.convs = nn.Sequential(*_conv(width if tap is None else 2 * width, width), *_conv(width, width))

    def forward(self, x: Tensor, tap: Optional[Tensor]) -> Tensor:
        x = x if self.up is None else self.up(x)
        return self.convs(x if self.tap is None else torch.cat([x, self.tap(tap)], 1))


def _conv(inside: int, outside: int, side: int = 3) -> list[nn.Module]:
    norm = nn.InstanceNorm2d(outside, affine=True)
    return [nn.Conv2d(inside, outside, side, padding=side // 2, bias=False), norm, nn.LeakyReLU(0.01)]


def _lifted(channels: int, width: int, doublings: int) -> nn.Sequential:
    lifts = [nn.ConvTranspose2d(width, width, 2, stride=2) for _ in range(doublings)]
    return nn.Sequential(nn.Conv2d(channels, width, 1), *lifts)


class Generator(nn.Module):
    """Taps to auxiliary logits at 1, 2 and 4 times the embedding's side, widths E, E/2 and E/4.

    1.95 M parameters for the four taps of a ViT-B and four classes with background. Families with maps at strides 8 and
    4 plug these in; a plain ViT's earlier blocks are enlarged instead. Without ``finer`` taps: a plain stack on the
    deepest one, for comparison.
    """

    def __init__(self, spec: BackboneSpec, classes: int, *, finer: bool = True) -> None:
        super().__init__()
        width, (deep, *others) = spec.prompt_width, chosen_taps(spec)
        others = others if finer else [None, None]
        self.names = [None if tap is None else tap[0] for tap in (deep, *others)]
        self.taps = tuple(name for name in self.names if name is not None)
        self.deep = nn.Sequential(*_conv(deep[2], width, 1), *_conv(width, width))  # type: ignore[index]
        widths, strides = (width // 2, width // 4, width // 4), (8, 4, 4)
        before, levels = width, []
        for number, tap in enumerate(others):
            lift = None if tap is None else (tap[2], int(math.log2(tap[1] / strides[number])))
            levels.append(Level(before, widths[number], lift, up=number < 2))
            before = widths[number]
        self.levels = nn.ModuleList(levels)
        self.heads = nn.ModuleList(nn.Conv2d(w, classes, 1) for w in (width, *widths[:2]))

    def forward(self, features: Features) -> list[Tensor]:
        """Logits ``(B, C, h, w)``, ``(B, C, 2h, 2w)`` and ``(B, C, 4h, 4w)``."""
        maps = [None if name is None else features.taps[name] for name in self.names]
        x = self.deep(maps[0])
        found = [self.heads[0](x)]
        for number, level in enumerate(self.levels):
            x = level(x, maps[number + 1])
            if number == 0:
                found.append(self.heads[1](x))
        return [*found, self.heads[2](x)]


Tap = tuple[str, int, int]


def chosen_taps(spec: BackboneSpec) -> list[Optional[Tap]]:
    """The deepest tap and those of the levels of strides 8 and 4, and of the finest once more where a ViT has four.

    Raises:
        ConfigError: for a backbone without a tap at the embedding's stride.
    """
    coarse = [m for m in spec.pyramid if m[1] == spec.feature_stride]
    if not coarse:
        raise ConfigError(
            f"self_prompt needs a map of stride {spec.feature_stride} in the backbone's pyramid; {spec.name} has "
            f"{list(spec.pyramid)}. Choose another backbone."
        )
    found: list[Optional[Tap]] = [coarse.pop()]
    for stride in (8, 4):
        fine = [m for m in spec.pyramid if m[1] == stride]
        found.append(fine[-1] if fine else coarse.pop() if coarse else None)
    return [*found, coarse.pop()] if coarse and all(m[1] >= spec.feature_stride for m in spec.pyramid) else found


class ClassAdapter(nn.Module):
    """Classes weigh each other: C to 4C, norm, GELU, 4C to C, residual; the identity at step 0. 1,188 for C = 4."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(classes, 4 * classes, 3, padding=1, bias=False)
        self.norm = nn.InstanceNorm2d(4 * classes, affine=True)
        self.narrow = nn.Conv2d(4 * classes, classes, 3, padding=1)
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)  # type: ignore[arg-type]

    def forward(self, scores: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        return scores + self.narrow(F.gelu(self.norm(self.widen(scores))))


def log_odds(logits: Tensor) -> Tensor:
    """``(B, C, H, W)`` softmax logits to the log-odds of every class against all others."""
    return logits - _others(logits, lambda rest: rest.logsumexp(1))


def _margin(logits: Tensor) -> Tensor:
    """How far every class is above the best other one."""
    return logits - _others(logits, lambda rest: rest.amax(1))


def _others(logits: Tensor, reduce: Any) -> Tensor:
    classes = range(logits.shape[1])
    return torch.stack([reduce(logits[:, [c for c in classes if c != k]]) for k in classes], 1)


def derived(masks: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Deepest points and boxes of masks.

    Args:
        masks: ``(N, G, G)`` bool.
        scale: backbone pixels per cell.

    Returns:
        ``(N, 1, 2)`` points and ``(N, 4)`` boxes in backbone pixels; zero and NaN where a mask is empty.
    """
    if masks.is_meta:  # shapes without numbers
        return torch.empty(len(masks), 1, 2, device="meta"), torch.empty(len(masks), 4, device="meta")
    points, boxes = np.zeros((len(masks), 1, 2), np.float32), np.full((len(masks), 4), np.nan, np.float32)
    for n, mask in enumerate(masks.cpu().numpy()):
        if mask.any():
            points[n, 0], boxes[n] = _deepest_xy(mask), _box_xy(mask)
    points, boxes = (points + 0.5) * scale - 0.5, boxes * scale - 0.5
    return torch.from_numpy(points).to(masks.device), torch.from_numpy(boxes).to(masks.device)


def _deepest_xy(mask: np.ndarray) -> tuple[int, int]:
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]  # the border counts as outside
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(column), int(row)


def _box_xy(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Half-open, around the components that count: the largest does, however scattered the mask is."""
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    kept = sizes >= min(SMALL * mask.sum(), sizes.max())
    kept[0] = False
    counted = kept[parts]
    rows, columns = np.flatnonzero(counted.any(1)), np.flatnonzero(counted.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _given(prompts: PromptSet, pairs: int) -> Tensor:
    """``(N,)`` whether anything points at a pair."""
    device = next(v.device for v in vars(prompts).values() if v is not None)
    found = torch.zeros(pairs, dtype=torch.bool, device=device)
    if prompts.labels is not None:
        found = found | (prompts.labels >= 0).any(1)
    if prompts.boxes_xy is not None:
        found = found | torch.isfinite(prompts.boxes_xy).reshape(pairs, -1, 4).all(2).any(1)
    if prompts.masks is not None:
        found = found | (torch.ones_like(found) if prompts.mask_given is None else prompts.mask_given.bool())
    return found


def losses(
    preset: str, answer: Optional[Any], proposal: Proposal, target: Tensor, spec: BackboneSpec
) -> dict[str, Tensor]:
    """Parts of the loss of B images (METHODS 4.3): cross entropy and Dice of the softmax over background and classes.

    Args:
        preset: ``selfprompt`` or ``plain``, which is the same.
        answer: masks ``(N, 4h, 4w)`` as log-odds against background; None while only the auxiliary masks learn.
        proposal: of the same pairs, with the logits of every level.
        target: ``(N, 4h, 4w)`` in 0..1.
        spec: facts of the backbone.
    """
    if preset not in LOSSES:
        raise ConfigError(f"loss: expected one of {list(LOSSES)}, received {preset!r}.")
    levels: Sequence[Tensor] = proposal.levels or ()
    truth = _with_background(target.unflatten(0, (len(levels[-1]), -1)))
    weights = [0.5**n for n in range(len(levels))]  # finest first
    parts = [w * class_loss(x.float(), truth) for w, x in zip(weights, reversed(levels))]
    found = {"auxiliary": torch.stack(parts).sum() / sum(weights)}
    if answer is not None:
        masks = answer.masks.unflatten(0, (len(truth), -1))
        found["mask"] = class_loss(torch.cat([torch.zeros_like(masks[:, :1]), masks], 1), truth)
    return found


def _with_background(target: Tensor) -> Tensor:
    """``(B, K, G, G)`` shares to ``(B, K + 1, G, G)`` that sum to 1."""
    target = target / target.sum(1, keepdim=True).clamp_min(1.0)
    return torch.cat([1 - target.sum(1, keepdim=True), target], 1)


def class_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy and mean Dice loss of the classes; ``truth (B, C, G, G)`` is averaged to the logits' side."""
    truth = F.adaptive_avg_pool2d(truth, (logits.shape[-2], logits.shape[-1]))
    entropy = -(truth * logits.log_softmax(1)).sum(1).mean()
    prob, wanted = logits.softmax(1)[:, 1:].flatten(2), truth[:, 1:].flatten(2)
    overlap = 2 * (prob * wanted).sum(2) + 1
    return entropy + 1 - (overlap / (prob.sum(2) + wanted.sum(2) + 1)).mean()


def injectors(config: Config, backbone: Any, *, decoder: bool, encoder: bool) -> list[Injector]:
    """Depth-fused adapters in encoder and decoder, and the modality adapter before the encoder (METHODS 4.2)."""
    found: list[Injector] = []
    if "adapters" in config.parts:
        found += depth_fused(backbone, config.depth, config.slices, config.mix, decoder=decoder, encoder=encoder)
    if encoder and "place" in config.parts:
        found.append(depth_placed(backbone, config.slices))
    if encoder and ("modality" in config.parts or config.channels != 3):
        found.append(modality(config.channels))
    return found


def decoder_parameters(backbone: Any) -> list[str]:
    """None: all of SAM is frozen, its adapters learn."""
    return []
