"""The datastore of a folder: full disks, kills, two processes, and names that lead out of it."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelError,
    MONAILabelException,
)

from infers import local_store
from infers.local_store import LocalStore
from lib.errors import ConfigError

NAMES = {"label_info": [{"name": "liver", "idx": 1}]}
LARGE = 100_000  # bytes that the disk of `full_disk` does not take
KINDS = ["*.nii.gz", "*.nii", "*.nrrd"]


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.nii.gz").write_bytes(b"image " + name.encode())
    return folder


@pytest.fixture
def opened(studies: Path) -> Callable[..., LocalStore]:
    """Another store on the same folder, as another process has it."""
    return lambda **more: LocalStore(str(studies), extensions=KINDS, **more)


@pytest.fixture
def store(opened: Any) -> LocalStore:
    return opened()


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], str]:
    """An uploaded file."""

    def write(content: bytes, name: str = "upload.nii.gz") -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


@contextmanager
def full_disk() -> Iterator[None]:
    """No file grows beyond 10 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def on_disk(studies: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {
        str(p.relative_to(studies)): p.read_bytes() for p in studies.rglob("*") if p.is_file() and p.name != ".lock"
    }


def killed_while(work: Callable[[], Any], files: int) -> None:
    """Runs it in a process that is killed when so many files are written beside their places."""
    pid = os.fork()
    if pid == 0:
        fill, done = local_store.fill, []

        def last(*arguments: Any) -> None:
            fill(*arguments)
            done.append(1)
            if len(done) == files:
                os.kill(os.getpid(), signal.SIGKILL)

        local_store.fill = last
        try:
            work()
        finally:
            traceback.print_exc()
            os._exit(1)  # it is not pytest's
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


MORE = {"more": "x" * LARGE}
CHANGES: dict[str, Callable[[LocalStore, str, str], Any]] = {
    "label": lambda s, small, large: s.save_label("a", large, "final", {}),
    "first label": lambda s, small, large: s.save_label("b", large, "final", {}),
    "list after the label": lambda s, small, large: s.save_label("a", small, "final", MORE),
    "image": lambda s, small, large: s.add_image("a", large, {}),
    "list after a new image": lambda s, small, large: s.add_image("c", small, MORE),
    "label info": lambda s, small, large: s.update_label_info("a", "final", MORE),
    "image info": lambda s, small, large: s.update_image_info("a", MORE),
}


@pytest.mark.parametrize("change", CHANGES)
def test_full_disk_changes_neither_disk_nor_memory(store: LocalStore, studies: Path, file: Any, change: str) -> None:
    store.save_label("a", file(b"label"), "final", dict(NAMES))
    files = file(b"new", "small.nii.gz"), file(b"x" * LARGE, "large.nii.gz")
    disk, memory = on_disk(studies), store.json()
    with full_disk(), pytest.raises(MONAILabelException) as error:
        CHANGES[change](store, *files)
    assert error.value.error is MONAILabelError.SERVER_ERROR
    assert os.strerror(errno.EFBIG) in error.value.msg and "See to the disk's space" in error.value.msg
    assert on_disk(studies) == disk and store.json() == memory
    CHANGES[change](store, *files)  # there is room again
    assert on_disk(studies) != disk and store.json() == json.loads((studies / "datastore_v2.json").read_bytes())


@pytest.mark.parametrize("files", [1, 2])  # the label beside its place; also the list
def test_kill_leaves_the_old_label_and_list(
    store: LocalStore, studies: Path, file: Any, opened: Any, files: int
) -> None:
    store.save_label("a", file(b"label"), "final", dict(NAMES))
    before, upload = on_disk(studies), file(b"new label")
    killed_while(lambda: opened().save_label("a", upload, "final", {}), files)
    left = on_disk(studies)
    assert {name: left[name] for name in before} == before
    assert sorted(name.rpartition(".")[2] for name in left.keys() - before) == ["part"] * files
    again = opened()
    assert on_disk(studies) == before
    assert again.get_label_info("a", "final")["label_info"] == NAMES["label_info"]
    assert again.list_images() == ["a", "b"]


def test_what_is_not_complete_is_neither_image_nor_label(
    store: LocalStore, studies: Path, file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(*_: Any) -> None:
        parts = list(studies.rglob("*.part"))
        assert parts and not any(p.match(kind) for p in parts for kind in KINDS)
        seen.append(len(parts))

    monkeypatch.setattr(local_store.shutil, "copymode", look)
    store.add_image("c", file(b"image"), {})
    store.save_label("c", file(b"label"), "final", {})
    assert seen == [1, 2] * 2


def test_saved_label_is_in_the_file_and_the_store(store: LocalStore, studies: Path, file: Any, opened: Any) -> None:
    assert store.save_label("a", file(b"label", "l.nrrd"), "second-reader", dict(NAMES)) == "a"
    for one in (store, opened()):
        path = one.get_label_uri("a", "second-reader")
        assert Path(path).read_bytes() == b"label" and path.endswith("labels/second-reader/a.nrrd")
        info = one.get_label_info("a", "second-reader")
        assert info["label_info"] == NAMES["label_info"] and info["ts"] > 0 and info["name"] == "a.nrrd"


def test_list_keeps_its_rights(store: LocalStore, studies: Path) -> None:
    (studies / "datastore_v2.json").chmod(0o660)
    store.update_image_info("a", {"note": 1})
    assert (studies / "datastore_v2.json").stat().st_mode & 0o777 == 0o660


def test_unknown_image_or_label_is_told(store: LocalStore, file: Any) -> None:
    with pytest.raises(ImageNotFoundException, match="no such image"):
        store.save_label("nobody", file(b"label"), "final", {})
    with pytest.raises(ImageNotFoundException, match="no such image"):
        store.update_image_info("nobody", {})
    with pytest.raises(LabelNotFoundException, match="no such label"):
        store.update_label_info("a", "final", {})


def test_image_that_comes_again_keeps_its_labels(store: LocalStore, file: Any) -> None:
    store.save_label("a", file(b"label"), "final", dict(NAMES))
    store.add_image("a", file(b"better image"), {"from": "scanner"})
    assert store.get_image("a").read() == b"better image" and store.get_image_info("a")["from"] == "scanner"
    assert store.get_label_info("a", "final")["label_info"] == NAMES["label_info"]


def test_two_processes_lose_nothing_of_each_other(opened: Any, file: Any, studies: Path) -> None:
    first, second = opened(), opened()
    first.save_label("a", file(b"label"), "final", dict(NAMES))
    second.save_label("b", file(b"label"), "final", dict(NAMES))
    first.update_label_info("b", "final", {"provenance": "first"})
    second.update_label_info("a", "final", {"provenance": "second"})
    found = opened()
    assert [found.get_label_info(i, "final")["provenance"] for i in "ab"] == ["second", "first"]
    assert [found.get_label_info(i, "final")["label_info"] for i in "ab"] == [NAMES["label_info"]] * 2


def test_threads_lose_nothing_of_each_other(opened: Any, file: Any) -> None:
    stores, upload = [opened(), opened()], file(b"label")

    def save(number: int) -> None:
        for n in range(10):
            stores[number % 2].save_label("ab"[n % 2], upload, f"tag{number}-{n}", dict(NAMES))

    threads = [threading.Thread(target=save, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = opened().json()["objects"]
    assert sum(len(one["labels"]) for one in found.values()) == 40
    assert all("label_info" in label["info"] for one in found.values() for label in one["labels"].values())


def test_list_that_is_read_again_never_names_another_folder(
    store: LocalStore, studies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream's new list has no folder for a moment: a label saved then lands in the working directory."""
    folders: list[str] = []

    def look(changed: LocalStore, name: str, value: Any) -> None:
        object.__setattr__(changed, name, value)
        folders.append(changed._datastore.label_path("final"))

    (studies / "datastore_v2.json").write_bytes((studies / "datastore_v2.json").read_bytes() + b" ")
    monkeypatch.setattr(LocalStore, "__setattr__", look)
    store._init_from_datastore_file()
    assert len(folders) > 0 and set(folders) == {str(studies / "labels" / "final")}


@pytest.mark.parametrize("content", [b"", b'{"name": "new-dataset", "objects": {"a', b"[]", b"\xff\xfe"])
def test_damaged_list_is_told_with_its_name_and_kept(studies: Path, opened: Any, content: bytes) -> None:
    opened()
    index = studies / "datastore_v2.json"
    index.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        opened()
    assert str(index) in str(error.value) and "move it away and start again" in str(error.value)
    assert index.read_bytes() == content


def test_list_that_is_damaged_while_the_server_runs_is_replaced(
    store: LocalStore, studies: Path, file: Any, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store.save_label("a", file(b"label"), "final", dict(NAMES))
    (studies / "datastore_v2.json").write_text('{"name": "Mr. Miller')
    store.save_label("b", file(b"label"), "final", dict(NAMES))
    assert sorted(opened().get_labeled_images()) == ["a", "b"]
    assert "damaged" in caplog.text and "Miller" not in caplog.text


def test_full_disk_does_not_keep_the_store_from_starting(studies: Path, opened: Any) -> None:
    for n in range(200):
        (studies / f"image{n:03d}.nii.gz").write_bytes(b"image")
    with full_disk():
        found = opened()
    assert len(found.list_images()) == 202 and not (studies / "datastore_v2.json").exists()


def test_watching_store_takes_no_harm_from_its_own_writing(opened: Any, file: Any, studies: Path) -> None:
    watching = opened(auto_reload=True)
    try:
        for n in range(20):
            watching.save_label("ab"[n % 2], file(b"label %d" % n), "final", {**NAMES, "n": n})
        assert [watching.get_label_info(i, "final")["n"] for i in "ab"] == [18, 19]
    finally:
        watching.only_read()
    assert watching.json() == json.loads((studies / "datastore_v2.json").read_bytes())


def test_child_writes_nothing(opened: Any, studies: Path) -> None:
    server, child = opened(), opened(auto_reload=True)
    child.only_read()
    assert not child._observer.is_alive()
    server.update_image_info("a", {"note": "server's"})
    disk = on_disk(studies)
    (studies / "b.nii.gz").unlink()
    child.refresh()
    child.update_image_info("a", {"note": "child's"})
    assert on_disk(studies) == {name: data for name, data in disk.items() if name != "b.nii.gz"}


OUTSIDE = ["../x", "../../x", "{here}/x", "a/b", "..", ".", ".hidden", "..\\x", "x\0"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_name_that_leads_out_of_the_folder_is_refused(store: LocalStore, file: Any, tmp_path: Path, name: str) -> None:
    upload, name = file(b"content"), name.format(here=tmp_path)
    before = on_disk(tmp_path)
    for change in (lambda: store.add_image(name, upload, {}), lambda: store.save_label("a", upload, name, {})):
        with pytest.raises(MONAILabelException) as error:
            change()
        assert error.value.error is MONAILabelError.INVALID_INPUT and "expected a plain name" in error.value.msg
    assert on_disk(tmp_path) == before and store.list_images() == ["a", "b"]


def test_image_does_not_take_the_place_of_the_list(store: LocalStore, studies: Path, file: Any) -> None:
    before = on_disk(studies)
    for name in ("datastore_v2", "labels"):
        with pytest.raises(MONAILabelException, match=r"expected an image, \.nii\.gz, .*; received \.json"):
            store.add_image(name, file(b"{}", "x.json"), {})
    assert on_disk(studies) == before


def test_image_without_an_id_is_called_as_its_file(store: LocalStore, file: Any) -> None:
    assert store.add_image("", file(b"image", "scan.nii.gz"), {}) == "scan"
    assert store.get_image("scan").read() == b"image"


@pytest.mark.parametrize("told", [{"a": float("nan")}, {"name": "li\ud83d"}, {"label_info": 5}])
@pytest.mark.parametrize("kind", ["label", "image", "about a label", "about an image"])
def test_what_no_list_could_hold_is_refused(store: LocalStore, opened: Any, file: Any, kind: str, told: Any) -> None:
    store.save_label("a", file(b"label"), "final", NAMES)
    tell = {
        "label": lambda: store.save_label("a", file(b"other"), "final", told),
        "image": lambda: store.add_image("c", file(b"image"), told),
        "about a label": lambda: store.update_label_info("a", "final", told),
        "about an image": lambda: store.update_image_info("a", told),
    }[kind]
    with pytest.raises(MONAILabelException) as refused:
        tell()
    assert refused.value.error is MONAILabelError.INVALID_INPUT
    again = opened()
    assert again.get_label_info("a", "final") == store.get_label_info("a", "final") and sorted(again.list_images()) == [
        "a",
        "b",
    ]
    assert Path(store.get_label_uri("a", "final")).read_bytes() == b"label"
