"""The model's last answers to whoever asked about an image, for the comparison with what a person saves.

Answers stay as hard links in a folder of this process, so that a click pays for nothing; a file goes when nobody needs
its answer any more, and the oldest images' answers when there are too many bytes. Frames: the image's own voxels.
Thread-safe. Gone with the process: what a killed one left goes with the first answer to the next.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Optional
from uuid import uuid4

import numpy as np
from filelock import FileLock, Timeout

from infers.stored import label_map
from lib.data.geometry import slice_view
from lib.provenance import Provenance
from lib.quality.checks import LabelMap
from lib.types import Volume

KEPT_BYTES = 512 << 20  # of answers' files
PREFIX, LOCK = "autosam-asked-", ".lock"  # of folders that are locked as long as their process lives


@dataclass(frozen=True, eq=False)
class Answer:
    """One answer.

    Args:
        file: of the label; there as long as this is.
        names: voxel value to structure.
        record: how it came about.
        size: bytes of the file.
    """

    file: Path
    names: dict[int, str]
    record: Provenance
    size: int


Whose = tuple[str, str]  # an image, and who asked about it
Spot = tuple[str, Optional[int]]  # a structure, and the slice k of an answer that is about one slice only


class Answers:
    """The last answer for every structure of the images that were asked about lately.

    Args:
        limit_bytes: of all files together; what was asked for last always stays.
    """

    def __init__(self, limit_bytes: int = KEPT_BYTES) -> None:
        self._limit, self._lock = limit_bytes, threading.Lock()
        self._kept: OrderedDict[Whose, dict[Spot, Answer]] = OrderedDict()
        self._missed: set[Whose] = set()
        self._folder: Optional[Path] = None

    def add(
        self, whose: Whose, file: Path, names: Mapping[int, str], record: Provenance, slices: Optional[Sequence[int]]
    ) -> None:
        """Keeps an answer in place of former ones about the same structures.

        Args:
            whose: image, and who asked.
            file: label file, which may be removed afterwards.
            names: voxel value to structure.
            record: how it came about.
            slices: the slices k that it is about; None for all.
        """
        spots: list[Spot] = [(name, k) for name in names.values() for k in ([None] if slices is None else slices)]
        replaced = {name for name, k in spots if k is None}
        with self._lock:
            answer = _kept(file, self._own_folder(), names, record)
            mine = self._kept.setdefault(whose, {})
            self._kept.move_to_end(whose)
            for spot in [s for s in mine if s in spots or s[0] in replaced]:
                del mine[spot]
            mine |= dict.fromkeys(spots, answer)
            self._tidy()

    def miss(self, whose: Whose) -> None:
        """There was an answer that is not kept."""
        with self._lock:
            self._missed.add(whose)

    def of(self, whose: Whose) -> dict[Spot, Answer]:
        """The last answers; their files stay for as long as the caller holds them."""
        with self._lock:
            return dict(self._kept.get(whose, {}))

    def is_complete(self, whose: Whose) -> bool:
        """Whether :meth:`of` lacks none that there was since the start, or since :meth:`forget`."""
        with self._lock:
            return whose not in self._missed

    def forget(self, whose: Whose) -> None:
        """Begins anew."""
        with self._lock:
            self._kept.pop(whose, None)
            self._missed.discard(whose)

    def _own_folder(self) -> Path:
        if self._folder is not None and not self._folder.is_dir():  # somebody tidied the system's temporary folder
            self._missed |= self._kept.keys()
            self._kept.clear()
            self._folder = None
        if self._folder is None:
            _remove_abandoned()
            self._folder, lock = _locked_folder()
            weakref.finalize(self, _give_up, self._folder, lock)
        return self._folder

    def _tidy(self) -> None:
        while len(self._kept) > 1 and self._bytes() > self._limit:
            whose, _ = self._kept.popitem(last=False)
            self._missed.add(whose)

    def _bytes(self) -> int:
        return sum(answer.size for answer in {a for spots in self._kept.values() for a in spots.values()})


def _kept(file: Path, folder: Path, names: Mapping[int, str], record: Provenance) -> Answer:
    """An answer with a second name for a file that the server removes once it is sent."""
    target = folder / f"{time.monotonic_ns()}-{file.name}"
    try:
        os.link(file, target)
    except OSError:  # another file system
        shutil.copyfile(file, target)
    answer = Answer(target, dict(names), record, target.stat().st_size)
    weakref.finalize(answer, target.unlink, missing_ok=True)
    return answer


def _locked_folder() -> tuple[Path, FileLock]:
    """A new folder, made once its lock is held, which ends with the process at last."""
    folder = Path(tempfile.gettempdir()) / f"{PREFIX}{uuid4().hex}"
    lock = FileLock(f"{folder}{LOCK}", thread_local=False)  # given up by whichever thread comes last
    lock.acquire()
    folder.mkdir(mode=0o700)
    return folder, lock


def _give_up(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)


def _remove_abandoned() -> None:
    """The folders of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if folder.suffix == LOCK or folder.is_symlink():
            continue
        with suppress(OSError, Timeout):  # it is in use, another user's, or gone
            lock = FileLock(f"{folder}{LOCK}", timeout=0)
            with lock:
                shutil.rmtree(folder)
            Path(lock.lock_file).unlink(missing_ok=True)


def numbers_of(answers: Mapping[Spot, Answer]) -> Optional[dict[int, str]]:
    """Voxel value to structure; None where the answers do not agree, as those of one structure each."""
    said = {(value, name) for (name, _), a in answers.items() for value, own in a.names.items() if own == name}
    names = dict(sorted(said))
    return names if len(names) == len({*names.values()}) == len(said) else None


def together(answers: Mapping[Spot, Answer], volume: Volume) -> LabelMap:
    """The answers as one label map, with their own numbers if they agree; where two claim a voxel, the newer has it.

    Args:
        answers: of one image, at least one.
        volume: the image.

    Raises:
        VolumeError: for a file that cannot be read.
    """
    names = numbers_of(answers) or dict(enumerate(sorted({name for name, _ in answers}), start=1))
    numbers = {name: number for number, name in names.items()}
    voxels = np.zeros(volume.shape, np.uint16)
    read = {answer: label_map(volume, answer.file, answer.names) for answer in set(answers.values())}
    for (name, k), answer in sorted(answers.items(), key=lambda item: item[1].record.created):
        (value,) = (v for v, n in answer.names.items() if n == name)
        own = read[answer].voxels == value
        part, own = (voxels, own) if k is None else (slice_view(voxels, 2, k), slice_view(own, 2, k))
        part[own] = numbers[name]
    axis = next(iter(read.values())).axis
    return LabelMap(voxels, names, volume.affine, volume.spacing_mm, axis)
