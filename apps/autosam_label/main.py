"""The app that MONAI Label's loader executes under the module name ``main``, in the server and in every training child.

It puts the repository root on the path, forgets our own packages of an earlier load (``/reload`` executes this file
again), switches off others' log lines that name images or patients, and wires the tasks to one engine. Building the app
loads no weights, downloads nothing and writes no file.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Optional

from monailabel.config import settings as upstream
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.exception import ImageNotFoundException, MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask

ROOT = str(Path(__file__).resolve().parents[2])
OURS = ("lib", "infers", "trainers")

sys.path[:] = [ROOT, *(p for p in sys.path if p != ROOT)]
for _name in [m for m in list(sys.modules) if m.split(".")[0] in OURS]:
    del sys.modules[_name]

from infers.base import for_store, told
from infers.batch import BatchTask, giving_way
from infers.dicom_store import DicomStore
from infers.interactive import SamTask
from infers.learned import LearnedTask, live_versions
from infers.local_store import LocalStore
from infers.pacs import Pacs
from infers.records import Records
from infers.request import read_save
from infers.saving import FINAL, FinalLabels
from infers.scoring import AgreementScoring, QualityScoring
from infers.sessions import KeptSessions
from infers.strategies import Desk
from lib.assisted import AssistedEngine
from lib.config import method_row
from lib.engine import Engine
from lib.errors import ConfigError
from lib.settings import AppSettings
from lib.versions.report import report_file
from lib.versions.store import open_store
from trainers.adapt import AdaptTask
from trainers.gate import UpstreamGate
from trainers.schedule import Scheduler

UPSTREAM_NAMES_IMAGES = (
    "monailabel.endpoints.infer", "monailabel.endpoints.activelearning", "monailabel.endpoints.session",
    "monailabel.endpoints.datastore", "monailabel.tasks.activelearning", "monailabel.utils.sessions",
    "monailabel.datastore.local", "monailabel.datastore.dicom", "monailabel.datastore.utils", "dicomweb_client",
)  # fmt: skip
for _name in UPSTREAM_NAMES_IMAGES:
    logging.getLogger(_name).setLevel(logging.ERROR)
# Both quote the value of a malformed tag, such as a birth date; for all threads, which ``catch_warnings`` is not for.
warnings.filterwarnings("ignore", category=UserWarning, module=r"(pydicom|highdicom)\b")


class AutoSamLabel(MONAILabelApp):
    """Interactive segmentation with SAM-family models.

    Args:
        app_dir: this folder; nothing is written into it.
        studies: folder of images or DICOMweb address.
        conf: ``--conf`` pairs, see :class:`lib.settings.AppSettings`.

    Raises:
        ConfigError: for a wrong ``--conf``; the server then does not start.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.settings = AppSettings.from_conf(conf)
        self.engine = Engine(self.settings)
        self.versions_dir = self.settings.versions_dir(studies)
        self._assisted = {name: self._assist(name) for name in self.settings.models}
        self._records = Records(self.engine.open, lambda: live_versions(self._assisted), self.settings.labels)
        self._finals = FinalLabels(self.engine.open, self.settings.offered)
        trained = self.settings.train_default or next(iter(self.settings.models), "")
        gate = UpstreamGate(self, trained)
        self._desk = Desk(self._assisted.get(trained), self.settings, self.datastore, gate.busy)
        self.schedule = Scheduler(self.settings.rules, self.versions_dir, gate=gate)
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="autosam_label",
            description="Segmentation with SAM-family models: clicks, boxes, and prompts learned from your labels",
            version="0.2",
        )
        self._auto_update_scoring = False  # else every next sample would start a process for each scoring method

    def on_init_complete(self) -> None:
        """Called in the server only: the schedule begins."""
        super().on_init_complete()
        self._desk.start()
        self.schedule.start()

    def next_sample(self, request: dict[str, Any]) -> Any:
        """Upstream's; whoever asks for an image is about to work."""
        self.schedule.used()
        return super().next_sample(request)

    def on_save_label(self, image_id: str, label_id: str) -> None:
        """Called for a label of any tag; the schedule looks at the store itself."""
        self.schedule.saved()
        self._records.saved(self.datastore(), image_id)

    def describe(self, image_id: str, params: dict[str, Any], user: Optional[str]) -> dict[str, Any]:
        """How the label came about that a client is about to save: our wrapper of the server puts it into its params.

        A PACS gets it inside the DICOM SEG; :meth:`on_save_label` adds what the person changed.
        """
        return self._records.describe(self.datastore(), image_id, params, user).to_json()

    def info(self) -> dict[str, Any]:
        """Upstream's, and what the schedule decides."""
        return {**super().info(), "schedule": self.schedule.view()}

    def report(self, method: str, version: str = "") -> Path:
        """The page about a version of a method, or about the newest.

        Raises:
            MONAILabelException: where there is none.
        """
        try:
            return report_file(open_store(self.versions_dir, method), version)
        except ConfigError as error:
            raise MONAILabelException(MONAILabelError.INVALID_INPUT, str(error)) from error

    def _assist(self, name: str) -> AssistedEngine:
        return AssistedEngine(self.engine, method_row(name), open_store(self.versions_dir, name), self.settings.offered)

    def init_datastore(self) -> Datastore:
        """Upstream's, with our store of a folder."""
        if self.studies.startswith(("http://", "https://")):
            return super().init_datastore()
        return LocalStore(
            self.studies,
            extensions=upstream.MONAI_LABEL_DATASTORE_FILE_EXT,
            auto_reload=upstream.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=upstream.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def _init_dicomweb_datastore(self) -> Datastore:
        """Upstream's downloads a tool at start; ours writes DICOM SEG itself."""
        return DicomStore(
            Pacs(self.studies, self.settings.modalities), upstream.MONAI_LABEL_DICOMWEB_CACHE_PATH.strip() or None
        )

    def _load_sessions(self, load: bool = False) -> Optional[KeptSessions]:
        """Upstream's, with our sessions."""
        path, expiry = upstream.MONAI_LABEL_SESSION_PATH, upstream.MONAI_LABEL_SESSION_EXPIRY
        return KeptSessions(path, expiry) if load else None

    def init_infers(self) -> dict[str, InferTask]:
        """The tasks by the names that clients show."""
        labels = self.settings.offered
        tasks: dict[str, InferTask] = {
            "sam": SamTask(self.engine, labels, 3),
            "sam_2d": SamTask(self.engine, labels, 2),
        }
        for name in self.settings.models:
            assisted = self._assisted[name]
            tasks |= {name: LearnedTask(assisted, edit=False), f"{name}_edit": LearnedTask(assisted, edit=True)}
        return tasks

    def init_trainers(self) -> dict[str, TrainTask]:
        """One per learned method, under the same name as its autonomous task; OHIF shows and starts the first."""
        names = sorted(self.settings.models, key=lambda name: name != self.settings.train_default)
        return {n: AdaptTask(method_row(n), self.settings, self.versions_dir, self._is_child) for n in names}

    def _is_child(self) -> bool:
        return not self._server_mode

    def init_batch_infer(self) -> BatchTask:
        """Pre-annotation of the whole store."""
        return BatchTask(lambda: self._server_mode)

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """How labels agree, and which ones a person should look at."""
        kinds = (AgreementScoring, QualityScoring)
        return {k.name: k(self.versions_dir, self.settings.labels, lambda: self._server_mode) for k in kinds}

    def init_strategies(self) -> dict[str, Strategy]:
        """Ways to choose the next image; the default first."""
        return self._desk.strategies()

    def infer(self, request: dict[str, Any], datastore: Optional[Datastore] = None) -> dict[str, Any]:
        """Upstream's inference on an image of the store, a session or an upload, and on nothing else.

        The option ``save`` keeps the answer: ``draft`` under the tag original, ``final`` as final label, which a PACS
        gets as DICOM SEG. A final label that would lose something (:mod:`infers.saving`) is refused.

        Raises:
            MONAILabelException: for an unknown image or model, a path outside these places, or a wrong request.
        """
        self.schedule.used()
        tag = request.get("label_tag", "original")
        if not isinstance(tag, str) or not re.fullmatch(r"\w[\w-]{0,63}", tag):
            raise MONAILabelException(
                MONAILabelError.INVALID_INPUT,
                "label_tag: expected up to 64 letters, digits and dashes, such as original.",
            )
        store = datastore or self.datastore()
        if request.get("save_label") and tag == FINAL:
            raise MONAILabelException(
                MONAILabelError.INVALID_INPUT,
                "label_tag: expected a draft's, received final. Send save=final instead: that label says who made it.",
            )
        with told():
            keep_as = read_save(request)
        image = self._known_image(request.get("image"), store)
        if keep_as and os.path.isabs(str(request["image"])):
            raise MONAILabelException(
                MONAILabelError.INVALID_INPUT, "save: expected an image of the datastore, received another."
            )
        if keep_as:
            self._check_keeping(request, keep_as, store)
        self._records.asked(request)
        self._desk.opened(request)
        with giving_way(self.engine, request):
            result = super().infer({**request, "image": image}, datastore)
        try:
            self._records.answered(store, request, result, getattr(self._infers[request["model"]], "dimension", 3))
            if keep_as:
                self._keep(request, keep_as, result, store)
        except BaseException:  # upstream removes the file only after it has sent it
            Path(result["file"]).unlink(missing_ok=True)
            raise
        return result

    def _check_keeping(self, request: dict[str, Any], tag: str, store: Datastore) -> None:
        """Refuses, before anything is segmented, what would be filed under a wrong name or lose part of a label."""
        task = self._infers.get(request.get("model"))
        if task is None:  # upstream says which there are
            return
        with told():
            names = task.structures(request)
            if tag == FINAL:
                self._finals.check(store, request["image"], names, task.dimension)

    def _keep(self, request: dict[str, Any], tag: str, result: dict[str, Any], store: Datastore) -> None:
        """Stores an answer as the image's label and says so in the reply."""
        reply = result["params"]
        tag = reply.get("file", tag)  # a map of uncertainty is no label of the image
        nothing = reply["empty"] and "file" not in reply
        reply["saved"] = None if nothing else tag
        if nothing:
            reply["warnings"].append("Nothing was found, so nothing was saved.")
            return
        if tag == FINAL:  # again: somebody may have saved a label meanwhile
            with told():
                task = self._infers[request["model"]]
                self._finals.check(store, request["image"], reply["label_names"], task.dimension)
        reply["provenance"] = self._records.kept(store, request, reply["provenance"])
        names = [{"name": name, "idx": number} for name, number in reply["label_names"].items()]
        record = reply["provenance"]
        info = {"model": request["model"], "params": for_store(reply), "label_info": names, "provenance": record}
        self.on_save_label(request["image"], store.save_label(request["image"], result["file"], tag, info))

    def _known_image(self, image: Any, datastore: Datastore) -> str:
        """The image as upstream may look it up. It opens any path of the server that it is given, so this must not."""
        if isinstance(image, str) and "\0" in image:  # no file has such a name, and asking about one is an error
            image = None
        if isinstance(image, str) and os.path.basename(image) == image not in ("", ".", ".."):
            path = self._path_in(datastore, image)
            if path:  # upstream takes an id for a path where the working directory has a file of that name
                return path if os.path.exists(image) else image
        elif isinstance(image, str) and os.path.isabs(image) and self._may_open(image):
            return image
        raise ImageNotFoundException(
            "The image is not known here: expected an id out of the datastore, a session that has not expired, or an "
            "uploaded file. Choose the image again, or upload it."
        )

    @staticmethod
    def _path_in(datastore: Datastore, image_id: str) -> str:
        try:
            return datastore.get_image_uri(image_id)
        except MONAILabelException:
            raise
        except Exception as error:  # a remote store reports an unknown id in its own ways
            raise ImageNotFoundException("The datastore does not know this image or cannot be reached.") from error

    def _may_open(self, path: str) -> bool:
        """Whether a path lies in the studies or the sessions, or is a file that the server itself put away."""
        real = Path(path).resolve()
        folders = [] if "://" in self.studies else [Path(self.studies).resolve()]
        if self.sessions() is not None:
            folders.append(Path(self.sessions().store_path).resolve())
        uploaded = real.parent == Path(tempfile.gettempdir()).resolve() and real.name.startswith(
            tempfile.gettempprefix()
        )
        return real.exists() and (uploaded or any(folder in real.parents for folder in folders))
