"""MONAI Label's own DeepEdit: the tasks of its sample radiology app, from scratch and offline, on labels of ``--conf``.

The sample app has its labels and input size in its source and asks its users to edit them; here ``--conf`` gives them.
Differs from it in favour of MR: intensities are scaled between percentiles where the sample clips CT numbers (its own
comment says that this may not suit MR). Images must be stored in RAS order, as those of the bench are: MONAI's
transforms do not turn clicks with the image. A train request may say ``minutes``, after which the epoch ends and the
best version until then is the published one. ``lib`` means the sample's package here, not ours.
"""

# ruff: noqa: E402 - the sample's folder comes first on the path

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SAMPLE = Path(sys.prefix) / "monailabel" / "sample-apps" / "radiology"
sys.path.insert(0, str(SAMPLE))

import torch
from ignite.engine import Engine, Events
from monai.networks.nets import DynUNet
from monai.transforms import ScaleIntensityRanged, ScaleIntensityRangePercentilesd
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.tasks.activelearning.first import First

import lib.infers
import lib.trainers


def for_mr(transforms: Sequence[Any]) -> list[Any]:
    """The sample's transforms with intensities between percentiles 1 and 99 as 0..1."""
    scale = ScaleIntensityRangePercentilesd("image", 1, 99, 0.0, 1.0, clip=True)
    return [scale if isinstance(t, ScaleIntensityRanged) else t for t in transforms]


class Infer(lib.infers.DeepEdit):
    """The sample's task, which is not offered before something was trained: upstream answers with random weights."""

    def is_valid(self) -> bool:
        """Whether there is a version."""
        return os.path.exists(self.path[0])

    def pre_transforms(self, data: Any = None) -> list[Any]:
        """The sample's, for MR."""
        return for_mr(super().pre_transforms(data))


class Train(lib.trainers.DeepEdit):
    """The sample's task with a limit of time."""

    def train_pre_transforms(self, context: Any) -> list[Any]:
        """The sample's, for MR."""
        return for_mr(super().train_pre_transforms(context))

    def val_pre_transforms(self, context: Any) -> list[Any]:
        """The sample's, for MR."""
        return for_mr(super().val_pre_transforms(context))

    def train_handlers(self, context: Any) -> list[Any]:
        """The sample's and the limit, counted from the request as ours is: caching the images included."""
        minutes = float(context.request.get("minutes") or 0)
        limit = [TimeLimit(context.start_ts + 60 * minutes)] if minutes else []
        return [*super().train_handlers(context), *limit]


class TimeLimit:
    """Ends the epoch under way when the time is over, so that it is still validated, and then the training.

    Args:
        end: time of the day.
    """

    def __init__(self, end: float) -> None:
        self._end = end

    def attach(self, engine: Engine) -> None:
        """What MONAI calls."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: self._over() and engine.terminate_epoch())
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: self._over() and engine.terminate())

    def _over(self) -> bool:
        return time.time() >= self._end


def network(labels: Mapping[str, int], dropout: float = 0.0) -> DynUNet:
    """The sample's network."""
    return DynUNet(
        spatial_dims=3, in_channels=len(labels) + 1, out_channels=len(labels), kernel_size=[3] * 6,
        strides=[1, 2, 2, 2, 2, [2, 2, 1]], upsample_kernel_size=[2, 2, 2, 2, [2, 2, 1]], norm_name="instance",
        deep_supervision=False, res_block=True, dropout=dropout or None,
    )  # fmt: skip


class DeepEditApp(MONAILabelApp):
    """``deepedit``, ``deepedit_seg`` and their trainer.

    Args:
        app_dir: this folder; its ``model`` folder gets what is trained.
        studies: folder of images.
        conf: ``labels`` (names separated by commas) and ``size`` (voxels that every image is resized to; the first two
            divisible by 32, the last by 16).
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        names = [name.strip() for name in conf["labels"].split(",")]
        self.numbers = {**{name: n for n, name in enumerate(names, start=1)}, "background": 0}
        self.size = tuple(int(n) for n in conf["size"].split(","))
        self.model_dir = os.path.join(app_dir, "model")
        self.published = os.path.join(self.model_dir, "deepedit_dynunet.pt")
        super().__init__(app_dir=app_dir, studies=studies, conf=conf, name="deepedit", description="DeepEdit")

    def init_infers(self) -> dict[str, InferTask]:
        """With and without clicks; neither answers before something was trained."""
        facts = {"path": [self.published], "network": network(self.numbers), "labels": self.numbers}
        cached = {"cache_transforms": True, "cache_transforms_in_memory": True, "cache_transforms_ttl": 300}
        return {
            "deepedit": Infer(**facts, spatial_size=self.size, config=cached),
            "deepedit_seg": Infer(**facts, spatial_size=self.size, type=InferType.SEGMENTATION),
        }

    def init_trainers(self) -> dict[str, TrainTask]:
        """From scratch at first, from its last best afterwards."""
        task = Train(
            model_dir=os.path.join(self.model_dir, "deepedit_dynunet"), network=network(self.numbers),
            load_path=self.published, publish_path=self.published, spatial_size=self.size, labels=self.numbers,
            amp=torch.cuda.is_available(), find_unused_parameters=True, config={"pretrained": False},
        )  # fmt: skip
        return {"deepedit": task}

    def init_strategies(self) -> dict[str, Strategy]:
        """By name, so that the bench decides."""
        return {"first": First()}
