"""MobileSAM: TinyViT encoder under the official key layout, with SAM 1's prompt encoder and decoder (METHODS 1.3).

The package is not on PyPI, and timm's TinyViT names its parts otherwise and keeps attention biases in a cache that goes
stale when weights change; hence own modules. Blocks are NHWC in and out, unlike the original's flattened tokens, so
that one injector serves all families; ``attn`` sees windows ``(B*windows, n, C)``. Any input side that is a multiple of
16 works. Thread-safe in eval mode: no state. Left out: the ImageNet classifier.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.backbones._common import SamBackbone, decoder_paths, encoder_paths
from lib.backbones.sam import mask_decoder, neck, prompt_encoder
from lib.config import BackboneRow, from_mapping
from lib.contracts import BackboneSpec, Features, no_grad_eval

STEM_STRIDE = 4


@dataclass(frozen=True)
class TinyVitSize:
    """Numbers of one TinyViT, one entry per stage.

    Args:
        embed_dims: channels of the four stages.
        depths: blocks per stage; the first stage is convolutional.
        num_heads: attention heads; the first entry is unused.
        windows: attention window side in tokens; the first entry is unused.
        strides: of the three mergings between stages.
    """

    embed_dims: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    num_heads: tuple[int, int, int, int]
    windows: tuple[int, int, int, int]
    strides: tuple[int, int, int]


def build(row: BackboneRow) -> MobileSam:
    """The backbone of one YAML row with random weights, frozen; works under ``torch.device("meta")``.

    Raises:
        ConfigError: if the row has an unknown or missing key.
    """
    size = from_mapping(TinyVitSize, row.size, f"{row.name}.size")
    spec = from_mapping(BackboneSpec, {"name": row.name, **row.spec}, f"{row.name}.spec")
    backbone = MobileSam(replace(spec, pyramid=_pyramid(size)), size)
    no_grad_eval(backbone)
    return backbone


def _pyramid(size: TinyVitSize) -> tuple[tuple[str, int, int], ...]:
    stride, maps = STEM_STRIDE, [("patch_embed", STEM_STRIDE, size.embed_dims[0])]
    for i in range(len(size.depths)):
        last = i == len(size.strides)
        stride *= 1 if last else size.strides[i]
        maps.append((f"stage{i}", stride, size.embed_dims[i if last else i + 1]))
    return tuple(maps)


class MobileSam(SamBackbone):
    """TinyViT encoder, prompt encoder and mask decoder behind :class:`lib.contracts.Backbone`."""

    def __init__(self, spec: BackboneSpec, size: TinyVitSize) -> None:
        blocks = [f"image_encoder.layers.{s}.blocks.{i}" for s in (1, 2, 3) for i in range(size.depths[s])]
        paths = encoder_paths(blocks, "mlp.fc1", "mlp.fc2") | {"enc.stem": "image_encoder.patch_embed"}
        paths |= decoder_paths("mask_decoder", "mlp.lin1", "mlp.lin2")
        super().__init__(spec, paths)
        self.image_encoder = TinyVit(size, spec.prompt_width)
        self.prompt_encoder = prompt_encoder(spec)
        self.mask_decoder = mask_decoder(spec)

    def encode_maps(self, x: Tensor, taps: tuple[str, ...]) -> Features:
        """Image to embedding.

        Args:
            x: ``(B, 3, S, S)`` float32, normalised.
            taps: out of ``patch_embed`` and ``stage0`` to ``stage3``; a stage ends after its merging.
        """
        encoder = self.image_encoder
        maps = {"patch_embed": encoder.patch_embed(x)}
        last = maps["patch_embed"]
        for i, layer in enumerate(encoder.layers):
            last = layer(last)
            maps[f"stage{i}"] = last
        return Features(encoder.neck(last), self.grid_encoding(), None, {name: maps[name] for name in taps})


class TinyVit(nn.Module):
    """Holder of the encoder's parts; maps between parts are NCHW."""

    def __init__(self, size: TinyVitSize, width: int) -> None:
        super().__init__()
        dims = size.embed_dims
        self.patch_embed = PatchEmbed(dims[0])
        merges = [PatchMerging(dims[i], dims[i + 1], size.strides[i]) for i in range(3)]
        stages = [AttentionStage(dims[i], size.depths[i], size.num_heads[i], size.windows[i]) for i in (1, 2, 3)]
        self.layers = nn.ModuleList([ConvStage(dims[0], size.depths[0]), *stages])
        for layer, merge in zip(self.layers, merges):
            layer.downsample = merge
        self.neck = neck(dims[3], width)


class FrozenStatistics(nn.BatchNorm2d):
    """Batch norm that keeps its statistics whatever mode surrounds it: they drift under ``.train()`` (METHODS 1.4)."""

    def train(self, mode: bool = True) -> FrozenStatistics:
        """Stays in eval mode."""
        super().train(False)
        return self


class ConvNorm(nn.Sequential):
    """Convolution ``c`` and batch norm ``bn``."""

    def __init__(self, inside: int, outside: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = FrozenStatistics(outside)


class PatchEmbed(nn.Module):
    """``(B, 3, S, S)`` to ``(B, C, S/4, S/4)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(ConvNorm(3, width // 2, 3, 2), nn.GELU(), ConvNorm(width // 2, width, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Two strided convolutions."""
        return self.seq(x)


class PatchMerging(nn.Module):
    """Changes channels, and resolution where the stride is 2."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inside, outside)
        self.conv2 = ConvNorm(outside, outside, 3, stride, groups=outside)
        self.conv3 = ConvNorm(outside, outside)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C', H/stride, W/stride)``."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class MBConv(nn.Module):
    """Inverted bottleneck with expansion 4, residual before the last activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 4 * width
        self.conv1 = ConvNorm(width, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class ConvStage(nn.Module):
    """Convolutional blocks, then the merging."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MBConv(width) for _ in range(depth))
        self.downsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C', H', W')``."""
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class AttentionStage(nn.Module):
    """Window attention blocks, then the merging where there is one."""

    def __init__(self, width: int, depth: int, heads: int, window: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TinyVitBlock(width, heads, window) for _ in range(depth))
        self.downsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C', H', W')``."""
        tokens = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.downsample(tokens.permute(0, 3, 1, 2))


class TinyVitBlock(nn.Module):
    """Window attention, depthwise convolution, MLP; NHWC in and out."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(width, heads, window)
        self.local_conv = ConvNorm(width, width, 3, groups=width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to the same shape."""
        x = x + self._attend(x)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(x)

    def _attend(self, x: Tensor) -> Tensor:
        (b, height, width, c), side = x.shape, self.window
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))  # zeros take part in attention, as in training
        rows, columns = x.shape[1] // side, x.shape[2] // side
        windows = x.view(b, rows, side, columns, side, c).transpose(2, 3)  # (B, rows, columns, side, side, C)
        seen = self.attn(windows.reshape(-1, side * side, c)).view(b, rows, columns, side, side, c)
        return seen.transpose(2, 3).reshape(b, rows * side, columns * side, c)[:, :height, :width]


class WindowAttention(nn.Module):
    """Multi-head attention with a learned bias per absolute offset; q, k and v of one head lie side by side."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))

    def forward(self, x: Tensor) -> Tensor:
        """``(windows, n, C)`` to the same shape, n = window side squared."""
        m, n, c = x.shape
        qkv = self.qkv(self.norm(x)).view(m, n, self.heads, 3, c // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)  # each (windows, heads, n, C/heads)
        bias = self.attention_biases[:, self._offsets()]
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(seen.transpose(1, 2).reshape(m, n, c))

    def _offsets(self) -> Tensor:
        side = torch.arange(self.window, device=self.attention_biases.device)
        apart = (side[:, None] - side).abs()  # (window, window)
        index = apart[:, None, :, None] * self.window + apart[None, :, None, :]  # row offset, then column offset
        return index.reshape(self.window**2, self.window**2)


class Mlp(nn.Module):
    """Norm and a two-layer perceptron with expansion 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape ending in C."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))
