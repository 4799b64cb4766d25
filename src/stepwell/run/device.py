"""Which device a run computes on, and with how many threads."""

from __future__ import annotations

import torch

from stepwell.config.options import TrainingOptions
from stepwell.errors import ConfigError


def set_up_torch(options: TrainingOptions) -> torch.device:
    """Seed torch, give it its threads, and return the device of a run."""
    torch.manual_seed(options.seed)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return find_device(options.device)


def find_device(name: str) -> torch.device:
    """`auto` is the CUDA GPU if there is one; mps has no double precision, and is taken only by name.

    Raises:
        ConfigError: torch cannot use the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # `meta` can be named, but not computed on
        return probe.device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here: {reason}; try --device cpu") from None


def autocast_of(options: TrainingOptions, device: torch.device) -> torch.autocast:
    """The number format of forward passes in training; weights stay fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.precision == "bf16")
