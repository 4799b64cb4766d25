"""`stepwell compare`: paths and losses on one teacher and one data set, with fair controls, in one table."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from stepwell.compare import scales
from stepwell.compare.arms import Row, arms_of, given, run_arms
from stepwell.compare.paper import paper
from stepwell.compare.suites import NOTES, OF_MASKS
from stepwell.compare.table import as_json, as_markdown, as_plot, as_table
from stepwell.config.base import flag_of
from stepwell.config.commands import CompareConfig
from stepwell.data.splits import resolve_data
from stepwell.errors import ConfigError, RunDirError
from stepwell.models.teacher import load_teacher
from stepwell.paths.begin import require
from stepwell.run.atomic import write_atomically, writing
from stepwell.run.distributed import from_main
from stepwell.run.processes import world
from stepwell.run.run_dir import RunDir
from stepwell.setting.agreed_task import teacher_task
from stepwell.version import __version__


def run(config: CompareConfig) -> str:
    """Run the cells that are missing; write compare.json, compare.md and accuracy-over-cost.svg."""
    check(config)
    if config.suite is not None and config.scale == "paper" and not (config.teacher or config.data):
        return paper(config.suite, config)
    require(config, "compare", "out_dir")
    assert config.out_dir is not None
    out = config.out_dir
    if config.suite is not None:
        arms, config = scales.prepared(config.suite, config, out)
    else:
        require(config, "compare", "teacher", "data")
        arms = arms_of(config)
    config = _with_threads(config)
    data = resolve_data(config)
    teacher = load_teacher(
        config.teacher, config.teacher_weights, config.model_args, len(data.classes), config.weights_key
    )
    task = next((t for t in (data.task, teacher_task(teacher, config)) if t != "classification" and t), None)
    if task not in (None, "segmentation"):
        raise ConfigError(
            f"compare tables are of top1 or mIoU, and this would be the task {task}: run stepwell compress "
            f"for each way instead"
        )
    from_main(lambda: _make(out / "stages"))
    RunDir(out).check_identity({"teacher": teacher.digest, "data": data.fingerprint})
    rows = run_arms(arms, config, out)
    return from_main(lambda: _write(config, out, rows, Path(teacher.name).name, Path(data.source).name))


def _make(folder: Path) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _write(config: CompareConfig, out: Path, rows: list[Row], teacher: str, data: str) -> str:
    shutil.rmtree(out / "unfinished", ignore_errors=True)
    about = {
        "stepwell_version": __version__,
        "suite": config.suite,
        "scale": config.scale,
        # Names, not places: the file is for others too.
        "teacher": teacher,
        "data": data,
        "hardware": rows[0].cells[0].hardware,
    }
    write_atomically(out / "compare.json", as_json(rows, about))
    write_atomically(out / "compare.md", as_markdown(rows))
    write_atomically(out / "accuracy-over-cost.svg", as_plot(rows))
    files = ", ".join(str(out / name) for name in ("compare.json", "compare.md", "accuracy-over-cost.svg"))
    notes = NOTES.get(config.suite, ()) if config.suite else ()
    return "\n".join([as_table(rows), *notes, "", files])


def check(config: CompareConfig) -> None:
    """Refuse what cannot be compared, before anything runs.

    Raises:
        ConfigError: An option that a comparison or a suite sets itself, or a list that makes no comparison.
        RunDirError: The folder holds a run of another command.
    """
    asked = given(config)
    if config.minutes is not None:
        raise ConfigError(
            "compare takes --budget-epochs or --epochs: what fits into --minutes depends on what else runs"
        )
    for single, instead in (("path", "paths"), ("seed", "seeds"), ("control", "controls or --no-controls")):
        if single in asked:
            raise ConfigError(f"compare takes --{instead}, not --{single}")
    for single, several in (
        ("lr", "lrs"),
        ("logit_loss", "logit_losses"),
        ("feature_loss", "feature_losses"),
    ):
        if single in asked and getattr(config, several):
            raise ConfigError(f"{flag_of(several)} and {flag_of(single)}: give one of them")
    for name in ("paths", "logit_losses", "feature_losses"):
        if config.suite is not None and name in asked:
            raise ConfigError(f"--suite {config.suite} has arms of its own: leave out {flag_of(name)}")
    if config.suite == "optimizer" and config.lrs:
        raise ConfigError("--suite optimizer compares learning rates: leave out --lrs")
    if config.probe:
        raise ConfigError(
            "--probe in every run of a comparison would train the same classifier again: train it once with "
            "stepwell train --probe, and give that --teacher"
        )
    if config.encoder_weights is not None and (config.suite != OF_MASKS or config.teacher):
        raise ConfigError(
            "--encoder-weights is where the teacher starts that --suite segmentation trains: leave it out"
        )
    if config.suite is None and "scale" in asked:
        raise ConfigError("--scale is the size of a --suite")
    if not config.seeds or not config.paths:
        raise ConfigError("compare needs at least one of --seeds and one of --paths")
    for name in ("paths", "logit_losses", "feature_losses", "seeds", "lrs"):
        values = getattr(config, name)
        if twice := [value for value in values if values.count(value) > 1]:
            raise ConfigError(f"{flag_of(name)} has {twice[0]} twice")
    if config.jobs > 1 and world() > 1:
        raise ConfigError(
            f"--jobs {config.jobs}: {world()} processes make every run together, so runs come one by one"
        )
    if (out := config.out_dir) is not None and from_main((out / "config.yaml").exists):
        raise RunDirError(f"{config.out_dir} is a run of another command; choose another --out")


def _with_threads(config: CompareConfig) -> CompareConfig:
    """The processor is shared out among the jobs."""
    if config.threads is not None or config.jobs == 1:
        return config
    threads = max(1, (os.cpu_count() or 1) // config.jobs)
    return config.model_copy(update={"threads": threads})
