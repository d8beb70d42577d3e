"""Weight files: where they lie, how they arrive, and whether they are the right ones. No torch here.

A file either ships beside this module or lies in one folder, fetched from its official address on request. Downloads go
to ``<file>.part``, resume, and are moved into place whole. Every file has a SHA-256 digest: from the YAML row, or noted
at first use in ``<folder>/digests.json`` and enforced from then on. Safe for several processes (a lock file in the
folder). Left out: reading tensors, see :mod:`lib.loading`.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

from lib.config import WeightsEntry
from lib.errors import WeightsError

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).resolve().parent
DIGESTS = "digests.json"
CHUNK = 1 << 20
TIMEOUT_S = 30.0
ATTEMPTS = 3
PAUSE_S = 1.0

Progress = Callable[[int, int], None]  # bytes done, bytes in all or 0 where the server does not say


def weights_dir(setting: Union[str, Path, None] = None) -> Path:
    """The folder for weight files; it may not exist yet.

    Args:
        setting: an explicit folder; empty or None means the user's data folder.
    """
    if setting:
        return Path(setting).expanduser().resolve()
    import platformdirs

    return Path(platformdirs.user_data_dir("autosam_label", appauthor=False)) / "weights"


def locate(entry: WeightsEntry, folder: Path) -> Path:
    """Where the file of ``entry`` lies or belongs: beside this module if it ships, else in ``folder``."""
    shipped = SHIPPED / entry.file
    return shipped if entry.file and shipped.is_file() else folder / entry.file


def ensure(
    entry: WeightsEntry, folder: Path, *, allow_download: bool = True, progress: Optional[Progress] = None
) -> Path:
    """The verified file of ``entry``, downloaded if needed and allowed.

    Args:
        entry: a line of the manifest.
        folder: from :func:`weights_dir`; created on download.
        allow_download: False never touches the network.
        progress: called with bytes done and bytes in all.

    Raises:
        WeightsError: if the file is missing and cannot be had, incomplete, or not the expected one.
    """
    path = locate(entry, folder)
    if not path.is_file():
        if not (allow_download and entry.url):
            raise WeightsError(_missing(entry, folder))
        _download(entry, folder, progress or (lambda done, total: None))
    verify(entry, path)
    return path


def verify(entry: WeightsEntry, path: Path) -> str:
    """SHA-256 digest of the file, after checking size, kind and digest.

    Raises:
        WeightsError: if the file is incomplete, a web page, or has another digest than expected or than at first use.
    """
    _check_kind(entry, path)
    found = file_digest(path)
    expected = entry.sha256 or _noted(path.parent).get(path.name)
    if expected and found != expected:
        raise WeightsError(
            f"{path} has SHA-256 {found[:12]}..., expected {expected[:12]}... ({_source(entry, path)}). Delete the "
            "file and fetch it again; if you replaced it on purpose, use a folder of its own."
        )
    if not expected and path.parent != SHIPPED:
        _note(path, found)
    return found


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _missing(entry: WeightsEntry, folder: Path) -> str:
    size = f" ({entry.bytes / 1e6:.0f} MB)" if entry.bytes else ""
    if entry.url:
        how = f"Run `python -m lib.weights fetch {entry.file}` while online, or download {entry.url}{size}"
    else:
        how = f"It has no direct address. Get it from {entry.hint or 'its authors'}{size}"
    return (
        f"The weights file {entry.file} is not in {folder}. {how} and put it into that folder; for another folder "
        "start the server with `--conf weights_dir <folder>`."
    )


def _source(entry: WeightsEntry, path: Path) -> str:
    return "from the manifest" if entry.sha256 else f"noted at first use in {path.parent / DIGESTS}"


def _check_kind(entry: WeightsEntry, path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(f"{path} is a web page, not a checkpoint. Delete it. {_missing(entry, path.parent)}")
    found = path.stat().st_size
    if found == 0 or (entry.bytes and found != entry.bytes):
        raise WeightsError(
            f"{path} is incomplete or another file: expected {entry.bytes or 'some'} bytes, received {found}. "
            "Delete it and fetch it again."
        )


def _noted(folder: Path) -> dict[str, str]:
    try:
        return json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise WeightsError(f"{folder / DIGESTS} is damaged ({error}). Delete it to note the digests anew.") from error


def _note(path: Path, digest: str) -> None:
    try:
        with _lock(path.parent):
            text = json.dumps(_noted(path.parent) | {path.name: digest}, indent=1, sort_keys=True)
            fresh = path.parent / f"{DIGESTS}.part"
            fresh.write_text(text, encoding="utf-8")
            os.replace(fresh, path.parent / DIGESTS)
    except OSError as error:
        logger.warning("Cannot note the digest of %s, so a later change will go unnoticed: %s", path.name, error)


def _lock(folder: Path) -> Any:
    from filelock import FileLock

    return FileLock(folder / ".lock")


def _download(entry: WeightsEntry, folder: Path, progress: Progress) -> None:
    path, part = folder / entry.file, folder / f"{entry.file}.part"
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        if path.is_file():  # another process was faster
            return
        _check_space(entry, folder, part)
        logger.info("Fetching %s from %s", entry.file, entry.url)
        _fetch(entry, part, progress)
        try:
            _check_kind(entry, part)
            if entry.sha256 and file_digest(part) != entry.sha256:
                raise WeightsError(f"{entry.url} delivered another file than the manifest expects. Try again later.")
        except WeightsError:
            part.unlink()  # resuming a wrong file could never succeed
            raise
        os.replace(part, path)


def _check_space(entry: WeightsEntry, folder: Path, part: Path) -> None:
    needed = entry.bytes - (part.stat().st_size if part.is_file() else 0)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WeightsError(
            f"{entry.file} needs {needed / 1e6:.0f} MB more in {folder}, which has {free / 1e6:.0f} MB free. "
            "Make room or choose another folder with `--conf weights_dir <folder>`."
        )


def _fetch(entry: WeightsEntry, part: Path, progress: Progress) -> None:
    problem: object = "the connection closed early"
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_S)
        try:
            if _receive(entry, part, progress):
                return
        except urllib.error.HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and part.is_file():
                if _is_whole(entry, part, error):  # a process was killed before it moved the file
                    return
                part.unlink()
            elif error.code < 500:
                raise WeightsError(f"{entry.url} answered {error.code}. {_missing(entry, part.parent)}") from error
            problem = error
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            problem = error
    done = part.stat().st_size if part.is_file() else 0
    raise WeightsError(
        f"The download of {entry.file} stopped after {done} bytes ({problem}). What arrived is kept: run it again to "
        f"resume. {_missing(entry, part.parent)}"
    )


def _is_whole(entry: WeightsEntry, part: Path, refusal: urllib.error.HTTPError) -> bool:
    """Whether a part is the file, by its digest or else its size, where the server has nothing to send after it."""
    expected = entry.sha256 or _noted(part.parent).get(entry.file)
    if expected:
        return file_digest(part) == expected
    return refusal.headers.get("Content-Range") == f"bytes */{part.stat().st_size}"


def _receive(entry: WeightsEntry, part: Path, progress: Progress) -> bool:
    done = part.stat().st_size if part.is_file() else 0
    if entry.bytes and done >= entry.bytes:
        return True
    headers = {"Range": f"bytes={done}-"} if done else {}
    with urllib.request.urlopen(urllib.request.Request(entry.url, headers=headers), timeout=TIMEOUT_S) as reply:
        if "html" in reply.headers.get("Content-Type", ""):
            raise WeightsError(f"{entry.url} answered with a web page. {_missing(entry, part.parent)}")
        if reply.status != http.client.PARTIAL_CONTENT:
            done = 0  # the server sends the whole file
        length = int(reply.headers.get("Content-Length") or 0)
        total = done + length if length else entry.bytes
        with part.open("ab" if done else "wb") as file:
            while chunk := reply.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                progress(done, total)
    return not total or done >= total
