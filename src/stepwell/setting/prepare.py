"""The checks before a run: teacher, images, student and options must agree, and something must be learnt."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.config.commands import CompressConfig
from stepwell.config.options import DataOptions, TaskName
from stepwell.data.batches import EvalBatches, images_per_process
from stepwell.data.feed import decoded
from stepwell.data.spec import InputSpec
from stepwell.data.splits import Data
from stepwell.errors import ConfigError, UnsupportedModelError
from stepwell.losses.choose import Pair
from stepwell.losses.distillation import loss_macs, make_distillation
from stepwell.losses.kept import Kept
from stepwell.losses.observe import Observed
from stepwell.losses.scalekd.stages import warn_of_class_token
from stepwell.measure.budget import with_random_weights
from stepwell.models.card import example_images
from stepwell.models.input import check_runs, check_trains, too_few
from stepwell.models.student import OtherStudent, build_student
from stepwell.models.teacher import Teacher, placeholders
from stepwell.pruning import generic
from stepwell.pruning.coupled import concatenations
from stepwell.pruning.families import find_groups
from stepwell.pruning.generic import propose
from stepwell.pruning.parts import take_apart
from stepwell.pruning.prove import proven
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Group
from stepwell.run.device import find_device, set_up_torch
from stepwell.run.progress import say
from stepwell.run.run_dir import RunDir
from stepwell.setting.agreed_task import teacher_task
from stepwell.setting.channels import check_cut, halved, with_channels
from stepwell.setting.classes import settle
from stepwell.setting.placed import placed, whole_on
from stepwell.setting.rungs import kept_channels
from stepwell.setting.setting import Setting
from stepwell.setting.suits_task import check_no_labels_needed, check_suits_task
from stepwell.setting.training_mode import check_training_mode, trainable_groups

CPU = torch.device("cpu")
_TOLD = 8  # layers that stay whole; there may be a hundred


def prepare(
    config: CompressConfig,
    run: RunDir,
    teacher: Teacher,
    data: Data,
    student: nn.Module | None = None,
    cuts: bool = True,
) -> Setting:
    """Check that teacher, data and options agree, and put them together.

    Args:
        config: All options.
        run: Where the run is kept.
        teacher: What is compressed; its model is moved to the device of the run.
        data: The images.
        student: The module that `config.student` stands for, where the caller built it.
        cuts: Whether slices of the teacher are made; if not, any teacher will do.

    Raises:
        UnsupportedModelError: No family can cut the teacher, and it is to be cut.
        DataError: The classes of teacher and data differ; see `settle`.
        ConfigError: There is no such device; or no labels, but a loss that needs them; or no filters, but a
            score that is for them.
    """
    if not data.labelled and teacher_task(teacher, config) != "features":
        check_no_labels_needed(config, data.source)
    # A classifier that is still to be trained has the order of the images' classes.
    options = config.model_copy(update={"class_order": None}) if config.probe else config
    teacher, data = settle(teacher, data, options, whole_on(config, find_device(config.device)))
    check_suits_task(config, data)
    teacher.model.cpu()
    dense = data.task == "segmentation"
    num_classes = check_runs(teacher.model, teacher.spec, teacher.name, "--image-size", dense=dense)
    other_student = _other_student(config, teacher, num_classes, student, data.task)
    batch_size = images_per_process(config, len(data.train), config.mixes)
    if cuts:
        check_trains(teacher.model, teacher.spec, teacher.name, batch_size)  # its slices will be trained
    if other_student is not None:
        check_trains(other_student.model, teacher.spec, f"--student {other_student.name}", batch_size)
    # Last of the checks, since cuts are tried.
    if cuts and dense:
        teacher = with_parts(teacher)
    if cuts:
        groups = groups_of(teacher.model, teacher.spec, teacher.is_own_module or dense, data, config)
    else:
        groups = known_groups(teacher.model)
    if cuts and config.cuts_channels:
        groups = with_channels(teacher.model, groups, proof_images(data, teacher.spec, config))
    if cuts:
        check_cut(teacher, groups, config)
    if cuts and config.importance == "l1" and not any(group.kind == "filter" for group in groups):
        name = type(teacher.model).__name__
        raise ConfigError(f"--importance l1 is for convolution filters, and this {name} has none to cut")
    return put_together(config, run, teacher, groups, other_student, data, num_classes, cuts)


def put_together(
    config: CompressConfig,
    run: RunDir,
    teacher: Teacher,
    groups: list[Group],
    other_student: OtherStudent | None,
    data: Data,
    num_classes: int,
    cuts: bool,
) -> Setting:
    """The setting of what was found to agree, moved to the device of the run; its losses are tried.

    Raises:
        ConfigError: There is no such device, or nothing is to be learnt.
    """
    device = set_up_torch(config)
    teacher = placed(teacher, config, device)
    names = data.classes or teacher.classes or tuple(placeholders(num_classes))
    names = () if data.task == "features" else names
    s = Setting(config, run, teacher, groups, other_student, data, names, device)
    _check_something_to_learn(s)
    s = _with_training_mode(s, cuts)
    if other_student is not None and s.has_own_width:
        width = check_runs(other_student.model, s.spec, f"--student {other_student.name}", "--student-args")
        fitted_on = min(config.score_images, len(data.train))
        s = s.with_note(
            f"the student is a backbone that returns {width} numbers of its own: its cosine is that of the "
            f"best linear map of them, fitted on {fitted_on:,} training images, which is in no file"
        )
    if other_student is not None and cuts:
        sliced = with_loss_tried(s, is_other=False)
        s = replace(sliced, slice_loss_macs=sliced.loss_macs)
    return with_loss_tried(s, is_other=other_student is not None)


def _with_training_mode(s: Setting, cuts: bool) -> Setting:
    """What will be trained is tried in training mode; the setting, with a note if it is random there."""
    facts = s.config.feature_facts if s.config.feature_weight else None
    note = ""
    if cuts:
        note = check_training_mode(s.model, s.blocks, s.spec, s.teacher.name, facts, cut=True)
    if (other := s.other_student) is not None:
        blocks = s.compared(True)[0]
        check_training_mode(other.model, blocks, s.spec, f"--student {other.name}", facts, cut=False)
    return replace(s, teacher=replace(s.teacher, notes=(*s.teacher.notes, note))) if note else s


def read_images(s: Setting) -> None:
    """Decode what will be held in memory, so that a bad image is found before anything is begun."""
    _ = s.train
    for images in (s.data.selection, s.data.test):
        decoded(images, s.spec, s.config)


def _other_student(
    config: CompressConfig, teacher: Teacher, num_classes: int, student: nn.Module | None, task: TaskName
) -> OtherStudent | None:
    if config.student is None:
        return None
    spec, model = teacher.spec, teacher.model
    wanted = None if task == "features" and not config.logit_weight else num_classes
    if wanted is None and "num_classes" in config.student_args:
        raise ConfigError(
            "--logit-weight 0 makes the student a backbone, whose last layer nothing would train: leave out "
            "--student-args num_classes"
        )
    built = build_student(config, wanted, spec, config.seed, student, model, task=task)
    warn_of_class_token(built.model, built.name, config)
    return built


def _check_something_to_learn(s: Setting) -> None:
    """An impossible layer, or nothing to learn from, is an error now, not after scoring."""
    other, config = s.other_student, s.config
    if config.feature_weight and config.feature_facts.reads_stages:
        if other is None:
            raise ConfigError(
                f"--feature-loss {config.feature_loss} is for a student of another architecture: name it "
                f"with --student"
            )
        return
    ours, theirs = s.compared(other is not None)
    nothing = s.teacher.name if not theirs else other.name if other and not ours else None
    if nothing and config.feature_facts.needs_states and not config.task_weight and not config.logit_weight:
        raise ConfigError(
            f"{nothing} has no hidden states that can be compared, so --feature-weight alone teaches "
            f"nothing: leave --task-weight or --logit-weight above 0"
        )


def with_loss_tried(s: Setting, *, is_other: bool) -> Setting:
    """Make the loss of the student, or that between slices, and run it once: arguments that it does not take,
    or states that it cannot compare, show now. The setting then knows what the loss computes by itself, and
    what is left out of it is among its notes."""
    ours, theirs = s.compared(is_other)
    teacher = Observed(s.teacher.answering, theirs)
    images = torch.zeros(2, s.spec.channels, *s.spec.size, device=s.device)
    with torch.no_grad():
        answer = example = teacher(images)
        kept: list[Kept | None] = []
        if is_other and (model := s.fresh_student()) is not None:
            example = Observed(model, ours)(images)
        elif not is_other and s.config.cuts_channels:  # states have other shapes then
            half = halved(s.groups)
            small = with_random_weights(build_skeleton(s.model, s.groups, half.widths)).to(s.device)
            example = Observed(small.eval(), ours)(images)
            kept = kept_channels(s, half, {g.name: range(g.num_units) for g in s.groups})
    pair = Pair(example, answer, teacher, images, s.training_images, is_other, s.data.task, s.stages, kept)
    loss = make_distillation(s.config, pair, s.config.seed)
    loss.views(images)
    name = f"--feature-loss {s.config.feature_loss}"
    notes = [f"{name}: {note}" for note in getattr(loss.feature, "notes", ())]
    if s.config.feature_weight and loss.feature is None:
        notes = [f"{name} is left out: there are no hidden states to compare"]
    for note in notes:
        if note not in s.teacher.notes:  # of slices it has been told
            s = s.with_note(note)
    try:
        return replace(s, loss_macs=loss_macs(loss, pair, min(s.config.batch_size, len(s.data.train))))
    except ValueError as error:
        if not too_few(error):
            raise
        raise ConfigError(
            f"--batch-size 1: {name} has a BatchNorm that sees maps of 1 x 1 "
            f"of one image, which have no variance; give --batch-size 2 or more"
        ) from None


def with_parts(teacher: Teacher) -> Teacher:
    """A teacher whose convolutions of concatenations are taken apart, where a part could be cut; it computes
    the same."""
    if not generic.installed() or next(teacher.model.parameters()).is_meta:
        return teacher
    model, images = teacher.model, example_images(teacher.spec)
    blocks = {group.block for group in known_groups(model)}
    try:
        found = concatenations(model, images, sorted(blocks))
    except Exception:  # whatever the tracer stumbles over; where groups are looked for, that is said
        return teacher
    take_apart(model, found)
    parts = {**teacher.architecture.parts, **found}
    return replace(teacher, architecture=teacher.architecture.model_copy(update={"parts": parts}))


def known_groups(model: nn.Module) -> list[Group]:
    """What the families know in a model that is not cut: its blocks are told by it."""
    with suppress(UnsupportedModelError):
        return find_groups(model)
    return []


def groups_of(
    model: nn.Module, spec: InputSpec, is_own_module: bool, data: Data | None, options: DataOptions
) -> list[Group]:
    """What may be cut: in a model of a library what the families know, if they do; else what is proved.

    Args:
        model: The teacher, in eval mode.
        spec: The images that it takes.
        is_own_module: Whether it is a module of the user's own, or one that families know in part.
        data: Where the images come from that a cut is proved on.
        options: How they are read.

    Raises:
        UnsupportedModelError: Nothing can be cut.
    """
    if not is_own_module:
        with suppress(UnsupportedModelError):
            return find_groups(model)
    return proven_groups(model, spec, proof_images(data, spec, options))


def proof_images(
    data: Data | None, spec: InputSpec, options: DataOptions
) -> Float[Tensor, "batch channels height width"]:
    """A few images to prove a cut on: the first selection images, normalised, on the CPU; random ones where
    there are no data."""
    if data is None:
        return example_images(spec, 4)
    few = data.selection.subset(range(min(8, len(data.selection))))
    return next(iter(EvalBatches(few, spec, options, CPU))).images


def _check_steady(model: nn.Module, images: Float[Tensor, "batch channels height width"]) -> None:
    with torch.no_grad():
        one, other = model(images), model(images)
    if (one - other).abs().max() > 1e-4 * one.abs().max():  # more than rounding
        raise UnsupportedModelError(
            f"{type(model).__name__} answers the same images differently each time in eval mode, so nothing "
            f"can be proved or measured: is there a random number in its forward pass, or an F.dropout "
            f"without training=self.training?"
        )


def proven_groups(
    model: nn.Module, spec: InputSpec, images: Float[Tensor, "batch channels height width"]
) -> list[Group]:
    """The groups that are proved to be cut rightly, whoever made the model; says what stays whole.

    Args:
        model: The module, in eval mode.
        spec: The images that it takes.
        images: A few real images, to prove it on.

    Raises:
        UnsupportedModelError: Nothing can be cut.
    """
    _check_steady(model, images)
    proposal = propose(model, example_images(spec))
    groups = proposal.groups
    # If the two kinds do not go together, what the families know is the surer one.
    good = proven(model, groups, images) or proven(model, proposal.known, images)
    refused = [group.name for group in groups if group not in good]
    if not good:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not supported: none of the {len(refused)} layers that look familiar "
            f"can be cut; in each, cutting differs from masking its units ({refused[0]}, ...)"
        )
    good, proved = trainable_groups(model, good, images), good
    if not good:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not supported: with fewer units in any of its layers it does not run "
            f"in training mode"
        )
    read = [group.name for group in proved if group not in good]
    whole = dict.fromkeys(refused, "cutting it is not the same as masking its units")
    whole |= dict.fromkeys(read, "in training mode something else reads it") | proposal.whole
    for name, reason in list(whole.items())[:_TOLD]:
        say(f"stays whole: {name} ({reason})")
    if len(whole) > _TOLD:
        say(f"stays whole: {len(whole) - _TOLD} more layers")
    return good
