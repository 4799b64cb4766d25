"""`stepwell train`: get a teacher by fine-tuning a timm model on a folder of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepwell.config import TrainConfig
from stepwell.delivery.archive import Card, find_model_dir, load_strictly, save_model
from stepwell.delivery.input import input_spec, with_image_size
from stepwell.delivery.measure import evaluate, num_params, wilson_interval
from stepwell.delivery.teacher import create_timm, parse_model_args, timm_architecture
from stepwell.delivery.weights import read_weights
from stepwell.errors import ConfigError
from stepwell.setting import set_up_torch
from stepwell.stages.plan import epochs_in
from stepwell.training.batches import Batch, EvalBatches, TrainBatches
from stepwell.training.data import resolve_data
from stepwell.training.loop import Trained, fit, seconds_per_step
from stepwell.training.progress import say
from stepwell.training.run_dir import RunDir, writing
from stepwell.version import __version__


@dataclass(frozen=True)
class ClassifyStep:
    """Cross-entropy with the labels, softened."""

    model: nn.Module
    label_smoothing: float
    autocast: torch.autocast

    def __call__(self, batch: Batch, step: int, progress: float = 0.0) -> Mapping[str, Tensor]:
        """Forward and backward; returns the loss, detached."""
        with self.autocast:
            logits = self.model(batch.images)
        loss = F.cross_entropy(logits.float(), batch.labels, label_smoothing=self.label_smoothing)
        loss.backward()
        return {"loss": loss.detach()}


def run(config: TrainConfig) -> str:
    """Fine-tune, save to `OUT/teacher`, and return one line that says how good it is.

    The images that later choose the assistant are left out here: `compress` carves the same ones.
    """
    for name in ("model", "data", "out_dir"):
        if not getattr(config, name):
            raise ConfigError(f"train needs --{name.removesuffix('_dir')}")
    assert config.out_dir is not None
    data = resolve_data(config)
    if not data.labelled:
        raise ConfigError(
            f"{config.data} has no class folders: sort the images into train/CLASS/ to train on them"
        )
    device = set_up_torch(config)
    model = _start(config, len(data.classes)).to(device).train()
    spec = with_image_size(input_spec(model), model, config.image_size)
    # Decoded now: a bad image is an error before the folder is made.
    batches = TrainBatches(data.train, spec, config, config.seed, device)
    test = EvalBatches(data.test, spec, config, device)
    run_dir = RunDir.open(config.out_dir, config)
    run_dir.check_identity({"data": data.fingerprint})
    trained = run_dir.stage("train", Trained, lambda: _fit(config, model, batches, device, run_dir))
    model.load_state_dict(trained.tensors)
    model.eval()

    scores = evaluate(model, test, "test images")
    low, high = wilson_interval(scores.top1, len(scores.labels))
    args = {"num_classes": len(data.classes), **parse_model_args(config.model_args)}
    card = Card(
        architecture=timm_architecture(config.model, model, args),
        classes=list(data.classes),
        input=spec,
        provenance={
            "data": data.source,
            "data_fingerprint": data.fingerprint,
            "top1": scores.top1,
            "stepwell": __version__,
            "torch": torch.__version__,
        },
    )
    folder = config.out_dir / "teacher"
    if find_model_dir(folder) is None:
        with writing(folder):
            folder.mkdir(exist_ok=True)
        save_model(folder, model, card)
    return (
        f"{folder}: top1 {scores.top1:.2f} % (95 % interval {low:.1f} - {high:.1f}) on {len(scores.labels)} "
        f"test images ({data.test_from}), {num_params(model):,} parameters"
    )


def _start(config: TrainConfig, num_classes: int) -> nn.Module:
    args = {"num_classes": num_classes, **parse_model_args(config.model_args)}
    if args["num_classes"] != num_classes:
        raise ConfigError(
            f"--model-args num_classes={args['num_classes']}, but {config.data} has {num_classes} classes: "
            f"leave it out"
        )
    if config.weights is None:
        way_out = "pass --weights FILE, or --no-pretrained to start from random ones"
        return create_timm(config.model, args, pretrained=config.pretrained, way_out=way_out)
    model = create_timm(config.model, args, pretrained=False)
    tensors = read_weights(config.weights)
    head = {f"{name}.{leaf}" for name in _classifiers(model) for leaf in ("weight", "bias")}
    own = model.state_dict()
    fresh = {
        name: own[name]
        for name in head & own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    }
    if fresh:
        say(f"{config.weights} has another number of classes: the classifier starts fresh")
    load_strictly(model, {**tensors, **fresh}, str(config.weights))
    return model


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def _fit(
    config: TrainConfig, model: nn.Module, batches: TrainBatches, device: torch.device, run_dir: RunDir
) -> Trained:
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")
    step = ClassifyStep(model, config.label_smoothing, autocast)
    parameters = dict(model.named_parameters())
    epochs = config.epochs
    checkpoint = run_dir.checkpoints("train") / "main.safetensors"
    if config.minutes is not None and not checkpoint.exists():  # which knows for how long it was begun
        epochs = epochs_in(
            config.minutes, seconds_per_step(step, batches, parameters) * batches.steps_per_epoch, 0
        )
        say(f"train: {epochs:.1f} epochs fit into {config.minutes:g} minutes")
    no_decay = getattr(model, "no_weight_decay", set)
    trained = fit(
        "train",
        step,
        parameters,
        batches,
        config,
        epochs=epochs,
        lr=config.lr,
        no_decay=frozenset(no_decay()),
        modules=[model],
        checkpoint=checkpoint,
    )
    # All of it: a model with BatchNorm is not whole without its statistics.
    return trained.model_copy(update={"tensors": model.state_dict()})
