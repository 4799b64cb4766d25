"""What happens around every call of a user's own module: images go in as its author gave them, logits
come out.

Hooks, no module around it: names of tensors stay the user's own, and `functional_call`, deepcopy and
torch.export take them along.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stepwell.tasks.outputs import picked

_LIBRARIES = ("timm.", "torchvision.")
"""Their models take images in any layout, and leave them as they are."""
_MANY = 1000
"""Such containers hold labels or the like: to look through them in each pass would take time."""
_OF_EVERY_MODULE = vars(nn.Module()).keys()


def add_hooks(model: nn.Module) -> None:
    """Put the hooks of this file on a module that does not have them yet."""
    if _only_logits in model._forward_hooks.values():
        return
    if not type(model).__module__.startswith(_LIBRARIES):
        model.register_forward_pre_hook(_with_channels_first)
    model.register_forward_hook(_only_logits)
    model.register_forward_hook(_without_graph)


def _with_channels_first(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook: a copy of the images, which may be changed in place, in memory as a user's own loader gives
    them. In the other layout, in which the models of libraries are faster, a `view` behind a convolution
    fails."""
    return (inputs[0].clone(memory_format=torch.contiguous_format), *inputs[1:]) if inputs else inputs


def _only_logits(_module: nn.Module, _images: object, output: object) -> Tensor | None:
    """A hook: what is returned instead of `output`; None leaves it as it is.

    `{"logits": ...}` or `{"out": ...}`, an object with `.logits`, a tuple with logits first;
    (batch, classes, 1, 1) of a convolution that classifies; half precision of an autocast inside.
    """
    logits = picked(output)
    if logits is None:
        return None
    if logits.ndim == 4 and logits.shape[2:] == (1, 1):
        logits = logits.flatten(1)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return None if logits is output else logits


def _without_graph(model: nn.Module, _images: object, output: object) -> None:
    """A hook: activations that modules keep of a pass in training are kept without what computed them, or no
    copy could be made of a model that has been trained."""
    if not isinstance(output, Tensor) or not output.requires_grad:
        return
    keeps = False
    for part in model.modules():
        # Not torch's: while a candidate runs, its parameters are computed from the store's.
        for name in vars(part).keys() - _OF_EVERY_MODULE:
            if any(not tensor.is_leaf for tensor in tensors_in(vars(part)[name])):
                vars(part)[name], keeps = _detached(vars(part)[name]), True
    if not keeps:  # nor will it: to look in each pass would take time
        hooks = model._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is _without_graph]:
            del hooks[key]


def _detached(value: Any) -> Any:  # noqa: ANN401  (whatever a module has kept)
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_detached(item) for item in value]
        return tuple(items) if type(value) is tuple else items
    return value


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in whatever a module has kept."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)) and len(value) < _MANY:
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)
