"""`--shard-teacher`: of several processes each holds a part of every weight of a frozen model.

By torch's FSDP2 (`fully_shard`): before a block runs, the parts of its weights are gathered, and afterwards
they are dropped. So all processes call the model equally often, whatever images each has.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.run.distributed import group_of, talking
from stepwell.run.processes import world


class InParts(nn.Module):
    """A model whose weights lie in parts, and which has run; beside what it was, and what FSDP made of it."""

    def __call__(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401  (as the model)
        """Run the model, which all processes do.

        Raises:
            LostProcessError: Another process has ended.
        """
        with talking():
            return super().__call__(*args, **options)


def in_parts(model: nn.Module, blocks: Iterable[str], device: torch.device) -> nn.Module:
    """A model that computes the same, of whose weights this process holds a part.

    Args:
        model: Whole, in eval mode, on the CPU; it stays as it is, and no second copy of it is made there.
        blocks: Names of the modules whose weights are gathered together; the rest is one more such block.
        device: Where the parts lie, and where each block is put together to run.
    """
    from torch.distributed.device_mesh import DeviceMesh  # late: a plain run has no need of it
    from torch.distributed.fsdp import fully_shard

    # The same numbers under new names: moving one of these to the device leaves the model's own where it is.
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach().contiguous(), requires_grad=False) for p in model.parameters()
    }
    sharded = copy.deepcopy(model, memo)
    numbers = {p for p in sharded.parameters() if p.ndim == 0}  # which FSDP does not divide
    for number in numbers:
        number.data = number.data.to(device)
    mesh = DeviceMesh.from_group(group_of(device), device.type)
    named = [sharded.get_submodule(name) for name in blocks]
    for module in (*(block for block in named if any(True for _ in block.parameters())), sharded):
        # The outermost one, too, drops what it has gathered: nothing goes backward.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=numbers)
    return sharded


def guard(sharded: nn.Module) -> None:
    """From now on an error in a model that has run in parts is that of a process that has ended."""
    kind = type(sharded)
    sharded.__class__ = type(kind.__name__, (InParts, kind), {})


def keep_up(
    model: object, calls: int, most: int, images: Float[Tensor, "batch channels height width"]
) -> None:
    """Run a model in parts for those who have more images; nothing for any other.

    Args:
        model: Whatever was called.
        calls: How often this process has called it.
        most: How often the busiest one does.
        images: Any.
    """
    if isinstance(model, InParts) and world() > 1:
        with torch.no_grad():
            for _ in range(most - calls):
                model(images)


def num_held(model: nn.Module) -> int:
    """Parameters of a model in parts that lie in this process."""
    return sum(cast(Any, getattr(p, "_local_tensor", p)).numel() for p in model.parameters())
