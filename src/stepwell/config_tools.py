"""Options of the small commands: what looks at a finished run, uses it, or demonstrates."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from stepwell.options import Count, Fraction, Options, Positive, Seed


class DemoConfig(Options):
    """Options of the demonstration."""

    out_dir: Path = Path("runs/demo")
    """Where data, teacher and compressed model go."""
    seed: Seed = 0
    """Seed of everything random."""
    effort: Positive = 1.0
    """Multiplies all epochs; 0.1 is a quick look."""
    device: str = "auto"
    """cpu, cuda, ...; `auto` takes the GPU if there is one."""


class InspectConfig(Options):
    """Options of `stepwell inspect`."""

    run: Path
    """Directory of a finished run."""
    json_: bool = False
    """Print result.json instead of tables."""
    all: bool = False
    """Also export and time every rung of the ladder."""
    teacher: str = ""
    """FILE.py:FACTORY that builds the full-width model, with --all on a model that is not timm's."""


class ExportConfig(Options):
    """Options of `stepwell export`."""

    run: Path
    """Directory of a run with a trained ladder."""
    keep_ratio: Fraction | None = None
    """Which rung of the ladder to hand out."""
    all: bool = False
    """Hand out every rung."""
    format: Literal["onnx", "safetensors", "torch-export"] = "onnx"
    """`onnx` (dynamic batch, for any runtime), `safetensors` (a model directory for stepwell.load) or
    `torch-export` (a .pt2 program, loads without stepwell)."""
    out_dir: Path | None = None
    """Folder for the files; RUN/exports if not given."""
    teacher: str = ""
    """FILE.py:FACTORY that builds the full-width model, where it is not timm's."""


class PredictConfig(Options):
    """Options of `stepwell predict`."""

    model: Path
    """A student directory, or a run that holds one."""
    images: tuple[Path, ...]
    """Image files."""
    top: Count = 3
    """How many classes to name per image."""
    teacher: str = ""
    """FILE.py:FACTORY that builds the full-width model, where it is not timm's."""
