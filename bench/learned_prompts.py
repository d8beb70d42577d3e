"""What learned prompts add: boxes without training, learned prompts, both, clicks on top, and a DynUNet beside them.

    python -m bench.learned_prompts [--sets hippocampus acdc] [--minutes 5] [--few 10] [--seed 1] [--out FILE]

ACDC: 24 patients to adapt and 6 to test; hippocampus: 50 ``adapt`` and 30 ``test`` cases (``lib.data.split``), with all
labels and with ten labelled images. Each training, ours and the DynUNet's, gets the same wall-clock budget on the same
cases. Per class: Dice of whole volumes, HD95 in mm, paired differences over test cases with a bootstrap interval.

    BB        GT box of every slice, plain ``compact`` (the box also says that the class is there)
    LP frozen learned prompts, all of SAM frozen        LP        the whole small model trained with them
    BB+LP     the same box and learned prompts          LP+n      n corrective clicks per slice and class that is wrong
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from bench import common, unet
from bench.common import Report
from lib.config import MethodRow, TrainRecipe, method_row
from lib.contracts import PromptSet
from lib.data.geometry import put_slice, slice_size
from lib.data.samples import LabelledCase, TrainingCase, load_case, patient_of
from lib.data.split import acdc_split, hippocampus_split
from lib.evaluate import case_dice, encoded, segmented
from lib.learned import Answer, Learned, combine, rows
from lib.loading import load_backbone
from lib.prompts.simulate import box_of, next_click
from lib.prompts.user import SlicePrompts, prompt_set
from lib.train_data import Batches, Slice, all_slices, axis_of
from lib.train_loop import Run, fit
from lib.train_step import losses_of
from lib.transform import SliceTransform

SETS = {"hippocampus": ("anterior", "posterior"), "acdc": ("RV", "Myo", "LV")}
CLICKS = (1, 3, 5)
EPOCHS = 8  # a validation after each
Clock = Callable[[], float]


@dataclass
class Data:
    """Cases of one data set."""

    name: str
    labels: tuple[str, ...]
    adapt: list[TrainingCase]
    test: list[TrainingCase]


def read(folder: Path, name: str, limit: Optional[int]) -> Data:
    """The split of the project, cut to ``limit`` cases a part."""
    labels = SETS[name]
    names = [p.name for p in folder.glob("*.nii.gz")]
    parts = hippocampus_split(names) if name == "hippocampus" else acdc_split(names)

    def load(case: str) -> TrainingCase:
        files = folder / f"{case}.nii.gz", folder / "labels" / "final" / f"{case}.nii.gz"
        return load_case(LabelledCase(case, *files, dict(enumerate(labels, start=1))), labels)

    return Data(name, labels, [load(c) for c in parts["adapt"][:limit]], [load(c) for c in parts["test"][:limit]])


def few(cases: Sequence[TrainingCase], count: int) -> list[TrainingCase]:
    """Cases of different patients first, evenly spread over the list."""
    firsts = list({patient_of(c.case): c for c in reversed(cases)}.values())[::-1]
    return [firsts[i] for i in np.linspace(0, len(firsts) - 1, min(count, len(firsts))).round().astype(int)]


def split(cases: Sequence[TrainingCase]) -> tuple[list[TrainingCase], list[TrainingCase]]:
    """Every fifth patient chooses the best epoch; the DynUNet, which chooses none, trains on all."""
    patients = sorted({patient_of(c.case) for c in cases})
    held = set(patients[::5])
    return [c for c in cases if patient_of(c.case) not in held], [c for c in cases if patient_of(c.case) in held]


def learn(data: Data, cases: Sequence[TrainingCase], preset: str, budget_s: float, seed: int, folder: Path) -> Learned:
    """Sam2Rad, trained for the budget."""
    row = method_row("sam2rad")
    row = replace(row, recipe=replace(row.recipe, preset=preset, seed=seed))
    return trained(row, data, cases, budget_s, folder)[0]


def trained(
    row: MethodRow,
    data: Data,
    cases: Sequence[TrainingCase],
    budget_s: float,
    folder: Path,
    clock: Clock = time.monotonic,
) -> tuple[Learned, dict[str, Any]]:
    """Any method trained for the budget, features and validation included, and how that went.

    Args:
        row: of the method; its recipe's epochs, steps and patience are set here.
        data: whose labels are learned.
        cases: to train on, every fifth patient of which chooses the best epoch.
        budget_s: seconds of ``clock``.
        folder: new one for the run.
        clock: of the budget.
    """
    started = clock()
    recipe = replace(row.recipe, epochs=EPOCHS, patience=EPOCHS)
    torch.manual_seed(recipe.seed)
    model = Learned(row, load_backbone("compact"), len(data.labels), recipe.preset)
    training, validation = split(cases)
    batches = Batches(model, all_slices(training), recipe)
    batches.prepare()
    steps = _steps(model, batches, recipe, validation, budget_s - (clock() - started), clock)
    recipe = replace(recipe, steps=max(1, steps // EPOCHS))
    batches.recipe = recipe
    best = fit(Run(model, batches, validation, data.labels, recipe, folder))
    facts = {"steps": recipe.steps * EPOCHS, "train_s": clock() - started, "epoch": best["epoch"]}
    facts |= {"validation": best["mean_dice"]}
    done = f"{facts['steps']} steps, {facts['train_s']:.0f} s"
    chosen = f"validation Dice {best['mean_dice']:.3f} in epoch {best['epoch']}"
    print(f"{data.name}, {len(cases)} cases, {row.name} {recipe.preset}: {done}, {chosen}", flush=True)
    return model.eval(), facts


def _steps(
    model: Learned,
    batches: Batches,
    recipe: TrainRecipe,
    validation: Sequence[TrainingCase],
    left_s: float,
    clock: Clock,
) -> int:
    """As many steps as fit the time that is left, by timing some, and one validation, without updating anything."""
    per_step = _step_s(model, batches, recipe, clock)
    if model.warm_up:  # cheaper steps until then
        model.progress = 0.0
        per_step += model.warm_up * (_step_s(model, batches, recipe, clock) - per_step)
        model.progress = 1.0
    started = clock()
    segmented(model.eval(), validation[0], encoded(model))
    checks = EPOCHS * len(validation) * (clock() - started)
    return max(EPOCHS, int((left_s - checks) / per_step))


def _step_s(model: Learned, batches: Batches, recipe: TrainRecipe, clock: Clock) -> float:
    """Seconds of a step; at a learning rate of zero the weights stay."""
    optimiser, started = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.0), clock()
    for step in range(4):
        if step == 1:
            started = clock()
        features, target = batches.batch(step)
        for loss, _ in losses_of(model.train(), features, target, recipe.loss, step):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.zero_grad()
    return (clock() - started) / 3


# ------------------------------------------------------------------------------------------------------------ prompting


def on_slices(model: Learned, case: TrainingCase, ask: Callable[[Learned, Slice, Any], Answer]) -> np.ndarray:
    """``(I, J, K)`` class numbers from a function that answers for one slice and all classes."""
    axis, encode = axis_of(case), encoded(model)
    transform = SliceTransform(model.spec, slice_size(case.volume.shape, axis))
    out = np.zeros(case.volume.shape, np.uint8)
    with torch.inference_mode():
        for index in range(case.volume.shape[axis]):
            one = Slice(case, axis, index)
            answer = ask(model, one, encode([one]))
            put_slice(out, axis, index, combine(transform.logits(answer.masks[None]), answer.obj[None])[0].numpy())
    return out


def boxes_only(learned: bool) -> Callable[[Learned, Slice, Any], Answer]:
    """The true box of every class that is on the slice, without or with learned prompts."""

    def ask(model: Learned, one: Slice, features: Any) -> Answer:
        classes, transform = one.classes(), SliceTransform(model.spec, one.classes().shape)  # type: ignore[arg-type]
        masks = torch.full((model.classes, model.spec.mask_size, model.spec.mask_size), -10.0)
        obj, iou = torch.full((model.classes,), -1.0), torch.zeros(model.classes)
        for k in range(model.classes):
            if (classes == k + 1).any():
                user = prompt_set(SlicePrompts(box_rc=box_of(classes == k + 1)), transform)
                proposal = rows(model.propose(features), torch.tensor([k])) if learned else None
                _, answer = model.decode(features, proposal, user, torch.zeros(1, dtype=torch.long))
                masks[k], iou[k], obj[k] = answer.masks[0], answer.iou[0], 1.0
        return Answer(masks, iou, obj)

    return ask


def clicked(count: int) -> Callable[[Learned, Slice, Any], Answer]:
    """Learned prompts and up to ``count`` clicks for every class that is wrong on the slice."""

    def ask(model: Learned, one: Slice, features: Any) -> Answer:
        classes, transform = one.classes(), SliceTransform(model.spec, one.classes().shape)  # type: ignore[arg-type]
        proposal = model.propose(features)
        index = torch.zeros(model.classes, dtype=torch.long)
        _, answer = model.decode(features, proposal, PromptSet(), index)
        answer = Answer(answer.masks.clone(), answer.iou, answer.obj.clone())
        for k in range(model.classes):
            truth, prompts = classes == k + 1, SlicePrompts()
            shown = combine(transform.logits(answer.masks[None]), answer.obj[None])[0].numpy() == k + 1
            for _ in range(count):
                click = next_click(truth, shown)
                if click is None:
                    break
                prompts.points_rc.append(click)
                mine = rows(proposal, torch.tensor([k]))
                _, new = model.decode(features, mine, prompt_set(prompts, transform), index[:1])
                answer.masks[k] = new.masks[0]
                answer.obj[k] = new.obj[0].clamp(min=0.0) if prompts.starts else new.obj[0]
                shown = combine(transform.logits(answer.masks[None]), answer.obj[None])[0].numpy() == k + 1
        return answer

    return ask


# ------------------------------------------------------------------------------------------------------------- scoring


def scores(data: Data, segment: Callable[[TrainingCase], np.ndarray]) -> dict[str, np.ndarray]:
    """``dice`` and ``hd95`` in mm, each ``(test cases, K)``."""
    from monai.metrics import compute_hausdorff_distance

    dice, distance = [], []
    for case in data.test:
        found = segment(case)
        dice.append(case_dice(found, case.target, len(data.labels)))
        pair = [torch.from_numpy(np.stack([a == k + 1 for k in range(len(data.labels))]))[None].float()
                for a in (found, case.target)]  # fmt: skip
        measured = compute_hausdorff_distance(
            *pair, include_background=True, percentile=95, spacing=case.volume.spacing_mm
        )
        distance.append(measured[0].numpy())
    return {"dice": np.array(dice), "hd95": np.array(distance, float)}


def interval(values: np.ndarray, seed: int = 0, *, sign: str = "+") -> str:
    """Mean over test cases, of differences unless ``sign`` is empty, and its 95 % bootstrap interval."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    least, most = np.quantile(means, (0.025, 0.975))
    return f"{values.mean():{sign}.3f} ({least:{sign}.3f} to {most:{sign}.3f})"


def methods(
    data: Data, count: str, cases: Sequence[TrainingCase], options: Any, scratch: Path
) -> Iterator[tuple[str, Any]]:
    """Names and segmenting functions, trained as they are asked for."""
    budget = options.minutes * 60

    def with_model(model: Learned, ask: Any = None) -> Callable[[TrainingCase], np.ndarray]:
        model.eval()
        return (lambda c: segmented(model, c, encoded(model))) if ask is None else (lambda c: on_slices(model, c, ask))

    plain = Learned(method_row("sam2rad"), load_backbone("compact"), len(data.labels), "frozen")
    yield "BB", with_model(plain, boxes_only(learned=False))
    frozen = learn(data, cases, "frozen", budget, options.seed, scratch / f"{data.name}-{count}-frozen")
    yield "LP frozen", with_model(frozen)
    full = learn(data, cases, "full", budget, options.seed, scratch / f"{data.name}-{count}-full")
    yield "LP", with_model(full)
    yield "BB+LP", with_model(full, boxes_only(learned=True))
    for clicks in CLICKS:
        yield f"LP+{clicks}", with_model(full, clicked(clicks))
    net = unet.train(cases, len(data.labels), budget, options.seed)
    yield "DynUNet", lambda c: unet.segment(net, c)


PAIRS = (("LP", "BB"), ("BB+LP", "BB"), ("BB+LP", "LP"), ("LP+3", "LP"), ("LP", "LP frozen"), ("LP", "DynUNet"))


def compare(data: Data, count: str, cases: Sequence[TrainingCase], options: Any, scratch: Path, report: Report) -> None:
    """One table of scores, one of paired differences."""
    found = {}
    for name, segment in methods(data, count, cases, options, scratch):
        found[name] = scores(data, segment)
        print(f"{data.name}, {count}: {name} {found[name]['dice'].mean(0).round(3)}", flush=True)
    table = [
        [name, *(f"{v:.3f}" for v in s["dice"].mean(0)), f"{s['dice'].mean():.3f}",
         *(f"{v:.1f}" for v in np.nanmean(np.where(np.isfinite(s["hd95"]), s["hd95"], np.nan), 0))]
        for name, s in found.items()
    ]  # fmt: skip
    header = ["method", *(f"Dice {x}" for x in data.labels), "mean", *(f"HD95 {x}" for x in data.labels)]
    report.table(f"{data.name}, {count} ({len(cases)} cases), {len(data.test)} test cases", header, table)
    differences = [
        [f"{a} - {b}", *(interval(d) for d in (found[a]["dice"] - found[b]["dice"]).T),
         interval((found[a]["dice"] - found[b]["dice"]).mean(1))]
        for a, b in PAIRS
    ]  # fmt: skip
    report.table("Paired differences of Dice", ["pair", *data.labels, "mean"], differences)


def main() -> int:
    """Command line."""
    parser = common.arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--sets", nargs="+", choices=sorted(SETS), default=sorted(SETS))
    parser.add_argument("--minutes", type=float, default=5.0, help="budget of each training")
    parser.add_argument("--few", type=int, default=10, help="labelled images of the small experiment; 0 leaves it out")
    parser.add_argument(
        "--all", action=argparse.BooleanOptionalAction, default=True, help="the experiment with all labels"
    )
    parser.add_argument("--cases", type=int, default=None, help="at most so many cases per part, to try the bench out")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    report = Report("Learned prompts", options.out)
    report.add("", f"Budget of each training: {options.minutes:g} minutes, seed {options.seed}.")
    with common.scratch_folder() as scratch:
        for name in options.sets:
            data = read(options.data_dir / name, name, options.cases)
            if options.few:
                compare(data, f"{options.few} labelled images", few(data.adapt, options.few), options, scratch, report)
            if options.all:
                compare(data, "all labels", data.adapt, options, scratch, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
