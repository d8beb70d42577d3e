"""Image files to :class:`lib.types.Volume`: NIfTI, NRRD, one DICOM series per folder, and 2-D PNG, JPEG or TIFF.

Frame: the array is as stored, indexed (i, j, k) like 3D Slicer's IJK; the affine maps voxel indices to RAS millimetres
and is the file's own, never rounded or reoriented. Thread-safe: no state. Left out (refused with a reason): time
series, colour volumes, enhanced multi-frame DICOM, gantry tilt and missing slices.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from lib.data.readers import (
    LPS_AXES,
    StoredImage,
    check_size,
    decoding,
    read_nifti,
    read_nrrd,
    read_picture,
    suffix_of,
)
from lib.data.window import WindowRequest, choose_window
from lib.errors import VolumeError
from lib.types import Volume

READERS = {
    **dict.fromkeys((".nii", ".nii.gz"), read_nifti),
    **dict.fromkeys((".nrrd", ".nhdr"), read_nrrd),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".tif", ".tiff"), read_picture),
}
DICOM_REQUIRED = (
    "SeriesInstanceUID",
    "Rows",
    "Columns",
    "PhotometricInterpretation",
    "PixelSpacing",
    "ImageOrientationPatient",
    "ImagePositionPatient",
)
# No tag that names a patient is ever read together with these.
DICOM_TAGS = (
    *DICOM_REQUIRED,
    "Modality",
    "NumberOfFrames",
    "SliceThickness",
    "SpacingBetweenSlices",
    "WindowCenter",
    "WindowWidth",
)
STEP_TOLERANCE = 0.1  # of the slice distance; a missing slice is 1.0, scanner rounding is far below
TILT_TOLERANCE = 5e-3  # sideways shift per distance, 0.3 degrees; the affine contains what is below


def load_volume(path: Union[str, Path], window_request: WindowRequest = None) -> Volume:
    """Reads an image with its exact grid, its intensity window and its content hash.

    Args:
        path: an image file, or a folder that holds one DICOM series.
        window_request: ``(lo, hi)`` in voxel values or a preset's name, see :func:`lib.data.window.choose_window`.

    Returns:
        A volume whose array and affine are read-only.

    Raises:
        VolumeError: for a missing, broken, empty, constant, not finite or unsupported image.
        CapacityError: for an image that does not fit the memory.
        PromptError: for a window request that cannot be used.
    """
    image = _read(Path(path))
    _check_voxels(image.array)
    spacing_mm = _spacing(image.affine)
    is_rgb = image.array.ndim == 4
    window = choose_window(
        image.array,
        image.dicom_window,
        image.modality,
        requested=window_request,
        is_rgb=is_rgb,
        native_uint8=image.native_uint8,
    )
    for shared in (image.array, image.affine):
        shared.setflags(write=False)
    return Volume(
        array=image.array,
        affine=image.affine,
        spacing_mm=spacing_mm,
        window=window,
        content_hash=content_hash(image.array),
        is_2d=image.is_picture,
        header=image.header,
    )


def content_hash(array: np.ndarray) -> str:
    """Hex BLAKE2b digest of voxels, shape and dtype, whatever the memory layout; about 1 GB/s."""
    digest = hashlib.blake2b(f"{array.shape}{array.dtype.str}".encode(), digest_size=20)
    digest.update(np.ascontiguousarray(array.T).data)  # readers return Fortran order, so this is no copy
    return digest.hexdigest()


def _read(path: Path) -> StoredImage:
    if not path.exists():
        raise VolumeError(
            "Expected an image file or DICOM folder; nothing is there. Check the image id and the studies folder."
        )
    if path.is_dir():
        return _read_dicom(path)
    suffix = suffix_of(path)
    if suffix not in READERS:
        # A dotted identifier without an extension must not reach the message as one.
        received = suffix if suffix[1:].isalpha() and len(suffix) <= 6 else "none of these"
        raise VolumeError(
            f"Expected an extension out of {', '.join(READERS)}, or the folder of a DICOM series; received {received}."
            " Convert the image, or pass the folder of the series."
        )
    if path.stat().st_size == 0:
        raise VolumeError("Expected an image; received an empty file of 0 bytes. Copy or export it again.")
    return READERS[suffix](path)


def _check_voxels(array: np.ndarray) -> None:
    lo, hi = array.min(), array.max()  # NaN and infinity both surface here, in one pass without a copy
    if not (np.isfinite(lo) and np.isfinite(hi)):
        raise VolumeError(
            "Expected finite voxels; received NaN or infinity (also from overflow). Replace them and save again."
        )
    if lo == hi:
        raise VolumeError(f"Expected an image with contrast; every voxel is {lo:g}. Check the export of this image.")


def _spacing(affine: np.ndarray) -> tuple[float, float, float]:
    edges = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * edges.prod():
        raise VolumeError(
            "Expected an affine with three independent axes; received a singular or not finite one."
            " Repair the image's header."
        )
    i_mm, j_mm, k_mm = (float(v) for v in edges)
    return i_mm, j_mm, k_mm


def _read_dicom(folder: Path) -> StoredImage:
    with decoding("DICOM"):
        files = _series_files(folder)
        _check_series([head for _, head in files])
        files, affine = _placed(files)
        first = files[0][1]
        shape = (int(first.Columns), int(first.Rows), len(files))
        check_size(shape)
        array = np.empty(shape, dtype=np.float32, order="F")
        for k, (path, _) in enumerate(files):
            array[:, :, k] = _rescaled_pixels(path).T
        window = _dicom_window([head for _, head in files])
    if first.PhotometricInterpretation == "MONOCHROME1":  # low is bright: negated, and its window with it
        np.negative(array, out=array)
        window = None if window is None else (-window[0], window[1])
    return StoredImage(array, affine, {"format": "dicom"}, dicom_window=window, modality=first.get("Modality"))


def _series_files(folder: Path) -> list[tuple[Path, Any]]:
    """The folder's DICOM files with the header fields in use; other files, such as a licence text, are passed over."""
    import pydicom

    found = []
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name != "DICOMDIR"):
        with path.open("rb") as file:
            is_dicom = file.read(132)[128:] == b"DICM"
        if is_dicom or path.suffix.lower() == ".dcm":
            found.append((path, pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(DICOM_TAGS))))
    if not found:
        raise VolumeError(
            "Expected a folder with the files of one DICOM series; received none. Export the series into it."
        )
    return found


def _check_series(heads: list[Any]) -> None:
    if any(int(head.get("NumberOfFrames") or 1) > 1 for head in heads):
        raise VolumeError(
            "Expected one slice per DICOM file; received enhanced multi-frame DICOM. Convert the series to NIfTI."
        )
    missing = sorted({tag for tag in DICOM_REQUIRED for head in heads if not head.get(tag)})
    if missing:
        raise VolumeError(
            f"Expected DICOM slices with a place in space; tags {missing} are missing in a file."
            " Export that file again, remove it, or convert the series to NIfTI."
        )
    series = len({head.get("SeriesInstanceUID") for head in heads})
    if series != 1:
        raise VolumeError(
            f"Expected one DICOM series per folder; received {series}. Sort the files into a folder per series."
        )
    kinds = {str(head.PhotometricInterpretation) for head in heads}
    if not (kinds == {"MONOCHROME1"} or kinds == {"MONOCHROME2"}):
        raise VolumeError(
            f"Expected grey DICOM slices of one kind; received {sorted(kinds)}. Export them as MONOCHROME2."
        )
    grids = np.array(
        [[h.Rows, h.Columns, *h.PixelSpacing, *h.ImageOrientationPatient] for h in heads], dtype=np.float64
    )
    if np.abs(grids - grids[0]).max() > 1e-3:
        raise VolumeError(
            "Expected slices of one size, spacing and orientation; received several. Remove localizers from it."
        )


def _placed(files: list[tuple[Path, Any]]) -> tuple[list[tuple[Path, Any]], np.ndarray]:
    """Files sorted along the slice normal, as Slicer does, and the affine; its third column spans first to last."""
    head = files[0][1]
    along_row, along_column = np.array(head.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    files = sorted(files, key=lambda item: float(normal @ np.array(item[1].ImagePositionPatient, dtype=np.float64)))
    positions = np.array([head.ImagePositionPatient for _, head in files], dtype=np.float64)
    _check_steps(positions, normal)
    thickness = abs(float(head.get("SpacingBetweenSlices") or head.get("SliceThickness") or 1.0))
    last = positions[-1] - positions[0]
    row_mm, column_mm = (float(v) for v in head.PixelSpacing)  # distance between rows, then between columns
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = along_row * column_mm, along_column * row_mm
    affine[:3, 2] = last / (len(files) - 1) if len(files) > 1 else normal * thickness
    affine[:3, 3] = positions[0]
    affine[:3] *= np.array(LPS_AXES)[:, None]
    return files, affine


def _check_steps(positions: np.ndarray, normal: np.ndarray) -> None:
    if len(positions) < 2:
        return
    steps = np.diff(positions, axis=0)
    along = steps @ normal
    step = float(np.median(along))
    if along.min() < 1e-3:
        raise VolumeError(
            "Expected one slice per position; received several (time points, echoes?). Split the series by them."
        )
    if np.abs(along - step).max() > STEP_TOLERANCE * step:
        raise VolumeError(
            f"Expected slices {step:.3f} mm apart; received steps of {along.min():.3f} to {along.max():.3f} mm: slices"
            " are missing. Export the complete series or resample it."
        )
    if np.linalg.norm(steps.sum(axis=0) - along.sum() * normal) > TILT_TOLERANCE * along.sum():
        raise VolumeError(
            "Expected slices stacked along their normal; received a tilted gantry. Correct the tilt and use NIfTI."
        )


def _rescaled_pixels(path: Path) -> np.ndarray:
    """``(rows, columns)`` float32 in the modality's units; the slope may differ from slice to slice (PET)."""
    import pydicom

    dataset = pydicom.dcmread(path)
    try:
        pixels = dataset.pixel_array
    except (NotImplementedError, RuntimeError):
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise VolumeError(
            f"Expected pixels this server can decode; received {syntax}."
            " Install its decoder or export the series uncompressed."
        ) from None
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    scale = np.float32(1.0 if slope is None else slope)
    return pixels.astype(np.float32) * scale + np.float32(0.0 if intercept is None else intercept)


def _dicom_window(heads: list[Any]) -> Optional[tuple[float, float]]:
    """The first centre and width of each slice; scanners window MR slice by slice, so the volume takes the median."""
    pairs = [(head.get("WindowCenter"), head.get("WindowWidth")) for head in heads]
    if any(centre in (None, "") or width in (None, "") for centre, width in pairs):
        return None
    firsts = np.array([[float(np.atleast_1d(value)[0]) for value in pair] for pair in pairs])
    centre, width = np.median(firsts, axis=0)
    return float(centre), float(width)
