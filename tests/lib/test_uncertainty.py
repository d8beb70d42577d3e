"""Numbers per slice and the map, against answers whose uncertainty is known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lib.config import backbone_row
from lib.contracts import BackboneSpec
from lib.transform import SliceTransform
from lib.uncertainty import LEVELS, Uncertainty, doubts, entropy_map, levels_of

SURE, UNSURE = 12.0, 0.01


def answer(*slices: tuple[float, float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """One class: logit inside a square, logit around it, objectness logit of every slice."""
    masks, obj = torch.zeros(len(slices), 1, 16, 16), torch.zeros(len(slices), 1)
    for n, (inside, outside, presence) in enumerate(slices):
        masks[n] = outside
        masks[n, :, 4:12, 4:12] = inside
        obj[n] = presence
    return masks, obj


# inside, outside, objectness; expected doubt, tolerance
DOUBTS = [
    ((SURE, -SURE, SURE), 0.0, 0.001),
    ((SURE, -SURE, 0.0), 1 / 3, 0.01),  # there with a probability of one half: 2 * 0.5 / 1.5
    ((UNSURE, -SURE, SURE), 1 / 3, 0.01),
    ((SURE, -UNSURE, SURE), 1 - 128 / (64 + 64 + 192 * 0.5), 0.01),  # as sure of the square as unsure of the rest
    ((SURE, -SURE, -SURE), 0.0, 0.001),  # surely absent
    ((SURE, -SURE, -0.01), 0.5, 0.01),  # absent, but hardly
    ((-SURE, -SURE, 3.0), 0.95, 0.01),  # said to be there, and nothing is shown
]


@pytest.mark.parametrize("one, wanted, tolerance", DOUBTS)
def test_doubt_of_a_slice(one, wanted: float, tolerance: float) -> None:
    assert doubts(*answer(one)).item() == pytest.approx(wanted, abs=tolerance)


def test_doubts_do_not_depend_on_the_group_of_slices() -> None:
    torch.manual_seed(0)
    masks, obj = 3 * torch.randn(37, 2, 8, 8), torch.randn(37, 2)
    whole = doubts(masks.half(), obj)
    assert torch.equal(whole[20:21], doubts(masks[20:21].half(), obj[20:21]))
    assert whole.shape == (37, 2) and bool(((whole >= 0) & (whole <= 1)).all())


def test_what_another_label_took_is_not_shown() -> None:
    masks, obj = answer((SURE, -SURE, SURE))
    both = torch.cat([masks, masks - 4], 1)  # the second is nowhere the best
    found = doubts(both, torch.cat([obj, obj], 1))[0]
    assert found[0] < 0.01 and found[1] > 0.99


def test_slices_above_the_threshold_are_listed() -> None:
    found = Uncertainty.of(*answer((SURE, -SURE, SURE), (SURE, -SURE, 0.0), (SURE, -SURE, -0.01)), ("a",), 0.3)
    assert found.review == {"a": (1, 2)} and set(found.by_slice["a"]) == {0, 1, 2}
    assert Uncertainty.of(*answer((SURE, -SURE, SURE)), ("a",), 0.3).review == {}


def spec() -> BackboneSpec:
    row = backbone_row("tiny")
    return BackboneSpec(name=row.name, **row.spec)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_map_lies_on_the_image_and_is_the_entropy(axis: int) -> None:
    size = spec().mask_size
    shape = [40, 30, 20]
    masks = torch.full((shape[axis], 1, size, size), -SURE)
    masks[2] = math.log(1 / 3)  # a quarter
    obj = torch.full((shape[axis], 1), 30.0)
    plane = [n for a, n in enumerate(shape) if a != axis]
    transform = SliceTransform(spec(), (plane[1], plane[0]))
    found = entropy_map(masks, obj, transform, tuple(shape), axis)
    assert found.dtype == np.uint8 and found.shape == tuple(shape)
    slices = np.moveaxis(found, axis, 0)
    bits = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert (slices[2] == round(100 * bits)).all() and not np.delete(slices, 2, 0).any()


def test_map_shows_the_most_uncertain_label() -> None:
    size = spec().mask_size
    masks = torch.full((1, 2, size, size), -SURE)
    masks[0, 1] = 0.0
    found = entropy_map(masks, torch.full((1, 2), 30.0), SliceTransform(spec(), (8, 8)), (8, 8, 1), 2)
    assert (found == 100).all()


def test_levels_are_named_steps() -> None:
    percent = np.array([[[0, 24, 25, 49, 50, 74, 75, 99, 100]]], np.uint8)
    assert levels_of(percent).ravel().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert LEVELS == {"uncertain 25 to 50 %": 1, "uncertain 50 to 75 %": 2, "uncertain 75 to 100 %": 3}
