"""Dice of a learned model on whole volumes, nobody clicking: the number that chooses and gates versions.

A class that is absent from both prediction and truth counts 1 (METHODS 7.6). Slices across each volume's own axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from lib.contracts import Features
from lib.data.geometry import put_slice, slice_size
from lib.data.samples import TrainingCase
from lib.learned import Answer, Learned, combine
from lib.train_data import Slice, axis_of
from lib.transform import SliceTransform
from lib.windows import answers

FeaturesOf = Callable[[Sequence[Slice]], Features]


def encoded(model: Learned) -> FeaturesOf:
    """A function that encodes slices anew."""

    def features(slices: Sequence[Slice]) -> Features:
        shape = slices[0].classes().shape
        transform = SliceTransform(model.spec, shape)  # type: ignore[arg-type]
        x = torch.stack([transform.image(s.pixels()) for s in slices])
        depth = len(slices) if model.slices > 1 else 1
        return model.encode(x.to(model.backbone.grid_encoding().device), depth)

    return features


def kept(features: FeaturesOf, limit: int) -> FeaturesOf:
    """The same function that computes every group of slices once: validation asks for the same ones each epoch.

    Args:
        features: computes them.
        limit: bytes for what is kept; what comes later is computed each time.
    """
    memory: dict[tuple[str, int], tuple[Features, Tensor]] = {}
    left = limit

    def remembered(slices: Sequence[Slice]) -> Features:
        nonlocal left
        key = (slices[0].case.case, slices[0].index)
        there = memory.get(key)
        if there is None:
            fresh = features(slices)
            there = fresh.to("cpu", torch.float16), fresh.pe  # pe is the same for all and knows the device
            if there[0].nbytes() <= left:
                memory[key], left = there, left - there[0].nbytes()
        half, pe = there
        return replace(half.to(pe.device, torch.float32), pe=pe)

    return remembered


def segmented(model: Learned, case: TrainingCase, features: FeaturesOf) -> np.ndarray:
    """``(I, J, K)`` uint8 class numbers of one case."""
    axis = axis_of(case)
    transform = SliceTransform(model.spec, slice_size(case.volume.shape, axis))
    out = np.zeros(case.volume.shape, np.uint8, order="F")

    def of(group: range) -> Features:
        return features([Slice(case, axis, i) for i in group])

    with torch.inference_mode():
        for group, answer in answers(model, case.volume.shape[axis], of):
            for index, labels in zip(group, label_maps(answer, model.classes, transform)):
                put_slice(out, axis, index, labels.numpy())
    return out


def label_maps(answer: Answer, classes: int, transform: SliceTransform) -> Tensor:
    """``(B, H, W)`` uint8 on the CPU from the answer for ``B * K`` pairs."""
    logits = transform.logits(answer.masks.unflatten(0, (-1, classes)))
    return combine(logits, answer.obj.view(-1, classes)).cpu()


def case_dice(predicted: np.ndarray, truth: np.ndarray, classes: int) -> list[float]:
    """Dice of classes 1..K."""
    from monai.metrics import compute_dice  # seconds to import

    found, true = (torch.from_numpy(np.ravel(np.asfortranarray(a), order="K")) for a in (predicted, truth))
    dice = []
    for number in range(1, classes + 1):  # one by one: all of them as float are gigabytes of a large volume
        one, other = ((voxels == number)[None, None].float() for voxels in (found, true))  # (1, 1, voxels)
        dice.append(compute_dice(one, other, include_background=True, ignore_empty=False).item())
    return dice


def evaluate(
    model: Learned,
    cases: Sequence[TrainingCase],
    labels: Sequence[str],
    features: FeaturesOf,
    own: Optional[Sequence[str]] = None,
) -> dict[str, Any]:
    """``mean_dice``, ``dice`` by label and ``cases`` with Dice by label, for a version's metrics.

    Args:
        model: in eval mode.
        cases: whose targets number ``labels`` from 1.
        labels: that count.
        features: see :func:`encoded`.
        own: the model's labels where they are not ``labels``; one that it does not know it leaves empty.
    """
    table = np.zeros(256, np.uint8)
    for number, label in enumerate(own or labels, start=1):
        table[number] = labels.index(label) + 1 if label in labels else 0
    found = {c.case: case_dice(table[segmented(model, c, features)], c.target, len(labels)) for c in cases}
    return summary(found, labels)


def summary(rows: dict[str, list[float]], labels: Sequence[str]) -> dict[str, Any]:
    """Means of per-case Dice."""
    table = np.array(list(rows.values())).reshape(-1, len(labels))
    mean = float(table.mean()) if table.size else math.nan
    dice = {label: float(table[:, k].mean()) for k, label in enumerate(labels)} if len(table) else {}
    return {"mean_dice": mean, "dice": dice, "cases": {c: dict(zip(labels, row)) for c, row in rows.items()}}
