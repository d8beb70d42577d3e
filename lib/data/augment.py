"""Batches for promptable pretraining: moved and recoloured images, chosen objects, neighbouring slices made up.

Torch, numpy and scipy only; randomness comes from the generator passed in. Frames: normalised image coordinates inside.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor


def augment(images: Tensor, labels: Tensor, side: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random flips, rotation, zoom, stretch, gamma, inversion.

    Args:
        images: ``(B, 3, h, w)`` float in 0..1.
        labels: ``(B, 1, h, w)`` float label numbers.
        side: output side S.
        rng: source of randomness.

    Returns:
        ``(B, 3, S, S)`` in 0..1 and ``(B, S, S)`` long.
    """
    b = len(images)
    u = torch.rand(b, 8, generator=rng)
    angle = (u[:, 0] - 0.5) * torch.pi / 3 + (u[:, 1] * 4).floor() * torch.pi / 2
    zoom, stretch = torch.exp((u[:, 2] - 0.65) * 1.3), torch.exp((u[:, 3] - 0.5) * 0.5)
    flip = torch.where(u[:, 4] < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    shift = (torch.rand(b, 2, generator=rng) - 0.5) * 0.5
    theta = torch.stack(
        [cos * stretch * flip, -sin / stretch, shift[:, 0], sin * stretch * flip, cos / stretch, shift[:, 1]], 1
    )
    grid = F.affine_grid(theta.view(b, 2, 3).to(images.device), [b, 1, side, side], align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    labels = F.grid_sample(labels, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    gamma = torch.exp((u[:, 5] - 0.5) * 1.0).view(b, 1, 1, 1).to(images.device)
    images = images.clamp(0, 1) ** gamma
    inverted = (u[:, 6] < 0.15).view(b, 1, 1, 1).to(images.device)
    return torch.where(inverted, 1 - images, images), labels[:, 0].round().long()


def degrade(images: Tensor, rng: torch.Generator) -> Tensor:
    """``(B, 3, S, S)`` in 0..1 with, each for some of the images, lost resolution, a bias field and noise."""
    b, side = len(images), images.shape[-1]
    u = torch.rand(b, 5, generator=rng).to(images.device)
    small = F.interpolate(images, scale_factor=float(0.3 + 0.4 * u[0, 0]), mode="bilinear", antialias=True)
    blurred = F.interpolate(small, (side, side), mode="bilinear")
    images = torch.where((u[:, 1] < 0.2)[:, None, None, None], blurred, images)
    field = F.interpolate(torch.randn(b, 1, 4, 4, generator=rng).to(images.device), (side, side), mode="bicubic")
    images = images * (1 + 0.3 * (u[:, 2] < 0.3)[:, None, None, None] * field)
    strength = 0.08 * u[:, 3] * (u[:, 4] < 0.3)
    noise = torch.randn(b, 1, side, side, generator=rng).to(images.device)
    return (images + strength[:, None, None, None] * noise).clamp(0, 1)


def choose_objects(
    labels: Tensor, per_image: int, rng: np.random.Generator, connected: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Object masks and whose image they are.

    Args:
        labels: ``(B, S, S)`` long.
        per_image: pairs wanted per image.
        rng: source of randomness.
        connected: probability that one connected part of a structure is the object. Structures that are scattered over
            the image cannot be told from a box or a click, and make a model unsure of everything large.

    Returns:
        ``(N, S, S)`` float masks and ``(N,)`` long image indices; images without a large enough object give none.
    """
    masks, index = [], []
    least = labels.shape[-1] ** 2 * 0.0004
    for b, label_map in enumerate(labels):
        counts = torch.bincount(label_map.flatten(), minlength=2).tolist()
        known = [k for k, c in enumerate(counts) if k > 0 and c >= least]
        for _ in range(per_image if known else 0):
            picked = rng.choice(known, size=2 if rng.random() < 0.12 else 1)
            mask = torch.isin(label_map, torch.as_tensor(picked, device=label_map.device))
            if connected and rng.random() < connected:
                mask = _one_part(mask, rng, least)
            masks.append(mask)
            index.append(b)
    if not masks:
        return labels.new_zeros(0, *labels.shape[-2:]).float(), torch.zeros(0, dtype=torch.long)
    return torch.stack(masks).float(), torch.tensor(index)


def _one_part(mask: Tensor, rng: np.random.Generator, least: float) -> Tensor:
    """A connected part of a mask, larger ones more often; the largest where none has ``least`` pixels."""
    parts, _ = ndimage.label(mask.cpu().numpy())
    sizes = np.bincount(parts.ravel())[1:].astype(float)
    weights = np.where(sizes >= least, sizes, 0)
    weights = weights if weights.any() else sizes == sizes.max()
    return torch.from_numpy(parts == 1 + rng.choice(len(sizes), p=weights / weights.sum())).to(mask.device)


def neighbour(masks: Tensor, rng: torch.Generator) -> Tensor:
    """``(N, G, G)`` bool masks as the slice above or below might show them: moved, grown or shrunk a little."""
    n = len(masks)
    zoom = torch.exp((torch.rand(n, generator=rng) - 0.5) * 0.4)
    shift = (torch.rand(n, 2, generator=rng) - 0.5) * 0.06
    zero = torch.zeros(n)
    theta = torch.stack([zoom, zero, shift[:, 0], zero, zoom, shift[:, 1]], 1).view(n, 2, 3).to(masks.device)
    rows = torch.arange(masks.shape[-1], device=masks.device) / masks.shape[-1] * 2 - 1
    weight = masks.float()
    area = weight.flatten(1).sum(1).clamp_min(1)
    centre = torch.stack([(weight.sum(1) * rows).sum(1) / area, (weight.sum(2) * rows).sum(1) / area], 1)
    theta[:, :, 2] += centre * (1 - theta[:, [0, 1], [0, 1]])  # about the object's own centre
    grid = F.affine_grid(theta, [n, 1, *masks.shape[-2:]], align_corners=False)
    moved = F.grid_sample(weight[:, None], grid, mode="bilinear", align_corners=False)[:, 0] > 0.5
    return torch.where(moved.flatten(1).any(1)[:, None, None], moved, masks)
