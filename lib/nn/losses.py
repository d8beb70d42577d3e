"""Losses per (image, class) pair, so that an empty pair cannot hide in a batch mean (METHODS 7.5)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.contracts import DecoderOut
from lib.errors import ConfigError


def dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """``(N, H, W)`` logits and soft targets in 0..1 to ``(N,)`` soft Dice losses."""
    prob, target = logits.sigmoid().flatten(1), target.flatten(1)
    overlap = (prob * target).sum(1)
    return 1 - (2 * overlap + smooth) / (prob.sum(1) + target.sum(1) + smooth)


def balanced_bce(logits: Tensor, target: Tensor) -> Tensor:
    """``(N,)`` cross entropy where foreground and background of each pair weigh the same.

    From random weights the usual focal + Dice loss sits in the empty mask for thousands of images; this one does not.
    """
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1)
    inside = target.flatten(1)
    positive = (loss * inside).sum(1) / inside.sum(1).clamp_min(1.0)
    negative = (loss * (1 - inside)).sum(1) / (1 - inside).sum(1).clamp_min(1.0)
    return 0.5 * (positive + negative)


def soft_iou(logits: Tensor, target: Tensor) -> Tensor:
    """``(N,)`` IoU of the thresholded mask with the target, the number that the IoU head learns."""
    mask, target = (logits > 0).flatten(1).float(), target.flatten(1)
    overlap = torch.minimum(mask, target).sum(1)
    return (overlap + 1e-6) / (torch.maximum(mask, target).sum(1) + 1e-6)


def area_bce(logits: Tensor, target: Tensor) -> Tensor:
    """``(N,)`` summed cross entropy over the target's area and one per cent of the grid.

    Small and large objects weigh alike, as with Dice, but within an object the classes are not re-weighted, so logit 0
    stays where either class is as likely: :func:`balanced_bce` alone over-fills thin structures.
    """
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).sum(1)
    return 0.25 * loss / (target.flatten(1).sum(1) + 0.01 * target[0].numel())


def pair_loss(
    out: DecoderOut, target: Tensor, present: Tensor, *, multimask: bool, balance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mask, IoU and objectness loss.

    Args:
        out: decoder output of N pairs.
        target: ``(N, G, G)`` soft masks.
        present: ``(N,)`` bool; absent pairs teach objectness only.
        multimask: True also trains the best of tokens 1 to 3, and the others a little: left alone they die.
        balance: share of :func:`balanced_bce` in the cross entropy, for the first steps from random weights.

    Returns:
        Scalar loss and mean Dice of the single mask over present pairs.
    """
    n, m = out.masks.shape[:2]
    trained = out.masks if multimask else out.masks[:, :1]
    flat, wide = trained.flatten(0, 1), target.repeat_interleave(trained.shape[1], 0)
    entropy = (1 - balance) * area_bce(flat, wide)
    if balance:
        entropy = entropy + balance * balanced_bce(flat, wide)
    mask_loss = (entropy + dice_loss(flat, wide)).view(n, -1)
    chosen = mask_loss[:, 0]
    if multimask:
        chosen = chosen + 0.9 * mask_loss[:, 1:].amin(1) + 0.1 * mask_loss[:, 1:].mean(1)
    iou = soft_iou(out.masks.detach().flatten(0, 1), target.repeat_interleave(m, 0)).view(n, m)
    count = present.sum().clamp_min(1)
    loss = (chosen * present).sum() / count + 2 * (((out.iou - iou) ** 2).mean(1) * present).sum() / count
    obj = F.binary_cross_entropy_with_logits(out.obj[:, 0], present.float())  # type: ignore[index]
    dice = ((2 * iou[:, 0] / (1 + iou[:, 0])) * present).sum() / count
    return loss + 0.2 * obj, dice


def focal_loss(logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    """``(N,)`` mean focal loss; ``alpha`` weighs positives and ``1 - alpha`` negatives (METHODS 3.5)."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    prob = logits.sigmoid()
    missed = prob * (1 - target) + (1 - prob) * target
    weight = alpha * target + (1 - alpha) * (1 - target)
    return (weight * missed**gamma * entropy).flatten(1).mean(1)


def box_loss(boxes: Tensor, target: Tensor) -> Tensor:
    """``(N,)`` L1 and generalised IoU loss of ``(N, 4)`` boxes x0 y0 x1 y1 in 0..1."""
    from torchvision.ops import generalized_box_iou_loss  # pretraining runs without torchvision

    return (boxes - target).abs().mean(1) + generalized_box_iou_loss(boxes, target)


def present_mean(values: Tensor, present: Tensor) -> Tensor:
    """Mean over the pairs that count, 0 where none does: never 0/0."""
    return (values * present).sum() / present.sum().clamp_min(1)


def bce_dice(logits: Tensor, target: Tensor) -> Tensor:
    """``(N,)`` mean cross entropy and soft Dice loss, weights 1:1 (METHODS 2.3, 6.3)."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).mean(1)
    return entropy + dice_loss(logits, target)


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """``(N,)`` soft Dice loss and :func:`area_bce`, the app's own choice for every method."""
    return dice_loss(logits, target) + area_bce(logits, target)


def mask_part(preset: str, presets: tuple[str, str], logits: Tensor, target: Tensor, there: Tensor) -> Tensor:
    """Scalar mask loss where the paper takes :func:`bce_dice` of every pair and ``plain`` counts those that are there.

    Args:
        preset: one of them.
        presets: the paper's name, and ``plain``.
        logits: ``(N, G, G)``.
        target: ``(N, G, G)`` in 0..1.
        there: ``(N,)`` 1 or 0, see :func:`visible`.

    Raises:
        ConfigError: for another preset.
    """
    if preset not in presets:
        raise ConfigError(f"loss: expected one of {list(presets)}, received {preset!r}.")
    if preset == presets[0]:
        return bce_dice(logits, target).mean()
    return present_mean(plain_loss(logits, target), there)


def visible(target: Tensor, pixels: float) -> Tensor:
    """``(N,)`` 1 where ``(N, G, G)`` targets cover more than 10 of ``pixels`` input pixels per cell, else 0.

    A class of a few pixels teaches its objectness only (METHODS 3.5).
    """
    return (target.flatten(1).sum(1) * pixels > 10).float()


def presence_loss(obj: Tensor, target: Tensor) -> Tensor:
    """Scalar cross entropy of ``(N,)`` objectness logits with whether ``(N, G, G)`` targets hold anything, smoothed."""
    there = 0.05 + 0.9 * (target.flatten(1).sum(1) > 0).float()
    return F.binary_cross_entropy_with_logits(obj.clamp(-10, 10), there)


def point_loss(points_xy: Tensor, labels: Tensor, target: Tensor, side: int) -> Tensor:
    """``(N,)`` cross entropy of what lies under each point with what it says, differentiable in the coordinates.

    Args:
        points_xy: ``(N, P, 2)`` in pixels of the backbone's input.
        labels: ``(N, P)``, 1 inside, 0 outside, -1 not counted.
        target: ``(N, G, G)`` in 0..1, blurred here with sigma ``side / 128`` pixels so that there is a slope.
        side: S of the input in pixels (METHODS 6.3).
    """
    from torchvision.transforms.functional import gaussian_blur  # pretraining runs without torchvision

    sigma = target.shape[-1] / 128
    soft = gaussian_blur(target[:, None].float(), 2 * math.ceil(3 * sigma) + 1, sigma)
    grid = (points_xy.float() + 0.5) / side * 2 - 1
    under = F.grid_sample(soft, grid[:, :, None], padding_mode="border", align_corners=False)[:, 0, :, 0]  # (N, P)
    right = torch.where(labels == 1, under, 1 - under).clamp(1e-2, 1)
    counted = (labels >= 0).float()
    return -(right.log() * counted).sum(1) / counted.sum(1).clamp_min(1)
