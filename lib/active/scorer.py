"""Scores of all images of a store, kept up to date in the background of a running server.

One background thread (:mod:`lib.background`) works through a list that is made anew whenever something changed, and is
looked over every few seconds: images without scores are scored, unlabelled ones first. What was handed out, and then
what is likely next, is encoded before and between them, and in the middle of one between two groups of slices: scoring
goes on where it was, so no number of hand-outs keeps it from ending. It gives way to clicks before every encoder block.
Scores lie in ``scores/`` beside the versions; a new live version or a changed file is noticed without a restart. A
server on which nothing was trained and nobody asked for the next image does nothing. Any thread may read, which is one
look into a table, or call :meth:`Scorer.prepare`; the rest belongs to the background thread. Neither the engine's
embedding cache nor its opened images are touched by scoring, which would push out what people work on. Log lines carry
no names of images.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Optional

import numpy as np

from lib.active.calibration import Line, lines
from lib.active.selection import Known
from lib.active.sight import Sight
from lib.active.store import CaseScore, ScoreStore, digest_of
from lib.assisted import AssistedEngine, Live
from lib.background import FAILURES, Background, attempt
from lib.data.geometry import choose_axis
from lib.data.volume import load_volume
from lib.errors import CapacityError, VolumeError
from lib.versions.record import Version

logger = logging.getLogger(__name__)
LOOK_S = 5.0  # between two looks at the store and the live version
FORMULA = 1  # counts up when the same image and version would get other scores
RETRY_S = 30.0  # after a look that failed
AGAIN_S = 600.0  # after an image that could not be scored now, as where memory or disk were full
MOST_WANTED = 16  # images that wait to be prepared: the hand-outs of eight clients


@dataclass(frozen=True)
class Case:
    """One image of the store.

    Args:
        image: its identifier.
        path: its file or folder; None where it would have to be fetched from a PACS first.
        labelled: whether it has a final label; it then needs an embedding only.
    """

    image: str
    path: Optional[Path]
    labelled: bool


@dataclass(frozen=True)
class Scores:
    """All that is known under one version.

    Args:
        version: its name, or None while none is live.
        calibrated: whether predicted Dice rests on validation cases.
        known: by image.
        unreadable: images that could not be read.
    """

    version: Optional[str] = None
    calibrated: bool = False
    known: Mapping[str, Known] = field(default_factory=dict)
    unreadable: frozenset[str] = frozenset()


class Scorer:
    """Background scores of one learned method.

    Args:
        assisted: its engine.
        cases: lists the store.
        fetch: path of an image, which a PACS sends first; empty where there is none.
        most: how many unlabelled images are scored; 0 for none.
        fetches: how many images may be fetched only to score them.
        resting: whether a training has the processor now; images are prepared then, but none is scored. It would take
            the training's time, and the version that comes out of that needs all scores anew.
    """

    def __init__(
        self, assisted: AssistedEngine, cases: Callable[[], Sequence[Case]], fetch: Callable[[str], str], *,
        most: int, fetches: int, resting: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.assisted, self._resting = assisted, resting
        self._cases, self._fetch, self._most, self._fetches_left = cases, fetch, most, fetches
        self._store = ScoreStore(assisted.store.folder / "scores")
        self._lock = threading.Lock()  # of what is wanted
        self._key, self._lines = "", dict[str, Line]()
        self._table: dict[str, CaseScore] = {}  # by digest, of the version of the key
        self._digests: dict[str, str] = {}  # by image
        self._held: dict[str, tuple[str, float]] = {}  # by image: digest that was tried, and until when it waits
        self._now, self._former = Scores(), Scores()
        self._wanted: dict[str, int] = {}  # image to its place in its hand-out, most urgent first; replaced as a whole
        self._asked, self._due_s = False, 0.0
        self._news = threading.Event()
        self._worker: Background = assisted.engine.worker()
        self._finalizer = weakref.finalize(self, _close, self._worker, self._news)

    def start(self) -> None:
        """Begins; once, in the server only."""
        self._look_now()

    def close(self) -> None:
        """Ends the thread."""
        self._finalizer()

    def scores(self, images: Sequence[str]) -> Scores:
        """The newest version's scores, or those of the version before while they cover more of these images."""
        now, former = self._now, self._former
        covered = [sum(image in one.known for image in images) for one in (now, former)]
        return former if covered[1] > covered[0] else now

    def prepare(self, images: Sequence[str]) -> None:
        """Encodes these images next, so that they open at once.

        Whatever other clients wait for stays wanted: first what was handed out, then what is likely next, of each the
        newest first.

        Args:
            images: one client's, the one that was handed out first.
        """
        with self._lock:
            wanted = {image: place for place, image in enumerate(images)}
            wanted |= {image: place for image, place in self._wanted.items() if image not in wanted}
            self._wanted = dict(sorted(wanted.items(), key=itemgetter(1))[:MOST_WANTED])
        self._asked = True
        self._look_now()

    def waiting(self) -> int:
        """Images to prepare and jobs that are left, the next look at the store not counted."""
        return len(self._wanted) + max(0, self._worker.waiting() - 1)

    def look(self) -> None:
        """Prepares what is wanted, takes up what changed and makes the list of jobs anew; runs in the background."""
        self._news.clear()  # first: what comes meanwhile ends the wait for the next look
        self._serve()
        me, jobs = weakref.ref(self), list[Callable[[], object]]()
        if self._most and (self._asked or self.assisted.live_version() is not None):
            live, cases = self.assisted.live(), self._cases()
            digests = _digests(cases)
            if live is not None and not self._key:  # scores that an earlier server process left count as its own would
                self._take_up(self._predecessor(), digests)
            self._take_up(_version(live), digests)
            jobs += [partial(_call, me, "_score", case) for case in self._unscored(cases)]
        self._due_s = time.monotonic() + LOOK_S
        self._replan([*jobs, partial(_look, me, self._news, LOOK_S)])

    def _look_now(self) -> None:
        self._news.set()  # ends a wait
        self._replan([partial(_look, weakref.ref(self), self._news, 0.0)])

    def _replan(self, jobs: Sequence[Callable[[], object]]) -> None:
        self._worker.replace(jobs)

    def _take_up(self, version: Optional[Version], digests: dict[str, str]) -> None:
        """A new version, new images, changed files."""
        key = self._key_of(version)
        if key != self._key:
            if self._now.known:
                self._former = self._now
            if self._key:
                self._store.keep_only({key, self._key})
            self._key, self._table, self._digests, self._held = key, {}, {}, {}
            self._lines = {} if version is None else lines(version.metrics)
        unread = [digest for image, digest in digests.items() if self._digests.get(image) != digest]
        self._table |= self._store.read(key, unread)
        if digests != self._digests or self._now.version != _name(version):
            self._digests = digests
            self._publish(version)

    def _predecessor(self) -> Optional[Version]:
        name = self.assisted.store.predecessor()
        return self.assisted.store.get(name) if name else None

    def _key_of(self, version: Optional[Version]) -> str:
        """Of a folder of scores: everything that decides them but the image."""
        plain = self.assisted.engine.warm().weights_id
        parts = (plain, "" if version is None else version.sha256, FORMULA)
        return f"{_name(version) or 'plain'}-{hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()}"

    def _unscored(self, cases: Sequence[Case]) -> list[Case]:
        """What is to be scored, unlabelled images first, in an order that does not depend on names' order."""
        open_ = sorted((c for c in cases if not c.labelled), key=lambda c: _shuffled(c.image))[: self._most]
        labelled = [c for c in cases if c.labelled and c.path is not None]
        there = [c for c in open_ if c.path is not None]
        absent = [c for c in open_ if c.path is None] if self._asked else []
        return [c for c in (*there, *labelled, *absent) if not self._is_done(c)]

    def _is_done(self, case: Case) -> bool:
        """Whether nothing is to be done about an image, or not now."""
        digest = self._digests.get(case.image, "")
        tried, until_s = self._held.get(case.image, (None, 0.0))
        if tried == digest:
            return time.monotonic() < until_s
        score = self._table.get(digest)
        return score is not None and (score.failed or case.labelled or self._has_answer(score))

    def _has_answer(self, score: CaseScore) -> bool:
        return bool(score.raw) or self._key.startswith("plain-")

    def _score(self, case: Case) -> None:
        self._serve()
        if self._resting():
            return
        live = self.assisted.live()
        if time.monotonic() > self._due_s or self._key_of(_version(live)) != self._key:
            self._look_now()
            return
        if case.path is None and self._fetches_left <= 0:
            return
        self._hold(case.image, self._digests.get(case.image, ""))  # a full disk is not met again every few seconds
        path = case.path or self._fetched(case.image)
        if path is None:
            return
        digest = digest_of(case.image, path)
        try:
            score = self._looked_at(path, live, case.labelled)
            self._store.write(self._key, digest, score)
            del self._held[case.image]
        except CapacityError as error:
            logger.info("an image cannot be scored now: %s", error)
            self._hold(case.image, digest)
            score = CaseScore()  # in memory only: there may be more of it later
        self._table[digest], self._digests[case.image] = score, digest
        self._publish(_version(live), case.image)

    def _hold(self, image: str, digest: str) -> None:
        self._held[image] = digest, time.monotonic() + AGAIN_S

    def _fetched(self, image: str) -> Optional[Path]:
        self._fetches_left -= 1
        path = self._fetch(image)
        return Path(path) if path else None

    def _looked_at(self, path: Path, live: Optional[Live], labelled: bool) -> CaseScore:
        """Raises CapacityError, which says nothing about the image; one that cannot be read has failed."""
        try:
            volume = load_volume(path)
        except VolumeError as error:
            logger.info("an image cannot be scored: %s", error)
            return CaseScore()
        found = Sight(self.assisted, volume, live, self._serve).evidence(with_answer=not labelled)
        raw = {} if live is None or found.raw is None else dict(zip(live.version.labels, found.raw.tolist()))
        points = tuple(round(v, 5) for v in found.embedding.tolist())
        return CaseScore(raw, found.disagreement, points, volume.content_hash)

    def _publish(self, version: Optional[Version], image: str = "") -> None:
        """Puts what is known where :meth:`scores` reads it; one image's, or everything anew."""
        changed = {image: self._digests[image]} if image else self._digests
        known = {name: one for name, one in self._now.known.items() if image not in ("", name)}
        unreadable = self._now.unreadable - {image} if image else frozenset()
        found = {name: self._table[digest] for name, digest in changed.items() if digest in self._table}
        known |= {name: self._known(score) for name, score in found.items() if not score.failed}
        unreadable |= {name for name, score in found.items() if score.failed}
        self._now = Scores(_name(version), bool(self._lines), known, unreadable)
        if len(known) >= len(self._former.known):  # caught up: from now on the former ones would only be older
            self._former = Scores()

    def _known(self, score: CaseScore) -> Known:
        dice = [self._lines.get(label, Line())(raw) for label, raw in score.raw.items()]
        return Known(float(np.mean(dice)) if dice else None, score.disagreement, np.array(score.embedding, np.float32))

    def _serve(self) -> None:
        """Prepares all that is wanted; what fails is not tried again."""
        while (image := next(iter(self._wanted), None)) is not None:
            try:
                attempt(partial(self._prepare, image))
            finally:
                with self._lock:
                    self._wanted = {one: place for one, place in self._wanted.items() if one != image}

    def _prepare(self, image: str) -> None:
        """What a radiologist's first requests need: the autonomous result, and features of the middle slices."""
        engine = self.assisted.engine
        path = self._fetch(image)
        if not path:  # gone meanwhile
            return
        volume = engine.open(path)
        if self.assisted.live() is not None:
            self.assisted.segment(volume, {})
        if engine.settings.prefetch:
            axis = choose_axis(volume.spacing_mm, volume.shape, is_2d=volume.is_2d)
            middle = volume.shape[axis] // 2
            around = sorted(range(volume.shape[axis]), key=lambda i: abs(i - middle))
            for index in around[: 2 * engine.settings.prefetch_slices]:
                engine.features(volume, axis, index)


def _version(live: Optional[Live]) -> Optional[Version]:
    return None if live is None else live.version


def _name(version: Optional[Version]) -> Optional[str]:
    return None if version is None else version.name


def _digests(cases: Sequence[Case]) -> dict[str, str]:
    """By image; those that are not here have none."""
    digests = {}
    for case in cases:
        with suppress(VolumeError):  # gone meanwhile
            if case.path is not None:
                digests[case.image] = digest_of(case.image, case.path)
    return digests


def _shuffled(image: str) -> bytes:
    return hashlib.blake2b(image.encode(), digest_size=8).digest()


def _close(worker: Background, news: threading.Event) -> None:
    news.set()
    worker.close()


def _call(scorer: weakref.ref[Scorer], name: str, argument: object) -> None:
    """A job that must not keep its scorer alive."""
    alive = scorer()
    if alive is not None:
        getattr(alive, name)(argument)


def _look(scorer: weakref.ref[Scorer], news: threading.Event, wait_s: float) -> None:
    """Waits for news or for the time, then has a look."""
    if wait_s:
        news.wait(wait_s)
    alive = scorer()
    if alive is None:
        return
    try:
        alive.look()
    except FAILURES:  # such as a damaged version; whoever asks for it is told
        alive._replan([partial(_look, scorer, news, RETRY_S)])
        raise
