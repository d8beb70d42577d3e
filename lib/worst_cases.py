"""Keeps pictures of where a new version is most wrong, while the model and the images are at hand.

Written into the run's folder, from which :mod:`lib.versions.report` takes them. Thread-safe as the model is. Left out:
cases that nobody labelled, and what the version before would have drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.data.geometry import AXIS_NAMES, slice_view
from lib.data.samples import TrainingCase
from lib.evaluate import encoded, segmented
from lib.learned import Learned
from lib.train_data import Slice, axis_of
from lib.versions.gate import by_case
from lib.versions.pictures import overlay_png, turned, turned_spacing, worst_slice
from lib.versions.report import PICTURES

SHOWN = 3


def keep_worst(
    model: Learned, cases: Sequence[TrainingCase], scores: Mapping[str, Any], labels: Sequence[str], folder: Path
) -> None:
    """Draws the cases with the lowest mean Dice, each on the slice and in the class that is most wrong.

    Args:
        model: in eval mode.
        cases: that were scored.
        scores: with ``cases``, Dice by case and label.
        labels: of the targets, numbered from 1; the model's too.
        folder: for pictures and the file that says what they show.
    """
    held = {case.case: case for case in cases}
    rows = {case: row for case, row in by_case(scores).items() if row and case in held}
    worst = sorted(rows, key=lambda case: sum(rows[case].values()) / len(rows[case]))[:SHOWN]
    shown = []
    for number, name in enumerate(worst, start=1):
        label = min(rows[name], key=lambda k: rows[name][k])
        facts, png = _picture(model, held[name], labels.index(label) + 1)
        file = f"worst-{number}.png"
        (folder / file).write_bytes(png)
        shown.append({"file": file, "case": name, "label": label, "dice": rows[name][label], **facts})
    (folder / PICTURES).write_text(json.dumps(shown), encoding="utf-8")


def _picture(model: Learned, case: TrainingCase, number: int) -> tuple[dict[str, Any], bytes]:
    axis, affine = axis_of(case), case.volume.affine
    found = segmented(model, case, encoded(model))
    index = worst_slice(found, case.target, axis, number)
    cut = Slice(case, axis, index)
    pixels, truth, drawn = (
        turned(view, axis, affine) for view in (cut.pixels(), cut.classes(), slice_view(found, axis, index))
    )
    spacing = turned_spacing(case.volume.spacing_mm, axis, affine)
    return {"axis": AXIS_NAMES[axis], "slice": index}, overlay_png(pixels, truth, drawn, number, spacing)
