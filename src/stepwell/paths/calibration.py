"""A short calibration: what the parts of a run take on this device, timed on the run's own models and images.

A training is timed by running it for a few seconds, `fit` and all: feeding, forward, backward, clipping,
update. What is trained is a slice of the teacher, whose weights may be random, and is thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from stepwell.data.batches import EvalBatches
from stepwell.data.images import ImageSet
from stepwell.errors import ExportError
from stepwell.measure.clock import seconds_to_time
from stepwell.measure.clocked import Price, price_of_step
from stepwell.measure.estimate import Losses, activation_bytes, footprint, num_answering, seconds_of
from stepwell.measure.size import count_macs, num_params
from stepwell.models.card import ONNX, example_images
from stepwell.models.export import export_onnx, temporary_folder
from stepwell.models.ladder import Ladder
from stepwell.paths.path import Path as Way
from stepwell.paths.plan import usual_step
from stepwell.run.run_dir import Stage
from stepwell.setting.rungs import Rung, slice_of_teacher, store_of, student_below, teacher_of
from stepwell.setting.setting import Setting
from stepwell.stages import distill, joint
from stepwell.stages.score import importance_by_gradient
from stepwell.tasks.task import loss_of
from stepwell.training.timing import seconds_of_all, seconds_of_training_step

LONGEST_STEP = 3.0
"""Seconds; a step that would take longer is timed on fewer images, and taken to grow with them."""


@dataclass
class Calibration:
    """A `Clock`: times each part once, when it is first asked for; made by `calibrated`.

    Attributes:
        s: What the run works with, with the batches that are timed.
        ladder: Its candidates.
        way: Its path.
        num_train: Training images of the run, of which not all may be here.
        devices: How many share its batches.
        bytes_per_second: What each can send to the next.
        share: Images of a step on one device; in `s` there may be fewer.
    """

    s: Setting
    ladder: Ladder
    way: Way
    num_train: int
    devices: int
    bytes_per_second: float
    share: int
    _known: dict[tuple[object, ...], Price] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        """Images of the steps that are timed."""
        return self.s.config.batch_size

    def scoring(self, num_images: float) -> Price:
        """Scores of all units, from so many images."""
        return self._once(("score",), self._scoring) * (num_images / self.devices)

    def forward(self, scale: float) -> Price:
        """One image of the selection set through the model of this scale."""
        return self._once(("forward", scale), lambda: self._forward(scale)) * (1 / self.devices)

    def joint_step(self) -> Price:
        """One step of the joint training."""
        return self._once(("joint",), self._joint_step)

    def step(self, student: float, teachers: Sequence[float], drop: int) -> Price:
        """One step of distilling into the model of one scale, from those of others."""
        key = ("step", student, *teachers, drop)
        return self._once(key, lambda: self._step(student, teachers, drop))

    def figures(self, scale: float, num_images: int) -> Price:
        """What `deliver` asks of one model: answers, an ONNX file, milliseconds of batches of 1 and 32."""
        model = self._rung(scale).model
        macs = count_macs(model, self.s.spec)
        # By torch and, where there is a file, by onnxruntime, which is taken to be as fast.
        timed = 2 * sum(seconds_to_time(batch * macs / self._rate) for batch in (1, 32))
        return self.forward(scale) * num_images + Price(timed) + self._export(any_size=False)

    def file(self) -> Price:
        """The ONNX file of a model that is handed out: of masks, for images of any size where that can be."""
        return self._export(any_size=self.s.data.task == "segmentation")

    def num_params(self, scale: float) -> int:
        """Parameters of the model of this scale."""
        return num_params(self._rung(scale).model)

    def _once(self, part: tuple[object, ...], found: Callable[[], Price]) -> Price:
        if part not in self._known:
            self._known[part] = found()
        return self._known[part]

    def _scoring(self) -> Price:
        s = self.s
        is_by_weight = {g.name for g in s.groups if s.config.importance == "l1" and g.kind == "filter"}
        groups = [group for group in s.groups if group.name not in is_by_weight]
        if not groups:
            return Price(0.0)
        start = time.perf_counter()
        batches, loss = s.scored, loss_of(s.task, s.config.class_weights)
        reading = time.perf_counter() - start  # of images that are then held in memory

        def run(number: int) -> object:
            return importance_by_gradient(
                s.model, groups, batches.first(number), autocast=s.autocast, loss_per_image=loss
            )

        seconds = reading + seconds_of_all(run, len(batches), s.device)
        # Of a batch's mean gradient a device computes whole batches.
        size = self.share * (self.devices if s.config.score_reduction == "batch" else 1)
        kept = activation_bytes(s.model, s.spec, min(size, s.config.score_images), s.config.precision)
        return Price(seconds / len(batches.labels), 4 * num_params(s.model) + kept)

    def _forward(self, scale: float) -> Price:
        s, model = self.s, self._rung(scale).model.eval()
        batches = _batches(s, s.data.selection)

        def run(number: int) -> object:
            if s.has_labels:
                return s.task.evaluate(model, batches.first(number), "timing answers")
            with torch.no_grad():
                return [model(batch.images) for batch in batches.first(number)]

        seconds = seconds_of_all(run, len(batches), s.device)
        beside = 0 if model is s.model else num_params(model)
        return Price(seconds / len(batches.labels), 4 * (self._num_answering + beside))

    def _joint_step(self) -> Price:
        s, ladder = self.s, self.ladder
        shared = store_of(s, ladder)
        step = joint.joint_step(s, shared, ladder.order)
        *_, course = joint.courses_of(s, _no_stage("joint"), step, 1.0)
        seconds, timed = seconds_of_training_step(course, step, s.train, s.config, s.config)
        seconds *= usual_step(s, ladder, timed)
        losses = self.way.losses(len(ladder.candidates), s.config).of(s.model, s.blocks)
        return self._price(seconds, shared.skeletons[-1], self._num_answering, losses)

    def _step(self, student: float, teachers: Sequence[float], drop: int) -> Price:
        s, lower = self.s, self._rung(student)
        uppers = [self._rung(scale) for scale in teachers]
        step = distill.distill_step(s, uppers, lower, drop)
        *_, course = distill.courses_of(s, _no_stage("distill"), step, lower, 1.0)
        seconds, _ = seconds_of_training_step(course, step, s.train, s.config, s.config)
        # The teacher lies there, whether it teaches or not.
        frozen = self._num_answering + sum(num_params(r.model) for r in uppers if r.candidate is not None)
        compared, _ = s.compared(student == s.other_scale)
        losses = Losses(len(uppers), max(1, len(uppers) - drop)).of(s.model, compared)
        return self._price(seconds, lower.model, frozen, losses, asks_teacher=1.0 in teachers)

    def _price(
        self,
        seconds: float,
        trained: nn.Module,
        num_frozen: float,
        losses: Losses,
        *,
        asks_teacher: bool = True,
    ) -> Price:
        s = self.s
        found = footprint(
            s.config,
            num_frozen,
            trained,
            s.spec,
            self.share,
            self.num_train,
            losses,
            self.devices,
        )
        seconds *= self.share / s.train.batch_size
        # Parameters that have been moved are sent once more, which is half of a sum over all devices.
        sent = num_params(trained) * (1.5 if s.config.shard_optimizer else 1.0)
        if s.config.shard_teacher and asks_teacher:  # and its weights are gathered, which is half, too
            sent += num_params(s.model) / 2
        return price_of_step(seconds, found, sent, self.devices, self.bytes_per_second)

    @property
    def _num_answering(self) -> float:
        """Parameters of the teacher on a device."""
        return num_answering(self.s.config, self.s.model, self.devices)

    def _rung(self, scale: float) -> Rung:
        """A fresh model of that scale, or the nearest; a timed one is not what it was."""
        if scale == 1.0:
            return teacher_of(self.s)
        if scale == self.s.other_scale:
            return student_below(self.s, self.ladder, teacher_of(self.s))
        scales = self.ladder.scales
        return slice_of_teacher(
            self.s, self.ladder, min(range(len(scales)), key=lambda i: abs(scales[i] - scale))
        )

    def _export(self, *, any_size: bool) -> Price:
        """A file of the student, written and checked."""

        def found() -> Price:
            start, model, spec = time.perf_counter(), self._student, self.s.spec
            with suppress(ExportError), temporary_folder() as folder:  # the run will have none either
                export_onnx(model, spec, folder / ONNX, example_images(spec, 8), any_size=any_size)
            return Price(time.perf_counter() - start)

        return self._once(("export", any_size), found)

    @cached_property
    def _rate(self) -> float:
        """Multiply-accumulates a second of the student on the processor, with `latency_threads`."""
        model, threads = self._student.cpu().eval(), torch.get_num_threads()
        torch.set_num_threads(self.s.config.latency_threads)
        try:
            with torch.inference_mode():
                one = _seconds(lambda: model(example_images(self.s.spec, 1)))
                images = example_images(self.s.spec, 32 if 32 * one < LONGEST_STEP else 1)
                return len(images) * count_macs(model, self.s.spec) / _seconds(lambda: model(images))
        finally:
            torch.set_num_threads(threads)

    @property
    def _student(self) -> nn.Module:
        return self._rung(self.s.costs(self.ladder.scales).student).model


def calibrated(
    s: Setting, ladder: Ladder, way: Way, num_train: int, devices: int = 1, bytes_per_second: float = 1e10
) -> Calibration:
    """A clock for a run; nothing is timed yet.

    Args:
        s: What the run works with.
        ladder: Its candidates; their order may be any.
        way: Its path.
        num_train: Training images of the run.
        devices: How many share each of its batches.
        bytes_per_second: What each can send to the next.
    """
    share = max(1, min(s.config.batch_size, num_train) // devices)
    of_step = 2 * count_macs(s.model, s.spec) * s.config.views  # teacher and student, about
    fitting = LONGEST_STEP / max(seconds_of(of_step, s.device), 1e-12)
    batch_size = share
    while batch_size > 2 and batch_size > fitting:
        batch_size //= 2
    options: dict[str, int] = {"batch_size": batch_size}
    if not s.has_labels:  # the teacher is asked for each of them first
        options["score_images"] = min(s.config.score_images, 4 * batch_size)
    timed = replace(s, config=s.config.model_copy(update=options))
    return Calibration(timed, ladder, way, num_train, devices, bytes_per_second, share)


def _batches(s: Setting, images: ImageSet) -> EvalBatches:
    """As the run's; without labels nobody asks the teacher for all of its answers."""
    labels = None if s.has_labels else torch.zeros(len(images))
    return EvalBatches(images, s.spec, s.config, s.device, labels)


def _no_stage(name: str) -> Stage:
    return Stage(name, Path("no-such-folder"))


def _seconds(run: Callable[[], object]) -> float:
    """The quickest of three, after a first one."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])
