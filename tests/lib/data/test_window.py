from dataclasses import replace

import numpy as np
import pytest

from lib.data.window import PRESETS, apply_window, choose_window, with_window
from lib.errors import PromptError
from lib.types import Volume, Window, WindowSource

SOFT = PRESETS["soft_tissue"]


def grey(lo=0.0, hi=1000.0, shape=(20, 20, 10)):
    return np.linspace(lo, hi, int(np.prod(shape)), dtype=np.float32).reshape(shape, order="F")


def ct_like(shape=(20, 20, 10)):
    array = np.full(shape, -1000, np.float32)
    array[5:15, 5:15] = np.random.default_rng(0).integers(-150, 300, (10, 10, 10))
    array[5, 5, 0] = 900
    return array


@pytest.mark.parametrize(
    ("options", "lo", "hi", "source"),
    [
        ({"requested": (10, 20), "dicom_window": (40, 400), "modality": "CT"}, 10, 20, WindowSource.REQUEST),
        ({"requested": "lung"}, -1350, 150, WindowSource.REQUEST),
        # DICOM PS3.3 C.11.2.1.2: centre - 0.5 -+ (width - 1) / 2
        ({"dicom_window": (40, 400), "modality": "CT"}, -160, 239, WindowSource.DICOM),
        ({"dicom_window": (2048, 4096)}, 0, 4095, WindowSource.DICOM),
        ({"dicom_window": (0.5, 1.0)}, 0, 1, WindowSource.DICOM),
        ({"dicom_window": (40, 0), "modality": "CT"}, *SOFT, WindowSource.PRESET),
        ({"dicom_window": (float("nan"), 400), "modality": "CT"}, *SOFT, WindowSource.PRESET),
        ({"modality": "CT"}, *SOFT, WindowSource.PRESET),
        ({"native_uint8": True}, 0, 255, WindowSource.NATIVE),
        ({"native_uint8": True, "requested": (5, 50)}, 5, 50, WindowSource.REQUEST),
        ({"is_rgb": True, "requested": (5, 50)}, 0, 255, WindowSource.NATIVE),
    ],
)
def test_choose_window_takes_the_first_source_that_is_there(options, lo, hi, source):
    window = choose_window(grey(), **options)
    assert (window.lo, window.hi, window.source) == (lo, hi, source)


@pytest.mark.parametrize(
    ("requested", "text"),
    [
        ("lungs", r"preset out of .*'lungs'"),
        ((20, 10), r"lo < hi; received \(20.0, 10.0\)"),
        ((5, 5), "lo < hi"),
        ((0, float("inf")), "finite"),
        ((0, 1e-50), "lo < hi"),
        ((-3e38, 3e38), "finite"),
        ((1, 2, 3), "two numbers"),
        ((None, 2), "two numbers"),
        (7, "two numbers"),
    ],
)
def test_choose_window_unusable_request_says_why(requested, text):
    with pytest.raises(PromptError, match=text):
        choose_window(grey(), requested=requested)


def test_choose_window_without_hints_uses_percentiles():
    window = choose_window(grey())
    assert window.source is WindowSource.PERCENTILE
    assert window.lo == pytest.approx(5, abs=1)
    assert window.hi == pytest.approx(995, abs=1)


def test_choose_window_leaves_the_background_out():
    array = np.zeros((30, 30, 10), np.float32)
    array[:6, :6] = grey(500, 600, (6, 6, 10))
    window = choose_window(array)
    assert 499 < window.lo < 510
    assert 590 < window.hi < 601


def test_choose_window_resists_single_bright_voxels():
    array = grey()
    array[0, 0, 0] = 1e6
    assert choose_window(array).hi < 1001


def test_choose_window_degenerate_percentiles_fall_back_to_the_range():
    array = np.zeros((30, 30, 10), np.float32)
    array[3, 3, 3] = 7
    window = choose_window(array)
    assert (window.lo, window.hi) == (0, 7)
    array[:10] = 7
    assert choose_window(array).lo < choose_window(array).hi


def test_choose_window_hounsfield_without_tags_gets_the_ct_preset():
    window = choose_window(ct_like())
    assert (window.lo, window.hi, window.source) == (*SOFT, WindowSource.PRESET)


@pytest.mark.parametrize(
    "array",
    [
        ct_like() * 1.037 + 0.31,  # not whole numbers
        np.maximum(ct_like(), -500),  # no air
        np.rint(grey(-4096, 4095)),  # MR phase
        np.rint(grey(-3000, 3000)),  # spreads evenly, little soft tissue
    ],
)
def test_choose_window_other_negative_images_get_percentiles(array):
    assert choose_window(array).source is WindowSource.PERCENTILE


def test_choose_window_known_other_modality_is_never_taken_for_ct():
    assert choose_window(ct_like(), modality="MR").source is WindowSource.PERCENTILE


def test_choose_window_does_not_depend_on_memory_layout():
    array = np.random.default_rng(0).normal(size=(128, 128, 128)).astype(np.float32)
    fortran = np.asfortranarray(array)
    assert choose_window(array) == choose_window(fortran)


def test_choose_window_of_a_big_volume_is_close_to_all_voxels():
    array = np.random.default_rng(0).normal(size=(160, 160, 100)).astype(np.float32)
    window = choose_window(array)
    assert (window.lo, window.hi) == pytest.approx(np.percentile(array, (0.5, 99.5)), abs=0.03)


def test_apply_window_maps_and_clips_to_float32():
    pixels = np.array([[-200, -160], [40, 500]], np.float32)
    result = apply_window(pixels, Window(-160, 240))
    assert result.dtype == np.float32
    assert np.array_equal(result, np.array([[0, 0], [0.5, 1]], np.float32))
    assert pixels[0, 0] == -200


def test_apply_window_colour_is_divided_by_255():
    pixels = np.array([[[0, 51, 255]]], np.uint8)
    result = apply_window(pixels, Window(0, 1))
    assert result.dtype == np.float32
    assert result.ravel() == pytest.approx([0, 0.2, 1])


def channels():
    """A CT, an MR and an 8-bit-like channel."""
    return np.stack([ct_like(), grey(shape=ct_like().shape), grey(0, 255, ct_like().shape)], -1)


def test_channels_get_a_window_each_and_a_request_is_the_first_ones():
    array = channels()
    window = choose_window(array)
    assert [window, *window.rest] == [
        replace(choose_window(array[..., 0]), rest=window.rest), *(choose_window(array[..., m]) for m in (1, 2))
    ]  # fmt: skip
    assert (window.source, window.rest[0].source) == (WindowSource.PRESET, WindowSource.PERCENTILE)
    asked = choose_window(array, requested=(3, 4))
    assert asked == Window(3.0, 4.0, WindowSource.REQUEST, window.rest)
    assert len({window.key(), asked.key(), replace(window, rest=window.rest[:1]).key()}) == 3


def test_with_window_replaces_the_first_channels_alone():
    array = channels()
    volume = Volume(array, np.eye(4), (1.0, 1.0, 1.0), choose_window(array), "hash")
    assert with_window(volume, None) is volume
    assert with_window(volume, "lung").window == choose_window(array, requested="lung")
    colour = replace(volume, array=np.zeros((2, 2, 2, 3), np.uint8))
    assert with_window(colour, (3, 4)) is colour
    with pytest.raises(PromptError, match="lo < hi"):
        with_window(volume, (4, 3))


def test_apply_window_maps_every_channel_by_its_own():
    pixels = np.array([[[-200, 5, 1], [500, 10, 3]]], np.float32)
    window = Window(-160, 240, rest=(Window(0, 10), Window(1, 5)))
    result = apply_window(pixels, window)
    assert result.dtype == np.float32 and np.array_equal(result, np.array([[[0, 0.5, 0], [1, 1, 0.5]]], np.float32))
