"""What the datastore asks of a PACS, over DICOMweb: lists, facts about a series, download, upload.

Every request ends within a time limit, and a PACS that is away, slow or of another opinion becomes one sentence for the
user. Thread-safe as far as its HTTP session is: requests share nothing but connections. Identifiers of patients and
series are never logged. Left out: retrieval frame by frame.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, Optional, TypeVar

import requests
from dicomweb_client import DICOMwebClient
from dicomweb_client.session_utils import create_session_from_user_pass
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX
from monailabel.datastore.utils.dicom import dicom_web_upload_dcm
from monailabel.interfaces.exception import ImageNotFoundException, MONAILabelError, MONAILabelException
from requests.adapters import HTTPAdapter
from retrying import RetryError

logger = logging.getLogger(__name__)
CONNECT_S, READ_S = 5.0, 60.0  # a read is one piece of an answer, not a whole series
ATTEMPTS = 2
AGAIN_S = 60.0  # until a series whose metadata failed is asked about again: an archive may still be filing it
UID = re.compile(r"[0-9]+(\.[0-9]+)+")
UNSET_FILTER = {"Modality": "CT"}  # upstream's default; we offer every image
# Objects without voxels to segment, or with voxels that are no image of a patient.
_NOT_IMAGES = """
    ANN ASMT AU CFM DMS DOC ECG EEG EMG EOG EPS FID HD KO M3D PLAN PR REG RESP RTDOSE RTIMAGE RTINTENT RTPLAN RTRAD
    RTRECORD RTSEGANN RTSTRUCT RWV SEG SMR SR SRF STAIN TEXTUREMAP
"""
NOT_IMAGES = frozenset(_NOT_IMAGES.split())
STUDY, SERIES, MODALITY = "0020000D", "0020000E", "00080060"
REFERENCED_SERIES, CONTENT_DATE, CONTENT_TIME = "00081115", "00080023", "00080033"
INSTANCES = "00201209"
AS_STORED = (("application/dicom", "*"),)  # media type and transfer syntax

T = TypeVar("T")
Json = Mapping[str, Any]
# what is wrong where an answer is not the DICOMweb that its reader expects
NOT_DICOMWEB = (KeyError, IndexError, TypeError, ValueError, AttributeError)


def is_uid(text: str) -> bool:
    """Whether it is written as a DICOM identifier, and so may be part of an address or a path."""
    return len(text) <= 64 and UID.fullmatch(text) is not None


class PacsError(MONAILabelException):
    """The PACS cannot be reached, refuses, or answers something that is not DICOMweb."""

    def __init__(self, sentence: str) -> None:
        super().__init__(MONAILabelError.SERVER_ERROR, sentence)


@contextmanager
def _asking() -> Iterator[None]:
    try:
        yield
    except requests.HTTPError as error:
        raise _refused(error.response) from None
    except RetryError as error:  # busy, several times in a row
        raise _refused(error.last_attempt.value) from None
    except requests.RequestException:
        raise PacsError(
            "Expected an answer of the PACS; received none. Check that it runs and that --studies names its DICOMweb"
            " address."
        ) from None
    except NOT_DICOMWEB:
        raise PacsError(
            "Expected DICOMweb from the PACS; received something else. Check that --studies names its DICOMweb address."
        ) from None


def _refused(response: Optional[requests.Response]) -> PacsError:
    status = "an error" if response is None else response.status_code
    return PacsError(
        f"Expected the PACS to answer; received status {status}. Its log says more; check access and space there."
    )


class Kept(Generic[T]):
    """A value that costs a request and is asked for again when it is old.

    Args:
        fetch: gets it.
        seconds: how old it may be.
    """

    def __init__(self, fetch: Callable[[], T], seconds: float) -> None:
        self._fetch, self._seconds = fetch, seconds
        self._value: Optional[T] = None
        self._since = self._tried = 0.0
        self._lock = threading.Lock()

    def now(self) -> T:
        """The value, fetched first where it is old.

        Raises:
            PacsError: where it cannot be fetched.
        """
        with self._lock:
            if self._value is None or self._old():
                self._value, self._since = self._fetch(), time.monotonic()
            return self._value

    def soon(self) -> T:
        """The last known value at once; an old one is renewed behind it. Waits only where none is known.

        Every click asks for the server's state, and must not wait for a PACS.
        """
        value = self._value
        if value is None:
            return self.now()
        if self._old() and time.monotonic() - self._tried > self._seconds:
            self._tried = time.monotonic()
            threading.Thread(target=self._renew, daemon=True).start()
        return value

    def forget(self) -> None:
        """Makes the next question a request."""
        with self._lock:
            self._value = None

    def _old(self) -> bool:
        return time.monotonic() - self._since > self._seconds

    def _renew(self) -> None:
        with suppress(PacsError):  # the last known value stays; who needs the PACS itself is told
            self.now()


class _InTime(HTTPAdapter):
    """Requests that do not wait for ever."""

    def send(self, request: Any, *args: Any, **options: Any) -> requests.Response:
        if not options.get("timeout"):
            options["timeout"] = (CONNECT_S, READ_S)
        return super().send(request, *args, **options)


Source = tuple[Optional[str], tuple[str, str]]  # the series that a SEG refers to, and when it was made


class Pacs:
    """A DICOMweb address.

    Args:
        url: ``--studies``.
        modalities: offered ones; empty: every image.
    """

    def __init__(self, url: str, modalities: Collection[str] = ()) -> None:
        self.client = _client(url)
        self._filter = {} if settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER == UNSET_FILTER else {
            **settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER
        }  # fmt: skip
        self._modalities = {m.upper() for m in modalities}
        self._sources: dict[str, Source] = {}
        self._failed: dict[str, float] = {}  # when the metadata of a series failed

    def images(self) -> list[str]:
        """Series that hold images, in the order of the PACS."""
        with _asking():
            return [uid for uid, one in self._search(self._filter).items() if self._offered(_text(one, MODALITY))]

    def _offered(self, modality: str) -> bool:
        return modality in self._modalities if self._modalities else modality not in NOT_IMAGES

    def segmentations(self) -> dict[str, list[str]]:
        """Image series to the DICOM SEG series that refer to it, newest first.

        One whose metadata cannot be had, or are not DICOM, refers to nothing: it must not hide all others.
        """
        found: dict[str, list[tuple[tuple[str, str], str]]] = {}
        before = self._failed
        with _asking():
            listed = self._search({"Modality": "SEG"})
            self._failed = {uid: when for uid, when in before.items() if uid in listed}
            for uid, one in listed.items():
                image, made = self._known_source(_text(one, STUDY), uid)
                if image is not None:
                    found.setdefault(image, []).append((made, uid))
        if self._failed.keys() - before.keys():
            logger.warning("%d segmentation series of the PACS have no usable metadata: passed over", len(self._failed))
        return {image: [uid for _, uid in sorted(segs, reverse=True)] for image, segs in found.items()}

    def _known_source(self, study: str, series: str) -> Source:
        """Asked for once, for a stored object does not change; nothing where that failed lately."""
        if series not in self._sources and time.monotonic() - self._failed.get(series, -AGAIN_S) >= AGAIN_S:
            try:
                self._sources[series] = self._source(study, series)
                self._failed.pop(series, None)
            except (requests.HTTPError, *NOT_DICOMWEB):  # not of a PACS that is away or busy
                self._failed[series] = time.monotonic()
        return self._sources.get(series, (None, ("", "")))

    def _source(self, study: str, series: str) -> Source:
        if not (is_uid(study) and is_uid(series)):
            raise ValueError("no identifiers")
        head = self.client.retrieve_series_metadata(study, series)[0]
        referenced = head.get(REFERENCED_SERIES, {}).get("Value") or [{}]
        return _text(referenced[0], SERIES) or None, (_text(head, CONTENT_DATE), _text(head, CONTENT_TIME))

    def facts(self, series: str) -> Json:
        """The PACS's entry of a series.

        Raises:
            ImageNotFoundException: for a series that it does not have.
        """
        with _asking():
            found = self._search({"SeriesInstanceUID": series}).get(series)
        if found is None:
            raise ImageNotFoundException("The PACS has no such series. Choose the image again.")
        return found

    def download(self, series: str, folder: Path) -> None:
        """Writes all objects of a series into an empty folder.

        Files are numbered: an identifier out of an object is no file name, as anybody may have written it. The numbers
        follow the identifiers, so that frames without any other order keep theirs when they are downloaded again.

        Raises:
            ImageNotFoundException: for a series that the PACS does not have.
            PacsError: also where fewer objects came than it says it has.
        """
        facts = self.facts(series)
        parts: list[tuple[str, Path]] = []
        with _asking():
            for instance in self._objects(_text(facts, STUDY), series):
                parts.append((str(instance.SOPInstanceUID), folder / f"{len(parts):06d}.part"))
                instance.save_as(parts[-1][1])
        for number, (_, part) in enumerate(sorted(parts)):
            part.rename(folder / f"{number:06d}.dcm")
        announced = int(_text(facts, INSTANCES) or 0)
        if not parts or len(parts) < announced:
            raise PacsError(f"Expected {announced} objects of the series; received {len(parts)}. Try again.")

    def _objects(self, study: str, series: str) -> Iterator[Any]:
        """As they are stored: Orthanc cannot decode JPEG 2000, and we can. A PACS may know no such wish."""
        try:
            return self.client.iter_series(study, series, AS_STORED)
        except requests.HTTPError:
            return self.client.iter_series(study, series)

    def store(self, file: Path) -> str:
        """Uploads a DICOM file; its SeriesInstanceUID."""
        with _asking():
            series = dicom_web_upload_dcm(str(file), self.client)
        if not series:
            raise PacsError("Expected the PACS to store the segmentation; it refused. Its log says why.")
        return series

    def _search(self, filters: Mapping[str, Any]) -> dict[str, Json]:
        """Series by UID, page by page until one brings nothing new: a PACS may limit its answers."""
        found: dict[str, Json] = {}
        while True:
            page = self.client.search_for_series(search_filters=dict(filters), offset=len(found))
            new = {uid: one for one in page if (uid := _text(one, SERIES)) not in found}
            if not new:
                return found
            found |= new


def _client(url: str) -> DICOMwebClient:
    """Upstream's client with upstream's settings, and a time limit for every request."""
    session = requests.Session()
    if "googleapis.com" in url:
        from dicomweb_client.ext.gcp.session_utils import create_session_from_gcp_credentials

        session = create_session_from_gcp_credentials()
    elif settings.MONAI_LABEL_DICOMWEB_USERNAME and settings.MONAI_LABEL_DICOMWEB_PASSWORD:
        session = create_session_from_user_pass(
            settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
        )
    for scheme in ("http://", "https://"):
        session.mount(scheme, _InTime())
    client = DICOMwebClientX(
        url=url,
        session=session,
        qido_url_prefix=settings.MONAI_LABEL_QIDO_PREFIX,
        wado_url_prefix=settings.MONAI_LABEL_WADO_PREFIX,
        stow_url_prefix=settings.MONAI_LABEL_STOW_PREFIX,
    )
    client.set_http_retry_params(max_attempts=ATTEMPTS)
    return client


def _text(entry: Json, tag: str) -> str:
    """The first value of an attribute in DICOM JSON; empty where it has none."""
    values = entry.get(tag, {}).get("Value") or [""]
    return str(values[0])
