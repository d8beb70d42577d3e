"""Versions: whole or not at all, promoted atomically, rolled back in order, refused where they do not fit."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from safetensors.numpy import save_file

from lib.errors import ConfigError, WeightsError
from lib.versions import store as versions
from lib.versions.__main__ import main
from lib.versions.gate import check_fits
from lib.versions.record import Trained, Version
from lib.versions.store import VersionStore, open_store

ROOT = Path(__file__).resolve().parents[2]
TRAINED = Trained(
    backbone="compact",
    backbone_digest="ab" * 32,
    labels=("RV", "LV"),
    recipe={"steps": 10, "rates": (1e-3, 1e-4)},
    split={"case-a": "train", "case-b": "train", "case-c": "validation"},
    metrics={"mean_dice": 0.75, "dice": {"RV": 0.7, "LV": 0.8}, "cases": {"case-c": 0.75}},
)


@pytest.fixture
def store(tmp_path) -> VersionStore:
    return VersionStore(tmp_path / ".autosam" / "sam2rad")


def write(path: Path) -> None:
    save_file({"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}, path)


def scored(mean_dice: Optional[float]) -> Trained:
    return replace(TRAINED, metrics={**TRAINED.metrics, "mean_dice": mean_dice})


def fill(store: VersionStore, count: int, *, live: bool = True) -> list[str]:
    names = [store.add(write, TRAINED).name for _ in range(count)]
    for name in names if live else ():
        store.promote(name, "better")
    return names


def decisions(store: VersionStore) -> list[tuple[str, str, Optional[str]]]:
    return [(line["decision"], line["version"], line["previous"]) for line in store.history()]


# --- storing


def test_empty_store_has_nothing_and_creates_nothing(store) -> None:
    assert store.list() == [] and store.live() is None and store.live_stamp() is None and store.history() == []
    assert store.predecessor() is None
    assert not store.folder.exists()


def test_add_numbers_versions_and_leaves_live_alone(store) -> None:
    first, second = store.add(write, TRAINED), store.add(write, scored(0.5))
    assert [v.name for v in store.list()] == ["v0001", "v0002"]
    assert store.list() == [first, second] and store.get("v0002") == second
    assert (first.method, first.labels, first.trained_on, second.mean_dice) == ("sam2rad", ("RV", "LV"), 2, 0.5)
    assert store.live() is None and store.live_stamp() is None
    assert sorted(p.name for p in (store.folder / "versions" / "v0001").iterdir()) == [
        "model.safetensors",
        "version.json",
    ]


def test_tensors_come_back_as_they_were_even_shared_and_transposed(store) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(6.0).reshape(2, 3)
    version = store.add({"a": base, "b": base.T, "c": base.half().requires_grad_()}, TRAINED)
    found = store.tensors(version)
    assert found.keys() == {"a", "b", "c"}
    assert torch.equal(found["b"], base.T) and found["c"].dtype == torch.float16


def test_import_and_adding_by_function_do_not_load_torch(tmp_path) -> None:
    code = "import sys; from tests.lib.test_versions import *; fill(VersionStore(Path(sys.argv[1]) / 'sam2rad'), 1)"
    done = subprocess.run(
        [sys.executable, "-c", code + "; sys.exit('torch' in sys.modules)", str(tmp_path)], cwd=ROOT, check=False
    )
    assert done.returncode == 0


def full_disk(path: Path) -> None:
    path.write_bytes(b"\0" * 100)
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(path: Path) -> None:
    write(path)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        (full_disk, WeightsError, "No space left"),
        (interrupted, KeyboardInterrupt, None),
        (lambda path: None, WeightsError, "Cannot read or write"),
        (lambda path: path.write_bytes(b"\0" * 3), WeightsError, "Cannot store the tensors"),
        (lambda path: save_file({}, path), WeightsError, "received none"),
        ({}, WeightsError, "received none"),
    ],
)
def test_failed_write_leaves_nothing_visible_and_live_alone(store, content, error, text) -> None:
    fill(store, 1)
    stamp = store.live_stamp()
    with pytest.raises(error, match=text):
        store.add(content, TRAINED)
    assert os.listdir(store.folder / "versions") == ["v0001"]
    assert store.live_name() == "v0001" and store.live_stamp() == stamp
    assert store.add(write, TRAINED).name == "v0002"


@pytest.mark.parametrize("broken", ["write_text", "sync_folder", "write_model"])
def test_full_disk_at_any_step_of_adding_leaves_nothing(store, monkeypatch, broken) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(versions, broken, fail)
        with pytest.raises(WeightsError, match="No space left"):
            store.add(write, TRAINED)
    assert os.listdir(store.folder / "versions") == []
    assert store.add(write, TRAINED).name == "v0001"


def test_disk_that_is_really_full_is_a_plain_error(store) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")

    def really_full(path: Path) -> None:
        path.symlink_to("/dev/full")
        with path.open("wb") as file:
            file.write(b"x")

    with pytest.raises(WeightsError, match="No space left"):
        store.add(really_full, TRAINED)
    assert os.listdir(store.folder / "versions") == []


def test_killed_writer_leaves_nothing_visible(store) -> None:
    code = """
import os, signal, sys
from tests.lib.test_versions import *
def kill(path):
    write(path)
    os.kill(os.getpid(), signal.SIGKILL)
VersionStore(Path(sys.argv[1])).add(kill, TRAINED)
"""
    done = subprocess.run([sys.executable, "-c", code, str(store.folder)], cwd=ROOT, check=False)
    assert done.returncode == -9
    (left,) = (store.folder / "versions").iterdir()
    assert left.name.startswith(".part-") and store.list() == [] and store.live() is None
    assert store.add(write, TRAINED).name == "v0001"
    store.prune(1)
    assert left.exists()  # may be a writer at work
    os.utime(left, (time.time() - 2 * versions.STALE_S,) * 2)
    store.prune(1)
    assert not left.exists() and [v.name for v in store.list()] == ["v0001"]


def test_many_adders_get_names_of_their_own(store) -> None:
    code = "import sys; from tests.lib.test_versions import *; fill(VersionStore(Path(sys.argv[1])), 5, live=False)"
    other = subprocess.Popen([sys.executable, "-c", code, str(store.folder)], cwd=ROOT)
    while not store.list() and other.poll() is None:
        time.sleep(0.01)
    threads = [threading.Thread(target=fill, args=(store, 5), kwargs={"live": False}) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other.wait() == 0
    assert [v.name for v in store.list()] == [f"v{n:04d}" for n in range(1, 16)]
    assert not list((store.folder / "versions").glob(".part-*"))


def test_name_taken_in_spite_of_the_lock_is_skipped(store, monkeypatch) -> None:
    fill(store, 2, live=False)
    with monkeypatch.context() as patch:
        patch.setattr(VersionStore, "_names", lambda self: [])
        assert store.add(write, TRAINED).name == "v0003"
    assert [v.name for v in store.list()] == ["v0001", "v0002", "v0003"]


def test_held_lock_is_an_error_that_says_so(store, monkeypatch) -> None:
    fill(store, 1)
    monkeypatch.setattr(versions, "LOCK_TIMEOUT_S", 0.05)
    with versions.FileLock(store.folder / ".lock"), pytest.raises(WeightsError, match="Another process holds"):
        store.promote("v0001", "better")


def test_list_leaves_out_what_is_not_a_version(store) -> None:
    fill(store, 2)
    folder = store.folder / "versions"
    (folder / "v0003").mkdir()
    (folder / "notes").mkdir()
    (folder / ".part-x").mkdir()
    (folder / "v0002" / "version.json").write_text("{")
    assert [v.name for v in store.list()] == ["v0001"]
    with pytest.raises(WeightsError, match=r"v0002/version\.json is damaged"):
        store.get("v0002")
    assert store.add(write, TRAINED).name == "v0004"


def test_renamed_version_is_refused(store) -> None:
    fill(store, 1)
    (store.folder / "versions" / "v0001").rename(store.folder / "versions" / "v0007")
    with pytest.raises(WeightsError, match=r"Expected sam2rad v0007, but its .* is of sam2rad v0001"):
        store.get("v0007")


# --- the record


def test_nan_is_written_as_null_and_numpy_scalars_as_numbers(store) -> None:
    metrics = {"mean_dice": np.float32(0.5), "dice": {"RV": math.nan, "LV": np.float64(0.5)}, "cases": ()}
    version = store.add(write, replace(TRAINED, metrics=metrics, recipe={"n": np.int64(3), "x": math.inf}))
    assert version.metrics == {"mean_dice": 0.5, "dice": {"RV": None, "LV": 0.5}, "cases": []}
    assert version.recipe == {"n": 3, "x": None}
    assert store.get(version.name) == version


@pytest.mark.parametrize("recipe", [{"folder": Path("x")}, {1: 2}, {"a": {"b": {3}}}])
def test_fields_that_are_not_json_are_refused_before_writing(store, recipe) -> None:
    with pytest.raises(ConfigError, match="JSON values"):
        store.add(write, replace(TRAINED, recipe=recipe))
    assert not store.folder.exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"labels": []}, "labels"),
        ({"labels": ["RV", "RV"]}, "labels"),
        ({"labels": "RV"}, "labels"),
        ({"backbone_digest": ""}, "backbone_digest"),
        ({"metrics": {}}, "mean_dice"),
        ({"metrics": {"mean_dice": "good"}}, "mean_dice"),
        ({"split": {"a": 1}}, "split"),
        ({"split": ["a"]}, "split"),
        ({"created": "yesterday"}, "created"),
        ({"created": "2026-01-01T00:00:00"}, "created"),
        ({"sha256": "abc"}, "sha256"),
        ({"name": "../v0001"}, "version"),
        ({"parent": "first"}, "parent"),
        ({"method": "Sam2Rad"}, "method"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"backbone": ...}, "missing .* 'backbone'"),
        ({"metrics": {"mean_dice": math.nan}}, "NaN is not a JSON number"),
    ],
)
def test_broken_record_is_refused(store, change, text) -> None:
    values = json.loads(store.add(write, TRAINED).to_json()) | change
    with pytest.raises(WeightsError, match=rf"(?s)version\.json is damaged.*{text}"):
        Version.from_json(json.dumps({k: v for k, v in values.items() if v is not ...}))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\ufffd"])
def test_text_that_is_no_record_is_refused(text) -> None:
    with pytest.raises(WeightsError, match="damaged"):
        Version.from_json(text)


# --- the live version


def test_promote_switches_stamps_and_records(store) -> None:
    names = fill(store, 2, live=False)
    stamps = [store.live_stamp()]
    for name in names:
        assert store.promote(name, "scored higher").name == store.live_name() == store.live().name
        stamps.append(store.live_stamp())
    assert len(set(stamps)) == 3
    assert decisions(store) == [("promoted", "v0001", None), ("promoted", "v0002", "v0001")]
    assert store.history()[1]["reason"] == "scored higher"
    assert store.history()[1]["scores"] == {
        "mean_dice": 0.75,
        "dice": {"RV": 0.7, "LV": 0.8},
        "previous_mean_dice": 0.75,
    }
    assert "case-" not in (store.folder / "history.jsonl").read_text()
    store.promote("v0002", "again")
    assert store.live_stamp() == stamps[-1] and len(store.history()) == 2


def test_stamp_differs_after_every_change_even_within_a_tick_or_with_a_clock_set_back(store, monkeypatch) -> None:
    fill(store, 2)
    monkeypatch.setattr(versions.time, "time_ns", lambda: 1_000_000_000)
    stamps = [store.live_stamp()]
    for n in range(20):
        store.promote(f"v000{n % 2 + 1}", "to and fro")
        stamps.append(store.live_stamp())
    assert len(set(stamps)) == 21


@pytest.mark.parametrize(
    "broken", ["os.replace", "os.utime", "lib.versions.store.write_text", "lib.versions.store.VersionStore._record"]
)
def test_failed_promotion_leaves_the_live_version(store, monkeypatch, broken) -> None:
    fill(store, 3)
    store.add(write, TRAINED)
    stamp = store.live_stamp()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        with pytest.raises(WeightsError, match="No space left"):
            store.promote("v0004", "better")
        with pytest.raises(WeightsError, match="No space left"):
            store.rollback("worse")
    assert store.live_name() == "v0003" and store.live_stamp() == stamp
    # what was recorded without taking effect misleads nobody afterwards
    assert store.predecessor() == "v0002"
    assert store.promote("v0004", "better").name == "v0004"
    assert [store.rollback("worse").name for _ in range(3)] == ["v0003", "v0002", "v0001"]


def test_history_line_cut_short_by_a_full_disk_is_passed_over(store) -> None:
    fill(store, 2)
    with (store.folder / "history.jsonl").open("a") as file:
        file.write('{"decision": "promo')
    store.add(write, TRAINED)
    store.promote("v0003", "better")
    assert decisions(store)[-1] == ("promoted", "v0003", "v0002") and len(decisions(store)) == 3
    assert store.rollback("worse").name == "v0002"


def test_rollback_goes_back_one_by_one_then_says_there_is_none(store) -> None:
    fill(store, 3)
    store.refuse(store.add(write, TRAINED).name, "not better")
    assert store.rollback("worse").name == "v0002" == store.live_name()
    assert store.predecessor() == "v0001"
    assert store.rollback("worse").name == "v0001"
    stamp = store.live_stamp()
    with pytest.raises(WeightsError, match=r"Expected an earlier live version of sam2rad .* v0001 is live"):
        store.rollback("worse")
    assert store.live_stamp() == stamp
    assert [line[0] for line in decisions(store)[3:]] == ["refused", "rolled back", "rolled back"]


def test_rollback_without_live_version_is_an_error(store) -> None:
    with pytest.raises(WeightsError, match="none is live"):
        store.rollback("worse")


def test_rollback_after_promoting_an_old_version_returns_to_what_was_live(store) -> None:
    fill(store, 3)
    store.promote("v0001", "by hand")
    assert [store.rollback("worse").name for _ in range(3)] == ["v0003", "v0002", "v0001"]


def test_promotion_after_rollback_skips_what_was_rolled_back(store) -> None:
    fill(store, 2)
    store.rollback("worse")
    fill(store, 1)
    assert store.live_name() == "v0003" and store.rollback("worse").name == "v0001"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": "../../x"}', '{"version": 3}', "null"])
def test_damaged_live_pointer_says_what_to_do(store, text) -> None:
    fill(store, 2)
    (store.folder / "live.json").write_text(text)
    for call in (store.live, store.live_name, store.predecessor, lambda: store.prune(1)):
        with pytest.raises(WeightsError, match=r"live\.json of sam2rad is damaged .* Delete it and promote"):
            call()
    (store.folder / "live.json").unlink()
    assert store.promote("v0002", "restored").name == "v0002"


def test_missing_live_version_is_an_error_and_can_be_rolled_back(store) -> None:
    fill(store, 2)
    (store.folder / "versions" / "v0002").rename(store.folder / "lost")
    with pytest.raises(WeightsError, match="The live version is missing"):
        store.live()
    assert store.rollback("lost").name == "v0001"


def test_changed_tensors_are_neither_loaded_nor_promoted(store) -> None:
    fill(store, 1)
    version = store.add(write, TRAINED)
    path = store.folder / "versions" / version.name / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"v0002 has SHA-256 .*Restore it"):
        store.tensors(version)
    with pytest.raises(WeightsError, match="SHA-256"):
        store.promote(version.name, "better")
    path.unlink()
    with pytest.raises(WeightsError, match="No such file"):
        store.tensors(version)
    assert store.live_name() == "v0001" and len(store.history()) == 1


def test_prune_keeps_the_newest_the_live_and_the_one_before(store) -> None:
    fill(store, 6, live=False)
    for name in ("v0001", "v0004", "v0002"):
        store.promote(name, "by hand")
    assert store.prune(1) == ["v0001", "v0003", "v0005"]
    assert [v.name for v in store.list()] == ["v0002", "v0004", "v0006"]
    assert store.prune(1) == [] and not list((store.folder / "versions").glob(".part-*"))
    assert store.rollback("worse").name == "v0004"
    with pytest.raises(WeightsError, match="none before it is left"):
        store.rollback("worse")


def test_prune_of_everything_is_refused(store) -> None:
    with pytest.raises(ConfigError, match="Expected to keep 1 or more versions, received 0"):
        store.prune(0)


def test_name_of_a_deleted_version_is_not_used_again(store) -> None:
    fill(store, 2)
    store.rollback("worse")
    shutil.rmtree(store.folder / "versions" / "v0002")
    assert store.add(write, TRAINED).name == "v0003"


BAD_NAMES = ["", ".", "..", "../v0001", "v0001/..", "v1", "V0001", "v0001\n", "v٠٠٠١", "/etc", "v0001 ", None, 1]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_no_names_are_refused(store, name) -> None:
    fill(store, 1)
    for call in (store.get, lambda n: store.promote(n, "x"), lambda n: store.refuse(n, "x")):
        with pytest.raises(ConfigError, match="expected a name like v0001"):
            call(name)


def test_unknown_name_names_the_nearest(store) -> None:
    fill(store, 2)
    with pytest.raises(ConfigError, match=r"\['v0001', 'v0002'\], received 'v0003'\. Did you mean"):
        store.promote("v0003", "x")


@pytest.mark.parametrize("method", ["", "..", "../sam2rad", "a/b", "/etc", "Sam2Rad", "1a", "a" * 65])
def test_method_from_outside_is_checked(tmp_path, method) -> None:
    with pytest.raises(ConfigError, match="method: expected"):
        open_store(tmp_path, method)


def test_version_of_another_backbone_or_label_list_does_not_fit(store) -> None:
    version = store.add(write, TRAINED)
    check_fits(version, "ab" * 32)
    check_fits(version, "ab" * 32, ["RV", "LV"])
    with pytest.raises(
        WeightsError, match="v0001 was trained on compact with weights abababababab, but those loaded are cd"
    ):
        check_fits(version, "cd" * 32)
    for labels in (["LV", "RV"], ["RV"], []):
        with pytest.raises(WeightsError, match="knows the labels RV, LV in this order"):
            check_fits(version, "ab" * 32, labels)


# --- command line


def test_command_line_lists_shows_promotes_and_rolls_back(store, capsys) -> None:
    state = ["--state", str(store.folder.parent)]
    assert main(["list", *state]) == 0
    assert "No version of sam2rad" in capsys.readouterr().out
    store.add(write, TRAINED)
    store.add(write, scored(math.nan))
    assert main([*state, "promote", "--method", "sam2rad", "v0001"]) == 0
    assert main(["promote", "v0002", *state, "--reason", "trial"]) == 0
    assert capsys.readouterr().out == "sam2rad v0001 is live.\nsam2rad v0002 is live.\n"
    assert [line["reason"] for line in store.history()] == ["by hand", "trial"]
    assert main([*state, "list"]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "live", "created", "Dice", "cases", "labels"]
    assert first.split() == ["v0001", store.get("v0001").created, "0.7500", "2", "RV,", "LV"]
    assert second.split()[:2] == ["v0002", "*"] and second.split()[3] == "-"
    assert main([*state, "rollback"]) == 0
    assert main([*state, "show", "v0001"]) == 0
    out = capsys.readouterr().out
    shown = json.loads(out[out.index("{") :])
    assert shown["live"] is True and shown["split"] == {"train": 2, "validation": 1} and shown["metrics"]["cases"] == 1
    assert "case-" not in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["promote"], "expected a name like v0001, received ''"),
        (["promote", "../x"], "expected a name like v0001"),
        (["show", "v0009"], "received 'v0009'"),
        (["rollback"], "Expected an earlier live version"),
        (["rollback", "v0001"], "takes no name"),
        (["list", "--method", "../x"], "method: expected"),
    ],
)
def test_command_line_refuses_with_status_2_and_a_sentence(store, capsys, arguments, text) -> None:
    fill(store, 1)
    assert main(["--state", str(store.folder.parent), *arguments]) == 2
    caught = capsys.readouterr()
    assert text in caught.err and caught.out == "" and "Traceback" not in caught.err
    assert store.live_name() == "v0001"


def test_command_line_runs_as_a_module(store) -> None:
    command = [sys.executable, "-m", "lib.versions", "--state", str(store.folder.parent), "rollback"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("Expected an earlier live version") and done.stdout == ""
