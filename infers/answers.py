"""The model's last answers about each image, for the comparison with what a person saves.

Answers stay as hard links in a folder of this process, so that a click pays for nothing; the oldest images go when
there are too many bytes. Frames: the image's own voxels. Thread-safe. Gone with the process.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from infers.stored import label_map
from lib.data.geometry import slice_view
from lib.provenance import Provenance
from lib.quality.checks import LabelMap
from lib.types import Volume

KEPT_BYTES = 512 << 20  # of answers' files


@dataclass(frozen=True, eq=False)
class Answer:
    """One answer.

    Args:
        file: of the label.
        names: voxel value to structure.
        record: how it came about.
        size: bytes of the file.
    """

    file: Path
    names: dict[int, str]
    record: Provenance
    size: int


Spot = tuple[str, Optional[int]]  # a structure, and the slice k of an answer that is about one slice only


class Answers:
    """The last answer for every structure of the images that were asked about lately.

    Args:
        limit_bytes: of all files together; the image that was asked about last always stays.
    """

    def __init__(self, limit_bytes: int = KEPT_BYTES) -> None:
        self._limit, self._lock = limit_bytes, threading.Lock()
        self._kept: OrderedDict[str, dict[Spot, Answer]] = OrderedDict()
        self._folder: Optional[tempfile.TemporaryDirectory[str]] = None

    def add(
        self, image: str, file: Path, names: Mapping[int, str], record: Provenance, slices: Optional[Sequence[int]]
    ) -> None:
        """Keeps an answer in place of former ones about the same structures.

        Args:
            image: identifier.
            file: label file, which may be removed afterwards.
            names: voxel value to structure.
            record: how it came about.
            slices: the slices k that it is about; None for all.
        """
        spots: list[Spot] = [(name, k) for name in names.values() for k in ([None] if slices is None else slices)]
        replaced = {name for name, k in spots if k is None}
        with self._lock:
            kept = _linked(file, self._own_folder())
            mine = self._kept.setdefault(image, {})
            self._kept.move_to_end(image)
            for spot in [s for s in mine if s in spots or s[0] in replaced]:
                del mine[spot]
            mine |= dict.fromkeys(spots, Answer(kept, dict(names), record, kept.stat().st_size))
            self._tidy()

    def of(self, image: str) -> dict[Spot, Answer]:
        """The last answers about an image."""
        with self._lock:
            return dict(self._kept.get(image, {}))

    def _own_folder(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="autosam-answers-")
        return Path(self._folder.name)

    def _tidy(self) -> None:
        while len(self._kept) > 1 and sum(answer.size for answer in self._needed()) > self._limit:
            self._kept.popitem(last=False)
        needed = {answer.file for answer in self._needed()}
        for file in self._own_folder().iterdir():
            if file not in needed:
                file.unlink()

    def _needed(self) -> set[Answer]:
        return {answer for spots in self._kept.values() for answer in spots.values()}


def _linked(file: Path, folder: Path) -> Path:
    """A second name for a file that the server removes once it is sent."""
    target = folder / f"{time.monotonic_ns()}-{file.name}"
    try:
        os.link(file, target)
    except OSError:  # another file system
        shutil.copyfile(file, target)
    return target


def together(answers: Mapping[Spot, Answer], volume: Volume) -> LabelMap:
    """The answers as one label map; where two claim a voxel, the newer has it.

    Args:
        answers: of one image, at least one.
        volume: the image.

    Raises:
        VolumeError: for a file that cannot be read.
    """
    names = sorted({name for name, _ in answers})
    voxels = np.zeros(volume.shape, np.uint16)
    read = {answer: label_map(volume, answer.file, answer.names) for answer in set(answers.values())}
    for (name, k), answer in sorted(answers.items(), key=lambda item: item[1].record.created):
        (value,) = (v for v, n in answer.names.items() if n == name)
        own = read[answer].voxels == value
        part, own = (voxels, own) if k is None else (slice_view(voxels, 2, k), slice_view(own, 2, k))
        part[own] = names.index(name) + 1
    axis = next(iter(read.values())).axis
    return LabelMap(voxels, dict(enumerate(names, start=1)), volume.affine, volume.spacing_mm, axis)
