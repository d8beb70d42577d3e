"""Tables of prompts that clients send and what they mean. Shape (10, 20, 30) unless stated, in voxel indices."""

import json
import math
import tempfile

import nibabel as nib
import numpy as np
import pytest

from infers.prompts import MAX_STROKE_VOXELS, REQUEST_KEYS, read_label_prompts, read_prompts
from infers.request import option_table
from lib.errors import PromptError
from lib.types import Box, Click, Stroke, UserPrompts

LABELS = ("liver", "left kidney", "spleen")
SHAPE = (10, 20, 30)
PICTURE = (40, 30, 1)


def clicks(*points, positive=True):
    return tuple(Click(p, positive) for p in points)


# request, clicks, boxes
IN_3D = [
    # Slicer: both lists always, ints, the name of the segment and the model's options beside them
    (
        {"label": "liver", "foreground": [[1, 2, 3], [4, 5, 6]], "background": [[7, 8, 9]], "axis": "auto"},
        clicks((1, 2, 3), (4, 5, 6)) + clicks((7, 8, 9), positive=False),
        (),
    ),
    # OHIF: no label, no background points yet
    ({"foreground": [[1, 2, 3]], "background": [], "result_compress": False}, clicks((1, 2, 3)), ()),
    # JSON text in place of lists, floats rounded, an absent list
    ({"foreground": "[[1.4, 2.6, 3]]"}, clicks((1, 3, 3)), ()),
    ({"foreground": [[-0.4, 19.4, 29.49]], "background": None, "roi": ""}, clicks((0, 19, 29)), ()),
    # a ROI's ends are voxels inside it
    ({"roi": [1, 3, 5, 8, 10, 12]}, (), (Box((1, 5, 10), (4, 9, 13)),)),
    ({"roi": [3, 1, 8, 5, 12, 10], "foreground": []}, (), (Box((1, 5, 10), (4, 9, 13)),)),
    ({"roi": "[3, 1, 5, 8, 12, 10]"}, (), (Box((1, 5, 10), (4, 9, 13)),)),
    ({"roi": [2, 2, 2, 2, 2, 2]}, (), (Box((2, 2, 2), (3, 3, 3)),)),
    # both, and points of several slices
    (
        {"roi": [0, 9, 0, 19, 0, 29], "foreground": [[1, 1, 1]], "background": [[2, 2, 20]]},
        clicks((1, 1, 1)) + clicks((2, 2, 20), positive=False),
        (Box((0, 0, 0), (10, 20, 30)),),
    ),
]


@pytest.mark.parametrize(("request_", "clicks_", "boxes"), IN_3D)
def test_read_prompts_in_3d_keeps_every_slice(request_, clicks_, boxes):
    prompts, warnings = read_prompts(request_, SHAPE, planar=False)
    assert (prompts.clicks, prompts.boxes, warnings) == (clicks_, boxes, ())


# request, shape, clicks, boxes
IN_2D = [
    # the last positive point chooses the slice, as OHIF does itself
    (
        {"foreground": [[1, 1, 4], [2, 2, 7]], "background": [[3, 3, 7], [4, 4, 4]]},
        SHAPE,
        clicks((2, 2, 7)) + clicks((3, 3, 7), positive=False),
        (),
    ),
    # Slicer's slice is that of the point being edited, where a point lies on it
    ({"foreground": [[1, 1, 0], [2, 2, 7]], "slice": 0}, SHAPE, clicks((1, 1, 0)), ()),
    # and an offset in mm where none does
    ({"foreground": [[1, 1, 4]], "slice": 25}, SHAPE, clicks((1, 1, 4)), ()),
    # box only: the centre of the ROI, whatever the slice in mm
    ({"roi": [3, 1, 8, 5, 14, 10], "slice": 3, "foreground": []}, SHAPE, (), (Box((1, 5, 12), (4, 9, 13)),)),
    ({"roi": [1, 3, 5, 8, 10, 11]}, SHAPE, (), (Box((1, 5, 10), (4, 9, 11)),)),
    # a box and a click: the box counts on the clicked slice
    (
        {"roi": [1, 3, 5, 8, 10, 14], "foreground": [[2, 6, 11]]},
        SHAPE,
        clicks((2, 6, 11)),
        (Box((1, 5, 11), (4, 9, 12)),),
    ),
    # points without a k
    ({"foreground": [[2, 6]], "slice": 11}, SHAPE, clicks((2, 6, 11)), ()),
    (
        {"foreground": [[39, 29]], "background": [[0, 0, 0]]},
        PICTURE,
        clicks((39, 29, 0)) + clicks((0, 0, 0), positive=False),
        (),
    ),
    ({"roi": [1, 3, 5, 8]}, PICTURE, (), (Box((1, 5, 0), (4, 9, 1)),)),
    # a picture has one slice, however Slicer's ROI lies
    ({"roi": [1, 3, 5, 8, -20, -4]}, PICTURE, (), (Box((1, 5, 0), (4, 9, 1)),)),
]


@pytest.mark.parametrize(("request_", "shape", "clicks_", "boxes"), IN_2D)
def test_read_prompts_in_2d_keeps_one_slice(request_, shape, clicks_, boxes):
    prompts, warnings = read_prompts(request_, shape, planar=True)
    assert (prompts.clicks, prompts.boxes, warnings) == (clicks_, boxes, ())


def test_read_prompts_box_across_the_border_is_cut_with_a_warning():
    prompts, warnings = read_prompts({"roi": [-5, 3, 5, 50, 10, 12]}, SHAPE, planar=False)
    assert prompts.boxes == (Box((0, 5, 10), (4, 20, 13)),)
    assert warnings == ("The box reached outside the image and was cut off at its border.",)


def test_read_prompts_box_of_another_slice_is_left_out_with_a_warning():
    prompts, warnings = read_prompts({"roi": [1, 3, 5, 8, 10, 12], "foreground": [[1, 1, 2]]}, SHAPE, planar=True)
    assert (prompts.clicks, prompts.boxes) == (clicks((1, 1, 2)), ())
    assert warnings == ("The box does not reach slice 2 of the last click and was left out.",)


# request, words of the message
WRONG_PROMPTS = [
    ({"foreground": [[10**400, 1, 1]]}, "finite"),
    ({"roi": [10**400, 1, 1, 2, 2, 3]}, "finite"),
    ({"foreground": [[1, 1, 1]], "slice": 10**400}, "slice index"),
    ({}, "at least one positive point"),
    ({"foreground": [], "background": [], "roi": []}, "received neither"),
    ({"background": [[1, 1, 1]]}, "received only 1 negative"),
    ({"foreground": [[1, 1, 1], [10, 2, 3]]}, r"foreground\[1\]: expected a voxel inside the volume of \(10, 20, 30\)"),
    ({"foreground": [[1, 2, 3]], "background": [[-1, 2, 3]]}, r"background\[0\]: .*received \[-1, 2, 3\]"),
    ({"foreground": [[1, 2, math.nan]]}, "finite"),
    ({"foreground": [[1, math.inf, 2]]}, "finite"),
    ({"foreground": [[1, 2]]}, "expected three coordinates"),
    ({"foreground": [[1, 2, 3, 4]]}, r"expected a voxel index \[i, j, k\]"),
    ({"foreground": [1, 2, 3]}, r"expected a voxel index \[i, j, k\], received 1"),
    ({"foreground": [["1", 2, 3]]}, "expected a voxel index"),
    ({"foreground": [[True, 2, 3]]}, "expected a voxel index"),
    ({"foreground": [[None, 2, 3]]}, "expected a voxel index"),
    ({"foreground": "1, 2, 3"}, "foreground: expected a list, received text that is not JSON"),
    ({"foreground": {"i": 1}}, "foreground: expected a list"),
    ({"foreground": 3}, "foreground: expected a list"),
    ({"foreground": [[1, 1, 1]] * 1001}, "at most 1000 points"),
    ({"roi": [1, 2, 3, 4, 5]}, r"roi: expected voxel indices \[i0, i1, j0, j1, k0, k1\]"),
    ({"roi": [1, 2, 3, 4]}, "roi: expected three coordinates"),
    ({"roi": [20, 30, 5, 8, 10, 12]}, "roi: expected a box that meets the volume"),
    ({"roi": [1, 3, 5, 8, 10, math.nan]}, "roi: expected finite"),
    ({"roi": [[1, 3], [5, 8], [10, 12], 1, 1, 1]}, "roi: expected voxel indices"),
    ({"foreground": [[1, 2, 3]], "slice": "seven"}, "slice: expected a slice index"),
]


@pytest.mark.parametrize(("request_", "words"), WRONG_PROMPTS)
def test_read_prompts_wrong_input_says_what_was_expected(request_, words):
    with pytest.raises(PromptError, match=words):
        read_prompts(request_, SHAPE, planar=False)


def drawn(positive=(), negative=(), boxes=(), strokes=()):
    return UserPrompts(clicks(*positive) + clicks(*negative, positive=False), tuple(boxes), tuple(strokes))


A, B, C = (1, 2, 3), (4, 5, 6), (7, 8, 9)
ROI, BOX = [3, 1, 5, 8, 12, 10], Box((1, 5, 10), (4, 9, 13))

# request, prompts by label
BY_LABEL = [
    # nothing drawn: the caller answers by itself
    ({}, {}),
    ({"liver": [], "left kidney": None, "spleen": "", "background": [], "label": "spleen", "axis": "auto"}, {}),
    # Slicer's and OHIF's deepedit
    (
        {"liver": [A, B], "left kidney": [C], "spleen": [], "label": "liver", "background": []},
        {"liver": drawn([A, B]), "left kidney": drawn([C])},
    ),
    ({"spleen": "[[1, 2, 3]]"}, {"spleen": drawn([A])}),
    # background belongs to no label: negative for each, prompted or not
    (
        {"liver": [A], "background": [C]},
        {"liver": drawn([A], [C]), "left kidney": drawn((), [C]), "spleen": drawn((), [C])},
    ),
    # in Slicer these points are those of a segment, which is then the current one
    ({"liver": [A], "background": [], "label": "background"}, {"liver": drawn([A])}),
    # deepgrow
    ({"label": "spleen", "foreground": [A], "background": [C]}, {"spleen": drawn([A], [C])}),
    ({"foreground": [A], "background": [C]}, {"liver": drawn([A], [C])}),
    ({"label": " spleen ", "foreground": [A]}, {"spleen": drawn([A])}),
    ({"label": "spleen", "foreground": [], "background": [C]}, {name: drawn((), [C]) for name in LABELS}),
    # both ways of saying it at once
    (
        {"label": "liver", "liver": [A], "spleen": [B], "foreground": [C]},
        {"liver": drawn([A, C]), "spleen": drawn([B])},
    ),
    # negatives of one label
    ({"liver": [A], "negative": {"liver": [C], "spleen": [B]}}, {"liver": drawn([A], [C]), "spleen": drawn((), [B])}),
    ({"negative": json.dumps({"spleen": [B]})}, {"spleen": drawn((), [B])}),
    ({"negative": "", "boxes": None, "strokes": {}}, {}),
    # boxes
    ({"roi": ROI, "label": "spleen"}, {"spleen": drawn(boxes=[BOX])}),
    ({"roi": ROI}, {"liver": drawn(boxes=[BOX])}),
    ({"boxes": {"left kidney": ROI, "spleen": []}}, {"left kidney": drawn(boxes=[BOX])}),
    (
        {"roi": ROI, "boxes": {"spleen": [0, 0, 0, 0, 0, 0]}},
        {"liver": drawn(boxes=[BOX]), "spleen": drawn(boxes=[Box((0, 0, 0), (1, 1, 1))])},
    ),
    # strokes; those of the background are negative for every label
    (
        {"strokes": {"liver": [[A, B], [C]], "spleen": [[]]}},
        {"liver": drawn(strokes=[Stroke(np.array([A, B])), Stroke(np.array([C]))])},
    ),
    (
        {"strokes": {"spleen": [[A]], "background": [[B, C]]}, "liver": [A]},
        {
            "liver": drawn([A], strokes=[Stroke(np.array([B, C]), False)]),
            "left kidney": drawn(strokes=[Stroke(np.array([B, C]), False)]),
            "spleen": drawn(strokes=[Stroke(np.array([A])), Stroke(np.array([B, C]), False)]),
        },
    ),
    # what was selected counts where no label is given
    ({"selected_label_name": "spleen", "foreground": [A]}, {"spleen": drawn([A])}),
]


@pytest.mark.parametrize(("request_", "expected"), BY_LABEL)
def test_read_label_prompts_table(request_, expected):
    assert read_label_prompts(request_, SHAPE, LABELS) == (expected, ())


@pytest.mark.parametrize("labels", [("background", *LABELS), (*LABELS, "background")])
def test_read_label_prompts_background_never_is_a_label(labels):
    prompts, _ = read_label_prompts({"foreground": [A], "label": ""}, SHAPE, labels)
    assert prompts == {"liver": drawn([A])}
    assert list(read_label_prompts({"background": [C]}, SHAPE, labels)[0]) == list(LABELS)


def test_read_label_prompts_selected_background_means_the_only_label():
    assert read_label_prompts({"roi": ROI, "label": "background"}, SHAPE, ["liver"])[0] == {"liver": drawn(boxes=[BOX])}


def test_read_label_prompts_a_label_called_like_a_key_is_reached_by_the_other_ways():
    labels = ("label", "window", "foreground")
    assert read_label_prompts({"label": "label", "window": "auto", "foreground": [A]}, SHAPE, labels)[0] == {
        "label": drawn([A])
    }
    request = {"window": [0, 80], "negative": {"window": [A]}, "label": "foreground", "foreground": [B]}
    assert read_label_prompts(request, SHAPE, labels)[0] == {"window": drawn((), [A]), "foreground": drawn([B])}


def test_request_keys_hold_every_option():
    assert set(option_table(planar=False)) <= REQUEST_KEYS


def test_read_label_prompts_on_a_picture_need_no_k():
    request = {
        "liver": [[39, 29]],
        "background": [[0, 0]],
        "boxes": {"spleen": [1, 3, 5, 8]},
        "strokes": {"liver": [[[1, 2]]]},
    }
    assert read_label_prompts(request, PICTURE, ["liver", "spleen"])[0] == {
        "liver": drawn([(39, 29, 0)], [(0, 0, 0)], strokes=[Stroke(np.array([[1, 2, 0]]))]),
        "spleen": drawn((), [(0, 0, 0)], [Box((1, 5, 0), (4, 9, 1))]),
    }


def test_read_label_prompts_warns_once_of_cut_boxes_and_of_points_of_unknown_labels():
    request = {"boxes": {"liver": [-5, 3, 5, 8, 10, 12], "spleen": [5, 50, 5, 8, 10, 12]}, "livr": [A], "nothing": [1]}
    prompts, warnings = read_label_prompts(request, SHAPE, LABELS)
    assert prompts["liver"].boxes == (Box((0, 5, 10), (4, 9, 13)),)
    assert warnings == (
        "The points of 'livr' were left out: the model has no such label. Did you mean 'liver'?",
        "The box reached outside the image and was cut off at its border.",
    )


# request, words of the message
WRONG_BY_LABEL = [
    ({"label": "livr"}, r"label: expected one of the labels \['liver', .*received 'livr'. Did you mean 'liver'"),
    ({"label": 3}, "label: expected one of the labels"),
    ({"label": "/etc/passwd"}, "label: expected one of the labels"),
    ({"selected_label_name": "lung"}, "selected_label_name: expected one of the labels"),
    ({"negative": {"splen": [A]}}, "negative: expected one of the labels .*Did you mean 'spleen'"),
    ({"negative": {"background": [A]}}, "negative: expected one of the labels"),
    ({"boxes": {"lung": ROI}}, "boxes: expected one of the labels"),
    ({"strokes": {"lung": [[A]]}}, r"strokes: expected one of the labels \[.*'background'\]"),
    ({"negative": [A]}, "negative: expected a mapping of labels, received"),
    ({"boxes": "{"}, "boxes: expected a mapping of labels, received text that is not JSON"),
    ({"strokes": 3}, "strokes: expected a mapping of labels"),
    ({"label": "background", "foreground": [A]}, "foreground: expected a label that it belongs to"),
    ({"label": "background", "roi": ROI}, "roi: expected a label that it belongs to"),
    ({"liver": [[10, 2, 3]]}, r"liver\[0\]: expected a voxel inside the volume of \(10, 20, 30\)"),
    ({"left kidney": [A, [1, 2, math.nan]]}, r"left kidney\[1\]: expected finite"),
    ({"liver": [[1, 2]]}, r"liver\[0\]: expected three coordinates"),
    ({"liver": "abc"}, "liver: expected a list, received text that is not JSON"),
    ({"liver": [A] * 1001}, "liver: expected at most 1000 points"),
    ({"background": [[1, 2, 3, 4]]}, r"background\[0\]: expected a voxel index"),
    ({"negative": {"liver": [[-1, 2, 3]]}}, r"negative\[liver\]\[0\]: expected a voxel inside"),
    ({"boxes": {"liver": [1, 2, 3]}}, r"boxes\[liver\]: expected voxel indices"),
    ({"boxes": {"liver": [20, 30, 5, 8, 10, 12]}}, r"boxes\[liver\]: expected a box that meets the volume"),
    ({"strokes": {"liver": [A]}}, r"strokes\[liver\]\[0\]\[0\]: expected a voxel index \[i, j, k\], received 1"),
    ({"strokes": {"liver": [[A, [1, 2, 30]]]}}, r"strokes\[liver\]\[0\]\[1\]: expected a voxel inside"),
    ({"strokes": {"liver": [[A]] * 101}}, r"strokes\[liver\]: expected at most 100 strokes, received 101"),
    ({"strokes": {"liver": [[A] * (MAX_STROKE_VOXELS + 1)]}}, r"strokes\[liver\]\[0\]: expected at most 10000 points"),
]


@pytest.mark.parametrize(("request_", "words"), WRONG_BY_LABEL)
def test_read_label_prompts_wrong_input_says_what_was_expected(request_, words):
    with pytest.raises(PromptError, match=words):
        read_label_prompts(request_, SHAPE, LABELS)


@pytest.fixture
def uploaded():
    """A label map where upstream puts an upload: a foreground layer 5, a background layer 4, and a segment 1."""
    array = np.zeros(SHAPE, np.uint8)
    array[0, 0], array[1, 1, 2:4], array[2, 2, 5] = 1, 5, 4
    with tempfile.NamedTemporaryFile(suffix=".nii.gz") as file:
        nib.save(nib.Nifti1Image(array, np.eye(4)), file.name)
        yield file.name


FOREGROUND, OUTSIDE = Stroke(np.array([[1, 1, 2], [1, 1, 3]])), Stroke(np.array([[2, 2, 5]]), False)
LAYERS = [{"name": "background_scribbles", "id": 4}, {"name": "foreground_scribbles", "id": 5}]

# request beside the file, prompts by label
SCRIBBLES = [
    # Slicer: all segments, the selected one beside
    (
        {"label_info": [{"name": "liver", "id": 1}, *LAYERS], "selected_label_name": "spleen", "roi": []},
        {"spleen": drawn(strokes=[OUTSIDE, FOREGROUND])},
    ),
    # OHIF: no selected label, more fields
    (
        {"label_info": [{**layer, "color": [1, 0, 0]} for layer in LAYERS]},
        {"liver": drawn(strokes=[OUTSIDE, FOREGROUND])},
    ),
    # upstream's values without names: those behind the three labels
    ({"selected_label_name": "left kidney"}, {"left kidney": drawn(strokes=[OUTSIDE, FOREGROUND])}),
    # beside clicks
    (
        {"spleen": [A], "roi": ROI, "label_info": json.dumps(LAYERS)},
        {"liver": drawn(boxes=[BOX], strokes=[OUTSIDE, FOREGROUND]), "spleen": drawn([A])},
    ),
    # a client that paints labels
    (
        {"label_info": [{"name": "spleen", "id": 5}, {"name": "background", "id": 4}, {"name": "else", "id": 1}]},
        {
            "liver": drawn(strokes=[OUTSIDE]),
            "left kidney": drawn(strokes=[OUTSIDE]),
            "spleen": drawn(strokes=[OUTSIDE, FOREGROUND]),
        },
    ),
    ({"label_info": [{"name": "foreground_scribbles", "id": 9}]}, {}),
]


@pytest.mark.parametrize(("request_", "expected"), SCRIBBLES)
def test_read_label_prompts_of_an_uploaded_label_map(uploaded, request_, expected):
    assert read_label_prompts({**request_, "label": uploaded}, SHAPE, LABELS) == (expected, ())


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"label_info": {"name": "liver"}}, "label_info: expected a list"),
        ({"label_info": ["liver"]}, r"label_info\[0\]: expected a name and a whole id above 0, received 'liver'"),
        ({"label_info": [*LAYERS, {"name": "liver", "id": 0}]}, r"label_info\[2\]: expected a name and a whole id"),
        ({"label_info": [{"name": "liver", "id": True}]}, "whole id above 0"),
        ({"selected_label_name": "lung"}, "selected_label_name: expected one of the labels"),
        ({"selected_label_name": "background"}, "selected_label_name: expected a label that it belongs to"),
    ],
)
def test_read_label_prompts_of_a_label_map_wrong_input_says_what_was_expected(uploaded, request_, words):
    with pytest.raises(PromptError, match=words):
        read_label_prompts({**request_, "label": uploaded}, SHAPE, LABELS)
