"""HarDNet-85 down to stride 16, by its published description (Chao et al. 2019; sizes in METHODS 2.2); torch only.

Layer ``k`` of a block reads the outputs of layers ``k - 2**n`` for every power of two that divides ``k``, and is wider
the more it reads. The stage at stride 32 is left out: AutoSAM's decoder does not use it. NCHW; random weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEM = (48, 96)
GROWTH, WIDER = (24, 24, 28, 36, 48), 1.7
LAYERS, WIDTHS = (8, 16, 16, 16, 16), (192, 256, 320, 480, 720)
STRIDES = (4, 8, 8, 16, 16)
CHANNELS = {4: 192, 8: 320, 16: 720}  # of the last map at each stride


class HarDNet(nn.Module):
    """Features at strides 4, 8 and 16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, STEM[0], 3, 2), _conv(STEM[0], STEM[1], 3), nn.MaxPool2d(3, 2, 1))
        stages, width = [], STEM[1]
        for growth, layers, out in zip(GROWTH, LAYERS, WIDTHS):
            block = Block(width, growth, layers)
            stages.append(nn.Sequential(block, _conv(block.channels, out, 1)))
            width = out
        self.stages = nn.ModuleList(stages)
        self.halve = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, 3, I, I)`` to ``(B, 192, I/4, I/4)``, ``(B, 320, I/8, I/8)`` and ``(B, 720, I/16, I/16)``."""
        x, before, found = self.stem(x), STRIDES[0], {}
        for stage, stride in zip(self.stages, STRIDES):
            x = stage(self.halve(x) if stride != before else x)
            found[stride] = x
            before = stride
        return found[4], found[8], found[16]


class Block(nn.Module):
    """Harmonic dense block; gives its odd layers and its last one."""

    def __init__(self, width: int, growth: int, layers: int) -> None:
        super().__init__()
        widths = [width]
        self.layers, self.links = nn.ModuleList(), []
        for k in range(1, layers + 1):
            links = [k - 2**n for n in range(k.bit_length()) if k % 2**n == 0]
            grown = int(int(growth * WIDER ** (len(links) - 1)) + 1) // 2 * 2  # even
            self.layers.append(_conv(sum(widths[i] for i in links), grown, 3))
            self.links.append(links)
            widths.append(grown)
        self.shown = [k for k in range(1, layers + 1) if k % 2 or k == layers]
        self.channels = sum(widths[k] for k in self.shown)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, channels, H, W)``."""
        maps = [x]
        for layer, links in zip(self.layers, self.links):
            maps.append(layer(torch.cat([maps[i] for i in links], 1)))
        return torch.cat([maps[k] for k in self.shown], 1)


def _conv(inside: int, outside: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outside), nn.ReLU6()
    )
