"""Trainable parts that are put around frozen layers, placed by canonical path (METHODS 1.4, 3.2, 5.2).

Every injected part is the identity at step 0, because its last layer starts at zero, and a test says so for each.
Only torch.
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
from lib.nn.volume import VolumeContext


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


class ParallelAdapter(nn.Module):
    """SAM-Med2D's adapter: channel gate, then a spatial pass, residual and norm (METHODS 5.2); NHWC in and out.

    Not identity with random weights; 15,042,048 parameters at C = 768. Its key layout is the released one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channel, self.spatial = _channel_gate(width), _spatial_pass(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, h, w, C)`` to the same shape."""
        return self.norm(x + _gated_spatial(x, self.channel, self.spatial))


class LightParallelAdapter(nn.Module):
    """The same gate and spatial pass at a reduced width between two 1x1 projections; its output scale starts at zero.

    383,232 parameters at C = 768 and width 96, a fortieth of :class:`ParallelAdapter`.
    """

    def __init__(self, channels: int, width: int = 96) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, width, bias=False), nn.Linear(width, channels, bias=False)
        self.channel, self.spatial = _channel_gate(width), _spatial_pass(width)
        self.scale = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, h, w, C)`` to the same shape."""
        x = self.down(x)
        return self.scale * self.up(x + _gated_spatial(x, self.channel, self.spatial))


def _channel_gate(width: int) -> nn.Sequential:
    hidden = width // 4
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False), nn.Sigmoid()
    )


def _spatial_pass(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False),
        nn.ReLU(),
    )


def _gated_spatial(x: Tensor, channel: nn.Module, spatial: nn.Module) -> Tensor:
    gate = channel(x.mean((1, 2)))[:, None, None]  # (B, 1, 1, C)
    height, width = x.shape[1:3]
    found = spatial((gate * x).permute(0, 3, 1, 2))[..., :height, :width]  # an odd side comes back one cell longer
    return found.permute(0, 2, 3, 1)


class BesideMlp(nn.Module):
    """``mlp(x) + adapter(x)`` on what the block's MLP takes in (METHODS 5.1); NHWC, or ``(B, hw, C)`` of a square."""

    def __init__(self, mlp: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.mlp, self.adapter = mlp, adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + on_grid(self.adapter, x)


def on_grid(module: nn.Module, x: Tensor) -> Tensor:
    """An NHWC module on tokens that may have been flattened from a square."""
    if x.ndim == 4:
        return module(x)
    side = math.isqrt(x.shape[1])
    return module(x.unflatten(1, (side, side))).flatten(1, 2)


Wrap = Callable[[Any, Any], nn.Module]
# of a decoder, trained as a whole beside LoRA (METHODS 3.2)
DECODER_PARTS = (
    "mask_tokens",
    "output_upscaling",
    "output_hypernetworks_mlps",
    "obj_score_token",
    "pred_obj_score_head",
)


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


def _matching(pattern: str, backbone: Any) -> list[str]:
    names = [n for n in backbone.paths if re.fullmatch(pattern, n)]
    if not names:
        raise ValueError(f"{backbone.spec.name} has no layer {pattern!r}.")
    return names


def bottleneck(pattern: str, backbone: Any, width: int = 64) -> list[Injector]:
    """A bottleneck before every encoder block that matches; a block's width is what its attention takes in.

    Raises:
        ValueError: for a pattern that matches nothing.
    """

    def around(name: str) -> Wrap:
        channels = backbone.get_submodule(backbone.paths[f"{name}.attn.qkv"]).in_features
        return lambda block, owner: BottleneckBefore(block, channels, width, owner.block_channels_first)

    return [Injector(re.escape(name), around(name)) for name in _matching(pattern, backbone)]


def standard(
    backbone: Any, *, decoder: bool, encoder: bool, rank: int = 0, width: int = 64, last_blocks: int = 0
) -> list[Injector]:
    """Sam2Rad's adapters, also those of methods that name none: LoRA on q and v of every decoder attention, bottlenecks
    before encoder blocks (METHODS 3.2).

    Args:
        backbone: to be adapted.
        decoder: whether the decoder is.
        encoder: whether the encoder is.
        rank: of LoRA; 0 takes 8 for decoders with high-resolution maps, else 32.
        width: of the bottlenecks.
        last_blocks: of the encoder get one; 0 means all.
    """
    found: list[Injector] = []
    if decoder:
        rank = rank or (8 if backbone.spec.has_high_res else 32)
        found.append(lora(r"dec\.(layer\[\d+\]\.(self|t2i|i2t)|final)\.[qv]", rank))
    if encoder:
        blocks = sorted({int(n.split("[")[1].split("]")[0]) for n in backbone.paths if n.startswith("enc.block[")})
        chosen = "|".join(str(i) for i in (blocks[-last_blocks:] if last_blocks else blocks))
        found += bottleneck(rf"enc\.block\[({chosen})\]", backbone, width)
    return found


def decoder_parameters(backbone: Any) -> list[str]:
    """Names of the decoder's parameters that are trained as they are beside :func:`standard` adapters."""
    prefix = backbone.paths["dec"] + "."
    names = [n for n, _ in backbone.named_parameters() if n.startswith(prefix)]
    return [n for n in names if n[len(prefix) :].split(".")[0] in DECODER_PARTS]


def parallel(pattern: str, backbone: Any, *, wide: bool = False) -> list[Injector]:
    """SAM-Med2D's adapter beside the MLP of every encoder block that matches; ``wide`` takes the released layout.

    Raises:
        ValueError: for a pattern that matches nothing.
    """

    def beside(name: str) -> Wrap:
        channels = backbone.get_submodule(backbone.paths[f"{name}.mlp.fc1"]).in_features
        return lambda mlp, _: BesideMlp(mlp, _silent(channels) if wide else LightParallelAdapter(channels))

    return [Injector(re.escape(f"{name}.mlp"), beside(name)) for name in _matching(pattern, backbone)]


def _silent(channels: int) -> ParallelAdapter:
    """The released layout with its last layer at zero, so that it starts as the identity like every other part."""
    adapter = ParallelAdapter(channels)
    for layer in (adapter.spatial[0], adapter.spatial[2]):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
    nn.init.zeros_(adapter.norm.weight)
    return adapter


def clone(backbone: Backbone) -> Any:
    """A copy with modules of its own and shared tensors, so that a copy of a large encoder costs nothing.

    Its ``volume`` tells parts that see neighbouring slices which ones these are.
    """
    shared = [*backbone.parameters(), *backbone.buffers()]  # type: ignore[attr-defined]
    found: Any = copy.deepcopy(backbone, {id(t): t for t in shared})
    found.volume = VolumeContext()
    return found


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
