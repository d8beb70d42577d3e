"""What a backbone offers and what travels between encoder, prompts and decoder (METHODS 1.1, 1.2).

Tensor frame: ``_xy`` are pixels of the backbone's square input of side ``S``; pixel centres lie at +0.5 (added inside
``embed_prompts``, so integers mean pixel indices). Nothing here depends on a SAM package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Optional, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lib.errors import ConfigError

_IMAGE = re.compile(r"image(\d+)")


@dataclass(frozen=True)
class BackboneSpec:
    """Facts of one backbone size; derived sizes are properties, never literals elsewhere.

    Args:
        name: key of the YAML row, e.g. ``sam2.1_tiny``.
        family: ``sam1`` or ``sam2``; decides nothing but documentation, the flags below decide.
        input_size: side S of the square input in pixels, a multiple of 16.
        geometry: ``pad_br`` (longest side to S, pad bottom and right), ``squash`` (both sides to S), or
            ``centre_pad_or_squash`` (SAM-Med2D: centre-pad images smaller than S, squash the others).
        interpolation: ``bilinear``, ``bicubic`` or ``nearest``, for the image only.
        mean: per channel, on the 0..1 scale, in the model's channel order.
        std: per channel, on the 0..1 scale.
        channel_order: ``rgb`` or ``bgr``.
        per_image_minmax: True rescales each slice to 0..1 before mean and std (MedSAM).
        prompt_width: E.
        has_high_res: stride-4 and stride-8 maps are added inside the mask upscaling (SAM 2).
        has_obj_score: the decoder carries an objectness token.
        iou_is_sigmoid: the IoU head ends in a sigmoid; otherwise clamp.
        iou_reads_masks: the IoU head also takes the mask logits.
        mask_prompt_domain: ``logit`` or ``prob``.
        box_tokens: 2, or 3 where a not-a-point token is appended to a box (SAM 2's predictor).
        carry_box: a mask carried to the next slice comes with its box, because stock decoders barely follow a mask
            alone; False where the model was trained to.
        box_is_ambiguous: a box alone is answered with the best of the three multimask tokens, as a single click is;
            stock SAM answers it with the single mask.
        pyramid: ``(name, stride, channels)`` of maps available as taps.
        feature_stride: S / h.
        channels: of the encoder's input: 3, or 2 or 4 where a modality adapter stands before it.
    """

    name: str
    family: str
    input_size: int
    geometry: str
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    channel_order: str = "rgb"
    per_image_minmax: bool = False
    prompt_width: int = 256
    has_high_res: bool = False
    has_obj_score: bool = False
    iou_is_sigmoid: bool = False
    iou_reads_masks: bool = False
    mask_prompt_domain: str = "logit"
    box_tokens: int = 2
    carry_box: bool = True
    box_is_ambiguous: bool = False
    pyramid: tuple[tuple[str, int, int], ...] = ()
    feature_stride: int = 16
    channels: int = 3

    @property
    def grid(self) -> int:
        """h = w, side of the embedding."""
        return self.input_size // self.feature_stride

    @property
    def mask_size(self) -> int:
        """4h, side of low-resolution masks and of mask prompts."""
        return 4 * self.grid

    def tap_shape(self, name: str) -> tuple[int, int, int]:
        """``(C, H, W)`` of a tap: a map of the pyramid, or the normalised input at another side (:func:`image_tap`).

        Raises:
            ConfigError: for a name that is neither.
        """
        picture = _IMAGE.fullmatch(name)
        if picture:
            return self.channels, int(picture[1]), int(picture[1])
        found = {tap: (channels, self.input_size // stride) for tap, stride, channels in self.pyramid}
        if name not in found:
            raise ConfigError(f"{self.name}: expected taps out of {list(found)} or image<side>, received {name!r}.")
        channels, side = found[name]
        return channels, side, side


def image_tap(side: int) -> str:
    """Name of the tap that holds the encoder's input, resized to ``side`` pixels: for methods that look at pixels."""
    return f"image{side}"


def is_image_tap(name: str) -> bool:
    """Whether a tap is the input rather than a map of the encoder."""
    return _IMAGE.fullmatch(name) is not None


@dataclass
class Features:
    """Encoder output for B images.

    Args:
        embed: ``(B, E, h, w)``.
        pe: ``(1, E, h, w)`` positional encoding of the grid.
        high_res: None, or ``s0 (B, E/8, 4h, 4w)`` and ``s1 (B, E/4, 2h, 2w)``.
        taps: named intermediate maps, or the input itself, NCHW; empty unless asked for.
        depth: D, how many images in a row are consecutive slices of one volume; B is a multiple of it.
    """

    embed: Tensor
    pe: Tensor
    high_res: Optional[tuple[Tensor, Tensor]] = None
    taps: dict[str, Tensor] = field(default_factory=dict)
    depth: int = 1

    def to(self, *args: object) -> Features:
        """All tensors moved or cast as ``Tensor.to`` does."""
        high = None if self.high_res is None else tuple(t.to(*args) for t in self.high_res)  # type: ignore[call-overload]
        taps = {k: v.to(*args) for k, v in self.taps.items()}  # type: ignore[call-overload]
        return replace(self, embed=self.embed.to(*args), pe=self.pe.to(*args), high_res=high, taps=taps)  # type: ignore

    def halved(self) -> Features:
        """Half precision on the CPU, for keeping; not ``pe``, which is the same for all images."""
        return replace(self.to("cpu", torch.float16), pe=self.pe)

    def nbytes(self) -> int:
        """Size in memory without ``pe``."""
        tensors = (self.embed, *(self.high_res or ()), *self.taps.values())
        return sum(t.numel() * t.element_size() for t in tensors)

    def row(self, n: int) -> Features:
        """One image of the batch."""
        high = None if self.high_res is None else tuple(t[n : n + 1] for t in self.high_res)
        taps = {name: t[n : n + 1] for name, t in self.taps.items()}
        return Features(self.embed[n : n + 1], self.pe, high, taps)  # type: ignore[arg-type]

    @staticmethod
    def joined(parts: Sequence[Features]) -> Features:
        """Several batches of equal depth as one."""
        first = parts[0]
        if len(parts) == 1:
            return first
        high = None
        if first.high_res is not None:
            high = tuple(torch.cat([p.high_res[n] for p in parts]) for n in (0, 1))  # type: ignore[index]
        taps = {name: torch.cat([p.taps[name] for p in parts]) for name in first.taps}
        embed = torch.cat([p.embed for p in parts])
        return Features(embed, first.pe, high, taps, first.depth)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PromptSet:
    """Prompts of N pairs in backbone input pixels; every part may be None.

    Args:
        points_xy: ``(N, P, 2)`` float.
        labels: ``(N, P)`` int: 1 positive, 0 negative, -1 not a point (padding of ragged sets).
        boxes_xy: ``(N, 4)`` or ``(N, M, 4)`` float, x0 y0 x1 y1. A row of NaN means that this pair has no such box; its
            two corner tokens become not-a-point tokens. Where a model draws boxes, the last one that is given counts.
        masks: ``(N, 1, 4h, 4w)`` previous mask as *logits* (the backbone converts to its own domain).
        mask_given: ``(N,)`` bool, which pairs have a mask; None means all. The others get ``no_mask_embed``.
        tokens: ``(N, F, E)`` free tokens, appended as they are.
        dense: ``(N, E, h, w)`` replaces the dense map where no mask is given.
    """

    points_xy: Optional[Tensor] = None
    labels: Optional[Tensor] = None
    boxes_xy: Optional[Tensor] = None
    masks: Optional[Tensor] = None
    mask_given: Optional[Tensor] = None
    tokens: Optional[Tensor] = None
    dense: Optional[Tensor] = None

    @property
    def pairs(self) -> Optional[int]:
        """N, or None where nothing is given."""
        parts = (self.points_xy, self.boxes_xy, self.masks, self.tokens, self.dense)
        return next((p.shape[0] for p in parts if p is not None), None)

    def rows(self, pairs: Tensor) -> PromptSet:
        """The prompts of some of the pairs, ``(n,)`` long or ``(N,)`` bool."""
        return replace(self, **{k: v[pairs] for k, v in vars(self).items() if v is not None})


@dataclass
class Hooks:
    """Where a method reaches into the decoder; empty means stock SAM.

    Args:
        token_shift: ``(N, 4, E)`` added to the mask tokens before the transformer (METHODS 6.1).
        extra_tokens: ``(N, F, E)`` appended after the prompts and returned after the transformer.
        obj_head: maps the post-transformer IoU token ``(N, E)`` to an objectness logit ``(N, 1)`` where the decoder has
            no objectness of its own.
        place: ``(N, E, 1, 1)`` added to the image's positional encoding, such as which slice a pair is on.
    """

    token_shift: Optional[Tensor] = None
    extra_tokens: Optional[Tensor] = None
    obj_head: Optional[Callable[[Tensor], Tensor]] = None
    place: Optional[Tensor] = None


@dataclass
class DecoderOut:
    """Decoder output for N pairs; all four candidates, the caller reads the one its method names.

    Args:
        masks: ``(N, 4, 4h, 4w)`` logits; index 0 is the single-mask token, 1 to 3 the multimask tokens.
        iou: ``(N, 4)`` predicted IoU in the head's own domain.
        obj: ``(N, 1)`` objectness logit, or None.
        mask_tokens: ``(N, 4, E)`` after the transformer.
        extra_tokens: ``(N, F, E)`` after the transformer, or None.
    """

    masks: Tensor
    iou: Tensor
    obj: Optional[Tensor]
    mask_tokens: Tensor
    extra_tokens: Optional[Tensor] = None


@runtime_checkable
class Backbone(Protocol):
    """A SAM family behind one face. Implementations are ``nn.Module``s in eval mode, stateless between calls.

    Attributes:
        spec: the facts.
        mask_decoder: module with SAM's attribute names (``transformer``, ``iou_token``, ``mask_tokens``,
            ``output_upscaling``, ``output_hypernetworks_mlps``, ``iou_prediction_head`` and, where the spec says so,
            ``obj_score_token`` and ``pred_obj_score_head``), driven by :func:`lib.decoder.decode`.
        paths: canonical names of METHODS 1.4 (``enc.block[0]``, ``dec.layer[0].self.q`` ...) to module paths.
        weights_id: hex digest of the loaded tensors, or ``random-<seed>``.
    """

    spec: BackboneSpec
    mask_decoder: nn.Module
    paths: dict[str, str]
    weights_id: str

    def encode(self, x: Tensor, taps: tuple[str, ...] = ()) -> Features:
        """``x (B, 3, S, S)`` float32, already transformed and normalised, to features."""
        ...

    def grid_encoding(self) -> Tensor:
        """``(1, E, h, w)``: the ``pe`` of every :class:`Features` of this backbone."""
        ...

    def embed_prompts(self, prompts: PromptSet, pairs: Optional[int] = None) -> tuple[Tensor, Tensor]:
        """``(sparse (N, T, E), dense (N, E, h, w))``, always batched to N; ``pairs`` gives N for an empty set."""
        ...


@dataclass
class Proposal:
    """What a method proposes for ``N = B * K`` pairs, image by image, classes inside (pair ``n = b * K + k``).

    Args:
        prompts: learned prompts.
        hooks: where the method reaches into the decoder.
        boxes: ``(N, 4)`` predicted boxes x0 y0 x1 y1 in 0..1, or None; for the loss and for pictures.
        masks: ``(N, 1, 4h, 4w)`` interim mask logits, or None.
        obj: ``(N, 1)`` objectness logits that the method reads from the image; they replace the decoder's.
        final: True makes ``masks`` the answer where the user adds nothing, for methods that segment without SAM.
        yields: True lets a user's point or box take the place of the learned one of that kind, pair by pair.
        levels: ``(B, ...)`` maps that the method's own losses read, of all images whatever pairs are asked about.
        refine: maps decoder masks ``(N, 4h, 4w)``, the prompts they answer and the image of each pair to final masks;
            classes, or slices, may look at each other where all pairs of the images are there.
    """

    prompts: PromptSet
    hooks: Hooks = field(default_factory=Hooks)
    boxes: Optional[Tensor] = None
    masks: Optional[Tensor] = None
    obj: Optional[Tensor] = None
    final: bool = False
    yields: bool = False
    levels: Optional[tuple[Tensor, ...]] = None
    refine: Optional[Callable[[Tensor, PromptSet, Tensor], Tensor]] = None


@runtime_checkable
class Method(Protocol):
    """A learned prompter. Implementations are ``nn.Module``s that hold what is trained beside the backbone.

    A method that starts from something of the backbone's defines ``adopt(backbone)``, called once after it is built.
    One that sees neighbouring slices together has ``slices``, their number; its masks are log-odds against background.
    One whose prompts are useless at first has ``warm_up``, the share of training in which only its own losses count.
    One with ``picks = True`` also takes ``propose(features, classes)``, ``(B,)`` one class per image.

    Attributes:
        classes: K.
        taps: maps of the encoder that :meth:`propose` needs.
        mask_token: which of the decoder's four masks is read; None reads, per pair, the one of tokens 1 to 3 whose
            predicted IoU is largest.
    """

    classes: int
    taps: tuple[str, ...]
    mask_token: Optional[int]

    def propose(self, features: Features) -> Proposal:
        """Prompts of all classes for B images."""
        ...


def no_grad_eval(module: nn.Module) -> nn.Module:
    """Frozen means eval, no gradient: returns the module so."""
    module.eval()
    for p in module.parameters():
        p.requires_grad_(False)
    return module


def autocast_off(x: Tensor) -> torch.autocast:
    """A context that keeps coordinate arithmetic in float32 whatever precision surrounds it."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)  # meta knows no autocast
