"""Every way in which the tensors of a file can be read as a model's weights.

Training scripts wrap weights: in dictionaries (`state_dict`, `model`), in modules (`module.`, `_orig_mod.`,
`backbone.`), beside averaged ones (`state_dict_ema`), beside another model (`teacher`, `student`). No list of
such names could be complete. So every state dict in the file is tried, under every prefix after which its
names are the model's. What fits the model in every name and shape is a way; fitting.py chooses.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stepwell.models.weights import Checkpoint, StateDict

# What torch.compile, FSDP and activation checkpointing put into names.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# BatchNorm's counter, from which nothing is computed, and what thop adds to a model that it counts.
_IDLE = re.compile(r"(^|\.)(num_batches_tracked|total_ops|total_params)$")
AVERAGED = re.compile(r"(^|_)(ema|swa|averaged?|polyak)(_|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Fit:
    """One way to read a model's weights in a file.

    Attributes:
        label: Where they lie: keys and prefix, joined by dots; empty for all of the file.
        tensors: By the model's names.
        fresh: Tensors of the model's classifier that are not there, or are for another number of classes.
        resampled: Tensors that timm has resampled, for images or patches of another size.
        is_converted: Whether timm has translated the names.
        choice: Why this one was taken, where several fit as well; in words.
    """

    label: str
    tensors: Mapping[str, Tensor]
    fresh: tuple[str, ...] = ()
    resampled: tuple[str, ...] = ()
    is_converted: bool = False
    choice: str = ""

    @property
    def parts(self) -> list[str]:
        """The words of its label."""
        return self.label.split(".")

    @property
    def rank(self) -> tuple[bool, bool, bool]:
        """The smaller, the nearer to what the file holds."""
        return bool(self.resampled), bool(self.fresh), self.is_converted

    @property
    def is_averaged(self) -> bool:
        """Whether its label says that it is an average over the training."""
        return any(map(AVERAGED.search, self.parts))


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the tensors that turn features into classes: as timm or transformers call them, else those of
    the last layer."""
    record = getattr(model, "pretrained_cfg", None)
    given = record.get("classifier") if isinstance(record, Mapping) else None
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    if given is None:
        known = ("model.classifier", "model.cls_classifier", "model.distillation_classifier")
        given = [name for name in layers if name in known] or list(layers)[-1:]
    names = [given] if isinstance(given, str) else given
    return tuple(n for n in model.state_dict() if n.rpartition(".")[0] in names)


def all_fits(checkpoint: Checkpoint, model: nn.Module) -> Iterator[Fit]:
    """Every way in which something in the file fits, its classifier apart."""
    wanted, head = model.state_dict(), classifier_names(model)
    for found in checkpoint.state_dicts:
        for label, tensors in readings(found, wanted):
            fit = _fit(label, tensors, wanted, head) or _converted(label, tensors, model, head)
            if fit is not None:
                yield fit


def readings(found: StateDict, wanted: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """A state dict without each of the prefixes that may stand before the model's names; best first.

    The other way round as well: where all names of the model begin with the same word (a module of the user's
    own around a model), the file may lack it.
    """
    if 2 * len(found.tensors) < len(wanted):  # an optimizer has a dictionary for every parameter
        return
    names = {_WRAPPERS.sub("", name): name for name in wanted}
    clean = {_WRAPPERS.sub("", name): name for name in found.tensors}
    if len(clean) < len(found.tensors):  # the same tensor with and without its wrapper
        clean = {name: name for name in found.tensors}
    first = {name.partition(".")[0] + "." for name in names}
    for root in ("", *(first if len(first) == 1 else ())):
        short = {name.removeprefix(root): full for name, full in names.items()}
        votes = Counter(prefix for name in clean for prefix in _prefixes(name, short))
        best = votes.most_common(16)
        likely = [prefix for prefix, count in best if 2 * count >= len(wanted)]
        for prefix in likely or dict.fromkeys(["", *(prefix for prefix, _ in best[:1])]):
            inner = {
                name.removeprefix(prefix): full for name, full in clean.items() if name.startswith(prefix)
            }
            # The prefix as it stands in the file, wrappers and all.
            before = next((full.removesuffix(n) for n, full in inner.items() if full.endswith(n)), prefix)
            label = ".".join([*found.path, before.strip(".")]).strip(".")
            yield label, {short.get(n, root + n): found.tensors[full] for n, full in inner.items()}


def _prefixes(name: str, known: Mapping[str, str]) -> Iterator[str]:
    """What stands in `name` before a name that is known: `module.fc.bias` -> `module.`"""
    parts = name.split(".")
    for i in range(len(parts)):
        if ".".join(parts[i:]) in known:
            yield "".join(f"{part}." for part in parts[:i])


def _fit(
    label: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], head: Sequence[str]
) -> Fit | None:
    """`tensors` as the model's weights, if nothing is missing or left over outside of the classifier."""
    if any(name not in wanted and not _IDLE.search(name) for name in tensors):
        return None
    fresh = False
    for name, own in wanted.items():
        tensor = tensors.get(name)
        if tensor is None and _IDLE.search(name):
            continue
        if tensor is not None and tensor.shape == own.shape and same_kind(tensor, own):
            continue
        # Of another number of classes, all but the first edge is the same.
        if name not in head or (tensor is not None and tensor.shape[1:] != own.shape[1:]):
            return None
        fresh = True
    taken = {name: tensor for name, tensor in tensors.items() if name in wanted}
    return Fit(label, taken, tuple(head) if fresh else ())


def _converted(
    label: str, tensors: Mapping[str, Tensor], model: nn.Module, head: Sequence[str]
) -> Fit | None:
    """What timm itself makes of weights in the names of a model's authors, or for images of another size."""
    module = sys.modules.get(type(model).__module__)
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None or not type(model).__module__.startswith("timm."):
        return None
    made: object = None
    # Of weights that it does not know it may make anything.
    with contextlib.suppress(Exception), torch.no_grad():
        made = convert(dict(tensors), model)
    if not isinstance(made, dict) or not all(isinstance(value, Tensor) for value in made.values()):
        return None
    fit = _fit(label, made, model.state_dict(), head)
    if fit is None:
        return None
    sizes = {name: tensors[name].numel() for name in made.keys() & tensors.keys()}
    resampled = tuple(name for name in made if name in sizes and sizes[name] != made[name].numel())
    return replace(fit, resampled=resampled, is_converted=not made.keys() <= tensors.keys())


def same_kind(one: Tensor, other: Tensor) -> bool:
    """Whether one can be cast to the other's number format without another meaning."""
    return (one.is_floating_point(), one.is_complex()) == (other.is_floating_point(), other.is_complex())
