"""`stepwell compare`: paths and losses on one teacher and one data set, with fair controls, in one table."""

from __future__ import annotations

import os
import shutil

from stepwell.commands.compare import suites
from stepwell.commands.compare.arms import arms_of, run_arms
from stepwell.commands.compare.table import as_json, as_markdown, as_plot, as_table
from stepwell.commands.compress import require
from stepwell.config import CompareConfig, make_config
from stepwell.delivery.teacher import load_teacher
from stepwell.errors import ConfigError
from stepwell.training.data import resolve_data
from stepwell.training.run_dir import RunDir, write_atomically, writing
from stepwell.version import __version__


def run(config: CompareConfig) -> str:
    """Run the cells that are missing; write compare.json, compare.md and accuracy-over-cost.svg."""
    if config.suite is not None and config.scale == "paper":
        return suites.paper(config.suite)
    require(config, "compare", "out_dir")
    assert config.out_dir is not None
    out = config.out_dir
    if config.suite is not None:
        arms, config = suites.prepared(config.suite, config, out)
    else:
        require(config, "compare", "teacher", "data")
        arms = arms_of(config)
    check(config)
    config = _with_threads(config)
    with writing(out):
        (out / "stages").mkdir(parents=True, exist_ok=True)
    data = resolve_data(config)
    teacher = load_teacher(config.teacher, config.teacher_weights, config.model_args, len(data.classes))
    RunDir(out).check_identity({"teacher": teacher.digest, "data": data.fingerprint})
    rows = run_arms(arms, config, out)
    shutil.rmtree(out / "unfinished", ignore_errors=True)
    about = {
        "stepwell_version": __version__,
        "suite": config.suite,
        "scale": config.scale,
        "teacher": teacher.name,
        "data": data.source,
        "hardware": rows[0].cells[0].hardware,
    }
    write_atomically(out / "compare.json", as_json(rows, about))
    write_atomically(out / "compare.md", as_markdown(rows))
    write_atomically(out / "accuracy-over-cost.svg", as_plot(rows))
    files = ", ".join(str(out / name) for name in ("compare.json", "compare.md", "accuracy-over-cost.svg"))
    return f"{as_table(rows)}\n\n{files}"


def check(config: CompareConfig) -> None:
    """Refuse what cannot be compared, before anything runs.

    Raises:
        ConfigError: An option that a comparison sets itself, or a list without entries.
    """
    if config.minutes is not None:
        raise ConfigError("compare needs --epochs: what fits into --minutes depends on what else is running")
    if not config.seeds or not config.paths:
        raise ConfigError("compare needs at least one of --seeds and one of --paths")
    for lists, single in (("paths", "path"), ("lrs", "lr"), ("seeds", "seed")):
        if single in config.model_fields_set and single != "lr":
            raise ConfigError(f"compare takes --{lists}, not --{single}")


def _with_threads(config: CompareConfig) -> CompareConfig:
    """The processor is shared out among the jobs."""
    if config.threads is not None or config.jobs == 1:
        return config
    threads = max(1, (os.cpu_count() or 1) // config.jobs)
    return make_config(CompareConfig, {**given(config), "threads": threads})


def given(config: CompareConfig) -> dict[str, object]:
    """What was set of a config, not what is its default."""
    return {name: getattr(config, name) for name in config.model_fields_set}
