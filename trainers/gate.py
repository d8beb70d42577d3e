"""MONAI Label's own training gate as the schedule sees it: the one behind ``/train/``.

What is started here is seen and stopped there, and one training runs at a time. MONAI Label forgets its trainings when
it ends; how one ended that a server left behind is told by its process and by the trainer's report. Thread-safe as far
as MONAI Label's lists are. Identifiers leave this file as hashes only. Left out: when to start (:mod:`lib.triggers`).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Optional, Protocol

from lib.config import TrainRecipe
from lib.schedule_record import Run, Status
from lib.triggers import Job

if TYPE_CHECKING:
    from monailabel.interfaces.app import MONAILabelApp

    from trainers.schedule import Scheduler

logger = logging.getLogger(__name__)
OPTIONS = frozenset(f.name for f in fields(TrainRecipe))


class Gate(Protocol):
    """What the scheduler asks of the server."""

    model: str

    def labels(self) -> Optional[dict[str, str]]:
        """Final labels as opaque keys to stamps; None where the store does not answer."""

    def newest(self) -> Optional[Job]:
        """The newest training of the model since the server started."""

    def status(self, run: Run) -> Status:
        """How a training stands, also one of a server before this one."""

    def version(self) -> Optional[str]:
        """What the last training that ended well made."""

    def busy(self) -> bool:
        """Whether any training's process is running."""

    def start(self, options: Mapping[str, Any]) -> Optional[str]:
        """Asks for a training; its id, or None where it was refused."""

    def successor(self) -> Optional[Scheduler]:
        """The scheduler of the app that replaced this one after a reload."""


class UpstreamGate:
    """MONAI Label's own gate, the one behind ``/train/``: what is started here is seen and stopped there.

    Args:
        app: the running app.
        model: its trainer that is asked for.
    """

    def __init__(self, app: MONAILabelApp, model: str) -> None:
        self._app, self.model = app, model

    def labels(self) -> Optional[dict[str, str]]:
        """By hashes of the identifiers. A PACS is asked for identifiers only: stamps would cost downloads."""
        from monailabel.datastore.dicom import DICOMWebDatastore
        from monailabel.datastore.local import LocalDatastore
        from monailabel.interfaces.exception import MONAILabelException

        store = self._app.datastore()
        files = isinstance(store, LocalDatastore) and not isinstance(store, DICOMWebDatastore)
        try:
            images = store.get_labeled_images()
            return {_opaque(i): _stamp(store.get_label_uri(i, "final")) if files else "" for i in images}
        except (MONAILabelException, OSError, RuntimeError) as error:  # RuntimeError: a label came while we counted
            logger.warning("schedule: the datastore does not answer (%s)", type(error).__name__)
            return None

    def newest(self) -> Optional[Job]:
        """See :class:`Gate`."""
        mine = [task for task in _tasks() if task["request"].get("model") == self.model]
        if not mine:
            return None
        pid, born = _process(mine[-1]["id"])
        options = {key: value for key, value in mine[-1]["request"].items() if key in OPTIONS}
        return Job(mine[-1]["id"], options, pid, born)

    def status(self, run: Run) -> Status:
        """See :class:`Gate`. A trainer tells what went wrong; one that told nothing was killed."""
        task = next((task for task in _tasks() if task["id"] == run.id), None)
        if task is None:
            if _alive(run.pid, run.born):
                return Status.RUNNING
            return Status.GONE if self.version() in (None, run.version) else Status.DONE
        status = Status(task["status"])
        return Status.KILLED if status is Status.ERROR and "error" not in self._stats() else status

    def version(self) -> Optional[str]:
        """See :class:`Gate`."""
        return self._stats().get("version")

    def busy(self) -> bool:
        """See :class:`Gate`."""
        from monailabel.utils.async_tasks.task import AsyncTask

        return AsyncTask.status("train", check_if_running=True)[0] is not None

    def start(self, options: Mapping[str, Any]) -> Optional[str]:
        """See :class:`Gate`."""
        from monailabel.utils.async_tasks.task import AsyncTask

        task, _ = AsyncTask.run("train", request={**options, "model": self.model})
        return None if task is None else task["id"]

    def successor(self) -> Optional[Scheduler]:
        """See :class:`Gate`."""
        from monailabel.interfaces.utils import app

        others = [one for one in list(app.apps.values()) if one is not self._app]
        return getattr(others[-1], "schedule", None) if others and self._app not in app.apps.values() else None

    def _stats(self) -> dict[str, Any]:
        trainer = self._app._trainers.get(self.model)
        return trainer.stats() if trainer else {}


def _tasks() -> list[dict[str, Any]]:
    from monailabel.utils.async_tasks.task import AsyncTask

    return list(AsyncTask.status("train", all=True)[0] or ())


def _process(task_id: str) -> tuple[int, float]:
    """Number and time of birth of a training's process, zeros where there is none."""
    import psutil
    from monailabel.utils.async_tasks.utils import processes

    process = processes("train").get(task_id)
    try:
        return (process.pid, psutil.Process(process.pid).create_time()) if process else (0, 0.0)
    except psutil.Error:
        return 0, 0.0


def _alive(pid: int, born: float) -> bool:
    """Whether that very process is running: one that outlived its server must not get a second beside it."""
    import psutil

    try:
        process = psutil.Process(pid) if pid else None
        return process is not None and abs(process.create_time() - born) < 1 and process.status() != "zombie"
    except psutil.Error:
        return False


def _opaque(case: str) -> str:
    return hashlib.sha256(case.encode()).hexdigest()[:16]


def _stamp(file: str) -> str:
    try:
        found = os.stat(file)
    except FileNotFoundError:  # the store lists what somebody has just moved; all other labels still count
        return ""
    return f"{found.st_mtime_ns}-{found.st_size}"
