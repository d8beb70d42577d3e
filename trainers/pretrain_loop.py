"""The promptable training step of ``compact``: recipe, bank of images, prompts, rounds of clicks, weight average.

Torch, numpy, scipy and our own bare modules. Randomness is a function of (seed, step, worker), so a resumed run goes on
as if it had never stopped. Frames: masks on the mask-prompt grid ``G = 4h``, prompts in backbone pixels.
"""

from __future__ import annotations

import json
import logging
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lib.backbones.compact import Compact, build
from lib.config import BackboneRow, WeightsEntry
from lib.contracts import DecoderOut, Features, PromptSet
from lib.data.augment import augment, choose_objects, degrade, neighbour
from lib.data.synthetic import make_sample
from lib.decoder import decode
from lib.nn.losses import pair_loss
from lib.prompts.simulate import error_clicks, loosened, random_boxes, random_points

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, stored with the run.

    Args:
        backbone: the YAML row as a mapping (module, spec, size).
        synthetic: images in the generated bank.
        side: of the images in memory, in pixels.
        sides: input side S per phase.
        steps: optimiser steps per phase.
        connected: per phase, probability that an object is one connected part of its structure.
        batch: images per step, over all workers.
        workers: processes that share a batch; on CPUs one per core beats one with many threads.
        objects: pairs per image.
        silent: probabilities of 0, 1, 2 ... corrective clicks without gradient between the two rounds that learn.
        first: shares of first prompts: box, point, box and point, the neighbouring slice's mask and box, the same for
            an object that is not there.
        loose: share of boxes with every edge outside the object by up to half its side, as a box drawn for a whole
            volume is on most slices.
        lr: peak learning rate, linear warm-up then cosine over all phases.
        balance: share of all steps over which the cross entropy turns from class-balanced to plain.
        mix: probability of each source of images.
        seed: of bank, order and weights.
    """

    backbone: dict[str, Any]
    synthetic: int = 3000
    side: int = 256
    sides: tuple[int, ...] = (256,)
    steps: tuple[int, ...] = (6000,)
    connected: tuple[float, ...] = (0.85,)
    batch: int = 8
    workers: int = 1
    objects: int = 4
    silent: tuple[float, ...] = (0.5, 0.2, 0.1, 0.1, 0.05, 0.05)
    first: tuple[float, ...] = (0.4, 0.3, 0.08, 0.17, 0.05)
    loose: float = 0.15
    lr: float = 1e-3
    warmup: int = 300
    weight_decay: float = 0.05
    average: float = 0.998
    balance: float = 0.2
    mix: tuple[tuple[str, float], ...] = (
        ("synthetic", 0.5), ("hippocampus", 0.18), ("nuclei", 0.12), ("organs", 0.2),
    )  # fmt: skip
    seed: int = 7


def read_recipe(run: Path) -> Recipe:
    """The recipe stored with a run."""
    values = json.loads((run / "recipe.json").read_text())
    tuples = {k: tuple(map(tuple, v)) if k == "mix" else tuple(v) for k, v in values.items() if isinstance(v, list)}
    return Recipe(**{**values, **tuples})


Pair = tuple[np.ndarray, np.ndarray]


class Bank:
    """Training images in memory by source: ``(side, side[, 3])`` uint8 and label maps ``(side, side)`` uint8."""

    def __init__(self, run: Path, recipe: Recipe) -> None:
        self.recipe = recipe
        self.sources = {name: load_shard(run / f"{name}.npz", recipe.side) for name, _ in recipe.mix}
        if not self.sources.get("synthetic") and "synthetic" in self.sources:
            write_synthetic(run, recipe)
            self.sources["synthetic"] = load_shard(run / "synthetic.npz", recipe.side)
        self.names = [n for n, _ in recipe.mix if self.sources[n]]
        weights = np.array([p for n, p in recipe.mix if self.sources[n]])
        self.weights = weights / weights.sum()

    def draw(self, count: int, rng: np.random.Generator) -> Pair:
        """A batch: images ``(B, side, side, 3)`` and label maps ``(B, side, side)``, uint8."""
        pairs = []
        for name in rng.choice(self.names, count, p=self.weights):
            pairs.append(self.sources[name][int(rng.integers(len(self.sources[name])))])
        images = [i if i.ndim == 3 else np.repeat(i[..., None], 3, 2) for i, _ in pairs]
        return np.stack(images), np.stack([m for _, m in pairs])


def load_shard(path: Path, side: int) -> list[Pair]:
    """Images and label maps of a shard, squashed to ``side``; the empty list where there is none."""
    if not path.exists():
        return []
    with np.load(path) as shard:
        return [_square(shard[f"image_{n}"], shard[f"labels_{n}"], side) for n in range(len(shard.files) // 2)]


def save_shard(path: Path, pairs: list[Pair]) -> None:
    """Native sizes, compressed: shards travel to machines that have only torch."""
    named = {f"image_{n}": image for n, (image, _) in enumerate(pairs)}
    np.savez_compressed(path, **named, **{f"labels_{n}": labels for n, (_, labels) in enumerate(pairs)})


def write_synthetic(run: Path, recipe: Recipe) -> None:
    """The generated bank; grey images keep one channel."""
    logger.info("generating %d synthetic images", recipe.synthetic)
    seeds = range(recipe.seed * 1_000_000, recipe.seed * 1_000_000 + recipe.synthetic)
    with ProcessPoolExecutor(mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        pairs = list(pool.map(partial(make_sample, side=recipe.side), seeds, chunksize=16))
    grey = [(i[..., 0] if (i == i[..., :1]).all() else i, m) for i, m in pairs]
    save_shard(run / "synthetic.npz", grey)


def _square(image: np.ndarray, labels: np.ndarray, side: int) -> Pair:
    """Both squashed to ``side`` as the backbone's geometry does, labels nearest."""
    if image.shape[:2] == (side, side):
        return image, labels
    x = torch.from_numpy(np.ascontiguousarray(image, np.float32))
    x = (x if x.ndim == 3 else x[..., None]).permute(2, 0, 1)[None]
    x = F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False).clamp(0, 255)
    y = torch.from_numpy(np.ascontiguousarray(labels, np.float32))[None, None]
    y = F.interpolate(y, (side, side), mode="nearest-exact")[0, 0]
    pixels = x[0].permute(1, 2, 0).round().byte().numpy()
    return (pixels if pixels.shape[-1] == 3 else pixels[..., 0]), y.byte().numpy()


class Trainer:
    """Model, average, optimiser and counters of one worker; all workers hold the same after every step."""

    def __init__(self, recipe: Recipe, device: str, worker: int = 0) -> None:
        torch.manual_seed(recipe.seed)
        row = BackboneRow(name="compact", **{**recipe.backbone, "weights": WeightsEntry("compact.safetensors")})
        self.recipe, self.device, self.worker = recipe, device, worker
        self.model = build(row).to(device, memory_format=torch.channels_last).train()  # an eighth faster on CPUs
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.reseed()

    def reseed(self) -> None:
        """Random numbers of the coming step."""
        seeds = np.random.SeedSequence((self.recipe.seed, self.step, self.worker))
        self.rng = np.random.default_rng(seeds)
        self.torch_rng = torch.Generator().manual_seed(int(seeds.generate_state(1)[0]))
        shared = np.random.default_rng((self.recipe.seed, self.step))  # or the workers would wait for each other
        self.silent_clicks = int(shared.choice(len(self.recipe.silent), p=self.recipe.silent))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next leg needs: tensors by flat names, and plain values."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for number, entry in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{k}": torch.as_tensor(v) for k, v in entry.items()}
        return tensors, {"step": self.step, "history": self.history}

    def restore(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Continues where :meth:`state` was taken."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimiser": {}}
        for name, tensor in tensors.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.average = {k: v.to(self.device) for k, v in parts["average"].items()}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimiser"].items():
            number, key = name.split(".")
            moments.setdefault(int(number), {})[key] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.step, self.history = plain["step"], plain["history"]

    @property
    def total(self) -> int:
        """Steps of all phases."""
        return sum(self.recipe.steps)

    @property
    def phase(self) -> int:
        """Index into the recipe's ``sides``, ``steps`` and ``connected``."""
        ends = np.cumsum(self.recipe.steps)
        return min(int(np.searchsorted(ends, self.step, side="right")), len(ends) - 1)

    def learn(self, bank: Bank) -> dict[str, float]:
        """One optimiser step on a fresh batch."""
        self.reseed()
        self.set_side(self.recipe.sides[self.phase])
        x, masks, index = self.batch(bank)
        self.step += 1
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr()
        self.optimiser.zero_grad(set_to_none=True)
        with self.precision():
            features = self.model.encode(normalise(x, self.model))
        loss, report = self.rounds(features, masks, index)
        loss.backward()
        if self.recipe.workers > 1:
            share_gradients(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.follow()
        return report

    def precision(self) -> torch.autocast:
        """bfloat16 on GPUs; float32 on CPUs, where it was a third faster (without AMX)."""
        kind = self.device.split(":")[0]
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind != "cpu")

    def batch(self, bank: Bank) -> tuple[Tensor, Tensor, Tensor]:
        """This worker's share: ``x (B, 3, S, S)``, ``masks (N, S, S)`` and ``(N,)`` whose image each one is on."""
        while True:
            drawn = bank.draw(max(1, self.recipe.batch // self.recipe.workers), self.rng)
            images, labels = (torch.from_numpy(a).to(self.device) for a in drawn)
            images = images.permute(0, 3, 1, 2) / 255
            x, maps = augment(images, labels[:, None].float(), self.model.spec.input_size, self.torch_rng)
            masks, index = choose_objects(maps, self.recipe.objects, self.rng, self.recipe.connected[self.phase])
            if len(masks):
                return degrade(x, self.torch_rng), masks, index.to(self.device)

    def set_side(self, side: int) -> None:
        """Switches the input side; the architecture does not depend on it."""
        if self.model.spec.input_size != side:
            self.model.spec = replace(self.model.spec, input_size=side)
            self.model.prompt_encoder.spec = self.model.spec

    def lr(self) -> float:
        """Warm-up, then cosine to a hundredth."""
        if self.step < self.recipe.warmup:
            return self.recipe.lr * self.step / self.recipe.warmup
        done = (self.step - self.recipe.warmup) / max(1, self.total - self.recipe.warmup)
        return self.recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))

    def balance(self) -> float:
        """Share of the class-balanced cross entropy, falling to 0: it starts learning, and then it over-fills."""
        return max(0.0, 1 - self.step / max(1.0, self.recipe.balance * self.total))

    def follow(self) -> None:
        """Moves the weight average."""
        keep = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - keep)

    def rounds(self, features: Features, masks: Tensor, index: Tensor) -> tuple[Tensor, dict[str, float]]:
        """First prompts, some corrective clicks without gradient, then one more round that learns."""
        grid = self.model.spec.mask_size
        target = F.interpolate(masks[:, None], (grid, grid), mode="area")[:, 0]
        hard = target > 0.5
        hard = torch.where(hard.flatten(1).any(1)[:, None, None], hard, target > 0)
        prompts, present = self.first_prompts(hard)
        out = self.ask(features, prompts, index)
        first, dice0 = pair_loss(out, target, present, multimask=True, balance=self.balance())
        for _ in range(self.silent_clicks):
            prompts = self.correct(prompts, hard, fed_back(out, prompts))
            with torch.no_grad():
                out = self.ask(features, prompts, index)
        out = self.ask(features, self.correct(prompts, hard, fed_back(out, prompts)), index)
        last, dice1 = pair_loss(out, target, present, multimask=False, balance=self.balance())
        total = (first + last) / 2
        return total, {"loss": float(total.detach()), "dice_first": float(dice0), "dice_last": float(dice1)}

    def ask(self, features: Features, prompts: PromptSet, index: Tensor) -> DecoderOut:
        """One decoder call, in float32 afterwards."""
        model = self.model
        with self.precision():
            out = decode(model.spec, model.mask_decoder, features, model.embed_prompts(prompts), image_index=index)
        return DecoderOut(out.masks.float(), out.iou.float(), out.obj.float(), out.mask_tokens)  # type: ignore

    def first_prompts(self, hard: Tensor) -> tuple[PromptSet, Tensor]:
        """Box, point, both, or the neighbouring slice's mask and box; some of the latter for an absent object."""
        n, scale, rng = len(hard), self.model.spec.input_size / hard.shape[-1], self.torch_rng
        box, point, both, beside = np.cumsum(self.recipe.first)[:4].tolist()
        kind = torch.rand(n, generator=rng).to(hard.device)
        shifted = neighbour(hard, rng)
        absent = kind > beside
        shifted = torch.where(
            absent[:, None, None], shifted.roll((hard.shape[-1] // 2, hard.shape[-1] // 3), (1, 2)), shifted
        )
        absent &= ~(shifted & hard).flatten(1).any(1)
        with_mask = kind > both
        around = torch.where(with_mask[:, None, None] & shifted.flatten(1).any(1)[:, None, None], shifted, hard)
        boxes = loosened(random_boxes(around, scale, 0.1, rng), self.recipe.loose, rng)
        without_box = (kind > box) & (kind < point)
        if not self.model.spec.carry_box:  # then the neighbour's mask comes alone, as on a walk
            without_box |= with_mask & (torch.rand(n, generator=rng).to(hard.device) < 0.5)
        boxes = torch.where(without_box[:, None], torch.full_like(boxes, torch.nan), boxes)
        points = random_points(hard, scale, rng)[:, None]
        labels = torch.where((kind > box) & (kind <= both), 1, -1)[:, None]
        masks = torch.where(shifted, 6.0, -6.0)[:, None]
        return PromptSet(points, labels, boxes, masks, with_mask), ~absent

    def correct(self, prompts: PromptSet, hard: Tensor, previous: Tensor) -> PromptSet:
        """One click more per pair and the previous mask."""
        scale = self.model.spec.input_size / hard.shape[-1]
        xy, label = error_clicks(hard, previous > 0, scale, self.torch_rng)
        points = torch.cat([prompts.points_xy, xy], 1)  # type: ignore[list-item]
        labels = torch.cat([prompts.labels, label], 1)  # type: ignore[list-item]
        given = (torch.rand(len(hard), generator=self.torch_rng) < 0.9).to(hard.device)
        return PromptSet(points, labels, prompts.boxes_xy, previous[:, None], given)


def fed_back(out: DecoderOut, prompts: PromptSet) -> Tensor:
    """``(N, G, G)`` logits that the engine would feed back: best of three for a single click, else the single mask."""
    single = (prompts.labels >= 0).sum(1) == 1  # type: ignore[operator]
    single &= prompts.boxes_xy.isnan().any(1)  # type: ignore[union-attr]
    chosen = torch.where(single, 1 + out.iou[:, 1:].argmax(1), 0)
    return out.masks.detach()[torch.arange(len(chosen), device=chosen.device), chosen]


def share_gradients(model: Compact) -> None:
    """The mean of all workers' gradients, in one message."""
    with_gradient = list(model.parameters())
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in with_gradient])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, part in zip(with_gradient, flat.split([p.numel() for p in with_gradient])):
        p.grad = part.view_as(p).clone()


def normalise(x: Tensor, model: Compact) -> Tensor:
    """``(B, 3, S, S)`` in 0..1 to the backbone's input."""
    x = (x - x.new_tensor(model.spec.mean)[:, None, None]) / x.new_tensor(model.spec.std)[:, None, None]
    return x.contiguous(memory_format=torch.channels_last)
