"""Networks that look at an encoder's maps and say where points go (METHODS 6.2); torch only.

Every network starts with its points on their anchors, whatever the image. Frame: 0..1 of the backbone's input, x right,
y down. No state between calls; ``ResNetPoints`` and ``CrossPoints`` keep batch statistics while they are trained.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.contracts import BackboneSpec, Features, autocast_off

MAPS = 3  # of the encoder, the deepest ones: blocks 6, 9 and 12 of ViT-B
RESNET_34 = ((64, 3), (128, 4), (256, 6), (512, 3))
SPOT = 0.1  # sigma of the spots that light points start as, in sides of the image


def anchor_grid(count: int) -> Tensor:
    """``(count, 2)`` cells of a grid with a cell in the middle, nearest to it first."""
    side = math.ceil(math.sqrt(count)) // 2 * 2 + 1
    cells = [((i + 0.5) / side, (j + 0.5) / side) for i in range(side) for j in range(side)]
    cells.sort(key=lambda cell: math.dist(cell, (0.5, 0.5)))
    return torch.tensor(cells[:count])


def zeroed(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """The layer, giving zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResNetPoints(nn.Module):
    """APM-ResNet: the maps side by side, three convolutions, ResNet-34 with a stride-1 stem, one linear layer."""

    def __init__(self, anchors: Tensor, spec: BackboneSpec) -> None:
        super().__init__()
        self.names, self.grid = [name for name, _, _ in spec.pyramid[-MAPS:]], spec.grid
        width = spec.prompt_width
        self.fuse = nn.Sequential(
            nn.Conv2d(sum(c for _, _, c in spec.pyramid[-MAPS:]), width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip
        self.stem = nn.Sequential(_conv_norm(width, RESNET_34[0][0]), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = _resnet_34()
        self.head = zeroed(nn.Linear(RESNET_34[-1][0], anchors.numel()))
        self.anchors: Tensor
        self.register_buffer("anchors", anchors.logit(), persistent=False)

    def forward(self, features: Features) -> Tensor:
        """``(B, K * P, 2)`` points."""
        maps = [_resized(features.taps[name], self.grid) for name in self.names]
        seen = self.blocks(self.stem(self.fuse(torch.cat(maps[::-1], 1)))).mean((2, 3))
        return (self.head(seen).view(-1, *self.anchors.shape) + self.anchors).float().sigmoid()


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where ``project`` says so."""

    def __init__(self, inside: int, outside: int, stride: int, *, project: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv_norm(inside, outside, stride=stride), _conv_norm(outside, outside)
        self.shortcut = _conv_norm(inside, outside, 1, stride) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class LoneNorm(nn.BatchNorm2d):
    """Batch norm that falls back on its running statistics for a single value per channel, which torch refuses."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


def _resnet_34() -> nn.Sequential:
    blocks, before = [], RESNET_34[0][0]
    for stage, (width, count) in enumerate(RESNET_34):
        for number in range(count):
            stride = 2 if stage and not number else 1
            last = stage == len(RESNET_34) - 1 and number == count - 1  # projected too, as in released weights
            blocks.append(ResidualBlock(before, width, stride, project=before != width or last))
            before = width
    return nn.Sequential(*blocks)


def _conv_norm(inside: int, outside: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, kernel, stride, padding=kernel // 2, bias=False), LoneNorm(outside))


class CrossPoints(nn.Module):
    """APM-cross: one query per point visits the maps, deepest first; each shallower one is doubled once more.

    Needs 192 MB per image for the largest keys with ViT-B at 1024 px.
    """

    def __init__(self, anchors: Tensor, spec: BackboneSpec) -> None:
        super().__init__()
        maps = spec.pyramid[: -MAPS - 1 : -1]
        self.names, self.grid, width = [name for name, _, _ in maps], spec.grid, maps[0][2]
        self.project = nn.ModuleList(nn.Identity() if c == width else nn.Conv2d(c, width, 1) for _, _, c in maps)
        self.finer = nn.ModuleList(nn.Sequential(*(_doubled(width) for _ in range(n))) for n in range(len(maps)))
        self.levels = nn.Parameter(torch.randn(len(maps), width))
        self.queries = nn.Parameter(torch.randn(len(anchors), width))
        self.queries_place = nn.Parameter(torch.randn(len(anchors), width))
        self.layers = nn.ModuleList(CrossLayer(width) for _ in maps)
        self.head = zeroed(nn.Linear(width, 2))
        self.anchors: Tensor
        self.register_buffer("anchors", anchors.logit(), persistent=False)

    def forward(self, features: Features) -> Tensor:
        """``(B, K * P, 2)`` points."""
        x = self.queries.expand(features.embed.shape[0], -1, -1)
        for level, layer in enumerate(self.layers):
            image = self.project[level](features.taps[self.names[level]])
            image = self.finer[level](_resized(image, self.grid))
            values = image.flatten(2).transpose(1, 2) + self.levels[level]  # (B, cells, C)
            keys = values + _sine_2d(image.shape[-1], image.shape[1], image)
            x = layer(x, x + self.queries_place, keys, values)
        return (self.head(x) + self.anchors).float().sigmoid()


class CrossLayer(nn.Module):
    """Cross-attention and MLP, each with a residual and a norm after it; queries do not look at each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        heads = max(1, width // 64)
        self.attention = nn.MultiheadAttention(width, heads if width % heads == 0 else 1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, asked: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``x`` and ``asked`` ``(B, K * P, C)``, ``keys`` and ``values`` ``(B, cells, C)``."""
        x = self.norm1(x + self.attention(asked, keys, values, need_weights=False)[0])
        return self.norm2(x + self.mlp(x))


def _doubled(width: int) -> nn.Sequential:
    """Twice the side, less the two cells that the unpadded convolution eats."""
    return nn.Sequential(
        nn.ConvTranspose2d(width, width, 2, stride=2), nn.Conv2d(width, width, 3), LoneNorm(width), nn.ReLU()
    )


def _sine_2d(side: int, width: int, like: Tensor) -> Tensor:
    """``(cells, width)`` sines and cosines of row and column, temperature 10,000; ``width`` is a multiple of 4."""
    rate = 10_000 ** -(torch.arange(width // 4, device=like.device) * 4 / width)
    angle = (torch.arange(side, device=like.device) + 0.5)[:, None] / side * 2 * math.pi * rate
    wave = torch.cat([angle.sin(), angle.cos()], 1)  # (side, C/2)
    both = torch.cat([wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)], -1)
    return both.flatten(0, 1).to(like.dtype)


class LightPoints(nn.Module):
    """One heat map per point on the embedding; a point is the mean of its map, which starts as a spot on its anchor."""

    def __init__(self, anchors: Tensor, spec: BackboneSpec) -> None:
        super().__init__()
        inner = spec.prompt_width // 2
        groups = math.gcd(8, inner)
        self.body = nn.Sequential(
            nn.Conv2d(spec.prompt_width, inner, 3, padding=1), nn.GroupNorm(groups, inner), nn.GELU(),
            nn.Conv2d(inner, inner, 3, padding=1), nn.GroupNorm(groups, inner), nn.GELU(),
        )  # fmt: skip
        self.head = zeroed(nn.Conv2d(inner, len(anchors), 1))
        centres = (torch.arange(spec.grid) + 0.5) / spec.grid
        cells = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).flatten(0, 1)  # (hw, 2)
        far = (anchors[:, None] - cells).square().sum(-1)  # (K * P, hw)
        self.cells: Tensor
        self.spots: Tensor
        self.register_buffer("cells", cells, persistent=False)
        self.register_buffer("spots", -far / (2 * SPOT**2), persistent=False)

    def forward(self, features: Features) -> Tensor:
        """``(B, K * P, 2)`` points."""
        heat = self.head(self.body(features.embed)).flatten(2)
        with autocast_off(heat):  # half precision would move a point by pixels
            return (heat.float() + self.spots).softmax(-1) @ self.cells


def _resized(x: Tensor, side: int) -> Tensor:
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
