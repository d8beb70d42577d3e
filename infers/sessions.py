"""Images that clients upload for a while: upstream's sessions, which neither write elsewhere nor stay for ever.

A session is a folder with the image and ``meta.info``, which says until when it is kept. Members of an archive are
looked at before any is written. What a kill left, a folder without a readable ``meta.info``, goes when it is as old as
a session may become. Upstream's clean-up also runs after a restart, and nothing that lies there ends its thread. Left
out: a limit of an upload's size.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import tarfile
import tempfile
import time
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Optional

from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.utils.others.generic import remove_file
from monailabel.utils.sessions import SessionInfo, Sessions

from infers.local_store import fill, is_plain, part_of

META = "meta.info"
# of an archive that is none, is cut off or encrypted, or packed in a way that this Python does not know
BROKEN = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError,
    NotImplementedError,
)  # fmt: skip


class KeptSessions(Sessions):
    """Sessions of the server; arguments are upstream's."""

    def __bool__(self) -> bool:
        """True: upstream cleans up only sessions that are true, and a dictionary is not after a restart."""
        return True

    def get_session(self, session_id: str, update_ts: bool = True, fetch_cache: bool = True) -> Optional[SessionInfo]:
        """Upstream's; None also for what is damaged, and for a name that leads elsewhere."""
        if not is_plain(session_id) or _end(Path(self.store_path) / session_id) is None:
            return None
        return super().get_session(session_id, update_ts, fetch_cache)

    def remove_session(self, session_id: str) -> None:
        """Upstream's, for folders of sessions only."""
        if is_plain(session_id):
            super().remove_session(session_id)

    def remove_expired(self) -> int:
        """Removes sessions that nobody has used for too long, and damaged ones as old; how many."""
        gone = []
        with suppress(OSError):  # nothing was uploaded yet
            gone = [f.name for f in Path(self.store_path).iterdir() if self._is_over(f)]
        for name in gone:
            super().remove_session(name)
        return len(gone)

    def _is_over(self, folder: Path) -> bool:
        with suppress(OSError):  # somebody has removed it meanwhile
            if not folder.is_dir():
                return False
            end = _end(folder)
            if end is None:  # it may be coming right now, or be no session at all
                return _is_made_up(folder.name) and folder.stat().st_mtime + self.expiry < time.time()
            return end < time.time()
        return False

    def add_session(
        self, data_file: str, expiry: int = 0, uncompress: bool = False, session_id: Optional[str] = None
    ) -> tuple[str, SessionInfo]:
        """Keeps an image for a while.

        Args:
            data_file: image, archive or folder of images; it is moved, or removed where it is refused.
            expiry: seconds without use after which it goes; 0 and what is too long mean the server's.
            uncompress: whether to unpack an archive, ``.zip`` or ``.tar`` with or without compression.
            session_id: its name; None makes one.

        Raises:
            MONAILabelException: for an archive that cannot be read or would write outside its folder, before it writes.
        """
        session_id = session_id or str(uuid.uuid4())
        try:
            if not uncompress or os.path.isdir(data_file):
                return super().add_session(data_file, expiry, session_id=session_id)
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "image"
                folder.mkdir()
                _unpack(Path(data_file), folder)
                return super().add_session(str(folder), expiry, session_id=session_id)
        except BaseException:  # upstream removes an upload only after a success
            self.remove_session(session_id)
            remove_file(data_file)
            raise

    def _write_meta_info(self, session_id: str, session_info: SessionInfo) -> None:
        """Whole or not at all: every use of a session writes it anew."""
        place = Path(self.store_path) / session_id / META
        with part_of(place) as part:
            fill(part, io.BytesIO(session_info.to_str().encode()))
            os.replace(part, place)


def _is_made_up(name: str) -> bool:
    """Whether a name is one that sessions get: the folder may be one that others use too."""
    with suppress(ValueError):
        return str(uuid.UUID(name)) == name
    return False


def _end(folder: Path) -> Optional[float]:
    """When a session is over, in seconds since 1970; None where it is damaged."""
    try:
        facts: Any = json.loads((folder / META).read_text(encoding="utf-8"))
        here = Path(facts["image"]).exists()
        return float(facts["last_access_ts"]) + float(facts["expiry"]) if here else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _unpack(archive: Path, folder: Path) -> None:
    """Writes the members of an archive into an empty folder.

    Raises:
        MONAILabelException: where one would lie outside, is neither file nor folder, or cannot be read.
    """
    with _readable():
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                _check(packed.namelist())
                packed.extractall(folder)
        else:
            with tarfile.open(archive) as packed_tar:
                members = packed_tar.getmembers()
                _check([m.name for m in members], links=not all(m.isfile() or m.isdir() for m in members))
                # also leaves out rights and owners; older Pythons do not know it
                packed_tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def _check(names: list[str], links: bool = False) -> None:
    outside = any(name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") for name in names)
    if outside or links:
        raise _refusal(
            "archive: expected files and folders, received one with names that lead out of it or with links. Nothing of"
            " it was written. Pack the images themselves, by names without '..', and send it again."
        )


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        raise _refusal(
            "archive: expected one that can be unpacked, .zip or .tar, compressed or not; received another or a part of"
            f" one ({type(error).__name__}). Pack the images again, or send them without uncompress."
        ) from error


def _refusal(sentence: str) -> MONAILabelException:
    return MONAILabelException(MONAILabelError.INVALID_INPUT, sentence)
