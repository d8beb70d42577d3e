"""MONAI Label's scoring methods: ``agreement`` of final and model labels, and ``quality``, the ranked work list.

``POST /scoring/{method}`` runs in a child process that builds the app a second time. Upstream's methods write their
numbers into the datastore's file there, and so overwrite what the server saved meanwhile (PLATFORM 4). Ours only read
the store; results are ``NAME.json`` and ``NAME.html`` in the state folder, replaced whole, and the server shows them in
``/info/`` and under ``GET /quality/NAME``. Log lines and what a run returns hold counts and no identifiers.
"""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.scoring import ScoringMethod

from infers.base import told
from infers.batch import only_read
from infers.stored import stored_map
from lib.data.volume import load_volume
from lib.errors import CapacityError, ConfigError, GridError, VolumeError
from lib.quality import report
from lib.quality.across import Facts, compare, facts_of
from lib.quality.agreement import agreement, dice_by_label, summary
from lib.quality.checks import LabelMap, check_map
from lib.quality.rules import Remark, Rules, read_rules
from lib.types import Volume

logger = logging.getLogger(__name__)
UNREADABLE = (VolumeError, CapacityError, MONAILabelException)


class _Store:
    """The labels of one run's two tags."""

    def __init__(self, datastore: Datastore, request: Mapping[str, Any], labels: Sequence[str]) -> None:
        self._datastore, self._labels = datastore, labels
        self.y, self.y_pred = (
            _tag(request, key, tag.value)
            for key, tag in (("y", DefaultLabelTag.FINAL), ("y_pred", DefaultLabelTag.ORIGINAL))
        )
        self.tags = {case: set(datastore.get_labels_by_image_id(case)) for case in sorted(datastore.list_images())}

    def volume(self, case: str) -> Volume:
        return load_volume(self._datastore.get_image_uri(case))

    def label(self, case: str, tag: str, volume: Volume) -> LabelMap:
        return stored_map(self._datastore, case, tag, volume, self._labels)


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
            MONAILabelException: if asked for inside the server, or for a wrong option.
        """
        if self._in_server():
            raise _refusal("run_sync: expected false, received true, which would hold up everybody else. Leave it out.")
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
                left_out[case] = str(error)
        found = report.agreement_list(cases, summary(cases), left_out)
        return {**found, "y": store.y, "y_pred": store.y_pred}, report.agreement_page(found)


class QualityScoring(StoreScoring):
    """The ranked work list: every labelled case, by what is remarkable about its label.

    A case's final label is looked at or, where there is none, the model's. Options in the request's body: ``y`` and
    ``y_pred`` as above, and ``rules`` with thresholds in place of those in ``quality.yaml``.
    """

    name, text = "quality", "Work list: labels that a person should look at, with reasons"

    def _look(self, store: _Store, request: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        rules = _rules(request.get("rules"))
        records: dict[str, report.Record] = {}
        facts: dict[str, Facts] = {}
        for case, tags in store.tags.items():
            if tags & {store.y, store.y_pred}:
                records[case], known = _examined(store, case, rules)
                facts |= {case: known} if known else {}
        for case, remarks in compare(facts, rules).items():
            one = records[case]
            records[case] = report.Record(case, one.tag, (*one.remarks, *remarks), one.dice)
        found = report.work_list(list(records.values()), rules)
        return found, report.quality_page(found)


def _examined(store: _Store, case: str, rules: Rules) -> tuple[report.Record, Optional[Facts]]:
    """One case by itself, and what the comparison with the others needs."""
    tag = store.y if store.y in store.tags[case] else store.y_pred
    try:
        volume = store.volume(case)
        label = store.label(case, tag, volume)
    except GridError as error:
        return report.Record(case, tag, (Remark("grid", str(error)),)), None
    except UNREADABLE as error:
        return report.Record(case, tag, (Remark("unreadable", str(error)),)), None
    remarks = check_map(label, rules)
    dice = _dice_with_model(store, case, label, volume) if tag == store.y else {}
    remarks += [
        Remark("disagreement", f"{name}: Dice {value:.2f} with the model's label.", name, share=1 - value)
        for name, value in dice.items()
        if value < rules.agreement_dice
    ]
    return report.Record(case, tag, tuple(remarks), dice), facts_of(label)


def _dice_with_model(store: _Store, case: str, label: LabelMap, volume: Volume) -> dict[str, float]:
    if store.y_pred not in store.tags[case]:
        return {}
    try:
        return dice_by_label(label, store.label(case, store.y_pred, volume))
    except UNREADABLE:  # the method agreement says why; the label that counts is the final one
        return {}


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
