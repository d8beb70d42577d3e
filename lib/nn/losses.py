"""Losses per (image, class) pair, so that an empty pair cannot hide in a batch mean (METHODS 7.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
