"""Where a teacher comes from: timm by name, a directory of ours or of transformers, a file, or a module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from stepwell.config.options import TaskName
from stepwell.config.own_code import is_own_code
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError, ModelError
from stepwell.models import huggingface, own_module, segmenters
from stepwell.models.card import (
    WEIGHTS,
    Architecture,
    Card,
    build,
    check_answers,
    digest,
    find_model_dir,
    narrow_and_load,
    read_card,
)
from stepwell.models.converted import take_images_of
from stepwell.models.factory import load_factory
from stepwell.models.fitting import load_whole
from stepwell.models.image_processor import PROCESSOR
from stepwell.models.input import has_one_size, input_spec
from stepwell.models.recognise import recognise
from stepwell.models.timm_folder import LOCAL, create_from_folder, is_timm_folder, read_config
from stepwell.models.timm_folder import class_names as timm_class_names
from stepwell.models.timm_models import create_timm, create_with_weights, parse_model_args, timm_architecture
from stepwell.models.weights import read_weights, weights_in
from stepwell.run.progress import say
from stepwell.tasks.outputs import as_logits


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
        notes: What was found out about it that a careful reader should be told.
        task: What it was trained for, where something says that.
        own_spec: The images that it was trained on, where those of `spec` are brought to them on the way in.
        says_input: Whether its card or its image processor says how its images are normalised.
        sharded: What answers in place of `model`, where each of several processes holds a part of it.
    """

    model: nn.Module
    architecture: Architecture
    spec: InputSpec
    classes: tuple[str, ...] | None
    widths: Mapping[str, int]
    name: str
    digest: str
    trained_on: str | None = None
    notes: tuple[str, ...] = ()
    task: TaskName | None = None
    own_spec: InputSpec | None = None
    says_input: bool = False
    sharded: nn.Module | None = None

    @property
    def answering(self) -> nn.Module:
        """What answers, on the device of a run: the model itself, or that in parts."""
        return self.model if self.sharded is None else self.sharded

    @property
    def seen_size(self) -> tuple[int, int]:
        """Height and width of the images as it sees them."""
        return (self.own_spec or self.spec).size

    def at_size(self, size: tuple[int, int]) -> Teacher:
        """The same for images of another size, which are resized to its own on the way in."""
        if size == self.spec.size:
            return self
        given = replace(self.spec, size=size)
        take_images_of(self.model, given, self.spec)
        return replace(self, spec=given, own_spec=self.spec)

    @property
    def resized(self) -> list[str]:
        """That images are resized for it, in words; nothing where they are not."""
        if self.seen_size == self.spec.size:
            return []
        ours, theirs = (f"{height} x {width}" for height, width in (self.spec.size, self.seen_size))
        return [f"the student's images are of {ours}; the teacher sees the same, resized to {theirs}"]

    @property
    def has_own_size(self) -> bool:
        """Whether it is for images of one size, or was trained for masks at a known one. The square of a
        processor of transformers is neither: images of another aspect would be squashed."""
        is_from_processor = self.architecture.source == "transformers" and self.architecture.outputs != "maps"
        return has_one_size(self.model) or (self.task == "segmentation" and not is_from_processor)

    @property
    def is_own_module(self) -> bool:
        """Whether it is a module of the user's own, which no library can build by name."""
        return self.architecture.source == "factory"


def load_teacher(
    source: str,
    weights: Path | None,
    model_args: Mapping[str, str],
    num_classes: int,
    weights_key: str | None = None,
) -> Teacher:
    """Load the teacher that `--teacher` names.

    Args:
        source: A timm model name, a run or model directory, a folder of transformers or timm, or
            FILE.py:FACTORY.
        weights: Weights to load into it, instead of timm's pretrained ones or the factory's own.
        model_args: Arguments of timm's create_model.
        num_classes: Classes of the data; used where neither weights nor source say.
        weights_key: Which of the weights in that file, if it holds several.

    Raises:
        ModelError: It does not exist, has no weights, or the weights do not fit.
    """
    args = parse_model_args(model_args)
    has_file = weights is not None or source.startswith(LOCAL) or is_timm_folder(Path(source))
    if weights_key is not None and not has_file:
        raise ConfigError(
            "--weights-key says which weights of a file to take: name it with --teacher-weights"
        )
    if segmenters.is_named(source):
        return _from_segmenter(source, weights, weights_key, {"num_classes": num_classes, **args})
    if is_own_code(source):
        return _from_file(source, weights, weights_key)
    if source.startswith(LOCAL):
        return _from_timm_folder(Path(source.removeprefix(LOCAL)), weights, weights_key, args)
    path = Path(source)
    if path.is_dir():
        return _from_directory(path, weights, weights_key, args)
    if path.is_file():
        raise ModelError(
            f"--teacher {path} is a file; if it holds weights, pass it as --teacher-weights, and as "
            f"--teacher the timm name or the FILE.py:FACTORY that builds the model"
        )
    if weights is None:
        model = create_timm(source, args, pretrained=True)
    else:
        model = create_with_weights(source, weights, weights_key, args, num_classes)
    args = {"num_classes": model.num_classes, **args}
    return _teacher(model, timm_architecture(source, model.eval(), args), source, args)


def teacher_from_module(module: nn.Module, classes: tuple[str, ...] | None) -> Teacher:
    """Wrap a module that the caller built; a copy is taken, so the caller's own is never changed.

    A module keeps no record of how it was built. If it is a timm model that can be built again from what it
    shows (proved by equal outputs), the student will load without help; else `load` asks for `factory=`.
    """
    name = f"a {type(module).__name__}"
    model = own_module.taken(module, name).eval()
    _check_numbers(model, name)
    spec = input_spec(model)
    inner = own_module.unwrapped(module)
    architecture = recognise(model, spec) or Architecture(source="factory", name=type(inner).__name__)
    classes = huggingface.class_names(model) or classes
    task = huggingface.task_of(model, name)
    return Teacher(model, architecture, spec, classes, {}, architecture.name, digest(model), task=task)


def _from_directory(path: Path, weights: Path | None, key: str | None, args: Mapping[str, Any]) -> Teacher:
    folder = find_model_dir(path)
    if folder is None and is_timm_folder(path):
        return _from_timm_folder(path, weights, key, args)
    if folder is None and not huggingface.is_folder(path):
        return _from_checkpoints(path, weights, key, args)
    if args:
        raise ConfigError(f"--model-args are for timm names; {folder or path} has its own")
    if folder is None:
        return _from_transformers(path, weights)
    card: Card = read_card(folder)
    model = build(card.architecture, None, folder)
    model = narrow_and_load(model, card.widths, folder / WEIGHTS, card.input)
    check_answers(model, card, folder)
    if weights is not None:
        load_whole(model, weights, key)
    teacher = _teacher(model, card.architecture, str(path))
    return replace(
        teacher,
        spec=card.input,
        # A student of unlabelled images has placeholders, which say nothing.
        classes=None if card.classes == placeholders(len(card.classes)) else tuple(card.classes),
        widths=card.widths,
        trained_on=card.provenance.get("data_fingerprint") if weights is None else None,
        task=card.task,
        says_input=True,
    )


def _from_checkpoints(path: Path, weights: Path | None, key: str | None, args: Mapping[str, Any]) -> Teacher:
    """The only checkpoint in the folder of a transformers Trainer that has not saved its last model."""
    checkpoints = sorted(path.glob("checkpoint-*/"), key=lambda folder: (len(folder.name), folder.name))
    checkpoints = [folder for folder in checkpoints if huggingface.is_folder(folder)]
    if len(checkpoints) == 1:
        say(f"{path}: taken is {checkpoints[0].name}, the only model in it")
        return _from_directory(checkpoints[0], weights, key, args)
    if checkpoints:
        names = ", ".join(folder.name for folder in checkpoints[:6])
        raise ModelError(
            f"{path} holds checkpoints of a training ({names}) and no final model: give one of them, such as "
            f"--teacher {checkpoints[-1]}"
        )
    found = weights_in(path)
    if found is not None:
        raise ModelError(
            f"{path} holds weights, and nothing that says of which model: give them as --teacher-weights "
            f"{found}, and with --teacher the timm name or FILE.py:FACTORY that builds it"
        )
    raise ModelError(
        f"{path} holds no finished model: no stepwell.json in it, its student/ or its teacher/, and no "
        f"config.json"
    )


def _from_timm_folder(
    folder: Path, weights: Path | None, key: str | None, args: Mapping[str, Any]
) -> Teacher:
    model = create_from_folder(folder, args)
    load_whole(model, weights or folder, key)
    name = f"{LOCAL}{folder}"
    args = {**read_config(folder)[1], **args}
    teacher = _teacher(model, timm_architecture(name, model.eval(), args), name, args)
    classes = timm_class_names(folder)
    return replace(teacher, classes=classes if classes and len(classes) == model.num_classes else None)


def _from_transformers(folder: Path, weights: Path | None) -> Teacher:
    if weights is not None:
        raise ConfigError(f"--teacher-weights do not go with {folder}, which has its own")
    model = huggingface.load_folder(folder)
    spec, classes = huggingface.input_spec(model, folder), huggingface.class_names(model)
    _check_numbers(model, str(folder))
    architecture = recognise(model, spec) or Architecture(source="factory", name=str(folder))
    task = huggingface.task_of(model, str(folder))
    says_input = (folder / PROCESSOR).is_file()
    return Teacher(
        model, architecture, spec, classes, {}, str(folder), digest(model), task=task, says_input=says_input
    )


def _from_segmenter(source: str, weights: Path | None, key: str | None, args: Mapping[str, Any]) -> Teacher:
    """A model for masks by name, with the user's own weights."""
    if weights is None:
        raise ModelError(
            f"{source} is built without weights: pass --teacher-weights FILE, or train it first (stepwell "
            f"train --model {source} ...)"
        )
    names = (name for found in read_weights(weights).state_dicts for name in found.tensors)
    model = segmenters.build(source, args, auxiliary=any("aux_classifier." in name for name in names))
    load_whole(model, weights, key)
    segmenters.without_auxiliary(model)
    _check_numbers(model, source)
    return _segmenter(source, args, model, has_weights=True)


def named_segmenter(source: str, args: Mapping[str, Any]) -> Teacher:
    """A model for masks with random weights, to be looked at; it has no digest."""
    return _segmenter(source, args, segmenters.build(source, args), has_weights=False)


def _segmenter(source: str, args: Mapping[str, Any], model: nn.Module, *, has_weights: bool) -> Teacher:
    spec = segmenters.input_spec(model)
    library, _, kind = source.partition(":")
    architecture = Architecture.model_validate(
        {"source": library, "name": kind, "args": dict(args), "outputs": "maps"}
    )
    model = as_logits(model, "maps").eval()
    return Teacher(model, architecture, spec, None, {}, source, digest(model) if has_weights else "")


def placeholders(num_classes: int) -> list[str]:
    """Names for classes that nobody named."""
    return [f"class {i}" for i in range(num_classes)]


def _from_file(source: str, weights: Path | None, key: str | None) -> Teacher:
    module = load_factory(source)()
    if weights is not None:  # first: they are the file's own, before anything is folded into them
        load_whole(own_module.unwrapped(module), weights, key)
    model = own_module.plain(module, source)
    function = source.rpartition(":")[2]
    return _teacher(model.eval(), Architecture(source="factory", name=function), source)


def _teacher(
    model: nn.Module, architecture: Architecture, name: str, args: Mapping[str, Any] | None = None
) -> Teacher:
    _check_numbers(model, name)
    return Teacher(model, architecture, input_spec(model, args), None, {}, name, digest(model))


def _check_numbers(model: nn.Module, name: str) -> None:
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ModelError(
                f"{name} cannot teach: {key} holds NaN or infinite values; take an earlier checkpoint"
            )
