"""A request's prompts: of one structure for ``sam`` and ``sam_2d``, or of every label of a model at once.

Serves 3D Slicer and OHIF as they are. Points are voxel indices of the stored array; a ROI is
``[i0, i1, j0, j1, k0, k1]`` of voxels inside it, with the ends of a pair in any order. Thread-safe: no state.

With several labels, a segment named ``background`` is never a label: it says what belongs to none of them. A label that
is called like a key of :data:`REQUEST_KEYS` has no list of its own; ``label`` with ``foreground``, and the mappings
``negative``, ``boxes`` and ``strokes`` reach it. Left out: prompts of several labels in a 2-D task.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np

from infers.scribbles import (
    BACKGROUND,
    BACKGROUND_LAYER,
    FOREGROUND_LAYER,
    read_label_map,
    scribble_prompts,
    uploaded_file,
)
from lib.errors import PromptError
from lib.plugins import did_you_mean
from lib.types import Box, Click, Index, Stroke, UserPrompts

MAX_CLICKS = 1000
MAX_STROKES = 100  # of one label, so that a slice gets no more points than from clicks
MAX_STROKE_VOXELS = 10_000
# What a key means that could otherwise be a label's name.
_KEYS = """
    axis background boxes client_id device foreground ijk image label label_info label_tag logging model negative
    propagate reset_state restore_label_idx result_compress result_dtype result_extension result_write_to_file roi save
    save_label selected_label_name session session_id slice strokes window
"""
REQUEST_KEYS = frozenset(_KEYS.split())


def read_prompts(request: Mapping[str, Any], shape: Index, planar: bool) -> tuple[UserPrompts, tuple[str, ...]]:
    """The prompts of a request, and sentences about what was cut off or left out.

    In the 2-D task only the last clicked slice counts: the one in ``slice`` where a point lies on it, else that of the
    last positive point. Without points, Slicer's ``slice`` is an offset in mm, and the ROI's centre counts.

    Args:
        request: what the client sent.
        shape: voxels of the volume along i, j, k.
        planar: True for the 2-D task.

    Raises:
        PromptError: if there is no usable prompt, or one is malformed or outside the volume.
    """
    slice_k = _slice_index(request.get("slice"))
    positive = _read_points(request.get("foreground"), "foreground", shape, slice_k)
    negative = _read_points(request.get("background"), "background", shape, slice_k)
    box, warnings = _read_box(request.get("roi"), "roi", shape, slice_k)
    if planar:
        positive, negative, box, left_out = _on_one_slice(positive, negative, box, slice_k)
        warnings += left_out
    if not positive and box is None:
        received = f"only {len(negative)} negative" if negative else "neither"
        raise PromptError(
            f"Expected at least one positive point (foreground) or a box (roi), received {received}. "
            "Click on the structure first."
        )
    clicks = [Click(p) for p in positive] + [Click(p, positive=False) for p in negative]
    return UserPrompts(tuple(clicks), () if box is None else (box,)), warnings


def _on_one_slice(
    positive: list[Index], negative: list[Index], box: Optional[Box], slice_k: Optional[int]
) -> tuple[list[Index], list[Index], Optional[Box], tuple[str, ...]]:
    """The prompts of the slice that the 2-D task segments."""
    clicked = [p[2] for p in negative + positive]  # the last positive point comes last
    if not clicked and box is None:
        return positive, negative, box, ()
    if clicked:
        k = slice_k if slice_k in clicked else clicked[-1]
    else:
        k = (box.lo[2] + box.hi[2] - 1) // 2  # type: ignore[union-attr]
    left_out: tuple[str, ...] = ()
    if box is not None and not box.lo[2] <= k < box.hi[2]:
        left_out = (f"The box does not reach slice {k} of the last click and was left out.",)
        box = None
    if box is not None:
        box = Box((*box.lo[:2], k), (*box.hi[:2], k + 1))
    return [p for p in positive if p[2] == k], [p for p in negative if p[2] == k], box, left_out


def read_label_prompts(
    request: Mapping[str, Any], shape: Index, labels: Sequence[str]
) -> tuple[dict[str, UserPrompts], tuple[str, ...]]:
    """The prompts of every label that has some, and sentences about what was cut off or left out.

    The current label is ``label``, else ``selected_label_name``, else the first one.

    ====================================  ==============================================================
    ``<label>``: points                   positive clicks of that label (deepedit)
    ``background``: points                negative clicks of every label; of the current one beside ``foreground``
    ``foreground``: points                positive clicks of the current label (deepgrow)
    ``roi``: box                          box of the current label
    ``negative``: {label: points}         negative clicks of that label (own extension)
    ``boxes``: {label: box}               box of that label (own extension)
    ``strokes``: {label: [points, ...]}   strokes of that label; of ``background``: negative for all (own extension)
    uploaded ``label`` file               scribbles as a label map, see :mod:`infers.scribbles`
    ====================================  ==============================================================

    Args:
        request: what the client sent.
        shape: voxels of the volume along i, j, k; with one k, as in a picture, points and boxes may leave it out.
        labels: names that the model knows; ``background`` among them is passed over.

    Returns:
        Prompts by label, in the order of ``labels``; empty where the user gave nothing, which asks for the model's own
        answer. A label may have negative prompts only: they correct that answer.

    Raises:
        PromptError: for a label the model does not know, and for prompts that are malformed or outside the volume.
        VolumeError: for an uploaded label map that cannot be read.
    """
    drawn = _Drawn(request, shape, tuple(name for name in labels if name != BACKGROUND))
    drawn.add_clicks()
    drawn.add_boxes()
    drawn.add_strokes()
    drawn.add_label_map()
    return drawn.prompts(), tuple(dict.fromkeys(drawn.warnings))


class _Drawn:
    """The prompts of one request, collected by label."""

    def __init__(self, request: Mapping[str, Any], shape: Index, labels: tuple[str, ...]) -> None:
        self.request, self.shape, self.labels = request, shape, labels
        self.slice_k = _slice_index(request.get("slice"))
        self.current = _current_label(request, labels)
        self.clicks: dict[str, list[Click]] = {name: [] for name in labels}
        self.boxes: dict[str, list[Box]] = {name: [] for name in labels}
        self.strokes: dict[str, list[Stroke]] = {name: [] for name in labels}
        self.warnings: list[str] = []

    def prompts(self) -> dict[str, UserPrompts]:
        found = {
            n: UserPrompts(tuple(self.clicks[n]), tuple(self.boxes[n]), tuple(self.strokes[n])) for n in self.labels
        }
        return {name: prompts for name, prompts in found.items() if prompts}

    def add_clicks(self) -> None:
        for name in self.labels:
            if name not in REQUEST_KEYS:
                self._click(name, self.request.get(name), (name,))
        foreground = self._click("foreground", self.request.get("foreground"), None)
        self._click(BACKGROUND, self.request.get(BACKGROUND), None if foreground else self.labels, positive=False)
        for name, points in self._by_label("negative").items():
            self._click(f"negative[{name}]", points, (name,), positive=False)
        for name in self.request:
            if name not in self.labels and name not in REQUEST_KEYS and _looks_like_points(self.request[name]):
                near = did_you_mean(name, list(self.labels))
                self.warnings.append(f"The points of {name!r} were left out: the model has no such label.{near}")

    def _click(self, where: str, points: Any, owners: Optional[tuple[str, ...]], *, positive: bool = True) -> bool:
        """Adds clicks to the owners, None being the current label; True if there were any."""
        found = _read_points(points, where, self.shape, self.slice_k)
        if found:
            for name in self._current_of(where) if owners is None else owners:
                self.clicks[name] += [Click(point, positive) for point in found]
        return bool(found)

    def add_boxes(self) -> None:
        self._box("roi", self.request.get("roi"), None)
        for name, box in self._by_label("boxes").items():
            self._box(f"boxes[{name}]", box, (name,))

    def _box(self, where: str, value: Any, owners: Optional[tuple[str, ...]]) -> None:
        box, warnings = _read_box(value, where, self.shape, self.slice_k)
        if box is not None:
            for name in self._current_of(where) if owners is None else owners:
                self.boxes[name].append(box)
        self.warnings += warnings

    def add_strokes(self) -> None:
        for name, value in self._by_label("strokes", BACKGROUND).items():
            strokes = _parsed(value, f"strokes[{name}]")
            if len(strokes) > MAX_STROKES:
                raise PromptError(f"strokes[{name}]: expected at most {MAX_STROKES} strokes, received {len(strokes)}.")
            for n, stroke in enumerate(strokes):
                voxels = _read_points(
                    stroke, f"strokes[{name}][{n}]", self.shape, self.slice_k, limit=MAX_STROKE_VOXELS
                )
                for owner in (self.labels if name == BACKGROUND else (name,)) if voxels else ():
                    self.strokes[owner].append(Stroke(np.array(voxels), positive=name != BACKGROUND))

    def add_label_map(self) -> None:
        if uploaded_file(self.request.get("label")) is None:
            return
        names = _segment_names(self.request.get("label_info"), len(self.labels))
        array = read_label_map(self.request["label"], self.shape)
        (current,) = self._current_of("selected_label_name")
        for name, strokes in scribble_prompts(array, names, current=current, labels=self.labels).items():
            self.strokes[name] += strokes

    def _current_of(self, where: str) -> tuple[str]:
        if self.current is None:
            raise PromptError(
                f"{where}: expected a label that it belongs to, one of {list(self.labels)}; received {BACKGROUND!r}."
                " Select the structure's segment."
            )
        return (self.current,)

    def _by_label(self, key: str, *more: str) -> dict[str, Any]:
        value = _decoded(self.request.get(key), key, "a mapping of labels")
        if value is not None and not isinstance(value, Mapping):
            raise PromptError(f"{key}: expected a mapping of labels, received {value!r}.")
        return {_known_label(name, key, (*self.labels, *more)): item for name, item in (value or {}).items()}


def _current_label(request: Mapping[str, Any], labels: tuple[str, ...]) -> Optional[str]:
    """None where the user is at the segment ``background`` and several labels could be meant."""
    label = request.get("label")
    key = "selected_label_name" if label in (None, "") or uploaded_file(label) else "label"
    name = request.get(key)
    if name in (None, "") or (name == BACKGROUND and len(labels) == 1):
        return labels[0]
    return None if name == BACKGROUND else _known_label(name, key, labels)


def _known_label(name: Any, where: str, known: tuple[str, ...]) -> str:
    word = name.strip() if isinstance(name, str) else name
    if word not in known:
        near = did_you_mean(str(word), list(known))
        raise PromptError(f"{where}: expected one of the labels {list(known)}, received {name!r}.{near}")
    return word


def _looks_like_points(value: Any) -> bool:
    plain = isinstance(value, (list, tuple)) and all(isinstance(p, (list, tuple)) and len(p) in (2, 3) for p in value)
    return plain and len(value) > 0


def _segment_names(label_info: Any, labels: int) -> dict[int, str]:
    """Names by value from ``label_info``; without it the layers have upstream's values behind those of the labels."""
    segments = _parsed(label_info, "label_info")
    for n, segment in enumerate(segments):
        if not isinstance(segment, Mapping) or not _is_value(segment.get("id")):
            raise PromptError(f"label_info[{n}]: expected a name and a whole id above 0, received {segment!r}.")
    names = {segment["id"]: str(segment.get("name", "")).strip() for segment in segments}
    return names or {labels + 1: BACKGROUND_LAYER, labels + 2: FOREGROUND_LAYER}


def _is_value(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def _read_points(value: Any, where: str, shape: Index, slice_k: Optional[int], limit: int = MAX_CLICKS) -> list[Index]:
    points = _parsed(value, where)
    if len(points) > limit:
        raise PromptError(f"{where}: expected at most {limit} points, received {len(points)}.")
    return [_read_point(p, f"{where}[{n}]", shape, slice_k) for n, p in enumerate(points)]


def _read_point(point: Any, where: str, shape: Index, slice_k: Optional[int]) -> Index:
    numbers = _numbers(point, where, (2, 3), "a voxel index [i, j, k]")
    if len(numbers) == 2:
        numbers.append(_only_slice(where, shape, slice_k))
    if any(not 0 <= n < size for n, size in zip(numbers, shape)):
        raise PromptError(f"{where}: expected a voxel inside the volume of {shape} voxels, received {numbers}.")
    return (numbers[0], numbers[1], numbers[2])


def _read_box(roi: Any, where: str, shape: Index, slice_k: Optional[int]) -> tuple[Optional[Box], tuple[str, ...]]:
    roi = _parsed(roi, where)
    if not roi:
        return None, ()
    ends = _numbers(roi, where, (4, 6), "voxel indices [i0, i1, j0, j1, k0, k1]")
    if shape[2] == 1 or len(ends) == 4:
        ends[4:] = [_only_slice(where, shape, slice_k)] * 2  # a picture has no other slice, however thick the ROI is
    whole = Box.spanning((ends[0], ends[2], ends[4]), (ends[1], ends[3], ends[5]))
    lo = tuple(max(low, 0) for low in whole.lo)
    hi = tuple(min(high, size) for high, size in zip(whole.hi, shape))
    if any(high <= low for low, high in zip(lo, hi)):
        raise PromptError(f"{where}: expected a box that meets the volume of {shape} voxels, received {ends}.")
    box = Box(lo, hi)  # type: ignore[arg-type]
    return box, () if box == whole else ("The box reached outside the image and was cut off at its border.",)


def _only_slice(where: str, shape: Index, slice_k: Optional[int]) -> int:
    """The ``k`` of a prompt that has none."""
    if shape[2] == 1:
        return 0
    if slice_k is None:
        raise PromptError(f"{where}: expected three coordinates on a volume of {shape} voxels, received two.")
    return slice_k


def _numbers(value: Any, where: str, lengths: tuple[int, ...], what: str) -> list[int]:
    """Finite numbers, rounded to whole ones."""
    plain = isinstance(value, (list, tuple)) and len(value) in lengths
    if not plain or not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in value):
        raise PromptError(f"{where}: expected {what}, received {value!r}.")
    if not all(_is_finite(n) for n in value):
        raise PromptError(f"{where}: expected finite numbers, received {value!r}.")
    return [round(n) for n in value]


def _is_finite(number: float) -> bool:
    """False for NaN, infinity and whole numbers too large for a float."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _decoded(value: Any, key: str, expected: str) -> Any:
    """A value that may arrive as JSON text; None for nothing, empty text and null."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise PromptError(f"{key}: expected {expected}, received text that is not JSON: {value[:80]!r}.") from None
    return None if value is None or (isinstance(value, str) and not value.strip()) else value


def _parsed(value: Any, key: str) -> list[Any]:
    value = _decoded(value, key, "a list")
    if value is not None and not isinstance(value, (list, tuple)):
        raise PromptError(f"{key}: expected a list, received {value!r}.")
    return list(value or ())


def _slice_index(value: Any) -> Optional[int]:
    """``slice`` as a ``k`` index; negative means none, as upstream has it."""
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise PromptError(f"slice: expected a slice index, received {value!r}.")
    return round(value) if value >= 0 else None
