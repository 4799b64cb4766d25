"""A module that a user hands over, made into what the rest of the package calls: images in, logits out.

What is wrapped around it for training (`DataParallel`, `torch.compile`, an average of weights, LoRA that is
merged) is taken off, weights in half or double precision become fp32, norms and masks of weights that are
computed anew in each pass are folded in. Names of tensors stay the user's own, and the same is done when the
student is loaded again. What cannot be trained or copied is refused.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any, cast

import torch
from timm.utils.model_ema import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

from stepwell.data.images import one_line
from stepwell.errors import ModelError
from stepwell.models import huggingface, segmenters
from stepwell.models.own_module_hooks import add_hooks, tensors_in
from stepwell.run.progress import say

_AROUND = (nn.DataParallel, DistributedDataParallel, AveragedModel, ModelEmaV2, ModelEmaV3)
"""Hold the model as `module`."""
_LIBRARIES = ("torchvision.", "transformers.")
"""Their models do without an auxiliary head that is None."""
_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


def taken(module: nn.Module, name: str) -> nn.Module:
    """A copy of the caller's module, made plain; the caller's own is never changed.

    Args:
        module: In memory.
        name: For what is said.

    Raises:
        ModelError: It cannot be copied, or is of a kind that cannot be trained.
    """
    return _plain(copied(module), name, _taken_out_of(module), quiet=False)


def copied(module: nn.Module) -> nn.Module:
    """A copy on the CPU, without what is wrapped around the module.

    Raises:
        ModelError: As in `taken`.
    """
    name = f"a {type(module).__name__}"
    inner = unwrapped(module)
    _check_kind(inner, name)
    way_out = "pass FILE.py:FACTORY, a function that builds it without what cannot be copied"
    return _copy(inner, {}, name, way_out).cpu()


def plain(module: nn.Module, name: str, *, quiet: bool = False) -> nn.Module:
    """The module itself, changed in place: unwrapped, in fp32, and returning logits alone.

    Args:
        module: One that nobody else uses.
        name: For what is said.
        quiet: Say nothing of what was done.

    Raises:
        ModelError: It is of a kind that cannot be trained.
    """
    return _plain(unwrapped(module), name, _taken_out_of(module), quiet=quiet)


def _plain(inner: nn.Module, name: str, notes: list[str], *, quiet: bool) -> nn.Module:
    _unwrap_inside(inner)
    _check_kind(inner, name)
    if type(inner).__module__.startswith(_LIBRARIES) and segmenters.without_auxiliary(inner):
        notes.append("its auxiliary head is left out")
    if folded := _fold(inner):
        notes.append(f"folded into the weights: {', '.join(folded)}")
    if dtypes := {str(p.dtype).removeprefix("torch.") for p in inner.parameters()} - {"float32"}:
        notes.append(f"{' and '.join(sorted(dtypes))} weights are taken in float32")
        inner.float()
    if _without_autocast(inner):
        notes.append("autocast is taken off its forward (--precision bf16 trains with it)")
    if notes and not quiet:
        say(f"{name}: {'; '.join(notes)}")
    inner._compiled_call_impl = None  # of `module.compile()`: it holds the forward pass of this one object
    # Weights are left out of this copy: it shows whether slices can be made.
    weights = {id(p): p for p in inner.parameters()}
    _copy(inner, weights, name, "keep what cannot be copied out of it")
    model = huggingface.wrapped(inner)
    if model is inner:
        add_hooks(inner)
    return model


def _taken_out_of(module: nn.Module) -> list[str]:
    return [] if unwrapped(module) is module else [f"taken out of its {type(module).__name__}"]


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside of what is put around it for training.

    Raises:
        ModelError: It holds adapters that are not merged into its weights.
    """
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    held = module._modules
    if isinstance(module, _AROUND):
        return held["module"]
    if "_orig_mod" in held:  # torch.compile
        return held["_orig_mod"]
    if not type(module).__module__.startswith("peft."):
        return None
    if getattr(module, "merged", False) and "base_layer" in held:
        return held["base_layer"]
    if any("lora_A" in layer._modules and not getattr(layer, "merged", True) for layer in module.modules()):
        raise ModelError(
            f"a {type(module).__name__} holds a LoRA that is not merged: pass model.merge_and_unload()"
        )
    base = held.get("base_model", module)
    inner = base._modules.get("model") if base is not None else None
    if inner is None:
        raise ModelError(f"a {type(module).__name__} of peft: pass model.merge_and_unload()")
    return inner


def _unwrap_inside(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and (inner := unwrapped(child)) is not child:
                parent._modules[name] = inner


def _check_kind(model: nn.Module, name: str) -> None:
    parameters = list(model.named_parameters())
    if not parameters:
        raise ModelError(f"{name} has no parameters: there is nothing in it to compress or to train")
    modules = list(model.modules())
    for part in modules:
        kind = f"{type(part).__module__}.{type(part).__name__}"
        if isinstance(part, torch.jit.ScriptModule):
            raise ModelError(f"{name} is a ScriptModule, which cannot be cut: pass the module it was made of")
        if kind.startswith(_QUANTISED):
            raise ModelError(
                f"{name} is quantised ({type(part).__name__}), which cannot be trained: pass the model "
                f"that it was made of, and quantise the student afterwards"
            )
        forward = vars(part).get("forward")
        moves_along = isinstance(forward, MethodType) and forward.__self__ in modules
        if forward is not None and not moves_along and _inside(part) is None:
            raise ModelError(
                f"{name}: forward of a {type(part).__name__} was replaced on the object, and a copy would "
                f"still compute with this one's weights: make it a method of a class"
            )
    for key, tensor in [*parameters, *model.named_buffers()]:
        if is_lazy(tensor):
            raise ModelError(f"{name} is not built yet: {key} has no shape before its first run; run it once")
        if tensor.is_meta:
            raise ModelError(f"{name} has no weights: {key} is on the meta device; load them first")
    for key, tensor in parameters:
        if not tensor.is_floating_point() or type(tensor.data) is not Tensor:
            what = f"{type(tensor.data).__name__} of {str(tensor.dtype).removeprefix('torch.')}"
            raise ModelError(
                f"{name} holds no plain weights ({key} is a {what}): pass it as it is before it is quantised "
                f"or sharded"
            )


def _copy(model: nn.Module, memo: dict[int, Any], name: str, way_out: str) -> nn.Module:
    """Deepcopy, which refuses tensors that know how they were computed: those that modules have kept of their
    last pass, and weights that a hook computes before each."""
    kept = [tensor for part in model.modules() for tensor in tensors_in(vars(part))]
    memo |= {id(tensor): tensor.detach().clone() for tensor in kept if not tensor.is_leaf}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever an object in it says against being copied
        raise ModelError(f"{name} cannot be copied ({one_line(error)[:160]}): {way_out}") from None


def _fold(model: nn.Module) -> list[str]:
    """Make plain parameters of those that are computed from others in each pass; returns by what."""
    folded: dict[str, None] = {}
    for part in list(model.modules()):
        if parametrize.is_parametrized(part):
            # Taking them off changes the class, which a copy shares with the module that it was made from.
            shared = type(part)
            own = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
            cast(Any, part).__class__ = type(shared.__name__, shared.__bases__, own)
            for name, chain in list(cast(nn.ModuleDict, part.parametrizations).items()):
                kinds = [type(step).__name__.strip("_") for step in cast(nn.ModuleList, chain)]
                folded |= dict.fromkeys(kinds)
                parametrize.remove_parametrizations(part, name)
                value = getattr(part, name)
                if not isinstance(value, nn.Parameter):
                    delattr(part, name)
                    part.register_parameter(name, nn.Parameter(value.detach()))
        for hook in list(part._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(part, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(part, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(part, cast(Any, hook)._tensor_name)
            else:
                continue
            folded |= {type(hook).__name__: None}
    return list(folded)


def _without_autocast(model: nn.Module) -> bool:
    """Take `@torch.autocast(...)` off every forward: no runtime of ONNX reads what it would become."""
    decorated = [
        part
        for part in model.modules()
        if "autocast" in getattr(type(part).forward, "__script_unsupported", "")
        and not isinstance(vars(part).get("forward"), MethodType)
    ]
    for part in decorated:
        part.forward = MethodType(cast(Any, type(part).forward).__wrapped__, part)
    return bool(decorated)
