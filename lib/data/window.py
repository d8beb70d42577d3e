"""The intensity window: which voxel values become 0 and 1 in the network's input.

Chosen once per volume and never per slice, so that neighbouring slices stay comparable and a cached embedding stays
valid. Pure functions, thread-safe and deterministic: equal voxels give an equal window whatever their memory layout.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd, isfinite
from typing import Optional, Union

import numpy as np

from lib.errors import PromptError
from lib.types import Volume, Window, WindowSource

WindowRequest = Union[str, tuple[float, float], None]

PRESETS = {
    "soft_tissue": (-160.0, 240.0),
    "liver": (-45.0, 105.0),
    "lung": (-1350.0, 150.0),
    "bone": (-450.0, 1050.0),
    "brain": (0.0, 80.0),
}
MODALITY_PRESET = {"CT": "soft_tissue"}
PERCENTILES = (0.5, 99.5)
# A percentile of a million voxels differs from that of all by less than display noise and takes about 20 ms.
SAMPLE_SIZE = 1_000_000


def choose_window(
    array: np.ndarray,
    dicom_window: Optional[tuple[float, float]] = None,
    modality: Optional[str] = None,
    *,
    requested: WindowRequest = None,
    is_rgb: bool = False,
    native_uint8: bool = False,
) -> Window:
    """The window of a volume: request, DICOM tags, modality preset, 0..255 for 8-bit pictures, else percentiles.

    Args:
        array: ``(I, J, K)`` float32 finite voxels, ``(I, J, K, 3)`` uint8, or ``(I, J, K, M)`` float32, whose channels
            get a window each.
        dicom_window: centre and width as the DICOM tags give them; unusable pairs are passed over.
        modality: DICOM modality; None where the file has no tags.
        requested: ``(lo, hi)`` in voxel values, or a name of :data:`PRESETS`; ignored for colour, which has no window.
            Of several channels it is the first one's: the others have units of their own.
        is_rgb: every voxel is a colour.
        native_uint8: grey values come from an 8-bit picture.

    Raises:
        PromptError: for an unknown preset or a request that is not two finite rising numbers.
    """
    if is_rgb:
        return Window(0.0, 255.0, WindowSource.NATIVE)
    if array.ndim == 4:
        first, *others = (array[..., channel] for channel in range(array.shape[3]))
        rest = tuple(choose_window(other, None, modality) for other in others)
        return replace(choose_window(first, dicom_window, modality, requested=requested), rest=rest)
    if requested is not None:
        return Window(*_requested(requested), WindowSource.REQUEST)
    if dicom_window is not None and (limits := _linear_limits(*dicom_window)):
        return Window(*limits, WindowSource.DICOM)
    if modality in MODALITY_PRESET:
        return Window(*PRESETS[MODALITY_PRESET[modality]], WindowSource.PRESET)
    if native_uint8:
        return Window(0.0, 255.0, WindowSource.NATIVE)
    sample = _sample(array)
    if modality is None and _looks_like_ct(sample):
        return Window(*PRESETS[MODALITY_PRESET["CT"]], WindowSource.PRESET)
    return Window(*_percentiles(sample, array), WindowSource.PERCENTILE)


def with_window(volume: Volume, requested: WindowRequest) -> Volume:
    """The volume under a user's window, as :func:`choose_window` takes it; None leaves it as it is.

    Raises:
        PromptError: as :func:`choose_window`.
    """
    if requested is None or volume.is_rgb:
        return volume
    return replace(volume, window=Window(*_requested(requested), WindowSource.REQUEST, volume.window.rest))


def apply_window(pixels: np.ndarray, window: Window) -> np.ndarray:
    """Maps a slice to what the backbone's transform expects.

    Args:
        pixels: ``(H, W)`` grey, ``(H, W, M)`` float32 channels, or ``(H, W, 3)`` uint8, which is divided by 255
            whatever the window.
        window: the volume's window.

    Returns:
        float32 in 0..1, same shape, a new array.
    """
    if pixels.ndim == 3 and pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / np.float32(255)
    if pixels.ndim == 3:
        each = (replace(window, rest=()), *window.rest)
        return np.stack([apply_window(pixels[..., channel], own) for channel, own in enumerate(each)], -1)
    scaled = (pixels.astype(np.float32) - np.float32(window.lo)) / np.float32(window.hi - window.lo)
    return np.clip(scaled, 0, 1, out=scaled)


def _requested(requested: Union[str, tuple[float, float]]) -> tuple[float, float]:
    if isinstance(requested, str):
        if requested not in PRESETS:
            raise PromptError(
                f"Expected a window (lo, hi) or a preset out of {sorted(PRESETS)}; received {requested!r}."
                " Use one of these."
            )
        return PRESETS[requested]
    try:
        lo, hi = (float(v) for v in requested)
    except (TypeError, ValueError):
        raise PromptError(
            f"Expected a window of two numbers (lo, hi); received {requested!r}. Send both limits."
        ) from None
    with np.errstate(over="ignore"):
        width = np.float32(hi - lo)  # as it is divided by
    if not 0 < width < np.inf:
        raise PromptError(f"Expected finite window limits with lo < hi; received ({lo}, {hi}). Swap or widen them.")
    return lo, hi


def _linear_limits(centre: float, width: float) -> Optional[tuple[float, float]]:
    """DICOM PS3.3 C.11.2.1.2: LINEAR loses half a grey level at each end; widths up to 1 only exist in LINEAR_EXACT."""
    if not (isfinite(centre) and isfinite(width) and width > 0):
        return None
    if width <= 1:
        return centre - width / 2, centre + width / 2
    return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2


def _sample(array: np.ndarray) -> np.ndarray:
    """About :data:`SAMPLE_SIZE` voxels; the step shares no factor with the size, so no row or column is favoured."""
    flat = array.reshape(-1, order="F")
    step = max(1, flat.size // SAMPLE_SIZE)
    while gcd(step, flat.size) != 1:
        step += 1
    return flat[::step]


def _looks_like_ct(sample: np.ndarray) -> bool:
    """Hounsfield units without tags: whole numbers, air, nothing below the usual padding, and much soft tissue.

    The share of soft tissue tells CT from signed MR phase images, which spread evenly over their range.
    """
    lo, hi = PRESETS[MODALITY_PRESET["CT"]]
    if not -3100 <= sample.min() <= -900 or sample.max() < hi:
        return False
    whole = np.mean(np.abs(sample - np.rint(sample)) < 1e-3)
    soft = np.mean((sample >= lo) & (sample <= hi))
    return bool(whole > 0.95 and soft > 0.1)


def _percentiles(sample: np.ndarray, array: np.ndarray) -> tuple[float, float]:
    foreground = sample[sample > sample.min()]  # the lowest value is padding or air, and often most of the volume
    if foreground.size >= sample.size // 100 and foreground.size > 1:
        sample = foreground
    lo, hi = (float(v) for v in np.percentile(sample, PERCENTILES))
    return (lo, hi) if lo < hi else (float(array.min()), float(array.max()))
