"""The networks of a loss run in the number format of the models; what is compared is fp32."""

from __future__ import annotations

import pytest
import torch
from test_loss_scalekd import pair_of, resnet, swin
from torch import Tensor, nn

from blocks import shaken
from stepwell.config.options import LossOptions, TrainingOptions
from stepwell.data.batches import Batch
from stepwell.losses.distillation import make_distillation
from stepwell.losses.output import Output, Target
from stepwell.losses.scalekd import loss as scalekd
from stepwell.losses.scalekd.loss import ScaleKD
from stepwell.run.device import autocast_of
from stepwell.stages.distill import DistillStep
from stepwell.training.lesson import Lesson
from tiny import NUM_CLASSES, pair, random_images

BF16 = autocast_of(TrainingOptions(precision="bf16"), torch.device("cpu"))
LAYERS = (nn.Linear, nn.Conv2d)


def formats_of(model: nn.Module) -> dict[str, set[torch.dtype]]:
    """What each of its layers returns, told while it runs."""
    seen: dict[str, set[torch.dtype]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            module.register_forward_hook(
                lambda _m, _i, y, name=name: seen.setdefault(name, set()).add(y.dtype)
            )
    return seen


def output(channels: int, seed: int, *, is_dense: bool = False) -> Output:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(4, *shape, generator=generator)

    maps = [drawn(channels, 8, 8), drawn(2 * channels, 4, 4)]
    if is_dense:
        return Output(drawn(NUM_CLASSES, 8, 8), maps, maps[0])
    return Output(drawn(NUM_CLASSES), maps, maps[-1].mean((2, 3)))


@pytest.mark.parametrize("name", ["states", "fitnet", "ab", "ft", "vid", "review", "ofa", "cwd", "cirkd"])
def test_the_networks_of_a_loss_run_as_the_models_do(name):
    is_dense = name in ("cwd", "cirkd")
    student, teacher = output(4, 0, is_dense=is_dense), output(8, 1, is_dense=is_dense)
    options = LossOptions(feature_loss=name, logit_weight=0)
    between = pair(
        student, teacher, is_other_student=True, task="segmentation" if is_dense else "classification"
    )
    labels = torch.zeros(4, *((8, 8) if is_dense else ()), dtype=torch.int64)
    found = {}
    for precision in ("fp32", "bf16"):
        loss = make_distillation(options, between, seed=0)
        seen = formats_of(loss)
        loss.run_networks_in(autocast_of(TrainingOptions(precision=precision), torch.device("cpu")))
        values = []
        for phase in (*loss.phases, "main"):  # twice: the first time CIRKD knows nothing to compare with
            loss.begin(phase)
            values.append(loss(student, teacher, Target(labels, torch.arange(4), 0.5))["loss"])
        assert {value.dtype for value in values} == {torch.float32}
        expected = torch.bfloat16 if precision == "bf16" else torch.float32
        assert set().union(*seen.values()) == {expected}
        found[precision] = [value.item() for value in values]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.02)
    assert found["bf16"] != found["fp32"]


def test_a_step_of_scalekd_runs_projectors_and_the_teachers_tail_as_the_models(monkeypatch):
    """Both times that the tail runs; the two views see fp32."""
    teacher, student = shaken(swin).float(), shaken(resnet).float()
    images, compared = random_images(3, size=32), []
    between, learner, observed = pair_of(teacher, student, images)
    loss = make_distillation(LossOptions(feature_loss="scalekd", task_weight=0.5), between, seed=0)
    assert isinstance(loss.feature, ScaleKD)
    for name, view in dict(scalekd.VIEWS).items():

        def watched(ours: Tensor, theirs: Tensor, view=view) -> Tensor:
            compared.extend((ours.dtype, theirs.dtype))
            return view(ours, theirs)

        monkeypatch.setitem(scalekd.VIEWS, name, watched)
    of_loss, of_teacher, of_student = (formats_of(model) for model in (loss, teacher, student))
    step = DistillStep(Lesson([observed], [loss], BF16), learner)
    losses = step(Batch(images, torch.arange(3), torch.arange(3)), 0)
    for seen in (of_loss, of_teacher, of_student):
        assert not [name for name, formats in seen.items() if formats != {torch.bfloat16}]
    assert "feature.third.original.to_key" in of_loss
    assert "layers.1.blocks.0.attn.qkv" in of_teacher
    assert compared == [torch.float32] * 8
    assert losses["feature"].dtype == torch.float32
    assert student.layer1[0].conv1.weight.grad.abs().sum() > 0
