"""Pretraining: data stay inside the split, legs resume to the step, workers agree, weights come out loadable."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lib.config import CONFIG_DIR, backbone_row, from_mapping, read_yaml
from lib.contracts import DecoderOut
from lib.data import synthetic
from lib.data.augment import augment, choose_objects, degrade, neighbour
from lib.data.split import hippocampus_split, nuclei_split
from lib.data.synthetic import make_sample
from lib.nn.losses import area_bce, balanced_bce, pair_loss
from trainers import pretrain, pretrain_data, pretrain_loop
from trainers.pretrain_loop import Bank, Recipe, Trainer, load_shard, read_recipe, save_shard
from trainers.pretrain_state import SHARD_BYTES, draw_curves, load_state, save_state

SMALL = {"widths": [8, 16, 32], "depths": [1, 1, 1], "heads": 2, "decoder_heads": 2, "decoder_mlp": 32}
RECIPES = ("pretrain.yaml", "pretrain_gpu.yaml")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe() -> Recipe:
    spec = {**backbone_row("compact").spec, "prompt_width": 32, "input_size": 64}
    backbone = {"module": "compact", "spec": spec, "size": SMALL}
    steps, silent = (3, 3), (0.5, 0.5)
    return Recipe(
        backbone,
        synthetic=6,
        side=64,
        sides=(32, 64),
        connected=(0.0, 0.85),
        steps=steps,
        batch=2,
        objects=2,
        silent=silent,
        warmup=2,
    )


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe) -> Path:
    return write_recipe(tmp_path, recipe)


def write_recipe(run: Path, recipe: Recipe) -> Path:
    (run / "recipe.json").write_text(json.dumps(asdict(recipe)))
    return run


def shipped(name: str) -> Recipe:
    row = read_yaml(CONFIG_DIR / "backbones" / "compact.yaml")
    row.pop("weights")
    return from_mapping(Recipe, {**read_yaml(CONFIG_DIR / name), "backbone": row}, name)


def finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors.values())


# recipe and bank


def test_recipe_survives_json(run: Path, recipe: Recipe) -> None:
    assert read_recipe(run) == replace(recipe, backbone=read_recipe(run).backbone)


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipe_is_valid(name: str) -> None:
    recipe = shipped(name)
    assert len(recipe.sides) == len(recipe.steps)
    assert all(side % 32 == 0 for side in recipe.sides)
    assert math.isclose(sum(recipe.silent), 1) and math.isclose(sum(recipe.first), 1) and len(recipe.first) == 5
    assert recipe.batch % recipe.workers == 0
    assert math.isclose(sum(dict(recipe.mix).values()), 1)
    assert "acdc" not in dict(recipe.mix)


def test_shard_keeps_native_sizes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (40, 30), np.uint8), rng.integers(0, 3, (40, 30), np.uint8)
    colour = rng.integers(0, 256, (48, 48, 3), np.uint8), rng.integers(0, 250, (48, 48), np.uint8)
    save_shard(tmp_path / "x.npz", [grey, colour])
    with np.load(tmp_path / "x.npz") as shard:
        assert shard["image_0"].shape == shard["labels_0"].shape == (40, 30)
    squashed, same = load_shard(tmp_path / "x.npz", 48)
    assert squashed[0].shape == squashed[1].shape == (48, 48)
    assert squashed[0].dtype == squashed[1].dtype == np.uint8
    assert set(np.unique(squashed[1])) <= {0, 1, 2}
    np.testing.assert_array_equal(same[0], colour[0])
    np.testing.assert_array_equal(same[1], colour[1])


def test_load_shard_absent_gives_nothing(tmp_path: Path) -> None:
    assert load_shard(tmp_path / "x.npz", 64) == []


def test_bank_takes_what_the_mix_names_and_never_acdc(run: Path, recipe: Recipe) -> None:
    pair = np.full((20, 30), 9, np.uint8), np.ones((20, 30), np.uint8)
    for name in ("organs", "acdc"):
        save_shard(run / f"{name}.npz", [pair])
    bank = Bank(run, recipe)
    assert bank.names == ["synthetic", "organs"]  # hippocampus and nuclei are absent here
    np.testing.assert_allclose(bank.weights, np.array([0.5, 0.2]) / 0.7)
    images, labels = bank.draw(5, np.random.default_rng(0))
    assert images.shape == (5, 64, 64, 3) and labels.shape == (5, 64, 64)


# legs


def test_train_resumed_legs_equal_one_leg(run: Path, recipe: Recipe) -> None:
    assert pretrain.train_leg(run, 10, "cpu")
    whole = load_state(run)
    (run / "state-6").rename(run / "whole")
    trainer, bank = Trainer(recipe, "cpu"), Bank(run, recipe)
    for _ in range(2):
        trainer.learn(bank)
    save_state(run, trainer.step, *trainer.state())
    assert pretrain.train_leg(run, 10, "cpu")
    resumed = load_state(run)
    assert whole is not None and resumed is not None
    assert resumed[1]["step"] == whole[1]["step"] == 6
    assert set(resumed[0]) == set(whole[0])
    for name, value in whole[0].items():
        torch.testing.assert_close(resumed[0][name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_train_leg_without_time_does_nothing_but_save(run: Path) -> None:
    assert not pretrain.train_leg(run, 0, "cpu")
    state = load_state(run)
    assert state is not None and state[1]["step"] == 0


def test_train_leg_logs_and_draws(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "LOG_EVERY", 2)
    assert pretrain.train_leg(run, 10, "cpu")
    state = load_state(run)
    assert state is not None
    assert [h["step"] for h in state[1]["history"]] == [2, 4, 6]
    assert [p.name for p in run.glob("state*")] == ["state-6"]
    assert (run / "curves.png").stat().st_size > 0


def test_two_workers_train_and_resume(run: Path, recipe: Recipe) -> None:
    write_recipe(run, replace(recipe, workers=2, steps=(1, 1)))
    assert pretrain.train_leg(run, 10, "cpu")
    first = load_state(run)
    assert first is not None and first[1]["step"] == 2 and finite(first[0])
    write_recipe(run, replace(recipe, workers=2, steps=(1, 2)))
    assert pretrain.train_leg(run, 10, "cpu")
    second = load_state(run)
    assert second is not None and second[1]["step"] == 3 and finite(second[0])
    assert second[0]["optimiser.0.step"] == 3  # moments go on instead of starting anew
    assert any(not torch.equal(first[0][n], v) for n, v in second[0].items() if n.startswith("model."))


def learn_beside(worker: int, run: Path, recipe: Recipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{run}/meeting", rank=worker, world_size=recipe.workers)
    trainer, bank = Trainer(recipe, "cpu", worker), Bank(run, recipe)
    drawn = trainer.batch(bank)[0]
    for _ in range(2):
        trainer.learn(bank)
    torch.save({"x": drawn, **trainer.state()[0]}, run / f"worker-{worker}.pt")
    dist.destroy_process_group()


def test_workers_see_other_images_and_hold_the_same_model(run: Path, recipe: Recipe) -> None:
    recipe = replace(recipe, workers=2)
    Bank(run, recipe)
    torch.multiprocessing.spawn(learn_beside, (run, recipe), nprocs=2)
    one, other = (torch.load(run / f"worker-{n}.pt", weights_only=True) for n in range(2))
    assert not torch.equal(one.pop("x"), other.pop("x"))
    assert set(one) == set(other)
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


def test_training_lowers_the_loss(run: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_loop, "augment", lambda images, labels, side, rng: (images, labels[:, 0].long()))
    monkeypatch.setattr(pretrain_loop, "degrade", lambda images, rng: images)
    only = {"silent": (1.0,), "mix": (("synthetic", 1.0),), "balance": 1e-6}
    recipe = replace(recipe, synthetic=1, sides=(64,), steps=(40,), lr=3e-3, **only)
    trainer, bank = Trainer(recipe, "cpu"), Bank(run, recipe)
    losses = [trainer.learn(bank)["loss"] for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize(("step", "share"), [(0, 1.0), (50, 0.5), (100, 0.0), (500, 0.0)])
def test_balance_falls_to_nothing(recipe: Recipe, step: int, share: float) -> None:
    trainer = Trainer(replace(recipe, steps=(250, 250), balance=0.2), "cpu")
    trainer.step = step
    assert trainer.balance() == pytest.approx(share)


@pytest.mark.parametrize(("step", "phase"), [(0, 0), (2, 0), (3, 1), (5, 1), (6, 1)])
def test_phase_follows_the_steps(recipe: Recipe, step: int, phase: int) -> None:
    trainer = Trainer(recipe, "cpu")
    trainer.step = step
    assert trainer.phase == phase


# state


def test_state_of_the_shipped_recipe_is_small_enough(tmp_path: Path) -> None:
    trainer = Trainer(shipped("pretrain.yaml"), "cpu")
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    trainer.optimiser.step()
    tensors, plain = trainer.state()
    folder = save_state(tmp_path, 1, tensors, plain)
    sizes = [p.stat().st_size for p in folder.iterdir()]
    assert max(sizes) <= SHARD_BYTES
    assert sum(sizes) <= 48_000_000
    loaded = load_state(tmp_path)
    assert loaded is not None and loaded[1] == plain
    assert set(loaded[0]) == set(tensors)
    assert all(torch.equal(loaded[0][n], t.cpu()) for n, t in tensors.items())


def test_state_is_cut_into_shards(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.full((1_500_000,), float(n)) for n in range(5)}  # 6 MB each
    folder = save_state(tmp_path, 4, tensors, {"step": 4})
    assert len(list(folder.glob("shard-*.pt"))) == 3
    assert all(p.stat().st_size <= SHARD_BYTES for p in folder.iterdir())
    loaded = load_state(tmp_path)
    assert loaded is not None and all(torch.equal(loaded[0][n], t) for n, t in tensors.items())


def test_load_state_before_the_first_is_none(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None


def test_killed_save_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, 9, {"a": torch.ones(2)}, {"step": 9})
    original, calls = torch.save, []

    def fail_at_the_second(value: object, path: Path) -> None:
        assert (tmp_path / "state-9").is_dir()
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(value, path)

    big = {n: torch.zeros(3_000_000) for n in "ab"}  # two shards
    monkeypatch.setattr(torch, "save", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path, 10, big, {"step": 10})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state-9", "state.part"]
    state = load_state(tmp_path)
    assert state is not None and state[1] == {"step": 9} and state[0]["a"].tolist() == [1.0, 1.0]
    monkeypatch.undo()
    save_state(tmp_path, 10, big, {"step": 10})
    assert [p.name for p in tmp_path.iterdir()] == ["state-10"]


def test_old_state_goes_after_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, 99, {"a": torch.ones(2)}, {"step": 99})
    original, removed = pretrain.save_state.__globals__["shutil"].rmtree, []

    def note(path: Path, **options: object) -> None:
        if path.name.startswith("state-"):
            removed.append(path.name)
            assert (tmp_path / "state-100" / "state.json").exists()
        original(path, **options)

    monkeypatch.setattr("shutil.rmtree", note)
    save_state(tmp_path, 100, {"a": torch.ones(2)}, {"step": 100})
    assert removed == ["state-99"]


def test_state_of_the_same_step_is_never_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_state(tmp_path, 5, {"a": torch.ones(2)}, {"step": 5})

    def refuse(path: Path, **_: object) -> None:
        assert path != folder

    monkeypatch.setattr("shutil.rmtree", refuse)
    assert save_state(tmp_path, 5, {"a": torch.ones(2)}, {"step": 5}) == folder
    assert load_state(tmp_path) is not None


def test_newest_state_counts_by_number(tmp_path: Path) -> None:
    old = save_state(tmp_path, 900, {"a": torch.zeros(1)}, {"step": 900})
    old.rename(tmp_path / "kept")
    save_state(tmp_path, 1000, {"a": torch.zeros(1)}, {"step": 1000})
    (tmp_path / "kept").rename(old)  # as after a kill between writing and removing
    state = load_state(tmp_path)
    assert state is not None and state[1]["step"] == 1000


@pytest.mark.parametrize(("count", "lines"), [(0, 0), (1, 0), (3, 3)])
def test_curves_are_a_readable_png(tmp_path: Path, count: int, lines: int) -> None:
    from PIL import Image

    history = [{"step": 100 * n, "loss": 1 / n, "dice_first": 0.5, "dice_last": n / 10} for n in range(1, count + 1)]
    draw_curves(history, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and picture.size == (900, 420)
        colours = {c for _, c in picture.getcolors(10_000)}
    drawn = {(0x1F, 0x77, 0xB4), (0xD6, 0x27, 0x28), (0x2C, 0xA0, 0x2C)}
    assert len(drawn & colours) == lines  # a single point gives a legend and no line


def test_export_loads_as_the_backbone(run: Path, recipe: Recipe, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trainer = Trainer(recipe, "cpu")
    save_state(run, 3, *trainer.state())
    target = tmp_path / "weights.safetensors"
    row = tmp_path / "row.yaml"
    row.write_text("weights:\n  bytes: 0\n  sha256: null\n")
    digest = pretrain.export(run, target, row)
    assert read_yaml(row)["weights"] == {"bytes": target.stat().st_size, "sha256": digest}
    tensors = load_file(target)
    assert len(digest) == 64
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert set(tensors) == set(trainer.model.state_dict())
    trainer.model.load_state_dict(tensors)


def test_export_without_state_says_what_to_do(run: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run train first"):
        pretrain.export(run, run / "x", run / "y")


# images


def test_make_sample_is_deterministic_and_varied() -> None:
    image, labels = make_sample(5, 64)
    again, _ = make_sample(5, 64)
    assert np.array_equal(image, again)
    assert image.shape == (64, 64, 3)
    assert image.dtype == labels.dtype == np.uint8
    assert len({make_sample(s, 64)[1].max() for s in range(8)}) > 2


@pytest.mark.parametrize("seed", range(12))
def test_chambers_have_a_wall_a_cavity_and_a_neighbour(seed: int) -> None:
    labels = np.zeros((128, 128), np.uint8)
    synthetic._chambers(np.random.default_rng(seed), labels)
    wall, cavity, beside = (labels == n for n in (1, 2, 3))
    assert labels.max() <= 3
    assert wall.sum() >= 12 and cavity.sum() >= 4
    rim = np.pad(cavity, 1)
    grown = rim[:-2, 1:-1] | rim[2:, 1:-1] | rim[1:-1, :-2] | rim[1:-1, 2:]
    assert not (grown & ~cavity & ~wall).any()  # the wall closes the cavity
    assert beside.sum() >= 12


@pytest.mark.parametrize("seed", range(12))
def test_crescent_is_one_label_with_a_bite(seed: int) -> None:
    labels = np.zeros((128, 128), np.uint8)
    labels[0, 0] = 4
    synthetic._crescent(np.random.default_rng(seed), labels)
    assert set(np.unique(labels)) == {0, 4, 5}
    assert 12 <= (labels == 5).sum() < 0.5 * labels.size


def test_augment_moves_image_and_labels_together() -> None:
    labels = torch.zeros(1, 1, 64, 64)
    labels[..., 20:40, 25:45] = 1
    image, moved = augment(labels.expand(-1, 3, -1, -1), labels, 64, torch.Generator().manual_seed(3))
    inside = image[0, 0][moved[0] == 1].mean()
    outside = image[0, 0][moved[0] == 0].mean()
    assert abs(inside - outside) > 0.8  # inversion may swap them


@pytest.mark.parametrize("side", [32, 96])
def test_degrade_keeps_shape_and_range(side: int) -> None:
    images = torch.rand(24, 3, side, side, generator=torch.Generator().manual_seed(0))
    first, again, other = (degrade(images, torch.Generator().manual_seed(s)) for s in (4, 4, 5))
    assert first.shape == images.shape and first.dtype == images.dtype
    assert first.isfinite().all() and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    changed = (first != images).flatten(1).any(1)
    assert changed.any() and not changed.all()  # some images stay as they are


def test_choose_objects_skips_images_without_any() -> None:
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[1, 10:30, 10:30] = 4
    masks, index = choose_objects(labels, 3, np.random.default_rng(0))
    assert index.tolist() == [1, 1, 1]
    assert masks.sum((1, 2)).tolist() == [400.0] * 3


def test_neighbour_stays_close() -> None:
    masks = torch.zeros(20, 32, 32, dtype=torch.bool)
    masks[:, 4:14, 18:28] = True
    moved = neighbour(masks, torch.Generator().manual_seed(0))
    overlap = 2 * (moved & masks).sum((1, 2)) / (moved.sum((1, 2)) + masks.sum((1, 2)))
    assert (overlap > 0.6).all()
    assert (overlap < 1).any()


# losses


@pytest.mark.parametrize(
    ("area", "logit", "expected"), [(16, 0.0, 0.25 * 64 * math.log(2) / 16.64), (64, 0.0, 0.17157)]
)
def test_area_bce_numbers(area: int, logit: float, expected: float) -> None:
    target = torch.zeros(1, 8, 8)  # one per cent of 64 cells is 0.64
    target.view(-1)[:area] = 1
    assert float(area_bce(torch.full((1, 8, 8), logit), target)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("share", "expected"), [(1 / 8, -1.9459), (1 / 4, -1.0986), (1 / 2, 0.0), (3 / 4, 1.0986), (7 / 8, 1.9459)]
)
def test_area_bce_of_an_unsure_region_is_least_at_its_share(share: float, expected: float) -> None:
    # one logit on a region of 8 x 8 cells that are foreground with probability `share`; zero elsewhere, and known
    target = torch.zeros(1, 16, 16)
    region = torch.zeros(1, 16, 16, dtype=torch.bool)
    region[:, 4:12, 4:12] = True
    target[:, 4:12, 4 : 4 + int(8 * share)] = 1

    def least(loss: object) -> float:
        tried = torch.linspace(-4, 4, 8001)
        logits = torch.where(region, tried[:, None, None], torch.tensor(-12.0))
        return float(tried[loss(logits, target.expand_as(logits)).argmin()])  # type: ignore[operator]

    assert least(area_bce) == pytest.approx(expected, abs=2e-3)
    if share < 1 / 2:  # the balanced one fills a region that is mostly background
        assert least(area_bce) < 0 < least(balanced_bce)


def test_area_bce_is_least_at_a_soft_target() -> None:
    target = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(0.02, 0.98)
    logits = torch.logit(target).requires_grad_()
    area_bce(logits, target).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(target), atol=1e-6, rtol=0)


def three_tokens(best: int) -> tuple[Tensor, DecoderOut, Tensor]:
    """Logits that need a gradient, an output of one pair where token ``best`` leads by a little, and its target."""
    target = torch.zeros(1, 16, 16)
    target[:, 4:12, 4:12] = 1
    logits = torch.zeros(1, 4, 16, 16)
    logits[:, best] = 0.01 * (2 * target - 1)
    logits.requires_grad_()
    return logits, DecoderOut(logits, torch.full((1, 4), 0.5), torch.zeros(1, 1), torch.zeros(1, 4, 8)), target


@pytest.mark.parametrize("best", [1, 2, 3])
@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_pair_loss_trains_losing_tokens_a_little(best: int, balance: float) -> None:
    logits, out, target = three_tokens(best)
    pair_loss(out, target, torch.tensor([True]), multimask=True, balance=balance)[0].backward()
    assert logits.grad is not None
    amount = logits.grad[0].flatten(1).norm(dim=1)
    losing = [n for n in (1, 2, 3) if n != best]
    for n in losing:  # 0.1 / 3 against 0.9 + 0.1 / 3
        assert float(amount[n] / amount[best]) == pytest.approx(1 / 28, rel=0.05)
    assert float(amount[0]) == pytest.approx(float(amount[losing[0]]) * 30, rel=1e-3)


def test_pair_loss_of_a_single_mask_leaves_the_three_alone() -> None:
    logits, out, target = three_tokens(1)
    pair_loss(out, target, torch.tensor([True]), multimask=False)[0].backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].abs().sum() > 0
    assert logits.grad[0, 1:].abs().sum() == 0


def test_pair_loss_reports_dice_of_the_single_mask() -> None:
    _, out, target = three_tokens(0)
    _, dice = pair_loss(out, target, torch.tensor([True]), multimask=True)
    assert float(dice) == pytest.approx(1.0, abs=1e-4)
    half = out.masks.detach().clone()
    half[:, 0, :8] = -1  # lower half of the square alone: Dice 2 * 32 / (32 + 64)
    _, dice = pair_loss(
        DecoderOut(half, out.iou, out.obj, out.mask_tokens), target, torch.tensor([True]), multimask=True
    )
    assert float(dice) == pytest.approx(2 / 3, abs=1e-4)


def test_pair_loss_absent_pairs_teach_objectness_only() -> None:
    masks, obj = torch.randn(2, 4, 8, 8, requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    iou = torch.rand(2, 4, requires_grad=True)
    out = DecoderOut(masks, iou, obj, torch.zeros(2, 4, 8))
    loss, _ = pair_loss(out, torch.ones(2, 8, 8), torch.tensor([True, False]), multimask=True)
    loss.backward()
    for grad in (masks.grad, iou.grad):
        assert grad is not None
        assert grad[0].abs().sum() > 0
        assert grad[1].abs().sum() == 0
    assert obj.grad is not None
    assert obj.grad[0] < 0 < obj.grad[1]


def test_pair_loss_without_any_present_pair_is_finite() -> None:
    _, out, target = three_tokens(1)
    loss, dice = pair_loss(out, target, torch.tensor([False]), multimask=True)
    assert float(loss.detach()) == pytest.approx(0.2 * math.log(2))
    assert float(dice) == 0


# conversion


def test_convert_takes_pretraining_cases_only(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = pretrain_data._volume_slices

    def record(image: Path, label: Path, step: int, k_limit: int | None = None) -> object:
        opened.append(image.name.split(".")[0])
        assert k_limit == (82 if image.name.startswith("ct_torso") else None)
        return original(image, label, 16, k_limit)

    pictures, crop = set(), pretrain_data._nuclei_crops

    def note(folder: Path, case: str, rng: np.random.Generator) -> object:
        pictures.add(case)
        return list(crop(folder, case, rng))[:1]

    monkeypatch.setattr(pretrain_data, "_volume_slices", record)
    monkeypatch.setattr(pretrain_data, "_nuclei_crops", note)
    recipe_file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe_file.write_text("synthetic: 2\nside: 64\n")
    pretrain_data.convert(data_dir, recipe_file, run)
    names = [p.name for p in (data_dir / "hippocampus").glob("*.nii.gz")]
    assert set(opened) == set(hippocampus_split(names)["pretrain"]) | {"ct_torso", "mr_slab"}
    nuclei = [p.name for p in (data_dir / "nuclei").glob("*.png")]
    assert pictures == set(nuclei_split(nuclei)["pretrain"])
    shards = {f"{name}.npz" for name in ("hippocampus", "nuclei", "organs", "synthetic")}
    assert {p.name for p in run.iterdir()} == {"recipe.json"} | shards  # nothing of ACDC
    bank = Bank(run, read_recipe(run))
    assert sorted(f"{n}.npz" for n in bank.names) == sorted(shards)
    assert len(bank.sources["nuclei"]) == len(pictures)
    assert all(labels.any() for _, labels in bank.sources["hippocampus"])


def test_convert_goes_without_absent_sources(tmp_path: Path) -> None:
    recipe_file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe_file.write_text("synthetic: 2\nside: 64\n")
    pretrain_data.convert(tmp_path / "nowhere", recipe_file, run)
    assert Bank(run, read_recipe(run)).names == ["synthetic"]


@pytest.mark.parametrize(("names", "expected"), [((0, 3, 900), (0, 1, 2)), ((5, 7, 7), (1, 2, 2))])
def test_instances_are_renumbered(names: tuple[int, ...], expected: tuple[int, ...]) -> None:
    labels = pretrain_data._renumbered(np.array([names], np.uint16))
    assert labels.dtype == np.uint8
    assert labels.tolist() == [list(expected)]


def test_more_instances_than_a_byte_holds_are_dropped() -> None:
    labels = pretrain_data._renumbered(np.arange(300).reshape(1, -1))
    assert labels.max() == 250
    assert (labels[0, 251:] == 0).all()
