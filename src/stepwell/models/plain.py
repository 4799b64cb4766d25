"""Modules whose weights are no parameters that could be copied, cut and trained: refused with the way out."""

from __future__ import annotations

from torch import Tensor, nn

from stepwell.errors import ModelError

_FOLD = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(layer)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(layer)",
}
"""What makes a plain parameter of a weight that a hook computes, by the class of the hook; others are the
masks of `torch.nn.utils.prune`."""


def check_plain(model: nn.Module, name: str) -> None:
    """Check that every layer of a user's own module holds its weights as plain parameters.

    Raises:
        ModelError: A layer is quantised; or one of torch's older hooks computes its weight in every pass.
            (Their successors, `torch.nn.utils.parametrizations`, are no trouble.)
    """
    for layer, module in model.named_modules():
        if ".quantized" in type(module).__module__:
            raise ModelError(
                f"{name} cannot be trained: {layer} is a quantised {type(module).__name__}; give the model "
                f"as it was before it was quantised"
            )
        computed = next((key for key, value in vars(module).items() if isinstance(value, Tensor)), None)
        if computed is not None and hasattr(module, f"{computed}_orig") | hasattr(module, f"{computed}_g"):
            hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
            fold = next((_FOLD[hook] for hook in hooks if hook in _FOLD), None)
            raise ModelError(
                f"{name} cannot be cut: {layer}.{computed} is computed from other parameters in every pass; "
                f"make it a parameter first, with "
                f"{fold or f'torch.nn.utils.prune.remove(layer, {computed!r})'}"
            )
