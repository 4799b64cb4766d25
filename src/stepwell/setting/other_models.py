"""Models of another architecture as `doctor` looks at them: built without a download, and told of."""

from __future__ import annotations

from torch import nn

from stepwell.config.commands import CompressConfig
from stepwell.config.options import TaskName
from stepwell.data.spec import InputSpec
from stepwell.measure.size import count_macs, num_params, short_number
from stepwell.models.input import check_runs
from stepwell.models.student import OtherStudent, build_student
from stepwell.setting.baseline import build_baseline


def other_student(
    config: CompressConfig, teacher: nn.Module, spec: InputSpec, task: TaskName = "classification"
) -> OtherStudent | None:
    """The student of another architecture, if one is asked for."""
    if config.student is None:
        return None
    options = config.model_copy(update={"student_pretrained": False})  # nothing is downloaded
    return build_student(options, _num_classes(config, teacher, spec, task), spec, config.seed, task=task)


def baseline_network(
    config: CompressConfig, teacher: nn.Module, spec: InputSpec, task: TaskName = "classification"
) -> OtherStudent | None:
    """The stock network, likewise."""
    if config.baseline is None:
        return None
    options = config.model_copy(update={"baseline_pretrained": False})
    return build_baseline(options, config.baseline, _num_classes(config, teacher, spec, task), spec, task)


def _num_classes(config: CompressConfig, teacher: nn.Module, spec: InputSpec, task: TaskName) -> int:
    # A model of timm by name has no weights here, and cannot run; it says how many classes it has.
    classes = getattr(teacher, "num_classes", None)
    if classes is not None:
        return classes
    return check_runs(teacher, spec, config.teacher, "--image-size", dense=task == "segmentation")


def size_line(role: str, other: OtherStudent | None, teacher: nn.Module, spec: InputSpec) -> list[str]:
    """A line on its size; none where there is no such model."""
    if other is None:
        return []
    params, macs = num_params(other.model), count_macs(other.model, spec)
    return [
        f"{role}: {other.name}, {short_number(params)} parameters "
        f"({100 * params / num_params(teacher):.1f} %), {short_number(macs)} MACs "
        f"({100 * macs / count_macs(teacher, spec):.1f} %)",
    ]
