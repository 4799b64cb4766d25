"""`stepwell export`: any rung of the ladder of a finished run."""

from __future__ import annotations

from pathlib import Path

from stepwell.config.commands import ExportConfig
from stepwell.errors import ConfigError, ModelError
from stepwell.measure.size import num_params, short_number
from stepwell.models.card import example_images, save_model
from stepwell.models.export import export_onnx, export_program
from stepwell.models.factory import Factory, load_factory
from stepwell.models.ladder import load_rung, rungs, why_no_ladder
from stepwell.models.onnx_graph import OPSET
from stepwell.run.atomic import writing
from stepwell.run.progress import progress


def run(config: ExportConfig) -> str:
    """Write the rungs that were asked for; returns a line per file.

    ONNX and torch.export files are checked by running them. The run's images may be gone by now, so the
    check uses noise of the images' scale; `compress` checks its student on real ones.
    """
    available = rungs(config.run)
    if not available:
        raise ModelError(why_no_ladder(config.run))
    if config.all == (config.keep_ratio is not None):
        listed = ", ".join(f"{ratio:g}" for ratio in available)
        raise ConfigError(f"export needs --keep RATIO or --all; the rungs are {listed}")
    if config.opset is not None and config.format != "onnx":
        raise ConfigError(f"--opset is for --format onnx, not for {config.format}")
    wanted = available if config.all else [config.keep_ratio or 0.0]
    factory = load_factory(config.teacher) if config.teacher else None
    out = config.out_dir or config.run / "exports"
    lines = []
    with progress("export", len(wanted)) as advance:
        for keep_ratio in wanted:
            lines.append(_export_one(config, keep_ratio, out, factory))
            advance("")
    return "\n".join(lines)


def _export_one(config: ExportConfig, keep_ratio: float, out: Path, factory: Factory | None) -> str:
    model, card = load_rung(config.run, keep_ratio, factory)
    images = example_images(card.input, 4)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    stem = out / f"keep-{keep_ratio:g}"
    match config.format:
        case "onnx":
            target = stem.with_name(f"{stem.name}.onnx")
            difference = export_onnx(model, card.input, target, images, opset=config.opset or OPSET)
        case "torch-export":
            target = stem.with_name(f"{stem.name}.pt2")
            difference = export_program(model, card.input, target, images)
        case "safetensors":
            target, difference = stem, 0.0
            with writing(target):
                target.mkdir(exist_ok=True)
            save_model(target, model, card)
    return f"{target}: {short_number(num_params(model))} parameters, agrees with eager to {difference:.0e}"
