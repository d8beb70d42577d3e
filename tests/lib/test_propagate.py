"""Walks over slices: both ways, to the middle between seeds, and where they stop."""

from __future__ import annotations

import pytest
import torch

from lib.propagate import SliceResult, StopRule, propagate


def result(radius: float = 8, quality: float = 0.9, objectness: float | None = None, shift: int = 0) -> SliceResult:
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    return SliceResult((radius - torch.hypot(y - 16, x - 16 - shift))[None, None], quality, objectness)


def visits(seeds: list[int], bounds: range) -> dict[int, int]:
    """Which slice each slice was reached from."""
    reached: dict[int, int] = {}

    def step(index: int, before: SliceResult) -> SliceResult:
        reached[index] = int(before.quality * 1000)
        return SliceResult(before.low_res, before.quality)

    propagate({s: result(quality=0.9 + s / 1000) for s in seeds}, bounds, step, StopRule())
    return {i: round(q - 900) for i, q in reached.items()}


def test_propagate_goes_both_ways() -> None:
    assert sorted(visits([5], range(10))) == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_propagate_seeds_meet_in_the_middle() -> None:
    assert visits([2, 7], range(10)) == {0: 2, 1: 2, 3: 2, 4: 2, 5: 7, 6: 7, 8: 7, 9: 7}


@pytest.mark.parametrize(("broken", "kept"), [(12, range(13, 20)), (18, range(11, 18))])
def test_propagate_other_seed_fills_what_a_stopped_walk_left(broken: int, kept: range) -> None:
    def step(index: int, before: SliceResult) -> SliceResult:
        return result(quality=0.0 if index == broken else 0.9)

    found = propagate({10: result(), 20: result()}, range(10, 21), step, StopRule())
    assert sorted(set(found) - {10, 20}) == sorted(set(range(11, 20)) - {broken})
    assert set(kept) <= set(found)


def test_propagate_stays_in_bounds() -> None:
    assert sorted(visits([5], range(4, 8))) == [4, 6, 7]


@pytest.mark.parametrize(
    ("after", "stops"),
    [
        (result(8), False),
        (result(8, quality=0.2), True),
        (result(8, objectness=-0.1), True),
        (result(8, objectness=2.0), False),
        (result(-1), True),  # empty
        (result(2), True),  # shrinks by more than a factor of three
        (result(16), True),  # grows by more than a factor of three
        (result(8, shift=14), True),  # jumps
        (result(7, shift=1), False),
    ],
)
def test_stop_rule(after: SliceResult, stops: bool) -> None:
    assert StopRule().breaks(result(8), result(8), after) is stops
    found = propagate({5: result(8)}, range(4, 7), lambda *_: after, StopRule())
    assert sorted(found) == ([5] if stops else [4, 5, 6])


def test_propagate_in_a_box_only_emptiness_stops() -> None:
    found = propagate({5: result(8)}, range(11), lambda *_: result(8, quality=0.1), StopRule(), keep_on=range(3, 8))
    assert sorted(found) == [3, 4, 5, 6, 7]


def test_propagate_empty_seed_stays_alone() -> None:
    assert sorted(propagate({5: result(-1)}, range(11), lambda *_: result(), StopRule())) == [5]
