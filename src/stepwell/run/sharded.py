"""`--shard-optimizer`: of several processes each holds the moments of a part of the parameters.

ZeRO's stage 1 (Rajbhandari et al., SC 2020), by torch's `ZeroRedundancyOptimizer`. All have all gradients;
each moves its own parameters and sends them to the others, so a training comes to the same, to the bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stepwell.run.distributed import join, talking

with warnings.catch_warnings():  # torch 2.10 makes its own optimizers by what it says is deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer


class Sharded(ZeroRedundancyOptimizer):
    """An optimizer of which each process holds a part.

    Args:
        kind: The optimizer of each part.
        groups: Of all parameters, as every optimizer of torch takes them.
        options: For all groups.
    """

    def __init__(
        self,
        kind: type[torch.optim.Optimizer],
        groups: Sequence[Mapping[str, Any]],
        **options: Any,  # noqa: ANN401  (whatever that optimizer takes)
    ) -> None:
        join()
        # As views of one tensor for each process, parameters are sent in one piece.
        super().__init__([dict(g) for g in groups], kind, parameters_as_bucket_view=True, **options)

    def step(self, closure: Callable[[], float] | None = None, **options: Any) -> Any:  # noqa: ANN401
        """Move this process's parameters, send them, and receive the others'.

        Raises:
            LostProcessError: Another process has ended.
        """
        with talking():
            return super().step(closure, **options)

    def gather(self) -> None:
        """Bring all parts to the first process, whose `state_dict` then is that of a whole optimizer.

        Raises:
            LostProcessError: Another process has ended.
        """
        with talking():
            self.consolidate_state_dict(to=0)
