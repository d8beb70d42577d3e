"""One DICOM series per folder: classic slices, enhanced multi-frame, cine, grey or colour, compressed or not.

Frame: as stored, i along a row, j down the columns, k along the slice normal (:mod:`lib.data.frames`); affine to RAS
millimetres. Thread-safe: no state. No tag that names a patient is read with the geometry, :func:`patient_key` hands one
out as a hash alone, and messages quote no tag that may identify one. Left out: display functions beyond a window (VOI
LUT, sigmoid), overlays, time series.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from lib.data.frames import Frame, Stack, stacked
from lib.data.readers import StoredImage, check_size, decoding
from lib.errors import VolumeError

REQUIRED = ("SeriesInstanceUID", "Rows", "Columns", "PhotometricInterpretation")
# Functional groups of enhanced objects (PS3.3 C.7.6.16), where a tag lies inside them; elsewhere it is a file's own.
GROUPS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "SpacingBetweenSlices": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "WindowCenter": "FrameVOILUTSequence",
    "WindowWidth": "FrameVOILUTSequence",
    "StackID": "FrameContentSequence",
}
TAGS = (
    *REQUIRED,
    *(tag for tag in GROUPS if tag != "StackID"),
    "Modality",
    "ImageType",
    "InstanceNumber",
    "NumberOfFrames",
    "BitsStored",
    "PixelRepresentation",
    "ImagerPixelSpacing",
    "SequenceOfUltrasoundRegions",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
GREY = ("MONOCHROME1", "MONOCHROME2")
LUMINANCE = ("YBR_FULL", "YBR_FULL_422")  # what decoders leave to us; JPEG 2000 comes as RGB
COLOUR = ("RGB", "PALETTE COLOR", *LUMINANCE, "YBR_ICT", "YBR_RCT")
# JPEG-LS and lossless JPEG do not say whether they hold RGB; libjpeg takes RGB for YCbCr there and "converts" it.
UNMARKED_COLOUR = (
    "1.2.840.10008.1.2.4.57",
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.81",
)
REGION_2D, UNIT_CM = 1, 3  # PS3.3 C.8.5.5
OWNERS = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
# What anonymisation writes for everybody; as a patient it would make one of a whole archive.
NOBODY = re.compile(r"[\W_0x]*|anon(ymous|ymi[sz]ed)?|unknown|unk|none|n/?a|removed|de-?identified")


def read_series(folder: Path) -> StoredImage:
    """A series as one volume.

    Args:
        folder: holds the files of one series; files that are not DICOM are passed over.

    Returns:
        Grey float32 in the modality's unit (MONOCHROME1 negated, so that more is brighter), or RGB uint8.

    Raises:
        VolumeError: for files that cannot be decoded, or that are no regular stack of one series.
        CapacityError: for a series beyond :data:`lib.data.readers.MAX_VOXELS` or the memory.
    """
    with decoding("DICOM"):
        stack = _stack(_files(folder))
        check_size(stack.shape)
        frames = stack.frames
        is_rgb, is_inverse = frames[0].photometric in COLOUR, frames[0].photometric == "MONOCHROME1"
        array = _colour_voxels(stack) if is_rgb else _grey_voxels(stack)
    window = None if is_rgb else _window(frames)
    if is_inverse:  # low is bright: negated, and its window with it
        np.negative(array, out=array)
        window = None if window is None else (-window[0], window[1])
    return StoredImage(
        array,
        stack.affine,
        {"format": "dicom"},
        dicom_window=window,
        modality=frames[0].modality or None,
        native_uint8=not (is_rgb or is_inverse) and all(frame.is_byte for frame in frames),
        warnings=stack.warnings,
    )


def frame_order(folder: Path) -> list[tuple[Path, int]]:
    """For every k of the volume the file and the frame in it, from 0.

    Raises:
        VolumeError: as :func:`read_series`, except for the pixels.
    """
    with decoding("DICOM"):
        return [(frame.path, frame.number) for frame in _stack(_files(folder)).frames]


def patient_key(folder: Path) -> str:
    """Whose series this is: equal for all series of one patient, and no identifier.

    A SHA-256 of PatientID in small letters; where that is missing or a placeholder such as ``ANONYMOUS``, of the study,
    else of the series. It keeps the identifier out of files, but who knows a PatientID can compute its hash.

    Args:
        folder: as :func:`read_series` takes it.

    Raises:
        VolumeError: for a folder without a file that can be read as DICOM.
    """
    import pydicom

    with decoding("DICOM"):
        path = next(_dicom_paths(folder), None)
        head: Any = {} if path is None else pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(OWNERS))
        known = {tag: str(head.get(tag) or "").strip().casefold() for tag in OWNERS}
    for tag, value in known.items():
        if value and not (tag == "PatientID" and NOBODY.fullmatch(value)):
            return f"dicom:{hashlib.sha256(f'{tag}:{value}'.encode()).hexdigest()[:32]}"
    raise VolumeError("Expected a DICOM series; received files without identifiers. Export the series again.")


def has_dicom(folder: Path) -> bool:
    """Whether a folder holds a DICOM file."""
    return folder.is_dir() and next(_dicom_paths(folder), None) is not None


def _dicom_paths(folder: Path) -> Iterator[Path]:
    """DICOM files by name; others, such as a licence text, are passed over."""
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name != "DICOMDIR"):
        with path.open("rb") as file:
            is_dicom = file.read(132)[128:] == b"DICM"
        if is_dicom or path.suffix.lower() == ".dcm":
            yield path


def _files(folder: Path) -> list[tuple[Path, Any]]:
    """The files of the series with the header fields in use."""
    import pydicom

    found = [
        (path, pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS)))
        for path in _dicom_paths(folder)
    ]
    if not found:
        raise VolumeError(
            "Expected a folder with the files of one DICOM series; received none. Export the series into it."
        )
    heads = [head for _, head in found]
    missing = sorted({tag for tag in REQUIRED for head in heads if not head.get(tag)})
    if missing:
        raise VolumeError(
            f"Expected DICOM images; tags {missing} are missing in a file. Export that file again or remove it."
        )
    series = len({head.SeriesInstanceUID for head in heads})
    if series != 1:
        raise VolumeError(
            f"Expected one DICOM series per folder; received {series}. Sort the files into a folder per series."
        )
    return found


def _stack(files: Sequence[tuple[Path, Any]]) -> Stack:
    stack = stacked([frame for path, head in files for frame in _frames(path, head)])
    kinds = {frame.photometric for frame in stack.frames}
    if not kinds <= {*GREY, *COLOUR} or (len(kinds) > 1 and not kinds <= set(COLOUR)):
        raise VolumeError(
            f"Expected DICOM slices of one kind, grey or colour; received {sorted(kinds)}."
            " Export them as MONOCHROME2 or RGB."
        )
    return stack


def _frames(path: Path, head: Any) -> Iterator[Frame]:
    per_frame = head.get("PerFrameFunctionalGroupsSequence") or ()
    shared = (head.get("SharedFunctionalGroupsSequence") or [None])[0]
    for number in range(int(head.get("NumberOfFrames") or 1)):
        own = per_frame[number] if number < len(per_frame) else None
        yield _frame(path, number, head, [group for group in (own, shared) if group is not None])


def _frame(path: Path, number: int, head: Any, groups: Sequence[Any]) -> Frame:
    def tag(name: str) -> Any:
        """The frame's own value, else the shared one, else the file's."""
        for group in groups:
            for item in group.get(GROUPS[name]) or ():
                if item.get(name) not in (None, ""):
                    return item.get(name)
        return head.get(name)

    slope, intercept = _number(tag("RescaleSlope"), 1.0), _number(tag("RescaleIntercept"), 0.0)
    return Frame(
        path=path,
        number=number,
        size=(int(head.Rows), int(head.Columns)),
        modality=str(head.get("Modality") or ""),
        photometric=str(head.PhotometricInterpretation),
        spacing_mm=_numbers(tag("PixelSpacing")),
        orientation=_numbers(tag("ImageOrientationPatient")),
        position=_numbers(tag("ImagePositionPatient")),
        thickness_mm=abs(float(tag("SpacingBetweenSlices") or tag("SliceThickness") or 1.0)),
        calibrated_mm=calibrated_mm(head),
        slope=slope,
        intercept=intercept,
        window=_first_pair(tag("WindowCenter"), tag("WindowWidth")),
        stack=str(tag("StackID") or ""),
        instance=int(head.get("InstanceNumber") or 0),
        is_localizer="LOCALIZER" in (head.get("ImageType") or ()),
        is_byte=_is_byte(head, slope, intercept),
    )


def _number(value: Any, otherwise: float) -> float:
    return otherwise if value in (None, "") else float(value)


def _numbers(value: Any) -> Optional[tuple[float, ...]]:
    return tuple(float(v) for v in value) if value else None


def _first_pair(centre: Any, width: Any) -> Optional[tuple[float, float]]:
    if centre in (None, "") or width in (None, ""):
        return None
    return float(np.atleast_1d(centre)[0]), float(np.atleast_1d(width)[0])


def calibrated_mm(head: Any) -> Optional[tuple[float, ...]]:
    """Distance of rows and columns where no patient coordinates say it: of the largest 2-D ultrasound region."""

    def area(region: Any) -> float:
        width = abs(region.RegionLocationMaxX1 - region.RegionLocationMinX0)
        return float(width * abs(region.RegionLocationMaxY1 - region.RegionLocationMinY0))

    regions = [
        region
        for region in head.get("SequenceOfUltrasoundRegions") or ()
        if region.get("RegionSpatialFormat") == REGION_2D
        and region.get("PhysicalUnitsXDirection") == region.get("PhysicalUnitsYDirection") == UNIT_CM
        and region.get("PhysicalDeltaX") and region.get("PhysicalDeltaY")
    ]  # fmt: skip
    if not regions:
        return _numbers(head.get("ImagerPixelSpacing"))
    largest = max(regions, key=area)
    return abs(float(largest.PhysicalDeltaY)) * 10, abs(float(largest.PhysicalDeltaX)) * 10


def _is_byte(head: Any, slope: float, intercept: float) -> bool:
    is_unsigned = not head.get("PixelRepresentation")
    return int(head.get("BitsStored") or 16) <= 8 and is_unsigned and slope == 1 and intercept == 0


def _window(frames: Sequence[Frame]) -> Optional[tuple[float, float]]:
    """Scanners window MR slice by slice, so the volume takes the median."""
    pairs = [frame.window for frame in frames]
    if any(pair is None for pair in pairs):
        return None
    centre, width = np.median(np.array(pairs, dtype=np.float64), axis=0)
    return float(centre), float(width)


def _grey_voxels(stack: Stack) -> np.ndarray:
    """``(I, J, K)`` float32 in the modality's unit; slope and intercept may differ from slice to slice (PET)."""
    array = np.empty(stack.shape, dtype=np.float32, order="F")
    for k, frame, pixels in _decoded(stack):
        array[:, :, k] = (pixels.astype(np.float32) * np.float32(frame.slope) + np.float32(frame.intercept)).T
    return array


def _colour_voxels(stack: Stack) -> np.ndarray:
    """``(I, J, K, 3)`` uint8."""
    array = np.empty((*stack.shape, 3), dtype=np.uint8, order="F")
    for k, _, pixels in _decoded(stack):
        array[:, :, k] = pixels.swapaxes(0, 1)
    return array


def _decoded(stack: Stack) -> Iterator[tuple[int, Frame, np.ndarray]]:
    """Every k with its pixels; each file is decoded once and only one is held."""
    places: dict[Path, list[int]] = {}
    for k, frame in enumerate(stack.frames):
        places.setdefault(frame.path, []).append(k)
    for path, slices in places.items():
        pixels = _pixels(path)
        for k in slices:
            yield k, stack.frames[k], pixels[stack.frames[k].number]


def _pixels(path: Path) -> np.ndarray:
    """``(frames, rows, columns)`` as stored, or ``(frames, rows, columns, 3)`` uint8 RGB."""
    import pydicom
    from pydicom.pixel_data_handlers.util import apply_modality_lut

    dataset = pydicom.dcmread(path)
    kind = dataset.PhotometricInterpretation
    if kind == "RGB" and dataset.file_meta.TransferSyntaxUID in UNMARKED_COLOUR:
        dataset.PhotometricInterpretation = "YBR_FULL"  # as this the decoder hands out what is stored, untransformed
    try:
        pixels = dataset.pixel_array
    except (NotImplementedError, RuntimeError):
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise VolumeError(
            f"Expected pixels this server can decode; received {syntax}."
            " Install its decoder or export the series uncompressed; the file may also be damaged."
        ) from None
    if kind in COLOUR:
        pixels = _rgb(pixels, kind, dataset)
    elif "ModalityLUTSequence" in dataset:
        pixels = apply_modality_lut(pixels, dataset)
    return pixels if int(dataset.get("NumberOfFrames") or 1) > 1 else pixels[None]


def _rgb(pixels: np.ndarray, kind: str, dataset: Any) -> np.ndarray:
    from pydicom.pixel_data_handlers.util import apply_color_lut, convert_color_space

    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        return pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)  # entries of 16 bits
    if pixels.dtype != np.uint8:
        raise VolumeError(
            f"Expected colours of 8 bits; received {pixels.dtype.itemsize * 8}. Export the series with 8 bits."
        )
    if kind in LUMINANCE:
        return convert_color_space(pixels, kind, "RGB")
    return pixels
