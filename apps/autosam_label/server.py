"""ASGI wrapper for ``--uvicorn_app apps.autosam_label.server:app``: a server that does not block itself.

Upstream runs an inference inside its event loop, so that one click stalls everybody. Here ``POST /infer/{model}`` is a
plain function, which FastAPI runs in its thread pool, in front of upstream's route and with the same signature,
authentication and meaning, and so is what a disk or a PACS may keep waiting: the next sample, and the datastore. DICOM
SEG comes from our own writer. ``POST /train/`` starts one training and not all; ``/schedule`` shows, pauses and resumes
the training schedule; ``/versions`` and ``/quality`` hand out reports; a label that is saved gets the record of how it
came about, which no client writes. Errors become JSON with a ``detail`` that both clients show, in place of a bare 500.
Imports nothing of ours, so that ``/reload`` can replace our packages under it; the server works without this file,
only less well.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import json
import logging
import re
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Literal, Optional

from fastapi import Depends, File, Form, HTTPException, Request, UploadFile
from fastapi.background import BackgroundTasks
from fastapi.responses import FileResponse, JSONResponse
from fastapi.routing import APIRoute
from monailabel.app import app
from monailabel.config import settings
from monailabel.endpoints import activelearning, datastore
from monailabel.endpoints.datastore import add_image, save_label, update_image_info, update_label_info
from monailabel.endpoints.infer import ResultType, run_inference
from monailabel.endpoints.train import run_model
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelError,
    MONAILabelException,
)
from monailabel.interfaces.utils.app import app_instance

logger = logging.getLogger(__name__)
_upstream = len(app.router.routes)
USER = "authenticated_user"  # the app reads it in an inference's request
OURS = ("provenance", "ts")  # what the server alone writes about a label
PAGE_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


@app.post("/infer/{model}")
def infer(
    background_tasks: BackgroundTasks,
    model: str,
    image: str = "",
    session_id: str = "",
    params: str = Form("{}"),
    file: UploadFile = File(None),
    label: UploadFile = File(None),
    output: Optional[ResultType] = None,
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER)),
) -> Any:
    """Upstream's inference in a thread; checks first what upstream would answer with a bare 500."""
    as_seg = output == ResultType.dicom_seg  # upstream makes one with a tool that it would download
    if as_seg:
        params, output = _with_extension(params, ".dcm"), ResultType.image
    _check_params(params, output)
    params = json.dumps({**_without(params, USER), USER: _name(user)})
    if not (image or session_id or file):
        raise HTTPException(400, "Expected an image id, a session id or an uploaded file, received none of them.")
    try:
        answer = run_inference(background_tasks, model, image, session_id, params, file, label, output)
    except BaseException:
        for task in background_tasks.tasks:  # they remove uploaded files, and run only after a success
            task.func(*task.args, **task.kwargs)
        raise
    if as_seg:
        answer.headers["content-type"] = "application/dicom"
    return answer


def _with_extension(params: str, extension: str) -> str:
    """The parameters with another file format; what is no JSON object stays, and is refused later."""
    try:
        values = json.loads(params or "{}")
    except (ValueError, RecursionError):
        return params
    return json.dumps({**values, "result_extension": extension}) if isinstance(values, dict) else params


def _check_params(params: str, output: Optional[ResultType]) -> None:
    values = _object(params)
    if output == ResultType.image and values.get("result_write_to_file") is False:
        raise HTTPException(400, "result_write_to_file: expected true with output=image, received false. Ask for json.")
    for key in ("image", "model", "session"):
        if key in values:
            raise HTTPException(400, f"params: {key!r} belongs into the address of the request, not into params.")


def _object(params: str) -> dict[str, Any]:
    try:
        values = json.loads(params or "{}")
    except (ValueError, RecursionError):
        raise HTTPException(400, "params: expected a JSON object, received text that is not JSON.") from None
    if not isinstance(values, dict):
        raise HTTPException(400, f"params: expected a JSON object, received a {type(values).__name__}.")
    return values


def _without(params: str, *keys: str) -> dict[str, Any]:
    """The parameters without keys that no client may write."""
    return {key: value for key, value in _object(params).items() if key not in keys}


def _name(user: User) -> Optional[str]:
    """The authenticated name; upstream gives everybody one where nobody is authenticated."""
    return user.username if settings.MONAI_LABEL_AUTH_ENABLE else None


@app.exception_handler(MONAILabelException)
def answer_error(_: Request, error: MONAILabelException) -> JSONResponse:
    """What was wrong, in the words of the exception."""
    if isinstance(error, (ImageNotFoundException, LabelNotFoundException)):
        status = 404
    else:
        status = 400 if error.error is MONAILabelError.INVALID_INPUT else 500
    return JSONResponse({"detail": error.msg, "error": error.error.value}, status_code=status)


@app.exception_handler(OSError)
def answer_system_error(_: Request, error: OSError) -> JSONResponse:
    """A full disk, a missing right, a host that cannot be reached; never with the name of a file, which may be a
    patient's."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = error.strerror or type(error).__name__
    places = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-3:]]
    logger.error("The system refused something: %s, at %s", what, ", ".join(places))
    told = (
        f"The server could not read or write what it needed: {what}. See to the space on its disks, to the rights of"
        " its folders and to the PACS, and try again."
    )
    return JSONResponse({"detail": told, "error": MONAILabelError.SERVER_ERROR.value}, status_code=507 if full else 500)


@app.post("/train/", include_in_schema=False)
def train(params: Optional[dict] = None, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))) -> Any:
    """OHIF's *Update Model*: upstream queues every trainer, here the first one, whose progress OHIF shows, starts."""
    trainers = list(app_instance().info()["trainers"])
    if not trainers:
        raise HTTPException(404, "No model of this server can be trained.")
    options = (params or {}).get(trainers[0]) or {}
    if not isinstance(options, dict):
        raise HTTPException(400, f"{trainers[0]}: expected an object of options, received a {type(options).__name__}.")
    return {trainers[0]: {"result": run_model(trainers[0], options), "detail": None}}


@app.get("/schedule", tags=["Schedule"], summary="What is due, what it waits for, and the last decisions")
def schedule(user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))) -> Any:
    """The same as under ``schedule`` in ``/info/``."""
    return _schedule().view()


@app.post("/schedule/{command}", tags=["Schedule"], summary="Start nothing more, or go on")
def switch_schedule(
    command: Literal["pause", "resume"], user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))
) -> Any:
    """Holds over a restart. A training that runs goes on; ``DELETE /train/`` stops it."""
    try:
        _schedule().pause(command == "pause")
    except OSError as error:
        raise HTTPException(
            507,
            f"Expected a folder of trained versions that can be written, received: {error.strerror}. See to its rights"
            " and to the disk's space; the schedule is as it was.",
        ) from error
    return _schedule().view()


def _schedule() -> Any:
    found = getattr(app_instance(), "schedule", None)
    if found is None:
        raise HTTPException(404, "This app has no training schedule.")
    return found


@app.get("/versions/{method}/report.html", tags=["Versions"], summary="Report of a version, else of the newest")
def report(
    method: str, version: str = "", user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))
) -> FileResponse:
    """A page with case names and images, kept by no cache; no script could run in it."""
    find = getattr(app_instance(), "report", None)
    if find is None:
        raise HTTPException(404, "This app writes no reports.")
    return FileResponse(find(method, version), media_type="text/html", headers=PAGE_HEADERS)


@app.put("/datastore/label", include_in_schema=False)
def save(
    background_tasks: BackgroundTasks,
    image: str,
    params: str = Form("{}"),
    tag: str = "final",
    label: UploadFile = File(...),
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)),
) -> Any:
    """Upstream's way to save a label in a thread, with the record of how it came about, which no client may bring."""
    if not re.fullmatch(r"\w[\w-]{0,63}", tag):
        raise HTTPException(400, "tag: expected up to 64 letters, digits and dashes, such as final.")
    values = _without(params, *OURS)
    describe = getattr(app_instance(), "describe", None)
    if describe is not None:
        values["provenance"] = describe(image, values, _name(user))
    return save_label(background_tasks, image, json.dumps(values), tag, label, user.username)


@app.put("/datastore/label/info", include_in_schema=False)
def tell(
    label: str,
    tag: str,
    info: str = Form("{}"),
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)),
) -> Any:
    """Upstream's way to write about a label, without what the server alone writes; clients may send it back."""
    return update_label_info(label, tag, json.dumps(_without(info, *OURS)), user.username)


@app.put("/datastore/updatelabelinfo", include_in_schema=False)
def tell_as_before(
    label: str,
    tag: str,
    params: str = Form("{}"),
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)),
) -> Any:
    """Upstream's older name for the same."""
    return tell(label, tag, params, user)


@app.put("/datastore/image/info", include_in_schema=False)
def tell_of_image(
    image: str, info: str = Form("{}"), user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))
) -> Any:
    """Upstream's way to write about an image; what is no JSON is told."""
    return update_image_info(image, json.dumps(_object(info)), user.username)


@app.put("/datastore/image", include_in_schema=False)
def upload(
    background_tasks: BackgroundTasks,
    image: Optional[str] = None,
    params: str = Form("{}"),
    file: UploadFile = File(...),
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)),
) -> Any:
    """Upstream's way to take an image in; what is no JSON is told."""
    return add_image(background_tasks, image, json.dumps(_object(params)), file, user.username)


@app.get("/quality/{name}", tags=["Scoring"], summary="Work list, or agreement with the model, of the last scoring")
def quality(
    name: Literal["quality", "agreement"],
    output: Literal["html", "json"] = "html",
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER)),
) -> FileResponse:
    """What ``POST /scoring/NAME`` found last; it names cases and is kept by no cache."""
    folder = getattr(app_instance(), "versions_dir", None)
    if folder is None or not (folder / f"{name}.{output}").is_file():
        raise HTTPException(404, f"Nothing was looked at yet: POST /scoring/{name} first, and wait until it is done.")
    return FileResponse(folder / f"{name}.{output}", headers=PAGE_HEADERS)


def _in_a_thread(endpoint: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    """An endpoint of upstream's, none of which ever waits for anything, as a plain function."""

    def answer(**given: Any) -> Any:
        return asyncio.run(endpoint(**given))

    answer.__signature__ = inspect.signature(endpoint)  # type: ignore[attr-defined]
    return answer


# these wait for the disk or for others; with a PACS some download and convert a whole series
for _route in [*activelearning.router.routes, *datastore.router.routes]:
    if isinstance(_route, APIRoute):
        app.add_api_route(
            _route.path, _in_a_thread(_route.endpoint), methods=list(_route.methods), include_in_schema=False
        )

# the first match wins
app.router.routes[:] = [*app.router.routes[_upstream:], *app.router.routes[:_upstream]]
