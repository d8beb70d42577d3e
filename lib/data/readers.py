"""One image file to voxels and geometry: NIfTI, NRRD, and 2-D PNG, JPEG or TIFF. DICOM series are in ``dicom``.

Frame: indexed (i, j, k) like 3D Slicer's IJK, affine to RAS millimetres, both as the file has them. Thread-safe: no
state. Messages never quote a file name or header text, which may identify a patient.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from lib.errors import AppError, CapacityError, VolumeError
from lib.types import Index

# nibabel, pynrrd, pydicom and Pillow are called directly and not through monai.transforms.LoadImage: its NIfTI reader
# may rewrite the header's forms, its NRRD reader knows one spelling of one space, and its DICOM reader sorts by
# instance number and takes slice distances from z alone. Each would lose the exact affine or Slicer's axis order.

MAX_VOXELS = 2**30  # 4 GiB as float32
MAX_CHANNELS = 4
# ITK, and with it Slicer, places pictures and unplaced volumes on the LPS axes.
LPS_AXES = (-1.0, -1.0, 1.0)
NRRD_SIGNS = {
    "right-anterior-superior": (1.0, 1.0, 1.0),
    "RAS": (1.0, 1.0, 1.0),
    "left-anterior-superior": (-1.0, 1.0, 1.0),
    "LAS": (-1.0, 1.0, 1.0),
}
# The geometry fields that a mask copies as text, with the pattern of one axis' entry where there is one per axis.
NRRD_GEOMETRY: dict[str, Optional[str]] = {
    "space": None,
    "space dimension": None,
    "space directions": r"\([^)]*\)|none",
    "space origin": None,
    "spacings": r"\S+",
    "axis mins": r"\S+",
    "centerings": r"\S+",
}


@dataclass(frozen=True)
class StoredImage:
    """What a reader hands back.

    Args:
        array: ``(I, J, K)`` float32, ``(I, J, K, M)`` float32 for channels, or ``(I, J, K, 3)`` uint8 for colour.
        affine: ``(4, 4)`` float64, voxel index to RAS millimetres.
        header: for the writer, see :class:`lib.types.Volume`.
        dicom_window: centre and width, as the tags give them.
        modality: DICOM modality.
        is_picture: a 2-D picture file.
        native_uint8: grey values of an 8-bit picture.
        warnings: sentences for the user about what was repaired or assumed.
    """

    array: np.ndarray
    affine: np.ndarray
    header: dict[str, Any]
    dicom_window: Optional[tuple[float, float]] = None
    modality: Optional[str] = None
    is_picture: bool = False
    native_uint8: bool = False
    warnings: tuple[str, ...] = ()


def suffix_of(path: Path) -> str:
    """The file's format in lower case, ``.nii.gz`` in one piece."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def read_nifti(path: Path) -> StoredImage:
    """NIfTI-1 or -2 of one volume, or of 2 to 4 channels along the fourth axis, scaled by its slope and intercept.

    Further axes may hold one element, and NIfTI's vectors have their channels along the fifth. What four volumes in a
    row mean no header says reliably, so up to four are channels, such as MR sequences, and more are a time series.

    Raises:
        VolumeError: for a broken file, more axes, colour or complex voxels.
        CapacityError: for a volume beyond :data:`MAX_VOXELS` or the memory; so do the other readers.
    """
    with decoding("NIfTI"):
        image = _open_nifti(path)
        shape = _with_channels(image.shape)
        dtype = image.get_data_dtype()
        if dtype.kind not in "iuf":
            raise VolumeError(
                f"Expected a grey NIfTI of integers or floats; received voxels of {dtype.names or dtype}."
                " Convert it to one grey channel."
            )
        array = np.asarray(image.dataobj, dtype=np.float32).reshape(shape, order="F")
        affine = np.array(image.affine, dtype=np.float64)
        if image.header["sform_code"] == 0 and image.header["qform_code"] == 0:
            # Without a form nibabel centres the grid, ITK does not; an NRRD mask must lie where Slicer shows the image.
            affine = lps_grid(np.array(image.header.get_zooms()[:3], dtype=np.float64))
    return StoredImage(array, affine, {"format": "nifti", "nifti": image.header.copy()})


def nifti_shape(path: Path) -> tuple[int, ...]:
    """The first three axes of a NIfTI file of any kind, from its header alone.

    Raises:
        VolumeError: for a broken file.
    """
    with decoding("NIfTI"):
        return (*(int(n) for n in _open_nifti(path).shape[:3]), 1, 1)[:3]


def _open_nifti(path: Path) -> Any:
    import nibabel

    image = nibabel.load(path, mmap=False)
    if not isinstance(image, nibabel.Nifti1Image):
        raise VolumeError(f"Expected NIfTI content; received {type(image).__name__}. Convert the file to NIfTI.")
    return image


def read_nrrd(path: Path) -> StoredImage:
    """NRRD of three axes, fastest first, attached or with its data file beside it.

    Raises:
        VolumeError: for a broken file, another number of axes, colour or vectors, or a data file elsewhere.
    """
    import nrrd

    with decoding("NRRD"), path.open("rb") as file:
        header = nrrd.read_header(file)
        shape = _three_axes(tuple(int(n) for n in header["sizes"]), at_least=3)
        _check_detached(header)
        data = nrrd.read_data(header, file, str(path), index_order="F")
        if data.dtype.kind not in "iuf":
            raise VolumeError(
                f"Expected a grey NRRD of integers or floats; received {header['type']}. Convert its type."
            )
        array = np.asarray(data, dtype=np.float32).reshape(shape, order="F")
        affine = _nrrd_affine(header)
    return StoredImage(array, affine, {"format": "nrrd", "nrrd": _nrrd_geometry(path)})


def detached_file(path: Path) -> Optional[Path]:
    """The file beside an NRRD header that holds its voxels, or None where the header holds them or names none there."""
    for line in _header_lines(path):
        name, _, value = line.partition(":")
        if name.lower() in ("data file", "datafile") and len(Path(value.strip()).parts) == 1:
            beside = path.with_name(value.strip())
            return beside if beside.is_file() else None
    return None


def _header_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        yield from iter(lambda: file.readline(1 << 20).decode("ascii", "ignore").rstrip(), "")


def _check_detached(header: dict[str, Any]) -> None:
    """An image from outside must not make the server read a file elsewhere."""
    name = header.get("data file", header.get("datafile"))
    if name is not None and (Path(name).is_absolute() or len(Path(name).parts) != 1 or name.startswith("LIST")):
        raise VolumeError(
            "Expected the NRRD's data file beside its header; received a path or list. Store it as one .nrrd file."
        )


def _nrrd_affine(header: dict[str, Any]) -> np.ndarray:
    if header.get("space directions") is None:
        return lps_grid(np.array(header.get("spacings", (1.0, 1.0, 1.0)), dtype=np.float64)[:3])
    directions = np.asarray(header["space directions"], dtype=np.float64)[:3]
    origin = np.asarray(header.get("space origin", (0.0, 0.0, 0.0)), dtype=np.float64)
    if directions.shape != (3, 3) or origin.shape != (3,):
        raise VolumeError(
            f"Expected an NRRD in 3-D space; received directions of shape {directions.shape}. Export it as 3-D."
        )
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions.T, origin
    space = str(header.get("space", ""))
    affine[:3] *= np.array(NRRD_SIGNS.get(space, LPS_AXES))[:, None]
    return affine


def _nrrd_geometry(path: Path) -> dict[str, str]:
    """The geometry fields as text, so that a mask carries the very same characters; a fourth axis is dropped."""
    fields: dict[str, str] = {}
    for line in _header_lines(path):
        name, _, value = line.partition(":")
        if name in NRRD_GEOMETRY and not value.startswith("="):
            fields[name] = value.strip()
    for name, entry in NRRD_GEOMETRY.items():
        if entry and name in fields:
            fields[name] = " ".join(re.findall(entry, fields[name])[:3])
    return fields


def read_picture(path: Path) -> StoredImage:
    """PNG, JPEG or TIFF of one frame: grey as float32, colour and palettes as RGB without alpha; i is x, j is y.

    Raises:
        VolumeError: for a broken file, several frames or an unusual colour space.
    """
    from PIL import Image

    with decoding("PNG, JPEG or TIFF"), Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise VolumeError(f"Expected one picture; received {frames} frames in one file. Save each as its own file.")
        check_size((*image.size, 1))
        if image.mode in ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"):
            array = np.asarray(image.convert("RGB")).transpose(1, 0, 2)[:, :, None]
        elif image.mode in ("1", "L", "LA"):
            array = np.asarray(image.convert("L"), dtype=np.float32).T[:, :, None]
        elif image.mode in ("I", "F") or image.mode.startswith("I;16"):
            array = np.asarray(image).astype(np.float32).T[:, :, None]
        else:
            raise VolumeError(f"Expected a grey, RGB or palette picture; received mode {image.mode}. Save it as RGB.")
        native = image.mode in ("1", "L", "LA")
    return StoredImage(array, lps_grid(np.ones(3)), {"format": "picture"}, is_picture=True, native_uint8=native)


def lps_grid(spacing_mm: np.ndarray) -> np.ndarray:
    """``(4, 4)`` affine to RAS of a grid that lies on the LPS axes with its first voxel at the origin."""
    return np.diag([*(spacing_mm * LPS_AXES), 1.0])


def _with_channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``(I, J, K)``, or ``(I, J, K, M)`` where there are 2 to 4 channels."""
    sizes = [n for axis, n in enumerate(shape) if axis < 3 or n != 1]
    channels = sizes[3:]
    if len(channels) != 1 or not 1 < channels[0] <= MAX_CHANNELS:
        return _three_axes(shape)
    check_size((*sizes[:3], channels[0]))
    return tuple(sizes)


def _three_axes(shape: tuple[int, ...], at_least: int = 2) -> Index:
    """The stored shape as (I, J, K); trailing axes of one element carry nothing."""
    sizes = list(shape)
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    if not at_least <= len(sizes) <= 3 or min(sizes) < 1:
        raise VolumeError(
            f"Expected one volume of 3 axes, in NIfTI also 2 to {MAX_CHANNELS} channels along a fourth; received shape"
            f" {tuple(shape)}. Split time points, or further channels, into files."
        )
    sizes += [1] * (3 - len(sizes))
    check_size((sizes[0], sizes[1], sizes[2]))
    return sizes[0], sizes[1], sizes[2]


def check_size(shape: tuple[int, ...]) -> None:
    """Accepts a shape, channels included, before its voxels are decoded.

    Raises:
        CapacityError: beyond :data:`MAX_VOXELS`.
    """
    voxels = math.prod(shape)
    if voxels > MAX_VOXELS:
        raise CapacityError(
            f"Expected at most {MAX_VOXELS} voxels; received {voxels} ({shape}). Crop or resample the image."
        )


@contextmanager
def decoding(kind: str) -> Iterator[None]:
    """Turns whatever a decoder raises into our errors, without its text: that quotes file names and header content."""
    try:
        yield
    except AppError:
        raise
    except MemoryError:
        raise CapacityError(
            f"Expected a {kind} image that fits the memory; it does not. Crop or resample the image."
        ) from None
    except Exception as error:  # noqa: BLE001 - on broken files the decoders raise anything
        raise VolumeError(
            f"Expected a readable {kind} image; its decoder stopped with {type(error).__name__}."
            " The file is broken, truncated or of another format: export it again."
        ) from None
