"""DICOM beyond one grey slice per file: enhanced objects, compressed pixels, colour, cine and series of no place."""

import io

import numpy as np
import openjpeg
import pydicom
import pytest
from PIL import Image
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    JPEG2000,
    ComputedRadiographyImageStorage,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    UltrasoundImageStorage,
    generate_uid,
)

from lib.data.dicom import frame_order
from lib.data.samples import LabelledCase, load_case, training_slices
from lib.data.volume import load_volume
from lib.data.write import write_mask
from lib.engine import Engine, SegmentOptions
from lib.errors import VolumeError
from lib.train_data import Batches, all_slices
from lib.types import Click, UserPrompts, WindowSource
from tests.cases import learned, recipe, settings
from tests.dicom_files import (
    NORMAL,
    ORIGIN,
    RAS,
    STEP,
    STORED,
    cine,
    compressed,
    enhanced,
    image,
    place,
    placed_files,
    region,
    save,
    series,
)

SCALED = (STORED * np.arange(1.0, 7)[:, None, None] - 10.0 * np.arange(6)[:, None, None]).transpose(2, 1, 0)
Y, X = np.mgrid[0:48, 0:64]
SMOOTH = np.stack([X * 4, Y * 5, 255 - X * 2 - Y], -1).clip(0, 255).astype(np.uint8)  # (row, column, 3)
FRAMES = np.stack([np.roll(SMOOTH, 5 * n, axis=1) for n in range(3)])


# --- enhanced multi-frame


@pytest.mark.parametrize("order", [range(6), (3, 0, 5, 1, 4, 2)])
def test_enhanced_frames_are_sorted_scaled_and_placed(tmp_path, order):
    folder = save(tmp_path / "s", [enhanced(tuple(order))])
    volume = load_volume(folder)
    assert np.array_equal(volume.array, SCALED.astype(np.float32))
    assert np.allclose(volume.affine[:3], RAS, atol=1e-5)
    assert (volume.window.lo, volume.window.hi, volume.window.source) == (2.5, 1001.5, WindowSource.DICOM)
    (path,) = placed_files(folder)
    assert frame_order(folder) == [(path, list(order).index(k)) for k in range(6)]
    assert not volume.warnings


def test_enhanced_groups_that_all_frames_share_are_read(tmp_path):
    """Scale, window and orientation may stand once for all frames or with every frame."""
    dataset = enhanced(tuple(range(6)))
    shared = dataset.SharedFunctionalGroupsSequence[0]
    for groups in dataset.PerFrameFunctionalGroupsSequence:
        groups.PlaneOrientationSequence = shared.PlaneOrientationSequence
        scale = groups.PixelValueTransformationSequence
        del groups.PixelValueTransformationSequence, groups.FrameVOILUTSequence
    del shared.PlaneOrientationSequence
    shared.PixelValueTransformationSequence = scale
    volume = load_volume(save(tmp_path / "s", [dataset]))
    assert np.array_equal(volume.array, STORED.transpose(2, 1, 0) * np.float32(6) - 50)
    assert volume.window.source is WindowSource.PERCENTILE


def test_enhanced_object_in_several_files_is_one_volume(tmp_path):
    first, second = enhanced((4, 2, 0)), enhanced((1, 3, 5))
    second.SeriesInstanceUID = first.SeriesInstanceUID
    folder = save(tmp_path / "s", [first, second])
    assert np.array_equal(load_volume(folder).array, SCALED.astype(np.float32))
    assert [number for _, number in frame_order(folder)] == [2, 0, 1, 1, 0, 2]
    assert len(placed_files(folder)) == 2


def stack_of(groups, k):
    groups.FrameContentSequence[0].StackID = "1" if k < 3 else "2"


def time_point(groups, k):
    groups.FrameContentSequence[0].TemporalPositionIndex = k % 2 + 1
    groups.PlanePositionSequence[0].ImagePositionPatient = place(ORIGIN + k // 2 * STEP * NORMAL)[
        "ImagePositionPatient"
    ]


def tilted(groups, k):
    groups.PlanePositionSequence[0].ImagePositionPatient = [0, k, 2.0 * k]


def unplaced(groups, k):
    del groups.PlanePositionSequence


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (stack_of, "one stack of slices; the DICOM frames belong to 2 stacks"),
        (time_point, r"one slice per position; received 6 slices at 3 positions \(time points, echoes\?\)"),
        (tilted, "tilted gantry"),
        (unplaced, r"tags \['ImagePositionPatient'\] are missing in a file or frame"),
    ],
)
def test_enhanced_frames_we_cannot_stack_are_refused(tmp_path, change, text):
    folder = save(tmp_path / "s", [enhanced(tuple(range(6)), change)])
    with pytest.raises(VolumeError, match=text) as error:
        load_volume(folder)
    assert "DOE" not in str(error.value)


def test_enhanced_missing_frame_is_refused(tmp_path):
    with pytest.raises(VolumeError, match="slices are missing"):
        load_volume(save(tmp_path / "s", [enhanced((0, 1, 3, 4))]))


def test_enhanced_of_highdicom_reads_as_the_slices_it_was_made_of(tmp_path):
    legacy = pytest.importorskip("highdicom.legacy", reason="makes legacy converted enhanced CT")
    tags = {"Modality": "CT", "WindowCenter": 500, "WindowWidth": 1000, "StudyInstanceUID": generate_uid()}
    tags |= dict.fromkeys(
        ("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "PatientBirthDate", "PatientSex"), ""
    )
    tags |= {"FrameOfReferenceUID": generate_uid(), "Manufacturer": "", "ReferringPhysicianName": ""}
    tags |= {"ImageType": ["ORIGINAL", "PRIMARY"], "InstanceNumber": lambda k: k + 1, "AcquisitionDateTime": "20240101"}
    single = series(**tags)
    made = legacy.LegacyConvertedEnhancedCTImage(single, generate_uid(), 1, generate_uid(), 1)
    whole, slices = load_volume(save(tmp_path / "e", [made])), load_volume(save(tmp_path / "s", single))
    assert whole.content_hash == slices.content_hash
    assert np.allclose(whole.affine, slices.affine, atol=1e-9)
    assert whole.window == slices.window


def test_enhanced_agrees_with_itk(tmp_path):
    sitk = pytest.importorskip("SimpleITK", reason="the reference for series is GDCM")

    def unscaled(groups, _):
        del groups.PixelValueTransformationSequence

    folder = save(tmp_path / "s", [enhanced(tuple(range(6)), unscaled)])
    found, volume = sitk.ReadImage(str(placed_files(folder)[0])), load_volume(folder)
    direction = np.array(found.GetDirection()).reshape(3, 3) * found.GetSpacing()
    assert np.array_equal(sitk.GetArrayFromImage(found).T, volume.array)
    assert np.allclose(volume.affine[:3, :3], direction * [[-1], [-1], [1]], atol=1e-4)
    assert np.allclose(volume.affine[:3, 3], found.GetOrigin() * np.array([-1, -1, 1]))


# --- compressed


def encoded(pixels, syntax):
    """One frame as a stream of a syntax; each encoder is another package than the decoder where there are two."""
    target = io.BytesIO()
    if syntax in (JPEG2000, JPEG2000Lossless):
        colour = {"photometric_interpretation": 1, "use_mct": True} if pixels.ndim == 3 else {}
        rates = {"compression_ratios": [4]} if syntax == JPEG2000 else {}
        return openjpeg.encode(pixels, bits_stored=pixels.dtype.itemsize * 8, **colour, **rates)
    if syntax == JPEGLSLossless:
        pytest.importorskip("pillow_jpls", reason="no JPEG-LS encoder")
        Image.fromarray(pixels).save(target, "JPEG-LS")
    else:
        Image.fromarray(pixels).save(target, "JPEG", quality=95)
    return target.getvalue()


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_lossless_pixels_are_exact(tmp_path, syntax):
    datasets = series()
    for dataset, pixels in zip(datasets, STORED):
        if syntax == RLELossless:
            dataset.compress(RLELossless)
        else:
            compressed(dataset, [encoded(pixels, syntax)], syntax)
    volume = load_volume(save(tmp_path / "s", datasets))
    assert np.array_equal(volume.array, STORED.transpose(2, 1, 0).astype(np.float32) - 100)


@pytest.mark.parametrize("pixels", [STORED[0], FRAMES[0]], ids=["grey", "colour"])
def test_lossless_jpeg_of_gdcm_is_exact(tmp_path, pixels):
    sitk = pytest.importorskip("SimpleITK", reason="no lossless JPEG encoder")
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(tmp_path / "0.dcm"))
    writer.SetUseCompression(True)
    writer.SetCompressor("JPEG")
    writer.Execute(sitk.GetImageFromArray(pixels, isVector=pixels.ndim == 3))
    syntax = pydicom.dcmread(tmp_path / "0.dcm").file_meta.TransferSyntaxUID
    assert syntax == "1.2.840.10008.1.2.4.70"
    volume = load_volume(tmp_path)
    assert np.array_equal(volume.array[:, :, 0], pixels.swapaxes(0, 1))


def test_signed_pixels_are_exact_in_jpeg_2000(tmp_path):
    signed = (STORED.astype(np.int16) - 500)[:1]
    dataset = series(1, pixels=signed, PixelRepresentation=1)[0]
    folder = save(tmp_path / "s", [compressed(dataset, [encoded(signed[0], JPEG2000Lossless)], JPEG2000Lossless)])
    assert np.array_equal(load_volume(folder).array[:, :, 0], signed[0].T - 100.0)


def test_lossy_jpeg_is_close(tmp_path):
    grey = np.ascontiguousarray(SMOOTH[..., 0])
    dataset = cine(grey[None])
    folder = save(tmp_path / "s", [compressed(dataset, [encoded(grey, JPEGBaseline8Bit)], JPEGBaseline8Bit)])
    assert np.abs(load_volume(folder).array[:, :, 0] - grey.T).max() <= 2


def test_damaged_stream_is_told(tmp_path):
    stream = encoded(SMOOTH, JPEGBaseline8Bit)[:200]
    folder = save(tmp_path / "s", [compressed(cine(SMOOTH[None], "RGB"), [stream], JPEGBaseline8Bit, "YBR_FULL_422")])
    with pytest.raises(VolumeError, match=r"decoder stopped with|the file may also be damaged"):
        load_volume(folder)


def test_enhanced_object_may_be_compressed(tmp_path):
    dataset = enhanced((3, 0, 5, 1, 4, 2))
    streams = [encoded(STORED[k], JPEG2000Lossless) for k in (3, 0, 5, 1, 4, 2)]
    folder = save(tmp_path / "s", [compressed(dataset, streams, JPEG2000Lossless)])
    assert np.array_equal(load_volume(folder).array, SCALED.astype(np.float32))


# --- colour


def ybr(rgb):
    """ITU-R BT.601 as PS3.3 C.7.6.3.1.2 writes it."""
    matrix = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    return np.rint(rgb @ matrix.T + [0, 128, 128]).clip(0, 255).astype(np.uint8)


def planes(dataset):
    dataset.PlanarConfiguration = 1
    frames = np.frombuffer(dataset.PixelData, np.uint8).reshape(-1, 48, 64, 3)
    dataset.PixelData = np.ascontiguousarray(frames.transpose(0, 3, 1, 2)).tobytes()
    return dataset


def halved(dataset):
    """YBR_FULL_422 without compression: two Y, then the Cb and Cr of the first."""
    pairs = np.frombuffer(dataset.PixelData, np.uint8).reshape(-1, 2, 3)
    dataset.PixelData = np.column_stack([pairs[:, :, 0], pairs[:, 0, 1:]]).tobytes()
    dataset.PhotometricInterpretation = "YBR_FULL_422"
    return dataset


COLOURS = {
    "RGB": (lambda: cine(FRAMES, "RGB"), 0),
    "planes": (lambda: planes(cine(FRAMES, "RGB")), 0),
    "YBR_FULL": (lambda: cine(ybr(FRAMES), "YBR_FULL"), 2),
    "YBR_FULL_422": (lambda: halved(cine(ybr(FRAMES), "YBR_FULL")), 8),
    "JPEG": (lambda: packed(JPEGBaseline8Bit, "YBR_FULL_422"), 8),
    "JPEG-LS": (lambda: packed(JPEGLSLossless, "RGB"), 0),
    "JPEG 2000 lossless": (lambda: packed(JPEG2000Lossless, "YBR_RCT"), 0),
    "JPEG 2000": (lambda: packed(JPEG2000, "YBR_ICT"), 3),
}


def packed(syntax, colour):
    return compressed(cine(FRAMES, "RGB"), [encoded(frame, syntax) for frame in FRAMES], syntax, colour)


@pytest.mark.parametrize("name", COLOURS)
def test_colour_becomes_rgb(tmp_path, name):
    made, tolerance = COLOURS[name]
    volume = load_volume(save(tmp_path / "s", [made()]))
    assert volume.is_rgb
    assert volume.array.dtype == np.uint8
    assert volume.shape == (64, 48, 3)
    inside = np.abs(volume.array.astype(int) - FRAMES.transpose(2, 1, 0, 3))[np.arange(64) % 64 > 15]
    assert inside.max() <= tolerance
    assert (volume.window.lo, volume.window.hi, volume.window.source) == (0, 255, WindowSource.NATIVE)


@pytest.mark.parametrize(("bits", "shift"), [(8, 0), (16, 8)])
def test_palette_becomes_rgb(tmp_path, bits, shift):
    tables = np.random.default_rng(1).integers(0, 256, (3, 256))
    index = np.random.default_rng(2).integers(0, 256, (2, 48, 64)).astype(np.uint8)
    tags = {}
    for name, table in zip(("Red", "Green", "Blue"), tables):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        data = (table << shift).astype("u1" if bits == 8 else "<u2").tobytes()
        tags[f"{name}PaletteColorLookupTableData"] = data
    volume = load_volume(save(tmp_path / "s", [cine(index, "PALETTE COLOR", **tags)]))
    assert np.array_equal(volume.array, tables.T[index].transpose(2, 1, 0, 3))


def test_colour_of_16_bits_is_refused(tmp_path):
    with pytest.raises(VolumeError, match="colours of 8 bits; received 16"):
        load_volume(save(tmp_path / "s", [cine(FRAMES.astype(np.uint16), "RGB")]))


def test_grey_and_colour_in_one_series_is_refused(tmp_path):
    first, second = cine(FRAMES, "RGB"), cine(FRAMES[..., 0].copy())
    second.SeriesInstanceUID = first.SeriesInstanceUID
    with pytest.raises(VolumeError, match="one kind, grey or colour"):
        load_volume(save(tmp_path / "s", [first, second]))


def test_colour_slices_in_space_are_placed(tmp_path):
    uid = generate_uid()
    slices = [
        image(
            FRAMES[n], UltrasoundImageStorage, "RGB", Modality="US", SeriesInstanceUID=uid, **place(ORIGIN + n * NORMAL)
        )
        for n in (2, 0, 1)
    ]
    volume = load_volume(save(tmp_path / "s", slices))
    assert np.array_equal(volume.array, FRAMES.transpose(2, 1, 0, 3))
    assert volume.spacing_mm == pytest.approx((0.75, 0.5, 1.0), abs=1e-4)
    assert not volume.warnings


def test_colour_volume_is_trained_on(tmp_path):
    save(tmp_path / "us", [cine(FRAMES, "RGB")])
    target = (FRAMES[..., 0] > 100).transpose(2, 1, 0).astype(np.uint8)
    label = write_mask(load_volume(tmp_path / "us"), target, tmp_path / "label.nrrd")
    case = load_case(LabelledCase("us", tmp_path / "us", label), ["bright", "dark"])
    assert np.array_equal(case.target, target)
    assert training_slices(case, 2) == [0, 1, 2]
    model = learned(Engine(settings(tmp_path)))
    batches = Batches(model, all_slices([case]), recipe())
    batches.prepare()
    features, targets = batches.batch(0)
    assert features.embed.isfinite().all()
    assert targets.shape[:2] == (3, 2)
    assert targets[:, 0].any()


@pytest.mark.parametrize("axis", ["k", "i"])
def test_colour_volume_is_segmented_and_its_mask_written(tmp_path, axis):
    frames = np.full((5, 48, 64, 3), 30, np.uint8)
    frames[:, 12:36, 20:44] = (220, 120, 40)
    volume = load_volume(save(tmp_path / "s", [cine(frames, "RGB")]))
    engine = Engine(settings(tmp_path))
    found = engine.segment(volume, UserPrompts((Click((32, 24, 2)),)), SegmentOptions(axis=axis))
    assert found.mask.shape == (64, 48, 5)
    assert found.axis == "ijk".index(axis)
    for name in ("m.nrrd", "m.nii.gz"):
        written = load_volume(write_mask(volume, frames[..., 0].transpose(2, 1, 0) > 100, tmp_path / name))
        assert np.allclose(written.affine, volume.affine)
        assert written.array.sum() == 5 * 24 * 24


# --- without a place


@pytest.mark.parametrize(
    ("tags", "spacing_mm", "text"),
    [
        ({}, (1, 1, 1), "pixels of unknown size, taken as 1 mm"),
        ({"PixelSpacing": [0.2, 0.3]}, (0.3, 0.2, 1), "pixels of 0.3 x 0.2 mm"),
        ({"ImagerPixelSpacing": [2, 3]}, (3, 2, 3), "pixels of 3 x 2 mm"),
        ({"SequenceOfUltrasoundRegions": [region((0.4, 0.5), (63, 47))]}, (0.5, 0.4, 1), "pixels of 0.5 x 0.4 mm"),
        (
            {"SequenceOfUltrasoundRegions": [region((9, 9), (9, 9)), region((0.4, 0.5), (63, 40))]},
            (0.5, 0.4, 1),
            "pixels of 0.5 x 0.4 mm",
        ),
        ({"SequenceOfUltrasoundRegions": [region((0.4, 0.5), (63, 47), unit=4)]}, (1, 1, 1), "of unknown size"),
    ],
)
def test_cine_lies_on_the_lps_axes_with_a_warning(tmp_path, tags, spacing_mm, text):
    tags = {name: Items(v) if name.startswith("Seq") else v for name, v in tags.items()}
    volume = load_volume(save(tmp_path / "s", [cine(FRAMES[..., 0].copy(), **tags)]))
    assert np.array_equal(volume.array, FRAMES[..., 0].transpose(2, 1, 0))
    assert np.allclose(volume.affine, np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1]))
    assert volume.warnings[0].startswith("The series has no position in space: 3 frames by their numbers")
    assert text in volume.warnings[0]


def test_slices_of_no_place_are_sorted_by_number(tmp_path):
    uid, numbers = generate_uid(), (10, 9, 11)
    slices = [
        image(FRAMES[n, ..., 0].copy(), UltrasoundImageStorage, SeriesInstanceUID=uid, Modality="US", InstanceNumber=m)
        for n, m in enumerate(numbers)
    ]
    folder = save(tmp_path / "s", slices)
    assert np.array_equal(load_volume(folder).array, FRAMES[[1, 0, 2], ..., 0].transpose(2, 1, 0))
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in placed_files(folder)]
    assert uids == [slices[n].SOPInstanceUID for n in (1, 0, 2)]


def test_ultrasound_of_several_sizes_is_refused(tmp_path):
    first, second = cine(FRAMES, "RGB"), cine(FRAMES[:, :40].copy(), "RGB")
    second.SeriesInstanceUID = first.SeriesInstanceUID
    with pytest.raises(VolumeError, match="one size, spacing and orientation"):
        load_volume(save(tmp_path / "s", [first, second]))


@pytest.mark.parametrize(
    ("tags", "source"),
    [
        ({}, WindowSource.NATIVE),
        ({"WindowCenter": 100, "WindowWidth": 50}, WindowSource.DICOM),
        ({"RescaleSlope": 2, "RescaleIntercept": 0}, WindowSource.PERCENTILE),
        ({"PhotometricInterpretation": "MONOCHROME1"}, WindowSource.PERCENTILE),
    ],
)
def test_grey_of_8_bits_is_shown_as_a_screen_shows_it(tmp_path, tags, source):
    assert load_volume(save(tmp_path / "s", [cine(FRAMES[..., 0].copy(), **tags)])).window.source is source


def test_one_radiograph_is_a_volume_of_one_slice(tmp_path):
    tags = {"Modality": "CR", "PhotometricInterpretation": "MONOCHROME1", "ImagerPixelSpacing": [0.1, 0.1]}
    volume = load_volume(save(tmp_path / "s", [image(STORED[0], ComputedRadiographyImageStorage, **tags)]))
    assert np.array_equal(volume.array[:, :, 0], -STORED[0].T.astype(np.float32))
    assert volume.spacing_mm == pytest.approx((0.1, 0.1, 1))
    assert not volume.is_2d
