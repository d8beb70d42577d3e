"""Classic DICOM series: voxels, place, order, what is repaired with a warning and what is refused."""

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage

from lib.data.dicom import frame_order, patient_key
from lib.data.volume import load_volume
from lib.errors import PromptError, VolumeError
from lib.types import WindowSource
from tests.dicom_files import COLUMN, NORMAL, ORIGIN, RAS, STEP, STORED, image, place, placed_files, save, series


def refused(folder, text):
    with pytest.raises(VolumeError, match=text) as error:
        load_volume(folder)
    assert "DOE" not in str(error.value)
    assert "1234" not in str(error.value)


def test_dicom_axes_affine_and_rescale(tmp_path):
    volume = load_volume(save(tmp_path / "s", series()))
    assert volume.array.shape == (40, 32, 6)
    assert np.array_equal(volume.array, STORED.transpose(2, 1, 0).astype(np.float32) - 100)
    assert np.allclose(volume.affine[:3], RAS, atol=1e-5)
    assert not volume.warnings
    assert np.array_equal(volume.affine[:3, 3], ORIGIN * [-1, -1, 1])
    assert volume.spacing_mm == pytest.approx((0.75, 0.5, 2.5), abs=1e-5)
    assert (volume.window.lo, volume.window.hi, volume.window.source) == (-160, 240, WindowSource.PRESET)


def test_dicom_is_sorted_along_the_normal_not_by_instance_number(tmp_path):
    volume = load_volume(save(tmp_path / "s", series(step=-NORMAL * STEP, InstanceNumber=lambda k: k + 1)))
    assert np.array_equal(volume.array[:, :, 0], STORED[5].T.astype(np.float32) - 100)
    assert volume.affine[:3, 2] @ (NORMAL * [-1, -1, 1]) == pytest.approx(STEP, abs=1e-5)


def test_dicom_agrees_with_itk(tmp_path):
    sitk = pytest.importorskip("SimpleITK", reason="the reference for series is GDCM")
    folder = save(tmp_path / "s", series())
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    volume = load_volume(folder)
    assert np.array_equal(sitk.GetArrayFromImage(image).T, volume.array)
    direction = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    assert np.allclose(volume.affine[:3, :3], direction * [[-1], [-1], [1]], atol=1e-4)
    assert np.allclose(volume.affine[:3, 3], image.GetOrigin() * np.array([-1, -1, 1]))


def test_dicom_slope_may_differ_between_slices(tmp_path):
    volume = load_volume(save(tmp_path / "s", series(RescaleSlope=lambda k: k + 1, RescaleIntercept=0)))
    assert np.array_equal(volume.array, STORED.transpose(2, 1, 0) * np.arange(1.0, 7))


def test_dicom_without_rescale_keeps_stored_values(tmp_path):
    volume = load_volume(save(tmp_path / "s", series(RescaleSlope=None, RescaleIntercept=None)))
    assert np.array_equal(volume.array, STORED.transpose(2, 1, 0))


def test_dicom_window_is_the_median_of_the_first_pairs(tmp_path):
    tags = {"WindowCenter": lambda k: [40 + k, 500], "WindowWidth": lambda k: [400, 1500]}
    window = load_volume(save(tmp_path / "s", series(5, **tags))).window
    assert (window.lo, window.hi, window.source) == (42 - 0.5 - 199.5, 42 - 0.5 + 199.5, WindowSource.DICOM)


def test_dicom_requested_window_wins(tmp_path):
    folder = save(tmp_path / "s", series(WindowCenter=40, WindowWidth=400))
    assert load_volume(folder, (0, 80)).window.source is WindowSource.REQUEST
    with pytest.raises(PromptError, match="lo < hi"):
        load_volume(folder, (80, 0))


def test_dicom_monochrome1_is_negated_with_its_window(tmp_path):
    tags = {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": 400, "WindowWidth": 200}
    volume = load_volume(save(tmp_path / "s", series(**tags)))
    assert np.array_equal(volume.array, 100 - STORED.transpose(2, 1, 0).astype(np.float32))
    assert (volume.window.lo, volume.window.hi) == (-400.5 - 99.5, -400.5 + 99.5)


def test_dicom_syntax_without_decoder_is_named(tmp_path):
    datasets = series()
    for ds in datasets:
        ds.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
        ds.PixelData = encapsulate([b"\0" * 20])
        ds["PixelData"].is_undefined_length = True
    refused(save(tmp_path / "s", datasets), "received MPEG2 .*Install its decoder or export the series uncompressed")


def test_dicom_of_one_slice_takes_its_thickness(tmp_path):
    volume = load_volume(save(tmp_path / "s", series(1)))
    assert volume.shape == (40, 32, 1)
    assert volume.spacing_mm[2] == pytest.approx(2.0, abs=1e-5)
    assert not volume.is_2d


def test_dicom_passes_over_files_of_other_kinds(tmp_path):
    folder = save(tmp_path / "s", series())
    (folder / "LICENSE").write_text("Attribution")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "subfolder").mkdir()
    assert load_volume(folder).shape == (40, 32, 6)


@pytest.mark.parametrize("files", [{}, {"readme.txt": b"hello"}])
def test_dicom_folder_without_dicom_is_refused(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    refused(tmp_path, "files of one DICOM series; received none")


def test_dicom_broken_files_are_refused(tmp_path):
    folder = save(tmp_path / "s", series())
    (folder / "x.dcm").write_bytes(b"broken")
    refused(folder, "DICOM image; its decoder stopped with InvalidDicomError")


@pytest.mark.parametrize("cut", [10, 2700, 2900])
def test_dicom_truncated_slice_is_refused(tmp_path, cut):
    folder = save(tmp_path / "s", series())
    path = next(folder.iterdir())
    path.write_bytes(path.read_bytes()[:-cut])
    refused(folder, r"decoder stopped with|tags .* are missing in a file")


@pytest.mark.parametrize(
    ("tags", "text"),
    [
        ({"SeriesInstanceUID": lambda k: f"1.2.{k % 2}"}, "one DICOM series per folder; received 2"),
        ({"NumberOfFrames": 4}, r"one slice per position; received 24 slices at 6 positions \(time points"),
        ({"ImagePositionPatient": None}, r"tags \['ImagePositionPatient'\] are missing"),
        ({"PixelSpacing": None, "ImageOrientationPatient": None}, r"\['ImageOrientationPatient', 'PixelSpacing'\]"),
        ({"PhotometricInterpretation": "HSV"}, r"slices of one kind, grey or colour; received \['HSV'\]"),
        ({"PhotometricInterpretation": lambda k: f"MONOCHROME{1 + k % 2}"}, "one kind, grey or colour; received"),
        ({"PhotometricInterpretation": None}, r"DICOM images; tags \['PhotometricInterpretation'\] are missing"),
        ({"ImagePositionPatient": lambda k: None if k == 2 else [0, 0, k], "Modality": "US"}, "tags .* are missing"),
        ({"PixelSpacing": lambda k: [1, 1 + (k == 3)]}, "one size, spacing and orientation; received several"),
        ({"ImageOrientationPatient": lambda k: [1, 0, 0, 0, k % 2, 1 - k % 2]}, "one size, spacing and orientation"),
        ({"ImagePositionPatient": lambda k: [0, 0, 0]}, "one slice per position; received 6 slices at 1 pos"),
    ],
)
def test_dicom_series_we_cannot_stack_is_refused(tmp_path, tags, text):
    refused(save(tmp_path / "s", series(**tags)), text)


def test_dicom_of_several_sizes_is_refused(tmp_path):
    datasets = series()
    tags = {**place(ORIGIN), "Modality": "CT", "SeriesInstanceUID": datasets[0].SeriesInstanceUID}
    datasets[2] = image(np.zeros((8, 8), np.uint16), CTImageStorage, **tags)
    refused(save(tmp_path / "s", datasets), "one size, spacing and orientation")


def test_dicom_missing_slice_is_refused(tmp_path):
    datasets = series()
    del datasets[2]
    refused(
        save(tmp_path / "s", datasets),
        r"slices 2.500 mm apart; received steps of 2.500 to 5.000 mm: slices are missing",
    )


def test_dicom_gantry_tilt_is_refused(tmp_path):
    refused(save(tmp_path / "s", series(step=NORMAL * STEP + COLUMN * 0.3)), "tilted gantry. Correct the tilt")


def test_dicom_gantry_tilt_cannot_travel_to_itk(tmp_path):
    """Why it is refused: image and label files of one sheared affine lie apart in ITK and so in Slicer."""
    sitk = pytest.importorskip("SimpleITK", reason="the reference for what Slicer reads")
    affine = np.diag([-1.0, -1.0, 2.5, 1.0])
    affine[1, 2] = 0.7
    sheared = nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), affine)
    sheared.set_sform(affine, "scanner")
    sheared.set_qform(affine, "scanner")
    nib.save(sheared, tmp_path / "image.nii.gz")
    found = sitk.ReadImage(str(tmp_path / "image.nii.gz")).TransformIndexToPhysicalPoint((0, 0, 7))
    assert np.linalg.norm(np.array(found) * [-1, -1, 1] - (affine @ [0, 0, 7, 1])[:3]) > 1


def test_dicom_uneven_slices_are_taken_with_a_warning(tmp_path):
    volume = load_volume(save(tmp_path / "s", series(ImagePositionPatient=lambda k: near_even(k, 0.2))))
    assert volume.warnings == ("The slices are not evenly spaced: up to 0.20 mm beside a grid of 2.50 mm.",)
    assert volume.affine[:3, 2] @ (NORMAL * [-1, -1, 1]) == pytest.approx(STEP, abs=1e-5)


def near_even(k, shift_mm):
    return [round(float(v), 6) for v in ORIGIN + NORMAL * (k * STEP + shift_mm * (k == 3))]


def test_dicom_drift_of_half_a_slice_is_refused(tmp_path):
    """Every step is within its tolerance, and yet slices in the middle would be shown one place away."""
    pixels = np.repeat(STORED, 4, axis=0)
    along = np.cumsum([STEP * (1.09 if k < 12 else 0.92) for k in range(24)])
    folder = save(
        tmp_path / "s",
        series(24, pixels=pixels, ImagePositionPatient=lambda k: [float(v) for v in np.round(NORMAL * along[k], 6)]),
    )
    refused(folder, "slices are missing or uneven")


def test_dicom_localizer_is_left_out_with_a_warning(tmp_path):
    datasets = series()
    scout = {"Modality": "CT", "SeriesInstanceUID": datasets[0].SeriesInstanceUID, "PixelSpacing": [1, 1]}
    scout |= {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1], "ImagePositionPatient": [0, 0, 0]}
    scout["ImageType"] = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    folder = save(tmp_path / "s", [image(np.ones((50, 60), np.uint16), CTImageStorage, **scout), *datasets])
    volume = load_volume(folder)
    assert volume.warnings == ("Localizers in the series are left out: 1.",)
    assert np.array_equal(volume.array, STORED.transpose(2, 1, 0).astype(np.float32) - 100)
    assert len(placed_files(folder)) == 6


def test_dicom_of_localizers_alone_is_a_series(tmp_path):
    volume = load_volume(save(tmp_path / "s", series(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])))
    assert volume.shape == (40, 32, 6)
    assert not volume.warnings


def test_dicom_lookup_table_of_the_modality_is_applied(tmp_path):
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [1000, 0, 16], "HU", b""
    table.LUTData = np.arange(2000, 3000, dtype="<u2").tobytes()
    tags = {"ModalityLUTSequence": [table], "RescaleSlope": None, "RescaleIntercept": None}
    volume = load_volume(save(tmp_path / "s", series(**tags)))
    assert np.array_equal(volume.array, STORED.transpose(2, 1, 0).astype(np.float32) + 2000)


def test_dicom_files_are_placed_along_k(tmp_path):
    datasets = series(step=-NORMAL * STEP)
    folder = save(tmp_path / "s", datasets)
    uids = [pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in placed_files(folder)]
    assert uids == [dataset.SOPInstanceUID for dataset in reversed(datasets)]
    assert frame_order(folder) == [(path, 0) for path in placed_files(folder)]


@pytest.mark.parametrize(
    ("folder", "shape", "spacing_mm"),
    [
        ("dicom/Study1/13_HCropVolume", (35, 51, 32), (1, 1, 1)),
        ("dicom/Study2/14_HCropVolume", (36, 48, 35), (1, 1, 1)),
        ("dicom/Study2/14-T1post-22014", (512, 512, 24), (0.4297, 0.4297, 6.5)),
    ],
)
def test_real_dicom_series_agree_with_itk(data_dir, folder, shape, spacing_mm):
    sitk = pytest.importorskip("SimpleITK", reason="the reference for series is GDCM")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(data_dir / folder)))
    image, volume = reader.Execute(), load_volume(data_dir / folder)
    direction = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    assert volume.shape == shape
    assert volume.spacing_mm == pytest.approx(spacing_mm, abs=1e-3)
    assert volume.window.source is WindowSource.DICOM
    assert np.array_equal(sitk.GetArrayFromImage(image).T, volume.array)
    assert np.allclose(volume.affine[:3, :3], direction * [[-1], [-1], [1]], atol=1e-3)


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        ({}, True),
        ({"PatientID": "  doe-17 ", "StudyInstanceUID": "1.9"}, True),
        ({"PatientName": "ROE^JANE"}, True),
        ({"PatientID": "DOE-18"}, False),
        ({"PatientID": None}, False),
    ],
)
def test_patient_key_is_one_for_all_series_of_a_patient(tmp_path, other, is_same):
    first = save(tmp_path / "a", series(PatientID="DOE-17", StudyInstanceUID="1.2"))
    second = save(tmp_path / "b", series(**{"PatientID": "DOE-17", "StudyInstanceUID": "1.2", **other}))
    assert (patient_key(first) == patient_key(second)) is is_same
    assert "doe" not in patient_key(first).lower()


@pytest.mark.parametrize(
    "nobody", [None, "", " ", "ANONYMOUS", "anon", "N/A", "000", "xxx", "Unknown", "de-identified"]
)
def test_patient_key_without_a_patient_is_the_studys_then_the_series(tmp_path, nobody):
    def key(name, **tags):
        return patient_key(save(tmp_path / name, series(PatientID=nobody, **tags)))

    study = key("a", StudyInstanceUID="1.2")
    assert study == key("b", StudyInstanceUID="1.2") != key("c", StudyInstanceUID="1.3")
    assert key("d", StudyInstanceUID=None) != key("e", StudyInstanceUID=None)


@pytest.mark.parametrize("somebody", ["0017", "anon17", "x1"])
def test_patient_key_takes_a_pseudonym_for_a_patient(tmp_path, somebody):
    keys = [
        patient_key(save(tmp_path / study, series(PatientID=somebody, StudyInstanceUID=study))) for study in ("1", "2")
    ]
    assert keys[0] == keys[1]


def test_patient_key_of_real_series(data_dir):
    study1, study2, other = (
        patient_key(data_dir / "dicom" / name)
        for name in ("Study1/13_HCropVolume", "Study2/14_HCropVolume", "Study2/14-T1post-22014")
    )
    assert study2 == other != study1


def test_patient_key_of_no_dicom_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(VolumeError, match="without identifiers"):
        patient_key(tmp_path)
