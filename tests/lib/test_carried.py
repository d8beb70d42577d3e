"""What several walks make of a slice. The walks themselves are tested with the engine, in ``test_assisted``."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch

from lib.automatic import Automatic
from lib.carried import Step, combined
from lib.learned import Answer

GRID = 8


def automatic(logit: float = -4.0, obj: float = -5.0) -> Automatic:
    masks = torch.full((6, 1, GRID, GRID), logit)
    return Automatic(np.zeros((8, 8, 6), np.uint8), masks.half(), torch.ones(6, 1), torch.full((6, 1), obj))


def step(seed: int, columns: slice, value: float, obj: float = -1.0) -> Step:
    """A walk that speaks of some columns of slice 2."""
    near = torch.zeros(1, GRID, GRID, dtype=torch.bool)
    near[:, :, columns] = True
    masks = torch.where(near, value, torch.tensor(-4.0))
    return Step((2, 0), seed, near, Answer(masks, torch.tensor([0.5]), torch.tensor([obj])))


def test_combined_cell_is_as_the_nearer_correction_says_in_any_order() -> None:
    steps = step(5, slice(0, 6), 7.0), step(1, slice(4, 8), 3.0), step(0, slice(7, 8), 9.0)
    for order in permutations(steps):
        found = combined(automatic(), order)[2, 0]
        assert found.masks[0, 0].tolist() == [7.0] * 4 + [3.0] * 4


def test_combined_leaves_what_no_walk_speaks_of() -> None:
    found = combined(automatic(obj=5.0), [step(1, slice(0, 2), 3.0)])[2, 0]
    assert found.masks[0, 0].tolist() == [3.0] * 2 + [-4.0] * 6


def test_combined_says_that_a_label_is_there_where_anything_is_shown() -> None:
    shown, empty = (combined(automatic(), [step(1, slice(0, 2), value)])[2, 0] for value in (3.0, -3.0))
    assert float(shown.obj) == 0.0 and float(empty.obj) == -1.0
    assert combined(automatic(), []) == {}
