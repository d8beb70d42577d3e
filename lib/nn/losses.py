"""Losses per (image, class) pair, so that an empty pair cannot hide in a batch mean (METHODS 7.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.contracts import DecoderOut


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


def pair_loss(out: DecoderOut, target: Tensor, present: Tensor, *, multimask: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mask, IoU and objectness loss.

    Args:
        out: decoder output of N pairs.
        target: ``(N, G, G)`` soft masks.
        present: ``(N,)`` bool; absent pairs teach objectness only.
        multimask: True also trains the best of tokens 1 to 3.

    Returns:
        Scalar loss, mean Dice of the single mask over present pairs, and ``(N,)`` the candidate to feed back.
    """
    n, m = out.masks.shape[:2]
    flat, wide = out.masks.flatten(0, 1), target.repeat_interleave(m, 0)
    mask_loss = (balanced_bce(flat, wide) + dice_loss(flat, wide)).view(n, m)
    best = mask_loss[:, 1:].argmin(1) + 1
    chosen = mask_loss[:, 0] + (mask_loss.gather(1, best[:, None])[:, 0] if multimask else 0)
    iou = soft_iou(flat, wide).view(n, m).detach()
    count = present.sum().clamp_min(1)
    loss = (chosen * present).sum() / count + (((out.iou - iou) ** 2).mean(1) * present).sum() / count
    obj = F.binary_cross_entropy_with_logits(out.obj[:, 0], present.float())  # type: ignore[index]
    dice = ((2 * iou[:, 0] / (1 + iou[:, 0])) * present).sum() / count
    return loss + 0.2 * obj, dice, best
