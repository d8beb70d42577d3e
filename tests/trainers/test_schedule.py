"""The scheduler between its clock, its file and a gate, and MONAI Label's gate behind the same questions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional
from zoneinfo import ZoneInfo

import psutil
import pytest
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.interfaces.utils import app as upstream_app
from monailabel.utils.async_tasks import utils as upstream

from lib.schedule_record import FILE, Run, Status, load
from lib.train_rules import Rules
from lib.triggers import Job
from tests.cases import write_case
from tests.serving import ROOT, eventually
from trainers.gate import UpstreamGate
from trainers.schedule import Scheduler, main

NOW = datetime(2026, 3, 2, 14, tzinfo=ZoneInfo("Europe/Berlin"))
AFTER_ONE = Rules(after=1)


class FakeGate:
    """A server that takes every training unless it is told to refuse."""

    model = "sam2rad"

    def __init__(self) -> None:
        self.found: Optional[dict[str, str]] = {}
        self.jobs: list[Job] = []
        self.ended = Status.RUNNING
        self.refuse = False
        self.newer: Optional[Scheduler] = None
        self.looks = 0

    def labels(self) -> Optional[dict[str, str]]:
        self.looks += 1
        return self.found

    def newest(self) -> Optional[Job]:
        return self.jobs[-1] if self.jobs else None

    def status(self, run: Run) -> Status:
        return self.ended

    def version(self) -> Optional[str]:
        return None

    def busy(self) -> bool:
        return False

    def start(self, options: Mapping[str, Any]) -> Optional[str]:
        if self.refuse:
            return None
        self.jobs.append(Job(f"job{len(self.jobs) + 1}", options))
        return self.jobs[-1].id

    def successor(self) -> Optional[Scheduler]:
        return self.newer


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now

    def move(self, minutes: float) -> None:
        self.now += timedelta(minutes=minutes)


@pytest.fixture
def gate() -> FakeGate:
    return FakeGate()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, gate: FakeGate, clock: Clock) -> Callable[..., Scheduler]:
    """A scheduler on the test's folder, as after a start of the server."""

    def made(rules: Rules = AFTER_ONE, gate: FakeGate = gate) -> Scheduler:
        scheduler = Scheduler(rules, tmp_path / "state", gate=gate, now=clock)
        scheduler.restore()
        return scheduler

    return made


def said(scheduler: Scheduler) -> list[str]:
    return [line["what"] for line in scheduler.view()["log"]]


# the scheduler


def test_saved_label_is_seen_at_once_and_one_from_elsewhere_within_a_minute(make, gate: FakeGate, clock: Clock) -> None:
    scheduler = make(Rules(after=2))
    scheduler.tick()
    gate.found = {"a": "1"}
    scheduler.tick()
    assert (gate.looks, scheduler.view()["new_labels"]) == (1, 0)  # a store of a thousand cases is not read every 5 s
    scheduler.saved()
    scheduler.tick()
    assert (gate.looks, scheduler.view()["new_labels"]) == (2, 1)
    gate.found = {"a": "1", "b": "1"}
    clock.move(1)
    scheduler.tick()
    assert len(gate.jobs) == 1 and scheduler.view()["new_labels"] == 0


def test_label_saved_while_the_store_is_read_is_not_lost(make, gate: FakeGate, monkeypatch) -> None:
    scheduler, read = make(), gate.labels

    def saved_meanwhile() -> Optional[dict[str, str]]:
        before = read()
        gate.found = {"a": "1"}
        scheduler.saved()
        return before

    monkeypatch.setattr(gate, "labels", saved_meanwhile)
    scheduler.tick()
    monkeypatch.setattr(gate, "labels", read)
    scheduler.tick()
    assert len(gate.jobs) == 1


def test_idle_counts_from_the_start_and_from_every_use(make, gate: FakeGate, clock: Clock) -> None:
    gate.found = {"a": "1"}
    scheduler = make(Rules(after=1, idle_min=10))
    for use in (scheduler.used, scheduler.saved):
        clock.move(9)
        use()
        scheduler.tick()
        assert not gate.jobs
    clock.move(10)
    scheduler.tick()
    assert len(gate.jobs) == 1


def test_clock_set_back_makes_nobody_a_user_of_the_future(make, gate: FakeGate, clock: Clock) -> None:
    gate.found = {"a": "1"}
    scheduler = make(Rules(after=1, idle_min=10))
    scheduler.used()
    clock.move(-180)
    scheduler.tick()
    clock.move(9)
    scheduler.tick()
    assert not gate.jobs
    clock.move(1)
    scheduler.tick()
    assert len(gate.jobs) == 1


def test_next_is_unknown_while_what_is_due_waits_for_a_person(make, gate: FakeGate) -> None:
    gate.found = {"a": "1"}
    scheduler = make(Rules(at="02:00", after=1, idle_min=10))
    scheduler.used()
    scheduler.tick()
    view = scheduler.view()
    assert view["waits_for"].startswith("somebody used the server") and view["next"] is None


@pytest.mark.parametrize("zone", ["JST-9", "CET-1CEST,M3.5.0,M10.5.0/3", "nowhere/at_all"])
def test_zone_that_has_no_name_stops_nothing(zone: str) -> None:
    code = "from trainers.schedule import _local_time; assert _local_time().utcoffset() is not None"
    line = [sys.executable, "-c", code]
    found = subprocess.run(line, cwd=ROOT, env={**os.environ, "TZ": zone}, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr


def test_view_tells_what_is_due_and_what_it_waits_for(make, gate: FakeGate, clock: Clock) -> None:
    gate.found = {"a": "1"}
    scheduler = make(Rules(at="02:00", after=1, hours="20:00-06:00"))
    scheduler.tick()
    view = scheduler.view()
    assert view["pending"] == ["train_after 1"]
    assert view["waits_for"] == "outside the allowed hours 20:00-06:00"
    assert view["next"] == "2026-03-02T20:00:00+01:00"
    assert (view["enabled"], view["paused"], view["model"], view["last_training"]) == (True, False, "sam2rad", None)
    clock.move(6 * 60)
    scheduler.tick()
    view = scheduler.view()
    assert (view["pending"], view["waits_for"], view["next"]) == ([], None, "2026-03-03T02:00:00+01:00")
    assert view["last_training"]["by"] == "schedule" and view["last_training"]["status"] == "RUNNING"
    json.dumps(view)


def test_pause_holds_over_a_restart_and_what_is_due_stays_due(make, gate: FakeGate) -> None:
    gate.found = {"a": "1"}
    first = make()
    first.pause()
    first.tick()
    assert first.view()["paused"] and first.view()["next"] is None
    second = make()
    second.tick()
    assert second.view()["pending"] == ["train_after 1"] and not gate.jobs
    second.pause(False)
    second.tick()
    assert len(gate.jobs) == 1
    assert said(second) == ["paused", "due: train_after 1", "waits: paused", "resumed", "started: train_after 1"]


def test_refused_start_is_tried_again(make, gate: FakeGate) -> None:
    gate.found, gate.refuse = {"a": "1"}, True
    scheduler = make()
    scheduler.tick()
    scheduler.tick()
    assert said(scheduler)[-1].startswith("refused") and load(scheduler.folder).pending
    gate.refuse = False
    scheduler.tick()
    assert len(gate.jobs) == 1


def test_training_that_a_killed_server_left_is_taken_up(make, gate: FakeGate, clock: Clock) -> None:
    gate.found = {"a": "1"}
    make().tick()
    after = FakeGate()
    after.found, after.ended = gate.found, Status.GONE
    scheduler = make(gate=after)
    scheduler.tick()
    assert len(after.jobs) == 1
    assert "the server ended during a training" in said(scheduler)


def test_waiting_does_not_write_the_file_at_every_look(make, gate: FakeGate) -> None:
    gate.found = {"a": "1"}
    scheduler = make(Rules(after=1, hours="20:00-06:00"))
    scheduler.tick()
    before = (scheduler.folder / FILE).stat().st_mtime_ns
    scheduler.tick()
    assert (scheduler.folder / FILE).stat().st_mtime_ns == before
    assert scheduler.view()["log"][-1]["count"] == 2


def test_record_holds_no_identifier_beyond_the_gate(make, gate: FakeGate) -> None:
    gate.found = {"ab12cd": "1-2"}
    scheduler = make()
    scheduler.tick()
    assert "ab12cd" in (scheduler.folder / FILE).read_text()
    assert "ab12cd" not in json.dumps(scheduler.view())


def test_without_a_trigger_nothing_runs_and_nothing_is_written(make, gate: FakeGate) -> None:
    scheduler = make(Rules(idle_min=5))
    scheduler.start()
    assert scheduler.view()["enabled"] is False
    assert not scheduler.folder.exists()


@pytest.fixture
def running(tmp_path: Path, gate: FakeGate) -> Iterator[Scheduler]:
    """One with its own thread."""
    scheduler = Scheduler(AFTER_ONE, tmp_path / "state", gate=gate, tick_s=0.05)
    scheduler.start()
    yield scheduler
    scheduler.stop()


def test_thread_outlives_a_look_that_raises(running: Scheduler, gate: FakeGate, monkeypatch, caplog) -> None:
    def broken() -> None:
        raise ValueError("patient7.nii.gz")

    with monkeypatch.context() as patch:
        patch.setattr(gate, "newest", broken)
        assert eventually(lambda: "a look failed (ValueError) and is tried again" in said(running))
    gate.found = {"a": "1"}
    running.saved()
    assert eventually(lambda: len(gate.jobs) == 1)
    assert "patient7" not in caplog.text and "patient7" not in json.dumps(running.view())


def test_full_disk_is_told_and_the_record_written_later(running: Scheduler, gate: FakeGate, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("trainers.schedule.save", full)
        gate.found = {"a": "1"}
        running.saved()
        assert eventually(lambda: "a look failed (OSError) and is tried again" in said(running))
    assert eventually(lambda: load(running.folder).run is not None)
    assert len(gate.jobs) == 1


def test_reloaded_app_takes_over(running: Scheduler, gate: FakeGate, tmp_path: Path) -> None:
    after = FakeGate()
    newer = Scheduler(AFTER_ONE, tmp_path / "state", gate=after, tick_s=0.05)
    gate.newer = newer
    assert eventually(lambda: after.looks > 0)
    gate.found = after.found = {"a": "1"}
    newer.saved()
    running.saved()
    assert eventually(lambda: len(after.jobs) == 1)
    assert not gate.jobs
    assert eventually(lambda: running._stopped is None)
    newer.stop()


# MONAI Label's gate


class App:
    """As much of an app as the gate asks."""

    def __init__(self, store: Any) -> None:
        self.store, self.stats = store, {}  # type: ignore[var-annotated]
        self._trainers = {"sam2rad": SimpleNamespace(stats=lambda: self.stats)}

    def datastore(self) -> Any:
        return self.store

    def info(self) -> dict[str, Any]:
        return {}

    def bundle_path(self, _: Any) -> None:
        return None


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> App:
    """An app with its store, and MONAI Label's lists of trainings empty."""
    (tmp_path / "studies").mkdir()
    made = App(LocalDatastore(str(tmp_path / "studies"), extensions=["*.nii.gz"], auto_reload=False))
    monkeypatch.setattr(upstream, "background_tasks", {"train": []})
    monkeypatch.setattr(upstream, "background_processes", {"train": {}})
    monkeypatch.setattr(upstream_app, "apps", {"only": made})
    monkeypatch.setattr("monailabel.utils.async_tasks.task.app_instance", lambda: made)
    return made


def save_label(app: App, folder: Path, name: str, tag: str = "final") -> None:
    case = write_case(folder / "new", name, 1)
    if name not in app.store.list_images():
        app.store.add_image(name, str(case.image), {})
    app.store.save_label(name, str(case.label), tag, {})


def test_gate_counts_final_labels_by_case_under_hashes(app: App, tmp_path: Path) -> None:
    gate = UpstreamGate(app, "sam2rad")  # type: ignore[arg-type]
    save_label(app, tmp_path, "patient1", "original")
    assert gate.labels() == {}
    save_label(app, tmp_path, "patient1")
    before = gate.labels()
    assert before == gate.labels() and len(before) == 1 and "patient" not in str(before)
    save_label(app, tmp_path, "patient1")
    after = gate.labels()
    assert list(after) == list(before) and after != before  # corrected
    again = LocalDatastore(str(tmp_path / "studies"), extensions=["*.nii.gz"], auto_reload=False)
    assert UpstreamGate(App(again), "sam2rad").labels() == after  # type: ignore[arg-type]


def test_gate_counts_the_others_where_a_label_file_is_missing(app: App, tmp_path: Path) -> None:
    for name in ("patient1", "patient2"):
        save_label(app, tmp_path, name)
    Path(app.store.get_label_uri("patient1", "final")).unlink()
    found = UpstreamGate(app, "sam2rad").labels()  # type: ignore[arg-type]
    assert found is not None and sorted(map(bool, found.values())) == [False, True]


class Silent(DICOMWebDatastore):
    """A PACS that is away, or there but slow to give files."""

    def __init__(self, answer: Optional[list[str]]) -> None:
        self.answer = answer

    def get_labeled_images(self, *_: Any) -> list[str]:
        if self.answer is None:
            raise MONAILabelException(MONAILabelError.SERVER_ERROR, "away")
        return self.answer


@pytest.mark.parametrize(("answer", "expected"), [(None, None), ([], 0), (["1.2", "1.3"], 2)])
def test_gate_asks_a_pacs_for_identifiers_only(answer: Optional[list[str]], expected: Optional[int]) -> None:
    found = UpstreamGate(App(Silent(answer)), "sam2rad").labels()  # type: ignore[arg-type]
    assert (found if found is None else len(found)) == expected


def add_task(status: str, model: str = "sam2rad", **options: Any) -> dict[str, Any]:
    task = {
        "id": f"t{len(upstream.background_tasks['train'])}",
        "status": status,
        "request": {"model": model, **options},
    }
    upstream.background_tasks["train"].append(task)
    return task


def test_gate_shows_the_newest_training_of_its_model(app: App) -> None:
    gate = UpstreamGate(app, "sam2rad")  # type: ignore[arg-type]
    assert gate.newest() is None and not gate.busy()
    mine = add_task("RUNNING", epochs=3, client_id="someone", gpus="all")
    add_task("SUBMITTED", model="promise")
    upstream.background_processes["train"][mine["id"]] = SimpleNamespace(pid=os.getpid())
    born = psutil.Process().create_time()
    assert gate.newest() == Job("t0", {"epochs": 3}, os.getpid(), born)
    assert gate.busy()


STATUS = [
    ("RUNNING", {}, Status.RUNNING),
    ("SUBMITTED", {}, Status.SUBMITTED),
    ("DONE", {"version": "v0001"}, Status.DONE),
    ("STOPPED", {}, Status.STOPPED),
    ("ERROR", {"error": "Two labelled patients are the least."}, Status.ERROR),
    ("ERROR", {"epoch": 3}, Status.KILLED),
]


@pytest.mark.parametrize(("told", "stats", "expected"), STATUS)
def test_gate_status_table(app: App, told: str, stats: dict[str, Any], expected: Status) -> None:
    app.stats = stats
    run = Run(add_task(told)["id"], "schedule", NOW, "test")
    assert UpstreamGate(app, "sam2rad").status(run) is expected  # type: ignore[arg-type]


def test_gate_status_of_a_training_of_another_server(app: App) -> None:
    gate, me = UpstreamGate(app, "sam2rad"), psutil.Process()  # type: ignore[arg-type]
    run = Run("forgotten", "schedule", NOW, "test", version="v0001", pid=me.pid, born=me.create_time())
    assert gate.status(run) is Status.RUNNING  # it outlived its server
    for gone in (replace(run, born=1.0), replace(run, pid=0)):  # the number is another process's; never known
        for stats, expected in (({}, Status.GONE), ({"version": "v0001"}, Status.GONE), ({"version": "v0002"}, "DONE")):
            app.stats = stats
            assert gate.status(gone) == expected


def test_gate_starts_one_training_at_a_time(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def background(request: dict[str, Any], method: str) -> dict[str, Any]:
        asked.append(request)
        return {"id": "new"}

    monkeypatch.setattr("monailabel.utils.async_tasks.task.run_background_task", background)
    gate = UpstreamGate(app, "sam2rad")  # type: ignore[arg-type]
    assert gate.start({"epochs": 3}) == "new"
    assert asked == [{"model": "sam2rad", "epochs": 3}]
    upstream.background_processes["train"]["by hand"] = SimpleNamespace(pid=1)
    assert gate.start({}) is None and len(asked) == 1


def test_gate_knows_the_app_that_replaced_its_own(app: App) -> None:
    gate = UpstreamGate(app, "sam2rad")  # type: ignore[arg-type]
    assert gate.successor() is None
    upstream_app.apps.clear()
    assert gate.successor() is None  # nobody has asked for the new one yet
    upstream_app.apps["only"] = SimpleNamespace(schedule="newer")
    assert gate.successor() == "newer"


# the command line


def test_command_line_pauses_resumes_and_shows(make, gate: FakeGate, capsys) -> None:
    gate.found = {"a": "1"}
    scheduler = make()
    scheduler.pause()
    scheduler.tick()
    assert main(["resume", "--state", str(scheduler.folder)]) == 0
    assert main(["pause", "--state", str(scheduler.folder)]) == 0
    scheduler.tick()
    assert not gate.jobs
    assert main(["resume", "--state", str(scheduler.folder)]) == 0
    scheduler.tick()
    assert len(gate.jobs) == 1
    capsys.readouterr()
    assert main(["status", "--state", str(scheduler.folder)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["paused"] is False and shown["log"][-1]["what"] == "started: train_after 1"


def test_command_line_names_a_wrong_folder(tmp_path: Path, capsys) -> None:
    assert main(["pause", "--state", str(tmp_path / "nowhere")]) == 2
    assert "--state: expected the .autosam folder" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_command_line_pauses_no_folder_that_no_server_reads(tmp_path: Path, capsys) -> None:
    assert main(["pause", "--state", str(tmp_path)]) == 2  # the studies instead of their .autosam
    assert "received a folder without schedule.json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / ".autosam").mkdir()
    assert main(["pause", "--state", str(tmp_path / ".autosam")]) == 0  # before its first start


def test_command_line_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{}")
    code = "import sys; from trainers.schedule import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    line = [sys.executable, "-c", code, "status", "--state", str(tmp_path)]
    assert subprocess.run(line, cwd=ROOT, capture_output=True, timeout=120).returncode == 0
