"""A class for each pixel: loss, distillation and measure against plain loops and scikit-learn."""

from __future__ import annotations

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from report_example import make_model, make_result
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

from stepwell.config.options import DataOptions, LossOptions
from stepwell.data.batches import Batch, EvalBatches
from stepwell.data.mask_classes import IGNORED
from stepwell.data.spec import InputSpec
from stepwell.data.splits import resolve_data
from stepwell.errors import ConfigError
from stepwell.losses.choose import logit_loss
from stepwell.losses.dist import dist_loss
from stepwell.losses.logit import kd_loss
from stepwell.losses.output import Output
from stepwell.report.pictures import Picture
from stepwell.report.report import TestPredictions, write_report
from stepwell.tasks import classification, outputs, segmentation
from stepwell.tasks.outputs import AsLogits, as_logits, check_output, is_dense
from stepwell.tasks.segmentation import DRAWS, Answers, Meter, loss_per_image, times_drawn
from stepwell.tasks.task import Task, loss_of, task_of
from tiny import FixedEval

from tiny import pair  # isort: skip


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def masks(num: int, classes: int = 4, size: tuple[int, int] = (5, 6), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (num, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORED
    return labels


def batches(num: int = 7, batch: int = 3, skill: float = 1.0) -> list[Batch]:
    """Images that are the logits themselves."""
    labels = masks(num)
    right = torch.nn.functional.one_hot(labels.clamp_max(3), 4).movedim(-1, 1)
    images = random((num, 4, 5, 6), 3) + skill * right
    return [
        Batch(*rows)
        for rows in zip(*(t.split(batch) for t in (images, labels, torch.arange(num))), strict=True)
    ]


# --- losses


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [(), (1.0, 2.0, 0.5, 3.0)])
def test_the_loss_is_a_loop_over_pixels(smoothing, weights):
    logits, labels = random((2, 4, 5, 6)), masks(2)
    w = weights or (1.0,) * 4
    expected = []
    for image, truth in zip(logits, labels, strict=True):
        total = count = 0.0
        for row in range(5):
            for column in range(6):
                if (y := int(truth[row, column])) == IGNORED:
                    continue
                z = image[:, row, column].tolist()
                norm = math.log(sum(map(math.exp, z)))
                smooth = sum(w[c] * (norm - z[c]) for c in range(4)) / 4
                total += (1 - smoothing) * w[y] * (norm - z[y]) + smoothing * smooth
                count += w[y]
        expected.append(total / count)
    loss = loss_of(segmentation, weights)
    assert loss(logits, labels, smoothing).tolist() == pytest.approx(expected, rel=1e-5)


def test_an_image_without_a_class_costs_nothing():
    logits, labels = random((2, 4, 5, 6)).requires_grad_(), masks(2)
    labels[1] = IGNORED
    loss = loss_per_image(logits, labels)
    loss.sum().backward()
    assert loss[1] == 0
    assert not logits.grad[1].any()
    assert logits.grad.isfinite().all()


def test_logits_are_compared_pixel_by_pixel():
    student, teacher = random((2, 4, 3, 2)), random((2, 4, 3, 2), 1)
    rows = [[m[b, :, i, j] for b in range(2) for i in range(3) for j in range(2)] for m in (student, teacher)]
    ours, theirs = (torch.stack(each) for each in rows)
    example = pair(Output(student, [], student), Output(teacher, [], teacher), task="segmentation")
    kd = logit_loss(LossOptions(logit_loss="kd", temperature=2.0), example)
    assert kd(student, teacher).item() == pytest.approx(kd_loss(ours, theirs, 2.0).item())
    dist = logit_loss(LossOptions(logit_loss="dist"), example)
    assert dist(student, teacher).item() == pytest.approx(dist_loss(ours, theirs).item())


# --- the measure


def confusion(given: list[Batch]) -> np.ndarray:
    table = np.zeros((4, 4), int)
    for batch in given:
        for said, true in zip(batch.images.argmax(1).flatten(), batch.labels.flatten(), strict=True):
            if true != IGNORED:
                table[true, said] += 1
    return table


def test_the_measure_is_scikit_learns():
    given = batches()
    meter = segmentation.evaluate(nn.Identity(), FixedEval(given))
    said = torch.cat([b.images.argmax(1).flatten() for b in given])
    true = torch.cat([b.labels.flatten() for b in given])
    known = true != IGNORED
    expected = jaccard_score(true[known], said[known], average=None)
    assert meter.iou.tolist() == pytest.approx((100 * expected).tolist())
    assert meter.quality == pytest.approx(100 * expected.mean())
    assert meter.confusion.tolist() == confusion(given).tolist()
    assert meter.pixel_accuracy == pytest.approx(100 * (said == true)[known].float().mean().item())
    log_p = torch.cat([b.images.log_softmax(1).movedim(1, -1).flatten(0, 2) for b in given])[known]
    assert meter.log_likelihood == pytest.approx(
        log_p.gather(1, true[known][:, None]).mean().item(), rel=1e-5
    )
    assert (meter.num_images, meter.num_pixels) == (7, int(known.sum()))


@pytest.mark.skipif(find_spec("torchmetrics") is None, reason="of the development environment alone")
def test_the_measure_is_torchmetrics():
    """Which adds up over batches, as ours does."""
    from torchmetrics.classification import (
        MulticlassAccuracy,
        MulticlassCalibrationError,
        MulticlassJaccardIndex,
    )

    given, known = batches(), {"num_classes": 4, "ignore_index": IGNORED}
    iou, mean = (MulticlassJaccardIndex(**known, average=average) for average in ("none", "macro"))
    accuracy = MulticlassAccuracy(**known, average="micro")
    gap = MulticlassCalibrationError(**known, n_bins=15, norm="l1")
    for batch in given:
        for oracle in (iou, mean, accuracy, gap):
            oracle.update(batch.images, batch.labels)
    meter = segmentation.evaluate(nn.Identity(), FixedEval(given))
    assert meter.iou.tolist() == pytest.approx((100 * iou.compute()).tolist(), rel=1e-5)
    assert meter.quality == pytest.approx(100 * mean.compute().item(), rel=1e-5)
    assert meter.pixel_accuracy == pytest.approx(100 * accuracy.compute().item(), rel=1e-5)
    assert meter.calibration_error == pytest.approx(100 * gap.compute().item(), rel=1e-4)


@pytest.mark.parametrize("size", [(5, 6), (13, 9), (3, 4), (40, 6)])
def test_logits_are_scaled_in_strips_as_whole(size, monkeypatch):
    monkeypatch.setattr(outputs, "_STRIP", 100)  # of 4 x width numbers a row
    logits = random((4, 5, 6))
    expected = torch.nn.functional.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
    strips = list(outputs.in_strips(logits, size))
    assert len(strips) > 1 or size[0] < 5
    assert torch.equal(torch.cat([torch.arange(size[0])[rows] for rows, _ in strips]), torch.arange(size[0]))
    torch.testing.assert_close(torch.cat([part for _, part in strips], dim=1), expected)


def test_pixels_are_those_of_the_masks_whatever_the_model_sees(tmp_path):
    """Images of two sizes; lines of one pixel, which masks at the model's size would lose."""
    for i, (height, width) in enumerate([(40, 60), (40, 60), (64, 48)]):
        mask = np.zeros((height, width), np.uint8)
        mask[1::8] = 1
        for kind, pixels in (("images", np.stack([mask * 200] * 3, axis=2)), ("masks", mask)):
            for split in ("train", "val", "test"):
                file = tmp_path / kind / split / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
    options = DataOptions(data=str(tmp_path), workers=0, batch_size=2)
    data = resolve_data(options)
    spec = InputSpec((16, 24), 3, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "squash")
    batches, model = EvalBatches(data.test, spec, options, torch.device("cpu")), nn.Conv2d(3, 2, 3, padding=1)
    meter = segmentation.evaluate(model, batches)
    table = np.zeros((2, 2), int)
    for batch in batches:
        for logits, i in zip(model(batch.images), batch.indices.tolist(), strict=True):
            true = np.array(Image.open(tmp_path / f"masks/test/{i}.png"))
            whole = torch.nn.functional.interpolate(logits[None], true.shape, mode="bilinear")[0]
            np.add.at(table, (true, whole.argmax(0).numpy()), 1)
    assert meter.confusion.tolist() == table.tolist()
    assert meter.num_pixels == 2 * 40 * 60 + 64 * 48


def test_sums_of_batches_are_those_of_all():
    whole = segmentation.evaluate(nn.Identity(), FixedEval(batches(batch=7)))
    parts = segmentation.evaluate(nn.Identity(), FixedEval(batches(batch=2)))
    assert torch.equal(whole.counts, parts.counts)
    assert torch.equal(whole.confusion, parts.confusion)
    assert whole.calibration_error == pytest.approx(parts.calibration_error)
    assert whole.quality_interval == parts.quality_interval


def test_a_draw_counts_each_image_as_often_as_it_says():
    given = batches(batch=1)
    meter = segmentation.evaluate(nn.Identity(), FixedEval(given))
    for draw in range(3):
        table = sum(int(times_drawn(i)[draw]) * confusion([b]) for i, b in enumerate(given))
        both, union = np.diag(table), table.sum(0) + table.sum(1) - np.diag(table)
        assert meter.drawn[draw].item() == pytest.approx(100 * (both / union).mean())
    counts = torch.stack([times_drawn(i) for i in range(300)])
    assert counts.mean().item() == pytest.approx(1, abs=0.02)
    assert counts.var().item() == pytest.approx(1, abs=0.03)


def test_a_class_that_is_nowhere_counts_not_at_all():
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 0] = 1
    logits[0, 1, 0, 0] = 2  # one pixel is said to be of class 1, which is not there
    meter = Meter.of(logits, list(labels), torch.tensor([0]))
    assert meter.quality == pytest.approx(100 * (3 / 4 + 0) / 2)
    assert meter.iou.isnan().tolist() == [False, False, True]


def test_what_is_kept_gives_the_same_figures():
    answers = segmentation.predict(nn.Identity(), FixedEval(batches()))
    again = Answers(answers.probabilities, answers.labels)
    assert answers.probabilities.shape == (1 + DRAWS, 3, 4)
    assert again.meter.quality == answers.meter.quality
    assert again.meter.quality_interval == answers.meter.quality_interval
    assert again.meter.log_likelihood is None


def test_models_are_compared_by_the_same_draws():
    good, bad = (
        segmentation.predict(nn.Identity(), FixedEval(batches(60, 20, skill))) for skill in (3.0, 0.5)
    )
    found = segmentation.compare(good, bad)
    assert found.difference == pytest.approx(bad.meter.quality - good.meter.quality)
    low, high = found.difference_interval
    assert low < found.difference < high < 0
    assert found.p_value == pytest.approx(2 / (DRAWS + 1))
    same = segmentation.compare(good, good)
    assert (same.difference, same.p_value) == (0, 1)


def test_it_is_a_task_and_is_selected_by_its_measure():
    assert task_of("segmentation") is segmentation
    assert isinstance(segmentation, Task)
    assert segmentation.resolve_metric("auto", 10) == "mIoU"
    assert segmentation.resolve_metric("likelihood", 10) == "likelihood"
    with pytest.raises(ConfigError, match="--metric top1: these images are measured by mIoU, or likelihood"):
        segmentation.resolve_metric("top1", 10)


# --- what models return


class Returns(nn.Module):
    def __init__(self, form) -> None:
        super().__init__()
        self.conv, self.form = nn.Conv2d(3, 4, 1, stride=2), form

    def forward(self, images):
        return self.form(self.conv(images))


class Held:
    def __init__(self, logits) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: {"out": x, "aux": x + 1},
        lambda x: {"logits": x, "loss": None},
        lambda x: (x, 1),
        Held,
    ],
)
@pytest.mark.brings(
    "model", "logits of pixels: alone, in a tuple, as out or logits", "Taken, scaled to the image"
)
def test_logits_of_pixels_however_they_are_returned(form):
    model = Returns(form)
    images = random((2, 3, 8, 6))
    assert check_output(model(images), "m", dense=True) == 4
    dense = as_logits(model, "maps")
    assert isinstance(dense, AsLogits)
    assert is_dense(dense)
    assert not is_dense(model)
    expected = torch.nn.functional.interpolate(
        model.conv(images), (8, 6), mode="bilinear", align_corners=False
    )
    assert torch.equal(dense(images), expected)


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (
            torch.zeros(1, 5),
            r"m must return logits \(batch, classes, height, width\), .* not a tensor \(1, 5\)",
        ),
        ({"a": torch.zeros(1, 4, 2, 2), "b": 1}, "not a dict with the keys a, b"),
        (torch.zeros(1, 1, 2, 2), "m returns one number for each pixel: let it return two"),
    ],
)
def test_other_outputs_are_refused(output, says):
    with pytest.raises(ConfigError, match=says):
        check_output(output, "m", dense=True)


# --- what is told of it


def test_iou_of_each_class_and_pixel_accuracy_are_told():
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    labels[0, 0, 0] = IGNORED
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 0] = 1
    logits[0, 1, 1, 1] = 2
    meter = Meter.of(logits, list(labels), torch.tensor([0]))
    assert segmentation.of_pixels(meter, ["sky", "road", "car"]) == {
        "pixel_accuracy": pytest.approx(100 * 2 / 3),
        "iou_by_class": {"sky": pytest.approx(100 * 2 / 3), "road": 0.0},  # a car is nowhere
    }
    assert segmentation.of_pixels(classification.Meter(), ["sky"]) == {}


def test_the_report_shows_both_models_iou_and_what_the_colours_mean(tmp_path):
    answers = [segmentation.predict(nn.Identity(), FixedEval(batches(skill=skill))) for skill in (3.0, 0.5)]
    names = ["sky", "road", "car", "tree"]
    of_models = [of_model(answer.meter, names) for answer in answers]
    result = make_result(names, measure="mIoU", teacher=of_models[0], student=of_models[1])
    teacher, student = (answer.probabilities.numpy() for answer in answers)
    predictions = TestPredictions(answers[0].labels.numpy(), teacher, student, [f"{i}.png" for i in range(7)])
    picture = Picture("a.png", *["data:image/jpeg;base64,"] * 5)
    colours = [(1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12)]
    write_report(
        result, predictions, lambda _: Image.new("RGB", (4, 4)), tmp_path / "r.html", [picture], colours
    )
    page = (tmp_path / "r.html").read_text()
    for name, iou in zip(names, answers[0].meter.iou.tolist(), strict=True):
        assert f'title="{name}, ' in page
        assert f'<span class="both"><i style="width:{iou:.2f}%;background:var(--teacher)">' in page
    assert '<i style="background:rgb(4, 5, 6)"></i>road</span>' in page
    one, other = (answer.meter.pixel_accuracy for answer in answers)
    assert f"Pixel accuracy: {one:.1f} &rarr; {other:.1f}" in page


def of_model(meter: Meter, names: list[str]) -> dict:
    return {**make_model(meter.quality, 0.5, 0.5), **segmentation.of_pixels(meter, names)}
