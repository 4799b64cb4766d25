"""A loss that is chosen by its name is given the right tensors: it pulls at the student."""

from __future__ import annotations

import pytest
import torch

from stepwell.config.loss_facts import FEATURE_LOSSES, LOGIT_LOSSES
from stepwell.config.options import LossOptions
from stepwell.errors import ConfigError
from stepwell.losses.choose import Pair
from stepwell.losses.distillation import Distillation, make_distillation
from stepwell.losses.observe import Observed
from stepwell.losses.output import Output, Target, TrainingImages
from tiny import NUM_CLASSES, pair, random_images, tiny_vit

BLOCKS = ("blocks.0", "blocks.2")
LABELS = torch.arange(NUM_CLASSES)


# For students of another architecture alone: test_loss_scalekd.py.
BETWEEN_SLICES = [name for name, facts in FEATURE_LOSSES.items() if not facts.reads_stages]
# Of masks: test_losses_on_masks.py.
ALONE = [
    name
    for name in (*LOGIT_LOSSES, *BETWEEN_SLICES)
    if {**LOGIT_LOSSES, **FEATURE_LOSSES}[name].masks != "only"
]


@pytest.mark.parametrize("name", ALONE)
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


def loss_on_wide_images(name: str, *shapes: tuple[int, ...]) -> Distillation:
    """Of two models that are told apart only by their states, for images twice as wide as high."""
    output = Output(torch.zeros(2, 4), [torch.zeros(2, *shape) for shape in shapes], torch.zeros(2, 8))
    known = pair(output, output, blank=torch.zeros(2, 3, 16, 32), is_other_student=True)
    return make_distillation(LossOptions(feature_loss=name), known, seed=0)


@pytest.mark.parametrize("name", ["at", "fitnet", "states", "ofa"])
@pytest.mark.parametrize("shape", [(128, 8), (8, 16, 4)], ids=["tokens", "channels last"])
def test_states_of_images_that_are_not_square_are_refused_where_they_cannot_be_laid_out(name, shape):
    with pytest.raises(ConfigError, match=f"--feature-loss {name} compares maps, and of images of 16 x 32 "):
        loss_on_wide_images(name, shape)


def test_maps_of_images_that_are_not_square_are_compared_as_they_are():
    loss = loss_on_wide_images("at", (6, 8, 16), (8, 4, 8))
    maps = [torch.randn(2, 6, 8, 16, requires_grad=True), torch.randn(2, 8, 4, 8, requires_grad=True)]
    ours = Output(torch.zeros(2, 4), maps, torch.zeros(2, 8))
    theirs = ours._replace(states=[2 * m.detach() ** 2 for m in maps])
    known = Target(torch.tensor([0, 1]), torch.arange(2), 0.5)
    loss(ours, theirs, known)["feature"].backward()
    assert all(m.grad.abs().sum() > 0 for m in maps)


def test_losses_that_read_no_maps_take_images_of_any_shape():
    assert loss_on_wide_images("rkd", (128, 8)).feature is not None
