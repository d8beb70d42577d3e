"""The vocabulary that travels between modules, in voxel frames. No torch here, so command lines stay light.

Frames: ``_ijk`` is an index into the stored array, in the order the file stores it; boxes are half-open.
Everything is immutable and therefore safe to share between threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

import numpy as np

from lib.errors import PromptError

Index = tuple[int, int, int]


@dataclass(frozen=True)
class Click:
    """One point prompt.

    Args:
        ijk: voxel index; for a 2-D image ``k`` is 0.
        positive: True adds the structure at this voxel, False excludes it.
    """

    ijk: Index
    positive: bool = True


@dataclass(frozen=True)
class Box:
    """A half-open box of voxels, ``lo <= index < hi`` on every axis.

    Args:
        lo: first voxel inside.
        hi: first voxel outside.

    Raises:
        PromptError: if the box is empty on any axis. Use :meth:`spanning` for corners in any order.
    """

    lo: Index
    hi: Index

    def __post_init__(self) -> None:
        if any(h <= low for low, h in zip(self.lo, self.hi)):
            raise PromptError(f"A box needs at least one voxel on every axis; received lo={self.lo}, hi={self.hi}.")

    @classmethod
    def spanning(cls, a: Index, b: Index) -> Box:
        """The box that contains both voxels, whatever their order."""
        lo = tuple(min(x, y) for x, y in zip(a, b))
        hi = tuple(max(x, y) + 1 for x, y in zip(a, b))
        return cls(lo, hi)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Stroke:
    """A scribble: voxels that all belong to the structure, or all do not. Equal where sign and voxels in order are.

    Args:
        voxels: ``(M, 3)`` whole numbers, voxel indices in any order; kept as a read-only int64 copy.
        positive: True adds the structure at these voxels, False excludes them.

    Raises:
        PromptError: if there is no voxel, or the array has another shape or type.
    """

    voxels: np.ndarray
    positive: bool = True

    def __post_init__(self) -> None:
        given = np.asarray(self.voxels)
        if given.ndim != 2 or given.shape[1] != 3 or not len(given) or given.dtype.kind not in "iu":
            raise PromptError(
                f"Expected a stroke of voxel indices, whole numbers (M, 3); received {given.dtype} {given.shape}."
                " Draw at least one voxel."
            )
        own = given.astype(np.int64)
        own.setflags(write=False)
        object.__setattr__(self, "voxels", own)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stroke):
            return NotImplemented
        return self.positive == other.positive and np.array_equal(self.voxels, other.voxels)

    def __hash__(self) -> int:
        return hash((self.positive, self.voxels.tobytes()))


@dataclass(frozen=True)
class UserPrompts:
    """Everything the user drew for one label on one volume, in the volume's voxel frame.

    The tensors that reach the decoder are :class:`lib.contracts.PromptSet`; this comes before the backbone is known.
    """

    clicks: tuple[Click, ...] = ()
    boxes: tuple[Box, ...] = ()
    strokes: tuple[Stroke, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.clicks or self.boxes or self.strokes)

    @property
    def starts(self) -> bool:
        """Whether plain SAM can begin with them: a box, or something positive."""
        return bool(self.boxes or any(c.positive for c in self.clicks) or any(s.positive for s in self.strokes))


class WindowSource(Enum):
    """Where an intensity window came from, for the reply and the provenance."""

    REQUEST = "request"
    DICOM = "dicom"
    PRESET = "preset"
    PERCENTILE = "percentile"
    NATIVE = "native"


@dataclass(frozen=True)
class Window:
    """Intensities ``lo..hi`` are mapped linearly to 0..1 and clipped.

    Args:
        lo: becomes 0.
        hi: becomes 1.
        source: where they came from.
        rest: windows of the second and later channels of a volume that has several.
    """

    lo: float
    hi: float
    source: WindowSource = WindowSource.PERCENTILE
    rest: tuple[Window, ...] = ()

    def key(self) -> str:
        """A string that is equal exactly when the mapping is equal (for cache keys)."""
        return ";".join([f"{self.lo!r}:{self.hi!r}", *(window.key() for window in self.rest)])


@dataclass(frozen=True)
class Volume:
    """An image on its own grid.

    Args:
        array: ``(I, J, K)`` float32, ``(I, J, K, M)`` float32 with 2 to 4 channels, or ``(I, J, K, 3)`` uint8 for
            colour; a 2-D image has ``K == 1``. As stored: no reorientation. The first two axes of a PNG/JPEG/TIFF are
            (column, row), so ``i`` is x in every format.
        affine: ``(4, 4)`` float64, voxel index to RAS millimetres, exactly as the file gives it (for pictures the
            LPS axes, ``diag(-1, -1, 1, 1)``, where ITK and Slicer place them).
        spacing_mm: length of a voxel edge along i, j, k.
        window: the intensity window, computed once for the whole volume.
        content_hash: hex digest of voxels, shape and dtype; equal content, equal hash.
        is_2d: True for a picture, which has no slice axis to choose.
        header: what the writer needs to return results bit-equal on this grid (format specific, opaque to others).
        warnings: sentences for the user about what was repaired or assumed when the image was read.
    """

    array: np.ndarray
    affine: np.ndarray
    spacing_mm: tuple[float, float, float]
    window: Window
    content_hash: str
    is_2d: bool = False
    header: dict = field(default_factory=dict, compare=False, repr=False)
    warnings: tuple[str, ...] = ()

    @property
    def shape(self) -> Index:
        """Voxels along i, j, k."""
        return self.array.shape[:3]  # type: ignore[return-value]

    @property
    def is_rgb(self) -> bool:
        """True where every voxel is a colour."""
        return self.array.ndim == 4 and self.array.dtype == np.uint8

    @property
    def channels(self) -> int:
        """M, of measured values per voxel; 1 for grey, and for a colour, which is one picture."""
        return 1 if self.array.ndim == 3 or self.is_rgb else self.array.shape[3]


@dataclass(frozen=True)
class Prediction:
    """A segmentation on the volume's own grid.

    Args:
        mask: ``(I, J, K)`` uint8, 0 or 1.
        quality: predicted IoU in 0..1 per segmented slice index along ``axis``.
        axis: the slice axis used (0, 1 or 2).
        prompted: slice indices that carried user prompts.
        latencies_s: seconds per stage.
        cache: hits and misses of this request.
        warnings: sentences for the user about what was repaired or left out.
    """

    mask: np.ndarray
    quality: dict[int, float]
    axis: int
    prompted: tuple[int, ...] = ()
    latencies_s: dict[str, float] = field(default_factory=dict)
    cache: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    window: Optional[Window] = None


@dataclass(frozen=True)
class LabelPrediction:
    """A segmentation of several labels on the volume's own grid.

    Args:
        mask: ``(I, J, K)`` uint8: 0, or place in ``labels`` from 1.
        labels: names.
        axis: the slice axis used (0, 1 or 2).
        quality: predicted IoU in 0..1 by label and slice index, where the label was found.
        presence: probability in 0..1 that the label is on the slice, by label and slice index.
        edited: slice indices by label that the user's prompts changed.
        version: name of the version that answered, or None for plain SAM.
        latencies_s: seconds per stage.
        cache: hits and misses of this request.
        warnings: sentences for the user.
        window: intensities used.
        points: that the method proposed, by label and slice index, where they were asked for and it proposes any.
    """

    mask: np.ndarray
    labels: tuple[str, ...]
    axis: int
    quality: dict[str, dict[int, float]] = field(default_factory=dict)
    presence: dict[str, dict[int, float]] = field(default_factory=dict)
    edited: dict[str, tuple[int, ...]] = field(default_factory=dict)
    version: Optional[str] = None
    latencies_s: dict[str, float] = field(default_factory=dict)
    cache: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    window: Optional[Window] = None
    points: dict[str, dict[int, tuple[Click, ...]]] = field(default_factory=dict)
