"""DICOM SEG to label maps: turned, shifted, uneven, fractional, and those that are refused."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, generate_uid

from lib.data.volume import load_volume
from lib.dicom_seg import read_seg, write_seg
from lib.errors import VolumeError
from lib.provenance import Kind
from tests.lib.seg_series import (
    AUTOMATIC,
    AXIAL,
    NAMES,
    OBLIQUE,
    ORDER,
    REAL,
    SHAPE,
    SOURCES,
    SPACING,
    classic,
    drawn,
    edited,
    measures,
)


def _set(item: Any, keyword: str, value: Any) -> None:
    setattr(item, keyword, value)


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
        (lambda seg: _set(measures(seg), "PixelSpacing", [1.4, 1.8]), "another position, spacing or orientation"),
        (lambda seg: _set(measures(seg), "PixelSpacing", [0.71, 0.9]), "another position, spacing or orientation"),
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
    path = edited(write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC), change)
    with pytest.raises(VolumeError, match=text):
        read_seg(path, folder)


def test_seg_of_a_shifted_copy_lands_on_whole_voxels_inside(tmp_path):
    folder, labels = SOURCES["ct"](tmp_path / "series"), drawn()
    path = edited(
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

    np.testing.assert_array_equal(read_seg(edited(path, turn), folder).labels, labels)


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

    np.testing.assert_array_equal(read_seg(edited(path, straighten) if is_even else path, folder).labels, labels)


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

    path = edited(write_seg(folder, drawn(), NAMES, tmp_path / "seg.dcm", AUTOMATIC), relabel)
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
    edited(path, lambda seg: [_set(segment, "SegmentLabel", "kidney") for segment in seg.SegmentSequence])
    assert read_seg(path, folder).names == {"kidney": 1, "kidney (2)": 2, "kidney (3)": 3}


def test_file_that_is_no_dicom_is_refused(tmp_path):
    (tmp_path / "seg.dcm").write_bytes(b"nothing" * 100)
    with pytest.raises(VolumeError, match="readable DICOM SEG"):
        read_seg(tmp_path / "seg.dcm", SOURCES["ct"](tmp_path / "series"))


@pytest.mark.parametrize("series", REAL)
def test_labels_of_real_series_come_back(tmp_path, data_dir, series):
    folder = Path(shutil.copytree(data_dir / "dicom" / series, tmp_path / "series"))
    volume = load_volume(folder)
    labels = (volume.array > np.quantile(volume.array, [0.7, 0.9])[:, None, None, None]).sum(0).astype(np.uint8)
    found = read_seg(write_seg(folder, labels, {"bright": 1, "brain": 2}, tmp_path / "seg.dcm", AUTOMATIC), folder)
    np.testing.assert_array_equal(found.labels, labels)
    source, seg = (pydicom.dcmread(path) for path in (next(folder.glob("*")), tmp_path / "seg.dcm"))
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
        assert seg[keyword].value == source[keyword].value
