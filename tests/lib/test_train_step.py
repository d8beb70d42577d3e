"""The loss of a training step: all classes, or for large frozen decoders one class per slice in one decoder call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lib import learned as learned_module
from lib.learned import Learned, rows
from lib.train_step import drawn_loss, losses_of, step_loss
from tests.lib.test_learned import encoded, learned


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes ``tiny``'s decoder for a large one."""
    monkeypatch.setattr(learned_module, "SMALL_GRID", 1)


def drawn(target: torch.Tensor, seed: int = 3) -> tuple[Learned, dict[str, float]]:
    model = learned().train()
    loss, parts = drawn_loss(model, encoded(model, len(target)), target, "plain", seed)
    loss.backward()
    return model, parts


def of_class(images: int, number: int) -> torch.Tensor:
    target = torch.zeros(images, 2, 16, 16)
    target[:, number, 4:12, 4:12] = 1
    return target


@pytest.mark.parametrize("present, assisted", [(0, False), (1, True)])
def test_step_loss_asks_about_present_pairs_only(present, assisted) -> None:
    model = learned().train()
    target = torch.zeros(2, 2, 16, 16)
    target[:present, :1, 4:12, 4:12] = 1
    loss, parts = step_loss(model, encoded(model, 2), target, "plain", 3)
    assert torch.isfinite(loss) and ("assisted" in parts) == assisted
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.method.parameters() if p.grad is not None)
    assert parts["loss"] == pytest.approx(sum(v for k, v in parts.items() if k != "loss"), rel=1e-5)


def test_only_a_large_frozen_decoder_is_asked_about_drawn_classes(large) -> None:
    assert learned("frozen").draws
    assert not learned("adapters").draws and not learned("full").draws


def test_small_decoder_is_asked_about_all_classes() -> None:
    assert not learned("frozen").draws


@pytest.mark.parametrize("there", [0, 1])
def test_one_call_asks_about_one_class_per_slice(large, monkeypatch: pytest.MonkeyPatch, there: int) -> None:
    calls: list[dict[str, Any]] = []
    decode = Learned.decode

    def counted(self: Learned, features: Any, proposal: Any, user: Any, index: torch.Tensor, **more: Any) -> Any:
        calls.append({"pairs": index.tolist(), "user": user.pairs})
        return decode(self, features, proposal, user, index, **more)

    monkeypatch.setattr(Learned, "decode", counted)
    model = learned().train()
    for seed in range(8):
        for loss, _ in losses_of(model, encoded(model, 3), there * of_class(3, 0), "plain", seed):
            assert torch.isfinite(loss)
    assert [call["pairs"] for call in calls] == [[0, 1, 2]] * 8
    assert any(call["user"] for call in calls) == bool(there)  # nobody clicks on what is not there


def test_class_that_is_there_is_drawn_oftener_and_the_other_one_too() -> None:
    seen = [0, 0]
    for seed in range(40):
        grad = drawn(of_class(1, 1), seed)[0].method.queries.grad
        touched = grad.flatten(1).abs().sum(1) > 0
        assert touched.sum() == 1  # no other class's query had a part in it
        seen[int(touched.nonzero())] += 1
    assert seen[1] > seen[0] > 0


def test_picked_proposals_are_rows_of_the_whole_proposal() -> None:
    model = learned()
    features, classes = encoded(model, 3), torch.tensor([1, 0, 1])
    with torch.no_grad():
        picked, whole = model.propose(features, classes), rows(model.propose(features), 2 * torch.arange(3) + classes)
    for name in ("boxes", "masks"):
        torch.testing.assert_close(getattr(picked, name), getattr(whole, name))
    torch.testing.assert_close(picked.prompts.tokens, whole.prompts.tokens)


def test_drawn_steps_lower_the_loss_of_all_classes() -> None:
    model, target = learned().train(), of_class(2, 0) + 0.5 * of_class(2, 1)
    features = encoded(model, 2)
    optimiser = torch.optim.AdamW(model.groups(3e-3, 1e-3, 0.0))
    before = float(step_loss(model.eval(), features, target, "plain", 1)[0].detach())
    for step in range(30):
        optimiser.zero_grad()
        drawn_loss(model.train(), features, target, "plain", step)[0].backward()
        optimiser.step()
    assert float(step_loss(model.eval(), features, target, "plain", 1)[0].detach()) < 0.9 * before
