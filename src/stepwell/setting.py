"""Everything that a path needs and that no stage changes: teacher, images, device, options, run directory."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from stepwell.config import CompressConfig
from stepwell.delivery.archive import Architecture, Card, example_images
from stepwell.delivery.input import check_runs
from stepwell.delivery.measure import count_macs, evaluate
from stepwell.delivery.student import Foreign, build_student
from stepwell.delivery.teacher import Teacher, placeholders
from stepwell.errors import ConfigError, DataError, UnsupportedModelError
from stepwell.losses.distillation import make_distillation
from stepwell.losses.output import Output, TrainingImages
from stepwell.options import NEED_LABELS, NEED_STATES, TrainingOptions
from stepwell.pruning.families import find_groups
from stepwell.pruning.generic import propose
from stepwell.pruning.prove import proven
from stepwell.pruning.states import WithStates, compared_blocks
from stepwell.pruning.units import Group
from stepwell.training.batches import EvalBatches, InputSpec, TrainBatches
from stepwell.training.data import Data, ImageSet
from stepwell.training.progress import say
from stepwell.training.run_dir import RunDir

CPU = torch.device("cpu")
POSITIONS = ("relative_position_bias", "logit_scale", "cpb_mlp", "meta_mlp", "position_embeddings")
"""What tables of positions and learned temperatures are called; not every library says so itself."""


@dataclass(frozen=True)
class Setting:
    """What a run works with; made by `prepare`."""

    config: CompressConfig
    run: RunDir
    teacher: Teacher
    groups: list[Group]
    """The units that may be cut."""
    foreign: Foreign | None
    """The student, where it is of another architecture than the teacher."""
    data: Data
    classes: tuple[str, ...]
    device: torch.device

    @cached_property
    def model(self) -> nn.Module:
        """The teacher on the device of this run, in eval mode, frozen."""
        return self.teacher.model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The blocks whose hidden states are compared."""
        return compared_blocks(self.groups, self.config.feature_layers)

    @cached_property
    def no_decay(self) -> frozenset[str]:
        """Parameters of the teacher without weight decay."""
        return no_decay_of(self.teacher.model)

    @property
    def foreign_blocks(self) -> tuple[str, ...] | None:
        """The blocks of a student of another architecture; None if it is a slice of the teacher."""
        return self.foreign.blocks if self.foreign else None

    def fresh_student(self) -> nn.Module | None:
        """A copy of the untrained student of another architecture, on the device; None if there is none."""
        return copy.deepcopy(self.foreign.model).to(self.device) if self.foreign else None

    @cached_property
    def teacher_macs(self) -> int:
        """Multiply-accumulates of the teacher for one image."""
        return count_macs(self.teacher.model, self.teacher.spec)

    @property
    def autocast(self) -> torch.autocast:
        """The number format of forward passes in training."""
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    @cached_property
    def train(self) -> TrainBatches:
        """Training images, augmented, in random order."""
        # Without labels none are needed: `prepare` has checked that the task's weight is 0 then.
        return TrainBatches(self.data.train, self.teacher.spec, self.config, self.config.seed, self.device)

    @cached_property
    def scored(self) -> EvalBatches:
        """The first `score_images` training images in the order of a seeded shuffle, as they are."""
        order = torch.randperm(
            len(self.data.train), generator=torch.Generator().manual_seed(self.config.seed)
        ).tolist()
        return self.plain(self.data.train.subset(sorted(order[: self.config.score_images])))

    @cached_property
    def selection(self) -> EvalBatches:
        """The images that choose the assistant, and between student and control."""
        return self.plain(self.data.selection)

    @cached_property
    def test(self) -> EvalBatches:
        """The images that decide nothing and are looked at once, at the end."""
        return self.plain(self.data.test)

    def read_images(self) -> None:
        """Decode what will be held in memory, so that a bad image is found before anything is begun."""
        TrainBatches(self.data.train, self.teacher.spec, self.config, self.config.seed, self.device)
        for images in (self.data.selection, self.data.test):
            EvalBatches(images, self.teacher.spec, self.config, self.device)

    def plain(self, images: ImageSet) -> EvalBatches:
        """Batches of `images` without augmentation."""
        return EvalBatches(images, self.teacher.spec, self.config, self.device, self.labels(images))

    def labels(self, images: ImageSet) -> list[int] | None:
        """The teacher's own answers where the images have no labels, else None (use the true ones)."""
        if self.data.labelled:
            return None
        batches = EvalBatches(images, self.teacher.spec, self.config, self.device)
        return evaluate(self.model, batches, "teacher's answers").probabilities.argmax(dim=1).tolist()

    def card(self, widths: dict[str, int], **provenance: object) -> Card:
        """The card of a slice of the teacher with `widths` units per group."""
        # Groups that an earlier run emptied are no longer among this teacher's groups.
        return self._card(self.teacher.architecture, {**self.teacher.widths, **widths}, provenance)

    def student_card(self, widths: dict[str, int], **provenance: object) -> Card:
        """The card of the student: a slice with `widths`, or the model of another architecture."""
        if self.foreign is None:
            return self.card(widths, **provenance)
        return self._card(self.foreign.architecture, {}, provenance)

    def _card(
        self, architecture: Architecture, widths: dict[str, int], provenance: dict[str, object]
    ) -> Card:
        return Card(
            architecture=architecture,
            widths=widths,
            classes=list(self.classes),
            input=self.teacher.spec,
            provenance={"teacher": self.teacher.name, "data": self.data.source, **provenance},
        )


def no_decay_of(model: nn.Module) -> frozenset[str]:
    """Norms, biases, scales, tables of positions, and what the model itself excepts (`no_weight_decay`)."""
    own = getattr(model, "no_weight_decay", None)
    plain = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 or any(part in name for part in POSITIONS)
    }
    return frozenset(plain | set(cast(Iterable[str], own()) if callable(own) else ()))


def prepare(
    config: CompressConfig, run: RunDir, teacher: Teacher, data: Data, student: nn.Module | None = None
) -> Setting:
    """Check that teacher, data and options agree, and put them together.

    Args:
        config: All options.
        run: Where the run is kept.
        teacher: What is compressed.
        data: The images.
        student: The module that `config.student` stands for, where the caller built it.

    Raises:
        UnsupportedModelError: No family can cut the teacher.
        DataError: The classes of teacher and data differ.
        ConfigError: There is no such device; or no labels, but a loss that needs them; or no filters, but a
            score that is for them.
    """
    classes = check_classes(teacher, data)
    if not data.labelled and config.task_weight:
        raise ConfigError(
            f"{data.source} has no class folders, so there are no labels to learn: pass --task-weight 0 "
            f"to learn from the teacher alone, or sort the images into train/CLASS/"
        )
    losses = {"--logit-loss": config.logit_weight, "--feature-loss": config.feature_weight}
    for (option, weight), name in zip(losses.items(), (config.logit_loss, config.feature_loss), strict=True):
        if not data.labelled and weight and name in NEED_LABELS:
            raise ConfigError(f"{option} {name} needs labels, and {data.source} has no class folders")
    foreign = None
    if config.student is not None:
        like = teacher.model if config.student_init == "teacher" else None
        foreign = build_student(
            student or config.student, config.student_args, len(classes), teacher.spec, config.seed, like
        )
    # Last of the checks: of a module of the user's own every group is tried.
    if teacher.architecture.source == "factory":
        images = few_images(data, teacher.spec, config)
        groups = groups_of_foreign(teacher.model, teacher.spec, images)
    else:
        groups = find_groups(teacher.model)
    if config.importance == "l1" and not any(group.kind == "filter" for group in groups):
        name = type(teacher.model).__name__
        raise ConfigError(f"--importance l1 is for convolution filters, and this {name} has none to cut")
    setting = Setting(config, run, teacher, groups, foreign, data, classes, set_up_torch(config))
    # An impossible layer, or nothing to learn from, is an error now, not after scoring.
    nothing = teacher.name if not setting.blocks else foreign.name if foreign and not foreign.blocks else None
    if config.feature_loss not in NEED_STATES:
        nothing = None
    if nothing and not config.task_weight and not config.logit_weight:
        raise ConfigError(
            f"{nothing} has no hidden states that can be compared, so --feature-weight alone teaches "
            f"nothing: leave --task-weight or --logit-weight above 0"
        )
    _try_losses(setting)
    return setting


def _try_losses(s: Setting) -> None:
    """Make the losses once: an argument that one does not take, or states it cannot compare, show now."""
    images = torch.zeros(2, s.teacher.spec.channels, *s.teacher.spec.size)
    with torch.no_grad():
        teacher = example = Output(*WithStates(s.teacher.model.eval(), s.blocks)(images))
        if s.foreign is not None:
            example = Output(*WithStates(s.foreign.model.eval(), s.foreign.blocks)(images))
    known = TrainingImages(None, len(images))  # a memory of all images would be large, and is not needed here
    loss = make_distillation(s.config, example, teacher, known, s.foreign is not None, s.config.seed)
    loss.views(images)
    if s.config.feature_weight and loss.feature is None:
        say(f"--feature-loss {s.config.feature_loss} is left out: there are no hidden states to compare")


def few_images(data: Data, spec: InputSpec, config: CompressConfig) -> Tensor:
    """The first selection images, normalised."""
    few = data.selection.subset(range(min(8, len(data.selection))))
    return next(iter(EvalBatches(few, spec, config, CPU))).images


def groups_of_foreign(model: nn.Module, spec: InputSpec, images: Tensor) -> list[Group]:
    """The groups of a module of the user's own that are proved to be cut rightly; says what stays whole.

    Args:
        model: In eval mode.
        spec: What it takes.
        images: A few real images, to prove it on.

    Raises:
        UnsupportedModelError: Nothing can be cut.
    """
    proposal = propose(model, example_images(spec))
    groups = proposal.groups
    # If the two kinds do not go together, what the families know is the surer one.
    good = proven(model, groups, images) or proven(model, proposal.known, images)
    refused = [group.name for group in groups if group not in good]
    if not good:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not supported: none of the {len(refused)} layers that look familiar "
            f"can be cut; in each, cutting differs from masking its units ({refused[0]}, ...)"
        )
    for name in refused:
        say(f"stays whole: {name} (cutting it is not the same as masking its units)")
    for name, reason in proposal.whole.items():
        say(f"stays whole: {name} ({reason})")
    return good


def check_classes(teacher: Teacher, data: Data) -> tuple[str, ...]:
    """The names of the classes; number and names must agree between teacher and data."""
    outputs = check_runs(teacher.model, teacher.spec, teacher.name, "--image-size")
    if not data.labelled:
        return teacher.classes or tuple(placeholders(outputs))
    if outputs != len(data.classes):
        raise DataError(
            f"{teacher.name} has {outputs} classes, {data.source} has {len(data.classes)}: "
            f"fine-tune it first (stepwell train --model ... --data {data.source})"
        )
    if teacher.classes and teacher.classes != data.classes:
        i, (ours, theirs) = next(
            (i, pair)
            for i, pair in enumerate(zip(data.classes, teacher.classes, strict=True))
            if pair[0] != pair[1]
        )
        raise DataError(
            f"class {i} is {ours!r} in {data.source}, but {theirs!r} for {teacher.name}: "
            f"name the folders as the teacher was trained"
        )
    return data.classes


def set_up_torch(options: TrainingOptions) -> torch.device:
    """Seed torch, give it its threads, and return the device of a run."""
    torch.manual_seed(options.seed)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return find_device(options.device)


def find_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one.

    Raises:
        ConfigError: torch cannot use the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # `meta` can be named, but not computed on
        return probe.device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here: {reason}; try --device cpu") from None
