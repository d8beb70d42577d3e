"""MONAI Label's scoring methods: ``agreement`` of final and model labels, and ``quality``, the ranked work list.

``POST /scoring/{method}`` runs in a child process that builds the app a second time. Upstream's methods write their
numbers into the datastore's file there, and so overwrite what the server saved meanwhile. Ours only read
the store; results are ``NAME.json`` and ``NAME.html`` in the state folder, replaced whole, and the server shows them in
``/info/`` and under ``GET /quality/NAME``. Log lines and what a run returns hold counts and no identifiers.
"""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.scoring import ScoringMethod

from infers.base import told
from infers.pacs import PacsError
from infers.stored import stored_map
from lib.child import RUN_SYNC, only_read
from lib.data.samples import BACKGROUND
from lib.data.volume import load_volume
from lib.errors import AppError, CapacityError, ConfigError, GridError, VolumeError
from lib.provenance import Change, Provenance
from lib.quality import report
from lib.quality.across import Facts, compare, facts_of
from lib.quality.agreement import agreement, dice_by_label, summary
from lib.quality.checks import LabelMap, check_map
from lib.quality.rules import Remark, Rules, read_rules
from lib.types import Volume

logger = logging.getLogger(__name__)
FINAL, ORIGINAL = DefaultLabelTag.FINAL.value, DefaultLabelTag.ORIGINAL.value
# of one case, which then is a line of the result; torch tells of too little memory by a RuntimeError
UNREADABLE = (VolumeError, CapacityError, MONAILabelException, OSError, MemoryError, RuntimeError)
# what a Dice was measured with
MODELS = {"label": "the model's label", "record": "what the model had said when the label was saved"}


class _Store:
    """The labels of one run's two tags."""

    def __init__(self, datastore: Datastore, request: Mapping[str, Any], labels: Sequence[str]) -> None:
        self._datastore, self._labels = datastore, labels
        self.y, self.y_pred = (_tag(request, key, tag) for key, tag in (("y", FINAL), ("y_pred", ORIGINAL)))
        labelled = set(datastore.get_labeled_images())
        self.tags = {case: self._tags(case, case in labelled) for case in sorted(datastore.list_images())}

    def _tags(self, case: str, is_final: bool) -> set[str]:
        """The store of a PACS passes over a final label that it cannot get, and asking again raises where the PACS is
        away; else the label counts, and whoever reads it is told why it cannot."""
        tags = set(self._datastore.get_labels_by_image_id(case))
        if is_final and FINAL not in tags and case in self._datastore.get_labeled_images():
            tags.add(FINAL)
        return tags

    def volume(self, case: str) -> Volume:
        return load_volume(self._datastore.get_image_uri(case))

    def label(self, case: str, tag: str, volume: Volume) -> LabelMap:
        """Without what is named background, which training leaves out too."""
        self._datastore.get_label_uri(case, tag)  # says why a PACS does not hand it over
        return stored_map(self._datastore, case, tag, volume, self._labels).without(BACKGROUND)

    def change(self, case: str) -> Optional[Change]:
        """How much a person changed of what the model said, by the label's record."""
        try:
            record = (self._datastore.get_label_info(case, self.y) or {}).get("provenance")
            return Provenance.from_json(record).changed if record else None
        except ConfigError:  # of another program
            return None

    def passed_over(self, error: Exception) -> str:
        """Why one case is not in the result.

        Raises:
            PacsError: where the PACS is away for all: then the last result is worth more than this one.
        """
        if isinstance(error, PacsError):
            only_read(self._datastore)  # forgets the PACS's last list, so that it is asked
            self._datastore.get_labeled_images()
        return _told(error)


class StoreScoring(ScoringMethod):
    """A look at all labels of the store.

    Args:
        folder: for the result.
        labels: names of the values 1..K in labels that declare none.
        in_server: whether this process is the server, which must not stand still for it.
    """

    name = text = ""

    def __init__(self, folder: Path, labels: Sequence[str], in_server: Callable[[], bool]) -> None:
        super().__init__(self.text)
        self._folder, self._labels, self._in_server = folder, labels, in_server
        self._shown: tuple[int, dict[str, Any]] = (0, {})

    def info(self) -> dict[str, Any]:
        """What ``/info/`` shows: the last result's counts, and where it is."""
        path = self._folder / f"{self.name}.json"
        try:
            stamp = path.stat().st_mtime_ns
            if stamp != self._shown[0]:  # every click asks for this, and the file of a large store has megabytes
                found = json.loads(path.read_text(encoding="utf-8"))
                where = {"report": str(path.with_suffix(".html")), "url": f"/quality/{self.name}"}
                self._shown = stamp, {**where, "created": found["created"], **found["summary"]}
        except (OSError, ValueError, KeyError):  # none yet
            return super().info()
        return {**super().info(), **self._shown[1]}

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Looks at the labels and replaces the last result; its counts.

        Raises:
            MONAILabelException: if asked for inside the server, for a wrong option, or where the PACS is away.
        """
        if self._in_server():
            raise _refusal(RUN_SYNC)
        only_read(datastore)
        with told():
            found, page = self._look(_Store(datastore, request, self._labels), request)
        report.publish(self._folder, self.name, found, page)
        logger.info("%s: %s", self.name, found["summary"])
        return dict(found["summary"])

    @abstractmethod
    def _look(self, store: _Store, request: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """JSON and page of the result."""


class AgreementScoring(StoreScoring):
    """Dice and surface distances, structure by structure.

    Options in the request's body: ``y`` (default ``final``) and ``y_pred`` (default ``original``), tags of the labels.
    """

    name, text = "agreement", "Dice and surface distances between final labels and those of the model"

    def _look(self, store: _Store, request: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        cases, left_out = {}, {}
        for case, tags in store.tags.items():
            if not {store.y, store.y_pred} <= tags:
                continue
            try:
                volume = store.volume(case)
                cases[case] = agreement(*(store.label(case, tag, volume) for tag in (store.y, store.y_pred)))
            except UNREADABLE as error:
                left_out[case] = store.passed_over(error)
        found = report.agreement_list(cases, summary(cases), left_out)
        return {**found, "y": store.y, "y_pred": store.y_pred}, report.agreement_page(found)


class QualityScoring(StoreScoring):
    """The ranked work list: every labelled case, by what is remarkable about its label.

    A case's final label is looked at or, where there is none, the model's. It is compared with the model's label or,
    where the store has none, by what its record says of the model's answer. Options in the request's body: ``y`` and
    ``y_pred`` as above, and ``rules`` with thresholds in place of those in ``quality.yaml``.
    """

    name, text = "quality", "Work list: labels that a person should look at, with reasons"

    def _look(self, store: _Store, request: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        rules = _rules(request.get("rules"))
        records: dict[str, report.Record] = {}
        facts: dict[str, Facts] = {}
        left_out: dict[str, str] = {}
        for case, tags in store.tags.items():
            if not tags & {store.y, store.y_pred}:
                continue
            try:
                records[case], known = _examined(store, case, rules)
                facts |= {case: known} if known else {}
            except PacsError as error:  # which says nothing about the label
                left_out[case] = store.passed_over(error)
        for case, remarks in compare(facts, rules).items():
            records[case] = replace(records[case], remarks=(*records[case].remarks, *remarks))
        found = report.work_list(list(records.values()), rules, left_out)
        return found, report.quality_page(found)


def _examined(store: _Store, case: str, rules: Rules) -> tuple[report.Record, Optional[Facts]]:
    """One case by itself, and what the comparison with the others needs.

    Raises:
        PacsError: where the PACS does not hand it over.
    """
    tag = store.y if store.y in store.tags[case] else store.y_pred
    try:
        return _looked_at(store, case, tag, rules)
    except PacsError:
        raise
    except GridError as error:
        return report.Record(case, tag, (Remark("grid", str(error)),)), None
    except UNREADABLE as error:
        return report.Record(case, tag, (Remark("unreadable", _told(error)),)), None


def _looked_at(store: _Store, case: str, tag: str, rules: Rules) -> tuple[report.Record, Facts]:
    volume = store.volume(case)
    label = store.label(case, tag, volume)
    model = _model_label(store, case, volume) if tag == store.y else None
    dice, dice_of = _dice(store, case, label, model) if tag == store.y else ({}, "")
    remarks = check_map(label, rules)
    remarks += [
        Remark("disagreement", f"{name}: Dice {value:.2f} with {MODELS[dice_of]}.", name, share=1 - value)
        for name, value in dice.items()
        if value < rules.agreement_dice
    ]
    record = report.Record(case, tag, tuple(remarks), dice, dice_of)
    return record, facts_of(label, model, is_picture=volume.is_2d)


def _dice(store: _Store, case: str, label: LabelMap, model: Optional[LabelMap]) -> tuple[dict[str, float], str]:
    """By structure, with the model's label or, where the store has none, with what the model had said when the label
    was saved; and with which of the two."""
    if model is not None:
        return dice_by_label(label, model), "label"
    change = store.change(case) if store.y_pred == ORIGINAL else None
    known = change.dice if change else {}
    return {name: value for name, value in known.items() if 0 <= value <= 1}, "record" if known else ""


def _model_label(store: _Store, case: str, volume: Volume) -> Optional[LabelMap]:
    if store.y_pred not in store.tags[case]:
        return None
    try:
        return store.label(case, store.y_pred, volume)
    except PacsError:
        raise
    except UNREADABLE:  # the method agreement says why; the label that counts is the final one
        return None


def _told(error: Exception) -> str:
    """What it says; an error of the system would name files."""
    if isinstance(error, MONAILabelException):
        return str(error.msg)
    if isinstance(error, AppError):
        return str(error)
    return (
        f"Expected to read and compare image and label; received {type(error).__name__}."
        " See that the files are there and that memory is free, and score again."
    )


def _rules(changes: Any) -> Rules:
    if changes is not None and not isinstance(changes, Mapping):
        raise ConfigError(f"rules: expected a mapping of thresholds, received a {type(changes).__name__}.")
    return read_rules(changes)


def _tag(request: Mapping[str, Any], key: str, default: str) -> str:
    tag = request.get(key) or default
    if not isinstance(tag, str):
        raise _refusal(f"{key}: expected a label tag such as {default}, received {tag!r}.")
    return tag


def _refusal(sentence: str) -> MONAILabelException:
    return MONAILabelException(MONAILabelError.INVALID_INPUT, sentence)
