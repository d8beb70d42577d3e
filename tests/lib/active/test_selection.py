"""Orders of images worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lib.active.selection import DISAGREEMENT, DIVERSITY, MIX, PREDICTED, STRATEGIES, Known, rank, rank_sum


def known(predicted: float | None, disagreement: float | None, *embedding: float) -> Known:
    return Known(predicted, disagreement, np.array(embedding, np.float32))


CANDIDATES = [known(0.9, 0.3, 0.0, 0.0), known(0.2, 0.1, 1.0, 0.0), known(0.5, 0.2, 5.0, 5.0)]
CHOSEN = [known(None, None, 0.0, 0.1)]


@pytest.mark.parametrize(
    ("strategy", "order"), [(PREDICTED, [1, 2, 0]), (DISAGREEMENT, [0, 2, 1]), (DIVERSITY, [2, 1, 0]), (MIX, [2, 1, 0])]
)
def test_order_of_each_strategy(strategy: str, order: list[int]) -> None:
    ranking = rank(strategy, CANDIDATES, CHOSEN)
    assert np.argsort(-ranking.urgency, kind="stable").tolist() == order
    assert (ranking.used, ranking.why) == (strategy, "")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_a_version_diversity_takes_over_and_says_so(strategy: str) -> None:
    plain = [known(None, None, *one.embedding) for one in CANDIDATES]
    ranking = rank(strategy, plain, CHOSEN)
    assert ranking.used == DIVERSITY and int(ranking.urgency.argmax()) == 2
    assert ("No trained version" in ranking.why) == (strategy != DIVERSITY)


def test_candidates_without_scores_are_not_ranked() -> None:
    ranking = rank(PREDICTED, [None, CANDIDATES[1], None], CHOSEN)
    assert np.isfinite(ranking.urgency).tolist() == [False, True, False]
    nothing = rank(MIX, [None, None], [])
    assert nothing.used == "random" and "No image has scores" in nothing.why and np.isnan(nothing.urgency).all()


def test_diversity_begins_with_a_typical_image() -> None:
    ranking = rank(DIVERSITY, [known(None, None, x) for x in (0.0, 4.0, 5.0, 6.0, 20.0)], [])
    assert int(ranking.urgency.argmax()) == 3  # the mean is 7


def test_an_image_like_a_chosen_one_is_least_urgent_however_many_are_chosen() -> None:
    rng = np.random.default_rng(0)
    chosen = [known(None, None, *rng.normal(0, 1, 3)) for _ in range(30)]
    ranking = rank(DIVERSITY, [known(None, None, 9, 9, 9), known(None, None, *chosen[7].embedding)], chosen)
    assert ranking.urgency[1] == pytest.approx(0, abs=1e-3) and ranking.urgency[0] > 1


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([[1.0, 2.0, 3.0]], [1 / 6, 3 / 6, 5 / 6]),
        ([[1.0, 1.0]], [0.5, 0.5]),
        ([[0.0, 1.0], [5.0, -5.0]], [0.5, 0.5]),
        ([[1.0, np.nan, 2.0]], [0.25, 0.5, 0.75]),
        ([[np.nan, np.nan]], [0.5, 0.5]),
    ],
)
def test_rank_sum(parts: list[list[float]], expected: list[float]) -> None:
    np.testing.assert_allclose(rank_sum([np.array(p) for p in parts]), expected)


def test_rank_sum_does_not_see_units() -> None:
    a, b = np.array([1.0, 5.0, 2.0]), np.array([0.3, 0.1, 0.2])
    np.testing.assert_allclose(rank_sum([a, b]), rank_sum([1000 * a - 7, b / 50]))


def test_a_dimension_that_never_varies_does_no_harm() -> None:
    ranking = rank(DIVERSITY, [known(None, None, 7.0, x) for x in (0.0, 1.0)], [known(None, None, 7.0, 0.0)])
    assert np.isfinite(ranking.urgency).all() and int(ranking.urgency.argmax()) == 1
