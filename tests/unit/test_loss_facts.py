"""What a loss's record says is what it does: how it is called, when it is trained, what it costs."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stepwell.cli import parse
from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.config.loss_facts import (
    FEATURE_LOSSES,
    LOGIT_LOSSES,
    OWN_CODE,
    LossFacts,
    feature_facts,
    logit_facts,
)
from stepwell.config.options import LossOptions, TrainingOptions
from stepwell.errors import ConfigError
from stepwell.losses import choose
from stepwell.losses.choose import Pair
from stepwell.losses.distillation import Distillation, loss_macs, loss_parameters, make_distillation
from stepwell.losses.observe import Observed
from stepwell.losses.output import Output, Target, TrainingImages, arguments
from stepwell.losses.projection import ProjectedStates
from stepwell.run.checkpoint import changed_by_training
from stepwell.run.run_dir import Stage
from stepwell.training.lesson import Lesson
from stepwell.training.optimizer import make_optimizer
from tiny import no_autocast, pair, random_images, tiny_vit

CLASSES, IMAGES, MEMORY = 5, 6, 40
LABELS = torch.arange(IMAGES) % CLASSES
TARGET = Target(LABELS, torch.arange(IMAGES), 0.5)
KNOWN = TrainingImages(torch.arange(MEMORY) % CLASSES, MEMORY)
ALL = {**LOGIT_LOSSES, **FEATURE_LOSSES}
# What reads the stages of two architectures is made of models, not of shapes: test_loss_scalekd.py. What is
# for masks alone: test_losses_on_masks.py.
EVERY = {name: facts for name, facts in ALL.items() if not facts.reads_stages and facts.masks != "only"}
PRETRAINED = [name for name, facts in EVERY.items() if facts.pretraining]

# Shapes of the states, from shallow to deep, and the width of the features.
MAPS = ([(4, 8, 8), (6, 4, 4), (8, 2, 2)], 8)
WIDE_MAPS = ([(6, 8, 8), (9, 4, 4), (12, 2, 2)], 12)
TOKENS = ([(17, 8)] * 3, 8)
SWIN_MAPS = ([(8, 8, 4), (4, 4, 8)], 8)


def outputs(sizes, seed: int, num_images: int = IMAGES, learns: bool = False) -> Output:
    generator = torch.Generator().manual_seed(seed)
    shapes, dim = sizes

    def drawn(*shape: int) -> Tensor:
        return torch.randn(num_images, *shape, generator=generator).requires_grad_(learns)

    return Output(drawn(CLASSES), [drawn(*shape) for shape in shapes], drawn(dim))


def options_of(name: str, **more: object) -> LossOptions:
    """The loss alone, but for a little of the labels: some are silent in the main training."""
    kind = "logit" if name in LOGIT_LOSSES else "feature"
    weights = {"logit_weight": 0.0, "feature_weight": 0.0, f"{kind}_weight": 1.0}
    return LossOptions.model_validate({f"{kind}_loss": name, "task_weight": 0.5, **weights, **more})


def pair_of(ours, theirs, **facts) -> Pair:
    return pair(outputs(ours, 1, 2), outputs(theirs, 2, 2), **{"training_images": KNOWN, **facts})


def made(name: str, ours=MAPS, theirs=MAPS, **more: object) -> Distillation:
    return make_distillation(options_of(name, **more), pair_of(ours, theirs), seed=0)


def gradients(output: Output) -> float:
    """Size of all that flows back into it; NaN and infinity stay."""
    tensors = [output.logits, *output.states, output.features]
    return sum(float(tensor.grad.abs().sum()) for tensor in tensors if tensor.grad is not None)


# --- records


def test_which_losses_need_what():
    """By their names, as the help and the checks of a run tell them."""
    maps = {"fitnet", "at", "fsp", "nst", "ab", "ft", "vid", "review", "sp"}
    assert {name for name, facts in EVERY.items() if facts.needs_labels} == {"dkd", "pld", "sskd", "ofa"}
    assert {name for name, facts in EVERY.items() if facts.needs_maps} == maps
    assert {name for name, facts in EVERY.items() if facts.needs_states} == maps | {"states", "ofa"}
    assert {name for name, facts in EVERY.items() if facts.needs_teacher_states} == maps | {"states"}
    assert {name: facts.pretraining for name, facts in EVERY.items() if facts.pretraining} == {
        "fsp": "student", "ab": "student", "ft": "loss", "sskd": "loss",
    }  # fmt: skip
    assert {name for name, facts in EVERY.items() if facts.is_silent_after_pretraining} == {"fsp", "ab"}
    assert {name: facts.views for name, facts in EVERY.items() if facts.views > 1} == {"sskd": 4}
    shares = {name: facts.pretraining_share for name, facts in EVERY.items() if facts.pretraining}
    assert shares == {"fsp": 1 / 8, "ab": 1 / 8, "ft": 1 / 8, "sskd": 1 / 4}


def test_code_of_the_users_own_reads_everything_and_needs_nothing():
    for facts in (logit_facts("mine.py:loss"), feature_facts("mine.py:loss")):
        assert facts is OWN_CODE
        assert not any((facts.needs_labels, facts.needs_states, facts.pretraining))
    student, teacher = outputs(MAPS, 1), outputs(MAPS, 2)
    found = arguments(OWN_CODE, student, teacher, TARGET)
    assert found[0] is student
    assert found[1] is teacher
    assert found[2] is TARGET


@pytest.mark.parametrize("name", EVERY)
def test_a_name_brings_the_options_of_its_authors_where_none_are_given(name):
    kind = "logit_loss" if name in LOGIT_LOSSES else "feature_loss"
    plain, implied = CompressConfig(), dict(EVERY[name].implied)
    if EVERY[name].pretraining:
        plain = plain.model_copy(update={"path": "amd"})  # `auto` would begin with it twice
    found = make_config(CompressConfig, {kind: name})
    assert {option: getattr(found, option) for option in implied} == implied
    others = found.model_copy(update={kind: getattr(plain, kind)})
    assert others == plain.model_copy(update=implied)
    for option in implied:
        assert getattr(make_config(CompressConfig, {kind: name, option: 0.75}), option) == 0.75


def test_the_authors_of_dist_weigh_it_otherwise_for_masks(tmp_path):
    """By the task, or by what lies in the folder; nobody has to know it."""
    (tmp_path / "masks/images").mkdir(parents=True)
    (tmp_path / "masks/masks").mkdir()
    masks, classes = str(tmp_path / "masks"), str(tmp_path)

    def weight(**more) -> float:
        return make_config(CompressConfig, {"logit_loss": "dist", **more}).logit_weight

    assert weight(data=classes) == weight(data=masks, task="classification") == 2.0
    assert weight(data=masks) == weight(task="segmentation") == 1.0
    assert weight(data=masks, logit_weight=2.0) == 2.0
    words = ["--logit-loss", "dist", "--data"]
    for folder, expected in ((masks, 1.0), (classes, 2.0)):
        config = parse("compress", CompressConfig, [*words, folder])
        assert isinstance(config, CompressConfig)
        assert config.logit_weight == expected


READ = {
    "logits": lambda student, teacher: [student.logits, teacher.logits],
    "features": lambda student, teacher: [student.features, teacher.features],
    "states": lambda student, teacher: [student.states, teacher.states],
    "student_states": lambda student, teacher: [student.states],
    # The teacher has three, the student the last two of such: paired from the end.
    "maps": lambda student, teacher: [student.states, teacher.states[1:]],
    "middle_map": lambda student, teacher: [student.states[1], teacher.states[2]],
    "last_map": lambda student, teacher: [student.states[1], teacher.states[2]],
    "outputs": lambda student, teacher: [student, teacher],
}
GIVEN = {"labels": TARGET.labels, "indices": TARGET.indices, "progress": 0.5, "target": TARGET}


@pytest.mark.parametrize("what", READ)
def test_arguments_are_the_pieces_that_are_read_then_what_is_given(what):
    student, teacher = outputs((MAPS[0][1:], 8), 1), outputs(WIDE_MAPS, 2)
    for given, expected in GIVEN.items():
        found = arguments(LossFacts(reads=(what,), given=(given,)), student, teacher, TARGET)
        wanted = [*READ[what](student, teacher), expected]
        assert len(found) == len(wanted)
        for ours, piece in zip(found, wanted, strict=True):
            if isinstance(piece, list):
                assert all(one is other for one, other in zip(ours, piece, strict=True))
            else:
                assert ours is piece or ours == piece


# --- every loss


@pytest.mark.parametrize("name", EVERY)
def test_a_loss_takes_the_arguments_that_its_record_lays_out(name):
    loss = made(name)
    call = loss.logit if name in LOGIT_LOSSES else loss.feature
    function = call.forward if isinstance(call, nn.Module) else call
    known = dict(call.keywords) if isinstance(call, partial) else {}
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in known]
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    assert len(required) == len(arguments(EVERY[name], outputs(MAPS, 1), outputs(MAPS, 2), TARGET))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(MAPS, MAPS), (TOKENS, TOKENS), (MAPS, WIDE_MAPS), (SWIN_MAPS, TOKENS)],
    ids=["maps", "tokens", "wider maps", "maps of Swin from tokens"],
)
@pytest.mark.parametrize("name", EVERY)
def test_every_loss_is_built_and_runs_forward_and_backward(name, ours, theirs):
    other = ours is not theirs
    if other and name == "fsp":
        with pytest.raises(ConfigError, match="fsp compares states of equal channels"):
            make_distillation(options_of(name), pair_of(ours, theirs, is_other_student=True), seed=0)
        return
    loss = make_distillation(options_of(name), pair_of(ours, theirs, is_other_student=other), seed=0)
    kind = "logit" if name in LOGIT_LOSSES else "feature"
    num_images = IMAGES * EVERY[name].views
    student, teacher = outputs(ours, 3, num_images, learns=True), outputs(theirs, 4, num_images)
    parts = loss(student, teacher, TARGET)
    assert set(parts) == {"loss", "task", kind}
    assert all(torch.isfinite(value) and value.ndim == 0 for value in parts.values())
    expected = 0.5 * parts["task"] + parts[kind]
    torch.testing.assert_close(parts["loss"], expected)
    parts[kind].backward()
    assert 0 < gradients(student) < float("inf")
    assert all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())


def test_states_of_another_architecture_pass_through_projections():
    loss = make_distillation(options_of("states"), pair_of(MAPS, WIDE_MAPS, is_other_student=True), seed=0)
    assert isinstance(loss.feature, ProjectedStates)
    assert not list(made("states").parameters())


@pytest.mark.parametrize("name", EVERY)
def test_without_states_only_losses_that_compare_them_are_left_out(name):
    none = ([], 8)
    kind = "logit" if name in LOGIT_LOSSES else "feature"
    for ours, theirs in ((none, MAPS), (MAPS, none), (none, none)):
        facts = EVERY[name]
        missing = (ours is none and facts.needs_states) or (theirs is none and facts.needs_teacher_states)
        assert (getattr(made(name, ours, theirs), kind) is None) == missing


@pytest.mark.parametrize("name", EVERY)
def test_a_weight_of_0_builds_nothing(name):
    kind = "logit" if name in LOGIT_LOSSES else "feature"
    loss = made(name, **{f"{kind}_weight": 0.0})
    assert loss.logit is None
    assert loss.feature is None
    assert loss.phases == ("main",)
    images = random_images(2)
    assert loss.views(images) is images
    assert not loss.runs_teacher
    assert loss.runs_student


def test_the_same_seed_gives_the_same_parameters_and_leaves_torchs_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = made("review"), made("review")
    assert torch.equal(torch.rand(3), expected)
    states = first.state_dict(), second.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = make_distillation(options_of("review"), pair_of(MAPS, MAPS), seed=1)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize("name", EVERY)
def test_an_argument_that_a_loss_does_not_take_names_those_it_does(name):
    kind = "logit" if name in LOGIT_LOSSES else "feature"
    if name == "states":
        return  # it has an option of its own, --feature-scale
    with pytest.raises(ConfigError, match=f"--{kind}-args nonsense: the loss {name} takes "):
        made(name, **{f"{kind}_args": {"nonsense": 1.0}})


# --- phases


@pytest.mark.parametrize("name", EVERY)
def test_losses_with_a_pretraining_have_two_phases(name):
    assert made(name).phases == (("pretraining", "main") if name in PRETRAINED else ("main",))


@pytest.mark.parametrize("sizes", [MAPS, TOKENS], ids=["maps", "tokens"])
@pytest.mark.parametrize("name", PRETRAINED)
def test_a_pretraining_trains_the_student_or_the_loss_alone(name, sizes):
    loss, trains_student = made(name, sizes, sizes), EVERY[name].pretraining == "student"
    loss.begin("pretraining")
    assert loss.runs_teacher
    assert loss.runs_student == trains_student
    num_images = IMAGES * EVERY[name].views
    student, teacher = (outputs(sizes, seed, num_images, learns=True) for seed in (3, 4))
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    parts = loss(student if trains_student else teacher, teacher, TARGET)
    assert set(parts) == {"loss"}
    assert torch.isfinite(parts["loss"])
    parts["loss"].backward()
    trained = {key for key, p in loss.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert all(loss.get_parameter(key).grad.isfinite().all() for key in trained)
    if trains_student:
        assert gradients(student) > 0
        assert bool(trained) == (name == "ab")  # whose connectors learn with it
    else:
        assert gradients(student) == gradients(teacher) == 0
        assert trained
    assert loss.state_dict().keys() == before.keys()

    loss.begin("main")
    assert loss.runs_student
    student = outputs(sizes, 3, num_images, learns=True)
    parts = loss(student, outputs(sizes, 4, num_images), TARGET)
    assert ("feature" in parts) == (not trains_student)
    assert loss.views(random_images(2)).shape[0] == 2 * EVERY[name].views
    if trains_student:
        assert not list(loss.parameters())  # what learnt with the student's features is through
    else:
        parts["feature"].backward()
        still = {key for key, p in loss.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        # What was pretrained stays as it is from now on.
        for parameter in loss.parameters():
            parameter.grad = None
        loss(student, outputs(sizes, 4, num_images), TARGET)["feature"].backward()
        of_main = {key for key, p in loss.named_parameters() if p.grad is not None}
        assert not of_main & trained
        assert of_main <= still


@pytest.mark.parametrize(("name", "epochs"), [("ab", 2), ("fsp", 2), ("ft", 2), ("sskd", 4), ("kd", None)])
@pytest.mark.parametrize("first_epochs", [None, 3.0])
def test_a_lesson_has_a_course_for_each_phase(tmp_path, name, epochs, first_epochs):
    loss = made(name, first_epochs=first_epochs)
    student = {"weight": nn.Parameter(torch.ones(3, 3))}
    courses = list(courses_of(loss, tmp_path, student))
    main = courses[-1]
    assert (main.name, main.epochs, main.lr) == ("distill", 16, 0.1)
    assert main.checkpoint == tmp_path / "main.safetensors"
    assert main.parameters["weight"] is student["weight"]
    assert len(courses) == (1 if epochs is None else 2)
    for first in courses[:-1]:
        assert (first.name, first.epochs, first.lr) == ("distill: pretraining", first_epochs or epochs, 0.1)
        assert first.checkpoint == tmp_path / "pretraining.safetensors"
        assert ("weight" in first.parameters) == (EVERY[name].pretraining == "student")
        if EVERY[name].pretraining == "loss":
            assert first.parameters.keys() == loss_parameters([loss]).keys()


def courses_of(loss: Distillation, folder: Path, student: dict[str, nn.Parameter], modules=()):
    lesson = Lesson([], [loss], no_autocast())
    return lesson.courses(
        Stage("distill", folder), student, loss.options,
        epochs=16.0, lr=0.1, no_decay=frozenset({"table"}), modules=modules,
    )  # fmt: skip


# --- decay, and what is borrowed


CODE = """
import torch
from torch import nn

class Loss(nn.Module):
    def __init__(self, student, teacher):
        super().__init__()
        self.linear, self.gains = nn.Linear(8, 8), nn.Parameter(torch.ones(2, 2))

    def no_weight_decay(self):
        return {"gains"}

    def forward(self, student, teacher, target):
        return (self.linear(student.features) - teacher.features).square().mean() * self.gains.mean()
"""


@pytest.mark.parametrize("term", ["logit", "feature"])
def test_parameters_of_a_loss_that_are_not_to_decay_do_not(tmp_path, term):
    (tmp_path / "mine.py").write_text(CODE)
    weights = {"logit_weight": 0.0, "feature_weight": 0.0, f"{term}_weight": 1.0}
    options = LossOptions.model_validate({f"{term}_loss": f"{tmp_path}/mine.py:Loss", **weights})
    loss = make_distillation(options, pair_of(MAPS, MAPS), seed=0)
    assert loss.no_weight_decay() == {f"{term}.gains"}
    student = {"table": nn.Parameter(torch.ones(2, 2)), "weight": nn.Parameter(torch.ones(2, 2))}
    (course,) = courses_of(loss, tmp_path, student)
    assert course.no_decay == {"table", f"losses.0.{term}.gains"}
    optimizer = make_optimizer(course.parameters, course.lr, TrainingOptions(), course.no_decay)
    names = {id(parameter): name for name, parameter in course.parameters.items()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, value in decay.items() if value} == {"weight", f"losses.0.{term}.linear.weight"}
    assert decay.keys() == course.parameters.keys()


class Borrowing(nn.Module):
    """Keeps the rest of the teacher, and learns a projection."""

    def __init__(self, teacher: Observed) -> None:
        super().__init__()
        self.rest = teacher.after("blocks.0", random_images(1))
        self.projection = nn.Linear(24, 24)

    def forward(self, student: Output, teacher: Output, target: Target) -> Tensor:
        return (self.rest(self.projection(student.states[0])).logits - teacher.logits).square().mean()


def test_what_a_loss_borrows_is_neither_trained_nor_saved(tmp_path):
    teacher, student = tiny_vit(), tiny_vit(seed=1)
    observed = Observed(teacher.requires_grad_(False), ("blocks.0", "blocks.2"))
    loss = Distillation(LossOptions(feature_loss="mine.py:loss"), None, Borrowing(observed))
    (course,) = courses_of(loss, tmp_path, dict(student.named_parameters()), modules=[student])
    added = {"losses.0.feature.projection.weight", "losses.0.feature.projection.bias"}
    assert course.parameters.keys() == {name for name, _ in student.named_parameters()} | added
    saved = changed_by_training(course.parameters, course.modules)
    assert saved.keys() == course.parameters.keys()
    lent = {id(tensor) for tensor in (*teacher.parameters(), *teacher.buffers())}
    assert not lent & {id(tensor) for tensor in saved.values()}
    assert all(not key.startswith("feature.rest") for key in loss.state_dict())


# --- what it costs


def macs(
    name: str, ours=MAPS, theirs=MAPS, is_other_student: bool = False, phase: str = "main",
    batch_size: int = 2, **more: object,
) -> float:  # fmt: skip
    found = pair_of(ours, theirs, is_other_student=is_other_student)
    return loss_macs(make_distillation(options_of(name, **more), found, seed=0), found, batch_size)[phase]


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "pld", "taid", "states", "at"])
def test_a_loss_without_products_of_matrices_costs_nothing(name):
    assert macs(name) == 0


def test_the_regressor_of_fitnet():
    """A 1 x 1 convolution of the middle map: as much again for the gradient of its weights, and of its input,
    which is the student's and needs one."""
    assert macs("fitnet", MAPS, WIDE_MAPS) == 3 * 6 * 9 * (4 * 4)


def test_projections_of_a_student_of_another_architecture():
    forward = 4 * 6 * 8 * 8 + 6 * 9 * 4 * 4 + 8 * 12 * 2 * 2
    assert macs("states", MAPS, WIDE_MAPS, is_other_student=True) == 3 * forward
    # AB's connectors, where the maps are the same.
    assert macs("ab", MAPS, WIDE_MAPS, phase="pretraining") == 3 * forward
    assert macs("ab", MAPS, WIDE_MAPS) == 0  # and silent afterwards


def test_embeddings_of_crd_and_its_memory():
    """Neither the teacher's features nor the memory need a gradient: 2 forward passes, not 3."""
    embed = {"feature_args": {"embed_dim": 16}}
    linear = 3 * 8 * 16 + 2 * 12 * 16
    banks = 2 * (2 * 16 * MEMORY)  # every embedding with the whole memory of the other model
    assert macs("crd", MAPS, WIDE_MAPS, **embed) == linear + banks


def test_the_paraphraser_of_ft_only_runs_forward():
    def convolutions(first: int, factors: int) -> int:
        return 9 * (first * first + first * factors + factors * factors) * (2 * 2)

    assert macs("ft", MAPS, WIDE_MAPS) == 3 * convolutions(8, 6) + convolutions(12, 6)


def test_the_pretraining_of_ft_is_that_of_an_auto_encoder():
    """The teacher's map needs no gradient: the encoder's first convolution has two passes, not three."""
    encoder, decoder = (9 * 4 * pair for pair in (12 * 12 + 12 * 6 + 6 * 6, 6 * 6 + 6 * 12 + 12 * 12))
    expected = 3 * (encoder + decoder) - 9 * 4 * 12 * 12
    assert macs("ft", MAPS, WIDE_MAPS, phase="pretraining") == expected


def test_what_relates_the_images_of_a_batch_grows_with_it():
    """SP multiplies every image's map with every other's, in both models."""
    small, large = (macs("sp", batch_size=size) for size in (2, 64))
    assert large == 32 * small > 0


def test_views_count_as_images():
    """SSKD's heads see an image and its three rotations."""
    student, teacher = (dim * dim + dim * 16 for dim in (8, 12))
    rows = 3 * 2 * 16  # of each image three rotations, with both upright images of the example
    expected = 4 * (3 * student + teacher) + 3 * rows + rows
    assert macs("sskd", MAPS, WIDE_MAPS, feature_args={"embed_dim": 16}) == expected


def test_a_loss_of_the_users_own_is_counted_too(tmp_path):
    """Also one that does not detach what the teacher says: in a run no gradient flows there."""
    code = CODE.replace("- teacher.features", "- self.linear(teacher.features)")
    (tmp_path / "mine.py").write_text(code)
    found = pair_of(MAPS, MAPS)
    options = LossOptions(logit_weight=0, feature_loss=f"{tmp_path}/mine.py:Loss")
    loss = make_distillation(options, found, seed=0)
    assert loss_macs(loss, found, batch_size=2)["main"] == (3 + 2) * 8 * 8


def test_no_loss_has_a_record_without_a_case_or_a_case_without_a_record():
    source = inspect.getsource(choose)
    for name in ALL:
        assert f'case "{name}":' in source
    cases = {line.split('"')[1] for line in source.splitlines() if line.strip().startswith('case "')}
    assert cases == set(ALL)
