"""Ways from teacher to student; each is one file, made of the same stages."""

from __future__ import annotations

from stepwell.config.commands import CompressConfig
from stepwell.config.path_options import Way
from stepwell.errors import ConfigError
from stepwell.paths import amd, amd_manual, auto, curriculum, dgkd, mmd, mmd_os, scalekd, single_step, takd
from stepwell.paths.path import Path

CONTROL_PATH: Way = "single-step"
"""The path of a control: every comparison of paths is one with it."""
WHOLE_PATH: Way = "scalekd"
"""The same where nothing of the teacher is cut."""


def path_of(name: Way) -> Path:
    """The way that `--path` names."""
    match name:
        case "amd":
            return amd.PATH
        case "amd-manual":
            return amd_manual.PATH
        case "auto":
            return auto.PATH
        case "single-step":
            return single_step.PATH
        case "takd":
            return takd.PATH
        case "dgkd":
            return dgkd.PATH
        case "mmd":
            return mmd.PATH
        case "mmd-os":
            return mmd_os.PATH
        case "scalekd":
            return scalekd.PATH
        case "curriculum":
            return curriculum.PATH


def takes_teachers(name: str) -> bool:
    """Whether a path has several teachers."""
    return name == "curriculum"


def checked_path(options: CompressConfig) -> Path:
    """The way that `--path` names, which takes these options.

    Raises:
        ConfigError: It does not.
    """
    path = path_of(options.path)
    path.check(options)
    if path.is_one_step and options.control != "none":
        dear = options.feature_weight and options.feature_facts.reads_stages
        hint = (
            "; stepwell compare sets the logits alone beside it, for as long as costs the same"
            if dear
            else ""
        )
        raise ConfigError(
            f"--path {options.path} is a single step from the teacher, so it is its own control: leave "
            f"--control {options.control} out{hint}"
        )
    if options.student_size is not None and path.cuts(options):
        raise ConfigError(
            f"--student-size: with --path {options.path} slices of the teacher see the same images as the "
            f"student: leave it out, or take --path scalekd, where the teacher stays whole"
        )
    if options.teachers and not takes_teachers(options.path):
        raise ConfigError(
            f"--teachers teach one after another with --path curriculum, and --path {options.path} has one: "
            f"leave them out, or take that path"
        )
    return path
