"""What holds for every volume: hash, read-only arrays, a store's copy of a series, the real data."""

import time

import nibabel as nib
import numpy as np
import pytest

from lib.data.volume import content_hash, image_files, load_volume, series_folder
from lib.errors import VolumeError
from lib.types import WindowSource
from tests.dicom_files import NORMAL, STEP, STORED, cine, save, series


def test_content_hash_depends_on_voxels_shape_and_type_only():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert content_hash(array) == content_hash(np.asfortranarray(array)) == content_hash(array.copy())
    assert len({content_hash(a) for a in (array, array.reshape(3, 2, 4), array.astype(np.float64), array + 1)}) == 4


def test_content_hash_of_a_big_volume_is_fast():
    array = np.asfortranarray(np.random.default_rng(0).random((512, 512, 40), dtype=np.float32))
    times = []
    for _ in range(3):
        start = time.process_time()  # others may use the cores
        content_hash(array)
        times.append(time.process_time() - start)
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


@pytest.mark.parametrize("name", ["organs/ct_slab", "organs/mr_slab", "acdc/patient001_frame01"])
def test_real_nifti_affine_is_exact(data_dir, name):
    path = data_dir / f"{name}.nii.gz"
    volume = load_volume(path)
    assert volume.affine.tobytes() == nib.load(path).affine.tobytes()
    is_ct = volume.window.source is WindowSource.PRESET
    assert is_ct == ("ct_" in name)


def copied_series(folder, shape=(40, 32, 6), **changes):
    """A folder as a DICOMweb store keeps it: the series, and beside it a NIfTI of it for clients."""
    save(folder / "1.2.3", series(**changes))
    nib.save(nib.Nifti1Image(np.random.default_rng(1).random(shape), np.eye(4)), folder / "1.2.3.nii.gz")
    return folder / "1.2.3.nii.gz"


def test_series_is_read_instead_of_its_copy(tmp_path):
    path = copied_series(tmp_path, WindowCenter=40, WindowWidth=400)
    volume = load_volume(path)
    assert np.array_equal(volume.array, STORED.transpose(2, 1, 0).astype(np.float32) - 100)
    assert volume.window.source is WindowSource.DICOM
    assert volume.affine.tobytes() == load_volume(tmp_path / "1.2.3").affine.tobytes()
    assert not volume.warnings


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ({"shape": (40, 32, 5)}, "was not used. It has another size."),
        ({"step": NORMAL * STEP + [1.0, 0, 0]}, "was not used. Expected slices stacked along their normal"),
    ],
)
def test_copy_is_read_where_its_series_is_something_else(tmp_path, case, text):
    volume = load_volume(copied_series(tmp_path, **case))
    assert volume.array.max() <= 1
    assert text in volume.warnings[0]


def test_copy_of_a_colour_series_may_be_in_colour(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (4, 20, 30, 3)).astype(np.uint8)
    save(tmp_path / "us", [cine(frames, "RGB")])
    rgb = np.ascontiguousarray(frames.transpose(2, 1, 0, 3)).view([(c, "u1") for c in "RGB"])[..., 0]
    nib.save(nib.Nifti1Image(rgb, np.eye(4)), tmp_path / "us.nii.gz")
    assert np.array_equal(load_volume(tmp_path / "us.nii.gz").array, frames.transpose(2, 1, 0, 3))


def test_files_of_an_image_are_all_that_decide_it(tmp_path):
    (tmp_path / "x.nhdr").write_bytes(b"NRRD0004\ndata file: ../x.raw\nDATA FILE: x.raw\n\n")
    assert image_files(tmp_path / "x.nhdr") == [tmp_path / "x.nhdr"]  # the data file is not there
    (tmp_path / "x.raw").write_bytes(b"0")
    assert image_files(tmp_path / "x.nhdr") == [tmp_path / "x.nhdr", tmp_path / "x.raw"]
    copy, series = tmp_path / "1.2.3.nii.gz", tmp_path / "1.2.3"
    copy.write_bytes(b"0")
    assert image_files(copy) == [copy]
    series.mkdir()
    (series / "a.dcm").write_bytes(b"\0" * 128 + b"DICM")
    assert image_files(copy) == [copy, series]
    assert image_files(series) == [series / "a.dcm"]


def test_broken_copy_is_told_although_its_series_is_there(tmp_path):
    path = copied_series(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(VolumeError, match="NIfTI"):
        load_volume(path)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("series.nii.gz", "series"),
        ("series", "series"),
        ("series.nii", None),
        ("other.nii.gz", None),
        ("notes.nii.gz", None),
        ("notes", None),
        (".nii.gz", None),
    ],
)
def test_series_folder_of_an_image(tmp_path, name, found):
    save(tmp_path / "series", series(1))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("none")
    assert series_folder(tmp_path / name) == (tmp_path / found if found else None)
