"""A backbone with a learned method on it: what is trained, saved, loaded and asked, for every method alike.

The backbone is a copy that shares its frozen tensors with the original, so that plain SAM stays what it was. Pairs are
``n = b * K + k``. Thread-safe in eval mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lib.config import MethodRow, from_mapping
from lib.contracts import Backbone, DecoderOut, Features, PromptSet, Proposal
from lib.decoder import decode
from lib.errors import ConfigError, WeightsError
from lib.nn.adapters import clone, inject, unshare
from lib.plugins import load as load_plugin
from lib.prompts.merge import merge

PRESETS = ("frozen", "adapters", "full")
METHOD, BACKBONE = "method.", "backbone."


@dataclass
class Answer:
    """Masks of N pairs.

    Args:
        masks: ``(N, 4h, 4w)`` logits of the mask token that the method reads.
        iou: ``(N,)`` predicted IoU in 0..1.
        obj: ``(N,)`` objectness logits; a pair below 0 is absent.
    """

    masks: Tensor
    iou: Tensor
    obj: Tensor


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
        self.preset, self.spec = preset, backbone.spec
        self.backbone: Any = clone(backbone)
        self.backbone.requires_grad_(False)  # a clone shares parameters, and they are frozen already
        self._trained = self._prepare(plugin, config)
        self.method: Any = plugin.build(config, backbone.spec)
        self.losses = plugin.losses

    def _prepare(self, plugin: Any, config: Any) -> list[str]:
        if self.preset == "full":
            names = [n for n, _ in self.backbone.named_parameters()]
            unshare(self.backbone, names)
        elif self.preset == "adapters":
            unshare(self.backbone, plugin.decoder_parameters(self.backbone))
            inject(self.backbone, plugin.injectors(config, self.backbone, decoder=True, encoder=True))
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

    def propose(self, features: Features) -> Proposal:
        """Learned prompts of all classes for B images."""
        return self.method.propose(features)

    def decode(
        self, features: Features, proposal: Optional[Proposal], user: PromptSet, image_index: Tensor
    ) -> tuple[DecoderOut, Answer]:
        """One decoder call with learned and user prompts together.

        Args:
            features: of B images.
            proposal: of the N pairs asked about, or None for the user's prompts alone.
            user: of the same pairs, or empty.
            image_index: ``(N,)`` whose image each pair looks at.
        """
        prompts = user if proposal is None else merge(proposal.prompts, user)
        hooks = None if proposal is None else proposal.hooks
        embedded = self.backbone.embed_prompts(prompts, len(image_index))
        out = decode(self.spec, self.backbone.mask_decoder, features, embedded, image_index=image_index, hooks=hooks)
        token = self.method.mask_token
        obj = out.masks.new_zeros(len(image_index)) if out.obj is None else out.obj[:, 0].float()
        return out, Answer(out.masks[:, token].float(), out.iou[:, token].float().clamp(0, 1), obj)

    def autonomous(self, features: Features) -> Answer:
        """Masks of all classes on B images, nobody clicks."""
        images = torch.arange(features.embed.shape[0], device=features.embed.device)
        index = images.repeat_interleave(self.classes)
        return self.decode(features, self.propose(features), PromptSet(), index)[1]


def rows(proposal: Proposal, pairs: Tensor) -> Proposal:
    """The proposal of some of its pairs, ``(n,)`` long."""
    hooks = proposal.hooks
    cut = {k: None if getattr(hooks, k) is None else getattr(hooks, k)[pairs] for k in ("token_shift", "extra_tokens")}
    boxes, masks = (None if t is None else t[pairs] for t in (proposal.boxes, proposal.masks))
    return Proposal(proposal.prompts.rows(pairs), type(hooks)(**cut, obj_head=hooks.obj_head), boxes, masks)


def combine(masks: Tensor, obj: Tensor) -> Tensor:
    """``(B, K, H, W)`` logits and ``(B, K)`` objectness to ``(B, H, W)`` uint8: 0 where no class is above 0, else the
    best class + 1; classes with objectness below 0 are left out (METHODS 1.2)."""
    gated = masks.masked_fill((obj < 0)[..., None, None], -torch.inf)
    best, label = gated.max(1)
    return torch.where(best > 0, label + 1, 0).to(torch.uint8)
