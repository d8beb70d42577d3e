"""Bounded caches that compute every value once, however many threads ask.

``Lru`` keeps the most recently used values within a byte limit. ``EmbeddingCache`` adds half precision, a disk tier and
counters for encoder output. A key contains everything that affects the value, so entries never go stale.

Concurrency: one lock guards the table and is held for look-ups only; values are computed outside it. The first thread
to ask for a key computes, the others wait for its result (inside ``waiting()``, see ``lib.background``); if it fails
they get its error and the next to ask computes again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Optional, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.contracts import Features

logger = logging.getLogger(__name__)
V = TypeVar("V")


class Lru(Generic[V]):
    """Least recently used values leave first.

    Args:
        limit: most that may be kept, in the unit of ``size_of``; one value larger than that is not kept.
        least: newest values that are kept whatever their size.
        size_of: size of a value, bytes by convention.
        waiting: context entered while a thread waits for another one's result.
    """

    def __init__(
        self, limit: int, size_of: Callable[[V], int], waiting: Callable[[], AbstractContextManager] = nullcontext,
        *, least: int = 0,
    ) -> None:  # fmt: skip
        self.limit, self.least, self.size = limit, least, 0
        self._size_of, self._waiting = size_of, waiting
        self._values: OrderedDict[str, V] = OrderedDict()
        self._making: dict[str, Future[V]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get_or_make(self, key: str, make: Callable[[], V]) -> tuple[V, bool]:
        """The value and whether it was there (or in the making) already.

        Raises:
            whatever ``make`` raises, to every thread that waited for it.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key], True
            future = self._making.get(key)
            mine = future is None
            if future is None:
                future = self._making[key] = Future()
        if not mine:
            with self._waiting():
                return future.result(), True
        return self._make(key, make, future), False

    def _make(self, key: str, make: Callable[[], V], future: Future[V]) -> V:
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._keep(key, value)
        future.set_result(value)
        return value

    def _keep(self, key: str, value: V) -> None:
        if not self.least and self._size_of(value) > self.limit:
            return  # everything else would have to go, and then it too
        self._values[key] = value
        self.size += self._size_of(value)
        while self.size > self.limit and len(self._values) > self.least:
            _, old = self._values.popitem(last=False)
            self.size -= self._size_of(old)


@dataclass(frozen=True)
class EmbeddingKey:
    """All that decides an embedding.

    Args:
        content_hash: of the volume.
        axis: slice axis.
        index: slice number.
        window: ``Window.key()``.
        weights_id: digest of the backbone's tensors.
        backbone: its name, input side and taps.
    """

    content_hash: str
    axis: int
    index: int
    window: str
    weights_id: str
    backbone: str

    def digest(self) -> str:
        """A file name without meaning to a reader."""
        parts = (self.content_hash, self.axis, self.index, self.window, self.weights_id, self.backbone)
        return hashlib.blake2b(repr(parts).encode(), digest_size=20).hexdigest()


Tensors = dict[str, Tensor]
TAP = "tap."


class EmbeddingCache:
    """Encoder output in half precision: memory first, then disk, then the encoder.

    Args:
        memory_bytes: limit of the memory tier.
        folder: of the disk tier; created at the first write.
        disk_bytes: limit of the disk tier, 0 for none.
        waiting: see :class:`Lru`.
    """

    def __init__(
        self,
        memory_bytes: int,
        folder: Path,
        disk_bytes: int,
        waiting: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self._memory: Lru[Tensors] = Lru(memory_bytes, _bytes, waiting)
        self._disk = DiskTier(folder, disk_bytes) if disk_bytes else None
        self._count_lock = threading.Lock()
        self._counts = {"memory_hits": 0, "disk_hits": 0, "misses": 0}

    def get(
        self, key: EmbeddingKey, encode: Callable[[], Features], pe: Tensor, *, counted: bool = True
    ) -> tuple[Features, str]:
        """Features of one slice on the CPU, and ``memory_hits``, ``disk_hits`` or ``misses``.

        The encoder's output is rounded to half precision before its first use too, so that a repeated click gets the
        identical answer. The positional encoding is the same for every slice and is not stored.

        Args:
            key: of the slice.
            encode: computes its features.
            pe: ``(1, E, h, w)``, handed through.
            counted: False for work that no click asked for.
        """
        source = "memory_hits"

        def make() -> Tensors:
            nonlocal source
            found = self._disk.read(key.digest()) if self._disk else None
            source = "misses" if found is None else "disk_hits"
            if found is not None:
                return found
            fresh = _halved(encode())
            if self._disk:
                self._disk.write(key.digest(), fresh)
            return fresh

        tensors, _ = self._memory.get_or_make(key.digest(), make)
        with self._count_lock:
            self._counts[source] += int(counted)
        high = (tensors["s0"], tensors["s1"]) if "s0" in tensors else None
        taps = {name[len(TAP) :]: tensor for name, tensor in tensors.items() if name.startswith(TAP)}
        return Features(tensors["embed"], pe, high, taps), source

    def __contains__(self, key: EmbeddingKey) -> bool:
        """Whether the memory tier holds it."""
        return key.digest() in self._memory

    def room(self) -> int:
        """How many slices of the mean size so far the memory tier holds; 1 before the first."""
        size = self._memory.size
        return self._memory.limit * len(self._memory) // size if size else 1

    def info(self) -> dict[str, int]:
        """Counters and sizes for ``info()``."""
        with self._count_lock:
            counts = dict(self._counts)
        disk = self._disk.size() if self._disk else 0
        return {**counts, "slices": len(self._memory), "memory_bytes": self._memory.size, "disk_bytes": disk}


def _halved(features: Features) -> Tensors:
    named = {"embed": features.embed}
    if features.high_res is not None:
        named |= {"s0": features.high_res[0], "s1": features.high_res[1]}
    named |= {TAP + name: tensor for name, tensor in features.taps.items()}
    return {name: tensor.to("cpu", torch.float16).contiguous() for name, tensor in named.items()}


def _bytes(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


class DiskTier:
    """Safetensors files in one folder; the least recently used go when the limit is passed.

    A damaged or vanished file is a miss, and a full or read-only disk switches nothing but this tier off.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        self._size: Optional[int] = None

    def read(self, name: str) -> Optional[Tensors]:
        """The stored tensors, or None."""
        path = self.folder / f"{name}.safetensors"
        try:
            tensors = load_file(path)
            os.utime(path)  # marks it as used
        except (OSError, SafetensorError):
            return None
        return tensors

    def write(self, name: str, tensors: Tensors) -> None:
        """Stores tensors; never raises for a disk that cannot take them."""
        path = self.folder / f"{name}.safetensors"
        partial = path.with_suffix(f".{threading.get_ident()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # derived from patient images
            save_file(tensors, partial)
            partial.replace(path)
            self._grow(path.stat().st_size)
        except (OSError, SafetensorError) as error:
            logger.warning("the embedding cache on disk cannot be written: %s", type(error).__name__)
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def size(self) -> int:
        """Bytes in the folder as far as known."""
        return self._size or 0

    def _grow(self, added: int) -> None:
        with self._lock:
            if self._size is None or self._size + added > self.limit:
                self._size = self._sweep()
            else:
                self._size += added

    def _sweep(self) -> int:
        """Deletes the oldest files until a tenth of the limit is free; returns what is left."""
        files = sorted((p.stat().st_mtime, p.stat().st_size, p) for p in self.folder.glob("*.safetensors"))
        total = sum(size for _, size, _ in files)
        goal = self.limit if total <= self.limit else self.limit * 9 // 10
        for _, size, path in files:
            if total <= goal:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total
