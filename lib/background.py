"""Work for later that never stands in the way of a click.

Concurrency: clicks run on their callers' threads inside ``Gate.foreground()``; one daemon thread does the background
work and calls ``Gate.pause()`` between pieces (the engine calls it before every encoder block, so a click waits for a
block, not for a slice). A click that needs what the background is just making waits inside ``Gate.waiting()``, which
lets the background go on. The gate's condition is the only lock here and nothing is called while it is held.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lib.errors import AppError

logger = logging.getLogger(__name__)
FAILURES = (AppError, RuntimeError, OSError, ValueError, MemoryError)  # of a job; the thread goes on with the next
CLOSE_LIMIT_S = 20.0  # a thread ends at its next encoder block; this only keeps a stuck one from blocking the exit


class ClosedError(Exception):
    """Ends background work in mid-slice when its owner goes."""


def attempt(job: Callable[[], object]) -> None:
    """Runs what may fail: a failed guess at future work costs nothing, the click on that slice will tell."""
    try:
        job()
    except FAILURES as error:
        logger.warning("background work failed: %s", type(error).__name__)


class Gate:
    """Counts running clicks and holds background threads back while there are any."""

    def __init__(self) -> None:
        self._clicks = 0
        self._wanted = 0
        self._quiet = threading.Condition()
        self._closed = False
        self._local = threading.local()

    @contextmanager
    def foreground(self) -> Iterator[None]:
        """Everything inside is a click: the background waits. Inside :meth:`background` it is none."""
        click = int(not self.is_background())
        self._count(clicks=+click)
        try:
            yield
        finally:
            self._count(clicks=-click)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside a click: it waits for the background, which may therefore go on, whoever else is clicking."""
        self._count(wanted=+1)
        try:
            yield
        finally:
            self._count(wanted=-1)

    @contextmanager
    def background(self) -> Iterator[None]:
        """Marks this thread as one that :meth:`pause` may hold."""
        self._local.background = True
        try:
            yield
        finally:
            self._local.background = False

    def is_background(self) -> bool:
        """Whether this thread runs inside :meth:`background`."""
        return getattr(self._local, "background", False)

    def pause(self) -> None:
        """Returns at once in a click; in the background, when no click is running or one waits for the background.

        Raises:
            ClosedError: in the background, after :meth:`close`.
        """
        if self.is_background():
            with self._quiet:
                self._quiet.wait_for(lambda: self._clicks <= 0 or self._wanted > 0 or self._closed)
                if self._closed:
                    raise ClosedError

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """Ends every background thread at its next pause."""
        with self._quiet:
            self._closed = True
            self._quiet.notify_all()

    def _count(self, clicks: int = 0, wanted: int = 0) -> None:
        with self._quiet:
            self._clicks += clicks
            self._wanted += wanted
            self._quiet.notify_all()


class Background:
    """One thread that works through the newest list of jobs; a new list replaces what is left of the old one."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._jobs: list[Callable[[], object]] = []
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy = False

    def replace(self, jobs: Sequence[Callable[[], object]]) -> None:
        """Forgets the waiting jobs and takes these, first first."""
        with self._news:
            self._jobs = list(jobs)
            alive = self._thread is not None and self._thread.is_alive()
            if jobs and not alive and not self._gate.is_closed:
                self._thread = threading.Thread(target=self._run, name="autosam-background", daemon=True)
                self._thread.start()
            self._news.notify_all()

    def idle(self, timeout_s: float) -> bool:
        """Waits until all jobs are done; False if they are not by then."""
        with self._news:
            return self._news.wait_for(lambda: not self._jobs and not self._busy, timeout_s)

    def waiting(self) -> int:
        """Jobs not yet done."""
        with self._news:
            return len(self._jobs) + int(self._busy)

    def close(self) -> None:
        """Ends the thread. Python aborts when it exits while a thread is inside torch, so owners must close."""
        self._gate.close()
        self.replace([_nothing])  # wakes a thread that waits for work
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_LIMIT_S)

    def _run(self) -> None:
        with self._gate.background():
            try:
                while True:
                    self._work()
            except ClosedError:
                logger.debug("background work ends with its engine")
            finally:
                self._rest()

    def _work(self) -> None:
        """One job. Nothing holds it afterwards: it may be the last to know its engine."""
        job = self._next()
        self._gate.pause()
        attempt(job)

    def _next(self) -> Callable[[], object]:
        self._rest()
        with self._news:
            self._news.wait_for(lambda: bool(self._jobs))
            self._busy = True
            return self._jobs.pop(0)

    def _rest(self) -> None:
        with self._news:
            self._busy = False
            self._news.notify_all()


def _nothing() -> None:
    """A job that only wakes the thread."""
