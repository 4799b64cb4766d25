"""A teacher of masks: what it returns is made logits of the images' size, and it is asked what it knows."""

from __future__ import annotations

from dataclasses import replace

import torch

from stepwell.config.options import DataOptions
from stepwell.config.own_code import line_of
from stepwell.data.batches import EvalBatches
from stepwell.data.class_names import in_order_of
from stepwell.data.images import one_line
from stepwell.data.mask_classes import unnamed
from stepwell.data.splits import Data
from stepwell.errors import ConfigError, DataError, ModelError
from stepwell.models.input import check_runs
from stepwell.models.reached import with_logits_alone
from stepwell.models.teacher import Teacher
from stepwell.tasks.outputs import AsLogits, as_logits, is_dense
from stepwell.tasks.segmentation import Meter, check_classes

ASKED = 32
"""Training images that the teacher answers."""
_HARDLY = 1.5
"""Times the mIoU of the best answer that is the same everywhere: less is no knowledge of the images."""


def settle_masks(
    teacher: Teacher, data: Data, options: DataOptions, device: torch.device
) -> tuple[Teacher, Data]:
    """The teacher as one that returns logits of the images' size, and a note where it does not know them.

    Args:
        teacher: As it was loaded; its model is moved to `device`.
        data: Images with masks.
        options: Batch size, workers.
        device: What is computed on.

    Raises:
        ConfigError: It was trained for another task, or returns something else.
        DataError: Number, names or order of the classes differ.
        ModelError: It returns NaN, or fails on real images.
    """
    if teacher.task not in (None, "segmentation"):
        raise ConfigError(
            f"{teacher.name} was trained for the task {teacher.task}, and the images of {data.source} have "
            f"masks: train one for these first (stepwell train --model torchvision:deeplabv3_resnet50 ...)"
        )
    num_classes = check_runs(teacher.model, teacher.spec, teacher.name, "--image-size", dense=True)
    check_classes(num_classes, teacher.name, data)
    data = _named(teacher, data)
    if not is_dense(teacher.model):
        teacher = replace(
            teacher,
            model=as_logits(teacher.model, "maps").eval(),
            architecture=teacher.architecture.model_copy(update={"outputs": "maps"}),
        )
    teacher = _without_other_heads(teacher)
    teacher.model.to(device)
    if teacher.trained_on == data.fingerprint:  # trained on these: nothing to find out
        return teacher, data
    meter = _asked(teacher, data, options, device)
    chance = 100 * (meter.counts[0, 2].max() / max(1, meter.num_pixels)).item() / num_classes
    if meter.quality >= _HARDLY * chance:
        return teacher, data
    note = (
        f"WARNING: {teacher.name} knows these images no better than chance (mIoU {meter.quality:.1f} % on "
        f"{meter.num_images} training images), so it teaches nothing. Usual reasons: it numbers the classes "
        f"in another order; it wants another --mean or --std; it learnt other classes"
    )
    return replace(teacher, notes=(*teacher.notes, note)), data


def _without_other_heads(teacher: Teacher) -> Teacher:
    """Of a user's own second heads nothing is learnt, and a student would be handed out with them."""
    assert isinstance(teacher.model, AsLogits)
    left_out = with_logits_alone(teacher.model, teacher.spec)
    if not left_out:
        return teacher
    unused = [*teacher.architecture.unused, *left_out]
    named = ", ".join(name.removeprefix("model.") for name in left_out[:3])
    note = f"left out, since the logits do not depend on it: {named}{', ...' if len(left_out) > 3 else ''}"
    return replace(
        teacher,
        architecture=teacher.architecture.model_copy(update={"unused": unused}),
        notes=(*teacher.notes, note),
    )


def _named(teacher: Teacher, data: Data) -> Data:
    """The classes of masks are numbered by their list: it must be the teacher's. Without one they have the
    teacher's numbers, and get its names."""
    if teacher.classes is None or teacher.classes == data.classes:
        return data
    if data.classes == unnamed(len(teacher.classes)):
        return replace(data, classes=teacher.classes)
    in_order_of(teacher.classes, data.classes, teacher.name, data.source)  # other names are refused there
    where = next(
        i for i, pair in enumerate(zip(teacher.classes, data.classes, strict=True)) if len({*pair}) > 1
    )
    raise DataError(
        f"{teacher.name} has the class {teacher.classes[where]} where the list of {data.source} has "
        f"{data.classes[where]}: give the names in the teacher's order (--class-order FILE)"
    )


def _asked(teacher: Teacher, data: Data, options: DataOptions, device: torch.device) -> Meter:
    """How good it is on some training images, always the same ones."""
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:ASKED]
    images = data.train.subset(chosen.tolist())
    total: Meter | None = None
    batches = EvalBatches(images, teacher.spec, options, device)
    for batch in batches:
        try:
            with torch.no_grad():
                logits = teacher.model(batch.images)
        except Exception as error:  # whatever its forward pass raises
            raise ModelError(
                f"{teacher.name} runs on one blank image, but not on {len(batch.images)} training images "
                f"({one_line(error)[:160]}{line_of(error)})"
            ) from None
        if not logits.isfinite().all():
            raise ModelError(
                f"{teacher.name} returns NaN or infinite numbers for training images such as "
                f"{images.keys[int(batch.indices[0])]}: it cannot teach; is there a division or a logarithm "
                f"in its forward pass?"
            )
        meter = Meter.of(logits, batches.truths(batch), batch.indices)
        total = meter if total is None else total + meter
    assert total is not None, "there are images"
    return total
