"""What all infer tasks say in their replies."""

import numpy as np
import pytest

from infers.interactive import SamTask
from infers.learned import LearnedTask
from lib.assisted import AssistedEngine
from lib.engine import Engine
from tests.cases import ROW, settings, store_at, write_case
from tests.dicom_files import cine, save

FRAMES = np.random.default_rng(0).integers(0, 200, (3, 40, 48, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    engine = Engine(settings(folder))
    edit = LearnedTask(AssistedEngine(engine, ROW, store_at(folder), ("organ",)), edit=True)
    return {"sam": SamTask(engine, ["organ"], 3), "sam_2d": SamTask(engine, ["organ"], 2), "sam2rad_edit": edit}


@pytest.mark.parametrize(
    ("model", "prompts"),
    [
        ("sam", {"foreground": [[20, 20, 1]]}),
        ("sam_2d", {"foreground": [[20, 20, 1]]}),
        ("sam2rad_edit", {"organ": [[20, 20, 1]]}),
    ],
)
def test_reply_tells_what_was_assumed_about_the_image(tasks, tmp_path, model, prompts):
    folder = save(tmp_path / "cine", [cine(FRAMES, "RGB")])
    _, reply = tasks[model]({"image": str(folder), "model": model, "result_write_to_file": False, **prompts})
    assert reply["warnings"][0].startswith("The series has no position in space")


def test_reply_on_an_image_without_a_flaw_has_no_warnings(tasks, tmp_path):
    image = str(write_case(tmp_path, "case", 0).image)
    _, reply = tasks["sam"]({"image": image, "model": "sam", "foreground": [[14, 14, 2]]})
    assert reply["warnings"] == []
