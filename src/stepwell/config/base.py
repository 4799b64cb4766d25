"""What groups of options are made of: types of values, and names on the command line."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

FLAGS = {"keep_ratio": "keep", "out_dir": "out", "json_": "json"}
"""Names on the command line that differ from the field's."""

LENGTHS = ("epochs", "minutes", "budget_epochs")
"""What says how long a run is: at most one of them is given."""

SAVING_MEMORY = ("gradient_checkpointing", "shard_optimizer", "shard_teacher")
"""Options that say in how much memory a run computes, and not what: a begun run may be given another."""


def flag_of(name: str) -> str:
    """How a field is written on the command line."""
    return f"--{FLAGS.get(name, name).replace('_', '-')}"


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch takes
ImageSize = Count | Annotated[str, Field(pattern=r"^[1-9][0-9]*x[1-9][0-9]*$")]
"""One number for both, or heightxwidth."""
Amount = Annotated[str, Field(pattern=r"^ *[0-9]+(\.[0-9]+)? *[%kKMGT]? *$")]
"""A count such as 1.8G or 900k, or a share of the teacher's such as 10%."""


def height_and_width(size: int | str) -> tuple[int, int]:
    """An `ImageSize` as two numbers."""
    if isinstance(size, int):
        return size, size
    height, _, width = size.partition("x")
    return int(height), int(width)
