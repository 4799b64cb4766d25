"""Before any training: can the student be exported to ONNX? It costs seconds."""

from __future__ import annotations

from torch import nn

from stepwell.errors import ConfigError
from stepwell.measure.budget import DEFAULT_KEEP, no_milliseconds, with_random_weights
from stepwell.models.export import why_not_onnx
from stepwell.pruning.ranking import Balance, uniform_scores, widths_at
from stepwell.pruning.skeleton import build_skeleton
from stepwell.run.progress import progress, say
from stepwell.setting.setting import Setting


def try_export(s: Setting) -> None:
    """Export a student with random weights, throw it away, and say so if there will be no ONNX file.

    The small model is tried, not the teacher: the same layers, at a fraction of the size.

    Raises:
        ConfigError: It cannot be exported, and a budget in milliseconds is measured on ONNX files.
    """
    with progress("try the export", 1) as advance:
        reason = why_not_onnx(_small(s), s.spec)
        advance("")
    if not reason:
        return
    if s.config.latency_ms is not None:
        raise ConfigError(no_milliseconds(reason))
    say(f"no ONNX file will be written, only weights, and times are PyTorch's: {reason}")


def _small(s: Setting) -> nn.Module:
    """A model with about the student's layers; the real widths are not known before the units are scored."""
    if (other := s.fresh_student()) is not None:
        return other
    keep = s.config.keep_ratio or min(s.config.ladder, default=DEFAULT_KEEP)
    balance = Balance(uniform=s.config.uniform)
    widths = widths_at(s.groups, uniform_scores(s.groups), keep, keep, s.config, balance)
    return with_random_weights(build_skeleton(s.model, s.groups, widths))
