"""Embeddings: what is learnt, measured and scored where there are no classes; against plain loops."""

from __future__ import annotations

import math
import random

import pytest
import timm
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from stepwell.config.commands import CompressConfig
from stepwell.errors import ConfigError
from stepwell.losses.embedding import embedding_loss
from stepwell.pruning.families import find_groups
from stepwell.setting.suits_task import _check_embedding
from stepwell.stages.score import importance_by_gradient
from stepwell.tasks import embedding
from stepwell.tasks.embedding import Answers, loss_per_image, nearest
from stepwell.tasks.measures import performance
from tiny import FixedEval, random_batches


def numbers(rows: int, dim: int, seed: int) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_the_squared_error_in_units_of_the_teacher():
    student, teacher = numbers(3, 4, 0), numbers(3, 4, 1)
    pairs = list(zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    expected = sum((s - t) ** 2 for s, t in pairs) / sum(t * t for _, t in pairs)
    assert embedding_loss(student, teacher).item() == pytest.approx(expected)
    assert embedding_loss(torch.zeros(3, 4), teacher).item() == pytest.approx(1)
    assert embedding_loss(7 * student, 7 * teacher).item() == pytest.approx(expected)


def test_the_measure_is_the_mean_cosine():
    ours, theirs = numbers(50, 4, 0), numbers(50, 4, 1)
    answers = Answers(ours, theirs)
    cosines = [
        sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)
        for x, y in zip(ours.tolist(), theirs.tolist(), strict=True)
    ]
    mean = sum(cosines) / 50
    half = 1.959964 * math.sqrt(sum((c - mean) ** 2 for c in cosines)) / 50
    assert answers.quality == pytest.approx(100 * mean)
    assert answers.quality_interval == pytest.approx((100 * (mean - half), 100 * (mean + half)))
    assert Answers(ours, 3 * ours).quality == pytest.approx(100)
    first, second = Answers(ours[:20], theirs[:20]), Answers(ours[20:], theirs[20:])
    assert (first + second).quality == answers.quality
    assert (answers.log_likelihood, answers.calibration_error) == (None, None)
    assert performance(-3.0, None, "cosine") == 0


def test_neighbours_are_those_of_scikit_learn():
    rng = random.Random(0)
    labels = torch.tensor([rng.randrange(3) for _ in range(90)])
    truth = torch.tensor([rng.randrange(3) for _ in range(30)])
    centres = numbers(3, 5, 0)
    known, asked = centres[labels] + numbers(90, 5, 1), centres[truth] + numbers(30, 5, 2)
    for k in (1, 3, 200):
        found = nearest(known, labels, asked, truth, k)
        model = KNeighborsClassifier(min(k, 90), metric="cosine").fit(known.numpy(), labels.numpy())
        expected = 100 * model.score(asked.numpy(), truth.numpy())
        assert found == pytest.approx(
            expected, abs=100 / 30 if k == 3 else 1e-9
        )  # of three, ties are settled


def test_of_equally_common_classes_the_nearer_one_counts():
    known = torch.tensor([[1.0, 0.0], [1.0, 0.4], [1.0, 0.1], [1.0, 0.3]])
    asked, labels = torch.tensor([[1.0, 0.05]]), torch.tensor([0, 0, 1, 1])
    assert nearest(known, labels, asked, torch.tensor([1]), 4) == 100


@pytest.mark.parametrize("unit", [False, True])
def test_units_are_scored_by_how_far_the_embedding_moves(unit):
    """The mean of |direction . J| over random directions is |J| sqrt(2 / pi); J is d embedding / d gate."""
    torch.manual_seed(0)
    tiny = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=4, num_classes=0
    ).eval()
    model = nn.Sequential(tiny, Unit()) if unit else tiny
    groups = [group for group in find_groups(model) if group.kind == "head"]
    batches = random_batches(40, 8)
    found = importance_by_gradient(model, groups, FixedEval(batches), loss_per_image=embedding.loss_per_image)
    moves = torch.zeros(4)
    for batch in batches[:6]:
        moves += moved(model, tiny.blocks[0].attn, batch.images)
    ours, theirs = (
        torch.tensor(values) / max(values) for values in (found.raw[groups[0].name], moves.tolist())
    )
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=0.25)
    assert min(found.raw[groups[0].name]) > 1e-4


class Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x)


def moved(model: nn.Module, attention: nn.Module, images: Tensor, step: float = 1e-2) -> Tensor:
    """Sum over images of |d embedding / d gate| of each head, by finite differences."""
    sums = []
    with torch.no_grad():
        for head in range(4):

            def scale(_module, inputs, head=head):
                x = inputs[0].clone()
                x[..., 6 * head : 6 * head + 6] *= 1 - step
                return (x, *inputs[1:])

            whole = model(images)
            handle = attention.proj.register_forward_pre_hook(scale)
            sums.append(((whole - model(images)) / step).norm(dim=1).sum())
            handle.remove()
    return torch.stack(sums)


def test_what_is_scored_by_does_not_depend_on_labels_or_on_the_call():
    z = numbers(5, 4, 0)
    assert torch.equal(loss_per_image(z), loss_per_image(z, torch.zeros(5)))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"task_weight": 0.5}, "--task-weight: an embedding is learnt from the teacher alone"),
        ({"logit_loss": "dist"}, "--logit-loss dist is for classes, and the teacher returns an embedding"),
        (
            {"feature_loss": "rkd"},
            "--feature-loss rkd reads what a classifier reads or says, and there is",
        ),
        ({"logit_weight": 0, "feature_weight": 0}, "are 0: an embedding has nothing else to learn from"),
    ],
)
def test_losses_of_classes_are_refused(words, error):
    with pytest.raises(ConfigError, match=error):
        _check_embedding(CompressConfig(**words))
    _check_embedding(CompressConfig())


@pytest.mark.parametrize("metric", ["top1", "likelihood"])
def test_there_is_no_likelihood(metric):
    assert embedding.resolve_metric("auto", 10) == "cosine"
    with pytest.raises(ConfigError, match=f"--metric {metric}: these images are measured by cosine alone"):
        embedding.resolve_metric(metric, 10)
