"""Small trainable parts that are put around frozen layers, placed by canonical path (METHODS 1.4, 3.2).

Every part is the identity at step 0, because its last layer starts at zero, and a test says so for each. Only torch.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lib.contracts import Backbone


class LoraLinear(nn.Module):
    """``base(x) + B(A(x))``: low-rank update of a frozen linear layer (Hu et al. 2021); B starts at zero."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.down.T) @ self.up.T


class BottleneckBefore(nn.Module):
    """A block behind a residual bottleneck on its input: C to r, GELU, r to C, GELU (METHODS 3.2)."""

    def __init__(self, block: nn.Module, channels: int, width: int, channels_first: bool) -> None:
        super().__init__()
        self.block, self.channels_first = block, channels_first
        self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        last = x.permute(0, 2, 3, 1) if self.channels_first else x
        change = nn.functional.gelu(self.up(nn.functional.gelu(self.down(last))))
        return self.block(x + (change.permute(0, 3, 1, 2) if self.channels_first else change))


Wrap = Callable[[Any, Any], nn.Module]


@dataclass(frozen=True)
class Injector:
    """Which layers get which part.

    Args:
        pattern: regular expression over canonical paths, matched whole.
        wrap: ``(layer, backbone) -> layer`` around it.
    """

    pattern: str
    wrap: Wrap


def lora(pattern: str, rank: int) -> Injector:
    """LoRA on every linear layer that matches."""
    return Injector(pattern, lambda layer, _: LoraLinear(layer, rank))


def bottleneck(pattern: str, backbone: Any, width: int = 64) -> list[Injector]:
    """A bottleneck before every encoder block that matches; a block's width is what its attention takes in.

    Raises:
        ValueError: for a pattern that matches nothing.
    """
    names = [n for n in backbone.paths if re.fullmatch(pattern, n)]
    if not names:
        raise ValueError(f"{backbone.spec.name} has no layer {pattern!r}.")

    def around(name: str) -> Wrap:
        channels = backbone.get_submodule(backbone.paths[f"{name}.attn.qkv"]).in_features
        return lambda block, owner: BottleneckBefore(block, channels, width, owner.block_channels_first)

    return [Injector(re.escape(name), around(name)) for name in names]


def clone(backbone: Backbone) -> Any:
    """A copy with modules of its own and shared tensors, so that a copy of a large encoder costs nothing."""
    shared = [*backbone.parameters(), *backbone.buffers()]  # type: ignore[attr-defined]
    return copy.deepcopy(backbone, {id(t): t for t in shared})


def inject(backbone: Any, injectors: Iterable[Injector]) -> list[str]:
    """Wraps the matching layers of a :func:`clone` in place.

    Returns:
        Names of the added parameters.

    Raises:
        ValueError: for a pattern that matches nothing.
    """
    before = {id(p) for p in backbone.parameters()}
    for injector in injectors:
        places = [path for name, path in backbone.paths.items() if re.fullmatch(injector.pattern, name)]
        if not places:
            raise ValueError(f"{backbone.spec.name} has no layer {injector.pattern!r}.")
        for path in places:
            parent, _, child = path.rpartition(".")
            setattr(backbone.get_submodule(parent), child, injector.wrap(backbone.get_submodule(path), backbone))
    return [name for name, p in backbone.named_parameters() if id(p) not in before]


def unshare(backbone: Any, names: Iterable[str]) -> None:
    """Gives a :func:`clone` its own trainable copies of some parameters."""
    for name in names:
        parent, _, child = name.rpartition(".")
        module = backbone.get_submodule(parent)
        setattr(module, child, nn.Parameter(getattr(module, child).detach().clone()))
