"""What of a model its logits come from: second heads of a user's own are left out, whatever they are called,
and losses compare the map that the right layer reads."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import ExitStack, suppress

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.data.spec import InputSpec
from stepwell.tasks.outputs import LAYERS, AsLogits

_ENOUGH = 128  # pixels


class LeftOut(nn.Module):
    """In the place of a module whose answer does not reach the logits: hands on what it is given."""

    def forward(self, *inputs: object, **_options: object) -> object:
        """The first of them."""
        return inputs[0] if inputs else None


def leave_out(model: nn.Module, names: Iterable[str]) -> None:
    """Take modules out of a model, in place.

    Raises:
        KeyError: There is none of such a name.
    """
    for name in names:
        parent, _, last = name.rpartition(".")
        try:
            model.get_submodule(name)
        except AttributeError:
            raise KeyError(name) from None
        model.get_submodule(parent)._modules[last] = LeftOut()


def with_logits_alone(model: AsLogits, spec: InputSpec) -> list[str]:
    """Leave out what does not reach the logits, and note in the model which its last layer is.

    Args:
        model: Of masks; changed in place.
        spec: What images it takes.

    Returns:
        What was left out.
    """
    trial = copy.deepcopy(model).cpu().eval().requires_grad_(True)
    # What is reached is the same for small images, where a model takes them.
    for size in dict.fromkeys((tuple(min(side, _ENOUGH) for side in spec.size), spec.size)):
        images = torch.randn(2, spec.channels, *size, generator=torch.Generator().manual_seed(0))
        images = images.to(next(trial.parameters()).dtype)
        with suppress(Exception):  # of a forward pass, or a backward pass of the user's own
            model.last_layer, unused = _reached(trial, images)
            _, unused_in_training = _reached(copy.deepcopy(trial).train(), images)
            return _left_out(model, trial, unused & unused_in_training, images)
    return []


def _left_out(model: nn.Module, trial: nn.Module, unused: set[str], images: Tensor) -> list[str]:
    """Leave out the modules of these parameters that can be spared; `trial` is a copy of the model."""
    names = [name for name in _largest(trial, unused) if _is_spare(trial, [name], images)]
    if not names or not _is_spare(trial, names, images):
        return []
    leave_out(model, names)
    return names


def _reached(model: nn.Module, images: Float[Tensor, "batch channels height width"]) -> tuple[str, set[str]]:
    """The last layer to run that the logits depend on, and the parameters that they do not."""
    seen: list[tuple[str, Tensor]] = []
    with ExitStack() as stack, torch.enable_grad():
        for name, module in model.named_modules():
            if isinstance(module, LAYERS) and not _only_scales(module):
                note = lambda _module, _inputs, output, name=name: seen.append((name, output))  # noqa: E731
                stack.callback(module.register_forward_hook(note).remove)
        logits = model(images)
        maps = [(name, output) for name, output in seen if output.requires_grad]
        parameters = dict(model.named_parameters())
        tensors = [*(output for _, output in maps), *parameters.values()]
        found = torch.autograd.grad(logits.sum(), tensors, allow_unused=True)
    last = [name for (name, _), gradient in zip(maps, found, strict=False) if gradient is not None]
    of_parameters = zip(parameters, found[len(maps) :], strict=True)
    return (last[-1] if last else ""), {name for name, gradient in of_parameters if gradient is None}


def _only_scales(layer: nn.Module) -> bool:
    """Whether it is such a layer as stands behind the classifier (FCN), and makes its logits larger."""
    return isinstance(layer, nn.ConvTranspose2d) and layer.in_channels == layer.out_channels


def _largest(model: nn.Module, unused: set[str]) -> list[str]:
    """The largest modules all of whose parameters are unused."""
    names: list[str] = []
    for name, module in model.named_modules():
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
        if name and own and unused.issuperset(own) and not any(name.startswith(f"{n}.") for n in names):
            names.append(name)
    return names


@torch.no_grad()
def _is_spare(model: nn.Module, names: Iterable[str], images: Tensor) -> bool:
    """Whether a model computes the same without them; a weight may be read where no gradient passes."""
    without = copy.deepcopy(model)
    try:
        leave_out(without, names)
        same = torch.equal(without(images), model(images))
        without.train()(images)
    except Exception:  # whatever a forward pass does that misses something
        return False
    return same
