"""The command line: `stepwell COMMAND ...`.

Only words are parsed here; each command is the function `run` of its file in `stepwell.commands`, imported
when it is called, so that `--help` does not wait for torch. Every error a user can cause ends in one line
on stderr and exit code 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import TypeAdapter, ValidationError

from stepwell.config.base import FLAGS, flag_of
from stepwell.config.commands import (
    CompareConfig,
    CompressConfig,
    DemoConfig,
    ExportConfig,
    InspectConfig,
    PredictConfig,
    TrainConfig,
)
from stepwell.config.doctor_options import DoctorConfig
from stepwell.config.files import implied, make_config, over, read_yaml
from stepwell.config.help import MAIN_OPTIONS, first_screen
from stepwell.config.options import Options
from stepwell.config.own_code import is_own_code
from stepwell.errors import ConfigError, StepwellError, did_you_mean, printable
from stepwell.run.processes import alone, check_launcher, is_main, wait_for_the_end, world
from stepwell.version import __version__

POSITIONAL = frozenset({"run", "images"})
"""Fields given without a flag; so is `model` of `predict`."""

PAIRS = ("--model-args", "--student-args", "--baseline-args", "--logit-args", "--feature-args")
"""Options that take name=value pairs."""

TOGETHER = frozenset({"train", "compress", "compare", "demo"})
"""What several processes (`torchrun`, `accelerate launch`) do together."""

COMMANDS: dict[str, tuple[type[Options], str]] = {
    "train": (TrainConfig, "get a teacher: fine-tune a timm model on a folder of images"),
    "compress": (CompressConfig, "the main job: a teacher and images in, a small proven model out"),
    "compare": (CompareConfig, "paths and losses side by side, with fair controls, in one table"),
    "doctor": (DoctorConfig, "what can be cut, size of every candidate, time and memory; trains nothing"),
    "inspect": (InspectConfig, "a finished run: the candidate curve, why this assistant, the final table"),
    "export": (ExportConfig, "the student, or a rung of the ladder, as ONNX, safetensors or torch.export"),
    "predict": (PredictConfig, "class names and probabilities for image files"),
    "demo": (DemoConfig, "the whole path on 1,797 handwritten digits, in minutes on a laptop"),
}


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code: 0, 2 for an error of the user's, 130 when interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of folders and classes may hold what a terminal cannot show; that must not cost the answer.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has seen enough: `stepwell --help | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        return 0
    except StepwellError as error:
        wait_for_the_end(error)
        print(f"stepwell: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    # torch's OutOfMemoryError is a RuntimeError; torch is not imported here.
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(
            "out of memory|allocate memory|not enough memory", str(error), re.IGNORECASE
        ):
            raise
        line = " ".join(str(error).split())[:160]
        way_out = (
            "go on with --gradient-checkpointing, on more processes (there also with --shard-optimizer), or "
            "with a smaller --batch-size in another --out"
        )
        print(f"stepwell: out of memory ({line}): {way_out}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_main():
            print("stepwell: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130


def _run(argv: Sequence[str]) -> int:
    if not is_main() and TOGETHER.isdisjoint(argv[:1]):  # what the first process does alone
        return 0
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"stepwell {__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        raise ConfigError(f"no command {command!r}{did_you_mean(command, COMMANDS)}; see stepwell --help")
    kind, summary = COMMANDS[command]
    if command in MAIN_OPTIONS and not {"-h", "--help"}.isdisjoint(rest):
        print(first_screen(command, summary))
        return 0
    config = parse(command, kind, rest, summary)
    if config is not None:
        check_launcher()
        run = import_module(f"stepwell.commands.{command}").run
        if world() > 1 and command not in TOGETHER:
            with alone():
                output = run(config)
        else:
            output = run(config)
        if not is_main():
            return 0
        print("\n".join(map(printable, str(output).split("\n"))))
    return 0


def _overview() -> str:
    lines = [f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "stepwell compresses a trained vision model in automatic distillation steps.",
            "",
            "usage: stepwell COMMAND [options]        stepwell COMMAND --help for its options",
            "",
            *lines,
            "",
            "  stepwell compress --teacher runs/teacher --data path/to/images --keep 0.1 --out runs/small",
        ]
    )


def parse(command: str, kind: type[Options], argv: Sequence[str], summary: str = "") -> Options | None:
    """Turn the words after a command into its config; None if they asked for help, which is printed.

    Options not given come from `--config FILE`, then from the preset, then from the defaults.

    Raises:
        ConfigError: An unknown option, a missing or an impossible value.
    """
    words = ["--help" if word == "--help-all" else word for word in _split_pairs(argv)]
    from_file = _from_file(kind, words)
    form = _form(command, kind, _defaults(from_file, words))
    _check_flags(words, form)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed = tyro.cli(form, args=words, prog=f"stepwell {command}", description=summary)
    except SystemExit as exit_:
        if exit_.code == 0:  # --help
            return None
        raise ConfigError(f"{_first_paragraph(errors.getvalue())}; see stepwell {command} --help") from None
    # What nobody asked for is left out: a config knows what was given, and what is its default.
    asked = {name: value for name, value in vars(parsed).items() if _is_given(name, command, words)}
    return make_config(kind, over(from_file, asked))


def _is_given(name: str, command: str, words: Sequence[str]) -> bool:
    if name in POSITIONAL or (command == "predict" and name == "model"):
        return True
    flag = flag_of(name)
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    return name != "config" and not given.isdisjoint({flag, f"--no-{flag[2:]}"})


def _split_pairs(argv: Sequence[str]) -> list[str]:
    """`--model-args img_size=32 patch_size=4` -> `--model-args img_size 32 patch_size 4`, tyro's form."""
    words: list[str] = []
    in_pairs = False
    for word in argv:
        if word.startswith("--"):
            in_pairs = word in PAIRS
            words.append(word)
        elif in_pairs:
            name, equals, value = word.partition("=")
            if not (name and equals):
                raise ConfigError(f"{words[-1]} takes name=value pairs, not {word!r}")
            words += [name, value]
        else:
            words.append(word)
    return words


def _from_file(kind: type[Options], words: Sequence[str]) -> dict[str, Any]:
    """The values of the config file, if one is named."""
    values: dict[str, Any] = {}
    if (file := _value_of("--config", words)) is not None:
        for name, value in read_yaml(Path(file)).items():
            if name not in kind.model_fields:
                field = next((f for f, flag in FLAGS.items() if flag == name), str(name))
                raise ConfigError(f"{file}: unknown key {name!r}{did_you_mean(field, kind.model_fields)}")
            flag = flag_of(name)
            checked = _value(name, value, kind, file)
            code = [v for v in (checked if isinstance(checked, tuple) else (checked,)) if is_own_code(v)]
            if code and _value_of(flag, words) is None:
                raise ConfigError(
                    f"{file}: {name}: {code[0]} would run code, which a config file cannot ask for; "
                    f"if you trust that file, pass {flag} {code[0]} on the command line"
                )
            values[name] = checked
    return values


def _defaults(from_file: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """What holds where the command line is silent: the config file's values over what others imply."""
    values = dict(from_file)
    for name in ("preset", "path", "logit_loss", "feature_loss", "data", "task"):
        if (word := _value_of(f"--{name.replace('_', '-')}", words)) is not None:
            values[name] = word
    return {**implied(values), **from_file}


def _value(name: str, value: object, kind: type[Options], file: str) -> object:
    """A value of a config file as the type of its field: tyro takes no text for a path."""
    info = kind.model_fields[name]
    try:
        return TypeAdapter(Annotated[info.annotation, info]).validate_python(value)  # type: ignore[valid-type]
    except ValidationError as error:
        raise ConfigError(f"{file}: {name}: {error.errors()[0]['msg']}, got {value!r}") from None


def _value_of(flag: str, words: Sequence[str]) -> str | None:
    """What is given for a flag: the last time, where it is there twice, as the parser has it."""
    found = None
    for i, word in enumerate(words):
        if word == flag:
            found = words[i + 1] if i + 1 < len(words) else None
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def _form(command: str, kind: type[Options], defaults: Mapping[str, Any]) -> type:
    """A dataclass with the fields of `kind` but none of its checks: those are made once, in `make_config`."""
    required: list[tuple[str, Any, Any]] = []
    optional: list[tuple[str, Any, Any]] = []
    for name, info in kind.model_fields.items():
        marks: list[Any] = [tyro.conf.arg(name=FLAGS.get(name), help=info.description)]
        if name in POSITIONAL or (command == "predict" and name == "model"):
            marks.append(tyro.conf.Positional)
        annotation = Annotated[info.annotation, *marks]  # type: ignore[valid-type]
        if info.is_required():
            required.append((name, annotation, dataclasses.field()))
        else:
            default = defaults.get(name, info.get_default())
            optional.append((name, annotation, dataclasses.field(default_factory=lambda d=default: d)))
    if "preset" in kind.model_fields or kind is TrainConfig:
        config = Annotated[Path | None, tyro.conf.arg(help="YAML file with any of these options.")]
        optional.append(("config", config, dataclasses.field(default=None)))
    return dataclasses.make_dataclass(f"{command.title()}Options", [*required, *optional])


def _check_flags(words: Sequence[str], form: type) -> None:
    known = ["--help"]
    for field in dataclasses.fields(form):
        flag = flag_of(field.name)
        known += [flag, f"--no-{flag[2:]}"]
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if re.match(r"--[a-z]", name) and name not in known:
            raise ConfigError(f"unknown option {name}{did_you_mean(name, known)}")


def _first_paragraph(text: str) -> str:
    """tyro explains an error in a box of several paragraphs; the first says what is wrong."""
    lines = [line.strip(" │╭╰╮╯─") for line in text.splitlines()]
    paragraph = []
    for line in lines[1:]:
        if set(line) <= {"-", " "}:
            if paragraph:
                break
            continue
        paragraph.append(line)
    return " ".join(paragraph).rstrip(".")
