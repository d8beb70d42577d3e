"""The train task of a learned method: labelled store in, gated version out. Runs in MONAI Label's training child.

A run that was killed goes on where it was if it is asked for again with the same cases and recipe. A new version goes
live only if it beats the live one on the pinned validation cases; until that moment nothing that answers has changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Optional

import torch
from filelock import FileLock, Timeout
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.train import TrainTask

from lib.active.calibration import CALIBRATION
from lib.active.evidence import calibration_pairs
from lib.child import RUN_SYNC, only_read
from lib.config import MethodRow, TrainRecipe, override
from lib.contracts import Backbone
from lib.data.samples import (
    LabelledCase,
    TrainingCase,
    common_channels,
    labels_of,
    names_of,
    patient_of,
    usable_cases,
)
from lib.data.split import PinnedSplit
from lib.engine import Engine
from lib.errors import AppError, ConfigError, WeightsError
from lib.evaluate import encoded, evaluate
from lib.learned import PRESETS, Learned, fitted
from lib.settings import AppSettings
from lib.train_data import Batches, all_slices
from lib.train_loop import BEST, PROGRESS, STATE, Run, fit, write_json
from lib.versions.gate import beats
from lib.versions.record import Trained, Version
from lib.versions.report import keep_comparison, write_report
from lib.versions.start import NEW, STARTS, why_anew
from lib.versions.store import VersionStore, open_store
from lib.worst_cases import keep_worst

logger = logging.getLogger(__name__)
LEFT_OUT_SHOWN = 20
STORED = "stored"  # holds the name of the version that a run made
NICE = 10  # of the training's process: clicks on the server beside it go first


class AdaptTask(TrainTask):
    """Trains one method on the final labels of the store.

    Args:
        row: the method.
        settings: of the app.
        versions_dir: folder of trained versions of all methods.
        alone: whether this process does nothing but train and gives way to the server beside it; False in the server,
            which trains nothing itself, and None in a program that has no server.
    """

    def __init__(
        self, row: MethodRow, settings: AppSettings, versions_dir: Path, alone: Optional[Callable[[], bool]] = None
    ) -> None:
        super().__init__(f"{row.name}: learns prompts from the final labels")
        self._row, self._settings, self._versions_dir, self._alone = row, settings, versions_dir, alone

    def config(self) -> dict[str, Any]:
        """Options that clients show; a list is a choice whose first item is the default."""
        values = asdict(self._row.recipe)
        choices = {"preset": ("auto", *PRESETS), "start": STARTS}
        return values | {k: [values[k], *(c for c in found if c != values[k])] for k, found in choices.items()}

    def stats(self) -> dict[str, Any]:
        """Progress of the run under way or of the last one."""
        path = self._versions_dir / self._row.name / PROGRESS
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet
            return {}

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Trains and, if it is better, puts the new version live.

        Raises:
            MONAILabelException: with a sentence about what is missing or wrong; nothing has changed then.
        """
        store = open_store(self._versions_dir, self._row.name)
        if self._alone is not None:
            if not self._alone():
                raise MONAILabelException(MONAILabelError.INVALID_INPUT, RUN_SYNC)
            if hasattr(os, "nice"):
                os.nice(NICE)
            only_read(datastore)  # the server beside this process writes its file
        self._tell_error(store, None)
        try:
            return _Training(self._row, self._settings, store, request, *stored_cases(datastore)).run()
        except AppError as error:
            self._tell_error(store, str(error))
            raise MONAILabelException(MONAILabelError.INVALID_INPUT, str(error)) from error
        except MONAILabelException as error:  # the PACS, which says how it can be mended
            self._tell_error(store, str(error.msg))
            raise
        except Exception as error:  # such as a GPU's memory; its text may name files
            self._tell_error(store, f"{type(error).__name__}: the server's log says more.")
            raise

    def _tell_error(self, store: VersionStore, sentence: Optional[str]) -> None:
        """Beside the progress; None forgets the one of the training before."""
        told = {key: value for key, value in self.stats().items() if key != "error"}
        try:
            if sentence or "error" in self.stats():
                store.folder.mkdir(parents=True, exist_ok=True)
                write_json(store.folder / PROGRESS, {**told, **({"error": sentence} if sentence else {})})
        except OSError as error:  # a full disk must not hide what went wrong
            logger.warning("The progress of the training cannot be written: %s", error.strerror)


def stored_cases(datastore: Datastore) -> tuple[list[LabelledCase], list[str]]:
    """Images with a final label, and a sentence for those whose label a PACS has and does not give."""
    found, missing = [], 0
    for image in sorted(datastore.get_labeled_images()):
        label = datastore.get_label_by_image_id(image, DefaultLabelTag.FINAL)
        if not label:  # its datastore has logged why
            missing += 1
            continue
        info = datastore.get_label_info(label, DefaultLabelTag.FINAL) or {}
        files = datastore.get_image_uri(image), datastore.get_label_uri(label, DefaultLabelTag.FINAL)
        found.append(LabelledCase(image, Path(files[0]), Path(files[1]), names_of(info)))
    why = "final labels could not be read from the PACS: it does not answer, or they do not fit their series."
    return found, [f"{missing} {why} The log names the reason of each."] if missing else []


class _Training:
    """One run from cases to version."""

    def __init__(
        self, row: MethodRow, settings: AppSettings, store: VersionStore, request: Mapping[str, Any],
        cases: Sequence[LabelledCase], missing: Sequence[str],
    ) -> None:  # fmt: skip
        self.store, self.settings = store, settings
        # without cases the next line says what is missing
        self.labels = labels_of(cases, settings.labels) if cases else settings.offered
        try:
            self.cases, left_out = usable_cases(cases, self.labels)
        except ConfigError as error:  # perhaps because the PACS kept labels back
            raise ConfigError(" ".join([str(error), *missing])) from error
        self.left_out = [*missing, *left_out]
        self.channels = common_channels(self.cases)
        self.row = fitted(row, self.channels)
        self.engine = Engine(replace(settings, prefetch=False))
        self.backbone: Backbone = self.engine.warm()
        recipe = override(row.recipe, request)
        recipe = replace(recipe, preset=self._preset(recipe.preset))
        self.parts = self._split()
        self.start, self.why_anew = self._start(recipe)
        self.recipe = replace(recipe, start=self.start.name if self.start else NEW)
        self.folder = store.folder / "runs" / "current"

    def _preset(self, wanted: str) -> str:
        if wanted != "auto":
            return wanted
        if self.backbone.spec.name == "compact":
            return "full"
        return "adapters" if self.engine.device().type == "cuda" else "frozen"

    def _start(self, recipe: TrainRecipe) -> tuple[Optional[Version], Optional[str]]:
        """The version whose tensors are gone on with, or why there is none."""
        live = self.store.live()
        why = why_anew(
            recipe.start, live, backbone_digest=self.backbone.weights_id, labels=self.labels,
            recipe={**asdict(recipe), "options": self.row.options}, validation=[c.case for c in self._of("val")],
        )  # fmt: skip
        return (None if why else live), why

    def _split(self) -> dict[str, str]:
        patients = {c.case: patient_of(c) for c in self.cases}
        former = {c.case: c.patient for c in self.cases if c.patient}  # a series was once taken for a patient
        pinned = PinnedSplit(self.store.folder / "split.json").assign(patients.values(), former)
        return {case: pinned[patient] for case, patient in patients.items()}

    def run(self) -> dict[str, Any]:
        """Trains, stores, gates; alone in the folder of runs, where a server that was killed may have left one.

        Raises:
            ConfigError: where another training of this method is under way.
        """
        self.store.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.store.folder / ".training.lock", timeout=0):
                return self._run()
        except Timeout as error:
            raise ConfigError(
                f"Expected one training of {self.row.name} at a time; another process is at it, perhaps one that a "
                "server which was killed has left. Wait until it has finished, or end it."
            ) from error

    def _run(self) -> dict[str, Any]:
        self._take_up()
        for sentence in self.left_out:
            logger.warning(sentence)
        model = self._begun()
        start = f"Goes on from {self.start.name}." if self.start else f"Starts anew: {self.why_anew}."
        batches = Batches(model, all_slices(self._of("train")), self.recipe)
        plan = f"{len(self._of('train'))} cases to train, {len(self._of('val'))} to validate. {start} {batches.plan()}"
        logger.info("preset %s: %s", self.recipe.preset, plan)
        more = len(self.left_out) - LEFT_OUT_SHOWN  # clients fetch the notes with every look at the progress
        rest = [f"{more} more are left out; the server's log names them."] if more > 0 else []
        self.notes = {"plan": plan, "left_out": self.left_out[:LEFT_OUT_SHOWN] + rest}
        self._tell(self.notes)
        work = Run(model, batches, self._of("val"), self.labels, self.recipe, self.folder)
        metrics = fit(work, lambda entry: self._tell({**entry, **self.notes}))
        pairs = calibration_pairs(model, self._of("val"), self.labels, metrics["cases"], encoded(model))
        return self._publish(model, {**metrics, CALIBRATION: pairs})

    def _begun(self) -> Learned:
        """The model with the tensors that it begins with."""
        start = self.start
        if start is None:
            return self._anew()
        model = self._anew()
        try:
            model.restore(self.store.tensors(start))
        except WeightsError as error:  # of a program before this one, whose tensors had another form
            logger.warning("%s", error)
            self.start, self.why_anew = None, f"{start.name} does not load any more"
            return self._anew()
        model.warm_up = 0.0  # its prompts are good already
        return model

    def _anew(self) -> Learned:
        torch.manual_seed(self.recipe.seed)
        return Learned(self.row, self.backbone, len(self.labels), self.recipe.preset).to(self.engine.device())

    def _of(self, part: str) -> list[TrainingCase]:
        return [c for c in self.cases if self.parts[c.case] == part]

    def _tell(self, entry: Mapping[str, Any]) -> None:
        write_json(self.store.folder / PROGRESS, entry)

    def _take_up(self) -> None:
        """Keeps the folder of a run that was cut off if it was the same, else starts an empty one."""
        facts = {
            "recipe": asdict(self.recipe), "row": self.row.options, "labels": self.labels, "parts": self.parts,
            "backbone": self.backbone.weights_id, "voxels": [_voxels(c) for c in self.cases],
        }  # fmt: skip
        fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        mark = self.folder / "fingerprint"
        if not mark.exists() or mark.read_text() != fingerprint:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            mark.write_text(fingerprint)

    def _publish(self, model: Learned, metrics: dict[str, Any]) -> dict[str, Any]:
        absent = [n for k, n in enumerate(self.labels, 1) if not any((c.target == k).any() for c in self._of("val"))]
        version = self._stored(model, {**metrics, "absent": absent})
        live, before, standing = self._compared()
        better, reason = beats(
            metrics, before, tolerance=self.settings.gate_tolerance, absent=absent, standing=standing
        )
        gone = [label for label in (live.labels if live else ()) if label not in self.labels]
        reason += f" No longer a label: {', '.join(gone)}." if gone else ""
        (self.store.promote if better else self.store.refuse)(version.name, reason)
        logger.info("%s %s: %s", version.name, "is live" if better else "is stored, not live", reason)
        self._archive(version)
        done = {"version": version.name, "live": better, "reason": reason, "dice": metrics["dice"]}
        ended = {**_read(self._run_of(version) / PROGRESS), **done, **self.notes}
        self._tell(ended)
        done["report"] = self._report(model, version, live, before)
        self._tell({**ended, **done})
        self._prune()
        return done

    def _stored(self, model: Learned, metrics: dict[str, Any]) -> Version:
        """The new version, stored before anything is asked of the old one; once, however often the run is cut off."""
        mark = self.folder / STORED
        name = mark.read_text() if mark.exists() else ""
        stored = next((version for version in self.store.list() if version.name == name), None)
        if stored is not None:  # somebody may have deleted it
            return stored
        live = self.store.live_name()
        trained = Trained(
            backbone=self.backbone.spec.name, backbone_digest=self.backbone.weights_id, labels=self.labels,
            recipe={**asdict(self.recipe), "options": self.row.options}, split=self.parts, metrics=metrics,
            parent=live,
        )  # fmt: skip
        version = self.store.add(model.trained(), trained)
        mark.write_text(version.name)
        return version

    def _compared(self) -> tuple[Optional[Version], Optional[dict[str, Any]], str]:
        """The live version, its scores of today and why it has none; once more where another went live meanwhile."""
        while True:
            live = self.store.live()
            scores, why_not = self._incumbent(live)
            if self.store.live_name() == (live.name if live else None):
                return live, scores, why_not

    def _report(
        self, model: Learned, version: Version, live: Optional[Version], before: Optional[dict[str, Any]]
    ) -> Optional[str]:
        """Place of the new version's report in the state folder; None where it failed, which harms nothing else."""
        run = self._run_of(version)
        try:
            keep_comparison(run, live.name if live else None, before)
            keep_worst(model, self._of("val"), version.metrics, self.labels, run)
            return write_report(self.store, version.name).relative_to(self.store.folder.parent).as_posix()
        except Exception as error:  # noqa: BLE001 - drawing may meet anything; the version is stored and decided on
            logger.warning("The report of %s was not written: %s", version.name, type(error).__name__)
            return None

    def _prune(self) -> None:
        if not self.settings.keep_versions:
            return
        try:
            old = self.store.prune(self.settings.keep_versions)
        except AppError as error:  # what is too much can go next time
            logger.warning("Old versions were not deleted: %s", error)
            return
        if old:
            logger.info("deleted %s", ", ".join(old))

    def _incumbent(self, live: Optional[Version]) -> tuple[Optional[dict[str, Any]], str]:
        """The live version's scores on today's validation cases, or why it has none: it fits no more."""
        if live is None:
            return None, "nothing is live"
        if live.backbone_digest != self.backbone.weights_id:
            return None, f"{live.name}, which was live, belongs to another backbone"
        row = replace(self.row, options=live.recipe.get("options", self.row.options))  # the YAML may have changed
        try:
            model = Learned(row, self.backbone, len(live.labels), live.recipe["preset"])
            if model.spec.channels not in (3, self.channels):
                return None, f"{live.name}, which was live, reads images of {model.spec.channels} channels"
            model.restore(self.store.tensors(live))
        except AppError as error:  # of a program before this one
            logger.warning("%s", error)
            return None, f"{live.name}, which was live, does not load any more"
        model.to(self.engine.device()).eval()
        return evaluate(model, self._of("val"), self.labels, encoded(model), own=live.labels), ""

    def _run_of(self, version: Version) -> Path:
        return self.folder.with_name(version.name)

    def _archive(self, version: Version) -> None:
        """Curves and progress stay under the version's name; what only resuming needs goes."""
        for name in (STATE, BEST, STORED, "fingerprint"):
            (self.folder / name).unlink(missing_ok=True)
        target = self._run_of(version)
        shutil.rmtree(target, ignore_errors=True)
        self.folder.rename(target)


def _voxels(case: TrainingCase) -> str:
    return f"{case.volume.content_hash}:{hashlib.sha256(case.target.tobytes('F')).hexdigest()}"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
