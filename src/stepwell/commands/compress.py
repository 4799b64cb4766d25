"""`stepwell compress`: the main job, from a teacher and images to a small model with its proof."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from stepwell.config import CompressConfig, make_config
from stepwell.delivery.archive import Factory, digest, load
from stepwell.delivery.input import with_image_size
from stepwell.delivery.result import Result
from stepwell.delivery.table import result_table
from stepwell.delivery.teacher import Teacher, load_factory, load_teacher, teacher_from_module
from stepwell.errors import ConfigError
from stepwell.handover import hand_over
from stepwell.options import flag_of
from stepwell.own_code import file_digest, is_own_code
from stepwell.paths import descend
from stepwell.setting import Setting, prepare
from stepwell.training.data import Data, resolve_data
from stepwell.training.run_dir import RunDir


@dataclass(frozen=True)
class Compressed:
    """A finished run: `print(result)` shows the table, `result.student` is the small model.

    Attributes:
        result: Everything that `result.json` holds.
        out_dir: The run directory.
        factory: Builds the student at full width, for models that timm cannot build by name.
    """

    result: Result
    out_dir: Path
    factory: Factory | None = None

    @cached_property
    def student(self) -> nn.Module:
        """The handed-out student, a plain module in eval mode, on the CPU."""
        return load(self.out_dir / "student", factory=self.factory)

    def __str__(self) -> str:
        files = "model.safetensors, stepwell.json, model.onnx"
        return (
            f"{result_table(self.result)}\n\n"
            f"student: {self.out_dir / 'student'} ({files})\n"
            f"report:  {self.out_dir / 'report.html'}"
        )


def compress(
    teacher: nn.Module | str | Path,
    data: str | Path,
    *,
    keep_ratio: float | None = None,
    out_dir: str | Path,
    student: nn.Module | str | None = None,
    **options: object,
) -> Compressed:
    """Compress `teacher` to a budget, in automatic distillation steps.

    Started again with the same arguments, it goes on after the last checkpoint.

    Args:
        teacher: A supported module with trained weights, or what `--teacher` takes: a timm name, a finished
            run, FILE.py:FACTORY.
        data: Image folder, or a data set of timm.
        keep_ratio: Fraction of the units that the student keeps, in (0, 1); 0.1 if no other budget is given
            (`macs="1.8G"`, `params="10%"`, `latency_ms=5`).
        out_dir: The run directory.
        student: A model of another architecture that the assistant teaches, instead of the smallest
            candidate: a timm name, FILE.py:FACTORY, or a module.
        **options: Any other field of `stepwell.config.CompressConfig`, such as `epochs=60`.

    Raises:
        StepwellError: Anything that the caller can mend, in one line.
    """
    values = {
        "teacher": _name(teacher),
        "data": str(data),
        "keep_ratio": keep_ratio,
        "out_dir": Path(out_dir),
        "student": None if student is None else _name(student),
        **options,
    }
    config = make_config(CompressConfig, values)
    modules = (model if isinstance(model, nn.Module) else None for model in (teacher, student))
    return run(config, *modules)


def _name(model: nn.Module | str | Path) -> str:
    return f"a {type(model).__name__}" if isinstance(model, nn.Module) else str(model)


def run(
    config: CompressConfig, module: nn.Module | None = None, student: nn.Module | None = None
) -> Compressed:
    """What `compress()` and the command line share.

    Args:
        config: All options.
        module: The teacher, where the caller built it.
        student: The student of another architecture, likewise.
    """
    require(config, "compress", "teacher", "data", "out_dir")
    assert config.out_dir is not None
    setting = open_run(config, module, student)
    result = hand_over(setting, descend(setting))
    if config.student is not None:
        return Compressed(result, config.out_dir, _factory(config.student, student))
    return Compressed(result, config.out_dir, _factory(config.teacher, module))


def open_run(
    config: CompressConfig, module: nn.Module | None = None, student: nn.Module | None = None
) -> Setting:
    """Load the images and the teacher, check everything, and begin the run directory or come back to it."""
    data = resolve_data(config)
    if module is not None:
        teacher = teacher_from_module(module, data.classes or None)
    else:
        teacher = load_teacher(config.teacher, config.teacher_weights, config.model_args, len(data.classes))
    spec = with_image_size(teacher.spec, teacher.model, config.image_size)
    teacher = replace(teacher, spec=spec)
    return _setting(config, teacher, data, student)


def _factory(source: str, module: nn.Module | None) -> Factory | None:
    """What builds a model again, where timm cannot do it by name."""
    if module is not None:
        return lambda: copy.deepcopy(module).cpu()
    return load_factory(source) if ".py:" in source else None


def _setting(config: CompressConfig, teacher: Teacher, data: Data, student: nn.Module | None) -> Setting:
    assert config.out_dir is not None
    # Every check comes before the folder is made.
    setting = prepare(config, RunDir(config.out_dir), teacher, data, student)
    if not (config.out_dir / "result.json").exists():
        setting.read_images()
    RunDir.open(config.out_dir, config)
    identity = {"teacher": teacher.digest, "data": data.fingerprint}
    if setting.foreign is not None:
        identity["student"] = digest(setting.foreign.model)
    for option, loss in (("--logit-loss", config.logit_loss), ("--feature-loss", config.feature_loss)):
        if is_own_code(loss):
            identity[option] = file_digest(loss)
    setting.run.check_identity(identity)
    return setting


def require(config: CompressConfig, command: str, *names: str) -> None:
    """Check that the options without a default were given."""
    for name in names:
        if not getattr(config, name):
            raise ConfigError(f"{command} needs {flag_of(name)}")
