"""A model directory: weights without pickle, and a card that says how to build the model for them.

model.safetensors    parameters and buffers
stepwell.json        architecture, width of every layer, classes, input, where it comes from
model.onnx           the same model for other runtimes, where ONNX can hold it (written by export.py)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

import stepwell.zoo  # noqa: F401  (their names become names of timm)
from stepwell.config.options import TaskName
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError, DataError, ModelError, UnsupportedModelError
from stepwell.models import huggingface, own_module, segmenters
from stepwell.models.arguments import refused
from stepwell.models.factory import Factory, build_with
from stepwell.models.input import check_runs
from stepwell.models.reached import leave_out
from stepwell.pruning import generic
from stepwell.pruning.channels import channel_groups, is_stream
from stepwell.pruning.families import find_groups
from stepwell.pruning.parts import take_apart
from stepwell.pruning.skeleton import build_skeleton, fill
from stepwell.pruning.units import Group
from stepwell.run.atomic import plain_tensors, write_atomically
from stepwell.tasks.outputs import Outputs, as_logits

WEIGHTS, CARD, ONNX = "model.safetensors", "stepwell.json", "model.onnx"
BASELINE = "baseline"
"""Folder of a run with the stock network that the student is compared with."""
SIZES = "ladder"
"""Folder of a run with the further sizes of `--ladder`."""


def size_folder(keep_ratio: float) -> str:
    """Folder of one further size, in a run."""
    return f"{SIZES}/{keep_ratio:g}"


class Architecture(BaseModel):
    """How to build the model at full width: `timm.create_model(name, **args)`, transformers' class from the
    configuration `args`, or the user's own function."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["timm", "transformers", "torchvision", "smp", "factory"]
    name: str
    """timm's model name, transformers' class, torchvision's or segmentation-models-pytorch's function for
    segmentation, or the factory's; a factory's code is never stored and never found by its name."""
    args: dict[str, Any] = {}
    outputs: Outputs = "logits"
    """What it returns; the model of the card returns logits, see tasks/outputs.py."""
    parts: dict[str, list[int]] = {}
    """Convolutions that read a concatenation and were taken apart, with the channels of each part; see
    pruning/parts.py."""
    unused: list[str] = []
    """Modules that do not reach the logits and were left out; see reached.py."""


class Card(BaseModel):
    """The contents of `stepwell.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    architecture: Architecture
    widths: dict[str, Annotated[int, Field(ge=0)]] = {}
    """Units kept per group; a group that is not named is whole."""
    classes: list[str]
    input: InputSpec
    task: TaskName = "classification"
    """What its answers are: one class, or a yes or no for each, or one class for each pixel."""
    colours: list[tuple[int, int, int]] = []
    """What the classes of masks are drawn in; nothing for other tasks."""
    numbers: list[int] = []
    """What number each class has in the user's masks; nothing in cards of older versions."""
    provenance: dict[str, Any] = {}
    """Versions, teacher, data and figures: for people; nothing is computed from it."""


def save_model(folder: Path, model: nn.Module, card: Card) -> None:
    """Write `model.safetensors` and `stepwell.json`, each atomically, the card last."""
    write_atomically(folder / WEIGHTS, save(plain_tensors(model.state_dict())))
    write_atomically(folder / CARD, json.dumps(card.model_dump(mode="json"), indent=2))


def find_model_dir(path: Path) -> Path | None:
    """The model directory that `path` is or holds: itself, a run's `student/`, or a trained `teacher/`."""
    for folder in (path, path / "student", path / "teacher"):
        if (folder / CARD).is_file():
            return folder
    return None


def read_card(folder: Path) -> Card:
    """Read `stepwell.json`.

    Raises:
        ModelError: It is missing or is not ours.
    """
    try:
        return Card.model_validate_json((folder / CARD).read_bytes())
    except OSError:
        raise ModelError(f"{folder} holds no {CARD}: it is not a model directory of stepwell") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ModelError(f"{folder / CARD} is damaged: {where}: {first['msg']}") from None
    except DataError as error:
        raise ModelError(f"{folder / CARD} is damaged: {error}") from None


def load(path: str | Path, factory: Factory | str | None = None) -> nn.Module:
    """Load a student (or a trained teacher) as a plain module in eval mode, on the CPU.

    Args:
        path: A model directory, or a run that holds one.
        factory: Builds the full-width model, for models that did not come from timm by name: a function, or
            FILE.py:FUNCTION.

    Raises:
        ModelError: Nothing is there, the card is damaged, the weights do not fit, or a factory is needed.
    """
    return load_with_card(path, factory)[0]


def load_with_card(path: str | Path, factory: Factory | str | None = None) -> tuple[nn.Module, Card]:
    """The same, and what is known of it."""
    folder = find_model_dir(Path(path))
    if folder is None:
        raise ModelError(f"{path} holds no model: no {CARD} in it, in its student/ or in its teacher/")
    card = read_card(folder)
    model = build(card.architecture, factory, folder)
    model = narrow_and_load(model, card.widths, folder / WEIGHTS, card.input)
    check_answers(model, card, folder)
    return model, card


def check_answers(model: nn.Module, card: Card, folder: Path) -> None:
    """Check that a model takes the images of its card, and answers with as many numbers as it names classes.

    Raises:
        ModelError: It does not: the card is damaged, or another model was built.
    """
    try:
        name = f"its {type(model).__name__}"
        num_outputs = check_runs(model, card.input, name, "size", dense=card.task == "segmentation")
    except ConfigError as error:
        raise ModelError(f"{folder / CARD} is damaged, or for another model: {error}") from None
    if num_outputs != len(card.classes) and card.task != "features":
        raise ModelError(
            f"{folder / CARD} is damaged: it names {len(card.classes)} classes, but the model tells "
            f"{num_outputs} apart"
        )


def build(architecture: Architecture, factory: Factory | str | None, where: Path) -> nn.Module:
    """The full-width module with whatever weights its constructor gives it; returns logits."""
    model = as_logits(_build(architecture, factory, where), architecture.outputs)
    try:
        leave_out(model, architecture.unused)
    except KeyError as error:
        raise ModelError(
            f"{where} does not fit the {type(model).__name__} that was built for it: no {error.args[0]} there"
        ) from None
    try:
        take_apart(model, architecture.parts)
    except KeyError as error:
        raise ModelError(
            f"{where} does not fit the {type(model).__name__} that was built for it: {error.args[0]} is no "
            f"convolution of {sum(architecture.parts[error.args[0]])} channels there"
        ) from None
    return model


def _build(architecture: Architecture, factory: Factory | str | None, where: Path) -> nn.Module:
    if factory is not None:
        return own_module.plain(build_with(factory), architecture.name, quiet=True)
    if architecture.source == "factory":
        raise ModelError(
            f"{where} was made from {architecture.name}, which is not stored: "
            f"pass factory=, the function that builds it (to predict, export and inspect: --teacher "
            f"FILE.py:FACTORY), or use {ONNX}"
        )
    if architecture.source == "transformers":
        return huggingface.build(architecture.args)
    if architecture.source in segmenters.SOURCES:
        return segmenters.build(f"{architecture.source}:{architecture.name}", architecture.args)
    if (reason := refused(architecture.args)) is not None:
        raise ModelError(f"{where / CARD}: {reason}")
    if not timm.is_model(architecture.name):  # a name such as hf-hub:... would go to the network
        raise ModelError(f"{where / CARD}: this timm has no model {architecture.name!r}; is it too old?")
    try:
        return timm.create_model(architecture.name, pretrained=False, **architecture.args)
    except Exception as error:  # whatever a constructor does with arguments that it cannot use
        raise ModelError(
            f"{where / CARD}: timm cannot build {architecture.name} from {architecture.args}: "
            f"{type(error).__name__}: {error}"
        ) from None


def example_images(spec: InputSpec, num: int = 2) -> Tensor:
    """Random images of the right shape, always the same."""
    return torch.randn(num, spec.channels, *spec.size, generator=torch.Generator().manual_seed(0))


def named_groups(model: nn.Module, names: Collection[str], spec: InputSpec | None) -> list[Group]:
    """The groups of a model among which those called `names` should be.

    Args:
        model: At the width that they were found at.
        names: Their names. The dependency graph is only asked for what the families do not find.
        spec: The images that the model takes; without it the families alone are asked.

    Raises:
        ModelError: They were found with torch-pruning, which is missing.
        UnsupportedModelError: Nothing in the model may be cut.
    """
    try:
        groups = find_groups(model)
    except UnsupportedModelError:
        groups = []
    if any(is_stream(name) for name in names):
        groups = [*groups, *channel_groups(model, groups)]
    unknown = sorted(set(names) - {group.name for group in groups})
    if not unknown or spec is None:
        return groups
    if not generic.installed():
        raise ModelError(
            f"this {type(model).__name__} was cut at {unknown[0]}, which torch-pruning finds: pip install "
            f"'stepwell[generic]'"
        )
    return generic.propose(model.eval(), example_images(spec)).groups


def narrow_and_load(
    model: nn.Module, widths: Mapping[str, int], weights: Path, spec: InputSpec | None = None
) -> nn.Module:
    """Cut `model` to `widths` and fill it from a safetensors file.

    Args:
        model: At full width.
        widths: Units kept per group.
        weights: The file.
        spec: As in `named_groups`.

    Raises:
        ModelError: The file cannot be read, or model, widths and weights do not fit each other.
    """
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {weights}: {error}") from None
    if widths:
        groups = named_groups(model, widths, spec)
        units = {group.name: group.num_units for group in groups}
        wrong = [name for name, width in widths.items() if width > units.get(name, -1)]
        if wrong:
            raise ModelError(
                f"{weights.parent} does not fit the {type(model).__name__} that was built for it: {wrong[0]} "
                f"has {units.get(wrong[0], 0)} units there, here {widths[wrong[0]]}; if a factory built it, "
                f"pass the one that it was made from, else {CARD} is damaged"
            )
        skeleton = build_skeleton(model, groups, widths)
        check_fit(skeleton, tensors, str(weights))
        model = fill(skeleton, tensors)
    else:
        load_strictly(model, tensors, str(weights))
    return model.eval()


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict that must fit in every key and shape; see `check_fit`."""
    check_fit(model, tensors, where)
    model.load_state_dict(dict(tensors))


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Check that a state dict fits `model`, or a skeleton, in every key and shape.

    Raises:
        ModelError: Names the first keys that are missing, left over, or of another shape.
    """
    state = model.state_dict()
    complaints = {
        # Checkpoints of the first torch versions have no counters, and nothing is computed from them.
        "missing": sorted(k for k in state.keys() - tensors.keys() if not k.endswith(".num_batches_tracked")),
        "not in the model": sorted(tensors.keys() - state.keys()),
        "of another shape": [
            f"{k} {tuple(tensors[k].shape)} for {tuple(state[k].shape)}"
            for k in sorted(state.keys() & tensors.keys())
            if tensors[k].shape != state[k].shape
        ],
    }
    text = "; ".join(
        f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for what, keys in complaints.items()
        if keys
    )
    if text:
        raise ModelError(f"weights in {where} do not fit {type(model).__name__}: {text}")


def digest(model: nn.Module) -> str:
    """A fingerprint of all weights and buffers."""
    return hashlib.blake2b(save(plain_tensors(model.state_dict())), digest_size=16).hexdigest()
