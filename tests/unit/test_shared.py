"""The shared store: training together is training each candidate, and what was trained is handed out.

All in float64, so that a difference is a mistake and not rounding.
"""

import copy
import itertools
import json

import pytest
import torch
from timm.layers.mlp import Mlp
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from stepwell.config.commands import CompressConfig
from stepwell.config.options import LossOptions
from stepwell.config.path_options import JointOptions
from stepwell.errors import ModelError, UnsupportedModelError
from stepwell.losses.observe import Observed
from stepwell.losses.output import Output
from stepwell.measure.cost import candidates_per_step
from stepwell.models.card import Architecture, Card, load, save_model
from stepwell.pruning.constant import ConstantOutput
from stepwell.pruning.families import find_groups
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units, sort_units
from stepwell.pruning.units import Candidate
from stepwell.stages.joint import JointStep, candidates_of_step
from stepwell.training.loop import Course, fit
from tiny import (
    ARGS,
    NUM_CLASSES,
    SPEC,
    VARIANTS,
    FixedTrain,
    amd_loss,
    gates,
    group_of,
    group_sizes,
    keep_leading,
    lesson,
    output,
    random_batches,
    random_images,
    tiny_vit,
    units_first,
)

HEAD_DIM = 6  # 24 channels, 4 heads
LAYERS = (0, 2)
BLOCKS = tuple(f"blocks.{i}" for i in LAYERS)

# Heads and neurons per block (of 4 and 48): an empty attention, an empty FFN, a block with neither.
LADDER = [
    ((0, 4), (1, 0), (0, 0)),
    ((0, 8), (2, 0), (1, 3)),
    ((1, 8), (2, 16), (3, 24)),
    ((3, 40), (4, 48), (3, 24)),
]


def candidates() -> list[Candidate]:
    return [
        Candidate(
            (i + 1) / (len(LADDER) + 1),
            {
                f"blocks.{block}.{kind}": width
                for block, widths in enumerate(rung)
                for kind, width in zip(("attn", "mlp"), widths, strict=True)
            },
        )
        for i, rung in enumerate(LADDER)
    ]


def random_order(model, seed: int = 0) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randperm(n, generator=generator).tolist() for name, n in group_sizes(model).items()}


def sorted_copy(model, order):
    """The model with its units in another order, put there head by head and neuron by neuron."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            before = units_first(name, model.get_parameter(name), HEAD_DIM)
            if before is None:
                continue
            after = torch.stack([before[unit] for unit in order[group_of(name)]])
            match name.split(".")[2:]:
                case ["attn", "qkv", "weight"]:
                    after = after.permute(1, 0, 2, 3)
                case ["attn", "qkv", "bias"]:
                    after = after.permute(1, 0, 2)
                case ["attn", "proj", "weight"]:
                    after = after.permute(1, 0, 2)
                case ["mlp", "fc2", "weight"]:
                    after = after.T
            parameter.copy_(after.reshape(parameter.shape))
    return result


def make_shared(model) -> SharedWeights:
    return SharedWeights(model, find_groups(model), dict(model.named_parameters()), candidates())


def joint_step(teacher, shared, options: JointOptions, loss: LossOptions | None = None) -> JointStep:
    taught = lesson(Observed(teacher, BLOCKS), loss or LossOptions(), len(shared.candidates))
    students = [Observed(skeleton, BLOCKS) for skeleton in shared.skeletons]
    return JointStep(taught, shared, students, options, seed=0)


def run_with_states(model, images) -> Output:
    """Logits and block outputs, taken by hooks."""
    states = {}
    handles = [
        model.blocks[i].register_forward_hook(lambda _m, _in, out, i=i: states.__setitem__(i, out))
        for i in LAYERS
    ]
    try:
        logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return output(logits, [states[i] for i in LAYERS])


def increments_joined(tensors, name: str) -> torch.Tensor:
    """A parameter of the largest candidate, units in front, from the increments `name+0`, `name+1` ..."""
    parts = sorted((int(key.split("+")[1]), key) for key in tensors if key.startswith(f"{name}+"))
    # An increment keeps the parameter's own number of dimensions, split by head: put the units in front.
    axis = 0 if ".fc1." in name else 1
    return torch.cat([tensors[key].movedim(axis, 0) for _, key in parts])


# --- sorting


@pytest.mark.parametrize("variant", VARIANTS)
def test_sorting_keeps_the_function(variant):
    model = tiny_vit(torch.float64, **VARIANTS[variant])
    images = random_images(4, torch.float64)
    weights = sort_units(dict(model.named_parameters()), find_groups(model), random_order(model))
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, weights[name])]
    assert len(moved) == sum(
        units_first(n, p, HEAD_DIM) is not None for n, p in model.named_parameters() if "blocks" in n
    )
    with torch.no_grad():
        expected, found = model(images), functional_call(model, weights, (images,))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_sorting_puts_each_unit_where_it_is_asked_to_go():
    model = tiny_vit(torch.float64)
    order = random_order(model)
    weights = sort_units(dict(model.named_parameters()), find_groups(model), order)
    expected = dict(sorted_copy(model, order).named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


# --- skeletons


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_full_width_the_candidate_is_the_teacher_to_the_bit(variant):
    model = tiny_vit(torch.float64, **VARIANTS[variant])
    images = random_images(4, torch.float64)
    full = Candidate(1.0, group_sizes(model))
    shared = SharedWeights(model, find_groups(model), dict(model.named_parameters()), [full])
    with torch.no_grad():
        assert torch.equal(shared.extract(0)(images), model(images))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rung", [0, 2])
def test_sliced_equals_masked(variant, rung):
    """Outputs, hidden states and gradients; the gates are put in from outside, the cut is the package's."""
    model = tiny_vit(torch.float64, **VARIANTS[variant])
    images = random_images(3, torch.float64)
    widths = candidates()[rung].widths
    with gates(model, keep_leading(group_sizes(model), widths, torch.float64)):
        masked = run_with_states(model, images)
    shared = make_shared(model)
    weights = shared.weights(rung)
    sliced = Observed(shared.skeletons[rung], BLOCKS).with_weights(weights, images)
    torch.testing.assert_close(sliced.logits, masked.logits, rtol=1e-10, atol=1e-12)
    for ours, expected in zip(sliced.states, masked.states, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)

    # Any function of the outputs will do, if it weighs all of them differently.
    def summed(output: Output):
        return sum(
            (t.sin() * torch.linspace(1, 2, t.numel()).view_as(t)).sum() for t in (output[0], *output[1])
        )

    whole = dict(
        zip(dict(model.named_parameters()), _gradients(summed(masked), model.parameters()), strict=True)
    )
    found = dict(zip(weights, _gradients(summed(sliced), weights.values()), strict=True))
    for name, gradient in whole.items():
        by_unit = units_first(name, gradient, HEAD_DIM)
        if by_unit is None:
            if name in found:
                torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)
            else:  # a norm of queries or keys, in an attention that is no more
                assert gradient.abs().max() == 0
            continue
        width = widths[group_of(name)]
        assert by_unit[width:].abs().sum() == 0
        if width == 0:
            assert name not in found
        else:
            ours = units_first(name, found[name], HEAD_DIM)
            torch.testing.assert_close(ours, by_unit[:width], rtol=1e-8, atol=1e-10)


def _gradients(value, parameters) -> list[torch.Tensor]:
    parameters = list(parameters)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_are_those_of_the_blocks(variant):
    model = tiny_vit(torch.float64, **VARIANTS[variant])
    images = random_images(2, torch.float64)
    with torch.no_grad():
        expected, (logits, states, _) = run_with_states(model, images), Observed(model, BLOCKS)(images)
    assert torch.equal(logits, expected.logits)
    assert [torch.equal(a, b) for a, b in zip(states, expected.states, strict=True)] == [True, True]
    tokens = 4 + {"no-class-token": 0, "registers": 3}.get(variant, 1)
    assert states[0].shape == (2, tokens, 24)


@pytest.mark.parametrize(("group", "constant"), [("blocks.1.attn", "proj"), ("blocks.1.mlp", "fc2")])
def test_an_emptied_layer_says_its_output_bias(group, constant):
    model = tiny_vit(torch.float64)
    skeleton = build_skeleton(model, find_groups(model), {group: 0})
    student = fill(skeleton, dict(model.named_parameters()))
    layer = student.get_submodule(group)
    assert isinstance(layer, ConstantOutput)
    assert [name for name, _ in layer.named_parameters()] == [f"{constant}.bias"]
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    bias = model.get_parameter(f"{group}.{constant}.bias")
    assert torch.equal(layer(x, attn_mask=None), bias.expand(2, 5, 24))
    assert group not in {g.name for g in find_groups(student)}


def test_an_emptied_layer_without_bias_says_nothing():
    model = tiny_vit(torch.float64, proj_bias=False)
    skeleton = build_skeleton(model, find_groups(model), {"blocks.0.mlp": 0})
    student = fill(skeleton, dict(model.named_parameters()))
    assert student.blocks[0].mlp(torch.randn(2, 5, 24)).abs().sum() == 0


def test_skeletons_hold_no_memory():
    shared = make_shared(tiny_vit())
    for skeleton in shared.skeletons:
        assert {p.device.type for p in skeleton.parameters()} == {"meta"}
        assert all(b.device.type == "cpu" for b in skeleton.buffers())


def test_building_a_skeleton_copies_no_weight(monkeypatch):
    model = tiny_vit()
    widths = candidates()[0].widths
    copied = []
    original = nn.Parameter.__deepcopy__

    def counting(parameter, memo):
        copied.append(parameter.numel())
        return original(parameter, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", counting)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    skeleton = build_skeleton(model, find_groups(model), widths)
    assert copied == []
    # Filling does copy: the few parameters of the skeleton, which are on the meta device.
    fill(skeleton, leading_units(dict(model.named_parameters()), skeleton, find_groups(model), widths))
    assert sum(copied) == sum(p.numel() for p in skeleton.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_a_skeleton_knows_its_own_widths():
    model = tiny_vit()
    skeleton = build_skeleton(model, find_groups(model), {"blocks.0.attn": 3, "blocks.0.mlp": 16})
    attn, mlp = skeleton.blocks[0].attn, skeleton.blocks[0].mlp
    assert (attn.num_heads, attn.head_dim, attn.attn_dim) == (3, 6, 18)
    assert (attn.qkv.in_features, attn.qkv.out_features) == (24, 54)
    assert (attn.proj.in_features, attn.proj.out_features) == (18, 24)
    assert (mlp.fc1.out_features, mlp.fc2.in_features, mlp.fc2.out_features) == (16, 16, 24)
    assert [tuple(p.shape) for p in (attn.qkv.weight, attn.qkv.bias)] == [(54, 24), (54,)]
    # A group that is not named stays whole.
    assert skeleton.blocks[1].attn.num_heads == 4
    assert skeleton.blocks[1].mlp.fc1.out_features == 48


@pytest.mark.parametrize(
    "args",
    [
        {"drop_rate": 0.5, "pos_drop_rate": 0.5},
        {"proj_drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5},
        {"patch_drop_rate": 0.5},
    ],
)
def test_nothing_is_dropped_at_random_from_a_candidate(args):
    """A student is trained in train mode, and must still see every patch and every unit."""
    model = tiny_vit(torch.float64, **args)
    images = random_images(4, torch.float64)
    skeleton = build_skeleton(model, find_groups(model), group_sizes(model))
    student = fill(skeleton, dict(model.named_parameters()))
    with torch.no_grad():
        assert torch.equal(student.train()(images), model(images))


def test_the_teacher_keeps_its_dropout():
    model = tiny_vit(proj_drop_rate=0.5, drop_path_rate=0.5)
    build_skeleton(model, find_groups(model), {})
    assert model.blocks[1].mlp.drop1.p == 0.5
    assert model.blocks[2].drop_path1.drop_prob == 0.5


def test_filling_names_what_is_missing_or_does_not_fit():
    model = tiny_vit()
    skeleton = build_skeleton(model, find_groups(model), {"blocks.0.mlp": 8})
    weights = dict(model.named_parameters())
    with pytest.raises(ModelError, match=r"weights do not fit the model: .*blocks\.0\.mlp\.fc2\.weight"):
        fill(skeleton, weights)
    cut = leading_units(weights, skeleton, find_groups(model), {"blocks.0.mlp": 8})
    del cut["head.bias"], cut["norm.weight"]
    with pytest.raises(ModelError, match=r"missing for 2 parameters, the first is norm\.weight"):
        fill(skeleton, cut)


def test_a_filled_model_owns_its_weights():
    model = tiny_vit()
    weights = dict(model.named_parameters())
    student = fill(build_skeleton(model, find_groups(model), {}), weights)
    assert all(p.requires_grad and p.device.type == "cpu" for p in student.parameters())
    with torch.no_grad():
        student.head.bias += 1
    assert (student.head.bias - model.head.bias).sum().item() == pytest.approx(NUM_CLASSES)


@pytest.mark.parametrize(
    ("args", "group"),
    [({"scale_attn_norm": True}, "blocks.0.attn"), ({"scale_mlp_norm": True}, "blocks.0.mlp")],
)
def test_a_norm_over_the_units_is_cut_with_them_and_the_gate_lies_before_it(args, group):
    model = tiny_vit(**args)
    groups = {g.name: g for g in find_groups(model)}
    assert groups[group].gate == f"{group}.norm"
    skeleton = build_skeleton(model, list(groups.values()), {group: 2})
    kept = 2 * model.get_submodule(f"{group}.norm").weight.numel() // groups[group].num_units
    assert skeleton.get_submodule(f"{group}.norm").normalized_shape == (kept,)


def test_another_architecture_is_not_supported():
    with pytest.raises(
        UnsupportedModelError, match="Linear is not supported: nothing in it can be cut; known are: "
    ):
        find_groups(nn.Linear(1, 1))


# --- the store


def test_the_example_of_the_docstring():
    model = nn.Sequential(Mlp(4, 8))
    (group,) = find_groups(model)
    grid = [Candidate(0.25, {group.name: 2}), Candidate(0.375, {group.name: 3})]
    store = SharedWeights(model, [group], model.state_dict(), grid)
    assert {key: tuple(p.shape) for key, p in store.parameters.items()} == {
        "0.fc1.weight+0": (2, 4),
        "0.fc1.weight+1": (1, 4),
        "0.fc1.bias+0": (2,),
        "0.fc1.bias+1": (1,),
        "0.fc2.weight+0": (4, 2),
        "0.fc2.weight+1": (4, 1),
        "0.fc2.bias": (4,),
    }
    weights = store.weights(1)
    assert torch.equal(weights["0.fc1.weight"], model[0].fc1.weight[:3])
    assert torch.equal(weights["0.fc2.weight"], model[0].fc2.weight[:, :3])
    store.add_gradients(1, {"0.fc1.weight": torch.arange(12.0).reshape(3, 4)})
    assert store.parameters["0.fc1.weight+0"].grad.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert store.parameters["0.fc1.weight+1"].grad.tolist() == [[8, 9, 10, 11]]


def test_a_gradient_is_laid_out_as_its_parameter():
    """Fused optimizers on a GPU refuse other strides, and `torch.autograd.grad` hands out any."""

    def reversed_strides(tensor):
        return tensor.permute(*range(tensor.ndim)[::-1]).contiguous().permute(*range(tensor.ndim)[::-1])

    shared = make_shared(tiny_vit(torch.float64))
    for _ in range(2):  # the first is copied, the second added
        transposed = {n: reversed_strides(torch.randn_like(w)) for n, w in shared.weights(2).items()}
        before = {key: p.grad.clone() for key, p in shared.parameters.items() if p.grad is not None}
        shared.add_gradients(2, transposed)
    assert before
    for key, parameter in shared.parameters.items():
        if parameter.grad is not None:
            assert parameter.is_contiguous()
            assert parameter.grad.stride() == parameter.stride(), key
    gained = shared.parameters["blocks.0.mlp.fc1.weight+0"].grad - before["blocks.0.mlp.fc1.weight+0"]
    torch.testing.assert_close(gained, transposed["blocks.0.mlp.fc1.weight"][: len(gained)])


class Called(TorchDispatchMode):
    """Notes the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_gradients_of_all_tensors_are_copied_and_added_in_one_call_each():
    """On a GPU the host cannot keep up with hundreds of small ones."""
    shared = make_shared(tiny_vit())
    gradients = [{n: torch.ones_like(w) for n, w in shared.weights(index).items()} for index in (0, 3)]
    with Called() as called:
        for index, given in zip((0, 3), gradients, strict=True):
            shared.add_gradients(index, given)
    found = {name: called.names.count(name) for name in called.names if "copy" in name or "add" in name}
    assert found == {"_foreach_copy_.default": 2, "_foreach_add_.List": 1}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_candidates_weights_are_the_first_units_of_the_teachers(variant):
    model = tiny_vit(torch.float64, **VARIANTS[variant])
    shared = make_shared(model)
    for index, candidate in enumerate(shared.candidates):
        for name, weight in shared.weights(index).items():
            whole = model.get_parameter(name)
            by_unit = units_first(name, whole, HEAD_DIM)
            if by_unit is None:
                assert torch.equal(weight, whole)
            else:
                expected = by_unit[: candidate.widths[group_of(name)]]
                assert torch.equal(units_first(name, weight, HEAD_DIM), expected)


def test_what_a_small_candidate_holds_every_larger_one_holds():
    shared = make_shared(tiny_vit())
    # Not the teacher's values any more, as after some training.
    with torch.no_grad():
        for parameter in shared.parameters.values():
            parameter += torch.randn_like(parameter)
    for small, large in itertools.combinations(range(len(LADDER)), 2):
        of_small, of_large = shared.weights(small), shared.weights(large)
        assert of_small.keys() <= of_large.keys()
        for name, weight in of_small.items():
            by_unit = units_first(name, weight, HEAD_DIM)
            if by_unit is None:
                assert torch.equal(weight, of_large[name])
            else:
                width = shared.candidates[small].widths[group_of(name)]
                assert torch.equal(by_unit, units_first(name, of_large[name], HEAD_DIM)[:width])


def test_the_store_is_as_large_as_its_largest_candidate():
    shared = make_shared(tiny_vit())
    largest = sum(p.numel() for p in shared.skeletons[-1].parameters())
    assert sum(p.numel() for p in shared.parameters.values()) == largest
    # Block 0 has 0, 0, 1, 3 heads: increments 2 and 3 only.
    keys = [k for k in shared.parameters if k.startswith("blocks.0.attn.qkv.weight")]
    assert keys == ["blocks.0.attn.qkv.weight+2", "blocks.0.attn.qkv.weight+3"]
    assert [tuple(shared.parameters[k].shape) for k in keys] == [(3, 1, 6, 24), (3, 2, 6, 24)]


def test_training_the_store_leaves_the_teacher_alone():
    model = tiny_vit()
    before = copy.deepcopy(model.state_dict())
    shared = make_shared(model)
    with torch.no_grad():
        for parameter in shared.parameters.values():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("rung", range(len(LADDER)))
def test_what_is_handed_out_is_what_was_trained(rung):
    shared = make_shared(tiny_vit())
    with torch.no_grad():
        for parameter in shared.parameters.values():
            parameter += 0.1 * torch.randn_like(parameter)
        images = random_images(4)
        expected = functional_call(shared.skeletons[rung], shared.weights(rung), (images,))
        student = shared.extract(rung)
        assert torch.equal(student(images), expected)
        # A copy: further training of the store does not reach it.
        for parameter in shared.parameters.values():
            parameter.zero_()
        assert torch.equal(student(images), expected)


def test_a_store_takes_over_the_values_of_another():
    first, second = make_shared(tiny_vit(seed=1)), make_shared(tiny_vit(seed=2))
    images = random_images(2)
    assert not torch.equal(first.extract(0)(images), second.extract(0)(images))
    second.load({name: p.detach() for name, p in first.parameters.items()})
    for rung in range(len(LADDER)):
        assert torch.equal(first.extract(rung)(images), second.extract(rung)(images))
    with pytest.raises(AssertionError, match="saved for another grid"):
        second.load({"head.bias": torch.zeros(5)})


@pytest.mark.parametrize("variant", ["plain", "qk-norm", "registers", "no-output-bias"])
@pytest.mark.parametrize("rung", [0, 2])
def test_a_student_on_disk_is_the_student(tmp_path, variant, rung):
    args = {**ARGS, **VARIANTS[variant]}
    shared = make_shared(tiny_vit(**VARIANTS[variant]))
    student = shared.extract(rung).eval()
    card = Card(
        architecture=Architecture(source="timm", name="vit_tiny_patch16_224", args=args),
        widths=shared.candidates[rung].widths,
        classes=[f"class {i}" for i in range(NUM_CLASSES)],
        input=SPEC,
        provenance={"teacher": "tiny"},
    )
    save_model(tmp_path, student, card)
    loaded = load(tmp_path)
    assert not loaded.training
    state, expected = loaded.state_dict(), student.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    images = random_images(4)
    with torch.no_grad():
        assert torch.equal(loaded(images), student(images))
    assert json.loads((tmp_path / "stepwell.json").read_text())["widths"] == shared.candidates[rung].widths


# --- the joint step


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_joint_gradient_is_the_mean_of_the_candidates_gradients(variant):
    """Against whole models whose cut units are gated off, one backward pass through all of them."""
    teacher = tiny_vit(torch.float64, seed=0, **VARIANTS[variant])
    trained = tiny_vit(torch.float64, seed=5, **VARIANTS[variant])
    (batch,) = random_batches(1, 4, torch.float64)
    loss = LossOptions(task_weight=0.5, logit_weight=2.0, temperature=2.0)
    with torch.no_grad():
        target = run_with_states(teacher, batch.images)
    total, parts = 0.0, []
    for candidate in candidates():
        with gates(trained, keep_leading(group_sizes(trained), candidate.widths, torch.float64)):
            losses = amd_loss(run_with_states(trained, batch.images), target, batch.labels, loss)
        total = total + losses["loss"] / len(LADDER)
        parts.append({name: value.item() for name, value in losses.items()})
    total.backward()

    shared = make_shared(trained)
    step = joint_step(teacher, shared, JointOptions(sampling="all"), loss)
    found = step(batch, 0)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]}, rel=1e-6
    )
    gradients = {key: p.grad for key, p in shared.parameters.items() if p.grad is not None}
    compared = 0
    for name, parameter in trained.named_parameters():
        by_unit = units_first(name, parameter.grad, HEAD_DIM)
        if by_unit is None:
            ours, expected = gradients[name], parameter.grad
        else:
            ours, expected = increments_joined(gradients, name), by_unit
            expected = expected[: len(ours)]
        # The loss itself is taken in fp32.
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-12 + 1e-6 * float(expected.abs().max()))
        compared += ours.numel()
    assert compared == sum(p.numel() for p in shared.parameters.values())


def test_the_teacher_runs_once_per_batch_and_records_nothing():
    teacher = tiny_vit()
    runs = []
    teacher.head.register_forward_hook(lambda _module, _inputs, output: runs.append(output.requires_grad))
    step = joint_step(teacher, make_shared(tiny_vit(seed=5)), JointOptions(sampling="all"))
    for number, batch in enumerate(random_batches(2, 4)):
        step(batch, number)
    assert runs == [False, False]
    assert all(p.grad is None for p in teacher.parameters())


def test_gradients_of_steps_add_up():
    teacher = tiny_vit(torch.float64)
    shared = make_shared(tiny_vit(torch.float64, seed=5))
    step = joint_step(teacher, shared, JointOptions(sampling="all"))
    (batch,) = random_batches(1, 4, torch.float64)
    step(batch, 0)
    once = {key: p.grad.clone() for key, p in shared.parameters.items()}
    step(batch, 1)
    for key, parameter in shared.parameters.items():
        torch.testing.assert_close(parameter.grad, 2 * once[key], rtol=1e-12, atol=0)


def test_what_does_not_run_does_not_move():
    """Under AdamW with momentum and decay, over several steps, to the bit."""
    teacher = tiny_vit()
    shared = make_shared(tiny_vit(seed=5))
    options = JointOptions(sampling="sandwich", num_random=1)
    step = joint_step(teacher, shared, options)
    num_steps, rested, worked = 12, 0, 0
    before: dict[str, torch.Tensor] = {}
    largest_of_step = [max(candidates_of_step(len(LADDER), options, 0, n)) for n in range(num_steps)]
    assert set(largest_of_step) == {1, 2, 3}

    def runs(key: str, largest: int) -> bool:
        name, _, increment = key.partition("+")
        if increment:
            return int(increment) <= largest
        # A norm in front of a layer that is empty in all candidates of the step does nothing either.
        for norm, behind in ((".norm1.", ".attn"), (".norm2.", ".mlp")):
            if norm in name:
                return shared.candidates[largest].widths[name.split(norm)[0] + behind] > 0
        return True

    def compare(number: int) -> None:
        nonlocal rested, worked
        for key, parameter in shared.parameters.items():
            same = torch.equal(parameter, before[key])
            if runs(key, largest_of_step[number]):
                assert not same, f"{key} stood still in step {number}"
                worked += 1
            else:
                assert same, f"{key} moved in step {number}"
                rested += 1

    def watched(batch, number, progress):
        if number:
            compare(number - 1)
        before.update({key: p.detach().clone() for key, p in shared.parameters.items()})
        return step(batch, number, progress)

    config = CompressConfig(warmup=0.0, weight_decay=0.1, lr=1e-3)
    course = Course("joint", shared.parameters, epochs=num_steps / 3, lr=1e-3)
    fit(course, watched, FixedTrain(random_batches(3, 4)), config)
    compare(num_steps - 1)
    assert rested > 20
    assert worked > 200


def test_sandwich_always_runs_the_student_and_draws_the_others_evenly():
    options = JointOptions(sampling="sandwich", num_random=2)
    draws = [candidates_of_step(9, options, seed=3, step=n) for n in range(2000)]
    assert all(len(d) == 3 and d[-1] == 0 and d == sorted(d, reverse=True) for d in draws)
    counts = [sum(i in d for d in draws) for i in range(1, 9)]
    # 2000 draws of 2 in 8: 500 each, with a standard deviation of 19.
    assert min(counts) > 420
    assert max(counts) < 580
    assert draws == [candidates_of_step(9, options, seed=3, step=n) for n in range(2000)]
    assert draws != [candidates_of_step(9, options, seed=4, step=n) for n in range(2000)]


def test_more_random_candidates_than_there_are_is_all_of_them():
    options = JointOptions(sampling="sandwich", num_random=9)
    assert candidates_of_step(4, options, seed=0, step=0) == [3, 2, 1, 0]
    assert candidates_of_step(4, JointOptions(sampling="all"), seed=0, step=0) == [3, 2, 1, 0]


@pytest.mark.parametrize("num_random", [1, 2, 8, 20])
def test_candidates_per_step_are_those_of_the_mean_over_many_draws(num_random):
    scales = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    options = JointOptions(sampling="sandwich", num_random=num_random)
    drawn = [candidates_of_step(9, options, 0, n) for n in range(4000)]
    sums = [sum(scales[i] for i in of_step) for of_step in drawn]
    found_sum, found_number = candidates_per_step(scales, options)
    assert found_sum == pytest.approx(sum(sums) / len(sums), rel=0.03)
    assert {len(of_step) for of_step in drawn} == {found_number}
    assert candidates_per_step(scales, JointOptions(sampling="all")) == (pytest.approx(4.5), 9)
