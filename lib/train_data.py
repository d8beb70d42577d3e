"""Training batches of a learned model: slices of labelled volumes, augmented views, and kept features.

Where the encoder is frozen, features of the original and of augmented views are computed once and reused, half
precision on the CPU, as many views as fit the memory; where not even one fits, the same views are encoded anew, so that
memory decides about time and not about the result. A trained encoder sees fresh views in every step. A batch is a
function of (seed, step), so a resumed run sees what it would have seen. Frame: targets on the mask grid ``G = 4h``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lib.config import TrainRecipe
from lib.contracts import Features
from lib.data.geometry import choose_axis, slice_of, slice_view
from lib.data.samples import TrainingCase, training_slices
from lib.data.views import MOVES, augmented
from lib.data.window import apply_window
from lib.errors import ConfigError
from lib.learned import Learned
from lib.transform import SliceTransform

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slice:
    """One slice of one case."""

    case: TrainingCase
    axis: int
    index: int

    def pixels(self) -> np.ndarray:
        """``(H, W)``, or ``(H, W, M)`` of colour or channels, float in 0..1."""
        return apply_window(slice_of(self.case.volume, self.axis, self.index), self.case.volume.window)

    def classes(self) -> np.ndarray:
        """``(H, W)`` uint8."""
        return slice_view(self.case.target, self.axis, self.index)


def all_slices(cases: Sequence[TrainingCase]) -> list[Slice]:
    """Slices that are trained on, absent classes included, across each volume's own slice axis."""
    found = []
    for case in cases:
        axis = axis_of(case)
        found += [Slice(case, axis, index) for index in training_slices(case, axis)]
    return found


def axis_of(case: TrainingCase) -> int:
    """The slice axis, chosen as at inference."""
    return choose_axis(case.volume.spacing_mm, case.volume.shape, is_2d=case.volume.is_2d)


class Batches:
    """Features and targets of training batches.

    Args:
        model: asked for features; its encoder is frozen or not.
        slices: to draw from.
        recipe: batch, views, memory and seed.

    Raises:
        ConfigError: for an unknown augmentation.
    """

    def __init__(self, model: Learned, slices: Sequence[Slice], recipe: TrainRecipe) -> None:
        if recipe.augment not in MOVES:
            raise ConfigError(f"augment: expected one of {list(MOVES)}, received {recipe.augment!r}.")
        self.model, self.slices, self.recipe = model, list(slices), recipe
        longest = max((s.case.volume.shape[s.axis] for s in self.slices), default=1)
        self.depth = min(model.slices, longest)  # of the window around a slice; shorter volumes repeat their last slice
        self.views = 0 if model.changes_encoder else self._fitting_views()
        self._kept: list[list[tuple[Features, Tensor]]] = []
        self._pe = model.backbone.grid_encoding()

    def plan(self) -> str:
        """A sentence about what is kept, before training starts."""
        count = len(self.slices)
        if self.model.changes_encoder:
            return f"{count} slices; the encoder is trained, so every step encodes {self.recipe.batch} of them."
        if not self.views:
            return f"{count} slices; their features do not fit {self.recipe.memory_mb} MB, so every step encodes anew."
        fewer = "" if self.views == self.recipe.views else f" instead of {self.recipe.views}, which did not fit"
        size = self._bytes() * count * self.views >> 20
        return f"{count} slices in {self.views} views{fewer}: {size} of {self.recipe.memory_mb} MB for kept features."

    def left_bytes(self) -> int:
        """Of the memory for kept features, what those of training do not take; validation may have it."""
        return (self.recipe.memory_mb << 20) - self._bytes() * len(self.slices) * self.views

    def prepare(self) -> None:
        """Computes the features that are kept, once."""
        if self._kept:
            return
        places = range(len(self.slices) if self.views else 0)
        self._kept = [[self._frozen(p, view) for view in range(self.views)] for p in places]

    def batch(self, step: int) -> tuple[Features, Tensor]:
        """Features of B slices and targets ``(B, K, G, G)`` in 0..1."""
        rng = np.random.default_rng((self.recipe.seed, step))
        size = min(max(1, self.recipe.batch // self.depth), len(self.slices))
        places = rng.choice(len(self.slices), size, replace=False)
        views = self._draw_views(size, rng)
        if self.model.changes_encoder:
            return self._encode(list(zip(places.tolist(), views)))
        chosen = [self._frozen(int(p), v) for p, v in zip(places, views)]
        features = Features.joined([f for f, _ in chosen]).to(self._pe.device, torch.float32)
        return replace(features, pe=self._pe), torch.cat([t for _, t in chosen]).to(self._pe.device, torch.float32)

    def _frozen(self, place: int, view: int) -> tuple[Features, Tensor]:
        """What a frozen encoder gives, kept or made in the same way, so that memory changes the time and no result."""
        return self._kept[place][view] if self._kept else self._halved(*self._encode([(place, view)]))

    def _draw_views(self, size: int, rng: np.random.Generator) -> list[int]:
        """Numbers of views, 0 being the original: some of a few, or fresh ones for an encoder that learns."""
        if not self.model.changes_encoder:
            return rng.integers(self.views or self.recipe.views or 1, size=size).tolist()
        fresh = rng.integers(1, 2**31, size)
        return np.where(rng.random(size) < 1 / max(2, self.recipe.views), 0, fresh).tolist()

    def _encode(self, wanted: Sequence[tuple[int, int]]) -> tuple[Features, Tensor]:
        pairs = [pair for place, view in wanted for pair in self._window(place, view)]
        device = self._pe.device
        x = torch.stack([image for image, _ in pairs]).to(device)
        targets = torch.stack([target for _, target in pairs]).to(device)
        with torch.set_grad_enabled(self.model.changes_encoder and torch.is_grad_enabled()):
            return self.model.encode(x, self.depth), targets

    def _window(self, place: int, view: int) -> list[tuple[Tensor, Tensor]]:
        """A slice, or the window around it, all moved alike."""
        centre = self.slices[place]
        count = centre.case.volume.shape[centre.axis]
        start = min(max(0, centre.index - self.depth // 2), max(0, count - self.depth))
        indices = [min(start + n, count - 1) for n in range(self.depth)]
        return [self._view(replace(centre, index=index), place, view) for index in indices]

    def _view(self, one: Slice, place: int, view: int) -> tuple[Tensor, Tensor]:
        pixels, classes = one.pixels(), one.classes()
        if view:
            seed = np.random.SeedSequence((self.recipe.seed, place, view)).generate_state(1)[0]
            pixels, classes = augmented(pixels, classes, int(seed), MOVES[self.recipe.augment])
        transform = SliceTransform(self.model.spec, classes.shape)  # type: ignore[arg-type]
        return transform.image(pixels), targets(classes, self.model.classes, transform)

    def _fitting_views(self) -> int:
        self._pe = self.model.backbone.grid_encoding()
        budget = (self.recipe.memory_mb << 20) // max(1, len(self.slices))
        return max(0, min(self.recipe.views, budget // self._bytes()))

    def _bytes(self) -> int:
        """Of one slice's kept features and target, by the spec."""
        spec, taps = self.model.spec, self.model.method.taps
        cells, numbers = spec.grid**2, spec.prompt_width * spec.grid**2
        if spec.has_high_res:
            numbers += cells * 4 * (spec.prompt_width // 4) + cells * 16 * (spec.prompt_width // 8)
        numbers += sum(math.prod(spec.tap_shape(name)) for name in taps)
        return 2 * self.depth * (numbers + self.model.classes * spec.mask_size**2)

    def _halved(self, features: Features, target: Tensor) -> tuple[Features, Tensor]:
        return replace(features.halved(), pe=self._pe), target.to("cpu", torch.float16)  # one pe for all


def targets(classes: np.ndarray, count: int, transform: SliceTransform) -> Tensor:
    """``(H, W)`` class numbers to ``(K, G, G)`` shares of every cell in 0..1."""
    present = torch.from_numpy(np.ascontiguousarray(classes)) == torch.arange(1, count + 1)[:, None, None]
    return transform.coverage(present[:, None].float())[:, 0]
