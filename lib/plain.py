"""Plain SAM for several labels, as one label map, while nothing is trained.

SAM is asked for one structure at a time, so labels that lie in or beside each other come out overlapping, and in a
label map one of them has the voxel: the one whose prompt is nearest. What was pointed at or painted is what the user
said, as after training (:mod:`lib.claims`). With prompts of one label it is exactly plain SAM. Frame: voxels ``(i, j,
k)`` of the volume, distances in mm. The same for labels in any order but for ties; any number of threads may call it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from lib.cache import Lru
from lib.claims import Said
from lib.engine import Engine, SegmentOptions
from lib.errors import PromptError
from lib.prompts.user import by_slice
from lib.types import Index, LabelPrediction, Prediction, UserPrompts, Volume

KEPT_MB = 256  # of answers by label


class PlainLabels:
    """Every label by itself; one whose prompts are those of the last click is not asked about again.

    Args:
        engine: for volumes and plain SAM.
        method: that has no trained version, for messages.
        labels: names by class number from 1.
    """

    def __init__(self, engine: Engine, method: str, labels: tuple[str, ...]) -> None:
        self.engine, self.labels = engine, labels
        self._untrained = f"No trained version of {method} is live"
        self._kept: Lru[_Cut] = Lru(KEPT_MB << 20, lambda cut: cut.answer.mask.nbytes, engine.waiting)

    def segment(self, volume: Volume, prompts: Mapping[str, UserPrompts], options: SegmentOptions) -> LabelPrediction:
        """One map of all labels with prompts.

        Raises:
            PromptError: for prompts that cannot be used, or none that an object may begin at.
            WeightsError: if the backbone's weights are missing or wrong.
        """
        drawn = {self.labels.index(label) + 1: p for label, p in prompts.items() if p.starts}
        if not drawn:
            raise PromptError(
                f"{self._untrained}, so plain SAM answers, which needs a positive click or a box. Click on a "
                "structure, or train first."
            )
        found: dict[int, Prediction] = {}
        warnings: list[str] = []
        cache = Counter[str]()
        for number, one in drawn.items():
            found[number], sources = self._answer(volume, one, options)
            warnings += found[number].warnings
            cache.update(sources)
        mask = label_map(found, drawn, volume.spacing_mm, walks=options.propagate and not options.planar)
        quality = {self.labels[number - 1]: answer.quality for number, answer in found.items()}
        edited = {label: tuple(slices) for label, slices in quality.items()}
        axis = next(iter(found.values())).axis
        return LabelPrediction(
            mask, self.labels, axis, quality, {}, edited, None, {}, dict(cache),
            (*warnings, f"{self._untrained} yet: this is plain SAM."), volume.window,
        )  # fmt: skip

    def _answer(
        self, volume: Volume, prompts: UserPrompts, options: SegmentOptions
    ) -> tuple[Prediction, Mapping[str, int]]:
        cut, there = self._kept.get_or_make(
            _key(volume, prompts, options), lambda: _Cut.of(self.engine.segment(volume, prompts, options))
        )
        return cut.whole(), {"plain_hits": 1} if there else cut.answer.cache


def _key(volume: Volume, prompts: UserPrompts, options: SegmentOptions) -> str:
    """All that decides an answer; spacing decides the axis."""
    strokes = [(s.positive, hashlib.blake2b(s.voxels.tobytes()).digest()) for s in prompts.strokes]
    asked = (options, prompts.clicks, prompts.boxes, strokes)
    return repr((volume.content_hash, volume.window.key(), volume.spacing_mm, asked))


@dataclass(frozen=True)
class _Cut:
    """An answer without the empty part of its mask, which is most of a large volume."""

    answer: Prediction
    window: tuple[slice, ...]
    shape: Index

    @classmethod
    def of(cls, answer: Prediction) -> _Cut:
        i, j, k = answer.mask.shape
        window = (ndimage.find_objects(answer.mask) or [(slice(0),) * 3])[0]
        return cls(replace(answer, mask=np.array(answer.mask[window], order="F")), window, (i, j, k))

    def whole(self) -> Prediction:
        mask = np.zeros(self.shape, np.uint8, order="F")
        mask[self.window] = self.answer.mask
        return replace(self.answer, mask=mask)


def label_map(
    found: Mapping[int, Prediction], prompts: Mapping[int, UserPrompts], spacing_mm: Sequence[float], *, walks: bool
) -> np.ndarray:
    """``(I, J, K)`` uint8 class numbers.

    Args:
        found: plain SAM's answers by class number from 1, at least one.
        prompts: by the same numbers.
        spacing_mm: of the voxels.
        walks: whether a point may speak for slices beside its own.
    """
    mask = _nearest(found, prompts, spacing_mm)
    if len(found) == 1:
        return mask
    axis = next(iter(found.values())).axis
    shape = (mask.shape[0], mask.shape[1], mask.shape[2])
    points = {number - 1: by_slice(p, shape, axis, corrections=True) for number, p in prompts.items()}
    strokes = [(number, stroke) for number, p in prompts.items() for stroke in p.strokes]
    return Said.of(points, strokes, mask, axis, spacing_mm).settled(mask, mask, walks=walks)


def _nearest(
    found: Mapping[int, Prediction], prompts: Mapping[int, UserPrompts], spacing_mm: Sequence[float]
) -> np.ndarray:
    """Each voxel's label; where several want it, that of the nearest positive prompt."""
    first, *others = found.values()
    mask, wanted = np.zeros(first.mask.shape, np.uint8, order="F"), first.mask.astype(np.uint8)
    for other in others:
        wanted += other.mask
    for number, answer in found.items():
        mask[answer.mask > 0] = number
    contested = np.argwhere(wanted > 1)
    if not len(contested):
        return mask
    nearest = np.full(len(contested), np.inf)
    for number, answer in found.items():
        distance, _ = cKDTree(_places(prompts[number]) * spacing_mm).query(contested * np.asarray(spacing_mm))
        mine = (answer.mask[tuple(contested.T)] > 0) & (distance < nearest)
        nearest[mine] = distance[mine]
        mask[tuple(contested[mine].T)] = number
    return mask


def _places(prompts: UserPrompts) -> np.ndarray:
    """``(N, 3)`` voxels of what is positive; of a box its middle."""
    clicks = [click.ijk for click in prompts.clicks if click.positive]
    boxes = [[(lo + hi - 1) / 2 for lo, hi in zip(box.lo, box.hi)] for box in prompts.boxes]
    painted = [voxel for stroke in prompts.strokes if stroke.positive for voxel in stroke.voxels.tolist()]
    return np.array([*clicks, *boxes, *painted], float)
