"""The user's clicks, boxes and strokes, sorted by slice and turned into what a backbone embeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import torch

from lib.contracts import BackboneSpec, PromptSet
from lib.data.geometry import box_to_slices, check_inside, rows_columns, to_slice_rc
from lib.errors import PromptError
from lib.prompts.scribble import stroke_points
from lib.transform import SliceTransform
from lib.types import Index, Stroke, UserPrompts

RowColumnBox = tuple[int, int, int, int]


@dataclass
class SlicePrompts:
    """Prompts on one slice.

    Args:
        points_rc: ``(row, column, positive)`` per click, and per point that stands for a stroke.
        box_rc: half-open ``(r0, c0, r1, c1)``.
    """

    points_rc: list[tuple[int, int, bool]] = field(default_factory=list)
    box_rc: Optional[RowColumnBox] = None

    @property
    def starts(self) -> bool:
        """True where an object may begin: a positive click or a box. Negative clicks alone only correct."""
        return self.box_rc is not None or any(positive for _, _, positive in self.points_rc)

    def is_ambiguous(self, spec: BackboneSpec) -> bool:
        """True for a single click, which may mean a part or the whole: SAM's multimask case; see the spec for a box."""
        if self.box_rc is None:
            return len(self.points_rc) == 1
        return spec.box_is_ambiguous and not self.points_rc


def by_slice(prompts: UserPrompts, shape: Index, axis: int, *, corrections: bool = False) -> dict[int, SlicePrompts]:
    """Prompts per slice index, in order of the index; a box stands on every slice it touches, a stroke becomes points.

    Args:
        prompts: everything the user drew for one label.
        shape: voxels of the volume along i, j, k.
        axis: the axis across which the volume is cut.
        corrections: True where a mask without prompts exists that the user corrects; negative prompts alone then do.

    Raises:
        PromptError: for an empty list, a prompt outside the volume, two boxes on one slice, or negative prompts only.
    """
    if not prompts:
        raise PromptError("Expected at least one positive click or a box; received none. Click on the structure first.")
    slices: dict[int, SlicePrompts] = {}
    for click in prompts.clicks:
        check_inside(click.ijk, shape)
        index, row, column = to_slice_rc(click.ijk, axis)
        slices.setdefault(index, SlicePrompts()).points_rc.append((row, column, click.positive))
    for box in prompts.boxes:
        check_inside(box.lo, shape)
        check_inside(tuple(h - 1 for h in box.hi), shape)  # type: ignore[arg-type]
        touched, box_rc = box_to_slices(box, axis)
        for index in touched:
            _put_box(slices.setdefault(index, SlicePrompts()), box_rc, index)
    for stroke in prompts.strokes:
        check_inside(tuple(stroke.voxels.min(0).tolist()), shape)
        check_inside(tuple(stroke.voxels.max(0).tolist()), shape)
        for index, points in _stroke_by_slice(stroke, axis).items():
            slices.setdefault(index, SlicePrompts()).points_rc += points
    if not corrections and not any(p.starts for p in slices.values()):
        raise PromptError("Expected a positive click or a box; received negative clicks only. Click on the structure.")
    return dict(sorted(slices.items()))


def _stroke_by_slice(stroke: Stroke, axis: int) -> dict[int, list[tuple[int, int, bool]]]:
    """The points that stand for a stroke on each slice it touches."""
    voxels = stroke.voxels[np.argsort(stroke.voxels[:, axis], kind="stable")]
    indices, starts = np.unique(voxels[:, axis], return_index=True)
    parts = np.split(voxels[:, rows_columns(axis)], starts[1:])
    return {
        index: [(row, column, stroke.positive) for row, column in stroke_points(part).tolist()]
        for index, part in zip(indices.tolist(), parts)
    }


def _put_box(prompts: SlicePrompts, box_rc: RowColumnBox, index: int) -> None:
    if prompts.box_rc is not None:
        raise PromptError(f"Expected one box per slice; received two on slice {index}. Send one request per structure.")
    prompts.box_rc = box_rc


def prompt_set(prompts: SlicePrompts, transform: SliceTransform) -> PromptSet:
    """The prompts of one slice as one pair (N = 1) in backbone pixels."""
    points = labels = boxes = None
    if prompts.points_rc:
        rc = np.array([(r, c) for r, c, _ in prompts.points_rc])
        points = transform.points_xy(rc)[None]
        labels = torch.tensor([[int(positive) for _, _, positive in prompts.points_rc]])
    if prompts.box_rc is not None:
        boxes = transform.box_xy(prompts.box_rc)[None]
    return PromptSet(points_xy=points, labels=labels, boxes_xy=boxes)
