"""Several classes in one image: loss, distillation and measure against plain loops and scikit-learn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor

from stepwell.config.loss_facts import FEATURE_LOSSES, LOGIT_LOSSES
from stepwell.data.labels import as_tensor, classes_of, reordered
from stepwell.errors import ConfigError
from stepwell.losses.logit import binary_kd_loss
from stepwell.tasks import classification, multilabel
from stepwell.tasks.multilabel import Answers, average_precisions, compare, f1_at_half, loss_per_image
from stepwell.tasks.task import Task, task_of


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def answers_of(num_images: int, num_classes: int, skill: float = 1.0, digits: int = 2) -> Answers:
    """Probabilities with many ties; a third of the labels are 1."""
    labels = (random((num_images, num_classes), 1) > 0.4).float()
    logits = random((num_images, num_classes), 2).double() + skill * (2 * labels - 1)
    return Answers(logits.sigmoid().round(decimals=digits), labels)


# --- losses


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_a_loop_over_classes(smoothing):
    logits, labels = random((3, 4)), (random((3, 4), 1) > 0).float()
    expected = []
    for row, truth in zip(logits.tolist(), labels.tolist(), strict=True):
        total = 0.0
        for z, y in zip(row, truth, strict=True):
            p, y = 1 / (1 + math.exp(-z)), y * (1 - smoothing) + smoothing / 4
            total -= y * math.log(p) + (1 - y) * math.log(1 - p)
        expected.append(total / 4)
    assert loss_per_image(logits, labels, smoothing).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_a_loop_over_classes(temperature):
    student, teacher = random((3, 4)), random((3, 4), 1)
    total = 0.0
    for s_row, t_row in zip(student.tolist(), teacher.tolist(), strict=True):
        for s, t in zip(s_row, t_row, strict=True):
            p, q = 1 / (1 + math.exp(-t / temperature)), 1 / (1 + math.exp(-s / temperature))
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    expected = temperature**2 * total / 12
    assert binary_kd_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert binary_kd_loss(teacher, teacher, temperature).item() == 0


def test_distillation_of_sure_teachers_is_finite():
    student = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = binary_kd_loss(student, torch.tensor([[-200.0, -200.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(100)  # half of 200: the other class agrees
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_which_losses_are_for_one_class_an_image():
    exclusive = {name for known in (LOGIT_LOSSES, FEATURE_LOSSES) for name in known if known[name].exclusive}
    assert exclusive == {"dkd", "dist", "pld", "taid", "crd", "sskd", "ofa"}


# --- mAP


def by_loop(p: list[float], y: list[float]) -> float:
    """Sum over the different probabilities, from the largest: gain in recall times precision."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(p), reverse=True):
        taken = [truth for value, truth in zip(p, y, strict=True) if value >= threshold]
        recall = sum(taken) / sum(y)
        total += (recall - before) * sum(taken) / len(taken)
        before = recall
    return total


@pytest.mark.parametrize("digits", [1, 2, 9])
def test_average_precision_is_that_of_scikit_learn(digits):
    answers = answers_of(57, 5, digits=digits)
    (found,) = average_precisions(answers.probabilities, answers.labels)
    for p, y, ours in zip(answers.probabilities.T, answers.labels.T, found, strict=True):
        assert ours.item() == pytest.approx(average_precision_score(y.numpy(), p.numpy()), abs=1e-9)
        assert ours.item() == pytest.approx(by_loop(p.tolist(), y.tolist()), abs=1e-9)
    expected = average_precision_score(answers.labels.numpy(), answers.probabilities.numpy(), average="macro")
    assert answers.quality == pytest.approx(100 * expected, abs=1e-9)


def test_images_that_are_drawn_twice_count_twice():
    answers, counts = answers_of(20, 3), torch.randint(0, 3, (1, 20), generator=torch.manual_seed(0)).double()
    again = counts[0].long()
    (found,) = average_precisions(answers.probabilities, answers.labels, counts)
    (expected,) = average_precisions(
        answers.probabilities.repeat_interleave(again, 0), answers.labels.repeat_interleave(again, 0)
    )
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_a_class_without_images_is_left_out():
    answers = answers_of(30, 3)
    labels = answers.labels.clone()
    labels[:, 1] = 0
    (found,) = average_precisions(answers.probabilities, labels)
    assert found.isnan().tolist() == [False, True, False]
    assert Answers(answers.probabilities, labels).quality == pytest.approx(50 * (found[0] + found[2]).item())


def test_parts_add_up():
    whole = answers_of(40, 3)
    first, second = (Answers(whole.probabilities[i], whole.labels[i]) for i in (slice(25), slice(25, None)))
    both = first + second
    assert (both.quality, both.log_likelihood, both.num_images) == (whole.quality, whole.log_likelihood, 40)


def test_likelihood_and_calibration_are_loops():
    answers = answers_of(50, 3)
    pairs = list(
        zip(answers.probabilities.flatten().tolist(), answers.labels.flatten().tolist(), strict=True)
    )
    expected = sum(math.log(max(p if y else 1 - p, 1e-12)) for p, y in pairs) / len(pairs)
    assert answers.log_likelihood == pytest.approx(expected)
    gap = 0.0
    for b in range(15):
        inside = [(p, y) for p, y in pairs if min(14, int(p * 15)) == b]
        gap += abs(sum(p - y for p, y in inside)) / len(pairs)
    assert answers.calibration_error == pytest.approx(100 * gap, rel=1e-5)
    assert answers.performance("likelihood") == pytest.approx(math.exp(expected))
    assert answers.performance("mAP") == answers.quality / 100


def test_the_interval_is_that_of_a_bootstrap():
    """By a loop over draws with numpy's generator: not the same draws, but the same interval, roughly."""
    answers, rng = answers_of(150, 4), np.random.default_rng(0)
    p, y = answers.probabilities.numpy(), answers.labels.numpy()
    drawn = []
    for _ in range(300):
        rows = rng.integers(0, 150, 150)
        drawn.append(100 * average_precision_score(y[rows], p[rows], average="macro"))
    low, high = answers.quality_interval
    assert (low, high) == answers.quality_interval
    assert low < answers.quality < high
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.8)


def test_a_comparison_is_paired():
    good, bad = answers_of(200, 3, skill=2.0), answers_of(200, 3, skill=0.3)
    found = compare(good, bad)
    assert found.difference == pytest.approx(bad.quality - good.quality)
    assert found.difference_interval[0] < found.difference < found.difference_interval[1] < 0
    assert found.p_value == pytest.approx(2 / 501)
    same = compare(good, good)
    assert (same.difference, same.difference_interval, same.p_value) == (0, (0, 0), 1)


def test_f1_is_that_of_scikit_learn():
    answers = answers_of(60, 4)
    found, number = f1_at_half(answers.probabilities, answers.labels)
    said = (answers.probabilities > 0.5).numpy()
    assert found.tolist() == pytest.approx(
        (100 * f1_score(answers.labels.numpy(), said, average=None)).tolist()
    )
    assert number.tolist() == answers.labels.sum(0).tolist()


# --- labels and tasks


def test_labels_go_along_when_classes_are_put_in_another_order():
    before, after = ("a", "b", "c"), ("c", "a", "b")
    assert reordered([(1, 1, 0), (0, 0, 0)], before, after) == ((0, 1, 1), (0, 0, 0))
    assert reordered([0, 2], before, after) == (1, 0)
    assert [classes_of(label) for label in ((1, 0, 1), (0, 0, 0), 2)] == [(0, 2), (), (2,)]
    assert as_tensor([(1, 0)]).dtype == torch.float32
    assert as_tensor([1, 0]).dtype == torch.int64


def test_what_is_decided():
    answers = Answers(torch.tensor([[0.9, 0.6], [0.2, 0.5]]).double(), torch.zeros(2, 2))
    assert answers.decided == [(1, 1), (0, 0)]


@pytest.mark.parametrize(
    ("name", "module"), [("classification", classification), ("multi-label", multilabel)]
)
def test_a_task_is_a_module(name, module):
    assert task_of(name) is module
    assert isinstance(module, Task)
    assert name == module.NAME


@pytest.mark.parametrize(("task", "other"), list(itertools.permutations([classification, multilabel], 2)))
def test_the_metric_of_another_task_is_refused(task, other):
    assert task.resolve_metric(task.MEASURE, 10) == task.MEASURE
    assert task.resolve_metric("auto", 10) == "likelihood"
    assert task.resolve_metric("auto", 2000) == task.MEASURE
    with pytest.raises(ConfigError) as caught:
        task.resolve_metric(other.MEASURE, 10)
    assert str(caught.value) == (
        f"--metric {other.MEASURE}: these images are measured by {task.MEASURE}, or likelihood"
    )
