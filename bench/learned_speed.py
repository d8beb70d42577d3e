"""What learned prompts cost beside the bare model calls: autonomous pass, corrections, training epochs.

    python -m bench.learned_speed [--rounds 7] [--skip-sam2] [--out FILE]

No time depends on the values of the learned tensors, so the version is untrained (its mask head is biased so that it
finds something) and sam2.1_tiny has random weights. The task is called in this process, label file included; what HTTP
adds is measured by ``bench.click_latency``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import common
from bench.common import Report, Verdict, median, seconds
from infers.learned import LearnedTask
from lib.assisted import AssistedEngine
from lib.config import TrainRecipe, method_row
from lib.contracts import PromptSet
from lib.data.samples import TrainingCase
from lib.data.volume import load_volume
from lib.engine import Engine
from lib.learned import Learned
from lib.loading import load_backbone
from lib.settings import AppSettings
from lib.train_data import Batches, all_slices
from lib.train_step import losses_of
from lib.versions.record import Trained
from lib.versions.store import open_store
from lib.windows import BATCH

SHAPE = (256, 216, 10)
LABELS = ("RV", "Myo", "LV")
CLICK, SLICE, AUTONOMOUS, CACHED, SAVED = 0.150, 0.040, 1.25, 1.2, 10.0


def timed(call: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each call after a first one that is not counted."""
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def untrained_version(engine: Engine, folder: Path) -> AssistedEngine:
    """An assisted engine with a live version."""
    row, backbone = method_row("sam2rad"), engine.warm()
    torch.manual_seed(0)
    model = Learned(row, backbone, len(LABELS), "frozen")
    torch.nn.init.constant_(model.method.predictor.mask_head[-1].bias, 2.0)
    store = open_store(folder, "sam2rad")
    facts = Trained(
        backbone=backbone.spec.name, backbone_digest=backbone.weights_id, labels=LABELS,
        recipe={"preset": "frozen"}, split={}, metrics={"mean_dice": 0.5},
    )  # fmt: skip
    store.promote(store.add(model.trained(), facts).name, "untrained, for timing")
    return AssistedEngine(engine, row, store, LABELS)


def autonomous(engine: Engine, assisted: AssistedEngine, image: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the whole pass on a volume never seen, and of bare encoder and decoder calls for as many slices."""
    live = assisted.live()
    model, volume = live.model, engine.open(image)  # type: ignore[union-attr]
    passes, bare = [], []
    count = volume.shape[2]
    pieces = [torch.randn(min(BATCH, count - k), 3, *[model.spec.input_size] * 2) for k in range(0, count, BATCH)]
    for number in range(rounds + 1):
        fresh = replace(volume, content_hash=f"{volume.content_hash}-{number}")  # every cache misses
        started = time.perf_counter()
        assisted.segment(fresh, {})
        passes.append(time.perf_counter() - started)
        started = time.perf_counter()
        with torch.inference_mode():
            for x in pieces:  # as many slices at once as the pass takes
                model.autonomous(model.backbone.encode(x))
        bare.append(time.perf_counter() - started)
    return passes[1:], bare[1:]


def corrections(task: LearnedTask, assisted: AssistedEngine, image: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a request that stays on its slice and of one that is carried on, and how far that went."""
    request = {"image": str(image), "result_extension": ".nrrd", "Myo": [[120, 110, 5]], "background": [[40, 40, 5]]}
    files: list[str] = []

    def ask(**more: Any) -> dict[str, Any]:
        path, reply = task({**request, **more})
        files.append(str(path))
        return reply

    stays = timed(lambda: ask(propagate=False), rounds)
    carried = timed(lambda: ask(propagate=True), rounds)
    edited = {i for slices in ask(propagate=True)["edited"].values() for i in slices}
    pairs = sum(len(s) for s in ask(propagate=True)["edited"].values())
    for file in files:
        Path(file).unlink()
    one = median(timed(lambda: _one_slice(assisted, image), rounds))
    return {"stays": stays, "carried": carried, "slices": len(edited), "pairs": pairs, "step": one}


def _one_slice(assisted: AssistedEngine, image: Path) -> None:
    """One step of a walk by itself."""
    from lib.assisted import _Job
    from lib.engine import SegmentOptions

    live = assisted.live()
    job = _Job(assisted, live, assisted.engine.open(image), SegmentOptions())  # type: ignore[arg-type]
    side = live.model.spec.mask_size  # type: ignore[union-attr]
    with torch.inference_mode():
        job.ask(5, 1, PromptSet(masks=torch.zeros(1, 1, side, side)), said=True)


def phantom_case(shape: tuple[int, int, int], image: Path) -> TrainingCase:
    """A labelled volume for training steps."""
    volume = load_volume(image)
    target = np.zeros(shape, np.uint8)
    grid = np.indices(shape[:2])
    for number, radius in enumerate((60, 40, 20), start=1):
        target[np.hypot(grid[0] - shape[0] / 2, grid[1] - shape[1] / 2) < radius] = number
    return TrainingCase("phantom", volume, target)


def epochs(backbone: Any, case: TrainingCase, batch: int, steps: int) -> dict[str, float]:
    """Seconds per step with kept features, without, and of prompter and decoder alone; frozen preset."""
    torch.manual_seed(0)
    model = Learned(method_row("sam2rad"), backbone, len(LABELS), "frozen")
    recipe = TrainRecipe(preset="frozen", batch=batch, views=2, memory_mb=8192)
    optimiser = torch.optim.AdamW(model.groups(1e-4, 1e-4, 0.1))
    slices = all_slices([case])
    kept, anew = Batches(model, slices, recipe), Batches(model, slices, replace(recipe, memory_mb=0))
    kept.prepare()
    ready = kept.batch(0)

    def step(number: int, batches: Batches | None) -> None:
        features, target = ready if batches is None else batches.batch(number)
        optimiser.zero_grad(set_to_none=True)
        for loss, _ in losses_of(model.train(), features, target, "plain", number):
            loss.backward()
            optimiser.step()

    found: dict[str, list[float]] = {"kept": [], "anew": [], "bare": []}
    for number in range(steps + 1):  # in turns, since the machine is noisy
        for name, batches in (("kept", kept), ("anew", anew), ("bare", None)):
            started = time.perf_counter()
            step(number, batches)
            found[name].append(time.perf_counter() - started)
    return {name: median(times[1:]) for name, times in found.items()}


def main() -> int:
    """Command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-sam2", action="store_true", help="leave out the training steps of sam2.1_tiny, minutes")
    options = parser.parse_args()
    report = Report("What learned prompts cost", options.out)
    with common.scratch_folder() as scratch:
        common.write_phantoms(scratch / "studies", ["phantom"], SHAPE)
        image = scratch / "studies" / "phantom.nii.gz"
        engine = Engine(AppSettings.from_conf({"cache_dir": str(scratch / "cache"), "cache_disk_mb": "0"}))
        assisted = untrained_version(engine, scratch / "state")
        task = LearnedTask(assisted, edit=True)
        passes, bare = autonomous(engine, assisted, image, options.rounds)
        found = corrections(task, assisted, image, options.rounds)
        case = phantom_case(SHAPE, image)
        compact = epochs(engine.warm(), case, 8, options.rounds)
        rows = [
            ("autonomous pass, 10 slices, 3 classes", seconds(passes)),
            ("bare encoder, prompter and decoder calls for them", seconds(bare)),
            ("second click, stays on its slice", seconds(found["stays"])),
            (f"second click, carried: {found['slices']} slices, {found['pairs']} pairs", seconds(found["carried"])),
            ("one further slice of a walk", seconds([found["step"]])),
            *((f"compact, training step, features {name}", seconds([s])) for name, s in compact.items()),
        ]
        limits = [
            Verdict("autonomous pass / bare calls", median(passes) / median(bare), AUTONOMOUS),
            Verdict("second click that stays, s", median(found["stays"]), CLICK),
            Verdict("each further slice, s", found["step"], SLICE),
            Verdict("compact, kept step / bare step", compact["kept"] / compact["bare"], CACHED),
        ]
        if not options.skip_sam2:
            sam2 = epochs(load_backbone(common.SAM2_ROW, random_seed=0), case, 2, 3)
            rows += [(f"{common.SAM2_ROW}, training step, features {name}", seconds([s])) for name, s in sam2.items()]
            limits.append(Verdict(f"{common.SAM2_ROW}, anew / kept", sam2["anew"] / sam2["kept"], SAVED, least=True))
    report.table("Times", ("what", "seconds"), rows)
    report.verdicts(limits)
    return 0


if __name__ == "__main__":
    sys.exit(main())
