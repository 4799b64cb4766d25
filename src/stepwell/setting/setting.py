"""Everything that a path needs and that no stage changes: teacher, images, device, options, run directory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from stepwell.config.commands import CompressConfig
from stepwell.data.batches import EvalBatches, OnBatch, TrainBatches
from stepwell.data.images import ImageSet
from stepwell.data.labels import as_tensor, classes_of
from stepwell.data.spec import InputSpec
from stepwell.data.splits import Data
from stepwell.errors import DataError
from stepwell.losses.distillation import Phase
from stepwell.losses.output import TrainingImages
from stepwell.losses.scalekd.stages import Stages, find_stages, no_stages
from stepwell.measure.cost import Costs, OtherTeacher
from stepwell.measure.size import count_macs
from stepwell.models.card import Architecture, Card
from stepwell.models.student import OtherStudent
from stepwell.models.teacher import Teacher
from stepwell.pruning.blocks import compared_blocks
from stepwell.pruning.units import Group
from stepwell.run.device import autocast_of, scaler_of
from stepwell.run.observer import Split
from stepwell.run.run_dir import RunDir
from stepwell.tasks.measures import Metric
from stepwell.tasks.task import Task, task_of
from stepwell.training.optimizer import no_decay_of
from stepwell.training.statistics import NUM_IMAGES, norms_with_statistics


@dataclass(frozen=True)
class Setting:
    """What a run works with; made by `prepare`.

    Attributes:
        config: All options; a function further down takes the group that it needs.
        run: Where results are kept.
        teacher: What is compressed, in eval mode, frozen, and lies where `placed` puts it.
        groups: The units that may be cut.
        other_student: The student, where it is of another architecture than the teacher.
        data: The images.
        classes: Their names.
        device: What is computed on.
        loss_macs: What the loss of the student computes by itself for one image, forward and backward, by
            phase of a training.
        slice_loss_macs: The same of the loss between slices of one model, where that is another one.
        baseline: The same setting with a stock network as the student, where one is asked for.
        other_teachers: The same setting under each of `--teachers`, where the student has several.
        unit_macs: Multiply-accumulates of one pass, where `teacher` is one of these and not the last.
    """

    config: CompressConfig
    run: RunDir
    teacher: Teacher
    groups: list[Group]
    other_student: OtherStudent | None
    data: Data
    classes: tuple[str, ...]
    device: torch.device
    loss_macs: Mapping[Phase, float] = field(default_factory=dict)
    slice_loss_macs: Mapping[Phase, float] | None = None
    baseline: Setting | None = None
    other_teachers: tuple[Setting, ...] = ()
    unit_macs: int | None = None

    @property
    def model(self) -> nn.Module:
        """The teacher's module, whole: what is cut."""
        return self.teacher.model

    @property
    def spec(self) -> InputSpec:
        """The images that the teacher wants."""
        return self.teacher.spec

    @property
    def task(self) -> Task:
        """What the models are for."""
        return task_of(self.data.task)

    @property
    def has_labels(self) -> bool:
        """Whether models are measured by labels, and not by the teacher."""
        return self.data.labelled and self.data.task != "features"

    @property
    def has_own_width(self) -> bool:
        """Whether the student of another architecture returns features of its own, and no embedding like the
        teacher's, which nothing would teach it."""
        is_other = self.other_student is not None
        return is_other and self.data.task == "features" and not self.config.logit_weight

    @property
    def teacher_is_ours(self) -> bool:
        """Whether stepwell trained all teachers on the same images, and so left out the same ones."""
        trained_on = [s.teacher.trained_on for s in (self, *self.other_teachers)]
        return all(fingerprint == self.data.fingerprint for fingerprint in trained_on)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The teacher's blocks whose hidden states are looked at."""
        return self.config.observed(compared_blocks(self.groups, self.config.feature_layers))

    def compared(self, is_other: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The blocks of student and teacher whose states are compared, in a step to a slice or to
        the student of another architecture."""
        if not is_other or self.other_student is None:
            return self.blocks, self.blocks
        if self.stages is not None:
            return self.stages[0].blocks, self.stages[1].blocks
        return self.config.observed(self.other_student.blocks), self.blocks

    @cached_property
    def stages(self) -> tuple[Stages, Stages] | None:
        """The last two stages of the other student and of the teacher, where the loss compares these: one
        that is made for them, or any on states if the teacher has no blocks that are known.

        Raises:
            ConfigError: A model has no states that are known.
        """
        other, config = self.other_student, self.config
        facts = config.feature_facts
        if other is None or not config.feature_weight or not facts.needs_states:
            return None
        if not facts.reads_stages and self.groups:
            return None
        found = []
        own_size = self.teacher.seen_size
        for name, model, blocks, size in (
            (f"--student {other.name}", other.model, other.blocks, self.spec.size),
            (self.teacher.name, self.model, compared_blocks(self.groups), own_size),
        ):
            device = next(model.parameters()).device
            blank = torch.zeros(1, self.spec.channels, *size, device=device)
            if (stages := find_stages(model, blank, blocks)) is None:
                if not facts.reads_stages:
                    return None
                raise no_stages(config.feature_loss, name, model, blocks)
            found.append(stages)
        return found[0], found[1]

    @cached_property
    def no_decay(self) -> frozenset[str]:
        """Parameters of the teacher without weight decay."""
        return no_decay_of(self.model)

    @cached_property
    def teacher_macs(self) -> int:
        """Multiply-accumulates of the teacher for one image; of several, of the last."""
        return self.unit_macs or count_macs(self.model, self.spec)

    @cached_property
    def metric(self) -> Metric:
        """What the selection images are read by."""
        return self.task.resolve_metric(self.config.metric, len(self.data.selection))

    @property
    def autocast(self) -> torch.autocast:
        """The number format of forward passes in training."""
        return autocast_of(self.config, self.device)

    @property
    def scaler(self) -> torch.amp.GradScaler:
        """What the losses of a training are multiplied by, for the range of that format."""
        return scaler_of(self.config, self.device)

    def with_lr(self, lr: float) -> Setting:
        """The same with another peak learning rate, for the baseline too; batches and counts do not depend on
        it, and are kept."""
        baseline = self.baseline and self.baseline.with_lr(lr)
        return self._but(config=self.config.model_copy(update={"lr": lr}), baseline=baseline)

    def with_note(self, note: str) -> Setting:
        """The same with something more to be told of its teacher."""
        return self._but(teacher=replace(self.teacher, notes=(*self.teacher.notes, note)))

    def _but(self, **changes: object) -> Setting:
        """What was computed does not depend on the changes, and is kept."""
        other = replace(self, **changes)  # pyright: ignore[reportArgumentType]
        vars(other).update({name: value for name, value in vars(self).items() if name not in vars(other)})
        return other

    def under(self, other: Setting) -> Setting:
        """One of `other_teachers` with this one's options, and its images, which are decoded once."""
        taught = replace(other, config=self.config)
        vars(taught).update(train=self.train, selection=self.selection)
        return taught

    def fresh_student(self) -> nn.Module | None:
        """A copy of the untrained student of another architecture, on the device; None if there is none."""
        return copy.deepcopy(self.other_student.model).to(self.device) if self.other_student else None

    def costs(self, scales: Sequence[float]) -> Costs:
        """Operation counts of a run whose candidates have these shares of the teacher's MACs."""
        sliced = self.slice_loss_macs
        return Costs(
            self.config,
            scales,
            self.other_scale or scales[0],
            num_train=len(self.data.train),
            num_selection=len(self.data.selection),
            loss=self._passes(self.loss_macs, "main"),
            pretraining_loss=self._passes(self.loss_macs, "pretraining"),
            slice_loss=None if sliced is None else self._passes(sliced, "main"),
            slice_pretraining_loss=None if sliced is None else self._passes(sliced, "pretraining"),
            has_statistics=bool(norms_with_statistics(self.model)),
            is_mapped=self.has_own_width,
            other_teachers=[other.as_other_teacher for other in self.other_teachers],
        )

    @property
    def as_other_teacher(self) -> OtherTeacher:
        """What this one's teacher costs, who is one of several."""
        return OtherTeacher(
            count_macs(self.model, self.spec) / self.teacher_macs,
            self._passes(self.loss_macs, "main"),
            self._passes(self.loss_macs, "pretraining"),
        )

    def _passes(self, loss_macs: Mapping[Phase, float], phase: Phase) -> float:
        # Most losses compute nothing by themselves: then the teacher need not be counted either.
        macs = loss_macs.get(phase, 0.0)
        return macs / self.teacher_macs if macs else 0.0

    @cached_property
    def other_scale(self) -> float | None:
        """Share of the teacher's MACs of the student of another architecture, if there is one."""
        if self.other_student is None:
            return None
        return count_macs(self.other_student.model, self.spec) / self.teacher_macs

    @cached_property
    def train(self) -> TrainBatches:
        """Training images, augmented, in random order."""
        return TrainBatches(
            self.data.train,
            self.spec,
            self.config,
            self.config.seed,
            self.device,
            self._shown("training"),
            recipe=self.config,
            num_classes=len(self.classes),
        ).of_views(self.config.cache_teacher)

    @cached_property
    def training_images(self) -> TrainingImages:
        """What is known of all training images, for losses that keep a memory of them."""
        return TrainingImages(as_tensor(self.data.train.labels), len(self.data.train))

    @cached_property
    def known(self) -> EvalBatches:
        """All training images as they are, among which neighbours of test images are looked for."""
        return EvalBatches(self.data.train, self.spec, self.config, self.device)

    @cached_property
    def scored(self) -> EvalBatches:
        """The first `score_images` training images in the order of a seeded shuffle, as they are.

        They stay in that order: sorted, a batch would hold images of one class, and lack the variance
        between classes where BatchNorm statistics are recomputed.
        """
        return self._some_training_images(self.config.score_images)

    @cached_property
    def of_statistics(self) -> EvalBatches:
        """The first of the scored images: BatchNorm statistics are recomputed on them."""
        return self._some_training_images(min(NUM_IMAGES, self.config.score_images)).undivided()

    def _some_training_images(self, number: int) -> EvalBatches:
        order = torch.randperm(
            len(self.data.train), generator=torch.Generator().manual_seed(self.config.seed)
        )
        chosen = order[:number]
        shown = self._shown("training")
        return self._plain(self.data.train.subset(chosen.tolist()), lambda i: shown(chosen[i]))

    @cached_property
    def selection(self) -> EvalBatches:
        """The images that choose the assistant, and between student and control."""
        return self._plain(self.data.selection, self._shown("selection"))

    @cached_property
    def test(self) -> EvalBatches:
        """The images that decide nothing and are looked at once, at the end."""
        return self._plain(self.data.test, self._shown("test"))

    def _plain(self, images: ImageSet, shown: OnBatch) -> EvalBatches:
        """Batches without augmentation, with the teacher's own answers as labels where there are none."""
        batches = EvalBatches(images, self.spec, self.config, self.device, on_batch=shown)
        if self.has_labels:
            return batches
        answers = self.task.predict(self.teacher.answering, batches, "teacher's answers").decided
        if not isinstance(answers, Tensor) and not any(map(classes_of, answers)):
            raise DataError(
                f"{self.teacher.name} finds no class more probable than not in any of {len(images)} images "
                f"without labels, so no model can be measured by it: give labels, or other images"
            )
        return EvalBatches(images, self.spec, self.config, self.device, answers, shown)

    def _shown(self, split: Split) -> OnBatch:
        def tell(indices: Tensor) -> None:
            self.run.observer.on_batch(self.run.open_stage, split, indices)

        return tell

    def card(self, widths: dict[str, int], **provenance: object) -> Card:
        """The card of a slice of the teacher with `widths` units per group."""
        # Groups that an earlier run emptied are no longer among this teacher's groups.
        return self._card(self.teacher.architecture, {**self.teacher.widths, **widths}, provenance)

    def student_card(self, widths: dict[str, int], **provenance: object) -> Card:
        """The card of the student: a slice with `widths`, or the model of another architecture."""
        if self.other_student is None:
            return self.card(widths, **provenance)
        return self._card(self.other_student.architecture, {}, provenance)

    def _card(self, architecture: Architecture, widths: dict[str, int], more: dict[str, object]) -> Card:
        return Card(
            architecture=architecture,
            widths=widths,
            classes=list(self.classes),
            input=self.spec,
            task=self.data.task,
            colours=self.data.colours,
            numbers=self.data.mask_numbers,
            provenance={"teacher": self.teacher.name, "data": self.data.source, **more},
        )
