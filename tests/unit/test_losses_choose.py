"""A loss that is chosen by its name is given the right tensors: it pulls at the student."""

from __future__ import annotations

import pytest
import torch

from stepwell.config.loss_facts import FEATURE_LOSSES, LOGIT_LOSSES
from stepwell.config.options import LossOptions
from stepwell.losses.choose import Pair
from stepwell.losses.distillation import make_distillation
from stepwell.losses.observe import Observed
from stepwell.losses.output import Target, TrainingImages
from tiny import NUM_CLASSES, random_images, tiny_vit

BLOCKS = ("blocks.0", "blocks.2")
LABELS = torch.arange(NUM_CLASSES)


@pytest.mark.parametrize("name", [*LOGIT_LOSSES, *FEATURE_LOSSES])
def test_a_loss_alone_pulls_at_the_student(name):
    """With its weight, and down to the first layer."""
    kind = "logit" if name in LOGIT_LOSSES else "feature"
    weights = {"task_weight": 0.0, "logit_weight": 0.0, "feature_weight": 0.0, f"{kind}_weight": 2.0}
    if name in ("ab", "fsp"):  # silent after the training that comes first: another must be left
        weights["task_weight"] = 1.0
    options = LossOptions.model_validate({f"{kind}_loss": name, **weights})
    teacher, student = tiny_vit(seed=1), tiny_vit(seed=2).train()
    images = random_images(len(LABELS))
    observed = Observed(teacher, BLOCKS)
    example, known = observed(images[:2]), TrainingImages(LABELS, len(LABELS))
    loss = make_distillation(options, Pair(example, example, observed, images[:2], known), seed=0)
    seen = loss.views(images)
    answers = [Observed(model, BLOCKS)(seen) for model in (student, teacher)]
    parts = loss(*answers, Target(LABELS, LABELS, 0.5), task=False)
    assert set(parts) == {"loss", kind}
    assert float(parts["loss"].detach()) == pytest.approx(2 * float(parts[kind].detach()), rel=1e-6)
    parts["loss"].backward()
    assert student.patch_embed.proj.weight.grad.abs().sum() > 0
