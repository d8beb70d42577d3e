import time

import nibabel as nib
import nrrd
import numpy as np
import pytest
from PIL import Image

from lib.data.volume import load_volume
from lib.data.window import Window
from lib.data.write import write_mask
from lib.errors import PromptError, VolumeError
from lib.types import Volume

SHAPE = (5, 6, 7)
OBLIQUE = np.array(
    [
        [0.66641, 0.2713, -0.73, -101.3],
        [-0.21371, 0.84529, 0.69, 57.77],
        [0.0, -0.1523, 4.2, 1033.1],
        [0.0, 0.0, 0.0, 1.0],
    ]
)
FLIPPED = OBLIQUE * np.array([-1.0, 1.0, -1.0, 1.0])
SAGITTAL = OBLIQUE[:, [2, 0, 1, 3]]
AFFINES = [np.diag([-1.0, -1.0, 3.0, 1.0]), OBLIQUE, FLIPPED, SAGITTAL]
VOXELS = np.random.default_rng(0).random(SHAPE, dtype=np.float32)
MASK = np.random.default_rng(1).integers(0, 5, SHAPE).astype(np.uint8)
SUFFIXES = [".nii", ".nii.gz", ".nrrd", ".seg.nrrd"]


def from_nifti(folder, affine, sform=1, qform=0, kind=nib.Nifti1Image, endianness="<"):
    header = kind.header_class(endianness=endianness)
    image = kind(VOXELS, affine, header)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    image.header["descrip"] = b"DOE^JOHN"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JOHN"))
    nib.save(image, folder / "image.nii.gz")
    return load_volume(folder / "image.nii.gz")


def from_nrrd(folder, affine, space="left-posterior-superior"):
    header = {"space": space, "space directions": affine[:3, :3].T, "space origin": affine[:3, 3]}
    nrrd.write(str(folder / "image.nrrd"), VOXELS, header)
    return load_volume(folder / "image.nrrd")


def from_picture(folder, shape=(4, 9)):
    Image.fromarray(np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)).save(folder / "image.png")
    return load_volume(folder / "image.png")


def voxels_of(path):
    return nrrd.read(str(path))[0] if path.suffix == ".nrrd" else np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize(("sform", "qform"), [(1, 0), (0, 1), (1, 2), (0, 0)])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_write_mask_of_a_nifti_image_reads_back_on_the_same_grid(tmp_path, affine, sform, qform, suffix):
    volume = from_nifti(tmp_path, affine, sform, qform)
    path = write_mask(volume, MASK, tmp_path / f"mask{suffix}")
    assert load_volume(path).affine.tobytes() == volume.affine.tobytes()
    assert np.array_equal(voxels_of(path), MASK)
    if not suffix.endswith(".nrrd"):
        source, result = (nib.load(p) for p in (tmp_path / "image.nii.gz", path))
        assert result.affine.tobytes() == source.affine.tobytes()
        for field in ("sform_code", "qform_code", "quatern_b", "qoffset_x", "srow_x", "pixdim", "xyzt_units"):
            assert result.header[field].tobytes() == source.header[field].tobytes()


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("space", ["left-posterior-superior", "right-anterior-superior", "LAS"])
@pytest.mark.parametrize("compress", [True, False])
def test_write_mask_of_an_nrrd_image_keeps_the_text_of_its_geometry(tmp_path, affine, space, compress):
    volume = from_nrrd(tmp_path, affine, space)
    path = write_mask(volume, MASK, tmp_path / "mask.nrrd", compress=compress)
    source, result = (p.read_bytes().split(b"\n\n")[0].decode() for p in (tmp_path / "image.nrrd", path))
    for field in ("space:", "space directions:", "space origin:"):
        assert [x for x in source.splitlines() if x.startswith(field)] == [
            x for x in result.splitlines() if x.startswith(field)
        ]
    assert load_volume(path).affine.tobytes() == volume.affine.tobytes()
    assert np.array_equal(voxels_of(path), MASK)


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_write_mask_nifti_of_an_nrrd_image_rounds_its_affine_to_float32(tmp_path, affine, suffix):
    volume = from_nrrd(tmp_path, affine)
    image = nib.load(write_mask(volume, MASK, tmp_path / f"mask{suffix}"))
    assert np.array_equal(image.affine, volume.affine.astype(np.float32))
    assert int(image.header["sform_code"]) == 1
    assert np.allclose(image.get_qform()[:3, 3], volume.affine[:3, 3], atol=1e-3)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", np.uint32, np.dtype(">i2")])
def test_write_mask_has_the_type_asked_for_little_endian(tmp_path, suffix, dtype):
    volume = from_nifti(tmp_path, OBLIQUE, endianness=">")
    path = write_mask(volume, MASK, tmp_path / f"mask{suffix}", dtype)
    if suffix.endswith(".nrrd"):
        array, header = nrrd.read(str(path))
        assert (array.dtype, header["endian"]) == (np.dtype(dtype).newbyteorder("<"), "little")
    else:
        image = nib.load(path)
        assert image.get_data_dtype() == np.dtype(dtype).newbyteorder("<")
        assert image.header.endianness == "<"
    assert np.array_equal(voxels_of(path), MASK)


def test_write_mask_keeps_nifti_2(tmp_path):
    volume = from_nifti(tmp_path, OBLIQUE, kind=nib.Nifti2Image)
    image = nib.load(write_mask(volume, MASK, tmp_path / "mask.nii"))
    assert isinstance(image, nib.Nifti2Image)
    assert image.affine.tobytes() == volume.affine.tobytes()


def test_write_mask_does_not_copy_free_text_of_the_source(tmp_path):
    path = write_mask(from_nifti(tmp_path, OBLIQUE), MASK, tmp_path / "mask.nii")
    assert b"DOE" not in path.read_bytes()


def test_write_mask_of_a_scaled_image_is_not_scaled(tmp_path):
    image = nib.Nifti1Image((VOXELS * 100).astype(np.int16), OBLIQUE)
    image.header.set_slope_inter(0.5, 10)
    image.to_filename(tmp_path / "image.nii")
    path = write_mask(load_volume(tmp_path / "image.nii"), MASK, tmp_path / "mask.nii")
    assert np.array_equal(nib.load(path).get_fdata(), MASK)


@pytest.mark.parametrize("array", [MASK > 2, MASK.astype(np.int64), np.asfortranarray(MASK), MASK[::-1]])
def test_write_mask_takes_any_integer_array_and_layout(tmp_path, array):
    path = write_mask(from_nifti(tmp_path, OBLIQUE), array, tmp_path / "mask.nrrd")
    assert np.array_equal(voxels_of(path), array)


def segments_of(path):
    """Value to name, as the file's key-value pairs have them; pynrrd reads them as ASCII."""
    text = path.read_bytes().split(b"\n\n")[0].decode()
    pairs = dict(line.split(":=", 1) for line in text.splitlines() if ":=" in line)
    count = sum(key.endswith("_Name") for key in pairs)
    return {int(pairs[f"Segment{n}_LabelValue"]): pairs[f"Segment{n}_Name"] for n in range(count)}, pairs


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({}, {1: "Segment_1", 2: "Segment_2", 3: "Segment_3", 4: "Segment_4"}),
        ({"liver": 1, "b": 2, "c": 3, "d": 4}, {1: "liver", 2: "b", 3: "c", 4: "d"}),
        ({"d": 4, "Läsion links": 3}, {1: "Segment_1", 2: "Segment_2", 3: "Läsion links", 4: "d"}),
        ({"absent": 9, "background": 0}, {**{n: f"Segment_{n}" for n in range(1, 5)}, 9: "absent"}),
        ({"two\nlines := \\": 1}, {1: "two lines := \\\\", 2: "Segment_2", 3: "Segment_3", 4: "Segment_4"}),
    ],
)
def test_write_mask_names_the_segments_of_a_seg_nrrd(tmp_path, names, expected):
    path = write_mask(from_nifti(tmp_path, OBLIQUE), MASK, tmp_path / "mask.seg.nrrd", names=names)
    found, pairs = segments_of(path)
    assert found == expected
    assert len({pairs[f"Segment{n}_ID"] for n in range(len(found))}) == len(found)
    colours = [tuple(map(float, pairs[f"Segment{n}_Color"].split())) for n in range(len(found))]
    assert len(set(colours)) == len(found) and all(0 <= c <= 1 for rgb in colours for c in rgb)
    assert pairs["Segment0_Extent"] == "0 4 0 5 0 6" and pairs["Segment0_Layer"] == "0"


def test_write_mask_plain_nrrd_carries_no_names(tmp_path):
    path = write_mask(from_nifti(tmp_path, OBLIQUE), MASK, tmp_path / "mask.nrrd", names={"liver": 1})
    assert b"liver" not in path.read_bytes()


def test_write_mask_seg_nrrd_is_read_by_slicers_own_core(tmp_path):
    sc = pytest.importorskip("slicer_core", reason="needs 3D Slicer's core: pip install -r requirements-dev.txt")
    names = {"große Läsion": 1, "two words": 2, "a\\b": 3, "absent": 7}
    path = write_mask(from_nrrd(tmp_path, OBLIQUE), MASK, tmp_path / "mask.seg.nrrd", names=names)
    logic, scene = sc.vtkSlicerSegmentationsModuleLogic(), sc.vtkMRMLScene()
    logic.SetMRMLScene(scene)
    segmentation = logic.LoadSegmentationFromFile(str(path), False).GetSegmentation()
    segments = [segmentation.GetNthSegment(n) for n in range(segmentation.GetNumberOfSegments())]
    assert {s.GetName(): s.GetLabelValue() for s in segments} == {**names, "Segment_4": 4}


def test_write_mask_agrees_with_itk_about_the_place(tmp_path):
    sitk = pytest.importorskip("SimpleITK", reason="the reference reader")
    from_nifti(tmp_path, np.diag([-1.5, 1.5, 3.0, 1.0]) + np.diag([0, 0, 0, 0.0]), 1, 1)
    volume = load_volume(tmp_path / "image.nii.gz")
    image, mask = sitk.ReadImage(str(tmp_path / "image.nii.gz")), None
    mask = sitk.ReadImage(str(write_mask(volume, MASK, tmp_path / "mask.nrrd")))
    assert (mask.GetOrigin(), mask.GetDirection(), mask.GetSpacing()) == (
        image.GetOrigin(),
        image.GetDirection(),
        image.GetSpacing(),
    )
    assert np.array_equal(sitk.GetArrayFromImage(mask).T, MASK)


def test_write_mask_of_a_picture_as_png_has_rows_and_columns_back(tmp_path):
    volume = from_picture(tmp_path)
    mask = np.random.default_rng(0).integers(0, 300, volume.shape)
    path = write_mask(volume, mask, tmp_path / "mask.png", np.uint16)
    assert np.array_equal(np.asarray(Image.open(path)), mask[:, :, 0].T)
    assert np.asarray(Image.open(path)).shape == np.asarray(Image.open(tmp_path / "image.png")).shape


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_write_mask_of_a_picture_as_volume_lies_on_the_picture(tmp_path, suffix):
    volume = from_picture(tmp_path)
    mask = (np.arange(36).reshape(volume.shape) % 2).astype(np.uint8)
    path = write_mask(volume, mask, tmp_path / f"mask{suffix}")
    assert voxels_of(path).shape == (9, 4, 1)
    assert load_volume(path).affine.tobytes() == volume.affine.tobytes()


@pytest.mark.parametrize("name", ["mask.mha", "mask.jpg", "mask.dcm", "mask"])
def test_write_mask_unknown_format_lists_the_known(tmp_path, name):
    with pytest.raises(
        PromptError, match=r"extension out of \['.nii', '.nii.gz', '.nrrd', '.seg.nrrd', '.png'\]; received"
    ):
        write_mask(from_nifti(tmp_path, OBLIQUE), MASK, tmp_path / name)


@pytest.mark.parametrize(
    ("mask", "dtype", "kind", "text"),
    [
        (MASK, "float32", PromptError, r"result type out of .*'uint8'\]; received 'float32'"),
        (MASK, "nonsense", PromptError, "received 'nonsense'"),
        (MASK + np.int64(300), "uint8", PromptError, r"holds labels 300..304; received uint8"),
        (MASK.astype(np.int16) - 1, "uint8", PromptError, "labels -1..3"),
        (MASK.astype(np.int64) + 40000, "int16", PromptError, "received int16. Ask for a wider one"),
        (MASK.astype(np.float32), "uint8", PromptError, "integer labels; received float32"),
        (MASK[:, :, :3], "uint8", VolumeError, r"image's grid \(5, 6, 7\); received \(5, 6, 3\)"),
    ],
)
def test_write_mask_refuses_what_it_cannot_keep(tmp_path, mask, dtype, kind, text):
    volume = from_nifti(tmp_path, OBLIQUE)
    with pytest.raises(kind, match=text):
        write_mask(volume, mask, tmp_path / "mask.nrrd", dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["image.nii.gz"]


def test_write_mask_png_of_a_volume_or_wide_type_is_refused(tmp_path):
    with pytest.raises(PromptError, match=r"3-D image; received .png"):
        write_mask(from_nifti(tmp_path, OBLIQUE), MASK, tmp_path / "mask.png")
    picture = from_picture(tmp_path)
    with pytest.raises(PromptError, match=r"PNG result type .*received int32"):
        write_mask(picture, np.ones(picture.shape, np.uint8), tmp_path / "mask.png", np.int32)


def test_write_mask_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch):
    volume = from_nifti(tmp_path, OBLIQUE)
    (tmp_path / "mask.nrrd").write_bytes(b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_mask(volume, MASK, tmp_path / "mask.nrrd")
    assert (tmp_path / "mask.nrrd").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.nii.gz", "mask.nrrd"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_write_mask_is_deterministic(tmp_path, suffix):
    volume = from_nifti(tmp_path, OBLIQUE)
    a, b = (write_mask(volume, MASK, tmp_path / f"{name}{suffix}").read_bytes() for name in "ab")
    assert a == b


def test_write_mask_raw_nrrd_of_a_big_volume_is_fast(tmp_path):
    shape = (512, 512, 40)
    volume = Volume(np.zeros(shape, np.float32, order="F"), OBLIQUE, (1.0, 1.0, 1.0), Window(0, 1), "hash")
    mask = np.zeros(shape, np.uint8, order="F")
    mask[100:200, 100:200] = 1
    times = []
    for _ in range(3):
        start = time.perf_counter()
        write_mask(volume, mask, tmp_path / "mask.nrrd", compress=False)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.2  # about 0.02 s on an idle machine
