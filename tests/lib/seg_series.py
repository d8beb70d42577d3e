"""Source series by formula for the tests of DICOM SEG, labels on their grid, and what a SEG says about them.

Instances are named out of order and no size repeats, so that no order is right by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    UltrasoundMultiFrameImageStorage,
    generate_uid,
)

from lib.provenance import Provenance

SHAPE = (23, 19, 7)  # all different, and no frame ends on a whole byte of bits
ORDER = (3, 0, 6, 1, 5, 2, 4)  # places along k as files and frames count them
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
OBLIQUE = (0.96, 0.28, 0.0, 0.0, 0.0, -1.0)
SPACING, THICKNESS, STEP = (0.7, 0.9), 3.0, 2.5
NAMES = {"liver": 1, "Left kidney": 2, "growth of my own": 3}
AUTOMATIC = Provenance.answered(prompts=0, task="sam2rad", method="sam2rad", version="v0003", backbone="compact")


def _dataset(sop_class: str, modality: str, frames: int, tags: dict[str, Any]) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.is_little_endian, dataset.is_implicit_VR = True, False
    values = {
        "SpecificCharacterSet": "ISO_IR 100", "SOPClassUID": sop_class, "Modality": modality, "PatientID": "p1",
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID, "PatientName": "Müller^Änne", "PatientSex": "F",
        "StudyInstanceUID": "1.2.3.4", "SeriesInstanceUID": "1.2.3.4.5", "SeriesNumber": 7, "StudyDate": "20250102",
        "FrameOfReferenceUID": "1.2.3.4.6", "Rows": SHAPE[1], "Columns": SHAPE[0], "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15,
        "PixelRepresentation": 0,
    }  # fmt: skip
    for keyword, value in {**values, **tags}.items():
        setattr(dataset, keyword, value)
    if frames > 1:
        dataset.NumberOfFrames = frames
    noise = np.random.default_rng(1).integers(0, 900, (frames, SHAPE[1], SHAPE[0]))
    dataset.PixelData = noise.astype("<u2").tobytes()
    return dataset


def positions_of(orientation: Sequence[float]) -> list[list[float]]:
    """Of the slices in k order, LPS mm."""
    normal = np.cross(orientation[:3], orientation[3:])
    return [
        [round(float(v), 6) for v in np.array([-31.5, 17.25, 101.125]) + STEP * k * normal] for k in range(SHAPE[2])
    ]


def _items(**values: Any) -> list[Dataset]:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return [item]


def classic(folder: Path, sop_class: str, modality: str, orientation: Sequence[float], **tags: Any) -> Path:
    """One file for each slice, named out of order."""
    folder.mkdir()
    plane = {"PixelSpacing": list(SPACING), "SliceThickness": THICKNESS, "ImageOrientationPatient": list(orientation)}
    for file, k in enumerate(ORDER):
        own = {"ImagePositionPatient": positions_of(orientation)[k], "InstanceNumber": SHAPE[2] - k}
        own |= {keyword: value(k) if callable(value) else value for keyword, value in tags.items()}
        _dataset(sop_class, modality, 1, {**plane, **own}).save_as(folder / f"{file}.dcm")
    return folder


def enhanced(folder: Path, *, shared: bool) -> Path:
    """One file, frames out of order; spacing and orientation shared by all or with each of them."""
    folder.mkdir()
    groups = {
        "PixelMeasuresSequence": _items(PixelSpacing=list(SPACING), SliceThickness=THICKNESS),
        "PlaneOrientationSequence": _items(ImageOrientationPatient=list(OBLIQUE)),
    }
    frames = []
    for k in ORDER:
        position = _items(ImagePositionPatient=positions_of(OBLIQUE)[k])
        frames += _items(PlanePositionSequence=position, **({} if shared else groups))
    tags = {
        "SharedFunctionalGroupsSequence": _items(**(groups if shared else {})),
        "PerFrameFunctionalGroupsSequence": frames,
    }
    _dataset(EnhancedMRImageStorage, "MR", SHAPE[2], tags).save_as(folder / "enhanced.dcm")
    return folder


def cine(folder: Path, **tags: Any) -> Path:
    """Ultrasound: several frames without a place in space."""
    folder.mkdir()
    dataset = _dataset(UltrasoundMultiFrameImageStorage, "US", SHAPE[2], tags)
    del dataset.FrameOfReferenceUID
    dataset.save_as(folder / "cine.dcm")
    return folder


SOURCES = {
    "ct": lambda folder: classic(folder, CTImageStorage, "CT", AXIAL),
    "oblique mr": lambda folder: classic(folder, MRImageStorage, "MR", OBLIQUE),
    "enhanced mr": lambda folder: enhanced(folder, shared=True),
    "enhanced per frame": lambda folder: enhanced(folder, shared=False),
    "ultrasound": cine,
}
REAL = ("Study1/13_HCropVolume", "Study2/14_HCropVolume", "Study2/14-T1post-22014")  # below the real data's dicom
PLACED = [name for name in SOURCES if name != "ultrasound"]


def drawn(seed: int = 0, values: Sequence[int] = (1, 2, 3)) -> np.ndarray:
    """``(I, J, K)`` uint8: asymmetric blobs, none of them on the first slice, the last on one slice only."""
    labels = np.zeros(SHAPE, np.uint8)
    rng = np.random.default_rng(seed)
    for n, value in enumerate(values):
        block = (slice(2 + 6 * n, 8 + 6 * n), slice(1 + n, 9 + 2 * n), slice(2 + n, 6 if n < 2 else 5))
        labels[block] = value * (rng.random(labels[block].shape) < 0.7)
    return labels


def mask_of(seg: Dataset, segment: int, path_order: list[tuple[str, Optional[int]]]) -> np.ndarray:
    """One segment as bool ``(I, J, K)``, by pydicom and the references alone."""
    found = np.zeros(SHAPE, bool)
    frames = seg.pixel_array.reshape(-1, SHAPE[1], SHAPE[0])
    for frame, groups in zip(frames, seg.PerFrameFunctionalGroupsSequence):
        if groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber == segment:
            source = groups.DerivationImageSequence[0].SourceImageSequence[0]
            k = path_order.index((source.ReferencedSOPInstanceUID, source.get("ReferencedFrameNumber")))
            found[:, :, k] = frame.T > 0
    return found


def order_of(folder: Path) -> list[tuple[str, Optional[int]]]:
    """For every k the instance, and the frame from 1 in a file of several; from the constants, not our reader."""
    files = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(folder.iterdir())]
    if len(files) > 1:
        return [(files[ORDER.index(k)].SOPInstanceUID, None) for k in range(SHAPE[2])]
    places = range(SHAPE[2]) if files[0].Modality == "US" else ORDER
    return [(files[0].SOPInstanceUID, list(places).index(k) + 1) for k in range(SHAPE[2])]


def edited(path: Path, change: Any) -> Path:
    """A file whose dataset was changed by a function."""
    seg = pydicom.dcmread(path)
    change(seg)
    seg.save_as(path)
    return path


def measures(seg: Dataset) -> Any:
    """The shared pixel measures of a SEG."""
    return seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
