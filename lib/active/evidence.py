"""What a model shows of its own doubt on one volume, nobody clicking: raw quality, disagreement, embedding.

Raw quality of a label is the mean of two opinions of its Dice over the whole volume, which agree where the label is
right: the IoU head's, weighted by the area shown on each slice, and soft Dice, sigmoid of the mask times probability
that the label is there against the mask that is shown, which also falls for slices that are left out.
docs/active_learning.md says how they compare. Disagreement is the mean Dice distance between that answer and others:
learned prompts jittered, the image turned a little either way, and mirrored where the model was trained on mirrored
images (one that was not cannot know them). All on the mask grid. Deterministic; no state; thread-safe with a model in
eval mode. Left out: calibration (:mod:`lib.active.calibration`) and files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.active.sums import Distance, Pooled, Quality
from lib.contracts import Features, PromptSet
from lib.data.samples import TrainingCase
from lib.evaluate import FeaturesOf as SlicesToFeatures
from lib.learned import Answer, Learned, combine
from lib.train_data import Slice, axis_of
from lib.windows import BATCH, answers

DEGREES = 10.0  # of turned images, inside what training shows
JITTERS = 2  # answers to moved prompts
MOVE = 0.05  # of a box's sides, or of the input for points
NOISE = 0.2  # of the spread of tokens and maps
OUTSIDE = -20.0  # logit where a turned image ends


@dataclass(frozen=True)
class View:
    """How the encoder sees the slices.

    Args:
        degrees: by which its input is turned.
        mirrored: left and right of it exchanged.
    """

    degrees: float = 0.0
    mirrored: bool = False

    def of(self, images: Tensor) -> Tensor:
        """``(B, C, H, H)`` as seen."""
        seen = images if self.degrees == 0 else _turned(images, self.degrees, 0.0)
        return seen.flip(-1) if self.mirrored else seen

    def back(self, masks: Tensor) -> Tensor:
        """``(N, h, h)`` logits of what was seen, where the slices have them."""
        there = masks.flip(-1) if self.mirrored else masks
        return there if self.degrees == 0 else _turned(there[:, None], -self.degrees, OUTSIDE)[:, 0]


PLAIN = View()
FeaturesOf = Callable[[range, View], Features]


@dataclass(frozen=True)
class Evidence:
    """What was seen.

    Args:
        raw: ``(K,)`` raw quality in 0..1; None without a model.
        disagreement: 0..1; None without a model.
        embedding: ``(2E,)`` mean and deviation of the image embedding over slices and places.
    """

    raw: Optional[Tensor]
    disagreement: Optional[float]
    embedding: Tensor


def examine(model: Learned, count: int, features_of: FeaturesOf, *, flips: bool) -> Evidence:
    """All evidence about a volume.

    Args:
        model: in eval mode.
        count: slices.
        features_of: of consecutive slices in a view.
        flips: whether the model was trained on mirrored images.
    """
    pooled, memory = Pooled(), _Last()

    def plain(indices: range) -> Features:
        found, fresh = memory.get(indices, lambda: features_of(indices, PLAIN))
        if fresh:
            pooled.add(found.embed)
        return found

    passes = [answers(model, count, plain)]
    passes += [answers(_Jittered(model, seed), count, plain) for seed in range(JITTERS)]  # type: ignore[arg-type]
    views = [View(DEGREES), View(-DEGREES), *([View(mirrored=True)] if flips else [])]
    passes += [_seen(model, count, features_of, view) for view in views]
    quality, distance = Quality(model.classes), Distance(model.classes)
    with torch.inference_mode():
        for together in zip(*passes):
            first, *others = [found for _, found in together]
            shown = _labels(first, model.classes)
            quality.add(first, shown)
            distance.add(shown, [_labels(other, model.classes) for other in others])
    return Evidence(quality.found(), distance.found(), pooled.found())


def embedding(count: int, features_of: Callable[[range], Features]) -> Tensor:
    """``(2E,)`` mean and deviation of a volume's features, without any model on them."""
    pooled = Pooled()
    with torch.inference_mode():
        for start in range(0, count, BATCH):
            pooled.add(features_of(range(start, min(start + BATCH, count))).embed)
    return pooled.found()


def raw_quality(model: Learned, count: int, features_of: Callable[[range], Features]) -> Tensor:
    """``(K,)`` raw quality alone, for calibration."""
    quality = Quality(model.classes)
    with torch.inference_mode():
        for _, found in answers(model, count, features_of):
            quality.add(found, _labels(found, model.classes))
    return quality.found()


def calibration_pairs(
    model: Learned,
    cases: Sequence[TrainingCase],
    labels: Sequence[str],
    dice: Mapping[str, Mapping[str, float]],
    features: SlicesToFeatures,
) -> dict[str, list[tuple[float, float]]]:
    """Raw quality and true Dice of every label on validation cases, for :mod:`lib.active.calibration`.

    Args:
        model: in eval mode.
        cases: to look at.
        labels: of the model, in the order of its classes.
        dice: by case and label.
        features: see :func:`lib.evaluate.encoded`.
    """
    pairs: dict[str, list[tuple[float, float]]] = {label: [] for label in labels}
    for case in cases:
        axis = axis_of(case)
        raw = raw_quality(model, case.volume.shape[axis], partial(_of_case, features, case, axis))
        for label, value in zip(labels, raw.tolist()):
            pairs[label].append((value, dice[case.case][label]))
    return pairs


def _of_case(features: SlicesToFeatures, case: TrainingCase, axis: int, group: range) -> Features:
    return features([Slice(case, axis, index) for index in group])


def _seen(model: Learned, count: int, features_of: FeaturesOf, view: View) -> Iterator[tuple[range, Answer]]:
    for group, found in answers(model, count, lambda indices: features_of(indices, view)):
        yield group, replace(found, masks=view.back(found.masks))


def _turned(images: Tensor, degrees: float, outside: float) -> Tensor:
    """Turned around the middle; ``outside`` where nothing was seen."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = images.new_tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images - outside, grid, padding_mode="zeros", align_corners=False) + outside


def _labels(answer: Answer, classes: int) -> Tensor:
    """``(B, 4h, 4w)`` uint8 class numbers on the mask grid."""
    return combine(answer.masks.unflatten(0, (-1, classes)), answer.obj.view(-1, classes))


class _Jittered:
    """A model whose learned prompts are moved a little, equally in every run."""

    def __init__(self, model: Learned, seed: int) -> None:
        self.model, self.slices, self.classes, self.spec = model, model.slices, model.classes, model.spec
        self._rng = torch.Generator().manual_seed(seed)

    def autonomous(self, features: Features) -> Answer:
        """As :meth:`lib.learned.Learned.autonomous`."""
        proposal = self.model.propose(features)
        moved = replace(proposal, prompts=self._moved(proposal.prompts))
        images = torch.arange(features.embed.shape[0], device=features.embed.device)
        return self.model.decode(features, moved, PromptSet(), images.repeat_interleave(self.classes))[1]

    def _moved(self, prompts: PromptSet) -> PromptSet:
        boxes, changed = prompts.boxes_xy, {}
        if boxes is not None:
            sides = (boxes[..., 2:] - boxes[..., :2]).abs()
            changed["boxes_xy"] = boxes + MOVE * torch.cat([sides, sides], -1) * self._normal(boxes)
        if prompts.points_xy is not None:
            changed["points_xy"] = prompts.points_xy + MOVE * self.spec.input_size * self._normal(prompts.points_xy)
        for name in ("tokens", "dense", "masks"):
            part: Optional[Tensor] = getattr(prompts, name)
            if part is not None:
                changed[name] = part + NOISE * part.std() * self._normal(part)
        return replace(prompts, **changed)

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._rng).to(like)


class _Last:
    """The last value that was made: passes in step ask for the same slices one after the other."""

    def __init__(self) -> None:
        self._key: Optional[range] = None
        self._value: Any = None

    def get(self, key: range, make: Callable[[], Features]) -> tuple[Features, bool]:
        """The value, and whether it was made now."""
        fresh = key != self._key
        if fresh:
            self._key, self._value = key, make()
        return self._value, fresh
