"""Snapshots of the joint training: earlier states of all candidates, of which the assistant's teach, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from stepwell.data.batches import Batch
from stepwell.pruning.shared import SharedWeights
from stepwell.run.checkpoint import save_tensors
from stepwell.run.processes import is_main
from stepwell.training.loop import Step


def snapshot_files(folder: Path, num_snapshots: int) -> list[Path]:
    """Where the states are kept until the joint training ends."""
    return [folder / f"snapshot-{number}.safetensors" for number in range(num_snapshots)]


def with_snapshots(step: Step, shared: SharedWeights, files: Sequence[Path]) -> Step:
    """`step`, which first keeps the weights whenever another of equal stretches of the training is over.

    A training that was resumed comes past the same states again; a file that is there is one of them.
    """

    def keeping(batch: Batch, number: int, progress: float) -> Mapping[str, Tensor]:
        for index, file in enumerate(files, start=1):
            if progress >= index / (len(files) + 1) and is_main() and not file.exists():
                save_tensors(shared.state(), file)
        return step(batch, number, progress)

    return keeping if files else step


def read_snapshots(files: Sequence[Path]) -> dict[str, Tensor]:
    """All states, as the joint stage saves them; a training of very few steps may have passed over some.

    Of several processes only the first one has them, and its result is the stage's.
    """
    return {
        f"snapshot {number}/{key}": tensor
        for number, file in enumerate(files)
        if file.exists()
        for key, tensor in load_file(file).items()
    }
