"""Parts of Self-Prompt-SAM that see neighbouring slices, and its modality adapter (METHODS 4.2).

Which images are neighbours :class:`lib.nn.volume.VolumeContext` knows, one per clone of a backbone. At depth 1 every
part works as well. Every injected part is the identity at step 0. Only torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.errors import ConfigError
from lib.nn.adapters import Injector
from lib.nn.volume import VolumeContext

KINDS = ("conv1d", "fc")
MIXES = ("inside", "before", "after", "none")


class DepthMix(nn.Module):
    """``x + second(GELU(first(x)))`` along the slices, channel by channel; ``second`` starts at zero.

    Args:
        width: channels.
        kind: ``conv1d``, three slices at a time and any number of them, or ``fc``, all ``depth`` slices at once.
        depth: slices that ``fc`` takes.
    """

    def __init__(self, width: int, kind: str, depth: int) -> None:
        super().__init__()
        self.kind, self.depth = kind, depth
        first, second = (
            (nn.Linear(depth, 4 * depth), nn.Linear(4 * depth, depth))
            if kind == "fc"
            else (nn.Conv1d(width, width, 3, padding=1, groups=width) for _ in range(2))
        )
        self.first, self.second = first, second
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """``(B * D * inner, ..., r)`` and ``(B, D, inner)`` to the same shape.

        Raises:
            ConfigError: if ``fc`` gets another number of slices than it was made for.
        """
        if self.kind == "fc" and shape[1] != self.depth:
            raise ConfigError(
                f"depth: fc takes {self.depth} slices of a volume at once, received {shape[1]}. Set slices to that "
                "number, or use conv1d, which takes any."
            )
        stacked = x.reshape(shape[0], shape[1], -1, x.shape[-1])  # (B, D, M, r)
        columns = stacked.permute(0, 2, 3, 1).flatten(0, 1)  # (B * M, r, D)
        mixed = columns + self.second(F.gelu(self.first(columns)))
        return mixed.unflatten(0, (shape[0], -1)).permute(0, 3, 1, 2).reshape(x.shape)


class DepthFusedAdapter(nn.Module):
    """C to r, GELU, depth, r to C; the last layer starts at zero.

    298,000 parameters at C = 768 and ``fc`` over 16 slices, 35,216 at C = 256. For comparisons the depth layer stands
    before or after the other two, or is left out.
    """

    def __init__(self, channels: int, kind: str, depth: int, volume: VolumeContext, place: str = "inside") -> None:
        super().__init__()
        width = max(1, channels // 4)
        self.volume, self.place = volume, place
        self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
        mixed = width if place == "inside" else channels
        self.mix = None if place == "none" else DepthMix(mixed, kind, depth)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape ``(B * D * inner, ..., C)``."""
        x = F.gelu(self.down(self._mixed(x, "before")))
        return self._mixed(self.up(self._mixed(x, "inside")), "after")

    def _mixed(self, x: Tensor, place: str) -> Tensor:
        return x if self.mix is None or place != self.place else self.mix(x, self.volume.unfolded(x.shape[0]))


class Behind(nn.Module):
    """``y + adapter(y)`` with ``y = layer(x)``: the serial adapter behind an attention."""

    def __init__(self, layer: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + self.adapter(y)


class Beside(nn.Module):
    """``layer(x) + 0.5 adapter(x)``: the parallel adapter of an MLP."""

    def __init__(self, layer: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 0.5 * self.adapter(x)


class DepthEmbedding(nn.Module):
    """A learned vector per slice, stretched linearly to as many slices as there are; starts at zero."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.slices = nn.Parameter(torch.zeros(depth, channels))

    def forward(self, depth: int) -> Tensor:
        """``(D, C)``."""
        if depth == self.slices.shape[0]:
            return self.slices
        return F.interpolate(self.slices.T[None], depth, mode="linear", align_corners=False)[0].T


class DepthPlaced(nn.Module):
    """A block behind a depth embedding on its input."""

    def __init__(
        self, block: nn.Module, embedding: DepthEmbedding, channels_first: bool, volume: VolumeContext
    ) -> None:
        super().__init__()
        self.block, self.embedding = block, embedding
        self.channels_first, self.volume = channels_first, volume

    def forward(self, x: Tensor) -> Tensor:
        volumes, depth, _ = self.volume.unfolded(x.shape[0])
        place = self.embedding(depth).repeat(volumes, 1)  # (B * D, C)
        ones = [1] * (x.ndim - 2)
        return self.block(x + place.view(len(place), *((-1, *ones) if self.channels_first else (*ones, -1))))


class ModalityAdapter(nn.Module):
    """M input channels to the three that the encoder takes: mean of the channels and a learned residual (METHODS 4.2).

    Starts as that mean; with three channels as the input itself. 8,867 parameters for one channel and two doublings.

    Args:
        channels: M.
        doublings: of the side, for inputs that come at their own resolution.
    """

    def __init__(self, channels: int, doublings: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1, bias=False), _norm(), nn.GELU()]
        for _ in range(doublings):
            layers += [nn.ConvTranspose2d(16, 16, 4, stride=2, padding=1, bias=False), _norm(), nn.GELU()]
        self.body, self.out = nn.Sequential(*layers), nn.Conv2d(16, 3, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``(B, M, H, W)`` normalised to ``(B, 3, H', W')``."""
        change = self.out(self.body(x))
        skip = x if x.shape[1] == 3 else x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        if skip.shape[-2:] != change.shape[-2:]:
            skip = F.interpolate(skip, change.shape[-2:], mode="bilinear", align_corners=False)
        return skip + change


def _norm() -> nn.Module:
    return nn.InstanceNorm2d(16, affine=True)


def modality(channels: int) -> Injector:
    """A :class:`ModalityAdapter` before the encoder's first layer."""
    return Injector(r"enc\.stem", lambda stem, _: nn.Sequential(ModalityAdapter(channels), stem))


def depth_fused(
    backbone: Any, kind: str, depth: int, mix: str = "inside", *, decoder: bool, encoder: bool
) -> list[Injector]:
    """Adapters of METHODS 4.2: two per encoder block and three per decoder layer.

    Args:
        backbone: to be adapted.
        kind: of the depth layer, one of :data:`KINDS`.
        depth: D.
        mix: where it stands in the adapter, one of :data:`MIXES`; ``none`` leaves it out.
        decoder: whether the decoder gets adapters.
        encoder: whether the encoder does.

    Raises:
        ConfigError: for a kind or place that does not exist.
    """
    if kind not in KINDS:
        raise ConfigError(f"depth: expected one of {list(KINDS)}, received {kind!r}.")
    if mix not in MIXES:
        raise ConfigError(f"mix: expected one of {list(MIXES)}, received {mix!r}.")

    def adapter(layer: str, owner: Any) -> DepthFusedAdapter:
        return DepthFusedAdapter(_width(backbone, layer), kind, depth, owner.volume, mix)

    found: list[Injector] = []
    if encoder:
        for name in (n for n in backbone.paths if re.fullmatch(r"enc\.block\[\d+\]", n)):
            found += [_behind(f"{name}.attn.proj", adapter), _beside(f"{name}.mlp", adapter)]
    if decoder:
        for name in (n for n in backbone.paths if re.fullmatch(r"dec\.layer\[\d+\]", n)):
            found += [_behind(f"{name}.self.out", adapter), _beside(f"{name}.mlp", adapter)]
            found.append(_behind(f"{name}.i2t.out", adapter))
    return found


Adapt = Callable[[str, Any], DepthFusedAdapter]


def _width(backbone: Any, name: str) -> int:
    """Channels that a layer gives."""
    layer = f"{name}.fc1" if name.endswith(".mlp") else name
    found = backbone.get_submodule(backbone.paths[layer])
    return found.in_features if name.endswith(".mlp") else found.out_features


def _beside(name: str, adapter: Adapt) -> Injector:
    return Injector(re.escape(name), lambda layer, owner: Beside(layer, adapter(name, owner)))


def _behind(name: str, adapter: Adapt) -> Injector:
    return Injector(re.escape(name), lambda layer, owner: Behind(layer, adapter(name, owner)))


def depth_placed(backbone: Any, depth: int) -> Injector:
    """The encoder's depth embedding; comes last, since it takes the place of a block that others are put into."""
    width = backbone.get_submodule(backbone.paths["enc.block[0].attn.qkv"]).in_features

    def before(block: nn.Module, owner: Any) -> nn.Module:
        return DepthPlaced(block, DepthEmbedding(width, depth), owner.block_channels_first, owner.volume)

    return Injector(r"enc\.block\[0\]", before)
