"""MONAI Label's own SAM 2 tasks, registered as its sample radiology app does, offline.

Upstream downloads what is not in the model folder yet; ``bench.common.upstream_app`` puts both files there first, and
the settings below only name them. Importing upstream's module deletes and creates a cache below HOME.
"""

from __future__ import annotations

from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

settings.MONAI_SAM_MODEL_PT = "sam2.1_hiera_tiny.pt"
settings.MONAI_SAM_MODEL_CFG = "sam2.1_hiera_t.yaml"


class UpstreamSam2(MONAILabelApp):
    """``sam_2d`` and ``sam_3d``.

    Args:
        app_dir: this folder; its ``model`` folder holds checkpoint and configuration.
        studies: folder of images.
        conf: ``--conf`` pairs.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.model_dir = f"{app_dir}/model"
        super().__init__(app_dir=app_dir, studies=studies, conf=conf, name="upstream_sam2", description="SAM 2")

    def init_infers(self) -> dict[str, InferTask]:
        """The two tasks of the sample radiology app."""
        from monailabel.sam2.infer import Sam2InferTask

        return {
            "sam_2d": Sam2InferTask(model_dir=self.model_dir, type=InferType.DEEPGROW, dimension=2),
            "sam_3d": Sam2InferTask(model_dir=self.model_dir, type=InferType.DEEPGROW, dimension=3),
        }
