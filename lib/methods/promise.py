"""ProMISe: a network proposes points (APM), another shifts SAM's mask tokens (IPS); SAM stays frozen (METHODS 6).

Modes: ``apm`` points, ``ips`` shifts, ``apm_ips`` both. Point networks: ``resnet`` and ``cross``, the paper's, look at
three maps of the encoder, ``light`` at the embedding. At step 0 the shifts are zero and the points lie on a grid, the
positive ones in the middle. Frame: points in 0..1 of the backbone's input, x right, y down, until they become prompts
in ``_xy``. No state between calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lib.contracts import BackboneSpec, Features, Hooks, PromptSet, Proposal
from lib.errors import ConfigError
from lib.nn.losses import mask_part, point_loss, presence_loss, present_mean, visible
from lib.nn.points import MAPS, CrossPoints, LightPoints, ResNetPoints, anchor_grid, zeroed

MODES = ("apm", "ips", "apm_ips")
POINTS: dict[str, type[nn.Module]] = {"resnet": ResNetPoints, "cross": CrossPoints, "light": LightPoints}
POINT_WEIGHT = 0.1
LOSSES = ("promise", "plain")


@dataclass(frozen=True)
class Config:
    """Numbers of the method.

    Args:
        classes: K.
        mode: ``apm``, ``ips`` or ``apm_ips``.
        form: ``resnet``, ``cross`` or ``light``.
        positive: points per class that say what belongs to it; the paper's 3P, 5P and 16P have 1, 2 and 8.
        negative: points per class that say what does not: 2, 3 and 8.
        mask_token: which of the decoder's masks is read; released weights read 1.
    """

    classes: int
    mode: str = "apm_ips"
    form: str = "resnet"
    positive: int = 8
    negative: int = 8
    mask_token: int = 1


def build(config: Config, spec: BackboneSpec) -> Promise:
    """The method for one backbone.

    Raises:
        ConfigError: for a number that does not fit, or a form that needs maps which the backbone does not have.
    """
    for key, known in (("mode", MODES), ("form", tuple(POINTS))):
        if getattr(config, key) not in known:
            raise ConfigError(f"promise.{key}: expected one of {list(known)}, received {getattr(config, key)!r}.")
    if config.classes < 1 or min(config.positive, config.negative) < 0 or not config.positive + config.negative:
        raise ConfigError(f"promise: expected classes and points per class >= 1, received {config}.")
    if not 0 <= config.mask_token <= 3:
        raise ConfigError(f"promise.mask_token: expected 0 to 3, received {config.mask_token}.")
    if config.form != "light" and config.mode != "ips" and not spec.pyramid:
        raise ConfigError(f"promise.form: {config.form!r} reads maps that {spec.name} does not give; use 'light'.")
    return Promise(config, spec)


class Promise(nn.Module):
    """Point network and pattern encoder."""

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__()
        self.config, self.spec, self.classes = config, spec, config.classes
        self.mask_token = config.mask_token
        maps = spec.pyramid[-MAPS:] if config.form != "light" and config.mode != "ips" else ()
        self.taps = tuple(name for name, _, _ in maps)
        anchors = anchor_grid(config.positive + config.negative).repeat(config.classes, 1)
        self.points: Optional[nn.Module] = None if config.mode == "ips" else POINTS[config.form](anchors, spec)
        self.pattern = PatternEncoder(spec.prompt_width, config.classes, shifts=config.mode != "apm")
        self.slots: Tensor
        slots = [1] * config.positive + [0] * config.negative
        self.register_buffer("slots", torch.tensor(slots), persistent=False)

    def propose(self, features: Features) -> Proposal:
        """Points and token shifts of all classes for B images.

        The points of a class that is not there say nothing, but not in training, where they would stop learning.
        """
        shift, obj = self.pattern(features.embed)
        if self.points is None:
            return Proposal(PromptSet(), Hooks(token_shift=shift), obj=obj)
        unit = self.points(features).float().unflatten(1, (self.classes, -1)).flatten(0, 1)  # (N, P, 2)
        labels = self.slots.repeat(len(unit), 1)
        labels = labels if self.training else labels.masked_fill(obj < 0, -1)
        prompts = PromptSet(points_xy=unit * self.spec.input_size - 0.5, labels=labels)
        return Proposal(prompts, Hooks(token_shift=shift), obj=obj)


class PatternEncoder(nn.Module):
    """PaE: the embedding's mean becomes shifts of the four mask tokens, zero at first, and presence, per class."""

    def __init__(self, width: int, classes: int, *, shifts: bool) -> None:
        super().__init__()
        self.classes = classes
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
        self.shift = zeroed(nn.Linear(4 * width, classes * 4 * width)) if shifts else None
        self.presence = zeroed(nn.Linear(4 * width, classes))

    def forward(self, embed: Tensor) -> tuple[Optional[Tensor], Tensor]:
        """``(B, E, h, w)`` to ``(shift (N, 4, E) or None, objectness logits (N, 1))``."""
        hidden = self.hidden(embed.mean((2, 3)))
        shift = None if self.shift is None else self.shift(hidden).view(-1, 4, embed.shape[1])
        return shift, self.presence(hidden).view(-1, 1)


def losses(preset: str, answer: Any, proposal: Proposal, target: Tensor, spec: BackboneSpec) -> dict[str, Tensor]:
    """Weighted parts of the loss of N pairs (METHODS 6.3).

    Args:
        preset: ``promise`` (cross entropy and Dice of every pair, as in the paper) or ``plain``: Dice and cross entropy
            scaled by the object's area, of the pairs that are there, and a little for points on the wrong side.
        answer: masks ``(N, 4h, 4w)`` and objectness of the decoder call.
        proposal: of the same pairs.
        target: ``(N, 4h, 4w)`` in 0..1.
        spec: facts of the backbone.
    """
    there = visible(target, (spec.input_size / spec.mask_size) ** 2)
    parts = {
        "mask": mask_part(preset, LOSSES, answer.masks, target, there),
        "objectness": presence_loss(answer.obj, target),
    }
    prompts = proposal.prompts
    if preset == "plain" and prompts.points_xy is not None and prompts.labels is not None:
        missed = point_loss(prompts.points_xy, prompts.labels, target, spec.input_size)
        parts["points"] = POINT_WEIGHT * present_mean(missed, there)
    return parts
