"""Weight files: download, resume, digests, refusals, command line."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lib import weights
from lib.config import WeightsEntry, backbone_row
from lib.errors import WeightsError
from lib.weights.__main__ import main
from tests.lib.weight_server import Served, serving


@pytest.fixture
def served(tmp_path, monkeypatch) -> Iterator[Served]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(weights, "PAUSE_S", 0.0)
    with serving(tmp_path / "www") as served:
        yield served


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "weights"


CONTENT = bytes(range(256)) * 40_000  # 10.24 MB


def test_download_arrives_whole_with_progress_and_noted_digest(served, folder) -> None:
    seen: list[tuple[int, int]] = []
    entry = served.entry("a.pt", CONTENT, bytes=len(CONTENT))
    path = weights.ensure(entry, folder, progress=lambda done, total: seen.append((done, total)))
    assert path == folder / "a.pt" and path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and len(seen) > 1
    assert json.loads((folder / "digests.json").read_text()) == {"a.pt": weights.file_digest(path)}
    assert not (folder / "a.pt.part").exists()
    weights.ensure(entry, folder)
    assert len(served.asked) == 1


def test_broken_connection_resumes_where_it_stopped(served, folder) -> None:
    served.cut_after = [3_000_000, 2_000_000]
    path = weights.ensure(served.entry("a.pt", CONTENT), folder)
    assert path.read_bytes() == CONTENT
    assert served.asked == ["", "bytes=3000000-", "bytes=5000000-"]


def test_interrupted_download_is_kept_and_resumed_by_the_next_run(served, folder) -> None:
    served.cut_after = [1_000_000] * 3
    entry = served.entry("a.pt", CONTENT)
    with pytest.raises(WeightsError, match=r"stopped after 3000000 bytes.*run it again to resume"):
        weights.ensure(entry, folder)
    assert not (folder / "a.pt").exists()
    assert weights.ensure(entry, folder).read_bytes() == CONTENT
    assert served.asked[-1] == "bytes=3000000-"


WHOLE, LONGER, OTHER = CONTENT, CONTENT + b"more", CONTENT[::-1]


@pytest.mark.parametrize(
    ("kept", "has_digest", "tells_size", "asked"),
    [
        (WHOLE, True, True, 1),
        (WHOLE, True, False, 1),
        (WHOLE, False, True, 1),
        (WHOLE, False, False, 2),  # nothing says that it is whole, so it is fetched again
        (LONGER, False, True, 2),
        (OTHER, True, True, 2),
    ],
)
def test_download_killed_before_the_file_was_moved_succeeds(
    served, folder, kept, has_digest, tells_size, asked
) -> None:
    served.tells_size = tells_size
    entry = served.entry("a.pt", CONTENT, sha256=hashlib.sha256(CONTENT).hexdigest() if has_digest else None)
    folder.mkdir()
    (folder / "a.pt.part").write_bytes(kept)
    assert weights.ensure(entry, folder).read_bytes() == CONTENT
    assert served.asked == [f"bytes={len(kept)}-", ""][:asked]
    assert not (folder / "a.pt.part").exists()


def test_part_of_a_file_that_was_fetched_before_is_judged_by_the_noted_digest(served, folder) -> None:
    entry = served.entry("a.pt", CONTENT)
    weights.ensure(entry, folder).unlink()
    (folder / "a.pt.part").write_bytes(OTHER)
    assert weights.ensure(entry, folder).read_bytes() == CONTENT


def test_server_that_refuses_every_range_is_named(served, folder) -> None:
    served.status = 416
    with pytest.raises(WeightsError, match="answered 416"):
        weights.ensure(served.entry("a.pt", CONTENT), folder)


def test_server_without_ranges_starts_over(served, folder) -> None:
    served.cut_after, served.ranged = [1_000_000], False
    assert weights.ensure(served.entry("a.pt", CONTENT), folder).read_bytes() == CONTENT


def test_wrong_download_is_refused_and_not_kept(served, folder) -> None:
    entry = served.entry("a.pt", CONTENT, sha256="0" * 64)
    with pytest.raises(WeightsError, match="another file than the manifest expects"):
        weights.ensure(entry, folder)
    assert not (folder / "a.pt").exists() and not (folder / "a.pt.part").exists()


def test_download_of_another_size_is_refused(served, folder) -> None:
    with pytest.raises(WeightsError, match="expected 5 bytes, received 10240000"):
        weights.ensure(served.entry("a.pt", CONTENT, bytes=5), folder)


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_web_page_instead_of_a_checkpoint_is_refused(served, folder, kind) -> None:
    served.kind = kind
    with pytest.raises(WeightsError, match="web page"):
        weights.ensure(served.entry("a.pt", b"\n<!DOCTYPE html><title>Sign in</title>"), folder)
    assert not (folder / "a.pt").exists()


def test_web_page_saved_by_hand_is_refused(folder) -> None:
    folder.mkdir()
    (folder / "a.pt").write_bytes(b"<html>Google Drive - Virus scan warning</html>")
    with pytest.raises(WeightsError, match="is a web page, not a checkpoint"):
        weights.ensure(WeightsEntry("a.pt"), folder)


@pytest.mark.parametrize("status, text", [(404, "answered 404"), (503, "run it again to resume")])
def test_server_error_is_named(served, folder, status, text) -> None:
    served.status = status
    with pytest.raises(WeightsError, match=text):
        weights.ensure(served.entry("a.pt", CONTENT), folder)
    assert len(served.asked) == (1 if status == 404 else weights.ATTEMPTS)


def test_unreachable_server_says_what_to_do(folder, monkeypatch) -> None:
    monkeypatch.setattr(weights, "PAUSE_S", 0.0)
    entry = WeightsEntry("a.pt", url="http://127.0.0.1:9/a.pt")
    with pytest.raises(WeightsError, match="conf weights_dir"):
        weights.ensure(entry, folder)


def test_offline_missing_file_names_file_folder_url_and_command(folder) -> None:
    entry = backbone_row("sam_vit_b").weights
    with pytest.raises(WeightsError) as caught:
        weights.ensure(entry, folder, allow_download=False)
    message = str(caught.value)
    for part in (entry.file, str(folder), entry.url, "375 MB", "python -m lib.weights fetch", "--conf weights_dir"):
        assert part in message
    assert not folder.exists()


def test_missing_file_without_address_gives_the_hint(folder) -> None:
    with pytest.raises(WeightsError, match=r"no direct address.*Google Drive id"):
        weights.ensure(backbone_row("sam_med2d").weights, folder)


def test_truncated_file_is_refused(folder) -> None:
    folder.mkdir()
    (folder / "a.pt").write_bytes(CONTENT[:1000])
    with pytest.raises(WeightsError, match="incomplete or another file: expected 10240000 bytes, received 1000"):
        weights.ensure(WeightsEntry("a.pt", bytes=len(CONTENT)), folder)


def test_file_with_another_digest_than_the_manifest_is_refused(folder) -> None:
    folder.mkdir()
    (folder / "a.pt").write_bytes(CONTENT)
    with pytest.raises(WeightsError, match=r"expected 111111111111.*from the manifest"):
        weights.ensure(WeightsEntry("a.pt", sha256="1" * 64), folder)


def test_file_that_changed_since_first_use_is_refused(folder) -> None:
    folder.mkdir()
    (folder / "a.pt").write_bytes(CONTENT)
    weights.ensure(WeightsEntry("a.pt"), folder)
    (folder / "a.pt").write_bytes(CONTENT[::-1])
    with pytest.raises(WeightsError, match="noted at first use"):
        weights.ensure(WeightsEntry("a.pt"), folder)


def test_damaged_digest_file_is_named(folder) -> None:
    folder.mkdir()
    (folder / "a.pt").write_bytes(CONTENT)
    (folder / "digests.json").write_text("{")
    with pytest.raises(WeightsError, match=r"digests.json is damaged"):
        weights.ensure(WeightsEntry("a.pt"), folder)


def test_full_disk_is_refused_before_the_download(served, folder) -> None:
    with pytest.raises(WeightsError, match="MB more in"):
        weights.ensure(served.entry("a.pt", CONTENT, bytes=10**15), folder)
    assert served.asked == []


def test_two_processes_fetch_once(served, folder) -> None:
    entry = served.entry("a.pt", CONTENT)
    threads = [threading.Thread(target=weights.ensure, args=(entry, folder)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (folder / "a.pt").read_bytes() == CONTENT and len(served.asked) == 1


def test_shipped_file_is_found_beside_the_module_and_leaves_no_trace(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(weights, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "compact.safetensors").write_bytes(CONTENT)
    path = weights.ensure(WeightsEntry("compact.safetensors"), tmp_path / "other", allow_download=False)
    assert path == tmp_path / "shipped" / "compact.safetensors"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["compact.safetensors", "shipped"]


def test_weights_dir_is_the_setting_or_the_user_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert weights.weights_dir(str(tmp_path / "mine")) == tmp_path / "mine"
    default = weights.weights_dir("")
    assert default.parts[-2:] == ("autosam_label", "weights") and not default.exists()


def test_command_line_module_does_not_import_torch() -> None:
    code = "import sys, lib.weights, lib.weights.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0


def test_command_line_lists_fetches_and_verifies(served, folder, monkeypatch, capsys) -> None:
    row = replace(backbone_row("mobile_sam"), weights=served.entry("mobile_sam.pt", CONTENT))
    monkeypatch.setattr("lib.weights.__main__.backbone_names", lambda: ["mobile_sam"])
    monkeypatch.setattr("lib.weights.__main__.backbone_row", lambda name: row)
    assert main(["--weights-dir", str(folder), "list"]) == 0
    assert "missing" in capsys.readouterr().out
    assert main(["--weights-dir", str(folder), "fetch", "mobile_sam"]) == 0
    assert main(["--weights-dir", str(folder), "verify"]) == 0
    assert "verified" in capsys.readouterr().out
    (folder / "mobile_sam.pt").write_bytes(b"other")
    assert main(["--weights-dir", str(folder), "verify"]) == 1
    assert main(["--weights-dir", str(folder), "fetch", "mobil_sam"]) == 1
    assert "Did you mean 'mobile_sam'?" in capsys.readouterr().err
