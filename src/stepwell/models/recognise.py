"""How a module can be built again: what it shows of itself is tried, and proved by equal outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers.helpers import to_2tuple
from torch import nn

from stepwell.data.spec import InputSpec
from stepwell.models import huggingface
from stepwell.models.card import Architecture, example_images


def recognise(
    model: nn.Module, spec: InputSpec, tries: Sequence[Mapping[str, Any]] = ()
) -> Architecture | None:
    """What builds `model` again with timm or transformers, if it can be found and proved.

    Args:
        model: In eval mode, on the CPU.
        spec: The images that it takes.
        tries: Arguments of timm's create_model that may be its own; they are tried first.
    """
    if (found := huggingface.recipe(model)) is not None:
        return Architecture(source="transformers", name=found[0], args=found[1])
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if name is None or not timm.is_model(name) or not hasattr(model, "num_classes"):
        return None
    common: dict[str, Any] = {"num_classes": model.num_classes, "in_chans": spec.channels}
    size = spec.size[0] if spec.size[0] == spec.size[1] else spec.size
    guesses = [*({**args, **more} for args in tries for more in ({}, {"img_size": size}))]
    guesses += [common, {**common, "img_size": size}]
    blocks, embed = getattr(model, "blocks", None), getattr(model, "patch_embed", None)
    if blocks is not None and embed is not None and hasattr(getattr(blocks[0], "attn", None), "num_heads"):
        patch_size = to_2tuple(embed.patch_size)[0]
        vit = {"patch_size": patch_size, "embed_dim": model.embed_dim, "depth": len(blocks)}
        guesses.append({**common, "img_size": size, **vit, "num_heads": blocks[0].attn.num_heads})
    images = example_images(spec)
    for args in guesses:
        try:
            twin = timm.create_model(name, pretrained=False, **args)
            twin.load_state_dict(model.state_dict())
            with torch.no_grad():
                same = torch.equal(twin.eval()(images), model(images))
        except (TypeError, RuntimeError, AssertionError):
            continue
        if same:
            return Architecture(source="timm", name=name, args=dict(args))
    return None
