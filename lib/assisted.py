"""Autonomous and assisted segmentation with the live version of a learned method, over the engine's caches.

Autonomous: all slices, all classes, nobody clicks; kept per volume, window, axis and version. Assisted: on slices with
prompts, learned and user prompts go into one decoder call, of which the change at the user's points is kept; it is
carried to the neighbours both ways while it changes anything and as far as the points reach (:mod:`lib.claims`), and
everything else is the autonomous result. Without a live version each label is plain SAM (:mod:`lib.plain`).

The answer depends on nothing but volume, prompts, options and version. Any number of threads may call it; a new live
version is noticed with one look at a file and loaded once, while requests under way finish with the old one.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from lib.automatic import Automatic, changed_pairs, gated
from lib.cache import Lru
from lib.carried import Pair, Step, carry, combined
from lib.claims import Said
from lib.config import MethodRow
from lib.contracts import Features, PromptSet, Proposal
from lib.correction import Points, near_points
from lib.data.geometry import choose_axis, put_slice, slice_size, slice_view, to_slice_rc
from lib.data.window import with_window
from lib.engine import Engine, SegmentOptions
from lib.errors import PromptError
from lib.evaluate import label_maps
from lib.learned import Answer, Learned
from lib.plain import PlainLabels
from lib.prompts.user import SlicePrompts, by_slice, prompt_set
from lib.proposed import points_by_label
from lib.timing import Timed
from lib.transform import SliceTransform
from lib.types import LabelPrediction, UserPrompts, Volume
from lib.uncertainty import Uncertainty, entropy_map
from lib.versions.gate import check_fits
from lib.versions.record import Version
from lib.versions.store import VersionStore
from lib.windows import answers, window_around

KEPT_MB = 512  # of autonomous results; the last one stays whatever its size, or every click would make it anew
WINDOWS_MB = 256  # of features around clicked slices, for models that see neighbours
DEFAULTS = SegmentOptions()


@dataclass(frozen=True)
class Live:
    """A version that answers."""

    version: Version
    model: Learned


class AssistedEngine:
    """One learned method on one engine.

    Args:
        engine: for volumes and features.
        row: the method.
        store: of its versions.
        labels: of plain SAM, while no version is live.
    """

    def __init__(self, engine: Engine, row: MethodRow, store: VersionStore, labels: tuple[str, ...]) -> None:
        self.engine, self.row, self.store, self.offered = engine, row, store, labels
        self._plain = PlainLabels(engine, row.name, labels)
        self._kept: Lru[Automatic] = Lru(KEPT_MB << 20, Automatic.nbytes, engine.waiting, least=1)
        self._windows: Lru[Features] = Lru(WINDOWS_MB << 20, Features.nbytes, engine.waiting)
        self._live: tuple[object, Live | None] = (None, None)
        self._loading = threading.Lock()

    def live_version(self) -> Version | None:
        """The live version without loading its tensors."""
        return self.store.live()

    def labels(self) -> tuple[str, ...]:
        """Names that the next request is answered with."""
        version = self.live_version()
        return version.labels if version else self.offered

    def live(self) -> Live | None:
        """The live version, loaded; a new one replaces it.

        Raises:
            WeightsError: if it is damaged or belongs to another backbone.
        """
        with self._loading:
            stamp = self.store.live_stamp()
            if stamp != self._live[0]:
                version = self.store.live()
                self._live = (stamp, None if version is None else self._load(version))
            return self._live[1]

    def _load(self, version: Version) -> Live:
        backbone = self.engine.warm()
        check_fits(version, backbone.weights_id)
        row = replace(self.row, options=version.recipe.get("options", self.row.options))  # the YAML may have changed
        model = Learned(row, backbone, len(version.labels), version.recipe["preset"])
        model.restore(self.store.tensors(version))
        if model.changes_encoder:
            model.backbone.weights_id = f"{backbone.weights_id}+{version.sha256}"
        return Live(version, model.to(self.engine.device()).eval())

    def segment(
        self, volume: Volume, prompts: Mapping[str, UserPrompts], options: SegmentOptions = DEFAULTS
    ) -> LabelPrediction:
        """Segments all labels.

        Args:
            volume: from :meth:`Engine.open`.
            prompts: by label; empty for the autonomous result.
            options: axis and window; ``propagate`` False keeps corrections on their slices.

        Raises:
            PromptError: for prompts that cannot be used, or none without a live version.
            WeightsError: if weights or the version are missing or wrong.
        """
        started = time.perf_counter()
        with self.engine.foreground():
            volume = with_window(volume, options.window)
            live = self.live()
            _check_known(prompts, self.offered if live is None else live.version.labels)
            if live is None:
                found = self._plain.segment(volume, prompts, options)
            else:
                found = _Job(self, live, volume, options).run(prompts)
        return replace(found, latencies_s={**found.latencies_s, "segment": time.perf_counter() - started})

    def doubted(
        self, volume: Volume, options: SegmentOptions, *, above: float, mapped: bool
    ) -> tuple[LabelPrediction, Uncertainty]:
        """The autonomous result and how sure it is, both of the same version.

        Args:
            volume: from :meth:`Engine.open`.
            options: axis and window.
            above: number from which on a slice is listed for review.
            mapped: whether to draw the map too.

        Raises:
            PromptError: if no version is live.
            WeightsError: if weights or the version are missing or wrong.
        """
        started = time.perf_counter()
        with self.engine.foreground():
            live = self.live()
            if live is None:
                raise PromptError(f"No trained version of {self.row.name} is live. Label some images and train first.")
            job = _Job(self, live, with_window(volume, options.window), options)
            found = job.run({})
            with job.timed("uncertainty"), torch.inference_mode():
                doubt = job.doubt(above, mapped)
        seconds = {**job.seconds, "segment": time.perf_counter() - started}
        return replace(found, latencies_s=seconds), doubt


class _Job(Timed):
    """One request on its way."""

    def __init__(self, owner: AssistedEngine, live: Live, volume: Volume, options: SegmentOptions) -> None:
        super().__init__()
        self.owner, self.live, self.volume, self.options = owner, live, volume, options
        self.engine, self.model = owner.engine, live.model
        self.axis = choose_axis(volume.spacing_mm, volume.shape, requested=options.axis, is_2d=volume.is_2d)
        self.count = volume.shape[self.axis]
        self.walks = options.propagate and not options.planar
        self.transform = SliceTransform(self.model.spec, slice_size(volume.shape, self.axis))
        self.cache: Counter[str] = Counter()
        self.asked: tuple[range, Features, Proposal] | None = None

    def run(self, prompts: Mapping[str, UserPrompts]) -> LabelPrediction:
        """Autonomous result, and the user's corrections on it."""
        with self.timed("autonomous"), torch.inference_mode():
            automatic = self.found = self.automatic()
        with self.timed("assisted"), torch.inference_mode():
            corrections = self.corrections(automatic, prompts)
            strokes = [(self.live.version.labels.index(n) + 1, s) for n, p in prompts.items() for s in p.strokes]
            said = Said.of(corrections, strokes, automatic.mask, self.axis, self.volume.spacing_mm)
            edits = self.edits(automatic, corrections, said.reach(self.count))
        with self.timed("assemble"), torch.inference_mode():
            mask = automatic.edited(edits, self.axis, self.transform)
            if corrections:
                mask = said.settled(mask, automatic.mask, walks=self.walks)
        return self.prediction(automatic, edits, mask)

    def automatic(self) -> Automatic:
        """Kept for the next click on the same volume."""
        key = (self.volume.content_hash, self.axis, self.volume.window.key(), self.live.version.sha256)
        found, there = self.owner._kept.get_or_make(repr(key), self._automatic)
        self.cache["automatic_hits"] += int(there)
        return found

    def _automatic(self) -> Automatic:
        mask, found = np.zeros(self.volume.shape, np.uint8, order="F"), []
        for indices, answer in answers(self.model, self.count, self.features):
            for index, labels in zip(indices, label_maps(answer, self.model.classes, self.transform)):
                put_slice(mask, self.axis, index, labels.numpy())
            found.append(answer)
        mask.setflags(write=False)
        masks, iou, obj = (self._by_slice([getattr(a, name) for a in found]) for name in ("masks", "iou", "obj"))
        points = None if found[0].points is None else self._by_slice([a.points for a in found if a.points is not None])
        return Automatic(mask, masks.half(), iou, obj, points)

    def doubt(self, above: float, mapped: bool) -> Uncertainty:
        """Of the autonomous result, once :meth:`run` has found it."""
        masks, obj = self.found.masks, self.found.obj
        doubt = Uncertainty.of(masks, obj, self.live.version.labels, above)
        percent = entropy_map(masks, obj, self.transform, self.volume.shape, self.axis) if mapped else None
        return replace(doubt, percent=percent)

    def features(self, indices: range) -> Features:
        """Of consecutive slices; those that were encoded knowing their neighbours cannot be kept one by one."""
        model, device = self.model, self.engine.device()
        backbone, taps = model.backbone, model.method.taps
        depth = len(indices) if model.slices > 1 else 1
        if depth > 1 and model.changes_encoder:
            with backbone.volume.spanning(depth, depth):
                found = self.engine.together(self.volume, self.axis, indices, backbone, taps)
            self.cache["misses"] += depth
        else:
            found, sources = self.engine.stack(self.volume, self.axis, indices, backbone, taps)
            self.cache.update(sources)
        return replace(found.to(device, torch.float32), depth=depth)

    def around(self, window: range) -> Features:
        """Of the slices around a clicked one, kept for the next click: what single slices cannot be is kept as a whole.

        Half precision before its first use too, so that a repeated click gets the identical answer.
        """
        if self.model.slices == 1 or not self.model.changes_encoder:
            return self.features(window)
        volume, version = self.volume, self.live.version
        key = (volume.content_hash, self.axis, window, volume.window.key(), version.sha256)
        kept, there = self.owner._windows.get_or_make(repr(key), lambda: self.features(window).halved())
        self.cache["window_hits"] += int(there)
        return replace(kept.to(self.engine.device(), torch.float32), pe=kept.pe)

    def _by_slice(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).unflatten(0, (-1, self.model.classes)).cpu()

    def corrections(
        self, automatic: Automatic, prompts: Mapping[str, UserPrompts]
    ) -> dict[int, dict[int, SlicePrompts]]:
        """Prompts by class (from 0) and slice; a positive click on another label's voxel takes it from that one."""
        labels = self.live.version.labels
        found = {
            labels.index(label): by_slice(p, self.volume.shape, self.axis, corrections=True)
            for label, p in prompts.items()
            if p
        }
        for label, one in prompts.items():
            for click in one.clicks:
                owner = int(automatic.mask[click.ijk]) - 1
                if click.positive and owner >= 0 and owner != labels.index(label):
                    index, row, column = to_slice_rc(click.ijk, self.axis)
                    slices = found.setdefault(owner, {})
                    slices.setdefault(index, SlicePrompts()).points_rc.append((row, column, False))
        return found

    def edits(
        self, automatic: Automatic, corrections: Mapping[int, Mapping[int, SlicePrompts]], reach: Container[int]
    ) -> dict[Pair, Answer]:
        """Answers by (slice, class) that differ from the autonomous ones; ``reach``: slices that walks may come to."""
        asked = sorted((index, number) for number, slices in corrections.items() for index in slices)
        answers = {pair: self.corrected(automatic, *pair, corrections[pair[1]][pair[0]]) for pair in asked}
        mine = {pair: answer for pair, answer in answers.items() if answer is not None}
        steps: list[Step] = []
        for (index, number), answer in mine.items() if self.walks else ():
            free = {i for i in range(self.count) if i in reach and i not in corrections[number]}
            for path in (range(index + 1, self.count), range(index - 1, -1, -1)):
                within = takewhile(free.__contains__, path)
                steps += carry(automatic, (index, number), answer, within, self.ask, self.engine.rule)
        return combined(automatic, steps) | mine

    def corrected(self, automatic: Automatic, index: int, number: int, prompts: SlicePrompts) -> Answer | None:
        """The answer on a slice with prompts; points mend what they lie in, a box speaks of the whole label. None where
        they only exclude the label from where it is not."""
        user, base = prompt_set(prompts, self.transform), automatic.logits(index, number)
        points = Points.of(user, self.transform)
        if not prompts.starts and not bool((base[0] > 0)[points.distance <= points.radius].any()):
            return None
        answer = self.ask(index, number, user, said=prompts.starts)
        masks = gated(answer.masks, answer.obj)
        if prompts.box_rc is None:
            masks = near_points(masks, base, points)
        return Answer(masks, answer.iou, answer.obj.clamp(min=0.0) if bool((masks > 0).any()) else answer.obj)

    def ask(self, index: int, number: int, user: PromptSet, *, said: bool) -> Answer:
        """One class on one slice, learned and user prompts in one decoder call; ``said``: the user says it is there."""
        window, device = window_around(index, self.count, self.model.slices), self.engine.device()
        if self.asked is None or self.asked[0] != window:  # labels of one slice are asked about one after the other
            features = self.around(window)
            self.asked = window, features, self.model.propose(features)
        _, features, proposal = self.asked
        pair = torch.tensor([(index - window.start) * self.model.classes + number], device=device)
        user = PromptSet(**{k: None if v is None else v.to(device) for k, v in vars(user).items()})
        answer = self.model.corrected(features, proposal, user, pair)
        obj = answer.obj.clamp(min=0.0) if said else answer.obj
        return Answer(answer.masks.cpu(), answer.iou.cpu(), obj.cpu())

    def prediction(self, automatic: Automatic, edits: Mapping[Pair, Answer], mask: np.ndarray) -> LabelPrediction:
        """Everything that the reply says."""
        labels, iou, obj = self.live.version.labels, automatic.iou.clone(), automatic.obj.clone()
        for (index, number), answer in edits.items():
            iou[index, number], obj[index, number] = answer.iou[0], answer.obj[0]
        present = obj.sigmoid()
        shown = [np.bincount(slice_view(mask, self.axis, i).ravel("K"), minlength=256) for i in range(self.count)]
        quality = {
            label: {i: float(iou[i, n]) for i, voxels in enumerate(shown) if voxels[n + 1]}
            for n, label in enumerate(labels)
        }
        presence = {label: {i: float(p) for i, p in enumerate(present[:, n])} for n, label in enumerate(labels)}
        touched = set(edits) | changed_pairs(automatic.mask, mask, self.axis)
        edited = {label: tuple(sorted(i for i, m in touched if m == n)) for n, label in enumerate(labels)}
        told = automatic.points if self.options.points else None
        points = {} if told is None else points_by_label(told, labels, self.axis, self.transform)
        return LabelPrediction(
            mask, labels, self.axis, quality, presence, {k: v for k, v in edited.items() if v}, self.live.version.name,
            self.seconds, dict(self.cache), (), self.volume.window, points,
        )  # fmt: skip


def _check_known(prompts: Mapping[str, UserPrompts], labels: tuple[str, ...]) -> None:
    unknown = sorted(label for label, one in prompts.items() if one and label not in labels)
    if unknown:  # also where another version went live since the client looked
        raise PromptError(
            f"Expected prompts of the labels {list(labels)}, received {unknown}. Fetch the labels again and repeat."
        )
