"""What can be cut of a model and how large its candidates are, in words and as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from torch import nn

from stepwell.data.spec import InputSpec
from stepwell.measure.size import count_macs, num_params, short_number
from stepwell.pruning import generic
from stepwell.pruning.families import names_by_family
from stepwell.pruning.units import Candidate, Group
from stepwell.report.table import render


def found_by(model: nn.Module, groups: Sequence[Group]) -> list[str]:
    """Families that know something in `model`, and the dependency graph where it found more."""
    found = names_by_family(model)
    known = set().union(*found.values())
    channels = ["channels of the residual stream"] if any(group.kind == "channel" for group in groups) else []
    others = any(group.name not in known and group.kind != "channel" for group in groups)
    return [*found, *channels, *([generic.NAME] if others else [])]


def what_is_cut(groups: Sequence[Group]) -> str:
    """How many units of each kind, in how many layers."""
    *first, last = (f"{_units(groups, kind):,} {kind}s" for kind in _kinds(groups))
    units = f"{', '.join(first)} and {last}" if first else last
    return f"{units} in {sum(group.kind != 'channel' for group in groups)} layers"


def what_stays_whole(model: nn.Module, groups: Sequence[Group]) -> str:
    """What no group touches: its share of the parameters, and where it lies."""
    cut = {slice_.tensor for group in groups for slice_ in group.slices}
    sizes = {name: p.numel() for name, p in model.named_parameters() if name not in cut}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:4]
    return f"{sum(sizes.values()) / num_params(model):.1%} of the parameters, most of it {', '.join(largest)}"


def norms_over_the_rest(groups: Sequence[Group]) -> list[str]:
    """A line, where a norm over a cut width is taken over what is left of it."""
    norms = [norm for group in groups for norm in group.norms]
    if not norms:
        return []
    return [f"  norms taken over the units that are left: {len(norms)} ({norms[0]}, ...)"]


def candidate_table(
    groups: Sequence[Group],
    candidates: Sequence[Candidate],
    skeletons: Sequence[nn.Module],
    model: nn.Module,
    spec: InputSpec,
) -> str:
    """A row for each candidate: units, parameters and operations, and their shares of the model's.

    Args:
        groups: The units that may be cut.
        candidates: What each keeps.
        skeletons: The candidates as models.
        model: The whole one.
        spec: Its images.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    kinds = _kinds(groups)
    for column in ("keep", *(f"{kind}s" for kind in kinds), "params", "ratio", "MACs", "scale"):
        table.add_column(column, justify="right")
    total_macs, total_params = count_macs(model, spec), num_params(model)
    for candidate, skeleton in zip(candidates, skeletons, strict=True):
        macs, params = count_macs(skeleton, spec), num_params(skeleton)
        kept = [sum(candidate.widths[g.name] for g in groups if g.kind == kind) for kind in kinds]
        table.add_row(
            f"{candidate.keep_ratio:.3g}",
            *map(str, kept),
            short_number(params),
            f"{100 * params / total_params:.1f} %",
            short_number(macs),
            f"{100 * macs / total_macs:.1f} %",
        )
    return render(table)


def warnings_for(groups: Sequence[Group], student: Candidate) -> list[str]:
    """Where a model is too small for its ratio."""
    texts = []
    heads = [g for g in groups if g.kind == "head"]
    kept = sum(student.widths[g.name] for g in heads)
    if heads and (kept <= 2 or kept < len(heads) / 2):
        texts.append(
            f"keep {student.keep_ratio:g} leaves {kept} of {_units(heads, 'head')} heads for {len(heads)} "
            f"layers, so most lose their attention; a larger --keep or --min-heads-per-layer 1 keeps it"
        )
    for kind, layers in (("neuron", "FFNs"), ("filter", "convolutions")):
        empty = [g.name for g in groups if g.kind == kind and student.widths[g.name] == 0]
        if empty:
            texts.append(
                f"{len(empty)} {layers} lose all their {kind}s at keep {student.keep_ratio:g}: "
                f"{', '.join(empty[:4])}{', ...' if len(empty) > 4 else ''}"
            )
    return texts


def _units(groups: Sequence[Group], kind: str) -> int:
    return sum(g.num_units for g in groups if g.kind == kind)


def _kinds(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(group.kind for group in groups))
