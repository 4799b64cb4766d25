"""`stepwell inspect RUN --features`: the features of teacher and student, and those of other runs beside."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config, read_yaml
from stepwell.config.own_code import is_own_code
from stepwell.data.batches import EvalBatches
from stepwell.errors import ConfigError, ModelError
from stepwell.losses.observe import Observed
from stepwell.losses.scalekd.stages import find_stages, why_no_stages
from stepwell.measure.features import Features, LeftOver, Looked, look
from stepwell.models.card import load
from stepwell.models.factory import load_factory
from stepwell.paths.begin import begin
from stepwell.pruning.blocks import compared_blocks
from stepwell.report.feature_plots import features_figure
from stepwell.report.table import render
from stepwell.run.atomic import write_atomically
from stepwell.setting.setting import Setting

MOST_IMAGES = 512
"""That linear maps are fitted on, and as many to judge them."""
FEWEST_IMAGES = 20
UNTRAINED = "before training"


def look_at_features(run: Path, beside: Sequence[Path]) -> str:
    """Draw RUN/features.svg, and return the figures as a table.

    Raises:
        ConfigError: A run has another teacher than the first, or images of another size, or too few.
        ModelError: A run is not finished, or its teacher is no longer there.
    """
    s = _setting(run)
    fitted, judged = s.scored, s.selection
    if min(len(fitted.labels), len(judged.labels)) < FEWEST_IMAGES:
        raise ConfigError(
            f"--features fits a map on training images and judges it on selection images: {run} has "
            f"{len(fitted.labels)} and {len(judged.labels)}, and {FEWEST_IMAGES} of each are needed"
        )
    teacher = _looked_teacher(s)
    names = _names([run, *beside])
    students = {names[0]: _student_of(s, run)}
    for other, name in zip(beside, names[1:], strict=True):
        s_other = _setting(other)
        if (s_other.teacher.digest, s_other.spec) != (s.teacher.digest, s.spec):
            raise ConfigError(
                f"--beside {other}: its teacher, or the size of its images, is not that of {run}"
            )
        if s_other.data.fingerprint != s.data.fingerprint:
            raise ConfigError(
                f"--beside {other}: its images are not those of {run}: it may know those that judge"
            )
        students[name] = _student_of(s_other, other)
    if (fresh := s.fresh_student()) is not None:
        students[UNTRAINED] = _looked(s, fresh, s.spec.size, _own_blocks(s), UNTRAINED)
    features = look(teacher, students, _images(fitted), _images(judged))
    file = run / "features.svg"
    write_atomically(file, features_figure(features, UNTRAINED))
    return f"{_in_words(s, features)}\n\n{file}"


def _names(runs: Sequence[Path]) -> list[str]:
    """Of their folders, where these say which is which."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _setting(run: Path) -> Setting:
    """What a finished run worked with."""
    if not (run / "result.json").is_file() or not (run / "config.yaml").is_file():
        raise ModelError(f"{run} is not a finished run of stepwell compress")
    return begin(
        make_config(CompressConfig, {**read_yaml(run / "config.yaml"), "out_dir": run}), exports=False
    )


def _student_of(s: Setting, run: Path) -> Looked:
    source = s.config.student or s.config.teacher
    factory = load_factory(source) if is_own_code(source) else None
    student = load(run / "student", factory=factory).to(s.device)
    return _looked(s, student, s.spec.size, _own_blocks(s), f"{run}/student")


def _looked_teacher(s: Setting) -> Looked:
    """It may see the student's images in another size, and then has another grid."""
    return _looked(s, s.model, s.teacher.seen_size, compared_blocks(s.groups), s.teacher.name)


def _own_blocks(s: Setting) -> Sequence[str]:
    return s.other_student.blocks if s.other_student else compared_blocks(s.groups)


def _looked(
    s: Setting, model: nn.Module, seen_size: tuple[int, int], blocks: Sequence[str], name: str
) -> Looked:
    blank = torch.zeros(1, s.spec.channels, *seen_size, device=s.device)
    stages = find_stages(model.eval(), blank, blocks)
    if stages is None:
        raise ModelError(f"--features: the stages of {name} cannot be told: {why_no_stages(model, blocks)}")
    return Looked(Observed(model, stages.blocks), stages)


def _images(batches: EvalBatches) -> Iterator[Tensor]:
    """Of the first images."""
    num = -(-MOST_IMAGES // batches.batch_size)
    return (batch.images for batch in itertools.islice(batches, num))


def _in_words(s: Setting, features: Features) -> str:
    direct = [100 * shares[0] for shares in features.frequencies]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("not found in the student's, %")
    for number in (3, 4):
        table.add_column(f"stage {number}, mean", justify="right")
        table.add_column("rest", justify="right")
    for name, stages in features.left_over.items():
        table.add_row(name, *(cell for stage in stages for cell in _cells(stage)))
    return "\n".join(
        [
            f"Features of {s.teacher.name}: their mean over the image is {direct[0]:.0f} % of their squares "
            f"at stage 3, {direct[1]:.0f} % at stage 4.",
            "",
            render(table),
            "(Of the teacher's features, what the best linear map of the student's leaves, on other images.)",
        ]
    )


def _cells(left: LeftOver) -> list[str]:
    return ["-" if share is None else f"{100 * share:.0f}" for share in (left.direct, left.rest)]
