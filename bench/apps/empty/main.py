"""A MONAI Label app that does nothing: what any app costs before its own first line."""

from __future__ import annotations

from monailabel.interfaces.app import MONAILabelApp


class Empty(MONAILabelApp):
    """No tasks.

    Args:
        app_dir: this folder.
        studies: folder of images.
        conf: ``--conf`` pairs.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        super().__init__(app_dir=app_dir, studies=studies, conf=conf, name="empty", description="nothing")
