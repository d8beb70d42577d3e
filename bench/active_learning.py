"""Labels saved by choosing images: each strategy against random order, on features that were encoded once, no server.

    python -m bench.active_learning [--sets hippocampus acdc] [--seeds 1 2 3] [--quick] [--out FILE]
    python -m bench.active_learning --predicted-dice [--minutes 4] [--out FILE]

Protocol, fixed before the first full run. ``compact`` encodes twelve evenly spread slices of every ``adapt`` and
``test`` volume (``lib.data.split``). A small head on these features is trained anew in every round on the labelled
volumes: the same 400 steps, whatever their number; head and steps were chosen on ``adapt``. A seed decides the first 4
labelled volumes and the head; all strategies begin with the same ones. In each of 7 rounds 3 volumes are added one by
one as ``next_sample`` would, to 25: by ``random``, or by a strategy of ``lib.active.selection`` on what the head shows
of its doubt (``lib.active.evidence``; here jitter is noise on the features). Dice is the mean over test volumes and
labels on the head's 32 x 32 grid. The number of labels that a strategy needs is where its curve, the mean over seeds,
first reaches the last point of the curve of random, linear between rounds; its share is that number divided by 25.

``--predicted-dice`` measures the other claim instead: ``sam2rad`` is trained as in ``bench.learned_prompts`` for some
minutes on half of the ``adapt`` patients, and the Dice predicted for every ``test`` volume is compared with the true
one by Spearman's rank correlation, with a bootstrap interval over volumes.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import common
from bench.common import Report, Verdict
from bench.learned_prompts import SETS, Data, learn, read
from lib.active.calibration import lines
from lib.active.evidence import calibration_pairs, raw_quality
from lib.active.selection import STRATEGIES, Known, rank
from lib.active.sums import Distance, Quality
from lib.contracts import Backbone
from lib.data.geometry import slice_size
from lib.data.samples import TrainingCase, patient_of
from lib.evaluate import case_dice, encoded, segmented
from lib.learned import Answer
from lib.loading import load_backbone
from lib.train_data import Slice, axis_of, targets
from lib.transform import SliceTransform

RANDOM = "random"
SIDE, SLICES = 32, 12
FIRST, ADDED, ROUNDS, STEPS, BATCH, LR = 4, 3, 7, 400, 8, 1e-2
NOISE, VIEWS = 0.3, 2  # of standardised features; how many noisy answers
SHARE, SPEARMAN = 0.8, 0.6


@dataclass(frozen=True)
class Encoded:
    """One volume as the head sees it.

    Args:
        features: ``(D, C, 32, 32)`` float16, standardised over the pool.
        target: ``(D, 32, 32)`` class numbers.
        embedding: ``(d,)`` for diversity.
    """

    features: Tensor
    target: Tensor
    embedding: np.ndarray


@dataclass(frozen=True)
class Plan:
    """How long a run is; ``--quick`` has a shorter one."""

    rounds: int = ROUNDS
    steps: int = STEPS
    slices: int = SLICES


# ------------------------------------------------------------------------------------------------------------ features


def maps(backbone: Backbone, case: TrainingCase, classes: int, slices: int) -> tuple[Tensor, Tensor]:
    """Features ``(D, C, 32, 32)`` and class numbers ``(D, 32, 32)`` of evenly spread slices."""
    axis = axis_of(case)
    transform = SliceTransform(backbone.spec, slice_size(case.volume.shape, axis))
    count = case.volume.shape[axis]
    chosen = np.unique(np.linspace(0, count - 1, min(slices, count)).round().astype(int))
    whole = [Slice(case, axis, int(i)) for i in chosen]
    found = backbone.encode(torch.stack([transform.image(s.pixels()) for s in whole]))
    levels = [found.embed, *(found.high_res or ())]
    features = torch.cat([F.adaptive_avg_pool2d(m, SIDE) if m.shape[-1] > SIDE else _enlarged(m) for m in levels], 1)
    share = F.adaptive_avg_pool2d(torch.stack([targets(s.classes(), classes, transform) for s in whole]), SIDE)
    every = torch.cat([1 - share.sum(1, keepdim=True), share], 1)
    return features, every.argmax(1)


def _enlarged(level: Tensor) -> Tensor:
    return F.interpolate(level, (SIDE, SIDE), mode="bilinear", align_corners=False)


def encode(data: Data, slices: int) -> tuple[list[Encoded], list[Encoded]]:
    """``adapt`` and ``test``, each volume once."""
    backbone = load_backbone("compact")
    with torch.inference_mode():
        raw = [maps(backbone, c, len(data.labels), slices) for c in (*data.adapt, *data.test)]
    pool = torch.cat([f for f, _ in raw[: len(data.adapt)]])
    mean, spread = pool.mean((0, 2, 3), keepdim=True), pool.std((0, 2, 3), keepdim=True) + 1e-6
    found = []
    for features, target in raw:
        vector = torch.cat([features.mean((0, 2, 3)), features.std((0, 2, 3))]).numpy()
        found.append(Encoded(((features - mean) / spread).half().clone(), target.clone(), vector))
    return found[: len(data.adapt)], found[len(data.adapt) :]


# ------------------------------------------------------------------------------------------------------------- learner


def head(channels: int, classes: int) -> nn.Sequential:
    """The light learner: background and K classes on every cell."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=4), nn.ReLU(),
        nn.Conv2d(32, classes + 1, 1),
    )  # fmt: skip


def train(volumes: Sequence[Encoded], classes: int, steps: int, seed: int) -> nn.Sequential:
    """A head trained from the start on labelled volumes."""
    torch.manual_seed(seed)
    model = head(volumes[0].features.shape[1], classes)
    features, target = torch.cat([v.features for v in volumes]), torch.cat([v.target for v in volumes])
    optimiser = torch.optim.AdamW(model.parameters(), LR, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LR, total_steps=steps)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = torch.from_numpy(rng.choice(len(features), min(BATCH, len(features)), replace=False))
        logits, truth = model(features[rows].float()), target[rows]
        loss = F.cross_entropy(logits, truth) + _soft_dice(logits, truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def _soft_dice(logits: Tensor, truth: Tensor) -> Tensor:
    prob = logits.softmax(1)[:, 1:]
    true = F.one_hot(truth, logits.shape[1]).permute(0, 3, 1, 2)[:, 1:].float()
    overlap, total = (prob * true).sum((0, 2, 3)), (prob + true).sum((0, 2, 3))
    return 1 - ((2 * overlap + 1) / (total + 1)).mean()


def doubts(model: nn.Sequential, volume: Encoded, classes: int, seed: int) -> Known:
    """What the head shows of its doubt on one volume; noise takes the place of jittered prompts."""
    quality, distance = Quality(classes), Distance(classes)
    rng = torch.Generator().manual_seed(seed)
    features = volume.features.float()
    with torch.inference_mode():
        logits = model(features)
        answer = _answer(logits)
        shown = logits.argmax(1).to(torch.uint8)
        noisy = [features + NOISE * torch.randn(features.shape, generator=rng) for _ in range(VIEWS)]
        quality.add(answer, shown)
        distance.add(shown, [model(x).argmax(1).to(torch.uint8) for x in noisy])
    return Known(float(quality.found().mean()), distance.found(), volume.embedding)


def _answer(logits: Tensor) -> Answer:
    """Softmax as log-odds of each class against all others, all of them present."""
    prob = logits.softmax(1)[:, 1:].clamp(1e-6, 1 - 1e-6)
    pairs = prob.logit().flatten(0, 1)
    return Answer(pairs, torch.ones(len(pairs)), torch.full((len(pairs),), 20.0))


def score(model: nn.Sequential, test: Sequence[Encoded], classes: int) -> np.ndarray:
    """``(volumes, K)`` Dice."""
    with torch.inference_mode():
        found = [model(v.features.float()).argmax(1).numpy() for v in test]
    return np.array([case_dice(f, v.target.numpy(), classes) for f, v in zip(found, test)])


# -------------------------------------------------------------------------------------------------------------- rounds


def chosen_next(strategy: str, known: dict[int, Known], labelled: list[int], rng: np.random.Generator) -> int:
    """One more volume, as ``next_sample`` picks it."""
    left = [n for n in known if n not in labelled]
    if strategy == RANDOM:
        return int(rng.choice(left))
    ranking = rank(strategy, [known[n] for n in left], [known[n] for n in labelled])
    return left[int(np.nanargmax(ranking.urgency))]


def run(strategy: str, pool: list[Encoded], test: list[Encoded], classes: int, seed: int, plan: Plan) -> list[float]:
    """Mean test Dice after each round, the first before anything was chosen."""
    rng = np.random.default_rng(seed)
    labelled = rng.permutation(len(pool))[:FIRST].tolist()
    rng = np.random.default_rng((seed, 1))
    curve = []
    for step in range(plan.rounds + 1):
        model = train([pool[n] for n in labelled], classes, plan.steps, seed)
        curve.append(float(score(model, test, classes).mean()))
        if step < plan.rounds:
            known = {n: doubts(model, v, classes, seed) for n, v in enumerate(pool)}
            for _ in range(min(ADDED, len(pool) - len(labelled))):
                labelled.append(chosen_next(strategy, known, labelled, rng))
    return curve


def labels_needed(curve: Sequence[float], goal: float) -> float:
    """How many labels until a curve first reaches ``goal``, linear between rounds; NaN where it never does."""
    for step, dice in enumerate(curve):
        if dice >= goal:
            if step == 0:
                return FIRST
            before = curve[step - 1]
            return FIRST + ADDED * (step - 1 + (goal - before) / (dice - before))
    return math.nan


def compare(data: Data, options: Any, plan: Plan, report: Report) -> dict[str, float]:
    """Curves of all strategies on one set; the share of labels that each needs."""
    started = time.monotonic()
    pool, test = encode(data, plan.slices)
    names = (RANDOM, *STRATEGIES)
    curves = {}
    for name in names:
        each = np.array([run(name, pool, test, len(data.labels), seed, plan) for seed in options.seeds])
        curves[name] = each
        print(f"{data.name}: {name} {each.mean(0).round(3)}, {time.monotonic() - started:.0f} s", flush=True)
    goal, last = float(curves[RANDOM].mean(0)[-1]), FIRST + ADDED * plan.rounds
    shares = {name: labels_needed(curves[name].mean(0), goal) / last for name in names}
    header = ["strategy", *(f"{FIRST + ADDED * n}" for n in range(plan.rounds + 1)), "area", "labels", "share"]
    table = [
        [name, *(f"{v:.3f}" for v in curves[name].mean(0)), f"{curves[name].mean():.3f}",
         f"{shares[name] * last:.1f}", f"{shares[name]:.2f}"]
        for name in names
    ]  # fmt: skip
    report.table(f"{data.name}: test Dice by number of labels, mean over seeds {options.seeds}", header, table)
    spread = [[name, *(f"{v:.3f}" for v in curves[name].std(0))] for name in names]
    report.table("Deviation over seeds", header[: plan.rounds + 2], spread)
    return shares


# ------------------------------------------------------------------------------------------------------ predicted Dice


def predicted(data: Data, options: Any, scratch: Path, report: Report) -> float:
    """Spearman of predicted and true mean Dice of test volumes."""
    patients = sorted({patient_of(c) for c in data.adapt})
    cases = [c for c in data.adapt if patient_of(c) in set(patients[::2])]
    model = learn(data, cases, "full", options.minutes * 60, options.seeds[0], scratch / data.name).eval()
    features = encoded(model)
    unseen = [c for c in data.adapt if patient_of(c) not in set(patients[::2])]
    calibration = lines({"calibration": _pairs(model, unseen[:8], data.labels, features)})
    rows = []
    for case in data.test:
        axis = axis_of(case)
        raw = raw_quality(model, case.volume.shape[axis], partial(_slices, features, case, axis)).tolist()
        said = [calibration[label](value) for label, value in zip(data.labels, raw)]
        rows.append((said, case_dice(segmented(model, case, features), case.target, len(data.labels))))
    said, true = (np.array(part) for part in zip(*rows))
    table = [[label, *_row(said[:, k], true[:, k])] for k, label in enumerate(data.labels)]
    table.append(["mean of labels", *_row(said.mean(1), true.mean(1))])
    header = ["", "Spearman", "95 % interval", "mean predicted", "mean true", "mean error"]
    report.table(f"{data.name}: predicted against true Dice of {len(rows)} test volumes", header, table)
    return spearman(said.mean(1), true.mean(1))


def _pairs(model: Any, cases: Sequence[TrainingCase], labels: Sequence[str], features: Any) -> Any:
    dice = {c.case: dict(zip(labels, case_dice(segmented(model, c, features), c.target, len(labels)))) for c in cases}
    return calibration_pairs(model, cases, labels, dice, features)


def _slices(features: Any, case: TrainingCase, axis: int, group: range) -> Any:
    return features([Slice(case, axis, i) for i in group])


def _row(said: np.ndarray, true: np.ndarray) -> list[str]:
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(said), size=len(said)) for _ in range(1000)]
    found = np.nanquantile([spearman(said[d], true[d]) for d in draws], (0.025, 0.975))
    error = float(np.abs(said - true).mean())
    return [f"{spearman(said, true):.2f}", f"{found[0]:.2f} to {found[1]:.2f}", f"{said.mean():.3f}",
            f"{true.mean():.3f}", f"{error:.3f}"]  # fmt: skip


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation; NaN where one of them does not vary."""
    from scipy.stats import rankdata

    a, b = rankdata(first), rankdata(second)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else math.nan


def main() -> int:
    """Command line."""
    parser = common.arguments(__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--sets", nargs="+", choices=sorted(SETS), default=sorted(SETS, reverse=True))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--quick", action="store_true", help="two short rounds, to try the bench out")
    parser.add_argument("--predicted-dice", action="store_true", help="measure predicted Dice instead")
    parser.add_argument("--minutes", type=float, default=4.0, help="of each training with --predicted-dice")
    options = parser.parse_args()
    plan = Plan(2, 60, 3) if options.quick else Plan()
    report, verdicts = Report("Active learning", options.out), []
    with common.scratch_folder() as scratch:
        for name in options.sets:
            data = read(options.data_dir / name, name, 12 if options.quick else None)
            if options.predicted_dice:
                found = predicted(data, options, scratch, report)
                verdicts.append(Verdict(f"{name}, Spearman of predicted Dice", found, SPEARMAN, least=True))
            else:
                shares = compare(data, options, plan, report)
                verdicts.append(Verdict(f"{name}, share of labels that mix needs", shares["mix"], SHARE))
    report.verdicts(verdicts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
