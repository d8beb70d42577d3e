"""Integer masks to files on the source image's own grid: NIfTI, NRRD, Slicer's segmentation NRRD, PNG for 2-D images.

Frame: the mask is indexed (i, j, k) like the volume; nothing is resampled or flipped. Reading back gives the volume's
affine bit for bit, with one exception inherent to the format: NIfTI stores single precision, so a NIfTI made from an
NRRD or DICOM image rounds its affine to float32. NRRD from any source is exact. Files appear under their name only when
complete. Thread-safe. Only a ``.seg.nrrd`` names its segments; the reply carries the names for the others. Left out:
compression levels, terminology codes, segments that overlap.
"""

from __future__ import annotations

import colorsys
import os
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Union

import numpy as np
import numpy.typing as npt

from lib.data.readers import suffix_of
from lib.errors import PromptError, VolumeError
from lib.types import Volume

SEGMENTATION = ".seg.nrrd"  # 3D Slicer's: an NRRD whose key-value pairs name the segments
FORMATS = (".nii", ".nii.gz", ".nrrd", SEGMENTATION, ".png")
# ITK's spelling of the types, which every NRRD reader knows.
NRRD_TYPES = {
    "uint8": "unsigned char",
    "int8": "signed char",
    "uint16": "unsigned short",
    "int16": "short",
    "uint32": "unsigned int",
    "int32": "int",
}
PNG_TYPES = ("uint8", "uint16")
UNNAMED: Mapping[str, int] = MappingProxyType({})
GOLDEN = 0.618034  # turns of hue from one segment to the next: neighbours differ, none repeats soon


def write_mask(
    volume: Volume,
    mask: np.ndarray,
    path: Union[str, Path],
    dtype: npt.DTypeLike = np.uint8,
    *,
    compress: bool = True,
    names: Mapping[str, int] = UNNAMED,
) -> Path:
    """Writes a mask on the grid of its image.

    Args:
        volume: the image the mask belongs to.
        mask: ``(I, J, K)`` bool or integer labels.
        path: where to; the extension decides the format.
        dtype: voxel type in the file, stored little-endian: (u)int8, 16 or 32; PNG takes uint8 and uint16.
        compress: gzip inside an NRRD, or raw; the other formats decide by their extension.
        names: label to its value, for a ``.seg.nrrd``: each becomes a segment, with voxels or without. Values of the
            mask that have no name become segments called like ``Segment_3``.

    Returns:
        The path.

    Raises:
        PromptError: for a format or type we do not write, or a type too small for the labels.
        VolumeError: for a mask on another grid.
    """
    path = Path(path)
    suffix = SEGMENTATION if path.name.lower().endswith(SEGMENTATION) else suffix_of(path)
    if suffix not in FORMATS:
        raise PromptError(
            f"Expected a result extension out of {list(FORMATS)}; received {suffix or 'none'!r}. Ask for one of these."
        )
    labels = _typed(volume, mask, _checked_dtype(dtype))
    part = path.with_name(f".{uuid.uuid4().hex}{suffix}")
    try:
        if suffix == ".png":
            _write_png(volume, labels, part)
        elif suffix == ".nrrd":
            _write_nrrd(volume, labels, part, compress)
        elif suffix == SEGMENTATION:
            _write_nrrd(volume, labels, part, compress, _segments(labels, names))
        else:
            _write_nifti(volume, labels, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _checked_dtype(dtype: npt.DTypeLike) -> np.dtype:
    try:
        known = np.dtype(dtype)
    except TypeError:
        known = np.dtype(object)
    if known.name not in NRRD_TYPES:
        raise PromptError(
            f"Expected a result type out of {sorted(NRRD_TYPES)}; received {dtype!r}. Ask for one of these."
        )
    return known.newbyteorder("<")


def _typed(volume: Volume, mask: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The mask in its final type, Fortran order, after checking that it loses nothing."""
    if mask.shape != volume.shape:
        raise VolumeError(
            f"Expected a mask on the image's grid {volume.shape}; received {mask.shape}. Write it with its own image."
        )
    if mask.dtype.kind not in "bui":
        raise PromptError(f"Expected integer labels; received {mask.dtype}. Threshold or round the mask first.")
    lo, hi, limits = int(mask.min()), int(mask.max()), np.iinfo(dtype)
    if lo < limits.min or hi > limits.max:
        raise PromptError(f"Expected a type that holds labels {lo}..{hi}; received {dtype.name}. Ask for a wider one.")
    return np.asfortranarray(mask, dtype=dtype)


def _write_nifti(volume: Volume, labels: np.ndarray, path: Path) -> None:
    import nibabel

    source = volume.header.get("nifti")
    if source is None:
        image = nibabel.Nifti1Image(labels, volume.affine)
        image.set_sform(volume.affine, code="scanner")  # ITK prefers the sform only under this code
        image.set_qform(volume.affine, code="scanner")
        image.header.set_xyzt_units("mm")
    else:
        kind = nibabel.Nifti2Image if isinstance(source, nibabel.Nifti2Header) else nibabel.Nifti1Image
        # Without an affine nibabel leaves both forms and their codes as they are in the header, bit for bit.
        image = kind(labels, None, _clean_nifti_header(source))
    image.set_data_dtype(labels.dtype)
    image.to_filename(path)


def _clean_nifti_header(source: Any) -> Any:
    """The source's grid without what belongs to its voxels or patient: scaling, display range, text, extensions."""
    header = source.as_byteswapped("<")
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    for name in ("descrip", "aux_file", "intent_name", "db_name"):
        if name in header:
            header[name] = b""
    header.set_intent("none")
    header.extensions.clear()
    return header


def _write_nrrd(
    volume: Volume, labels: np.ndarray, path: Path, compress: bool, pairs: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Written here because pynrrd prints a time stamp and 17 digits, so equal masks would differ in bytes."""
    fields = {
        "type": NRRD_TYPES[labels.dtype.name],
        "dimension": "3",
        **(volume.header.get("nrrd") or _nrrd_geometry(volume.affine)),
        "sizes": " ".join(str(n) for n in labels.shape),
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "gzip" if compress else "raw",
    }
    text = "NRRD0004\n" + "".join(f"{name}: {value}\n" for name, value in fields.items())
    text += "".join(f"{key}:={value}\n" for key, value in pairs.items()) + "\n"
    voxels = labels.reshape(-1, order="F").data.cast("B")
    with path.open("wb") as file:
        file.write(text.encode())  # UTF-8, as Slicer reads segment names; all else is ASCII
        file.write(_gzip(voxels) if compress else voxels)


def _segments(labels: np.ndarray, names: Mapping[str, int]) -> dict[str, str]:
    """The key-value pairs of a segmentation with one layer: of those that 3D Slicer writes the ones that it reads."""
    named = {value: name for name, value in names.items() if value > 0}
    unnamed = np.unique(labels[~np.isin(labels, [0, *named])])  # sorting all voxels of a large volume takes seconds
    named |= {int(value): f"Segment_{value}" for value in unnamed if value > 0}
    pairs = {
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    extent = " ".join(f"0 {n - 1}" for n in labels.shape)
    for number, (value, name) in enumerate(sorted(named.items())):
        colour = " ".join(f"{c:.6f}" for c in colorsys.hsv_to_rgb(number * GOLDEN % 1, 0.6, 0.9))
        fields = {"ID": f"Segment_{value}", "Name": _escaped(name), "LabelValue": value, "Layer": 0, "Color": colour}
        fields |= {"Extent": extent, "NameAutoGenerated": 0, "ColorAutoGenerated": 1}
        pairs |= {f"Segment{number}_{field}": str(content) for field, content in fields.items()}
    return pairs


def _escaped(name: str) -> str:
    """A name as NRRD values hold it; anything that would end the line is a blank."""
    return " ".join(name.splitlines()).replace("\\", "\\\\")


def _gzip(voxels: memoryview) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS | 16)  # no time stamp; level 9 takes twice as long
    return packer.compress(voxels) + packer.flush()


def _nrrd_geometry(affine: np.ndarray) -> dict[str, str]:
    """RAS to LPS text; shortest repr reads back to the same double, and changing a sign is exact."""
    lps = affine[:3] * np.array([[-1.0], [-1.0], [1.0]])
    columns = ["(" + ",".join(repr(float(v)) for v in lps[:, c]) + ")" for c in range(4)]
    return {"space": "left-posterior-superior", "space directions": " ".join(columns[:3]), "space origin": columns[3]}


def _write_png(volume: Volume, labels: np.ndarray, path: Path) -> None:
    from PIL import Image

    if not volume.is_2d:
        raise PromptError(
            f"Expected a format out of {list(FORMATS[:-1])} for a 3-D image; received .png. Ask for one of these."
        )
    if labels.dtype.name not in PNG_TYPES:
        raise PromptError(
            f"Expected a PNG result type out of {list(PNG_TYPES)}; received {labels.dtype.name}. Ask for one of these."
        )
    Image.fromarray(np.ascontiguousarray(labels[:, :, 0].T)).save(path)
