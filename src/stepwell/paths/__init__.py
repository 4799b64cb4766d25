"""Ways from teacher to student; each is one file, made of the same stages."""

from __future__ import annotations

from stepwell.descent import Finished
from stepwell.paths import amd, dgkd, mmd, single_step, takd
from stepwell.setting import Setting


def descend(s: Setting) -> Finished:
    """Go the way that `--path` names."""
    match s.config.path:
        case "amd" | "amd-manual":
            return amd.descend(s)
        case "single-step":
            return single_step.descend(s)
        case "takd":
            return takd.descend(s)
        case "dgkd":
            return dgkd.descend(s)
        case "mmd" | "mmd-os":
            return mmd.descend(s)
