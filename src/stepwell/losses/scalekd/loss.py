"""ScaleKD's loss on features: projectors, two views, and the teacher's own parameters between its stages.

With CAP a projector (projector.py), V the views (views.py), S3 and S4 the student's last two stages, T4 the
teacher's last one, and tail(.) what the frozen teacher makes of a state behind its stage 3, up to T4:

P  = tail(CAP_3(S3))                      teacher parameter perception (TPP): the student's map, completed
L3 = V(P, T4)                             by the teacher's own weights
L4 = V(CAP_4(S4; queries P), T4)          what P is asks what the student's last map knows
L  = L3 + L4,  V = .08 original + .06 alternative, on 7 x 7 positions

Each view has projectors of its own and so a P of its own; both pass the tail as one batch. Gradients go
through the tail, and to P as queries. Beside it stand half of the cross-entropy and half of the divergence
of logits.

Published weights fall as the grid of T4 grows: .08 at 7 x 7 positions, .016 at 16 x 16, .008 at 24 x 24, each
about 4 in all. So here they are those of 7 x 7, times 49 / positions, and a student of small images weighs
what a large one does. A ViT's class token and registers at stage 3 are the teacher's own when the tail runs:
the student has none to give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.errors import ConfigError
from stepwell.losses.networks import LossWithNetworks
from stepwell.losses.output import full
from stepwell.losses.scalekd.projector import PUBLISHED_SCALE, CrossAttentionProjector
from stepwell.losses.scalekd.stages import Layout, Stage, Stages
from stepwell.losses.scalekd.views import FEWEST_IN_A_ROW, alternative_view, original_view

PUBLISHED_POSITIONS = 49
"""Of the grid at which the published weights hold."""

Tail = Callable[[Tensor], Tensor]
"""The rest of the teacher: from its state behind stage 3 to its state behind stage 4."""


@dataclass(frozen=True)
class Parts:
    """What ScaleKD is made of; the defaults are the published ones, and each can be turned off (0) alone.

    Attributes:
        original: Weight of the view of the features as they are, on 7 x 7 positions.
        alternative: Weight of the view without their mean.
        alternative_4: The same at stage 4, where it differs: 0 with the smallest published teacher.
        stage_3: Whether stage 3 has a term.
        stage_4: Whether stage 4 has one.
        tpp: Whether the teacher's tail runs; without it stage 3 is compared with the teacher's stage 3.
        own_queries: Stage 4 has learned queries instead of the tail's outputs.
        softmax_scale: See `CrossAttentionProjector`; published are 5, and 1 for students with the
            teacher's grids that are no CNN with BatchNorm.
        num_heads_3: Of the projectors of stage 3; 0 takes the teacher's own.
        num_heads_4: Of those of stage 4, likewise.
        layer_norm: See `CrossAttentionProjector`.
    """

    original: float = 0.08
    alternative: float = 0.06
    alternative_4: float | None = None
    stage_3: bool = True
    stage_4: bool = True
    tpp: bool = True
    own_queries: bool = False
    softmax_scale: float = PUBLISHED_SCALE
    num_heads_3: int = 0
    num_heads_4: int = 0
    layer_norm: bool = False

    def weights(self, stage: int) -> tuple[float, float]:
        """Of the two views at stage 3 or 4; 0 where the stage has no term."""
        if not (self.stage_3 if stage == 3 else self.stage_4):
            return 0.0, 0.0
        of_4 = stage == 4 and self.alternative_4 is not None
        return (
            self.original,
            self.alternative_4 if of_4 and self.alternative_4 is not None else self.alternative,
        )


class ScaleKD(LossWithNetworks):
    """The loss between a student and a teacher of another architecture.

    Args:
        student: Its last two stages.
        teacher: Those of the teacher.
        tail: The rest of the teacher behind its stage 3, borrowed; None where `parts` do not ask for it.
        parts: What it is made of.
        notes: What is to be said of it already; `notes` has more.

    Raises:
        ConfigError: Nothing is left of it, or the heads do not divide the teacher's width.
    """

    def __init__(
        self, student: Stages, teacher: Stages, tail: Tail | None, parts: Parts, notes: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.student_stages, self.teacher_stages, self.tail, self.parts = student, teacher, tail, parts
        assert (tail is not None) == parts.tpp, "a tail is there exactly where it is asked for"
        target = teacher.fourth if parts.tpp else teacher.third
        self.notes = list(notes)
        self.weights_3 = self._weights(3, student.third, target)
        self.weights_4 = self._weights(4, student.fourth, teacher.fourth)
        if not any((*self.weights_3, *self.weights_4)):
            why = "; ".join(["leave a view and a stage", *self.notes])
            raise ConfigError(f"--feature-args: scalekd: nothing of it is left: {why}")
        self.given_queries = parts.tpp and not parts.own_queries
        # A view that stage 4 alone has needs stage 3's projector all the same, where that makes its queries.
        needed_3 = [
            bool(w3 or (w4 and self.given_queries))
            for w3, w4 in zip(self.weights_3, self.weights_4, strict=True)
        ]
        needed_4 = [bool(weight) for weight in self.weights_4]
        heads_3 = parts.num_heads_3 or teacher.third.num_heads
        heads_4 = parts.num_heads_4 or teacher.fourth.num_heads
        self.third = self._projectors(student.third, teacher.third, needed_3, heads_3)
        own = not self.given_queries
        self.fourth = self._projectors(student.fourth, teacher.fourth, needed_4, heads_4, has_queries=own)

    def forward(
        self,
        student_states: Sequence[Float[Tensor, "batch ..."]],
        teacher_states: Sequence[Float[Tensor, "batch ..."]],
    ) -> Float[Tensor, ""]:
        """The weighted sum over stages and views.

        Args:
            student_states: Behind its two stages, as its model lays them out.
            teacher_states: Those of the teacher; no gradient flows there.
        """
        ours, theirs = self.student_stages, self.teacher_stages
        map_3, map_4 = (
            ours.third.layout.as_map(student_states[0]),
            ours.fourth.layout.as_map(student_states[1]),
        )
        target_4 = theirs.fourth.layout.as_tokens(teacher_states[1].detach())
        target_3 = target_4 if self.tail else theirs.third.layout.as_tokens(teacher_states[0].detach())
        with self.autocast:
            predicted_3 = {view: project(map_3) for view, project in self.third.items()}
            if self.tail and predicted_3:
                predicted_3 = self._completed(predicted_3, teacher_states[0].detach())
            queries = predicted_3 if self.given_queries else {}
            predicted_4 = {view: project(map_4, queries.get(view)) for view, project in self.fourth.items()}
        terms = [
            weight * VIEWS[view](full(predicted[view]), target)
            for predicted, target, weights in (
                (predicted_3, target_3, self.weights_3),
                (predicted_4, target_4, self.weights_4),
            )
            for view, weight in zip(VIEWS, weights, strict=True)
            if weight
        ]
        return torch.stack(terms).sum()

    def no_weight_decay(self) -> set[str]:
        """Tables of positions and queries, as the authors leave them."""
        return {
            f"{stage}.{view}.{name}"
            for stage in ("third", "fourth")
            for view, projector in getattr(self, stage).items()
            for name in projector.no_weight_decay()
        }

    def _weights(self, number: int, ours: Stage, target: Stage) -> tuple[float, float]:
        asked = self.parts.weights(number)
        kept = _kept(asked, ours.layout, target.layout)
        if asked[1] and not kept[1]:
            sizes = [f"{stage.layout.height} x {stage.layout.width}" for stage in (ours, target)]
            self.notes.append(
                f"at stage {number} the view without the mean is left out, of which maps below 2 x 2 have "
                f"nothing (student {sizes[0]}, teacher {sizes[1]})"
            )
        return kept

    def _projectors(
        self, ours: Stage, theirs: Stage, needed: Sequence[bool], num_heads: int, *, has_queries: bool = True
    ) -> nn.ModuleDict:
        channels = theirs.layout.channels
        if channels % num_heads:
            raise ConfigError(
                f"--feature-args: scalekd: {num_heads} heads do not divide the teacher's {channels} channels"
            )
        return nn.ModuleDict(
            {
                view: CrossAttentionProjector(
                    ours.layout.shape,
                    theirs.layout.shape,
                    num_heads,
                    self.parts.softmax_scale,
                    has_queries,
                    self.parts.layer_norm,
                )
                for view, is_needed in zip(VIEWS, needed, strict=True)
                if is_needed
            }
        )

    def _completed(self, predicted: dict[str, Tensor], state: Tensor) -> dict[str, Tensor]:
        """What the teacher's tail makes of predictions of its stage 3: all views in one pass."""
        assert self.tail is not None
        layouts = self.teacher_stages
        states = [layouts.third.layout.as_state(tokens, state) for tokens in predicted.values()]
        ends = layouts.fourth.layout.as_tokens(self.tail(torch.cat(states)))
        return dict(zip(predicted, ends.chunk(len(states)), strict=True))


VIEWS = {"original": original_view, "alternative": alternative_view}


def _kept(weights: tuple[float, float], student: Layout, target: Layout) -> tuple[float, float]:
    """The weights of the views on grids of these sizes: a map of one position says the same everywhere."""
    original, alternative = (weight * PUBLISHED_POSITIONS / target.num_positions for weight in weights)
    smallest = min(student.height, student.width, target.height, target.width)
    return original, alternative if smallest >= FEWEST_IN_A_ROW else 0.0
