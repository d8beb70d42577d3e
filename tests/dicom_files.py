"""DICOM files by formula for the reader's tests: classic series, enhanced objects, cine and colour.

Patient tags are filled in everywhere, so that a message that quotes one is caught. Pictures for whole runs through a
PACS are in ``tests.pacs``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    UltrasoundMultiFrameImageStorage,
    generate_uid,
)

from lib.data.dicom import frame_order

ROW, COLUMN = np.array([0.96, 0.28, 0.0]), np.array([-0.28 * 0.8, 0.96 * 0.8, 0.6])
NORMAL = np.cross(ROW, COLUMN)
ORIGIN, STEP, PIXEL_MM = np.array([-10.5, 20.25, 30.75]), 2.5, (0.5, 0.75)  # distance of rows, then of columns
STORED = np.random.default_rng(0).integers(0, 1000, (6, 32, 40)).astype(np.uint16)  # (k, row, column)
LPS = np.column_stack([ROW * PIXEL_MM[1], COLUMN * PIXEL_MM[0], NORMAL * STEP, ORIGIN])
RAS = LPS * [[-1], [-1], [1]]  # (3, 4)


def placed_files(folder: Path) -> list[Path]:
    """The files of a series, sorted along k; one for an enhanced object."""
    return list(dict.fromkeys(path for path, _ in frame_order(folder)))


def image(pixels: np.ndarray, sop_class: str, colour: str = "MONOCHROME2", **tags: Any) -> FileDataset:
    """One object without a place; pixels ``(rows, columns)``, ``(frames, rows, columns)`` or either with 3 colours."""
    samples = 3 if pixels.shape[-1] == 3 else 1
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    found.is_little_endian, found.is_implicit_VR = True, False
    size = pixels.shape[:-1] if samples == 3 else pixels.shape
    bits = pixels.dtype.itemsize * 8
    own: dict[str, Any] = {
        "SOPClassUID": sop_class, "SOPInstanceUID": meta.MediaStorageSOPInstanceUID, "PatientName": "DOE^JOHN",
        "PatientID": "1234", "StudyInstanceUID": generate_uid(), "Rows": size[-2], "Columns": size[-1],
        "SamplesPerPixel": samples, "PhotometricInterpretation": colour, "BitsAllocated": bits, "BitsStored": bits,
        "HighBit": bits - 1, "PixelRepresentation": 0, "SeriesInstanceUID": generate_uid(),
    }  # fmt: skip
    if samples == 3:
        own["PlanarConfiguration"] = 0
    if len(size) == 3:
        own["NumberOfFrames"] = size[0]
    for name, value in {**own, **tags}.items():
        if value is not None:
            setattr(found, name, value)
        elif name in found:
            delattr(found, name)
    found.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    return found


def place(position: np.ndarray) -> dict[str, Any]:
    """Tags of a slice in space."""
    return {
        "PixelSpacing": list(PIXEL_MM),
        "SliceThickness": 2.0,
        "ImageOrientationPatient": [round(float(v), 6) for v in (*ROW, *COLUMN)],
        "ImagePositionPatient": [round(float(v), 6) for v in position],
    }


def series(
    count: int = 6, step: np.ndarray = NORMAL * STEP, pixels: np.ndarray = STORED, **tags: Any
) -> list[FileDataset]:
    """Slices in k order; a callable tag gets the slice's number, None removes it."""
    own: dict[str, Any] = {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -100}
    own |= {"SeriesInstanceUID": generate_uid(), **tags}
    return [
        image(
            pixels[k], CTImageStorage,
            **{n: v(k) if callable(v) else v for n, v in {**place(ORIGIN + k * step), **own}.items()},
        )
        for k in range(count)
    ]  # fmt: skip


def enhanced(order: Sequence[int], change: Optional[Callable[[Dataset, int], None]] = None, **tags: Any) -> FileDataset:
    """An Enhanced MR object whose frames are the slices ``order``, with its groups as the standard has them.

    Args:
        order: k of each frame.
        change: called with each frame's groups and the frame's k.
        tags: of the object.
    """
    shared, measures, plane = Dataset(), Dataset(), Dataset()
    where = place(ORIGIN)
    measures.PixelSpacing, measures.SliceThickness = where["PixelSpacing"], 2.0
    plane.ImageOrientationPatient = where["ImageOrientationPatient"]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Items([measures]), Items([plane])
    frames = [_frame_groups(k) for k in order]
    for frame, k in zip(frames, order):
        if change is not None:
            change(frame, k)
    own: dict[str, Any] = {"Modality": "MR", "SharedFunctionalGroupsSequence": Items([shared])}
    own["PerFrameFunctionalGroupsSequence"] = Items(frames)
    return image(STORED[list(order)], EnhancedMRImageStorage, **{**own, **tags})


def _frame_groups(k: int) -> Dataset:
    groups, content, position, scale, window = (Dataset() for _ in range(5))
    content.StackID, content.InStackPositionNumber = "1", k + 1
    position.ImagePositionPatient = place(ORIGIN + k * STEP * NORMAL)["ImagePositionPatient"]
    scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = k + 1, -10 * k, "US"
    window.WindowCenter, window.WindowWidth = [500 + k, 40], [1000, 80]
    groups.FrameContentSequence, groups.PlanePositionSequence = Items([content]), Items([position])
    groups.PixelValueTransformationSequence, groups.FrameVOILUTSequence = Items([scale]), Items([window])
    return groups


def cine(pixels: np.ndarray, colour: str = "MONOCHROME2", **tags: Any) -> FileDataset:
    """A multi-frame ultrasound without a place."""
    return image(pixels, UltrasoundMultiFrameImageStorage, colour, **{"Modality": "US", **tags})


def region(millimetres: tuple[float, float], corner: tuple[int, int], unit: int = 3) -> Dataset:
    """An ultrasound region from the picture's origin; distances of rows and columns."""
    found = Dataset()
    found.RegionSpatialFormat, found.RegionDataType, found.RegionFlags = 1, 1, 0
    found.PhysicalUnitsXDirection = found.PhysicalUnitsYDirection = unit
    found.PhysicalDeltaY, found.PhysicalDeltaX = (mm / 10 for mm in millimetres)
    found.RegionLocationMinX0 = found.RegionLocationMinY0 = 0
    found.RegionLocationMaxX1, found.RegionLocationMaxY1 = corner
    return found


def compressed(
    dataset: FileDataset, streams: Sequence[bytes], syntax: str, colour: Optional[str] = None
) -> FileDataset:
    """The same object with encoded frames."""
    dataset.PixelData = encapsulate(list(streams))
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax
    if colour:
        dataset.PhotometricInterpretation = colour
    return dataset


def save(folder: Path, datasets: Sequence[FileDataset]) -> Path:
    """Written with names that say nothing about the order."""
    folder.mkdir(exist_ok=True)
    for number, dataset in enumerate(datasets):
        dataset.save_as(folder / f"{(number * 5) % 7}_{number}", write_like_original=False)
    return folder
