"""Models for segmentation by name: torchvision's, and those of segmentation-models-pytorch.

    torchvision:deeplabv3_mobilenet_v3_large
    smp:Unet, with --model-args encoder_name=resnet18 ...

They are built without weights, so nothing goes to the network. What they return is made logits of the images'
size by `AsLogits` (tasks/outputs.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.models import segmentation

from stepwell.data.images import one_line
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError, ModelError, did_you_mean
from stepwell.models.arguments import refused
from stepwell.models.weights import read_weights
from stepwell.run.progress import say
from stepwell.tasks.outputs import AsLogits

SOURCES = ("torchvision", "smp")
TORCHVISION = (
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "fcn_resnet50",
    "fcn_resnet101",
    "lraspp_mobilenet_v3_large",
)
SMP = (
    "DeepLabV3",
    "DeepLabV3Plus",
    "FPN",
    "Linknet",
    "MAnet",
    "PAN",
    "PSPNet",
    "Segformer",
    "UPerNet",
    "Unet",
    "UnetPlusPlus",
)
_OURS = frozenset({"encoder_weights", "aux_params", "activation", "weights", "weights_backbone", "aux_loss"})
"""Arguments that fetch weights, add what is not deployed, or end in a softmax."""
_AUXILIARY = ("aux_classifier", "auxiliary_head")
"""Names of second heads, which learn from the labels and are not deployed."""
_ENOUGH = 0.9
"""Share of an encoder's tensors that a file of weights must have."""


def is_named(name: str) -> bool:
    """Whether a name is one of these models."""
    source, colon, _ = name.partition(":")
    return bool(colon) and source in SOURCES


def build(name: str, args: Mapping[str, Any], *, auxiliary: bool = False) -> nn.Module:
    """A model with random weights, as its library has it.

    Args:
        name: Such as `smp:Unet`.
        args: `num_classes`, and what the library's function takes.
        auxiliary: Whether it has a second head for training, where there is one.

    Raises:
        ModelError: There is no such model, or its library is not installed.
        ConfigError: It does not take these arguments.
    """
    source, _, kind = name.partition(":")
    known = TORCHVISION if source == "torchvision" else SMP
    if kind not in known:
        hint = did_you_mean(kind, known) or f"; there are {', '.join(known)}"
        raise ModelError(f"{source} has no model {kind!r} for segmentation{hint}")
    if (reason := refused(args)) is not None:
        raise ConfigError(f"--model-args: {reason}")
    if wrong := sorted(_OURS & args.keys()):
        raise ConfigError(f"--model-args {wrong[0]}: stepwell says that itself; leave it out")
    library = segmentation if source == "torchvision" else _smp()
    own = _torchvision_args(kind, args, auxiliary) if source == "torchvision" else _smp_args(args)
    try:
        return getattr(library, kind)(**own)
    except Exception as error:  # whatever a constructor does with arguments that it cannot use
        raise ConfigError(f"--model-args {dict(args)} do not suit {name}: {one_line(error)[:200]}") from None


def _torchvision_args(kind: str, args: Mapping[str, Any], auxiliary: bool) -> dict[str, Any]:
    # LRASPP has no second head.
    second = {} if kind.startswith("lraspp") else {"aux_loss": auxiliary}
    return {**args, "weights": None, "weights_backbone": None, **second}


def _smp_args(args: Mapping[str, Any]) -> dict[str, Any]:
    others = {key: value for key, value in args.items() if key != "num_classes"}
    return {**others, "classes": args["num_classes"], "encoder_weights": None}


def _smp() -> Any:  # noqa: ANN401  (a module that may be missing)
    try:
        return import_module("segmentation_models_pytorch")
    except ImportError as error:
        raise ModelError(
            f"models called smp:... are those of segmentation-models-pytorch, which cannot be imported "
            f"({one_line(error)[:80]}): pip install 'stepwell[segmentation]'"
        ) from None


def without_auxiliary(model: nn.Module) -> bool:
    """Take second heads off, in place; whether there was one."""
    found = False
    for module in list(model.modules()):
        for name in _AUXILIARY:
            if isinstance(module._modules.get(name), nn.Module):
                module._modules[name] = None
                found = True
    return found


def auxiliary_head(model: nn.Module) -> str | None:
    """Name of the second head of a model, if it has one."""
    names = (name for name, _ in model.named_modules() if name.rpartition(".")[2] in _AUXILIARY)
    return next(names, None)


def input_spec(model: nn.Module, channels: int = 3) -> InputSpec:
    """What images a model wants: any size, as a whole; mean and std are its encoder's, or ImageNet's."""
    encoder = encoder_of(model)
    config = getattr(encoder, "pretrained_cfg", None) or {}
    mean = tuple(config.get("mean") or IMAGENET_DEFAULT_MEAN)
    std = tuple(config.get("std") or IMAGENET_DEFAULT_STD)
    if channels == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return InputSpec((224, 224), channels, mean, std, "bilinear", 1.0, "squash")


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The part that was trained on other images, as its library calls it."""
    model = model.model if isinstance(model, AsLogits) else model
    for name in ("encoder", "backbone"):
        if isinstance(found := model._modules.get(name), nn.Module):
            # smp puts timm's models one level down.
            inner = found._modules.get("model")
            return inner if isinstance(inner, nn.Module) and len(found._modules) == 1 else found
    return None


def load_encoder(model: nn.Module, file: Path, name: str) -> None:
    """Fill the encoder of a model from weights of a classifier; its head is left out.

    Args:
        model: With an encoder.
        file: As `--weights` takes it; nothing in it is executed.
        name: The model's, for errors.

    Raises:
        ModelError: There is no encoder, or the weights are another's.
    """
    encoder = encoder_of(model)
    if encoder is None:
        raise ModelError(f"--encoder-weights: {name} has no part that is called encoder or backbone")
    wanted = encoder.state_dict()
    best: dict[str, Any] = {}
    for found in read_weights(file).state_dicts:
        # timm takes encoders apart: stages.0 becomes stages_0. torchvision's MobileNets call theirs features.
        theirs = {
            key.removeprefix("features.").replace("_", "."): tensor for key, tensor in found.tensors.items()
        }
        fits = {
            key: theirs[same].to(tensor.dtype)
            for key, tensor in wanted.items()
            if (same := key.replace("_", ".")) in theirs and theirs[same].shape == tensor.shape
        }
        best = max(best, fits, key=len)
    counted = [key for key in wanted if not key.endswith("num_batches_tracked")]
    missing = [key for key in counted if key not in best]
    if len(missing) > (1 - _ENOUGH) * len(counted):
        raise ModelError(
            f"--encoder-weights {file}: {len(counted) - len(missing)} of the {len(counted)} tensors of the "
            f"encoder of {name} are in it, the first that is not is {missing[0]}: they are of another model"
        )
    if bad := next((key for key, tensor in best.items() if not tensor.isfinite().all()), None):
        raise ModelError(f"--encoder-weights {file}: {bad} holds NaN or infinite values")
    encoder.load_state_dict({**wanted, **best})
    left = f"; {len(missing)} start fresh ({', '.join(missing[:2])})" if missing else ""
    say(f"the encoder starts from {file}{left}")
