"""A volume as the live version, or the plain backbone, sees it: evidence about it, with features that are kept nowhere.

Not thread-safe: one per volume.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import numpy as np
import torch

from lib.active.evidence import Evidence, View, embedding, examine
from lib.assisted import AssistedEngine, Live
from lib.contracts import Backbone, Features
from lib.data.geometry import choose_axis, slice_of, slice_size
from lib.data.window import apply_window
from lib.learned import Learned
from lib.transform import SliceTransform
from lib.types import Volume

MOST_SLICES = 64  # of one image that are looked at, evenly spread; a model that sees neighbours gets all


class Sight:
    """One volume as the live version, or the plain backbone, sees it.

    Args:
        assisted: engine of the method.
        volume: the image.
        live: version to see it with; None for the plain backbone.
        between: called before each group of slices, for what is more urgent.
    """

    def __init__(
        self, assisted: AssistedEngine, volume: Volume, live: Optional[Live], between: Callable[[], None]
    ) -> None:
        self.engine, self.volume, self.live, self._between = assisted.engine, volume, live, between
        self.backbone: Backbone = assisted.engine.warm() if live is None else live.model.backbone
        self.axis = choose_axis(volume.spacing_mm, volume.shape, is_2d=volume.is_2d)
        self.transform = SliceTransform(self.backbone.spec, slice_size(volume.shape, self.axis))
        count = volume.shape[self.axis]
        spread = live is None or live.model.slices == 1
        most = min(count, MOST_SLICES) if spread else count
        self.indices = np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()

    def evidence(self, *, with_answer: bool) -> Evidence:
        """Embedding alone without a version or a wish for more."""
        if self.live is None or not with_answer:
            return Evidence(None, None, embedding(len(self.indices), lambda group: self.features(group, View())))
        flips = self.live.version.recipe.get("augment") == "paper"
        return examine(self.live.model, len(self.indices), self.features, flips=flips)

    def features(self, group: range, view: View) -> Features:
        """Of some of the slices, encoded anew and kept nowhere."""
        with torch.inference_mode(False):  # it may load a model, whose tensors would be of this mode
            self._between()
        images = []
        for place in group:
            pixels = apply_window(slice_of(self.volume, self.axis, self.indices[place]), self.volume.window)
            images.append(self.transform.image(pixels))
        x = view.of(torch.stack(images).to(self.engine.device()))
        model: Optional[Learned] = None if self.live is None else self.live.model
        with torch.inference_mode():
            return self.backbone.encode(x) if model is None else model.encode(x, self._depth(model, group))

    @staticmethod
    def _depth(model: Learned, group: range) -> int:
        return len(group) if model.slices > 1 else 1
