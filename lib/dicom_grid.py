"""Where the slices of a DICOM series lie, and where the frames of an object drawn on it land on its voxels.

Frame: voxels (i, j, k) as in :class:`lib.types.Volume`, positions in DICOM's LPS millimetres as the files give them.
Datasets come in opened; no DICOM package is imported here. Thread-safe: no state. Left out: resampling, so an object
on any other grid is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from lib.errors import VolumeError
from lib.types import Index

TOLERANCE = 0.1  # of a voxel, at the far end of a frame; grids of other images differ by far more


@dataclass(frozen=True)
class Plane:
    """One slice of a series.

    Args:
        uid: of the instance that holds it; empty where the file has none.
        sop_class: of that instance; likewise.
        frame: from 1, or None in a file of one slice.
    """

    uid: str
    sop_class: str
    frame: Optional[int]


@dataclass(frozen=True)
class Series:
    """A series as others refer to it.

    Args:
        head: header of its first file.
        planes: along k.
        positions: ``(K, 3)`` mm of every slice's first voxel, or None where the series has no place in space.
        orientation: direction along a row, then along a column.
        spacing_mm: distance between rows, then between columns.
        thickness_mm: of a slice.
    """

    head: Any
    planes: list[Plane]
    positions: Optional[np.ndarray]
    orientation: list[float]
    spacing_mm: list[float]
    thickness_mm: float

    @property
    def shape(self) -> Index:
        """Voxels along i, j, k."""
        return int(self.head.Columns), int(self.head.Rows), len(self.planes)

    @property
    def distance_mm(self) -> Optional[float]:
        """Between neighbouring slices; None for a single one or without a place in space."""
        if self.positions is None or len(self.positions) < 2:
            return None
        return float(np.linalg.norm(self.positions[-1] - self.positions[0])) / (len(self.positions) - 1)

    @property
    def steps_mm(self) -> np.ndarray:
        """``(3, 3)``, columns: the step along i, along j, and along the slice normal."""
        steps = in_plane_steps(self.orientation, self.spacing_mm)
        normal = np.cross(steps[:, 0], steps[:, 1])
        normal *= (self.distance_mm or self.thickness_mm) / np.linalg.norm(normal)
        return np.column_stack([steps, normal])


def series_of(frames: Sequence[tuple[Any, int]]) -> Series:
    """The series that consists of these frames.

    Args:
        frames: for every k the opened file and the frame in it, from 0.
    """
    first, frame = frames[0]
    placed = [frame_value(file, n, "PlanePositionSequence", "ImagePositionPatient") for file, n in frames]
    orientation = frame_value(first, frame, "PlaneOrientationSequence", "ImageOrientationPatient")
    spacing, thickness, between = (
        frame_value(first, frame, "PixelMeasuresSequence", keyword)
        for keyword in ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices")
    )
    is_placed = orientation and spacing and all(placed)
    return Series(
        head=first,
        planes=[_plane(file, n) for file, n in frames],
        positions=np.array(placed, dtype=np.float64) if is_placed else None,
        orientation=[float(v) for v in orientation or (1, 0, 0, 0, 1, 0)],
        spacing_mm=[float(v) for v in spacing or (1, 1)],
        thickness_mm=abs(float(thickness or between or 1.0)),
    )


def _plane(file: Any, frame: int) -> Plane:
    several = int(file.get("NumberOfFrames") or 1) > 1
    uid, sop_class = (str(file.get(keyword) or "") for keyword in ("SOPInstanceUID", "SOPClassUID"))
    return Plane(uid, sop_class, frame + 1 if several else None)


def check_referable(series: Series) -> None:
    """Accepts a series that another object can refer to.

    What names the patient may be missing, and a frame of reference too, as in ultrasound.

    Raises:
        VolumeError: for a series without an identifier that DICOM asks for.
    """
    known = {
        "StudyInstanceUID": series.head.get("StudyInstanceUID"),
        "SOPInstanceUID": all(plane.uid for plane in series.planes),
        "SOPClassUID": all(plane.sop_class for plane in series.planes),
    }
    missing = [keyword for keyword, value in known.items() if not value]
    if missing:
        raise VolumeError(
            f"Expected a series that a DICOM SEG can refer to; received one without {', '.join(missing)}. Export the"
            " series again with its identifiers, or ask for another format such as .nrrd."
        )


def frame_value(file: Any, frame: int, group: str, keyword: str) -> Any:
    """A value of one frame from wherever its file keeps it: with the frame, for all frames, or for the whole file.

    Args:
        file: an opened file.
        frame: from 0.
        group: keyword of the functional group.
        keyword: of the value.

    Returns:
        The value, or None.
    """
    item = _group(file, frame, group)
    found = item.get(keyword) if item is not None else None
    return file.get(keyword) if found is None else found


def _group(file: Any, frame: int, group: str) -> Any:
    """The first item of a functional group, of the frame or else of all frames, or None."""
    per_frame, shared = file.get("PerFrameFunctionalGroupsSequence"), file.get("SharedFunctionalGroupsSequence")
    for holder in (per_frame[frame] if per_frame else None, shared[0] if shared else None):
        held = holder.get(group) if holder is not None else None
        if held:
            return held[0]
    return None


def in_plane_steps(orientation: Sequence[float], spacing_mm: Sequence[float]) -> np.ndarray:
    """``(3, 2)`` mm: columns are the step to the next column (i) and to the next row (j)."""
    along_row, along_column = np.array(orientation, dtype=np.float64).reshape(2, 3)
    row_mm, column_mm = (float(v) for v in spacing_mm)  # between rows, then between columns
    return np.stack([along_row * column_mm, along_column * row_mm], axis=1)


def located(file: Any, frame: int, pixels: np.ndarray, series: Series) -> np.ndarray:
    """Voxels of a series under pixels of a frame: by position where both have one, else by the slice it refers to.

    Args:
        file: an opened object drawn on the series.
        frame: from 0.
        pixels: ``(2, M)`` column and row.
        series: the grid.

    Returns:
        ``(3, M)`` whole numbers.

    Raises:
        VolumeError: where they do not fall on voxels of the series.
    """
    position = frame_value(file, frame, "PlanePositionSequence", "ImagePositionPatient")
    if position is None or series.positions is None:
        voxels = np.vstack([pixels, np.full(pixels.shape[1], _referenced(file, frame, series))])
    else:
        offsets_mm = np.array(position, dtype=np.float64) - _places(series.positions)
        first, steps = _placement(file, frame, offsets_mm, series)
        voxels = first[:, None] + steps @ pixels
    if (voxels < 0).any() or (voxels >= np.array(series.shape)[:, None]).any():
        raise _other_grid("voxels outside of it")
    return voxels


def _places(positions: np.ndarray) -> np.ndarray:
    """``(2K, 3)`` mm where slices are, and where other writers put them: scanners space slices a little unevenly, but
    a volume, and what is exported from it, has an even grid from end to end."""
    return np.concatenate([positions, np.linspace(positions[0], positions[-1], len(positions))])


def _placement(file: Any, frame: int, offsets_mm: np.ndarray, series: Series) -> tuple[np.ndarray, np.ndarray]:
    """A frame's first voxel ``(3,)`` and its steps ``(3, 2)`` to the next column and row, in whole voxels."""
    orientation = frame_value(file, frame, "PlaneOrientationSequence", "ImageOrientationPatient")
    spacing = frame_value(file, frame, "PixelMeasuresSequence", "PixelSpacing")
    if orientation is None or spacing is None:
        raise _other_grid("a position without orientation or spacing")
    to_voxels = np.linalg.inv(series.steps_mm)
    offsets = offsets_mm @ to_voxels.T
    nearest = int(np.abs(offsets[:, 2]).argmin())
    found = np.column_stack([offsets[nearest], to_voxels @ in_plane_steps(orientation, spacing)])
    whole = np.rint(found).astype(np.int64)
    drift = np.abs(found - whole) * (1, file.Columns, file.Rows)  # a step that is a little off adds up over the frame
    turned_in_plane = (np.abs(whole[:2, 1:]).sum(axis=0) == 1).all() and not whole[2, 1:].any()
    if drift.max() > TOLERANCE or not turned_in_plane or whole[:, 1] @ whole[:, 2]:
        raise _other_grid("another position, spacing or orientation")
    return whole[:, 0] + (0, 0, nearest % len(series.planes)), whole[:, 1:]


def _referenced(file: Any, frame: int, series: Series) -> int:
    """The slice that a frame without a place refers to."""
    derivation = _group(file, frame, "DerivationImageSequence")
    source = derivation.get("SourceImageSequence") if derivation is not None else None
    if source and (int(file.Columns), int(file.Rows)) == series.shape[:2]:
        uid, number = source[0].get("ReferencedSOPInstanceUID"), source[0].get("ReferencedFrameNumber")
        for k, plane in enumerate(series.planes):
            if plane.uid == uid and plane.frame in (None, number):
                return k
    raise _other_grid("neither a position in space nor a reference to a slice of it")


def _other_grid(what: str) -> VolumeError:
    return VolumeError(
        f"Expected an object on the grid of its series; received {what}."
        " Choose the series it was drawn on, or resample it there."
    )
