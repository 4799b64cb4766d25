"""Where a training on masks begins: a model of torchvision or segmentation-models-pytorch, its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stepwell.config.commands import TrainConfig
from stepwell.data.splits import Data
from stepwell.errors import ConfigError
from stepwell.models import segmenters
from stepwell.models.card import Architecture
from stepwell.models.fitting import load_start
from stepwell.models.timm_models import parse_model_args
from stepwell.run.progress import say
from stepwell.tasks.outputs import as_logits


def start_for_masks(config: TrainConfig, data: Data) -> nn.Module:
    """The model to begin with, which returns logits of the images' size; with an auxiliary head, if it has
    one.

    Raises:
        ConfigError: It is no model for masks, or an option does not go with one.
    """
    if not segmenters.is_named(config.model):
        raise ConfigError(
            f"--model {config.model}: {data.source} has masks, which torchvision:NAME learns "
            f"({', '.join(segmenters.TORCHVISION[:3])}, ...) or smp:NAME "
            f"({', '.join(segmenters.SMP[:3])}, ...); a model of your own is trained by you, and "
            f"compressed as --teacher FILE.py:FACTORY"
        )
    if config.probe or config.layer_decay != 1:
        flag = "--probe" if config.probe else "--layer-decay"
        raise ConfigError(f"{flag} is for classifiers: leave it out, and give --encoder-weights")
    args = parse_model_args(config.model_args)
    if args.get("num_classes", len(data.classes)) != len(data.classes):
        raise ConfigError(
            f"--model-args num_classes: the masks have {len(data.classes)} classes; leave it out"
        )
    # Fresh weights are drawn from the seed, whatever was drawn before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        own = {**args, "num_classes": len(data.classes)}
        model = segmenters.build(config.model, own, auxiliary=config.auxiliary_weight > 0)
    if config.weights is None and config.encoder_weights is None:
        say(f"{config.model} starts from random weights; --encoder-weights FILE is for its encoder")
    if config.weights is not None:
        load_start(model, config.weights, config.weights_key)
    if config.encoder_weights is not None:
        segmenters.load_encoder(model, config.encoder_weights, config.model)
    return as_logits(model, "maps")


def architecture_for_masks(config: TrainConfig, args: Mapping[str, Any]) -> Architecture:
    """How to build the model that was trained, without its auxiliary head."""
    source, _, name = config.model.partition(":")
    return Architecture.model_validate(
        {"source": source, "name": name, "args": dict(args), "outputs": "maps"}
    )
