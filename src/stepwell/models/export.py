"""Files that other programs open: ONNX with a dynamic batch, checked by running it, and torch.export."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from stepwell.data.spec import InputSpec
from stepwell.errors import ExportMismatchError
from stepwell.run.run_dir import writing

TOLERANCE = 1e-5  # largest difference of logits, relative to the largest logit


def export_onnx(
    model: nn.Module, spec: InputSpec, file: Path, images: Tensor, tolerance: float = TOLERANCE
) -> float:
    """Write `file` and prove with onnxruntime that it computes what `model` does.

    Args:
        model: What to export; a copy is exported from the CPU in fp32 and eval mode.
        spec: Its input.
        file: Where to; written whole or not at all.
        images: Real, normalised images (batch, channels, height, width) for the check; run one by one and
            all together, so that the batch dimension is shown to be free.
        tolerance: Largest difference that is allowed, relative to the largest logit.

    Returns:
        The largest difference of logits, relative to the largest logit.

    Raises:
        ExportMismatchError: The file computes something else; it is not left behind.
    """
    model = copy.deepcopy(model).cpu().float().eval()
    with _unfinished(file, ".onnx") as unfinished:
        write_onnx(model, spec, unfinished)
        _forget_sources(unfinished)
        difference = onnx_difference(model, unfinished, images)
        _check(file, difference, tolerance)
    return difference


def write_onnx(model: nn.Module, spec: InputSpec, file: Path) -> None:
    """Export a model on the CPU, in fp32 and eval mode, with a dynamic batch; nothing is checked.

    The model stays frozen: attention with a mask that is learned (BEiT) has other strides where gradients are
    wanted, and torch's exporter trips over them.
    """
    with _quiet():
        torch.onnx.export(
            model.eval().requires_grad_(False),
            (_example(spec),),
            str(file),
            dynamo=True,
            dynamic_shapes=_dynamic_batch(model),
            input_names=["images"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )


def _forget_sources(file: Path) -> None:
    """Take out which line of which file on this machine each node came from: long, and nobody's business."""
    program = onnx.load(file)
    graph = program.graph
    for part in (program, graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        part.ClearField("metadata_props")
    onnx.save(program, file)


def onnx_difference(model: nn.Module, file: Path, images: Tensor) -> float:
    """Largest |onnx - eager| over the largest |eager| logit, for a batch of all images and of one."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    images = images.cpu().float()
    worst = 0.0
    for batch in (images, images[:1]):
        with torch.no_grad():
            eager = model(batch).numpy()
        (exported,) = session.run(None, {"images": batch.numpy()})
        worst = max(worst, float(np.abs(exported - eager).max() / np.abs(eager).max()))
    return worst


def export_program(model: nn.Module, spec: InputSpec, file: Path, images: Tensor) -> float:
    """Write a `torch.export` program (`.pt2`), with a dynamic batch, and check it against `model`.

    Returns:
        The largest difference of logits, relative to the largest logit.

    Raises:
        ExportMismatchError: The program computes something else; it is not left behind.
    """
    model = copy.deepcopy(model).cpu().float().eval()
    with _unfinished(file, ".pt2") as unfinished:
        with _quiet():
            program = torch.export.export(model, (_example(spec),), dynamic_shapes=_dynamic_batch(model))
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)  # see _forget_sources
            buffer = io.BytesIO()  # torch's own file writer aborts the process when the disk is full
            torch.export.save(program, buffer)
            unfinished.write_bytes(buffer.getvalue())
            loaded = torch.export.load(unfinished).module()
        with torch.no_grad():
            exported, eager = loaded(images.cpu()), model(images.cpu())
        difference = ((exported - eager).abs().max() / eager.abs().max()).item()
        _check(file, difference, TOLERANCE)
    return difference


def _example(spec: InputSpec) -> Tensor:
    """A batch of 2 to trace with: torch.export takes a size of 1 for a constant."""
    return torch.zeros(2, spec.channels, *spec.size)


def _dynamic_batch(model: nn.Module) -> tuple[object, ...]:
    """That the batch may have any size, in the shape of the arguments: forward(images), or forward(*args)."""
    free = {0: torch.export.Dim.DYNAMIC}
    first = next(iter(inspect.signature(model.forward).parameters.values()))
    return ((free,),) if first.kind is inspect.Parameter.VAR_POSITIONAL else (free,)


def _check(file: Path, difference: float, tolerance: float) -> None:
    if not difference <= tolerance:  # a NaN is no agreement either
        raise ExportMismatchError(
            f"{file}: logits differ by {difference:.1e} of the largest one, allowed are {tolerance:.0e}"
        )


@contextlib.contextmanager
def _unfinished(file: Path, suffix: str) -> Iterator[Path]:
    """A name to write to; it becomes `file` if all goes well, and is removed if not."""
    unfinished = file.with_name(f".unfinished-{file.stem}{suffix}")
    try:
        with writing(file):
            yield unfinished
            os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's log and warnings (opset versions, deprecations inside torch) say nothing to a user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
