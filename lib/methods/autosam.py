"""AutoSAM: a network of its own looks at the image and fills SAM's dense prompt, one map per class (METHODS 2).

Training moves this network only; with SAM's decoder its last layer starts at zero, so that step 0 is SAM without
prompts. The network is any timm CNN with maps at strides 4, 8 and 16, with random weights, or HarDNet-85. ``head:
light`` is the paper's ablation, which reads the masks from the maps without SAM's decoder. Frame: the backbone's
normalised input, resized to ``side``. Keeps batch statistics in training, no state between calls. Left out: ImageNet
weights, a download.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.contracts import BackboneSpec, Features, PromptSet, Proposal, image_tap
from lib.errors import ConfigError
from lib.nn.hardnet import CHANNELS, HarDNet
from lib.nn.losses import mask_part, presence_loss, visible

STRIDES = (4, 8, 16)
LEAST_SIDE = 32
CELL = 8  # pixels
RARE = 0.05  # share of a slice that a structure covers, roughly
SPREAD = 5.0  # times the usual weights of the light head's last layer
HEADS = ("sam", "light")
LOSSES = ("autosam", "plain")


@dataclass(frozen=True)
class Config:
    """Numbers of the method.

    Args:
        classes: K.
        cnn: name of a timm model, or ``hardnet85``, the paper's.
        side: I, of the network's input in pixels, never more than the backbone's own side; 0 means eight per cell of
            the embedding: 512, the source's default, for SAM, 128 for compact, where 256 takes thrice as long.
        head: ``sam`` decodes the maps with SAM, ``light`` with three layers.
        presence: True predicts from the maps whether a class is there; False leaves that to SAM, where it can tell.
    """

    classes: int
    cnn: str = "resnet18"
    side: int = 0
    head: str = "sam"
    presence: bool = True


def build(config: Config, spec: BackboneSpec) -> AutoSam:
    """The method for one backbone.

    Raises:
        ConfigError: for a number that does not fit, or a network without maps at strides 4, 8 and 16.
    """
    if config.head not in HEADS:
        raise ConfigError(f"autosam.head: expected one of {list(HEADS)}, received {config.head!r}.")
    if config.classes < 1 or 0 < config.side < LEAST_SIDE or config.side < 0:
        raise ConfigError(f"autosam: expected classes >= 1 and side 0 or >= {LEAST_SIDE}, received {config}.")
    return AutoSam(config, spec)


class AutoSam(nn.Module):
    """Image network g, and what its maps say about presence."""

    mask_token = 0

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__()
        self.config, self.spec, self.classes = config, spec, config.classes
        side = config.side or max(LEAST_SIDE, CELL * spec.grid)
        self.taps = (image_tap(min(side, spec.input_size)),)
        self.trunk, channels = trunk(config.cnn)
        self.maps = MapDecoder(channels, spec.prompt_width, config.classes)
        self.scale = nn.Parameter(torch.ones(()))
        self.light = light_head(spec.prompt_width) if config.head == "light" else None
        if self.light is None:  # no prompt at step 0; light masks would be the same everywhere, and stay so
            nn.init.zeros_(self.maps.last.weight)
            nn.init.zeros_(self.maps.last.bias)  # type: ignore[arg-type]
        self.presence = nn.Linear(spec.prompt_width, 1) if config.presence else None
        if self.presence is not None:  # 0 counts as present
            nn.init.zeros_(self.presence.weight)
            nn.init.zeros_(self.presence.bias)
        self.no_mask: Tensor
        self.register_buffer("no_mask", torch.zeros(1, spec.prompt_width, 1, 1))

    def adopt(self, backbone: Any) -> None:
        """Takes the backbone's dense map of no mask, from which the learned maps depart."""
        with torch.no_grad():
            self.no_mask.copy_(backbone.embed_prompts(PromptSet(), 1)[1][:, :, :1, :1])

    def propose(self, features: Features) -> Proposal:
        """Dense prompts of all classes for B images."""
        learned = self.maps(self.trunk(features.taps[self.taps[0]])).tanh()
        learned = F.interpolate(learned, (self.spec.grid,) * 2, mode="bilinear", align_corners=False)
        learned = learned.unflatten(1, (self.classes, -1)).flatten(0, 1)  # (N, E, h, w), classes inside
        obj = None if self.presence is None else self.presence(learned.mean((2, 3)))
        learned = self.scale * learned
        if self.light is None:
            return Proposal(PromptSet(dense=self.no_mask + learned), obj=obj)
        masks = self.light(learned)
        return Proposal(PromptSet(masks=masks.detach()), masks=masks, obj=obj, final=True)


class MapDecoder(nn.Module):
    """Maps at strides 4, 8 and 16 to ``(B, K * E, I/4, I/4)``."""

    def __init__(self, channels: tuple[int, int, int], width: int, classes: int) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.up = nn.ModuleList([_fuse(coarse + middle, middle), _fuse(middle + fine, fine)])
        self.last = nn.Conv2d(width, width * classes, 3, padding=1)
        self.head = nn.Sequential(nn.Conv2d(fine, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, maps: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """``maps`` finest first."""
        fine, middle, x = maps
        for fuse, skip in zip(self.up, (middle, fine)):
            x = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=False)
            x = fuse(torch.cat([x, skip], 1))
        return self.last(self.head(x))


def _fuse(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1),
        nn.BatchNorm2d(outside), nn.LeakyReLU(0.01),
    )  # fmt: skip


def light_head(width: int) -> nn.Sequential:
    """The ablation's h: ``(N, E, h, w)`` maps to ``(N, 1, 4h, 4w)`` mask logits.

    Its bias starts at the log-odds of :data:`RARE`: from 0 every weight moves together at first, only to make masks
    small, which drives the maps into their tanh's ends, where they learn no more. The norm before the last layer bounds
    what that can say: with its usual weights no logit would come above 0 within hundreds of steps.
    """
    last = nn.Conv2d(width // 16, 1, 1)
    with torch.no_grad():
        last.weight.mul_(SPREAD)
    nn.init.constant_(last.bias, math.log(RARE / (1 - RARE)))  # type: ignore[arg-type]
    return nn.Sequential(
        nn.ConvTranspose2d(width, width // 4, 3, stride=2, padding=1, output_padding=1),
        ChannelNorm(width // 4), nn.GELU(),
        nn.ConvTranspose2d(width // 4, width // 16, 2, stride=2), ChannelNorm(width // 16), nn.GELU(),
        last,
    )  # fmt: skip


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of NCHW maps."""

    def forward(self, x: Tensor) -> Tensor:
        """Any ``(N, C, H, W)``."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def trunk(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network that gives maps at strides 4, 8 and 16, cut off there, and their channels.

    Raises:
        ConfigError: for an unknown network, or one without these maps.
    """
    if name == "hardnet85":
        return HarDNet(), tuple(CHANNELS[s] for s in STRIDES)  # type: ignore[return-value]
    import timm  # seconds to import, and only this method needs it

    if not timm.is_model(name):
        raise ConfigError(f"autosam.cnn: expected hardnet85 or the name of a timm model, received {name!r}.")
    strides = _strides(timm.create_model, name)
    if any(strides.count(s) != 1 for s in STRIDES):
        raise ConfigError(
            f"autosam.cnn: expected a network with one map at each of the strides {list(STRIDES)}, received {name!r} "
            f"with {strides}. Take a convolutional one such as resnet18."
        )
    places = tuple(strides.index(s) for s in STRIDES)
    network: Any = timm.create_model(name, features_only=True, out_indices=places, pretrained=False)
    return network, tuple(network.feature_info.channels())


def _strides(create: Callable[..., Any], name: str) -> list[int]:
    """Strides of the NCHW maps that a timm model gives for an image of any size; empty where it gives none."""
    side = 3 * LEAST_SIDE  # networks that are made for one size refuse it
    try:
        with torch.device("meta"):
            network = create(name, features_only=True, pretrained=False).eval()
            maps = network(torch.zeros(1, 3, side, side))
    except (RuntimeError, AttributeError, AssertionError, NotImplementedError, TypeError, ValueError):
        return []
    widths = network.feature_info.channels()
    return [side // m.shape[-1] if m.shape[1] == c and m.ndim == 4 else 0 for m, c in zip(maps, widths)]


def losses(preset: str, answer: Any, proposal: Proposal, target: Tensor, spec: BackboneSpec) -> dict[str, Tensor]:
    """Weighted parts of the loss of N pairs (METHODS 2.3).

    Args:
        preset: ``autosam`` (cross entropy and Dice of every pair, as in the paper) or ``plain``: Dice and cross entropy
            scaled by the object's area, of the pairs that are there.
        answer: masks ``(N, 4h, 4w)`` and objectness of the decoder call.
        proposal: of the same pairs.
        target: ``(N, 4h, 4w)`` in 0..1.
        spec: facts of the backbone.
    """
    there = visible(target, (spec.input_size / spec.mask_size) ** 2)
    parts = {"mask": mask_part(preset, LOSSES, answer.masks, target, there)}
    if proposal.obj is not None:
        parts["objectness"] = presence_loss(answer.obj, target)
    return parts
