"""A student that is a backbone of its own width: nothing of it returns the teacher's embedding.

It learns from hidden states alone (`--logit-weight 0`), and what it returns cannot be compared with what the
teacher returns but through a map. So it is measured through the best linear one, which is fitted on the
scored training images whenever something is measured, and is in no file.
"""

from __future__ import annotations

import torch
from torch import nn

from stepwell.errors import ConfigError
from stepwell.losses.choose import Pair
from stepwell.losses.distillation import make_distillation
from stepwell.losses.observe import Observed
from stepwell.losses.output import Target
from stepwell.models.card import example_images
from stepwell.setting.setting import Setting
from stepwell.tasks import embedding
from stepwell.tasks.measures import Forward
from stepwell.training.linear_map import fitted_map


def measured(s: Setting, model: nn.Module, *, is_other: bool) -> Forward:
    """What is measured of a model, in eval mode: its answers; of such a student, their linear map to the
    teacher's embedding."""
    if not (is_other and s.has_own_width):
        return model
    found = embedding.evaluate(model, s.scored, "fit a linear map")
    mapped = fitted_map(torch.nan_to_num(found.probabilities), found.labels)
    return lambda images: mapped(model(images))


def check_all_is_trained(s: Setting) -> None:
    """Check that the loss on hidden states trains all of the student: nothing else does.

    Raises:
        ConfigError: Some layers behind its last state would stay random.
    """
    if s.other_student is None or not s.has_own_width:
        return
    model, (ours, theirs) = s.fresh_student(), s.compared(True)
    assert model is not None
    images = example_images(s.spec, 4).to(s.device)
    with torch.enable_grad():
        learner, teacher = Observed(model.eval(), ours), Observed(s.teacher.answering, theirs)
        student, answer = learner(images), teacher(images)
        pair = Pair(student, answer, teacher, images, s.training_images, True, s.data.task, s.stages)
        indices = torch.zeros(len(images), dtype=torch.int64, device=s.device)
        loss = make_distillation(s.config, pair, s.config.seed)
        for phase in loss.phases[-1:]:
            loss.begin(phase)
        loss(student, answer, Target(indices, indices, 0.5))["loss"].backward()
    # Vectors are norms and biases, which begin as nothing.
    random = [name for name, p in model.named_parameters() if p.grad is None and p.ndim > 1]
    if random:
        raise ConfigError(
            f"--logit-weight 0: {random[0]} of --student {s.other_student.name} lies behind the last states "
            f"that --feature-loss {s.config.feature_loss} compares, so nothing would train it: leave it out"
        )
