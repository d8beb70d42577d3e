"""The loss of one training step: learned prompts alone, and with the prompts a user might add (METHODS 3.3).

Pure functions of model, batch and seed. Frame: targets on the mask grid ``G = 4h``. Where features are kept and the
decoder is large, as SAM's on 64 x 64 cells, decoder calls are all that a step costs: there every slice is asked about
one class, once, so that a step is cheap and the next one sees other slices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.contracts import Features, PromptSet
from lib.learned import Learned, spread
from lib.nn.losses import area_bce, dice_loss, soft_iou
from lib.prompts.simulate import user_prompts

ALONE = 0.1  # share of assisted calls without learned prompts (METHODS 3.3)
HELPED = 0.5  # share of drawn pairs that the user helps with, where the class is there
OFTENER = 3.0  # a class that is on the slice is drawn so much oftener than one that is not


def step_loss(
    model: Learned, features: Features, target: Tensor, preset: str, seed: int
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch: the autonomous call, and one with simulated user prompts on the pairs that are present.

    Args:
        model: in training mode.
        features: of B slices.
        target: ``(B, K, G, G)`` in 0..1.
        preset: of losses.
        seed: of the simulated prompts.
    """
    images, classes = target.shape[:2]
    index = torch.arange(images, device=target.device).repeat_interleave(classes)
    flat = target.flatten(0, 1)
    proposal = model.propose(features)
    if model.progress < model.warm_up:  # its prompts are useless yet
        return _totalled(model.losses(preset, None, proposal, flat, model.spec))
    _, answer = model.decode(features, proposal, PromptSet(), index)
    parts = model.losses(preset, answer, proposal, flat, model.spec)
    rng = torch.Generator().manual_seed(seed)
    hard = flat > 0.5
    present = hard.flatten(1).any(1).nonzero()[:, 0]
    if len(present):
        scale = model.spec.input_size / flat.shape[-1]
        user = user_prompts(hard[present], answer.masks.detach()[present] > 0, scale, rng)
        learned = None if float(torch.rand(1, generator=rng)) < ALONE else proposal
        assisted = model.corrected(features, learned, user, present)
        parts["assisted"] = (
            0.5 * (dice_loss(assisted.masks, flat[present]) + area_bce(assisted.masks, flat[present])).mean()
        )
    if model.preset != "frozen":  # a head that is not trained cannot follow
        parts["quality"] = F.mse_loss(answer.iou, soft_iou(answer.masks.detach(), flat))
    return _totalled(parts)


def drawn_loss(
    model: Learned, features: Features, target: Tensor, preset: str, seed: int
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch with one class drawn per slice and one decoder call, the user helping with some of them.

    Errors that the user's points lie in are those of the method's interim mask, where it has one, else everything is
    still missing. Arguments as of :func:`step_loss`.
    """
    rng = torch.Generator().manual_seed(seed)
    device, every = target.device, torch.arange(len(target), device=target.device)
    there = (target > 0.5).flatten(2).any(2)
    classes = torch.multinomial(1 + (OFTENER - 1) * there.float().cpu(), 1, generator=rng)[:, 0].to(device)
    flat = target[every, classes]
    proposal = model.propose(features, classes)
    helped = (there[every, classes] & (torch.rand(len(every), generator=rng) < HELPED).to(device)).nonzero()[:, 0]
    hard, user = flat > 0.5, PromptSet()
    if len(helped):
        before = torch.zeros_like(hard) if proposal.masks is None else proposal.masks.detach()[:, 0] > 0
        scale = model.spec.input_size / flat.shape[-1]
        user = spread(user_prompts(hard[helped], before[helped], scale, rng), helped, len(every))
    _, answer = model.decode(features, proposal, user, every)
    return _totalled(model.losses(preset, answer, proposal, flat, model.spec))


def _totalled(parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    total = torch.stack(list(parts.values())).sum()
    return total, {k: float(v.detach()) for k, v in {"loss": total, **parts}.items()}


def losses_of(
    model: Learned, features: Features, target: Tensor, preset: str, seed: int
) -> Iterator[tuple[Tensor, dict[str, float]]]:
    """Losses of one batch, one optimiser step each: :func:`step_loss` or :func:`drawn_loss`, or a method's own rounds
    where the backbone is trained, each of which is computed after the step on the one before."""
    if model.rounds is None or model.preset == "frozen":
        yield (drawn_loss if model.draws else step_loss)(model, features, target, preset, seed)
        return
    for parts in model.rounds(model, features, target, preset, seed):
        yield _totalled(parts)
