"""Peak memory of training each method at batch 2, on generated volumes.

    python -m bench.memory [--methods NAME ...] [--backbone compact] [--device cpu] [--out FILE]

Each method trains in a process of its own, with its own recipe but for batch and steps: four steps, a validation, a
saved state. On the CPU the number is the process's resident peak, imports included (about 0.8 GB), on a GPU what torch
reserved there. Batch 2 are two slices, or two windows of slices where a method sees neighbours. Backbones other than
``compact`` get random weights, and adapters where the recipe says ``auto``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import common
from bench.common import ROOT, Report
from bench.ladder import recipe_row
from lib.config import method_names
from lib.data.samples import LabelledCase, TrainingCase, load_case
from lib.learned import Learned
from lib.loading import load_backbone
from lib.train_data import Batches, all_slices
from lib.train_loop import Run, fit
from tests import cases

SHAPE = (96, 96, 10)  # as many slices as a window of any method, and more
STEPS, BATCH = 4, 2
LIMITS_GB = {"cpu": 4.0, "cuda": 16.0}


def peak_gb(method: str, backbone: str = "compact", device: str = "cpu") -> float:
    """Of one method, measured in a process of its own.

    Raises:
        RuntimeError: if that process failed.
    """
    command = [sys.executable, "-W", "ignore", "-m", "bench.memory", "--job", "--methods", method]
    command += ["--backbone", backbone, "--device", device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{method} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def job(options: Any) -> float:
    """What the process does; GB."""
    own = options.backbone == "compact"
    row, seed = recipe_row(options.methods[0], auto="full" if own else "adapters"), None if own else 1
    with common.scratch_folder() as scratch:
        found = _cases(scratch)
        model = Learned(row, load_backbone(options.backbone, random_seed=seed), len(cases.LABELS), row.recipe.preset)
        model.to(options.device)
        size = BATCH * min(model.slices, SHAPE[2])
        recipe = replace(row.recipe, batch=size, epochs=1, steps=STEPS, patience=1)
        fit(Run(model, Batches(model, all_slices(found[:2]), recipe), found[2:], cases.LABELS, recipe, scratch / "run"))
    if options.device != "cpu":
        return torch.cuda.max_memory_reserved() / 2**30
    return common.memory_mb(os.getpid())[1] / 1024


def _cases(folder: Path) -> list[TrainingCase]:
    import nibabel as nib
    import numpy as np

    found = []
    for seed in range(3):
        files = folder / f"m{seed}.nii.gz", folder / f"m{seed}_label.nii.gz"
        for voxels, file in zip(cases.draw(seed, SHAPE), files):
            nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 5.0, 1.0])), file)
        found.append(load_case(LabelledCase(f"m{seed}", *files, dict(enumerate(cases.LABELS, 1))), cases.LABELS))
    return found


def main() -> int:
    """Command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--methods", nargs="+", choices=method_names(), default=method_names())
    parser.add_argument("--backbone", default="compact")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(job(options)))
        return 0
    report = Report(f"Peak memory at batch {BATCH} with {options.backbone} on {options.device}", options.out)
    limit = LIMITS_GB[torch.device(options.device).type]
    found = {m: peak_gb(m, options.backbone, options.device) for m in options.methods}
    report.verdicts([common.Verdict(f"{m}, GB", peak, limit) for m, peak in found.items()])
    return 0


if __name__ == "__main__":
    sys.exit(main())
