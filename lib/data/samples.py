"""From a store's images and final labels to training cases and the slices that training looks at.

Frames: a target lies on its image's own grid, (i, j, k) as stored, never resampled; slices follow
:mod:`lib.data.geometry`. Thread-safe: no state. Every case is read whole, so all usable volumes are in memory at once.
Messages name a case by its place in the list and never by its identifier. Left out: prompts, batches, augmentation
(:mod:`lib.data.views`), and which patient is for what (:class:`lib.data.split.PinnedSplit`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from lib.data.dicom import patient_key
from lib.data.readers import StoredImage, suffix_of
from lib.data.volume import READERS, load_volume, series_folder
from lib.errors import CapacityError, ConfigError, GridError, VolumeError
from lib.types import Volume

# ``patient001_frame01`` belongs to ``patient001``
PATIENT_PATTERN = r"(.+?)_frame"
# of the shortest voxel edge: a qform's rounding over 500 voxels stays below, another grid does not
GRID_TOLERANCE = 0.1
MAX_VALUE = 65535
BACKGROUND = "background"
MAX_UNNAMED = 32
MAX_LABELS = 255  # class numbers are uint8
PATIENTS_NEEDED = 2  # one to train on, one to validate
REASONS_SHOWN = 5


@dataclass(frozen=True)
class LabelledCase:
    """One image of the store and its final label, as files.

    Args:
        case: identifier in the store.
        image: an image file or the folder of a DICOM series.
        label: the label file.
        values: voxel value in the label file to label name; empty where nothing was declared.
    """

    case: str
    image: Path
    label: Path
    values: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingCase:
    """One image with what is true of it.

    Args:
        case: identifier in the store.
        volume: the image.
        target: ``(I, J, K)`` uint8, read-only: 0 background, else place in the list of labels, from 1.
        patient: whose image it is, where the image itself says so, as DICOM does.
    """

    case: str
    volume: Volume
    target: np.ndarray
    patient: str = ""


def patient_of(case: Union[str, TrainingCase], group: str = PATIENT_PATTERN) -> str:
    """Whose image a case is, so that images of one patient are never on both sides of a split.

    Args:
        case: identifier in the store, or the case itself, whose ``patient`` counts if it has one.
        group: regular expression matched at the start of the identifier. The patient is its first group, or the whole
            match where it has no group. A case that does not match, or only with an empty text, is its own patient.

    Raises:
        ConfigError: for a pattern that is no regular expression.
    """
    if not isinstance(case, str):
        return case.patient or patient_of(case.case, group)
    try:
        match = re.match(group, case)
    except re.error as error:
        raise ConfigError(
            f"group: expected a regular expression such as {PATIENT_PATTERN!r}; received {group!r} ({error.msg})."
        ) from None
    return (match.group(1 if match.re.groups else 0) or case) if match else case


def named_values(info: Mapping[str, Any]) -> dict[int, str]:
    """Voxel value to name, out of what was saved with a label: ``label_info``, Slicer's with ``idx``, others' with
    ``id``; else ``label_names`` of our own replies."""
    found: dict[int, str] = {}
    declared = info.get("label_info")
    for entry in declared if isinstance(declared, Sequence) and not isinstance(declared, str) else ():
        value = _whole(entry.get("idx", entry.get("id"))) if isinstance(entry, Mapping) else None
        if value is not None and isinstance(entry.get("name"), str):
            found[value] = entry["name"]
    names = info.get("label_names")
    if not found and isinstance(names, Mapping):
        found = {value: name for name, number in names.items() if (value := _whole(number)) is not None}
    return {value: name for value, name in found.items() if 0 < value <= MAX_VALUE}


def _whole(value: Any) -> Optional[int]:
    """A whole number, also one that a client wrote as text or with a point."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() else None


def names_of(info: Mapping[str, Any]) -> dict[int, str]:
    """Voxel value to name, out of what was saved with a label; a batch keeps the reply one level deeper."""
    reply = info.get("params")
    return named_values({**(reply if isinstance(reply, Mapping) else {}), **info})


def labels_of(cases: Sequence[LabelledCase], configured: Sequence[str] = ()) -> tuple[str, ...]:
    """The labels to train, in the order of the class numbers 1..K.

    The configured ones; else all names that the files declare, by value; else, where no file declares any, ``label_1``
    to ``label_n`` for the highest value n <= 32 in the files, gaps included: a value keeps its name as cases come.
    :data:`BACKGROUND`, which clients are offered for clicks on what is none of the labels, is no structure.

    Raises:
        ConfigError: for empty or repeated names, more than :data:`MAX_LABELS`, files that contradict each other, or
            nothing to name labels by.
    """
    named = [name for name in configured if name != BACKGROUND]
    labels = tuple(named) or tuple(n for n in _declared(cases) if n != BACKGROUND) or _generic(cases)
    if not all(isinstance(name, str) and name.strip() for name in labels) or len(set(labels)) != len(labels):
        raise ConfigError(f"labels: expected distinct names; received {list(labels)}. Name every structure once.")
    if len(labels) > MAX_LABELS:
        raise ConfigError(f"labels: expected at most {MAX_LABELS} names; received {len(labels)}. Train a part of them.")
    return labels


def _declared(cases: Sequence[LabelledCase]) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for case in cases:
        names |= {value: name for value, name in case.values.items() if value != 0}
    for case in cases:
        for value, name in case.values.items():
            if value != 0 and names[value] != name:
                raise ConfigError(
                    f"Expected one name per label value in all final labels; value {value} is {name!r} in one and"
                    f" {names[value]!r} in another. Set labels to the names in the wanted order, or rename one."
                )
    if len(set(names.values())) != len(names):
        twice = sorted(name for name in set(names.values()) if list(names.values()).count(name) > 1)
        raise ConfigError(
            f"Expected one value per label name in all final labels; {twice} have several."
            " Set labels to the names in the wanted order."
        )
    if names and sorted(names) != list(range(1, len(names) + 1)) and not all(case.values for case in cases):
        raise ConfigError(
            f"Expected label values 1..{len(names)}, because some final labels declare no names; received"
            f" {sorted(names)}. Save those labels again with names, or set labels to the names in the wanted order."
        )
    return tuple(names[value] for value in sorted(names))


def _generic(cases: Sequence[LabelledCase]) -> tuple[str, ...]:
    tops = []
    for case in cases:
        try:
            tops.append(max(_values(_read_label(case.label))[1], default=0))
        except (VolumeError, CapacityError):
            continue  # load_case says why
    highest = max((top for top in tops if top <= MAX_UNNAMED), default=0)
    if highest == 0:
        raise ConfigError(
            f"Expected label names, or final labels with voxel values 1..{MAX_UNNAMED}; received"
            f" {_count(len(cases))} without names, {len(tops)} of them usable, with values up to"
            f" {max(tops, default=0)}. Save the labels with names, or set labels and number the voxels 1, 2, ..."
        )
    return tuple(f"label_{n}" for n in range(1, highest + 1))


def load_case(case: LabelledCase, labels: Sequence[str]) -> TrainingCase:
    """Reads an image and its label, and renumbers the label's voxels.

    Args:
        case: the files.
        labels: names in the order of the class numbers 1..K. A declared value counts by its name, whatever its number;
            in a file that declares none, value v is the v-th label.

    Raises:
        VolumeError: for an image or label that cannot be read, a label on another grid, with fractions, with values
            that are none of ``labels``, or without any labelled voxel.
        CapacityError: for a file that does not fit the memory.
    """
    volume = load_volume(case.image)
    voxels, found = read_label(volume, case.label)
    numbers = _numbers(case, labels, found)
    if not any(numbers.values()):
        raise VolumeError("Expected a label with a structure; the file carries no labelled voxel. Label it or drop it.")
    lookup = np.zeros(max(found) + 1, np.uint8)
    lookup[list(numbers)] = list(numbers.values())
    target = lookup[voxels]
    target.setflags(write=False)
    folder = series_folder(case.image)
    return TrainingCase(case.case, volume, target, patient_key(folder) if folder else "")


def read_label(volume: Volume, path: Path) -> tuple[np.ndarray, list[int]]:
    """The voxels of a label file, ``(I, J, K)`` uint16 on the image's grid, and the values above 0 that occur.

    Raises:
        GridError: for a label on another grid.
        VolumeError: for a label that cannot be read, or with fractions.
        CapacityError: for a file that does not fit the memory.
    """
    return _values(_on_grid(volume, _read_label(path)))


def usable_cases(
    cases: Sequence[LabelledCase], labels: Sequence[str], *, group: str = PATIENT_PATTERN
) -> tuple[list[TrainingCase], list[str]]:
    """Reads all cases and passes over what cannot be trained on.

    Args:
        cases: the store's final labels.
        labels: names in the order of the class numbers 1..K.
        group: which cases are one patient's, see :func:`patient_of`.

    Returns:
        The usable cases in the given order, and a sentence for each other one.

    Raises:
        ConfigError: if fewer than two patients are left, for all the reasons together.
    """
    usable: list[TrainingCase] = []
    left_out: list[str] = []
    for number, case in enumerate(cases, start=1):
        try:
            usable.append(load_case(case, labels))
        except (VolumeError, CapacityError) as error:
            left_out.append(f"Case {number} of {len(cases)} is left out: {error}")
    patients = len({patient_of(case, group) for case in usable})
    if patients >= PATIENTS_NEEDED:
        return usable, left_out
    reasons = left_out[:REASONS_SHOWN]
    if len(left_out) > REASONS_SHOWN:
        reasons.append(f"{len(left_out) - REASONS_SHOWN} more are left out.")
    raise ConfigError(
        " ".join(
            [
                f"Expected at least {PATIENTS_NEEDED} labelled cases of different patients; {_count(len(cases))} found,"
                f" {len(usable)} usable, of {patients} patient{'' if patients == 1 else 's'}.",
                "Save final labels for more patients." if not left_out else "Repair these or label others:",
                *reasons,
            ]
        )
    )


def common_channels(cases: Sequence[TrainingCase]) -> int:
    """Channels of the images, all alike; a colour picture counts as one.

    Raises:
        ConfigError: for images with different numbers of channels.
    """
    found = sorted({case.volume.channels for case in cases})
    if len(found) > 1:
        counts = [sum(case.volume.channels == n for case in cases) for n in found]
        raise ConfigError(
            f"Expected labelled images with one number of channels; received {_listed(counts, found)}. A model would"
            " mistake one kind for the other: keep them in stores of their own."
        )
    return found[0]


def _listed(counts: Sequence[int], channels: Sequence[int]) -> str:
    parts = [f"{n} with {m} channel{'' if m == 1 else 's'}" for n, m in zip(counts, channels)]
    return " and ".join([", ".join(parts[:-1]), parts[-1]])


def training_slices(case: TrainingCase, axis: int) -> list[int]:
    """Slices to train on: the labelled extent, gaps included, and as many evenly spread empty ones outside it.

    Without the empty ones absence would never be learned; with all of them it would be most of what is learned.

    Args:
        case: what to train on.
        axis: slice axis 0, 1 or 2.

    Returns:
        Rising slice indices along ``axis``, equal for equal targets.
    """
    others = tuple(a for a in range(3) if a != axis)
    labelled = np.flatnonzero(case.target.any(axis=others))
    first, last = int(labelled[0]), int(labelled[-1])
    inside = range(first, last + 1)
    outside = [*range(first), *range(last + 1, case.target.shape[axis])]
    wanted = min(len(inside), len(outside))
    empty = [outside[(2 * m + 1) * len(outside) // (2 * wanted)] for m in range(wanted)]
    return sorted([*inside, *empty])


def _read_label(path: Path) -> StoredImage:
    if not path.is_file():
        raise VolumeError("Expected a label file; nothing is there. Save the label again.")
    suffix = suffix_of(path)
    if suffix not in READERS:
        raise VolumeError(f"Expected a label file out of {', '.join(READERS)}. Save the label as one of these.")
    if path.stat().st_size == 0:
        raise VolumeError("Expected a label; received an empty file of 0 bytes. Save the label again.")
    try:
        stored = READERS[suffix](path)
    except (VolumeError, CapacityError) as error:
        raise type(error)(f"The label file: {error}") from None
    if stored.array.ndim != 3:
        raise VolumeError(
            "Expected one label number per voxel; received colours or channels. Save one grey value per voxel."
        )
    return stored


def _on_grid(volume: Volume, label: StoredImage) -> StoredImage:
    """The label, with its slices reversed where they are stored from the other end at the same place.

    So 3D Slicer saves labels of left-handed images, whose slices it reverses when it reads them.
    """
    if label.array.shape == volume.shape and not label.is_picture:
        back = np.diag([1.0, 1.0, -1.0, 1.0])
        back[2, 3] = volume.shape[2] - 1
        turned = replace(label, array=label.array[:, :, ::-1], affine=label.affine @ back)
        if _away_mm(volume, turned) <= GRID_TOLERANCE * min(volume.spacing_mm):
            return turned
    _check_grid(volume, label)
    return label


def _away_mm(volume: Volume, label: StoredImage) -> float:
    """How far the grids' corners are apart; both of one shape."""
    corners = np.array(np.meshgrid(*([-0.5, n - 0.5] for n in volume.shape))).reshape(3, 8)
    moved = (label.affine - volume.affine)[:3] @ np.vstack([corners, np.ones(8)])
    return float(np.sqrt((moved**2).sum(0)).max())


def _check_grid(volume: Volume, label: StoredImage) -> None:
    shape = label.array.shape
    if shape != volume.shape:
        raise GridError(
            f"Expected the label on its image's grid {volume.shape}; received {shape}."
            " Save the label on this image, or resample it."
        )
    if label.is_picture:  # carries no geometry
        return
    distance = _away_mm(volume, label)
    if not distance <= GRID_TOLERANCE * min(volume.spacing_mm):
        raise GridError(
            f"Expected the label on its image's grid; received the same shape {distance:.3g} mm away, turned or"
            " stretched. Save the label on this image, or resample it."
        )


def _values(label: StoredImage) -> tuple[np.ndarray, list[int]]:
    """``(I, J, K)`` uint16 voxels and the values that occur, without 0."""
    lo, hi = float(label.array.min()), float(label.array.max())
    if not (lo >= 0 and hi <= MAX_VALUE):  # also NaN
        raise VolumeError(
            f"Expected label numbers 0..{MAX_VALUE}; received {lo:g} to {hi:g}. Check that this file is a label."
        )
    voxels = label.array.astype(np.uint16)
    if (voxels != label.array).any():
        raise VolumeError(
            "Expected whole numbers as labels; received fractions. Save a label map, resampled to the nearest voxel."
        )
    return voxels, [int(v) for v in np.flatnonzero(np.bincount(voxels.ravel(order="K"))) if v != 0]


def _numbers(case: LabelledCase, labels: Sequence[str], found: Sequence[int]) -> dict[int, int]:
    """Class number of each value in the file."""
    numbers = {name: number for number, name in enumerate(labels, start=1)}
    numbers[BACKGROUND] = 0
    known = {value: numbers[name] for value, name in case.values.items() if name in numbers}
    if not case.values:
        known = {number: number for number in numbers.values() if number}
    unknown = [f"{value} ({case.values[value]!r})" if value in case.values else str(value) for value in found]
    unknown = [text for text, value in zip(unknown, found) if value not in known]
    if unknown:
        shown = ", ".join(unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        raise VolumeError(
            f"Expected voxels of the labels {list(labels)} and 0; received the unknown values {shown}."
            " Name these values, add their labels, or set the voxels to 0."
        )
    return {value: known[value] for value in found}


def _count(labels: int) -> str:
    return f"{labels or 'no'} final label{'' if labels == 1 else 's'}"
