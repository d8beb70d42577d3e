"""Pre-annotation of the whole store: ``POST /batch/infer/{model}`` with a learned method, on the running server.

MONAI Label starts a batch as a process of its own, which would load a second model, compete with every click and write
its copy of the store's file over the server's. Ours only asks the server, one image after the other: the server stays
the only writer (:func:`lib.child.only_read`), its clicks go first (:func:`giving_way`), and a batch that is stopped or
killed harms nothing; the next one goes on where it was. Its log lines are in ``GET /batch/infer``; they name images by
their place in the sorted list of identifiers, never by those. Left out: several images at once, which on one device is
no faster.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import requests
from monailabel.config import settings
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.batch_infer import BatchInferTask

from lib.child import RUN_SYNC, only_read
from lib.engine import Engine
from lib.settings import SWITCH

logger = logging.getLogger(__name__)
MARK = "batch"
# of the batch or of upstream's way to run it; all else in the body are options of every image's request
OWN_KEYS = """
    model images label_tag redo max_batch_size max_workers multi_gpu gpus device logging save_label bundle_path
    description local_rank
"""
NOT_PASSED_ON = frozenset(OWN_KEYS.split())
INFO_LIMIT_S = 60.0
Task = Mapping[str, Any]


@contextmanager
def giving_way(engine: Engine, request: Task) -> Iterator[None]:
    """Inside, a batch's request waits before every encoder block while anybody clicks; other requests run as ever."""
    if request.get(MARK) is True:
        with engine.background():
            yield
    else:
        yield


@dataclass(frozen=True)
class Server:
    """The server that started this process, on this machine."""

    url: str

    def tasks(self) -> dict[str, Any]:
        """What ``/info/`` says of the models.

        Raises:
            MONAILabelException: if nothing answers there, or something else does.
        """
        response = self._send("get", "/info/", timeout=INFO_LIMIT_S)
        try:
            return dict(response.json()["models"])
        except (ValueError, KeyError, TypeError):
            raise MONAILabelException(
                MONAILabelError.SERVER_ERROR,
                f"Expected a list of models at {self.url}/info/; received status {response.status_code} and none. Look"
                " whether this server answers there, and into its log; then start the batch again.",
            ) from None

    def label(self, model: str, image: str, params: Task) -> str:
        """Segments one image and keeps the label; what was wrong, or nothing.

        Without a time limit: clicks may hold it up for as long as there are any.
        """
        form = {"params": (None, json.dumps({**params, "save_label": True, MARK: True}))}
        response = self._send("post", f"/infer/{model}", params={"image": image, "output": "json"}, files=form)
        return "" if response.ok else _sentence(response)

    def _send(self, verb: str, path: str, **content: Any) -> requests.Response:
        with requests.Session() as session:
            session.trust_env = False  # a proxy for the world is none for this machine
            try:
                return session.request(verb, self.url + path, **content)
            except requests.RequestException as error:
                raise MONAILabelException(
                    MONAILabelError.SERVER_ERROR,
                    f"Expected the server at {self.url}; it does not answer ({type(error).__name__}). Start it on this"
                    " machine without TLS, and the batch again: it goes on where it was.",
                ) from error


def _sentence(response: requests.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"


class BatchTask(BatchInferTask):
    """What MONAI Label calls for a batch.

    Options in the request's body: ``label_tag`` (default ``original``), ``redo`` (also images that this version has
    answered), ``max_batch_size`` (images at most, 0 for all), and those of the model. ``images`` in its address is
    ``all``, ``labeled`` or ``unlabeled``, which looks at final labels.

    Args:
        in_server: whether this process is the server, which must not wait for itself.
    """

    def __init__(self, in_server: Callable[[], bool]) -> None:
        self._in_server = in_server

    def __call__(self, request: Task, datastore: Datastore, infer: Callable) -> dict[str, int]:
        """Labels the images; how many were ``done``, ``skipped`` and ``failed``.

        Raises:
            MONAILabelException: for a model that cannot segment alone, an option or server that cannot be used, or if
                every image failed.
        """
        if self._in_server():
            raise _refusal(RUN_SYNC)
        only_read(datastore)
        tag = _checked_tag(request.get("label_tag", DefaultLabelTag.ORIGINAL.value))
        most, redo = _most(request.get("max_batch_size")), _redo(request.get("redo"))
        server = Server(f"http://127.0.0.1:{settings.MONAI_LABEL_SERVER_PORT}")
        model = str(request.get("model"))
        version = _live_version(server.tasks(), model)
        images = sorted(self.get_images(request, datastore))
        todo = [n for n, image in enumerate(images) if not _keeps(datastore, image, tag, model, version, redo)]
        params = {k: v for k, v in request.items() if k not in NOT_PASSED_ON}
        plan = f"{model} {version}, tag {tag}: {len(images)} images, {len(images) - len(todo)} of them kept as they are"
        logger.info("%s; %d to do now", plan, len(todo[:most]))
        failed = _run(server, model, images, todo[:most], {**params, "label_tag": tag})
        return {"done": len(todo[:most]) - failed, "skipped": len(images) - len(todo), "failed": failed}


def _run(server: Server, model: str, images: Sequence[str], todo: Sequence[int], params: Task) -> int:
    """Labels the images at these places; how many failed."""
    failed, start = [], time.monotonic()
    for count, place in enumerate(todo, 1):
        wrong = server.label(model, images[place], params)
        if wrong:
            failed.append(place + 1)
            logger.warning("image %d of the sorted list failed and is passed over: %s", place + 1, wrong)
        each = (time.monotonic() - start) / count
        left = each * (len(todo) - count)
        logger.info("%d of %d, %d failed; %.1f s each, %.0f s left", count, len(todo), len(failed), each, left)
    if failed:
        logger.warning("failed images, by place in the sorted list: %s", failed)
    if failed and len(failed) == len(todo):
        raise MONAILabelException(
            MONAILabelError.INFERENCE_ERROR, f"All {len(failed)} images failed. The log says why."
        )
    return len(failed)


def _live_version(tasks: Mapping[str, Task], model: str) -> str:
    """The version that answers; only models that have one segment without prompts."""
    alone = sorted(name for name, task in tasks.items() if task.get("version_live"))
    if model not in alone:
        raise _refusal(
            f"model: expected one that segments alone and has a live version, one of {alone}; received {model!r}."
            " Train first."
        )
    return str(tasks[model]["version_live"])


def _checked_tag(tag: Any) -> str:
    """Final labels are what people made or confirmed, and what training learns from."""
    if not isinstance(tag, str) or tag == DefaultLabelTag.FINAL.value:
        raise _refusal(f"label_tag: expected a tag for unchecked results such as original, received {tag!r}.")
    return tag


def _most(value: Any) -> Optional[int]:
    """Images at most; None for all."""
    number = value.strip() if isinstance(value, str) else value
    if number in (None, "", 0) and not isinstance(number, bool):
        return None
    if isinstance(number, str) and number.isdecimal():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise _refusal(f"max_batch_size: expected a whole number, 0 for all images, received {value!r}.")
    return number or None


def _redo(value: Any) -> bool:
    if value in (None, ""):
        return False
    word = str(value).strip().lower()
    if word not in SWITCH:
        raise _refusal(f"redo: expected true or false, received {value!r}.")
    return SWITCH[word]


def _keeps(datastore: Datastore, image: str, tag: str, model: str, version: str, redo: bool) -> bool:
    """Whether the image has a label under the tag that is to stay: this version's, or one that no model made."""
    label = datastore.get_label_by_image_id(image, tag)
    if not label:
        return False
    info = datastore.get_label_info(label, tag) or {}
    answer = info.get("params")
    made_by_model = "model" in info and isinstance(answer, Mapping) and "version" in answer
    same = made_by_model and (info["model"], answer["version"]) == (model, version)
    return not made_by_model or (same and not redo)


def _refusal(sentence: str) -> MONAILabelException:
    return MONAILabelException(MONAILabelError.INVALID_INPUT, sentence)
