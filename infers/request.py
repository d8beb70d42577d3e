"""The only file that knows the clients' key names: a request dictionary becomes prompts, options and a reply format.

Serves 3D Slicer and OHIF as they are (PLATFORM 6). Points are voxel indices of the stored array; a ROI is
``[i0, i1, j0, j1, k0, k1]`` of voxels inside it, with the ends of a pair in any order. Pure functions, thread-safe.
Left out: what both clients send but nothing here depends on (``device``, ``reset_state``, ``client_id``,
``restore_label_idx``, ``logging``); unknown keys are therefore no error, wrong values of known ones are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from lib.config import SWITCH
from lib.data.window import PRESETS
from lib.data.write import FORMATS, NRRD_TYPES
from lib.engine import SegmentOptions
from lib.errors import PromptError
from lib.plugins import did_you_mean
from lib.types import Box, Click, Index, UserPrompts

AXES = ("auto", "i", "j", "k")
MAX_CLICKS = 1000


@dataclass(frozen=True)
class ReplyFormat:
    """How the client wants the answer.

    Args:
        label: name of the segment.
        extension: of the label file, with the dot.
        dtype: numpy name of the label file's voxel type.
        compress: whether formats that can be compressed are.
        write_file: False sends the JSON part alone.
    """

    label: str
    extension: str = ".nrrd"
    dtype: str = "uint8"
    compress: bool = True
    write_file: bool = True


def option_table(planar: bool) -> dict[str, Any]:
    """What a task offers under ``config`` in ``/info/``: a list is a choice whose first item is the default."""
    window = {"window": "auto"}
    return window if planar else {"axis": list(AXES), "propagate": True, **window}


def read_options(request: Mapping[str, Any], planar: bool) -> SegmentOptions:
    """The options of a request; everything left out has its default.

    Args:
        request: what the client sent.
        planar: True for the 2-D task, which works on one ``k`` slice.

    Raises:
        PromptError: for a value that the option does not have.
    """
    window = _read_window(request.get("window"))
    if planar:
        return SegmentOptions(axis="k", propagate=False, window=window, planar=True)
    axis = _choice(request, "axis", AXES, "auto")
    propagate = _flag(request, "propagate", True)
    return SegmentOptions(axis=None if axis == "auto" else axis, propagate=propagate, window=window)


def read_reply(request: Mapping[str, Any], default_label: str) -> ReplyFormat:
    """The reply format of a request.

    Args:
        request: what the client sent.
        default_label: name for a client that sends none, as OHIF does.

    Raises:
        PromptError: for a format, voxel type or label name that cannot be written.
    """
    label = request.get("label")
    label = default_label if label is None else label
    if not isinstance(label, str) or not label.strip():
        raise PromptError(f"label: expected the name of the segment, received {label!r}. Select a segment first.")
    return ReplyFormat(
        label=label.strip(),
        extension=_choice(request, "result_extension", FORMATS, ".nrrd"),
        dtype=_choice(request, "result_dtype", tuple(NRRD_TYPES), "uint8"),
        compress=_flag(request, "result_compress", True),
        write_file=_flag(request, "result_write_to_file", True),
    )


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
    positive = _read_points(request, "foreground", shape, slice_k)
    negative = _read_points(request, "background", shape, slice_k)
    box, warnings = _read_box(request.get("roi"), shape, slice_k)
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


def _read_points(request: Mapping[str, Any], key: str, shape: Index, slice_k: Optional[int]) -> list[Index]:
    points = _parsed(request.get(key), key)
    if len(points) > MAX_CLICKS:
        raise PromptError(f"{key}: expected at most {MAX_CLICKS} points, received {len(points)}.")
    return [_read_point(p, f"{key}[{n}]", shape, slice_k) for n, p in enumerate(points)]


def _read_point(point: Any, where: str, shape: Index, slice_k: Optional[int]) -> Index:
    numbers = _numbers(point, where, (2, 3), "a voxel index [i, j, k]")
    if len(numbers) == 2:
        numbers.append(_only_slice(where, shape, slice_k))
    if any(not 0 <= n < size for n, size in zip(numbers, shape)):
        raise PromptError(f"{where}: expected a voxel inside the volume of {shape} voxels, received {numbers}.")
    return (numbers[0], numbers[1], numbers[2])


def _read_box(roi: Any, shape: Index, slice_k: Optional[int]) -> tuple[Optional[Box], tuple[str, ...]]:
    roi = _parsed(roi, "roi")
    if not roi:
        return None, ()
    ends = _numbers(roi, "roi", (4, 6), "voxel indices [i0, i1, j0, j1, k0, k1]")
    if shape[2] == 1 or len(ends) == 4:
        ends[4:] = [_only_slice("roi", shape, slice_k)] * 2  # a picture has no other slice, however thick the ROI is
    whole = Box.spanning((ends[0], ends[2], ends[4]), (ends[1], ends[3], ends[5]))
    lo = tuple(max(low, 0) for low in whole.lo)
    hi = tuple(min(high, size) for high, size in zip(whole.hi, shape))
    if any(high <= low for low, high in zip(lo, hi)):
        raise PromptError(f"roi: expected a box that meets the volume of {shape} voxels, received {ends}.")
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


def _parsed(value: Any, key: str) -> list[Any]:
    """A list that may arrive as JSON text; nothing, empty text and null are the empty list."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise PromptError(f"{key}: expected a list, received text that is not JSON: {value[:80]!r}.") from None
    if value in (None, "") or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, (list, tuple)):
        raise PromptError(f"{key}: expected a list, received {value!r}.")
    return list(value)


def _slice_index(value: Any) -> Optional[int]:
    """``slice`` as a ``k`` index; negative means none, as upstream has it."""
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise PromptError(f"slice: expected a slice index, received {value!r}.")
    return round(value) if value >= 0 else None


def _read_window(value: Any) -> Optional[tuple[float, float]]:
    """``"lo, hi"``, ``[lo, hi]`` or a preset's name; empty or ``auto`` leaves the choice to the volume."""
    if isinstance(value, str):
        value = value.strip().lower()
        value = PRESETS.get(value, value)
    if value in (None, "", "auto"):
        return None
    parts = value.strip("[]()").replace(",", " ").split() if isinstance(value, str) else value
    try:
        lo, hi = (float(part) for part in parts)
    except (TypeError, ValueError, OverflowError):
        raise PromptError(
            f"window: expected auto, one of {sorted(PRESETS)} or two intensities 'low, high', received {value!r}."
        ) from None
    return lo, hi


def _choice(request: Mapping[str, Any], key: str, allowed: tuple[str, ...], default: str) -> str:
    """One of ``allowed``; a list stands for its first item, as in Slicer's options."""
    value = _first(request.get(key))
    if value in (None, ""):
        return default
    word = value.strip().lower() if isinstance(value, str) else value
    if word not in allowed:
        near = did_you_mean(str(word), list(allowed))
        raise PromptError(f"{key}: expected one of {list(allowed)}, received {value!r}.{near}")
    return word


def _flag(request: Mapping[str, Any], key: str, default: bool) -> bool:
    value = _first(request.get(key))
    if value in (None, ""):
        return default
    word = str(value).strip().lower()
    if word not in SWITCH:
        raise PromptError(f"{key}: expected true or false, received {value!r}.")
    return SWITCH[word]


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and value else value
