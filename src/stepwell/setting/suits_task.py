"""Which losses go with which task, and with images without labels."""

from __future__ import annotations

from collections.abc import Mapping

from stepwell.config.cache_options import CacheOptions
from stepwell.config.commands import CompressConfig
from stepwell.config.loss_facts import FEATURE_LOSSES, LOGIT_LOSSES, LossFacts
from stepwell.config.options import LossOptions
from stepwell.data.splits import Data
from stepwell.errors import ConfigError
from stepwell.tasks.task import task_of


def check_no_labels_needed(options: LossOptions, source: str) -> None:
    """Check that nothing asks for labels.

    Raises:
        ConfigError: Something does.
    """
    if options.task_weight:
        raise ConfigError(
            f"{source} has no class folders, so there are no labels to learn: pass --task-weight 0 "
            f"to learn from the teacher alone, or sort the images into train/CLASS/"
        )
    for option, weight, facts, name in (
        ("--logit-loss", options.logit_weight, options.logit_facts, options.logit_loss),
        ("--feature-loss", options.feature_weight, options.feature_facts, options.feature_loss),
    ):
        if weight and facts.needs_labels:
            raise ConfigError(f"{option} {name} needs labels, and {source} has no class folders")


def check_class_weights(weights: tuple[float, ...], data: Data) -> None:
    """Check that there is one for each class of masks.

    Raises:
        ConfigError: There is not.
    """
    if not weights:
        return
    if data.task != "segmentation":
        raise ConfigError(
            "--class-weights are for masks, where classes have few pixels or many: leave them out"
        )
    if len(weights) != len(data.classes):
        raise ConfigError(
            f"--class-weights has {len(weights)} numbers, and the masks have {len(data.classes)} classes "
            f"({', '.join(data.classes[:4])}, ...): give one for each"
        )


def check_answers_can_be_kept(options: CacheOptions, data: Data) -> None:
    """Check that what models tell of these images can be kept as `--cache-teacher` keeps it.

    Raises:
        ConfigError: It cannot.
    """
    flag = f"--cache-teacher {options.cache_teacher}"
    if options.cache_teacher and data.task == "segmentation":
        raise ConfigError(f"{flag}: an answer for each pixel is larger than its image; leave it out")
    if options.cache_top and data.task != "classification":
        raise ConfigError(
            f"--cache-top spreads the rest of a probability over the other classes, and there is none here: "
            f"leave it out, and {flag} keeps all numbers"
        )


def check_suits_task(config: CompressConfig, data: Data) -> None:
    """Check that metric and losses are for the task of the images.

    Raises:
        ConfigError: One is not.
    """
    task_of(data.task).resolve_metric(config.metric, len(data.selection))
    check_class_weights(config.class_weights, data)
    check_answers_can_be_kept(config, data)
    for option, weight, facts, name in (
        ("--logit-loss", config.logit_weight, config.logit_facts, config.logit_loss),
        ("--feature-loss", config.feature_weight, config.feature_facts, config.feature_loss),
    ):
        if weight and facts.masks == "only" and data.task != "segmentation":
            raise ConfigError(f"{option} {name} is for masks, and {data.source} has none: take another")
    match data.task:
        case "multi-label":
            _check_several_classes(config)
        case "features":
            _check_embedding(config)
        case "segmentation":
            _check_masks(config)
        case "classification":
            pass


def _check_several_classes(config: CompressConfig) -> None:
    given: tuple[tuple[str, float, str, Mapping[str, LossFacts]], ...] = (
        ("--logit-loss", config.logit_weight, config.logit_loss, LOGIT_LOSSES),
        ("--feature-loss", config.feature_weight, config.feature_loss, FEATURE_LOSSES),
    )
    for option, weight, name, known in given:
        if weight and name in known and known[name].exclusive:
            others = ", ".join(
                each for each, facts in known.items() if not facts.exclusive and facts.masks != "only"
            )
            raise ConfigError(
                f"{option} {name} is for one class an image, and here an image may have several: take "
                f"{others}"
            )


def _check_masks(config: CompressConfig) -> None:
    """Of losses that are for one class an image, some are defined for pixels alike."""
    given: tuple[tuple[str, float, str, Mapping[str, LossFacts]], ...] = (
        ("--logit-loss", config.logit_weight, config.logit_loss, LOGIT_LOSSES),
        ("--feature-loss", config.feature_weight, config.feature_loss, FEATURE_LOSSES),
    )
    for option, weight, name, known in given:
        if weight and name in known and known[name].masks == "never":
            others = ", ".join(each for each, facts in known.items() if facts.masks != "never")
            raise ConfigError(
                f"{option} {name} is for one class an image, and here each pixel has one: take {others}"
            )


def _check_embedding(config: CompressConfig) -> None:
    """An embedding is learnt from the teacher's, and from hidden states."""
    # What comes with a loss, or stands in the file of a run, nobody has asked for.
    by_itself = {**config.logit_facts.implied, **config.feature_facts.implied}.get("task_weight", 1.0)
    if config.task_weight not in (0, by_itself):
        raise ConfigError("--task-weight: an embedding is learnt from the teacher alone; leave it out, or 0")
    if config.student is not None and not config.logit_weight and config.baseline is not None:
        raise ConfigError(
            "--logit-weight 0 makes the student a backbone of its own width, and --baseline would return the "
            "teacher's embedding: leave one of them out"
        )
    if config.label_smoothing:
        raise ConfigError("--label-smoothing softens labels, and an embedding is learnt from none")
    if not config.logit_weight and not config.feature_weight:
        raise ConfigError(
            "--logit-weight and --feature-weight are 0: an embedding has nothing else to learn from"
        )
    usual = LossOptions.model_fields["logit_loss"].default
    if config.logit_weight and config.logit_loss in LOGIT_LOSSES and config.logit_loss != usual:
        raise ConfigError(
            f"--logit-loss {config.logit_loss} is for classes, and the teacher returns an embedding: leave "
            f"it out, and the distance between embeddings takes its place"
        )
    others = [name for name, facts in FEATURE_LOSSES.items() if not _reads_classifier(facts)]
    if config.feature_weight and config.feature_loss in FEATURE_LOSSES and config.feature_loss not in others:
        raise ConfigError(
            f"--feature-loss {config.feature_loss} reads what a classifier reads or says, and there is none: "
            f"take {', '.join(others)}"
        )


def _reads_classifier(facts: LossFacts) -> bool:
    return facts.exclusive or facts.masks == "only" or not {"features", "logits"}.isdisjoint(facts.reads)
