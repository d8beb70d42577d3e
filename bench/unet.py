"""The baseline of the learned prompts: MONAI's DynUNet from scratch on the same slices, for the same time.

2-D slices at native resolution, in patches of at most 128 pixels a side of which every second holds foreground, as
nnU-Net does it: whole slices took 1.9 s a step and left the network near zero after five minutes. The same
augmentation; Dice over the batch and cross entropy, no deep supervision. Frame: slices as
:class:`lib.train_data.Slice` cuts them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lib.data.geometry import put_slice
from lib.data.samples import TrainingCase
from lib.data.views import MOVES, augmented
from lib.train_data import Slice, all_slices, axis_of

FILTERS = (16, 32, 64, 128, 128)
BATCH, PATCH = 8, 128


def build(classes: int) -> torch.nn.Module:
    """A DynUNet of 1.3 M parameters."""
    from monai.networks.nets import DynUNet

    levels = len(FILTERS)
    return DynUNet(
        2, 1, classes + 1, [3] * levels, [1] + [2] * (levels - 1), [2] * (levels - 1), filters=FILTERS,
        norm_name="instance",
    )  # fmt: skip


def train(
    cases: Sequence[TrainingCase], classes: int, budget_s: float, seed: int,
    clock: Callable[[], float] = time.monotonic,
) -> torch.nn.Module:  # fmt: skip
    """Trains until the budget is spent: AdamW 1e-3, cosine over the time of ``clock``."""
    from monai.losses import DiceCELoss

    torch.manual_seed(seed)
    slices, net = all_slices(cases), build(classes)
    shapes = np.array([s.classes().shape for s in slices])
    size = _padded([tuple(np.median(shapes, 0).clip(max=PATCH).astype(int))])
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-4)
    rng, started = np.random.default_rng(seed), clock()
    while (spent := clock() - started) < budget_s:
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * (0.05 + 0.475 * (1 + np.cos(np.pi * spent / budget_s)))
        chosen = [slices[i] for i in rng.choice(len(slices), min(BATCH, len(slices)), replace=False)]
        pairs = [augmented(s.pixels(), s.classes(), int(rng.integers(2**31)), MOVES["mild"]) for s in chosen]
        crops = [_crop(t, size, rng, n % 2 == 0) for n, (_, t) in enumerate(pairs)]
        x = torch.stack([_input(p[c], size) for (p, _), c in zip(pairs, crops)])
        y = torch.stack([_pad(torch.from_numpy(t[c]).float(), size) for (_, t), c in zip(pairs, crops)])[:, None]
        optimiser.zero_grad()
        loss_of(net(x), y).backward()
        optimiser.step()
    return net.eval()


def segment(net: torch.nn.Module, case: TrainingCase) -> np.ndarray:
    """``(I, J, K)`` uint8 class numbers."""
    from monai.inferers import sliding_window_inference

    axis, out = axis_of(case), np.zeros(case.volume.shape, np.uint8)
    with torch.inference_mode():
        for index in range(case.volume.shape[axis]):
            pixels = Slice(case, axis, index).pixels()
            rows, columns = pixels.shape[:2]
            x = _input(pixels, _padded([pixels.shape[:2]]))[None]
            roi = [min(PATCH, n) for n in x.shape[2:]]
            labels = sliding_window_inference(x, roi, BATCH, net, 0.5, "gaussian")[0].argmax(0)[:rows, :columns]
            put_slice(out, axis, index, labels.numpy().astype(np.uint8))
    return out


def _crop(classes: np.ndarray, size: tuple[int, int], rng: np.random.Generator, on_class: bool) -> tuple[slice, slice]:
    """A random part of at most ``size``, around a pixel of some class if wanted and if there is one."""
    inside = np.argwhere(classes > 0) if on_class else []
    if len(inside):
        centre = inside[rng.integers(len(inside))]
        starts = [int(np.clip(c - n // 2, 0, max(0, whole - n))) for c, n, whole in zip(centre, size, classes.shape)]
    else:
        starts = [int(rng.integers(max(0, whole - n) + 1)) for whole, n in zip(classes.shape, size)]
    return slice(starts[0], starts[0] + size[0]), slice(starts[1], starts[1] + size[1])


def _input(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    x = torch.from_numpy(np.ascontiguousarray(pixels if pixels.ndim == 2 else pixels.mean(2)))
    return _pad((x - 0.5) / 0.25, size)[None]


def _pad(x: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.nn.functional.pad(x, (0, size[1] - x.shape[1], 0, size[0] - x.shape[0]))


def _padded(shapes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    rows, columns = (max(s[n] for s in shapes) for n in (0, 1))
    return -(-rows // 16) * 16, -(-columns // 16) * 16
