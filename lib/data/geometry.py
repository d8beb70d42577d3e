"""Between a volume's voxels (``_ijk``) and the rows and columns of one slice (``_rc``).

Convention: a slice across an axis has the *higher* of the two other axes as rows and the *lower* as columns. Across k
rows are j and columns are i, so a slice looks like the viewer's picture of an axial series and like the picture file of
a 2-D image. Across j rows are k and columns are i; across i rows are k and columns are j. No resampling, no flips: all
maps are permutations and exactly reversible. Pure functions, thread-safe.
"""

from __future__ import annotations

from typing import Union

import numpy as np

from lib.errors import PromptError
from lib.types import Box, Index, Volume

AXIS_NAMES = ("i", "j", "k")
# Spacings that differ by less are one spacing written with different rounding.
SPACING_TOLERANCE = 1e-3


def choose_axis(
    spacing_mm: tuple[float, float, float],
    shape: Index,
    *,
    requested: Union[int, str, None] = None,
    is_2d: bool = False,
) -> int:
    """The axis across which the volume is cut: an axis of one voxel, else the thickest spacing, ties to the last axis.

    Args:
        spacing_mm: voxel edge along i, j, k.
        shape: voxels along i, j, k.
        requested: 0, 1, 2 or ``"i"``, ``"j"``, ``"k"``; None decides by spacing.
        is_2d: True for a picture, whose only axis is k.

    Raises:
        PromptError: for any other request, or an axis other than k for a picture.
    """
    if requested is not None:
        return _requested_axis(requested, is_2d)
    flat = [axis for axis in range(3) if shape[axis] == 1]
    if is_2d or flat:
        return 2 if is_2d else flat[-1]
    thick = max(spacing_mm) * (1 - SPACING_TOLERANCE)
    return max(axis for axis in range(3) if spacing_mm[axis] >= thick)


def _requested_axis(requested: Union[int, str], is_2d: bool) -> int:
    known: dict[Union[int, str], int] = {name: axis for axis, name in enumerate(AXIS_NAMES)}
    known |= {axis: axis for axis in range(3)} | {str(axis): axis for axis in range(3)}
    key = requested.strip().lower() if isinstance(requested, str) else requested
    if isinstance(key, bool) or key not in known:
        raise PromptError(
            f"Expected a slice axis 0, 1, 2 or i, j, k; received {requested!r}. Leave it out to choose by spacing."
        )
    if is_2d and known[key] != 2:
        raise PromptError(f"Expected slice axis k for a 2-D image; received {requested!r}. Leave the axis out.")
    return known[key]


def rows_columns(axis: int) -> tuple[int, int]:
    """The voxel axes that run along the rows (downwards) and columns (rightwards) of a slice across ``axis``."""
    low, high = (a for a in range(3) if a != axis)
    return high, low


def slice_size(shape: Index, axis: int) -> tuple[int, int]:
    """``(H, W)`` of a slice across ``axis``."""
    row_axis, column_axis = rows_columns(axis)
    return shape[row_axis], shape[column_axis]


def slice_of(volume: Volume, axis: int, index: int) -> np.ndarray:
    """One slice of a volume, a view in the convention of this module.

    Returns:
        ``(H, W)`` float32, ``(H, W, M)`` float32 for channels, or ``(H, W, 3)`` uint8 for colour.

    Raises:
        PromptError: if the volume has no such slice.
    """
    return slice_view(volume.array, axis, index)


def slice_view(array: np.ndarray, axis: int, index: int) -> np.ndarray:
    """:func:`slice_of` for any ``(I, J, K)`` or ``(I, J, K, M)`` array, such as a mask; writing to it writes through.

    Raises:
        PromptError: if the array has no such slice.
    """
    if not 0 <= index < array.shape[axis]:
        raise PromptError(
            f"Expected a slice index 0..{array.shape[axis] - 1} along {AXIS_NAMES[axis]}; received {index}."
            " Pick a slice inside the volume."
        )
    return np.moveaxis(array, axis, 0)[index].swapaxes(0, 1)


def put_slice(mask: np.ndarray, axis: int, index: int, slice_mask: np.ndarray) -> None:
    """Writes an ``(H, W)`` slice into an ``(I, J, K)`` mask in place; the inverse of :func:`slice_view`.

    Raises:
        PromptError: if the volume has no such slice, or the slice has another size.
    """
    target = slice_view(mask, axis, index)
    if slice_mask.shape != target.shape:
        raise PromptError(
            f"Expected {target.shape} rows and columns across {AXIS_NAMES[axis]}; received {slice_mask.shape}."
            " Transform the mask back to its slice first."
        )
    target[...] = slice_mask


def to_slice_rc(ijk: Index, axis: int) -> tuple[int, int, int]:
    """A voxel to ``(slice index, row, column)``."""
    row_axis, column_axis = rows_columns(axis)
    return ijk[axis], ijk[row_axis], ijk[column_axis]


def from_slice_rc(index: int, row: int, column: int, axis: int) -> Index:
    """``(slice index, row, column)`` to the voxel; the inverse of :func:`to_slice_rc`."""
    row_axis, column_axis = rows_columns(axis)
    ijk = [0, 0, 0]
    ijk[axis], ijk[row_axis], ijk[column_axis] = index, row, column
    return ijk[0], ijk[1], ijk[2]


def box_to_slices(box: Box, axis: int) -> tuple[range, tuple[int, int, int, int]]:
    """The slices a box touches and its half-open ``(r0, c0, r1, c1)`` on each of them."""
    first, r0, c0 = to_slice_rc(box.lo, axis)
    last, r1, c1 = to_slice_rc(box.hi, axis)
    return range(first, last), (r0, c0, r1, c1)


def check_inside(ijk: Index, shape: Index) -> None:
    """Accepts a voxel of the volume.

    Raises:
        PromptError: if the index is not three numbers inside ``shape``.
    """
    if len(ijk) == 3 and all(0 <= value < size for value, size in zip(ijk, shape)):
        return
    limits = ", ".join(f"{name} 0..{size - 1}" for name, size in zip(AXIS_NAMES, shape))
    raise PromptError(
        f"Expected a voxel index (i, j, k) in the stored array's frame, {limits}; received {tuple(ijk)}."
        " Send voxel indices, not millimetres, of this image."
    )
