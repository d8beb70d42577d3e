"""``--conf`` strings to settings: a table of what converts and of what is refused with which words."""

from pathlib import Path

import pytest

from lib.config import AppSettings
from lib.errors import ConfigError

# --conf, setting, value
GOOD = [
    ({}, "backbone", "compact"),
    ({}, "labels", ("object",)),
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
]


@pytest.mark.parametrize(("conf", "name", "value"), GOOD)
def test_settings_from_conf_table(conf: dict[str, str], name: str, value: object) -> None:
    assert getattr(AppSettings.from_conf(conf), name) == value


BAD = [
    ({"bakbone": "tiny"}, r"unknown key 'bakbone'.*Did you mean 'backbone'\?"),
    ({"models": "sam"}, "unknown key 'models'"),
    ({"backbone": "compakt"}, r"Expected a backbone out of .*Did you mean 'compact'\?"),
    ({"prefetch": "maybe"}, "--conf prefetch: expected true or false, received 'maybe'"),
    ({"cache_memory_mb": "1.5"}, "--conf cache_memory_mb: expected a whole number, received '1.5'"),
    ({"cache_memory_mb": "0"}, "cache_memory_mb: expected 1 or more, received 0"),
    ({"cache_disk_mb": "-1"}, "cache_disk_mb: expected 0 or more"),
    ({"volumes_memory_mb": "0"}, "volumes_memory_mb: expected 1 or more"),
    ({"device": "gpu"}, "device: expected auto, cpu, mps, cuda or cuda:N, received 'gpu'"),
    ({"labels": "liver,,spleen"}, "labels: expected at least one name"),
]


@pytest.mark.parametrize(("conf", "words"), BAD)
def test_settings_wrong_conf_is_named(conf: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AppSettings.from_conf(conf)
