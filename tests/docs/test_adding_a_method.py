"""The page about adding a method: its toy works as written, from one file and one YAML, in a copy of the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "adding_a_method.md"
BLOCK = re.compile(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", re.DOTALL)
COPIED = ("apps", "infers", "lib", "tests", "trainers", "pyproject.toml")
CORE = (
    "step_0_is_the_plain_backbone or training_lowers_the_loss or restored_model_predicts_the_same"
    " or click_changes_the_mask or no_user_prompt_is_autonomous or gradient_reaches_every_tensor or propose_gives_pairs"
)
# what the server and a training child do with the app, without a server
APP = """
import json, sys
from monailabel.interfaces.utils.app import app_instance
folder, studies = sys.argv[1:]
conf = {"backbone": "tiny", "models": "prototypes", "cache_dir": folder + "/cache"}
app = app_instance(folder + "/apps/autosam_label", studies, conf)
info = app.info()
print(json.dumps({"models": sorted(app._infers), "trainers": sorted(info["trainers"])}))
"""


def blocks() -> dict[str, str]:
    """Path to text of the page's files."""
    return dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the page's files in it."""
    folder = tmp_path_factory.mktemp("copy") / "repository"
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "model", "logs", "bin"))
        else:
            shutil.copy(source, folder / name)
    for path, text in blocks().items():
        assert not (folder / path).exists(), f"{path} exists: the page's toy needs another name"
        (folder / path).write_text(text, encoding="utf-8")
    return folder


def run(copy: Path, *command: str) -> str:
    """Output of a Python process that knows the copy alone."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True, timeout=540, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_page_shows_one_file_of_sixty_lines_and_one_yaml() -> None:
    found = blocks()
    module, row = sorted(found, key=lambda path: path.endswith(".yaml"))
    assert len(found) == 2 and Path(module).stem == Path(row).stem
    assert len(found[module].strip().splitlines()) <= 60 and len(found[row].strip().splitlines()) <= 10


def test_toy_keeps_the_contract(copy: Path) -> None:
    picked = f"prototypes and (tiny or sam_vit_b) and ({CORE})"
    tests = "tests/lib/methods/test_method_contract.py"
    told = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", picked)
    passed = re.search(r"(\d+) passed", told)
    assert passed and int(passed[1]) >= 20 and "failed" not in told and "skipped" not in told


def test_toy_becomes_tasks_of_the_app(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    told = json.loads(run(copy, "-c", APP, str(copy), str(tmp_path / "studies")).splitlines()[-1])
    assert {"prototypes", "prototypes_edit"} <= set(told["models"])
    assert told["trainers"] == ["prototypes"]
