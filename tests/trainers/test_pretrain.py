"""Pretraining: data stay inside the split, legs resume to the step, weights come out loadable."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.config import CONFIG_DIR, backbone_row, from_mapping, read_yaml
from lib.data.augment import augment, choose_objects, neighbour
from lib.data.split import hippocampus_split, nuclei_split
from lib.data.synthetic import make_sample
from lib.nn.losses import pair_loss
from trainers import pretrain, pretrain_data
from trainers.pretrain import Bank, Recipe, Trainer

SMALL = {"widths": [8, 16, 32], "depths": [1, 1, 1], "heads": 2, "decoder_heads": 2, "decoder_mlp": 32}


@pytest.fixture
def recipe() -> Recipe:
    spec = {**backbone_row("compact").spec, "prompt_width": 32, "input_size": 64}
    backbone = {"module": "compact", "spec": spec, "size": SMALL}
    return Recipe(
        backbone=backbone,
        synthetic=6,
        side=64,
        sides=(32, 64),
        steps=(3, 3),
        batch=2,
        objects=2,
        rounds=(1, 2),
        warmup=2,
    )


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe) -> Path:
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(recipe)))
    return tmp_path


def test_recipe_survives_json(run: Path, recipe: Recipe) -> None:
    assert pretrain.read_recipe(run) == replace(recipe, backbone=pretrain.read_recipe(run).backbone)


def test_shipped_recipe_is_valid() -> None:
    recipe = from_mapping(Recipe, {**read_yaml(CONFIG_DIR / "pretrain.yaml"), "backbone": {}}, "pretrain.yaml")
    assert len(recipe.sides) == len(recipe.steps) == len(recipe.rounds)
    assert "acdc" not in dict(recipe.mix)


def test_train_resumed_legs_equal_one_leg(run: Path, recipe: Recipe) -> None:
    assert pretrain.train_leg(run, 10, "cpu")
    whole = torch.load(run / "state.pt", weights_only=True)
    (run / "state.pt").unlink()
    trainer, bank = Trainer(recipe, "cpu"), Bank(run, recipe)
    for _ in range(2):
        trainer.learn(bank)
    pretrain.save(trainer, run / "state.pt")
    assert pretrain.train_leg(run, 10, "cpu")
    resumed = torch.load(run / "state.pt", weights_only=True)
    assert resumed["step"] == whole["step"] == 6
    for name, value in whole["model"].items():
        torch.testing.assert_close(resumed["model"][name], value)


def test_train_leg_without_time_does_nothing_but_save(run: Path) -> None:
    assert not pretrain.train_leg(run, 0, "cpu")
    assert torch.load(run / "state.pt", weights_only=True)["step"] == 0


def test_training_lowers_the_loss(run: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "augment", lambda images, labels, side, rng: (images, labels[:, 0].long()))
    recipe = replace(recipe, synthetic=1, sides=(64,), steps=(40,), rounds=(1,), lr=3e-3, mix=(("synthetic", 1.0),))
    trainer, bank = Trainer(recipe, "cpu"), Bank(run, recipe)
    losses = [r["loss"] for _ in range(40) if (r := trainer.learn(bank))]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_export_loads_as_the_backbone(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    pretrain.train_leg(run, 10, "cpu")
    target = tmp_path / "weights.safetensors"
    row = tmp_path / "row.yaml"
    row.write_text("weights:\n  bytes: 0\n  sha256: null\n")
    digest = pretrain.export(run, target, row)
    assert read_yaml(row)["weights"] == {"bytes": target.stat().st_size, "sha256": digest}
    tensors = load_file(target)
    assert len(digest) == 64
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    recipe = pretrain.read_recipe(run)
    assert set(tensors) == set(Trainer(recipe, "cpu").model.state_dict())


def test_make_sample_is_deterministic_and_varied() -> None:
    image, labels = make_sample(5, 64)
    again, _ = make_sample(5, 64)
    assert np.array_equal(image, again)
    assert image.shape == (64, 64, 3)
    assert image.dtype == labels.dtype == np.uint8
    assert len({make_sample(s, 64)[1].max() for s in range(8)}) > 2


def test_augment_moves_image_and_labels_together() -> None:
    labels = torch.zeros(1, 1, 64, 64)
    labels[..., 20:40, 25:45] = 1
    image, moved = augment(labels.expand(-1, 3, -1, -1), labels, 64, torch.Generator().manual_seed(3))
    inside = image[0, 0][moved[0] == 1].mean()
    outside = image[0, 0][moved[0] == 0].mean()
    assert abs(inside - outside) > 0.8  # inversion may swap them


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


def test_pair_loss_absent_pairs_teach_objectness_only() -> None:
    from lib.contracts import DecoderOut

    masks = torch.randn(2, 4, 8, 8, requires_grad=True)
    out = DecoderOut(masks, torch.rand(2, 4), torch.zeros(2, 1, requires_grad=True), torch.zeros(2, 4, 8))
    loss, _, _ = pair_loss(out, torch.ones(2, 8, 8), torch.tensor([True, False]), multimask=True)
    loss.backward()
    assert masks.grad is not None
    assert masks.grad[0].abs().sum() > 0
    assert masks.grad[1].abs().sum() == 0


def test_convert_takes_pretraining_cases_only(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = pretrain_data._volume_slices

    def record(image: Path, label: Path, side: int, step: int, k_limit: int | None = None) -> object:
        opened.append(image.name.split(".")[0])
        assert k_limit == (82 if image.name.startswith("ct_torso") else None)
        return original(image, label, side, 16, k_limit)

    pictures, crop = set(), pretrain_data._nuclei_crops

    def note(folder: Path, case: str, side: int, rng: object) -> object:
        pictures.add(case)
        return crop(folder, case, side, rng)

    monkeypatch.setattr(pretrain_data, "_volume_slices", record)
    monkeypatch.setattr(pretrain_data, "_nuclei_crops", note)
    pretrain_data.convert(data_dir, None, tmp_path)
    names = [p.name for p in (data_dir / "hippocampus").glob("*.nii.gz")]
    assert set(opened) == set(hippocampus_split(names)["pretrain"]) | {"ct_torso", "mr_slab"}
    assert not list(tmp_path.glob("*acdc*"))
    nuclei = [p.name for p in (data_dir / "nuclei").glob("*.png")]
    assert pictures == set(nuclei_split(nuclei)["pretrain"])
