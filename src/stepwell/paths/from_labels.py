"""A model trained from labels alone: how a teacher is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepwell.config.commands import DEFAULT_EPOCHS, TrainConfig
from stepwell.data.batches import EvalBatches, TrainBatches, images_per_process
from stepwell.data.spec import InputSpec
from stepwell.data.splits import Data, resolve_data
from stepwell.errors import ConfigError
from stepwell.measure.cost import Seconds, epochs_in
from stepwell.measure.size import num_params
from stepwell.models import segmenters
from stepwell.models.card import Card, find_model_dir, save_model
from stepwell.models.fitting import load_start
from stepwell.models.input import as_asked, check_runs, check_trains, for_masks, input_spec
from stepwell.models.timm_models import create_timm, parse_model_args, timm_architecture
from stepwell.paths.begin import require
from stepwell.paths.masks_from_labels import architecture_for_masks, start_for_masks
from stepwell.run.atomic import writing
from stepwell.run.device import set_up_torch
from stepwell.run.distributed import from_main
from stepwell.run.progress import say
from stepwell.run.run_dir import RunDir, Stage
from stepwell.setting.classes import in_order_of_model
from stepwell.setting.suits_task import check_class_weights
from stepwell.tasks.task import task_of
from stepwell.training.from_labels import LabelStep, freeze_but_classifier, label_step
from stepwell.training.handed_on import performance_of
from stepwell.training.loop import Course, Trained, fit, seconds_per_step
from stepwell.training.optimizer import layer_scales, no_decay_of
from stepwell.version import __version__


def train(config: TrainConfig) -> str:
    """Fine-tune, save to `OUT/teacher`, and return one line that says how good it is.

    The images that later choose the assistant are left out here: `compress` carves the same ones.
    """
    require(config, "train", "model", "data", "out_dir")
    assert config.out_dir is not None
    if config.task == "features":
        raise ConfigError("train learns from labels, and an embedding from a teacher: see stepwell compress")
    data = resolve_data(config)
    if not data.labelled:
        raise ConfigError(
            f"{config.data} has no class folders: sort the images into train/CLASS/ to train on them"
        )
    check_class_weights(config.class_weights, data)
    device = set_up_torch(config)
    start = _begun(config, data, device)
    model, data, task = start.model, start.data, task_of(start.data.task)
    # Decoded now: a bad image is an error before the folder is made.
    batches = TrainBatches(
        data.train, start.spec, config, config.seed, device, recipe=config, num_classes=len(data.classes)
    )
    selection = EvalBatches(data.selection, start.spec, config, device) if config.keep_best else None
    test = EvalBatches(data.test, start.spec, config, device)
    run = RunDir.open(config.out_dir, config)
    run.check_identity({"data": data.fingerprint})
    with run.stage("train", Trained) as stage:
        if stage.is_new:
            second = segmenters.auxiliary_head(model)
            auxiliary = (second, config.auxiliary_weight) if second is not None else None
            smoothing, weights = config.label_smoothing, config.class_weights
            step = label_step(task, model, config, smoothing, weights, auxiliary)
            trained = _fit(config, model, step, start.trained_names, batches, selection, stage)
            # All of it: a model with BatchNorm is not whole without its statistics.
            stage.result = trained.model_copy(update={"tensors": model.state_dict()})
    model.load_state_dict(stage.result.tensors)
    segmenters.without_auxiliary(model)
    model.eval()
    meter = task.evaluate(model, test, "test images")
    folder = config.out_dir / "teacher"
    card = _card(config, start, {task.MEASURE: meter.quality})
    from_main(lambda: _save_once(folder, model, card))
    probed = " (a linear probe: its classifier alone was trained)" if config.probe else ""
    return f"{folder}: {task.in_words(meter, data.test_from)}, {num_params(model):,} parameters{probed}"


@dataclass(frozen=True)
class _Begun:
    """What a training begins with.

    Attributes:
        model: On the device, in the mode that it is trained in.
        spec: The images that it takes.
        args: What it was built with.
        trained_names: Of its parameters.
        data: With the classes in the model's order.
    """

    model: nn.Module
    spec: InputSpec
    args: Mapping[str, Any]
    trained_names: list[str]
    data: Data


def _begun(config: TrainConfig, data: Data, device: torch.device) -> _Begun:
    """The model and its images; whatever cannot be trained is refused here, before anything is written."""
    dense = data.task == "segmentation"
    if dense:
        model, keeps_head, fresh = start_for_masks(config, data), False, ()
    else:
        model, keeps_head, fresh = _start(config, len(data.classes))
    model = model.to(device)
    trained_names = _trained_names(config, model, fresh)
    layer_scales(model, config.layer_decay)  # raises where it cannot be
    args = {"num_classes": len(data.classes), **parse_model_args(config.model_args)}
    own = segmenters.input_spec(model) if dense else input_spec(model, args)
    spec = as_asked(own, model, config, data.white_level)
    if dense:
        spec = for_masks(spec, data.train, config, has_size=False)
    check_runs(model, spec, config.model, "--image-size, or --model-args img_size=", dense=dense)
    check_trains(model, spec, config.model, images_per_process(config, len(data.train), config.mixes))
    if keeps_head and config.class_order is None and data.task == "classification":
        data = in_order_of_model(model.eval(), spec, data, config, device)
    model.train(not config.probe)  # frozen features are those of eval mode
    return _Begun(model, spec, args, trained_names, data)


def _card(config: TrainConfig, start: _Begun, measured: Mapping[str, float]) -> Card:
    """What the teacher's folder says of it, with how good it is."""
    data = start.data
    dense = data.task == "segmentation"
    return Card(
        architecture=architecture_for_masks(config, start.args)
        if dense
        else timm_architecture(config.model, start.model, start.args),
        classes=list(data.classes),
        input=start.spec,
        task=data.task,
        colours=data.colours,
        numbers=data.mask_numbers,
        provenance={
            "data": data.source,
            "data_fingerprint": data.fingerprint,
            **measured,
            "stepwell": __version__,
            "torch": torch.__version__,
        },
    )


def _save_once(folder: Path, model: nn.Module, card: Card) -> None:
    if find_model_dir(folder) is None:
        with writing(folder):
            folder.mkdir(exist_ok=True)
        save_model(folder, model, card)


def _start(config: TrainConfig, num_classes: int) -> tuple[nn.Module, bool, tuple[str, ...]]:
    """The model to begin with, whether its classifier was trained already, and what of a file's is fresh."""
    args = {"num_classes": num_classes, **parse_model_args(config.model_args)}
    if args["num_classes"] != num_classes:
        raise ConfigError(
            f"--model-args num_classes={args['num_classes']}, but {config.data} has {num_classes} classes: "
            f"leave it out"
        )
    if config.weights is None:
        way_out = "pass --weights FILE, or --no-pretrained to start from random ones"
        model = create_timm(config.model, args, pretrained=config.pretrained, way_out=way_out)
        known = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
        return model, config.pretrained and known == num_classes, ()
    model = create_timm(config.model, args, pretrained=False)
    fit = load_start(model, config.weights, config.weights_key)
    return model, not fit.fresh, fit.fresh


def _trained_names(config: TrainConfig, model: nn.Module, fresh: tuple[str, ...]) -> list[str]:
    """The parameters that are trained: all; of a probe the classifier's and what else starts fresh, the rest
    being frozen here."""
    names = [name for name, _ in model.named_parameters()]
    if not config.probe:
        return names
    return freeze_but_classifier(model, fresh)


def _fit(
    config: TrainConfig,
    model: nn.Module,
    step: LabelStep,
    trained_names: list[str],
    batches: TrainBatches,
    selection: EvalBatches | None,
    stage: Stage[Trained],
) -> Trained:
    epochs = config.epochs or DEFAULT_EPOCHS
    checkpoint = stage.checkpoints / "main.safetensors"
    is_begun = from_main(checkpoint.exists)  # it knows for how long
    if config.minutes is not None and not is_begun:
        trained = [model.get_parameter(name) for name in trained_names]
        seconds = seconds_per_step(step, batches, trained, config) * batches.steps_per_epoch
        if selection is not None and config.keep_best:
            # Forward alone, which is a third of a step, and nearly all of a probe's.
            passes = 1 if config.probe else 3
            seconds *= 1 + len(selection.labels) / (passes * len(batches.labels) * config.keep_best)
        epochs = from_main(partial(epochs_in, config.minutes, Seconds(seconds)))  # by one clock
        say(f"train: {epochs:.1f} epochs fit into {config.minutes:g} minutes")
    judge = None
    if selection is not None:
        metric = step.task.resolve_metric("auto", len(selection.labels))
        judge = partial(performance_of, model, selection, metric, step.task)
    course = Course(
        name=stage.name,
        parameters={name: model.get_parameter(name) for name in trained_names},
        epochs=epochs,
        lr=config.lr,
        no_decay=no_decay_of(model),
        modules=[] if config.probe else [model],  # what is frozen keeps its statistics
        lr_scales=layer_scales(model, config.layer_decay),
        judge=judge,
        scaler=step.scaler,
        checkpoint=checkpoint,
    )
    return fit(course, step, batches, config, config)
