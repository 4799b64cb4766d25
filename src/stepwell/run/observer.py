"""Looking on while a run goes: which stages it passes through, and which images each of them is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

if TYPE_CHECKING:
    from stepwell.run.run_dir import StageResult

Split = Literal["training", "selection", "test"]


class Observer:
    """Does nothing; whoever wants to see something overrides a method and hands it to a run."""

    def on_stage(self, name: str, result: StageResult | None) -> None:
        """A stage begins (`result` is None), or has its result, computed or read back.

        An exception raised here stops the run as a crash would: what is finished is on disk.
        """

    def on_batch(self, stage: str, split: Split, indices: Tensor) -> None:
        """The images at `indices` (shape (batch,)) of a split are about to be used.

        Args:
            stage: The stage that uses them; empty between stages.
            split: Which images they belong to.
            indices: Their places in that split.
        """
