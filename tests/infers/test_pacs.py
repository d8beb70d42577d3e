"""What the datastore asks of a PACS, with a client that answers as told; ``tests/test_pacs.py`` asks a real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from retrying import Attempt, RetryError

from infers import pacs as module
from infers.pacs import Pacs, PacsError, is_uid

STUDY = "1.2.3"


class Client:
    """Segmentations by SeriesInstanceUID: when they were made, or what their metadata fail with; all of image 1.5."""

    def __init__(self, segs: dict[str, Any]) -> None:
        self.segs, self.asked, self.instances, self.knows_wildcard = segs, [], [], True

    def search_for_series(self, search_filters: Any, offset: int) -> list[dict[str, Any]]:
        uids = [self.instances[0].SeriesInstanceUID] if self.instances else list(self.segs)
        return [{"0020000D": {"Value": [STUDY]}, "0020000E": {"Value": [uid]}} for uid in uids][offset:]

    def retrieve_series_metadata(self, study: str, series: str) -> list[dict[str, Any]]:
        self.asked.append(series)
        found = self.segs[series]
        if isinstance(found, Exception):
            raise found
        if not isinstance(found, str):
            return found
        referenced = {"Value": [{"0020000E": {"Value": ["1.5"]}}]}
        return [{"00081115": referenced, "00080023": {"Value": [found]}, "00080033": {"Value": ["120000"]}}]

    def iter_series(self, study: str, series: str, media_types: Any = None) -> Iterator[Any]:
        if media_types is not None and not self.knows_wildcard:
            raise requests.HTTPError(response=status(406))
        return iter(self.instances)


def pacs_of(segs: dict[str, Any]) -> Pacs:
    found = Pacs("http://127.0.0.1:9/dicom-web")
    found.client = Client(segs)
    return found


def status(code: int) -> requests.Response:
    found = requests.Response()
    found.status_code = code
    return found


def test_segmentations_are_listed_newest_first() -> None:
    segs = {"1.1": "20240101", "1.2": "20250101", "1.3": "20230101", "1.4": "20250101"}
    assert pacs_of(segs).segmentations() == {"1.5": ["1.4", "1.2", "1.1", "1.3"]}


BAD = [
    requests.HTTPError(response=status(404)),
    ValueError("no JSON"),
    [],
    ["no object"],
    [{"00081115": {"Value": ["no item"]}}],
]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("uid", ["1.9", "1." + "2" * 70, "../x", ""])
def test_one_bad_segmentation_hides_no_other(bad: Any, uid: str, caplog: pytest.LogCaptureFixture) -> None:
    pacs = pacs_of({"1.1": "20240101", uid: bad, "1.2": "20240102"})
    for _ in range(2):
        assert pacs.segmentations() == {"1.5": ["1.2", "1.1"]}
    assert caplog.text.count("1 segmentation series of the PACS have no usable metadata") == 1
    assert STUDY not in caplog.text and "1.9" not in caplog.text
    assert pacs.client.asked == (["1.1", "1.9", "1.2"] if uid == "1.9" else ["1.1", "1.2"])  # once, if it is an address


def test_a_segmentation_that_failed_is_asked_for_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    pacs = pacs_of({"1.1": requests.HTTPError(response=status(404))})
    assert pacs.segmentations() == {}
    pacs.client.segs["1.1"] = "20240101"
    assert pacs.segmentations() == {}
    monkeypatch.setattr(module, "AGAIN_S", 0.0)
    assert pacs.segmentations() == {"1.5": ["1.1"]}


@pytest.mark.parametrize(
    "error, words",
    [
        (requests.ConnectionError(), "received none"),
        (requests.Timeout(), "received none"),
        (RetryError(Attempt(status(503), 2, False)), "received status 503"),
    ],
)
def test_a_pacs_that_is_away_or_busy_is_told(error: Exception, words: str) -> None:
    with pytest.raises(PacsError, match=words):
        pacs_of({"1.1": error}).segmentations()


@pytest.mark.parametrize("knows_wildcard", [True, False])
def test_files_are_named_by_number_and_never_by_what_an_object_says(tmp_path: Path, knows_wildcard: bool) -> None:
    folder = tmp_path / "in" / "here"
    folder.mkdir(parents=True)
    pacs = pacs_of({})
    pacs.client.knows_wildcard = knows_wildcard
    for uid in ("1.3", "../../out", "1.2"):
        save = lambda path, uid=uid: Path(path).write_text(uid)  # noqa: E731
        pacs.client.instances.append(SimpleNamespace(SOPInstanceUID=uid, SeriesInstanceUID="1.5", save_as=save))
    pacs.download("1.5", folder)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        f"in/here/{n:06d}.dcm" for n in range(3)
    ]
    assert [p.read_text() for p in sorted(folder.iterdir())] == ["../../out", "1.2", "1.3"]  # whatever came first


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1.2.840.1", True),
        ("1." + "1" * 62, True),
        ("1." + "1" * 63, False),
        ("1..2", False),
        ("1.2/..", False),
        ("", False),
    ],
)
def test_identifier_is_digits_and_points_and_short(text: str, expected: bool) -> None:
    assert is_uid(text) is expected
