"""What all infer tasks share: thread-safe call, error translation, label file and plain JSON.

Errors of ``lib`` become the server's exception here and nowhere else. Nothing about images or requests is logged.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from infers.request import SEG, ReplyFormat
from lib.data.volume import series_folder
from lib.data.write import write_mask
from lib.dicom_seg import write_seg
from lib.engine import Engine
from lib.errors import AppError, PromptError, VolumeError
from lib.provenance import Provenance
from lib.types import LabelPrediction, Prediction, UserPrompts, Volume, Window

BY_SLICE = ("quality", "presence", "uncertainty", "points", "negative_points")


@contextmanager
def told() -> Iterator[None]:
    """Errors of ``lib`` as the server's exception; the message says how the user or the operator can mend it."""
    try:
        yield
    except (PromptError, VolumeError) as error:
        raise MONAILabelException(MONAILabelError.INVALID_INPUT, str(error)) from error
    except AppError as error:
        raise MONAILabelException(MONAILabelError.APP_ERROR, str(error)) from error


@contextmanager
def asked_in_background() -> Iterator[None]:
    """The server's exceptions as errors of ``lib``, for its background work, which tries again later."""
    try:
        yield
    except MONAILabelException as error:
        raise VolumeError(str(error.msg)) from error


class EngineTask(InferTask):
    """A task over the shared engine.

    Args:
        kind: decides in which panel clients show the task.
        engine: shared by all tasks; owned by the app.
        labels: names that clients offer.
        dimension: 3 for volumes, 2 for one slice of a volume or a picture.
        text: what clients show as description.
        options: what clients show as options.
    """

    method = ""  # the learned method's name, for the record of how a label came about

    def __init__(
        self, kind: InferType, engine: Engine, labels: Sequence[str], dimension: int, text: str, options: dict[str, Any]
    ) -> None:
        super().__init__(kind, list(labels), dimension, text, options)
        self._engine = engine

    def info(self) -> dict[str, Any]:
        """What ``/info/`` shows, the engine's backbone and cache counters included."""
        return {**super().info(), "engine": plain(self._engine.info())}

    def is_valid(self) -> bool:
        """True: weights are looked for at the first request, so that the server starts without them."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[Optional[str], dict[str, Any]]:
        """Path of the label file and the reply's JSON.

        Raises:
            MONAILabelException: for everything the user or the operator can mend; the message says how.
        """
        with told(), self._engine.foreground():
            return self.answer(request)

    @abstractmethod
    def structures(self, request: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of what the answer holds, before anything is segmented.

        Raises:
            PromptError: for a request that does not say enough.
        """

    @abstractmethod
    def answer(self, request: Mapping[str, Any]) -> tuple[Optional[str], dict[str, Any]]:
        """The same, with errors of ``lib``."""

    def reply(
        self, volume: Volume, found: Union[Prediction, LabelPrediction], wanted: ReplyFormat, facts: dict[str, Any],
        started: float, opened: float,
    ) -> tuple[Optional[str], dict[str, Any]]:  # fmt: skip
        """Label file and JSON.

        Args:
            volume: the image.
            found: the segmentation.
            wanted: how the client wants the file.
            facts: what the JSON says beyond what all tasks say; ``label_names``, and how many ``prompts`` there were.
            started: clock at the request's arrival.
            opened: clock when image and prompts were read.
        """
        predicted = time.perf_counter()
        window, engine = found.window, self._engine.info()
        record = Provenance.answered(
            prompts=facts["prompts"],
            task=wanted.task,
            method=self.method,
            version=facts.get("version") or "",
            backbone=engine.get("backbone") or "",
            weights_id=engine.get("weights_id") or "",
            window=window and replace(window, rest=()),  # a record holds the first channel's
        )
        path = _write(volume, found.mask, wanted, facts["label_names"], record) if wanted.write_file else None
        end = time.perf_counter()
        stages = {
            "pre": opened - started,
            "infer": predicted - opened,
            "invert": 0,
            "post": 0,
            "write": end - predicted,
        }
        latencies = {**found.latencies_s, **stages, "total": end - started}
        report = {
            "latencies": {stage: round(seconds, 4) for stage, seconds in latencies.items()},
            "cache": found.cache,
            "quality": found.quality,
            "axis": "ijk"[found.axis],
            "window": window and _told(window),
            "backbone": engine.get("backbone"),
            "weights_id": engine.get("weights_id"),
            "empty": not found.mask.any(),
            "provenance": record.to_json(),
            **facts,
            "warnings": (*volume.warnings, *facts.get("warnings", ())),
        }
        return path, plain(report)


def for_store(reply: Mapping[str, Any]) -> dict[str, Any]:
    """A reply as it is kept beside its label: without what it says slice by slice, since MONAI Label writes its list
    of all labels anew at every hand-out."""
    return {key: value for key, value in reply.items() if key not in BY_SLICE}


def _told(window: Window) -> dict[str, Any]:
    """A window as JSON; where there are several channels, ``rest`` holds those of the second and later ones."""
    told = {"lo": window.lo, "hi": window.hi, "source": window.source.value}
    return {**told, "rest": [_told(other) for other in window.rest]} if window.rest else told


def count_prompts(*drawn: UserPrompts) -> int:
    """How many clicks, boxes and strokes."""
    return sum(len(p.clicks) + len(p.boxes) + len(p.strokes) for p in drawn)


def _write(
    volume: Volume, mask: np.ndarray, reply: ReplyFormat, names: Mapping[str, int], record: Provenance
) -> str:  # fmt: skip
    """A temporary file with the mask; the server removes it after sending."""
    handle, path = tempfile.mkstemp(suffix=reply.extension)
    os.close(handle)
    try:
        if reply.extension == SEG:
            write_seg(_series(reply.image), mask, names, Path(path), record)
        else:
            write_mask(volume, mask, path, dtype=reply.dtype, compress=reply.compress, names=names)
    except BaseException:
        os.unlink(path)
        raise
    return path


def _series(image: str) -> Path:
    folder = series_folder(image)
    if folder is None:
        raise PromptError("DICOM SEG: expected an image out of a DICOM series, received another. Ask for .nrrd.")
    return folder


def plain(value: Any) -> Any:
    """Python's own types with text keys; numbers that JSON does not have (NaN, infinity) become null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "item"):  # a numpy number
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
