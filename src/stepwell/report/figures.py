"""The figures of one model: how good it is, how large, how fast."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor, nn

from stepwell.data.batches import EvalBatches
from stepwell.errors import ExportError, RunDirError
from stepwell.measure.clock import Latency, measure_latency
from stepwell.measure.size import count_macs, num_params
from stepwell.models.card import ONNX, WEIGHTS, Card, save_model
from stepwell.models.export import export_onnx, temporary_folder
from stepwell.report.result import ModelResult
from stepwell.run.distributed import from_main
from stepwell.run.progress import say
from stepwell.tasks import embedding
from stepwell.tasks.measures import Forward
from stepwell.tasks.segmentation import of_pixels
from stepwell.tasks.task import Answers, task_of


def neighbours_top1(model: nn.Module, known: EvalBatches, test: EvalBatches, truth: Tensor) -> float:
    """Top1 of the nearest neighbours by a model's embeddings.

    Args:
        model: It returns embeddings.
        known: Training images, with their classes.
        test: The images whose neighbours are looked for.
        truth: The classes of these.
    """
    bank = embedding.evaluate(model, known, "embeddings of the training images").probabilities
    asked = embedding.evaluate(model, test, "embeddings of the test images").probabilities
    return embedding.nearest(bank, known.labels, asked, truth)


def figures_of(
    name: str,
    model: nn.Module,
    images: tuple[EvalBatches, EvalBatches],
    *,
    card: Card,
    teacher_macs: int,
    keep_ratio: float,
    threads: int,
    measured: Forward | None = None,
) -> tuple[ModelResult, Answers]:
    """A model's figures, and its answers on the test images.

    Args:
        name: Its role, for progress.
        model: The model, on the device of the batches.
        images: Those whose figures decide between student and control, and the test images, which are looked
            at once, for the report.
        card: What the model would be saved with; also says its input, and what it is for.
        teacher_macs: Operations of the teacher, for the model's scale.
        keep_ratio: Fraction of units kept.
        threads: CPU threads of onnxruntime and of eager torch.
        measured: What is measured in place of the model's own answers, if anything.
    """
    (selection, test), task = images, task_of(card.task)
    on_selection = task.evaluate(measured or model, selection, f"{name}: selection images")
    answers = task.predict(measured or model, test, f"{name}: test images")
    say(f"  {name}: exporting and timing")
    # One process times, and the others wait, so as not to be in its way.
    latency, not_exported, file_bytes = from_main(
        lambda: _timed(model, card, next(iter(test)).images, threads)
    )
    macs, on_test = count_macs(model, card.input), answers.meter
    result = ModelResult(
        quality=on_test.quality,
        quality_interval=on_test.quality_interval,
        log_likelihood=on_test.log_likelihood,
        selection_quality=on_selection.quality,
        selection_log_likelihood=on_selection.log_likelihood,
        calibration_error=on_test.calibration_error,
        num_params=num_params(model),
        macs=macs,
        latency_ms=latency.onnx_batch1,
        latency=latency,
        not_exported=not_exported,
        file_bytes=file_bytes,
        keep_ratio=keep_ratio,
        scale=macs / teacher_macs,
        **of_pixels(on_test, card.classes),
    )
    return result, answers


def _timed(
    model: nn.Module, card: Card, images: Float[Tensor, "batch channels height width"], threads: int
) -> tuple[Latency, str, int]:
    """How fast a model is, why it has no ONNX file (empty where it has one), and the bytes of its weights."""
    with temporary_folder() as folder:
        onnx_file, not_exported = folder / ONNX, ""
        try:
            # To be timed, not handed out: no more is asked of it than that it runs, on images of this size.
            export_onnx(model, card.input, onnx_file, images[:8], tolerance=math.inf, any_size=False)
        except (ExportError, RunDirError) as error:  # no room for a file is no reason to stop either
            not_exported = str(error)
        save_model(folder, model, card)
        latency = measure_latency(model, None if not_exported else onnx_file, card.input, threads)
        return latency, not_exported, (folder / WEIGHTS).stat().st_size
