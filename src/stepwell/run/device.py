"""Which device a run computes on, and with how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stepwell.config.options import TrainingOptions
from stepwell.errors import ConfigError
from stepwell.run.processes import check_precision, local_rank, world


def set_up_torch(options: TrainingOptions) -> torch.device:
    """Seed torch, give it its threads, and return the device of a run.

    Raises:
        ConfigError: torch cannot use the device, or a launcher asks for another number format.
    """
    check_precision(options.precision)
    torch.manual_seed(options.seed)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = find_device(options.device)
    if options.compile:
        from stepwell.run.graphs import check_compiler  # late, as the compiler: most runs have no need of it

        check_compiler(device)
    return device


def find_device(name: str) -> torch.device:
    """`auto` is the CUDA GPU if there is one; mps has no double precision, and is taken only by name.

    Of several processes on a machine each has a GPU of its own.

    Raises:
        ConfigError: torch cannot use the device, or several processes would share it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world() > 1 and name != "cpu":
        name = _one_of_several(name)
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # `meta` can be named, but not computed on
        return probe.device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here: {reason}; try --device cpu") from None


def _one_of_several(name: str) -> str:
    num_gpus = torch.cuda.device_count()
    if name != "cuda":
        raise ConfigError(
            f"--device {name} is a single one, and there are {world()} processes: cuda gives each its own"
        )
    if local_rank() >= num_gpus:
        raise ConfigError(
            f"there are more processes than GPUs here, of which there are {num_gpus}: start as many "
            f"processes, or pass --device cpu"
        )
    torch.cuda.set_device(local_rank())
    return f"cuda:{local_rank()}"


def autocast_of(options: TrainingOptions, device: torch.device) -> torch.autocast:
    """The number format of forward passes in training; weights stay fp32."""
    dtype = torch.float16 if options.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=options.precision in ("bf16", "fp16"))


@contextmanager
def tf32_of(options: TrainingOptions, device: torch.device) -> Iterator[None]:
    """While it is open, a GPU may round what it multiplies to TF32, if training is asked to.

    Both passes need it, so all of a training lies inside. What is proved of cuts and the figures of finished
    models lie outside.
    """
    before = torch.get_float32_matmul_precision()
    if options.precision == "tf32" and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def scaler_of(options: TrainingOptions, device: torch.device) -> torch.amp.GradScaler:
    """What keeps gradients within the range of fp16; with other formats it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
