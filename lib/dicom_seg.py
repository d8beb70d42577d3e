"""Label maps to DICOM Segmentation objects (SEG) and back, on the grid of the DICOM series they belong to.

Frame: labels are indexed (i, j, k) like :class:`lib.types.Volume`: i along a row, j down the columns, k through the
slices in the order of :func:`lib.data.dicom.frame_order`. Positions are in DICOM's LPS millimetres and copied from the
source, never computed. A file appears under its name only when complete. Thread-safe: no state. Left out: resampling
to another grid, overlapping segments, label-map SEGs, and RTSTRUCT. Patient data goes from the source file to the SEG
and nowhere else.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Optional, Union

import highdicom as hd
import numpy as np
import pydicom
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom.dataset import Dataset
from pydicom.uid import MRImageStorage, SegmentationStorage
from pydicom.valuerep import DSfloat

from lib.codes import PRIVATE, Code, CodeTable, LabelCode
from lib.data.dicom import calibrated_mm, frame_order
from lib.data.readers import check_size, decoding
from lib.dicom_grid import Plane, Series, check_referable, frame_value, located, series_of
from lib.errors import PromptError, VolumeError
from lib.provenance import Kind, Provenance
from lib.types import Index

SOFTWARE = "autosam_label"
FAMILY = Code("123110", "Artificial Intelligence", "DCM")  # PS3.16 CID 7162
TEXT = 64  # characters of DICOM's long strings
# What a SEG shares with the series it belongs to, besides the study's identifier.
INHERITED = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "OtherPatientIDsSequence"),
    *("PatientAge", "PatientSize", "PatientWeight", "PatientIdentityRemoved", "DeidentificationMethod"),
    *("DeidentificationMethodCodeSequence", "StudyDate", "StudyTime", "StudyID", "StudyDescription"),
    *("AccessionNumber", "ReferringPhysicianName", "BodyPartExamined", "Laterality", "LossyImageCompression"),
    *("LossyImageCompressionRatio", "LossyImageCompressionMethod"),
)


class StoredSegments(NamedTuple):
    """What :func:`read_seg` hands back.

    Args:
        labels: ``(I, J, K)`` uint8, or uint16 above 255 segments: 0, or a segment's number.
        names: segment number by name.
        kinds: how the segment was made, by name, where the file says so.
    """

    labels: np.ndarray
    names: dict[str, int]
    kinds: dict[str, Kind]


def write_seg(
    folder: Union[str, Path],
    labels: np.ndarray,
    segments: Mapping[str, int],
    path: Union[str, Path],
    provenance: Provenance,
) -> Path:
    """Writes labels as a binary SEG that refers to the series they were drawn on.

    Every name becomes a segment, also one without voxels; segments count 1, 2, ... in the order of their label values,
    as DICOM demands. Without any voxel the file holds one empty frame for each.

    Args:
        folder: the source series.
        labels: ``(I, J, K)`` whole numbers on its grid; 0 is background.
        segments: label value by name, from 1.
        path: where to.
        provenance: how the labels came about.

    Returns:
        The path.

    Raises:
        VolumeError: for a series that cannot be read or referred to, or labels on another grid.
        PromptError: for labels or names that cannot be stored.
    """
    path = Path(path)
    series = _series(Path(folder))
    check_referable(series)
    numbers = _checked_names(segments)
    pixels = _pixels(labels, numbers, series.shape)
    seg = _build(series, pixels, list(numbers), provenance)
    part = path.with_name(f".{uuid.uuid4().hex}.dcm")
    try:
        seg.save_as(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def read_seg(path: Union[str, Path], folder: Union[str, Path]) -> StoredSegments:
    """Reads a SEG onto the grid of its series, whoever wrote it.

    A frame lies where its position says, also turned or flipped within the plane; without a position, on the slice it
    refers to. Fractional segments count from half of their largest value.

    Args:
        path: a SEG file.
        folder: the series it belongs to.

    Raises:
        VolumeError: for another kind of file, a series that cannot be read, another grid, or overlapping segments.
        CapacityError: for a SEG that does not fit the memory.
    """
    series = _series(Path(folder))
    with decoding("DICOM SEG"):
        seg = pydicom.dcmread(path)
        _check_seg(seg, series)
        names, kinds = _described(seg)
        labels = np.zeros(series.shape, np.uint8 if max(names.values()) < 256 else np.uint16)
        for index, number, mask in _frames(seg):
            column, row = np.nonzero(mask.T)
            if len(row):
                _paint(labels, located(seg, index, np.stack([column, row]), series), number, names)
    return StoredSegments(labels, names, kinds)


def _series(folder: Path) -> Series:
    with decoding("DICOM"):
        order = frame_order(folder)
        paths = dict.fromkeys(path for path, _ in order)
        files = {path: pydicom.dcmread(path, stop_before_pixels=True) for path in paths}
        return series_of([(files[path], frame) for path, frame in order])


def _checked_names(segments: Mapping[str, int]) -> dict[str, int]:
    """Label value by name, in the order of the values."""
    names = {name.strip(): int(number) for name, number in segments.items()}
    bad = [name for name in names if not 0 < len(name) <= TEXT or "\\" in name or not name.isprintable()]
    if not names or bad:
        raise PromptError(
            f"Expected names of 1 to {TEXT} printable characters without backslash; received {bad or 'none'}."
            " Rename the segments."
        )
    if min(names.values()) < 1 or len(set(names.values())) < len(segments):
        raise PromptError(
            f"Expected different names and different label values from 1; received {dict(segments)}. Renumber them."
        )
    return dict(sorted(names.items(), key=lambda item: item[1]))


def _pixels(labels: np.ndarray, numbers: dict[str, int], shape: Index) -> np.ndarray:
    """``(K, rows, columns)`` segment numbers 1, 2, ... in uint8 or uint16."""
    if labels.shape != shape:
        raise VolumeError(
            f"Expected labels on the grid of the series {shape}; received {labels.shape}."
            " Save them with their own image."
        )
    if labels.dtype.kind not in "bui":
        raise PromptError(f"Expected whole numbers as labels; received {labels.dtype}. Round or threshold them first.")
    known = np.array([0, *numbers.values()])
    pixels = np.empty(shape[::-1], np.uint8 if len(known) <= 256 else np.uint16)
    for k in range(shape[2]):
        values = labels[:, :, k].T.astype(np.int64)
        if not np.isin(values, known).all():
            raise PromptError(
                f"Expected label values out of {known.tolist()}; received {np.setdiff1d(values, known).tolist()[:10]}"
                " too. Name every label."
            )
        pixels[k] = np.searchsorted(known, values)
    return pixels


def _build(series: Series, pixels: np.ndarray, names: list[str], provenance: Provenance) -> Dataset:
    stand_ins = _stand_ins(series)
    table = CodeTable.read()
    positions = [hd.PlanePositionSequence("PATIENT", image.ImagePositionPatient) for image in stand_ins]
    found = bool(pixels.any())
    if not found:  # a SEG needs a frame: an empty one for each segment says that it was looked for
        pixels, positions = pixels[:1], positions[:1]
    seg = hd.seg.Segmentation(
        source_images=stand_ins,
        pixel_array=pixels,
        plane_positions=positions,
        omit_empty_frames=found,
        segmentation_type="BINARY",
        segment_descriptions=[_segment(n + 1, name, table.code(name), provenance) for n, name in enumerate(names)],
        series_instance_uid=hd.UID(),
        series_number=1000 + int(series.head.get("SeriesNumber") or 0) % 1000,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer=SOFTWARE,
        manufacturer_model_name=SOFTWARE,
        software_versions=provenance.version or provenance.backbone or "unknown",
        device_serial_number="none",
        content_label="SEGMENTATION",
        content_description=_description(provenance),
        series_description=f"Segmentation {_description(provenance)}"[:TEXT],
        coding_schemes=[CodingSchemeIdentificationItem(PRIVATE, name=f"Names that {SOFTWARE} has no code for")],
    )
    _point_to_sources(seg, series)
    _inherit(seg, series.head)
    if series.positions is None:
        _unplace(seg, calibrated_mm(series.head))
    return seg


def _stand_ins(series: Series) -> list[Dataset]:
    """One single-frame image per plane, for highdicom, which takes neither enhanced files with a place per frame nor
    several ultrasound frames. They name no patient, because highdicom logs what it copies."""
    positions, frame_of_reference = series.positions, series.head.get("FrameOfReferenceUID")
    if positions is None:
        positions, frame_of_reference = np.outer(np.arange(len(series.planes)), (0, 0, 1)), None
    common = {
        **dict.fromkeys(("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID")),
        **dict.fromkeys(("StudyDate", "StudyTime")),
        "SOPClassUID": MRImageStorage,
        "Modality": series.head.get("Modality"),
        **{key: series.head[key].value for key in ("StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns")},
        "FrameOfReferenceUID": frame_of_reference or hd.UID(),
        "ImageOrientationPatient": _decimals(series.orientation),
        "PixelSpacing": _decimals(series.spacing_mm),
        "SliceThickness": _decimals([series.thickness_mm])[0],
    }
    if series.distance_mm:
        common["SpacingBetweenSlices"] = _decimals([series.distance_mm])[0]
    images = []
    for k, position in enumerate(positions):
        image = Dataset()
        for keyword, value in {**common, "SOPInstanceUID": str(k), "ImagePositionPatient": _decimals(position)}.items():
            setattr(image, keyword, value)
        images.append(image)
    return images


def _decimals(values: Iterable[float]) -> list[DSfloat]:
    """In at most the 16 characters that DICOM allows, so values of a file stay what they are."""
    return [DSfloat(float(value), auto_format=True) for value in values]


def _point_to_sources(seg: Dataset, series: Series) -> None:
    """References from the stand-ins to the real files and frames."""
    for item in seg.PerFrameFunctionalGroupsSequence:
        for reference in item.DerivationImageSequence[0].SourceImageSequence:
            plane = series.planes[int(reference.ReferencedSOPInstanceUID)]
            _refer(reference, plane)
            if plane.frame is not None:
                reference.ReferencedFrameNumber = plane.frame
    instances = list({plane.uid: plane for plane in series.planes}.values())
    seg.SourceImageSequence = [_refer(Dataset(), plane) for plane in instances]
    seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence = [_refer(Dataset(), plane) for plane in instances]


def _refer(reference: Dataset, plane: Plane) -> Dataset:
    reference.ReferencedSOPClassUID = plane.sop_class
    reference.ReferencedSOPInstanceUID = plane.uid
    return reference


def _inherit(seg: Dataset, head: Dataset) -> None:
    """Patient and study of the source, read with its character set and written in UTF-8."""
    head.decode()
    seg.SpecificCharacterSet = "ISO_IR 192"
    for keyword in INHERITED:
        if keyword in head and (keyword in seg or head[keyword].VM):  # an optional one may not stand there empty
            seg[keyword] = head[keyword]


def _unplace(seg: Dataset, spacing_mm: Optional[Sequence[float]]) -> None:
    """Takes out the place in space that only the stand-ins had; frames are in order and refer to their sources.

    The size of a pixel stays where an ultrasound region tells it: OHIF ends with a black page without it.
    """
    for keyword in ("FrameOfReferenceUID", "PositionReferenceIndicator"):
        if keyword in seg:
            delattr(seg, keyword)
    shared = seg.SharedFunctionalGroupsSequence[0]
    del shared.PlaneOrientationSequence, shared.PixelMeasuresSequence
    if spacing_mm:
        measures = Dataset()
        measures.PixelSpacing = _decimals(spacing_mm)
        shared.PixelMeasuresSequence = [measures]
    for item in seg.PerFrameFunctionalGroupsSequence:
        content = item.FrameContentSequence[0]
        content.StackID, content.InStackPositionNumber = "1", content.DimensionIndexValues[1]
        del item.PlanePositionSequence
    seg.PatientOrientation = None  # unknown, and asked for where no position tells it
    order = seg.DimensionIndexSequence[1]
    order.DimensionIndexPointer = pydicom.datadict.tag_for_keyword("InStackPositionNumber")
    order.FunctionalGroupPointer = pydicom.datadict.tag_for_keyword("FrameContentSequence")
    order.DimensionDescriptionLabel = "In-Stack Position Number"


def _segment(number: int, name: str, code: LabelCode, provenance: Provenance) -> hd.seg.SegmentDescription:
    segment = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=_coded(code.category),
        segmented_property_type=_coded(code.type),
        algorithm_type=provenance.kind.value,
        algorithm_identification=None if provenance.kind is Kind.MANUAL else _algorithm(provenance),
        tracking_uid=hd.UID(),
        tracking_id=name,
        anatomic_regions=[_coded(code.region)] if code.region else None,
    )
    if code.modifiers:
        modifiers = [_coded(modifier) for modifier in code.modifiers]
        if code.region:
            segment.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = modifiers
        else:
            segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = modifiers
    segment.RecommendedDisplayCIELabValue = list(_colour(number))
    return segment


def _algorithm(provenance: Provenance) -> hd.AlgorithmIdentificationSequence:
    known = provenance.to_json()
    window = provenance.window and f"{provenance.window.lo:g}..{provenance.window.hi:g}"
    parameters = {key: known[key] for key in ("method", "version", "backbone", "weights_id", "prompts", "created")}
    return hd.AlgorithmIdentificationSequence(
        name=f"{SOFTWARE} {provenance.task}".strip()[:TEXT],
        family=_coded(FAMILY),
        version=(provenance.version or provenance.weights_id or "unknown")[:TEXT],
        source=SOFTWARE,
        parameters={
            key: str(value) for key, value in {**parameters, "window": window}.items() if value not in (None, "")
        },
    )


def _description(provenance: Provenance) -> str:
    """Such as ``automatic sam2rad v0003``."""
    return " ".join(t for t in (provenance.kind.value.lower(), provenance.task, provenance.version) if t)[:TEXT]


def _coded(code: Code) -> hd.sr.CodedConcept:
    return hd.sr.CodedConcept(code.value, code.scheme, code.meaning)


def _colour(number: int) -> tuple[int, int, int]:
    """CIELab of a segment as DICOM stores it: the golden angle keeps the hues of neighbours apart."""
    hue = np.deg2rad(137.5 * (number - 1))
    return hd.color.CIELabColor(65.0, 60.0 * float(np.cos(hue)), 60.0 * float(np.sin(hue))).value


def _check_seg(seg: Dataset, series: Series) -> None:
    if seg.get("SOPClassUID") != SegmentationStorage or seg.get("SegmentationType") not in ("BINARY", "FRACTIONAL"):
        raise VolumeError(
            "Expected a DICOM Segmentation, binary or fractional; received another kind of object. Export it as one."
        )
    theirs, ours = seg.get("FrameOfReferenceUID"), series.head.get("FrameOfReferenceUID")
    if theirs and ours and series.positions is not None and theirs != ours:
        raise VolumeError(
            "Expected a segmentation in the frame of reference of its series; received another one."
            " Choose the series it was drawn on."
        )
    check_size((int(seg.Columns), int(seg.Rows), int(seg.get("NumberOfFrames") or 1)))


def _described(seg: Dataset) -> tuple[dict[str, int], dict[str, Kind]]:
    """Names made different where a file uses one twice, and how the segments were made."""
    names: dict[str, int] = {}
    kinds: dict[str, Kind] = {}
    for segment in seg.SegmentSequence:
        number = int(segment.SegmentNumber)
        name = str(segment.get("SegmentLabel") or f"Segment {number}")
        name = f"{name} ({number})" if name in names else name
        names[name] = number
        kind = segment.get("SegmentAlgorithmType")
        if kind in Kind.__members__:
            kinds[name] = Kind(kind)
    return names, kinds


def _frames(seg: Dataset) -> Iterator[tuple[int, int, np.ndarray]]:
    """Index, segment number and ``(rows, columns)`` bool of every frame."""
    frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    half = int(seg.MaximumFractionalValue) / 2 if seg.SegmentationType == "FRACTIONAL" else 1
    for index, frame in enumerate(frames):
        number = frame_value(seg, index, "SegmentIdentificationSequence", "ReferencedSegmentNumber")
        yield index, int(number), frame >= half


def _paint(labels: np.ndarray, voxels: np.ndarray, number: int, names: dict[str, int]) -> None:
    there = labels[tuple(voxels)]
    others = set(there[(there != 0) & (there != number)].tolist())
    if others:
        both = sorted(name for name, n in names.items() if n in others | {number})
        raise VolumeError(
            f"Expected segments that do not overlap, as a label map cannot hold both; received {both}."
            " Separate them where they were drawn."
        )
    labels[tuple(voxels)] = number
