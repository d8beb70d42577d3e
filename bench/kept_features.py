"""What keeping features changes: the time of a whole training of ten volumes, and not its result.

    python -m bench.kept_features [--data-dir DIR] [--steps 120] [--seeds 1 2 3] [--out FILE]
    python -m bench.kept_features --drawn     # whole steps against those that draw one class per slice

Ten hippocampus ``adapt`` cases, frozen preset on ``compact``. First the recipe as it ships, from cases in memory to the
best epoch, with kept features. Then a shorter run per seed with features kept and with none kept; Dice on ten ``test``
cases. Drawn steps (:mod:`lib.train_step`) are made for large decoders; here ``compact`` takes them for once, as many as
cost the same number of decoded pairs: a whole step decodes every class of a slice twice, a drawn one decodes one class.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from bench import common
from bench.common import Report, Verdict
from bench.learned_prompts import Data, read, split
from lib import learned
from lib.config import TrainRecipe, method_row
from lib.evaluate import case_dice, encoded, segmented
from lib.learned import Learned
from lib.loading import load_backbone
from lib.train_data import Batches, all_slices
from lib.train_loop import Run, fit

CASES = 10
MINUTES, SAME = 15.0, 0.01


def trained(data: Data, recipe: TrainRecipe, folder: Path) -> tuple[Learned, float, str]:
    """The model of the best epoch, the seconds that it took, and what was kept."""
    started = time.monotonic()
    torch.manual_seed(recipe.seed)
    model = Learned(method_row("sam2rad"), load_backbone("compact"), len(data.labels), "frozen")
    training, validation = split(data.adapt)
    batches = Batches(model, all_slices(training), recipe)
    fit(Run(model, batches, validation, data.labels, recipe, folder))
    return model.eval(), time.monotonic() - started, batches.plan()


def score(model: Learned, data: Data) -> float:
    """Mean Dice over classes and test cases."""
    return float(
        np.mean([case_dice(segmented(model, c, encoded(model)), c.target, len(data.labels)) for c in data.test])
    )


def drawn_steps(data: Data, short: TrainRecipe, seeds: list[int], report: Report, scratch: Path) -> None:
    """Both kinds of step for the same number of decoded pairs."""
    rows, dice = [], []
    for seed in seeds:
        pair = []
        for name, grid, times in (("whole", learned.SMALL_GRID, 1), ("drawn", 0, 2 * len(data.labels))):
            with mock.patch.object(learned, "SMALL_GRID", grid):
                wanted = replace(short, seed=seed, steps=times * short.steps)
                model, spent, _ = trained(data, wanted, scratch / f"{name}-{seed}")
            pair.append(score(model, data))
            rows.append((seed, name, wanted.steps, f"{pair[-1]:.4f}", f"{spent:.0f}"))
        dice.append(pair)
    report.table("Whole and drawn steps", ("seed", "steps are", "steps", "test Dice", "seconds"), rows)
    apart = [drawn - whole for whole, drawn in dice]
    report.add("", f"Drawn - whole, mean over seeds: {np.mean(apart):+.4f} ({min(apart):+.4f} to {max(apart):+.4f}).")


def main() -> int:
    """Command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--steps", type=int, default=120, help="of each short run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--drawn", action="store_true", help="compare kinds of step instead")
    options = parser.parse_args()
    report = Report("Kept features", options.out)
    data = read(options.data_dir / "hippocampus", "hippocampus", CASES)
    recipe = replace(method_row("sam2rad").recipe, preset="frozen")
    short = replace(recipe, epochs=1, steps=options.steps)
    with common.scratch_folder() as scratch:
        if options.drawn:
            drawn_steps(data, short, options.seeds, report, scratch)
            return 0
        rows, dice = [], []
        for seed in options.seeds:
            pair = []
            for name, memory_mb in (("kept", recipe.memory_mb), ("anew", 0)):
                wanted = replace(short, seed=seed, memory_mb=memory_mb)
                model, spent, _ = trained(data, wanted, scratch / f"{name}-{seed}")
                pair.append(score(model, data))
                rows.append((seed, name, f"{pair[-1]:.4f}", f"{spent:.0f}"))
            dice.append(pair)
        report.table("Short runs", ("seed", "features", "test Dice", "seconds"), rows)
        model, whole, plan = trained(data, recipe, scratch / "whole")
        report.table("The recipe as it ships, ten volumes", ("test Dice", "minutes", "plan"),
                     [(f"{score(model, data):.3f}", f"{whole / 60:.1f}", plan)])  # fmt: skip
    apart = abs(float(np.mean([kept - anew for kept, anew in dice])))
    report.verdicts(
        [
            Verdict("ten volumes with kept features, minutes", whole / 60, MINUTES),
            Verdict("Dice, kept against anew, mean over seeds", apart, SAME),
        ]
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
