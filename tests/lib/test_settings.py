"""``--conf`` strings and train requests to settings: tables of what converts and what is refused with which words."""

from pathlib import Path

import platformdirs
import pytest

from lib.config import TrainRecipe, method_names, method_row, override
from lib.errors import ConfigError
from lib.settings import AppSettings

# --conf, setting, value
GOOD = [
    ({}, "backbone", "compact"),
    ({}, "labels", ()),
    ({}, "offered", ("object",)),
    ({"labels": "spleen"}, "offered", ("spleen",)),
    ({}, "models", ("sam2rad",)),
    ({"models": " sam2rad "}, "models", ("sam2rad",)),
    ({}, "state_dir", None),
    ({"state_dir": "~/s"}, "state_dir", Path.home() / "s"),
    ({}, "weights_dir", None),
    ({"server_mode": "true"}, "prefetch", True),
    ({"prefetch": "Off"}, "prefetch", False),
    ({"download": "0"}, "download", False),
    ({"cache_disk_mb": " 0 "}, "cache_disk_mb", 0),
    ({"labels": "left kidney, spleen"}, "labels", ("left kidney", "spleen")),
    ({"device": "cuda:1"}, "device", "cuda:1"),
    ({"backbone": "tiny"}, "backbone", "tiny"),
    ({"cache_dir": "~/c"}, "cache_dir", Path.home() / "c"),
    ({"weights_dir": "/w"}, "weights_dir", Path("/w")),
    ({}, "gate_tolerance", 0.02),
    ({"gate_tolerance": " 0.1 "}, "gate_tolerance", 0.1),
    ({"keep_versions": "0"}, "keep_versions", 0),
    ({"modalities": "CT, MR"}, "modalities", ("CT", "MR")),
    ({"modalities": "ct"}, "modalities", ("ct",)),
    ({"labels": "background, liver"}, "labels", ("background", "liver")),
    ({"lease_minutes": "0.5"}, "lease_minutes", 0.5),
]


@pytest.mark.parametrize(("conf", "name", "value"), GOOD)
def test_settings_from_conf_table(conf: dict[str, str], name: str, value: object) -> None:
    assert getattr(AppSettings.from_conf(conf), name) == value


BAD = [
    ({"bakbone": "tiny"}, r"unknown key 'bakbone'.*Did you mean 'backbone'\?"),
    ({"model": "sam2rad"}, r"unknown key 'model'.*Did you mean 'models'\?"),
    ({"models": "sam2rat"}, r"Expected a model out of .*Did you mean 'sam2rad'\?"),
    ({"models": "sam2rad,../x"}, r"Expected a model out of .*received '\.\./x'"),
    ({"backbone": "compakt"}, r"Expected a backbone out of .*Did you mean 'compact'\?"),
    ({"prefetch": "maybe"}, "--conf prefetch: expected true or false, received 'maybe'"),
    ({"cache_memory_mb": "1.5"}, "--conf cache_memory_mb: expected a whole number, received '1.5'"),
    ({"cache_memory_mb": "0"}, "cache_memory_mb: expected 1 or more, received 0"),
    ({"cache_disk_mb": "-1"}, "cache_disk_mb: expected 0 or more"),
    ({"volumes_memory_mb": "0"}, "volumes_memory_mb: expected 1 or more"),
    ({"device": "gpu"}, "device: expected auto, cpu, mps, cuda or cuda:N, received 'gpu'"),
    ({"gate_tolerance": "much"}, "--conf gate_tolerance: expected a number, received 'much'"),
    ({"gate_tolerance": "-0.1"}, "gate_tolerance: expected a Dice from 0 to 1, received -0.1"),
    ({"gate_tolerance": "nan"}, "gate_tolerance: expected a Dice from 0 to 1"),
    ({"keep_versions": "-1"}, "keep_versions: expected 0 or more, received -1"),
    ({"labels": "liver,,spleen"}, "labels: expected different names, separated by commas"),
    ({"labels": "liver, liver"}, "labels: expected different names"),
    ({"labels": "background"}, "labels: expected a structure's name too, received 'background' alone"),
    *[({"lease_minutes": text}, "lease_minutes: expected a finite number, .*received") for text in ("inf", "1e300")],
    ({"lease_minutes": "-inf"}, "lease_minutes: expected 0 or more"),
    ({"train_at": "02:00", "train_idle": "inf"}, "train_idle: expected a number of at least 0, received inf"),
    ({"train_minutes": "1e300"}, "train_minutes: expected a finite number"),
    ({"modalities": "CT MR"}, "modalities: expected .* separated by commas, such as CT,MR; received 'CT MR'"),
    ({"modalities": "CT,"}, "modalities: expected .*received ''"),
    ({"modalities": "M" * 17}, "modalities: expected"),
    *[({key: "~nobody-here/x"}, f"{key}: expected a folder, .*whole path") for key in ("cache_dir", "weights_dir")],
    ({"state_dir": "~nobody-here"}, "state_dir: expected a folder, received '~nobody-here'"),
]


@pytest.mark.parametrize(("conf", "words"), BAD)
def test_settings_wrong_conf_is_named(conf: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AppSettings.from_conf(conf)


def test_versions_lie_with_the_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = AppSettings.from_conf({})
    assert settings.versions_dir(str(tmp_path / "studies")) == tmp_path / "studies" / ".autosam"
    monkeypatch.chdir(tmp_path)
    assert settings.versions_dir("studies") == tmp_path / "studies" / ".autosam"
    assert settings.versions_dir("~/studies") == Path.home() / "studies" / ".autosam"


def test_versions_of_a_dicomweb_address_have_a_folder_of_their_own() -> None:
    settings = AppSettings.from_conf({})
    a, b = (settings.versions_dir(f"http://{host}:8042/dicom-web") for host in ("one", "two"))
    assert a != b
    assert a == settings.versions_dir("http://one:8042/dicom-web")
    assert a.parent == platformdirs.user_data_path("autosam_label", appauthor=False)
    assert "one" not in str(a.name)


@pytest.mark.parametrize("studies", ["/studies", "http://one:8042/dicom-web"])
def test_versions_lie_where_they_are_told_to(tmp_path: Path, studies: str) -> None:
    assert AppSettings.from_conf({"state_dir": str(tmp_path)}).versions_dir(studies) == tmp_path


# train request, setting, value
SET = [
    ({}, "epochs", TrainRecipe().epochs),
    ({"epochs": 5}, "epochs", 5),
    ({"epochs": " 5 "}, "epochs", 5),
    ({"epochs": [5, 6]}, "epochs", 5),  # a choice as Slicer sends it
    ({"epochs": None}, "epochs", TrainRecipe().epochs),
    ({"epochs": ""}, "epochs", TrainRecipe().epochs),
    ({"lr": "1e-3"}, "lr", 1e-3),
    ({"lr": 1}, "lr", 1.0),
    ({"preset": ["full", "frozen"]}, "preset", "full"),
    ({"steps": 0}, "steps", 0),
    ({"memory_mb": 0}, "memory_mb", 0),
    ({"model": "sam2rad", "client_id": "x", "local_rank": 0}, "epochs", TrainRecipe().epochs),  # not ours
]


@pytest.mark.parametrize(("request_", "name", "value"), SET)
def test_override_table(request_: dict[str, object], name: str, value: object) -> None:
    got = getattr(override(TrainRecipe(), request_), name)
    assert got == value
    assert type(got) is type(value)


WRONG = [
    ({"epochs": "many"}, "epochs: expected a whole number, received 'many'"),
    ({"epochs": 2.5}, "epochs: expected a whole number, received 2.5"),
    ({"epochs": True}, "epochs: expected a whole number, received True"),
    ({"epochs": {"a": 1}}, "epochs: expected a whole number"),
    ({"epochs": []}, "epochs: expected a whole number"),
    ({"epochs": 0}, "epochs: expected a number above 0, received 0"),
    ({"batch": -1}, "batch: expected a number above 0, received -1"),
    ({"lr": "fast"}, "lr: expected a number, received 'fast'"),
    ({"lr": 0}, "lr: expected a number above 0, received 0.0"),
    ({"lr": "nan"}, "lr: expected a number above 0, received nan"),
    ({"backbone_lr": -1}, "backbone_lr: expected a number above 0"),
    ({"patience": 0}, "patience: expected a number above 0"),
]


@pytest.mark.parametrize(("request_", "words"), WRONG)
def test_override_wrong_value_is_named(request_: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        override(TrainRecipe(), request_)


@pytest.mark.parametrize("name", method_names())
def test_method_rows_are_complete(name: str) -> None:
    row = method_row(name)
    assert row.name == name
    assert override(row.recipe, {}) == row.recipe
