"""The two click-and-box tasks, ``sam`` (3-D) and ``sam_2d``: request in, label file and JSON out, over one engine.

Thread-safe: one instance serves all requests at once; it holds no request state, and the engine locks what it shares.
Errors of ``lib`` become the server's exception here and nowhere else. Nothing about images or requests is logged.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from infers.prompts import read_prompts
from infers.request import ReplyFormat, option_table, read_options, read_reply
from lib.data.write import write_mask
from lib.engine import Engine
from lib.errors import AppError, PromptError, VolumeError
from lib.types import Prediction, Volume


class SamTask(InferTask):
    """Segments what the user clicked or boxed.

    Args:
        engine: shared by both tasks; owned by the app.
        labels: names that clients offer; any other is accepted.
        dimension: 3 for volumes, 2 for one slice of a volume or a picture.
    """

    def __init__(self, engine: Engine, labels: Sequence[str], dimension: int) -> None:
        text = {3: "SAM on a volume: clicks and boxes on any slices", 2: "SAM on one slice or picture"}[dimension]
        super().__init__(InferType.DEEPGROW, list(labels), dimension, text, option_table(planar=dimension == 2))
        self._engine = engine

    def info(self) -> dict[str, Any]:
        """What ``/info/`` shows, the engine's backbone and cache counters included."""
        return {**super().info(), "engine": _plain(self._engine.info())}

    def is_valid(self) -> bool:
        """True: weights are looked for at the first request, so that the server starts without them."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[Optional[str], dict[str, Any]]:
        """Path of the label file and the reply's JSON.

        Raises:
            MONAILabelException: for everything the user or the operator can mend; the message says how.
        """
        try:
            with self._engine.foreground():
                return self._answer(request)
        except (PromptError, VolumeError) as error:
            raise MONAILabelException(MONAILabelError.INVALID_INPUT, str(error)) from error
        except AppError as error:
            raise MONAILabelException(MONAILabelError.APP_ERROR, str(error)) from error

    def _answer(self, request: Mapping[str, Any]) -> tuple[Optional[str], dict[str, Any]]:
        start = time.perf_counter()
        planar = self.dimension == 2
        options, reply = read_options(request, planar), read_reply(request, self.labels[0])
        volume = self._engine.open(request["image"])
        if volume.is_2d and not planar:
            raise PromptError("Expected a volume, received a 2-D image. Use the model sam_2d.")
        prompts, warnings = read_prompts(request, volume.shape, planar)
        opened = time.perf_counter()
        prediction = self._engine.segment(volume, prompts, options)
        predicted = time.perf_counter()
        path = _write(volume, prediction, reply) if reply.write_file else None
        end = time.perf_counter()
        stages = {"pre": opened - start, "infer": predicted - opened, "invert": 0, "post": 0, "write": end - predicted}
        latencies = {**prediction.latencies_s, **stages, "total": end - start}
        return path, self._report(prediction, reply, latencies, warnings)

    def _report(
        self, prediction: Prediction, reply: ReplyFormat, latencies: dict[str, float], warnings: tuple[str, ...]
    ) -> dict[str, Any]:
        window, engine = prediction.window, self._engine.info()
        report = {
            "label_names": {reply.label: 1},
            "latencies": {stage: round(seconds, 4) for stage, seconds in latencies.items()},
            "cache": prediction.cache,
            "quality": prediction.quality,
            "axis": "ijk"[prediction.axis],
            "prompted": prediction.prompted,
            "window": None if window is None else {"lo": window.lo, "hi": window.hi, "source": window.source.value},
            "backbone": engine.get("backbone"),
            "weights_id": engine.get("weights_id"),
            "warnings": warnings + prediction.warnings,
        }
        return _plain(report)


def _write(volume: Volume, prediction: Prediction, reply: ReplyFormat) -> str:
    """A temporary file with the mask; the server removes it after sending."""
    handle, path = tempfile.mkstemp(suffix=reply.extension)
    os.close(handle)
    try:
        write_mask(volume, prediction.mask, path, dtype=reply.dtype, compress=reply.compress)
    except BaseException:
        os.unlink(path)
        raise
    return path


def _plain(value: Any) -> Any:
    """Python's own types with text keys; numbers that JSON does not have (NaN, infinity) become null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):  # a numpy number
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
