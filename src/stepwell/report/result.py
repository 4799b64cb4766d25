"""What a run says about itself: the contents of `result.json`, typed.

Every quality is the task's measure (`Result.measure`) in percent, with its 95 % interval; every latency in
milliseconds per batch, with the threads it was measured on; every share is of the teacher. Where there was
one task, quality was called top1: such files are read too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from stepwell.errors import RunDirError
from stepwell.measure.clock import Latency
from stepwell.run.run_dir import StageResult
from stepwell.tasks.measures import Measure, Metric, PairedBootstrap, PairedTest


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _before(name: str) -> AliasChoices:
    """A field's name, and the one that it had in older files."""
    return AliasChoices(name, name.replace("quality", "top1"))


Quality = Annotated[float, Field(validation_alias=_before("quality"))]
QualityInterval = Annotated[tuple[float, float], Field(validation_alias=_before("quality_interval"))]
SelectionQuality = Annotated[float, Field(validation_alias=_before("selection_quality"))]


class ModelResult(_Record):
    """One model: teacher, assistant, student or control."""

    quality: Quality
    """On the test images."""
    quality_interval: QualityInterval
    """95 % interval of `quality`: Wilson's of top1, by bootstrap over images of others."""
    log_likelihood: float | None
    """Mean log-probability of the truth on the test images; None where there are no probabilities."""
    selection_quality: SelectionQuality
    """On the selection images."""
    selection_log_likelihood: float | None
    calibration_error: float | None
    """Expected calibration error on the test images, in percent (15 bins)."""
    neighbours_right: float | None = None
    """Of an embedding, where there are labels: percent of the test images whose class is the commonest among
    the 20 nearest training images."""
    pixel_accuracy: float | None = None
    """Of masks: percent of the test pixels whose class is said rightly."""
    iou_by_class: dict[str, float] = {}
    """Of masks, in percent; without classes that are neither there nor said to be."""
    num_params: int
    macs: int
    """Multiply-accumulates of one image."""
    latency_ms: float | None
    """onnxruntime, CPU, fp32, batch 1: `latency.onnx_batch1`."""
    latency: Latency
    not_exported: str = ""
    """Why there is no ONNX file to be timed; empty where there is one."""
    file_bytes: int
    keep_ratio: float
    """Fraction of the units kept; 1 for the teacher."""
    scale: float
    """Measured share of the teacher's MACs."""


class SizeResult(ModelResult):
    """A further size that the run hands out."""

    taught_by: float
    """Keep ratio of the model that taught its last step; 1 is the teacher."""
    is_as_joint: bool = False
    """Whether it is as the joint training left it, since its last step did it harm."""
    folder: str
    """Where it lies, in the run directory."""


class CandidateResult(_Record):
    """One rung of the ladder after joint training, measured on the selection images."""

    keep_ratio: float
    scale: float
    """Measured share of the teacher's MACs; the S of NPSD."""
    quality: Quality
    quality_interval: QualityInterval
    log_likelihood: float | None
    num_params: int
    macs: int
    widths: dict[str, int]
    """Units kept per group."""


class TriedResult(_Record):
    """The student via one assistant, where a student was trained for each."""

    keep_ratio: float
    """The assistant's."""
    scale: float
    """The assistant's share of the teacher's MACs."""
    selection_quality: SelectionQuality
    """The student's, on the selection images: decides which is kept."""
    selection_log_likelihood: float | None
    quality: Quality
    """The student's, on the test images: looked at once, at the end."""
    log_likelihood: float | None


class SelectionResult(_Record):
    """Which candidate became the assistant, and what every rule would have said."""

    rule: str
    metric: Metric
    pick: float
    """Keep ratio of the assistant."""
    picks: dict[str, float]
    """Keep ratio that each rule would pick."""
    values: dict[str, list[float | None]]
    """Each rule's value per candidate, in their order; null where it is not defined or not allowed."""
    num_images: int


class Choice(StageResult):
    """What the select stage hands on: the candidates' figures, and which is the assistant."""

    index: int
    candidates: list[CandidateResult]
    """From the smallest, the student's rung, to the largest."""
    selection: SelectionResult
    teacher_performance: float | None = None
    """The teacher's, in [0, 1], on the same images; None in runs of older versions."""


class Cost(_Record):
    """Cost of the run in units of one single-step distillation of as many epochs as the last stage: seconds
    where a control was trained, operations where not."""

    value: float
    predicted: bool
    """True where no single-step run was made and the figure comes from operation counts alone."""


class DataResult(_Record):
    """Which images decided what."""

    source: str
    classes: list[str]
    num_train: int
    num_selection: int
    num_test: int
    test_from: str
    """Where the test images come from: `test/`, `val/`, or `a tenth by hash of the file name`."""
    selection_from: str
    """`a tenth of the training images by hash of the file name`, or the folder that was given."""
    labels: Literal["true", "teacher"]
    """`teacher`: the images have no labels, or they are not asked; quality is agreement with the teacher."""
    teacher_saw_selection: str
    """`no`, or why that is not known."""
    bad_images: int


class History(_Record):
    """Course of one training stage."""

    step: list[int]
    losses: dict[str, list[float]]
    """Mean of each loss part (`loss`, `task`, `logit`, `feature`) since the step before."""
    lr: list[float]


class Result(_Record):
    """The whole of `result.json`."""

    stepwell_version: str
    created: str
    hardware: dict[str, str]
    teacher_name: str
    student_name: str | None
    """The student's architecture, where it is no slice of the teacher; then `keep_ratio` is that of the
    smallest rung of the ladder."""
    path: str
    """The way down, as `--path` names it."""
    way: str = ""
    """How the path went, in a sentence; empty in results of older versions."""
    teachers: dict[str, str] = {}
    """By stage, who taught in it; empty where the student has one teacher."""
    measure: Measure = "top1"
    """What every `quality` is."""
    losses: dict[str, str]
    """The losses on `logits` and `features`."""
    keep_ratio: float
    data: DataResult
    teacher: ModelResult
    higher_assistants: list[ModelResult]
    """Those above `assistant`, from the largest down; none but in a chain."""
    assistant: ModelResult | None
    """Which taught the student; None in a single step."""
    student: ModelResult
    """The end of the path: teacher, assistants, student."""
    control: ModelResult | None
    """The same student distilled straight from the teacher, if one was trained."""
    baseline_name: str | None = None
    """The stock network that the teacher taught for comparison, if one was asked for."""
    baseline: ModelResult | None = None
    """It, in `baseline/`; its `keep_ratio` is 1, as it was not cut."""
    sizes: list[SizeResult] = []
    """The other sizes that were handed out, from the smallest up; the student is not among them."""
    handed_out: Literal["student", "control"]
    """Which of the two trainings is in `student/`, decided on the selection images."""
    decided_by: Metric | None = None
    """What was compared on them; None in results of older versions."""
    candidates: list[CandidateResult]
    """The rungs, where they were trained and evaluated; empty where a path chooses nothing."""
    selection: SelectionResult | None
    tried: list[TriedResult]
    """The student via each assistant, where a student was trained for each."""
    group_sizes: dict[str, int]
    """Units of each group in the teacher."""
    group_kinds: dict[str, str]
    """What they are: `head`, `neuron` or `filter`."""
    teacher_vs_student: PairedTest | PairedBootstrap | None
    """None where the teacher is itself what the student is measured by."""
    cost_vs_single_step: Cost
    teacher_passes: dict[str, float]
    """Cost of each stage of the path, in forward passes of the teacher on one image."""
    seconds: dict[str, float]
    images_per_second: dict[str, float]
    epochs: dict[str, float]
    histories: dict[str, History]
    not_exported: str = ""
    """Why `student/` has no ONNX file; empty where it has one."""
    notes: list[str]
    """Everything a careful reader should be told."""

    @property
    def models(self) -> list[ModelResult]:
        """Teacher, assistants, student, control, baseline and further sizes, as far as there are any."""
        models = [self.teacher, *self.higher_assistants, self.assistant, self.student, self.control]
        models += [self.baseline, *self.sizes]
        return [model for model in models if model is not None]

    @property
    def runtime(self) -> Literal["onnxruntime", "PyTorch"]:
        """What the models' times are compared on: PyTorch where one of them has no ONNX file."""
        timed = all(model.latency.onnx_batch1 is not None for model in self.models)
        return "onnxruntime" if timed else "PyTorch"

    @property
    def given(self) -> ModelResult:
        """The model in `student/`."""
        return (self.control if self.handed_out == "control" else None) or self.student

    def milliseconds(self, model: ModelResult, batch: Literal[1, 32] = 1) -> float:
        """Time of a batch of one of the models, on the `runtime` that all of them have."""
        times = model.latency
        on_onnx, eager = times.onnx_batch1, times.eager_batch1
        if batch == 32:
            on_onnx, eager = times.onnx_batch32, times.eager_batch32
        return on_onnx if self.runtime == "onnxruntime" and on_onnx is not None else eager

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read `result.json`.

        Raises:
            RunDirError: It is damaged, or was written by a version that kept other figures.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise RunDirError(
                f"{path} is damaged, or of another version of stepwell: {where}: {first['msg']}"
            ) from None

    def to_json(self) -> str:
        """The text of `result.json`."""
        return json.dumps(self.model_dump(mode="json"), indent=2)
