"""`stepwell export`: the student of a finished run, or any rung of its ladder, in another format."""

from __future__ import annotations

from pathlib import Path

from stepwell.config.commands import ExportConfig
from stepwell.errors import ConfigError, ModelError
from stepwell.measure.size import num_params, short_number
from stepwell.models.card import CARD, example_images, load_with_card, save_model
from stepwell.models.export import export_onnx, export_program
from stepwell.models.factory import Factory, load_factory
from stepwell.models.ladder import load_rung, rungs, why_no_ladder
from stepwell.models.onnx_graph import OPSET
from stepwell.run.atomic import writing
from stepwell.run.progress import progress


def run(config: ExportConfig) -> str:
    """Write the student, or the rungs that were asked for; returns a line per file.

    ONNX and torch.export files are checked by running them. The run's images may be gone by now, so the
    check uses noise of the images' scale; `compress` checks its student on real ones.
    """
    if config.all and config.keep_ratio is not None:
        raise ConfigError(
            "--keep is one rung and --all are all: give one of them, or neither for the student"
        )
    if config.opset is not None and config.format != "onnx":
        raise ConfigError(f"--opset is for --format onnx, not for {config.format}")
    wanted = rungs(config.run) if config.all else [config.keep_ratio]
    if not wanted:
        raise ModelError(why_no_ladder(config.run))
    factory = load_factory(config.teacher) if config.teacher else None
    out = config.out_dir or config.run / "exports"
    lines = []
    with progress("export", len(wanted)) as advance:
        for keep_ratio in wanted:
            lines.append(_export_one(config, keep_ratio, out, factory))
            advance("")
    return "\n".join(lines)


def _student_of(config: ExportConfig) -> Path:
    """The folder of a run's student, or the folder itself, which is not written over."""
    run = config.run
    for folder in (run / "student", run):
        if (folder / CARD).is_file():
            if config.out_dir is not None and (config.out_dir / "student").resolve() == folder.resolve():
                raise ConfigError(f"--out {config.out_dir} would write over {folder}: choose another")
            return folder
    raise ModelError(f"{run} has no student (yet): run stepwell compress on it until it is finished")


def _export_one(config: ExportConfig, keep_ratio: float | None, out: Path, factory: Factory | None) -> str:
    if keep_ratio is None:
        stem, (model, card) = out / "student", load_with_card(_student_of(config), factory)
    else:
        stem, (model, card) = out / f"keep-{keep_ratio:g}", load_rung(config.run, keep_ratio, factory)
    images = example_images(card.input, 4)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
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
