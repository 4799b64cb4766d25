"""CRD, which contrasts images by a memory, equals a loop over images and negatives drawn evenly."""

import copy
import math

import numpy as np
import pytest
import torch
from loss_reference import LABELS, NUM_IMAGES, array, crd_batch, dot, features, linear, make_crd, number

from stepwell.losses import negatives
from stepwell.losses.crd import CRD
from stepwell.losses.negatives import Negatives
from stepwell.losses.vectors import unit


def unit_by_loop(row) -> np.ndarray:
    return np.array(row) / math.sqrt(dot(row, row))


# With a bank of 12 rows: fewer negatives than that per embedding take the path that copies rows.
@pytest.mark.parametrize(
    "options", [{}, {"embed_dim": 2, "num_negatives": 1}, {"temperature": 0.5}, {"momentum": 0.9}]
)
@pytest.mark.parametrize("labels", [None, LABELS])
def test_crd_equals_the_loop_over_images_and_negatives_for_some_steps(options, labels):
    crd = make_crd(labels, **options)
    tau, momentum, num_negatives = crd.temperature, crd.momentum, crd.num_negatives
    banks = {"student": array(crd.student_bank).copy(), "teacher": array(crd.teacher_bank).copy()}
    constants = {}
    for step in range(3):
        student, teacher, indices = crd_batch(step)
        drawn = crd.negatives(indices, num_negatives, torch.tensor(step))
        embeddings = {
            "student": [unit_by_loop(linear(crd.student_embed, row)) for row in array(student)],
            "teacher": [unit_by_loop(linear(crd.teacher_embed, row)) for row in array(teacher)],
        }
        loss = 0.0
        for anchor, other in (("student", "teacher"), ("teacher", "student")):
            scores = []
            for b, index in enumerate(indices.tolist()):
                slots = [index, *drawn[b].tolist()]
                scores.append([math.exp(dot(embeddings[anchor][b], banks[other][r]) / tau) for r in slots])
            if step == 0:
                constants[anchor] = NUM_IMAGES * number(np.mean(scores))
            noise = num_negatives / NUM_IMAGES
            for row in scores:
                positive, *rest = [score / constants[anchor] for score in row]
                loss -= math.log(positive / (positive + noise)) / len(scores)
                loss -= sum(math.log(noise / (x + noise)) for x in rest) / len(scores)
        assert number(crd(student, teacher, indices)) == pytest.approx(loss, rel=1e-4)
        for model, bank in banks.items():
            for b, index in enumerate(indices.tolist()):
                bank[index] = unit_by_loop(momentum * bank[index] + (1 - momentum) * embeddings[model][b])
            assert array(getattr(crd, f"{model}_bank")) == pytest.approx(bank, abs=1e-5)
    assert math.exp(number(crd.student_log_z)) == pytest.approx(constants["student"], rel=1e-4)
    assert math.exp(number(crd.teacher_log_z)) == pytest.approx(constants["teacher"], rel=1e-4)


def test_crd_by_hand():
    # Two images of the same row in the bank: x+ = x- = 1/2 and N/M = 1/2, so four times -log(1/2).
    crd = CRD(3, 3, None, 2)
    crd.student_bank[:], crd.teacher_bank[:] = 1.0, 1.0
    assert crd.num_negatives == 1
    assert number(crd(features(1, 1, 3), features(2, 1, 3), torch.tensor([1]))) == pytest.approx(
        4 * math.log(2)
    )


def test_crd_falls_when_an_image_finds_its_own_embedding():
    crd = make_crd(None, num_negatives=11)
    crd(*crd_batch(1))
    crd.eval()
    student, teacher, indices = crd_batch(0, batch=1)
    losses = []
    for sign in (-1, 1):
        crd.teacher_bank[indices] = sign * unit(crd.student_embed(student)).detach()
        crd.student_bank[indices] = sign * unit(crd.teacher_embed(teacher)).detach()
        losses.append(number(crd(student, teacher, indices)))
    assert losses[1] < losses[0] - 1


def test_the_banks_of_crd_change_only_in_training_and_only_in_the_rows_of_the_batch():
    crd = make_crd()
    before = copy.deepcopy(crd.state_dict())
    student, teacher, indices = crd_batch(0)
    crd.eval()
    first, second = crd(student, teacher, indices), crd(student, teacher, indices)
    assert number(first) == number(second)
    assert all(torch.equal(value, before[name]) for name, value in crd.state_dict().items())
    crd.train()
    assert number(crd(student, teacher, indices)) == number(first)
    for name in ("student_bank", "teacher_bank"):
        changed = (crd.state_dict()[name] != before[name]).any(dim=1)
        assert changed.nonzero().flatten().tolist() == sorted(indices.tolist())
        assert crd.state_dict()[name][indices].norm(dim=1).tolist() == pytest.approx([1.0] * 3)
    assert crd.num_steps == 1


def test_the_constants_of_crd_are_those_of_the_first_batch():
    crd = make_crd()
    crd(*crd_batch(0))
    constants = crd.student_log_z.clone(), crd.teacher_log_z.clone()
    assert 0 not in constants
    crd(*crd_batch(1))
    assert (crd.student_log_z, crd.teacher_log_z) == constants


def test_a_fresh_bank_has_rows_of_length_about_1():
    crd = CRD(2, 2, None, 2000, num_negatives=1)
    for bank in (crd.student_bank, crd.teacher_bank):
        assert number(bank.square().sum(dim=1).mean()) == pytest.approx(1, abs=0.02)
    assert not torch.equal(crd.student_bank, crd.teacher_bank)


@pytest.mark.parametrize(("labels", "asked", "number"), [(None, 5, 5), (None, 16384, 11), (LABELS, 16384, 9)])
def test_there_are_no_more_negatives_than_images_to_draw_from(labels, asked, number):
    # The smallest of the classes has three of twelve images.
    assert make_crd(labels, num_negatives=asked).num_negatives == number


@pytest.mark.parametrize("labels", [None, LABELS, torch.tensor([7] * 11 + [-1])])
def test_negatives_are_uniform_among_the_images_of_other_classes(labels):
    num_draws, draw = 2000, Negatives(labels, NUM_IMAGES)
    drawn = draw(torch.arange(NUM_IMAGES), num_draws, torch.tensor(3))
    for image in range(NUM_IMAGES):
        counts = np.bincount(drawn[image].numpy(), minlength=NUM_IMAGES)
        same = [i == image if labels is None else bool(labels[i] == labels[image]) for i in range(NUM_IMAGES)]
        assert counts[same].sum() == 0
        others = counts[np.logical_not(same)]
        expected = num_draws / len(others)
        # Chi-square of mean len - 1; 6 standard deviations.
        chi_square = ((others - expected) ** 2 / expected).sum()
        assert chi_square <= len(others) - 1 + 6 * math.sqrt(2 * max(len(others) - 1, 0))


def test_negatives_differ_between_images_steps_and_seeds_and_are_repeated_for_the_same_step():
    draw, indices = Negatives(None, 1000), torch.tensor([5, 5])
    other_seed = Negatives(None, 1000)
    first = draw(indices, 50, torch.tensor(0))
    assert torch.equal(draw(indices, 50, torch.tensor(0)), first)
    for other in (
        first.flip(0),
        draw(indices, 50, torch.tensor(1)),
        other_seed(indices, 50, torch.tensor(0)),
    ):
        assert (other == first).float().mean() < 0.1


def test_the_random_numbers_are_the_same_everywhere():
    def mixed(number: int) -> int:
        for _ in range(2):
            number = ((number ^ number >> 16) * 0x45D9F3B) % 2**32
        return number ^ number >> 16

    numbers = [0, 1, 2, 77, 2**31, 2**32 - 1, 2**32 + 1]
    assert negatives._mixed(torch.tensor(numbers)).tolist() == [mixed(n % 2**32) for n in numbers]


def test_crd_refuses_labels_it_cannot_use():
    with pytest.raises(ValueError, match="3 labels for 12 training images"):
        make_crd(LABELS[:3])
    with pytest.raises(ValueError, match="all images are of one class"):
        make_crd(torch.zeros(12, dtype=torch.int64))
