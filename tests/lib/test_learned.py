"""What every learned model does alike: presets, optimiser groups, the combination rule."""

from __future__ import annotations

import pytest
import torch

from lib.config import MethodRow, TrainRecipe, method_row
from lib.contracts import Features, Hooks, PromptSet, Proposal
from lib.errors import ConfigError
from lib.learned import Learned, combine, rows
from lib.loading import load_backbone


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def learned(preset: str = "frozen", classes: int = 2, name: str = "tiny", **options) -> Learned:
    torch.manual_seed(0)
    row = MethodRow("sam2rad", "sam2rad", options, TrainRecipe())
    return Learned(row, load_backbone(name, random_seed=0), classes, preset).eval()


def encoded(model: Learned, count: int = 1) -> Features:
    side = model.spec.input_size
    x = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.backbone.encode(x, model.method.taps)


@pytest.mark.parametrize(
    "preset, row, message",
    [
        ("half", method_row("sam2rad"), r"preset: expected one of \['frozen', 'adapters', 'full'\], received 'half'"),
        ("frozen", MethodRow("x", "nowhere", {}, TrainRecipe()), "received 'nowhere'"),
        ("frozen", MethodRow("x", "sam2rad", {"token": 3}, TrainRecipe()), "Did you mean 'tokens'"),
        ("frozen", MethodRow("x", "sam2rad", {"form": "wide"}, TrainRecipe()), "received 'wide'"),
    ],
)
def test_what_cannot_be_built_is_refused(preset, row, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Learned(row, load_backbone("tiny", random_seed=0), 2, preset)


@pytest.mark.parametrize("preset", ["frozen", "adapters", "full"])
def test_groups_hold_every_trained_tensor_once(preset) -> None:
    model = learned(preset)
    groups = model.groups(0.5, 0.25, 0.1)
    held = [id(p) for g in groups for p in g["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}
    names = {id(p): n for n, p in model.named_parameters()}
    for group in groups:
        kinds = {names[id(p)].split(".")[0] for p in group["params"]}
        assert kinds == ({"method"} if group["lr"] == 0.5 else {"backbone"})
        plain = {p.ndim <= 1 or names[id(p)] == "method.queries" for p in group["params"]}
        assert plain == {group["weight_decay"] == 0}
    assert {g["lr"] for g in groups} == ({0.5} if preset == "frozen" else {0.5, 0.25})
    assert "method.queries" in {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}


def test_answer_reads_the_methods_token() -> None:
    model = learned()
    features, index = encoded(model), torch.zeros(2, dtype=torch.long)
    click = PromptSet(points_xy=torch.full((2, 1, 2), 20.0), labels=torch.ones(2, 1, dtype=torch.long))
    for token in (0, 2):
        model.method.mask_token = token
        with torch.no_grad():
            out, answer = model.decode(features, model.propose(features), click, index)
        assert torch.equal(answer.masks, out.masks[:, token]) and torch.equal(answer.iou, out.iou[:, token])
        assert torch.equal(answer.obj, out.obj[:, 0])


def test_rows_cut_every_part() -> None:
    count = torch.arange(4.0)
    prompts = PromptSet(boxes_xy=count[:, None].expand(4, 4), masks=count.view(4, 1, 1, 1), tokens=count.view(4, 1, 1))
    head = torch.nn.Identity()
    hooks = Hooks(token_shift=count.view(4, 1, 1), obj_head=head)
    cut = rows(Proposal(prompts, hooks, boxes=count[:, None], masks=count.view(4, 1, 1, 1)), torch.tensor([3, 1]))
    found = [
        cut.prompts.boxes_xy[:, 0],
        cut.prompts.masks,
        cut.prompts.tokens,
        cut.hooks.token_shift,
        cut.boxes,
        cut.masks,
    ]
    assert [t.flatten().tolist() for t in found] == [[3.0, 1.0]] * 6
    assert cut.hooks.obj_head is head
    assert cut.hooks.extra_tokens is None and cut.prompts.points_xy is None
    bare = rows(Proposal(PromptSet(tokens=count.view(4, 1, 1))), torch.tensor([0]))
    assert bare.boxes is None and bare.masks is None and bare.prompts.pairs == 1


@pytest.mark.parametrize(
    "logits, obj, label",
    [
        ([-1.0, -2.0], [5.0, 5.0], 0),  # nothing above 0
        ([0.0, 0.0], [5.0, 5.0], 0),  # 0 is not above 0
        ([1.0, -2.0], [5.0, 5.0], 1),
        ([1.0, 2.0], [5.0, 5.0], 2),  # the best one
        ([2.0, 1.0], [5.0, 5.0], 1),
        ([1.0, 2.0], [5.0, -0.1], 1),  # the best one is absent
        ([-1.0, 2.0], [5.0, -0.1], 0),
        ([1.0, 2.0], [-1.0, -1.0], 0),  # all absent
        ([1.0, 2.0], [5.0, 0.0], 2),  # objectness 0 is present
        ([1.0, 1.0], [5.0, 5.0], 1),  # a tie goes to the first
    ],
)
def test_combine_rule(logits, obj, label) -> None:
    found = combine(torch.tensor(logits).view(1, 2, 1, 1), torch.tensor([obj]))
    assert found.dtype == torch.uint8 and found.tolist() == [[[label]]]


def test_combine_works_per_image_and_pixel() -> None:
    masks = torch.tensor([[[[3.0, -1.0]], [[1.0, 2.0]]], [[[3.0, -1.0]], [[1.0, 2.0]]]])  # (B, K, H, W) = (2, 2, 1, 2)
    kept = masks.clone()
    assert combine(masks, torch.tensor([[1.0, 1.0], [-1.0, 1.0]])).tolist() == [[[1, 2]], [[2, 2]]]
    assert torch.equal(masks, kept)


def test_combine_reaches_label_255() -> None:
    masks = torch.full((1, 255, 1, 1), -1.0)
    masks[0, 254] = 1.0
    assert combine(masks, torch.ones(1, 255)).item() == 255
