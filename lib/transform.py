"""The reversible map between a slice and a backbone's square input (METHODS 1.3, 7.4).

Frames: ``_rc`` pixel of the slice (row, column), ``_xy`` pixel of the S x S input. Pixel centres are kept: index p of
an axis of n pixels lies at (p + 0.5) / n of its extent. Thread-safe: immutable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.contracts import BackboneSpec
from lib.errors import VolumeError


@dataclass(frozen=True)
class SliceTransform:
    """Maps one slice size to one backbone input and back.

    Args:
        spec: the backbone's facts.
        size: ``(H, W)`` of the slice.
    """

    spec: BackboneSpec
    size: tuple[int, int]

    @property
    def inner(self) -> tuple[int, int]:
        """Rows and columns that the slice covers inside the S x S input."""
        (height, width), side = self.size, self.spec.input_size
        if self.spec.geometry == "pad_br":
            scale = side / max(height, width)
            return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
        if self.spec.geometry == "centre_pad_or_squash" and max(height, width) < side:
            return height, width
        return side, side

    @property
    def offset(self) -> tuple[int, int]:
        """Top and left padding in input pixels."""
        if self.spec.geometry != "centre_pad_or_squash":
            return 0, 0
        return tuple((self.spec.input_size - n) // 2 for n in self.inner)  # type: ignore[return-value]

    def image(self, pixels: np.ndarray) -> Tensor:
        """Network input.

        Args:
            pixels: ``(H, W)``, ``(H, W, 3)`` RGB or three channels, or ``(H, W, M)`` channels, float32 in 0..1. An
                encoder that takes three gets three as they are and the mean of two or four.

        Returns:
            ``(3, S, S)`` or ``(M, S, S)`` float32, normalised; padding is the mean colour (0 after normalisation).

        Raises:
            VolumeError: if the encoder takes M channels and the image has another number.
        """
        x = self._channels(torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32)))
        if self.spec.per_image_minmax:
            x = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-8)
        x = self._resize(x)
        mean, std = x.new_tensor(self.spec.mean), x.new_tensor(self.spec.std)
        if self.spec.channels != 3:  # no colours: every channel is normalised alike
            mean, std = mean.mean(), std.mean()
        elif self.spec.channel_order == "bgr":
            x = x.flip(0)
        return self._pad((x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))

    def _channels(self, x: Tensor) -> Tensor:
        x = x.permute(2, 0, 1) if x.ndim == 3 else x[None]
        if self.spec.channels not in (3, len(x)):
            raise VolumeError(
                f"Expected an image with {self.spec.channels} channels, as those that were trained on; received"
                f" {len(x)}. Add the missing channels along the fourth axis, or train on images like this one."
            )
        if len(x) in (3, self.spec.channels):
            return x
        return x.mean(0).expand(3, -1, -1) if len(x) > 1 else x.expand(3, -1, -1)

    def points_xy(self, points_rc: np.ndarray) -> Tensor:
        """``(P, 2)`` slice pixels (row, column; integers are pixel centres) to ``(P, 2)`` x, y input pixels."""
        return self._to_xy(np.asarray(points_rc, np.float64).reshape(-1, 2) + 0.5) - 0.5

    def box_xy(self, box_rc: tuple[float, float, float, float]) -> Tensor:
        """Half-open ``(r0, c0, r1, c1)`` to ``(4,)`` x0 y0 x1 y1: the edges in input pixels less half a pixel."""
        return self._to_xy(np.asarray(box_rc, np.float64).reshape(2, 2)).reshape(4) - 0.5

    def points_rc(self, points_xy: Tensor) -> np.ndarray:
        """Inverse of :meth:`points_xy`."""
        xy = points_xy.detach().cpu().double().numpy().reshape(-1, 2) + 0.5
        inner, offset = np.array(self.inner), np.array(self.offset)
        return (xy[:, ::-1] - offset) / inner * np.array(self.size) - 0.5

    def logits(self, low_res: Tensor) -> Tensor:
        """``(N, M, 4h, 4w)`` mask logits to ``(N, M, H, W)`` on the slice: up to S, crop, resize to native."""
        side = self.spec.input_size
        x = F.interpolate(low_res, (side, side), mode="bilinear", align_corners=False)
        (top, left), (rows, columns) = self.offset, self.inner
        x = x[..., top : top + rows, left : left + columns]
        return F.interpolate(x, self.size, mode="bilinear", align_corners=False)

    def mask(self, native: Tensor) -> Tensor:
        """``(N, 1, H, W)`` logits on the slice to ``(N, 1, 4h, 4w)``; padding becomes strong background."""
        return self._to_grid(native, -20.0)

    def coverage(self, native: Tensor) -> Tensor:
        """``(N, 1, H, W)`` masks to ``(N, 1, 4h, 4w)``: the share of each cell that is covered, 0 in the padding."""
        return self._to_grid(native, 0.0).clamp(0, 1)

    def _to_grid(self, native: Tensor, outside: float) -> Tensor:
        x = F.interpolate(native.float(), self.inner, mode="bilinear", align_corners=False, antialias=True)
        x = self._pad(x, value=outside)
        return F.interpolate(x, (self.spec.mask_size,) * 2, mode="bilinear", align_corners=False, antialias=True)

    def _to_xy(self, edges_rc: np.ndarray) -> Tensor:
        rc = edges_rc / np.array(self.size) * np.array(self.inner) + np.array(self.offset)
        return torch.from_numpy(np.ascontiguousarray(rc[:, ::-1])).float()

    def _resize(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == self.inner:
            return x.contiguous()
        mode = self.spec.interpolation
        if mode == "nearest":
            return F.interpolate(x[None], self.inner, mode="nearest")[0]
        x = F.interpolate(x[None], self.inner, mode=mode, align_corners=False, antialias=True)[0]
        return x.clamp(0, 1)

    def _pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        (top, left), (rows, columns), side = self.offset, self.inner, self.spec.input_size
        return F.pad(x, (left, side - columns - left, top, side - rows - top), value=value)
