"""Which models can be cut in their residual stream too (`--cut all`): two columns of docs/supported.md.

    python benchmarks/support_channels.py    # of what support.py has checked; resumes where it stopped
    python benchmarks/support_channels.py --only cifar --again

As support.py does it: random weights, a random ranking of all units, channels among them, and for each keep
ratio `exact`, `backward`, `reload` and `onnx`. Norms lie over the stream, so in the masked model they are
computed over the channels that are left. Writes `channels` of each record in benchmarks/results/support.json:
null where a model's channels stay whole.
"""

from __future__ import annotations

import copy
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.layers.norm import LayerNorm2d, RmsNorm2d
from torch import Tensor, nn

from record import commit
from stepwell.models.card import Card
from stepwell.models.export import export_onnx
from stepwell.pruning.channels import channel_groups
from stepwell.pruning.families.slices import narrow_norm
from stepwell.pruning.prove import masked
from stepwell.pruning.units import Group
from stepwell.setting.channels import with_channels
from support import (
    CHANNEL_RATIOS,
    Checked,
    backward,
    checked,
    checks_of,
    classifier,
    one_line,
    options_of,
    recorded,
    reload,
    write,
)


def main() -> None:
    """Check all models whose channels are not checked yet, then write the page."""
    options, done = options_of(__doc__), recorded()
    todo = [n for n in done if re.search(options.only, n) and (options.again or "channels" not in done[n])]
    for name, found in checked(check, todo, options.jobs):
        done[name]["channels"] = found
        write(done)
        print(f"{name}: {summary(found)}", flush=True)
    write(done)


def check(name: str) -> dict[str, Any] | None:
    """All checks of one model at all ratios; what fails says why."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    try:
        found = CheckedChannels.of_channels(name)
        ratios = found and {f"{c.keep_ratio:g}": found.candidate(c.widths) for c in found.candidates}
    except Exception as error:
        return {"commit": commit(), "error": one_line(error)}
    seconds = round(time.perf_counter() - start)
    return ratios and {"commit": commit(), "seconds": seconds, "ratios": ratios}


class CheckedChannels(Checked):
    """One model with a random ranking of its units, channels among them."""

    @classmethod
    def of_channels(cls, name: str) -> CheckedChannels | None:
        """A model by its name in the table; None where its channels stay whole."""
        teacher, original, groups = classifier(name)
        if not channel_groups(teacher.model, groups):
            return None
        images = torch.randn(2, teacher.spec.channels, *teacher.spec.size)
        return cls(teacher, original, with_channels(teacher.model, groups, images), CHANNEL_RATIOS)

    def checks(self, small: nn.Module, card: Card, folder: Path) -> dict[str, Callable[[], object]]:
        """What is tried with a slice; each raises what is wrong."""
        return {
            "exact": lambda: self.exact(small, card.widths),
            "backward": lambda: backward(small, self.images),
            "reload": lambda: reload(small, card, folder, self.images, self.original),
            "onnx": lambda: export_onnx(small, self.spec, folder / "m.onnx", self.images, tolerance=1e-5),
        }

    def exact(self, small: nn.Module, widths: Mapping[str, int]) -> None:
        """The slice against the whole model with masks."""
        with torch.no_grad(), masked_with_norms(self.sorted_model, self.groups, widths):
            expected = self.sorted_model(self.images)
        with torch.no_grad():
            off = ((small(self.images) - expected).abs().max() / expected.abs().max()).item()
        assert off <= 1e-4, f"logits differ by {off:.1e} of the largest"


@contextmanager
def masked_with_norms(model: nn.Module, groups: Sequence[Group], widths: Mapping[str, int]) -> Iterator[None]:
    """As `masked`, but that norms over units are computed over those that are left."""
    with ExitStack() as stack:
        stack.enter_context(masked(model, groups, widths))
        for group in groups:
            for name in group.norms:
                hook = over_kept(group, widths[group.name])
                stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


def over_kept(group: Group, width: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that puts a narrower copy of the norm in its place, and 0 where units are gone."""

    def hook(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        is_map = isinstance(norm, LayerNorm2d | RmsNorm2d) or (
            group.kind != "channel" and group.gate_dim == 1
        )
        dim = 1 if is_map else -1
        places = torch.arange(output.shape[dim])
        # Channels may lie side by side several times (those of four neighbours); a head is several numbers.
        size = len(places) // group.num_units
        kept = places[(places % group.num_units if group.kind == "channel" else places // size) < width]
        small = copy.deepcopy(norm)
        for leaf, tensor in norm.named_parameters(recurse=False):
            setattr(small, leaf, nn.Parameter(tensor[kept]))
        narrow_norm(small, len(kept))
        found = small.forward(inputs[0].index_select(dim, kept))  # not called: the copy has this hook too
        return torch.zeros_like(output).index_copy(dim, kept, found)

    return hook


def summary(found: dict[str, Any] | None) -> str:
    """One line for the log."""
    if found is None or "error" in found:
        return "channels stay whole" if found is None else found["error"]
    bad = {told for r in found["ratios"].values() for told in checks_of(r).items() if told[1] != "ok"}
    return f"{found['seconds']} s; {'; '.join(map(': '.join, sorted(bad))) or 'all ok'}"


if __name__ == "__main__":
    main()
