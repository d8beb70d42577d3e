"""The datastore of a folder: upstream's, but files are replaced whole or not at all, and nothing lies outside it.

Upstream writes a label and its list of labels over the old ones, so that a full disk or a kill destroys both. Here all
is written under another name beside its place, and moved there when nothing can fail any more; memory says what the
disk holds, also after a failure. The list is read again before every change, under one lock for threads and processes,
so that nobody's change is lost. Names that clients choose are plain file names. A child writes nothing
(:meth:`LocalStore.only_read`). Left out: a kill between the two moves of a label, which leaves the new voxels with what
was known of the old ones.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Optional, TypeVar
from uuid import uuid4

from filelock import FileLock
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore, LocalDatastoreModel
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelError,
    MONAILabelException,
)

from infers.base import told
from lib.child import stop_watching
from lib.errors import ConfigError
from lib.told import check_told

logger = logging.getLogger(__name__)
POLL_S = 0.001  # upstream looks at every file that is copied in, and would have the lock again before others look
PART = ".part"  # ends the names of what is not complete yet; no image or label ends so
Model = TypeVar("Model", DataModel, ImageLabelModel)


class LocalStore(LocalDatastore):
    """Images and labels of a folder; arguments are upstream's.

    Raises:
        ConfigError: where the list of images and labels is damaged.
    """

    _is_child = False
    _seen: tuple[int, ...] = ()  # the list's file when it was read or written last

    @cached_property
    def _index_lock(self) -> FileLock:
        """One for all that reads, changes and writes the list; upstream makes a new one each time, which nests not."""
        return FileLock(self._lock_file, poll_interval=POLL_S)

    def only_read(self) -> None:
        """Makes this the store of a child process: what it learns stays with it, so that the server alone writes.

        Its list would be as old as the child, and what was saved since would be gone.
        """
        stop_watching(self)
        self._is_child = True

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Keeps a label; the one before stays whole until then.

        Args:
            image_id: identifier of the image, which is the label's too.
            label_filename: file that is copied.
            label_tag: ``final`` or another; a folder of that name holds the labels.
            label_info: what is known about it.

        Raises:
            MONAILabelException: for a tag that is no plain name, for facts that no JSON can hold, or where the disk is
                full; nothing has changed then.
        """
        _check_name("tag", label_tag)
        with told():
            check_told(label_info or {})
        _, ext = self._to_id(os.path.basename(label_filename))
        name = self._filename(image_id, ext)
        facts = {**(label_info or {}), "ts": int(time.time()), "name": name}
        with self._index_lock:
            labels = self._known(image_id).labels
            with entry(labels, label_tag, DataModel(info=facts, ext=ext)):
                self._put(Path(label_filename), Path(self._datastore.label_path(label_tag)) / name)
        return image_id

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Takes an image in; one of the same id is replaced, and its labels stay.

        Raises:
            MONAILabelException: for an id that is no plain name, a kind of file that the store does not list, or where
                the disk is full; nothing has changed then.
        """
        with told():
            check_told(image_info or {})
        own, ext = self._to_id(os.path.basename(image_filename))
        image_id = image_id or own
        _check_name("image", image_id)
        name = self._filename(image_id, ext)
        if not any(fnmatch(name, pattern) for pattern in self._extensions):  # such as the list of labels itself
            kinds = ", ".join(pattern.lstrip("*") for pattern in self._extensions)
            raise _refusal(f"file: expected an image, {kinds}; received {ext or 'none of them'}. Convert it first.")
        info = {**(image_info or {}), "ts": int(time.time()), "name": name}
        with self._index_lock:
            self._init_from_datastore_file()
            before = self._datastore.objects.get(image_id)
            model = ImageLabelModel(image=DataModel(info=info, ext=ext), labels=before.labels if before else {})
            with entry(self._datastore.objects, image_id, model):
                self._put(Path(image_filename), Path(self._datastore.image_path()) / name)
        return image_id

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Adds to what is known about an image."""
        with told():
            check_told(info)
        with self._index_lock:
            known = self._known(image_id)
            image = DataModel(info={**known.image.info, **info}, ext=known.image.ext)
            model = ImageLabelModel(image=image, labels=known.labels)
            with entry(self._datastore.objects, image_id, model):
                self._update_datastore_file()

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Adds to what is known about a label."""
        with told():
            check_told(info)
        with self._index_lock:
            self._init_from_datastore_file()
            known = self._datastore.objects.get(label_id)
            label = known.labels.get(label_tag) if known else None
            if known is None or label is None:
                raise LabelNotFoundException("The image has no such label. Choose the image again.")
            with entry(known.labels, label_tag, DataModel(info={**label.info, **info}, ext=label.ext)):
                self._update_datastore_file()

    def _known(self, image_id: str) -> ImageLabelModel:
        """As the list says now."""
        self._init_from_datastore_file()
        known = self._datastore.objects.get(image_id)
        if known is None:
            raise ImageNotFoundException("The datastore has no such image. Choose the image again.")
        return known

    def _put(self, source: Path, place: Path) -> None:
        """Copies a file to its place and writes the list that tells of it."""
        with _disk(), part_of(place) as part:
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(source, "rb") as file:
                fill(part, file, source)
            self._write_list(lambda: os.replace(part, place))

    def _update_datastore_file(self, lock: bool = True) -> None:
        """Upstream's name; the lock may be held or not."""
        self._write_list()

    def _write_list(self, first: Callable[[], None] = lambda: None) -> None:
        """Replaces the list; ``first`` is done when its new text is on the disk, and only then."""
        if self._is_child:
            return first()
        index = Path(self._datastore_config_path)
        with self._index_lock, _disk(), part_of(index) as part:
            text = json.dumps(self._datastore.model_dump(exclude={"base_path"}), indent=2, default=str)
            fill(part, io.BytesIO(text.encode()), index if index.exists() else None)
            first()
            os.replace(part, index)
            self._seen = _stamp(index)

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        """Reads the list if it has changed; a damaged one is an error at the start, and later what is known stays."""
        index = Path(self._datastore_config_path)
        with self._index_lock:
            if not index.exists() or (stamp := _stamp(index)) == self._seen:
                return
            try:
                found = LocalDatastoreModel.model_validate_json(index.read_bytes())
            except ValueError:  # whose text holds parts of the file
                if throw_exception:
                    raise _damaged(index) from None
                logger.error("The list of labels on the disk is damaged: passed over, the next change replaces it")
                return
            found.base_path = self._datastore_path  # before anybody asks for a path: else it is the working directory's
            self._datastore, self._seen = found, stamp

    def _reconcile_datastore(self) -> None:
        """Upstream's, in one piece; what the folder holds is known though the list cannot be written."""
        with self._index_lock:
            self._remove_parts()
            try:
                super()._reconcile_datastore()
            except MONAILabelException as error:  # the next one writes it
                logger.warning("The list of images and labels was not written: %s", error.msg)

    def _remove_parts(self) -> None:
        """What a process left that was killed; with the lock held nobody is at any."""
        labels = Path(self._datastore.label_path(None))
        for folder in {Path(self._datastore_path), Path(self._datastore.image_path()), *labels.glob("*/")}:
            for part in folder.glob(f".*{PART}"):
                part.unlink(missing_ok=True)


def is_plain(name: Any) -> bool:
    """Whether a text names a file in a folder and nothing outside of it, on any system."""
    return isinstance(name, str) and name[:1] not in ("", ".") and not {"/", "\\", ":", "\0"} & set(name)


@contextmanager
def part_of(place: Path) -> Iterator[Path]:
    """Where a file is written before it is moved to its place; gone afterwards, whatever happens."""
    part = place.with_name(f".{uuid4().hex}{PART}")  # its own for each of two at once
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def fill(part: Path, content: BinaryIO, like: Optional[Path] = None) -> None:
    """Writes a file and waits until it is on the disk: a network share may say only then that it is full.

    Args:
        part: the file.
        content: of it.
        like: a file whose rights it gets.
    """
    with open(part, "wb") as file:
        shutil.copyfileobj(content, file)
        file.flush()
        os.fsync(file.fileno())
    if like is not None:
        shutil.copymode(like, part)


@contextmanager
def entry(entries: dict[str, Model], key: str, new: Model) -> Iterator[None]:
    """An entry that stays if all inside succeeds; else the one before is back."""
    before = entries.get(key)
    entries[key] = new
    try:
        yield
    except BaseException:
        if before is None:
            del entries[key]
        else:
            entries[key] = before
        raise


@contextmanager
def _disk() -> Iterator[None]:
    """A full disk as the server's exception."""
    try:
        yield
    except OSError as error:
        raise MONAILabelException(
            MONAILabelError.SERVER_ERROR,
            f"Expected to write into the datastore; received: {error.strerror or type(error).__name__}. What it held"
            " before is whole. See to the disk's space and the folder's rights, and save again.",
        ) from error


def _stamp(index: Path) -> tuple[int, ...]:
    """Changes with the file: a new one has another number, however soon it follows."""
    facts = index.stat()
    return facts.st_mtime_ns, facts.st_ino, facts.st_size


def _damaged(index: Path) -> ConfigError:
    return ConfigError(
        f"Expected the list of images and labels in {index} as JSON; received a damaged one, perhaps cut off by a full"
        " disk or a kill. Images and labels themselves are other files. Put the list back from a backup. Without one,"
        " move it away and start again: labels are found again by their files, but names of their values and who made"
        " them are lost, so keep the damaged list, where they can be looked up."
    )


def _check_name(key: str, name: Any) -> None:
    if not is_plain(name):
        raise _refusal(f"{key}: expected a plain name, without a folder and not beginning with a dot. Choose another.")


def _refusal(sentence: str) -> MONAILabelException:
    return MONAILabelException(MONAILabelError.INVALID_INPUT, sentence)
