"""Scores of all images of a store, kept up to date in the background of a running server.

One background thread (:mod:`lib.background`) works through a list that is made anew whenever something changed, and is
looked over every few seconds: first what was handed out and what is likely next is encoded, then images without scores
are scored, unlabelled ones first. It gives way to clicks before every encoder block. Scores lie in ``scores/`` beside
the versions; a new live version or a changed file is noticed without a restart. A server on which nothing was trained
and nobody asked for the next image does nothing. Any thread may read; reading is one look
into a table. Neither the engine's embedding cache nor its opened images are touched by scoring, which would push out
what people work on. Log lines carry no names of images.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Optional

import numpy as np

from lib.active.calibration import Line, lines
from lib.active.selection import Known
from lib.active.sight import Sight
from lib.active.store import CaseScore, ScoreStore, digest_of
from lib.assisted import AssistedEngine, Live
from lib.background import Background
from lib.data.geometry import choose_axis
from lib.data.volume import load_volume
from lib.errors import AppError, VolumeError

logger = logging.getLogger(__name__)
LOOK_S = 5.0  # between two looks at the store and the live version
FORMULA = 1  # counts up when the same image and version would get other scores
RETRY_S = 30.0  # after a look that failed


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
        self._lock = threading.Lock()
        self._key, self._lines = "", dict[str, Line]()
        self._table: dict[str, CaseScore] = {}  # by digest, of the version of the key
        self._digests: dict[str, str] = {}  # by image
        self._tried: set[str] = set()
        self._now, self._former = Scores(), Scores()
        self._wanted: list[str] = []
        self._asked = False
        self._news = threading.Event()
        self._worker: Background = assisted.engine.worker()
        self._finalizer = weakref.finalize(self, _close, self._worker, self._news)

    def start(self) -> None:
        """Begins; once, in the server only."""
        self._replan([partial(_look, weakref.ref(self), self._news, 0.0)])

    def close(self) -> None:
        """Ends the thread."""
        self._finalizer()

    def scores(self, images: Sequence[str]) -> Scores:
        """The newest version's scores, or those of the version before while they cover more of these images."""
        now, former = self._now, self._former
        covered = [sum(image in one.known for image in images) for one in (now, former)]
        return former if covered[1] > covered[0] else now

    def prepare(self, images: Sequence[str]) -> None:
        """Encodes these images next, first first, so that they open at once."""
        self._wanted, self._asked = list(images), True
        self._news.set()  # ends a wait
        me = weakref.ref(self)
        self._replan([*(partial(_call, me, "_prepare", i) for i in images), partial(_look, me, self._news, 0.0)])

    def waiting(self) -> int:
        """Jobs that are left, the next look at the store not counted."""
        return max(0, self._worker.waiting() - 1)

    def look(self) -> None:
        """Takes up what changed and makes the list of jobs anew; runs in the background."""
        me = weakref.ref(self)
        jobs: list[Callable[[], object]] = [partial(_call, me, "_prepare", image) for image in self._wanted]
        if self._most and (self._asked or self.assisted.live_version() is not None):
            live = self.assisted.live()
            cases = self._cases()
            self._take_up(live, cases)
            jobs += [partial(_call, me, "_score", case) for case in self._unscored(cases)]
        self._news.clear()
        self._replan([*jobs, partial(_look, me, self._news, LOOK_S)])

    def _replan(self, jobs: Sequence[Callable[[], object]]) -> None:
        self._worker.replace(jobs)

    def _take_up(self, live: Optional[Live], cases: Sequence[Case]) -> None:
        """A new version, new images, changed files."""
        key = self._key_of(live)
        digests = {}
        for case in cases:
            with suppress(VolumeError):  # gone meanwhile
                if case.path is not None:
                    digests[case.image] = digest_of(case.image, case.path)
        if key != self._key:
            if self._key and self._now.known:
                self._former = self._now
            self._table, self._tried = {}, set()
            self._lines = {} if live is None else lines(live.version.metrics)
            self._store.keep_only({key, self._key})
            self._key = key
        unread = [d for d in digests.values() if d not in self._table]
        self._table |= self._store.read(key, unread)
        if digests != self._digests or unread or self._now.version != _name(live):
            self._digests = digests
            self._publish(live)

    def _key_of(self, live: Optional[Live]) -> str:
        """Of a folder of scores: everything that decides them but the image."""
        plain = self.assisted.engine.warm().weights_id
        parts = (plain, "" if live is None else live.version.sha256, FORMULA)
        return f"{_name(live) or 'plain'}-{hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()}"

    def _unscored(self, cases: Sequence[Case]) -> list[Case]:
        """What is to be scored, unlabelled images first, in an order that does not depend on names' order."""
        open_ = sorted((c for c in cases if not c.labelled), key=lambda c: _shuffled(c.image))[: self._most]
        labelled = [c for c in cases if c.labelled and c.path is not None]
        there = [c for c in open_ if c.path is not None]
        absent = [c for c in open_ if c.path is None] if self._asked else []
        return [c for c in (*there, *labelled, *absent) if not self._is_done(c)]

    def _is_done(self, case: Case) -> bool:
        digest = self._digests.get(case.image)
        if case.image in self._tried:
            return True
        score = self._table.get(digest or "")
        return score is not None and (score.failed or case.labelled or self._has_answer(score))

    def _has_answer(self, score: CaseScore) -> bool:
        return bool(score.raw) or self._key.startswith("plain-")

    def _score(self, case: Case) -> None:
        if self._resting():
            return
        live = self.assisted.live()
        if self._key_of(live) != self._key:  # the next look takes the new version up
            self._news.set()
            return
        self._tried.add(case.image)  # an error of memory or disk is not met again every few seconds
        path = case.path or self._fetched(case.image)
        if path is None:
            return
        digest = digest_of(case.image, path)
        score = self._looked_at(path, live, case.labelled)
        self._store.write(self._key, digest, score)
        with self._lock:
            self._table[digest], self._digests[case.image] = score, digest
        self._tried.discard(case.image)
        self._publish(live, case.image)

    def _fetched(self, image: str) -> Optional[Path]:
        if self._fetches_left <= 0:
            self._tried.discard(image)
            return None
        self._fetches_left -= 1
        return Path(self._fetch(image))

    def _looked_at(self, path: Path, live: Optional[Live], labelled: bool) -> CaseScore:
        try:
            volume = load_volume(path)
        except AppError as error:
            logger.info("an image cannot be scored: %s", error)
            return CaseScore()
        found = Sight(self.assisted, volume, live).evidence(with_answer=not labelled)
        raw = {} if live is None or found.raw is None else dict(zip(live.version.labels, found.raw.tolist()))
        points = tuple(round(v, 5) for v in found.embedding.tolist())
        return CaseScore(raw, found.disagreement, points, volume.content_hash)

    def _publish(self, live: Optional[Live], image: str = "") -> None:
        """Puts what is known where :meth:`scores` reads it; one image's, or everything anew."""
        with self._lock:
            changed = {image: self._digests[image]} if image else dict(self._digests)
            known = dict(self._now.known) if image else {}
            unreadable = set(self._now.unreadable) if image else set()
            for name, digest in changed.items():
                score = self._table.get(digest)
                if score is None:
                    continue
                if score.failed:
                    unreadable.add(name)
                else:
                    known[name] = self._known(score)
            self._now = Scores(_name(live), bool(self._lines), known, frozenset(unreadable))

    def _known(self, score: CaseScore) -> Known:
        dice = [self._lines.get(label, Line())(raw) for label, raw in score.raw.items()]
        return Known(float(np.mean(dice)) if dice else None, score.disagreement, np.array(score.embedding, np.float32))

    def _prepare(self, image: str) -> None:
        """What a radiologist's first requests need: the autonomous result, and features of the middle slices."""
        engine = self.assisted.engine
        if image in self._wanted:  # before and not after: what fails is not tried again and again
            self._wanted.remove(image)
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


def _name(live: Optional[Live]) -> Optional[str]:
    return None if live is None else live.version.name


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
    except (AppError, RuntimeError, OSError, ValueError):  # such as a damaged version; whoever asks for it is told
        alive._replan([partial(_look, scorer, news, RETRY_S)])
        raise
