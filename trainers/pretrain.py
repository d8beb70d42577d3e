"""Promptable pretraining of ``compact`` in resumable legs, on torch, numpy, scipy and our own ``lib`` alone.

    python -m trainers.pretrain convert --data-dir DIR --run runs/compact      # shared data and recipe -> npz, json
    python -m trainers.pretrain train --run runs/compact --minutes 9           # one leg; repeat until it says done
    python -m trainers.pretrain export --run runs/compact                      # fp16 safetensors into lib/weights

One bare loop instead of MONAI's engines, the one stated exception: it must run on machines that have only torch. Every
leg continues from the state of the last one: weights, average, optimiser, step and random state.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.backbones.compact import Compact, build
from lib.config import BackboneRow, WeightsEntry
from lib.contracts import DecoderOut, PromptSet
from lib.data.augment import augment, choose_objects, neighbour
from lib.data.synthetic import make_sample
from lib.decoder import decode
from lib.nn.losses import pair_loss
from lib.prompts.simulate import error_clicks, random_boxes, random_points

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, stored with the run.

    Args:
        backbone: the YAML row as a mapping (module, spec, size, weights).
        synthetic: images in the generated bank; side of every training image in pixels.
        sides: input side S per phase.
        steps: optimiser steps per phase.
        batch: images per step.
        objects: pairs per image.
        rounds: decoder calls per pair, per phase.
        first: shares of first prompts: box, point, box and point, the neighbouring slice's mask and box, the same for
            an object that is not there.
        lr: peak learning rate, linear warm-up then cosine over all phases.
        mix: probability of each source of images.
        seed: of bank, order and weights.
    """

    backbone: dict[str, Any]
    synthetic: int = 3000
    side: int = 256
    sides: tuple[int, ...] = (256, 512)
    steps: tuple[int, ...] = (5000, 1000)
    batch: int = 8
    objects: int = 4
    rounds: tuple[int, ...] = (2, 3)
    first: tuple[float, ...] = (0.35, 0.35, 0.08, 0.17, 0.05)
    lr: float = 1e-3
    warmup: int = 300
    weight_decay: float = 0.05
    average: float = 0.998
    mix: tuple[tuple[str, float], ...] = (
        ("synthetic", 0.5), ("hippocampus", 0.2), ("nuclei", 0.15), ("organs", 0.15),
    )  # fmt: skip
    seed: int = 7


class Bank:
    """Training images in memory by source: ``(n, side, side, 3)`` uint8 and label maps ``(n, side, side)`` uint8."""

    def __init__(self, run: Path, recipe: Recipe) -> None:
        self.recipe = recipe
        self.sources = {"synthetic": _synthetic(run, recipe)}
        for name, _ in recipe.mix:
            path = run / f"{name}.npz"
            if name != "synthetic" and path.exists():
                with np.load(path) as shard:
                    self.sources[name] = (shard["images"], shard["labels"])
        self.names = [n for n, _ in recipe.mix if n in self.sources]
        weights = np.array([p for n, p in recipe.mix if n in self.sources])
        self.weights = weights / weights.sum()

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A batch: images ``(B, side, side, 3)`` and label maps ``(B, side, side)``, uint8."""
        images, labels = [], []
        for name in rng.choice(self.names, self.recipe.batch, p=self.weights):
            bank, maps = self.sources[name]
            k = int(rng.integers(len(bank)))
            images.append(bank[k] if bank[k].ndim == 3 else np.repeat(bank[k][..., None], 3, 2))
            labels.append(maps[k])
        return np.stack(images), np.stack(labels)


def _synthetic(run: Path, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    path = run / "synthetic.npz"
    if not path.exists():
        logger.info("generating %d synthetic images", recipe.synthetic)
        pairs = [make_sample(recipe.seed * 1_000_000 + i, recipe.side) for i in range(recipe.synthetic)]
        np.savez(path, images=np.stack([p[0] for p in pairs]), labels=np.stack([p[1] for p in pairs]))
    with np.load(path) as shard:
        return shard["images"], shard["labels"]


class Trainer:
    """Model, average, optimiser and counters of one run."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        torch.manual_seed(recipe.seed)
        row = BackboneRow(name="compact", **{**recipe.backbone, "weights": WeightsEntry("compact.safetensors")})
        self.recipe, self.device = recipe, device
        self.model = build(row).to(device, memory_format=torch.channels_last).train()  # an eighth faster on CPUs
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
        self.step = 0
        self.rng = np.random.default_rng(recipe.seed)
        self.torch_rng = torch.Generator().manual_seed(recipe.seed)
        self.history: list[dict[str, float]] = []

    def state(self) -> dict[str, Any]:
        """Everything that the next leg needs."""
        return {
            "model": self.model.state_dict(), "average": self.average, "optimiser": self.optimiser.state_dict(),
            "step": self.step, "rng": self.rng.bit_generator.state, "torch_rng": self.torch_rng.get_state(),
            "history": self.history,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where :meth:`state` was taken."""
        self.model.load_state_dict(state["model"])
        self.average = {k: v.to(self.device) for k, v in state["average"].items()}
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.history = state["step"], state["history"]
        self.rng.bit_generator.state = state["rng"]
        self.torch_rng.set_state(state["torch_rng"])

    @property
    def total(self) -> int:
        """Steps of all phases."""
        return sum(self.recipe.steps)

    @property
    def phase(self) -> int:
        """Index into the recipe's ``sides``, ``steps`` and ``rounds``."""
        ends = np.cumsum(self.recipe.steps)
        return min(int(np.searchsorted(ends, self.step, side="right")), len(ends) - 1)

    def learn(self, bank: Bank) -> Optional[dict[str, float]]:
        """One optimiser step on a fresh batch; None where the batch held no object."""
        side = self.recipe.sides[self.phase]
        self.set_side(side)
        images, labels = (torch.from_numpy(a).to(self.device) for a in bank.draw(self.rng))
        x, maps = augment(images.permute(0, 3, 1, 2) / 255, labels[:, None].float(), side, self.torch_rng)
        masks, index = choose_objects(maps, self.recipe.objects, self.rng)
        self.step += 1
        if not len(masks):
            return None
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16):
            features = self.model.encode(normalise(x, self.model))
        loss, report = self.rounds(features, masks, index.to(self.device), self.recipe.rounds[self.phase])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.follow()
        return report

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

    def follow(self) -> None:
        """Moves the weight average."""
        keep = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - keep)

    def rounds(self, features: Any, masks: Tensor, index: Tensor, count: int) -> tuple[Tensor, dict[str, float]]:
        """First prompts, then corrective clicks with the previous mask fed back."""
        spec, grid = self.model.spec, self.model.spec.mask_size
        target = F.interpolate(masks[:, None], (grid, grid), mode="area")[:, 0]
        hard = target > 0.5
        hard = torch.where(hard.flatten(1).any(1)[:, None, None], hard, target > 0)
        prompts, present = self.first_prompts(hard)
        total, report = target.new_zeros(()), {}
        for r in range(count):
            with torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16):
                out = decode(
                    spec, self.model.mask_decoder, features, self.model.embed_prompts(prompts), image_index=index
                )
            out = DecoderOut(out.masks.float(), out.iou.float(), out.obj.float(), out.mask_tokens)  # type: ignore
            loss, dice, best = pair_loss(out, target, present, multimask=r == 0)
            total = total + loss
            report[f"dice{r}"] = float(dice)
            previous = out.masks.detach()[torch.arange(len(best)), best if r == 0 else torch.zeros_like(best)]
            prompts = self.correct(prompts, hard, previous)
        report["loss"] = float(total.detach())
        return total / count, report

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
        boxes = random_boxes(around, scale, 0.1, rng)
        boxes = torch.where(((kind > box) & (kind < point))[:, None], torch.full_like(boxes, torch.nan), boxes)
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


def normalise(x: Tensor, model: Compact) -> Tensor:
    """``(B, 3, S, S)`` in 0..1 to the backbone's input."""
    x = (x - x.new_tensor(model.spec.mean)[:, None, None]) / x.new_tensor(model.spec.std)[:, None, None]
    return x.contiguous(memory_format=torch.channels_last)


def train_leg(run: Path, minutes: float, device: str) -> bool:
    """Trains until the time or the recipe is over; True when the recipe is done."""
    recipe = read_recipe(run)
    torch.backends.cuda.matmul.allow_tf32 = True
    trainer, bank = Trainer(recipe, device), Bank(run, recipe)
    state = run / "state.pt"
    if state.exists():
        trainer.restore(torch.load(state, map_location="cpu", weights_only=True))  # random states live on the CPU
    started, logged, window = time.monotonic(), time.monotonic(), []
    while trainer.step < trainer.total and time.monotonic() - started < minutes * 60:
        report = trainer.learn(bank)
        window += [report] if report else []
        if trainer.step % 100 == 0 and window:
            mean = {k: round(float(np.mean([w[k] for w in window])), 4) for k in window[0]}
            speed = 100 * recipe.batch / (time.monotonic() - logged)
            logger.info(
                "step %d/%d side %d %s %.1f images/s",
                trainer.step,
                trainer.total,
                trainer.model.spec.input_size,
                mean,
                speed,
            )
            trainer.history.append({"step": trainer.step, **mean})
            logged, window = time.monotonic(), []
        if trainer.step % 100 == 0:
            save(trainer, state)
    save(trainer, state)
    return trainer.step >= trainer.total


def save(trainer: Trainer, path: Path) -> None:
    """Writes the state beside its place, then moves it, so that a killed leg loses nothing."""
    partial = path.with_suffix(".part")
    torch.save(trainer.state(), partial)
    partial.replace(path)


def read_recipe(run: Path) -> Recipe:
    """The recipe stored with a run."""
    values = json.loads((run / "recipe.json").read_text())
    tuples = {k: tuple(map(tuple, v)) if k == "mix" else tuple(v) for k, v in values.items() if isinstance(v, list)}
    return Recipe(**{**values, **tuples})


def export(run: Path, target: Path, manifest: Path) -> str:
    """Averaged weights as float16 safetensors; their SHA-256 is returned and written into the backbone's YAML row."""
    from safetensors.torch import save_file

    state = torch.load(run / "state.pt", map_location="cpu", weights_only=True)
    tensors = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in state["average"].items()}
    save_file(tensors, target, metadata={"step": str(state["step"])})
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    row = re.sub(r"bytes: \d+", f"bytes: {target.stat().st_size}", manifest.read_text())
    manifest.write_text(re.sub(r"sha256: \w+", f"sha256: {digest}", row))
    return digest


def main(arguments: Optional[list[str]] = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("convert", "train", "export"))
    parser.add_argument("--run", type=Path, default=Path("runs/compact"))
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--recipe", type=Path, default=None, help="YAML; default: configs/pretrain.yaml of the app")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    if options.action == "convert":
        from trainers.pretrain_data import convert  # reads NIfTI and YAML, which the training machine need not have

        convert(options.data_dir, options.recipe, options.run)
    elif options.action == "train":
        done = train_leg(options.run, options.minutes, options.device)
        logger.info("done" if done else "leg over, run again to continue")
    else:
        root = Path(__file__).resolve().parents[1]
        row = root / "apps/autosam_label/configs/backbones/compact.yaml"
        logger.info("sha256 %s", export(options.run, root / "lib/weights/compact.safetensors", row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
