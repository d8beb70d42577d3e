"""The empty request: an all-zero label of the image's size through the same route, in the same file format.

What it takes is what a click costs before any segmentation. The label is written by ``lib.data.write`` as our own
tasks do, so that the bytes on the wire are those of an empty mask. Needs the repository root on the path, which
``bench.common`` sees to.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from lib.data.volume import load_volume
from lib.data.write import write_mask

opened = lru_cache(maxsize=4)(load_volume)


class EmptyLabel(InferTask):
    """Answers every request with background."""

    def __init__(self) -> None:
        super().__init__(InferType.DEEPGROW, ["object"], 3, "an empty label", {})

    def is_valid(self) -> bool:
        """True: nothing to load."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Path of the label file and no result."""
        volume = opened(request["image"])
        handle, path = tempfile.mkstemp(suffix=request["result_extension"])
        os.close(handle)
        write_mask(volume, np.zeros(volume.shape, np.uint8, order="F"), path, dtype=request["result_dtype"])
        return path, {}


class EmptyLabelApp(MONAILabelApp):
    """One task that segments nothing.

    Args:
        app_dir: this folder.
        studies: folder of images.
        conf: ``--conf`` pairs.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        super().__init__(app_dir=app_dir, studies=studies, conf=conf, name="empty_label", description="empty labels")

    def init_infers(self) -> dict[str, InferTask]:
        """The task."""
        return {"empty": EmptyLabel()}
