"""Promptable pretraining of ``compact`` in resumable legs, on torch, numpy, scipy, Pillow and our own ``lib`` alone.

    python -m trainers.pretrain convert --data-dir DIR --run runs/compact      # shared data and recipe -> npz, json
    python -m trainers.pretrain train --run runs/compact --minutes 9           # one leg; repeat until it says done
    python -m trainers.pretrain export --run runs/compact                      # fp16 safetensors into lib/weights

One bare loop instead of MONAI's engines, the one stated exception: it must run on machines that have only torch. Every
leg continues from the state of the last one. Workers average their gradients, so all of them hold the same model.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import torch.distributed as dist

from trainers.pretrain_loop import Bank, Recipe, Trainer, read_recipe
from trainers.pretrain_state import draw_curves, load_state, save_state

logger = logging.getLogger(__name__)
LOG_EVERY = 100


def train_leg(run: Path, minutes: float, device: str) -> bool:
    """Trains until the time or the recipe is over; True when the recipe is done."""
    recipe = read_recipe(run)
    if not (run / "synthetic.npz").exists():
        Bank(run, recipe)  # generates it once, before several workers would
    if recipe.workers == 1:
        _work(0, run, recipe, minutes, device, "")
    else:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (run, recipe, minutes, device, f"file://{folder}/meeting")
            torch.multiprocessing.spawn(_work, arguments, nprocs=recipe.workers)
    state = load_state(run)
    return state is not None and state[1]["step"] >= sum(recipe.steps)


def _work(worker: int, run: Path, recipe: Recipe, minutes: float, device: str, meeting: str) -> None:
    """One worker's leg; the first one logs and saves."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    if recipe.workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // recipe.workers))
        dist.init_process_group("gloo", init_method=meeting, rank=worker, world_size=recipe.workers)
    torch.backends.cuda.matmul.allow_tf32 = True
    trainer, bank = Trainer(recipe, device, worker), Bank(run, recipe)
    state = load_state(run)
    if state is not None:
        trainer.restore(*state)
    _loop(trainer, bank, run, time.monotonic() + minutes * 60)
    if recipe.workers > 1:
        dist.destroy_process_group()


def _loop(trainer: Trainer, bank: Bank, run: Path, end: float) -> None:
    logged, window = time.monotonic(), []
    while trainer.step < trainer.total and _time_left(trainer, end):
        window.append(trainer.learn(bank))
        if trainer.step % LOG_EVERY == 0 and trainer.worker == 0:
            mean = {k: round(float(np.mean([w[k] for w in window])), 4) for k in window[0]}
            speed = len(window) * trainer.recipe.batch / (time.monotonic() - logged)
            side = trainer.model.spec.input_size
            logger.info("step %d/%d side %d %s %.1f images/s", trainer.step, trainer.total, side, mean, speed)
            trainer.history.append({"step": trainer.step, **mean})
            logged, window = time.monotonic(), []
            save_state(run, trainer.step, *trainer.state())
    if trainer.worker == 0:
        save_state(run, trainer.step, *trainer.state())
        draw_curves(trainer.history, run / "curves.png")


def _time_left(trainer: Trainer, end: float) -> bool:
    """The first worker's clock decides for all, or one would wait for the others' gradients for ever."""
    left = torch.tensor([float(time.monotonic() < end)])
    if trainer.recipe.workers > 1:
        dist.broadcast(left, 0)
    return bool(left)


def export(run: Path, target: Path, manifest: Path) -> str:
    """Averaged weights as float16 safetensors; their SHA-256 is returned and written into the backbone's YAML row."""
    from safetensors.torch import save_file

    state = load_state(run)
    if state is None:
        raise FileNotFoundError(f"{run}: no state to export; run train first.")
    average = {k.removeprefix("average."): v for k, v in state[0].items() if k.startswith("average.")}
    tensors = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in average.items()}
    save_file(tensors, target, metadata={"step": str(state[1]["step"])})
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
