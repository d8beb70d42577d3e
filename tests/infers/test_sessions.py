"""Uploads that are kept for a while: archives that lead elsewhere, restarts, kills and full disks."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException

from infers import sessions as module
from infers.sessions import KeptSessions

EXPIRY_S = 100


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Temporary files of the server."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


@pytest.fixture
def restarted(tmp_path: Path, scratch: Path) -> Callable[[], KeptSessions]:
    """The sessions as a server has them that has just started."""
    return lambda: KeptSessions(str(tmp_path / "sessions"), EXPIRY_S)


@pytest.fixture
def sessions(restarted: Any) -> KeptSessions:
    return restarted()


def upload(folder: Path, content: bytes = b"image", name: str = "scan.nii.gz") -> str:
    """What a client sent."""
    (folder / "received").mkdir(exist_ok=True)
    (folder / "received" / name).write_bytes(content)
    return str(folder / "received" / name)


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return file.getvalue()


def tarred(members: dict[str, bytes], mode: str = "w", link: str = "") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as packed:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
        if link:
            member = tarfile.TarInfo("link")
            member.type, member.linkname = tarfile.SYMTYPE, link
            packed.addfile(member)
    return file.getvalue()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def age(folder: Path, seconds: float) -> None:
    """Makes a folder and what it says of itself older."""
    meta = folder / "meta.info"
    if meta.exists() and meta.stat().st_size:
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "last_access_ts": int(time.time() - seconds)}))
    os.utime(folder, (time.time() - seconds,) * 2)


def test_session_is_found_again_after_a_restart(sessions: KeptSessions, scratch: Path, restarted: Any) -> None:
    name, info = sessions.add_session(upload(scratch), 50)
    assert Path(info.image).read_bytes() == b"image" and info.expiry == 50
    assert restarted().get_session(name).image == info.image
    sessions.remove_session(name)
    assert sessions.get_session(name) is None and not Path(info.image).exists()


@pytest.mark.parametrize(
    "content, name",
    [
        (zipped({"a.dcm": b"1", "more/b.dcm": b"2"}), "series.zip"),
        (tarred({"a.dcm": b"1", "more/b.dcm": b"2"}), "series.tar"),
        (tarred({"a.dcm": b"1", "more/b.dcm": b"2"}, "w:gz"), "series.tar.gz"),
    ],
    ids=["zip", "tar", "tar.gz"],
)
def test_archive_becomes_a_folder(sessions: KeptSessions, scratch: Path, content: bytes, name: str) -> None:
    _, info = sessions.add_session(upload(scratch, content, name), uncompress=True)
    assert files(Path(info.image)) == {"a.dcm": b"1", "more/b.dcm": b"2"}


def refused(sessions: KeptSessions, scratch: Path, content: bytes, name: str) -> str:
    """What is said of an archive that is refused, of which nothing stays."""
    sent = upload(scratch, content, name)
    with pytest.raises(MONAILabelException) as error:
        sessions.add_session(sent, uncompress=True)
    assert error.value.error is MONAILabelError.INVALID_INPUT
    return error.value.msg


@pytest.mark.parametrize("pack, kind", [(zipped, "zip"), (tarred, "tar")])
@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "{here}/x", "..\\x", "../../../x"])
def test_archive_that_leads_outside_is_refused(
    sessions: KeptSessions, scratch: Path, tmp_path: Path, pack: Any, kind: str, name: str
) -> None:
    before = files(tmp_path)
    content = pack({"good.dcm": b"1", name.format(here=tmp_path): b"2"})
    assert "lead out of it" in refused(sessions, scratch, content, f"series.{kind}")
    assert files(tmp_path) == before and sessions == {}


def test_archive_with_a_link_is_refused(sessions: KeptSessions, scratch: Path, tmp_path: Path) -> None:
    assert "with links" in refused(sessions, scratch, tarred({}, link="/etc"), "series.tar")
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    "content, name",
    [
        (b"no archive", "scan.nii.gz"),
        (b"", "series.zip"),
        (tarred({"a.dcm": b"1" * 9000}, "w:gz")[:60], "series.tar.gz"),
        (zipped({"a.dcm": b"1" * 9000})[:900], "series.zip"),
    ],
    ids=["image", "empty", "tar cut off", "zip cut off"],
)
def test_broken_archive_is_told(sessions: KeptSessions, scratch: Path, tmp_path: Path, content: Any, name: str) -> None:
    assert "expected one that can be unpacked" in refused(sessions, scratch, content, name)
    assert files(tmp_path) == {}


def test_full_disk_leaves_no_session(
    sessions: KeptSessions, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "fill", full)
    with pytest.raises(OSError, match="No space"):
        sessions.add_session(upload(scratch))
    assert files(tmp_path) == {} and list((tmp_path / "sessions").iterdir()) == []


def test_expired_session_goes_after_a_restart(sessions: KeptSessions, scratch: Path, restarted: Any) -> None:
    old, young = (sessions.add_session(upload(scratch))[0] for _ in range(2))
    age(Path(sessions.store_path) / old, EXPIRY_S + 10)
    again = restarted()
    assert bool(again)  # upstream's clean-up does nothing with sessions that are false
    assert again.remove_expired() == 1
    assert [p.name for p in Path(again.store_path).iterdir()] == [young]


DAMAGED: dict[str, str | None] = {
    "none": None, "empty": "", "cut off": '{"name": "x", "ima', "list": "[]", "nothing said": "{}", "number": "7",
    "no image": '{"image": null, "last_access_ts": 9e9, "expiry": 60}',
    "image gone": '{"image": "/gone.nii.gz", "last_access_ts": 9000000000, "expiry": 60}',
    "no time": '{"image": "/", "last_access_ts": "soon", "expiry": 60}',
}  # fmt: skip


@pytest.mark.parametrize("meta", DAMAGED)
def test_damaged_session_goes_when_it_is_old_and_stops_no_clean_up(
    sessions: KeptSessions, scratch: Path, restarted: Any, meta: str
) -> None:
    young, old = str(uuid4()), str(uuid4())
    for name, seconds in ((young, 10.0), (old, EXPIRY_S + 10.0), ("not a session", EXPIRY_S + 10.0)):
        folder = Path(sessions.store_path) / name
        folder.mkdir(parents=True)
        (folder / "scan.nii.gz").write_bytes(b"image")
        if DAMAGED[meta] is not None:
            (folder / "meta.info").write_text(str(DAMAGED[meta]))
        os.utime(folder, (time.time() - seconds,) * 2)
        assert sessions.get_session(name) is None
    again = restarted()
    assert again.remove_expired() == 1
    assert {p.name for p in Path(again.store_path).iterdir()} == {young, "not a session"}  # which is somebody else's


def test_clean_up_before_the_first_upload_and_beside_other_files(sessions: KeptSessions) -> None:
    assert sessions.remove_expired() == 0
    Path(sessions.store_path).mkdir()
    (Path(sessions.store_path) / "notes.txt").write_text("mine")
    os.utime(Path(sessions.store_path) / "notes.txt", (0, 0))
    assert sessions.remove_expired() == 0
    assert (Path(sessions.store_path) / "notes.txt").exists()


@pytest.mark.parametrize("name", ["..", "../outside", "", "{here}/outside"])
def test_name_that_leads_elsewhere_is_no_session(
    sessions: KeptSessions, tmp_path: Path, scratch: Path, name: str
) -> None:
    sessions.add_session(upload(scratch))
    outside = tmp_path / "outside"
    outside.mkdir()
    told = {"image": str(outside), "last_access_ts": time.time(), "expiry": 60}
    for folder in (outside, tmp_path, Path(sessions.store_path)):
        (folder / "meta.info").write_text(json.dumps(told))
    assert sessions.get_session(name.format(here=tmp_path)) is None
    sessions.remove_session(name.format(here=tmp_path))
    assert outside.exists() and len(list(Path(sessions.store_path).iterdir())) == 2


def test_two_clicks_at_once_on_a_session_both_find_it(sessions: KeptSessions, scratch: Path) -> None:
    name, _ = sessions.add_session(upload(scratch))

    def click(_: int) -> bool:
        return sessions.get_session(name, update_ts=True) is not None

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(click, range(200)))


def test_use_of_a_session_that_is_killed_leaves_it(sessions: KeptSessions, scratch: Path, monkeypatch: Any) -> None:
    name, _ = sessions.add_session(upload(scratch))
    monkeypatch.setattr(module.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sessions.get_session(name, update_ts=True)
    monkeypatch.undo()
    assert sessions.get_session(name, fetch_cache=False) is not None
