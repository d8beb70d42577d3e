"""What the server was started with: ``configs/app.yaml`` and ``--conf`` strings become one frozen dataclass.

Unknown keys are errors that name the nearest valid spelling. Environment variables would be read here and only here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union, get_origin, get_type_hints

from lib.config import CONFIG_DIR, KINDS, backbone_row, from_mapping, method_row, read_yaml
from lib.errors import ConfigError
from lib.plugins import did_you_mean
from lib.train_rules import Rules

STATE_FOLDER = ".autosam"  # in the studies
UPSTREAM_CONF = ("server_mode",)  # the one key of --conf that MONAI Label's own base class reads
SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
LARGEST = 1e9  # of minutes that is 1900 years
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_MODALITY = re.compile(r"[A-Za-z0-9_]{1,16}")  # DICOM's code strings, in either case


@dataclass(frozen=True)
class AppSettings:
    """What the server was started with: ``configs/app.yaml`` overridden by ``--conf``.

    Args:
        backbone: name of a file in ``configs/backbones``.
        labels: names that clients offer for new segments and that training learns; empty: ``object`` is offered, and
            training takes what the saved labels declare.
        models: learned methods that are offered, names of files in ``configs/methods``.
        train_default: the one of them that OHIF's *Update Model* and the schedule train; empty: the first.
        train_at: when the schedule trains, a time of day or five cron fields; empty: never.
        train_after: new final labels after which it trains; 0: never.
        train_min_interval: minutes from one scheduled start to the next at least.
        train_hours: hours of the day in which it may start one, such as ``20:00-06:00``; empty: always.
        train_idle: minutes that nobody must have used the server before it starts one.
        train_minutes: minutes that one may take, as ``minutes`` of a train request; 0: no limit.
        modalities: DICOM modalities that a PACS's images are offered of, such as CT; empty: every image.
        state_dir: folder of trained versions; None means ``.autosam`` inside the studies, or for a DICOMweb address a
            folder of its own in the user's data folder.
        gate_tolerance: Dice that a class may lose on the validation cases when a new version's mean is better.
        keep_versions: so many of the newest versions are kept, and of those to roll back to; 0 keeps all.
        lease_minutes: how long an image that was handed out is offered to nobody else; 0: not at all.
        score_images: at most so many unlabelled images are scored in the background for active learning; 0: none.
        score_fetches: images that a PACS is asked for only to score them, from when a client first asks for the next.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``mps``, ``cuda`` or ``cuda:N``.
        weights_dir: folder of checkpoints; None means the user's data folder.
        download: False forbids every download.
        cache_dir: folder of the embedding cache's disk tier.
        cache_memory_mb: limit of the memory tier in MiB.
        cache_disk_mb: limit of the disk tier in MiB; 0 switches it off.
        volumes_memory_mb: limit of opened images that are kept, in MiB.
        prefetch: True encodes neighbouring slices in the background after a click.
        prefetch_slices: at most so many neighbours on each side of the clicked slice.
    """

    backbone: str
    labels: tuple[str, ...]
    models: tuple[str, ...]
    train_default: str
    train_at: str
    train_after: int
    train_min_interval: float
    train_hours: str
    train_idle: float
    train_minutes: float
    modalities: tuple[str, ...]
    state_dir: Optional[Path]
    gate_tolerance: float
    keep_versions: int
    lease_minutes: float
    score_images: int
    score_fetches: int
    device: str
    weights_dir: Optional[Path]
    download: bool
    cache_dir: Path
    cache_memory_mb: int
    cache_disk_mb: int
    volumes_memory_mb: int
    prefetch: bool
    prefetch_slices: int

    @classmethod
    def from_conf(cls, conf: Mapping[str, str]) -> AppSettings:
        """The defaults with ``--conf`` on top.

        Args:
            conf: strings, as MONAI Label hands them to the app.

        Raises:
            ConfigError: for an unknown key or backbone, or a value that does not convert.
        """
        values = read_yaml(CONFIG_DIR / "app.yaml")
        hints = get_type_hints(cls)
        for key, text in conf.items():
            if key in UPSTREAM_CONF:
                continue
            if key not in hints:
                near = did_you_mean(key, list(hints))
                raise ConfigError(f"--conf: unknown key {key!r}; valid keys are {sorted(hints)}.{near}")
            values[key] = _from_text(hints[key], str(text).strip(), f"--conf {key}")
        values["cache_dir"] = values["cache_dir"] or _user_cache()
        for key in ("cache_dir", "weights_dir", "state_dir"):
            values[key] = _folder(values[key], key) if values[key] else None
        settings = from_mapping(cls, values, "app.yaml")
        settings._check()
        return settings

    @property
    def rules(self) -> Rules:
        """Of the training schedule."""
        return Rules(
            self.train_at,
            self.train_after,
            self.train_min_interval,
            self.train_hours,
            self.train_idle,
            self.train_minutes,
        )

    @property
    def offered(self) -> tuple[str, ...]:
        """Names that clients offer for new segments."""
        return self.labels or ("object",)

    def versions_dir(self, studies: str) -> Path:
        """Folder of trained versions: with the studies, so that another study set cannot be answered with them."""
        if self.state_dir is not None:
            return self.state_dir
        if "://" not in studies:
            return Path(studies).expanduser().absolute() / STATE_FOLDER
        return _user_data() / f"state-{hashlib.sha256(studies.encode()).hexdigest()[:12]}"

    def _check(self) -> None:
        backbone_row(self.backbone)
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device: expected auto, cpu, mps, cuda or cuda:N, received {self.device!r}.")
        for model in self.models:
            method_row(model)
        if self.train_default and self.train_default not in self.models:
            raise ConfigError(f"train_default: expected one of {list(self.models)}, received {self.train_default!r}.")
        if not 0 <= self.gate_tolerance <= 1:
            raise ConfigError(f"gate_tolerance: expected a Dice from 0 to 1, received {self.gate_tolerance}.")
        if self.rules.enabled and not self.models:
            raise ConfigError("models: expected one that the schedule can train, received none. Unset train_at/after.")
        for modality in self.modalities:
            if not _MODALITY.fullmatch(modality):
                raise ConfigError(
                    "modalities: expected DICOM modalities of letters and digits, separated by commas, such as CT,MR;"
                    f" received {modality!r}."
                )
        self._check_labels()
        self._check_numbers()

    def _check_labels(self) -> None:
        from lib.data.samples import BACKGROUND  # not at the top: it brings in what reads images

        if not all(self.labels) or len(set(self.labels)) < len(self.labels):
            raise ConfigError(f"labels: expected different names, separated by commas, received {self.labels!r}.")
        if self.labels == (BACKGROUND,):
            raise ConfigError(f"labels: expected a structure's name too, received {BACKGROUND!r} alone. Add one.")

    def _check_numbers(self) -> None:
        for name, least in (
            ("cache_memory_mb", 1),
            ("cache_disk_mb", 0),
            ("volumes_memory_mb", 1),
            ("prefetch_slices", 0),
            ("keep_versions", 0),
            ("lease_minutes", 0),
            ("score_images", 0),
            ("score_fetches", 0),
        ):
            if not getattr(self, name) >= least:  # NaN is not
                raise ConfigError(f"{name}: expected {least} or more, received {getattr(self, name)}.")
        for name, value in vars(self).items():
            if isinstance(value, float) and not abs(value) <= LARGEST:  # infinity is not, nor what overflows as a date
                raise ConfigError(f"{name}: expected a finite number, {LARGEST:.0f} at most, received {value}.")


def _user_cache() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("autosam_label", appauthor=False)


def _user_data() -> Path:
    import platformdirs

    return platformdirs.user_data_path("autosam_label", appauthor=False)


def _folder(text: Union[str, Path], key: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:  # ``~name`` of nobody
        raise ConfigError(
            f"{key}: expected a folder, received {str(text)!r}, and no home folder of that user is known. Give the"
            " whole path."
        ) from None


def _from_text(hint: Any, text: str, where: str) -> Any:
    """One ``--conf`` string as the type of its setting."""
    try:
        if hint is bool:
            return SWITCH[text.lower()]
        if hint in (int, float):
            return hint(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{where}: expected {KINDS[hint]}, received {text!r}.") from None
    if get_origin(hint) is tuple:
        return tuple(part.strip() for part in text.split(",")) if text else ()
    return text
