"""The training loop of every learned method, on MONAI's engines: resumable to the step, early stopping, progress.

One state file holds model, optimiser, scheduler, scaler, counters and early stopping; it is replaced atomically, so a
kill at any moment loses at most the steps since the last one. The best tensors lie beside it. Not thread-safe.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from lib.config import TrainRecipe
from lib.data.samples import TrainingCase
from lib.errors import ConfigError
from lib.evaluate import FeaturesOf, case_dice, encoded, kept, segmented, summary
from lib.learned import Learned
from lib.train_data import Batches
from lib.train_step import losses_of

logger = logging.getLogger(__name__)
STATE, BEST, PROGRESS = "state.pt", "best.safetensors", "progress.json"
SAVE_S = 20.0  # seconds between states
LEAST_STEPS = 20


@dataclass
class Run:
    """What one training works on.

    Args:
        model: to be trained.
        batches: of training slices.
        validation: cases that choose the best epoch.
        labels: names of classes 1..K.
        recipe: how to train.
        folder: for state, best tensors, progress and TensorBoard.
    """

    model: Learned
    batches: Batches
    validation: Sequence[TrainingCase]
    labels: Sequence[str]
    recipe: TrainRecipe
    folder: Path

    @property
    def steps(self) -> int:
        """Optimiser steps per epoch."""
        return self.recipe.steps or max(LEAST_STEPS, math.ceil(len(self.batches.slices) / self.recipe.batch))


def fit(run: Run, report: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    """Trains, or goes on with a run that was cut off.

    Args:
        run: the work.
        report: gets every progress entry; it may raise to stop.

    Returns:
        Metrics of the best epoch on the validation cases; the model holds its tensors.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    session = _Session(run, report)  # its clock starts before the features are made
    run.batches.prepare()
    session.restore()
    session.train()
    return session.finish()


class _Session:
    """Trainer, evaluator and what hangs on them."""

    def __init__(self, run: Run, report: Callable[[dict[str, Any]], None]) -> None:
        self.run, self.report, recipe = run, report, run.recipe
        self.device = run.batches.model.backbone.grid_encoding().device
        self.started, self.saved, self.spent, self.checking = time.monotonic(), time.monotonic(), 0.0, 0.0
        torch.manual_seed(recipe.seed)
        self.optimiser = torch.optim.AdamW(run.model.groups(recipe.lr, recipe.backbone_lr, recipe.weight_decay))
        total = recipe.epochs * run.steps
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda s: _cosine(s, total, self._time_share())
        )
        self.amp = self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp)
        features = encoded(run.model)
        limit = run.batches.left_bytes()
        self.features: FeaturesOf = features if run.model.changes_encoder else kept(features, limit)
        self.best: dict[str, Any] = {}
        self._build()

    def _build(self) -> None:
        from ignite.engine import Events
        from ignite.handlers import EarlyStopping  # MONAI's wrapper of it cannot be resumed
        from ignite.metrics import Average
        from monai.engines import Evaluator, SupervisedTrainer
        from monai.handlers import TensorBoardStatsHandler, ValidationHandler

        run, recipe = self.run, self.run.recipe
        board = str(run.folder / "tensorboard")
        per_epoch = TensorBoardStatsHandler(
            log_dir=board, iteration_log=False, global_epoch_transform=lambda _: self.trainer.state.epoch
        )
        per_step = TensorBoardStatsHandler(
            log_dir=board, tag_name="loss", output_transform=lambda out: out["loss"], epoch_log=False
        )
        self.evaluator = Evaluator(
            device=self.device,
            val_data_loader=list(run.validation),
            iteration_update=self._validate,
            key_val_metric={"val_mean_dice": Average(output_transform=lambda row: sum(row) / len(row))},
            val_handlers=[per_epoch],
            decollate=False,
        )
        self.trainer = SupervisedTrainer(
            device=self.device,
            max_epochs=recipe.epochs,
            train_data_loader=_Endless(),
            epoch_length=run.steps,
            network=run.model,
            optimizer=self.optimiser,
            loss_function=lambda *_: None,
            iteration_update=self._step,
            decollate=False,
            train_handlers=[ValidationHandler(1, self.evaluator), per_step],
        )
        self.stopper = EarlyStopping(recipe.patience, lambda e: e.state.metrics["val_mean_dice"], self.trainer)
        self.evaluator.add_event_handler(Events.STARTED, lambda: self._start_validation())
        self.evaluator.add_event_handler(Events.COMPLETED, lambda: self._end_validation())
        self.evaluator.add_event_handler(Events.COMPLETED, self.stopper)
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: self._after_step())
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: self._after_epoch())

    def _step(self, engine: Any, _: Any) -> dict[str, float]:
        run, step = self.run, engine.state.iteration
        run.model.train()
        run.model.progress = max((step - 1) / (run.recipe.epochs * run.steps), self._time_share())
        torch.manual_seed(run.recipe.seed * 1_000_003 + step)  # dropout too is a function of the step
        with self._autocast():
            features, target = run.batches.batch(step)
        rounds = losses_of(run.model, features, target, run.recipe.loss, step)
        found = list(iter(lambda: self._round(rounds, step), None))
        self.scheduler.step()
        return found[0]  # later rounds only correct it

    def _round(self, rounds: Iterator[tuple[Tensor, dict[str, float]]], step: int) -> Optional[dict[str, float]]:
        """One optimiser step on the next loss; None where there is none left."""
        self.optimiser.zero_grad(set_to_none=True)
        with self._autocast():
            loss, parts = next(rounds, (None, {}))
        if loss is None:
            return None
        if not math.isfinite(parts["loss"]):
            raise ConfigError(f"The loss became {parts['loss']} in step {step}. Train again with a smaller lr.")
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)
        torch.nn.utils.clip_grad_norm_([p for g in self.optimiser.param_groups for p in g["params"]], 1.0)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return parts

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.float16, enabled=self.amp)

    def _after_step(self) -> None:
        # not after an epoch's last step: a run that goes on from there would never validate that epoch
        if time.monotonic() - self.saved > SAVE_S and self.trainer.state.iteration % self.run.steps:
            self.save()
        self._tell()
        if self._time_share() >= 1.0:
            self.trainer.terminate_epoch()  # MONAI's handler still validates it

    def _after_epoch(self) -> None:
        self.save()
        if self._time_share() >= 1.0:
            self.trainer.terminate()

    def _time_spent(self) -> float:
        """Seconds of training, those before a kill included."""
        return self.spent + time.monotonic() - self.started

    def _time_share(self) -> float:
        """Part of the recipe's minutes that is gone, room for one more validation left; 0 without a limit."""
        limit_s = 60.0 * self.run.recipe.minutes
        return (self._time_spent() + self.checking) / limit_s if limit_s else 0.0

    def _start_validation(self) -> None:
        self.run.model.eval()
        self.check_started = time.monotonic()
        self._rows: dict[str, list[float]] = {}

    def _validate(self, _: Any, case: TrainingCase) -> list[float]:
        found = case_dice(segmented(self.run.model, case, self.features), case.target, len(self.run.labels))
        self._rows[case.case] = found
        return found

    def _end_validation(self) -> None:
        from safetensors.torch import save_file

        metrics = summary(self._rows, self.run.labels)
        if metrics["mean_dice"] > self.best.get("mean_dice", -1.0):
            self.best = {**metrics, "epoch": self.trainer.state.epoch}
            partial = self.run.folder / f"{BEST}.part"
            save_file(self.run.model.trained(), partial, metadata={"best": json.dumps(self.best)})
            os.replace(partial, self.run.folder / BEST)
        self.checking = time.monotonic() - self.check_started
        logger.info("epoch %d: validation Dice %.4f", self.trainer.state.epoch, metrics["mean_dice"])
        self._tell(force=True)

    def _tell(self, force: bool = False) -> None:
        state = self.trainer.state
        total, done = self.run.recipe.epochs * self.run.steps, state.iteration
        spent = self._time_spent()
        entry = {
            "epoch": state.epoch, "total_epochs": self.run.recipe.epochs, "step": done, "total_steps": total,
            "loss": (state.output or {}).get("loss"), "best_metric": self.best.get("mean_dice"), "total_time": spent,
            "time_left_s": self._left(total, done, spent),
        }  # fmt: skip
        if force or done % 5 == 0:
            write_json(self.run.folder / PROGRESS, entry)
        self.report(entry)

    def _left(self, total: int, done: int, spent: float) -> float:
        left = (total - done) * spent / max(1, done)
        limit_s = 60.0 * self.run.recipe.minutes
        return min(left, max(0.0, limit_s - spent)) if limit_s else left

    def save(self) -> None:
        """The whole state, replaced atomically."""
        state = {
            "model": self.run.model.trained(), "optimiser": self.optimiser.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch}, "scaler": self.scaler.state_dict(),
            "trainer": dict(self.trainer.state_dict()), "stopper": dict(self.stopper.state_dict()),
            "spent": self._time_spent(),
        }  # fmt: skip
        partial = self.run.folder / f"{STATE}.part"
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.run.folder / STATE)
        self.saved = time.monotonic()

    def restore(self) -> None:
        """Takes up the state of a run that was cut off."""
        path = self.run.folder / STATE
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - a file that a power cut left may raise anything
            logger.warning("the state of the run cannot be read, so it starts anew: %s", type(error).__name__)
            return
        self.run.model.restore(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        if state["scaler"]:  # empty where the run began on a CPU
            self.scaler.load_state_dict(state["scaler"])
        self.trainer.load_state_dict(state["trainer"])
        self.stopper.load_state_dict(state["stopper"])
        self.spent = state["spent"]
        self.best = read_best(self.run.folder)
        logger.info("resumed at step %d", self.trainer.state.iteration)

    def train(self) -> None:
        """Runs to the end, unless it is there already."""
        patience_gone = (self.stopper.counter or 0) >= self.run.recipe.patience
        stopped = patience_gone or (self._time_share() >= 1.0 and bool(self.best))
        if self.trainer.state.iteration < self.run.recipe.epochs * self.run.steps and not stopped:
            self.trainer.run()

    def finish(self) -> dict[str, Any]:
        """Puts the best tensors into the model and returns their metrics."""
        from safetensors.torch import load_file

        self.run.model.restore(load_file(self.run.folder / BEST))
        self.run.model.eval()
        return self.best


class _Endless:
    """MONAI wants a loader; a batch is made from the step's number instead, which resuming needs."""

    def __iter__(self) -> Any:
        while True:
            yield {}


def _cosine(step: int, total: int, share: float = 0.0) -> float:
    """From 1 to a tenth, after a short warm-up; ``share`` of the time is gone, where that is more than of the steps."""
    warm = max(1, min(50, total // 20))
    if step < warm:
        return min((step + 1) / warm, _fallen(share))
    return _fallen(max(share, step / max(1, total)))


def _fallen(part: float) -> float:
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, part)))


def read_best(folder: Path) -> dict[str, Any]:
    """Metrics of the best epoch so far, or nothing."""
    from safetensors import safe_open

    if not (folder / BEST).exists():
        return {}
    with safe_open(folder / BEST, "pt") as file:
        return json.loads(file.metadata()["best"])


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file atomically."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(json.dumps(value))
    os.replace(partial, path)
