"""A backbone with a learned method on it: what is trained, saved, loaded and asked, for every method alike.

The backbone is a copy that shares its frozen tensors with the original, so that plain SAM stays what it was. Pairs are
``n = b * K + k``. Thread-safe in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lib.config import MethodRow, from_mapping
from lib.contracts import Backbone, DecoderOut, Features, PromptSet, Proposal
from lib.decoder import MAX_PAIRS, decode
from lib.errors import ConfigError, WeightsError
from lib.nn.adapters import clone, decoder_parameters, inject, standard, unshare
from lib.nn.depth import modality
from lib.plugins import load as load_plugin
from lib.prompts.merge import merge

PRESETS = ("frozen", "adapters", "full")
METHOD, BACKBONE = "method.", "backbone."
SMALL_GRID = 32  # cells along a side of the embedding, up to which a decoder call is cheap beside the rest of a step


@dataclass
class Answer:
    """Masks of N pairs.

    Args:
        masks: ``(N, 4h, 4w)`` logits of the mask token that the method reads.
        iou: ``(N,)`` predicted IoU in 0..1.
        obj: ``(N,)`` objectness logits; a pair below 0 is absent.
        points: ``(N, P, 3)`` x, y in backbone pixels and label (1, 0, -1 for none) of the points that the method
            proposed, or None where it proposes none.
    """

    masks: Tensor
    iou: Tensor
    obj: Tensor
    points: Optional[Tensor] = None


class Learned(nn.Module):
    """Backbone copy and method.

    Args:
        row: of the method.
        backbone: loaded and frozen; it is not changed.
        classes: K.
        preset: ``frozen`` trains the method alone, ``adapters`` also decoder and encoder adapters and the decoder's
            last layers, ``full`` everything.
    """

    def __init__(self, row: MethodRow, backbone: Backbone, classes: int, preset: str) -> None:
        super().__init__()
        if preset not in PRESETS:
            raise ConfigError(f"preset: expected one of {list(PRESETS)}, received {preset!r}.")
        plugin = load_plugin("methods", row.module)
        config = from_mapping(plugin.Config, {**row.options, "classes": classes}, f"methods/{row.name}.options")
        self.preset = preset
        self.spec = replace(backbone.spec, channels=taken_channels(config, preset))
        self.backbone: Any = clone(backbone)
        self.backbone.spec = self.spec
        self.backbone.requires_grad_(False)  # a clone shares parameters, and they are frozen already
        self._trained = self._prepare(plugin, config)
        self.method: Any = plugin.build(config, self.spec)
        if hasattr(self.method, "adopt"):
            self.method.adopt(self.backbone)
        self.slices: int = getattr(self.method, "slices", 1)
        self.warm_up: float = getattr(self.method, "warm_up", 0.0)
        self.progress = 1.0  # share of its training that is done
        self.losses = plugin.losses
        self.rounds: Optional[Callable[..., Iterator[dict[str, Tensor]]]] = getattr(plugin, "rounds", None)

    def _prepare(self, plugin: Any, config: Any) -> list[str]:
        if self.preset == "full":
            names = [n for n, _ in self.backbone.named_parameters()]
            unshare(self.backbone, names)
            if self.spec.channels != 3:
                inject(self.backbone, [modality(self.spec.channels)])
        elif self.preset == "adapters":
            unshare(self.backbone, getattr(plugin, "decoder_parameters", decoder_parameters)(self.backbone))
            own = getattr(plugin, "injectors", None)
            parts = {"decoder": True, "encoder": True}
            found = standard(self.backbone, **parts) if own is None else own(config, self.backbone, **parts)
            inject(self.backbone, found)
        return [n for n, p in self.backbone.named_parameters() if p.requires_grad]

    @property
    def classes(self) -> int:
        """K."""
        return self.method.classes

    @property
    def changes_encoder(self) -> bool:
        """Whether embeddings differ from the plain backbone's, so that its cached ones cannot be used."""
        prefix = self.backbone.paths["enc"] + "."
        return any(n.startswith(prefix) for n in self._trained)

    def train(self, mode: bool = True) -> Learned:
        """Frozen parts stay in eval mode."""
        super().train(mode)
        if self.preset != "full":
            self.backbone.eval()
        return self

    def groups(self, lr: float, backbone_lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups: method and backbone at their own rates; no decay on queries, norms and biases."""
        found = []
        for part, rate in ((self.method, lr), (self.backbone, backbone_lr)):
            named = [(n, p) for n, p in part.named_parameters() if p.requires_grad]
            plain = [p for n, p in named if p.ndim <= 1 or "queries" in n]
            ids = {id(p) for p in plain}
            found.append(
                {"params": [p for _, p in named if id(p) not in ids], "lr": rate, "weight_decay": weight_decay}
            )
            found.append({"params": plain, "lr": rate, "weight_decay": 0.0})
        return [g for g in found if g["params"]]

    def trained(self) -> dict[str, Tensor]:
        """All that a version stores, on the CPU; the method's buffers included."""
        tensors = {METHOD + n: t for n, t in self.method.state_dict().items()}
        own = dict(self.backbone.named_parameters())
        tensors |= {BACKBONE + n: own[n] for n in self._trained}
        return {n: t.detach().cpu().contiguous() for n, t in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`trained` gave.

        Raises:
            WeightsError: if keys or shapes differ.
        """
        expected = {n: t.shape for n, t in self.trained().items()}
        wrong = sorted(
            n for n in expected.keys() | tensors.keys() if expected.get(n) != getattr(tensors.get(n), "shape", None)
        )
        if wrong:
            raise WeightsError(
                f"The trained tensors do not fit the preset {self.preset} on {self.spec.name}; "
                f"{len(wrong)} differ, such as {wrong[:3]}. Train a new version for this backbone."
            )
        self.method.load_state_dict({n[len(METHOD) :]: t for n, t in tensors.items() if n.startswith(METHOD)})
        own = dict(self.backbone.named_parameters())
        with torch.no_grad():
            for name in self._trained:
                own[name].copy_(tensors[BACKBONE + name])

    def encode(self, x: Tensor, depth: int = 1) -> Features:
        """Features with the taps that the method reads; ``depth`` images in a row are slices of one volume."""
        with self.backbone.volume.spanning(depth, len(x)):
            return replace(self.backbone.encode(x, self.method.taps), depth=depth)

    @property
    def draws(self) -> bool:
        """Whether training asks about one class per slice and step: frozen, a large decoder, a method that can."""
        picks = getattr(self.method, "picks", False)
        return picks and self.preset == "frozen" and self.spec.grid > SMALL_GRID

    def propose(self, features: Features, classes: Optional[Tensor] = None) -> Proposal:
        """Learned prompts of all classes for B images, or of ``(B,)`` one class each, for a method that picks."""
        return self.method.propose(features) if classes is None else self.method.propose(features, classes)

    def decode(
        self, features: Features, proposal: Optional[Proposal], user: PromptSet, image_index: Tensor,
        *, train_prompts: bool = True,
    ) -> tuple[DecoderOut, Answer]:  # fmt: skip
        """One decoder call with learned and user prompts together.

        Args:
            features: of B images.
            proposal: of the N pairs asked about, or None for the user's prompts alone.
            user: of the same pairs, or empty.
            image_index: ``(N,)`` whose image each pair looks at.
            train_prompts: False keeps gradients out of the prompt encoder and of what it embeds.
        """
        prompts = user if proposal is None else merge(proposal.prompts, user, yields=proposal.yields)
        hooks = None if proposal is None else proposal.hooks
        with torch.set_grad_enabled(train_prompts and torch.is_grad_enabled()):
            embedded = self.backbone.embed_prompts(prompts, len(image_index))
        depth = features.depth if torch.equal(image_index, self._every_pair(features)) else 1
        with self.backbone.volume.spanning(depth, features.embed.shape[0]):
            out = decode(
                self.spec, self.backbone.mask_decoder, features, embedded, image_index=image_index, hooks=hooks,
                max_pairs=MAX_PAIRS if depth == 1 else len(image_index),  # a volume's slices stay in one chunk
            )  # fmt: skip
        masks, iou = read_token(out, self.method.mask_token)
        said = out.obj if proposal is None or proposal.obj is None else proposal.obj
        obj = out.masks.new_zeros(len(image_index)) if said is None else said[:, 0].float()
        if proposal is not None and proposal.final and proposal.masks is not None and user.pairs is None:
            masks = proposal.masks[:, 0]
        if proposal is not None and proposal.refine is not None:
            masks = proposal.refine(masks, prompts, image_index)
        return out, Answer(masks.float(), iou.float().clamp(0, 1), obj)

    def autonomous(self, features: Features) -> Answer:
        """Masks of all classes on B images, nobody clicks."""
        proposal = self.propose(features)
        answer = self.decode(features, proposal, PromptSet(), self._every_pair(features))[1]
        return replace(answer, points=_points(proposal.prompts))

    def corrected(self, features: Features, proposal: Optional[Proposal], user: PromptSet, pairs: Tensor) -> Answer:
        """Masks of some pairs with the user's prompts on them.

        Args:
            features: of B images.
            proposal: of all their pairs, or None for the user's prompts alone.
            user: of the pairs asked about, without tokens and dense maps.
            pairs: ``(n,)`` their numbers.
        """
        every = self._every_pair(features)
        together = self.slices > 1 if proposal is None else proposal.refine is not None
        if not together:
            cut = None if proposal is None else rows(proposal, pairs)
            return self.decode(features, cut, user, every[pairs])[1]
        # pairs look at each other, or slices do
        answer = self.decode(features, proposal, spread(user, pairs, len(every)), every)[1]
        return Answer(answer.masks[pairs], answer.iou[pairs], answer.obj[pairs])

    def _every_pair(self, features: Features) -> Tensor:
        """``(N,)`` image of every pair."""
        images = torch.arange(features.embed.shape[0], device=features.embed.device)
        return images.repeat_interleave(self.classes)


def taken_channels(config: Any, preset: str) -> int:
    """Input channels of the encoder: those of the method's ``Config`` where it has such a field, else three, of which
    :class:`lib.transform.SliceTransform` makes what an image has. A frozen encoder takes three.

    Raises:
        ConfigError: for another number than 2, 3 or 4.
    """
    channels = getattr(config, "channels", 3)
    if channels not in (2, 3, 4):
        raise ConfigError(f"channels: expected 2, 3 (also for grey) or 4, received {channels!r}.")
    return 3 if preset == "frozen" else channels


def fitted(row: MethodRow, channels: int) -> MethodRow:
    """The method with as many input channels as the images have, where it can have them and its YAML does not say."""
    known = {field.name for field in fields(load_plugin("methods", row.module).Config)}
    if "channels" not in known or "channels" in row.options or channels not in (2, 4):
        return row  # one channel and three go the same way into every encoder
    return replace(row, options={**row.options, "channels": channels})


def _points(prompts: PromptSet) -> Optional[Tensor]:
    if prompts.points_xy is None or prompts.labels is None:
        return None
    return torch.cat([prompts.points_xy, prompts.labels[..., None]], 2).float()


def read_token(out: DecoderOut, token: Optional[int]) -> tuple[Tensor, Tensor]:
    """``(masks (N, 4h, 4w), predicted IoU (N,))`` of one mask token, see :class:`lib.contracts.Method`."""
    if token is not None:
        return out.masks[:, token], out.iou[:, token]
    best = 1 + out.iou[:, 1:].argmax(1)
    pairs = torch.arange(len(best), device=best.device)
    return out.masks[pairs, best], out.iou[pairs, best]


def rows(proposal: Proposal, pairs: Tensor) -> Proposal:
    """The proposal of some of its pairs, ``(n,)`` long."""
    hooks = proposal.hooks
    parts = ("token_shift", "extra_tokens", "place")
    cut = {k: None if getattr(hooks, k) is None else getattr(hooks, k)[pairs] for k in parts}
    boxes, masks, obj = (None if t is None else t[pairs] for t in (proposal.boxes, proposal.masks, proposal.obj))
    hooks = type(hooks)(**cut, obj_head=hooks.obj_head)
    prompts = proposal.prompts.rows(pairs)
    return replace(proposal, prompts=prompts, hooks=hooks, boxes=boxes, masks=masks, obj=obj)


def spread(user: PromptSet, pairs: Tensor, total: int) -> PromptSet:
    """The prompts of some pairs as those of ``total`` pairs, of which the others have none."""

    def placed(part: Optional[Tensor], empty: float) -> Optional[Tensor]:
        if part is None:
            return None
        found = part.new_full((total, *part.shape[1:]), empty)
        found[pairs] = part
        return found

    given = torch.ones_like(pairs, dtype=torch.bool) if user.mask_given is None else user.mask_given
    return PromptSet(
        points_xy=placed(user.points_xy, 0.0),
        labels=placed(user.labels, -1),
        boxes_xy=placed(user.boxes_xy, torch.nan),
        masks=placed(user.masks, 0.0),
        mask_given=None if user.masks is None else placed(given, False),
    )


def combine(masks: Tensor, obj: Tensor) -> Tensor:
    """``(B, K, H, W)`` logits and ``(B, K)`` objectness to ``(B, H, W)`` uint8: 0 where no class is above 0, else the
    best class + 1; classes with objectness below 0 are left out (METHODS 1.2)."""
    gated = masks.masked_fill((obj < 0)[..., None, None], -torch.inf)
    best, label = gated.max(1)
    return torch.where(best > 0, label + 1, 0).to(torch.uint8)
