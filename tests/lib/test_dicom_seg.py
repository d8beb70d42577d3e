"""Label maps to DICOM SEG and back: generated series, read with pydicom, highdicom, dcmqi, and checked by dciodvfy."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    UltrasoundMultiFrameImageStorage,
    generate_uid,
)

from lib.data.volume import load_volume
from lib.dicom_seg import read_seg, write_seg
from lib.errors import PromptError, VolumeError
from lib.provenance import Kind, Provenance
from lib.types import Window

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


def _positions(orientation: Sequence[float]) -> list[list[float]]:
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
        own = {"ImagePositionPatient": _positions(orientation)[k], "InstanceNumber": SHAPE[2] - k}
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
        position = _items(ImagePositionPatient=_positions(OBLIQUE)[k])
        frames += _items(PlanePositionSequence=position, **({} if shared else groups))
    tags = {
        "SharedFunctionalGroupsSequence": _items(**(groups if shared else {})),
        "PerFrameFunctionalGroupsSequence": frames,
    }
    _dataset(EnhancedMRImageStorage, "MR", SHAPE[2], tags).save_as(folder / "enhanced.dcm")
    return folder


def cine(folder: Path) -> Path:
    """Ultrasound: several frames without a place in space."""
    folder.mkdir()
    dataset = _dataset(UltrasoundMultiFrameImageStorage, "US", SHAPE[2], {})
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


@pytest.mark.parametrize("source", SOURCES)
def test_labels_come_back_voxel_equal_by_pydicom_and_by_our_reader(tmp_path, source):
    folder, labels = SOURCES[source](tmp_path / "series"), drawn()
    assert load_volume(folder).shape == SHAPE
    path = write_seg(folder, labels, NAMES, tmp_path / "seg.dcm", AUTOMATIC)
    seg, order = pydicom.dcmread(path), order_of(folder)
    for number in NAMES.values():
        np.testing.assert_array_equal(mask_of(seg, number, order), labels == number)
    found = read_seg(path, folder)
    np.testing.assert_array_equal(found.labels, labels)
    assert found.labels.dtype == np.uint8
    assert found.names == NAMES
    assert found.kinds == dict.fromkeys(NAMES, Kind.AUTOMATIC)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("source", SOURCES)
def test_highdicom_reads_the_labels_without_being_told_to_ignore_places(tmp_path, source):
    folder, labels = SOURCES[source](tmp_path / "series"), drawn()
    seg = hd.seg.segread(write_seg(folder, labels, NAMES, tmp_path / "seg.dcm", AUTOMATIC))
    order = order_of(folder)
    if order[0][1] is None:
        pixels = seg.get_pixels_by_source_instance([uid for uid, _ in order], combine_segments=True)
    else:
        frames = [frame for _, frame in order]
        pixels = seg.get_pixels_by_source_frame(
            order[0][0], frames, combine_segments=True, assert_missing_frames_are_empty=True
        )
    np.testing.assert_array_equal(pixels.transpose(2, 1, 0), labels)


@pytest.mark.parametrize("source", PLACED)
def test_frames_lie_where_the_slices_lie(tmp_path, source):
    folder = SOURCES[source](tmp_path / "series")
    seg = pydicom.dcmread(write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC))
    orientation = AXIAL if source == "ct" else OBLIQUE
    shared, order = seg.SharedFunctionalGroupsSequence[0], order_of(folder)
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == list(orientation)
    measures = shared.PixelMeasuresSequence[0]
    assert (measures.PixelSpacing, measures.SliceThickness) == (list(SPACING), THICKNESS)
    assert measures.SpacingBetweenSlices == pytest.approx(STEP, abs=1e-6)
    for groups in seg.PerFrameFunctionalGroupsSequence:
        source_image = groups.DerivationImageSequence[0].SourceImageSequence[0]
        k = order.index((source_image.ReferencedSOPInstanceUID, source_image.get("ReferencedFrameNumber")))
        assert groups.PlanePositionSequence[0].ImagePositionPatient == _positions(orientation)[k]
    assert seg.FrameOfReferenceUID == "1.2.3.4.6"


def test_every_source_instance_is_referenced_once(tmp_path):
    for name in ("ct", "enhanced mr"):
        folder = SOURCES[name](tmp_path / name)
        seg = pydicom.dcmread(write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC))
        wanted = {(f.SOPClassUID, f.SOPInstanceUID) for f in map(pydicom.dcmread, folder.iterdir())}
        for items in (seg.SourceImageSequence, seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence):
            found = [(i.ReferencedSOPClassUID, i.ReferencedSOPInstanceUID) for i in items]
            assert set(found) == wanted
            assert len(found) == len(wanted)
        assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == "1.2.3.4.5"


def test_ultrasound_gets_no_invented_place_in_space(tmp_path):
    seg = pydicom.dcmread(write_seg(cine(tmp_path / "series"), drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC))
    for keyword in ("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        assert keyword not in str(seg.to_json_dict()) and not [e for e in seg.iterall() if e.keyword == keyword]


def test_head_says_what_made_it_and_inherits_the_study(tmp_path):
    provenance = Provenance.answered(
        prompts=4, task="sam2rad_edit", version="v0012", weights_id="abc", window=Window(-160, 240)
    )
    folder = SOURCES["ct"](tmp_path / "series")
    seg = pydicom.dcmread(write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", provenance))
    assert str(seg.PatientName) == "Müller^Änne"
    assert (seg.PatientID, seg.PatientSex, seg.StudyInstanceUID, seg.StudyDate) == ("p1", "F", "1.2.3.4", "20250102")
    assert seg.SeriesInstanceUID != "1.2.3.4.5" and seg.Modality == "SEG" and seg.SegmentationType == "BINARY"
    assert seg.SpecificCharacterSet == "ISO_IR 192"
    assert seg.SeriesDescription == "Segmentation semiautomatic sam2rad_edit v0012"
    assert (seg.Manufacturer, seg.ManufacturerModelName, seg.SoftwareVersions) == (
        "autosam_label",
        "autosam_label",
        "v0012",
    )
    segment = seg.SegmentSequence[0]
    assert (segment.SegmentAlgorithmType, segment.SegmentAlgorithmName) == (
        "SEMIAUTOMATIC",
        "autosam_label sam2rad_edit",
    )
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("autosam_label sam2rad_edit", "v0012")
    family = codes.cid7162.ArtificialIntelligence
    assert _code(algorithm.AlgorithmFamilyCodeSequence) == (family.value, family.scheme_designator, family.meaning)
    assert "prompts=4" in algorithm.AlgorithmParameters and "window=-160..240" in algorithm.AlgorithmParameters
    assert len({tuple(s.RecommendedDisplayCIELabValue) for s in seg.SegmentSequence}) == 3
    assert len({s.TrackingUID for s in seg.SegmentSequence}) == 3


@pytest.mark.parametrize(
    "kind, prompts, has_algorithm", [(Kind.AUTOMATIC, 0, True), (Kind.SEMIAUTOMATIC, 2, True), (Kind.MANUAL, 0, False)]
)
def test_kind_decides_whether_an_algorithm_is_named(tmp_path, kind, prompts, has_algorithm):
    folder = SOURCES["ct"](tmp_path / "series")
    provenance = Provenance(kind=kind, prompts=prompts, task="sam")
    path = write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", provenance)
    for segment in pydicom.dcmread(path).SegmentSequence:
        assert segment.SegmentAlgorithmType == kind.value
        assert ("SegmentAlgorithmName" in segment) is has_algorithm
        assert ("SegmentationAlgorithmIdentificationSequence" in segment) is has_algorithm
    assert read_seg(path, folder).kinds == dict.fromkeys(NAMES, kind)


def test_codes_reach_the_segments(tmp_path):
    names = {"Left kidney": 1, "liver tumor": 2, "growth of my own": 3}
    seg = pydicom.dcmread(
        write_seg(SOURCES["ct"](tmp_path / "series"), drawn(), names, tmp_path / "seg.dcm", AUTOMATIC)
    )
    kidney, tumor, own = seg.SegmentSequence
    assert _code(kidney.SegmentedPropertyCategoryCodeSequence) == ("123037004", "SCT", "Anatomical Structure")
    assert _code(kidney.SegmentedPropertyTypeCodeSequence) == ("64033007", "SCT", "Kidney")
    modifiers = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence
    assert _code(modifiers) == ("7771000", "SCT", "Left")
    assert _code(tumor.SegmentedPropertyTypeCodeSequence) == ("108369006", "SCT", "Neoplasm")
    assert _code(tumor.AnatomicRegionSequence) == ("10200004", "SCT", "Liver")
    assert _code(own.SegmentedPropertyTypeCodeSequence)[1:] == ("99AUTOSAM", "growth of my own")
    assert _code(own.SegmentedPropertyCategoryCodeSequence)[1:] == ("99AUTOSAM", "Not coded")
    assert [s.CodingSchemeDesignator for s in seg.CodingSchemeIdentificationSequence] == ["99AUTOSAM"]


def _code(sequence: Any) -> tuple[str, str, str]:
    return sequence[0].CodeValue, sequence[0].CodingSchemeDesignator, sequence[0].CodeMeaning


@pytest.mark.parametrize("source", SOURCES)
def test_absent_label_is_still_a_segment(tmp_path, source):
    folder, labels = SOURCES[source](tmp_path / "series"), drawn(values=(1, 3))
    found = read_seg(write_seg(folder, labels, NAMES, tmp_path / "seg.dcm", AUTOMATIC), folder)
    assert found.names == NAMES
    np.testing.assert_array_equal(found.labels, labels)


@pytest.mark.parametrize("source", SOURCES)
def test_empty_mask_is_stored_as_one_empty_frame_per_segment(tmp_path, source):
    folder = SOURCES[source](tmp_path / "series")
    path = write_seg(folder, np.zeros(SHAPE, np.uint8), NAMES, tmp_path / "seg.dcm", AUTOMATIC)
    seg = pydicom.dcmread(path)
    assert (seg.NumberOfFrames, seg.pixel_array.max()) == (3, 0)
    found = read_seg(path, folder)
    assert found.names == NAMES and not found.labels.any()


def test_segments_count_from_one_in_the_order_of_the_label_values(tmp_path):
    folder, labels = SOURCES["ct"](tmp_path / "series"), drawn(values=(9, 4, 250)).astype(np.int64)
    found = read_seg(
        write_seg(folder, labels, {"liver": 9, "spleen": 4, "lv": 250}, tmp_path / "seg.dcm", AUTOMATIC), folder
    )
    assert found.names == {"spleen": 1, "liver": 2, "lv": 3}
    for name, value in (("spleen", 4), ("liver", 9), ("lv", 250)):
        np.testing.assert_array_equal(found.labels == found.names[name], labels == value)


@pytest.mark.parametrize("name", ["Größe", "肝臓", "τμήμα 1", "a" * 64, "two words", "x&y <z>"])
def test_names_come_back_as_they_were(tmp_path, name):
    folder = SOURCES["ct"](tmp_path / "series")
    path = write_seg(folder, drawn(values=(1,)), {name: 1}, tmp_path / "seg.dcm", AUTOMATIC)
    assert read_seg(path, folder).names == {name: 1}
    assert hd.seg.segread(path).get_segment_description(1).segment_label == name


def test_three_hundred_segments_need_more_than_a_byte(tmp_path):
    folder = SOURCES["ct"](tmp_path / "series")
    labels = (np.arange(np.prod(SHAPE)) % 301).reshape(SHAPE).astype(np.uint16)
    labels[:, :, 1:] = 0
    names = {f"cell {n}": n for n in range(1, 301)}
    found = read_seg(write_seg(folder, labels, names, tmp_path / "seg.dcm", AUTOMATIC), folder)
    assert found.labels.dtype == np.uint16
    np.testing.assert_array_equal(found.labels, labels)


@pytest.mark.parametrize(
    "labels, names, error, text",
    [
        (
            np.zeros((19, 23, 7), np.uint8),
            NAMES,
            VolumeError,
            r"grid of the series \(23, 19, 7\); received \(19, 23, 7\)",
        ),
        (np.zeros((23, 19), np.uint8), NAMES, VolumeError, r"received \(23, 19\)"),
        (np.zeros(SHAPE, np.float32), NAMES, PromptError, "whole numbers as labels; received float32"),
        (np.full(SHAPE, 4, np.uint8), NAMES, PromptError, r"out of \[0, 1, 2, 3\]; received \[4\]"),
        (np.full(SHAPE, -1, np.int16), NAMES, PromptError, r"received \[-1\]"),
        (drawn(), {}, PromptError, "received none"),
        (drawn(), {"a" * 65: 1}, PromptError, "1 to 64 printable characters"),
        (drawn(), {" ": 1}, PromptError, "1 to 64 printable characters"),
        (drawn(), {"left\\right": 1}, PromptError, "without backslash"),
        (drawn(), {"a": 1, "b": 1}, PromptError, "different label values"),
        (drawn(), {"a": 1, "a ": 2}, PromptError, "different names"),
        (drawn(), {"a": 0}, PromptError, "label values from 1"),
    ],
)
def test_labels_that_cannot_be_stored_are_refused_and_leave_no_file(tmp_path, labels, names, error, text):
    folder = SOURCES["ct"](tmp_path / "series")
    with pytest.raises(error, match=text):
        write_seg(folder, labels, names, tmp_path / "seg.dcm", AUTOMATIC)
    assert [p.name for p in tmp_path.iterdir()] == ["series"]


@pytest.mark.parametrize(
    "charset, name",
    [
        ("ISO_IR 192", "Müller^Änne"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("ISO_IR 144", "Люкceмбypг^A"),
    ],
)
def test_patient_name_in_any_character_set_is_written_in_utf_8(tmp_path, charset, name):
    folder = classic(tmp_path / "series", CTImageStorage, "CT", AXIAL, SpecificCharacterSet=charset, PatientName=name)
    seg = pydicom.dcmread(write_seg(folder, drawn(), {"肝臓": 1, "b": 2, "c": 3}, tmp_path / "seg.dcm", AUTOMATIC))
    assert (str(seg.PatientName), seg.SegmentSequence[0].SegmentLabel) == (name, "肝臓")


def test_lossy_source_makes_a_seg_that_says_so(tmp_path):
    lossy = {
        "LossyImageCompression": "01",
        "LossyImageCompressionRatio": 8.5,
        "LossyImageCompressionMethod": "ISO_10918_1",
    }
    folder = classic(tmp_path / "series", CTImageStorage, "CT", AXIAL, **lossy)
    seg = pydicom.dcmread(write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC))
    assert {keyword: seg[keyword].value for keyword in lossy} == lossy


def test_series_of_one_slice(tmp_path):
    folder, labels = SOURCES["oblique mr"](tmp_path / "series"), drawn()[:, :, 3:4]
    for path in folder.iterdir():
        if path.name != f"{ORDER.index(3)}.dcm":
            path.unlink()
    path = write_seg(folder, labels, NAMES, tmp_path / "seg.dcm", AUTOMATIC)
    np.testing.assert_array_equal(read_seg(path, folder).labels, labels)
    assert "SpacingBetweenSlices" not in _measures(pydicom.dcmread(path))


def test_bare_source_without_patient_tags_is_enough(tmp_path):
    folder = SOURCES["ct"](tmp_path / "series")
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        for keyword in ("PatientID", "PatientName", "PatientSex", "StudyDate", "SeriesNumber", "SliceThickness"):
            del dataset[keyword]
        dataset.save_as(path)
    seg = pydicom.dcmread(write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC))
    assert not seg.PatientID and not seg.PatientName


def test_nothing_of_the_patient_is_logged(tmp_path, caplog, capfd):
    caplog.set_level("DEBUG")
    folder = classic(tmp_path / "series", CTImageStorage, "CT", AXIAL, PatientName="Odd Name", PatientID="secret-7")
    path = write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC)
    read_seg(path, folder)
    out, err = capfd.readouterr()
    uids = [f.SOPInstanceUID for f in map(pydicom.dcmread, folder.iterdir())]
    for secret in ("Odd Name", "secret-7", "1.2.3.4", *uids):
        assert secret not in caplog.text + out + err


def _edited(path: Path, change: Any) -> Path:
    seg = pydicom.dcmread(path)
    change(seg)
    seg.save_as(path)
    return path


def _set(item: Any, keyword: str, value: Any) -> None:
    setattr(item, keyword, value)


def _measures(seg: Dataset) -> Any:
    return seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]


def _shift(seg: Dataset, by: Sequence[float]) -> None:
    for groups in seg.PerFrameFunctionalGroupsSequence:
        place = groups.PlanePositionSequence[0]
        place.ImagePositionPatient = [float(a) + b for a, b in zip(place.ImagePositionPatient, by)]


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda seg: _shift(seg, (0.45, 0, 0)), "another position, spacing or orientation"),
        (lambda seg: _shift(seg, (0, 0, 1.0)), "another position, spacing or orientation"),
        (lambda seg: _shift(seg, (9.0, 0, 0)), "voxels outside of it"),
        (lambda seg: _shift(seg, (0, 0, 25.0)), "voxels outside of it|another position"),
        (lambda seg: _set(_measures(seg), "PixelSpacing", [1.4, 1.8]), "another position, spacing or orientation"),
        (lambda seg: _set(_measures(seg), "PixelSpacing", [0.71, 0.9]), "another position, spacing or orientation"),
        (
            lambda seg: _set(
                seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0],
                "ImageOrientationPatient",
                [0, 1, 0, 0, 0, -1],
            ),
            "another position, spacing or orientation",
        ),
        (lambda seg: _set(seg, "FrameOfReferenceUID", "1.9"), "frame of reference"),
        (lambda seg: _set(seg, "SegmentationType", "LABELMAP"), "received another kind of object"),
        (lambda seg: _set(seg, "SOPClassUID", CTImageStorage), "received another kind of object"),
    ],
)
def test_seg_that_does_not_belong_to_the_series_is_refused(tmp_path, change, text):
    folder = SOURCES["ct"](tmp_path / "series")
    path = _edited(write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC), change)
    with pytest.raises(VolumeError, match=text):
        read_seg(path, folder)


def test_seg_of_a_shifted_copy_lands_on_whole_voxels_inside(tmp_path):
    folder, labels = SOURCES["ct"](tmp_path / "series"), drawn()
    path = _edited(
        write_seg(folder, labels, NAMES, tmp_path / "seg.dcm", AUTOMATIC), lambda seg: _shift(seg, (0.9, -0.7, 2.5))
    )
    np.testing.assert_array_equal(read_seg(path, folder).labels, np.roll(labels, (1, -1, 1), (0, 1, 2)))


def test_flipped_and_turned_frames_are_put_right(tmp_path):
    """A writer may store the same plane with its axes swapped and one of them reversed."""
    folder, labels = SOURCES["oblique mr"](tmp_path / "series"), drawn()
    path = write_seg(folder, labels, NAMES, tmp_path / "seg.dcm", AUTOMATIC)

    def turn(seg: Dataset) -> None:
        row, column = np.array(OBLIQUE).reshape(2, 3)
        frames = seg.pixel_array[:, :, ::-1].transpose(0, 2, 1)  # new rows: i reversed; new columns: j
        seg.Rows, seg.Columns = SHAPE[0], SHAPE[1]
        seg.PixelData = hd.seg.sop.pack_bits(np.ascontiguousarray(frames).ravel())
        seg.PixelData += b"\0" * (len(seg.PixelData) % 2)
        shared = seg.SharedFunctionalGroupsSequence[0]
        shared.PlaneOrientationSequence[0].ImageOrientationPatient = [*column, *-row]
        shared.PixelMeasuresSequence[0].PixelSpacing = list(SPACING[::-1])
        _shift(seg, (row * SPACING[1] * (SHAPE[0] - 1)).tolist())

    np.testing.assert_array_equal(read_seg(_edited(path, turn), folder).labels, labels)


@pytest.mark.parametrize("is_even", [False, True], ids=["as the slices lie", "on the even grid of the volume"])
def test_slices_may_lie_a_little_unevenly(tmp_path, is_even):
    uneven = np.cumsum([0, 2.36, 2.36, 2.36, 2.64, 2.64, 2.64])  # the middle is 0.17 slices off the even grid
    folder, labels = tmp_path / "series", drawn()
    classic(folder, CTImageStorage, "CT", AXIAL, ImagePositionPatient=lambda k: [1.5, 2.5, float(uneven[k])])
    path = write_seg(folder, labels, NAMES, tmp_path / "seg.dcm", AUTOMATIC)

    def straighten(seg: Dataset) -> None:
        for groups in seg.PerFrameFunctionalGroupsSequence:
            place = groups.PlanePositionSequence[0]
            k = int(np.abs(uneven - float(place.ImagePositionPatient[2])).argmin())
            place.ImagePositionPatient = [1.5, 2.5, 2.5 * k]

    np.testing.assert_array_equal(read_seg(_edited(path, straighten) if is_even else path, folder).labels, labels)


def test_overlapping_segments_are_named(tmp_path):
    folder = SOURCES["ct"](tmp_path / "series")

    def relabel(seg: Dataset) -> None:  # the kidney's first frame becomes a copy of the liver's on its slice
        first = {}
        pixels = seg.pixel_array.copy()
        for n, groups in enumerate(seg.PerFrameFunctionalGroupsSequence):
            place = tuple(groups.PlanePositionSequence[0].ImagePositionPatient)
            if place in first:
                pixels[n] |= pixels[first[place]]
            first.setdefault(place, n)
        seg.PixelData = hd.seg.sop.pack_bits(pixels.ravel())
        seg.PixelData += b"\0" * (len(seg.PixelData) % 2)

    path = _edited(write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC), relabel)
    with pytest.raises(VolumeError, match=r"do not overlap.*received \['Left kidney', 'liver'\]"):
        read_seg(path, folder)


def test_fractional_seg_counts_from_half(tmp_path):
    folder = SOURCES["ct"](tmp_path / "series")
    sources = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
    chances = np.linspace(0, 1, np.prod(SHAPE)).reshape(SHAPE[::-1])[:, :, ::-1]
    for dataset in sources:
        dataset.AccessionNumber = dataset.StudyID = dataset.StudyTime = dataset.PatientBirthDate = ""
    code = hd.sr.CodedConcept("10200004", "SCT", "Liver")
    described = hd.seg.SegmentDescription(1, "liver", code, code, "MANUAL")
    hd.seg.Segmentation(
        sources, np.stack([chances[k] for k in ORDER]), "FRACTIONAL", [described], generate_uid(), 1, generate_uid(), 1,
        "m", "m", "1", "1",
    ).save_as(tmp_path / "seg.dcm")  # fmt: skip
    found = read_seg(tmp_path / "seg.dcm", folder)
    stored = np.around(chances * 255).astype(int)
    np.testing.assert_array_equal(found.labels, (stored >= 128).transpose(2, 1, 0))
    assert found.kinds == {"liver": Kind.MANUAL}


def test_names_that_stand_twice_are_told_apart(tmp_path):
    folder = SOURCES["ct"](tmp_path / "series")
    path = write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC)
    _edited(path, lambda seg: [_set(segment, "SegmentLabel", "kidney") for segment in seg.SegmentSequence])
    assert read_seg(path, folder).names == {"kidney": 1, "kidney (2)": 2, "kidney (3)": 3}


def test_file_that_is_no_dicom_is_refused(tmp_path):
    (tmp_path / "seg.dcm").write_bytes(b"nothing" * 100)
    with pytest.raises(VolumeError, match="readable DICOM SEG"):
        read_seg(tmp_path / "seg.dcm", SOURCES["ct"](tmp_path / "series"))


@pytest.mark.parametrize("series", ["Study1/13_HCropVolume", "Study2/14_HCropVolume", "Study2/14-T1post-22014"])
def test_labels_of_real_series_come_back(tmp_path, data_dir, series):
    folder = Path(shutil.copytree(data_dir / "dicom" / series, tmp_path / "series"))
    volume = load_volume(folder)
    labels = (volume.array > np.quantile(volume.array, [0.7, 0.9])[:, None, None, None]).sum(0).astype(np.uint8)
    found = read_seg(write_seg(folder, labels, {"bright": 1, "brain": 2}, tmp_path / "seg.dcm", AUTOMATIC), folder)
    np.testing.assert_array_equal(found.labels, labels)
    source, seg = (pydicom.dcmread(path) for path in (next(folder.glob("*")), tmp_path / "seg.dcm"))
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
        assert seg[keyword].value == source[keyword].value


# --- other people's software


def _tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is not installed (pip install dcmqi; apt-get install dicom3tools)")
    return found


@pytest.mark.parametrize("content", ["labels", "absent", "empty"])
@pytest.mark.parametrize("source", SOURCES)
def test_validator_finds_no_error(tmp_path, source, content):
    tool, labels = _tool("dciodvfy"), {"labels": drawn(), "absent": drawn(values=(1, 3)), "empty": drawn(values=())}
    path = write_seg(SOURCES[source](tmp_path / "series"), labels[content], NAMES, tmp_path / "seg.dcm", AUTOMATIC)
    said = subprocess.run([tool, str(path)], capture_output=True, text=True, check=False).stderr
    assert "Segmentation" in said, "the validator did not recognise the object"
    assert [line for line in said.splitlines() if line.startswith("Error")] == []


def test_validator_sees_what_is_missing(tmp_path):
    path = write_seg(SOURCES["ct"](tmp_path / "series"), drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC)
    _edited(path, lambda seg: seg.SegmentSequence[0].__delattr__("SegmentAlgorithmType"))
    said = subprocess.run([_tool("dciodvfy"), str(path)], capture_output=True, text=True, check=False).stderr
    assert re.search("^Error.*SegmentAlgorithmType", said, re.M)


@pytest.mark.parametrize("values", [(1, 2, 3), (1, 3)], ids=["all", "one absent"])
@pytest.mark.parametrize("source", PLACED)
def test_dcmqi_reads_our_labels_at_our_place(tmp_path, source, values):
    folder, labels = SOURCES[source](tmp_path / "series"), drawn(values=values)
    path = write_seg(folder, labels, NAMES, tmp_path / "seg.dcm", AUTOMATIC)
    command = [_tool("segimage2itkimage"), "--inputDICOM", path, "--outputDirectory", tmp_path, "-t", "nrrd"]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    affine = load_volume(folder).affine
    for value in values:
        image = SimpleITK.ReadImage(str(tmp_path / f"{value}.nrrd"))
        stored = SimpleITK.GetArrayFromImage(image)
        found = np.zeros(SHAPE, bool)
        for kji in np.argwhere(stored):
            place = image.TransformIndexToPhysicalPoint([int(v) for v in kji[::-1]])
            ijk = np.linalg.inv(affine) @ [-place[0], -place[1], place[2], 1]
            assert np.abs(ijk - np.rint(ijk)).max() < 1e-3
            found[tuple(np.rint(ijk[:3]).astype(int))] = True
        np.testing.assert_array_equal(found, labels == value)
    described = json.loads((tmp_path / "meta.json").read_text())["segmentAttributes"]
    assert {item["SegmentLabel"] for group in described for item in group} >= {
        name for name, value in NAMES.items() if value in values
    }


def test_we_read_what_dcmqi_writes(tmp_path):
    """3D Slicer's exporter: no references to slices are needed, places decide."""
    folder, labels = SOURCES["oblique mr"](tmp_path / "series"), drawn()
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ load_volume(folder).affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(labels.transpose(2, 1, 0))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    SimpleITK.WriteImage(image, str(tmp_path / "labels.nrrd"))
    tissue = {"CodeValue": "85756007", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Tissue"}
    segments = [
        {
            "labelID": value, "SegmentDescription": name, "SegmentLabel": name, "SegmentAlgorithmType": "MANUAL",
            "SegmentedPropertyCategoryCodeSequence": tissue, "SegmentedPropertyTypeCodeSequence": tissue,
        }
        for name, value in NAMES.items()
    ]  # fmt: skip
    meta = {
        "ContentCreatorName": "Reader1",
        "SeriesNumber": "300",
        "InstanceNumber": "1",
        "segmentAttributes": [segments],
    }
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "SeriesDescription": "s", "BodyPartExamined": ""}))
    command = [
        _tool("itkimage2segimage"),
        "--inputImageList",
        tmp_path / "labels.nrrd",
        "--inputDICOMDirectory",
        folder,
    ]
    command += ["--outputDICOM", tmp_path / "seg.dcm", "--inputMetadata", tmp_path / "meta.json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert (tmp_path / "seg.dcm").is_file(), done.stderr[-500:]
    found = read_seg(tmp_path / "seg.dcm", folder)
    assert found.names == NAMES
    np.testing.assert_array_equal(found.labels, labels)
