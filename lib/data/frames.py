"""Frames of a DICOM series as numbers: which is which k, and the affine of their stack. No DICOM package here.

Frame: positions and directions are LPS millimetres as the tags have them, the affine maps (i, j, k) to RAS. A stack
that no affine describes exactly is refused, never resampled: masks go back to the very slices they came from. A gantry
tilt would be exact in a sheared affine, but ITK, and with it Slicer, reads a sheared NIfTI by its quaternion, which
cannot shear: labels would lie beside the image. Thread-safe: no state. Left out: time series, several stacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from lib.data.readers import LPS_AXES, lps_grid
from lib.errors import VolumeError

STEP_TOLERANCE = 0.1  # of the slice distance; a missing slice is 1.0, scanner rounding is far below
DRIFT_LIMIT = 0.5  # of the slice distance: beyond it a voxel belongs to its neighbour's place
DRIFT_WARNING = 0.02
TILT_TOLERANCE = 5e-3  # sideways shift per distance, 0.3 degrees; the affine contains what is below
GRID_TOLERANCE = 1e-3
ALWAYS_PLACED = ("CT", "MR", "PT")  # without a position such a series has lost its tags
PLACE_TAGS = {
    "spacing_mm": "PixelSpacing",
    "orientation": "ImageOrientationPatient",
    "position": "ImagePositionPatient",
}


@dataclass(frozen=True)
class Frame:
    """One slice of a series as its tags describe it.

    Args:
        path: its file.
        number: of the frame in the file, from 0.
        size: rows and columns.
        modality: DICOM modality.
        photometric: DICOM photometric interpretation.
        spacing_mm: distance of rows, then of columns.
        orientation: LPS directions of a row, then of a column.
        position: LPS millimetres of the first pixel's centre.
        thickness_mm: distance to the next slice, as far as a single slice can know.
        calibrated_mm: distance of rows and columns by the ultrasound region, or at the detector.
        slope, intercept: stored value to the modality's unit.
        window: centre and width, the first pair.
        stack: DICOM StackID, or empty.
        instance: DICOM InstanceNumber.
        is_localizer: a scout image among the slices that were planned on it.
        is_byte: grey values of 8 bits without a unit, a screen's own, as in ultrasound.
    """

    path: Path
    number: int
    size: tuple[int, int]
    modality: str
    photometric: str
    spacing_mm: Optional[tuple[float, ...]] = None
    orientation: Optional[tuple[float, ...]] = None
    position: Optional[tuple[float, ...]] = None
    thickness_mm: float = 1.0
    calibrated_mm: Optional[tuple[float, ...]] = None
    slope: float = 1.0
    intercept: float = 0.0
    window: Optional[tuple[float, float]] = None
    stack: str = ""
    instance: int = 0
    is_localizer: bool = False
    is_byte: bool = False


@dataclass(frozen=True, eq=False)
class Stack:
    """Frames in the order of k.

    Args:
        frames: one per k.
        affine: ``(4, 4)`` float64, voxel index to RAS millimetres.
        warnings: sentences about what was repaired or assumed.
    """

    frames: tuple[Frame, ...]
    affine: np.ndarray
    warnings: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along i, j, k."""
        rows, columns = self.frames[0].size
        return columns, rows, len(self.frames)


def stacked(frames: Sequence[Frame]) -> Stack:
    """Frames of one series along their normal, as Slicer sorts them; those of no place by their numbers.

    Raises:
        VolumeError: for frames that are no regular stack: tags missing, several sizes, orientations, stacks or frames
            per position, missing slices, a tilted gantry.
    """
    slices = [frame for frame in frames if not frame.is_localizer] or list(frames)
    warnings = []
    if len(slices) < len(frames):
        warnings.append(f"Localizers in the series are left out: {len(frames) - len(slices)}.")
    if _are_unplaced(slices):
        _check_alike([frame.size for frame in slices])
        return _unplaced(slices, warnings)
    _check_tags(slices)
    _check_stacks(slices)
    _check_alike([(*f.size, *(f.spacing_mm or ()), *(f.orientation or ())) for f in slices])
    return _placed(slices, warnings)


def _are_unplaced(frames: Sequence[Frame]) -> bool:
    placed = any(frame.position is not None and frame.orientation is not None for frame in frames)
    return not placed and not any(frame.modality in ALWAYS_PLACED for frame in frames)


def _check_tags(frames: Sequence[Frame]) -> None:
    missing = sorted({tag for name, tag in PLACE_TAGS.items() for frame in frames if getattr(frame, name) is None})
    if missing:
        raise VolumeError(
            f"Expected DICOM slices with a place in space; tags {missing} are missing in a file or frame."
            " Export that file again, remove it, or convert the series to NIfTI."
        )


def _check_stacks(frames: Sequence[Frame]) -> None:
    stacks = len({frame.stack for frame in frames})
    if stacks > 1:
        raise VolumeError(
            f"Expected one stack of slices; the DICOM frames belong to {stacks} stacks. Export each as its own series."
        )


def _check_alike(grids: Sequence[tuple[float, ...]]) -> None:
    values = np.array(grids, dtype=np.float64)
    if np.abs(values - values[0]).max() > GRID_TOLERANCE:
        raise VolumeError(
            "Expected slices of one size, spacing and orientation; received several. Remove localizers from the series,"
            " or split it by orientation."
        )


def _unplaced(frames: Sequence[Frame], warnings: list[str]) -> Stack:
    """Every frame one k on the LPS axes, as pictures lie; never closer than pixels, so that slices are cut across k."""
    ordered = sorted(frames, key=lambda f: (f.instance, f.path.name, f.number))
    known = ordered[0].spacing_mm or ordered[0].calibrated_mm
    row_mm, column_mm = known or (1.0, 1.0)
    pixels = f"pixels of {column_mm:.3g} x {row_mm:.3g} mm" if known else "pixels of unknown size, taken as 1 mm"
    warnings.append(
        f"The series has no position in space: {len(ordered)} frames by their numbers, {pixels}, and distances between"
        " frames have no meaning."
    )
    affine = lps_grid(np.array([column_mm, row_mm, max(1.0, row_mm, column_mm)]))
    return Stack(tuple(ordered), affine, tuple(warnings))


def _placed(frames: Sequence[Frame], warnings: list[str]) -> Stack:
    """The affine's third column spans first to last."""
    along_row, along_column = np.array(frames[0].orientation, dtype=np.float64).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    ordered = sorted(frames, key=lambda frame: float(normal @ np.array(frame.position, dtype=np.float64)))
    positions = np.array([frame.position for frame in ordered], dtype=np.float64)
    drift_mm, step_mm = _check_steps(positions, normal)
    if drift_mm > DRIFT_WARNING * step_mm:
        warnings.append(f"The slices are not evenly spaced: up to {drift_mm:.2f} mm beside a grid of {step_mm:.2f} mm.")
    row_mm, column_mm = ordered[0].spacing_mm or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = along_row * column_mm, along_column * row_mm
    affine[:3, 2] = normal * ordered[0].thickness_mm
    if len(ordered) > 1:
        affine[:3, 2] = (positions[-1] - positions[0]) / (len(ordered) - 1)
    affine[:3, 3] = positions[0]
    affine[:3] *= np.array(LPS_AXES)[:, None]
    return Stack(tuple(ordered), affine, tuple(warnings))


def _check_steps(positions: np.ndarray, normal: np.ndarray) -> tuple[float, float]:
    """Largest distance of a slice from an even grid, and that grid's step, both in mm."""
    if len(positions) < 2:
        return 0.0, 1.0
    steps = np.diff(positions, axis=0)
    along = steps @ normal
    step = float(np.median(along))
    if along.min() < GRID_TOLERANCE:
        raise VolumeError(
            f"Expected one slice per position; received {len(positions)} slices at {int((along >= 1e-3).sum()) + 1}"
            " positions (time points, echoes?). Split the series by them."
        )
    even = np.linspace(0.0, along.sum(), len(positions))
    drift = float(np.abs(np.cumsum([0.0, *along]) - even).max())
    if np.abs(along - step).max() > STEP_TOLERANCE * step or drift > DRIFT_LIMIT * step:
        raise VolumeError(
            f"Expected slices {step:.3f} mm apart; received steps of {along.min():.3f} to {along.max():.3f} mm: slices"
            " are missing or uneven. Export the complete series or resample it."
        )
    if np.linalg.norm(steps.sum(axis=0) - along.sum() * normal) > TILT_TOLERANCE * along.sum():
        raise VolumeError(
            "Expected slices stacked along their normal; received a tilted gantry. Correct the tilt and use NIfTI."
        )
    return drift, step
