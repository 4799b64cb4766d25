"""What a run will take, before it is begun: seconds and disk within a factor of two, memory within a fifth.

tests/unit/test_memory.py compares memory with what steps of three models took on a GPU.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from stepwell.config.commands import CompressConfig
from stepwell.data.spec import InputSpec
from stepwell.losses.choose import memory_bytes
from stepwell.losses.observe import Observed
from stepwell.measure.size import num_params, shadow_of
from stepwell.pruning.skeleton import build_skeleton
from stepwell.training.recomputed import recomputed_blocks

EFFICIENCY = 0.4
"""Of what a large matrix product reaches, small layers reach about this share."""


@dataclass(frozen=True)
class Losses:
    """How many losses, each with a memory of its own, a path keeps at once, and how many a step computes.

    `last_map` is as `memory_bytes` has it; `states` are the blocks whose outputs are compared.
    """

    kept: int = 1
    in_a_step: int = 1
    last_map: tuple[int, int] = (0, 0)
    states: tuple[str, ...] = ()

    def of(self, teacher: nn.Module, states: tuple[str, ...]) -> Losses:
        """The same, for the maps of this teacher, and these blocks of the student."""
        here = replace(self, states=states)
        name = getattr(teacher, "last_layer", "")
        last = teacher.get_submodule(name) if name else nn.Identity()
        if isinstance(last, nn.ConvTranspose2d):
            return replace(here, last_map=(last.out_channels, last.in_channels))
        weights = list(last.parameters())
        kernels = [weight for weight in weights if weight.ndim == 4]  # several where it is taken apart
        if not kernels:
            return here
        return replace(here, last_map=(kernels[0].shape[0], sum(kernel.shape[1] for kernel in kernels)))


def seconds_of(macs: float, device: torch.device) -> float:
    """How long so many multiply-accumulates take on `device`."""
    return macs / (EFFICIENCY * macs_per_second(device))


@dataclass(frozen=True)
class Footprint:
    """What a training takes besides time, in bytes.

    Attributes:
        memory: Weights, gradients, moments, what autograd keeps for the way back, memories of losses.
        kept: The trained weights, on disk.
        passing: Two checkpoints, of which one is being written; gone when it is finished.
    """

    memory: float
    kept: float
    passing: float


def footprint(
    config: CompressConfig,
    num_frozen: float,
    trained: nn.Module,
    spec: InputSpec,
    batch_size: int,
    num_train: int,
    losses: Losses,
    devices: int = 1,
) -> Footprint:
    """What the training of a model takes on one device, counted on shapes.

    Args:
        config: Loss, whether weights are averaged, and whether blocks are computed again.
        num_frozen: Parameters of its teachers, and of what else lies there.
        trained: The model; of several in one store of weights the largest, which has them all.
        spec: Input of both.
        batch_size: Images of a step on one device.
        num_train: Training images.
        losses: How many there are.
        devices: How many have a part of the batch, and of the optimizer's state if that is asked for.
    """
    store, averages = num_params(trained), 1 if config.ema else 0
    # What relates images or remembers them is computed of the whole batch on each device.
    banks, read = memory_bytes(config, num_train, batch_size * devices, losses.last_map)
    activations = activation_bytes(
        trained,
        spec,
        batch_size * config.views,
        config.precision,
        recomputed=config.gradient_checkpointing,
        states=losses.states,
    )
    # Of every trained parameter: weight, gradient, the average, and of a part, or of all, two moments.
    moments = 8 / (devices if config.shard_optimizer else 1)
    weights = 4 * num_frozen + (8 + 4 * averages + moments) * store
    return Footprint(
        memory=weights + activations + losses.kept * banks + losses.in_a_step * read,
        kept=4 * store,
        passing=2 * ((12 + 4 * averages) * store + losses.kept * banks),
    )


def num_answering(config: CompressConfig, teacher: nn.Module, devices: int = 1) -> float:
    """Parameters of a frozen teacher that lie on each device while it answers.

    Args:
        config: Whether it lies in parts.
        teacher: Whole.
        devices: How many have a part each.
    """
    whole = num_params(teacher)
    if not config.shard_teacher or devices == 1:
        return whole
    blocks = [num_params(block) for block in recomputed_blocks(teacher).values()]
    # What lies beside the blocks is gathered for all of a pass; a block runs while the next one comes.
    return whole / devices + max(0, whole - sum(blocks)) + 2 * max(blocks, default=0)


def memory_and_disk(
    config: CompressConfig,
    model: nn.Module,
    skeletons: Sequence[nn.Module],
    spec: InputSpec,
    num_train: int,
    losses: Losses,
) -> tuple[float, float]:
    """Bytes of memory while training, and of disk.

    Args:
        config: Batch size, loss.
        model: The teacher.
        skeletons: Of the candidates, the largest last.
        spec: Input of the teacher.
        num_train: Training images.
        losses: Of the path, with the blocks that are compared.
    """
    frozen = num_params(model)
    found = footprint(config, frozen, skeletons[-1], spec, config.batch_size, num_train, losses)
    # The store and the students, and while it trains the checkpoints.
    return found.memory, found.kept + 16 * num_params(skeletons[0]) + found.passing


def macs_per_second(device: torch.device) -> float:
    """What a matrix product of moderate size reaches on `device`."""
    size = 1024
    a = torch.randn(size, size, device=device)
    product, seconds = a, 0.0
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        for _ in range(4):
            product = a @ a
        product[0, 0].item()  # waits for the device
        seconds = time.perf_counter() - start
    return 4 * size**3 / seconds


def activation_bytes(
    model: nn.Module,
    spec: InputSpec,
    batch_size: int,
    precision: str,
    *,
    recomputed: bool = False,
    states: Sequence[str] = (),
) -> int:
    """Bytes that lie there between forward and backward, counted on tensors that have shapes and no values.

    A forward pass that wants values runs on the CPU, on two images. Which operations compute in half of the
    bytes is what torch's autocast says of a CPU.

    Args:
        model: What is trained.
        spec: Its input.
        batch_size: Images.
        precision: Number format of the forward pass.
        recomputed: Whether of each block the input alone is kept, and the rest of one block at a time.
        states: Blocks whose outputs are compared with a teacher's, which are taken to be as large. Both are
            compared in fp32.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    counted = partial(_bytes_of_pass, dtype=dtype, recomputed=recomputed, states=states)
    try:
        skeleton = build_skeleton(model, [], {})
        with FakeTensorMode(allow_non_fake_inputs=True):
            return counted(skeleton, _images(batch_size, spec))
    except Exception:  # whatever it raises where it finds no values
        return counted(shadow_of(model, "cpu"), _images(2, spec)) * batch_size // 2


def _images(number: int, spec: InputSpec) -> Tensor:
    return torch.zeros(number, spec.channels, *spec.size)


class _Kept:
    """Bytes of memory behind tensors, each counted once."""

    def __init__(self) -> None:
        self._found: dict[int, int] = {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._found[storage._cdata] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self._found.values())

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)


def _bytes_of_pass(
    model: nn.Module,
    images: Tensor,
    dtype: torch.dtype | None,
    recomputed: bool,
    states: Sequence[str],
) -> int:
    kept, of_blocks = _Kept(), [0]
    if recomputed:
        for block in recomputed_blocks(model).values():
            block.forward = _counted_apart(block.forward, kept, of_blocks)
    known = dict(model.named_modules())
    observed = Observed(model.train(), [block for block in states if block in known])
    values = {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype).requires_grad_(isinstance(tensor, nn.Parameter))
        for name, tensor in itertools.chain(observed.named_parameters(), observed.named_buffers())
    }
    with kept.hooks(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = functional_call(observed, values, (images,))
    compared = output.in_full_precision().states
    of_teacher = sum(state.nbytes for state in compared)
    for state in compared:
        kept.add(state)
    return kept.total + max(of_blocks) + of_teacher


def _counted_apart(forward: Callable[..., Any], kept: _Kept, of_blocks: list[int]) -> Callable[..., Any]:
    """A block's forward pass, of which `kept` gets the input alone; the rest is added to `of_blocks`."""

    def run(*args: Any, **options: Any) -> Any:  # noqa: ANN401
        for value in tree_leaves((args, options)):
            if isinstance(value, Tensor):
                kept.add(value)
        own = _Kept()
        with own.hooks():
            output = forward(*args, **options)
        of_blocks.append(own.total)
        return output

    return run
