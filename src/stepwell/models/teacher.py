"""Where a teacher comes from: timm by name, a directory of ours or of transformers, a file, or a module."""

from __future__ import annotations

import ast
import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.helpers import to_2tuple
from torch import Tensor, nn

import stepwell.zoo  # noqa: F401  (their names become names of timm)
from stepwell.config.own_code import load_function
from stepwell.data.images import one_line
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError, ModelError, did_you_mean
from stepwell.models import huggingface
from stepwell.models.arguments import refused
from stepwell.models.card import (
    WEIGHTS,
    Architecture,
    Card,
    Factory,
    build,
    digest,
    find_model_dir,
    load_strictly,
    narrow_and_load,
    read_card,
)
from stepwell.models.input import input_spec
from stepwell.models.plain import check_plain
from stepwell.models.weights import read_weights


@dataclass(frozen=True)
class Teacher:
    """A trained model, and what belongs to it.

    Attributes:
        model: In eval mode, on the CPU.
        architecture: How to build it at full width.
        spec: The images that it wants.
        classes: Names of its classes, or None where nothing says them.
        widths: Its own widths, if it has been cut before.
        name: For people.
        digest: Fingerprint of its weights.
        trained_on: Fingerprint of the data that stepwell trained it on, or None.
    """

    model: nn.Module
    architecture: Architecture
    spec: InputSpec
    classes: tuple[str, ...] | None
    widths: Mapping[str, int]
    name: str
    digest: str
    trained_on: str | None = None

    @property
    def is_own_module(self) -> bool:
        """Whether it is a module of the user's own, which no library can build by name."""
        return self.architecture.source == "factory"


def load_teacher(
    source: str, weights: Path | None, model_args: Mapping[str, str], num_classes: int
) -> Teacher:
    """Load the teacher that `--teacher` names.

    Args:
        source: A timm model name, a run or model directory, a folder of transformers, or FILE.py:FACTORY.
        weights: Weights to load into it, instead of timm's pretrained ones or the factory's own.
        model_args: Arguments of timm's create_model.
        num_classes: Classes of the data; used where neither weights nor source say.

    Raises:
        ModelError: It does not exist, has no weights, or the weights do not fit.
    """
    args = parse_model_args(model_args)
    if ".py:" in source:
        return _from_file(source, weights)
    path = Path(source)
    if path.exists():
        return _from_directory(path, weights, args)
    return _from_timm(source, weights, args, num_classes)


def teacher_from_module(module: nn.Module, classes: tuple[str, ...] | None) -> Teacher:
    """Wrap a module that the caller built; a copy is taken, so the caller's own is never changed.

    A module keeps no record of how it was built. If it is a timm model that can be built again from what it
    shows (proved by equal outputs), the student will load without help; else `load` asks for `factory=`.
    """
    check_plain(module, f"a {type(module).__name__}")
    model = huggingface.wrapped(copy.deepcopy(module).cpu().eval())
    _check_numbers(model, f"a {type(module).__name__}")
    spec = input_spec(model)
    architecture = _recognise(model, spec) or Architecture(source="factory", name=type(module).__name__)
    classes = huggingface.class_names(model) or classes
    return Teacher(model, architecture, spec, classes, {}, architecture.name, digest(model))


_HUB = ("hf-hub:", "hf_hub:", "local-dir:")


def create_timm(
    name: str,
    args: Mapping[str, Any],
    *,
    pretrained: bool,
    way_out: str = "pass --teacher-weights FILE",
    flag: str = "--model-args",
) -> nn.Module:
    """`timm.create_model` with our errors: unknown names, wrong arguments, unreachable weights."""
    if (reason := refused(args)) is not None:
        raise ConfigError(f"{flag}: {reason}")
    base = name.split(".")[0]
    if not name.startswith(_HUB) and not timm.is_model(base):
        raise ModelError(
            f"{name!r} is neither a model of timm nor an existing folder"
            f"{did_you_mean(base, timm.list_models())}"
        )
    try:
        return timm.create_model(name, **{**args, "pretrained": pretrained})
    except TypeError as error:
        raise ConfigError(f"{flag} {dict(args)} do not suit {name}: {one_line(error)}") from None
    except Exception as error:
        if not pretrained:
            if not args:
                raise
            raise ConfigError(f"{flag} {dict(args)} do not suit {name}: {one_line(error)}") from None
        # Whatever the hub's client raises (no network, no such file, no weights): the way out is the same.
        raise ModelError(
            f"no pretrained weights can be reached for {name} ({one_line(error)[:120]}); {way_out}"
        ) from None


def create_without_memory(name: str, args: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """As `create_timm`, on the meta device if the model can be built there: for counting, without weights."""
    # A constructor may want the values of tensors, which have none there (RegNet in older versions of timm).
    with contextlib.suppress(ConfigError, RuntimeError), torch.device("meta"):
        return create_timm(name, args, pretrained=pretrained)
    return create_timm(name, args, pretrained=pretrained)


def parse_model_args(model_args: Mapping[str, str]) -> dict[str, Any]:
    """`{"img_size": "32"}` -> `{"img_size": 32}`; what is no Python literal stays text."""
    parsed = {}
    for name, text in model_args.items():
        try:
            parsed[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[name] = text
    return parsed


def _from_timm(name: str, weights: Path | None, args: dict[str, Any], num_classes: int) -> Teacher:
    if weights is None:
        model = create_timm(name, args, pretrained=True)
    else:
        tensors = read_weights(weights)
        args = {"num_classes": _classes_in(tensors, name, num_classes), **args}
        model = create_timm(name, args, pretrained=False)
        load_strictly(model, tensors, str(weights))
    args = {"num_classes": model.num_classes, **args}
    return _teacher(model, timm_architecture(name, model.eval(), args), name)


def timm_architecture(name: str, model: nn.Module, args: Mapping[str, Any]) -> Architecture:
    """How to build `model`, which timm made of `name`, without the hub and without its weights."""
    if name.startswith(_HUB):  # its arguments stand in a file there
        plain = copy.deepcopy(model).cpu().eval()
        return _recognise(plain, input_spec(plain)) or Architecture(source="factory", name=name)
    return Architecture(source="timm", name=name.split(".")[0], args=dict(args))


def _classes_in(tensors: Mapping[str, Tensor], name: str, default: int) -> int:
    """The classifier's size as the weights have it: they know better than the data folder."""
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    classifier = getattr(config, "classifier", None) or "head"
    weight = tensors.get(f"{classifier}.weight") if isinstance(classifier, str) else None
    return default if weight is None else weight.shape[0]


def _from_directory(path: Path, weights: Path | None, args: Mapping[str, Any]) -> Teacher:
    folder = find_model_dir(path)
    if folder is None and not huggingface.is_folder(path):
        raise ModelError(
            f"{path} holds no finished model: no stepwell.json in it, its student/ or its teacher/"
        )
    if args:
        raise ConfigError(f"--model-args are for timm names; {folder or path} has its own")
    if folder is None:
        return _from_transformers(path, weights)
    card: Card = read_card(folder)
    model = build(card.architecture, None, folder)
    model = narrow_and_load(model, card.widths, folder / WEIGHTS, card.input)
    if weights is not None:
        load_strictly(model, read_weights(weights), str(weights))
    teacher = _teacher(model, card.architecture, str(path))
    return replace(
        teacher,
        spec=card.input,
        # A student of unlabelled images has placeholders, which say nothing.
        classes=None if card.classes == placeholders(len(card.classes)) else tuple(card.classes),
        widths=card.widths,
        trained_on=card.provenance.get("data_fingerprint") if weights is None else None,
    )


def _from_transformers(folder: Path, weights: Path | None) -> Teacher:
    if weights is not None:
        raise ConfigError(f"--teacher-weights do not go with {folder}, which has its own")
    model = huggingface.load_folder(folder)
    spec, classes = huggingface.input_spec(model, folder), huggingface.class_names(model)
    _check_numbers(model, str(folder))
    architecture = _recognise(model, spec) or Architecture(source="factory", name=str(folder))
    return Teacher(model, architecture, spec, classes, {}, str(folder), digest(model))


def placeholders(num_classes: int) -> list[str]:
    """Names for classes that nobody named."""
    return [f"class {i}" for i in range(num_classes)]


def _from_file(source: str, weights: Path | None) -> Teacher:
    model = load_factory(source)()
    check_plain(model, source)
    model = huggingface.wrapped(model)
    if weights is not None:
        load_strictly(model, read_weights(weights), str(weights))
    function = source.rpartition(":")[2]
    return _teacher(model.eval(), Architecture(source="factory", name=function), source)


def load_factory(source: str) -> Factory:
    """Import FILE.py and return its function; only ever for a file that the user named in this command."""
    factory = load_function(source, "--teacher")

    def build() -> nn.Module:
        try:
            model = factory()
        except Exception as error:
            raise ModelError(f"{source} failed: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise ModelError(f"{source} returned a {type(model).__name__}, not a torch.nn.Module")
        return model

    return build


def _teacher(model: nn.Module, architecture: Architecture, name: str) -> Teacher:
    _check_numbers(model, name)
    return Teacher(model, architecture, input_spec(model), None, {}, name, digest(model))


def _check_numbers(model: nn.Module, name: str) -> None:
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ModelError(
                f"{name} cannot teach: {key} holds NaN or infinite values; take an earlier checkpoint"
            )


def _recognise(model: nn.Module, spec: InputSpec) -> Architecture | None:
    """What builds `model` again with timm or transformers, if it can be found and proved."""
    if (found := huggingface.recipe(model)) is not None:
        return Architecture(source="transformers", name=found[0], args=found[1])
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if name is None or not timm.is_model(name):
        return None
    common: dict[str, Any] = {"num_classes": model.num_classes, "in_chans": spec.channels}
    size = spec.size[0] if spec.size[0] == spec.size[1] else spec.size
    guesses = [common, {**common, "img_size": size}]
    blocks, embed = getattr(model, "blocks", None), getattr(model, "patch_embed", None)
    if blocks is not None and embed is not None and hasattr(getattr(blocks[0], "attn", None), "num_heads"):
        patch_size = to_2tuple(embed.patch_size)[0]
        vit = {"patch_size": patch_size, "embed_dim": model.embed_dim, "depth": len(blocks)}
        guesses.append({**guesses[1], **vit, "num_heads": blocks[0].attn.num_heads})
    images = torch.randn(2, spec.channels, *spec.size, generator=torch.Generator().manual_seed(0))
    for args in guesses:
        try:
            twin = timm.create_model(name, pretrained=False, **args)
            twin.load_state_dict(model.state_dict())
            with torch.no_grad():
                same = torch.equal(twin.eval()(images), model(images))
        except (TypeError, RuntimeError, AssertionError):
            continue
        if same:
            return Architecture(source="timm", name=name, args=args)
    return None
