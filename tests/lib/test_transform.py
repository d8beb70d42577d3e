"""Slice to backbone input and back: round trips, and parity with the official preprocessing (METHODS 1.3, 7.4)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lib.config import backbone_names, backbone_row, from_mapping
from lib.contracts import BackboneSpec
from lib.errors import VolumeError
from lib.transform import SliceTransform

NAMES = backbone_names()
SIZES = [(512, 512), (511, 333), (97, 640), (1200, 801), (61, 63), (255, 200), (256, 256), (1, 1), (3, 1500)]


def spec_of(name: str) -> BackboneSpec:
    return from_mapping(BackboneSpec, {"name": name, **backbone_row(name).spec}, name)


def blob(size: tuple[int, int], centre_rc: tuple[float, float], sigma: float) -> np.ndarray:
    r, c = np.mgrid[: size[0], : size[1]]
    return np.exp(-((r - centre_rc[0]) ** 2 + (c - centre_rc[1]) ** 2) / (2 * sigma**2)).astype(np.float32)


def centroid_rc(weights: np.ndarray) -> np.ndarray:
    r, c = np.mgrid[: weights.shape[0], : weights.shape[1]]
    return np.array([(r * weights).sum(), (c * weights).sum()]) / weights.sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_points_round_trip_returns_the_voxel(name, size) -> None:
    transform = SliceTransform(spec_of(name), size)
    points_rc = np.array([[0, 0], [size[0] - 1, size[1] - 1], [size[0] // 2, size[1] // 3]], float)
    xy = transform.points_xy(points_rc)
    assert xy.min() >= -0.5 and xy.max() <= transform.spec.input_size - 0.5
    assert np.abs(transform.points_rc(xy) - points_rc).max() < 0.01  # required: < 0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(512, 512), (511, 333), (61, 63)])
def test_points_land_on_the_image_content(name, size) -> None:
    transform = SliceTransform(spec_of(name), size)
    scale = min(transform.inner[0] / size[0], transform.inner[1] / size[1])
    centre = (size[0] * 0.4, size[1] * 0.6)
    network = transform.image(blob(size, centre, sigma=3 + 2 / scale))[0] * transform.spec.std[0]
    bright = (network + transform.spec.mean[0] - 0.6).clamp_min(0)  # 0.6 is above the padding's mean colour
    found = centroid_rc(bright.double().numpy())
    expected = transform.points_xy(np.array([centre]))[0].flip(0).numpy()
    assert np.abs(found - expected).max() < 1.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(512, 512), (511, 333), (200, 150)])
def test_mask_round_trip_keeps_its_place(name, size) -> None:
    transform = SliceTransform(spec_of(name), size)
    cell = max(size) / transform.spec.mask_size
    native = torch.from_numpy(blob(size, (size[0] * 0.45, size[1] * 0.55), sigma=max(size) / 10)) * 20 - 10
    back = transform.logits(transform.mask(native[None, None]))[0, 0]
    assert back.shape == size
    shift = centroid_rc((back > 0).double().numpy()) - centroid_rc((native > 0).double().numpy())
    assert np.abs(shift).max() < 0.5 * cell


@pytest.mark.parametrize("name", NAMES)
def test_box_edges_are_half_open_voxels(name) -> None:
    transform = SliceTransform(spec_of(name), (300, 400))
    x0, y0, x1, y1 = transform.box_xy((10, 20, 110, 220)).tolist()
    first, last = transform.points_xy(np.array([[10, 20], [109, 219]]))
    assert x0 < first[0] and y0 < first[1] and x1 > last[0] and y1 > last[1]
    scale_x, scale_y = transform.inner[1] / 400, transform.inner[0] / 300
    assert x1 - x0 == pytest.approx(200 * scale_x, rel=1e-4) and y1 - y0 == pytest.approx(100 * scale_y, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_image_has_input_shape_and_is_finite(name, size) -> None:
    spec = spec_of(name)
    pixels = np.random.default_rng(0).random(size).astype(np.float32)
    out = SliceTransform(spec, size).image(pixels)
    assert out.shape == (3, spec.input_size, spec.input_size) and out.dtype == torch.float32
    assert torch.isfinite(out).all()


def test_constant_slice_does_not_divide_by_zero() -> None:
    out = SliceTransform(spec_of("medsam"), (40, 50)).image(np.full((40, 50), 0.7, np.float32))
    assert torch.equal(out, torch.zeros_like(out))


def rgb(size: tuple[int, int]) -> np.ndarray:
    coarse = np.random.default_rng(1).integers(0, 255, (size[0] // 8 + 1, size[1] // 8 + 1, 3))
    return np.kron(coarse, np.ones((8, 8, 1)))[: size[0], : size[1]].astype(np.uint8)


@pytest.mark.parametrize("size", [(480, 640), (333, 201), (1500, 1100)])
def test_sam1_image_equals_official_preprocessing(size) -> None:
    """Within the rounding of the official path, which resizes 8-bit pictures."""
    from segment_anything.modeling import Sam
    from segment_anything.utils.transforms import ResizeLongestSide

    pixels = rgb(size)
    resized = torch.as_tensor(ResizeLongestSide(1024).apply_image(pixels)).permute(2, 0, 1).float()
    holder = torch.nn.Module()
    holder.image_encoder = torch.nn.Module()
    holder.image_encoder.img_size = 1024
    holder.pixel_mean = torch.tensor([123.675, 116.28, 103.53]).view(-1, 1, 1)
    holder.pixel_std = torch.tensor([58.395, 57.12, 57.375]).view(-1, 1, 1)
    official = Sam.preprocess(holder, resized)
    ours = SliceTransform(spec_of("sam_vit_b"), size).image(pixels / np.float32(255))
    one_grey_level = 1 / 255 / 0.224
    assert float((ours - official).abs().max()) < 1.5 * one_grey_level
    assert float((ours - official).abs().mean()) < 0.5 * one_grey_level


def test_sam1_points_differ_from_official_by_less_than_half_a_scaled_pixel() -> None:
    """Official: x * scale, then +0.5. Ours keeps pixel centres: (x + 0.5) * scale."""
    from segment_anything.utils.transforms import ResizeLongestSide

    size = (300, 400)
    official = ResizeLongestSide(1024).apply_coords(np.array([[100.0, 50.0]]), size)
    ours = SliceTransform(spec_of("sam_vit_b"), size).points_xy(np.array([[50.0, 100.0]])).numpy()
    assert np.allclose(ours - official, 0.5 * (1024 / 400 - 1), atol=1e-3)


@pytest.mark.parametrize("size", [(480, 640), (333, 201)])
def test_sam2_image_equals_official_transforms(size) -> None:
    from sam2.utils.transforms import SAM2Transforms

    pixels = rgb(size)
    official = SAM2Transforms(resolution=1024, mask_threshold=0.0)(pixels)
    ours = SliceTransform(spec_of("sam2.1_tiny"), size).image(pixels / np.float32(255))
    assert float((ours - official).abs().max()) < 1e-4


def test_med2d_small_image_is_centre_padded_as_bgr() -> None:
    pixels = np.zeros((101, 60, 3), np.float32)
    pixels[..., 2] = 1.0  # blue
    transform = SliceTransform(spec_of("sam_med2d"), (101, 60))
    out = transform.image(pixels)
    assert transform.offset == (77, 98)
    inside = out[:, 77:178, 98:158]
    assert torch.allclose(inside[0], torch.tensor((1 - 0.485) / 0.229))  # blue is first, with red's constants
    assert torch.allclose(inside[2], torch.tensor((0 - 0.406) / 0.225))
    out[:, 77:178, 98:158] = 0
    assert torch.equal(out, torch.zeros_like(out))
    assert transform.points_xy(np.array([[0, 0]])).tolist() == [[98.0, 77.0]]


@pytest.mark.parametrize("size, squashed", [((255, 255), False), ((256, 100), True), ((100, 300), True)])
def test_med2d_squashes_unless_both_sides_are_small(size, squashed) -> None:
    assert (SliceTransform(spec_of("sam_med2d"), size).inner == (256, 256)) == squashed


def test_medsam_is_rescaled_per_image_without_mean_and_std() -> None:
    pixels = np.linspace(0.2, 0.6, 64 * 48, dtype=np.float32).reshape(64, 48)
    out = SliceTransform(spec_of("medsam"), (64, 48)).image(pixels)
    assert float(out.min()) == pytest.approx(0, abs=1e-3) and float(out.max()) == pytest.approx(1, abs=1e-3)


def test_pad_br_keeps_one_row_of_an_extreme_slice() -> None:
    assert SliceTransform(spec_of("sam_vit_b"), (1, 5000)).inner == (1, 1024)


@pytest.mark.parametrize("name", ["compact", "sam_vit_b", "medsam"])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_channels_become_three_for_an_encoder_that_takes_three(name, channels) -> None:
    pixels = np.random.default_rng(0).random((61, 63, channels), np.float32)
    transform = SliceTransform(spec_of(name), (61, 63))
    expected = pixels if channels == 3 else pixels.mean(2)
    assert torch.allclose(transform.image(pixels), transform.image(expected), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_channels_stay_for_an_encoder_that_takes_them(name) -> None:
    spec = spec_of(name)
    transform = SliceTransform(replace(spec, channels=4), (61, 63))
    pixels = np.random.default_rng(0).random((61, 63, 4), np.float32)
    found = transform.image(pixels)
    assert found.shape == (4, spec.input_size, spec.input_size)
    mean, std = np.mean(spec.mean), np.mean(spec.std)
    for channel in range(4):  # each as a grey picture of a backbone with the same mean and deviation thrice
        alike = replace(spec, mean=(mean,) * 3, std=(std,) * 3, per_image_minmax=False)
        if not spec.per_image_minmax:
            alone = SliceTransform(alike, (61, 63)).image(pixels[..., channel])
            assert torch.allclose(found[channel], alone[0], atol=1e-5)


@pytest.mark.parametrize(("channels", "size"), [(1, (8, 9)), (3, (8, 9, 3)), (2, (8, 9, 2))])
def test_other_channels_than_the_encoder_takes_are_refused(channels, size) -> None:
    transform = SliceTransform(replace(spec_of("tiny"), channels=4), (8, 9))
    with pytest.raises(VolumeError, match=f"image with 4 channels, as those .*; received {channels}. Add"):
        transform.image(np.zeros(size, np.float32))
