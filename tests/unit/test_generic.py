"""Modules that no family knows: what torch-pruning's graph finds, cut as every family cuts."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import Bottleneck
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.func import functional_call

from blocks import check_sliced_equals_masked, shaken
from stepwell.config.path_options import GridOptions
from stepwell.data.spec import InputSpec
from stepwell.errors import ModelError, UnsupportedModelError
from stepwell.measure.size import num_params
from stepwell.models import card
from stepwell.models.card import Architecture, Card, load, save_model
from stepwell.models.export import export_onnx
from stepwell.pruning import generic
from stepwell.pruning.generic import propose
from stepwell.pruning.prove import proven
from stepwell.pruning.ranking import uniform_scores
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.pruning.units import Candidate, Group, tensors_of
from stepwell.setting.prepare import proven_groups
from stepwell.stages.grid import make_grid

pytest.importorskip("torch_pruning")

SPEC = InputSpec((16, 16), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGES = card.example_images(SPEC, 3)


def conv(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layers = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    return nn.Sequential(*layers, nn.ReLU(inplace=True))


class Plain(nn.Module):
    """Convolutions, one with a bias and a PReLU for each channel, a flattened map, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = conv(3, 8, stride=2)
        self.second = nn.Conv2d(8, 12, 3, 2, 1)
        self.act = nn.PReLU(12)
        self.hidden = nn.Linear(12 * 16, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.second(self.first(x)))
        return self.head(F.relu(self.hidden(x.flatten(1))))


class Added(nn.Module):
    """Down and up again, with an addition on the way, and a branch that is added to its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.down = conv(8, 12, stride=2)
        self.branch = conv(12, 12)
        self.up = nn.ConvTranspose2d(12, 8, 2, 2)
        self.norm = nn.GroupNorm(4, 8)
        self.late = conv(8, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        down = self.down(stem)
        down = down + self.branch(down)
        return self.head(self.late(self.norm(stem + self.up(down))).mean((2, 3)))


class Joined(nn.Module):
    """Two branches behind each other in one map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.left, self.right = conv(8, 6), conv(8, 10)
        self.after = conv(16, 12, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.after(torch.cat([self.left(x), self.right(x)], dim=1)).mean((2, 3)))


class Grouped(nn.Module):
    """A convolution in four groups, a depthwise one, and one that makes two channels of each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.grouped = conv(8, 16, groups=4)
        self.point = conv(16, 10)
        self.depthwise = conv(10, 10, groups=10)
        self.doubling = conv(10, 20, groups=10)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.grouped(self.stem(x)))
        return self.head(self.doubling(self.depthwise(x)).mean((2, 3)))


class Excited(nn.Module):
    """Channels that are multiplied by factors of their own, and read by two kinds of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)
        self.last = conv(8, 12, stride=2)
        self.norm = nn.InstanceNorm2d(12, affine=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        factors = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return self.head(self.norm(self.last(x * factors[..., None, None])).square().mean((2, 3)))


class Hybrid(nn.Module):
    """A stem of convolutions before a transformer block of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, stride=2), conv(8, 12, stride=2), nn.Conv2d(12, 24, 1))
        self.place = nn.Parameter(0.1 * torch.randn(1, 16, 24))
        self.block = Block(24, 4, mlp_ratio=2)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.block(x).mean(1))


# Of each model the groups, with the number of their units.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "plain": (Plain, {"first.0": 8, "second": 12, "hidden": 10}),
    # The GroupNorm keeps stem and up, 8 channels, in 4 units.
    "added": (Added, {"stem.0": 4, "down.0": 12, "late.0": 6}),
    "joined": (Joined, {"stem.0": 8, "after.0": 12}),
    "grouped": (Grouped, {"stem.0": 4, "point.0": 10}),
    "excited": (Excited, {"stem.0": 8, "squeeze": 4, "last.0": 12}),
    "hybrid": (Hybrid, {"block.attn": 4, "block.mlp": 48, "stem.0.0": 8, "stem.1.0": 12}),
}


def found(model: nn.Module) -> list[Group]:
    return propose(model, IMAGES.to(next(model.parameters()).dtype)).groups


def cut(model: nn.Module, widths: dict[str, int]) -> nn.Module:
    groups = [group for group in found(model) if group.name in widths]
    skeleton = build_skeleton(model, groups, widths)
    return fill(skeleton, leading_units(tensors_of(model), skeleton, groups, widths)).eval()


def small(groups: list[Group], ratio: float = 0.3) -> dict[str, int]:
    return dict(make_grid(groups, uniform_scores(groups), [ratio], GridOptions(round_to=1))[0].widths)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_found_is_cut_as_it_is_masked(name):
    build, units = MODELS[name]
    model = shaken(build)
    groups = found(model)
    assert {group.name: group.num_units for group in groups} == units
    assert proven(model, groups, IMAGES.double()) == groups
    check_sliced_equals_masked(model, IMAGES.double(), [0.1, 0.6], groups=groups)


@pytest.mark.parametrize("name", MODELS)
def test_a_student_of_it_can_be_cut_again(name):
    model = shaken(MODELS[name][0])
    widths = {group.name: max(1, group.num_units // 2) for group in found(model)}
    student = cut(model, widths)
    again = found(student)
    # What is left with one unit can be cut no further.
    assert {g.name: g.num_units for g in again} == {name: w for name, w in widths.items() if w > 1}
    check_sliced_equals_masked(student, IMAGES.double(), [0.5], groups=again)


@pytest.mark.parametrize("name", MODELS)
def test_a_student_is_loaded_without_images(name, tmp_path):
    build = MODELS[name][0]
    teacher = shaken(build).float()
    groups = found(teacher)
    widths = small(groups)
    if name == "hybrid":
        widths |= {"block.attn": 0, "block.mlp": 0}
    student = cut(teacher, widths)
    assert num_params(student) < num_params(teacher) / 2
    card = Card(
        architecture=Architecture(source="factory", name=name),
        widths=widths,
        classes=[*"abcde"],
        input=SPEC,
    )
    save_model(tmp_path, student, card)
    torch.manual_seed(7)  # the factory's own weights are not the teacher's
    loaded = load(tmp_path, factory=build)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), student(IMAGES))
    if name == "hybrid":  # narrow layers are plain ones; an emptied block of a transformer is not
        assert export_onnx(loaded, SPEC, tmp_path / "model.onnx", IMAGES) <= 1e-5


def test_the_store_of_a_ladder_holds_generic_groups():
    model = shaken(Added)
    groups = found(model)
    ladder = [Candidate(r, small(groups, r)) for r in (0.3, 0.6, 1.0)]
    shared = SharedWeights(model, groups, tensors_of(model), ladder)
    for index in range(3):
        with torch.no_grad():
            sliced = functional_call(shared.skeletons[index], shared.weights(index), (IMAGES.double(),))
            torch.testing.assert_close(shared.extract(index).eval()(IMAGES.double()), sliced, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(sliced, model(IMAGES.double()))


def test_units_of_a_linear_layer_are_neurons():
    kinds = {group.name: group.kind for group in propose(Excited().eval(), IMAGES).generic}
    assert kinds == {"stem.0": "filter", "squeeze": "neuron", "last.0": "filter"}


def test_the_same_groups_are_found_whatever_the_weights_and_images():
    torch.manual_seed(1)
    first, second = Added().eval(), Added().eval()
    assert propose(first, IMAGES).generic == propose(second, torch.zeros_like(IMAGES[:1])).generic
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in first.modules())


def test_why_layers_stay_whole_is_said(capsys):
    model = Joined().eval()
    proposal = propose(model, IMAGES)
    reason = "after.0 takes its channels together with others"
    assert proposal.whole == {"left.0": reason, "right.0": reason}
    proven_groups(model, SPEC, IMAGES)
    assert f"stays whole: left.0 ({reason})" in capsys.readouterr().err


class Normed(nn.Module):
    """A norm of all channels, a gain outside of layers, two uses of one layer, and two orders."""

    def __init__(self) -> None:
        super().__init__()
        self.normed, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(1, 8)
        self.scaled, self.gain = nn.Conv2d(8, 6, 3, padding=1), nn.Parameter(torch.ones(1, 6, 1, 1) + 1)
        self.around = nn.Conv2d(6, 4, 1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.normed(x))
        x = self.around(self.scaled(x) * self.gain)
        x = self.last(self.twice(self.twice(x).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


def test_what_cannot_be_cut_safely_stays_whole():
    model = shaken(Normed)
    proposal = propose(model, IMAGES.double())
    assert [group.name for group in proposal.groups] == ["last"]
    assert proposal.whole == {
        "normed": "norm (GroupNorm) is nothing that could be cut with it",
        "scaled": "a parameter outside of layers goes with its channels",
        "around": "a layer that reads its channels runs more than once",
    }


class Mixing(nn.Module):
    """Mixes its channels without a layer: it looks element-wise to the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 8), conv(8, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).softmax(dim=1)).mean((2, 3)))


def test_what_the_graph_gets_wrong_is_not_cut(capsys):
    groups = proven_groups(Mixing().eval(), SPEC, IMAGES)
    assert [group.name for group in groups] == ["second.0"]
    assert "stays whole: first.0 (cutting it is not the same" in capsys.readouterr().err


def test_known_blocks_keep_the_shape_of_their_outputs():
    """The residual stream of a block that a family knows is not the graph's to cut."""
    model = shaken(Hybrid)
    touched = {slice_.tensor for group in propose(model, IMAGES.double()).generic for slice_ in group.slices}
    assert "stem.2.weight" in touched  # its inputs
    assert "stem.2.bias" not in touched
    assert not any(name.startswith(("block", "head", "place")) for name in touched)


class Residual(nn.Module):
    """A block of timm's ResNet between convolutions: without a norm over channels, all of it could be cut."""

    def __init__(self) -> None:
        super().__init__()
        shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.stem, self.block, self.last = conv(3, 8), Bottleneck(8, 4, downsample=shortcut), conv(16, 12)
        self.block.act2 = nn.PReLU(4)  # the family leaves the last convolution of the block alone
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.block(self.stem(x))).mean((2, 3)))


def test_what_runs_through_known_blocks_is_not_proposed():
    proposal = propose(shaken(Residual), IMAGES.double())
    assert [group.name for group in proposal.known] == ["block.conv1"]
    assert [group.name for group in proposal.generic] == ["last.0"]


class Split(nn.Module):
    """One half of the channels multiplies the other; one convolution and one linear layer read the same."""

    def __init__(self) -> None:
        super().__init__()
        self.halves, self.both = conv(3, 8), nn.Conv2d(4, 6, 1)
        self.map, self.tokens = nn.Conv2d(6, 5, 1), nn.Linear(6, 5)
        self.inner, self.head = nn.Linear(5, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.halves(x).chunk(2, dim=1)
        x = self.both(left * right)
        x = self.map(x).mean((2, 3)) + self.tokens(x.flatten(2).transpose(1, 2)).mean(1)
        return self.head(self.inner(x).relu())


def test_what_does_not_lie_alike_in_all_tensors_stays_whole():
    proposal = propose(shaken(Split), IMAGES.double())
    assert proposal.whole == {
        "halves.0": "its channels are in another order in both",
        "both": "its channels are read from maps and from tokens",
    }
    assert [group.name for group in proposal.groups] == ["map", "inner"]


class Tied(nn.Module):
    """Two layers share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.again = conv(3, 4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.again.weight = self.shared.weight
        self.last, self.head = nn.Conv2d(4, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.again(self.shared(self.first(x)))).relu().mean((2, 3)))


def test_layers_that_share_a_weight_stay_whole():
    proposal = propose(shaken(Tied), IMAGES.double())
    assert [group.name for group in proposal.groups] == ["last"]
    assert proposal.whole == dict.fromkeys(
        ("first.0", "shared", "again"), "its weight is shared with another layer, or computed"
    )


class Ungraspable(nn.Module):
    """Its forward pass leaves no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = conv(3, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.head(self.first(x).mean((2, 3)))


def test_a_module_without_a_graph_is_not_supported():
    with pytest.raises(UnsupportedModelError, match="nor does torch-pruning find channels to cut"):
        propose(Ungraspable().eval(), IMAGES)


def test_without_the_extra_the_way_out_is_named(monkeypatch, tmp_path, capsys):
    student = cut(Plain().eval(), {"first.0": 4})
    architecture = Architecture(source="factory", name="f")
    save_model(
        tmp_path,
        student,
        Card(architecture=architecture, widths={"first.0": 4}, classes=[*"abcde"], input=SPEC),
    )
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    monkeypatch.setattr(generic, "find_spec", lambda _: None)
    with pytest.raises(
        UnsupportedModelError, match=r"Plain is not supported.*pip install 'stepwell\[generic\]'"
    ):
        proven_groups(Plain().eval(), SPEC, IMAGES)
    with pytest.raises(ModelError, match=r"pip install 'stepwell\[generic\]'"):
        load(tmp_path, factory=Plain)
    # What the families know needs no extra.
    assert [g.name for g in proven_groups(Hybrid().eval(), SPEC, IMAGES)] == ["block.attn", "block.mlp"]
    assert "stays whole: every other layer (to cut" in capsys.readouterr().err
    torch.manual_seed(0)
    known = Card(architecture=architecture, widths={"block.mlp": 8}, classes=[*"abcde"], input=SPEC)
    hybrid = Hybrid().eval()
    groups = [g for g in propose(hybrid, IMAGES).groups if g.name == "block.mlp"]
    skeleton = build_skeleton(hybrid, groups, {"block.mlp": 8})
    save_model(
        tmp_path, fill(skeleton, leading_units(tensors_of(hybrid), skeleton, groups, {"block.mlp": 8})), known
    )
    assert num_params(load(tmp_path, factory=Hybrid)) < num_params(hybrid)


class WithConstants(Plain):
    """Keeps a tensor that is no buffer, and makes another in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.full((1, 3, 1, 1), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - self.mean) + torch.arange(5)


def test_constants_of_a_forward_pass_are_no_reason_to_leave_all_whole():
    names = [group.name for group in propose(Plain().eval(), IMAGES).groups]
    assert names
    assert [group.name for group in propose(WithConstants().eval(), IMAGES).groups] == names


class Dropping(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x))


def test_randomness_in_eval_mode_is_named():
    with pytest.raises(UnsupportedModelError, match="answers the same images differently each"):
        proven_groups(Dropping().eval(), SPEC, IMAGES)
