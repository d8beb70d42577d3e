"""DICOM series and what holds for every volume: hash, read-only arrays, the real data."""

import time

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid

from lib.data.volume import content_hash, load_volume
from lib.errors import PromptError, VolumeError
from lib.types import WindowSource

ROW, COLUMN = np.array([0.96, 0.28, 0.0]), np.array([-0.28 * 0.8, 0.96 * 0.8, 0.6])
NORMAL = np.cross(ROW, COLUMN)
ORIGIN, STEP, PIXEL_MM = np.array([-10.5, 20.25, 30.75]), 2.5, (0.5, 0.75)  # distance of rows, then of columns
STORED = np.random.default_rng(0).integers(0, 1000, (6, 32, 40)).astype(np.uint16)  # (k, row, column)


def dicom_slice(pixels, position, series_uid, **tags):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = (
        CTImageStorage,
        meta.MediaStorageSOPInstanceUID,
        series_uid,
    )
    ds.PatientName, ds.PatientID, ds.Modality = "DOE^JOHN", "1234", "CT"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.PixelSpacing, ds.SliceThickness = list(PIXEL_MM), 2.0
    ds.ImageOrientationPatient = [round(float(v), 6) for v in (*ROW, *COLUMN)]
    ds.ImagePositionPatient = [round(float(v), 6) for v in position]
    ds.RescaleSlope, ds.RescaleIntercept = 1, -100
    for name, value in tags.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    ds.is_little_endian, ds.is_implicit_VR = True, False
    ds.PixelData = pixels.astype("<u2").tobytes()
    return ds


def series(count=6, step=NORMAL * STEP, **tags):
    """Slices in k order; a callable tag gets the slice's number."""
    uid = generate_uid()
    return [
        dicom_slice(STORED[k], ORIGIN + k * step, uid, **{n: v(k) if callable(v) else v for n, v in tags.items()})
        for k in range(count)
    ]


def save(folder, datasets):
    """Written with names that say nothing about the order."""
    folder.mkdir(exist_ok=True)
    for number, ds in enumerate(datasets):
        ds.save_as(folder / f"{(number * 5) % 7}_{number}", write_like_original=False)
    return folder


def refused(folder, text):
    with pytest.raises(VolumeError, match=text) as error:
        load_volume(folder)
    assert "DOE" not in str(error.value)
    assert "1234" not in str(error.value)


def test_dicom_axes_affine_and_rescale(tmp_path):
    volume = load_volume(save(tmp_path / "s", series()))
    assert volume.array.shape == (40, 32, 6)
    assert np.array_equal(volume.array, STORED.transpose(2, 1, 0).astype(np.float32) - 100)
    lps = np.column_stack([ROW * PIXEL_MM[1], COLUMN * PIXEL_MM[0], NORMAL * STEP, ORIGIN])
    assert np.allclose(volume.affine[:3], lps * [[-1], [-1], [1]], atol=1e-5)
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


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_dicom_compressed_pixels_are_decoded(tmp_path, syntax):
    datasets = series()
    for ds, pixels in zip(datasets, STORED):
        if syntax == RLELossless:
            ds.compress(RLELossless)
        else:
            openjpeg = pytest.importorskip("openjpeg", reason="no JPEG 2000 encoder")
            ds.PixelData = encapsulate([openjpeg.encode(pixels, bits_stored=16)])
            ds["PixelData"].is_undefined_length = True
            ds.file_meta.TransferSyntaxUID = syntax
    volume = load_volume(save(tmp_path / "s", datasets))
    assert np.array_equal(volume.array, STORED.transpose(2, 1, 0).astype(np.float32) - 100)


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
        ({"NumberOfFrames": 4}, "enhanced multi-frame DICOM. Convert the series to NIfTI"),
        ({"ImagePositionPatient": None}, r"tags \['ImagePositionPatient'\] are missing"),
        ({"PixelSpacing": None, "ImageOrientationPatient": None}, r"\['ImageOrientationPatient', 'PixelSpacing'\]"),
        ({"PhotometricInterpretation": "RGB"}, r"grey DICOM slices of one kind; received \['RGB'\]"),
        ({"PhotometricInterpretation": lambda k: f"MONOCHROME{1 + k % 2}"}, "grey DICOM slices of one kind"),
        ({"PixelSpacing": lambda k: [1, 1 + (k == 3)]}, "one size, spacing and orientation; received several"),
        ({"ImageOrientationPatient": lambda k: [1, 0, 0, 0, k % 2, 1 - k % 2]}, "one size, spacing and orientation"),
        ({"ImagePositionPatient": lambda k: [0, 0, 0]}, "one slice per position; received several"),
    ],
)
def test_dicom_series_we_cannot_stack_is_refused(tmp_path, tags, text):
    refused(save(tmp_path / "s", series(**tags)), text)


def test_dicom_of_several_sizes_is_refused(tmp_path):
    datasets = series()
    datasets[2] = dicom_slice(np.zeros((8, 8)), datasets[2].ImagePositionPatient, datasets[0].SeriesInstanceUID)
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


def test_content_hash_depends_on_voxels_shape_and_type_only():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert content_hash(array) == content_hash(np.asfortranarray(array)) == content_hash(array.copy())
    assert len({content_hash(a) for a in (array, array.reshape(3, 2, 4), array.astype(np.float64), array + 1)}) == 4


def test_content_hash_of_a_big_volume_is_fast():
    array = np.asfortranarray(np.random.default_rng(0).random((512, 512, 40), dtype=np.float32))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        content_hash(array)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


def test_volume_is_read_only_and_equal_content_has_an_equal_hash(tmp_path):
    array = np.random.default_rng(0).random((5, 6, 7), dtype=np.float32)
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii")
    nib.save(nib.Nifti1Image(array, np.diag([1, 2, 3, 1])), tmp_path / "b.nii.gz")
    a, b = load_volume(tmp_path / "a.nii"), load_volume(str(tmp_path / "b.nii.gz"))
    assert a.content_hash == b.content_hash
    with pytest.raises(ValueError, match="read-only"):
        a.array[0, 0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        a.affine[0, 0] = 1


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


@pytest.mark.parametrize("name", ["organs/ct_slab", "organs/mr_slab", "acdc/patient001_frame01"])
def test_real_nifti_affine_is_exact(data_dir, name):
    path = data_dir / f"{name}.nii.gz"
    volume = load_volume(path)
    assert volume.affine.tobytes() == nib.load(path).affine.tobytes()
    is_ct = volume.window.source is WindowSource.PRESET
    assert is_ct == ("ct_" in name)
