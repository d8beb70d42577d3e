"""Who is labelling which image: what was handed out lately, so that nobody else gets it too.

A client's lease is on the image that it was handed or opened last; asking for another one releases the former. Clients
that give no name cannot be told apart, so each of their images stays leased. A lease ends after some time, and with a
final label, which takes the image out of the candidates. Thread-safe. Not stored here: MONAI Label writes time and
client of every hand-out into the datastore, from where :meth:`Leases.restore` takes them after a restart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

NOBODY = ""  # a client without a name


class HandOut(NamedTuple):
    """One image given to one client.

    Args:
        client: its name, or :data:`NOBODY`.
        time_s: of the hand-out, seconds since 1970.
    """

    client: str
    time_s: float


class Leases:
    """Hand-outs of the last minutes.

    Args:
        minutes: how long a lease lasts; 0 for no leases.
        clock: gives seconds since 1970.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.time) -> None:
        self._period_s, self._clock = minutes * 60, clock
        self._last: dict[str, HandOut] = {}
        self._lock = threading.Lock()

    def restore(self, found: Iterable[tuple[str, HandOut]]) -> None:
        """Takes up hand-outs of an earlier server process, in any order; those known here win if they are later."""
        with self._lock:
            for image, one in found:
                if image not in self._last or self._last[image].time_s < one.time_s:
                    self._last[image] = one

    def take(self, image: str, client: str) -> None:
        """Leases an image to a client and releases the one it had."""
        with self._lock:
            self._last[image] = HandOut(client, self._clock())

    def opened(self, image: str, client: str) -> None:
        """Leases an image that a client works on, however it came to it; not one that somebody else is labelling.

        A client without a name takes none: whoever asked for all images in a row would keep them from everybody.
        """
        with self._lock:
            lately = self._lately()
            other = lately.get(image)
            released = other is not None and other.client != NOBODY and other.time_s < _newest(lately)[other.client]
            if client and (other is None or released or other.client == client):
                self._last[image] = HandOut(client, self._clock())

    def order(self, images: Sequence[str], client: str) -> tuple[list[str], list[str]]:
        """``(free, seen)``: images the client may get, and after those the ones it had lately, longest ago first.

        What others are labelling is in neither.
        """
        with self._lock:
            lately = self._lately()
        newest = _newest(lately)
        free, seen = [], []
        for image in images:
            one = lately.get(image)
            if one is None or (one.client not in (client, NOBODY) and one.time_s < newest[one.client]):
                free.append(image)
            elif one.client == client:
                seen.append(image)
        return free, sorted(seen, key=lambda image: lately[image].time_s)

    def until_free_s(self, images: Sequence[str]) -> float:
        """Seconds until the first of these leases ends; 0 where one is free."""
        with self._lock:
            lately = self._lately()
        now = self._clock()
        return min((lately[i].time_s + self._period_s - now if i in lately else 0.0 for i in images), default=0.0)

    def _lately(self) -> dict[str, HandOut]:
        """Forgets what is over; the lock is held."""
        since = self._clock() - self._period_s
        self._last = {image: one for image, one in self._last.items() if one.time_s > since}
        return self._last


def _newest(lately: Mapping[str, HandOut]) -> dict[str, float]:
    """When each client took its last image."""
    return {one.client: one.time_s for one in sorted(lately.values(), key=lambda one: one.time_s)}
