"""From a module to a graph of ONNX that old runtimes open too.

The exporter is torch's. What it cannot take is tried once more, with attention as products and a softmax, and
with one input whatever the signature of `forward` is.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from stepwell.data.spec import InputSpec
from stepwell.errors import ExportError

OPSET = 18
"""The oldest version of the operators that torch's exporter writes, so the one that most runtimes know:
onnxruntime reads it since 1.14."""
EXTERNAL_FROM = 1_800_000_000
"""Bytes of weights above which they lie beside the graph: one message of protobuf holds 2 GiB."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def write_onnx(
    model: nn.Module, spec: InputSpec, file: Path, opset: int = OPSET, *, any_size: bool = False
) -> None:
    """Export a model on the CPU, in fp32 and eval mode, with a dynamic batch; nothing is checked.

    Args:
        model: It is frozen, and stays so: attention with a mask that is learned (BEiT) has other strides
            where gradients are wanted, and torch's exporter trips over them.
        spec: Its input.
        file: Where to; large weights go to `FILE.data`.
        opset: Version of ONNX's operators.
        any_size: Whether height and width are dynamic too.

    Raises:
        ExportError: The exporter cannot take the model, or does not write this opset.
        OSError: The file cannot be written.
    """
    model = model.eval().requires_grad_(False)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    with quiet():
        program = _converted(model, spec, opset, _dynamic(any_size))
        program.save(str(file), external_data=size > EXTERNAL_FROM)
    del program
    graph = onnx.load(file, load_external_data=False)
    written = max(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))
    if written != opset:
        raise ExportError(
            f"--opset {opset}: the exporter of torch {torch.__version__} wrote opset {written} instead; "
            f"{OPSET} is what it writes best and most runtimes read"
        )
    _forget_sources(graph)
    # Torch's exporter always says 10, which onnxruntime 1.17 and older refuse, whatever the graph holds.
    graph.ir_version = max(8, onnx.helper.find_min_ir_version_for(graph.opset_import, ignore_unknown=True))
    onnx.save(graph, file)


Dynamic = dict[int, Any]
"""The dimensions of the images that are free."""


def _dynamic(any_size: bool = False) -> Dynamic:
    return dict.fromkeys((0, 2, 3) if any_size else (0,), Dim.DYNAMIC)


def captured(model: nn.Module, spec: InputSpec, dynamic: Dynamic | None = None) -> ExportedProgram:
    """The graph of a model by torch.export, with a dynamic batch or more; whatever torch raises is let
    through."""
    dynamic = _dynamic() if dynamic is None else dynamic
    with contextlib.suppress(Exception):
        return _traced(model, spec, dynamic)
    with contextlib.suppress(Exception):
        return _traced(model, spec, dynamic, strict=True)  # Python itself is traced: `len(images)` stays free
    return _traced(_OneInput(model), spec, dynamic)


def reason_of(error: BaseException) -> str:
    """What went wrong at the bottom of an exporter's chain of errors, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if "specialized it to be a constant" in str(error):
        return "its code fixes the size of a batch; images.shape[0] would not"
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines()]
    first = next((line for line in lines if line), type(error).__name__)
    return first if len(first) <= 200 else f"{first[:200]}..."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter's log and warnings (opset versions, deprecations inside torch) say nothing to a user."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        nowhere = io.StringIO()
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _OneInput(nn.Module):
    """A model called with images alone: of `forward(*args)` torch.export wants every argument described."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def _converted(model: nn.Module, spec: InputSpec, opset: int, dynamic: Dynamic) -> torch.onnx.ONNXProgram:
    with contextlib.suppress(Exception):  # of torch's many kinds; the second way may do
        return _in_onnx(model, spec, opset, dynamic)
    try:
        return _in_onnx(_with_plain_attention(captured(model, spec, dynamic)), spec, opset, dynamic)
    except Exception as error:
        raise ExportError(
            f"torch's exporter to ONNX cannot take this {type(model).__name__} ({reason_of(error)})"
        ) from None


def _in_onnx(
    model: nn.Module | ExportedProgram, spec: InputSpec, opset: int, dynamic: Dynamic
) -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(
        model,
        (_example(spec),),
        dynamo=True,
        dynamic_shapes=None if isinstance(model, ExportedProgram) else (dynamic,),
        input_names=["images"],
        output_names=["logits"],
        opset_version=opset,
        verbose=False,
    )
    assert program is not None
    return program


def _traced(model: nn.Module, spec: InputSpec, dynamic: Dynamic, strict: bool = False) -> ExportedProgram:
    return torch.export.export(model, (_example(spec),), dynamic_shapes=(dynamic,), strict=strict)


def _with_plain_attention(program: ExportedProgram) -> ExportedProgram:
    """The exporter takes the fused operator in four dimensions only; Twins, Hiera and SAM have others."""
    return program.run_decompositions({torch.ops.aten.scaled_dot_product_attention.default: _attention})


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k^T scale + mask) v, as the fused operator defines it."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask
    return scores.softmax(-1) @ value


def _example(spec: InputSpec) -> Tensor:
    """A batch of 2 to trace with: torch.export takes a size of 1 for a constant."""
    return torch.zeros(2, spec.channels, *spec.size)


def _forget_sources(program: onnx.ModelProto) -> None:
    """Take out which line of which file on this machine each node came from: long, and nobody's business."""
    program.ClearField("metadata_props")
    _forget_in(program.graph)
    for function in program.functions:
        for part in (function, *function.node):
            part.ClearField("metadata_props")


def _forget_in(graph: onnx.GraphProto) -> None:
    values = (*graph.value_info, *graph.input, *graph.output, *graph.initializer)
    for part in (graph, *graph.node, *values):
        part.ClearField("metadata_props")
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                _forget_in(inner)
