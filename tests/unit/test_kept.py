"""Hidden states are compared on the channels that a slice kept, in the order that it has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepwell.config.options import LossOptions
from stepwell.errors import ConfigError
from stepwell.losses.distillation import make_distillation
from stepwell.losses.kept import Kept, on_kept
from stepwell.losses.observe import Observed
from stepwell.losses.output import Output, Target
from stepwell.models.ladder import Ladder
from stepwell.pruning.channels import channel_groups
from stepwell.pruning.families import find_groups
from stepwell.pruning.units import Candidate
from stepwell.setting.rungs import Rung, kept_channels, slice_of_teacher, teacher_of
from stepwell.stages.distill import distill_step
from tiny import SPEC, pair, random_batches, setting, tiny_vit


def test_states_of_kept_channels() -> None:
    tokens, image, whole = torch.randn(2, 5, 4), torch.randn(2, 4, 3, 3), torch.randn(2, 7)
    kept = [Kept((3, 1), -1), Kept((0, 2), 1), None]
    states = on_kept(Output(whole, [tokens, image, whole], whole), kept).states
    assert torch.equal(states[0], tokens[..., [3, 1]])
    assert torch.equal(states[1], image[:, [0, 2]])
    assert states[2] is whole


def test_the_loss_is_0_where_a_slice_has_the_teachers_channels() -> None:
    """Whatever the teacher has in the channels that are gone."""
    generator = torch.Generator().manual_seed(0)
    theirs = [torch.randn(3, 17, 8, generator=generator) for _ in range(2)]
    ours = [state[..., [5, 2, 7]] for state in theirs]
    logits = torch.zeros(3, 4)
    student, teacher = Output(logits, ours, logits), Output(logits, theirs, logits)
    options = LossOptions(task_weight=0, logit_weight=0)
    loss = make_distillation(options, pair(student, teacher, kept=[Kept((5, 2, 7), -1)] * 2), seed=0)
    target = Target(torch.zeros(3, dtype=torch.int64), torch.arange(3), 0.0)
    assert loss(student, teacher, target)["loss"].item() == 0
    other = Output(logits, [torch.flip(state, (2,)) for state in ours], logits)
    assert loss(other, teacher, target)["loss"].item() > 0.5


def test_projected_all_of_the_teachers_channels_count() -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = [torch.randn(3, 17, 8, generator=generator) for _ in range(2)]
    ours = [state[..., [5, 2, 7]].requires_grad_() for state in theirs]
    logits = torch.zeros(3, 4)
    student, teacher = Output(logits, ours, logits), Output(logits, theirs, logits)
    options = LossOptions(task_weight=0, logit_weight=0, project_states=True)
    loss = make_distillation(options, pair(student, teacher, kept=[Kept((5, 2, 7), -1)] * 2), seed=0)
    target = Target(torch.zeros(3, dtype=torch.int64), torch.arange(3), 0.0)
    found = loss(student, teacher, target)["loss"]
    by_hand = 0.0
    for conv, s, t in zip(loss.feature.projections.convs, ours, theirs, strict=True):
        weight, bias = conv.weight[:, :, 0, 0].detach(), conv.bias.detach()
        error = s.detach()[:, 1:] @ weight.T + bias - t[:, 1:]  # but for the class token, which is on no map
        by_hand += float(error.square().mean() / t[:, 1:].square().mean()) / 2
    assert found.item() == pytest.approx(by_hand, rel=1e-4)
    found.backward()
    assert all(parameter.grad is not None for parameter in (*loss.parameters(), *ours))
    wrong = options.model_copy(update={"feature_args": {"times": 3.0}})
    with pytest.raises(ConfigError, match="the loss states takes none"):
        make_distillation(wrong, pair(student, teacher, kept=[Kept((5, 2, 7), -1)] * 2), seed=0)
    # Where no channel was cut there is nothing to be projected.
    whole = make_distillation(options, pair(teacher, teacher), seed=0)
    assert not list(whole.parameters())


def test_slices_of_one_teacher_are_compared_channel_by_channel(tmp_path) -> None:
    """A slice of all heads and neurons: what it kept of the embedding is the teacher's own."""
    model = tiny_vit().requires_grad_(False)
    groups = find_groups(model)
    groups = [*groups, *channel_groups(model, groups)]
    s = setting(tmp_path, model, random_batches(1, 4), groups=groups, cut="all", feature_layers=(0, 2))
    order = {g.name: list(reversed(range(g.num_units))) for g in groups}
    small, large = (
        Candidate(share, {g.name: round(share * g.num_units) for g in groups}) for share in (0.25, 0.5)
    )
    ladder = Ladder(teacher=s.card({}), candidates=[small, large], scales=[0.1, 0.3], order=order)
    student, assistant = slice_of_teacher(s, ladder, 0), slice_of_teacher(s, ladder, 1)
    assert kept_channels(s, small, order) == [Kept((23, 22, 21, 20, 19, 18), -1)] * 2
    assert kept_channels(s, small, order, large) == [Kept((0, 1, 2, 3, 4, 5), -1)] * 2

    def states(rung: Rung) -> list[Tensor]:
        return list(Observed(rung.model, s.blocks)(torch.zeros(1, *(SPEC.channels, *SPEC.size))).states)

    for above in (teacher_of(s), assistant):
        step = distill_step(s, [above], student)
        (loss,) = step.lesson.losses
        widths = [one.of(state).shape[-1] for one, state in zip(loss.kept, states(above), strict=True)]
        assert widths == [6, 6]
        assert step(next(iter(s.train.epoch(0))), 0)["feature"].isfinite()
    # The patch embedding itself is cut and not changed, so these are equal number by number.
    x = torch.randn(1, 3, 16, 16)
    theirs = model.patch_embed(x)[..., kept_channels(s, small, order)[0].channels]
    torch.testing.assert_close(student.model.patch_embed(x), theirs)
