"""Checkpoints to backbones: safe, strict; and real save, serve, fetch and load (METHODS 1.3, loader rule)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lib import loading, weights
from lib.config import BackboneRow, WeightsEntry, backbone_row
from lib.contracts import Backbone, PromptSet
from lib.decoder import decode
from lib.errors import ConfigError, WeightsError
from lib.loading import load_backbone, load_into, load_state
from tests.lib.weight_server import Served, serving


@pytest.fixture
def served(tmp_path, monkeypatch) -> Iterator[Served]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(weights, "PAUSE_S", 0.0)
    with serving(tmp_path / "www") as served:
        yield served


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "weights"


CONTENT = bytes(range(256)) * 40_000  # 10.24 MB


@pytest.fixture
def tiny() -> Backbone:
    return load_backbone("tiny", random_seed=0)


def test_random_seed_repeats_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    a, b, c = (load_backbone("tiny", random_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert a.weights_id == "random-1"
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.mask_decoder.iou_token.weight, c.mask_decoder.iou_token.weight)


def test_tiny_needs_no_file() -> None:
    assert load_backbone("tiny", download=False).weights_id == "random-0"


def test_unknown_name_and_missing_package_are_config_errors(monkeypatch) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'sam_vit_b'"):
        load_backbone("sam_vitb")

    def absent(kind: str, name: str) -> object:
        raise ModuleNotFoundError("No module named 'segment_anything'", name="segment_anything")

    monkeypatch.setattr(loading, "load_plugin", absent)
    with pytest.raises(ConfigError, match="needs the Python package segment_anything"):
        load_backbone("sam_vit_b", random_seed=0)


@pytest.mark.parametrize("wrap", ["", "model", "state_dict"])
def test_load_state_unwraps(tmp_path, tiny, wrap) -> None:
    state = tiny.state_dict()
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "a.pt")
    found = load_state(tmp_path / "a.pt", WeightsEntry("a.pt"))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_load_state_reads_safetensors(tmp_path, tiny) -> None:
    from safetensors.torch import save_file

    save_file(dict(tiny.state_dict()), tmp_path / "a.safetensors")
    assert load_state(tmp_path / "a.safetensors", WeightsEntry("a.safetensors")).keys() == tiny.state_dict().keys()


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_pickled_optimizer_object_does_not_break_safe_loading(tmp_path, optimizer) -> None:
    """As SAM-Med2D saves: ``{'model': state, 'optimizer': <object>}``."""
    model = torch.nn.Linear(3, 2)
    steps = optimizer(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    steps.step()
    safe = set(torch.serialization.get_safe_globals())  # its order varies from call to call
    torch.save({"model": model.float().state_dict(), "optimizer": steps}, tmp_path / "a.pth")
    found = load_state(tmp_path / "a.pth", WeightsEntry("a.pth", unwrap="model"))
    assert torch.equal(found["weight"], model.weight)
    assert set(torch.serialization.get_safe_globals()) == safe


class Evil:
    """Would create a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path) -> None:
    torch.save({"model": Evil(tmp_path / "run")}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"mkdir.*save its state dict alone"):
        load_state(tmp_path / "a.pt", WeightsEntry("a.pt"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_damaged_checkpoint_is_a_weights_error(tmp_path, tiny, name) -> None:
    torch.save(tiny.state_dict(), tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:5000])
    with pytest.raises(WeightsError, match="cannot be read as a checkpoint"):
        load_state(tmp_path / name, WeightsEntry(name))


@pytest.mark.parametrize("held", [[1, 2], {"epoch": 3}, {}])
def test_file_without_tensors_is_refused(tmp_path, held) -> None:
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="expected a dict of tensors"):
        load_state(tmp_path / "a.pt", WeightsEntry("a.pt"))


def test_wrong_architecture_names_five_keys(tiny) -> None:
    state = dict(tiny.state_dict())
    state["mask_decoder.iou_token.weight"] = torch.zeros(1, 3)
    del state["prompt_encoder.kinds.weight"]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(WeightsError) as caught:
        load_into(tiny, state, WeightsEntry("a.pt"), digest="x")
    message = str(caught.value)
    assert "1 missing: prompt_encoder.kinds.weight" in message
    assert "9 unexpected: extra.0" in message and "extra.4" in message and "extra.5" not in message
    assert "mask_decoder.iou_token.weight (1, 3) instead of (1, 32)" in message
    assert tiny.weights_id == "random-0"


def test_declared_keys_are_ignored_and_prefixes_renamed(tiny) -> None:
    state = {f"net.{key}": value + 1 for key, value in tiny.state_dict().items()} | {"memory.a": torch.zeros(1)}
    load_into(tiny, state, WeightsEntry("a.pt", prefix_map={"net.": ""}, ignore=("memory.",)), digest="d")
    assert tiny.weights_id == "d"
    assert torch.equal(tiny.mask_decoder.iou_token.weight, state["net.mask_decoder.iou_token.weight"])


def test_half_precision_checkpoint_is_loaded_as_float32(tiny) -> None:
    load_into(tiny, {key: value.half() for key, value in tiny.state_dict().items()}, WeightsEntry("a.pt"), digest="d")
    assert {p.dtype for p in tiny.parameters()} == {torch.float32}


# --- save, serve, fetch, load, compare -----------------------------------------------------------------------------


def official(name: str, backbone: Backbone) -> dict:
    """The state as the authors' file holds it, unused parts included."""
    state = dict(backbone.state_dict())
    if name.startswith("sam2"):
        return {"model": official_sam2(name) | state}
    if name == "mobile_sam":
        shapes = {
            "norm_head.weight": (320,),
            "norm_head.bias": (320,),
            "head.weight": (1000, 320),
            "head.bias": (1000,),
        }
        return state | {f"image_encoder.{key}": torch.zeros(shape) for key, shape in shapes.items()}
    if name == "sam_med2d":
        parameter = torch.nn.Parameter(torch.zeros(3))
        return {"model": state, "optimizer": torch.optim.Adam([parameter])}
    return state


def official_sam2(name: str) -> dict[str, torch.Tensor]:
    import sam2
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    version, size = name.split("_", 1)
    letter = {"tiny": "t", "large": "l"}[size]
    file = Path(sam2.__file__).parent / "configs" / version / f"{version}_hiera_{letter}.yaml"
    return instantiate(OmegaConf.load(file).model, _recursive_=True).state_dict()


def masks_at(backbone: Backbone) -> torch.Tensor:
    side = backbone.spec.input_size
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2))
    prompts = PromptSet(points_xy=torch.tensor([[[40.0, 60.0]]]), labels=torch.tensor([[1]]))
    with torch.no_grad():
        return decode(backbone.spec, backbone.mask_decoder, backbone.encode(x), backbone.embed_prompts(prompts)).masks


def round_trip(name: str, served: Served, folder: Path, monkeypatch) -> None:
    """Official layout, official tensor shapes; only the input side is 256 to keep the forward affordable."""
    row = backbone_row(name)
    row = replace(row, spec={**row.spec, "input_size": 256})
    monkeypatch.setattr(loading, "backbone_row", lambda _: row)
    torch.set_num_threads(1)
    source = load_backbone(name, random_seed=3)
    expected = masks_at(source)
    torch.save(official(name, source), served.folder / row.weights.file)
    del source
    size = (served.folder / row.weights.file).stat().st_size
    served.cut_after = [size // 2]  # broken off once, resumed once
    row = with_url(row, served, size)
    loaded = load_backbone(name, weights_dir=folder)
    assert served.asked == ["", f"bytes={size // 2}-"]
    assert torch.equal(masks_at(loaded), expected)
    assert loaded.weights_id == weights.file_digest(folder / row.weights.file)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for path in (served.folder / row.weights.file, folder / row.weights.file):
        path.unlink()  # pytest keeps temporary folders of three runs


def with_url(row: BackboneRow, served: Served, size: int) -> BackboneRow:
    entry = replace(row.weights, url=f"{served.url}/{row.weights.file}", bytes=size, sha256=None)
    object.__setattr__(row, "weights", entry)
    return row


@pytest.mark.parametrize("name", ["sam_vit_b", "sam2.1_tiny", "mobile_sam"])
def test_official_layout_survives_save_fetch_load(name, served, folder, monkeypatch) -> None:
    round_trip(name, served, folder, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam_vit_h", "sam2.1_large", "sam_med2d"])
def test_large_official_layout_survives_save_fetch_load(name, served, folder, monkeypatch) -> None:
    round_trip(name, served, folder, monkeypatch)


def test_file_of_another_size_does_not_load(tmp_path) -> None:
    small, large = load_backbone("sam2.1_tiny", random_seed=0), backbone_row("sam2.1_small")
    torch.save({"model": small.state_dict()}, tmp_path / large.weights.file)
    state = load_state(tmp_path / large.weights.file, large.weights)
    with torch.device("meta"):
        target = loading._build(large)
    with pytest.raises(WeightsError, match=r"does not fit the backbone sam2.1_small: .* missing"):
        load_into(target, state, large.weights, digest="x")
