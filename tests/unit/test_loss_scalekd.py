"""ScaleKD equals loops over its equations, teaches through the frozen tail, and leaves the teacher alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from loss_reference_scalekd import alternative, array, original, projected, without_direct_component
from torch import Tensor, nn

from blocks import shaken
from stepwell.config.options import LossOptions
from stepwell.data.batches import Batch
from stepwell.errors import ConfigError
from stepwell.losses.choose import Pair
from stepwell.losses.distillation import Distillation, loss_macs, loss_parameters, make_distillation
from stepwell.losses.observe import Observed
from stepwell.losses.output import Target, TrainingImages
from stepwell.losses.scalekd.loss import Parts, ScaleKD
from stepwell.losses.scalekd.projector import CrossAttentionProjector
from stepwell.losses.scalekd.stages import Layout, Stage, Stages, find_stages
from stepwell.losses.scalekd.views import alternative_view, original_view
from stepwell.stages.distill import DistillStep
from stepwell.training.lesson import Lesson
from tiny import NUM_CLASSES, random_images, tiny_vit

SIZE = 32
TERMS = {"feature_loss": "scalekd", "task_weight": 0.5, "logit_weight": 0.5}


def resnet() -> nn.Module:
    """Its stages 3 and 4 are 4 x 4 and 2 x 2."""
    layers = {"layers": (1, 1, 1, 1), "channels": (4, 4, 6, 8), "output_stride": 16}
    return timm.create_model("resnet18", **layers, num_classes=NUM_CLASSES)


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=SIZE, patch_size=4, embed_dim=12, depths=(1, 1),
        num_heads=(1, 2), window_size=4, mlp_ratio=2.0, num_classes=NUM_CLASSES,
    )  # fmt: skip


def vit() -> nn.Module:
    return tiny_vit(torch.float64, img_size=SIZE, patch_size=8, reg_tokens=2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair_of(teacher: nn.Module, student: nn.Module, images: Tensor) -> tuple[Pair, Observed, Observed]:
    """The two models of a step, as a run observes them."""
    ours, theirs = find_stages(student, images), find_stages(teacher, images)
    assert ours is not None
    assert theirs is not None
    learner, observed = Observed(student, ours.blocks), Observed(teacher.requires_grad_(False), theirs.blocks)
    with torch.no_grad():
        outputs = learner(images[:2]), observed(images[:2])
    pair = Pair(*outputs, observed, images[:2], TrainingImages(None, 1), True, stages=(ours, theirs))
    return pair, learner, observed


def loss_of(pair: Pair, **feature_args: float) -> Distillation:
    """In evaluation mode, in float64, with every number other than where it starts."""
    options = LossOptions(**TERMS, feature_args=feature_args)
    loss = make_distillation(options, pair, seed=0)
    assert isinstance(loss.feature, ScaleKD)
    loss.feature = shaken(lambda: loss.feature)
    return loss


# --- the parts


@pytest.mark.parametrize("given", [False, True], ids=["own queries", "given queries"])
def test_the_projector_equals_its_attention_by_loop(given):
    cap = shaken(lambda: CrossAttentionProjector((3, 4, 2), (6, 2, 3), 2, 5.0, has_queries=not given))
    maps, queries = random(2, 3, 4, 2), random(2, 6, 6, seed=1) if given else None
    found = array(cap(maps, queries))
    for i in range(2):
        asked = array(cap.queries)[0] if queries is None else array(queries)[i]
        assert found[i] == pytest.approx(projected(cap, array(maps)[i], asked, 2, 5.0), abs=1e-9)


def test_with_layer_norm_each_position_of_the_students_map_is_normalised_over_its_channels():
    cap = shaken(lambda: CrossAttentionProjector((3, 4, 2), (6, 2, 3), 2, layer_norm=True))
    seen: list[Tensor] = []
    conv, norm, _ = cap.student
    conv.register_forward_hook(lambda _m, _i, y: seen.append(y))
    norm.register_forward_hook(lambda _m, _i, y: seen.append(y))
    cap.train()(random(1, 3, 4, 2))  # of one image, whose statistics it does not need
    before, after = (array(tensor)[0] for tensor in seen)
    weight, bias = array(norm.weight), array(norm.bias)
    for row in range(4):
        for column in range(2):
            x = before[:, row, column]
            expected = weight * (x - x.mean()) / np.sqrt(x.var() + 1e-6) + bias
            assert after[:, row, column] == pytest.approx(expected, rel=1e-6)
    assert not list(cap.buffers())  # a BatchNorm would have kept statistics


def test_the_views_equal_loops_over_positions_and_over_a_dct():
    for height, width in [(2, 2), (3, 4), (7, 7)]:
        ours, theirs = random(2, height * width, 5), 3 * random(2, height * width, 5, seed=1) + 1
        assert original_view(ours, theirs).item() == pytest.approx(original(array(ours), array(theirs)))
        expected = alternative(array(ours), array(theirs), height, width)
        assert alternative_view(ours, theirs).item() == pytest.approx(expected, rel=1e-9)


def test_without_its_direct_component_a_map_is_one_without_its_mean():
    tokens = array(random(49, 3)) + 2
    left = without_direct_component(tokens, 7, 7)
    assert left == pytest.approx(tokens - tokens.mean(axis=0), abs=1e-12)
    assert not np.allclose(left, tokens)


@pytest.mark.parametrize("position", [0.0, 1.0])
def test_the_gradient_of_a_position_without_features_is_finite(position):
    tokens = torch.zeros(1, 4, 3, dtype=torch.float64)
    tokens[:, 0] = position
    tokens.requires_grad_()
    (original_view(tokens, random(1, 4, 3)) + alternative_view(tokens, random(1, 4, 3))).backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()
    assert tokens.grad.abs().max() < 1e7


# --- the whole: through the teacher's own parameters


def tail_of_swin(model: nn.Module, third: Tensor) -> Tensor:
    """(B, H, W, C) of stage 3 to the tokens of stage 4, by the model's own modules."""
    return model.norm(model.layers[1](third)).flatten(1, 2)


def tail_of_vit(model: nn.Module, third: Tensor) -> Tensor:
    """A class token and two registers come before the positions."""
    return model.norm(model.blocks[2](third))[:, 3:]


def by_hand(
    loss: ScaleKD,
    tail: Callable[[Tensor], Tensor],
    states: list[Tensor],
    theirs: list[Tensor],
    heads: list[int],
) -> float:
    """0.08 V1 + 0.06 V2 at either stage, with the projectors by loop."""
    grids = [stage.layout for stage in (loss.teacher_stages.third, loss.teacher_stages.fourth)]
    target = theirs[1] if theirs[1].ndim == 3 else theirs[1].flatten(1, 2)
    target = array(target[:, -grids[1].num_positions :])
    size, total = (grids[1].height, grids[1].width), 0.0
    for view, weight in (("original", 0.08), ("alternative", 0.06)):
        third, fourth = loss.third[view], loss.fourth[view]
        queries = array(third.queries)[0]
        tokens = torch.tensor(
            np.array([projected(third, array(m), queries, heads[0], 5.0) for m in states[0]])
        )
        if grids[0].kind == "tokens":
            given = torch.cat([theirs[0][:, : grids[0].num_prefix], tokens], dim=1)
        else:
            given = tokens.unflatten(1, (grids[0].height, grids[0].width))
        completed = array(tail(given))
        last = np.array(
            [projected(fourth, array(m), q, heads[1], 5.0) for m, q in zip(states[1], completed, strict=True)]
        )
        for predicted in (completed, last):
            distance = (
                original(predicted, target) if view == "original" else alternative(predicted, target, *size)
            )
            total += weight * 49 / (size[0] * size[1]) * distance
    return total


@pytest.mark.parametrize(
    ("build", "tail", "heads"),
    [(swin, tail_of_swin, [1, 2]), (vit, tail_of_vit, [4, 4])],
    ids=["swin", "vit"],
)
def test_the_loss_equals_its_equations_by_loop(build, tail, heads):
    teacher = shaken(build)
    student, images = shaken(resnet), random_images(2, torch.float64, size=SIZE)
    pair, learner, observed = pair_of(teacher, student, images)
    loss = loss_of(pair).feature.eval()
    with torch.no_grad():
        ours, theirs = learner(images).states, observed(images).states
        expected = by_hand(loss, lambda state: tail(teacher, state), list(ours), list(theirs), heads)
        assert loss(ours, theirs).item() == pytest.approx(expected, rel=1e-8)


@pytest.fixture
def lesson():
    teacher, student = shaken(swin), shaken(resnet)
    images = random_images(3, torch.float64, size=SIZE)
    return teacher, student, images, *pair_of(teacher, student, images)


def test_gradients_reach_the_student_through_the_frozen_tail_and_the_teacher_stays(lesson):
    teacher, student, images, pair, learner, observed = lesson
    before = copy.deepcopy(teacher.state_dict())
    loss = loss_of(pair, stage_4=0, alternative=0)  # the only way is through the tail
    with torch.no_grad():
        answer = observed(images)
    output, labels = learner(images), torch.arange(3)
    parts = loss(output, answer, Target(labels, labels, 0.0))
    gradients = torch.autograd.grad(parts["feature"], student.layer2[0].conv1.weight, retain_graph=True)
    assert gradients[0].abs().sum() > 0
    parts["loss"].backward()
    assert student.layer1[0].conv1.weight.grad.abs().sum() > 0
    assert loss.feature.third["original"].queries.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_the_tail_is_borrowed_neither_saved_nor_trained_nor_decayed(lesson):
    teacher, _, _, pair, _, _ = lesson
    loss = loss_of(pair)
    owned = {id(tensor) for tensor in teacher.state_dict().values()} | {id(p) for p in teacher.parameters()}
    assert not owned & {id(tensor) for tensor in loss.state_dict(keep_vars=True).values()}
    assert not owned & {id(p) for p in loss_parameters([loss]).values()}
    assert {name.split(".")[1] for name in loss.state_dict()} == {"third", "fourth"}
    # Queries and positions are tables, which are not decayed; stage 4 has no queries of its own.
    assert loss.no_weight_decay() == {
        f"feature.{name}"
        for view in ("original", "alternative")
        for name in (f"third.{view}.positions", f"third.{view}.queries", f"fourth.{view}.positions")
    }


def test_the_tail_runs_once_for_both_views(lesson):
    teacher, _, images, pair, learner, observed = lesson
    loss = loss_of(pair).feature
    with torch.no_grad():
        ours, theirs = learner(images).states, observed(images).states
    seen = []
    teacher.layers[1].register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    teacher.layers[0].blocks[0].register_forward_hook(lambda *_: seen.append("before the tail"))
    loss(ours, theirs)
    assert seen == [6]


def test_in_a_step_only_the_tail_runs_twice_once_for_its_own_features_and_once_for_both_views(lesson):
    teacher, student, images, pair, learner, observed = lesson
    loss = loss_of(pair)
    calls: dict[str, list[int]] = {}

    def count(name: str, model: nn.Module) -> None:
        for part, module in model.named_modules():
            if not list(module.children()) and not isinstance(module, (nn.Identity, nn.Dropout)):
                seen = calls.setdefault(f"{name}.{part}", [])
                module.register_forward_hook(lambda _m, inputs, _o, seen=seen: seen.append(len(inputs[0])))

    for name, model in (("teacher", teacher), ("student", student), ("loss", loss)):
        count(name, model)
    step = DistillStep(Lesson([observed], [loss], torch.autocast("cpu", enabled=False)), learner)
    step(Batch(images, torch.arange(3), torch.arange(3)), 0)

    def times(start: str) -> set[int]:
        """How often the modules whose names begin so were called."""
        return {len(seen) for name, seen in calls.items() if name.startswith(start)}

    windows = images.shape[0] * (SIZE // 4 // 4) ** 2  # Swin's blocks see windows of 4 x 4 positions
    assert times("teacher.patch_embed") | times("teacher.layers.0") == {1}
    assert times("teacher.layers.1") == times("teacher.norm") == {2}
    assert calls["teacher.layers.1.downsample.reduction"] == [3, 2 * 3]
    assert calls["teacher.layers.0.blocks.0.attn.qkv"] == [windows]
    # Of the student all but the ReLU that a block has twice.
    assert {
        len(seen) for name, seen in calls.items() if name.startswith("student.") and "act" not in name
    } == {1}
    assert times("loss.feature.third.") == times("loss.feature.fourth.") == {1}


@pytest.mark.parametrize(
    ("given", "third", "fourth", "has_queries"),
    [
        ({}, {"original", "alternative"}, {"original", "alternative"}, False),
        ({"alternative": 0}, {"original"}, {"original"}, False),
        ({"original": 0}, {"alternative"}, {"alternative"}, False),
        ({"stage_3": 0}, {"original", "alternative"}, {"original", "alternative"}, False),
        ({"stage_3": 0, "own_queries": 1}, set(), {"original", "alternative"}, True),
        ({"stage_4": 0}, {"original", "alternative"}, set(), None),
        ({"alternative_4": 0, "own_queries": 1}, {"original", "alternative"}, {"original"}, True),
        ({"tpp": 0, "alternative": 0}, {"original"}, {"original"}, True),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_each_part_can_be_turned_off(lesson, given, third, fourth, has_queries):
    *_, images, pair, learner, observed = lesson
    loss = loss_of(pair, **given).feature
    assert set(loss.third) == third
    assert set(loss.fourth) == fourth
    assert {cap.queries is not None for cap in loss.fourth.values()} == (
        set() if has_queries is None else {has_queries}
    )
    assert (loss.tail is None) == (given.get("tpp") == 0)
    with torch.no_grad():
        ours, theirs = learner(images).states, observed(images).states
    value = loss(ours, theirs)
    value.backward()
    assert value > 0
    # Every projector that there is learns something.
    assert all(p.grad is not None for name, p in loss.named_parameters())


def test_without_tpp_stage_3_is_compared_with_the_teachers_stage_3(lesson):
    *_, images, pair, learner, observed = lesson
    loss = loss_of(pair, tpp=0, stage_4=0, alternative=0).feature.eval()
    with torch.no_grad():
        ours, theirs = learner(images).states, observed(images).states
        predicted = loss.third["original"](ours[0])
        expected = 0.08 * 49 / 64 * original_view(predicted, theirs[0].flatten(1, 2))
        assert loss(ours, theirs).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"original": 0, "alternative": 0}, "nothing of it is left"),
        ({"stage_3": 0, "stage_4": 0}, "nothing of it is left"),
        ({"num_heads_3": 5}, "5 heads do not divide the teacher's 12 channels"),
        ({"num_heads_4": 5}, "5 heads do not divide the teacher's 24 channels"),
        ({"beta": 0.5}, "--feature-args beta: the loss scalekd takes original, alternative, alternative_4,"),
        ({"tpp": 0.5}, "--feature-args tpp=0.5: the loss scalekd takes 0 or 1 there"),
        ({"own_queries": 2}, "--feature-args own_queries=2: the loss scalekd takes 0 or 1 there"),
        ({"num_heads_3": 2.5}, "--feature-args num_heads_3=2.5: the loss scalekd takes a whole number there"),
        (
            {"num_heads_3": -2},
            "--feature-args num_heads_3=-2: the loss scalekd takes no negative number",
        ),
        ({"original": -1}, "--feature-args original=-1: the loss scalekd takes no negative number"),
        ({"alternative_4": -1}, "--feature-args alternative_4=-1: the loss scalekd takes no negative number"),
        (
            {"softmax_scale": 0},
            "--feature-args softmax_scale=0: the loss scalekd takes a number above 0",
        ),
        ({"original": math.nan}, "--feature-args original=nan: give a number"),
        ({"tpp": math.inf}, "--feature-args tpp=inf: give a number"),
    ],
)
def test_what_it_does_not_take(lesson, given, said):
    with pytest.raises(ConfigError, match=said):
        loss_of(lesson[3], **given)


# --- small grids


def of_grid(height: int, width: int, channels: int = 4) -> Stage:
    return Stage("any", Layout("map", channels, height, width), 2)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 5), (2, 2), (2, 3)])
def test_grids_of_few_positions_give_no_nan_and_one_view_below_two_by_two(size):
    stages = Stages(of_grid(*size), of_grid(*size))
    torch.manual_seed(0)
    loss = ScaleKD(stages, stages, lambda state: 2 * state, Parts())
    ours = [torch.zeros(2, 4, *size, requires_grad=True), torch.randn(2, 4, *size, requires_grad=True)]
    value = loss(ours, [torch.randn(2, 4, *size), torch.zeros(2, 4, *size)])
    value.backward()
    assert value.isfinite()
    gradients = [p.grad for p in [*loss.parameters(), *ours]]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    is_small = min(size) < 2
    assert set(loss.third) == ({"original"} if is_small else {"original", "alternative"})
    grid = f"{size[0]} x {size[1]}"
    said = [
        f"at stage {number} the view without the mean is left out, of which maps below 2 x 2 have nothing "
        f"(student {grid}, teacher {grid})"
        for number in (3, 4)
    ]
    assert loss.notes == (said if is_small else [])


def test_a_student_of_one_position_has_one_view_however_large_the_teachers_grid():
    """Its projection is the same at all positions: there is one thing to attend to."""
    cap = CrossAttentionProjector((4, 1, 1), (4, 3, 3), 2)
    tokens = cap.eval()(torch.randn(2, 4, 1, 1))
    torch.testing.assert_close(tokens, tokens[:, :1].expand(-1, 9, -1))
    student, teacher = Stages(of_grid(2, 2), of_grid(1, 1)), Stages(of_grid(3, 3), of_grid(3, 3))
    loss = ScaleKD(student, teacher, lambda state: state, Parts())
    assert loss.weights_3[1] > 0
    assert loss.weights_4[1] == 0


def test_the_weights_are_the_published_ones_at_the_published_grids():
    def weights(side: int) -> tuple[float, ...]:
        stages = Stages(of_grid(side, side), of_grid(side, side))
        return ScaleKD(stages, stages, lambda state: state, Parts()).weights_4

    assert weights(7) == pytest.approx((0.08, 0.06))
    assert weights(16) == pytest.approx((0.016, 0.0115), abs=7e-4)  # published: .016, .008
    assert weights(24) == pytest.approx((0.0068, 0.0051), abs=1e-4)  # published: .008, .004


# --- as the product uses it


def test_between_slices_of_one_model_amds_loss_stands_in_its_place(lesson):
    *_, pair, _, _ = lesson
    loss = make_distillation(LossOptions(**TERMS), replace(pair, is_other_student=False), seed=0)
    assert loss.options.feature_loss == "states"
    assert (loss.options.task_weight, loss.options.logit_weight, loss.options.feature_weight) == (
        0.5,
        0.5,
        0.5,
    )
    assert not isinstance(loss.feature, ScaleKD)


def test_the_bill_counts_projectors_and_the_tail(lesson):
    teacher, _, _, pair, _, _ = lesson
    teacher.float()
    pair = replace(pair, student=_float(pair.student), teacher=_float(pair.teacher), blank=pair.blank.float())
    with_tail = loss_macs(make_distillation(LossOptions(**TERMS), pair, 0), pair, 4)["main"]
    own = LossOptions(**TERMS, feature_args={"tpp": 0})
    alone = loss_macs(make_distillation(own, pair, 0), pair, 4)["main"]
    # Both views pass the tail, forward and back to its input: no gradient of its weights. Swin's last layer
    # by hand: patch merging (4 x 12 -> 24 channels) of 4 x 4 positions, one block with a window of 4 x 4.
    positions, width = 16, 24
    block = positions * (3 * width**2 + width**2 + 2 * 2 * width**2) + 2 * positions**2 * width
    head = width * NUM_CLASSES  # the model runs to its end; its logits lead nowhere, so forward only
    tail = 2 * (2 * (positions * 48 * width + block) + head)
    # The merged weights of queries differ by what is learned: stage 4 has its own queries without TPP, of the
    # same size; their gradients are a sum. So the difference is the tail, and the positions of its target.
    products_with_scores = 2 * 2 * positions**2 * width  # attention: four products backward for two forward
    assert with_tail - alone == pytest.approx(tail + products_with_scores, rel=0.05)


def _float(output):
    return type(output)(
        output.logits.float(), [state.float() for state in output.states], output.features.float()
    )


def test_a_teacher_whose_rest_reads_more_than_a_state_teaches_without_its_parameters():
    class Around(nn.Module):
        """What stands behind the first block also reads what stands before it."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 4, 4)
            self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)])
            self.head = nn.Linear(8, NUM_CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            x = self.stem(images)
            return self.head(self.blocks[1](self.blocks[0](x).relu() + x).mean((2, 3)))

    teacher, student, images = shaken(Around), shaken(resnet), random_images(2, torch.float64, size=SIZE)
    ours, theirs = find_stages(student, images), find_stages(teacher, images, ("blocks.0", "blocks.1"))
    assert theirs is not None
    observed, learner = Observed(teacher, theirs.blocks), Observed(student, ours.blocks)
    with torch.no_grad():
        outputs = learner(images), observed(images)
    pair = Pair(*outputs, observed, images, TrainingImages(None, 1), True, stages=(ours, theirs))
    loss = make_distillation(LossOptions(**TERMS), pair, 0).feature
    assert loss.tail is None
    reason = "what follows blocks.0 reads more than what it returns"
    assert loss.notes == [f"the teacher's own parameters (tpp) are left out: {reason}"]
    assert math.isfinite(loss.double()(outputs[0].states, outputs[1].states).item())
