"""What a teacher's outputs mean and how it numbers its classes, settled before anything else is looked at.

The teacher answers a few hundred training images once. Its answers show whether they are logits
(tasks/outputs.py), which of the usual orders of the classes it was trained with, where nothing says their
names (tasks/order.py), and whether it knows these images at all. The labels follow the teacher's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stepwell.config.options import DataOptions
from stepwell.config.own_code import line_of
from stepwell.data.batches import EvalBatches
from stepwell.data.class_names import WAY_OUT, in_order_of, read_class_order, usual_orders
from stepwell.data.folders import join
from stepwell.data.images import ImageSet, one_line
from stepwell.data.labels import as_tensor
from stepwell.data.spec import InputSpec
from stepwell.data.splits import Data, in_order
from stepwell.errors import DataError, ModelError
from stepwell.models.card import Architecture
from stepwell.models.input import check_runs
from stepwell.models.teacher import Teacher
from stepwell.run.progress import say
from stepwell.setting import several
from stepwell.setting.agreed_task import agreed
from stepwell.setting.masks import settle_masks
from stepwell.tasks.order import MANY, Fit, best_fit, disputed, fits_of, majority_order
from stepwell.tasks.outputs import IN_WORDS, as_logits, last_operation, logits_of, meaning_of, sound_rows
from stepwell.tasks.task import task_of

ASKED = 256
"""Training images that the teacher answers; up to half as many more of classes whose place is in doubt."""


@dataclass(frozen=True)
class Answers:
    """What a teacher says of some training images.

    Attributes:
        numbers: What it returned, on the CPU.
        operation: The last operation of its forward pass.
        images: The images; those from `num_any` on are of disputed classes.
        num_any: How many were drawn from all.
    """

    numbers: Float[Tensor, "images ..."]
    operation: str
    images: ImageSet
    num_any: int


NUMBERED = "the classes are numbered as"
"""How the note begins that says whose order it is."""


def settle(teacher: Teacher, data: Data, options: DataOptions, device: torch.device) -> tuple[Teacher, Data]:
    """The teacher, wrapped if it returns no logits, and the images with the labels in its order.

    What was found out is among the teacher's notes, to be said and to be kept in the report. A teacher near
    chance is no error: an untrained one is a fair thing to compare with, and the labels teach as well.

    Args:
        teacher: As it was loaded; its model is moved to `device`.
        data: The images, with the labels in the order of the folders' names or of `--class-order`.
        options: Batch size, workers, the file of `--class-order`.
        device: What is computed on.

    Raises:
        DataError: Number or names of the classes differ, or the teacher has an unusual order.
        ConfigError: The outputs are not those of classes, or of another task than the images.
        ModelError: The outputs are NaN, or the same for all images.
    """
    if data.task == "segmentation":
        return settle_masks(teacher, data, options, device)
    data = agreed(data, options, teacher)
    num_outputs = check_runs(teacher.model, teacher.spec, teacher.name, "--image-size")
    task_of(data.task).check_classes(num_outputs, teacher.name, data)
    teacher.model.to(device)
    given = None if options.class_order is None else read_class_order(options.class_order)
    if data.labelled and teacher.trained_on is not None and teacher.classes is not None and given is None:
        ordered = in_order(data, _by_name(teacher, data))
        if ordered.fingerprint == teacher.trained_on:  # trained on these: nothing to find out
            return teacher, ordered
    answers = _ask(teacher, data, options, device)
    if data.task == "features":
        sound_rows(answers.numbers, teacher.name, answers.images.keys)
        note = (
            f"{teacher.name} returns an embedding of {num_outputs} numbers and no classes: the student "
            f"learns that, and is measured by its cosine with it"
        )
        return replace(teacher, classes=None, notes=(*teacher.notes, note)), data
    teacher, data, logits = _understood(teacher, data, options, answers)
    several_classes, predicted = data.task == "multi-label", logits.argmax(dim=1)
    if not data.labelled and several_classes:
        several.check_finds_some(logits, teacher.name)
    if not data.labelled:
        notes = (*teacher.notes, *([] if several_classes else _one_answer(predicted, teacher)))
        return replace(teacher, classes=_names(given, logits.shape[1], teacher), notes=notes), data
    if given is not None:
        order, note = data.classes, _other_names(teacher, data)
    elif teacher.classes is not None:
        order, note = _by_name(teacher, data), "matched by name"
    elif several_classes:
        order, note = several.order_by_trying(logits, answers.images, data)
    else:
        best = _by_trying(predicted, answers, teacher, data)
        order, note = best.order, f"{best.words}: {_right(best)}"
    if order != data.classes:
        note = f"{NUMBERED} {teacher.name} has them ({note})"
    elif given is None:
        note = ""
    if several_classes:
        found = several.near_chance(logits, answers.images, data, order)
    else:
        found = _near_chance(predicted, answers, data, order)
    notes = [note, _knows_nothing(teacher, found)]
    teacher = replace(teacher, notes=(*teacher.notes, *filter(None, notes)))
    return teacher, in_order(data, order)


def in_order_of_model(
    model: nn.Module, spec: InputSpec, data: Data, options: DataOptions, device: torch.device
) -> Data:
    """The images with the labels in the order that a model has which is to be trained further; says so.

    An order that is none of the usual ones is as good as any for a classifier that is about to change, and so
    is one that nothing is known of.
    """
    teacher = Teacher(
        model, Architecture(source="factory", name="the model"), spec, None, {}, "the model", ""
    )
    check_runs(model, spec, "the model", "--image-size")
    answers = _ask(teacher, data, options, device)
    best = _usual(answers.numbers.argmax(dim=1), answers, data)
    if best.order != data.classes:
        say(f"the classes are numbered as the weights have them ({best.words}: {_right(best)})")
    return in_order(data, best.order)


def _ask(teacher: Teacher, data: Data, options: DataOptions, device: torch.device) -> Answers:
    """What the teacher returns for training images, always the same ones."""
    everyone = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = everyone[:ASKED]
    if data.labelled and teacher.classes is None and data.task == "classification":
        unsure = set(disputed(data.classes))
        chosen += [i for i in everyone[ASKED:] if data.train.labels[i] in unsure][: ASKED // 2]
    images = data.train.subset(chosen)
    numbers, operation = [], ""
    for batch in EvalBatches(images, teacher.spec, options, device):
        try:
            if not operation:
                operation = last_operation(teacher.model(batch.images[:2].clone().requires_grad_()))
            with torch.no_grad():
                output = teacher.model(batch.images).float().cpu()
        except Exception as error:  # whatever its forward pass raises
            raise ModelError(
                f"{teacher.name} runs on one blank image, but not on {len(batch.images)} training "
                f"images ({one_line(error)[:160]}{line_of(error)})"
            ) from None
        if len(output) != len(batch.images):
            raise ModelError(
                f"{teacher.name} returns {len(output)} rows for {len(batch.images)} images: its forward pass "
                f"must keep the images of a batch apart, whatever their number"
            )
        numbers.append(output)
    return Answers(torch.cat(numbers), operation, images, min(ASKED, len(everyone)))


def _understood(
    teacher: Teacher, data: Data, options: DataOptions, answers: Answers
) -> tuple[Teacher, Data, Float[Tensor, "images classes"]]:
    """The teacher as one that returns logits, the images as those of its task, and its answers as logits."""
    outputs = meaning_of(answers.numbers, answers.operation, teacher.name, answers.images.keys)
    data = agreed(data, options, teacher, outputs)
    logits = logits_of(answers.numbers, outputs)
    if outputs == "logits":
        return teacher, data, logits
    wrapped = replace(
        teacher,
        model=as_logits(teacher.model, outputs).eval(),
        architecture=teacher.architecture.model_copy(update={"outputs": outputs}),
        notes=(*teacher.notes, f"{teacher.name} {IN_WORDS[outputs]}"),
    )
    return wrapped, data, logits


def _names(given: Sequence[str] | None, num_classes: int, teacher: Teacher) -> tuple[str, ...] | None:
    """What the classes are called where no folders name them."""
    if given is None:
        return teacher.classes
    if len(given) != num_classes:
        raise DataError(f"--class-order names {len(given)} classes, and {teacher.name} has {num_classes}")
    return tuple(given)


def _one_answer(predicted: Int[Tensor, " images"], teacher: Teacher) -> list[str]:
    """A warning where the teacher names one class for all images, and nobody says that it should not."""
    if len(predicted) < 2 or len(predicted.unique()) > 1:
        return []
    return [
        f"WARNING: {teacher.name} names the same class for all of {len(predicted)} training images, so "
        f"agreement with it says nothing: are they what it was trained on, and are its outputs logits?"
    ]


def _by_name(teacher: Teacher, data: Data) -> tuple[str, ...]:
    return in_order_of(teacher.classes or data.classes, data.classes, teacher.name, data.source)


def _other_names(teacher: Teacher, data: Data) -> str:
    """A note where the user's order is not the one that the teacher's names have."""
    if teacher.classes is None:
        return ""
    try:
        same = _by_name(teacher, data) == data.classes
    except DataError:
        same = False
    return "" if same else f"--class-order is followed, although {teacher.name} names its classes otherwise"


def _by_trying(predicted: Int[Tensor, " images"], answers: Answers, teacher: Teacher, data: Data) -> Fit:
    """The usual order that fits the teacher's answers, and the folders' own where no other fits clearly.

    Raises:
        DataError: An unusual one fits clearly, and well.
    """
    best, labels = _usual(predicted, answers, data), as_tensor(answers.images.labels)
    unusual = majority_order(predicted, labels, data.classes)
    if unusual is not None:
        usual, other = fits_of(
            predicted, labels, data.classes, {best.words: best.order, "no usual order": unusual}
        )
        if other.top1 > 50 and other.is_clearly_above(usual):
            listed = ", ".join(unusual) if len(unusual) <= MANY else join(unusual)
            raise DataError(
                f"{teacher.name} numbers the classes in no usual order: {usual.words}, it is "
                f"{_right(usual)}, and as {listed} on {other.top1:.1f} %. If this is its order, {WAY_OUT}"
            )
    return best


def _usual(predicted: Int[Tensor, " images"], answers: Answers, data: Data) -> Fit:
    """The usual order that fits the teacher's answers, and the folders' own where no other fits clearly."""
    labels = as_tensor(answers.images.labels)
    # Images of classes that all orders number alike say nothing.
    telling = torch.isin(labels, torch.tensor(disputed(data.classes)))
    return best_fit(fits_of(predicted[telling], labels[telling], data.classes, usual_orders(data.classes)))


def _near_chance(
    predicted: Int[Tensor, " images"], answers: Answers, data: Data, order: Sequence[str]
) -> str:
    """What is found if the teacher's answers may have nothing to do with the images; else nothing."""
    labels = as_tensor(answers.images.labels)[: answers.num_any]
    (fit,) = fits_of(predicted[: answers.num_any], labels, data.classes, {"": order})
    return f"{_right(fit)}, chance is {fit.chance:.1f} %" if fit.is_chance else ""


def _knows_nothing(teacher: Teacher, found: str) -> str:
    """A warning, where that was found."""
    if not found:
        return ""
    return (
        f"WARNING: {teacher.name} knows these images no better than chance ({found}), so it "
        f"teaches nothing. Usual reasons: it numbers the classes in another order "
        f"(--class-order FILE); it wants another --mean than {_short(teacher.spec.mean)}, or another --std "
        f"than {_short(teacher.spec.std)}; its classifier is new or another's; it learnt other classes"
    )


def _right(fit: Fit) -> str:
    return f"right on {fit.top1:.1f} % of {fit.num_images} training images"


def _short(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)
