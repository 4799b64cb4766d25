"""Models of Hugging Face's transformers, with or without a classifier: read from a folder, and rebuilt.

transformers is imported only where one of its models is at hand: it takes seconds, and it is an extra.
Nothing here goes to the network, unpickles, or runs code that lies in a folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stepwell.config.options import TaskName
from stepwell.data.images import one_line
from stepwell.data.spec import InputSpec
from stepwell.errors import ModelError, UnsupportedModelError
from stepwell.models import segmenters
from stepwell.models.arguments import architecture_only, refused_configuration
from stepwell.models.huggingface_calls import (
    BACKBONES,
    NO_POOLER,
    SEGMENTERS,
    Backbone,
    Classifier,
    Segmenter,
    Wrapped,
    backbone_named,
    channels_of,
    check_segmenter,
    image_tower,
)
from stepwell.models.image_processor import PROCESSOR, read_json, read_spec
from stepwell.models.weights import FILES, read_weights, weights_in
from stepwell.run.progress import console, say

SUPPORTED = (*BACKBONES, *SEGMENTERS)
"""As `model_type` in a config. Others are not even built: some of transformers' types fetch from the hub."""

CONFIG = "config.json"
# Their configuration says what they were trained at first; DINOv2's 518 goes with a processor for 224.
_ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit", "resnet", *SEGMENTERS)
_OLDEST = (5, 10)  # the first that names layers as pruning/families/huggingface.py does


def wrapped(module: nn.Module) -> nn.Module:
    """`module` itself, but a model of transformers in fp32 and inside a `Wrapped`; it is set up in place.

    Raises:
        ModelError: It is a model of transformers that we cannot use.
    """
    bases = {f"{base.__module__}.{base.__name__}" for base in type(module).__mro__}
    if "transformers.modeling_utils.PreTrainedModel" not in bases:
        return module
    _transformers()
    model = cast(Any, module)
    name, model_type = type(module).__name__, model.config.model_type
    classifies = "ForImageClassification" in "".join(bases)
    if not classifies and hasattr(model.config, "vision_config"):
        raise ModelError(f"a {name} reads texts too: pass its image tower, which `.vision_model` is")
    _check_type(model_type, f"a {name}")
    if model_type in SEGMENTERS:
        check_segmenter(model_type, name, f"a {name}")
        segmenters.without_auxiliary(model)
        return Segmenter(model.float())
    if not classifies and name not in BACKBONES[model_type]:
        raise ModelError(
            f"a {name} returns neither logits nor an embedding: use the ...ForImageClassification or the "
            f"{BACKBONES[model_type][-1]}"
        )
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            # It computes layers a second time, when candidates no longer hold their weights.
            layer.gradient_checkpointing = False
    if _attention(model_type):
        model.set_attn_implementation("sdpa")  # others need a GPU, or compute in fp32 whatever they are given
    if model_type == "dinov3_vit":  # a student learns what its teacher says of the same positions
        model.config.pos_embed_shift = model.config.pos_embed_jitter = model.config.pos_embed_rescale = None
    return Classifier(model.float()) if classifies else Backbone(model.float())


def is_folder(path: Path) -> bool:
    """Whether `save_pretrained` may have written it."""
    return (path / CONFIG).is_file()


def load_folder(folder: Path) -> Wrapped:
    """Load what `save_pretrained` has written; nothing outside of the folder is read.

    Of a model of images and texts (CLIP, SigLIP) it is the image tower.

    Raises:
        ModelError: It is no model that we support, or its weights are missing, do not fit or would run code;
            or transformers is not installed.
    """
    transformers = _transformers()
    config, prefixes = image_tower(architecture_only(read_json(folder / CONFIG)))
    config = architecture_only(config)
    _check_type(config.get("model_type"), str(folder))
    if config["model_type"] in SEGMENTERS:
        named = config.get("architectures") or [""]
        check_segmenter(config["model_type"], str(named[0]), str(folder))
    if (reason := refused_configuration(config)) is not None:
        raise ModelError(f"{folder / CONFIG}: {reason}")
    tensors = _tensors(folder)
    if prefixes:
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(prefixes)}
        say(f"{folder}: taken is its image tower, without the text tower")
    try:
        with _quiet(transformers):
            model, report = _filled(transformers, config, tensors)
            if report["missing_keys"] and all(key.startswith("pooler.") for key in report["missing_keys"]):
                say(f"{folder} has no weights of a pooler: its embedding is the class token")
                model, report = _filled(transformers, {**config, **NO_POOLER}, tensors)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"transformers cannot load {folder}: {one_line(error)[:200]}") from None
    missing, left_over = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:  # transformers would leave them random
        raise ModelError(
            f"{folder} has no weights for {len(missing)} tensors of the {type(model).__name__}, the first is "
            f"{missing[0]}: it was not saved from one"
        )
    if left_over:
        say(f"note: {len(left_over)} tensors of {folder} are not the model's, the first is {left_over[0]}")
    return cast(Wrapped, wrapped(model.eval()))


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder; says so if they are not in our number format."""
    file = weights_in(folder)
    if file is None:
        raise ModelError(
            f"{folder} holds no {FILES[0]}, {FILES[2]} or index of several: save the model again with "
            f"save_pretrained"
        )
    found = read_weights(file).state_dicts[0]
    if found.path:
        raise ModelError(
            f"{file} is not as save_pretrained writes it: its tensors lie under {'.'.join(found.path)}"
        )
    tensors = found.tensors
    formats = {str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()}
    if others := sorted(formats - {"float32"}):
        say(f"weights in {file}: {' and '.join(others)} is read as float32")
    return tensors


def _filled(transformers: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, Any]:  # noqa: ANN401
    """A model with weights, which transformers may rename, and its report on them."""
    kind = type(transformers.AutoConfig.for_model(config["model_type"]))
    config, pooling = _split(config)
    settings = kind.from_dict(config)
    # By state_dict= and without a path: a path would let an index or an adapter name other files.
    return _class_of(transformers, config, settings).from_pretrained(
        None,
        config=settings,
        state_dict=tensors,
        dtype=torch.float32,
        attn_implementation=_attention(config["model_type"]),
        output_loading_info=True,
        **pooling,
    )


def _class_of(transformers: Any, config: Mapping[str, Any], settings: Any) -> Any:  # noqa: ANN401
    """The class without a head if the configuration was saved from it, else the image classifier."""
    if (name := backbone_named(config)) is not None:
        return getattr(transformers, name)  # one of a list of ours
    with torch.device("meta"):  # only to learn which class it is: DeiT has two
        empty = transformers.AutoModelForImageClassification.from_config(settings, trust_remote_code=False)
    return type(empty)


def _split(args: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    """A configuration, and what stands beside it for the constructor alone."""
    config = {key: value for key, value in args.items() if key not in NO_POOLER}
    return config, NO_POOLER if "add_pooling_layer" in args and backbone_named(args) else {}


def recipe(model: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """The name of a model's class, and the arguments that `build` makes it from; None for other models.

    None as well where the configuration no longer describes the model: it is proved by equal outputs.
    """
    if not isinstance(model, Wrapped) or not type(model.model).__module__.startswith("transformers."):
        return None
    args = json.loads(model.config.to_json_string(use_diff=False))
    # Where it lay on this machine is nobody's business; the number format is ours.
    args = {key: value for key, value in architecture_only(args).items() if key != "dtype"}
    name = type(model.model).__name__
    args["architectures"] = [name]  # DeiT has two
    if isinstance(model, Backbone) and getattr(model.model, "pooler", model) is None:
        args |= NO_POOLER
    try:
        twin = build(args)
        twin.load_state_dict(model.state_dict())
    except (ModelError, RuntimeError):
        return None
    images = torch.randn(
        2, channels_of(model.config), *_size(model), generator=torch.Generator().manual_seed(0)
    )
    try:
        with torch.no_grad():
            same = torch.equal(twin.eval()(images), model(images))
    except Exception:  # whatever its forward pass raises; where it is run in earnest, that is said
        return None
    return (name, args) if same else None


def build(args: Mapping[str, Any]) -> Wrapped:
    """A model of a configuration, with whatever weights its constructor gives it.

    Raises:
        ModelError: transformers is not installed, or cannot build it.
    """
    transformers = _transformers()
    _check_type(args.get("model_type"), "the configuration")
    if (reason := refused_configuration(args)) is not None:
        raise ModelError(f"the configuration of a {args['model_type']}: {reason}")
    settings, pooling = _split(args)
    try:
        config = transformers.AutoConfig.for_model(**settings)
        model = _class_of(transformers, settings, config)._from_config(
            config, attn_implementation=_attention(args["model_type"]), dtype=torch.float32, **pooling
        )
    except Exception as error:  # whatever a constructor does with arguments that it cannot use
        raise ModelError(
            f"transformers cannot build a {args['model_type']}: {one_line(error)[:200]}"
        ) from None
    return cast(Wrapped, wrapped(model))


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names that the configuration gives to the classes.

    None if they are transformers' placeholders; or not all different, such as ImageNet's two cranes, since
    no folders can be named like that.
    """
    if not isinstance(model, Classifier | Segmenter):
        return None
    names = tuple(str(model.config.id2label[i]) for i in range(model.num_classes))
    default = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    return None if default or len(set(names)) < len(names) else names


def task_of(model: nn.Module, name: str) -> TaskName | None:
    """What a model was trained for, by its configuration; None where that does not say it.

    Raises:
        UnsupportedModelError: For a number.
    """
    if isinstance(model, Segmenter):
        return "segmentation"
    if not isinstance(model, Classifier):
        return None
    kind = getattr(model.config, "problem_type", None)
    if kind == "regression" or model.num_classes == 1:
        raise UnsupportedModelError(f"{name} returns a number, no classes (problem_type: regression)")
    tasks: dict[str | None, TaskName] = {
        "multi_label_classification": "multi-label",
        "single_label_classification": "classification",
    }
    return tasks.get(kind)


def input_spec(model: Wrapped, folder: Path | None = None) -> InputSpec:
    """What images a model wants: size from its configuration, the rest from its image processor.

    Args:
        model: The model.
        folder: Where `preprocessor_config.json` may lie.

    Raises:
        ModelError: The two disagree, or are damaged.
    """
    size, channels = _size(model), channels_of(model.config)
    file = None if folder is None else folder / PROCESSOR
    if file is None or not file.is_file():
        where = f"{folder} has no {PROCESSOR}" if folder else "a module of transformers does not carry one"
        console.print(f"note: mean and std are taken for 0.5 each, since {where}", soft_wrap=True)
        return InputSpec(size, channels, (0.5,) * channels, (0.5,) * channels, "bilinear", 1.0, "squash")
    return read_spec(file, size, channels, any_size=model.config.model_type in _ANY_SIZE)


def _size(model: Wrapped) -> tuple[int, int]:
    usual = 512 if isinstance(model, Segmenter) else 224  # a ResNet takes any, and is trained at this
    size = getattr(model.config, "image_size", usual)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _check_type(model_type: object, where: str) -> None:
    if model_type not in SUPPORTED:
        raise UnsupportedModelError(
            f"{where} is a {model_type!r} model of transformers, which is not supported; "
            f"known are: {', '.join(SUPPORTED)}"
        )


def _attention(model_type: str) -> str | None:
    """Which of transformers' implementations; None for models that have no choice."""
    without = ("convnext", "convnextv2", "resnet", "swinv2", *SEGMENTERS)
    return None if model_type in without else "sdpa"


def _transformers() -> Any:  # noqa: ANN401  (a module that may be missing)
    way_out = "pip install 'stepwell[transformers]'"
    try:
        installed = version("transformers")
        import transformers
    except (PackageNotFoundError, ImportError):
        raise ModelError(f"this is a model of transformers, which is not installed: {way_out}") from None
    if tuple(map(int, re.findall(r"\d+", installed)[:2])) < _OLDEST:
        raise ModelError(f"transformers {installed} is too old, {_OLDEST[0]}.{_OLDEST[1]} will do: {way_out}")
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:  # noqa: ANN401  (a module)
    """Without transformers' progress bar and its table of keys: what matters of them is checked."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()
