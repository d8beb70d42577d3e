"""DICOM SEG and other people's software: dciodvfy judges ours, dcmqi reads ours and we read its."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.uid import CTImageStorage

from lib.data.volume import load_volume
from lib.dicom_seg import read_seg, write_seg
from tests.dicom_files import region
from tests.lib.seg_series import AUTOMATIC, AXIAL, NAMES, PLACED, REAL, SHAPE, SOURCES, cine, classic, drawn, edited

# attributes of a source that have no value: a SEG leaves the first out, and must have the others
OPTIONAL = {
    **dict.fromkeys(("Laterality", "BodyPartExamined", "PatientAge", "StudyDescription", "IssuerOfPatientID"), ""),
    "OtherPatientIDsSequence": [],
}
REQUIRED = dict.fromkeys(("AccessionNumber", "StudyID", "StudyTime", "PatientBirthDate", "ReferringPhysicianName"), "")


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


def errors_of(path: Path) -> list[str]:
    """What the validator says against a SEG."""
    said = subprocess.run([_tool("dciodvfy"), str(path)], capture_output=True, text=True, check=False).stderr
    assert "Segmentation" in said, "the validator did not recognise the object"
    return [line for line in said.splitlines() if line.startswith("Error")]


@pytest.mark.parametrize("series", REAL)
def test_validator_finds_no_error_on_a_real_series(tmp_path, data_dir, series):
    volume = load_volume(data_dir / "dicom" / series)
    labels = (volume.array > np.quantile(volume.array, 0.9)).astype(np.uint8)
    path = write_seg(data_dir / "dicom" / series, labels, {"bright": 1}, tmp_path / "seg.dcm", AUTOMATIC)
    assert errors_of(path) == []


def test_validator_finds_no_error_where_optional_attributes_of_the_source_are_empty(tmp_path):
    folder = classic(tmp_path / "series", CTImageStorage, "CT", AXIAL, **OPTIONAL, **REQUIRED)
    path = write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC)
    assert errors_of(path) == []
    seg = pydicom.dcmread(path)
    assert [keyword for keyword in OPTIONAL if keyword in seg] == []
    assert [keyword for keyword in REQUIRED if keyword not in seg] == []


def test_validator_takes_a_calibrated_ultrasound(tmp_path):
    tool, regions = _tool("dciodvfy"), [region((0.4, 0.3), (SHAPE[0] - 1, SHAPE[1] - 1))]
    folder = cine(tmp_path / "series", SequenceOfUltrasoundRegions=regions)
    path = write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC)
    said = subprocess.run([tool, str(path)], capture_output=True, text=True, check=False).stderr
    assert "Segmentation" in said and [line for line in said.splitlines() if line.startswith("Error")] == []


def test_validator_sees_what_is_missing(tmp_path):
    path = write_seg(SOURCES["ct"](tmp_path / "series"), drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC)
    edited(path, lambda seg: seg.SegmentSequence[0].__delattr__("SegmentAlgorithmType"))
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
