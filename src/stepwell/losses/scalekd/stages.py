"""Where the last two stages of a model end, and how their states lie: read from the model, for any of timm.

In a pyramid (ResNet, Swin, ConvNeXt, EfficientNet, ...) stage 3 ends with the last state of a larger grid
than the deepest one has. In a model of one grid (ViT, Mixer, ...) stage 4 is the last two blocks, as in Swin,
which are the authors' too in a ViT of 24 blocks; of fewer than 12 blocks it is the last one. Stage 4 ends
with the norm that follows the last block at all positions, if there is one: what the teacher's head reads is
what the student is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stepwell.config.options import LossOptions
from stepwell.data.folders import join
from stepwell.errors import ConfigError
from stepwell.losses.observe import tensor_of
from stepwell.run.progress import say

_MOST_PREFIX = 16
"""Class tokens and registers: 5 in DINOv2, 1 + 8 elsewhere; a grid that leaves more of a state is not its."""
_BLOCKS_OF_STAGE_4, _BLOCKS_FOR_TWO = 2, 12
_HEAD = 32
"""Channels of an attention head where the model has none: Swin's."""


@dataclass(frozen=True)
class Layout:
    """How a state lies.

    Attributes:
        kind: tokens (B, prefix + height * width, C), a map (B, C, height, width), or the same with the
            channels last (B, height, width, C).
        channels: C.
        height: Of the grid, in positions.
        width: Of the grid, in positions.
        num_prefix: Class tokens and registers before the positions.
    """

    kind: Literal["tokens", "map", "channels-last"]
    channels: int
    height: int
    width: int
    num_prefix: int = 0

    @property
    def num_positions(self) -> int:
        """Of the grid."""
        return self.height * self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.channels, self.height, self.width

    def as_tokens(self, state: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch positions channels"]:
        """The state's positions in rows, without class tokens and registers."""
        if self.kind == "tokens":
            return state[:, self.num_prefix :]
        return (state if self.kind == "channels-last" else state.permute(0, 2, 3, 1)).flatten(1, 2)

    def as_map(self, state: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch channels height width"]:
        """The state as a map."""
        return self.as_tokens(state).transpose(1, 2).unflatten(2, (self.height, self.width))

    def as_state(
        self, tokens: Float[Tensor, "batch positions channels"], state: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, "batch ..."]:
        """`tokens` laid out as the model's own state; class tokens and registers are those of `state`."""
        if self.kind == "tokens":
            return torch.cat([state[:, : self.num_prefix], tokens], dim=1)
        grid = tokens.unflatten(1, (self.height, self.width))
        return grid if self.kind == "channels-last" else grid.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Stage:
    """The end of a stage.

    Attributes:
        block: The module that returns its state.
        layout: How the state lies.
        num_heads: Of its attention, or what a model of its width would have; divides the channels.
    """

    block: str
    layout: Layout
    num_heads: int


@dataclass(frozen=True)
class Stages:
    """The last two stages of a model: the authors' third and fourth."""

    third: Stage
    fourth: Stage

    @property
    def blocks(self) -> tuple[str, str]:
        """The modules to observe."""
        return self.third.block, self.fourth.block


def find_stages(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    blocks: Sequence[str] = (),
) -> Stages | None:
    """The last two stages of `model`; None if nothing in it is known that has states.

    Args:
        model: In eval mode, on any device, `meta` among them.
        images: An example of its input.
        blocks: Its blocks, for models that do not name them in timm's `feature_info`.
    """
    named = [name for name in _named_by_timm(model) if _has(model, name)] or list(blocks)
    order = _order_of(model, images[:1])
    shapes = {name: shape for name, shape in order if name in named and len(shape) in (3, 4)}
    ends = list(shapes)  # in the order in which they run, which names need not have
    if not ends:
        return None
    layouts = dict(zip(ends, layouts_of(model, [shapes[n] for n in ends], images.shape[2:]), strict=True))
    last = layouts[ends[-1]]
    larger = [name for name in ends if layouts[name].num_positions > last.num_positions]
    if larger:
        third = larger[-1]
    else:
        behind = _BLOCKS_OF_STAGE_4 if len(ends) >= _BLOCKS_FOR_TWO else 1
        third = ends[max(0, len(ends) - 1 - behind)]
    fourth = _norm_behind(model, ends[-1], order) or ends[-1]
    return Stages(
        Stage(third, layouts[third], _num_heads(model, third, layouts[third].channels)),
        Stage(fourth, last, _num_heads(model, ends[-1], last.channels)),
    )


def why_no_stages(model: nn.Module, blocks: Sequence[str] = ()) -> str:
    """Why `find_stages` knows none in `model`, in words: which stages are missing."""
    named = _named_by_timm(model)
    if there := [name for name in named if _has(model, name)] or list(blocks):
        return f"none of its stages ({join(there)}) returns one map, or one row of tokens"
    missing = f"its stages ({join(named)}) are not there by these names, and " if named else ""
    return f"{missing}it has no blocks that are known"


def warn_of_class_token(student: nn.Module, name: str, options: LossOptions) -> None:
    """Say it where a ViT as student answers by its class token, and a loss that reads stages does not."""
    reads_stages = options.feature_weight and options.feature_facts.reads_stages
    if reads_stages and getattr(student, "global_pool", "") == "token":
        say(
            f"warning: --student {name} answers by its class token, and what is compared are its positions: "
            f"--student-args class_token=False global_pool=avg makes it answer by their mean, as published"
        )


def no_stages(feature_loss: str, name: str, model: nn.Module, blocks: Sequence[str]) -> ConfigError:
    """To be raised where a loss reads stages, and `find_stages` knows none of `model`, called `name`."""
    why = why_no_stages(model, blocks)
    return ConfigError(
        f"--feature-loss {feature_loss}: the stages of {name} cannot be told: {why}; take "
        f"--feature-weight 0, or another model"
    )


def layouts_of(
    model: nn.Module, shapes: Sequence[Sequence[int]], image_size: Sequence[int]
) -> Iterator[Layout]:
    """How states of these shapes lie, of images of `image_size`."""
    said = getattr(model, "output_fmt", None)
    # Height and width are the two sides that are to each other as the image's; tiny maps may fit both ways.
    last = str(said) in ("NHWC", "Format.NHWC") or any(
        _fit(s[1], s[2], image_size) and not _fit(s[2], s[3], image_size) for s in shapes if len(s) == 4
    )
    for shape in shapes:
        if len(shape) == 3:
            height, width = _grid(shape[1], image_size, getattr(model, "num_prefix_tokens", None))
            yield Layout("tokens", shape[2], height, width, shape[1] - height * width)
        elif last:
            yield Layout("channels-last", shape[3], shape[1], shape[2])
        else:
            yield Layout("map", *shape[1:])


def _fit(height: int, width: int, image_size: Sequence[int]) -> bool:
    """Whether a map of these sides may be one of the image: divided by one stride, rounded alike."""
    return abs(height * image_size[1] - width * image_size[0]) < max(image_size)


def _grid(num_tokens: int, image_size: Sequence[int], num_prefix: int | None) -> tuple[int, int]:
    """Height and width of the grid that leaves the model's prefix tokens, else as few tokens as can be."""
    height, width = image_size
    grids = {
        (half(height / patch), half(width / patch))
        for patch in range(1, max(height, width) + 1)
        for half in (math.floor, math.ceil)
    }
    left = {grid: num_tokens - grid[0] * grid[1] for grid in grids if grid[0] * grid[1]}
    exact = [grid for grid, rest in left.items() if rest == num_prefix]
    if exact:
        return max(exact)
    fitting = {grid: rest for grid, rest in left.items() if 0 <= rest <= _MOST_PREFIX}
    return min(fitting, key=lambda grid: (fitting[grid], grid)) if fitting else (1, num_tokens)


def _named_by_timm(model: nn.Module) -> list[str]:
    info: Any = getattr(model, "feature_info", None)
    entries = info if isinstance(info, list) else getattr(info, "info", None)
    return list(dict.fromkeys(e["module"] for e in entries or [] if isinstance(e, dict) and "module" in e))


def _has(model: nn.Module, name: str) -> bool:
    return any(name == other for other, _ in model.named_modules())


def _order_of(
    model: nn.Module, images: Float[Tensor, "one channels height width"]
) -> list[tuple[str, tuple[int, ...]]]:
    """The modules in the order in which they end, with the shapes of what they return."""
    ended: list[tuple[str, tuple[int, ...]]] = []

    def note(name: str) -> Any:  # noqa: ANN401  (a hook)
        def hook(_module: nn.Module, _inputs: object, output: Any) -> None:  # noqa: ANN401
            tensor = tensor_of(output) if isinstance(output, (Tensor, tuple)) else None
            ended.append((name, tuple(tensor.shape) if isinstance(tensor, Tensor) else ()))

        return hook

    with torch.no_grad(), ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(note(name)).remove)
        model(images)
    return ended


def _norm_behind(model: nn.Module, block: str, order: list[tuple[str, tuple[int, ...]]]) -> str | None:
    """The norm that is the first thing to happen to what `block` returns, at all its positions."""
    names = [name for name, _ in order]
    place = len(names) - 1 - names[::-1].index(block)
    for name, shape in order[place + 1 :]:
        module = model.get_submodule(name)
        if f"{block}.".startswith(f"{name}.") or isinstance(module, (nn.Identity, nn.Dropout)):
            continue  # what is around the block ends behind it
        is_norm = "norm" in type(module).__name__.lower() and names.count(name) == 1
        return name if is_norm and shape == order[place][1] else None
    return None


def _num_heads(model: nn.Module, block: str, channels: int) -> int:
    """The heads of the last attention in `block`, if they divide its width; else one for each 32 channels."""
    heads = [getattr(module, "num_heads", None) for module in model.get_submodule(block).modules()]
    own = [number for number in heads if isinstance(number, int) and number and channels % number == 0]
    return own[-1] if own else math.gcd(channels, max(1, channels // _HEAD))
