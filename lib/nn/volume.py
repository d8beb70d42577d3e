"""Which images of a batch are neighbouring slices of one volume (METHODS 1.2).

Slices of B volumes pass a network as ``B * D`` images, ``n = b * D + d``. Frozen layers in between know nothing of D,
so the parts that do are told by an object that they share, set around a call and per thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class VolumeContext:
    """How many consecutive slices of one volume follow each other in a batch; 1 unless :meth:`spanning` says more."""

    def __init__(self) -> None:
        self._now = threading.local()

    def __deepcopy__(self, memo: dict) -> VolumeContext:
        return VolumeContext()

    @contextmanager
    def spanning(self, depth: int, images: int) -> Iterator[None]:
        """Within it, ``images`` images are slices of ``images / depth`` volumes."""
        before = getattr(self._now, "shape", (1, 0))
        self._now.shape = (depth, images) if depth > 1 else (1, 0)
        try:
            yield
        finally:
            self._now.shape = before

    def unfolded(self, rows: int) -> tuple[int, int, int]:
        """``(B, D, rows per slice)`` of a tensor's first axis: windows of a slice, or its classes, come inside it."""
        depth, images = getattr(self._now, "shape", (1, 0))
        inner = rows // images if images else 1
        return rows // (depth * inner), depth, inner
