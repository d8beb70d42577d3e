"""Tables of what clients send and what it means. Shape (10, 20, 30) unless stated; frames are voxel indices."""

import math

import pytest

from infers.request import option_table, read_options, read_prompts, read_reply
from lib.errors import PromptError
from lib.types import Box, Click

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


# request, axis, propagate, window
OPTIONS = [
    ({}, None, True, None),
    ({"axis": "auto", "propagate": True, "window": "auto"}, None, True, None),
    ({"axis": ["k", "i"], "propagate": [False], "window": ""}, "k", False, None),
    ({"axis": " J ", "propagate": "False", "window": "-100, 240"}, "j", False, (-100.0, 240.0)),
    ({"axis": "", "propagate": "", "window": None}, None, True, None),
    ({"propagate": 0, "window": [0, 80.5]}, None, False, (0.0, 80.5)),
    ({"propagate": "yes", "window": "[1 2]"}, None, True, (1.0, 2.0)),
    ({"window": "Lung"}, None, True, (-1350.0, 150.0)),
]


@pytest.mark.parametrize(("request_", "axis", "propagate", "window"), OPTIONS)
def test_read_options_table(request_, axis, propagate, window):
    options = read_options(request_, planar=False)
    assert (options.axis, options.propagate, options.window, options.planar) == (axis, propagate, window, False)


def test_read_options_planar_is_one_k_slice():
    options = read_options({"axis": "i", "propagate": True}, planar=True)
    assert (options.axis, options.propagate, options.planar) == ("k", False, True)


WRONG_OPTIONS = [
    ({"window": [0, 10**400]}, "window"),
    ({"axis": "x"}, r"axis: expected one of \['auto', 'i', 'j', 'k'\], received 'x'"),
    ({"axis": 2}, "axis: expected one of"),
    ({"propagate": "maybe"}, "propagate: expected true or false, received 'maybe'"),
    ({"propagate": 2}, "propagate: expected true or false"),
    ({"window": "wide"}, "window: expected auto, one of"),
    ({"window": [1]}, "window: expected"),
    ({"window": [1, 2, 3]}, "window: expected"),
    ({"window": 5}, "window: expected"),
]


@pytest.mark.parametrize(("request_", "words"), WRONG_OPTIONS)
def test_read_options_wrong_value_is_named(request_, words):
    with pytest.raises(PromptError, match=words):
        read_options(request_, planar=False)


def test_option_table_first_items_read_back_as_defaults():
    """Slicer sends the first item of every list in the table."""
    for planar in (False, True):
        sent = {k: v[0] if isinstance(v, list) else v for k, v in option_table(planar).items()}
        assert read_options(sent, planar) == read_options({}, planar)


# request, label, extension, dtype, compress, write_file
REPLIES = [
    ({}, "object", ".nrrd", "uint8", True, True),
    (
        {"label": " left kidney ", "result_extension": ".NII.GZ", "result_dtype": "uint16", "result_compress": "false"},
        "left kidney",
        ".nii.gz",
        "uint16",
        False,
        True,
    ),
    (
        {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False},
        "object",
        ".nrrd",
        "uint8",
        False,
        True,
    ),
    ({"result_write_to_file": False, "result_dtype": None}, "object", ".nrrd", "uint8", True, False),
]


@pytest.mark.parametrize(("request_", "label", "extension", "dtype", "compress", "write_file"), REPLIES)
def test_read_reply_table(request_, label, extension, dtype, compress, write_file):
    reply = read_reply(request_, "object")
    assert (reply.label, reply.extension, reply.dtype) == (label, extension, dtype)
    assert (reply.compress, reply.write_file) == (compress, write_file)


WRONG_REPLIES = [
    ({"label": ""}, "label: expected the name of the segment"),
    ({"label": 3}, "label: expected the name of the segment"),
    ({"result_extension": ".dcm"}, r"result_extension: expected one of .*received '.dcm'"),
    ({"result_extension": ".seg.nrrd"}, "result_extension: expected one of"),
    ({"result_extension": "nrrd"}, "Did you mean '.nrrd'"),
    ({"result_dtype": "float64"}, "result_dtype: expected one of"),
    ({"result_dtype": "object"}, "result_dtype: expected one of"),
    ({"result_compress": "perhaps"}, "result_compress: expected true or false"),
]


@pytest.mark.parametrize(("request_", "words"), WRONG_REPLIES)
def test_read_reply_wrong_value_is_named(request_, words):
    with pytest.raises(PromptError, match=words):
        read_reply(request_, "object")
