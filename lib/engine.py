"""Pure prediction: a volume, the user's prompts and options become a mask on the volume's own grid.

The answer depends on nothing but these and the weights; caches only make it faster. The engine alone owns inference
mode, device and the background encoder.

Concurrency: any number of threads may call it. The backbone is loaded once under a lock and then read only. Opening a
volume and encoding a slice happen once however many ask (``lib.cache``). After a click the neighbouring slices are
encoded by one background thread, nearest first, which steps aside before every encoder block while a click runs
(``lib.background``) and forgets its list at the next request, whichever image that is for.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import Tensor

from lib.background import Background, Gate
from lib.cache import EmbeddingCache, EmbeddingKey, Lru
from lib.contracts import Backbone, Features, PromptSet
from lib.data.geometry import choose_axis, put_slice, slice_of, slice_size
from lib.data.volume import image_files, load_volume
from lib.data.window import apply_window, with_window
from lib.decoder import decode
from lib.errors import ConfigError, PromptError, VolumeError
from lib.loading import load_backbone
from lib.prompts.user import SlicePrompts, by_slice, prompt_set
from lib.propagate import SliceResult, StopRule, propagate
from lib.settings import AppSettings
from lib.timing import Timed
from lib.transform import SliceTransform
from lib.types import Prediction, UserPrompts, Volume


@dataclass(frozen=True)
class SegmentOptions:
    """How to segment.

    Args:
        axis: ``i``, ``j`` or ``k``; None takes the thickest spacing.
        propagate: True carries the result to neighbouring slices.
        window: intensities ``(lo, hi)`` that replace the volume's own window.
        planar: True segments exactly one slice and refuses prompts on several.
        points: True tells the points that a learned method proposed.
    """

    axis: Optional[str] = None
    propagate: bool = True
    window: Union[str, tuple[float, float], None] = None
    planar: bool = False
    points: bool = False


class Engine:
    """Prediction with one backbone; see the module's docstring for what threads may do.

    Args:
        settings: of the app; nothing is loaded before the first use.
    """

    def __init__(self, settings: AppSettings) -> None:
        self.settings = settings
        self.rule = StopRule()
        self._gate = Gate()
        self._background = Background(self._gate)
        weakref.finalize(self, self._background.close)  # also at exit
        self._volumes: Lru[Volume] = Lru(settings.volumes_memory_mb << 20, lambda v: v.array.nbytes)
        self._cache = EmbeddingCache(
            settings.cache_memory_mb << 20, settings.cache_dir, settings.cache_disk_mb << 20, self._gate.waiting
        )
        self._backbone: Optional[Backbone] = None
        self._pe = torch.empty(0)
        self._loading = threading.Lock()

    def warm(self) -> Backbone:
        """The backbone, loaded if it is not yet.

        Raises:
            WeightsError: if its weights are missing or wrong.
            ConfigError: if the device is not there.
        """
        with self._loading:
            if self._backbone is None:
                device = self.device()
                backbone: Any = load_backbone(
                    self.settings.backbone, weights_dir=self.settings.weights_dir, download=self.settings.download
                )
                backbone.to(device)
                self._let_clicks_pass(backbone)
                with torch.inference_mode():
                    self._pe = backbone.grid_encoding().cpu()
                self._backbone = backbone
            return self._backbone

    def device(self) -> torch.device:
        """Where the backbone runs.

        Raises:
            ConfigError: if the wanted device does not exist on this machine.
        """
        wanted = self.settings.device
        if wanted == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(wanted)
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.type == "cuda" and (device.index or 0) >= gpus:
            raise ConfigError(f"device: expected a GPU of this machine, received {wanted}; usable CUDA GPUs: {gpus}.")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise ConfigError("device: expected a device that exists, received mps without Apple's GPU. Use auto.")
        return device

    def foreground(self) -> AbstractContextManager[None]:
        """A context for all of a click that is not inside :meth:`segment`: the background stands still meanwhile."""
        return self._gate.foreground()

    def background(self) -> AbstractContextManager[None]:
        """A context for a whole request that is no click: it waits before every encoder block while clicks run."""
        return self._gate.background()

    def waiting(self) -> AbstractContextManager[None]:
        """A context in which a click waits for what another thread, perhaps a background one, is making."""
        return self._gate.waiting()

    def open(self, path: Union[str, Path]) -> Volume:
        """A volume from disk, or the same one again while its file has not changed.

        Args:
            path: an image file or the folder of a DICOM series.

        Raises:
            VolumeError: if it cannot be read or segmented.
        """
        with self._gate.foreground():
            return self._volumes.get_or_make(_fingerprint(Path(path)), lambda: load_volume(path))[0]

    def segment(self, volume: Volume, prompts: UserPrompts, options: SegmentOptions = SegmentOptions()) -> Prediction:
        """Segments one structure.

        Args:
            volume: from :meth:`open`.
            prompts: everything the user drew for the structure, on any number of slices.
            options: how to segment.

        Returns:
            A mask on the volume's grid with per-slice quality, timings and cache hits.

        Raises:
            PromptError: for prompts that cannot be used.
            WeightsError: if the backbone's weights are missing or wrong.
        """
        with self._gate.foreground():
            started = time.perf_counter()
            self._background.replace([])  # whatever was guessed before, the user is here now
            volume = with_window(volume, options.window)
            job = _Job(self, volume, prompts, options)
            prediction = job.prediction(job.run())
            if self.settings.prefetch:
                self._prefetch(job)
            total = time.perf_counter() - started
        return replace(prediction, latencies_s={**job.seconds, "segment": total})

    def features(
        self, volume: Volume, axis: int, index: int, backbone: Optional[Backbone] = None, taps: tuple[str, ...] = ()
    ) -> tuple[Features, str]:
        """Half precision CPU features of one slice, and where they came from (see :class:`EmbeddingCache`).

        Args:
            volume: from :meth:`open`.
            axis: slice axis.
            index: slice number.
            backbone: another one than the engine's own: the adapted copy of a learned model.
            taps: maps that a learned method needs.
        """
        backbone = backbone or self.warm()
        key = self._key(volume, axis, index, backbone, taps)
        counted = not self._gate.is_background()

        def encode() -> Features:
            return self._encode(backbone, volume, axis, [index], taps)

        return self._cache.get(key, encode, self._pe, counted=counted)

    def stack(
        self, volume: Volume, axis: int, indices: Sequence[int], backbone: Backbone, taps: tuple[str, ...] = ()
    ) -> tuple[Features, Counter[str]]:
        """Features of several slices as one batch, and where they came from; missing ones are encoded together."""
        keys = {i: self._key(volume, axis, i, backbone, taps) for i in indices}
        missing = [i for i in indices if keys[i] not in self._cache]
        if len(missing) > 1 and self.device().type != "cpu":  # on CPUs a batch is no faster than its slices
            together = self._encode(backbone, volume, axis, missing, taps)
            for n, i in enumerate(missing):
                self._cache.get(keys[i], partial(together.row, n), self._pe)
        found = [self.features(volume, axis, i, backbone, taps) for i in indices]
        return Features.joined([f for f, _ in found]), Counter(source for _, source in found)

    def together(
        self, volume: Volume, axis: int, indices: Sequence[int], backbone: Backbone, taps: tuple[str, ...] = ()
    ) -> Features:
        """Features of slices that know of each other, encoded anew: what they are depends on their neighbours."""
        return self._encode(backbone, volume, axis, indices, taps)

    def _key(
        self, volume: Volume, axis: int, index: int, backbone: Optional[Backbone] = None, taps: tuple[str, ...] = ()
    ) -> EmbeddingKey:
        backbone = backbone or self.warm()
        name = ":".join([backbone.spec.name, str(backbone.spec.input_size), *taps])
        return EmbeddingKey(volume.content_hash, axis, index, volume.window.key(), backbone.weights_id, name)

    def _encode(
        self, backbone: Backbone, volume: Volume, axis: int, indices: Sequence[int], taps: tuple[str, ...]
    ) -> Features:
        slices = [apply_window(slice_of(volume, axis, i), volume.window) for i in indices]
        transform = SliceTransform(backbone.spec, slices[0].shape[:2])  # type: ignore[arg-type]
        with torch.inference_mode():
            return backbone.encode(torch.stack([transform.image(p) for p in slices]).to(self.device()), taps)

    def _prefetch(self, job: _Job) -> None:
        """Queues the neighbours of the prompted slices that are not in memory, nearest first.

        At most half of what the memory tier holds, so that guesses never push out the slices that the user works on.
        """
        volume, axis = job.volume, job.axis
        distance = {i: min(abs(i - p) for p in job.slices) for i in range(volume.shape[axis])}
        reach = self.settings.prefetch_slices
        near = sorted((i for i, d in distance.items() if 0 < d <= reach), key=distance.__getitem__)
        new = [i for i in near[: self._cache.room() // 2] if not self._knows(volume, axis, i)]
        self._background.replace([partial(_encode_later, weakref.ref(self), volume, axis, i) for i in new])

    def _knows(self, volume: Volume, axis: int, index: int) -> bool:
        return self._key(volume, axis, index) in self._cache

    def _let_clicks_pass(self, backbone: Any) -> None:
        """Background encoding steps aside before every encoder block."""
        gate = self._gate
        blocks = {path for name, path in backbone.paths.items() if name.startswith("enc.block[") and name.endswith("]")}
        for path in blocks:
            backbone.get_submodule(path).register_forward_pre_hook(lambda *_: gate.pause())

    def worker(self) -> Background:
        """Another background thread that steps aside for clicks; whoever asked for it closes it."""
        return Background(self._gate)

    def wait_for_background(self, timeout_s: float) -> bool:
        """Waits for the background encoder, for tests and benches; False if it is not done by then."""
        return self._background.idle(timeout_s)

    def info(self) -> dict[str, Any]:
        """Backbone and cache counters for a task's ``info()``."""
        loaded = self._backbone
        return {
            "backbone": self.settings.backbone,
            "weights_id": loaded.weights_id if loaded else None,
            "device": self.settings.device,
            "cache": {**self._cache.info(), "background_slices": self._background.waiting()},
        }


def _encode_later(engine: weakref.ref[Engine], volume: Volume, axis: int, index: int) -> None:
    """A job for the background, which must not keep its engine alive."""
    alive = engine()
    if alive is not None:
        alive.features(volume, axis, index)


class _Job(Timed):
    """One request on its way through the engine."""

    def __init__(self, engine: Engine, volume: Volume, prompts: UserPrompts, options: SegmentOptions) -> None:
        super().__init__("encode", "decode", "assemble")
        self.engine, self.volume, self.options = engine, volume, options
        self.cache: Counter[str] = Counter()
        self.warnings: list[str] = []
        self.axis = choose_axis(volume.spacing_mm, volume.shape, requested=options.axis, is_2d=volume.is_2d)
        self.slices = by_slice(prompts, volume.shape, self.axis)
        if options.planar and len(self.slices) != 1:
            raise PromptError(
                f"Expected prompts on one slice for a 2-D task; received slices {sorted(self.slices)}. Use a 3-D task."
            )
        self.boxed = _span([i for i, p in self.slices.items() if p.box_rc is not None])
        with self.timed("load"):
            self.backbone = engine.warm()
        self.transform = SliceTransform(self.backbone.spec, slice_size(volume.shape, self.axis))

    def run(self) -> dict[int, SliceResult]:
        """Results per slice index."""
        if not (self.options.propagate and not self.options.planar and not self.volume.is_2d):
            self._warn_of_corrections_alone()
            return {i: self.segment(i, p) for i, p in self.slices.items() if p.starts}
        seeds = {i: self.segment(i, self.slices[i]) for i in self._seeds()}
        bounds = self.boxed if len(self.boxed) > 1 else range(self.volume.shape[self.axis])  # a flat box bounds nothing
        bounds = range(min(bounds.start, min(seeds)), max(bounds.stop, max(seeds) + 1))
        return propagate(seeds, bounds, self.follow, self.engine.rule, keep_on=self.boxed)

    def _seeds(self) -> list[int]:
        """Slices a walk starts from: those with positive clicks, and the middle of a box that has none."""
        clicked = [i for i, p in self.slices.items() if any(positive for _, _, positive in p.points_rc)]
        if self.boxed and not any(i in self.boxed for i in clicked):
            clicked.append(self.boxed[len(self.boxed) // 2])
        return sorted(clicked)

    def _warn_of_corrections_alone(self) -> None:
        alone = [i for i, p in self.slices.items() if not p.starts]
        if alone:
            self.warnings.append(f"Slices {alone} carry negative clicks only and were left empty: propagate is off.")

    def segment(self, index: int, prompts: SlicePrompts) -> SliceResult:
        """A slice from the user's prompts alone."""
        return self.decode(
            index, prompt_set(prompts, self.transform), multimask=prompts.is_ambiguous(self.backbone.spec)
        )

    def follow(self, index: int, before: SliceResult) -> SliceResult:
        """A slice from its neighbour's result, plus what the user drew on it."""
        mine = prompt_set(self.slices.get(index, SlicePrompts()), self.transform)
        prompts = replace(mine, masks=before.low_res.clamp(-32, 32))
        if self.backbone.spec.carry_box:
            prompts = replace(prompts, boxes_xy=self._box_around(before.low_res, mine.boxes_xy))
        return self.decode(index, prompts, multimask=False)

    def _box_around(self, low_res: Tensor, user: Optional[Tensor]) -> Tensor:
        """``(1, 4)`` box of a mask in backbone pixels, a cell wider on each side: structures may grow.

        A user's 3-D box bounds it, since at the ends of that box the structure is smaller; unless the two do not meet.
        """
        rows, columns = torch.nonzero(low_res[0, 0] > 0, as_tuple=True)
        scale = self.backbone.spec.input_size / low_res.shape[-1]
        edges = [columns.min() - 1, rows.min() - 1, columns.max() + 2, rows.max() + 2]
        box = (torch.stack(edges).float() * scale).clamp(0, self.backbone.spec.input_size)[None] - 0.5
        if user is None:
            return box
        lo, hi = torch.maximum(box, user)[:, :2], torch.minimum(box, user)[:, 2:]
        return torch.cat([lo, hi], 1) if bool((lo < hi).all()) else user

    def decode(self, index: int, prompts: PromptSet, *, multimask: bool) -> SliceResult:
        """One decoder call on one slice."""
        with self.timed("encode"):
            features, source = self.engine.features(self.volume, self.axis, index)
        self.cache[source] += 1
        device = self.engine.device()
        with self.timed("decode"), torch.inference_mode():
            embedded = self.backbone.embed_prompts(_on(prompts, device))
            features = features.to(device, torch.float32)
            out = decode(self.backbone.spec, self.backbone.mask_decoder, features, embedded)
            best = 1 + int(out.iou[0, 1:].argmax()) if multimask else 0
            objectness = None if out.obj is None else float(out.obj[0, 0])
            quality = float(out.iou[0, best].clamp(0, 1))
            return SliceResult(out.masks[:, best : best + 1].float().cpu(), quality, objectness)

    def prediction(self, found: dict[int, SliceResult]) -> Prediction:
        """All slices on the volume's grid."""
        mask = np.zeros(self.volume.shape, np.uint8, order="F")  # as files store it: written six times faster
        with self.timed("assemble"), torch.inference_mode():
            for index, result in found.items():
                pixels = (self.transform.logits(result.low_res)[0, 0] > 0).numpy().astype(np.uint8)
                put_slice(mask, self.axis, index, pixels)
        return Prediction(
            mask=mask,
            quality={i: found[i].quality for i in sorted(found)},
            axis=self.axis,
            prompted=tuple(self.slices),
            cache=dict(self.cache),
            warnings=tuple(self.warnings),
            window=self.volume.window,
        )


def _span(indices: list[int]) -> range:
    return range(min(indices), max(indices) + 1) if indices else range(0)


def _on(prompts: PromptSet, device: torch.device) -> PromptSet:
    moved = {k: v.to(device) for k, v in vars(prompts).items() if v is not None}
    return replace(prompts, **moved)


def _fingerprint(path: Path) -> str:
    """Changes when the image does, without reading it; looks at every file that belongs to it."""
    try:
        stats = [(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in image_files(path)]
    except OSError as error:
        raise VolumeError(
            "The image cannot be found on the server. Refresh the list of images and try again."
        ) from error
    return repr((str(path), stats))
