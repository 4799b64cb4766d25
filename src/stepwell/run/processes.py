"""Which of several processes this one is, as a launcher says; a plain run is a world of one.

torchrun --nproc-per-node 4 -m stepwell compress ...      or     accelerate launch -m stepwell compress ...

All processes of a run compute; the first one decides, writes and prints. What they tell each other is in
`distributed.py`; nothing here imports torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from stepwell.errors import ConfigError, LostProcessError, StepwellError

PATIENCE = 30.0
"""Seconds in which a launcher ends all processes after the first of them has failed."""

_NO_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
"""What says how many processes there are, though nobody has told them of each other."""

_is_alone = False


def _launched(name: str, default: int) -> int:
    """What a launcher says; all of them set LOCAL_RANK, which nothing else does."""
    return int(os.environ.get(name, default)) if "LOCAL_RANK" in os.environ else default


def check_launcher() -> None:
    """Refuse to be one of several processes that do not know of each other: each would be a run of its own.

    Raises:
        ConfigError: Slurm or MPI has started several, and no launcher.
    """
    if "LOCAL_RANK" not in os.environ:
        for name, who in _NO_LAUNCHERS.items():
            if (number := os.environ.get(name, "1")) != "1":
                raise ConfigError(
                    f"{who} has started {number} processes, which do not know of each other: let it start "
                    f"torchrun, once on each machine (examples/cluster/slurm.sh), or a single process"
                )


def check_precision(precision: str) -> None:
    """Refuse to compute in another number format than the launcher was told.

    Raises:
        ConfigError: They differ.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") if "LOCAL_RANK" in os.environ else "no"
    if asked not in ("no", precision):
        raise ConfigError(
            f"accelerate launch asks for {asked}, and --precision is {precision}: give both the same, or "
            f"--mixed_precision no to the launcher"
        )


def num_launched() -> int:
    """Number of processes that make this run."""
    return _launched("WORLD_SIZE", 1)


def world() -> int:
    """Number of processes that compute together now: all that make this run, or this one alone."""
    return 1 if _is_alone else num_launched()


def rank() -> int:
    """Number of this process, from 0."""
    return 0 if _is_alone else _launched("RANK", 0)


def local_rank() -> int:
    """Its number on its machine."""
    return _launched("LOCAL_RANK", 0)


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return _launched("RANK", 0) == 0


@contextmanager
def alone() -> Iterator[None]:
    """What is computed inside is this process's own: it sees all images, and asks nobody."""
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


def wait_for_the_end(error: StepwellError) -> None:
    """Before a process says why it stops: an error of all is for the first to say, and one that follows from
    another process's is for nobody. A launcher has ended this process before it is its turn."""
    if world() > 1 and (not is_main() or isinstance(error, LostProcessError)):
        time.sleep(PATIENCE)
