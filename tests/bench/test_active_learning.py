"""What the bench of active learning computes itself, on small volumes; what it measures belongs to no test."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from bench import common
from bench.active_learning import (
    ADDED,
    FIRST,
    RANDOM,
    Encoded,
    Plan,
    chosen_next,
    doubts,
    labels_needed,
    run,
    score,
    spearman,
    train,
)
from lib.active.selection import DIVERSITY, MIX, PREDICTED, STRATEGIES, Known


def volume(seed: int, noise: float = 0.3) -> Encoded:
    """Two slices whose first feature shows where the only class is."""
    rng = torch.Generator().manual_seed(seed)
    target = torch.zeros(2, 32, 32, dtype=torch.long)
    target[:, 4 + seed % 9 : 20, 6:22] = 1
    features = noise * torch.randn(2, 3, 32, 32, generator=rng)
    features[:, 0] += target.float()
    return Encoded(features.half(), target, features.mean((0, 2, 3)).numpy())


@pytest.mark.parametrize(
    ("curve", "goal", "labels"),
    [
        ([0.1, 0.2, 0.3], 0.2, FIRST + ADDED),
        ([0.1, 0.2, 0.4], 0.3, FIRST + 1.5 * ADDED),
        ([0.5, 0.2], 0.4, FIRST),
        ([0.1, 0.5, 0.2], 0.3, FIRST + 0.5 * ADDED),  # the first time counts
    ],
)
def test_labels_needed(curve: list[float], goal: float, labels: float) -> None:
    assert labels_needed(curve, goal) == pytest.approx(labels)


def test_a_goal_that_is_never_reached_is_no_number() -> None:
    assert math.isnan(labels_needed([0.1, 0.2], 0.3))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([1, 2, 3], [10, 20, 90], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 1, 2], [5, 5, 9], 1.0)],
)
def test_spearman(first: list[float], second: list[float], expected: float) -> None:
    assert spearman(np.array(first), np.array(second)) == pytest.approx(expected)


def test_spearman_of_a_constant_is_no_number() -> None:
    assert math.isnan(spearman(np.ones(3), np.arange(3.0)))


def test_each_strategy_chooses_among_what_is_left() -> None:
    known = {n: Known(0.9 - n / 10, n / 10, np.array([float(n), 0.0])) for n in range(5)}
    rng = np.random.default_rng(0)
    assert chosen_next(PREDICTED, known, [4], rng) == 3
    assert chosen_next(DIVERSITY, known, [4], rng) == 0
    assert chosen_next(MIX, known, [0], rng) == 4
    assert {chosen_next(RANDOM, known, [0, 1], rng) for _ in range(40)} == {2, 3, 4}


def test_the_head_learns_and_doubts_what_is_noisy() -> None:
    model = train([volume(n) for n in range(4)], 1, 60, seed=1)
    assert score(model, [volume(7)], 1).mean() > 0.8
    clear, noisy = (doubts(model, volume(7, noise), 1, seed=1) for noise in (0.1, 2.0))
    assert clear.predicted > noisy.predicted and clear.disagreement < noisy.disagreement


@pytest.mark.parametrize("strategy", [RANDOM, *STRATEGIES])
def test_a_run_is_repeatable_and_begins_alike_for_all(strategy: str) -> None:
    pool, test = [volume(n) for n in range(12)], [volume(20), volume(21)]
    plan = Plan(1, 4, 2)
    curve = run(strategy, pool, test, 1, 3, plan)
    assert len(curve) == 2 and curve == run(strategy, pool, test, 1, 3, plan)
    assert curve[0] == run(RANDOM, pool, test, 1, 3, plan)[0]


def test_the_bench_explains_itself() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "bench.active_learning", "--help"],
        cwd=common.ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--predicted-dice" in told.stdout and "python -m bench.active_learning" in told.stdout
