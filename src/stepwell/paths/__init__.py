"""Ways from teacher to student; each is one file, made of the same stages."""

from __future__ import annotations

from stepwell.config.path_options import Way
from stepwell.paths import amd, amd_manual, auto, dgkd, mmd, mmd_os, scalekd, single_step, takd
from stepwell.paths.path import Path

CONTROL_PATH: Way = "single-step"
"""The path of a control: every comparison of paths is one with it."""


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
