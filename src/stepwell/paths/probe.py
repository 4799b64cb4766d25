"""--probe: before anything else, the teacher's new classifier is trained on its frozen features.

What follows sees a teacher like any other. Every way down from it needs the probe, so no budget and no
control is charged with it; it stands on the bill.
"""

from __future__ import annotations

from functools import partial

from stepwell.config.commands import CompressConfig
from stepwell.data.splits import Data
from stepwell.errors import ConfigError
from stepwell.models.classifier import with_classifier
from stepwell.models.teacher import Teacher
from stepwell.run.progress import say
from stepwell.setting.bill import PROBE_STAGE
from stepwell.setting.setting import Setting
from stepwell.training.from_labels import freeze_but_classifier, label_step
from stepwell.training.handed_on import performance_of
from stepwell.training.loop import Course, Trained, fit
from stepwell.training.optimizer import no_decay_of


class Probed(Trained):
    """The trained classifier, as `tensors`."""

    quality: float
    """Of the teacher with it on the selection images, in percent."""


def with_head(teacher: Teacher, data: Data | None, config: CompressConfig) -> Teacher:
    """The teacher with the classifier that is to be trained; as it is, where none is asked for.

    Raises:
        ConfigError: There are no labels to train it on.
        ModelError: The teacher cannot have one.
    """
    if not config.probe:
        return teacher
    if config.task == "features":
        raise ConfigError("--probe makes it a run about classes: leave out --task features, or --probe")
    if data is None or not data.labelled:
        where = "--data" if data is None else data.source
        raise ConfigError(
            f"--probe trains a classifier on the classes of the images, and {where} "
            f"{'is not given' if data is None else 'gives none'}: without --probe, the embedding is distilled"
        )
    return with_classifier(teacher, data.classes, data.fingerprint, config.seed, data.task)


def probe_line(config: CompressConfig) -> list[str]:
    """What `doctor` says of it; nothing where it is not asked for."""
    if not config.probe:
        return []
    return [
        f"  {config.probe_epochs:g} epochs of a linear probe before that, on frozen features: the teacher's "
        f"classifier"
    ]


def probe(s: Setting) -> Setting:
    """The setting, whose teacher has its classifier trained now, where that is asked for."""
    if not s.config.probe:
        return s
    with s.run.stage(PROBE_STAGE, Probed) as stage:
        if stage.is_new:
            names = freeze_but_classifier(s.model)
            step = label_step(s.task, s.model, s.config, s.config.label_smoothing, s.config.class_weights)
            course = Course(
                name=stage.name,
                parameters={name: s.model.get_parameter(name) for name in names},
                epochs=s.config.probe_epochs,
                lr=s.config.lr,
                no_decay=no_decay_of(s.model),
                modules=[],  # what is frozen keeps its statistics
                judge=partial(performance_of, s.model, s.selection, s.metric, s.task),
                scaler=step.scaler,
                checkpoint=stage.checkpoints / "main.safetensors",
            )
            trained = fit(course, step, s.train, s.config, s.config)
            meter = s.task.evaluate(s.model, s.selection, "probe: selection images")
            stage.result = Probed(
                **trained.model_dump(exclude={"passes"}),
                quality=meter.quality,
                passes=s.costs([1.0]).probing,
                tensors={name: s.model.get_parameter(name).detach() for name in names},
            )
    s.model.load_state_dict(stage.result.tensors, strict=False)
    s.model.eval().requires_grad_(False)
    found = f"{s.task.MEASURE} {stage.result.quality:.1f} % on the selection images"
    told = (
        f"{s.teacher.name} got a linear classifier, trained on its frozen features for "
        f"{s.config.probe_epochs:g} epochs: {found}"
    )
    say(f"probe: {told}")
    return s.with_note(told)
