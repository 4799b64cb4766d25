"""Where a teacher lies: on the device of the run; or whole on the CPU, to be cut, and in parts, to answer."""

from __future__ import annotations

from dataclasses import replace

import torch

from stepwell.config.shard_options import ShardOptions
from stepwell.data.images import one_line
from stepwell.errors import ConfigError, StepwellError
from stepwell.measure.size import num_params
from stepwell.models.card import example_images
from stepwell.models.teacher import Teacher
from stepwell.run.processes import world
from stepwell.run.progress import say
from stepwell.run.sharded_model import guard, in_parts, num_held
from stepwell.training.recomputed import recomputed_blocks

CPU = torch.device("cpu")
_CLOSE = 1e-2
"""Of the largest logit: a GPU rounds otherwise than a CPU, and a mistake is far larger."""


def whole_on(options: ShardOptions, device: torch.device) -> torch.device:
    """Where the whole teacher lies, in a run on `device`."""
    return CPU if options.shard_teacher and world() > 1 else device


def placed(teacher: Teacher, options: ShardOptions, device: torch.device) -> Teacher:
    """The teacher, frozen, where a run wants it.

    Args:
        teacher: Its model is moved.
        options: Whether it is to lie in parts.
        device: Of the run.

    Raises:
        ConfigError: In parts it does not run, or computes something else.
    """
    model = teacher.model.eval().requires_grad_(False)
    model.to(whole_on(options, device))
    if not options.shard_teacher or world() == 1:
        return teacher
    blocks, images = recomputed_blocks(model), example_images(teacher.spec)
    flag = f"--shard-teacher: {teacher.name}"
    with torch.no_grad():
        whole = model(images)
        try:
            sharded = in_parts(model, blocks, device)
            parts = sharded(images.to(device)).cpu()
        except (StepwellError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever FSDP, or a forward pass within it, raises
            raise ConfigError(
                f"{flag} does not run in parts ({one_line(error)[:160]}): leave it out"
            ) from None
    guard(sharded)
    if (parts - whole).abs().max() > _CLOSE * whole.abs().max():
        raise ConfigError(f"{flag} answers otherwise in parts than whole: leave it out")
    say(
        f"{teacher.name}: {num_held(sharded):,} of {num_params(model):,} parameters lie in the first process "
        f"to answer; what is cut and scored is the whole teacher, on the CPU"
    )
    return replace(teacher, sharded=sharded)
