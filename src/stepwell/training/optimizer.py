"""Which parameters decay, the optimizer, and the course of its learning rate: one rule for all trainings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from timm.optim import param_groups_layer_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.poly_lr import PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from stepwell.config.options import TrainingOptions
from stepwell.errors import ConfigError
from stepwell.run.processes import world

POSITIONS = re.compile(
    r"(^|[._])(rel(ative)?_pos|abs(olute)?_pos|pos(ition(al)?)?_?(emb|enc|bias|table))"
    r"|(^|[._])(class|cls|dist(illation)?|mask|reg(ister)?)_(token|embedding)s?$"
    r"|logit_scale|temperature|cpb_mlp|meta_mlp|continuous_position_bias"
)
"""What tables of positions, tokens, learned temperatures, and networks that compute position biases are
called; not every library says so itself."""


def no_decay_of(model: nn.Module) -> frozenset[str]:
    """Norms, biases, scales, tables of positions, tokens, and what a model excepts (`no_weight_decay`)."""
    plain = {name for name, parameter in model.named_parameters() if _is_plain(name, parameter)}
    for prefix, module in model.named_modules():
        excepted = getattr(module, "no_weight_decay", None)
        if callable(excepted):
            plain |= {f"{prefix}.{name}".lstrip(".") for name in cast(Iterable[str], excepted())}
    return frozenset(plain)


def _is_plain(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is no matrix by which a layer multiplies."""
    # Beside layers, what has a dimension of 1 is one vector, or one for each position: (1, tokens, width).
    is_beside = "weight" not in name.rpartition(".")[2] and 1 in parameter.shape
    return parameter.ndim <= 1 or is_beside or POSITIONS.search(name) is not None


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Learning rate of each parameter as a multiple of that of the last layer's: decay^(layers after it).

    Bao et al., BEiT, ICLR 2022 (and Clark et al., ELECTRA, ICLR 2020); timm knows the layers of its models.

    Args:
        model: The model that is trained.
        decay: In (0, 1]; 1 gives no scales.

    Raises:
        ConfigError: The model does not say what its layers are.
    """
    if decay == 1:
        return {}
    name = type(model).__name__
    if not hasattr(model, "group_matcher"):
        raise ConfigError(
            f"--layer-decay {decay:g}: this {name} does not say in which order its layers follow each other "
            f"(timm's group_matcher); leave it out"
        )
    groups = param_groups_layer_decay(model, layer_decay=decay)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    if len(set(scales.values())) == 1:
        raise ConfigError(f"--layer-decay {decay:g}: this {name} is a single layer to timm; leave it out")
    return {name: scales[id(parameter)] for name, parameter in model.named_parameters()}


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    lr: float,
    options: TrainingOptions,
    no_decay: frozenset[str],
    lr_scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer that decays weight matrices only: no norms, biases, or names in `no_decay`.

    An increment of the shared store (`blocks.0.mlp.fc1.weight+3`) is treated as the parameter it belongs to.
    The schedulers of timm multiply the learning rate of a group by its `lr_scale`.
    """
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        base = name.split("+")[0]
        is_vector = parameter.ndim <= 1 or base.endswith(".bias") or base in no_decay
        found.setdefault((is_vector, (lr_scales or {}).get(name, 1.0)), []).append(parameter)
    groups = [
        {"params": found[key], "weight_decay": 0.0 if key[0] else options.weight_decay, "lr_scale": key[1]}
        for key in sorted(found)  # the same order in a training that resumes, by which the state is kept
    ]
    kind: type[torch.optim.Optimizer]
    more: dict[str, Any]
    match options.optimizer:
        case "adamw":
            kind, more = torch.optim.AdamW, {"fused": True}
        case "sgd":
            kind, more = torch.optim.SGD, {"momentum": 0.9, "nesterov": True}
    if is_sharded(options):
        from stepwell.run.sharded import Sharded  # late: a plain run has no need of it

        return Sharded(kind, groups, lr=lr, **more)
    return kind(groups, lr=lr, **more)


def is_sharded(options: TrainingOptions) -> bool:
    """Whether each of several processes holds a part of the optimizer's state."""
    return options.shard_optimizer and world() > 1


def give_own_memory(parameters: Iterable[nn.Parameter]) -> None:
    """A sharded optimizer makes parameters views of one tensor, and exporters look at what shares memory."""
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def make_scheduler(optimizer: torch.optim.Optimizer, num_steps: int, options: TrainingOptions) -> Scheduler:
    """Linear warm-up, then a cosine, a line, or four cosines in a row, down to 0 at the last step.

    Step n of a warm-up of w has (n + 1) / (w + 1) of the peak: none is wasted on a rate of 0.
    """
    warmup = int(options.warmup * num_steps)
    rest = max(2, num_steps - warmup)  # of one, which has the peak, timm says that it has no effect
    common = {
        "warmup_t": warmup,
        "warmup_lr_init": optimizer.param_groups[0]["lr"] / (warmup + 1),
        "warmup_prefix": True,
        "t_in_epochs": False,
        "initialize": True,
    }
    match options.schedule:
        case "cosine":
            return CosineLRScheduler(optimizer, t_initial=rest, **common)
        case "linear":
            return PolyLRScheduler(optimizer, t_initial=rest, power=1.0, **common)
        case "cosine-restarts":
            cycles = 4
            length = max(2, math.ceil(rest / cycles))
            return CosineLRScheduler(optimizer, t_initial=length, cycle_limit=cycles, **common)
