"""Losses on relations between images, against loops over images, pairs and triples, from the formulas."""

import copy
import math

import numpy as np
import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped
from torch._subclasses.fake_tensor import FakeTensorMode

from stepwell.losses import negatives, rkd
from stepwell.losses.cc import CC
from stepwell.losses.crd import CRD
from stepwell.losses.negatives import Negatives
from stepwell.losses.pkt import pkt_loss
from stepwell.losses.rkd import rkd_loss
from stepwell.losses.sp import sp_loss
from stepwell.losses.sskd import SSKD, _kept, rotations
from stepwell.losses.vectors import unit

DISTANCES = [sp_loss, rkd_loss, pkt_loss]
NUM_IMAGES, STUDENT_DIM, TEACHER_DIM, NUM_CLASSES = 12, 5, 7, 3


def features(seed: int, *shape: int) -> torch.Tensor:
    # Not centred on 0, as features behind a ReLU are not.
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def number(scalar) -> float:
    # float() warns where there is a gradient.
    return scalar.item()


def array(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def dot(a, b) -> float:
    return sum(float(x) * float(y) for x, y in zip(np.ravel(a), np.ravel(b), strict=True))


def cosine(a, b) -> float:
    lengths = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / lengths if lengths else 0.0


def smooth_l1(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def softmax(row, temperature: float = 1.0) -> list[float]:
    exponentials = [math.exp((x - max(row)) / temperature) for x in row]
    return [e / sum(exponentials) for e in exponentials]


def divergence(teacher_row, student_row, temperature: float) -> float:
    p, q = softmax(teacher_row, temperature), softmax(student_row, temperature)
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def linear(layer, row) -> np.ndarray:
    return np.array([dot(w, row) + number(b) for w, b in zip(array(layer.weight), layer.bias, strict=True)])


def unit_by_loop(row) -> np.ndarray:
    return np.array(row) / math.sqrt(dot(row, row))


def sp_by_loop(student, teacher) -> float:
    def similarities(maps):
        rows = [[dot(a, b) for b in maps] for a in maps]
        return [[x / math.sqrt(dot(row, row)) for x in row] for row in rows]

    s, t, count = similarities(student), similarities(teacher), len(student)
    return sum((t[i][j] - s[i][j]) ** 2 for i in range(count) for j in range(count)) / count**2


def rkd_by_loop(student, teacher, distance_weight=25.0, angle_weight=50.0) -> float:
    count = len(student)

    def distances(rows):
        of_pairs = [[math.sqrt(dot(a - b, a - b)) for b in rows] for a in rows]
        positive = [d for row in of_pairs for d in row if d > 0]
        return [[d / (sum(positive) / len(positive)) for d in row] for row in of_pairs]

    s, t = distances(student), distances(teacher)
    distance = sum(smooth_l1(s[i][j] - t[i][j]) for i in range(count) for j in range(count))
    angle = 0.0
    for i, j, k in np.ndindex(count, count, count):
        of_student = cosine(student[j] - student[i], student[k] - student[i])
        of_teacher = cosine(teacher[j] - teacher[i], teacher[k] - teacher[i])
        angle += smooth_l1(of_student - of_teacher)
    return distance_weight * distance / count**2 + angle_weight * angle / count**3


def pkt_by_loop(student, teacher) -> float:
    def neighbours(rows):
        kernel = [[(cosine(a, b) + 1) / 2 for b in rows] for a in rows]
        return [[x / sum(row) for x in row] for row in kernel]

    s, t, count = neighbours(student), neighbours(teacher), len(student)
    pairs = [(t[i][j] + 1e-7, s[i][j] + 1e-7) for i in range(count) for j in range(count)]
    return sum((p - 1e-7) * math.log(p / q) for p, q in pairs) / count**2


BY_LOOP = {sp_loss: sp_by_loop, rkd_loss: rkd_by_loop, pkt_loss: pkt_by_loop}


# --- similarities, distances, neighbours


@pytest.mark.parametrize("loss", DISTANCES)
@pytest.mark.parametrize(("batch", "student_dim", "teacher_dim"), [(2, 3, 3), (4, 8, 2), (7, 5, 16)])
def test_a_relation_equals_the_loop_over_images(loss, batch, student_dim, teacher_dim):
    student, teacher = features(1, batch, student_dim), features(2, batch, teacher_dim)
    expected = BY_LOOP[loss](array(student), array(teacher))
    # Two images have one distance, which is its own mean, and no angle.
    assert expected > 1e-5 or (loss is rkd_loss and batch == 2)
    assert number(loss(student, teacher)) == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_sp_takes_maps_of_any_channels_and_size():
    student, teacher = features(1, 3, 2, 4, 4), features(2, 3, 5, 2, 3)
    assert number(sp_loss(student, teacher)) == pytest.approx(
        sp_by_loop(array(student), array(teacher)), rel=1e-5
    )
    assert number(sp_loss(student.flatten(1), teacher)) == number(sp_loss(student, teacher))


def test_sp_by_hand():
    # Rows of G: (1, 0) and (0, 1) for the student, (1, 1) / sqrt(2) twice for the teacher.
    loss = sp_loss(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.ones(2, 2))
    assert number(loss) == pytest.approx((2 - math.sqrt(2)) / 2)


def test_rkd_by_hand():
    # 0, 1, 3 on a line against a triangle of equal sides. Distances over their mean: 1/2, 3/2, 1 against 1.
    # Cosines at the three images: 1, -1, 1 against 1/2.
    student = torch.tensor([[0.0], [1.0], [3.0]])
    teacher = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, math.sqrt(3)]])
    assert number(rkd_loss(student, teacher, 1.0, 0.0)) == pytest.approx(2 * (0.125 + 0.125) / 9)
    assert number(rkd_loss(student, teacher, 0.0, 1.0)) == pytest.approx(2 * (0.125 + 1.0 + 0.125) / 27)
    assert number(rkd_loss(student, teacher)) == pytest.approx(25 * 0.5 / 9 + 50 * 2.5 / 27)


def test_pkt_by_hand():
    # Neighbours (2/3, 1/3) for the student, (1/2, 1/2) for the teacher.
    loss = pkt_loss(torch.eye(2), torch.ones(2, 3))
    assert number(loss) == pytest.approx((0.5 * math.log(0.75) + 0.5 * math.log(1.5)) / 2, rel=1e-5)


@pytest.mark.parametrize("loss", DISTANCES)
def test_a_relation_is_0_between_equals_and_grows_with_the_difference(loss):
    teacher, noise = features(1, 6, 8), features(2, 6, 8)
    assert number(loss(teacher, teacher)) == pytest.approx(0, abs=1e-6)
    small, large = number(loss(teacher + 0.1 * noise, teacher)), number(loss(teacher + 0.5 * noise, teacher))
    assert 1e-7 < small < large


@pytest.mark.parametrize("loss", DISTANCES)
def test_one_image_alone_has_no_relation(loss):
    student = features(1, 1, 4).requires_grad_()
    value = loss(student, features(2, 1, 4))
    assert value.item() == 0
    assert torch.autograd.grad(value, student)[0].abs().max() < 1e-6


@pytest.mark.parametrize("loss", DISTANCES)
def test_the_order_of_the_batch_and_the_scale_of_a_model_do_not_matter(loss):
    student, teacher = features(1, 6, 8), features(2, 6, 4)
    expected = pytest.approx(number(loss(student, teacher)), rel=1e-4)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert number(loss(student[order], teacher[order])) == expected
    assert number(loss(30 * student, teacher)) == expected
    assert number(loss(student, teacher / 30)) == expected
    assert number(loss(student[order], teacher)) != expected


def test_rkd_sees_neither_a_shift_nor_a_rotation_of_the_features():
    student, teacher = features(1, 6, 8), features(2, 6, 8)
    rotation, _ = torch.linalg.qr(features(3, 8, 8))
    moved = student @ rotation + features(4, 8)
    assert number(rkd_loss(moved, teacher)) == pytest.approx(number(rkd_loss(student, teacher)), rel=1e-4)
    assert number(rkd_loss(student @ rotation, student)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", DISTANCES)
def test_a_relation_only_teaches_the_student(loss):
    student, teacher = features(1, 6, 8).requires_grad_(), features(2, 6, 8).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum(dim=1).min() > 0


@pytest.mark.parametrize("loss", DISTANCES)
def test_the_gradient_is_that_of_the_formula(loss):
    student, teacher = features(1, 4, 3), features(2, 4, 3)
    (gradient,) = torch.autograd.grad(loss(student.requires_grad_(), teacher), student)
    step = 1e-5
    for index in np.ndindex(4, 3):
        shift = np.zeros((4, 3))
        shift[index] = step
        above = BY_LOOP[loss](array(student) + shift, array(teacher))
        below = BY_LOOP[loss](array(student) - shift, array(teacher))
        expected = (above - below) / (2 * step)
        assert number(gradient[index]) == pytest.approx(
            expected, rel=1e-3, abs=1e-5 * number(gradient.abs().max())
        )


@pytest.mark.parametrize("loss", DISTANCES)
def test_the_gradient_is_0_between_equals(loss):
    teacher = features(1, 6, 8)
    student = teacher.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, teacher), student)
    assert gradient.abs().max() < 1e-5


DEGENERATE = {
    "one image of 0": lambda x: x * torch.tensor([0.0, 1, 1, 1])[:, None],
    "all of 0": torch.zeros_like,
    "all equal": lambda x: x[:1].repeat(4, 1),
    "two equal": lambda x: x[[0, 0, 2, 3]],
    "tiny": lambda x: 1e-12 * x,
}


@pytest.mark.parametrize("loss", DISTANCES)
@pytest.mark.parametrize("of_student", DEGENERATE)
@pytest.mark.parametrize("of_teacher", [None, *DEGENERATE])
def test_degenerate_features_have_moderate_values_and_finite_gradients(loss, of_student, of_teacher):
    student, teacher = DEGENERATE[of_student](features(1, 4, 3)), features(2, 4, 3)
    if of_teacher is not None:
        teacher = DEGENERATE[of_teacher](teacher)
    value = loss(student.requires_grad_(), teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert -1e-7 < value.item() < 100
    assert gradient.isfinite().all()
    if of_student != "tiny":
        assert gradient.abs().max() < 1e3


@pytest.mark.parametrize("loss", DISTANCES)
def test_half_precision_is_compared_in_full_precision(loss):
    student, teacher = features(1, 4, 6).bfloat16(), features(2, 4, 6).bfloat16()
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert number(value) == pytest.approx(BY_LOOP[loss](array(student), array(teacher)), rel=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert number(loss(student, teacher)) == number(value)


@pytest.mark.parametrize("chunk", [1, 2, 4, 6, 100])
def test_rkd_in_chunks_is_the_same_loss_with_the_same_gradient(chunk, monkeypatch):
    student, teacher = features(1, 6, 8).requires_grad_(), features(2, 6, 5)
    whole = rkd_loss(student, teacher)
    (of_whole,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(rkd, "CHUNK_NUMBERS", chunk * 6 * 8)
    in_chunks = rkd_loss(student, teacher)
    (of_chunks,) = torch.autograd.grad(in_chunks, student)
    assert number(in_chunks) == pytest.approx(number(whole), rel=1e-6)
    torch.testing.assert_close(of_chunks, of_whole, rtol=1e-4, atol=1e-6)


def test_rkd_in_chunks_keeps_no_cube_of_the_batch(monkeypatch):
    batch, numbers = 24, []
    student, teacher = features(1, batch, 4).requires_grad_(), features(2, batch, 4)

    def kept_numbers() -> int:
        numbers.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
            rkd_loss(student, teacher)
        return sum(numbers)

    assert kept_numbers() > batch**3
    monkeypatch.setattr(rkd, "CHUNK_NUMBERS", 3 * batch**2)
    assert 0 < kept_numbers() < 10 * batch**2


def test_a_vector_of_0_has_no_direction():
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3e-15, -4e-15]], requires_grad=True)
    directions = unit(vectors)
    assert array(directions) == pytest.approx(np.array([[0, 0], [0.6, 0.8], [0.6, -0.8]]), rel=1e-6)
    (gradient,) = torch.autograd.grad(directions.sum(), vectors)
    assert gradient.isfinite().all()
    assert gradient[0].abs().max() <= 1


# --- correlation congruence


@pytest.mark.parametrize("batch", [2, 3, 6])
def test_cc_equals_the_loop_over_neighbours(batch):
    cc = CC(STUDENT_DIM, TEACHER_DIM, embed_dim=4)
    student, teacher = features(1, batch, STUDENT_DIM), features(2, batch, TEACHER_DIM)
    differences = [
        linear(cc.student_embed, s) - linear(cc.teacher_embed, t)
        for s, t in zip(array(student), array(teacher), strict=True)
    ]
    total = 0.0
    for i in range(batch - 1):
        total += sum(abs(differences[i][d]) * abs(differences[i + 1][d]) for d in range(4))
    assert number(cc(student, teacher)) == pytest.approx(total / (batch - 1), rel=1e-5)


def test_cc_by_hand():
    cc = CC(2, 2, embed_dim=2)
    for layer in (cc.student_embed, cc.teacher_embed):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    student = torch.tensor([[1.0, -2.0], [3.0, 4.0], [0.0, 1.0]])
    # |1 * 3| + |-2 * 4| and |3 * 0| + |4 * 1|, and their mean.
    assert number(cc(student, torch.zeros(3, 2))) == pytest.approx((11 + 4) / 2)
    assert number(cc(student, student)) == 0
    assert number(cc(student[:1], torch.zeros(1, 2))) == 0


def test_cc_is_0_between_equals_with_a_gradient_of_0_and_grows_with_the_difference():
    cc = CC(4, 4)
    cc.teacher_embed.load_state_dict(cc.student_embed.state_dict())
    teacher = features(1, 6, 4)
    student = teacher.clone().requires_grad_()
    loss = cc(student, teacher)
    assert number(loss) == 0
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.abs().max() == 0
    noise = features(2, 6, 4)
    assert 0 < number(cc(teacher + 0.1 * noise, teacher)) < number(cc(teacher + noise, teacher))


# --- contrast with a memory


LABELS = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 2, 1, 2, 2])


def make_crd(labels=LABELS, **options) -> CRD:
    return CRD(STUDENT_DIM, TEACHER_DIM, labels, NUM_IMAGES, **{"embed_dim": 4, "num_negatives": 6} | options)


def crd_batch(seed: int, batch: int = 3):
    indices = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(seed))[:batch]
    return features(seed, batch, STUDENT_DIM), features(seed + 100, batch, TEACHER_DIM), indices


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


def test_the_banks_of_crd_change_in_training_only_and_in_the_rows_of_the_batch_only():
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


def test_negatives_of_images_steps_and_seeds_are_different_and_those_of_the_same_step_the_same():
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


# --- self-supervision


def head_by_loop(head, rows) -> list[np.ndarray]:
    return [linear(head[2], np.maximum(linear(head[0], row), 0)) for row in rows]


def kept_by_loop(scores, right, share: float) -> list[int]:
    ranks = [sorted(row, reverse=True).index(row[column]) for row, column in zip(scores, right, strict=True)]
    correct = [i for i, rank in enumerate(ranks) if rank == 0]
    wrong = sorted((i for i, rank in enumerate(ranks) if rank > 0), key=lambda i: ranks[i])
    return correct + wrong[: int(share * len(wrong))]


def sskd_by_loop(sskd, student, teacher, student_logits, teacher_logits, labels) -> float:
    batch = len(labels)
    rows = []
    for head, inputs in ((sskd.student_head, student), (sskd.teacher_head, teacher)):
        embeddings = head_by_loop(head, array(inputs))
        rows.append(
            [[cosine(embeddings[batch + r], embeddings[b]) for b in range(batch)] for r in range(3 * batch)]
        )
    student_rows, teacher_rows = rows
    kept = kept_by_loop(teacher_rows, [r % batch for r in range(3 * batch)], sskd.kept_rows)
    similarity = sum(divergence(teacher_rows[r], student_rows[r], 0.5) for r in kept) / len(kept)
    z_s, z_t = student_logits[batch:].tolist(), teacher_logits[batch:].tolist()
    kept = kept_by_loop(z_t, [int(labels[r % batch]) for r in range(3 * batch)], sskd.kept_logits)
    logit = sum(divergence(z_t[r], z_s[r], 4.0) for r in kept) / len(kept)
    return 2.7 * logit + 10 * similarity


def sskd_batch(seed: int, batch: int = 4):
    return (
        features(seed, 4 * batch, STUDENT_DIM),
        features(seed + 1, 4 * batch, TEACHER_DIM),
        3 * features(seed + 2, 4 * batch, NUM_CLASSES),
        3 * features(seed + 3, 4 * batch, NUM_CLASSES),
        torch.arange(batch) % NUM_CLASSES,
    )


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("shares", [{}, {"kept_rows": 0.3, "kept_logits": 0.5}, {"kept_rows": 1.0}])
def test_sskd_equals_the_loop_over_rotated_and_upright_images(batch, shares):
    sskd = SSKD(STUDENT_DIM, TEACHER_DIM, embed_dim=3, **shares)
    inputs = sskd_batch(10 * batch, batch)
    assert number(sskd(*inputs)) == pytest.approx(sskd_by_loop(sskd, *inputs), rel=1e-4)


def test_by_default_every_rotated_image_and_three_quarters_of_the_wrong_rows_are_kept():
    sskd = SSKD(STUDENT_DIM, TEACHER_DIM)
    assert (sskd.kept_logits, sskd.kept_rows) == (1.0, 0.75)


def test_rows_are_kept_by_the_rank_of_the_right_column():
    # The right column is 0 and has the ranks 3, 1, 0, 2, 1, 0: two rows right, four wrong.
    ranks = [3, 1, 0, 2, 1, 0]
    scores = torch.tensor([[0.5] + [0.9] * rank + [0.1] * (3 - rank) for rank in ranks])
    right = torch.zeros(6, dtype=torch.int64)
    for share, kept in {
        0.0: [2, 5],
        0.25: [1, 2, 5],
        0.5: [1, 2, 4, 5],
        0.75: [1, 2, 3, 4, 5],
        1.0: range(6),
    }.items():
        assert _kept(scores, right, share).nonzero().flatten().tolist() == list(kept)


def test_pretraining_is_the_cross_entropy_of_the_own_upright_image():
    sskd, batch = SSKD(STUDENT_DIM, TEACHER_DIM, embed_dim=3), 3
    teacher = features(0, 4 * batch, TEACHER_DIM)
    embeddings = head_by_loop(sskd.teacher_head, array(teacher))
    total = 0.0
    for r in range(3 * batch):
        row = softmax([cosine(embeddings[batch + r], embeddings[b]) for b in range(batch)])
        total -= math.log(row[r % batch])
    assert number(sskd.pretraining_loss(teacher)) == pytest.approx(total / (3 * batch), rel=1e-5)
    # All alike: every upright image is as near as the own one.
    assert number(sskd.pretraining_loss(torch.ones(12, TEACHER_DIM))) == pytest.approx(math.log(3), rel=1e-5)


def test_pretraining_reaches_the_head_of_the_teacher_only_and_can_be_learned():
    sskd = SSKD(STUDENT_DIM, TEACHER_DIM)
    upright = features(0, 6, TEACHER_DIM)
    teacher = torch.cat([upright, *(upright + 0.1 * features(i, 6, TEACHER_DIM) for i in range(1, 4))])
    first = sskd.pretraining_loss(teacher.requires_grad_())
    first.backward()
    assert teacher.grad is None
    assert all(p.grad.abs().max() > 0 for p in sskd.teacher_head.parameters())
    assert all(p.grad is None for p in sskd.student_head.parameters())
    optimizer = torch.optim.SGD(sskd.teacher_head.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        loss = sskd.pretraining_loss(teacher.detach())
        loss.backward()
        optimizer.step()
    assert number(loss) < number(first) - 0.1


def test_sskd_is_0_between_equals_with_a_gradient_of_0_and_grows_with_the_difference():
    sskd = SSKD(6, 6)
    sskd.student_head.load_state_dict(sskd.teacher_head.state_dict())
    teacher, logits, labels = features(1, 16, 6), features(2, 16, NUM_CLASSES), torch.tensor([0, 1, 2, 0])
    student, student_logits = teacher.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = sskd(student, teacher, student_logits, logits, labels)
    assert number(loss) == pytest.approx(0, abs=1e-6)
    assert max(number(g.abs().max()) for g in torch.autograd.grad(loss, [student, student_logits])) < 1e-5
    for of_features, of_logits in ((1.0, 0.0), (0.0, 1.0)):
        moved = teacher + of_features * features(3, 16, 6), logits + of_logits * features(4, 16, NUM_CLASSES)
        assert number(sskd(moved[0], teacher, moved[1], logits, labels)) > 1e-3


def test_sskd_sees_neither_a_shift_of_logits_nor_upright_logits():
    sskd = SSKD(STUDENT_DIM, TEACHER_DIM)
    student, teacher, student_logits, teacher_logits, labels = sskd_batch(0)
    expected = pytest.approx(number(sskd(student, teacher, student_logits, teacher_logits, labels)), rel=1e-5)
    assert (
        number(sskd(student, teacher, student_logits + torch.arange(16.0)[:, None], teacher_logits, labels))
        == expected
    )
    student_logits[:4], teacher_logits[:4] = 7.0, torch.eye(4, NUM_CLASSES)
    assert number(sskd(student, teacher, student_logits, teacher_logits, labels)) == expected
    student_logits[4, 0] += 1
    assert number(sskd(student, teacher, student_logits, teacher_logits, labels)) != expected


def test_rotations_are_upright_first_then_turned_left_one_two_three_times():
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    views = rotations(torch.stack([image, image + 10])[:, None])
    turned = [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]
    assert views.shape == (8, 1, 2, 2)
    for number, expected in enumerate(turned):
        assert views[2 * number, 0].tolist() == expected
        assert (views[2 * number + 1, 0] - 10).tolist() == expected


def test_images_that_are_not_square_cannot_be_rotated():
    with pytest.raises(ValueError, match="must be square, not 4 x 6"):
        rotations(torch.zeros(2, 3, 4, 6))


def test_views_must_be_four_of_each_image():
    sskd = SSKD(STUDENT_DIM, TEACHER_DIM)
    with pytest.raises(AssertionError, match="16 views of 3 images"):
        sskd(*sskd_batch(0)[:4], torch.arange(3))
    with pytest.raises(AssertionError, match="15 views are not four"):
        sskd.pretraining_loss(features(0, 15, TEACHER_DIM))


# --- what all with parameters have in common

MODULES = {
    "cc": (lambda: CC(STUDENT_DIM, TEACHER_DIM), lambda seed: crd_batch(seed)[:2]),
    "crd": (make_crd, crd_batch),
    "sskd": (lambda: SSKD(STUDENT_DIM, TEACHER_DIM), sskd_batch),
}


@pytest.fixture(params=MODULES)
def made(request):
    """A module, its constructor and its inputs as a function of a seed."""
    make, inputs = MODULES[request.param]
    return make(), make, inputs


def test_gradients_reach_the_student_and_what_is_trained_but_not_the_teacher(made):
    module, _, inputs = made
    student, teacher, *rest = inputs(1)
    student.requires_grad_(), teacher.requires_grad_()
    module(student, teacher, *rest).backward()
    assert teacher.grad is None
    # SSKD leaves out up to a quarter of the rotated images.
    reached = (student.grad.abs().sum(dim=1) > 0).float().mean()
    assert reached >= 0.75 if isinstance(module, SSKD) else reached == 1
    for name, parameter in module.named_parameters():
        if name.startswith("teacher_head"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.abs().max() > 0, name


def test_a_gradient_of_logits_reaches_the_rotated_images_of_the_student_only():
    sskd = SSKD(STUDENT_DIM, TEACHER_DIM)
    student, teacher, student_logits, teacher_logits, labels = sskd_batch(0)
    student_logits.requires_grad_(), teacher_logits.requires_grad_()
    sskd(student, teacher, student_logits, teacher_logits, labels).backward()
    assert teacher_logits.grad is None
    assert student_logits.grad[:4].abs().max() == 0
    assert student_logits.grad[4:].abs().sum(dim=1).min() > 0


@pytest.mark.parametrize("bias", ["as made", "none"])
@pytest.mark.parametrize("of", ["student", "teacher", "both"])
def test_features_of_0_give_finite_gradients(made, bias, of):
    module, _, inputs = made
    if bias == "none":
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
    student, teacher, *rest = inputs(1)
    for features_of, name in ((student, "student"), (teacher, "teacher")):
        if of in (name, "both"):
            features_of.zero_()
    for _ in range(2):
        loss = module(student.requires_grad_(), teacher, *rest)
        assert 0 <= number(loss) < 1e3
        trained = [student, *(p for n, p in module.named_parameters() if not n.startswith("teacher_head"))]
        for gradient in torch.autograd.grad(loss, trained):
            assert gradient.isfinite().all()
            assert gradient.abs().max() < 1e3


def test_a_reloaded_module_goes_on_identically(made):
    module, make, inputs = made
    for seed in range(2):
        module(*inputs(seed))
    reloaded = make()
    assert number(reloaded.eval()(*inputs(2))) != number(module.eval()(*inputs(2)))
    reloaded.load_state_dict(copy.deepcopy(module.state_dict()))
    module.train(), reloaded.train()
    for seed in range(2, 5):
        assert number(reloaded(*inputs(seed))) == number(module(*inputs(seed)))
    for name, value in module.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], value), name


def test_a_module_is_the_same_in_half_precision_and_under_autocast(made):
    module, _, inputs = made
    module.eval()
    halves = [t.bfloat16() if t.is_floating_point() else t for t in inputs(1)]
    full = module(*(t.float() if t.is_floating_point() else t for t in halves))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = module(*halves)
    assert under_autocast.dtype == torch.float32
    assert math.isfinite(number(full))
    assert number(under_autocast) == number(module(*halves)) == number(full)


@pytest.mark.parametrize("name", [*MODULES, "sp_loss", "rkd_loss", "pkt_loss"])
@pytest.mark.parametrize("what", ["value", "in chunks"])
def test_no_loss_waits_for_a_value(name, what, monkeypatch):
    # Fake tensors have shapes and no values: what reads a value on the host is an error.
    if what == "in chunks":
        monkeypatch.setattr(rkd, "CHUNK_NUMBERS", 1)
    make, inputs = MODULES.get(name, (None, lambda seed: crd_batch(seed)[:2]))
    loss = make() if make else {f.__name__: f for f in DISTANCES}[name]
    mode = FakeTensorMode()

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        # Not made from the tensor: the value of a single number would be kept.
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype)

    arguments = [fake(tensor) for tensor in inputs(1)]
    if make:
        for module in loss.modules():
            for key, parameter in module._parameters.items():
                module._parameters[key] = torch.nn.Parameter(fake(parameter))
            for key, buffer in module._buffers.items():
                module._buffers[key] = fake(buffer)
    with mode:
        value = loss(arguments[0].requires_grad_(), *arguments[1:])
        (gradient,) = torch.autograd.grad(value, arguments[0])
    assert value.shape == ()
    assert gradient.shape == arguments[0].shape


def checked(function):
    return jaxtyped(typechecker=beartype)(function)


@pytest.mark.parametrize("loss", DISTANCES)
def test_a_relation_of_batches_of_different_size_is_refused(loss):
    assert checked(loss)(features(1, 4, 3), features(2, 4, 5)).shape == ()
    with pytest.raises(TypeCheckError, match="teacher_"):
        checked(loss)(features(1, 4, 3), features(2, 5, 3))


@pytest.mark.parametrize("loss", [rkd_loss, pkt_loss])
def test_a_relation_of_features_refuses_maps(loss):
    with pytest.raises(TypeCheckError, match="student_features"):
        checked(loss)(features(1, 4, 3, 2, 2), features(2, 4, 3, 2, 2))


def test_a_module_refuses_batches_of_different_size(made):
    module, _, inputs = made
    forward = checked(type(module).forward)
    assert forward(module, *inputs(1)).shape == ()
    for position in range(1, len(inputs(1))):
        wrong = list(inputs(1))
        wrong[position] = wrong[position][:-1]
        # Labels of SSKD are of the upright images: their number is compared by an assertion.
        with pytest.raises((TypeCheckError, AssertionError), match=r"Type-check|views of"):
            forward(module, *wrong)
