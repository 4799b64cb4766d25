"""The figures of one model: how good it is, how large, how fast."""

from __future__ import annotations

import math

from torch import nn

from stepwell.data.batches import EvalBatches
from stepwell.errors import ExportError, RunDirError
from stepwell.measure.clock import measure_latency
from stepwell.measure.size import count_macs, num_params
from stepwell.models.card import ONNX, WEIGHTS, Card, save_model
from stepwell.models.export import export_onnx, temporary_folder
from stepwell.report.result import ModelResult
from stepwell.run.progress import say
from stepwell.tasks.classification import Answers, evaluate, predict


def figures_of(
    name: str,
    model: nn.Module,
    *,
    selection: EvalBatches,
    test: EvalBatches,
    card: Card,
    teacher_macs: int,
    keep_ratio: float,
    threads: int,
) -> tuple[ModelResult, Answers]:
    """A model's figures, and its answers on the test images.

    Args:
        name: Its role, for progress.
        model: The model, on the device of the batches.
        selection: The images whose figures decide between student and control.
        test: The images that are looked at once, for the report.
        card: What the model would be saved with; also says its input.
        teacher_macs: Operations of the teacher, for the model's scale.
        keep_ratio: Fraction of units kept.
        threads: CPU threads of onnxruntime and of eager torch.
    """
    on_selection = evaluate(model, selection, f"{name}: selection images")
    answers = predict(model, test, f"{name}: test images")
    with temporary_folder() as folder:
        say(f"  {name}: exporting and timing")
        onnx_file, not_exported = folder / ONNX, ""
        try:
            # To be timed, not handed out: of the teacher's file no more is asked than that it runs.
            export_onnx(model, card.input, onnx_file, next(iter(test)).images[:8], tolerance=math.inf)
        except (ExportError, RunDirError) as error:  # no room for a file is no reason to stop either
            not_exported = str(error)
        save_model(folder, model, card)
        latency = measure_latency(model, None if not_exported else onnx_file, card.input, threads)
        file_bytes = (folder / WEIGHTS).stat().st_size
    macs, on_test = count_macs(model, card.input), answers.meter
    result = ModelResult(
        top1=on_test.top1,
        top1_interval=on_test.top1_interval,
        log_likelihood=on_test.log_likelihood,
        selection_top1=on_selection.top1,
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
    )
    return result, answers
