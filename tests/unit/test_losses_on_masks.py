"""Losses over pixels, each against a loop that is written from its paper."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stepwell.config.loss_facts import FEATURE_LOSSES, LOGIT_LOSSES
from stepwell.config.options import LossOptions
from stepwell.data.mask_classes import IGNORED
from stepwell.losses.adversarial import SKD, Discriminator
from stepwell.losses.choose import Pair
from stepwell.losses.cirkd import CIRKD, Queues, pixel_relations
from stepwell.losses.cwd import CWD, cwd_loss
from stepwell.losses.dense import at_most, labels_at, rows_of
from stepwell.losses.distillation import loss_macs, make_distillation
from stepwell.losses.ifvd import ifvd_loss
from stepwell.losses.output import Output, Target
from stepwell.losses.skd import skd_loss
from tiny import pair

OF_MASKS = [name for name, facts in {**LOGIT_LOSSES, **FEATURE_LOSSES}.items() if facts.masks == "only"]


def random(*shape: int, seed: int = 0, learns: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).requires_grad_(learns)


def masks(batch: int = 2, size: tuple[int, int] = (4, 6), classes: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(classes, (batch, *size), generator=generator)
    labels[0, 0] = IGNORED
    return labels


def softmax(values: list[float]) -> list[float]:
    exponents = [math.exp(v) for v in values]
    return [e / sum(exponents) for e in exponents]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cwd_is_a_loop_over_channels(temperature):
    s, t = random(2, 3, 2, 4), random(2, 3, 2, 4, seed=1)
    total = 0.0
    for b, c in itertools.product(range(2), range(3)):
        ours, theirs = (softmax((m[b, c].flatten() / temperature).tolist()) for m in (s, t))
        total += kl(theirs, ours)
    expected = temperature**2 * total / 6
    assert cwd_loss(s, t, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert CWD(3, 3, temperature)(s, t).item() == pytest.approx(expected, rel=1e-5)
    assert cwd_loss(t, t).item() == pytest.approx(0, abs=1e-6)


def test_other_widths_pass_through_a_convolution():
    loss = CWD(2, 3)
    assert loss(random(2, 2, 4, 4), random(2, 3, 2, 2)).isfinite()
    assert {name: p.shape for name, p in loss.named_parameters()} == {
        "project.weight": (3, 2, 1, 1),
        "project.bias": (3,),
    }


def test_masks_at_a_maps_size_are_where_the_map_is():
    """The edge of two halves, over all places where it can be, against the mean over each window."""
    places = torch.arange(81)
    halves = (torch.arange(80) >= places[:, None]).long()[:, None].expand(-1, 8, -1)
    means = F.adaptive_avg_pool2d(halves.float(), (2, 16)).sum(dim=(1, 2))
    assert (labels_at(halves, (2, 16)).sum(dim=(1, 2)) - means).mean().abs() < 0.01


def test_skd_is_a_loop_over_pairs_of_positions():
    s, t = random(2, 3, 4, 6), random(2, 5, 4, 6, seed=1)
    total, count = 0.0, 0
    for b in range(2):
        cells = [
            [m[b, :, i : i + 2, j : j + 2].amax(dim=(1, 2)) for i in range(0, 4, 2) for j in range(0, 6, 2)]
            for m in (s, t)
        ]
        for i, j in itertools.product(range(6), repeat=2):
            ours, theirs = (cosine(of[i], of[j]) for of in cells)
            total, count = total + (ours - theirs) ** 2, count + 1
    assert skd_loss(s, t).item() == pytest.approx(total / count, rel=1e-4)
    assert skd_loss(t, t) == 0
    assert at_most(random(1, 1, 64, 96), 100).shape[2:] == (8, 12)


def test_ifvd_is_a_loop_over_pixels():
    s, t, labels = random(2, 3, 4, 6), random(2, 5, 4, 6, seed=1), masks()
    total, count = 0.0, 0
    for b, i, j in itertools.product(range(2), range(4), range(6)):
        if (cls := int(labels[b, i, j])) == IGNORED:
            continue
        ours, theirs = (cosine(m[b, :, i, j], m[b][:, labels[b] == cls].mean(dim=1)) for m in (s, t))
        total, count = total + (ours - theirs) ** 2, count + 1
    assert ifvd_loss(s, t, labels).item() == pytest.approx(total / count, rel=1e-4)
    large = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert ifvd_loss(s, t, large).item() == pytest.approx(total / count, rel=1e-4)
    assert torch.equal(labels_at(large, (4, 6)), labels)
    assert ifvd_loss(s, t, torch.full_like(labels, IGNORED)) == 0


def test_relations_between_images_are_a_loop_over_pairs_of_images():
    s, t, tau = random(3, 4, 2, 2), random(3, 5, 2, 2, seed=1), 0.1
    total = 0.0
    for i, j, p in itertools.product(range(3), range(3), range(4)):
        rows = []
        for m in (s, t):
            a, others = m[i].flatten(1)[:, p], m[j].flatten(1)
            rows.append(softmax([cosine(a, others[:, q]) / tau for q in range(4)]))
        total += kl(rows[1], rows[0]) / 4
    found = pixel_relations(rows_of(s), rows_of(t), tau)
    assert found.item() == pytest.approx(total / 9, rel=1e-4)


def test_queues_forget_the_oldest():
    queues = Queues(num_classes=2, length=3, dim=1)
    queues.push(1, torch.tensor([[1.0], [2.0]]))
    assert sorted(queues.drawn(10).flatten().tolist()) == [1, 2]
    queues.push(1, torch.tensor([[3.0], [4.0]]))
    assert sorted(queues.drawn(10).flatten().tolist()) == [2, 3, 4]
    queues.push(0, torch.tensor([[9.0]]))
    assert len(queues.drawn(2)) == 2  # one of each class
    queues.push(1, torch.arange(7.0)[:, None])
    assert sorted(queues.rows[1].flatten().tolist()) == [4, 5, 6]


def test_the_memory_of_cirkd_holds_the_teachers_rows():
    s, t, labels = random(2, 3, 4, 6, learns=True), random(2, 5, 4, 6, seed=1), masks()
    loss = CIRKD(3, 5, 3)
    first = loss(s, t, labels)
    assert first.item() == pytest.approx(pixel_relations(rows_of(s), rows_of(t)).item(), rel=1e-5)
    for cls in range(3):
        means = [t[b][:, labels[b] == cls].mean(dim=1) for b in range(2) if (labels[b] == cls).any()]
        kept = loss.regions.rows[cls, : int(loss.regions.used[cls])]
        assert torch.allclose(kept, F.normalize(torch.stack(means), dim=1), atol=1e-6)
        counts = [min(16, int((labels[b] == cls).sum())) for b in range(2)]
        assert int(loss.pixels.used[cls]) == sum(counts)
    # The regions are so few that all are drawn: the third term as a loop.
    only = CIRKD(3, 5, 3, pixel_weight=0.0, memory_weight=0.0, region_weight=1.0).eval()
    only.regions, only.pixels = loss.regions, loss.pixels
    known = torch.cat([loss.regions.rows[c, : int(loss.regions.used[c])] for c in range(3)])
    ours = only.head(s)
    total = 0.0
    for b, i, j in itertools.product(range(2), range(4), range(6)):
        rows = [softmax([cosine(m[b, :, i, j], row) / 0.1 for row in known]) for m in (ours, t)]
        total += kl(rows[1], rows[0]) / 48
    assert only(s, t, labels).item() == pytest.approx(total, rel=1e-4)
    loss(s, t, labels).backward()
    assert s.grad.isfinite().all()
    assert all(p.grad is not None for p in loss.head.parameters())


def test_each_side_of_the_adversarial_term_learns_its_own():
    torch.manual_seed(0)
    features = random(2, 3, 8, 8), random(2, 3, 8, 8, seed=1)
    logits = random(2, 4, 16, 16, learns=True), random(2, 4, 16, 16, seed=1)
    loss = SKD(4, pair_weight=0.0)
    loss(*features, *logits).backward()
    judge = Discriminator(4)
    judge.load_state_dict(loss.discriminator.state_dict())
    student = logits[0].detach().requires_grad_()
    (-0.001 * judge(student).mean()).backward()
    assert torch.allclose(logits[0].grad, student.grad, atol=1e-9)
    judge.zero_grad()
    told = (1 - judge(logits[1])).relu().mean() + (1 + judge(logits[0].detach())).relu().mean()
    (0.1 * told).backward()
    for ours, theirs in zip(loss.discriminator.parameters(), judge.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)
    with_pairs = SKD(4, generator_weight=0.0, discriminator_weight=0.0)
    assert with_pairs(*features, *logits).item() == pytest.approx(10 * skd_loss(*features).item(), rel=1e-5)


def example(num: int, seed: int, dim: int, learns: bool = False) -> Output:
    logits = random(num, 3, 8, 12, seed=seed, learns=learns)
    return Output(logits, [], random(num, dim, 4, 6, seed=seed + 1, learns=learns))


def of_masks(**facts) -> Pair:
    return pair(
        example(2, 1, 3), example(2, 9, 5), task="segmentation", blank=torch.zeros(2, 3, 8, 12), **facts
    )


@pytest.mark.parametrize("name", [*OF_MASKS, "kd", "dist"])
def test_every_loss_of_masks_teaches(name):
    kind = "logit" if name in LOGIT_LOSSES else "feature"
    weights = {"logit_weight": 0.0, "feature_weight": 0.0, f"{kind}_weight": 1.0, f"{kind}_loss": name}
    options = LossOptions.model_validate({"task_weight": 0.5, **weights})
    loss = make_distillation(options, of_masks(), seed=0)
    student, target = example(3, 3, 3, learns=True), Target(masks(3, (8, 12)), torch.arange(3), 0.5)
    for _ in range(2):  # a memory is filled by then
        parts = loss(student, example(3, 20, 5), target)
    parts["loss"].backward()
    read = student.features if kind == "feature" else student.logits
    assert read.grad.isfinite().all()
    assert read.grad.abs().sum() > 0
    assert loss_macs(make_distillation(options, of_masks(), seed=0), of_masks(), 2).keys() == {"main"}


def test_what_cirkd_costs_is_counted_with_full_queues(monkeypatch):
    """As after some steps: with empty ones, the first step of a training is much cheaper than the others."""
    options = LossOptions(feature_loss="cirkd", logit_weight=0.0, feature_args={"num_pixels": 8})
    features, logits = torch.zeros(2, 5, 4, 6), torch.zeros(2, 3, 16, 24)
    found = pair(
        Output(logits, [], features), Output(logits, [], features),
        blank=torch.zeros(2, 3, 16, 24), task="segmentation",
    )  # fmt: skip
    full = loss_macs(make_distillation(options, found, seed=0), found, 2)["main"]
    monkeypatch.setattr(CIRKD, "fill", lambda _self: None)
    empty = loss_macs(make_distillation(options, found, seed=0), found, 2)["main"]
    # 8 rows in each queue of pixels, a third of 1,024 drawn of regions; forward for both, back for one.
    assert full - empty == 3 * (4 * 6) * 5 * 3 * (8 + 1024 // 3)
