"""Students of another architecture: states of any two layouts made comparable."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from stepwell.config.model_options import StudentOptions
from stepwell.config.options import LossOptions
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError
from stepwell.losses.distillation import make_distillation
from stepwell.losses.output import Output, as_maps
from stepwell.losses.projection import ProjectedStates, Projections
from stepwell.models.card import Architecture
from stepwell.models.ladder import Ladder
from stepwell.models.student import OtherStudent, build_student
from stepwell.pruning.blocks import compared_blocks
from stepwell.pruning.families import find_groups
from stepwell.pruning.units import Candidate
from stepwell.setting.rungs import student_below, teacher_of
from stepwell.stages.distill import distill
from stepwell.training.loop import Trained
from tiny import pair, random_batches, random_images, setting, tiny_vit

SPEC = InputSpec((32, 32), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
RESNET = StudentOptions(student="cifar_resnet20")


def test_every_layout_becomes_the_same_map():
    image = torch.randn(2, 5, 4, 4)
    tokens = image.flatten(2).transpose(1, 2)
    states = (image, image.permute(0, 2, 3, 1), tokens, torch.cat([torch.randn(2, 1, 5), tokens], dim=1))
    for state in states:
        (found,) = as_maps([state])
        assert torch.equal(found, image)


def test_as_many_channels_as_rows_lie_like_the_models_other_states():
    """As in a Swin at 384 pixels: 96 channels on 96 x 96."""
    cube, small = torch.randn(2, 4, 4, 4), torch.randn(2, 2, 2, 8)
    first, second = as_maps([cube, small])
    assert torch.equal(first, cube.permute(0, 3, 1, 2))
    assert torch.equal(second, small.permute(0, 3, 1, 2))
    first, second = as_maps([cube, small.permute(0, 3, 1, 2)])
    assert torch.equal(first, cube)
    assert torch.equal(second, small.permute(0, 3, 1, 2))


def test_states_are_paired_from_the_end_on_the_smaller_grid():
    student = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4), torch.randn(2, 8, 2, 2)]
    teacher = [torch.randn(2, 17, 10), torch.randn(2, 17, 10)]
    projections = Projections(student, teacher)
    ours, theirs = projections(student, teacher)
    assert (
        [tuple(x.shape) for x in ours] == [tuple(x.shape) for x in theirs] == [(2, 10, 4, 4), (2, 10, 2, 2)]
    )
    first, second = as_maps(teacher)
    assert torch.equal(theirs[0], first)
    torch.testing.assert_close(theirs[1][:, :, 0, 0], second[:, :, :2, :2].mean((2, 3)))


def test_projected_states_count_ten_times_their_distance():
    student, teacher = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)], [torch.randn(2, 17, 10)] * 2
    loss = ProjectedStates(student, teacher, "teacher-power")
    pairs = zip(*loss.projections(student, teacher), strict=True)
    shares = [
        np.mean((ours.detach().numpy() - theirs.numpy()) ** 2) / np.mean(theirs.numpy() ** 2)
        for ours, theirs in pairs
    ]
    assert loss(student, teacher).item() == pytest.approx(10 * np.mean(shares), rel=1e-5)


def run_distill(folder, student, teacher, blocks, student_blocks) -> Trained:
    """The course of the training of a student of another architecture."""
    architecture = Architecture(source="factory", name="tiny")
    s = setting(
        folder,
        teacher.requires_grad_(False),
        random_batches(3, 4),
        groups=[group for group in find_groups(teacher) if group.block in blocks],
        other_student=OtherStudent(student, architecture, student_blocks, "tiny"),
        lr=1e-3,
    )
    assert s.blocks == blocks
    ladder = Ladder(teacher=s.card({}), candidates=[Candidate(0.4, {})], scales=[0.5])
    distill(s, ladder, "distill", [teacher_of(s)], student_below(s, ladder, teacher_of(s)), epochs=1.0)
    trained = s.run.finished("distill", Trained)
    assert trained is not None
    return trained


def test_blocks_of_the_same_name_but_another_width_are_projected(tmp_path):
    blocks = ("blocks.0", "blocks.2")
    trained = run_distill(tmp_path, tiny_vit(embed_dim=12, num_heads=2), tiny_vit(), blocks, blocks)
    assert trained.losses["feature"][-1] > 0
    assert not any("projection" in name for name in trained.tensors)


def test_where_the_student_has_no_blocks_the_logits_teach_alone(tmp_path):
    trained = run_distill(tmp_path, tiny_vit(embed_dim=12, num_heads=2), tiny_vit(), ("blocks.2",), ())
    assert "feature" not in trained.losses
    assert "logit" in trained.losses


@pytest.mark.parametrize("student_blocks", [("blocks.2",), ()])
def test_where_nothing_of_the_teacher_is_known_the_last_two_stages_are_compared(tmp_path, student_blocks):
    trained = run_distill(tmp_path, tiny_vit(embed_dim=12, num_heads=2), tiny_vit(), (), student_blocks)
    assert trained.losses["feature"][-1] > 0


def test_a_student_is_built_for_the_teachers_images():
    vit = build_student(
        StudentOptions(student="vit_tiny_patch16_224", student_args={"depth": "1"}), 5, SPEC, 0
    )
    assert vit.model.patch_embed.img_size == (32, 32)
    any_size = build_student(RESNET, 5, SPEC, 0)
    assert any_size.model(random_images(2, size=32)).shape == (2, 5)
    assert any_size.blocks == compared_blocks(find_groups(any_size.model))


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("resnet18", {"nonsense": "1"}, "--student-args"),
        ("mixer_s32_224", {"img_size": "224"}, "--student mixer_s32_224 cannot run on images of 32 x 32 x 3"),
    ],
)
def test_a_student_that_does_not_fit(name, args, said):
    with pytest.raises(ConfigError) as caught:
        build_student(StudentOptions(student=name, student_args=args), 5, SPEC, 0)
    assert said in str(caught.value)


def test_oblong_images_are_refused_where_it_cannot_be_told_how_states_lie():
    """The student itself may be: only losses that match maps of two architectures need squares."""
    oblong = InputSpec((32, 64), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert build_student(RESNET, 5, oblong, 0).blocks
    tokens = Output(torch.zeros(2, 5), [torch.zeros(2, 33, 4)], torch.zeros(2, 4))
    oblongs = pair(tokens, tokens, blank=torch.zeros(2, 3, 32, 64), is_other_student=True)
    with pytest.raises(ConfigError, match="of images of 32 x 64 it cannot be told how states of shape"):
        make_distillation(LossOptions(), oblongs, seed=0)


def test_the_seed_says_which_weights_a_student_starts_from():
    weights = [build_student(RESNET, 5, SPEC, seed).model.conv1.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert timm.is_model("cifar_resnet20")
