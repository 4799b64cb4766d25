"""Exported files: what is in them, which models cannot be exported, and what is left when that fails."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepwell.errors import ExportError, ExportMismatchError
from stepwell.models import export, onnx_graph
from stepwell.models.card import Architecture, Card
from stepwell.models.export import export_onnx, export_program, onnx_difference, sizes_taken, why_not_onnx
from stepwell.models.input import input_spec
from stepwell.report import figures
from stepwell.tasks.outputs import as_logits
from tiny import SPEC, random_images

SIZE = SPEC.channels * SPEC.size[0] * SPEC.size[1]
IMAGES = random_images(3)


class Linear(nn.Module):
    """The smallest classifier; those below are it with one peculiarity each."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(SIZE, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))


class Attending(Linear):
    """Attention in five dimensions, as in Twins, Hiera and SAM, with every kind of mask."""

    def forward(self, images: Tensor) -> Tensor:
        x = images.unflatten(0, (-1, 1))  # (batch, 1, channels, height, width)
        mask = torch.linspace(-1, 1, SPEC.size[0])
        plain, causal = (F.scaled_dot_product_attention(x, x, x, is_causal=c) for c in (False, True))
        added = F.scaled_dot_product_attention(x, x, x, attn_mask=mask, scale=0.3)
        masked = F.scaled_dot_product_attention(x, x, x, attn_mask=mask > 0)
        return self.fc((plain + causal + added + masked).flatten(1))


class Arguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Linear()

    def forward(self, *args: Tensor) -> Tensor:
        return self.model(*args)


class Length(Linear):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.reshape(len(images), -1))


class Bessel(Linear):
    """ONNX has no such function."""

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(torch.special.bessel_j0(images.flatten(1)))


class Half(Linear):
    """As a wrapper that runs a model in bfloat16 does it."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.fc(images.flatten(1)).float()


class Branching(Linear):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1)) if images.sum() > 0 else self.fc(-images.flatten(1))


class Pairs(Linear):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.reshape(2, -1))


class NotANumber(Linear):
    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1)) / 0 * 0


class NotItself(Linear):
    """Computes something else when it is traced."""

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1)) * (2 if torch.compiler.is_exporting() else 1)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.brings(
    "machine", "a runtime that reads opset 18 and IR version 8", "the ONNX file claims no more than these"
)
def test_the_lowest_version_is_written_that_holds_the_graph(tmp_path):
    file, model = tmp_path / "model.onnx", Linear()
    (tmp_path / ".unfinished-model.onnx").mkdir()  # of a call that was killed
    (tmp_path / ".unfinished-model.onnx" / "model.onnx.data").write_bytes(b"half of it")
    assert export_onnx(model, SPEC, file, IMAGES) < 1e-5
    program = onnx.load(file)
    assert program.ir_version == 8
    assert [(entry.domain, entry.version) for entry in program.opset_import] == [("", 18)]
    onnx.checker.check_model(program, full_check=True)
    assert onnxruntime.InferenceSession(file).get_inputs()[0].shape[1:] == [3, 16, 16]
    weight, bias = model.fc.weight.detach().numpy(), model.fc.bias.detach().numpy()
    (logits,) = onnxruntime.InferenceSession(file).run(None, {"images": IMAGES.numpy()})
    np.testing.assert_allclose(np.asarray(logits), IMAGES.flatten(1).numpy() @ weight.T + bias, atol=1e-4)
    # Nor does it say on whose machine, in which line, a node was made.
    assert str(Path(__file__).parent).encode() not in file.read_bytes()
    assert not any(node.metadata_props for node in program.graph.node)
    assert left_in(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize(("opset", "ir_version"), [pytest.param(20, 9, marks=pytest.mark.slow), (21, 10)])
def test_a_later_opset_can_be_asked_for(tmp_path, opset, ir_version):
    assert export_onnx(Linear(), SPEC, tmp_path / "model.onnx", IMAGES, opset=opset) < 1e-5
    program = onnx.load(tmp_path / "model.onnx")
    assert (program.opset_import[0].version, program.ir_version) == (opset, ir_version)


def test_an_opset_that_the_exporter_does_not_reach_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"--opset 99: the exporter of torch .* wrote opset 18 instead"):
        export_onnx(Linear(), SPEC, tmp_path / "model.onnx", IMAGES, opset=99)
    assert not left_in(tmp_path)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            Attending,
            marks=pytest.mark.brings(
                "model",
                "attention that torch's exporter cannot take (Twins, Hiera, SAM)",
                "ONNX, spelled out",
            ),
        ),
        pytest.param(Arguments, marks=pytest.mark.brings("model", "`forward(*args)`", "ONNX")),
        pytest.param(Length, marks=pytest.mark.brings("model", "`len(images)` in `forward`", "ONNX")),
    ],
)
def test_what_has_to_be_exported_in_another_way(model, tmp_path):
    model = model().eval()
    assert export_onnx(model, SPEC, tmp_path / "model.onnx", IMAGES) < 1e-5
    assert export_program(model, SPEC, tmp_path / "model.pt2", IMAGES) < 1e-5
    assert left_in(tmp_path) == ["model.onnx", "model.pt2"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for num in (1, 3):  # the file does not know with how many it was made
        assert np.shape(session.run(None, {"images": IMAGES[:num].numpy()})[0]) == (num, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "args"),
    [
        (
            "twins_svt_small",
            64,
            {"embed_dims": (8, 16, 32, 64), "num_heads": (1, 2, 4, 8), "depths": (1,) * 4},
        ),
        ("hiera_tiny_224", 224, {"stages": (1, 1, 1, 1), "embed_dim": 16}),
        ("samvit_base_patch16_224", 224, {"embed_dim": 32, "depth": 3, "num_heads": 2}),
    ],
)
def test_transformers_with_other_dimensions_are_exported(name, size, args, tmp_path):
    args = {"img_size": size, **args} if "twins" in name else args
    model = timm.create_model(name, num_classes=5, **args).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # Hiera's head begins with zeros
            parameter += 0.02 * torch.randn_like(parameter)
    spec = replace(input_spec(model), size=(size, size))
    assert export_onnx(model, spec, tmp_path / "model.onnx", random_images(2, size=size)) < 1e-5


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        pytest.param(
            Bessel,
            r"cannot take this Bessel \(No ONNX function found for .*bessel",
            marks=pytest.mark.brings(
                "model",
                "an operator that ONNX lacks",
                "said before training; weights and report are delivered, without an ONNX file",
            ),
        ),
        pytest.param(
            Half,
            r"onnxruntime does not run what was exported \(\[ONNXRuntimeError\] : 9 : NOT_IMPLEMENTED",
            marks=[
                pytest.mark.slow,
                pytest.mark.brings(
                    "model",
                    "`with torch.autocast(...)` inside `forward`",
                    "said before training; delivered without an ONNX file",
                ),
            ],
        ),
        pytest.param(
            Branching,
            r"cannot take this Branching \(.*data-dependent",
            marks=[
                pytest.mark.slow,
                pytest.mark.brings(
                    "model",
                    "a branch on the values of images",
                    "said before training; delivered without an ONNX file",
                ),
            ],
        ),
        pytest.param(
            Pairs,
            r"cannot take this Pairs \(its code fixes the size of a batch; images.shape\[0\] would not\)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(model, reason, tmp_path, capfd):
    with pytest.raises(ExportError, match=reason) as caught:
        export_onnx(model(), SPEC, tmp_path / "model.onnx", IMAGES[:2])
    line = str(caught.value)
    assert "\n" not in line
    assert "\x1b" not in line
    assert len(line) < 400
    assert not left_in(tmp_path)
    assert capfd.readouterr() == ("", "")
    if model is Bessel:
        assert why_not_onnx(model(), SPEC) == line


def test_torch_export_says_it_in_one_line_too(tmp_path):
    with pytest.raises(ExportError, match=r"^torch.export cannot take this Branching \(.*\)$"):
        export_program(Branching(), SPEC, tmp_path / "model.pt2", IMAGES)
    assert not left_in(tmp_path)


@pytest.mark.parametrize(
    ("export", "model"),
    [(export_onnx, NotANumber), (export_program, NotANumber), (export_program, NotItself)],
)
def test_a_file_that_computes_something_else_is_not_left_behind(export, model, tmp_path):
    with pytest.raises(
        ExportMismatchError, match=r"model\.file: logits differ by (nan|1\.0e\+00) of the largest"
    ):
        export(model(), SPEC, tmp_path / "model.file", IMAGES)
    assert not left_in(tmp_path)


def test_a_head_of_zeros_agrees_with_itself(tmp_path):
    model = Linear()
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    assert export_program(model, SPEC, tmp_path / "model.pt2", IMAGES) == 0


@pytest.mark.slow
@pytest.mark.brings(
    "model", "more than 1.8 GB of weights", "`model.onnx`, and the weights in `model.onnx.data`"
)
def test_large_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "EXTERNAL_FROM", 4 * SIZE * 5)  # the biases are too many
    file, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    export_onnx(Linear(), SPEC, file, IMAGES)
    assert left_in(tmp_path) == ["model.onnx", "model.onnx.data"]
    assert file.stat().st_size < 4 * SIZE * 5 <= data.stat().st_size
    assert onnx.load(file, load_external_data=False).ir_version == 8
    assert onnx_difference(Linear(), file, IMAGES) < 1e-5

    # It stays when the next export fails, is replaced by a large one, and goes with a small one.
    before = file.read_bytes(), data.read_bytes()
    with pytest.raises(ExportMismatchError):
        export_onnx(NotItself(), SPEC, file, IMAGES)
    assert (file.read_bytes(), data.read_bytes()) == before
    other = Linear()
    nn.init.ones_(other.fc.weight)
    export_onnx(other, SPEC, file, IMAGES)
    assert onnx_difference(other, file, IMAGES) < 1e-5
    export_onnx(Linear(classes=4), SPEC, file, IMAGES)
    assert left_in(tmp_path) == ["model.onnx"]


@pytest.mark.brings(
    "machine", "an output folder whose name is not UTF-8", "ONNX is written and checked there"
)
def test_a_folder_whose_name_is_no_text(tmp_path):
    folder = tmp_path / "caf\udce9"  # Latin-1 on the disk
    folder.mkdir()
    assert export_onnx(Linear(), SPEC, folder / "model.onnx", IMAGES) < 1e-5
    assert left_in(folder) == ["model.onnx"]


class Halves(nn.Module):
    """Of maps: up again by a factor of 2, or to the size that there was."""

    def __init__(self, *, by_factor: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.by_factor = by_factor
        self.down, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(7, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        small = self.down(images)
        if self.by_factor:
            up = F.interpolate(small, scale_factor=2.0)
        else:
            up = F.interpolate(small, images.shape[-2:])
        return self.head(torch.cat([images, up], dim=1))


MASKS = replace(SPEC, size=(32, 64), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize(("by_factor", "sizes"), [(False, "any"), (True, "multiples of 32")])
def test_a_file_says_which_sizes_it_was_run_on(tmp_path, by_factor, sizes, capfd):
    model = as_logits(Halves(by_factor=by_factor), "maps").eval()
    export_onnx(model, MASKS, tmp_path / "m.onnx", torch.randn(2, 3, 32, 64))
    assert capfd.readouterr() == ("", "")  # onnxruntime does not report the sizes that are only tried
    assert sizes_taken(tmp_path / "m.onnx") == sizes
    images = torch.randn(1, 3, *((96, 32) if by_factor else (37, 51)))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(None, {"images": images.numpy()})
    assert np.allclose(found, model(images).detach().numpy(), atol=1e-4)


class OfOneSize(nn.Module):
    """Masks of a model with a position table."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.positions = nn.Conv2d(3, 3, 1), nn.Parameter(torch.randn(1, 3, *MASKS.size))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images) + self.positions


class OtherElsewhere(nn.Module):
    """Masks of a model that computes something else in a graph for any size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        traced = torch.compiler.is_exporting() and not isinstance(images.shape[2], int)
        return self.head(images) * (2 if traced else 1)


@pytest.mark.slow  # four exports
@pytest.mark.parametrize("kind", [OfOneSize, OtherElsewhere])
def test_a_file_for_one_size_where_that_for_any_is_not_the_model(tmp_path, kind):
    """However large a difference is allowed: such a file is timed."""
    model = as_logits(kind(), "maps").eval()
    images = torch.randn(2, 3, *MASKS.size)
    assert export_onnx(model, MASKS, tmp_path / "m.onnx", images, tolerance=math.inf) < 1e-5
    assert sizes_taken(tmp_path / "m.onnx") == ""
    assert onnx_difference(model, tmp_path / "m.onnx", images) < 1e-5


@pytest.mark.parametrize("difference", [math.inf, 0.1])
def test_no_file_that_fails_for_any_size_is_taken_where_all_differences_are_allowed(
    tmp_path, monkeypatch, difference
):
    monkeypatch.setattr(export, "_for_any_size", lambda *_: difference)
    monkeypatch.setattr(export, "write_onnx", lambda *given: given[2].write_text("for one size"))
    monkeypatch.setattr(export, "onnx_difference", lambda *_: 0.2)
    model = as_logits(OfOneSize(), "maps").eval()
    images = torch.randn(2, 3, *MASKS.size)
    assert export_onnx(model, MASKS, tmp_path / "m.onnx", images, tolerance=math.inf) == 0.2
    assert (tmp_path / "m.onnx").read_text() == "for one size"


def test_files_that_are_tried_or_timed_are_for_one_size(monkeypatch):
    written: list[bool] = []

    def refused(*_given: object, any_size: bool = False) -> None:
        written.append(any_size)
        raise ExportError("not here")

    monkeypatch.setattr(export, "write_onnx", refused)
    monkeypatch.setattr(figures, "measure_latency", lambda *_: None)
    model = as_logits(OfOneSize(), "maps").eval()
    mine = Architecture(source="factory", name="mine", outputs="maps")
    card = Card(architecture=mine, classes=["a", "b", "c"], input=MASKS, task="segmentation")
    figures._timed(model, card, torch.randn(2, 3, *MASKS.size), 1)
    assert why_not_onnx(model, MASKS) == "not here"
    assert written == [False, False]
