"""Background work steps aside for clicks and cannot lock them out."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lib.background import Background, Gate
from lib.cache import Lru

ROOT = Path(__file__).resolve().parents[2]


def test_background_runs_jobs_in_order() -> None:
    done: list[int] = []
    background = Background(Gate())
    background.replace([lambda i=i: done.append(i) for i in range(5)])  # type: ignore[misc]
    assert background.idle(5)
    assert done == list(range(5))


def test_background_new_list_replaces_the_rest() -> None:
    gate, started, release = Gate(), threading.Event(), threading.Event()
    done: list[str] = []
    background = Background(gate)

    def first() -> None:
        started.set()
        release.wait(5)
        done.append("first")

    background.replace([first, lambda: done.append("never")])
    assert started.wait(5)
    background.replace([lambda: done.append("second")])
    release.set()
    assert background.idle(5)
    assert done == ["first", "second"]


def test_background_pauses_while_a_click_runs() -> None:
    gate, steps = Gate(), []
    background = Background(gate)

    def job() -> None:
        for _ in range(3):
            gate.pause()
            steps.append(time.monotonic())

    with gate.foreground():
        background.replace([job])
        time.sleep(0.2)
        assert not steps
        click_over = time.monotonic()
    assert background.idle(5)
    assert len(steps) == 3
    assert steps[0] >= click_over


def test_background_failure_keeps_the_thread_alive() -> None:
    done: list[int] = []
    background = Background(Gate())

    def fail() -> None:
        raise ValueError("no such slice")

    background.replace([fail, lambda: done.append(1)])
    assert background.idle(5)
    assert done == [1]


def test_click_waiting_for_the_background_does_not_wait_for_other_clicks() -> None:
    gate = Gate()
    cache: Lru[int] = Lru(10, lambda _: 1, gate.waiting)
    background, begun = Background(gate), threading.Event()

    def encode() -> int:
        begun.set()
        time.sleep(0.1)
        gate.pause()
        return 5

    background.replace([lambda: cache.get_or_make("slice", encode)])
    assert begun.wait(5)
    with gate.foreground(), ThreadPoolExecutor(1) as pool:  # somebody's long inference, and beside it a click

        def click() -> int:
            with gate.foreground():
                return cache.get_or_make("slice", lambda: -1)[0]

        assert pool.submit(click).result(5) == 5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_background_replace_after_an_unexpected_error_starts_again() -> None:
    background, done = Background(Gate()), []

    def fail() -> None:
        raise SystemExit

    background.replace([fail])
    assert background.idle(5)
    assert background._thread is not None
    background._thread.join(5)
    background.replace([lambda: done.append(1)])
    assert background.idle(5)
    assert done == [1]


def test_click_waiting_for_background_value_does_not_deadlock() -> None:
    gate = Gate()
    cache: Lru[int] = Lru(10, lambda _: 1, gate.waiting)
    background, begun = Background(gate), threading.Event()

    def encode() -> int:
        begun.set()
        time.sleep(0.1)
        gate.pause()  # between two blocks: a click is running and wants just this value
        return 5

    background.replace([lambda: cache.get_or_make("slice", encode)])
    assert begun.wait(5)
    answer: list[int] = []

    def click() -> None:
        with gate.foreground():
            answer.append(cache.get_or_make("slice", lambda: -1)[0])

    thread = threading.Thread(target=click, daemon=True)
    thread.start()
    thread.join(5)
    assert answer == [5]


def test_close_ends_the_thread_in_mid_job() -> None:
    gate, begun = Gate(), threading.Event()
    background = Background(gate)

    def endless() -> None:
        begun.set()
        while True:
            gate.pause()
            time.sleep(0.01)

    background.replace([endless, endless])
    assert begun.wait(5)
    background.close()
    assert background._thread is not None
    assert not background._thread.is_alive()


def test_python_exits_cleanly_while_the_background_encodes() -> None:
    """Without closing, the interpreter aborts: a daemon thread inside torch outlives it."""
    code = (
        "import tempfile, threading, torch\n"
        "from lib.settings import AppSettings\n"
        "from lib.engine import Engine\n"
        "engine = Engine(AppSettings.from_conf({'backbone': 'tiny', 'cache_dir': tempfile.mkdtemp()}))\n"
        "begun = threading.Event()\n"
        "def work():\n"
        "    while True:\n"
        "        begun.set(); torch.randn(400, 400) @ torch.randn(400, 400); engine._gate.pause()\n"
        "engine._background.replace([work])\n"
        "assert begun.wait(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
