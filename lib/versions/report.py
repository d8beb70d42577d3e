"""A report of one version, HTML to look at and JSON to compute with, made of facts that are stored already.

It lies in ``<state_dir>/<method>/reports/<name>.html`` and may be made again at any time: from the version's record,
the history, and what its run left (curves, the live version's scores of that day, pictures of the worst cases). Parts
that are gone are left out. The page holds everything in itself, runs no script and escapes every text. Case names and
images are patient data: the files stay in the state folder, messages and logs name neither. Thread-safe: files are
replaced.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

from lib.errors import ConfigError
from lib.versions.curves import HEIGHT, WIDTH, drawing, read_curves
from lib.versions.files import explained, read_text, replace_text
from lib.versions.gate import by_case, paired
from lib.versions.record import NAME, Version, check_name, matches, plain
from lib.versions.store import REPORTS, RUNS, VersionStore, now, number_of

COMPARISON, PICTURES, PROGRESS = "comparison.json", "worst.json", "progress.json"
TEMPLATE = "report.html"


def keep_comparison(run: Path, live: Optional[str], scores: Optional[Mapping[str, Any]]) -> None:
    """Keeps the live version's scores of today in a run's folder; no later moment knows them.

    Args:
        run: folder of the run.
        live: name of the version.
        scores: ``mean_dice``, ``dice`` and ``cases``; None where it could not be compared.
    """
    replace_text(run / COMPARISON, json.dumps(plain({"version": live, "scores": scores})))


def write_report(store: VersionStore, name: str) -> Path:
    """Writes both files of a version's report.

    Args:
        store: of its method.
        name: of a stored version.

    Returns:
        the HTML file.

    Raises:
        ConfigError: for an unknown name.
        WeightsError: if the version is damaged or the folder cannot be written.
    """
    facts = gathered(store, store.get(name))
    folder = store.folder / REPORTS
    with explained():
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / f"{name}.json", json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False))
        replace_text(folder / f"{name}.html", as_html(facts, store.folder / RUNS / name))
    return folder / f"{name}.html"


def report_file(store: VersionStore, name: str = "") -> Path:
    """The HTML file of a version's report, or of the newest one.

    Raises:
        ConfigError: for a malformed name, or where there is none.
    """
    folder = store.folder / REPORTS
    stems = (path.stem for path in folder.glob("*.html"))
    known = sorted((stem for stem in stems if matches(NAME, stem)), key=number_of)
    wanted = check_name(name) if name else (known[-1] if known else "")
    if wanted not in known:
        raise ConfigError(
            f"Expected a version of {store.method} with a report out of {known}, received {name or 'none'}. Train "
            "one, or make its report by `python -m lib.versions report`."
        )
    return folder / f"{wanted}.html"


def gathered(store: VersionStore, version: Version) -> dict[str, Any]:
    """Everything that the report says, as JSON values."""
    run = store.folder / RUNS / version.name
    progress, before = _json(run / PROGRESS) or {}, _json(run / COMPARISON) or {}
    epochs, steps = progress.get("total_epochs") or 0, progress.get("total_steps") or 0
    curves = read_curves(run / "tensorboard", steps // epochs if epochs else 1)
    scores, history = before.get("scores"), list(store.history())
    own = [line for line in history if line["version"] == version.name]
    facts = {
        "method": version.method, "version": version.name, "created": version.created, "parent": version.parent,
        "written": now(), "live": store.live_name() == version.name, "backbone": version.backbone,
        "labels": version.labels, "recipe": version.recipe, "cases_trained": version.trained_on,
        "cases_validated": len(version.metrics.get("cases") or ()), "decision": own[0] if own else None,
        "mean_dice": version.mean_dice, "by_label": _by_label(version, scores),
        "best_epoch": version.metrics.get("epoch"), "seconds": progress.get("total_time"),
        "before": {"version": before["version"], "mean_dice": scores["mean_dice"]} if scores else None,
        "curves": asdict(curves), "cases": _cases(version, scores), "versions": _versions(store, version, before),
        "pictures": _json(run / PICTURES) or [], "left_out": progress.get("left_out") or [], "history": history,
    }  # fmt: skip
    return plain(facts)


def _by_label(version: Version, before: Optional[Mapping[str, Any]]) -> list[dict[str, Any]]:
    now, then = version.metrics.get("dice") or {}, (before or {}).get("dice") or {}
    absent = version.metrics.get("absent") or ()
    return [{"label": k, "now": now.get(k), "before": then.get(k), "absent": k in absent} for k in version.labels]


def _cases(version: Version, before: Optional[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Validation cases, the worst first, with the change against the version that was live."""
    change = paired(version.metrics, before) if before else {}
    rows = [
        {"case": case, "dice": row, "mean": sum(row.values()) / len(row), "change": change.get(case)}
        for case, row in by_case(version.metrics).items()
        if row
    ]
    return sorted(rows, key=lambda row: row["mean"])


def _versions(store: VersionStore, version: Version, before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every stored version beside this one, on the cases and labels that both were scored on."""
    live, rows = store.live_name(), []
    for other in store.list():
        again = other.name == before.get("version") and before.get("scores")
        change = paired(version.metrics, again or other.metrics)
        rows.append({
            "name": other.name, "created": other.created, "live": other.name == live, "backbone": other.backbone,
            "labels": other.labels, "cases_trained": other.trained_on, "mean_dice": other.mean_dice,
            "scored_again": bool(again), "cases_in_common": len(change),
            "change": sum(change.values()) / len(change) if change and other.name != version.name else None,
        })  # fmt: skip
    return rows


def as_html(facts: Mapping[str, Any], run: Path) -> str:
    """The page.

    Args:
        facts: of :func:`gathered`.
        run: folder of the pictures; those that are not there are left out.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    places = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=places, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    curves = {name: drawing(points) for name, points in facts["curves"].items()}
    return page.get_template(TEMPLATE).render(
        facts, drawn=curves, width=WIDTH, height=HEIGHT, shown=_embedded(facts["pictures"], run)
    )


def _embedded(pictures: Sequence[Mapping[str, Any]], run: Path) -> list[dict[str, Any]]:
    found = []
    for picture in pictures:
        path = run / Path(picture["file"]).name
        if path.is_file():
            found.append({**picture, "png": base64.b64encode(path.read_bytes()).decode()})
    return found


def _json(path: Path) -> Any:
    """Content of a file of the run, None where there is none or it is cut short."""
    try:
        return json.loads(read_text(path) or "null")
    except ValueError:
        return None
