"""NIfTI, NRRD and pictures: axis order, exact affines, scaling, and every kind of file that must be refused."""

import gzip

import nibabel as nib
import nrrd
import numpy as np
import pytest
from PIL import Image

from lib.data import readers
from lib.data.volume import load_volume
from lib.data.write import write_mask
from lib.errors import CapacityError, VolumeError
from lib.types import WindowSource

SHAPE = (5, 6, 7)
NAME = "DOE_JOHN_1234"


def voxels(dtype=np.float32, shape=SHAPE):
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def oblique(spacing=(0.7, 0.9, 4.3), flip=(1, -1, 1), order=(0, 1, 2)):
    """An oblique right- or left-handed affine with awkward decimals; ``order`` makes it non-axial."""
    a, b = 0.31, -0.17
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = (turn * spacing * flip)[:, order]
    affine[:3, 3] = [-101.3, 57.77, 1033.1]
    return affine


AFFINES = {
    "plain": np.diag([1.5, 1.5, 3.0, 1.0]),
    "flipped": oblique(flip=(-1, -1, 1)),
    "oblique": oblique(),
    "sagittal": oblique(order=(2, 0, 1)),
}


def nifti(path, array, affine, sform=1, qform=0, kind=nib.Nifti1Image):
    image = kind(array, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    nib.save(image, path)
    return path


def text_of(error):
    assert NAME not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__ or error.value.__context__ is None
    return str(error.value)


# NIfTI


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize(("sform", "qform"), [(1, 0), (2, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_keeps_array_and_affine_bit_for_bit(tmp_path, name, sform, qform, suffix):
    path = nifti(tmp_path / f"x{suffix}", voxels(np.int16), AFFINES[name], sform, qform)
    volume = load_volume(path)
    assert volume.affine.tobytes() == nib.load(path).affine.tobytes()
    assert volume.affine.dtype == np.float64
    assert volume.array.dtype == np.float32
    assert np.array_equal(volume.array, voxels())
    assert volume.spacing_mm == pytest.approx(np.linalg.norm(AFFINES[name][:3, :3], axis=0), rel=1e-5)
    assert not volume.is_2d


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, ">i2", np.float64, ">f4", np.int32])
def test_nifti_of_any_number_type_and_byte_order_is_read(tmp_path, dtype):
    header = nib.Nifti1Header(endianness=">" if str(dtype).startswith(">") else "<")
    header.set_data_dtype(dtype)
    nib.save(nib.Nifti1Image(voxels(dtype), np.eye(4), header), tmp_path / "x.nii")
    volume = load_volume(tmp_path / "x.nii")
    assert np.array_equal(volume.array, voxels())
    assert volume.array.dtype == np.dtype(np.float32)


def test_nifti_2_is_read(tmp_path):
    path = nifti(tmp_path / "x.nii.gz", voxels(), AFFINES["oblique"], kind=nib.Nifti2Image)
    assert load_volume(path).affine.tobytes() == nib.load(path).affine.tobytes()


def test_nifti_slope_and_intercept_are_applied(tmp_path):
    image = nib.Nifti1Image(voxels(np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, -100)
    image.to_filename(tmp_path / "x.nii")
    raw = nib.load(tmp_path / "x.nii").dataobj.get_unscaled()
    assert np.array_equal(load_volume(tmp_path / "x.nii").array, raw * 0.5 - 100)


def test_nifti_without_forms_lies_where_itk_shows_it(tmp_path):
    sitk = pytest.importorskip("SimpleITK", reason="the reference for unplaced images is ITK")
    path = nifti(tmp_path / "x.nii", voxels(), np.diag([2.0, 3.0, 4.0, 1.0]), 0, 0)
    image = sitk.ReadImage(str(path))
    direction = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    volume = load_volume(path)
    assert np.array_equal(volume.affine[:3, :3], direction * [[-1], [-1], [1]])
    assert np.array_equal(volume.affine[:3, 3], image.GetOrigin())


@pytest.mark.parametrize(
    ("stored", "read"), [((5, 6, 7, 1), (5, 6, 7)), ((5, 6), (5, 6, 1)), ((5, 6, 1, 1), (5, 6, 1))]
)
def test_nifti_axes_of_one_element_carry_nothing(tmp_path, stored, read):
    path = nifti(tmp_path / "x.nii", voxels(shape=stored), np.eye(4))
    assert load_volume(path).array.shape == read


@pytest.mark.parametrize("shape", [(5, 6, 7, 5), (5, 6, 7, 1, 6), (5, 6, 7, 2, 2), (9,)])
def test_nifti_of_another_dimension_is_refused(tmp_path, shape):
    path = nifti(tmp_path / f"{NAME}.nii", voxels(shape=shape), np.eye(4))
    with pytest.raises(VolumeError, match=r"one volume of 3 axes.*; received shape \(.*Split") as error:
        load_volume(path)
    text_of(error)


@pytest.mark.parametrize("stored", [(5, 6, 7, 2), (5, 6, 7, 3), (5, 6, 7, 4), (5, 6, 1, 2), (5, 6, 7, 1, 4)])
def test_nifti_of_two_to_four_volumes_has_channels(tmp_path, stored):
    array = voxels(np.int16, stored)
    volume = load_volume(nifti(tmp_path / "x.nii.gz", array, AFFINES["oblique"]))
    assert (volume.channels, volume.is_rgb, volume.shape) == (stored[-1], False, stored[:3])
    assert volume.array.dtype == np.float32 and np.array_equal(volume.array, array.reshape(*stored[:3], -1))
    assert volume.affine.tobytes() == nib.load(tmp_path / "x.nii.gz").affine.tobytes()
    assert volume.content_hash != load_volume(nifti(tmp_path / "y.nii", array[..., 0], np.eye(4))).content_hash
    back = load_volume(write_mask(volume, volume.array[..., 0] > 99, tmp_path / "mask.nii.gz"))
    assert back.shape == stored[:3] and back.channels == 1
    assert back.affine.tobytes() == volume.affine.tobytes()


@pytest.mark.parametrize(("value", "words"), [(7, "every voxel of channel 2 is 7"), (np.nan, "finite voxels")])
def test_channel_without_contrast_or_numbers_is_refused(tmp_path, value, words):
    array = voxels(shape=(5, 6, 7, 3))
    array[..., 1] = value
    with pytest.raises(VolumeError, match=words):
        load_volume(nifti(tmp_path / "x.nii", array, np.eye(4)))


def test_nifti_of_channels_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_VOXELS", 5 * 6 * 7 * 3)
    load_volume(nifti(tmp_path / "x.nii", voxels(shape=(5, 6, 7, 3)), np.eye(4)))
    with pytest.raises(CapacityError, match="at most 630 voxels; received 840"):
        load_volume(nifti(tmp_path / "y.nii", voxels(shape=(5, 6, 7, 4)), np.eye(4)))


def test_nifti_of_colour_or_complex_voxels_is_refused(tmp_path):
    rgb = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb, np.eye(4)), tmp_path / "rgb.nii")
    nib.save(nib.Nifti1Image(voxels(np.complex64), np.eye(4)), tmp_path / "complex.nii")
    with pytest.raises(VolumeError, match=r"grey NIfTI of integers or floats; received voxels of \('R', 'G', 'B'\)"):
        load_volume(tmp_path / "rgb.nii")
    with pytest.raises(VolumeError, match="received voxels of complex64"):
        load_volume(tmp_path / "complex.nii")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_refused(tmp_path, value):
    array = voxels()
    array[1, 2, 3] = value
    with pytest.raises(VolumeError, match=r"finite voxels; received NaN or infinity.*Replace"):
        load_volume(nifti(tmp_path / "x.nii", array, np.eye(4)))


def test_voxels_that_are_all_equal_are_refused(tmp_path):
    with pytest.raises(VolumeError, match="contrast; every voxel is 7"):
        load_volume(nifti(tmp_path / "x.nii", np.full(SHAPE, 7.0, np.float32), np.eye(4)))


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_affine_that_cannot_be_inverted_is_refused(tmp_path, value):
    image = nib.Nifti1Image(voxels(), np.eye(4))
    image.header["srow_z"] = value
    nib.Nifti1Image(voxels(), None, image.header).to_filename(tmp_path / "x.nii")
    with pytest.raises(VolumeError, match=r"affine with three independent axes; received.*Repair"):
        load_volume(tmp_path / "x.nii")


def test_image_beyond_the_size_limit_is_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_VOXELS", 100)
    with pytest.raises(CapacityError, match=r"at most 100 voxels; received 210 .*Crop"):
        load_volume(nifti(tmp_path / "x.nii", voxels(), np.eye(4)))


# NRRD


def write_nrrd(path, array, **header):
    nrrd.write(str(path), array, {name.replace("_", " "): value for name, value in header.items()})
    return path


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", (-1, -1, 1)),
        ("LPS", (-1, -1, 1)),
        ("right-anterior-superior", (1, 1, 1)),
        ("RAS", (1, 1, 1)),
        ("left-anterior-superior", (-1, 1, 1)),
        ("scanner-xyz", (-1, -1, 1)),
    ],
)
def test_nrrd_affine_is_flipped_exactly(tmp_path, name, space, signs):
    stored = AFFINES[name]
    path = write_nrrd(
        tmp_path / "x.nrrd", voxels(), space=space, space_directions=stored[:3, :3].T, space_origin=stored[:3, 3]
    )
    volume = load_volume(path)
    assert np.array_equal(volume.affine[:3], stored[:3] * np.array(signs)[:, None])
    assert np.array_equal(volume.array, voxels())


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "ascii"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, ">i2", np.float64])
def test_nrrd_of_any_encoding_and_type_is_read(tmp_path, encoding, dtype):
    path = write_nrrd(tmp_path / "x.nrrd", voxels(dtype), encoding=encoding)
    assert np.array_equal(load_volume(path).array, voxels())


def test_nrrd_with_spacings_only_lies_on_the_lps_axes(tmp_path):
    path = write_nrrd(tmp_path / "x.nrrd", voxels(), spacings=[0.7, 0.8, 3.3])
    assert np.array_equal(load_volume(path).affine, np.diag([-0.7, -0.8, 3.3, 1]))


def test_nrrd_with_a_detached_data_file_is_read(tmp_path):
    path = write_nrrd(tmp_path / "x.nhdr", voxels())
    assert np.array_equal(load_volume(path).array, voxels())


@pytest.mark.parametrize("data_file", ["/etc/passwd", "../secret.raw", "LIST"])
def test_nrrd_with_a_data_file_elsewhere_is_refused(tmp_path, data_file):
    path = write_nrrd(tmp_path / "x.nhdr", voxels())
    lines = path.read_text().replace("data file: x.raw.gz", f"data file: {data_file}")
    path.write_text(lines)
    with pytest.raises(VolumeError, match=r"data file beside its header.*one .nrrd file"):
        load_volume(path)


def test_nrrd_trailing_axis_of_one_element_carries_nothing(tmp_path):
    header = {"space": "RAS", "space_origin": [1, 2, 3]}
    directions = np.vstack([np.diag([1.0, 2, 3]), np.full((1, 3), np.nan)])
    path = write_nrrd(tmp_path / "x.nrrd", voxels()[..., None], space_directions=directions, **header)
    volume = load_volume(path)
    assert volume.array.shape == SHAPE
    assert np.array_equal(np.diag(volume.affine), [1, 2, 3, 1])
    assert volume.header["nrrd"]["space directions"].count("(") == 3


@pytest.mark.parametrize("shape", [(3, 5, 6, 7), (5, 6, 7, 2), (5, 6)])
def test_nrrd_of_another_dimension_is_refused(tmp_path, shape):
    with pytest.raises(VolumeError, match=r"one volume of 3 axes.*; received shape"):
        load_volume(write_nrrd(tmp_path / "x.nrrd", voxels(shape=shape)))


def test_nrrd_in_another_space_dimension_is_refused(tmp_path):
    path = write_nrrd(tmp_path / "x.nrrd", voxels(), space_dimension=2, space_directions=np.ones((3, 2)))
    with pytest.raises(VolumeError, match=r"3-D space; received directions of shape \(3, 2\)"):
        load_volume(path)


# pictures


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff"])
def test_picture_grey_is_indexed_x_then_y(tmp_path, suffix):
    rows = voxels(np.uint8, (4, 9))
    Image.fromarray(rows).save(tmp_path / f"x{suffix}")
    volume = load_volume(tmp_path / f"x{suffix}")
    assert volume.array.shape == (9, 4, 1)
    assert np.array_equal(volume.array[:, :, 0], rows.T)
    assert volume.is_2d
    assert volume.window.source is WindowSource.NATIVE
    assert np.array_equal(volume.affine, np.diag([-1, -1, 1, 1]))


def test_picture_lies_where_itk_shows_it(tmp_path):
    sitk = pytest.importorskip("SimpleITK", reason="the reference for pictures is ITK")
    Image.fromarray(voxels(np.uint8, (4, 9))).save(tmp_path / "x.png")
    image = sitk.ReadImage(str(tmp_path / "x.png"))
    assert image.GetSize() == load_volume(tmp_path / "x.png").shape[:2]
    assert (image.GetDirection(), image.GetOrigin(), image.GetSpacing()) == ((1, 0, 0, 1), (0, 0), (1, 1))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_picture_of_16_bits_keeps_its_values(tmp_path, suffix):
    rows = voxels(np.uint16, (4, 9)) * 300
    Image.fromarray(rows).save(tmp_path / f"x{suffix}")
    volume = load_volume(tmp_path / f"x{suffix}")
    assert np.array_equal(volume.array[:, :, 0], rows.T)
    assert volume.window.source is WindowSource.PERCENTILE


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_picture_in_colour_becomes_rgb_without_alpha(tmp_path, mode):
    rows = voxels(np.uint8, (4, 9, 3))
    picture = Image.fromarray(rows).convert(mode)
    if mode == "RGBA":
        picture.putalpha(3)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    picture.save(path)
    volume = load_volume(path)
    assert volume.is_rgb
    assert volume.array.dtype == np.uint8
    assert np.array_equal(volume.array[:, :, 0], np.asarray(picture.convert("RGB")).transpose(1, 0, 2))
    if mode in ("RGB", "RGBA"):
        assert np.array_equal(volume.array[:, :, 0], rows.transpose(1, 0, 2))


@pytest.mark.parametrize("mode", ["1", "LA", "F", "I"])
def test_picture_of_other_grey_modes_is_grey(tmp_path, mode):
    picture = Image.fromarray(voxels(np.uint8, (4, 9))).convert(mode)
    path = tmp_path / ("x.png" if mode in ("1", "LA") else "x.tif")
    picture.save(path)
    expected = picture.convert("L") if mode in ("1", "LA") else picture
    assert np.array_equal(load_volume(path).array[:, :, 0], np.asarray(expected).T)


def test_picture_jpeg_is_read(tmp_path):
    Image.fromarray(voxels(np.uint8, (40, 90))).save(tmp_path / "x.JPG", format="JPEG")
    assert load_volume(tmp_path / "x.JPG").array.shape == (90, 40, 1)


def test_picture_of_several_frames_is_refused(tmp_path):
    frames = [Image.fromarray(voxels(np.uint8, (4, 9))) for _ in range(3)]
    frames[0].save(tmp_path / "x.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(VolumeError, match="one picture; received 3 frames"):
        load_volume(tmp_path / "x.tif")


# files that are not what they seem


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".png", ".jpg", ".tif"])
@pytest.mark.parametrize("content", [b"", b"x", b"not an image at all" * 40, gzip.compress(b"nothing", mtime=0)])
def test_broken_file_is_refused_without_its_name(tmp_path, suffix, content):
    path = tmp_path / f"{NAME}{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        VolumeError, match=r"empty file of 0 bytes|its decoder stopped with \w+\. .* export it"
    ) as error:
        load_volume(path)
    text_of(error)


@pytest.mark.parametrize("kind", [".nii", ".nii.gz", ".nrrd", "raw.nrrd", ".png", ".tif"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_file_is_refused(tmp_path, kind, share):
    path = tmp_path / f"{NAME}{kind}"
    shape = (20, 30, 20)
    if ".nii" in kind:
        nifti(path, voxels(shape=shape), np.eye(4))
    elif "nrrd" in kind:
        write_nrrd(path, voxels(shape=shape), encoding="raw" if "raw" in kind else "gzip")
    else:
        Image.fromarray(voxels(np.uint8, (50, 60))).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(VolumeError, match="decoder stopped") as error:
        load_volume(path)
    text_of(error)


@pytest.mark.parametrize("suffix", [".mha", ".dcm", ".txt", "", ".hdr"])
def test_unknown_extension_lists_what_is_read(tmp_path, suffix):
    path = tmp_path / f"{NAME}{suffix}"
    path.write_bytes(b"content")
    expected = rf"extension out of .nii, .*series; received {suffix or 'none of these'}.*folder of the series"
    with pytest.raises(VolumeError, match=expected) as error:
        load_volume(path)
    text_of(error)


def test_identifier_with_dots_is_not_quoted_as_extension(tmp_path):
    path = tmp_path / "1.2.840.113619"
    path.write_bytes(b"content")
    with pytest.raises(VolumeError, match="received none of these") as error:
        load_volume(path)
    assert "113619" not in str(error.value)


def test_missing_file_is_refused_without_its_name(tmp_path):
    with pytest.raises(VolumeError, match=r"nothing is there. Check the image id") as error:
        load_volume(tmp_path / f"{NAME}.nii.gz")
    text_of(error)
