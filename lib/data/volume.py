"""Image files to :class:`lib.types.Volume`: NIfTI, NRRD, one DICOM series per folder, and 2-D PNG, JPEG or TIFF.

Frame: the array is as stored, indexed (i, j, k) like 3D Slicer's IJK; the affine maps voxel indices to RAS millimetres
and is the file's own, never rounded or reoriented. Thread-safe: no state. Left out (refused with a reason): time
series, colour NIfTI and NRRD, channels in NRRD, and DICOM slices that are no regular stack (:mod:`lib.data.frames`).
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Optional, Union

import numpy as np

from lib.data.dicom import has_dicom, read_series
from lib.data.readers import StoredImage, detached_file, nifti_shape, read_nifti, read_nrrd, read_picture, suffix_of
from lib.data.window import WindowRequest, choose_window
from lib.errors import VolumeError
from lib.types import Volume

READERS = {
    **dict.fromkeys((".nii", ".nii.gz"), read_nifti),
    **dict.fromkeys((".nrrd", ".nhdr"), read_nrrd),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".tif", ".tiff"), read_picture),
}
COPY_SUFFIX = ".nii.gz"  # what a DICOMweb store makes of a series, for clients


def load_volume(path: Union[str, Path], window_request: WindowRequest = None) -> Volume:
    """Reads an image with its exact grid, its intensity window and its content hash.

    Args:
        path: an image file, or a folder that holds one DICOM series. ``X.nii.gz`` beside such a folder ``X`` is a
            store's copy of the series: the series is read, which alone has window and modality, if the sizes agree.
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
    is_rgb = image.array.ndim == 4 and image.array.dtype == np.uint8
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
        warnings=image.warnings,
    )


def series_folder(path: Union[str, Path]) -> Optional[Path]:
    """The folder of the DICOM series that an image is or was copied from, or None.

    Args:
        path: as :func:`load_volume` takes it.
    """
    path = Path(path)
    if path.is_dir():
        return path if has_dicom(path) else None
    name = path.name[: -len(COPY_SUFFIX)]
    folder = path.with_name(name) if name and suffix_of(path) == COPY_SUFFIX else None
    return folder if folder is not None and has_dicom(folder) else None


def image_files(path: Path) -> list[Path]:
    """What changes on the disk when an image does: of a series every file, of a header without data the file beside it.

    Of a series beside its copy the folder alone, which changes when a file comes or goes: thousands take too long.

    Args:
        path: as :func:`load_volume` takes it.

    Raises:
        OSError: if it is not there.
    """
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file())
    series = series_folder(path)
    beside = detached_file(path) if READERS.get(suffix_of(path)) is read_nrrd else None
    return [path, *(p for p in (series, beside) if p is not None)]


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
        return read_series(path)
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
    folder = series_folder(path)
    return READERS[suffix](path) if folder is None else _read_copied(path, folder)


def _read_copied(copy: Path, folder: Path) -> StoredImage:
    """The series; the file only where it is of something else, or the series cannot be read."""
    reason = "It has another size."
    try:
        series = read_series(folder)
        if series.array.shape[:3] == nifti_shape(copy):
            return series
    except VolumeError as error:
        reason = str(error)
    image = read_nifti(copy)
    return replace(image, warnings=(*image.warnings, f"The DICOM series beside this file was not used. {reason}"))


def _check_voxels(array: np.ndarray, part: str = "") -> None:
    if array.ndim == 4 and array.dtype != np.uint8:
        for channel in range(array.shape[3]):
            _check_voxels(array[..., channel], f" of channel {channel + 1}")
        return
    lo, hi = array.min(), array.max()  # NaN and infinity both surface here, in one pass without a copy
    if not (np.isfinite(lo) and np.isfinite(hi)):
        raise VolumeError(
            "Expected finite voxels; received NaN or infinity (also from overflow). Replace them and save again."
        )
    if lo == hi:
        raise VolumeError(
            f"Expected an image with contrast; every voxel{part} is {lo:g}. Check the export of this image."
        )


def _spacing(affine: np.ndarray) -> tuple[float, float, float]:
    edges = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * edges.prod():
        raise VolumeError(
            "Expected an affine with three independent axes; received a singular or not finite one."
            " Repair the image's header."
        )
    i_mm, j_mm, k_mm = (float(v) for v in edges)
    return i_mm, j_mm, k_mm
