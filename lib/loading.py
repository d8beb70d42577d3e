"""Builds a backbone by name and fills it with verified weights (METHODS 1.3, loader rule).

Files are read without executing code in them (``weights_only``), on the CPU, strictly: every key must be known, present
and of the right shape, except for the prefixes that the YAML row declares as unused. Thread-safe.
"""

from __future__ import annotations

import pickle
import threading
import zipfile
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from lib import weights
from lib.config import BackboneRow, WeightsEntry, backbone_row
from lib.contracts import Backbone, no_grad_eval
from lib.errors import ConfigError, WeightsError
from lib.plugins import load as load_plugin

SHOWN_KEYS = 5
WRAPPERS = ("model", "state_dict")
OPTIMIZERS = ("adam.Adam", "adamw.AdamW", "sgd.SGD")
TORCH_ADVICE = ("Weights only load failed", "Please file an issue", "Check the documentation")  # some of it unsafe
_reading = threading.Lock()  # torch's list of safe classes is global


def load_backbone(
    name: str,
    *,
    weights_dir: Union[str, Path, None] = None,
    download: bool = True,
    random_seed: Optional[int] = None,
) -> Backbone:
    """A frozen backbone on the CPU.

    Args:
        name: a YAML row in ``configs/backbones``.
        weights_dir: folder for weight files; None means the user's data folder.
        download: False never touches the network.
        random_seed: random weights instead of the file, for tests.

    Raises:
        ConfigError: for an unknown name, or a SAM package that is not installed.
        WeightsError: if the weights are missing, incomplete or wrong.
    """
    row = backbone_row(name)
    if random_seed is not None or not row.weights.file:
        return _random(row, random_seed or 0)
    path = weights.ensure(row.weights, weights.weights_dir(weights_dir), allow_download=download)
    with torch.device("meta"):  # random weights would cost seconds and twice the memory, only to be replaced
        backbone = _build(row)
    load_into(backbone, load_state(path, row.weights), row.weights, digest=_digest(row.weights, path))
    return backbone


def load_state(path: Path, entry: WeightsEntry) -> dict[str, Tensor]:
    """The state dict in a checkpoint, under its official keys.

    Raises:
        WeightsError: if the file is damaged, holds code, or holds something other than tensors.
    """
    try:
        held = _read(path)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(
            f"{path} cannot be read as a checkpoint of tensors: {_reason(error)}. If it is damaged, delete it and "
            "fetch it again; if it holds pickled objects, save its state dict alone and use that file."
        ) from error
    state = _unwrapped(held, (entry.unwrap, *WRAPPERS))
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: expected a dict of tensors, received {_summary(held)}.")
    return dict(state)


def load_into(backbone: Backbone, state: Mapping[str, Tensor], entry: WeightsEntry, *, digest: str) -> None:
    """Fills ``backbone``, freezes it and sets its ``weights_id``.

    Args:
        backbone: built for the same YAML row, on the meta device or not.
        state: official keys to tensors, from :func:`load_state`.
        entry: says which prefixes to rename and which to ignore.
        digest: SHA-256 of the file.

    Raises:
        WeightsError: if keys are missing or unexpected, or shapes differ; names up to five keys.
    """
    module = _as_module(backbone)
    renamed = {_renamed(key, entry): value for key, value in state.items() if not key.startswith(entry.ignore)}
    own = module.state_dict()
    _check_keys(backbone.spec.name, entry, own, renamed)
    cast = {key: value.to(dtype=own[key].dtype).contiguous() for key, value in renamed.items()}
    module.load_state_dict(cast, strict=True, assign=any(p.is_meta for p in own.values()))
    if any(t.is_meta for t in chain(module.parameters(), module.buffers())):
        raise WeightsError(
            f"{backbone.spec.name} keeps a buffer that no checkpoint holds; build it off the meta device."
        )
    no_grad_eval(module)
    backbone.weights_id = digest


def _random(row: BackboneRow, seed: int) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        backbone = _build(row)
    no_grad_eval(_as_module(backbone))
    backbone.weights_id = f"random-{seed}"
    return backbone


def _build(row: BackboneRow) -> Backbone:
    try:
        return load_plugin("backbones", row.module).build(row)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"The backbone {row.name} needs the Python package {error.name}, which is not installed. Install "
            "requirements.txt or choose another backbone."
        ) from error


def _as_module(backbone: Backbone) -> nn.Module:
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"A backbone is an nn.Module; received {type(backbone).__name__}.")
    return backbone


def _digest(entry: WeightsEntry, path: Path) -> str:
    return entry.sha256 or weights.verify(entry, path)


class _Discarded:
    """Takes the place of a pickled optimizer, so that nothing of ``torch.optim`` runs while reading."""

    def __setstate__(self, state: Any) -> None:
        pass


def _plain_dict(*_: Any) -> dict:
    """Takes the place of an optimizer's ``defaultdict``, which the safe reader cannot fill."""
    return {}


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    stand_ins: list[Any] = [(_Discarded, f"torch.optim.{name}") for name in OPTIMIZERS]
    stand_ins += [(_plain_dict, "collections.defaultdict"), (dict, "builtins.dict")]
    with _reading, torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True)


def _unwrapped(held: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(held, Mapping):
        return {}
    inner = next((held[key] for key in keys if isinstance(held.get(key), Mapping)), held)
    return dict(inner)


def _renamed(key: str, entry: WeightsEntry) -> str:
    prefix = next((p for p in entry.prefix_map if key.startswith(p)), "")
    return entry.prefix_map.get(prefix, "") + key[len(prefix) :]


def _check_keys(name: str, entry: WeightsEntry, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    reshaped = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    found = {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "of another shape": reshaped,
    }
    problems = [f"{len(keys)} {kind}: {', '.join(keys[:SHOWN_KEYS])}" for kind, keys in found.items() if keys]
    if problems:
        raise WeightsError(
            f"{entry.file} does not fit the backbone {name}: {'; '.join(problems)}. Choose the backbone that the file "
            "was made for, or fetch its own file."
        )


def _summary(held: Any) -> str:
    return f"keys {sorted(map(str, held))[:SHOWN_KEYS]}" if isinstance(held, Mapping) else type(held).__name__


def _reason(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line and not line.startswith(TORCH_ADVICE)), type(error).__name__)
