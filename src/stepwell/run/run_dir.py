"""A run directory: what was asked for, and every finished stage, each written whole or not at all.

config.yaml             all options
stages/identity.json    fingerprints of teacher and data
stages/NAME/            result.json and tensors.safetensors of a finished stage
stages/.training-NAME/  checkpoints of a stage that is not finished (checkpoint.py)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepwell.config.files import read_yaml, to_yaml
from stepwell.config.options import Options
from stepwell.errors import DataError, RunDirError
from stepwell.run.observer import Observer
from stepwell.run.progress import say

# These change where and how fast a run computes, not what; a folder may be moved, or named from elsewhere.
# The task is found out where it is not given; what it came to is part of a run's identity.
_MAY_CHANGE = frozenset({"device", "workers", "out_dir", "task"})


class StageResult(BaseModel):
    """What a stage hands on: JSON fields, and `tensors` beside them."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    tensors: dict[str, Tensor] = Field(default_factory=dict, exclude=True, repr=False)
    passes: float = 0.0
    """What the stage cost, in forward passes of the teacher on one image; 0 where that is not counted."""
    seconds: float = Field(default=0.0, exclude=True)
    """Duration, also where an earlier call has computed it."""


StageT = TypeVar("StageT", bound=StageResult)


@dataclass
class Stage(Generic[StageT]):
    """A stage while it is open; see `RunDir.stage`.

    Attributes:
        name: Its name, for progress, errors and the folder.
        checkpoints: Where its trainings keep their state until it is finished.
        found: The result, if an earlier call has computed it.
    """

    name: str
    checkpoints: Path
    found: StageT | None = None

    @property
    def is_new(self) -> bool:
        """Whether it is still to be computed."""
        return self.found is None

    @property
    def result(self) -> StageT:
        """What it hands on."""
        assert self.found is not None, f"stage {self.name} has no result"
        return self.found

    @result.setter
    def result(self, result: StageT) -> None:
        self.found = result


class RunDir:
    """The folder of one run; see the module's docstring for what lies in it."""

    def __init__(self, path: Path, observer: Observer | None = None) -> None:
        self.path = path
        self.observer = observer or Observer()
        self.stages: dict[str, StageResult] = {}
        """The results of the stages that this call went through, in their order, without their tensors: what
        a run cost and how it went is read from them."""
        self.open_stage = ""
        """Name of the stage that is being computed."""

    @classmethod
    def open(cls, path: Path, config: Options) -> RunDir:
        """Make the folder, or come back to it with the same options.

        A run with neither a finished stage nor a checkpoint has nothing to lose: it starts over with the
        options of now.

        Raises:
            RunDirError: The folder holds something else, belongs to a run with other options (the first
                one that differs is named), or cannot be written.
        """
        saved, stages = path / "config.yaml", path / "stages"
        begun = any(stages.glob("[!.]*/result.json")) or any(stages.glob(".training-*/*.safetensors"))
        if saved.exists() and stages.is_dir():
            if begun:
                _check_same(read_yaml(saved), config, path)
                check_version(path)
        elif path.exists() and (begun or not _holds_only(path, {stages, _unfinished(saved)})):
            raise RunDirError(f"{path} exists and is not a run of stepwell; choose another --out")
        with writing(path):
            stages.mkdir(parents=True, exist_ok=True)
            for left_over in stages.glob(".unfinished-*"):
                shutil.rmtree(left_over)
            for checkpoints in stages.glob(".training-*"):
                finished = (stages / checkpoints.name.removeprefix(".training-")).exists()
                if finished or not any(checkpoints.glob("*.safetensors")):
                    shutil.rmtree(checkpoints)
            if not begun:
                (stages / "identity.json").unlink(missing_ok=True)
                write_atomically(saved, to_yaml(config))
        return cls(path)

    def check_identity(self, identity: Mapping[str, str]) -> None:
        """Refuse to resume with another teacher or other images than the run began with.

        Args:
            identity: A fingerprint of each, by the option that names it (`teacher`, `data`).

        Raises:
            RunDirError: Names what has changed.
        """
        file = self.path / "stages" / "identity.json"
        if not file.exists():
            write_atomically(file, json.dumps(dict(identity), indent=2))
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        for name, fingerprint in identity.items():
            if before.get(name) != fingerprint:
                raise RunDirError(
                    f"{self.path} was begun with another {name} (its content has changed); "
                    "choose another --out"
                )

    def checkpoints(self, name: str) -> Path:
        """Where the trainings of stage `name` keep their state until it is finished."""
        return self.path / "stages" / f".training-{name}"

    def finished(self, name: str, kind: type[StageT]) -> StageT | None:
        """The result of stage `name` if it was finished before."""
        folder = self.path / "stages" / name
        return _load(folder, kind) if folder.exists() else None

    @contextmanager
    def stage(self, name: str, kind: type[StageT]) -> Iterator[Stage[StageT]]:
        """Open a stage, whose result is read back if it was finished before, and saved if it is new:

            with run.stage("score", Importance) as stage:
                if stage.is_new:
                    stage.result = ...
            return stage.result

        A `with` block, not a function that is handed in, so a stage stays one call above what it computes.
        This is the one place where a result comes to be valid: for this call, for later ones, and for all
        processes the day there are several.
        """
        folder = self.path / "stages" / name
        stage: Stage[StageT] = Stage(name, self.checkpoints(name), self.finished(name, kind))
        if not stage.is_new:
            say(f"{name}: done before ({stage.result.seconds:.1f} s)")
            yield stage
        else:
            start, before = time.monotonic(), _seconds_in(stage.checkpoints)
            self.open_stage = name
            self.observer.on_stage(name, None)
            try:
                yield stage
            finally:
                self.open_stage = ""
            seconds = before + time.monotonic() - start
            stage.result = stage.result.model_copy(update={"seconds": seconds})
            _save(folder, stage.result)
            shutil.rmtree(stage.checkpoints, ignore_errors=True)
            say(f"{name}: {seconds:.1f} s")
        self.stages[name] = stage.result.model_copy(update={"tensors": {}})  # which can be gigabytes
        self.observer.on_stage(name, stage.result)


def _check_same(before: Mapping[str, object], config: Options, path: Path) -> None:
    now = config.model_dump(mode="json")
    if unknown := sorted(before.keys() - now.keys()):
        raise RunDirError(
            f"{path} belongs to another command or another version of stepwell (its config.yaml has "
            f"{unknown[0]}); choose another --out"
        )
    # An option that is newer than the run: it was made as if it had its default.
    before = {**type(config).model_construct().model_dump(mode="json"), **before}
    for name in sorted(now.keys() | before.keys()):
        if name not in _MAY_CHANGE and not _same(before.get(name), now.get(name)):
            raise RunDirError(
                f"{path} was made with {name}: {before.get(name)}, now it is {now.get(name)}; "
                f"give the old value to go on, or choose another --out"
            )


def check_version(path: Path) -> None:
    """Refuse an unfinished run of an older version: its stages do not say what they cost.

    Raises:
        RunDirError: It is one.
    """
    if (path / "result.json").exists() and (path / "student" / "stepwell.json").exists():  # it is finished
        return
    for file in (path / "stages").glob("[!.]*/result.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # reported when it is read
            if file.parent.name != "train" and "passes" not in json.loads(file.read_bytes())["result"]:
                raise RunDirError(
                    f"{path} was begun by an older version of stepwell and is not finished: finish it with "
                    f"that version, or choose another --out"
                )


def _same(before: object, now: object) -> bool:
    """Equal, or two ways to write the same path."""
    if isinstance(before, str) and isinstance(now, str) and before and now:
        return before == now or Path(before).absolute() == Path(now).absolute()
    return before == now


def _holds_only(path: Path, allowed: Collection[Path]) -> bool:
    return path.is_dir() and all(entry in allowed for entry in path.iterdir())


def _save(folder: Path, result: StageResult) -> None:
    with writing(folder):
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
        try:
            if result.tensors:
                save_file(plain_tensors(result.tensors), unfinished / "tensors.safetensors")
            text = json.dumps({"seconds": result.seconds, "result": result.model_dump(mode="json")}, indent=1)
            (unfinished / "result.json").write_text(text, encoding="utf-8")
            unfinished.chmod(0o755)
            unfinished.rename(folder)  # the stage is finished the moment its folder has its name
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # only there still if something failed


def _load(folder: Path, kind: type[StageT]) -> StageT:
    try:
        record = json.loads((folder / "result.json").read_bytes())
        result = kind.model_validate({**record["result"], "seconds": record["seconds"]})
        tensors = folder / "tensors.safetensors"
        return result.model_copy(update={"tensors": load_file(tensors)}) if tensors.exists() else result
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, DataError):
        raise RunDirError(
            f"{folder} is damaged, or of another version of stepwell; "
            f"remove it, and the same command computes this stage again"
        ) from None


def _seconds_in(checkpoints: Path) -> float:
    """How long interrupted trainings have run."""
    total = 0.0
    for file in checkpoints.glob("*.safetensors"):
        # One that is damaged is reported when it is to be used.
        damaged = contextlib.suppress(OSError, ValueError, KeyError, TypeError, SafetensorError)
        with damaged, safe_open(file, "pt") as saved:
            total += json.loads(saved.metadata()["record"])["seconds"]
    return total


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: on the CPU, each with memory of its own, also where layers share."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        plain[name] = copy.clone() if copy.untyped_storage().data_ptr() in seen else copy
        seen.add(copy.untyped_storage().data_ptr())
    return plain


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        RunDirError: It cannot be written (no permission, no space).
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(file):
        unfinished = _unfinished(file)
        try:
            unfinished.write_bytes(data)
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)  # only there still if something failed


def _unfinished(file: Path) -> Path:
    return file.with_name(f".{file.name}.unfinished")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write below `path` into one clear line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunDirError(f"cannot write {path}: {reason}; free some space or choose another --out") from None
