"""The worst slice of a case as a picture: what was found and what is true as outlines on the image. No torch.

Frame: slices are (rows, columns) as :mod:`lib.data.geometry` cuts them; a picture is turned to the radiological view
(the patient's right or front on the left, the head or front on top) and its pixels are square. Thread-safe: no state.
Left out: more than one slice of a case.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from lib.data.geometry import rows_columns

LONG_SIDE = 420  # pixels
THICKNESS = 2  # of outlines, pixels
TRUTH, FOUND, BOTH = (64, 224, 96), (255, 64, 160), (255, 255, 255)  # outlines, and where they agree
LPS = np.diag([-1.0, -1.0, 1.0])


def worst_slice(found: np.ndarray, truth: np.ndarray, axis: int, number: int) -> int:
    """The slice with most voxels wrong in one class, the first of equals.

    Args:
        found: ``(I, J, K)`` class numbers.
        truth: the same.
        axis: slice axis.
        number: of the class.
    """
    wrong = (found == number) != (truth == number)
    return int(wrong.sum(axis=tuple(a for a in range(3) if a != axis)).argmax())


def overlay_png(
    pixels: np.ndarray, truth: np.ndarray, found: np.ndarray, number: int, spacing_mm: tuple[float, float]
) -> bytes:
    """A PNG of one slice with both outlines of one class.

    Args:
        pixels: ``(H, W)`` grey or ``(H, W, 3)`` colour in 0..1; of any other number of channels the first is shown.
        truth: ``(H, W)`` class numbers.
        found: the same, of the model.
        number: of the class.
        spacing_mm: from row to row and from column to column.
    """
    from PIL import Image

    if pixels.ndim == 3 and pixels.shape[2] != 3:
        pixels = pixels[:, :, 0]
    scale = LONG_SIDE / max(n * mm for n, mm in zip(pixels.shape, spacing_mm))
    height, width = (max(1, round(n * mm * scale)) for n, mm in zip(pixels.shape, spacing_mm))
    grey = np.rint(255 * np.clip(np.nan_to_num(pixels), 0, 1)).astype(np.uint8)
    canvas = np.array(Image.fromarray(grey).convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
    masks = [Image.fromarray((labels == number).astype(np.uint8)) for labels in (truth, found)]
    true, own = (outline(np.array(m.resize((width, height), Image.Resampling.NEAREST), bool)) for m in masks)
    canvas[true], canvas[own], canvas[true & own] = TRUTH, FOUND, BOTH
    out = io.BytesIO()
    Image.fromarray(canvas).save(out, "PNG")
    return out.getvalue()


def outline(mask: np.ndarray) -> np.ndarray:
    """The rim of a mask, inside it, :data:`THICKNESS` wide; the picture's edge is none."""
    from scipy.ndimage import binary_erosion

    return mask & ~binary_erosion(mask, iterations=THICKNESS, border_value=1)


def turned(pixels: np.ndarray, axis: int, affine: np.ndarray) -> np.ndarray:
    """A slice in the radiological view.

    Args:
        pixels: ``(H, W)`` or ``(H, W, C)`` of a slice across ``axis``.
        axis: slice axis.
        affine: voxel to RAS mm.

    Returns:
        a view, rows and columns swapped where the volume was stored on its side.
    """
    flip_rows, flip_columns, swap = _turns(affine, axis)
    view = pixels.swapaxes(0, 1) if swap else pixels
    return view[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def turned_spacing(spacing_mm: Sequence[float], axis: int, affine: np.ndarray) -> tuple[float, float]:
    """Row and column spacing of :func:`turned`."""
    row, column = (float(spacing_mm[a]) for a in rows_columns(axis))
    return (column, row) if _turns(affine, axis)[2] else (row, column)


def _turns(affine: np.ndarray, axis: int) -> tuple[bool, bool, bool]:
    """Whether rows and columns are reversed after they were swapped or not."""
    directions = (LPS @ affine[:3, :3]).T  # of i, j, k in left, posterior, superior
    row, column = (directions[a] for a in rows_columns(axis))
    across = int(np.abs(directions[axis]).argmax())
    # down runs towards the feet, in axial slices towards the back; right towards the left, in sagittal ones the back
    down = np.eye(3)[1] if across == 2 else -np.eye(3)[2]
    swap = abs(row @ down) < abs(column @ down)
    row, column = (column, row) if swap else (row, column)
    right = np.eye(3)[1] if across == 0 else np.eye(3)[0]
    return bool(row @ down < 0), bool(column @ right < 0), bool(swap)
