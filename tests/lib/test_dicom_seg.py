"""Label maps to DICOM SEG: voxels, places, references, what the head says; read with pydicom and highdicom."""

from __future__ import annotations

from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage

from lib.data.volume import load_volume
from lib.dicom_seg import read_seg, write_seg
from lib.errors import PromptError, VolumeError
from lib.provenance import Kind, Provenance
from lib.types import Window
from tests.dicom_files import region
from tests.lib.seg_series import (
    AUTOMATIC,
    AXIAL,
    NAMES,
    OBLIQUE,
    ORDER,
    PLACED,
    SHAPE,
    SOURCES,
    SPACING,
    STEP,
    THICKNESS,
    cine,
    classic,
    drawn,
    edited,
    mask_of,
    measures,
    order_of,
    positions_of,
)


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
        assert groups.PlanePositionSequence[0].ImagePositionPatient == positions_of(orientation)[k]
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


def test_calibrated_ultrasound_keeps_the_size_of_its_pixels_alone(tmp_path):
    regions = [region((0.4, 0.3), (SHAPE[0] - 1, SHAPE[1] - 1))]
    folder = cine(tmp_path / "series", SequenceOfUltrasoundRegions=regions)
    path = write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC)
    seg = pydicom.dcmread(path)
    assert measures(seg).PixelSpacing == pytest.approx([0.4, 0.3]) and len(measures(seg)) == 1
    assert not [e for e in seg.iterall() if e.keyword in ("FrameOfReferenceUID", "ImageOrientationPatient")]
    np.testing.assert_array_equal(read_seg(path, folder).labels, drawn())


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
    assert "SpacingBetweenSlices" not in measures(pydicom.dcmread(path))


def test_bare_source_without_patient_tags_is_enough(tmp_path):
    folder = SOURCES["ct"](tmp_path / "series")
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        for keyword in ("PatientID", "PatientName", "PatientSex", "StudyDate", "SeriesNumber", "SliceThickness"):
            del dataset[keyword]
        dataset.save_as(path)
    seg = pydicom.dcmread(write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC))
    assert not seg.PatientID and not seg.PatientName


@pytest.mark.parametrize("source", ["ct", "enhanced mr", "ultrasound"])
@pytest.mark.parametrize("lacks", [("StudyInstanceUID",), ("SOPInstanceUID", "SOPClassUID")])
@pytest.mark.parametrize("is_empty", [False, True])
def test_source_without_an_identifier_is_refused_by_name(tmp_path, source, lacks, is_empty):
    folder = SOURCES[source](tmp_path / "series")
    path = sorted(folder.iterdir())[-1]
    for file in folder.iterdir() if "StudyInstanceUID" in lacks else [path]:  # one instance in a series is enough
        edited(file, lambda dataset: [_take(dataset, keyword, is_empty) for keyword in lacks])
    with pytest.raises(VolumeError, match=f"received one without {', '.join(lacks)}. Export .*nrrd"):
        write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC)
    assert [p.name for p in tmp_path.iterdir()] == ["series"]
    assert load_volume(folder).shape == SHAPE


def _take(dataset: Any, keyword: str, is_empty: bool) -> None:
    if is_empty:
        dataset[keyword].value = ""
    else:
        del dataset[keyword]


@pytest.mark.parametrize("source", ["ct", "enhanced mr"])
def test_source_without_a_frame_of_reference_is_enough(tmp_path, source):
    folder = SOURCES[source](tmp_path / "series")
    for file in folder.iterdir():
        edited(file, lambda dataset: _take(dataset, "FrameOfReferenceUID", False))
    path = write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC)
    np.testing.assert_array_equal(read_seg(path, folder).labels, drawn())


def test_nothing_of_the_patient_is_logged(tmp_path, caplog, capfd):
    caplog.set_level("DEBUG")
    folder = classic(tmp_path / "series", CTImageStorage, "CT", AXIAL, PatientName="Odd Name", PatientID="secret-7")
    path = write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC)
    read_seg(path, folder)
    out, err = capfd.readouterr()
    uids = [f.SOPInstanceUID for f in map(pydicom.dcmread, folder.iterdir())]
    for secret in ("Odd Name", "secret-7", "1.2.3.4", *uids):
        assert secret not in caplog.text + out + err
