"""The app under MONAI Label's own loader: from any directory, again and again, and as a training child builds it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import nibabel as nib
import numpy as np
import pytest
from fastapi.testclient import TestClient
from monailabel.config import settings
from monailabel.interfaces.exception import ImageNotFoundException, MONAILabelException
from monailabel.interfaces.utils.app import app_instance, clear_cache
from pydicom.uid import CTImageStorage

from apps.autosam_label import server
from lib.versions.store import open_store
from tests.cases import LABELS, add_version
from tests.lib.seg_series import AXIAL, classic
from tests.serving import APP, ROOT

OURS = ("lib", "infers", "trainers")


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    folder.mkdir()
    voxels = np.random.default_rng(0).normal(100, 20, (24, 20, 8)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 3.0, 1.0])), folder / "case.nii.gz")
    return folder


@pytest.fixture
def conf(tmp_path: Path) -> dict[str, str]:
    return {"backbone": "tiny", "cache_dir": str(tmp_path / "cache")}


@pytest.fixture
def load(studies: Path, conf: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Builds the app as the server does; leaves this process's modules and path as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(ROOT))])
    before = {name: module for name, module in list(sys.modules.items()) if name.split(".")[0] in OURS}
    monkeypatch.setattr(settings, "MONAI_LABEL_SESSION_PATH", str(tmp_path / "sessions"))
    clear_cache()
    yield lambda **more: app_instance(str(APP), str(studies), {**conf, **more})
    clear_cache()
    for name in [m for m in list(sys.modules) if m.split(".")[0] in OURS]:
        del sys.modules[name]
    sys.modules.update(before)


def click(**more: Any) -> dict[str, Any]:
    return {"model": "sam", "image": "case", "foreground": [[12, 10, 4]], "result_write_to_file": False, **more}


def test_app_loads_from_another_directory_and_answers(load) -> None:
    app = load()
    assert set(app.info()["models"]) == {"sam", "sam_2d", "sam2rad_edit"}
    assert app.infer(click())["params"]["label_names"] == {"object": 1}
    assert sys.path[0] == str(ROOT)


def test_app_loads_again_with_fresh_modules_of_one_generation(load) -> None:
    first = load()
    wanted = first.infer(click())["params"]["quality"]
    clear_cache()
    second = load()
    assert type(second) is not type(first)
    assert type(second.engine) is sys.modules["lib.engine"].Engine
    assert type(first.engine) is not type(second.engine)
    assert second.infer(click())["params"]["quality"] == wanted
    with pytest.raises(
        MONAILabelException, match="positive point"
    ):  # an error class of a stale generation would escape
        second.infer(click(foreground=[]))
    assert sys.path.count(str(ROOT)) == 1


def test_app_writes_nothing_and_loads_no_weights(load, tmp_path: Path) -> None:
    before = {p for p in APP.rglob("*") if "__pycache__" not in p.parts}
    app = load()
    assert app.info()["models"]["sam"]["engine"]["weights_id"] is None
    assert {p for p in APP.rglob("*") if "__pycache__" not in p.parts} == before
    assert not (tmp_path / "cache").exists()


def test_schedule_leaves_whoever_asks_for_an_image_alone(load, monkeypatch) -> None:
    app, uses = load(), []
    monkeypatch.setattr(app.schedule, "used", lambda: uses.append(1))
    app.next_sample({"strategy": "random"})
    app.infer(click())
    assert len(uses) == 2


def test_app_offers_the_labels_it_is_told(load) -> None:
    assert load(labels="liver, spleen").info()["labels"] == ["liver", "spleen"]


def test_app_lists_tasks_and_trainers_and_hides_autonomous_until_a_version_is_live(load, studies: Path) -> None:
    app = load()
    info = app.info()
    assert set(info["models"]) == {"sam", "sam_2d", "sam2rad_edit"}
    assert info["models"]["sam2rad_edit"]["version_live"] is None
    assert info["models"]["sam2rad_edit"]["labels"] == {"object": 1}
    assert set(info["trainers"]) == set(info["train_stats"]) == {"sam2rad"}
    assert info["trainers"]["sam2rad"]["config"]["preset"][0] == "auto"
    assert info["train_stats"]["sam2rad"] == {}
    with pytest.raises(MONAILabelException, match="No trained version of sam2rad is live"):
        app.infer(click(model="sam2rad"))
    add_version(open_store(studies / ".autosam", "sam2rad"), app.engine)
    info = app.info()
    assert set(info["models"]) == {"sam", "sam_2d", "sam2rad", "sam2rad_edit"}
    assert info["models"]["sam2rad"]["version_live"] == "v0001"
    assert list(info["models"]["sam2rad"]["labels"]) == list(LABELS)
    assert app.infer(click(model="sam2rad"))["params"]["version"] == "v0001"


def test_app_scores_when_asked_and_not_by_itself(load, monkeypatch) -> None:
    app = load()
    assert set(app.info()["scoring"]) == {"agreement", "quality"}
    monkeypatch.setattr(app, "async_scoring", lambda _: 1 / 0)  # upstream's default: at every next sample
    assert app.next_sample({"strategy": "first"})["id"] == "case"


def test_image_that_somebody_clicks_on_is_handed_to_nobody_else(load) -> None:
    app = load()
    app.infer(click(client_id="anna"))  # she opened it by hand
    with pytest.raises(MONAILabelException, match="Others are labelling all 1 images"):
        app.next_sample({"strategy": "first", "client_id": "bob"})
    assert app.next_sample({"strategy": "first", "client_id": "anna"})["id"] == "case"


def test_image_of_a_batch_stays_free(load) -> None:
    app = load()
    app.infer(click(client_id="anna", batch=True))
    assert app.next_sample({"strategy": "first", "client_id": "bob"})["id"] == "case"


def test_infer_kept_answer_says_who_wished_it(load, studies: Path) -> None:
    app = load()
    reply = app.infer(click(save="draft", client_id="anna", result_write_to_file=True))["params"]
    record = app.datastore().get_label_info("case", "original")["provenance"]
    assert (record["user"], record["declared"], record["saved"]) == ("anna", True, False)
    assert record["seconds_spent"] >= 0 and record == reply["provenance"]


def test_app_asked_about_training_writes_nothing(load, studies: Path) -> None:
    load().info()
    assert not (studies / ".autosam").exists()


def test_app_unknown_setting_is_told_with_the_nearest_spelling(load) -> None:
    with pytest.raises(Exception, match=r"unknown key 'bakbone'.*Did you mean 'backbone'"):
        load(bakbone="tiny")


@pytest.mark.parametrize(
    "image", ["nobody", "", ".", "..", "../studies/case", "/etc/hostname", "case.nii.gz", None, 7, ["case"]]
)
def test_infer_unknown_image_is_refused(load, image: Any) -> None:
    with pytest.raises(ImageNotFoundException, match="not known here"):
        load().infer(click(image=image))


def test_infer_opens_paths_of_studies_and_uploads_only(load, studies: Path, tmp_path: Path, monkeypatch) -> None:
    app, case = load(), studies / "case.nii.gz"
    assert app.infer(click(image=str(case)))["params"]["axis"] == "k"
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(uploads))
    (uploads / "tmpx.nii.gz").write_bytes(case.read_bytes())
    (uploads / "other.nii.gz").write_bytes(case.read_bytes())
    assert app.infer(click(image=str(uploads / "tmpx.nii.gz")))["params"]["axis"] == "k"
    (uploads / "tmpy.nii.gz").symlink_to(tmp_path)
    (studies / "link.nii.gz").symlink_to(uploads / "other.nii.gz")
    for path in ("other.nii.gz", "tmpy.nii.gz", "tmp_absent.nii.gz"):
        with pytest.raises(ImageNotFoundException):
            app.infer(click(image=str(uploads / path)))
    for path in (studies / "link.nii.gz", studies / ".." / "uploads" / "other.nii.gz"):
        with pytest.raises(ImageNotFoundException):
            app.infer(click(image=str(path)))


def test_infer_id_wins_over_a_file_of_the_working_directory(load, tmp_path: Path) -> None:
    (tmp_path / "case").write_text("not an image")
    assert load().infer(click())["params"]["axis"] == "k"


def test_infer_answer_does_not_become_a_final_label_without_a_record(load) -> None:
    with pytest.raises(MONAILabelException, match="save=final"):
        load().infer(click(save_label=True, label_tag="final"))


@pytest.mark.parametrize("tag", ["../../x", "/x", "", "a/b", 5])
def test_infer_label_tag_stays_inside_the_store(load, tag: Any) -> None:
    with pytest.raises(MONAILabelException, match="label_tag"):
        load().infer(click(label_tag=tag))


def test_infer_saves_a_label_where_asked(load, studies: Path) -> None:
    app = load()
    app.infer(click(save_label=True, label_tag="first_guess", result_write_to_file=True))
    assert (studies / "labels" / "first_guess" / "case.nrrd").is_file()


@pytest.mark.parametrize("option, tag", [("draft", "original"), ("final", "final"), (["final", "no"], "final")])
def test_infer_keeps_the_answer_as_the_option_says(load, studies: Path, option: Any, tag: str) -> None:
    app = load()
    reply = app.infer(click(save=option, label="liver", result_write_to_file=True))["params"]
    assert (reply["saved"], reply["provenance"]["kind"], reply["provenance"]["prompts"]) == (tag, "SEMIAUTOMATIC", 1)
    assert (studies / "labels" / tag / "case.nrrd").is_file()
    info = app.datastore().get_label_info("case", tag)
    assert info["label_info"] == [{"name": "liver", "idx": 1}]
    assert info["provenance"] == reply["provenance"]


def test_infer_keeps_nothing_unless_asked(load, studies: Path) -> None:
    for request in (click(result_write_to_file=True), click(save="no", result_write_to_file=True)):
        assert "saved" not in load().infer(request)["params"]
    assert list((studies / "labels").rglob("*.nrrd")) == []


def test_infer_keeps_no_empty_answer(load, studies: Path, monkeypatch) -> None:
    app = load()
    answer = app._infers["sam"].answer

    def nothing(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        file, reply = answer(request)
        return file, {**reply, "empty": True}

    monkeypatch.setattr(app._infers["sam"], "answer", nothing)
    reply = app.infer(click(save="final", result_write_to_file=True))["params"]
    assert reply["saved"] is None and reply["warnings"] == ["Nothing was found, so nothing was saved."]
    assert list((studies / "labels").rglob("*.nrrd")) == []


def kept(**more: Any) -> dict[str, Any]:
    """A click whose answer is to be the final label."""
    return click(**{"save": "final", "result_write_to_file": True, **more})


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an app's engine fail where it would segment."""
    return lambda app: monkeypatch.setattr(app.engine, "segment", lambda *_: 1 / 0)


@pytest.mark.parametrize("model", ["sam", "sam_2d"])
@pytest.mark.parametrize("wish", [{}, {"save": "draft"}, {"save": "no", "save_label": True}])
def test_infer_keeps_no_structure_under_a_name_that_nobody_gave(
    load, studies: Path, never, model: str, wish: dict[str, Any]
) -> None:
    """OHIF's point panel sends no label: the first one offered would be any organ's name."""
    app = load(labels="liver, spleen, background")
    never(app)
    with pytest.raises(MONAILabelException, match=r"expected label, .* received none; \['liver', 'spleen'\] are"):
        app.infer(kept(model=model, **wish))
    assert list((studies / "labels").rglob("*.nrrd")) == []


def test_infer_without_a_name_answers_where_it_is_not_kept_or_there_is_one_label(load) -> None:
    assert load(labels="liver, spleen").infer(click())["params"]["label_names"] == {"liver": 1}
    clear_cache()
    app = load(labels="background, liver")
    app.infer(kept())
    assert app.datastore().get_label_info("case", "final")["label_info"] == [{"name": "liver", "idx": 1}]


def test_infer_final_label_loses_no_structure(load, never) -> None:
    app = load(labels="liver, spleen")
    add_version(app._assisted["sam2rad"].store, app.engine, labels=("liver", "spleen"))
    app.infer(kept(model="sam2rad_edit", label="liver"))
    app.infer(kept(save="draft", label="kidney"))  # a draft takes no final label's place
    app.infer(kept(model="sam2rad"))  # all structures again
    before = dict(app.datastore().get_label_info("case", "final"))
    never(app)
    for model, text in (("sam", r"received one with \['kidney'\], without"), ("sam_2d", "all 8 slices")):
        with pytest.raises(MONAILabelException, match=text):
            app.infer(kept(model=model, label="kidney"))
    assert app.datastore().get_label_info("case", "final") == before


def test_infer_same_structure_is_saved_again(load) -> None:
    app = load(labels="liver, spleen")
    for image_point in ([12, 10, 4], [10, 8, 3]):
        assert app.infer(kept(label="liver", foreground=[image_point]))["params"]["saved"] == "final"


def test_infer_label_that_was_saved_meanwhile_is_not_lost(load, monkeypatch) -> None:
    app = load(labels="liver, spleen")
    answer = app._infers["sam"].answer

    def meanwhile(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        file, reply = answer(request)
        info = {"label_info": [{"name": "spleen", "idx": 1}]}
        app.datastore().save_label("case", file, "final", info)
        return file, reply

    monkeypatch.setattr(app._infers["sam"], "answer", meanwhile)
    with pytest.raises(MONAILabelException, match=r"without \['spleen'\]"):
        app.infer(kept(label="liver"))
    assert app.datastore().get_label_info("case", "final")["label_info"] == [{"name": "spleen", "idx": 1}]


@pytest.mark.parametrize(
    "more, text",
    [
        ({"save": "yes", "result_write_to_file": True}, "expected one of .*no.*draft.*final"),
        ({"save": "final"}, "answer with a label map"),
        ({"save": "final", "result_write_to_file": True, "result_extension": ".dcm"}, "answer with a label map"),
        ({"result_write_to_file": True, "result_extension": ".dcm"}, "out of a DICOM series"),
    ],
)
def test_infer_wrong_wish_to_keep_is_told(load, studies: Path, more: dict[str, Any], text: str) -> None:
    with pytest.raises(MONAILabelException, match=text):
        load().infer(click(**more))
    with pytest.raises(MONAILabelException, match="image of the datastore"):
        load().infer(click(image=str(studies / "case.nii.gz"), save="draft", result_write_to_file=True))


def test_app_offers_the_default_trainer_first(load) -> None:
    assert next(iter(load(train_default="sam2rad").info()["trainers"])) == "sam2rad"
    clear_cache()
    with pytest.raises(Exception, match="train_default: expected one of"):
        load(train_default="liver")


def test_app_on_a_pacs_starts_without_it_and_without_a_download(load, monkeypatch, tmp_path: Path) -> None:
    clear_cache()
    monkeypatch.setattr("monailabel.interfaces.app.MONAILabelApp._download_dcmqi_tools", lambda _: 1 / 0)
    monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_CACHE_PATH", str(tmp_path / "dicom"))
    app = app_instance(str(APP), "http://127.0.0.1:9/dicom-web", {"backbone": "tiny", "state_dir": str(tmp_path / "s")})
    assert type(app.datastore()).__name__ == "DicomStore"
    with pytest.raises(MONAILabelException, match="Expected an answer of the PACS"):
        app.info()


@pytest.fixture
def sent(load, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of our wrapper, in front of the app."""
    app = load()
    for module in ("datastore", "session"):
        monkeypatch.setattr(f"monailabel.endpoints.{module}.app_instance", lambda: app)
    return TestClient(server.app)


@pytest.mark.parametrize("image", ["../../x", "{here}/x", ".."])
def test_uploaded_image_stays_inside_the_studies(sent, tmp_path: Path, image: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    name = image.format(here=tmp_path)
    answer = sent.put("/datastore/image", params={"image": name}, files={"file": ("x.nii.gz", b"image")})
    assert answer.status_code == 400 and "expected a plain name" in answer.json()["detail"]
    assert sorted(tmp_path.rglob("*")) == before


def test_uploaded_archive_stays_inside_its_session(sent, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../../../../x"))
    answer = sent.put("/session/", params={"uncompress": True}, files={"files": ("x.tar", packed.getvalue())})
    assert answer.status_code == 400 and "lead out of it" in answer.json()["detail"]
    assert not list((tmp_path / "sessions").rglob("*"))


def test_sessions_of_the_server_before_are_cleaned_up(load, tmp_path: Path) -> None:
    left = tmp_path / "sessions" / str(uuid4())
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    load().cleanup_sessions()
    assert not left.exists()


def test_damaged_list_of_labels_ends_the_start_with_its_name(load, studies: Path) -> None:
    (studies / "datastore_v2.json").write_text('{"name": "new-data')
    with pytest.raises(Exception, match=f"list of images and labels in {studies}/datastore_v2.json"):
        load()


@pytest.fixture
def child(studies: Path, conf: dict[str, str], tmp_path: Path) -> Any:
    """Runs Python in the environment that upstream gives a training job and a batch."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MONAI_")}
    env.update(
        MONAI_LABEL_APP_DIR=str(APP),
        MONAI_LABEL_STUDIES=str(studies),
        MONAI_LABEL_APP_CONF=json.dumps(conf),
        MONAI_LABEL_SESSION_PATH=str(tmp_path / "sessions"),
        PYTHONPATH=os.pathsep.join(["", str(APP)]),
    )

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
        )

    return run


def test_training_child_builds_the_app(child) -> None:
    """The command of upstream's training job; an unknown trainer is refused."""
    refused = child("-m", "monailabel.interfaces.utils.app", "-m", "train", "-r", json.dumps({"model": "adapt"}))
    assert "There is no model 'adapt' available" in refused.stderr
    code = "import sys, json; from monailabel.interfaces.utils.app import app_instance as a;"
    code += "sys.stdout.write(json.dumps(a().infer(json.loads(sys.argv[1]))['params']['label_names']))"
    answered = child("-c", code, json.dumps(click()))
    assert answered.stdout == '{"object": 1}', answered.stderr[-3000:]


MALFORMED = {"PatientBirthDate": "1970-01-31", "StudyInstanceUID": "1.2.03.4"}
QUOTING = """
import sys
from pathlib import Path
from monailabel.interfaces.utils.app import app_instance
app_instance()
from highdicom.valuerep import check_person_name
from pydicom import Dataset
from lib.dicom_seg import write_seg
from tests.lib.seg_series import AUTOMATIC, NAMES, drawn
write_seg(Path(sys.argv[1]), drawn(), NAMES, Path(sys.argv[2]), AUTOMATIC)
Dataset.from_json({"00100030": {"vr": "DA", "Value": ["1970-01-31"]}}).PatientBirthDate  # as a PACS answers
check_person_name("Odd Name")
"""


def test_malformed_tags_of_a_patient_are_in_no_log_line_of_a_process_with_the_app(child, tmp_path: Path) -> None:
    """In a process of its own, for pytest replaces the filters of warnings in this one."""
    with warnings.catch_warnings(action="ignore"):
        folder = classic(tmp_path / "series", CTImageStorage, "CT", AXIAL, **MALFORMED)
    done = child("-c", QUOTING, str(folder), str(tmp_path / "seg.dcm"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [secret for secret in (*MALFORMED.values(), "Odd Name") if secret in done.stdout + done.stderr] == []
