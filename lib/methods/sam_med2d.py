"""SAM-Med2D: an adapter beside every encoder MLP, and a decoder trained by correcting itself (METHODS 5).

The recipe is interactive. Automatic use puts Sam2Rad's prompt predictor on top; it learns in the first round of every
batch. A backbone that has the adapters already, as the released one, trains those instead of getting a second set. The
mask read is the one of three whose predicted IoU is largest. Frame: prompts in pixels of the backbone's input. No state
between calls. Left out: what the sources do to data, five masks per image apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lib.contracts import BackboneSpec, Features, PromptSet, Proposal
from lib.errors import ConfigError
from lib.learned import read_token, rows
from lib.methods import sam2rad
from lib.nn.adapters import Injector, ParallelAdapter, parallel
from lib.nn.losses import dice_loss, focal_loss, present_mean, soft_iou
from lib.prompts.simulate import random_boxes, random_points

KINDS = ("light", "wide")
POINTS = (1, 3, 5, 9)
SHIFT_PX, SHIFT_SHARE = 5.0, 0.5  # a box is moved by at most this, and at most by this share of its short side
ALONE = 0.5  # share of batches that ask with the user's prompts alone, as the source does; the app asks with both


@dataclass(frozen=True)
class Config:
    """Numbers of the method.

    Args:
        classes: K.
        adapter: ``light``, or ``wide`` as released: 15 million parameters per block of a ViT-B.
        form: of the prompt predictor, see :class:`lib.methods.sam2rad.Config`.
        tokens: of the prompt predictor.
        iterations: corrections of every batch, each with an optimiser step of its own; 0 asks once.
        masks: pairs of every image that are asked about, drawn with replacement out of those that are present.
    """

    classes: int
    adapter: str = "light"
    form: str = "linear"
    tokens: int = 10
    iterations: int = 8
    masks: int = 5


def build(config: Config, spec: BackboneSpec) -> SamMed2d:
    """The method for one backbone.

    Raises:
        ConfigError: for a number that does not fit.
    """
    if config.adapter not in KINDS:
        raise ConfigError(f"sam_med2d.adapter: expected one of {list(KINDS)}, received {config.adapter!r}.")
    if config.iterations < 0 or config.masks < 1:
        raise ConfigError(f"sam_med2d: expected iterations >= 0 and masks >= 1, received {config}.")
    return SamMed2d(config, spec)


class SamMed2d(nn.Module):
    """The prompt predictor, and which mask is read."""

    mask_token: Optional[int] = None  # the best of three

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__()
        self.config, self.classes = config, config.classes
        self.predictor = sam2rad.build(sam2rad.Config(config.classes, config.form, config.tokens), spec)
        self.taps = self.predictor.taps

    def propose(self, features: Features) -> Proposal:
        """Prompts of all classes for B images."""
        return self.predictor.propose(features)


def injectors(config: Config, backbone: Any, *, decoder: bool, encoder: bool) -> list[Injector]:
    """An adapter beside every encoder MLP, unless the backbone has its own; the decoder is trained as it is."""
    if not encoder or _own_adapters(backbone):
        return []
    return parallel(r"enc\.block\[\d+\]", backbone, wide=config.adapter == "wide")


def decoder_parameters(backbone: Any) -> list[str]:
    """Names of what is trained as it is: decoder, prompt encoder, and adapters that the backbone came with."""
    prefixes = (f"{backbone.paths['dec']}.", f"{backbone.prompt_attribute}.", *_own_adapters(backbone))
    return [n for n, _ in backbone.named_parameters() if n.startswith(prefixes)]


def _own_adapters(backbone: Any) -> list[str]:
    return [f"{n}." for n, m in backbone.named_modules() if isinstance(m, ParallelAdapter)]


def losses(preset: str, answer: Any, proposal: Proposal, target: Tensor, spec: BackboneSpec) -> dict[str, Tensor]:
    """Weighted parts of the loss of N pairs: ``med2d`` for the mask (METHODS 5.3), the others as in Sam2Rad.

    Args:
        preset: ``med2d``, or one of :data:`lib.methods.sam2rad.LOSSES`.
        answer: masks ``(N, 4h, 4w)`` and objectness of the decoder call.
        proposal: of the same pairs.
        target: ``(N, 4h, 4w)`` in 0..1.
        spec: facts of the backbone.
    """
    parts = sam2rad.losses("plain" if preset == "med2d" else preset, answer, proposal, target, spec)
    if preset == "med2d":
        parts["mask"] = present_mean(_mask_loss(answer.masks, target), (target > 0.5).flatten(1).any(1).float())
    return parts


def _mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    return 20 * focal_loss(logits, target, 0.25, 2.0) + dice_loss(logits, target)


def rounds(model: Any, features: Features, target: Tensor, preset: str, seed: int) -> Iterator[dict[str, Tensor]]:
    """Losses of one batch, one optimiser step each (METHODS 5.3).

    The first round trains everything: the autonomous call, and a call with one box or one point per pair. The others
    train the decoder alone: clicks into what is still wrong and the mask before; at one of them, and at the last, the
    mask alone.

    Args:
        model: the learned model, in training mode.
        features: of B slices.
        target: ``(B, K, G, G)`` in 0..1.
        preset: of losses.
        seed: of everything that is drawn.
    """
    rng, flat = torch.Generator().manual_seed(seed), target.flatten(0, 1)
    index = torch.arange(len(target), device=target.device).repeat_interleave(target.shape[1])
    proposal = model.propose(features)
    answer = model.decode(features, proposal, PromptSet(), index)[1]
    parts = model.losses(preset, answer, proposal, flat, model.spec)
    pairs = _drawn(target, model.method.config.masks, rng)
    if not len(pairs):
        yield parts
        return
    alone = float(torch.rand(1, generator=rng)) < ALONE
    asked = _Asked(model, features, None if alone else rows(proposal, pairs), index[pairs], flat[pairs])
    parts["asked"] = asked.again(first_prompts(asked.target > 0.5, asked.scale, rng))
    yield parts
    asked.detach()
    for kind in _plan(model.method.config.iterations, rng):
        yield {"corrected": asked.again(asked.correction(kind, rng), train_prompts=False)}


class _Asked:
    """Pairs that are asked about again and again."""

    def __init__(
        self, model: Any, features: Features, proposal: Optional[Proposal], index: Tensor, target: Tensor
    ) -> None:
        self.model, self.features, self.proposal = model, features, proposal
        self.index, self.target = index, target
        self.scale = model.spec.input_size / target.shape[-1]
        self.masks = target  # logits of the last answer

    def again(self, user: PromptSet, *, train_prompts: bool = True) -> Tensor:
        """Loss of the answer to these prompts."""
        out, _ = self.model.decode(self.features, self.proposal, user, self.index, train_prompts=train_prompts)
        masks, iou = (t.float() for t in read_token(out, self.model.method.mask_token))
        self.masks = masks.detach()
        quality = (iou - soft_iou(self.masks, self.target)) ** 2
        return (_mask_loss(masks, self.target) + quality).mean()

    def detach(self) -> None:
        """Keeps gradients of the rounds to come inside the decoder."""
        high = self.features.high_res
        high = None if high is None else (high[0].detach(), high[1].detach())
        self.features = replace(self.features, embed=self.features.embed.detach(), high_res=high, taps={})
        if self.proposal is not None:
            prompts = {k: None if v is None else v.detach() for k, v in vars(self.proposal.prompts).items()}
            self.proposal = replace(self.proposal, prompts=PromptSet(**prompts))

    def correction(self, points: int, rng: torch.Generator) -> PromptSet:
        """The mask before, and so many points in what is wrong with it."""
        before = self.masks[:, None].clamp(-32, 32)
        if not points:
            return PromptSet(masks=before)
        xy, labels = error_points(self.target > 0.5, self.masks > 0, points, self.scale, rng)
        return PromptSet(points_xy=xy, labels=labels, masks=before)


def _drawn(target: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Numbers of the pairs asked about: ``count`` of every image, with replacement, out of those that are present."""
    present = (target > 0.5).flatten(2).any(2).float().cpu()  # (B, K)
    images = present.any(1).nonzero()[:, 0]
    if not len(images):
        return images
    classes = torch.multinomial(present[images], count, replacement=True, generator=rng)
    return (images[:, None] * target.shape[1] + classes).flatten().to(target.device)


def _plan(iterations: int, rng: torch.Generator) -> list[int]:
    """Points of every correction; 0 where the mask comes alone: at a random one and at the last."""
    chosen = torch.randint(len(POINTS), (iterations,), generator=rng).tolist()
    plan = [POINTS[n] for n in chosen]
    if plan:
        plan[int(torch.randint(iterations, (1,), generator=rng))] = plan[-1] = 0
    return plan


def first_prompts(target: Tensor, scale: float, rng: torch.Generator) -> PromptSet:
    """One box for all pairs or one point, with equal chance; ``target (N, G, G)`` bool, none empty."""
    if float(torch.rand(1, generator=rng)) < 0.5:
        return PromptSet(boxes_xy=_shifted(random_boxes(target, scale, 0.0, rng), rng))
    points = random_points(target, scale, rng)[:, None]
    return PromptSet(points_xy=points, labels=torch.ones(points.shape[:2], dtype=torch.long, device=points.device))


def _shifted(boxes: Tensor, rng: torch.Generator) -> Tensor:
    """``(N, 4)`` boxes, each moved as a whole."""
    short = (boxes[:, 2:] - boxes[:, :2]).amin(1, keepdim=True)
    draw = (torch.rand(len(boxes), 2, generator=rng) * 2 - 1).to(boxes.device)
    return boxes + (draw * (SHIFT_SHARE * short).clamp(max=SHIFT_PX)).repeat(1, 2)


def error_points(
    target: Tensor, predicted: Tensor, count: int, scale: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Points drawn evenly from what is wrong.

    Args:
        target: ``(N, G, G)`` bool.
        predicted: ``(N, G, G)`` bool.
        count: points per pair.
        scale: backbone pixels per cell.
        rng: source of randomness.

    Returns:
        ``(N, count, 2)`` backbone pixels and ``(N, count)`` labels: 1 in what was missed, 0 in what is too much, -1
        where nothing is wrong.
    """
    wrong, pairs = target ^ predicted, torch.arange(len(target), device=target.device)
    xy = torch.stack([random_points(wrong, scale, rng) for _ in range(count)], 1)
    known = ~xy.isnan().any(-1)
    xy = torch.nan_to_num(xy)
    column, row = ((xy + 0.5) / scale).long().clamp(0, target.shape[-1] - 1).unbind(-1)
    return xy, torch.where(known, target[pairs[:, None], row, column].long(), -1)
