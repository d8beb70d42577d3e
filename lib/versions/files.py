"""Files of a version store: written beside and renamed, checked against their digest, errors as sentences."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Union

from lib.errors import WeightsError
from lib.versions.record import Version

if TYPE_CHECKING:
    from torch import Tensor

MODEL = "model.safetensors"
Content = Union[Mapping[str, "Tensor"], Callable[[Path], None]]  # tensors, or what writes them to a safetensors file


def check_digest(version: Version, found: str) -> None:
    """Refuses tensors that are not the ones a version was stored with.

    Raises:
        WeightsError: if ``found``, their SHA-256, is another.
    """
    if found != version.sha256:
        raise WeightsError(
            f"{MODEL} of {version.method} {version.name} has SHA-256 {found[:12]}..., expected {version.sha256[:12]}..."
            ": the file was changed or cut short. Restore it from a copy, or promote another version and delete this "
            "one."
        )


def write_model(content: Content, path: Path) -> None:
    """Writes tensors as safetensors and waits until they are on the disk.

    Raises:
        WeightsError: if they cannot be written, or there are none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if callable(content):
            content(path)
        else:
            from safetensors.torch import save_file

            # clones, because the format refuses tensors that share memory
            save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in content.items()}, path)
        with safe_open(path, framework="np") as held:
            count = len(held.keys())
    except SafetensorError as error:  # also what a full disk raises
        raise WeightsError(f"Cannot store the tensors of a new version: {error}. Make room and try again.") from error
    if not count:
        raise WeightsError("Expected tensors for a new version, received none. Nothing was stored.")
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def read_text(path: Path) -> Optional[str]:
    """Text of a file, or None where there is none."""
    with explained():
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None


def write_text(path: Path, text: str) -> None:
    """Writes a file and waits until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Writes a file beside and renames it, so that readers see the old text or the new."""
    part = path.with_name(f"{path.name}.part")
    write_text(part, text)
    os.replace(part, path)


def sync_folder(folder: Path) -> None:
    """Waits until names in a folder are on the disk."""
    if os.name == "nt":  # has no handle on folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def explained() -> Iterator[None]:
    """Turns what the disk says into a sentence."""
    try:
        yield
    except OSError as error:
        raise WeightsError(
            f"Cannot read or write a version: {error}. Nothing is left half-written. Make room or check the folder's "
            "permissions, then try again."
        ) from error
