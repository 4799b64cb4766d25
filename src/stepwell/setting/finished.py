"""What a path hands to the last stage: the models that it ended with, and how it came to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from stepwell.models.ladder import Ladder
from stepwell.report.result import Choice
from stepwell.setting.rungs import Rung


@dataclass(frozen=True)
class Size:
    """A further size that is handed out.

    Attributes:
        rung: The model.
        taught_by: Keep ratio of what taught its last step; 1 is the teacher.
        is_as_joint: Whether it is as the joint training left it, since its last step did it harm.
    """

    rung: Rung
    taught_by: float
    is_as_joint: bool = False


@dataclass(frozen=True)
class Finished:
    """The models that a path ends with, and how it came to them.

    Attributes:
        ladder: The candidates that it stood on.
        student: The last rung.
        assistants: Those that taught on the way, from the largest down; none in a single step.
        control: The same student straight from the teacher; None if not asked for.
        choice: Which candidate was chosen; None where nothing was.
        tried: Where a student was trained for each assistant: all of these pairs.
        single_step: Cost of a single step with as many epochs as the last one, in passes of the teacher.
        way: How the path went, in a sentence.
        sizes: The other sizes of `--ladder`, from the largest down.
        baseline: A stock network that the teacher taught for comparison.
        teachers: By stage, who taught in it, where the student has several teachers.
    """

    ladder: Ladder
    student: Rung
    assistants: Sequence[Rung]
    control: nn.Module | None
    choice: Choice | None
    tried: Sequence[tuple[Rung, Rung]]
    single_step: float
    way: str
    sizes: Sequence[Size] = ()
    baseline: Rung | None = None
    teachers: Mapping[str, str] = field(default_factory=dict)
