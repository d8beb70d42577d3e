"""Who works on which image since when and what the model told them, for the record of a saved label.

What a person changed is computed when a label is saved, in the background where it takes long. Frames: the image's own
voxels. Thread-safe. Lost at a restart: then a label is compared with the stored one of the model, and the time counts
from the hand-out that the store remembers. Left out: who changed which voxels in between two saves.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Optional

from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.exception import MONAILabelException

from infers.answers import Answer, Answers, Spot, together
from infers.batch import MARK
from infers.request import SEG
from infers.stored import hand_outs, stored_map
from lib.data.samples import names_of
from lib.errors import AppError
from lib.provenance import Change, Kind, Provenance
from lib.quality.agreement import changed_voxels, dice_by_label
from lib.types import Volume

logger = logging.getLogger(__name__)
FINAL, ORIGINAL = DefaultLabelTag.FINAL.value, DefaultLabelTag.ORIGINAL.value
LONGEST_S = 4 * 3600.0  # an image that was open for longer was left open
PATIENCE_S = 0.5  # that a save waits for the comparison
NAME = 100  # characters of a user's name that are kept


class Records:
    """The server's memory of who works on what.

    Args:
        open_image: path to volume.
        live: versions that are live, by method.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        open_image: Callable[[str], Volume],
        live: Callable[[], dict[str, str]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._open, self._live, self._clock = open_image, live, clock
        self._lock = threading.Lock()
        self._since: dict[tuple[str, str], float] = {}
        self._saved: dict[tuple[str, str], float] = {}
        self._answers = Answers()
        self._worker: Optional[ThreadPoolExecutor] = None

    def asked(self, request: Mapping[str, Any]) -> None:
        """Somebody asks a model about an image."""
        if _is_users(request):
            with self._lock:
                self._since.setdefault((request["image"], _client(request)), self._clock())

    def answered(self, request: Mapping[str, Any], result: Mapping[str, Any], dimension: int) -> None:
        """A model has answered; keeps the file.

        Args:
            request: of the client.
            result: of the app's inference.
            dimension: of the task; 2 answers about the prompted slices only.
        """
        file, reply = str(result.get("file") or ""), result["params"]
        names = {number: name for name, number in reply.get("label_names", {}).items()}
        seen = _is_users(request) and os.path.isfile(file) and not file.endswith(SEG)
        if seen and names and "file" not in reply:
            slices = reply.get("prompted") if dimension == 2 else None
            self._answers.add(request["image"], Path(file), names, Provenance.from_json(reply["provenance"]), slices)

    def describe(
        self, store: Datastore, image: str, params: Mapping[str, Any], user: Optional[str] = None
    ) -> Provenance:
        """The record of a label that a client saves now, without what was changed.

        Args:
            store: of the image.
            image: identifier.
            params: what the client says about the label.
            user: authenticated name; None where only the client says who it is.
        """
        names = {*names_of(params).values()}
        answers = _about(names, self._answers.of(image))
        record = _newest(answers) or _stored_record(store, image, names)
        who = self._who(store, image, params, user)
        if record is None:
            return Provenance(kind=Kind.MANUAL, saved=True, **who)
        prompts = sum(a.record.prompts for a in set(answers.values())) or record.prompts
        return replace(
            record, kind=Kind.SEMIAUTOMATIC, prompts=prompts, saved=True, created=datetime.now(UTC), changed=None, **who
        )

    def kept(self, store: Datastore, request: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
        """The record of an answer that the server itself keeps at a client's wish, with who wished it."""
        who = self._who(store, str(request["image"]), request, None)
        return replace(Provenance.from_json(record), **who).to_json()

    def _who(self, store: Datastore, image: str, params: Mapping[str, Any], user: Optional[str]) -> dict[str, Any]:
        client = _client(params)
        return {
            "user": (user or client)[:NAME],
            "declared": user is None and bool(client),
            "seconds_spent": self._seconds(store, image, client),
            "live": self._live(),
        }

    def _seconds(self, store: Datastore, image: str, client: str) -> Optional[float]:
        """From the hand-out by an active learning strategy or the first question, whichever was first."""
        handed = hand_outs(store.get_image_info(image) or {})
        starts = [float(h["ts"]) for h in handed if h.get("client_id") in (client, None)]
        with self._lock:
            now, before = self._clock(), self._saved.get((image, client), 0.0)
            starts += [self._since[image, client]] if (image, client) in self._since else []
        spent = [now - start for start in starts if start > before and 0 <= now - start <= LONGEST_S]
        return round(max(spent), 1) if spent else None

    def saved(
        self, store: Datastore, image: str, user: Optional[str] = None, wait_s: float = PATIENCE_S
    ) -> Optional[Future]:
        """Completes the record of the label that was saved last.

        Args:
            store: of the image.
            image: identifier.
            user: authenticated name, if any.
            wait_s: how long to wait for the comparison before it goes on alone.

        Returns:
            The comparison, or None where there is nothing to compare.
        """
        try:
            found = self._completed(store, image, user)
        except (AppError, MONAILabelException, OSError) as error:  # the label is saved, whatever becomes of its record
            logger.warning("The record of a saved label cannot be completed: %s", _told(error))
            return None
        if found is None:
            return None
        with self._lock:
            self._worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix="records")
        done = self._worker.submit(self._compare, store, image, *found)
        with suppress(StillRunning):
            done.result(wait_s)
        return done

    def _completed(self, store: Datastore, image: str, user: Optional[str]) -> Optional[tuple[str, Provenance]]:
        """Tag and record of the label that was saved last, if a person saved it after a model's answer."""
        tag, info = _last_saved(store, image)
        if tag is None:
            return None
        if info.get("provenance") is None:
            record = self.describe(store, image, info, user)
            store.update_label_info(image, tag, {"provenance": record.to_json()})
        else:
            record = Provenance.from_json(info["provenance"])
        if not record.saved or record.changed is not None:
            return None
        with self._lock:
            self._saved[image, _client(info)] = self._clock()
            self._since.pop((image, _client(info)), None)
        return None if record.kind is Kind.MANUAL else (tag, record)

    def _compare(self, store: Datastore, image: str, tag: str, record: Provenance) -> None:
        try:
            change = self._change(store, image, tag)
        except (AppError, MONAILabelException, OSError) as error:
            logger.warning("What a person changed cannot be said: %s", _told(error))
            return
        info = store.get_label_info(image, tag) or {}
        now = info.get("provenance") or {}
        if change is not None and now.get("created") == record.to_json()["created"]:  # else it was saved again
            store.update_label_info(image, tag, {"provenance": replace(record, changed=change).to_json()})

    def _change(self, store: Datastore, image: str, tag: str) -> Optional[Change]:
        volume = self._open(store.get_image_uri(image))
        final = stored_map(store, image, tag, volume)
        answers = _about({*final.names.values()} if final.declared else set(), self._answers.of(image))
        if answers:
            model, since = together(answers, volume), "answer"
        elif tag != ORIGINAL and ORIGINAL in store.get_labels_by_image_id(image):
            model, since = stored_map(store, image, ORIGINAL, volume), "original"
        else:
            return None
        dice = {name: round(value, 4) for name, value in dice_by_label(final, model).items()}
        return Change(since, dice, changed_voxels(final, model))


def _told(error: Exception) -> str:
    """What it says; an error of the disk would name files."""
    if isinstance(error, MONAILabelException):
        return error.msg
    return str(error) if isinstance(error, AppError) else type(error).__name__


def _is_users(request: Mapping[str, Any]) -> bool:
    """Whether a person sees the answer, and it is about an image of the store."""
    image = request.get("image")
    return isinstance(image, str) and not os.path.isabs(image) and request.get(MARK) is not True


def _client(params: Mapping[str, Any]) -> str:
    client = params.get("client_id")
    return client if isinstance(client, str) else ""


def _about(names: Set[str], answers: Mapping[Spot, Answer]) -> dict[Spot, Answer]:
    """The answers about structures that the saved label has; all where it names none."""
    return {spot: answer for spot, answer in answers.items() if not names or spot[0] in names}


def _newest(answers: Mapping[Spot, Answer]) -> Optional[Provenance]:
    return max((a.record for a in answers.values()), key=lambda record: record.created, default=None)


def _stored_record(store: Datastore, image: str, names: Set[str]) -> Optional[Provenance]:
    """Of the model's label in the store, if it is about one of these structures."""
    if ORIGINAL not in store.get_labels_by_image_id(image):
        return None
    info = store.get_label_info(image, ORIGINAL) or {}
    theirs = {*names_of(info).values()}
    if names and theirs and not names & theirs:
        return None
    params = info.get("params")
    record = info.get("provenance") or (params.get("provenance") if isinstance(params, Mapping) else None)
    try:
        return (
            Provenance.from_json(record) if record else Provenance(kind=Kind.AUTOMATIC, task=str(info.get("model", "")))
        )
    except AppError:  # of another program
        return Provenance(kind=Kind.AUTOMATIC)


def _last_saved(store: Datastore, image: str) -> tuple[Optional[str], dict[str, Any]]:
    """Tag and info of the image's newest label; the final one of two from the same second."""
    found = {tag: store.get_label_info(image, tag) or {} for tag in store.get_labels_by_image_id(image)}
    if not found:
        return None, {}
    newest = max(found, key=lambda tag: (found[tag].get("ts", 0), tag == FINAL))
    return newest, found[newest]
