"""How the next image to label is chosen: MONAI Label's strategies over the background scores and the leases.

``next_sample`` only reads: scores come from :class:`lib.active.scorer.Scorer`. Every reply says under ``selection``
which score was used and, where that is not what was asked for, why. An image that another client is labelling is not
handed out (:class:`lib.active.leases.Leases`), by upstream's ``random`` and ``first`` neither. Thread-safe. Left out:
strategies for labels that images lack, upstream's ``label_tag`` and ``labels``, which its own stores pay no heed to.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random

from infers.base import asked_in_background
from infers.batch import MARK
from infers.stored import hand_outs, time_of
from lib.active.leases import NOBODY, HandOut, Leases
from lib.active.scorer import Case, Scorer
from lib.active.selection import DISAGREEMENT, DIVERSITY, MIX, PREDICTED, STRATEGIES, Ranking, rank
from lib.assisted import AssistedEngine
from lib.settings import AppSettings

TEXTS = {
    MIX: "sum of the ranks of predicted_dice, disagreement and diversity",
    PREDICTED: "lowest Dice that the live version is expected to have",
    DISAGREEMENT: "answers of the live version that differ most when prompts and image are moved a little",
    DIVERSITY: "the image least like those that are labelled",
}
UPSTREAM_NOBODY = "admin"  # what MONAI Label writes for a client without a name, where it has no users


class Desk:
    """What the strategies of a server share.

    Args:
        assisted: engine of the method whose doubts count; None leaves upstream's strategies alone.
        settings: of the app.
        datastore: gives the app's store; it is asked when it is needed.
        training: whether a training runs, beside which nothing is scored.
    """

    def __init__(
        self, assisted: Optional[AssistedEngine], settings: AppSettings, datastore: Callable[[], Datastore],
        training: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.leases = Leases(settings.lease_minutes)
        self.scorer = assisted and Scorer(
            assisted,
            partial(_cases, datastore),
            partial(_fetched, datastore),
            most=settings.score_images,
            fetches=settings.score_fetches,
            resting=training,
        )
        self._datastore, self._lock, self._restored = datastore, threading.Lock(), False

    def start(self) -> None:
        """Begins to score; in the server only, which alone answers clients."""
        if self.scorer is not None:
            self.scorer.start()

    def prepare(self, images: Sequence[str]) -> None:
        """Encodes images in the background, first first."""
        if self.scorer is not None:
            self.scorer.prepare(images)

    def opened(self, request: Mapping[str, Any]) -> None:
        """A client asks about an image, which it may have opened by hand: nobody else is to be handed it.

        A batch opens nothing, and an upload or a session is no image of the store.
        """
        image = str(request["image"])
        if request.get(MARK) is not True and not os.path.isabs(image):
            self.leases.opened(image, str(request.get("client_id") or NOBODY))

    def strategies(self) -> dict[str, Strategy]:
        """By the names that clients show, the default first."""
        scorer = self.scorer
        own = {} if scorer is None else {name: ActiveStrategy(name, self, scorer) for name in STRATEGIES}
        return {**own, "random": LeasedStrategy(Random(), self), "first": LeasedStrategy(First(), self)}

    def hand_out(
        self, request: Mapping[str, Any], datastore: Datastore, choose: Callable[[list[str]], Optional[dict[str, Any]]],
        *, again: bool,
    ) -> Optional[dict[str, Any]]:  # fmt: skip
        """Leases what ``choose`` picks out of the images that this client may get; None where nothing is unlabelled.

        Args:
            request: of the client.
            datastore: of images.
            choose: gives the reply, with the ``id``, for a list that is not empty.
            again: whether images that the client had lately are offered before it has had all. Without a name nobody
                has had any, for another one without a name may be labelling them.

        Raises:
            MONAILabelException: where others are labelling all that is left.
        """
        client = str(request.get("client_id") or NOBODY)
        with self._lock:
            self._restore(datastore)
            images = list(datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels")))
            free, seen = self.leases.order(images, client)
            pool = [*free, *seen] if again and client != NOBODY else free or seen[:1]
            if images and not pool:
                raise MONAILabelException(MONAILabelError.INVALID_INPUT, self._all_taken(images))
            reply = choose(pool) if pool else None
            if reply:
                self.leases.take(reply["id"], client)
        return reply

    def _all_taken(self, images: Sequence[str]) -> str:
        minutes = math.ceil(self.leases.until_free_s(images) / 60)
        return (
            f"Others are labelling all {len(images)} images that have no final label. The first of them is free in "
            f"{minutes} minutes, unless it is labelled by then. Ask again, or open an image by hand."
        )

    def _restore(self, datastore: Datastore) -> None:
        """Hand-outs of an earlier server process, which MONAI Label wrote into its store."""
        if not self._restored:
            self.leases.restore(handed_out(datastore))
            self._restored = True


class ActiveStrategy(Strategy):
    """One of ours.

    Args:
        name: one of :data:`lib.active.selection.STRATEGIES`.
        desk: shared.
        scorer: its scores.
    """

    def __init__(self, name: str, desk: Desk, scorer: Scorer) -> None:
        super().__init__(TEXTS[name])
        self._name, self._desk, self._scorer = name, desk, scorer

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> Optional[dict[str, Any]]:
        """The next image and why; it and the likely one after it are encoded in the background."""
        likely: list[str] = []

        def choose(pool: list[str]) -> dict[str, Any]:
            reply, order = self._chosen(pool, datastore)
            likely.extend(order[:2])
            return reply

        reply = self._desk.hand_out(request, datastore, choose, again=False)
        if reply:
            self._desk.prepare(likely)
        return reply

    def _chosen(self, pool: list[str], datastore: Datastore) -> tuple[dict[str, Any], list[str]]:
        """The reply, and the most urgent images, the chosen one first."""
        scores = self._scorer.scores(pool)
        there = set(pool)
        chosen = [known for image, known in scores.known.items() if image not in there]  # labelled, or with others
        ranking = rank(self._name, [scores.known.get(image) for image in pool], chosen)
        order = _ordered(pool, ranking, scores.unreadable)
        first = order[0]
        known, urgency = scores.known.get(first), ranking.urgency[pool.index(first)]
        facts = {
            "asked": self._name, "used": ranking.used if known else "random", "why": _why(ranking, known is not None),
            "predicted_dice": known.predicted if known else None, "calibrated": scores.calibrated,
            "disagreement": known.disagreement if known else None,
            "urgency": float(urgency) if math.isfinite(urgency) else None, "version": scores.version,
            "scored": sum(image in scores.known for image in pool), "candidates": len(pool),
        }  # fmt: skip
        return {"id": first, "selection": facts}, order[:2]


class LeasedStrategy(Strategy):
    """One of upstream's, which sees only images that nobody else is labelling."""

    def __init__(self, inner: Strategy, desk: Desk) -> None:
        super().__init__(inner.description)
        self._inner, self._desk = inner, desk

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> Optional[dict[str, Any]]:
        """Upstream's reply."""
        reply = self._desk.hand_out(
            request, datastore, lambda pool: self._inner(request, _Unleased(datastore, pool)), again=True
        )
        if reply:
            self._desk.prepare([reply["id"]])
        return reply


class _Unleased:
    """A datastore that offers some of its images."""

    def __init__(self, datastore: Datastore, images: list[str]) -> None:
        self._datastore, self._images = datastore, images

    def get_unlabeled_images(self, *_: Any) -> list[str]:
        return list(self._images)

    def get_image_info(self, image: str) -> dict[str, Any]:
        """With hand-outs a second ago or more: upstream's ``random`` weighs by the seconds since, and fails at none."""
        info, latest = self._datastore.get_image_info(image), int(time.time()) - 1
        found = info.get("strategy")
        entries = found.items() if isinstance(found, Mapping) else ()
        past = {name: {"ts": min(time_of(one), latest)} for name, one in entries if isinstance(one, Mapping)}
        return {**info, "strategy": past}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._datastore, name)


def stored(datastore: Datastore) -> Iterator[Case]:
    """The images of a store; those of a PACS that are not here have no path."""
    labelled = set(datastore.get_labeled_images())
    for image in list(datastore.list_images()):
        path = _path_here(datastore, image)
        yield Case(image, Path(path) if path else None, image in labelled)


def _cases(datastore: Callable[[], Datastore]) -> list[Case]:
    with asked_in_background():
        return list(stored(datastore()))


def _fetched(datastore: Callable[[], Datastore], image: str) -> str:
    with asked_in_background():
        return datastore().get_image_uri(image)


def handed_out(datastore: Datastore) -> Iterator[tuple[str, HandOut]]:
    """What MONAI Label wrote down of every image's last hand-outs."""
    for image in list(datastore.list_images()):
        info = LocalDatastore.get_image_info(datastore, image) if isinstance(datastore, LocalDatastore) else {}
        for one in hand_outs(info):
            client = str(one.get("client_id") or NOBODY)
            yield image, HandOut(NOBODY if client == UPSTREAM_NOBODY else client, float(one["ts"]))


def _path_here(datastore: Datastore, image: str) -> str:
    """Without asking a PACS for anything: upstream's local store, which ours of a PACS is too, knows what is here."""
    if isinstance(datastore, LocalDatastore):
        return LocalDatastore.get_image_uri(datastore, image)
    return datastore.get_image_uri(image)


def _ordered(pool: Sequence[str], ranking: Ranking, unreadable: frozenset[str]) -> list[str]:
    """Most urgent first, then those without scores in an order that looks random, unreadable ones last."""
    urgency = np.where(np.isfinite(ranking.urgency), ranking.urgency, -np.inf)

    def place(n: int) -> tuple[bool, float, bytes]:
        return pool[n] in unreadable, -float(urgency[n]), hashlib.blake2b(pool[n].encode(), digest_size=8).digest()

    return [pool[n] for n in sorted(range(len(pool)), key=place)]


def _why(ranking: Ranking, known: bool) -> str:
    return ranking.why if known or ranking.why else "No image that could be handed out has scores yet."
