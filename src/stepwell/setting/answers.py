"""The answers that `--cache-teacher` keeps: of the teacher for all trainings, of an assistant for its own."""

from __future__ import annotations

import shutil

import torch

from stepwell.errors import ConfigError
from stepwell.measure.cost import ANSWERS_STAGE
from stepwell.models.card import digest
from stepwell.run.distributed import from_main
from stepwell.run.progress import say
from stepwell.run.run_dir import RunDir, StageResult
from stepwell.setting.rungs import Rung
from stepwell.setting.setting import Setting
from stepwell.training.answers import Answers

_FOLDER = "answers"


class Answered(StageResult):
    """Where the answers of one model are."""

    folder: str
    num_classes: int


def answers_of(s: Setting, teacher: Rung, training: str, epochs: float) -> Answers | None:
    """What `teacher` answers on the views of all images, computed now where it was not; None where a training
    asks it anew for every batch.

    The teacher's serve all trainings and every way down needs them, so they have a stage that no budget pays
    for. An assistant's are computed where its training sees some views more than once, and are on its bill.

    Args:
        s: What the run works with.
        teacher: The model that teaches.
        training: The name of what it teaches in.
        epochs: Of that training.
    """
    num_views = s.config.cache_teacher
    is_assistant = teacher.candidate is not None
    if not num_views or (is_assistant and epochs <= num_views):
        return None
    name = f"{ANSWERS_STAGE} for {training}" if is_assistant else ANSWERS_STAGE
    passes = teacher.scale * num_views * len(s.data.train)
    found = s.run.stages.get(name)
    if found is None:
        with s.run.stage(name, Answered) as stage:
            if stage.is_new:
                stage.result = _computed(s, teacher, name).model_copy(update={"passes": passes})
        found = stage.result
    assert isinstance(found, Answered)
    charged = passes if is_assistant else 0.0
    return _answers(s, found, charged)


def _answers(s: Setting, found: Answered, passes: float = 0.0) -> Answers:
    folder = s.run.path / _FOLDER / found.folder
    return Answers(folder, len(s.data.train), found.num_classes, s.config.cache_top, passes)


def _computed(s: Setting, teacher: Rung, name: str) -> Answered:
    teacher.model.eval()
    with torch.no_grad():
        num_classes = teacher.model(s.train.blank(teacher.model)).shape[1]
    weights = s.model if teacher.candidate is None else teacher.model  # a teacher may answer in parts
    answered = Answered(folder=digest(weights)[:16], num_classes=num_classes)
    answers, num_views = _answers(s, answered), s.config.cache_teacher
    size = num_views * answers.num_bytes
    top = s.config.cache_top
    kept = f"the top {top} of {num_classes:,}" if 0 < top < num_classes else f"{num_classes:,}"
    say(
        f"{name}: {kept} logits for {num_views} views of {len(s.data.train):,} images, "
        f"{size / 2**20:,.1f} MiB in {answers.folder.parent} until the run is finished"
    )
    free = from_main(lambda: shutil.disk_usage(s.run.path).free)
    there = from_main(lambda: sum(file.stat().st_size for file in answers.folder.glob("*.safetensors")))
    if size - there > free:
        raise ConfigError(
            f"--cache-teacher {num_views} takes {size / 2**30:.2g} GiB, and {s.run.path} has "
            f"{free / 2**30:.2g} GiB left: give fewer views, or keep less of each with --cache-top"
        )
    answers.compute(teacher.model, s.train, s.autocast, name)
    return answered


def forget_answers(run: RunDir) -> None:
    """Remove what no training will read again."""
    from_main(lambda: shutil.rmtree(run.path / _FOLDER, ignore_errors=True))
