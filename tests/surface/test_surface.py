"""What others build on: public names, command-line flags, cheap imports, version bounds, the size of files.

A change of the surface must be seen in the diff of this file.
"""

from __future__ import annotations

import ast
import json
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import stepwell
from stepwell import cli
from stepwell.config.base import flag_of
from stepwell.config.commands import DEFAULT_BUDGET, DEFAULT_EPOCHS
from stepwell.config.help import MAIN_OPTIONS
from stepwell.measure.budget import DEFAULT_KEEP

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

PUBLIC = {"Compressed", "StepwellError", "__version__", "compress", "load"}

TRAINING = {
    "--augment", "--batch-size", "--clip-norm", "--data", "--data-root", "--device", "--epochs",
    "--image-column", "--image-size", "--mean", "--std", "--label-column", "--lr",
    "--skip-names", "--task", "--white-level",
    "--gradient-checkpointing", "--shard-optimizer",
    "--compile", "--minutes", "--model-args", "--optimizer", "--out", "--precision", "--schedule", "--seed",
    "--class-order", "--selection-data",
    "--accumulate", "--cutmix", "--ema", "--keep-best", "--label-smoothing", "--mix-prob", "--mixup",
    "--rand-augment", "--random-erasing",
    "--class-list", "--ignore-index", "--class-weights",
    "--skip-bad-images", "--threads", "--warmup", "--weight-decay", "--workers", "--config",
}  # fmt: skip
COMPRESS = TRAINING | {
    "--assistant", "--control", "--distill-lr", "--feature-layers", "--feature-scale", "--feature-weight",
    "--grid", "--joint-epochs", "--joint-lr", "--keep", "--latency-threads", "--logit-weight", "--metric",
    "--min-heads-per-layer", "--num-candidates", "--num-random", "--preset", "--round-to", "--rule",
    "--sampling", "--score-images", "--score-reduction", "--task-weight", "--teacher", "--teacher-weights",
    "--temperature", "--macs", "--params", "--latency-ms", "--importance",
    "--cut", "--shares", "--drop-blocks", "--whole-last", "--uniform", "--repair", "--project-states",
    "--student", "--student-args", "--student-init", "--student-pretrained", "--student-size",
    "--student-weights",
    "--student-weights-key", "--weights-key",
    "--assistant-share", "--snapshots",
    "--path", "--teachers", "--probe", "--probe-epochs", "--assistants", "--num-assistants", "--drop",
    "--logit-loss", "--feature-loss", "--logit-args", "--feature-args", "--loss-warmup",
    "--first-epochs", "--budget-epochs", "--joint-share",
    "--ladder", "--baseline", "--baseline-args", "--baseline-pretrained", "--baseline-weights",
    "--baseline-weights-key",
    "--tune", "--tune-lrs", "--cache-teacher", "--cache-top", "--shard-teacher",
}  # fmt: skip
FLAGS = {
    "train": TRAINING | {"--layer-decay", "--model", "--pretrained", "--probe", "--weights", "--weights-key",
              "--auxiliary-weight", "--encoder-weights"},
    "compress": COMPRESS,
    "compare": COMPRESS | {
        "--paths", "--logit-losses", "--feature-losses", "--seeds", "--lrs", "--controls", "--jobs",
        "--suite", "--scale", "--encoder-weights",
    },
    "doctor": COMPRESS | {"--plan", "--num-images", "--devices", "--bandwidth"},
    "inspect": {"--all", "--beside", "--features", "--json", "--latency-ms", "--teacher"},
    "export": {"--all", "--format", "--keep", "--opset", "--out", "--teacher"},
    "predict": {"--out", "--teacher", "--top", "--white-level"},
    "demo": {"--device", "--effort", "--out", "--seed"},
}  # fmt: skip


def test_public_names() -> None:
    assert set(stepwell.__all__) == PUBLIC == set(dir(stepwell))
    for name in PUBLIC:
        assert getattr(stepwell, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        stepwell.compres  # noqa: B018


def test_version_is_that_of_the_changelog() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(stepwell.__version__)}\]", changes, flags=re.MULTILINE)


def test_there_is_no_other_command() -> None:
    assert set(cli.COMMANDS) == set(FLAGS)


@pytest.mark.parametrize("command", FLAGS)
def test_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help-all"]) == 0
    # A flag begins its line; `--no-flag` and the description come after it, in a column of their own.
    shown = re.findall(r"^. (?:-\w, )?(--[\w-]+)", capsys.readouterr().out, flags=re.MULTILINE)
    assert set(shown) == FLAGS[command] | {"--help"}
    assert len(shown) == len(set(shown))


@pytest.mark.parametrize("command", FLAGS)
def test_help_fits_a_screen_and_leads_to_all_of_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    if command not in MAIN_OPTIONS:  # it has few options: these are all
        assert cli.main([command, "--help-all"]) == 0
        assert capsys.readouterr().out == text
        return
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 110
    assert f"stepwell {command} --help-all" in lines[-1]
    shown = re.findall(r"^  (--[\w-]+)", text, flags=re.MULTILINE)
    assert set(shown) < FLAGS[command]
    assert len(shown) == len(set(shown))


@pytest.mark.parametrize("command", MAIN_OPTIONS)
def test_defaults_are_what_the_first_screen_says(command: str) -> None:
    kind, _ = cli.COMMANDS[command]
    fields = {flag_of(name): name for name in kind.model_fields}
    compared = 0
    for flag, text in (row for rows in MAIN_OPTIONS[command].values() for row in rows):
        if said := re.search(r"\(([^()]+)\)$", text):
            name = fields[flag.split()[0]]
            default = kind.model_fields[name].get_default()
            # Where no other budget, or no other length, is given.
            instead = {"keep_ratio": DEFAULT_KEEP, "budget_epochs": DEFAULT_BUDGET, "epochs": DEFAULT_EPOCHS}
            default = instead.get(name, default)
            values = default if isinstance(default, tuple) else (default,)
            assert said[1] == " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values), flag
            compared += 1
    assert compared >= 2


def modules_after(code: str) -> set[str]:
    """Which packages a fresh interpreter has loaded after `code`."""
    code += "\nimport json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_is_cheap() -> None:
    loaded = modules_after("import stepwell")
    assert "stepwell" in loaded
    assert not loaded & {"torch", "torchvision", "timm", "numpy", "onnxruntime", "matplotlib"}


def test_command_line_waits_for_nothing_heavy() -> None:
    loaded = modules_after("from stepwell.cli import main\nmain(['--help'])\nmain(['compress', '--help'])")
    assert not loaded & {"torch", "torchvision", "timm", "onnxruntime", "matplotlib"}


def test_help_takes_less_than_a_second() -> None:
    def seconds() -> float:  # of the processor: other programs on this machine are not our delay
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "stepwell", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 1


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT / "src/stepwell")))
def test_a_file_fits_into_a_head(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 340
    if file.name != "cli.py":  # the library reports through training/progress.py, or returns
        calls = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        assert not [c.lineno for c in calls if isinstance(c, ast.Name) and c.id == "print"]


def constraints(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines]
    assert lines == sorted(lines), f"{name} is not sorted"
    return {canonicalize_name(package): Version(version) for package, version in pairs}


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    return [Requirement(line) for line in [*PROJECT["dependencies"], *extras["demo"], *extras["dev"]]]


def test_constraints_satisfy_the_project() -> None:
    pinned = constraints("constraints.txt")
    for requirement in requirements():
        if requirement.name != "stepwell":
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement.name


def test_lowest_versions_are_the_ones_that_are_tested() -> None:
    """Every lower bound that a user relies on is installed, to the digit, by the minimum-versions check."""
    pinned = constraints("constraints-minimum.txt")
    extras = PROJECT["optional-dependencies"]
    lines = [line for name in ("demo", "transformers", "generic") for line in extras[name]]
    for line in [*PROJECT["dependencies"], *lines]:
        requirement = Requirement(line)
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        assert pinned[canonicalize_name(requirement.name)] == Version(bound.version), line


def test_who_reads_three_lines_gets_no_traceback():
    """`stepwell --help | head -3`, where the reader is gone before a word is written."""
    late = "import time; time.sleep(0.5); from stepwell.__main__ import main; main()"
    words = [sys.executable, "-c", late, "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.close()
        assert command.wait() == 0
        assert command.stderr.read() == ""
