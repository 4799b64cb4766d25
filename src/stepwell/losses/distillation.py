"""What a student minimises: the labels' term, one on the logits, one on hidden states or features.

The defaults are AMD's loss (supplementary, Eq. 3 as we read it): cross-entropy, KL divergence, squared
distance of hidden states. The first two are those of the task.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepwell.config.options import LossOptions, TaskName
from stepwell.errors import ConfigError
from stepwell.losses.choose import Call, Pair, feature_loss, logit_loss
from stepwell.losses.cirkd import CIRKD
from stepwell.losses.kept import Kept, on_kept
from stepwell.losses.networks import LossWithNetworks
from stepwell.losses.output import Output, Target, arguments
from stepwell.losses.sskd import rotations
from stepwell.run.processes import alone
from stepwell.tasks.task import loss_of, task_of

Phase = Literal["pretraining", "main"]
"""Some losses have a pretraining; see `LossFacts.pretraining`."""


class Distillation(nn.Module):
    """loss = task_weight * CE + logit_weight * LOGIT + feature_weight * FEATURE, for one pair of models.

    That AMD's three terms are these is certain from the supplementary; that its alpha belongs to the logits
    and its beta to the states is our reading (docs/method.md). A term with weight 0 is not computed.

    What is saved and trained with it are its parameters and buffers: those of its terms. What a term borrows
    of a model (`Observed.after`) is a function, and no part of it.

    Args:
        options: Weights, and over which share of the training the teacher's two terms rise from 0.
        logit: From the two models' logits; None where the weight is 0.
        feature: From their hidden states or features; None where the weight is 0, or one has no states.
        task: What the models are for; the labels' term is its loss.
        kept: Which channels of the teacher's states are compared; nothing for all.
    """

    def __init__(
        self,
        options: LossOptions,
        logit: Call | None,
        feature: Call | None,
        task: TaskName = "classification",
        kept: Sequence[Kept | None] = (),
    ) -> None:
        super().__init__()
        self._loss_per_image = loss_of(task_of(task), options.class_weights)
        self._has_labels = task != "features"
        self.kept = tuple(kept)
        self.options, self.logit, self.feature = options, logit, feature
        self.phase: Phase = "main"

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The trainings that it takes, in their order."""
        has_pretraining = self.feature is not None and self.options.pretraining is not None
        return ("pretraining", "main") if has_pretraining else ("main",)

    def begin(self, phase: Phase) -> None:
        """Enter a phase; a loss with a pretraining of the student is no part of the main one."""
        if phase == "main" and self.options.feature_facts.is_silent_after_pretraining:
            self.feature = None
        self.phase = phase

    @property
    def runs_student(self) -> bool:
        """Whether the student has to run in this phase: not while a loss only trains parts of its own."""
        return not (self.phase == "pretraining" and self.options.pretraining == "loss")

    @property
    def runs_teacher(self) -> bool:
        """Whether any term needs the teacher's outputs."""
        return self.logit is not None or self.feature is not None

    def run_networks_in(self, autocast: torch.autocast) -> None:
        """Let the networks of the terms run in the number format of the models."""
        if isinstance(self.feature, LossWithNetworks):
            self.feature.autocast = autocast

    def views(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "views channels height width"]:
        """The images that both models see; some losses add turned copies behind them."""
        if self.feature is None or not self.options.feature_facts.rotations:
            return images
        try:
            return rotations(images)
        except ValueError as error:  # images that cannot be turned
            raise ConfigError(f"--feature-loss {self.options.feature_loss}: {error}") from None

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that a term does not want decayed, besides norms and biases."""
        terms = {"logit": self.logit, "feature": self.feature}
        return {
            f"{term}.{name}"
            for term, loss in terms.items()
            for name in getattr(cast(Any, loss), "no_weight_decay", set)()
        }

    def forward(
        self, student: Output, teacher: Output, target: Target, task: bool = True
    ) -> dict[str, Float[Tensor, ""]]:
        """`loss`, and the parts it is made of before their weights: `task`, `logit`, `feature`.

        Args:
            student: The student's output for all views.
            teacher: The teacher's output for all views.
            target: What is known of the images themselves, the first of the views.
            task: Whether the labels' term is part; a student of several teachers has it once.
        """
        options, num_images = self.options, len(target.labels)
        if self.feature is not None:
            teacher = on_kept(teacher, self.kept)
        if self.phase == "pretraining":
            return {"loss": self._pretraining(student, teacher, target)}
        rise = min(1.0, target.progress / options.loss_warmup) if options.loss_warmup else 1.0
        plain = student._replace(logits=student.logits[:num_images])
        given = teacher._replace(logits=teacher.logits[:num_images])
        parts, total = {}, []
        if task and options.task_weight and self._has_labels:
            loss = self._loss_per_image(plain.logits, target.labels, options.label_smoothing)
            parts["task"] = loss.mean()
            total.append(options.task_weight * parts["task"])
        if self.logit is not None:
            parts["logit"] = self.logit(*arguments(options.logit_facts, plain, given, target))
            total.append(rise * options.logit_weight * parts["logit"])
        if self.feature is not None:
            parts["feature"] = self.feature(*arguments(options.feature_facts, student, teacher, target))
            total.append(rise * options.feature_weight * parts["feature"])
        assert total, "LossOptions allows at most two weights of 0"
        return {"loss": sum(total[1:], start=total[0]), **parts}

    def _pretraining(self, student: Output, teacher: Output, target: Target) -> Tensor:
        assert self.feature is not None
        given = arguments(self.options.feature_facts, student, teacher, target)
        if self.options.pretraining == "student":
            return self.feature(*given)
        return cast(Any, self.feature).pretraining_loss(given[1])  # the teacher's piece of the first pair


def make_distillation(options: LossOptions, pair: Pair, seed: int) -> Distillation:
    """The loss that `options` describe, for two models.

    Args:
        options: Names, weights, arguments; a loss for students of another architecture alone says what stands
            in its place between slices of one.
        pair: The models, by example.
        seed: Of the parameters that a loss has of its own.

    Raises:
        ConfigError: A loss does not take such an argument, or does not suit these models.
    """
    if options.feature_weight and not pair.is_other_student:
        options = options.model_copy(update=dict(options.feature_facts.between_slices))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # All channels where the student's are projected onto them, and for a network that looks at the
        # teacher alone, which is one for all candidates.
        sees_all = options.project_states or options.feature_facts.pretraining == "loss"
        kept = () if sees_all else pair.kept
        seen = replace(pair, teacher=on_kept(pair.teacher, kept))
        logit, feature = logit_loss(options, seen), feature_loss(options, seen)
    loss = Distillation(options, logit, feature, pair.task, kept)
    held = [module for module in loss.modules() if module is pair.observed_teacher.model]
    assert not held, "a loss borrows of the teacher what Pair.after returns, and never keeps the teacher"
    return loss.to(pair.student.logits.device)


def share_teacher_side(losses: Sequence[Distillation]) -> None:
    """Let losses of several students of one teacher use the first one's networks that look at the teacher.

    A loss names them in `teacher_side`. With one for each student, those of a student that is drawn in every
    eighth step would be trained for an eighth of the time, to encode the same teacher.
    """
    for loss in losses[1:]:
        for name in getattr(loss.feature, "teacher_side", ()):
            setattr(loss.feature, name, getattr(losses[0].feature, name))


def loss_macs(loss: Distillation, pair: Pair, batch_size: int) -> dict[Phase, float]:
    """Multiply-accumulates of the loss itself, forward and backward, per image and by phase.

    Those of its projectors, heads and memories, and of the rest of the teacher where it lets that run; the
    models' own are not among them.

    Args:
        loss: One that was made for this count alone: a memory is written to, and the last phase entered.
        pair: The models that it was made for.
        batch_size: Images of a step; what relates all images of a batch grows with it.
    """
    device, phases = pair.student.logits.device, {}
    student = _as_leaves(pair.student, batch_size * loss.options.views, learns=True)
    teacher = _as_leaves(pair.teacher, batch_size * loss.options.views, learns=False)
    indices = torch.zeros(batch_size, dtype=torch.int64, device=device)
    like = pair.training_images.labels
    labels = indices if like is None else like.new_zeros((batch_size, *like.shape[1:]), device=device)
    if pair.task == "segmentation":
        labels = indices.new_zeros((batch_size, *pair.student.logits.shape[2:]))
    if isinstance(loss.feature, CIRKD):
        loss.feature.fill()
    for phase in loss.phases:
        loss.begin(phase)
        # The fused attention kernels are not all known to the counter; the plain one is two matrix products.
        counting = FlopCounterMode(display=False)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), alone(), counting as counter:
            loss(student, teacher, Target(labels, indices, progress=0.5))["loss"].backward()
        phases[phase] = counter.get_total_flops() / 2 / batch_size
    return phases


def _as_leaves(output: Output, num_images: int, *, learns: bool) -> Output:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor[:1].detach().expand(num_images, *tensor.shape[1:]).clone().requires_grad_(learns)

    return Output(leaf(output.logits), [leaf(state) for state in output.states], leaf(output.features))


def loss_parameters(losses: Iterable[Distillation]) -> dict[str, nn.Parameter]:
    """What the losses of a step train besides the models, by names of their own; what they share, once."""
    names: dict[nn.Parameter, str] = {}
    for i, loss in enumerate(losses):
        for name, parameter in loss.named_parameters():
            if parameter.requires_grad:
                names.setdefault(parameter, f"losses.{i}.{name}")
    return {name: parameter for parameter, name in names.items()}
