"""Who works on which image since when and what the model told them, for the record of a saved label.

Who that is: the authenticated user, else what the client calls itself; clients without a name cannot be told apart.
What a person changed of the answers that they had when they saved is computed in the background where it takes long.
Frames: the image's own voxels. Thread-safe. Lost at a restart: then a label is compared with the stored one of the
model, whether one was asked is not known, and the time counts from the hand-out that the store remembers. Left out: who
changed which voxels in between two saves.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Optional

from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.exception import MONAILabelException

from infers.answers import Answer, Answers, Spot, Whose, numbers_of, together
from infers.base import for_store
from infers.batch import MARK
from infers.request import SEG
from infers.stored import hand_outs, stored_map, time_of
from infers.strategies import UPSTREAM_NOBODY
from lib.data.samples import names_of
from lib.errors import AppError
from lib.provenance import Change, Kind, Provenance
from lib.quality.agreement import changed_voxels, dice_by_label
from lib.types import Volume

logger = logging.getLogger(__name__)
FINAL, ORIGINAL = DefaultLabelTag.FINAL.value, DefaultLabelTag.ORIGINAL.value
USER = "authenticated_user"  # in a request, where our wrapper of the server alone may write it
PAUSE_S = 600.0  # without a request, and whoever pauses for longer may be away
AGAIN_S = 3600.0  # after a save, in which its answers count for a second one as well
OPEN_S = 4 * 3600.0  # after a hand-out or an answer, in which its image may still be open
PATIENCE_S = 0.5  # that a save waits for the comparison
NAME = 100  # characters of a user's name that are kept


class Records:
    """The server's memory of who works on what.

    Args:
        open_image: path to volume.
        live: versions that are live, by method.
        labels: names of the values 1..K in a label that declares none.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        open_image: Callable[[str], Volume],
        live: Callable[[], dict[str, str]],
        labels: Sequence[str] = (),
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._open, self._live, self._labels, self._clock = open_image, live, labels, clock
        self._lock, self._start = threading.Lock(), clock()
        self._times: dict[Whose, list[float]] = {}  # of the questions since the last save
        self._saved: dict[Whose, float] = {}
        self._answers = Answers()
        self._worker: Optional[ThreadPoolExecutor] = None

    def asked(self, request: Mapping[str, Any]) -> None:
        """Somebody asks a model about an image."""
        if _is_users(request):
            with self._lock:
                self._end_former(_whose(request))
                self._times.setdefault(_whose(request), []).append(self._clock())

    def answered(self, store: Datastore, request: Mapping[str, Any], result: Mapping[str, Any], dimension: int) -> None:
        """A model has answered; keeps the file, and completes the record of a label that MONAI Label made of it.

        Args:
            store: of the image.
            request: of the client.
            result: of the app's inference.
            dimension: of the task; 2 answers about the prompted slices only.
        """
        file, reply = str(result.get("file") or ""), result["params"]
        if result.get("label") == request["image"]:
            self._written(store, request, reply)
        if not _is_users(request):
            return
        names = {number: name for name, number in reply.get("label_names", {}).items()}
        if not names or "file" in reply or file.endswith(SEG) or not os.path.isfile(file):
            self._answers.miss(_whose(request))
            return
        slices = reply.get("prompted") if dimension == 2 else None
        try:
            self._answers.add(_whose(request), Path(file), names, Provenance.from_json(reply["provenance"]), slices)
        except OSError as error:  # such as a full disk: the answer itself is there
            logger.warning("An answer cannot be kept for comparison: %s", error.strerror)
            self._answers.miss(_whose(request))

    def _written(self, store: Datastore, request: Mapping[str, Any], reply: dict[str, Any]) -> None:
        """Puts the record of a label that MONAI Label's ``save_label`` made where it is for all others."""
        reply["provenance"] = self.kept(store, request, reply["provenance"])
        info = {"params": for_store(reply), "provenance": reply["provenance"]}
        try:
            store.update_label_info(request["image"], request.get("label_tag", ORIGINAL), info)
        except MONAILabelException as error:  # removed meanwhile
            logger.warning("The record of a saved label cannot be completed: %s", _told(error))
        if _is_users(request):
            self._end(_whose(request))

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
        facts = self._facts(store, image, params, user)
        answers = self._given((image, facts["user"]), names)
        record = _newest(answers) or _draft(store, image, names)
        if record is None:
            asked = None if self._may_have_asked(store, image, params, facts["user"]) else False
            return Provenance(kind=Kind.MANUAL, saved=True, asked=asked, **facts)
        prompts = sum(a.record.prompts for a in set(answers.values())) or record.prompts
        now = datetime.now(UTC)
        return replace(record, kind=Kind.SEMIAUTOMATIC, prompts=prompts, saved=True, created=now, changed=None, **facts)

    def kept(self, store: Datastore, request: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
        """The record of an answer that the server itself keeps at a client's wish, with who wished it."""
        facts = self._facts(store, request["image"], request, request.get(USER))
        if not _is_users(request):  # nobody works on the images of a batch
            facts["seconds_spent"] = None
        return replace(Provenance.from_json(record), **facts).to_json()

    def _facts(self, store: Datastore, image: str, params: Mapping[str, Any], user: Optional[str]) -> dict[str, Any]:
        who = _who(params, user)
        return {
            "user": who,
            "declared": not user and bool(who),
            "seconds_spent": self._seconds(store, image, params, who),
            "live": self._live(),
        }

    def _seconds(self, store: Datastore, image: str, params: Mapping[str, Any], who: str) -> Optional[float]:
        """From the hand-out by an active learning strategy or the first question, whichever was first."""
        with self._lock:
            now, before = self._clock(), self._saved.get((image, who), 0.0)
            asked = list(self._times.get((image, who), ()))
        handed = (t for t in self._handed(store, image, params, who) if t > before)
        times = sorted(t for t in (*asked, *handed) if t <= now)  # the clock may have been put back
        return round(sum(min(b - a, PAUSE_S) for a, b in pairwise([*times, now])), 1) if times else None

    def _handed(self, store: Datastore, image: str, params: Mapping[str, Any], who: str) -> list[float]:
        """When the image was handed to this client or user of late."""
        now, names = self._clock(), {who, _who(params, None)}
        ours = [time_of(h) for h in hand_outs(store.get_image_info(image) or {}) if _named(h) in names]
        return [t for t in ours if now - OPEN_S < t <= now]

    def _may_have_asked(self, store: Datastore, image: str, params: Mapping[str, Any], who: str) -> bool:
        """Whether a model may be behind a label although no answer is known: one from before the start, one that was
        not kept, or one behind another label of the image."""
        since = max(self._handed(store, image, params, who), default=self._clock() - OPEN_S)
        infos = (store.get_label_info(image, tag) or {} for tag in store.get_labels_by_image_id(image))
        records = [info["provenance"] for info in infos if isinstance(info.get("provenance"), Mapping)]
        unknown = since < self._start or not self._answers.is_complete((image, who))
        return unknown or any(record.get("asked") is not False for record in records)

    def _given(self, whose: Whose, names: Set[str]) -> dict[Spot, Answer]:
        """The answers about structures that a saved label has; all where it names none."""
        with self._lock:
            self._end_former(whose)
        answers = self._answers.of(whose)
        return {spot: answer for spot, answer in answers.items() if not names or spot[0] in names}

    def _end_former(self, whose: Whose) -> None:
        """Forgets the answers of work that ended with a save; the lock is held."""
        if not self._times.get(whose) and self._clock() - self._saved.get(whose, math.inf) > AGAIN_S:
            self._answers.forget(whose)

    def _end(self, whose: Whose) -> None:
        """What was done was saved, and what comes is other work."""
        with self._lock:
            self._saved[whose] = self._clock()
            self._times.pop(whose, None)

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

    def _completed(
        self, store: Datastore, image: str, user: Optional[str]
    ) -> Optional[tuple[str, Provenance, dict[Spot, Answer]]]:
        """Tag and record of the label that was saved last, and the answers before it, if they are to be compared."""
        tag, info = _last_saved(store, image)
        if tag is None:
            return None
        if info.get("provenance") is None:
            record = self.describe(store, image, info, user)
            store.update_label_info(image, tag, {"provenance": record.to_json()})
        else:
            record = Provenance.from_json(info["provenance"])
        answers = self._given((image, record.user), {*names_of(info).values()})
        self._end((image, record.user))
        is_new = record.saved and record.changed is None and record.kind is not Kind.MANUAL
        return (tag, record, answers) if is_new else None

    def _compare(
        self, store: Datastore, image: str, tag: str, record: Provenance, answers: Mapping[Spot, Answer]
    ) -> None:
        try:
            change = self._change(store, image, tag, answers)
        except (AppError, MONAILabelException, OSError) as error:
            logger.warning("What a person changed cannot be said: %s", _told(error))
            return
        info = store.get_label_info(image, tag) or {}
        now = info.get("provenance") or {}
        if change is not None and now.get("created") == record.to_json()["created"]:  # else it was saved again
            store.update_label_info(image, tag, {"provenance": replace(record, changed=change).to_json()})

    def _change(self, store: Datastore, image: str, tag: str, answers: Mapping[Spot, Answer]) -> Optional[Change]:
        volume = self._open(store.get_image_uri(image))
        final = stored_map(store, image, tag, volume, self._labels)
        if answers:
            if not final.declared and numbers_of(answers) is None:  # nobody knows which value is what
                return None
            model, since = together(answers, volume), "answer"
        elif tag != ORIGINAL and _draft(store, image, {*final.names.values()} if final.declared else set()):
            model, since = stored_map(store, image, ORIGINAL, volume, self._labels), "original"
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


def _whose(request: Mapping[str, Any]) -> Whose:
    return request["image"], _who(request, request.get(USER))


def _who(params: Mapping[str, Any], user: Optional[str]) -> str:
    """The authenticated name, else the client's."""
    who = user or params.get("client_id")
    return who[:NAME] if isinstance(who, str) else ""


def _named(hand_out: Mapping[str, Any]) -> str:
    """To which client it was, as that calls itself."""
    client = _who(hand_out, None)
    return "" if client == UPSTREAM_NOBODY else client


def _newest(answers: Mapping[Spot, Answer]) -> Optional[Provenance]:
    return max((a.record for a in answers.values()), key=lambda record: record.created, default=None)


def _draft(store: Datastore, image: str, names: Set[str]) -> Optional[Provenance]:
    """The record of the model's label in the store, if it is about one of these structures and not drawn by hand."""
    if ORIGINAL not in store.get_labels_by_image_id(image):
        return None
    info = store.get_label_info(image, ORIGINAL) or {}
    theirs = {*names_of(info).values()}
    if names and theirs and not names & theirs:
        return None
    unknown = Provenance(kind=Kind.AUTOMATIC, task=str(info.get("model", "")))  # of another program
    try:
        record = Provenance.from_json(info["provenance"]) if "provenance" in info else unknown
    except AppError:
        record = unknown
    return None if record.kind is Kind.MANUAL else record


def _last_saved(store: Datastore, image: str) -> tuple[Optional[str], dict[str, Any]]:
    """Tag and info of the image's newest label; the final one of two from the same second."""
    found = {tag: store.get_label_info(image, tag) or {} for tag in store.get_labels_by_image_id(image)}
    if not found:
        return None, {}
    newest = max(found, key=lambda tag: (time_of(found[tag]), tag == FINAL))
    return newest, found[newest]
