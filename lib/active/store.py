"""Scores of images on disk: one small file per image and version, written beside and renamed.

``<folder>/<version key>/<digest>.json``; the digest is of the image's identifier, size and time, so a changed file has
no scores and no name of an image is written. A file that cannot be read counts as none: it is made again. Thread-safe.
Left out: what the numbers mean (:mod:`lib.active.evidence`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from lib.errors import VolumeError

DAMAGED = (OSError, ValueError, TypeError, KeyError, OverflowError)  # what reading a file of other hands ends with


@dataclass(frozen=True)
class CaseScore:
    """What was found out about one image.

    Args:
        raw: uncalibrated opinion of the result by label, 0..1; empty without a version.
        disagreement: see :class:`lib.active.selection.Known`.
        embedding: of the image; empty for an image that could not be read.
        content: hash of its voxels.
    """

    raw: dict[str, float] = field(default_factory=dict)
    disagreement: Optional[float] = None
    embedding: tuple[float, ...] = ()
    content: str = ""

    @property
    def failed(self) -> bool:
        """Whether the image could not be read."""
        return not self.embedding


class ScoreStore:
    """Scores of all versions of one method.

    Args:
        folder: made with the first score.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: str, wanted: Collection[str]) -> dict[str, CaseScore]:
        """Scores of the wanted images under a version's key, by digest."""
        found = {}
        for digest in wanted:
            try:
                found[digest] = _score(json.loads((self._folder / key / f"{digest}.json").read_text("utf-8")))
            except DAMAGED:
                continue
        return found

    def write(self, key: str, digest: str, score: CaseScore) -> None:
        """Stores one image's scores.

        Raises:
            OSError: if the disk does not take them.
        """
        folder = self._folder / key
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{digest}.part"
        partial.write_text(json.dumps(asdict(score), allow_nan=False), encoding="utf-8")
        os.replace(partial, folder / f"{digest}.json")

    def keep_only(self, keys: Collection[str]) -> None:
        """Removes scores of other versions."""
        if self._folder.is_dir():
            for old in self._folder.iterdir():
                if old.is_dir() and old.name not in keys:
                    shutil.rmtree(old, ignore_errors=True)


def digest_of(image: str, path: Path) -> str:
    """A name without meaning to a reader, another one when the file changes.

    Raises:
        VolumeError: if the file is gone.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise VolumeError("Expected an image of the store; its file is gone. Refresh the list of images.") from error
    text = repr((image, facts.st_size, facts.st_mtime_ns))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _score(values: dict[str, Any]) -> CaseScore:
    """Raises an error of :data:`DAMAGED` for anything that :meth:`ScoreStore.write` did not write."""
    score = CaseScore(**{**values, "embedding": tuple(values["embedding"])})
    if not isinstance(score.raw, dict) or not isinstance(score.content, str):
        raise TypeError("no scores")
    numbers = [*score.raw.values(), *score.embedding, *([] if score.disagreement is None else [score.disagreement])]
    if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        raise ValueError("not finite")
    return score
