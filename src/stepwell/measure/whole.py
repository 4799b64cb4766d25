"""What stays whole in a candidate: why it may keep far more of the operations than of the units."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial

from torch import nn

from stepwell.config.commands import CompressConfig
from stepwell.config.options import TaskOptions
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError
from stepwell.measure.budget import budget_and_cost
from stepwell.measure.meet import meet
from stepwell.measure.size import count_macs, macs_by_module, num_params
from stepwell.pruning.channels import channel_groups
from stepwell.pruning.ranking import uniform_scores, widths_at
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Candidate, Group

FAR_MORE = 2.0
"""A share of operations that is this many times the share of units is worth a word."""


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a name: `blocks.0`, not `conv1`


def little_saved(
    budget: TaskOptions,
    spec: InputSpec,
    groups: Sequence[Group],
    student: Candidate,
    skeleton: nn.Module,
    scale: float,
) -> str | None:
    """One line where the student keeps far more of the operations than of the units, else None.

    Args:
        budget: What was asked for; where it is not a share of the units, there is nothing to be told.
        spec: The images that it takes.
        groups: What may be cut in it.
        student: The smallest candidate.
        skeleton: Its skeleton.
        scale: Its share of the teacher's operations.
    """
    if _is_counted(budget):
        return None
    if scale <= FAR_MORE * student.keep_ratio:
        return None
    parts = [f"{name} {share:.0%}" for name, share in _whole_parts(skeleton, spec, groups)[:3]]
    return (
        f"keep {student.keep_ratio:g} of the units leaves {scale:.0%} of the operations: most of them are in "
        f"what stays whole ({', '.join(parts)} of the student's); --macs asks for operations instead"
    )


def narrower(
    model: nn.Module, spec: InputSpec, groups: Sequence[Group], keep: float, config: CompressConfig
) -> list[str]:
    """A line on what would be left if the residual stream were cut too, or, where it is, if it stayed whole:
    at equal shares of every kind, the same ones or those of the same budget of operations or parameters. None
    where it cannot be cut; nor of milliseconds, which would be timed a second time, or where blocks are alike
    or the last one stays whole.

    Args:
        model: The teacher; its shapes are enough.
        spec: The images that it takes.
        groups: What is cut in it.
        keep: Share of the units.
        config: How widths are rounded, and what was asked for.
    """
    if config.latency_ms is not None or config.whole_last or config.uniform:
        return []
    if any(group.kind == "channel" for group in groups):
        every, how = [group for group in groups if group.kind != "channel"], "--cut heads,neurons"
        what = "of the units inside blocks"
    elif channels := channel_groups(model, groups):
        every, how, what = [*groups, *channels], "--cut all", "of all units, the channels too"
    else:
        return []
    at = partial(widths_at, every, uniform_scores(every), options=config)
    if (priced := budget_and_cost(config, model, spec)) is None:
        widths = at(keep, keep)
    else:
        budget, cost = priced
        try:
            met = meet(budget, lambda widths: cost(build_skeleton(model, every, widths)), at)
        except ConfigError:  # it cannot be met that way: then there is nothing to choose
            return []
        widths, keep = met.widths, met.keep_ratio
    skeleton = build_skeleton(model, every, widths)
    macs = count_macs(skeleton, spec) / count_macs(model, spec)
    params = num_params(skeleton) / num_params(model)
    return [
        f"with {how}, keep {keep:.3g} {what}: {100 * params:.1f} % of the parameters, {100 * macs:.1f} % of "
        f"the MACs"
    ]


def _is_counted(budget: TaskOptions) -> bool:
    """Whether the budget is anything but a share of the units."""
    return not (budget.macs is None and budget.params is None and budget.latency_ms is None)


def _whole_parts(skeleton: nn.Module, spec: InputSpec, groups: Sequence[Group]) -> list[tuple[str, float]]:
    """The parts of a candidate that no group touches, with their share of its operations, largest first.

    Layers that differ by number alone are one part: `blocks.*.attn.qkv`.
    """
    macs = macs_by_module(skeleton, spec)
    touched = {slice_.tensor.rpartition(".")[0] for group in groups for slice_ in group.slices}
    inside = tuple(f"{group.name}." for group in groups)
    parts: Counter[str] = Counter()
    for name, own in macs.items():
        if own and name not in touched and not f"{name}.".startswith(inside):
            parts[_NUMBER.sub("*", name) or "the model itself"] += own
    total = sum(macs.values())
    return [(name, own / total) for name, own in parts.most_common()]
