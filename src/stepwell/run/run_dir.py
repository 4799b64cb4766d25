"""A run directory: what was asked for, and every finished stage, each written whole or not at all.

config.yaml             all options
stages/identity.json    fingerprints of teacher and data
stages/NAME/            result.json and tensors.safetensors of a finished stage
stages/.training-NAME/  checkpoints of a stage that is not finished (checkpoint.py)

Of several processes the first one alone reads and writes here, and tells the others what it found.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepwell.config.options import Options
from stepwell.errors import DataError, RunDirError
from stepwell.run.atomic import plain_tensors, writing
from stepwell.run.come_back import check_alike, check_identity, open_folder
from stepwell.run.distributed import from_main, from_main_with_tensors
from stepwell.run.observer import Observer
from stepwell.run.progress import say


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
        from_main(lambda: open_folder(path, config))
        return cls(path)

    def check_identity(self, identity: Mapping[str, str]) -> None:
        """Refuse to resume with another teacher or other images than the run began with, or if two processes
        have different ones.

        Args:
            identity: A fingerprint of each, by the option that names it (`teacher`, `data`).

        Raises:
            RunDirError: Names what has changed.
            DataError: Of several machines one has other files.
        """
        check_alike(identity)
        from_main(lambda: check_identity(self.path, identity))

    def checkpoints(self, name: str) -> Path:
        """Where the trainings of stage `name` keep their state until it is finished."""
        return self.path / "stages" / f".training-{name}"

    def finished(self, name: str, kind: type[StageT]) -> StageT | None:
        """The result of stage `name` if it was finished before."""
        folder = self.path / "stages" / name
        return _of_main(lambda: _load(folder, kind) if folder.exists() else None)

    @contextmanager
    def stage(self, name: str, kind: type[StageT]) -> Iterator[Stage[StageT]]:
        """Open a stage, whose result is read back if it was finished before, and saved if it is new:

            with run.stage("score", Importance) as stage:
                if stage.is_new:
                    stage.result = ...
            return stage.result

        A `with` block, not a function that is handed in, so a stage stays one call above what it computes.
        This is the one place where a result comes to be valid: for this call, for later ones, and for all
        processes. Each computes; what the first one has is saved, and is what all go on with, so whatever a
        clock or rounding has decided is decided alike.
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
            stage.found = _of_main(lambda: _finish(folder, stage))
            say(f"{name}: {seconds:.1f} s")
        self.stages[name] = stage.result.model_copy(update={"tensors": {}})  # which can be gigabytes
        self.observer.on_stage(name, stage.result)


def _of_main(find: Callable[[], StageT | None]) -> StageT | None:
    """The result that the first process has; in the others its tensors lie on the CPU."""

    def told() -> tuple[StageT | None, dict[str, Tensor]]:
        result = find()
        return (None, {}) if result is None else (result.model_copy(update={"tensors": {}}), result.tensors)

    result, tensors = from_main_with_tensors(told)
    return None if result is None else result.model_copy(update={"tensors": tensors})


def _finish(folder: Path, stage: Stage[StageT]) -> StageT:
    _save(folder, stage.result)
    shutil.rmtree(stage.checkpoints, ignore_errors=True)
    return stage.result


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
