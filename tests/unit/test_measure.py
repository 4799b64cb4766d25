"""What a model costs and how good it is, against closed formulas, tables and loops."""

import itertools
import math

import numpy as np
import pytest
import timm
import torch

from stepwell.data.spec import InputSpec
from stepwell.measure.size import _counted, _counted_with_numbers, count_macs, num_params
from stepwell.pruning.families import find_groups
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.tasks.classification import Answers, evaluate, mcnemar, predict, wilson_interval
from tiny import NUM_CLASSES, SPEC, VARIANTS, FixedEval, group_sizes, random_batches, tiny_vit

IMAGENET = InputSpec((224, 224), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# --- parameters and MACs


def macs_by_formula(widths: dict[str, int], tokens: int, width: int = 24, head_dim: int = 6) -> int:
    """Heads: four products with the tokens and two of tokens with tokens; neurons: two products."""
    total = 0
    for name, units in widths.items():
        if name.endswith("attn"):
            total += units * (4 * tokens * width * head_dim + 2 * tokens**2 * head_dim)
        else:
            total += 2 * tokens * width * units
    patches = 4 * (3 * 8 * 8) * width
    return total + patches + width * NUM_CLASSES


def params_by_formula(widths: dict[str, int], tokens: int, width: int = 24, head_dim: int = 6) -> int:
    total = 0
    for name, units in widths.items():
        per_unit = head_dim * (4 * width + 3) if name.endswith("attn") else 2 * width + 1
        total += units * per_unit + width + 2 * width  # with the output bias and one norm
    embedding = (3 * 8 * 8) * width + width + tokens * width + width  # patches, positions, class token
    return total + embedding + 2 * width + width * NUM_CLASSES + NUM_CLASSES


@pytest.fixture(scope="module")
def vit_base():
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224")


def test_vit_base_has_its_published_size(vit_base):
    assert num_params(vit_base) == 86_567_656
    assert round(num_params(vit_base) / 1e6, 2) == 86.57
    assert round(count_macs(vit_base, IMAGENET) / 1e9, 2) == 17.56


@pytest.mark.parametrize(
    "widths",
    [
        {},
        {"blocks.0.attn": 1, "blocks.1.attn": 3, "blocks.0.mlp": 8, "blocks.2.mlp": 5},
        {"blocks.0.attn": 0, "blocks.1.mlp": 0},
        dict.fromkeys(("blocks.0.attn", "blocks.0.mlp", "blocks.2.attn", "blocks.2.mlp"), 0),
    ],
)
def test_a_small_model_costs_what_the_formula_says(widths):
    model = tiny_vit()
    skeleton = build_skeleton(model, find_groups(model), widths)
    kept = {**group_sizes(model), **widths}
    assert count_macs(skeleton, SPEC) == macs_by_formula(kept, tokens=5)
    assert num_params(skeleton) == params_by_formula(kept, tokens=5)
    # A physical model costs what its skeleton does.
    student = fill(
        skeleton, leading_units(dict(model.named_parameters()), skeleton, find_groups(model), widths)
    )
    assert count_macs(student, SPEC) == count_macs(skeleton, SPEC)
    assert num_params(student) == num_params(skeleton)


@pytest.mark.parametrize(("variant", "tokens"), [("registers", 7), ("no-class-token", 4), ("layer-scale", 5)])
def test_all_tokens_are_counted(variant, tokens):
    model = tiny_vit(**VARIANTS[variant])
    assert count_macs(model, SPEC) == macs_by_formula(group_sizes(model), tokens)


class Branching(torch.nn.Sequential):
    """Asks for a value of its images, which have none on the meta device."""

    def forward(self, images):
        return super().forward(images if images.mean() > -1 else -images)


@pytest.mark.brings("model", "A forward pass with a branch on values of the image", "counted on the CPU")
def test_a_branch_on_values_is_counted():
    layers = (torch.nn.Conv2d(3, 4, 1), torch.nn.Flatten(), torch.nn.Linear(4 * 256, 5))
    skeleton = build_skeleton(Branching(*layers), [], {})
    assert count_macs(skeleton, SPEC) == 3 * 4 * 256 + 4 * 256 * 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_numbers_are_counted_as_shapes_are(variant):
    """End-to-end tests of tiny models count so."""
    model = tiny_vit(**VARIANTS[variant])
    shapes, numbers = (count(model, SPEC).get_flop_counts() for count in (_counted, _counted_with_numbers))
    assert shapes == numbers
    assert shapes["Global"]


def test_counting_leaves_the_model_as_it_was():
    model = tiny_vit().train()
    pointers = [p.data_ptr() for p in model.parameters()]
    count_macs(model, SPEC)
    assert model.training
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


# --- accuracy


def random_answers(rng, num_images: int, num_classes: int = 4, sharpness: float = 3.0) -> Answers:
    logits = sharpness * rng.standard_normal((num_images, num_classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = rng.integers(num_classes, size=num_images)
    return Answers(torch.tensor(probabilities, dtype=torch.float32), torch.tensor(labels))


@pytest.mark.parametrize("num_images", [1, 7, 500])
def test_figures_are_those_of_loops(num_images):
    found = random_answers(np.random.default_rng(num_images), num_images)
    right, log_likelihood = 0, 0.0
    for row, label in zip(found.probabilities.tolist(), found.labels.tolist(), strict=True):
        right += max(range(4), key=row.__getitem__) == label
        log_likelihood += math.log(max(row[label], 1e-12))
    assert found.meter.top1 == pytest.approx(100 * right / num_images)
    assert found.meter.log_likelihood == pytest.approx(log_likelihood / num_images)
    assert found.correct.sum().item() == right


def test_one_image_cannot_rule_the_likelihood():
    sure_and_wrong = Answers(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([1, 1]))
    assert sure_and_wrong.meter.log_likelihood == pytest.approx((math.log(1e-12) + math.log(0.5)) / 2)


@pytest.mark.parametrize(("num_images", "sharpness"), [(1, 3.0), (40, 1.0), (1000, 3.0)])
def test_calibration_error_is_that_of_a_loop_over_bins(num_images, sharpness):
    found = random_answers(np.random.default_rng(0), num_images, sharpness=sharpness)
    total = 0.0
    for i in range(15):
        inside = []
        for row, label in zip(found.probabilities.tolist(), found.labels.tolist(), strict=True):
            confidence = max(row)
            if i / 15 <= confidence < (i + 1) / 15 or (i == 14 and confidence == 1.0):
                inside.append((confidence, row.index(confidence) == label))
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            confidence = sum(c for c, _ in inside) / len(inside)
            total += len(inside) / num_images * abs(accuracy - confidence)
    assert found.meter.calibration_error == pytest.approx(100 * total, rel=1e-6)


def test_calibration_error_by_hand():
    # Confidence 1 and all right: 0. Confidence 0.8 and all wrong: 80 percent.
    sure = Answers(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([0, 0, 0]))
    assert sure.meter.calibration_error == 0
    wrong = Answers(torch.tensor([[0.8, 0.2]] * 3), torch.tensor([1, 1, 1]))
    assert wrong.meter.calibration_error == pytest.approx(80, rel=1e-6)
    # Errors in both directions within one bin cancel, in different bins they do not.
    half_right = Answers(torch.tensor([[0.5, 0.5]] * 2), torch.tensor([0, 1]))
    assert half_right.meter.calibration_error == 0


def test_predict_runs_every_image_once_in_order():
    model = tiny_vit()
    batches = [*random_batches(2, 3), *random_batches(1, 2, seed=8)]
    found = predict(model, FixedEval(batches))
    assert found.labels.tolist() == [int(label) for batch in batches for label in batch.labels]
    with torch.no_grad():
        logits = np.concatenate([model(batch.images).double().numpy() for batch in batches])
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert found.probabilities.numpy() == pytest.approx(expected, abs=1e-6)
    assert not found.probabilities.requires_grad


def test_evaluate_sums_up_what_predict_keeps():
    model = tiny_vit()
    batches = FixedEval([*random_batches(2, 3), *random_batches(1, 2, seed=8)])
    found, kept = evaluate(model, batches), predict(model, batches).meter
    assert found.num_images == kept.num_images == 8
    assert found.num_correct == kept.num_correct
    assert found.log_likelihood == pytest.approx(kept.log_likelihood, rel=1e-12)
    assert found.calibration_error == pytest.approx(kept.calibration_error, rel=1e-12)


# --- intervals and tests


def test_wilson_interval_holds_the_accuracy_itself_at_both_ends():
    for n in range(1, 200):
        assert wilson_interval(100.0, n)[1] == 100.0
        assert wilson_interval(0.0, n)[0] == 0.0


@pytest.mark.parametrize(
    ("right", "num_images", "low", "high"),
    # Newcombe (1998), table I, method 3, and the textbook case of 8 in 10.
    [
        (8, 10, 49.0, 94.3),
        (81, 263, 25.5, 36.6),
        (15, 148, 6.2, 16.0),
        (0, 20, 0.0, 16.1),
        (1, 29, 0.6, 17.2),
        (20, 20, 83.9, 100.0),
    ],
)
def test_wilson_interval_is_the_published_one(right, num_images, low, high):
    found = wilson_interval(100 * right / num_images, num_images)
    assert [round(end, 1) for end in found] == [low, high]


@pytest.mark.parametrize("num_images", [1, 10, 1000])
def test_the_ends_of_the_interval_are_accuracies_from_which_this_one_is_196_deviations_away(num_images):
    for right in {0, num_images // 3, num_images // 2, num_images}:
        observed = right / num_images
        for end in wilson_interval(100 * observed, num_images):
            p = end / 100
            deviation = math.sqrt(p * (1 - p) / num_images)
            if 1e-9 < p < 1 - 1e-9:
                assert abs(observed - p) / deviation == pytest.approx(1.959964, rel=1e-6)
            else:
                assert observed == pytest.approx(p, abs=1e-9)


def answers(right: list[bool]) -> Answers:
    """Two classes; the true one is 1."""
    return Answers(
        torch.tensor([[0.1, 0.9] if r else [0.9, 0.1] for r in right]),
        torch.ones(len(right), dtype=torch.long),
    )


def binomial_test(n: int, k: int) -> float:
    """Sum over all outcomes of n fair coins that are as unlikely as k heads, by counting them."""
    if n <= 10:
        counts = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
        ways = [counts.count(i) for i in range(n + 1)]
    else:
        ways = [math.factorial(n) // math.factorial(i) // math.factorial(n - i) for i in range(n + 1)]
    return sum(w for w in ways if w <= ways[k]) / 2**n


@pytest.mark.parametrize(
    ("teacher_only", "student_only"), [*itertools.product(range(5), repeat=2), (10, 0), (15, 5), (60, 40)]
)
def test_mcnemar_is_the_binomial_test_of_the_images_they_disagree_on(teacher_only, student_only):
    teacher = [True] * teacher_only + [False] * student_only + [True, True, False]
    student = [False] * teacher_only + [True] * student_only + [True, True, False]
    found = mcnemar(answers(teacher), answers(student))
    assert (found.only_teacher_right, found.only_student_right) == (teacher_only, student_only)
    assert found.p_value == pytest.approx(binomial_test(teacher_only + student_only, teacher_only))


def test_mcnemar_on_thousands_of_images():
    found = mcnemar(answers([True] * 1100 + [False] * 1000), answers([False] * 1100 + [True] * 1000))
    # Two-sided normal approximation with continuity correction: z = 99 / sqrt(2100).
    assert found.p_value == pytest.approx(math.erfc(99 / math.sqrt(2100) / math.sqrt(2)), rel=0.01)


def test_mcnemar_on_a_test_set_of_the_size_of_imagenets() -> None:
    """17,000 images that the two disagree on: whole numbers of 17,000 bits, each made of the one before."""
    found = mcnemar(answers([True] * 8600 + [False] * 8400), answers([False] * 8600 + [True] * 8400))
    # The normal distribution with continuity correction: z = (200 - 1) / sqrt(17,000).
    assert found.p_value == pytest.approx(math.erfc(199 / math.sqrt(17_000) / math.sqrt(2)), rel=1e-3)
