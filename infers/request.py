"""A request's options and reply format. With ``infers.prompts`` the only place that knows the clients' key names.

Serves 3D Slicer and OHIF as they are. Pure functions, thread-safe. Left out: what both clients send but
nothing here depends on (``device``, ``reset_state``, ``client_id``, ``restore_label_idx``, ``logging``); unknown keys
are therefore no error, wrong values of known ones are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from infers.handedness import ORDERS, mirrored, slicer_reverses
from infers.scribbles import uploaded_file
from lib.data.window import PRESETS
from lib.data.write import FORMATS, NRRD_TYPES
from lib.engine import SegmentOptions
from lib.errors import PromptError
from lib.plugins import did_you_mean
from lib.settings import SWITCH
from lib.types import UserPrompts, Volume

AXES = ("auto", "i", "j", "k")
SEG = ".dcm"  # the extension of a reply as DICOM SEG
UNCERTAINTY = ("no", "slices", "map", "levels")
MAPPED = ("map", "levels")  # the label file is then the uncertainty map
SAVE = {"no": None, "draft": "original", "final": "final"}  # option to the store's tag


@dataclass(frozen=True)
class ReplyFormat:
    """How the client wants the answer.

    Args:
        label: name of the segment.
        extension: of the label file, with the dot.
        dtype: numpy name of the label file's voxel type.
        compress: whether formats that can be compressed are.
        write_file: False sends the JSON part alone.
        task: the task that was asked, for the record of how the label came about.
        image: path of the image, whose series a DICOM SEG refers to.
    """

    label: str
    extension: str = ".nrrd"
    dtype: str = "uint8"
    compress: bool = True
    write_file: bool = True
    task: str = ""
    image: str = ""


def option_table(planar: bool) -> dict[str, Any]:
    """What a task offers under ``config`` in ``/info/``: a list is a choice whose first item is the default."""
    both = {"window": "auto", "save": list(SAVE), "ijk": list(ORDERS)}
    return both if planar else {"axis": list(AXES), "propagate": True, **both}


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
    points = _flag(request, "points", False)
    return SegmentOptions(axis=None if axis == "auto" else axis, propagate=propagate, window=window, points=points)


def in_file_order(prompts: UserPrompts, request: Mapping[str, Any], volume: Volume) -> UserPrompts:
    """The prompts in the image file's voxels, whichever the request's are: see :mod:`infers.handedness`.

    Raises:
        PromptError: for another ``ijk`` than ``slicer`` or ``file``.
    """
    counts_as_slicer = _choice(request, "ijk", ORDERS, "file") == "slicer"
    return mirrored(prompts, volume.shape[2]) if counts_as_slicer and slicer_reverses(volume.affine) else prompts


def read_reply(request: Mapping[str, Any], default_label: str) -> ReplyFormat:
    """The reply format of a request.

    Args:
        request: what the client sent.
        default_label: name for a client that sends none, as OHIF does, or uploads a label map, which takes that key.

    Raises:
        PromptError: for a format, voxel type or label name that cannot be written.
    """
    label = request["label"] if is_named(request) else default_label
    if not isinstance(label, str) or not label.strip():
        raise PromptError(f"label: expected the name of the segment, received {label!r}. Select a segment first.")
    return ReplyFormat(
        label=label.strip(),
        extension=_choice(request, "result_extension", (*FORMATS, SEG), ".nrrd"),
        dtype=_choice(request, "result_dtype", tuple(NRRD_TYPES), "uint8"),
        compress=_flag(request, "result_compress", True),
        write_file=_flag(request, "result_write_to_file", True),
        task=str(request.get("model") or ""),
        image=str(request.get("image") or ""),
    )


def is_named(request: Mapping[str, Any]) -> bool:
    """Whether the client says which structure it is about; OHIF's point panel does not."""
    label = request.get("label")
    return label is not None and uploaded_file(label) is None


def is_kept(request: Mapping[str, Any]) -> bool:
    """Whether the answer becomes a label of the image, by our option or by MONAI Label's own.

    Raises:
        PromptError: as :func:`read_save`.
    """
    return read_save(request) is not None or bool(request.get("save_label"))


def read_save(request: Mapping[str, Any]) -> Optional[str]:
    """The store's tag under which the answer is kept, or None.

    Raises:
        PromptError: for another value than ``no``, ``draft`` or ``final``, or without a label file to keep.
    """
    tag = SAVE[_choice(request, "save", tuple(SAVE), "no")]
    if tag and not (_flag(request, "result_write_to_file", True) and request.get("result_extension") != SEG):
        raise PromptError("save: expected an answer with a label map. Ask for .nrrd or .nii.gz, or set save to no.")
    return tag


def read_uncertainty(request: Mapping[str, Any]) -> str:
    """Whether and how an autonomous answer says how sure it is: one of :data:`UNCERTAINTY`.

    ``slices`` adds numbers to the reply. ``map`` and ``levels`` also make the label file a map: 0..100 percent, for
    programs, or a few named steps, which viewers show as segments.

    Raises:
        PromptError: for another value, or a map that would be kept as a label of the image.
    """
    wish = _choice(request, "uncertainty", UNCERTAINTY, "no")
    kept = _choice(request, "save", tuple(SAVE), "no") == "final" or request.get("save_label")
    if wish in MAPPED and kept:
        raise PromptError(
            f"uncertainty: expected no or slices where the answer is kept as a label, received {wish!r}."
            " Keep the map by save draft, which gives it the tag uncertainty."
        )
    return wish


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
