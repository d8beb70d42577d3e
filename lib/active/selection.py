"""The order in which images are handed out, from what is known of each. Pure functions on numpy arrays, no torch.

An urgency is the larger the sooner an image should be labelled. ``mix`` adds ranks and not values, because the parts
have different units and spreads, and ranks need no weights that would be right for one data set only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np

PREDICTED, DISAGREEMENT, DIVERSITY, MIX = "predicted_dice", "disagreement", "diversity", "mix"
STRATEGIES = (MIX, PREDICTED, DISAGREEMENT, DIVERSITY)  # clients take the first where nobody chooses


@dataclass(frozen=True)
class Known:
    """What is known of one image.

    Args:
        predicted: Dice that the live version is expected to have, mean over labels; None without a version.
        disagreement: mean Dice distance between its answers to the image seen in different ways; None without one.
        embedding: ``(d,)`` of the image.
    """

    predicted: Optional[float]
    disagreement: Optional[float]
    embedding: np.ndarray


@dataclass(frozen=True)
class Ranking:
    """Urgencies of candidates.

    Args:
        urgency: ``(n,)``; NaN where nothing is known of an image.
        used: the strategy that they are of.
        why: a sentence where that is not the one that was asked for, else empty.
    """

    urgency: np.ndarray
    used: str
    why: str = ""


def rank(strategy: str, known: Sequence[Optional[Known]], chosen: Sequence[Known]) -> Ranking:
    """Urgencies of ``n`` candidates.

    Args:
        strategy: one of :data:`STRATEGIES`.
        known: of each candidate, None where it has no scores yet.
        chosen: images that are labelled or are being labelled.
    """
    found = np.full(len(known), np.nan)
    places = [n for n, one in enumerate(known) if one is not None]
    there = [one for one in known if one is not None]
    if not there:
        return Ranking(found, "random", "No image has scores yet.")
    used, why = strategy, ""
    if strategy != DIVERSITY and all(one.predicted is None for one in there):
        used, why = DIVERSITY, "No trained version is live yet."
    parts = []
    if used in (PREDICTED, MIX):
        parts.append(np.array([np.nan if one.predicted is None else -one.predicted for one in there]))
    if used in (DISAGREEMENT, MIX):
        parts.append(np.array([np.nan if one.disagreement is None else one.disagreement for one in there]))
    if used in (DIVERSITY, MIX):
        embeddings = np.stack([one.embedding for one in (*there, *chosen)])
        parts.append(novelty(embeddings, np.arange(len(there)), np.arange(len(there), len(embeddings))))
    found[places] = parts[0] if len(parts) == 1 else rank_sum(parts)
    return Ranking(found, used, why)


def rank_sum(parts: Sequence[np.ndarray]) -> np.ndarray:
    """``(n,)`` mean of the ranks in 0..1; equal values share their mean rank, NaN counts as the middle."""
    from scipy.stats import rankdata

    total = np.zeros(len(parts[0]))
    for part in parts:
        known = np.isfinite(part)
        ranks = np.full(len(part), 0.5)
        ranks[known] = (rankdata(part[known]) - 0.5) / max(1, int(known.sum()))
        total += ranks / len(parts)
    return total


def novelty(embeddings: np.ndarray, candidates: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """``(n,)`` distance of each candidate to the nearest chosen image: the next of a core-set by k-centre greedy.

    Where nothing is chosen, minus the distance to the middle of all: the first is a typical one.

    Args:
        embeddings: ``(m, d)`` of all images.
        candidates: ``(n,)`` rows.
        chosen: ``(c,)`` rows.
    """
    points = standardised(embeddings)
    if not len(chosen):
        return -np.sqrt((points[candidates] ** 2).sum(1))
    near, far = points[candidates], points[chosen]
    squares = (near**2).sum(1)[:, None] + (far**2).sum(1) - 2 * near @ far.T
    return np.sqrt(np.maximum(squares.min(1), 0.0))


def standardised(embeddings: np.ndarray) -> np.ndarray:
    """``(m, d)`` float32 with mean 0 and deviation 1 in every dimension that varies, scaled by ``sqrt(1 / d)``."""
    points = np.asarray(embeddings, np.float32)
    spread = points.std(0)
    points = (points - points.mean(0)) / np.where(spread > 1e-6 * (1 + np.abs(points).max(0)), spread, np.inf)
    return points / np.sqrt(max(1, points.shape[1]))
