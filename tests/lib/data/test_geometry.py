import numpy as np
import pytest

from lib.data import geometry
from lib.errors import PromptError
from lib.types import Box, Volume, Window

SHAPE = (4, 5, 6)


def volume_of(array):
    return Volume(array, np.eye(4), (1.0, 1.0, 1.0), Window(0, 1), "hash")


@pytest.fixture
def volume():
    return volume_of(np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE))


@pytest.mark.parametrize(
    ("spacing_mm", "shape", "options", "axis"),
    [
        ((1, 1, 5), SHAPE, {}, 2),
        ((1, 5, 1), SHAPE, {}, 1),
        ((5, 1, 1), SHAPE, {}, 0),
        ((1, 1, 1), SHAPE, {}, 2),
        ((2, 1, 2), SHAPE, {}, 2),
        ((2, 2, 1), SHAPE, {}, 1),
        ((1.0000001, 1, 0.9999999), SHAPE, {}, 2),
        ((1, 1, 5), (1, 50, 60), {}, 0),
        ((5, 5, 1), (50, 60, 1), {}, 2),
        ((5, 1, 1), (50, 60, 1), {"is_2d": True}, 2),
        ((1, 1, 5), SHAPE, {"requested": 0}, 0),
        ((1, 1, 5), SHAPE, {"requested": "j"}, 1),
        ((1, 1, 5), SHAPE, {"requested": " I "}, 0),
        ((1, 1, 5), SHAPE, {"requested": "1"}, 1),
        ((1, 1, 1), SHAPE, {"requested": "k", "is_2d": True}, 2),
    ],
)
def test_choose_axis_gives_the_expected_axis(spacing_mm, shape, options, axis):
    assert geometry.choose_axis(spacing_mm, shape, **options) == axis


@pytest.mark.parametrize("requested", [3, -1, "z", "axial", "", True, 1.5])
def test_choose_axis_unknown_request_is_refused(requested):
    with pytest.raises(PromptError, match=r"slice axis 0, 1, 2 or i, j, k; received"):
        geometry.choose_axis((1, 1, 1), SHAPE, requested=requested)


def test_choose_axis_of_a_picture_is_k_only():
    with pytest.raises(PromptError, match="axis k for a 2-D image; received 'i'"):
        geometry.choose_axis((1, 1, 1), (5, 5, 1), requested="i", is_2d=True)


def test_slice_of_axis_k_has_rows_j_and_columns_i(volume):
    assert np.array_equal(geometry.slice_of(volume, 2, 3), volume.array[:, :, 3].T)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slice_of_agrees_with_to_slice_rc_for_every_voxel(volume, axis):
    for ijk in np.ndindex(SHAPE):
        index, row, column = geometry.to_slice_rc(ijk, axis)
        assert geometry.slice_of(volume, axis, index)[row, column] == volume.array[ijk]
        assert geometry.from_slice_rc(index, row, column, axis) == ijk
    assert geometry.slice_of(volume, axis, 0).shape == geometry.slice_size(SHAPE, axis)


def test_slice_of_colour_keeps_channels_last():
    array = np.random.default_rng(0).integers(0, 255, (7, 5, 1, 3), dtype=np.uint8)
    assert np.array_equal(geometry.slice_of(volume_of(array), 2, 0), array[:, :, 0].transpose(1, 0, 2))


@pytest.mark.parametrize(("axis", "index", "limit"), [(2, 6, "0..5 along k"), (0, -1, "0..3 along i")])
def test_slice_of_outside_names_the_range(volume, axis, index, limit):
    with pytest.raises(PromptError, match=rf"{limit}; received {index}"):
        geometry.slice_of(volume, axis, index)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_put_slice_is_the_inverse_of_slice_of(volume, axis):
    copy = np.zeros(SHAPE, np.float32)
    for index in range(SHAPE[axis]):
        geometry.put_slice(copy, axis, index, geometry.slice_of(volume, axis, index))
    assert np.array_equal(copy, volume.array)


def test_put_slice_of_another_size_is_refused():
    with pytest.raises(PromptError, match=r"\(5, 4\) rows and columns across k; received \(4, 5\)"):
        geometry.put_slice(np.zeros(SHAPE), 2, 0, np.zeros((4, 5)))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_box_to_slices_covers_exactly_the_box(axis):
    box = Box.spanning((3, 1, 2), (1, 3, 5))
    painted = np.zeros(SHAPE, np.uint8)
    slices, (r0, c0, r1, c1) = geometry.box_to_slices(box, axis)
    for index in slices:
        geometry.slice_view(painted, axis, index)[r0:r1, c0:c1] = 1
    expected = np.zeros(SHAPE, np.uint8)
    expected[1:4, 1:4, 2:6] = 1
    assert np.array_equal(painted, expected)


@pytest.mark.parametrize("ijk", [(0, 0, 0), (3, 4, 5)])
def test_check_inside_accepts_the_corners(ijk):
    geometry.check_inside(ijk, SHAPE)


@pytest.mark.parametrize("ijk", [(4, 0, 0), (0, -1, 0), (0, 0, 6), (0, 0), (0, 0, float("nan"))])
def test_check_inside_names_frame_value_and_range(ijk):
    with pytest.raises(PromptError, match=r"\(i, j, k\) in the stored array's frame, i 0..3, j 0..4, k 0..5; received"):
        geometry.check_inside(ijk, SHAPE)
