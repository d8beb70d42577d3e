"""Records of cases, their rank, and the files that show them: JSON for programs, one HTML page for people.

The page loads nothing from anywhere and every text in it is escaped. Files replace the former ones whole, so that a
reader never meets half of one and a run that is killed leaves the last result. They name cases; they are for the state
folder and its readers only, never for a log.
"""

from __future__ import annotations

import html
import json
import os
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Optional

from lib.quality.rules import Remark, Rules
from lib.versions.files import write_text

STYLE = (
    "body{font:15px sans-serif;margin:2em;max-width:75em}table{border-collapse:collapse}"
    "td,th{border-bottom:1px solid #ccc;padding:.3em .8em;text-align:left;vertical-align:top}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}ul{margin:0;padding-left:1.2em}"
)


@dataclass(frozen=True)
class Record:
    """One case of the work list.

    Args:
        case: identifier in the store.
        tag: of the label that was checked.
        remarks: what is remarkable; empty for a case in order.
        dice: between final label and the model's, by structure, where that is known.
        dice_of: what it was measured with: ``label``, the model's in the store, or ``record``, as the final label's
            record has it; empty without any.
    """

    case: str
    tag: str
    remarks: tuple[Remark, ...] = ()
    dice: dict[str, float] = field(default_factory=dict)
    dice_of: str = ""

    def score(self, rules: Rules) -> float:
        """Sum of the remarks' weights."""
        return sum(rules.weights[r.check] * r.share for r in self.remarks)


def ranked(records: Sequence[Record], rules: Rules) -> list[Record]:
    """The most remarkable first; equal ones by identifier."""
    return sorted(records, key=lambda record: (-record.score(rules), record.case))


def work_list(
    records: Sequence[Record], rules: Rules, left_out: Mapping[str, str], now: Optional[datetime] = None
) -> dict[str, Any]:
    """JSON of the ranked list: ``summary`` and one record per case under ``cases``.

    Args:
        records: of the cases that were looked at.
        rules: weights.
        left_out: why a case was not looked at.
        now: time of the run.
    """
    found: list[dict[str, Any]] = []
    for rank, record in enumerate(ranked(records, rules), start=1):
        reasons = [{**asdict(r), "weight": round(rules.weights[r.check] * r.share, 3)} for r in record.remarks]
        one = {"rank": rank, "case": record.case, "tag": record.tag, "score": round(record.score(rules), 3)}
        found.append({**one, "reasons": reasons, "dice": record.dice, "dice_of": record.dice_of})
    checks = Counter(check for record in records for check in {r.check for r in record.remarks})
    to_look_at = sum(bool(record.remarks) for record in records)
    counts = {"cases": len(records), "left_out": len(left_out), "to_look_at": to_look_at, "checks": dict(checks)}
    return {"summary": counts, "created": _stamp(now), "rules": asdict(rules), "cases": found, "left_out": left_out}


def agreement_list(
    cases: Mapping[str, Mapping[str, Mapping[str, Optional[float]]]],
    means: Mapping[str, Any],
    left_out: Mapping[str, str],
    now: Optional[datetime] = None,
) -> dict[str, Any]:
    """JSON of the agreement, the worst case first.

    Args:
        cases: measures by case and structure.
        means: measures by structure.
        left_out: why a case could not be compared.
        now: time of the run.
    """
    rows: list[dict[str, Any]] = [
        {"case": case, "dice": mean_dice(labels), "labels": labels} for case, labels in cases.items()
    ]
    rows.sort(key=lambda row: (row["dice"], row["case"]))
    overall = sum(row["dice"] for row in rows) / len(rows) if rows else None
    counts = {"cases": len(rows), "left_out": len(left_out), "mean_dice": overall}
    return {"summary": counts, "created": _stamp(now), "labels": means, "cases": rows, "left_out": left_out}


def mean_dice(labels: Mapping[str, Mapping[str, Optional[float]]]) -> float:
    """Over the structures of a case; 1 where there is none."""
    values = [row["dice"] or 0.0 for row in labels.values()]
    return sum(values) / len(values) if values else 1.0


def _stamp(now: Optional[datetime]) -> str:
    return (now or datetime.now(UTC)).isoformat(timespec="seconds")


def quality_page(found: Mapping[str, Any]) -> str:
    """The HTML of :func:`work_list`."""
    rows = [
        _row(one["rank"], f"{one['score']:.1f}", one["case"], one["tag"], [r["reason"] for r in one["reasons"]])
        for one in found["cases"]
        if one["reasons"]
    ]
    rows += [_row("", "", case, "", [f"Not looked at. {reason}"]) for case, reason in found["left_out"].items()]
    counts = found["summary"]
    text = f"{counts['to_look_at']} of {counts['cases']} labelled cases are remarkable. {found['created']}"
    return _page("Work list", text, ("", "score", "case", "label", "reasons"), rows)


def agreement_page(found: Mapping[str, Any]) -> str:
    """The HTML of :func:`agreement_list`."""
    rows = [
        _row(one["case"], label, *(_number(row[key]) for key in ("dice", "hd95_mm", "mean_mm")))
        for one in found["cases"]
        for label, row in one["labels"].items()
    ]
    rows += [_row(case, "", "", "", reason) for case, reason in found["left_out"].items()]
    means = "; ".join(f"{name}: Dice {_number(row['dice'])}" for name, row in found["labels"].items())
    text = f"{found['summary']['cases']} cases. {means or 'No case has both labels.'} {found['created']}"
    heads = ("case", "structure", "Dice", "95 % Hausdorff mm", "mean surface mm")
    return _page("Final labels beside the model's", text, heads, rows)


def _number(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.3f}"


def _row(*cells: Any) -> str:
    return "<tr>" + "".join(_cell(cell) for cell in cells) + "</tr>"


def _cell(content: Any) -> str:
    if isinstance(content, list):
        return "<td><ul>" + "".join(f"<li>{html.escape(str(item))}</li>" for item in content) + "</ul></td>"
    text = html.escape(str(content))
    return f'<td class="n">{text}</td>' if text.replace(".", "", 1).isdigit() else f"<td>{text}</td>"


def _page(title: str, text: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    body = f"<h1>{html.escape(title)}</h1><p>{html.escape(text)}</p>"
    body += f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def publish(folder: Path, name: str, found: Mapping[str, Any], page: str) -> None:
    """Writes ``NAME.html`` and ``NAME.json``, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".html", page), (".json", json.dumps(found, allow_nan=False))):
        part = folder / f".{name}-{uuid.uuid4().hex}{suffix}"
        try:
            write_text(part, text)
            os.replace(part, folder / f"{name}{suffix}")
        finally:
            part.unlink(missing_ok=True)
