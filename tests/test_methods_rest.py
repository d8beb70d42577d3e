"""Every method that the app knows, trained through the server's REST interface, and what the live version answers.

One server with all of them on ``compact`` and generated cases; a new method is tested without an edit here. Whether it
learns anything worth having is measured by ``bench.methods`` on real data.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from lib.config import method_names
from tests import cases
from tests.labelling import ask, save_labels, train, upload
from tests.serving import Server, running_server

COUNT = 5  # one to validate, one that nobody labels
# enough to find something, as a version without any Dice is not put live; on ``tiny``, whose masks have four channels,
# ``sam_med2d`` learns now and then where a structure is not and no more
FAST = {"epochs": 2, "steps": 30, "batch": 4, "patience": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with every method on labelled phantoms; the last one has no label."""
    scratch = tmp_path_factory.mktemp("methods")
    studies = scratch / "studies"
    studies.mkdir()
    written = [cases.write_case(scratch / "cases", f"c{n}", n) for n in range(COUNT)]
    conf = {
        "labels": ",".join(cases.LABELS),
        "models": ",".join(method_names()),
        "prefetch": "false",
    }
    with running_server(studies, scratch, conf=conf) as running:
        upload(running, (c.image for c in written))
        save_labels(running, (c.label for c in written[:-1]), cases.LABELS)
        yield running


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", method_names())
def test_method_is_trained_answers_alone_and_takes_a_click(server: Server, method: str, tmp_path: Path) -> None:
    unseen = f"c{COUNT - 1}"
    assert server.info()["models"][f"{method}_edit"]["version_live"] is None and method not in server.info()["models"]

    last = train(server, method=method, **FAST)[-1]
    assert (last["version"], last["live"], last["step"]) == ("v0001", True, 60), last
    assert np.isfinite(last["loss"])
    assert server.info()["models"][method]["labels"] == {name: n for n, name in enumerate(cases.LABELS, start=1)}

    alone, reply = ask(server, tmp_path, method, unseen)
    assert reply["version"] == "v0001" and alone.shape == cases.SHAPE and set(np.unique(alone)) <= {0, 1, 2}
    again, before = ask(server, tmp_path, f"{method}_edit", unseen)
    np.testing.assert_array_equal(again, alone)  # no click: the autonomous result

    name, (i, j, k) = beside(alone)
    edited, reply = ask(server, tmp_path, f"{method}_edit", unseen, **{name: [[i, j, k]]}, label=name)
    assert reply["version"] == "v0001" and k in reply["edited"][name]
    untouched = [z for z in range(alone.shape[2]) if all(z not in slices for slices in reply["edited"].values())]
    np.testing.assert_array_equal(edited[:, :, untouched], alone[:, :, untouched])
    assert reply["quality"] != before["quality"]  # a random backbone's mask may stay, what it thinks of it does not


def beside(found: np.ndarray) -> tuple[str, list[int]]:
    """A label of an answer, and a voxel beside it that a person wants in it."""
    there = found == 1
    across = ndimage.generate_binary_structure(3, 1) & (np.arange(3) == 1)  # within a slice
    voxels = np.argwhere(ndimage.binary_dilation(there, across) & (found == 0))
    return cases.LABELS[0], voxels[len(voxels) // 2].tolist()
