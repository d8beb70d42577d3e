"""ASGI wrapper for ``--uvicorn_app apps.autosam_label.server:app``: a server that does not block itself.

Upstream runs an inference inside its event loop, so that one click stalls everybody. Here ``POST /infer/{model}`` is a
plain function, which FastAPI runs in its thread pool, in front of upstream's route and with the same signature,
authentication and meaning; DICOM SEG comes from our own writer. ``POST /train/`` starts one training and not all.
Errors become JSON with a ``detail`` that both clients show, in place of a bare 500. Upstream's log lines that name
images are switched off. Imports nothing of ours, so that ``/reload`` can replace our packages under it; the server
works without this file, only less well.
"""

from __future__ import annotations

import json
import logging
from typing import Any, Optional

from fastapi import Depends, File, Form, HTTPException, Request, UploadFile
from fastapi.background import BackgroundTasks
from fastapi.responses import JSONResponse
from monailabel.app import app
from monailabel.config import settings
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

for _name in ("monailabel.endpoints.infer", "monailabel.datastore.utils.dicom", "dicomweb_client"):
    logging.getLogger(_name).setLevel(logging.WARNING)


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
    except ValueError:
        return params
    return json.dumps({**values, "result_extension": extension}) if isinstance(values, dict) else params


def _check_params(params: str, output: Optional[ResultType]) -> None:
    try:
        values = json.loads(params or "{}")
    except ValueError:
        raise HTTPException(400, "params: expected a JSON object, received text that is not JSON.") from None
    if not isinstance(values, dict):
        raise HTTPException(400, f"params: expected a JSON object, received a {type(values).__name__}.")
    if output == ResultType.image and values.get("result_write_to_file") is False:
        raise HTTPException(400, "result_write_to_file: expected true with output=image, received false. Ask for json.")
    for key in ("image", "model", "session"):
        if key in values:
            raise HTTPException(400, f"params: {key!r} belongs into the address of the request, not into params.")


@app.exception_handler(MONAILabelException)
def answer_error(_: Request, error: MONAILabelException) -> JSONResponse:
    """What was wrong, in the words of the exception."""
    if isinstance(error, (ImageNotFoundException, LabelNotFoundException)):
        status = 404
    else:
        status = 400 if error.error is MONAILabelError.INVALID_INPUT else 500
    return JSONResponse({"detail": error.msg, "error": error.error.value}, status_code=status)


@app.post("/train/", include_in_schema=False)
def train(params: Optional[dict] = None, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))) -> Any:
    """OHIF's *Update Model*: upstream queues every trainer, here the first one, whose progress OHIF shows, starts."""
    trainers = list(app_instance().info()["trainers"])
    if not trainers:
        raise HTTPException(404, "No model of this server can be trained.")
    return {trainers[0]: {"result": run_model(trainers[0], (params or {}).get(trainers[0])), "detail": None}}


app.router.routes[:0] = [app.router.routes.pop() for _ in (infer, train)]  # the first match wins
