"""A student of another architecture: built by name, for the images that the teacher takes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from stepwell.config.model_options import StudentOptions
from stepwell.config.options import TaskName
from stepwell.config.own_code import is_own_code
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError, UnsupportedModelError
from stepwell.models import own_module, segmenters
from stepwell.models.card import Architecture
from stepwell.models.factory import load_factory
from stepwell.models.fitting import load_start
from stepwell.models.input import check_runs, has_one_size, input_spec, runs
from stepwell.models.reached import with_logits_alone
from stepwell.models.timm_models import create_timm, parse_model_args, timm_architecture
from stepwell.pruning.blocks import compared_blocks
from stepwell.pruning.families import find_groups
from stepwell.run.progress import say
from stepwell.tasks.outputs import AsLogits


@dataclass(frozen=True)
class OtherStudent:
    """A student that is no slice of the teacher.

    Attributes:
        model: In eval mode, on the CPU; with random weights if none were asked for.
        architecture: How to build it.
        blocks: The blocks whose states are compared with the assistant's; none if we know none of them.
        name: For people.
    """

    model: nn.Module
    architecture: Architecture
    blocks: tuple[str, ...]
    name: str


def build_student(
    options: StudentOptions,
    num_classes: int | None,
    spec: InputSpec,
    seed: int,
    module: nn.Module | None = None,
    like: nn.Module | None = None,
    flag: str = "--student",
    *,
    task: TaskName = "classification",
) -> OtherStudent:
    """Build the student that `--student` names.

    Args:
        options: What it is, and which weights it starts from.
        num_classes: Those of the teacher, or the numbers in its embedding; None for a backbone without a last
            layer, whose features are as wide as they are.
        spec: The teacher's input: the student gets the same images.
        seed: Of the random weights.
        module: The module that `--student` stands for, where the caller built it; a copy is taken.
        like: Where to copy weights from, by name and shape, with `--student-init teacher`.
        flag: The option that names it, for errors.
        task: What both are for.

    Raises:
        ModelError: There is no such model, or the weights do not fit it.
        ConfigError: It does not take images of this size, or has other classes.
    """
    if module is not None and options.student_pretrained:
        raise ConfigError("--student-pretrained is for timm names: the module brings its own weights")
    assert options.student is not None
    name = options.student if module is None else type(module).__name__
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if module is not None:
            model = own_module.copied(module)
            architecture = Architecture(source="factory", name=name)
        elif is_own_code(name):
            model, architecture = load_factory(name)(), Architecture(source="factory", name=name)
        elif segmenters.is_named(name):
            given = {**parse_model_args(options.student_args), "num_classes": num_classes}
            source, _, kind = name.partition(":")
            model = segmenters.build(name, given)
            architecture = Architecture.model_validate({"source": source, "name": kind, "args": given})
        else:
            model, architecture = _from_timm(options, num_classes or 0, spec, flag)
    if options.student_weights is not None:  # first: they are the file's own, before anything is folded
        whole = own_module.unwrapped(model)
        load_start(whole, options.student_weights, options.student_weights_key, f"{flag}-weights-key")
    if architecture.source == "factory":
        model = own_module.plain(model, f"{flag} {name}")
    # A slice of the teacher is trained as a whole, and so is this.
    model = model.eval().requires_grad_(True)
    dense = task == "segmentation"
    classes = check_runs(model, spec, f"{flag} {name}", f"{flag}-args or another model", dense=dense)
    if dense:
        model = AsLogits(model, "maps")
        unused = with_logits_alone(model, spec)
        architecture = architecture.model_copy(update={"outputs": "maps", "unused": unused})
    if num_classes is not None and classes != num_classes:
        if task == "features":
            raise ConfigError(
                f"{flag} {name} returns {classes} numbers, and the teacher an embedding of {num_classes}: "
                f"let the student's last layer return as many"
            )
        raise ConfigError(f"{flag} {name} has {classes} classes, the teacher has {num_classes}")
    if like is not None and options.student_init == "teacher":
        _copy(like, model, name)
    try:
        blocks = compared_blocks(find_groups(model))
    except UnsupportedModelError:
        blocks = ()
    return OtherStudent(model, architecture, blocks, name)


def _from_timm(
    options: StudentOptions, num_classes: int, spec: InputSpec, flag: str
) -> tuple[nn.Module, Architecture]:
    name, args, role = str(options.student), f"{flag}-args", flag.removeprefix("--")
    given = {"num_classes": num_classes, "in_chans": spec.channels, **parse_model_args(options.student_args)}
    model = create_timm(name, given, pretrained=False, flag=args)
    wrong = (has_one_size(model) and input_spec(model).size != spec.size) or not runs(model, spec)
    if wrong and "img_size" not in given:
        with contextlib.suppress(ConfigError):  # a model that takes no size fails, in words, where it is run
            model = create_timm(name, {**given, "img_size": spec.size}, pretrained=False, flag=args)
            given |= {"img_size": spec.size}
    if options.student_pretrained:
        way_out = f"pass {flag}-weights FILE"
        model = create_timm(name, given, pretrained=True, way_out=way_out, flag=args)
        say(f"{role}: starts from timm's pretrained weights of {name}, with a new head where classes differ")
    return model, timm_architecture(name, model.eval(), given)


def _copy(source: nn.Module, target: nn.Module, name: str) -> None:
    theirs = source.state_dict()
    same = {
        key: theirs[key].clone()
        for key, tensor in target.state_dict().items()
        if key in theirs and theirs[key].shape == tensor.shape
    }
    parameters = [key for key, _ in target.named_parameters()]
    if not any(key in same for key in parameters):
        raise ConfigError(f"--student-init teacher: {name} has no tensor in common with the teacher")
    target.load_state_dict(same, strict=False)
    copied = sum(key in same for key in parameters)
    say(f"student: {copied} of its {len(parameters)} parameter tensors are the teacher's")
