"""Autonomous and assisted answers of a live version with ``tiny``: purity, caching, edits, versions, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lib import assisted as module
from lib import claims
from lib.assisted import AssistedEngine
from lib.automatic import Automatic
from lib.data.geometry import slice_view
from lib.engine import Engine, SegmentOptions
from lib.errors import PromptError, WeightsError
from lib.evaluate import case_dice
from lib.learned import Answer, combine
from lib.types import Box, Click, LabelPrediction, Stroke, UserPrompts, Volume
from tests.cases import LABELS, ROW, add_version, draw, settings, store_at, write_case

ALONE = SegmentOptions(propagate=False)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., AssistedEngine]:
    def new(**changes: Any) -> AssistedEngine:
        engine = Engine(settings(tmp_path))
        return AssistedEngine(engine, replace(ROW, **changes), store_at(tmp_path), ("a", "b"))

    return new


@pytest.fixture
def plain(build) -> AssistedEngine:
    """Nothing is live."""
    return build()


@pytest.fixture
def live(build) -> AssistedEngine:
    found = build()
    add_version(found.store, found.engine)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_case(tmp_path, "asked", 3).image


@pytest.fixture
def volume(live: AssistedEngine, path: Path) -> Volume:
    return live.engine.open(path)


def click(*points: tuple[int, int, int], positive: bool = True) -> UserPrompts:
    return UserPrompts(tuple(Click(p, positive) for p in points))


def voxel_of(mask: np.ndarray, label: int, k: int) -> tuple[int, int, int]:
    """A voxel of a label on a slice, in the middle of those there are."""
    found = np.argwhere(mask[:, :, k] == label)
    assert len(found), f"label {label} is not on slice {k}"
    i, j = found[len(found) // 2].tolist()
    return i, j, k


def slice_of_label(mask: np.ndarray, label: int) -> int:
    return int((mask == label).sum((0, 1)).argmax())


def changed(a: np.ndarray, b: np.ndarray, axis: int = 2) -> set[int]:
    return {i for i in range(a.shape[axis]) if not np.array_equal(slice_view(a, axis, i), slice_view(b, axis, i))}


def edited_slices(found: LabelPrediction) -> set[int]:
    return {i for slices in found.edited.values() for i in slices}


# no version


def test_plain_sam_answers_label_by_label_with_a_warning(plain: AssistedEngine, path: Path) -> None:
    volume = plain.engine.open(path)
    found = plain.segment(volume, {"b": click((16, 18, 3))}, ALONE)
    alone = plain.engine.segment(volume, click((16, 18, 3)), ALONE)
    assert np.array_equal(found.mask, alone.mask * 2)
    assert (found.version, found.labels, found.presence) == (None, ("a", "b"), {})
    assert found.quality == {"b": alone.quality} and found.edited == {"b": (3,)}
    assert "No trained version of sam2rad is live yet: this is plain SAM." in found.warnings


def test_plain_sam_shows_what_was_said_of_several_labels(plain: AssistedEngine, path: Path) -> None:
    volume = plain.engine.open(path)
    asked = {"a": UserPrompts(boxes=(Box((2, 2, 3), (30, 30, 4)),)), "b": click((16, 18, 3))}
    parts = {name: plain.engine.segment(volume, one, ALONE).mask for name, one in asked.items()}
    found = plain.segment(volume, asked, ALONE)
    assert found.mask[16, 18, 3] == 2, "the label before it in the list covers the voxel"
    only = {n: (parts[name] > 0) & (parts[other] == 0) for n, name, other in ((1, "a", "b"), (2, "b", "a"))}
    assert (found.mask[only[1]] == 1).all() and (found.mask[only[2]] == 2).mean() > 0.5
    swapped = plain.segment(volume, dict(reversed(asked.items())), ALONE)
    assert np.array_equal(found.mask, swapped.mask)


def test_plain_sam_decodes_only_the_label_that_was_clicked(plain: AssistedEngine, path: Path, monkeypatch) -> None:
    volume = plain.engine.open(path)
    stroke = UserPrompts(strokes=(Stroke(np.array([(i, 18, 3) for i in range(4, 24)]), True),))
    first = plain.segment(volume, {"a": stroke, "b": click((16, 18, 3))}, ALONE)
    asked: list[UserPrompts] = []
    segment = plain.engine.segment
    monkeypatch.setattr(plain.engine, "segment", lambda v, p, o: (asked.append(p), segment(v, p, o))[1])
    more = click((16, 18, 3), (17, 18, 3))
    second = plain.segment(volume, {"a": stroke, "b": more}, ALONE)
    assert asked == [more] and second.cache["plain_hits"] == 1
    other = UserPrompts(strokes=(Stroke(np.array([(i, 19, 3) for i in range(4, 24)]), True),))
    plain.segment(volume, {"a": other, "b": more}, ALONE)
    assert asked[1:] == [other]
    assert first.mask[16, 18, 3] == 2 or first.mask[4, 18, 3] == 1


def test_plain_sam_is_asked_again_where_the_spacing_is_another(plain: AssistedEngine, path: Path) -> None:
    volume = plain.engine.open(path)
    turned = replace(volume, spacing_mm=tuple(reversed(volume.spacing_mm)))
    first, second = (plain.segment(one, {"a": click((16, 18, 3))}) for one in (volume, turned))
    assert (first.axis, second.axis) == (2, 0)


def test_plain_sam_keeps_the_same_mask_without_its_empty_part(plain: AssistedEngine, path: Path) -> None:
    volume = plain.engine.open(path)
    asked = {"a": UserPrompts(boxes=(Box((10, 12, 2), (20, 24, 4)),))}
    first, second = plain.segment(volume, asked, ALONE), plain.segment(volume, asked, ALONE)
    assert second.cache == {"plain_hits": 1} and first.mask.any()
    np.testing.assert_array_equal(first.mask, second.mask)
    (cut,) = plain._plain._kept._values.values()
    np.testing.assert_array_equal(cut.whole().mask > 0, first.mask > 0)
    assert cut.answer.mask.shape[2] < volume.shape[2]


@pytest.mark.parametrize(
    "prompts",
    [
        {},
        {"a": UserPrompts()},
        {"a": click((1, 1, 1), positive=False)},
        {"a": UserPrompts(strokes=(Stroke(np.ones((2, 3), int), False),))},
    ],
)
def test_plain_sam_needs_a_positive_prompt(plain: AssistedEngine, path: Path, prompts) -> None:
    with pytest.raises(PromptError, match=r"No trained version of sam2rad is live.*positive click or a box"):
        plain.segment(plain.engine.open(path), prompts)


def test_labels_are_those_of_whoever_answers(build) -> None:
    one = build()
    assert one.labels() == ("a", "b") and one.live() is None
    add_version(one.store, one.engine)
    assert one.labels() == LABELS


# autonomous


def test_autonomous_finds_what_was_learned(live: AssistedEngine, volume: Volume) -> None:
    found, truth = live.segment(volume, {}), draw(3)[1]
    assert max(case_dice(found.mask, truth, 2)) > 0.3
    assert (found.version, found.labels, found.edited, found.axis) == ("v0001", LABELS, {}, 2)
    assert found.mask.shape == volume.shape and found.mask.dtype == np.uint8
    assert set(found.presence) == set(LABELS) and all(len(p) == 6 for p in found.presence.values())
    assert all(0 <= q <= 1 for by_slice in found.quality.values() for q in by_slice.values())
    for number, label in enumerate(LABELS, start=1):
        assert set(found.quality[label]) == {k for k in range(6) if (found.mask[:, :, k] == number).any()}
        assert all(found.presence[label][k] >= 0.5 for k in found.quality[label])


@pytest.mark.parametrize("prompts", [{}, {"big": UserPrompts()}])
def test_autonomous_equals_a_request_without_prompts(live: AssistedEngine, volume: Volume, prompts) -> None:
    first = live.segment(volume, {})
    again = live.segment(volume, prompts)
    assert np.array_equal(first.mask, again.mask)
    assert (first.quality, first.presence) == (again.quality, again.presence)


def test_second_request_neither_encodes_nor_decodes(live: AssistedEngine, volume: Volume, monkeypatch) -> None:
    model: Any = live.live().model  # type: ignore[union-attr]
    calls: list[str] = []
    for owner, name in ((model.backbone, "encode"), (model, "decode"), (model, "propose")):
        monkeypatch.setattr(owner, name, _counted(getattr(owner, name), name, calls), raising=False)
    first = live.segment(volume, {})
    assert first.cache == {"misses": 6, "automatic_hits": 0}
    assert calls.count("encode") == 6 and calls.count("decode") == 1
    calls.clear()
    again = live.segment(volume, {})
    assert again.cache == {"automatic_hits": 1}
    assert calls == []
    clicked = live.segment(volume, {"big": click((16, 18, 3))}, ALONE)
    assert clicked.cache == {"automatic_hits": 1, "memory_hits": 1}
    assert calls.count("decode") == 1 and "encode" not in calls


def _counted(call: Callable, name: str, calls: list[str]) -> Callable:
    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return call(*args, **kwargs)

    return counting


def test_new_process_answers_the_same_from_disk(build, live: AssistedEngine, volume: Volume, path: Path) -> None:
    first = live.segment(volume, {"big": click((16, 18, 3))})
    other = build()
    again = other.segment(other.engine.open(path), {"big": click((16, 18, 3))})
    assert again.cache["disk_hits"] == 6 and "misses" not in again.cache
    assert np.array_equal(first.mask, again.mask) and first.quality == again.quality


def test_window_is_part_of_the_question(live: AssistedEngine, volume: Volume) -> None:
    first = live.segment(volume, {})
    other = live.segment(volume, {}, SegmentOptions(window=(0.0, 100.0)))
    assert other.cache == {"misses": 6, "automatic_hits": 0}
    assert other.window is not None and (other.window.lo, other.window.hi) == (0.0, 100.0)
    assert first.presence != other.presence
    assert np.array_equal(live.segment(volume, {}).mask, first.mask)


# assisted


@pytest.fixture
def asked(live: AssistedEngine, volume: Volume) -> dict[str, UserPrompts]:
    """A click that excludes part of the large structure where it is largest, and changes something.

    What a model of a few seconds makes of a click depends on the last digits of its training, which number of threads
    and processor change: hence several places.
    """
    mask = live.segment(volume, {}).mask
    k = slice_of_label(mask, 1)
    for i, j in np.argwhere(mask[:, :, k] == 1)[::4].tolist():
        found = {"big": click((i, j, k), positive=False)}
        if changed(live.segment(volume, found, ALONE).mask, mask):
            return found
    pytest.fail("no excluding click changes the automatic mask")


def test_click_changes_its_slice_and_no_slice_that_is_not_listed(live: AssistedEngine, volume: Volume, asked) -> None:
    automatic = live.segment(volume, {})
    k = asked["big"].clicks[0].ijk[2]
    found = live.segment(volume, asked)
    moved = changed(found.mask, automatic.mask)
    assert k in moved
    assert moved <= edited_slices(found)
    assert k in found.edited["big"]
    assert {i for i in range(6) if found.presence["big"][i] != automatic.presence["big"][i]} <= set(found.edited["big"])
    assert found.presence["small one"] == automatic.presence["small one"]


def test_click_without_propagation_stays_on_its_slice(live: AssistedEngine, volume: Volume, asked) -> None:
    automatic = live.segment(volume, {})
    k = asked["big"].clicks[0].ijk[2]
    found = live.segment(volume, asked, ALONE)
    assert changed(found.mask, automatic.mask) == {k}
    assert found.edited == {"big": (k,)}


@pytest.mark.parametrize("positive", [True, False])
def test_clicked_voxels_are_what_the_user_said(live: AssistedEngine, volume: Volume, positive: bool) -> None:
    mask = live.segment(volume, {}).mask
    places = np.argwhere((mask == 1) != positive)
    for i, j, k in places[np.linspace(0, len(places) - 1, 6).astype(int)].tolist():
        found = live.segment(volume, {"big": click((i, j, k), positive=positive)}, ALONE)
        assert (found.mask[i, j, k] == 1) == positive, (i, j, k)


def test_box_speaks_of_the_whole_label_and_a_click_of_its_place(
    live: AssistedEngine, volume: Volume, monkeypatch
) -> None:
    """The decoder finds two new parts; the click lies in one of them."""
    left, right = (slice(5, 11), slice(2, 6)), (slice(5, 11), slice(10, 14))
    drawn = torch.full((1, 16, 16), -4.0)
    for part in (left, right):
        drawn[0][part] = 4.0
    monkeypatch.setattr(module._Job, "ask", lambda *_, **__: Answer(drawn, torch.tensor([0.9]), torch.tensor([5.0])))
    nothing = torch.full((6, 2, 16, 16), -4.0).half()
    empty = Automatic(np.zeros(volume.shape, np.uint8), nothing, torch.full((6, 2), 0.9), torch.full((6, 2), -5.0))
    monkeypatch.setattr(module._Job, "_automatic", lambda _: empty)
    there = UserPrompts((Click((16, 8, 3)),))
    alone = live.segment(volume, {"big": there}, ALONE).mask[:, :, 3]
    boxed = live.segment(volume, {"big": replace(there, boxes=(Box((2, 2, 3), (30, 34, 4)),))}, ALONE).mask[:, :, 3]
    assert alone[:, :18].any() != alone[:, 18:].any()
    assert boxed[:, :18].any() and boxed[:, 18:].any()


def test_repeated_request_is_identical(live: AssistedEngine, volume: Volume, asked) -> None:
    first, again = live.segment(volume, asked), live.segment(volume, asked)
    assert np.array_equal(first.mask, again.mask)
    assert (first.quality, first.presence, first.edited) == (again.quality, again.presence, again.edited)


def test_removed_click_gives_the_answer_without_it(live: AssistedEngine, volume: Volume, asked) -> None:
    one = live.segment(volume, asked)
    more = live.segment(volume, {**asked, "small one": click((4, 4, 1))})
    back = live.segment(volume, asked)
    assert not np.array_equal(one.presence["small one"], more.presence["small one"])
    assert np.array_equal(one.mask, back.mask) and one.edited == back.edited
    assert np.array_equal(live.segment(volume, {}).mask, live.segment(volume, {}).mask)
    assert live.segment(volume, {}).edited == {}


def test_order_of_labels_does_not_matter(live: AssistedEngine, volume: Volume) -> None:
    parts = {"big": click((10, 12, 2)), "small one": click((16, 28, 4))}
    a, b = live.segment(volume, parts), live.segment(volume, dict(reversed(parts.items())))
    assert np.array_equal(a.mask, b.mask) and a.edited == b.edited


def test_click_on_another_labels_voxel_takes_it_from_that_label(live: AssistedEngine, volume: Volume) -> None:
    mask = live.segment(volume, {}).mask
    k = slice_of_label(mask, 1)
    stolen, own = voxel_of(mask, 1, k), {"big": click(voxel_of(mask, 1, k))}
    found = live.segment(volume, {"small one": click(stolen)}, ALONE)
    assert found.edited == {"big": (k,), "small one": (k,)}
    assert live.segment(volume, own, ALONE).edited == {"big": (k,)}
    excluded = live.segment(volume, {"big": click(stolen, positive=False)}, ALONE)
    assert found.presence["big"] == excluded.presence["big"]  # as if the user had excluded it there
    negative = live.segment(volume, {"small one": click(stolen, positive=False)}, ALONE)
    assert negative.edited == {}  # it is not there, so nothing changes


@pytest.mark.parametrize(
    ("prompts", "slices"),
    [
        (UserPrompts(boxes=(Box((5, 5, 2), (25, 25, 3)),)), (2,)),
        (UserPrompts(boxes=(Box((5, 5, 1), (25, 25, 4)),)), (1, 2, 3)),
        (UserPrompts(strokes=(Stroke(np.array([[5, 5, 2], [6, 5, 2], [6, 6, 4]])),)), (2, 4)),
        (UserPrompts((Click((9, 9, 3)), Click((3, 3, 3), False)), (Box((5, 5, 3), (25, 25, 4)),)), (3,)),
    ],
)
def test_boxes_and_strokes_edit_the_slices_they_touch(live: AssistedEngine, volume: Volume, prompts, slices) -> None:
    automatic = live.segment(volume, {})
    found = live.segment(volume, {"big": prompts}, ALONE)
    assert found.edited == {"big": slices}
    assert all(found.presence["big"][i] != automatic.presence["big"][i] for i in slices)
    assert changed(found.mask, automatic.mask) <= set(slices)


def test_negative_stroke_edits_its_slice_where_the_label_is(live: AssistedEngine, volume: Volume, asked) -> None:
    there = asked["big"].clicks[0].ijk
    for voxel, edited in ((there, {"big": (there[2],)}), ((31, 1, 2), {})):
        stroke = Stroke(np.array([voxel]), positive=False)
        assert live.segment(volume, {"big": UserPrompts(strokes=(stroke,))}, ALONE).edited == edited


@pytest.mark.parametrize("positive", [True, False])
def test_strokes_are_obeyed_on_every_voxel(live: AssistedEngine, volume: Volume, positive: bool) -> None:
    mask = live.segment(volume, {}).mask
    k = slice_of_label(mask, 1)
    voxels = np.argwhere(np.ones_like(mask[:, :, k]))[5::11]
    stroke = Stroke(np.insert(voxels, 2, k, axis=1), positive)
    found = live.segment(volume, {"big": UserPrompts(strokes=(stroke,))}).mask
    assert ((found[tuple(stroke.voxels.T)] == 1) == positive).all()
    if not positive:  # of what is no part of it nothing is said
        others = stroke.voxels[mask[tuple(stroke.voxels.T)] == 2]
        assert (found[tuple(others.T)] == 2).all()


@pytest.mark.parametrize("prompts", [click((1, 1, 1)), UserPrompts(boxes=(Box((1, 1, 1), (9, 9, 2)),))])
def test_positive_prompt_says_that_the_label_is_there(live: AssistedEngine, volume: Volume, prompts) -> None:
    assert live.segment(volume, {"small one": prompts}, ALONE).presence["small one"][1] >= 0.5


BAD = [
    ({"big": click((99, 0, 0))}, "received"),
    ({"liver": click((1, 1, 1))}, r"labels \['big', 'small one'\], received \['liver'\]"),
    ({"big": UserPrompts(boxes=(Box((1, 1, 1), (4, 4, 2)), Box((5, 5, 1), (9, 9, 2))))}, "two on slice 1"),
]


@pytest.mark.parametrize(("prompts", "words"), BAD)
def test_prompts_that_cannot_be_used_are_named(live: AssistedEngine, volume: Volume, prompts, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        live.segment(volume, prompts)


@pytest.mark.parametrize(("axis", "number"), [("i", 0), ("j", 1), ("k", 2)])
def test_each_axis(live: AssistedEngine, volume: Volume, axis: str, number: int) -> None:
    options = SegmentOptions(axis=axis)
    automatic = live.segment(volume, {}, options)
    found = live.segment(volume, {"big": click((16, 18, 3))}, options)
    assert automatic.axis == found.axis == number
    assert len(found.presence["big"]) == volume.shape[number]
    assert (16, 18, 3)[number] in found.edited["big"]
    assert changed(found.mask, automatic.mask, number) <= edited_slices(found)


def test_picture(live: AssistedEngine, tmp_path: Path) -> None:
    grey = np.clip(draw(2)[0][:, :, 3], 0, 255).astype(np.uint8)
    Image.fromarray(grey.T).save(tmp_path / "picture.png")
    picture = live.engine.open(tmp_path / "picture.png")
    automatic = live.segment(picture, {})
    found = live.segment(picture, {"big": click((16, 18, 0))})
    assert automatic.mask.shape == (32, 36, 1) and automatic.mask.any()
    assert found.edited == {"big": (0,)}


# the walk of a correction, with answers that are made up


def test_carried_correction_changes_nothing_far_from_it(live: AssistedEngine, volume: Volume, monkeypatch) -> None:
    """Two blobs on every slice; the user removes one, and the decoder then sees nothing at all on neighbours."""
    walk = _walk(live, volume, monkeypatch, blobs=("left", "right"), corrected="right", carried="", carried_obj=-5.0)
    automatic, found = walk
    for k in range(6):
        left, right = found.mask[:, :18, k], found.mask[:, 18:, k]
        assert np.array_equal(left, automatic.mask[:, :18, k])
        assert not right.any()
    assert found.edited == {"big": tuple(range(6))}
    assert all(p >= 0.5 for p in found.presence["big"].values())


def test_carried_correction_appears_where_the_label_was_absent(
    live: AssistedEngine, volume: Volume, monkeypatch
) -> None:
    automatic, found = _walk(live, volume, monkeypatch, blobs=(), corrected="right", carried="right", carried_obj=5.0)
    assert not automatic.mask.any()
    assert all(found.mask[:, 18:, k].any() and not found.mask[:, :18, k].any() for k in range(6))


def test_carried_correction_ends_where_it_changes_nothing(live: AssistedEngine, volume: Volume, monkeypatch) -> None:
    blobs = ("left", "right")
    automatic, found = _walk(live, volume, monkeypatch, blobs, corrected="right", carried="left right", carried_obj=5.0)
    assert found.edited == {"big": (3,)}
    assert changed(found.mask, automatic.mask) == {3}


def test_carried_correction_stops_at_slices_with_prompts_of_their_own(
    live: AssistedEngine, volume: Volume, monkeypatch
) -> None:
    prompts = {"big": click((16, 27, 1), (16, 27, 4), positive=False)}
    asked: list[int] = []
    _walk(live, volume, monkeypatch, ("left", "right"), "right", "", -5.0, prompts=prompts, asked=asked)
    assert sorted(asked) == [0, 1, 2, 2, 3, 3, 4, 5]  # between two seeds both arrive, at seeds none


@pytest.mark.parametrize("places", [((16, 7, 0), (16, 27, 5)), ((16, 27, 5), (16, 7, 0))])
def test_walks_that_meet_keep_both_corrections(live: AssistedEngine, volume: Volume, monkeypatch, places) -> None:
    """The left blob is removed on the first slice and the right one on the last: in between neither is left."""
    prompts = {"big": click(*places, positive=False)}
    blobs = ("left", "right")
    _, found = _walk(live, volume, monkeypatch, blobs, {0: "left", 5: "right"}, "", -5.0, prompts=prompts)
    assert not found.mask[:, :, 1:5].any()
    assert found.mask[:, 18:, 0].any() and found.mask[:, :18, 5].any()


def test_background_click_asks_only_about_labels_that_are_there(
    live: AssistedEngine, volume: Volume, monkeypatch
) -> None:
    asked: list[int] = []
    prompts = {name: click((16, 27, 3), positive=False) for name in LABELS}
    _walk(live, volume, monkeypatch, ("left", "right"), "right", "", -5.0, prompts=prompts, asked=asked)
    assert asked.count(3) == 1


def test_correction_ends_where_the_click_does_not_reach(live: AssistedEngine, volume: Volume, monkeypatch) -> None:
    """A blob goes through all slices, which lie 5 mm apart; its rim is 3 to 5 mm from the click."""
    asked: list[int] = []
    walk = _walk(live, volume, monkeypatch, ("left", "right"), "right", "", -5.0, asked=asked, far=1.9)
    automatic, found = walk
    assert sorted(asked) == [2, 3, 4]
    assert changed(found.mask, automatic.mask) == edited_slices(found) == {2, 3, 4}


def _walk(
    live: AssistedEngine, volume: Volume, monkeypatch, blobs: tuple[str, ...], corrected: Any, carried: str,
    carried_obj: float, prompts=None, asked=None, far: float = 1000.0,
) -> tuple[LabelPrediction, LabelPrediction]:  # fmt: skip
    """``corrected`` is what the click takes away (or draws, without blobs), by slice where it differs; ``carried`` what
    a neighbour shows; how far a click reaches plays no part."""
    columns = {"left": slice(2, 6), "right": slice(10, 14)}  # of the 16 x 16 grid; the volume's rows are i or j

    def logits(names: str) -> torch.Tensor:
        grid = torch.full((16, 16), -4.0)
        for name in names.split():
            grid[(slice(5, 11), columns[name])] = 4.0
        return grid if rows_are_i else grid.T.contiguous()

    rows_are_i = slice_view(np.zeros((2, 3, 1)), 2, 0).shape == (2, 3)
    auto = logits(" ".join(blobs)).expand(6, 2, 16, 16).clone()
    auto[:, 1] = -4.0
    obj = torch.tensor([[5.0 if blobs else -5.0, -5.0]]).repeat(6, 1)

    def automatic(job: Any) -> Automatic:
        mask = np.zeros(volume.shape, np.uint8, order="F")
        for k in range(6):
            drawn = combine(job.transform.logits(auto[k][None]), obj[k][None])[0].numpy()
            slice_view(mask, 2, k)[...] = drawn
        return Automatic(mask, auto.half(), torch.full((6, 2), 0.9), obj)

    def ask(job: Any, index: int, number: int, user: Any, *, said: bool) -> Answer:
        if asked is not None:
            asked.append(index)
        if user.points_xy is not None:
            mine = corrected if isinstance(corrected, str) else corrected[index]
            left = " ".join(b for b in blobs if b != mine) if blobs else mine
            return Answer(logits(left)[None], torch.tensor([0.9]), torch.tensor([5.0]))
        return Answer(logits(carried)[None], torch.tensor([0.9]), torch.tensor([carried_obj]))

    monkeypatch.setattr(module._Job, "_automatic", automatic)
    monkeypatch.setattr(module._Job, "ask", ask)
    monkeypatch.setattr(claims, "FAR", far)
    return live.segment(volume, {}), live.segment(volume, prompts or {"big": click((16, 27, 3), positive=not blobs)})


# versions


def test_promoted_version_answers_the_next_request_and_rollback_gives_the_old_bits(
    live: AssistedEngine, volume: Volume, asked
) -> None:
    old, old_edit = live.segment(volume, {}), live.segment(volume, asked)
    add_version(live.store, live.engine, noise=0.05)
    new = live.segment(volume, {})
    assert new.version == "v0002"
    assert new.presence != old.presence
    live.store.rollback("test")
    back, back_edit = live.segment(volume, {}), live.segment(volume, asked)
    assert back.version == "v0001"
    assert np.array_equal(back.mask, old.mask) and back.presence == old.presence
    assert np.array_equal(back_edit.mask, old_edit.mask) and back_edit.presence == old_edit.presence


def test_version_of_other_labels_renames_the_answer(live: AssistedEngine, volume: Volume) -> None:
    add_version(live.store, live.engine, labels=("liver", "spleen"))
    assert live.segment(volume, {}).labels == ("liver", "spleen")
    with pytest.raises(PromptError, match=r"labels \['liver', 'spleen'\], received \['big'\]"):
        live.segment(volume, {"big": click((1, 1, 1))})


def test_version_of_another_backbone_is_refused(build, path: Path) -> None:
    one = build()
    add_version(one.store, one.engine, digest="f" * 64)
    with pytest.raises(WeightsError, match=r"v0001 was trained on tiny with weights ffffffffffff, but those loaded"):
        one.segment(one.engine.open(path), {})
    add_version(one.store, one.engine)  # and the next request finds the right one
    assert one.segment(one.engine.open(path), {}).version == "v0002"


def test_damaged_version_is_refused(live: AssistedEngine, volume: Volume) -> None:
    file = live.store.folder / "versions" / "v0001" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(WeightsError, match="the file was changed or cut short"):
        live.segment(volume, {})


def test_version_is_built_with_its_own_options(build, live: AssistedEngine, volume: Volume, path: Path) -> None:
    other = build(options={**ROW.options, "tokens": 5})  # as after an update of the YAML
    got = other.segment(other.engine.open(path), {})
    assert np.array_equal(got.mask, live.segment(volume, {}).mask)


def test_version_is_loaded_once(live: AssistedEngine, volume: Volume, monkeypatch) -> None:
    loads: list[str] = []
    monkeypatch.setattr(live.store, "tensors", _counted(live.store.tensors, "load", loads), raising=False)
    for _ in range(3):
        live.segment(volume, {})
    assert loads == ["load"]


def test_threads_with_one_question_get_one_answer(live: AssistedEngine, volume: Volume, monkeypatch) -> None:
    loads: list[str] = []
    monkeypatch.setattr(live.store, "tensors", _counted(live.store.tensors, "load", loads), raising=False)
    ready = threading.Barrier(4)

    def ask(_: int) -> LabelPrediction:
        ready.wait(30)
        return live.segment(volume, {"big": click((16, 18, 3))})

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert loads == ["load"]
    assert sum(f.cache.get("misses", 0) for f in found) == 6
    assert all(np.array_equal(f.mask, found[0].mask) and f.presence == found[0].presence for f in found)
    alone = live.segment(volume, {"big": click((16, 18, 3))})
    assert np.array_equal(alone.mask, found[0].mask)


def test_request_under_way_finishes_with_the_old_version(live: AssistedEngine, volume: Volume, monkeypatch) -> None:
    old = live.segment(volume, {})
    original = module._Job.automatic

    def switched(job: Any) -> Automatic:
        if live.store.live_name() == "v0001":
            add_version(live.store, live.engine, noise=0.05)
        return original(job)

    monkeypatch.setattr(module._Job, "automatic", switched)
    found = live.segment(volume, {})
    assert found.version == "v0001" and np.array_equal(found.mask, old.mask)
    assert live.segment(volume, {}).version == "v0002"
