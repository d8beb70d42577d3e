"""The two click-and-box tasks, ``sam`` (3-D) and ``sam_2d``: request in, label file and JSON out, over one engine.

Thread-safe: one instance serves all requests at once; it holds no request state, and the engine locks what it shares.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from monailabel.interfaces.tasks.infer_v2 import InferType

from infers.base import EngineTask, count_prompts
from infers.prompts import read_prompts
from infers.request import in_file_order, is_kept, is_named, option_table, read_options, read_reply
from lib.data.samples import BACKGROUND
from lib.engine import Engine
from lib.errors import PromptError


class SamTask(EngineTask):
    """Segments what the user clicked or boxed.

    Args:
        engine: shared by all tasks; owned by the app.
        labels: names that clients offer, ``background`` not alone; any other is accepted.
        dimension: 3 for volumes, 2 for one slice of a volume or a picture.
    """

    def __init__(self, engine: Engine, labels: Sequence[str], dimension: int) -> None:
        text = {3: "SAM on a volume: clicks and boxes on any slices", 2: "SAM on one slice or picture"}[dimension]
        super().__init__(InferType.DEEPGROW, engine, labels, dimension, text, option_table(planar=dimension == 2))
        self._offered = [name for name in labels if name != BACKGROUND]

    def structures(self, request: Mapping[str, Any]) -> tuple[str, ...]:
        """The one that the request names, else the first that clients offer.

        Raises:
            PromptError: where several are offered, none is named and the answer is to be kept: it would be filed under
                another organ's name.
        """
        if len(self._offered) > 1 and is_kept(request) and not is_named(request):
            raise PromptError(
                f"save: expected label, the name of the structure to keep, received none; {self._offered} are offered."
                " Send label, use sam2rad_edit, which knows the chosen row, or start the server with one label."
            )
        return (read_reply(request, self._offered[0]).label,)

    def answer(self, request: Mapping[str, Any]) -> tuple[Optional[str], dict[str, Any]]:
        """One structure from the prompts of the request."""
        started = time.perf_counter()
        planar = self.dimension == 2
        options, wanted = read_options(request, planar), read_reply(request, self._offered[0])
        (label,) = self.structures(request)
        volume = self._engine.open(request["image"])
        if volume.is_2d and not planar:
            raise PromptError("Expected a volume, received a 2-D image. Use the model sam_2d.")
        prompts, warnings = read_prompts(request, volume.shape, planar)
        prompts = in_file_order(prompts, request, volume)
        opened = time.perf_counter()
        found = self._engine.segment(volume, prompts, options)
        facts = {
            "label_names": {label: 1},
            "prompts": count_prompts(prompts),
            "prompted": found.prompted,
            "warnings": warnings + found.warnings,
        }
        return self.reply(volume, found, wanted, facts, started, opened)
