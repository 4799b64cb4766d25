"""Files that other programs open: ONNX with a dynamic batch, checked by running it, and torch.export.

How a model becomes a graph of ONNX is in onnx_graph.py; here is what is written where, and the proof of it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepwell.data.spec import InputSpec
from stepwell.errors import ExportError, ExportMismatchError, RunDirError
from stepwell.models.card import example_images
from stepwell.models.onnx_graph import OPSET, captured, quiet, reason_of, write_onnx
from stepwell.pruning.parts import put_together
from stepwell.run.atomic import writing
from stepwell.tasks.outputs import is_dense

_STEP = 32  # pixels; nets that halve their maps five times take multiples of it
_SIZES = "stepwell.sizes"  # key of the metadata of an ONNX file
TOLERANCE = 1e-4  # largest difference of logits, relative to the largest logit


def export_onnx(
    model: nn.Module,
    spec: InputSpec,
    file: Path,
    images: Tensor,
    tolerance: float = TOLERANCE,
    opset: int = OPSET,
    *,
    any_size: bool = True,
) -> float:
    """Write `file` and prove with onnxruntime that it computes what `model` does.

    Weights above `onnx_graph.EXTERNAL_FROM` bytes lie in a second file, `FILE.data`. A model that tells each
    pixel is exported for images of any height and width, and run on those of three sizes, of which one is
    odd; where that fails it is for multiples of 32, which its metadata say; and where it cannot be, for those
    of its own size.

    Args:
        model: What to export; a copy is exported from the CPU in fp32 and eval mode.
        spec: Its input.
        file: Where to; written whole or not at all.
        images: Real, normalised images (batch, channels, height, width) for the check; run one by one and
            all together, so that the batch dimension is shown to be free.
        tolerance: Largest difference that is allowed, relative to the largest logit.
        opset: Version of ONNX's operators.
        any_size: Whether a model that tells each pixel is to take images of other sizes; that costs several
            times the seconds, which a file is not worth that is only timed.

    Returns:
        The largest difference of logits, relative to the largest logit.

    Raises:
        ExportError: The exporter cannot take the model, or onnxruntime not the file.
        ExportMismatchError: The file computes something else; it is not left behind.
        RunDirError: The file cannot be written.
    """
    model = _plain_copy(model)
    with _unfinished(file) as unfinished:
        if any_size and is_dense(model):
            found = _for_any_size(model, spec, unfinished, images, opset)
            # Where any difference is allowed, one is still a reason to write the file for one size.
            if found <= min(tolerance, TOLERANCE):
                return found
        write_onnx(model, spec, unfinished, opset)
        difference = onnx_difference(model, unfinished, images)
        _check(file, difference, tolerance)
    return difference


def _for_any_size(model: nn.Module, spec: InputSpec, file: Path, images: Tensor, opset: int) -> float:
    """Write an ONNX file for images of any height and width; returns the largest difference on images of two
    sizes, infinite where that cannot be."""
    height, width = ((side // _STEP + more) * _STEP for side, more in zip(spec.size, (1, 2), strict=True))
    others = F.interpolate(images.cpu().float(), (height, width), mode="bilinear", align_corners=False)
    try:
        write_onnx(model, spec, file, opset, any_size=True)
        found = float(np.max([onnx_difference(model, file, some) for some in (images, others[:2])]))
    except Exception:  # the exporter's, or the model's own where it takes one size alone
        return math.inf
    # Skip connections of other sizes do not fit to each other, in many models.
    odd = F.interpolate(others[:1], (height + 5, width + 7), mode="bilinear", align_corners=False)
    with contextlib.suppress(Exception):  # likewise
        if onnx_difference(model, file, odd) <= TOLERANCE:
            return found
    written = onnx.load(file, load_external_data=False)
    onnx.helper.set_model_props(written, {_SIZES: f"multiples of {_STEP}"})
    onnx.save(written, file)
    return found


def sizes_taken(file: Path) -> str:
    """Heights and widths of the images that an ONNX file takes: `any`, or `multiples of 32`; empty where it
    takes one size alone."""
    model = onnx.load(file, load_external_data=False)
    sides = model.graph.input[0].type.tensor_type.shape.dim[2:]
    if not all(dim.HasField("dim_param") for dim in sides):
        return ""
    return {entry.key: entry.value for entry in model.metadata_props}.get(_SIZES, "any")


def why_not_onnx(model: nn.Module, spec: InputSpec) -> str:
    """Try an export that is thrown away; returns why it cannot be made, in one line, or nothing."""
    noise = example_images(spec)
    try:
        with temporary_folder() as folder:
            # Where it cannot be for any size, it will be for this one.
            export_onnx(model, spec, folder / "trial.onnx", noise, any_size=False)
    except (ExportMismatchError, RunDirError):
        return ""  # random weights need not agree; and no room for a trial says nothing of the model
    except ExportError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for files that are looked at and thrown away.

    Raises:
        RunDirError: There is no room for it.
    """
    with writing(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def onnx_difference(model: nn.Module, file: Path, images: Tensor) -> float:
    """Largest |onnx - eager| over the largest |eager| logit, for a batch of all images and of one.

    Raises:
        ExportError: onnxruntime does not run the file.
    """
    batches = [images.cpu().float(), images[:1].cpu().float()]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, and some sizes are expected to
    try:
        session = onnxruntime.InferenceSession(
            _for_runtime(file), options, providers=["CPUExecutionProvider"]
        )
        exported = [session.run(None, {"images": batch.numpy()})[0] for batch in batches]
    except Exception as error:  # of onnxruntime's many kinds
        raise ExportError(f"onnxruntime does not run what was exported ({reason_of(error)})") from None
    with torch.no_grad():
        pairs = [
            (torch.from_numpy(ours), model(batch)) for ours, batch in zip(exported, batches, strict=True)
        ]
    # Not max(): it would lose a NaN.
    return float(np.max([_difference(ours, eager) for ours, eager in pairs]))


def export_program(model: nn.Module, spec: InputSpec, file: Path, images: Tensor) -> float:
    """Write a `torch.export` program (`.pt2`), with a dynamic batch, and check it against `model`.

    Returns:
        The largest difference of logits, relative to the largest logit.

    Raises:
        ExportError: torch.export cannot take the model.
        ExportMismatchError: The program computes something else; it is not left behind.
        RunDirError: The file cannot be written.
    """
    model = _plain_copy(model)
    with _unfinished(file) as unfinished:
        with quiet():
            try:
                program = captured(model, spec)
            except Exception as error:  # of torch's many kinds
                name = type(model).__name__
                raise ExportError(f"torch.export cannot take this {name} ({reason_of(error)})") from None
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)  # see onnx_graph._forget_sources
            buffer = io.BytesIO()  # torch's own file writer aborts the process when the disk is full
            torch.export.save(program, buffer)
            unfinished.write_bytes(buffer.getvalue())
            loaded = torch.export.load(unfinished).module()
        with torch.no_grad():
            difference = _difference(loaded(images.cpu()), model(images.cpu()))
        _check(file, difference, TOLERANCE)
    return difference


def _for_runtime(file: Path) -> Path | bytes:
    """onnxruntime wants names in UTF-8: of a folder with another one it gets the content without the name."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return file.read_bytes()
    return file


def _plain_copy(model: nn.Module) -> nn.Module:
    return put_together(copy.deepcopy(model)).cpu().float().eval()


def _difference(exported: Tensor, eager: Tensor) -> float:
    """Relative to the largest logit; of a model whose head is all zeros, absolute."""
    return ((exported - eager).abs().max() / (eager.abs().max() or 1.0)).item()


def _check(file: Path, difference: float, tolerance: float) -> None:
    if not difference <= tolerance:  # a NaN is no agreement either
        raise ExportMismatchError(
            f"{file}: logits differ by {difference:.1e} of the largest one, allowed are {tolerance:.0e}"
        )


@contextlib.contextmanager
def _unfinished(file: Path) -> Iterator[Path]:
    """A file to write to, in a hidden folder; all of the folder moves to `file`'s if all goes well.

    The name is already the final one, because an ONNX file says what the file with its weights is called.
    """
    hidden = file.with_name(f".unfinished-{file.name}")
    shutil.rmtree(hidden, ignore_errors=True)  # of a call that was killed
    data = file.with_name(f"{file.name}.data")
    try:
        with writing(file):
            hidden.mkdir()
            yield hidden / file.name
            if data.exists():
                # Two files cannot be replaced at once: rather none for a moment than two of different models.
                file.unlink(missing_ok=True)
                data.unlink()
            for part in sorted(hidden.iterdir(), reverse=True):  # the data first
                os.replace(part, file.with_name(part.name))
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
