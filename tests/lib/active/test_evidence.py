"""What a model shows of its doubt, on answers whose doubt is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.active.evidence import View, calibration_pairs, embedding, examine, raw_quality
from lib.active.sums import Distance, Quality
from lib.engine import Engine
from lib.evaluate import encoded, evaluate
from lib.learned import Answer, Learned
from lib.train_data import Slice, axis_of
from tests.cases import LABELS, cases, learned, settings, trained_tensors


def answer(logit: float, obj: float, iou: float = 1.0) -> tuple[Answer, torch.Tensor]:
    """One slice with one label on its left half, sure of it by ``logit`` on both sides."""
    masks = torch.full((1, 8, 8), -logit)
    masks[:, :, :4] = logit
    shown = (masks > 0).to(torch.uint8) if obj >= 0 else torch.zeros(1, 8, 8, dtype=torch.uint8)
    return Answer(masks, torch.tensor([iou]), torch.tensor([obj])), shown


@pytest.mark.parametrize(
    ("logit", "obj", "iou", "expected"),
    [
        (20.0, 20.0, 1.0, 1.0),  # sure
        (0.0001, 20.0, 1.0, (0.5 + 1) / 2),  # probability one half everywhere: 2 * 0.5 * A / (0.5 * 2 A + A)
        (20.0, 0.0, 1.0, (2 / 3 + 1) / 2),  # there or not: 2 * 0.5 A / (0.5 A + A)
        (20.0, 20.0, 0.5, (1 + 2 / 3) / 2),  # an IoU of 1/2 is a Dice of 2/3
        (20.0, -20.0, 0.5, 1.0),  # surely absent
        (20.0, -0.0001, 0.5, 0.5),  # absent, or not
    ],
)
def test_quality_is_the_mean_of_soft_dice_and_iou_head(logit: float, obj: float, iou: float, expected: float) -> None:
    quality = Quality(1)
    for _ in range(3):
        quality.add(*answer(logit, obj, iou))
    assert float(quality.found()[0]) == pytest.approx(expected, abs=1e-3)


def test_the_iou_head_counts_by_what_is_shown_of_each_slice() -> None:
    quality = Quality(1)
    quality.add(*answer(20.0, 20.0, 1.0))
    masks = torch.full((1, 8, 8), -20.0)
    masks[:, :4, :2] = 20.0  # a quarter of the other slice's area, and worth nothing
    quality.add(Answer(masks, torch.zeros(1), torch.tensor([20.0])), (masks > 0).to(torch.uint8))
    assert float(quality.found()[0]) == pytest.approx((1 + 32 / 40) / 2, abs=1e-3)


def test_quality_falls_for_slices_that_are_left_out() -> None:
    whole, gap = Quality(1), Quality(1)
    whole.add(*answer(4.0, 4.0))
    gap.add(*answer(4.0, 4.0))
    gap.add(*answer(4.0, -0.5))  # probably there, not shown
    assert gap.found()[0] < whole.found()[0] - 0.05


def test_distance_is_one_minus_dice_over_all_slices() -> None:
    own, other = torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 4, dtype=torch.uint8)
    own[0, :2], other[0, 1:3] = 1, 1  # 8 and 8 cells, 4 in common; label 2 is nowhere
    distance = Distance(2)
    distance.add(own, [other, own])
    assert distance.found() == pytest.approx((0.5 + 0 + 0 + 0) / 4)


@pytest.mark.parametrize("view", [View(10.0), View(-30.0), View(mirrored=True), View(20.0, mirrored=True)])
def test_a_view_is_undone(view: View) -> None:
    grid = torch.linspace(-1, 1, 64)
    blob = 8 - 60 * ((grid[:, None] - 0.2) ** 2 + (grid[None] + 0.3) ** 2)
    back = view.back(view.of(blob[None, None])[:, 0])[0]
    inside = (grid[:, None] ** 2 + grid[None] ** 2) < 0.8
    assert float((back - blob)[inside].abs().max()) < 0.5
    assert float((view.of(blob[None, None])[0, 0] - blob)[inside].abs().max()) > 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    engine = Engine(settings(tmp_path_factory.mktemp("engine")))
    found = learned(engine)
    found.restore(trained_tensors())
    return found.eval()


def seen(model: Learned, case):
    """A features function of a case that counts how often each view is encoded."""
    from lib.transform import SliceTransform

    axis, counts = axis_of(case), {}

    def features(group: range, view: View):
        counts[view] = counts.get(view, 0) + len(group)
        pixels = [Slice(case, axis, i).pixels() for i in group]
        transform = SliceTransform(model.spec, pixels[0].shape[:2])
        return model.encode(view.of(torch.stack([transform.image(p) for p in pixels])))

    return features, counts, case.volume.shape[axis]


def test_evidence_of_a_volume(model: Learned, tmp_path: Path) -> None:
    features, counts, slices = seen(model, cases(tmp_path, 1)[0])
    found = examine(model, slices, features, flips=False)
    assert found.raw is not None and found.raw.shape == (2,) and bool(((found.raw > 0) & (found.raw < 1)).all())
    assert found.disagreement is not None and 0 < found.disagreement < 1
    assert found.embedding.shape == (2 * model.spec.prompt_width,) and bool(torch.isfinite(found.embedding).all())
    assert set(counts.values()) == {slices} and len(counts) == 3  # jitter costs no encoding, a turn one each
    torch.testing.assert_close(raw_quality(model, slices, lambda group: features(group, View())), found.raw)
    torch.testing.assert_close(embedding(slices, lambda group: features(group, View())), found.embedding)
    again = examine(model, slices, features, flips=False)
    assert again.disagreement == found.disagreement
    examine(model, slices, features, flips=True)
    assert View(mirrored=True) in counts


def test_a_model_that_hears_nothing_of_its_prompts_does_not_disagree_by_jitter(model: Learned, tmp_path: Path) -> None:
    """The jitter moves prompts: with all noise off, only turned views differ."""
    import lib.active.evidence as module

    features, _, slices = seen(model, cases(tmp_path, 1)[0])

    def still(group: range, _: View):
        return features(group, View())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DEGREES", 0.0)
        patch.setattr(module, "MOVE", 0.5)  # this model hardly listens
        patch.setattr(module, "NOISE", 5.0)
        moved = examine(model, slices, still, flips=False).disagreement
        patch.setattr(module, "MOVE", 0.0)
        patch.setattr(module, "NOISE", 0.0)
        fixed = examine(model, slices, still, flips=False).disagreement
    assert fixed == 0 and moved is not None and moved > 0


def test_noise_in_the_image_lowers_quality(model: Learned, tmp_path: Path) -> None:
    case = cases(tmp_path, 1)[0]
    rng = np.random.default_rng(0)
    noisy = np.asarray(case.volume.array) + rng.normal(0, 120, case.volume.shape).astype(np.float32)
    worse = replace(case, volume=replace(case.volume, array=noisy, content_hash="noisy"))
    raw = [examine(model, slices, features, flips=False).raw.mean() for features, _, slices in
           (seen(model, case), seen(model, worse))]  # fmt: skip
    assert raw[1] < raw[0]


def test_calibration_pairs_hold_raw_and_true_of_every_label(model: Learned, tmp_path: Path) -> None:
    found = cases(tmp_path, 2)
    dice = evaluate(model, found, LABELS, encoded(model))["cases"]
    pairs = calibration_pairs(model, found, LABELS, dice, encoded(model))
    assert list(pairs) == list(LABELS)
    for label in LABELS:
        assert [d for _, d in pairs[label]] == [dice[c.case][label] for c in found]
        assert all(0 <= raw <= 1 for raw, _ in pairs[label])
