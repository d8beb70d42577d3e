"""The two tasks of a learned method over one engine: ``NAME`` segments alone, ``NAME_edit`` together with the user.

``NAME`` shows itself to clients only while a trained version is live; ``NAME_edit`` is plain SAM per label until then.
Thread-safe: no request state.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Optional

from monailabel.interfaces.tasks.infer_v2 import InferType

from infers.base import EngineTask, count_prompts
from infers.prompts import read_label_prompts
from infers.request import (
    MAPPED,
    UNCERTAINTY,
    in_file_order,
    option_table,
    read_options,
    read_reply,
    read_uncertainty,
)
from lib.assisted import AssistedEngine
from lib.engine import SegmentOptions
from lib.errors import AppError, PromptError
from lib.quality.rules import read_rules
from lib.types import Index, LabelPrediction, UserPrompts, Volume
from lib.uncertainty import LEVELS, levels_of

logger = logging.getLogger(__name__)


class LearnedTask(EngineTask):
    """Autonomous or assisted segmentation of all labels.

    Args:
        assisted: the method's engine.
        edit: True takes the user's prompts too.
    """

    def __init__(self, assisted: AssistedEngine, *, edit: bool) -> None:
        kind = InferType.DEEPEDIT if edit else InferType.SEGMENTATION
        text = f"{assisted.row.name}: learned prompts" + (
            " and your clicks, boxes and scribbles" if edit else ", nobody clicks"
        )
        options = option_table(planar=False)
        if not edit:
            for prompted_only in ("propagate", "ijk"):
                options.pop(prompted_only)
            options["uncertainty"] = list(UNCERTAINTY)
        super().__init__(kind, assisted.engine, _shown(assisted)[1], 3, text, options)
        self._assisted, self._edit, self.method = assisted, edit, assisted.row.name
        self._review_above = read_rules().review_above

    def info(self) -> dict[str, Any]:
        """What ``/info/`` shows, with the labels and name of the version that is live now."""
        version, labels = _shown(self._assisted)
        names = {label: number for number, label in enumerate(labels, start=1)}
        return {**super().info(), "labels": names, "version_live": version}

    def is_valid(self) -> bool:
        """Whether clients see the task."""
        return self._edit or _shown(self._assisted)[0] is not None

    def structures(self, request: Mapping[str, Any]) -> tuple[str, ...]:
        """All labels of the version that is live, whatever the request is about."""
        return self._assisted.labels()

    def answer(self, request: Mapping[str, Any]) -> tuple[Optional[str], dict[str, Any]]:
        """All labels of an image."""
        started = time.perf_counter()
        labels = self._assisted.labels()
        options, wanted = read_options(request, planar=False), read_reply(request, labels[0])
        if not self.is_valid():
            raise PromptError(
                f"No trained version of {self._assisted.row.name} is live. Label some images and train first."
            )
        volume = self._assisted.engine.open(request["image"])
        prompts, warnings = self._prompts(request, volume.shape, labels)
        prompts = {label: in_file_order(drawn, request, volume) for label, drawn in prompts.items()}
        opened = time.perf_counter()
        found, more = self._segmented(request, volume, prompts, options)
        facts = {**_facts(found, warnings), "prompts": count_prompts(*prompts.values()), **more}
        facts |= _points(found, request, volume)
        return self.reply(volume, found, wanted, facts, started, opened)

    def _segmented(
        self, request: Mapping[str, Any], volume: Volume, prompts: Mapping[str, UserPrompts], options: SegmentOptions
    ) -> tuple[LabelPrediction, dict[str, Any]]:
        """The answer, whose mask is the uncertainty map where that is asked for, and what else the reply says."""
        wish = "no" if self._edit else read_uncertainty(request)
        if wish == "no":
            return self._assisted.segment(volume, prompts, options), {}
        found, doubt = self._assisted.doubted(volume, options, above=self._review_above, mapped=wish in MAPPED)
        told = {label: {i: round(d, 4) for i, d in rows.items()} for label, rows in doubt.by_slice.items()}
        empty = not found.mask.any()  # also where the file is the map
        facts: dict[str, Any] = {"uncertainty": told, "review": doubt.review, "empty": empty}
        if doubt.percent is None:
            return found, facts
        names = LEVELS if wish == "levels" else {}
        mask = levels_of(doubt.percent) if wish == "levels" else doubt.percent
        return replace(found, mask=mask), {**facts, "file": "uncertainty", "label_names": names}

    def _prompts(
        self, request: Mapping[str, Any], shape: tuple[int, int, int], labels: tuple[str, ...]
    ) -> tuple[dict[str, UserPrompts], tuple[str, ...]]:
        return read_label_prompts(request, shape, labels) if self._edit else ({}, ())


def _points(found: LabelPrediction, request: Mapping[str, Any], volume: Volume) -> dict[str, Any]:
    """Voxels that the method proposed, by label and slice, counted as the request's are; nothing unless asked for."""
    told: dict[str, dict[str, dict[int, list[Index]]]] = {"points": {}, "negative_points": {}}
    for label, slices in found.points.items():
        for index, clicks in slices.items():
            for click in in_file_order(UserPrompts(clicks), request, volume).clicks:
                mine = told["points" if click.positive else "negative_points"].setdefault(label, {})
                mine.setdefault(index, []).append(click.ijk)
    return told if found.points else {}


def live_versions(engines: Mapping[str, AssistedEngine]) -> dict[str, str]:
    """Names of the versions that answer now, by method; a damaged store is passed over."""
    found = {name: _shown(assisted)[0] for name, assisted in engines.items()}
    return {name: version for name, version in found.items() if version}


def _shown(assisted: AssistedEngine) -> tuple[Optional[str], tuple[str, ...]]:
    """Name and labels of the live version for ``/info/``.

    A damaged store hides no other task there; whoever asks for a segmentation is told.
    """
    try:
        version = assisted.live_version()
    except AppError as error:
        logger.warning("%s: %s", assisted.row.name, error)
        version = None
    return (version.name, version.labels) if version else (None, assisted.offered)


def _facts(found: LabelPrediction, warnings: tuple[str, ...]) -> dict[str, Any]:
    return {
        "label_names": {label: number for number, label in enumerate(found.labels, start=1)},
        "version": found.version,
        "presence": found.presence,
        "edited": found.edited,
        "warnings": warnings + found.warnings,
    }
