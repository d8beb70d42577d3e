"""MONAI Label's own OHIF in headless Chromium, driven as a user does: mouse, lists, buttons.

What is looked at is what is shown: pixels of screenshots against voxels projected by the viewer's own camera. The
viewer's services are asked where a voxel lies on the screen, and for its label map; nothing is changed through them.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from PIL import Image

LIMIT_MS = 240_000  # software rendering on a machine with other work
SHOWN_LIMIT_S = 60.0
FAR = 1000  # pixels between two spots that scale a view
COLOURED = 6  # difference of channels; the image is grey, a pale overlay on it has 10 and more
ARGUMENTS = [
    "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist",
    "--disable-dev-shm-usage",
]  # fmt: skip
VIEWPORT = """
    const services = window.services, id = services.viewportGridService.getState().activeViewportId;
    const viewport = services.cornerstoneViewportService.getCornerstoneViewport(id);
    viewport.element.scrollIntoView({block: "nearest"});  // a long list beside it pushes it up, under the window's edge
"""
CAMERA = "() => {" + VIEWPORT + "return viewport.getCamera().focalPoint; }"
PROJECT = "(points) => {" + VIEWPORT + """
    const frame = viewport.element.getBoundingClientRect();
    return points.map(point => { const [x, y] = viewport.worldToCanvas(point); return [x + frame.x, y + frame.y]; });
}"""  # fmt: skip
UNPROJECT = "(pixels) => {" + VIEWPORT + "return pixels.map(pixel => Array.from(viewport.canvasToWorld(pixel))); }"
FRAME = "() => {" + VIEWPORT + """
    const {x, y, width, height} = viewport.element.getBoundingClientRect(); return {x, y, width, height};
}"""  # fmt: skip
LABELMAP = """() => {
    const volume = window.services.segmentationService.getLabelmapVolume('1');
    return {shape: volume.dimensions, voxels: Array.from(volume.voxelManager.getCompleteScalarDataArray())};
}"""
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def why_no_browser() -> Optional[str]:
    """The reason to skip, or None."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "Playwright is not installed (pip install -r requirements-dev.txt)"
    return None if chromium() else "Chromium is not installed (Debian: apt-get install chromium)"


def chromium() -> Optional[str]:
    """Path of the browser."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def running_browser(server: str) -> Iterator[Ohif]:
    """A browser window; skips the test where there is no browser.

    Args:
        server: address of MONAI Label's server, which serves OHIF too.
    """
    reason = why_no_browser()
    if reason:
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS, timeout=LIMIT_MS)
        context = browser.new_context(viewport={"width": 1500, "height": 620})
        # the panel's own memory of the server; its first guess is port 8000 of the page's host
        context.add_cookies([{"name": "MONAILABEL_SERVER_URL", "value": f"{server}/", "url": server}])
        page = context.new_page()
        page.set_default_timeout(LIMIT_MS)
        page.on("dialog", lambda dialog: dialog.accept())
        yield Ohif(page, server)
        browser.close()


@dataclass(frozen=True)
class Grid:
    """Where an image lies.

    Args:
        affine: voxel to RAS mm.
        shape: voxels along i, j, k.
    """

    affine: np.ndarray
    shape: tuple[int, int, int]

    def world(self, ijk: Any) -> list[list[float]]:
        """Voxels ``(N, 3)`` as LPS mm, which OHIF's world is."""
        points = np.asarray(ijk, float).reshape(-1, 3)
        return ((TO_LPS @ self.affine) @ np.c_[points, np.ones(len(points))].T)[:3].T.tolist()

    def voxel(self, world: Any) -> np.ndarray:
        """LPS mm ``(3,)`` or ``(N, 3)`` as voxels, not rounded."""
        back = np.linalg.inv(TO_LPS @ self.affine)
        return np.asarray(world) @ back[:3, :3].T + back[:3, 3]


class Ohif:
    """One window.

    Args:
        page: Playwright's.
        server: address.
    """

    def __init__(self, page: Any, server: str) -> None:
        self.page, self.server = page, server

    def open(self, study: str, mode: str = "monai-label") -> None:
        """Loads a study; the mode is a part of the address."""
        self.page.goto(f"{self.server}/ohif/{mode}?StudyInstanceUIDs={study}", wait_until="domcontentloaded")
        self.page.wait_for_selector("canvas.cornerstone-canvas")
        notice = self.page.locator("text=Confirm and Hide")
        if notice.count():
            notice.click()
        self.view()

    def connect(self) -> None:
        """The panel's round button."""
        self.page.click(".settingsTable .actionButton")
        self.page.wait_for_selector("text=Auto-Segmentation")
        self.view()

    def tab(self, name: str) -> Any:
        """Opens a part of the panel."""
        tab = self.page.locator("div.tab", has=self.page.locator(f"label:has-text('{name}')"))
        if not tab.locator("input.tab-switch").is_checked():
            tab.locator("label.tab-label").click()
            self.page.wait_for_timeout(500)  # it changes the mouse's tool
        return tab

    def choose_model(self, tab: str, model: str) -> None:
        """The list at the top of a tab; choosing clears points and the chosen segment."""
        self.tab(tab).locator("select.selectBox").first.select_option(model)

    def run(self, tab: str) -> Any:
        """Presses *Run*; the server's answer."""
        with self.page.expect_response(lambda answer: "/infer/" in answer.url) as answer:
            self.tab(tab).locator("button", has_text="Run").click()
        return answer.value

    def press(self, button: str, path: str) -> Any:
        """Presses a button of *Active Learning*; the answer of the server's address that contains ``path``."""
        with self.page.expect_response(lambda r: path in r.url and r.request.method != "GET") as answer:
            self.tab("Active Learning").locator("button", has_text=button).click()
        return answer.value

    def choose_label(self, name: str) -> None:
        """A row of the segments of *Point Prompts*."""
        self.tab("Point Prompts").locator("tr.clickable-row", has_text=name).first.click()

    def set_option(
        self, model: str, key: str, value: str, section: str = "infer", picture: Optional[Path] = None
    ) -> None:
        """*Options / Configurations* of a task for ``infer`` or ``train``."""
        self.page.click("text=Options / Configurations")
        self.page.locator("select[name=selectSection]").select_option(section)
        self.page.locator("select[name=selectName]").select_option(model)
        cell = self.page.locator(f"[id='{section}{model}{key}']")
        (cell.select_option if cell.evaluate("cell => cell.tagName") == "SELECT" else cell.fill)(value)
        if picture:
            self.page.screenshot(path=picture)
        self.page.locator("button", has_text="Confirm").last.click()
        self.page.wait_for_selector(".optionsForm", state="detached")

    def slice_shown(self, grid: Grid) -> int:
        """k of the slice in the active viewport, which cuts across k."""
        return self.middle(grid)[2]

    def middle(self, grid: Grid) -> list[int]:
        """The voxel in the middle of the active viewport."""
        return [round(float(v)) for v in grid.voxel(self.page.evaluate(CAMERA))]

    def scroll_to(self, grid: Grid, k: int) -> None:
        """Turns the mouse wheel until slice k is shown."""
        frame = self.page.evaluate(FRAME)
        self.page.mouse.move(frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2)
        direction, before = 1, self.slice_shown(grid)
        for _ in range(3 * grid.shape[2]):
            shown = self.slice_shown(grid)
            if shown == k:
                self.view()
                return
            if abs(shown - k) > abs(before - k):
                direction = -direction
            before = shown
            self.page.mouse.wheel(0, 100 * direction)
            self.page.wait_for_timeout(200)
        raise AssertionError(f"slice {k} was not reached, {self.slice_shown(grid)} is shown")

    def click(self, grid: Grid, ijk: Any) -> None:
        """A click on a voxel of the slice that is shown."""
        (x, y), = self.page.evaluate(PROJECT, grid.world(ijk))  # fmt: skip
        self.page.mouse.click(x, y)
        self.page.wait_for_timeout(500)

    def labelmap(self) -> np.ndarray:
        """The panel's segmentation, ``(I, J, K)`` uint8."""
        found = self.page.evaluate(LABELMAP)
        return np.array(found["voxels"], np.uint8).reshape(found["shape"], order="F")

    def view(self) -> np.ndarray:
        """Pixels of the active viewport ``(rows, columns, 3)`` once they rest."""
        last, end = None, time.monotonic() + LIMIT_MS / 1000
        while time.monotonic() < end:
            frame = self.page.evaluate(FRAME)
            shot = np.asarray(Image.open(BytesIO(self.page.screenshot(clip=frame))).convert("RGB")).astype(int)
            if last is not None and last.shape == shot.shape and (last == shot).all():
                return shot
            last = shot
            self.page.wait_for_timeout(500)
        raise AssertionError("the picture does not come to rest")

    def shows(self, grid: Grid, label: np.ndarray, least: float) -> float:
        """The overlap of overlay and label, once it is as large as it should be or time is up."""
        end = time.monotonic() + SHOWN_LIMIT_S
        while (found := self.overlap(grid, label, self.view())) < least and time.monotonic() < end:
            self.page.wait_for_timeout(500)
        return found

    def overlap(self, grid: Grid, label: np.ndarray, shot: np.ndarray) -> float:
        """Dice of the coloured pixels of a view and a label ``(I, J, K)`` bool, cut by the plane that is shown.

        The image is grey, so what is coloured is overlay. The plane may lie in any way, also aslant through the slices.
        """
        corner, right, down = np.array(self.page.evaluate(UNPROJECT, [[0, 0], [FAR, 0], [0, FAR]]))
        y, x = (axis.ravel()[:, None] / FAR for axis in np.mgrid[: shot.shape[0], : shot.shape[1]] + 0.5)
        voxels = np.rint(grid.voxel(corner + x * (right - corner) + y * (down - corner))).astype(int)
        inside = ((voxels >= 0) & (voxels < grid.shape)).all(1)
        wanted = np.zeros(inside.shape, bool)
        wanted[inside] = label[tuple(voxels[inside].T)]
        coloured = (shot.max(2) - shot.min(2) > COLOURED).ravel() & inside
        return 2.0 * (wanted & coloured).sum() / max(1, wanted.sum() + coloured.sum())
