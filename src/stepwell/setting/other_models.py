"""Models of another architecture as `doctor` looks at them: built without a download, and told of."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from stepwell.config.commands import CompressConfig
from stepwell.config.options import TaskName
from stepwell.config.own_code import is_own_code
from stepwell.data.spec import InputSpec
from stepwell.errors import DataError
from stepwell.losses.scalekd.stages import warn_of_class_token
from stepwell.measure.size import count_macs, num_params, short_number
from stepwell.models.card import Architecture
from stepwell.models.input import check_runs, input_spec
from stepwell.models.student import OtherStudent, build_student
from stepwell.models.teacher import Teacher, load_teacher
from stepwell.models.timm_folder import LOCAL
from stepwell.models.timm_models import create_without_memory
from stepwell.setting.agreed_task import teacher_task
from stepwell.setting.baseline import build_baseline


def embeds(teacher: Teacher, config: CompressConfig) -> bool:
    """Whether the run would be about an embedding; a model without weights says so by having no classes."""
    if not teacher.digest and config.task == "auto":
        return getattr(teacher.model, "num_classes", None) == 0
    return teacher_task(teacher, config) == "features"


def other_student(
    config: CompressConfig, teacher: nn.Module, spec: InputSpec, task: TaskName = "classification"
) -> OtherStudent | None:
    """The student of another architecture, if one is asked for.

    Args:
        config: All options.
        teacher: It may have no weights.
        spec: The images that it takes.
        task: What both are for.
    """
    if config.student is None:
        return None
    options = config.model_copy(update={"student_pretrained": False})  # nothing is downloaded
    has_own_width = task == "features" and not config.logit_weight
    wanted = None if has_own_width else _num_classes(config, teacher, spec, task)
    built = build_student(options, wanted, spec, config.seed, task=task)
    warn_of_class_token(built.model, built.name, config)
    return built


def baseline_network(
    config: CompressConfig, teacher: nn.Module, spec: InputSpec, task: TaskName = "classification"
) -> OtherStudent | None:
    """The stock network, likewise."""
    if config.baseline is None:
        return None
    options = config.model_copy(update={"baseline_pretrained": False})
    return build_baseline(options, config.baseline, _num_classes(config, teacher, spec, task), spec, task)


def _num_classes(config: CompressConfig, teacher: nn.Module, spec: InputSpec, task: TaskName) -> int:
    # A model of timm by name has no weights here; it says how many classes it has, or that it has none.
    classes = getattr(teacher, "num_classes", None)
    return classes or check_runs(teacher, spec, config.teacher, "--image-size", dense=task == "segmentation")


def other_teachers(config: CompressConfig, teacher: nn.Module, spec: InputSpec) -> list[Teacher]:
    """The teachers besides the last; what is here is loaded, models of timm by name have no weights.

    Raises:
        DataError: One has another number of classes than the last.
    """
    if not config.teachers:
        return []
    num_classes, found = _num_classes(config, teacher, spec, "classification"), []
    for name in config.teachers:
        if is_own_code(name) or name.startswith(LOCAL) or Path(name).exists():
            other = load_teacher(name, None, {}, num_classes)
            classes = check_runs(other.model, other.spec, name, "--teachers")
        else:
            model = create_without_memory(name, {}).eval()
            architecture = Architecture(source="timm", name=name)
            other = Teacher(model, architecture, input_spec(model), None, {}, name, digest="")
            classes = getattr(model, "num_classes", num_classes)
        check_same_classes(name, classes, config.teacher, num_classes)
        found.append(other)
    return found


def check_same_classes(name: str, classes: int, last: str, num_classes: int) -> None:
    """Check that a teacher has as many classes as the last one.

    Raises:
        DataError: It has not.
    """
    if classes != num_classes:
        raise DataError(
            f"--teachers: {name} has {classes} classes, and {last} has {num_classes}: train it on the same "
            f"ones first (stepwell train --model ...)"
        )


def size_line(
    role: str, other: OtherStudent | Teacher | None, teacher: nn.Module, spec: InputSpec
) -> list[str]:
    """A line on its size, beside the teacher's; none where there is no such model. Another teacher has images
    of its own size, a student has those of the teacher."""
    if other is None:
        return []
    own = other.spec if isinstance(other, Teacher) else spec
    params, macs = num_params(other.model), count_macs(other.model, own)
    return [
        f"{role}: {other.name}, {short_number(params)} parameters "
        f"({100 * params / num_params(teacher):.1f} %), {short_number(macs)} MACs "
        f"({100 * macs / count_macs(teacher, spec):.1f} %)",
    ]
