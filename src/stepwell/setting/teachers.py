"""Several teachers of one student: the others are loaded, understood and tried as the last one is.

All see the images of the last teacher, each brought to its own size and normalisation on the way in, and all
return its classes in its order. What the student is taught by each of the others is as for a student of
another architecture, also where it is a slice of the last.
"""

from __future__ import annotations

from dataclasses import replace

from stepwell.data.class_names import in_order_of
from stepwell.errors import ConfigError, DataError
from stepwell.measure.budget import with_random_weights
from stepwell.models.converted import return_in_order, take_images_of
from stepwell.models.input import check_runs
from stepwell.models.student import OtherStudent
from stepwell.models.teacher import Teacher, load_teacher
from stepwell.pruning.skeleton import build_skeleton
from stepwell.setting.channels import halved
from stepwell.setting.classes import NUMBERED, settle
from stepwell.setting.other_models import check_same_classes
from stepwell.setting.placed import placed, whole_on
from stepwell.setting.prepare import known_groups, with_loss_tried
from stepwell.setting.setting import Setting


def with_other_teachers(s: Setting) -> Setting:
    """The setting, which knows each of `--teachers`, tried with the run's images, student and losses.

    Raises:
        ModelError, DataError: One cannot be loaded, or is for other classes or images.
        ConfigError: Two are the same, or the losses do not go with one of them.
    """
    if not s.config.teachers:
        return s
    if s.data.task == "features":
        raise ConfigError(
            f"--path {s.config.path}: {s.teacher.name} returns an embedding, and those of several teachers "
            f"have nothing in common: give the teachers classes first (stepwell train --probe), or take one"
        )
    if s.data.task == "segmentation":
        raise ConfigError(
            f"--path {s.config.path} is for classes of images, and not yet for masks: take one teacher"
        )
    others = [_understood(s, name) for name in s.config.teachers]
    known: dict[str, str] = {s.teacher.digest: f"--teacher {s.teacher.name}"}
    for teacher in others:
        if (same := known.setdefault(teacher.digest, teacher.name)) != teacher.name:
            raise ConfigError(f"--teachers: {teacher.name} and {same} have the same weights: leave one out")
    return replace(s, other_teachers=tuple(_under(s, teacher) for teacher in others))


def _understood(s: Setting, name: str) -> Teacher:
    """A teacher that takes the images of the last one and returns the same classes."""
    num_classes = len(s.classes)
    teacher = load_teacher(name, None, {}, num_classes)
    own = teacher.spec.for_images(s.data.white_level)
    if own.channels != s.spec.channels:
        raise DataError(
            f"--teachers: {name} reads {own.channels} channel{'s' * (own.channels > 1)}, and "
            f"{s.teacher.name} reads {s.spec.channels}: all must read the same images"
        )
    # What says the order of the last one's classes says nothing of one that has names of its own.
    options = s.config.model_copy(update={"class_order": None}) if teacher.classes else s.config
    teacher, data = settle(replace(teacher, spec=own), s.data, options, whole_on(s.config, s.device))
    num_outputs = check_runs(teacher.model, own, name, "--teachers")
    check_same_classes(name, num_outputs, s.teacher.name, num_classes)
    is_ours = teacher.trained_on == data.fingerprint
    return_in_order(teacher.model, _names(s, teacher, data.classes), s.classes)
    take_images_of(teacher.model, s.spec, own)
    notes = tuple(note for note in teacher.notes if not note.startswith(NUMBERED))
    if data.classes != s.classes:
        notes = (*notes, f"{teacher.name}: its outputs are put into the order of {s.teacher.name}'s classes")
    trained_on = s.data.fingerprint if is_ours else None
    found = replace(teacher, spec=s.spec, own_spec=own, trained_on=trained_on, classes=s.classes, notes=notes)
    return placed(found, s.config, s.device)


def _names(s: Setting, teacher: Teacher, ordered: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the last teacher's classes, in the order of this one's."""
    if s.data.labelled:
        return ordered
    if teacher.classes is None or s.teacher.classes is None:
        return s.classes  # of the same number, and nothing says more
    return in_order_of(teacher.classes, s.classes, teacher.name, s.teacher.name)


def _under(s: Setting, teacher: Teacher) -> Setting:
    student = s.other_student
    if student is None:
        # A slice has the blocks of the last teacher; how wide it will be is not known yet.
        half = build_skeleton(s.model, s.groups, halved(s.groups).widths)
        model = with_random_weights(half).to(s.device)
        student = OtherStudent(model, s.teacher.architecture, s.blocks, "the student")
    taught = replace(
        s,
        teacher=teacher,
        groups=known_groups(teacher.model),
        other_student=student,
        slice_loss_macs=None,
        baseline=None,
        unit_macs=s.teacher_macs,
    )
    try:
        return with_loss_tried(taught, is_other=True)
    except ConfigError as error:
        raise ConfigError(f"--teachers: {teacher.name}: {error}") from None
