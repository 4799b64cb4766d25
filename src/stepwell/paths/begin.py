"""From options to a setting: load images and teacher, check everything, open the run directory."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from stepwell.config.base import flag_of, height_and_width
from stepwell.config.commands import CompressConfig
from stepwell.config.options import Options
from stepwell.config.own_code import file_digest, is_own_code
from stepwell.data.splits import resolve_data
from stepwell.errors import ConfigError
from stepwell.models.card import digest
from stepwell.models.input import as_asked, for_masks
from stepwell.models.teacher import load_teacher, teacher_from_module
from stepwell.paths import checked_path
from stepwell.paths.path import say_what_is_not_read
from stepwell.paths.probe import probe, with_head
from stepwell.run.distributed import from_main
from stepwell.run.observer import Observer
from stepwell.run.processes import world
from stepwell.run.progress import say
from stepwell.run.run_dir import RunDir
from stepwell.setting.baseline import with_baseline
from stepwell.setting.export_trial import try_export
from stepwell.setting.own_width import check_all_is_trained
from stepwell.setting.prepare import prepare, read_images
from stepwell.setting.setting import Setting
from stepwell.setting.teachers import with_other_teachers


def begin(
    config: CompressConfig,
    module: nn.Module | None = None,
    student: nn.Module | None = None,
    observer: Observer | None = None,
    exports: bool = True,
) -> Setting:
    """Load the images and the teacher, check everything, and begin the run directory or come back to it.

    Args:
        config: All options.
        module: The teacher, where the caller built it.
        student: The student of another architecture, likewise.
        observer: Whoever looks on.
        exports: Whether the run ends with an ONNX file, so that one has to be tried before it begins.
    """
    require(config, "compress", "teacher", "data", "out_dir")
    assert config.out_dir is not None
    path = checked_path(config)
    say_what_is_not_read(config)
    if config.shard_teacher and world() == 1:
        say("--shard-teacher does nothing in a single process: start several, with torchrun")
    data = resolve_data(config)
    if module is not None:
        teacher = teacher_from_module(module, None)
    else:
        teacher = load_teacher(
            config.teacher,
            config.teacher_weights,
            config.model_args,
            0 if config.probe else len(data.classes),
            config.weights_key,
        )
    teacher = with_head(teacher, data, config)
    spec = as_asked(teacher.spec, teacher.model, config, data.white_level)
    if data.task == "segmentation":
        spec = for_masks(spec, data.train, config, has_size=teacher.has_own_size)
    teacher = replace(teacher, spec=spec)
    if config.student_size is not None:
        teacher = teacher.at_size(height_and_width(config.student_size))
        teacher = replace(teacher, notes=(*teacher.notes, *teacher.resized))
    # Every check comes before the folder is made.
    cuts = path.cuts(config)
    s = with_baseline(prepare(config, RunDir(config.out_dir, observer), teacher, data, student, cuts))
    s = with_other_teachers(s)
    check_all_is_trained(s)
    if not from_main((config.out_dir / "result.json").exists):
        read_images(s)
    begun = from_main(lambda: any(s.run.path.glob("stages/[!.]*/result.json")))
    if exports and not begun:
        from_main(lambda: try_export(s))
    RunDir.open(config.out_dir, config)
    s.run.check_identity(_identity(s))
    for note in (note for each in (s, *s.other_teachers) for note in each.teacher.notes):
        say(note)
    return probe(s)


def _identity(s: Setting) -> dict[str, str]:
    """A fingerprint of everything that the options only name."""
    # What images without labels are for, their names do not say.
    task = "" if s.data.task == "classification" else f":{s.data.task}"
    identity = {"teacher": s.teacher.digest, "data": f"{s.data.fingerprint}{task}"}
    if s.other_student is not None:
        identity["student"] = digest(s.other_student.model)
    if s.baseline is not None and s.baseline.other_student is not None:
        identity["baseline"] = digest(s.baseline.other_student.model)
    if s.other_teachers:
        identity["teachers"] = " ".join(other.teacher.digest for other in s.other_teachers)
    for option, loss in (("--logit-loss", s.config.logit_loss), ("--feature-loss", s.config.feature_loss)):
        if is_own_code(loss):
            identity[option] = file_digest(loss)
    return identity


def require(config: Options, command: str, *names: str) -> None:
    """Check that the options without a default were given."""
    for name in names:
        if not getattr(config, name):
            raise ConfigError(f"{command} needs {flag_of(name)}")
