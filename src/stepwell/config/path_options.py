"""Options of the way down: how units are scored, candidates laid out and trained, and one of them chosen."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stepwell.config.base import Count, Fraction, Positive
from stepwell.config.options import MetricOption, Options

Rule = Literal[
    "performance", "npsd", "npsd-chord-teacher", "npsd-chord-student", "lambda", "thrift", "nearest-2.5"
]
Way = Literal[
    "amd", "amd-manual", "auto", "single-step", "takd", "dgkd", "mmd", "mmd-os", "scalekd", "curriculum",
]  # fmt: skip


class ScoreOptions(Options):
    """How the importance of units is measured."""

    importance: Literal["gradient", "l1"] = "gradient"
    """`gradient`: how much the loss would change (AMD). `l1`: convolution filters by the sum of their
    weights, greedily along the network (Li et al. 2017); heads and neurons still by gradient."""
    score_images: Count = 2048
    """At most this many training images are scored on, without augmentation."""
    score_reduction: Literal["sample", "batch"] = "sample"
    """Take |gradient| per image (AMD's formula), or per batch of images (MiniDisc's code)."""


class GridOptions(Options):
    """Which candidates make up the ladder."""

    num_candidates: Annotated[int, Field(ge=1, le=99)] = 9
    """Rungs of the ladder; the paper's m."""
    grid: Literal["with-student", "between"] = "with-student"
    """Count the student's own rung among the candidates (0.1, 0.2 ... 0.9 for keep 0.1 and 9 candidates),
    or place all of them strictly between student and teacher."""
    round_to: Count | Literal["cpu", "gpu"] = "cpu"
    """Widths of FFNs and convolutions are rounded to a multiple of this; below half of it the layer is left
    out. `cpu` is 8, the numbers that a vector unit holds; `gpu` is 16, the tile of a matrix unit."""
    min_heads_per_layer: Annotated[int, Field(ge=0)] = 0
    """Heads that no layer falls below; 0 lets a layer lose its attention, as in the paper."""

    @property
    def multiple(self) -> int:
        """`round_to` as a number."""
        return {"cpu": 8, "gpu": 16}[self.round_to] if isinstance(self.round_to, str) else self.round_to

    @model_validator(mode="after")
    def _room_for_an_assistant(self) -> Self:
        if self.grid == "with-student" and self.num_candidates < 2:
            raise ValueError("num_candidates must be at least 2: one is the student, one the assistant")
        return self


class JointOptions(Options):
    """How the candidates are trained together."""

    sampling: Literal["all", "sandwich"] = "sandwich"
    """Train every candidate in every step (the paper's Algorithm 1), or smallest + `num_random` others."""
    num_random: Count = 1
    """Random candidates per step besides the smallest, with sandwich sampling."""
    joint_epochs: Positive | None = None
    """Epochs of the joint stage; by default `epochs`, or what `joint_share` of a budget allows."""
    joint_share: Fraction = 0.5
    """Share of the path's cost or time that the joint stage takes of `--budget-epochs` or `--minutes`."""
    joint_lr: Positive | None = None
    """Peak learning rate of the joint stage; `lr` if not given."""


class SelectOptions(Options):
    """How the assistant is chosen."""

    rule: Rule = "thrift"
    """performance: the candidate that performs best (the default with --epochs); npsd: just before the
    steepest fall (our reading of AMD's NPSD); npsd-chord-*: minus the slope to teacher or student; lambda:
    MiniDisc's P + 0.2 (1 - S); thrift: P - 0.3 log(S + 3 S_student), since a smaller assistant leaves more of
    a budget for the student; nearest-2.5: nearest to 2.5 times the student. Every run computes all."""
    metric: MetricOption = "auto"
    """Performance P of a candidate on the selection images: `top1` / 100 (with several classes an image,
    `mAP` / 100), or `likelihood` (geometric mean of the probability given to the truth); `auto` is likelihood
    below 2,000 images, where the others are noise."""
    assistant: Fraction | None = None
    """Use the candidate nearest to this keep ratio as the assistant, whatever the rule says."""
    assistant_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the path's cost or time in which the teacher goes on to train the chosen assistant by itself,
    before it teaches; with --epochs, that share of them. With --path amd."""
    snapshots: Annotated[int, Field(ge=0, le=8)] = 0
    """So many earlier states of the assistant, from equal stretches of the joint training, teach the student
    first, each for as long as the finished one in the end (progressive distillation). With --path amd."""


class PathOptions(Options):
    """Which way down from teacher to student."""

    budget_epochs: Positive | None = None
    """Cost of the whole path: that of distilling straight from the teacher for so many epochs; 60 if
    neither this nor epochs nor minutes are given. Sets the epochs of every training; what a small assistant
    saves goes into the last step."""
    path: Way = "auto"
    """auto: as amd where an assistant pays, else a single step: by what it saves, and how far the
    student is behind early on; where other options ask for an assistant (--assistant, --num-assistants,
    --snapshots, --assistant-share, --student) it is amd, with --ladder takd. amd: candidates trained
    together, one chosen as the assistant. amd-manual: the same, but a student via every candidate.
    single-step: no assistant. takd: the assistants given, one after another. dgkd: likewise, each taught
    by all larger ones. mmd: every candidate trained by itself, and a student via each. mmd-os: the same,
    one chosen. scalekd: the teacher, of any kind, stays whole and teaches --student. curriculum:
    --teachers, of any kinds, teach the student one after another, and at last --teacher does."""
    teachers: tuple[str, ...] = ()
    """The other teachers of curriculum, each the folder of a finished run, a timm name (if its own
    classes are those of --teacher), or FILE.py:FACTORY.
    Their order is found: before each comes the one whose features lead to its own most cheaply. --teacher is
    the best and the last, what all is measured against."""
    assistants: tuple[Fraction, ...] = (0.5,)
    """Keep ratios of the assistants of takd and dgkd; with --ladder its sizes are those of takd."""
    num_assistants: Count = 1
    """Assistants in a row that amd chooses, each among the candidates below the one before."""
    drop: Annotated[int, Field(ge=0)] = 1
    """Teachers that dgkd leaves out of each step, drawn again for each; one always stays."""
