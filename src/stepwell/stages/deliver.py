"""Stage 6, deliver: hand out a physically small model, and prove that the files compute what it does."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from stepwell.delivery.archive import ONNX, WEIGHTS, Card, save_model
from stepwell.delivery.export import export_onnx
from stepwell.delivery.measure import (
    Scores,
    count_macs,
    evaluate,
    measure_latency,
    num_params,
    wilson_interval,
)
from stepwell.delivery.result import ModelResult
from stepwell.training.batches import EvalBatches
from stepwell.training.progress import say
from stepwell.training.run_dir import writing


@dataclass(frozen=True)
class Measured:
    """A model's figures, and its answers on the test images."""

    result: ModelResult
    test: Scores


def deliver(model: nn.Module, card: Card, images: Tensor, folder: Path) -> float:
    """Write the model directory: weights, card, and an ONNX file that was run against the model.

    Args:
        model: The student.
        card: Goes into `stepwell.json`.
        images: Real images, normalised, on which the ONNX file must agree.
        folder: Where to.

    Returns:
        The largest difference of the ONNX file's logits from eager, relative to the largest logit.

    Raises:
        ExportMismatchError: The ONNX file computes something else.
        RunDirError: Nothing can be written there.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    difference = export_onnx(model, card.input, folder / ONNX, images)
    save_model(folder, model, card)
    return difference


def measure(
    name: str,
    model: nn.Module,
    *,
    selection: EvalBatches,
    test: EvalBatches,
    card: Card,
    teacher_macs: int,
    keep_ratio: float,
    threads: int,
) -> Measured:
    """Measure a model on the test images, the selection images, and the clock.

    Args:
        name: Its role, for progress.
        model: On the device of the batches.
        selection: Its figures here decide between student and control.
        test: Looked at once, for the report.
        card: What the model would be saved with; also says its input.
        teacher_macs: For its scale.
        keep_ratio: Fraction of units kept.
        threads: Of onnxruntime and of eager torch.
    """
    on_selection = evaluate(model, selection, f"{name}: selection images")
    on_test = evaluate(model, test, f"{name}: test images")
    with tempfile.TemporaryDirectory() as temporary:
        say(f"  {name}: exporting and timing")
        folder = Path(temporary)
        # To be timed, not handed out: of the teacher's file no more is asked than that it runs.
        export_onnx(model, card.input, folder / ONNX, next(iter(test)).images[:8], tolerance=math.inf)
        save_model(folder, model, card)
        latency = measure_latency(model, folder / ONNX, card.input, threads)
        file_bytes = (folder / WEIGHTS).stat().st_size
    macs = count_macs(model, card.input)
    result = ModelResult(
        top1=on_test.top1,
        top1_interval=wilson_interval(on_test.top1, len(on_test.labels)),
        log_likelihood=on_test.log_likelihood,
        selection_top1=on_selection.top1,
        selection_log_likelihood=on_selection.log_likelihood,
        calibration_error=on_test.calibration_error,
        num_params=num_params(model),
        macs=macs,
        latency_ms=latency.onnx_batch1,
        latency=latency,
        file_bytes=file_bytes,
        keep_ratio=keep_ratio,
        scale=macs / teacher_macs,
    )
    return Measured(result, on_test)
