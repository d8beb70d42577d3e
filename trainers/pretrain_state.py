"""What a leg of pretraining leaves for the next one: sharded state and the learning curves as a picture.

Torch, numpy and Pillow only. The state is a folder of shards of at most 15 MB, because small files travel where large
ones do not; it appears under its name only when complete, and the one before is removed after that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

SHARD_BYTES = 15_000_000
ENTRY_BYTES = 1_000  # torch.save's own per tensor, 300 measured; uncounted it took a shard 69 kB over the limit
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


def save_state(run: Path, step: int, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> Path:
    """Writes ``run/state-STEP`` and removes older ones; a state of this very step is kept, since the step decides all.

    Args:
        run: folder of the run.
        step: number in the folder's name.
        tensors: by flat names.
        plain: what JSON can hold.
    """
    folder = run / f"state-{step}"
    if not folder.exists():  # to replace it would leave a moment without any state
        _write(run / "state.part", tensors, plain).rename(folder)
    for other in run.glob("state-*"):
        if other != folder:
            shutil.rmtree(other)
    return folder


def _write(folder: Path, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, names in enumerate(_shards(tensors)):
        torch.save({n: tensors[n].detach().cpu().clone() for n in names}, folder / f"shard-{number}.pt")
    (folder / "state.json").write_text(json.dumps(plain))
    return folder


def load_state(run: Path) -> Optional[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Tensors on the CPU and plain values of the newest complete state, or None before the first."""
    folders = sorted(run.glob("state-*"), key=lambda p: int(p.name.split("-")[1]))
    if not folders:
        return None
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folders[-1].glob("shard-*.pt")):
        tensors |= torch.load(shard, map_location="cpu", weights_only=True)
    return tensors, json.loads((folders[-1] / "state.json").read_text())


def _shards(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        amount = tensor.numel() * tensor.element_size() + ENTRY_BYTES
        if size + amount > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += amount
    return shards


def draw_curves(history: Sequence[Mapping[str, float]], path: Path, size: tuple[int, int] = (900, 420)) -> None:
    """A PNG of every logged number over the step, each scaled to its own range, which the legend names."""
    from PIL import Image, ImageDraw

    width, height = size
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((40, 20, width - 20, height - 60), outline="black")
    names = [k for k in (history[-1] if history else {}) if k != "step"]
    last = max((h["step"] for h in history), default=1)
    for number, name in enumerate(names):
        known = [(h["step"], h[name]) for h in history if name in h]
        low, high = min(v for _, v in known), max(v for _, v in known)
        colour = COLOURS[number % len(COLOURS)]
        line = [
            (40 + (width - 60) * s / last, height - 60 - (height - 80) * (v - low) / ((high - low) or 1.0))
            for s, v in known
        ]
        if len(line) > 1:
            draw.line(line, fill=colour, width=2)
        place = (44 + (number % 3) * (width - 60) // 3, height - 52 + 18 * (number // 3))
        draw.text(place, f"{name}: {low:.3f} to {high:.3f}, last {known[-1][1]:.3f}", fill=colour)
    draw.text((width // 2 - 40, 4), f"{last} steps", fill="black")
    picture.save(path)
