"""`stepwell compress`: the main job, from a teacher and images to a small model with its proof."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.config.own_code import is_own_code
from stepwell.errors import ConfigError
from stepwell.models import own_module
from stepwell.models.card import load
from stepwell.models.factory import Factory, load_factory
from stepwell.paths import path_of
from stepwell.paths.baseline import train_baseline
from stepwell.paths.begin import begin
from stepwell.report.result import Result
from stepwell.report.table import result_table
from stepwell.run.observer import Observer
from stepwell.setting.answers import forget_answers
from stepwell.setting.finished import Finished
from stepwell.setting.setting import Setting
from stepwell.stages.deliver import deliver, finished_before


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
        files = "model.safetensors, stepwell.json" + ("" if self.result.not_exported else ", model.onnx")
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

    Started again with the same arguments, it resumes after the last checkpoint.

    Args:
        teacher: A supported module with trained weights, or what `--teacher` takes: a timm name, a finished
            run, FILE.py:FACTORY.
        data: Image folder, or a data set of timm.
        keep_ratio: Fraction of the units that the student keeps, in (0, 1); 0.1 if no other budget is given
            (`macs="1.8G"`, `params="10%"`, `latency_ms=5`).
        out_dir: The run directory.
        student: A model of another architecture that the assistant teaches, instead of the smallest
            candidate: a timm name, FILE.py:FACTORY, or a module.
        **options: Any other field of `stepwell.config.commands.CompressConfig`, such as `epochs=60`.

    Raises:
        StepwellError: Anything that the caller can mend, in one line.
    """
    if not isinstance(data, (str, os.PathLike)):
        raise ConfigError(f"data is a {type(data).__name__}: pass a folder, or a data set's name")
    values = {
        "teacher": _name(teacher, "teacher"),
        "data": str(data),
        "keep_ratio": keep_ratio,
        "out_dir": Path(out_dir),
        "student": None if student is None else _name(student, "student"),
        **options,
    }
    config = make_config(CompressConfig, values)
    teacher_module, student_module = (m if isinstance(m, nn.Module) else None for m in (teacher, student))
    s = begin(config, teacher_module, student_module)
    result = finished_before(s) or path_of(config.path).descend(s, _deliver)
    return _compressed(config, result, teacher_module, student_module)


def run(config: CompressConfig, observer: Observer | None = None) -> Compressed:
    """`compress` for the command line, where models are named.

    Args:
        config: All options.
        observer: Whoever looks on.
    """
    s = begin(config, observer=observer)
    result = finished_before(s) or path_of(config.path).descend(s, _deliver)
    return _compressed(config, result)


def _deliver(s: Setting, finished: Finished) -> Result:
    finished = train_baseline(s, finished)
    forget_answers(s.run)
    return deliver(s, finished)


def _compressed(
    config: CompressConfig, result: Result, teacher: nn.Module | None = None, student: nn.Module | None = None
) -> Compressed:
    assert config.out_dir is not None
    source, module = (config.teacher, teacher) if config.student is None else (config.student, student)
    factory = load_factory(source) if is_own_code(source) else None
    return Compressed(
        result, config.out_dir, factory if module is None else lambda: own_module.copied(module)
    )


def _name(model: object, option: str) -> str:
    """What a model is called in the config; what is no model is refused before it is taken for a name."""
    if isinstance(model, nn.Module):
        return f"a {type(model).__name__}"
    if isinstance(model, (str, os.PathLike)):
        return str(model)
    if isinstance(model, Mapping):
        found = "a dictionary (a state_dict?): pass the module, not its state_dict()"
    elif isinstance(model, type):
        found = f"the class {model.__name__}: pass the module, not its class"
    else:
        found = f"a {type(model).__name__}: pass a module, a name of timm, a folder or FILE.py:FACTORY"
    raise ConfigError(f"{option} is {found}")
