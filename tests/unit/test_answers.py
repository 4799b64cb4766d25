"""Answers that are kept: what of them comes back, which views do, and what it costs."""

import numpy as np
import pytest
import torch
from test_batches import by_image, image_set
from test_cost import costs

from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.data import feed
from stepwell.data.batches import TrainBatches
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError, ModelError
from stepwell.measure.cost import Epochs, charged, epochs_for
from stepwell.paths import path_of
from stepwell.training import answers
from stepwell.training.answers import Answers, bytes_of, packed, unpacked

CPU = torch.device("cpu")
KEEPING = {"cache_teacher": 4, "feature_weight": 0.0}


# --- what comes back of an answer


def test_all_logits_come_back_as_fp16_has_them():
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)) * 8
    kept = packed(logits, 0)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in kept.items()} == {
        "logits": (torch.float16, (5, 12))
    }
    assert np.array_equal(unpacked(kept, 12), logits.numpy().astype(np.float16).astype(np.float32))
    assert packed(logits, 12).keys() == {"logits"}  # as many as there are


def test_of_the_top_the_rest_is_spread_evenly():
    """Against the formula of TinyViT: what the top leaves of the probability, in equal parts."""
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(1)) * 3
    kept = packed(logits, 3)
    assert sum(t.element_size() * t.numel() for t in kept.values()) == 6 * bytes_of(10, 3)
    found = torch.softmax(unpacked(kept, 10), 1).numpy()
    z = logits.numpy().astype(np.float64)
    for row, ours in zip(z, found, strict=True):
        p = np.exp(row) / np.exp(row).sum()
        order = np.argsort(-row)
        expected = np.full(10, p[order[3:]].sum() / 7)
        expected[order[:3]] = p[order[:3]]
        np.testing.assert_allclose(ours, expected, rtol=5e-3)


def test_logits_beyond_fp16_are_refused():
    with pytest.raises(ModelError, match=r"the teacher's go beyond 65,504: leave it out"):
        packed(torch.tensor([[1.0, 7e4]]), 0)


# --- which views come back


def batches(tmp_path, number=20, **options) -> TrainBatches:
    config = make_config(CompressConfig, {"batch_size": 6, "workers": 0, **options})
    images = image_set(tmp_path, number)
    return TrainBatches(images, InputSpec((8, 8), 3, (0.5,) * 3, (0.25,) * 3), config, 0, CPU, recipe=config)


@pytest.mark.parametrize("limit", [0, 2**20])
def test_a_process_without_images_has_no_view_of_any(tmp_path, monkeypatch, limit):
    """Of a last part with fewer images than processes; whether images are decoded or held in memory."""
    monkeypatch.setattr(feed, "MEMORY_LIMIT", limit)
    assert list(batches(tmp_path).of_view(0, range(5, 5))) == []


@pytest.mark.parametrize("augment", ["crop", "affine", "resized-crop"])
@pytest.mark.parametrize("workers", [0, 2])
def test_views_come_back_in_every_training(tmp_path, augment, workers):
    images = batches(tmp_path, augment=augment, workers=workers, random_erasing=0.5).of_views(2)
    views = [by_image(images.of_view(view, range(20))) for view in range(2)]
    assert all(len(view) == 20 for view in views)
    assert any(not torch.equal(views[0][i], views[1][i]) for i in range(20))
    orders = []
    for epoch, training in ((0, "joint"), (1, "joint"), (2, "joint"), (3, "distill")):
        found = list(images.epoch(epoch, training=training))
        assert {batch.view for batch in found} == {epoch % 2}
        for i, image in by_image(found).items():
            assert torch.equal(image, views[epoch % 2][i])
        orders.append([i for batch in found for i in batch.indices.tolist()])
    assert orders[0] != orders[2]  # the same views in another order
    resumed = list(images.epoch(2, first_step=1, training="joint"))
    assert [batch.indices.tolist() for batch in resumed] == [orders[2][6:12], orders[2][12:18]]


def test_without_views_nothing_comes_back(tmp_path):
    images = batches(tmp_path, augment="crop")
    epochs = [by_image(images.epoch(0, training=name)) for name in ("joint", "distill")]
    assert any(not torch.equal(epochs[0][i], epochs[1][i]) for i in epochs[0].keys() & epochs[1].keys())


# --- files


def test_answers_are_read_from_parts_that_are_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "PART", 8)
    images = batches(tmp_path / "images", augment="crop").of_views(2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5)).requires_grad_(False)
    autocast = torch.autocast("cpu", enabled=False)
    kept = Answers(tmp_path / "answers" / "abc", 20, 5)
    kept.compute(model, images, autocast, "test")
    files = sorted(path.name for path in kept.folder.iterdir())
    assert files == [f"view-00{v}-0000{p}.safetensors" for v in range(2) for p in range(3)]
    for epoch in range(4):
        for batch in images.epoch(epoch, training="any"):
            torch.testing.assert_close(kept.of(batch).logits, model(batch.images), rtol=1e-3, atol=1e-3)
    # Only what is missing is computed again.
    (kept.folder / files[2]).unlink()
    times = {name: (kept.folder / name).stat().st_mtime_ns for name in files if name != files[2]}
    seen = []
    model.register_forward_hook(lambda _m, given, _o: seen.append(len(given[0])))
    kept.compute(model, images, autocast, "test")
    assert sum(seen) == 4  # images 16 to 19 of view 0
    assert {name: (kept.folder / name).stat().st_mtime_ns for name in times} == times
    (kept.folder / files[0]).write_bytes(b"damaged")
    with pytest.raises(
        answers.RunDirError, match=r"view-000-00000.safetensors is gone or damaged: remove it"
    ):
        Answers(kept.folder, 20, 5).of(next(iter(images.of_view(0, range(20)))))


# --- what it costs


def test_the_teacher_costs_nothing_in_trainings_and_an_assistant_each_view_once():
    found = costs(num_train=1000, **KEEPING)
    assert found.answering == 4000
    assert found.single_step(10) == pytest.approx(10 * 1000 * 0.3)
    assert found.step_down(10, 0.1, [0.5]) == pytest.approx(1000 * (4 * 0.5 + 10 * 0.3))
    assert found.step_down(3, 0.1, [0.5]) == pytest.approx(1000 * 3 * (0.5 + 0.3))  # no view comes back
    assert found.joint(10) == pytest.approx(10 * 1000 * 3 * (0.1 + 0.55))
    assert costs(num_train=1000).answering == 0


def test_no_control_pays_for_what_both_need():
    found = costs(num_train=1000, **KEEPING)
    bill = {"answers": found.answering, "score": 7.0, "distill": found.single_step(5)}
    assert found.equal_compute_epochs(bill) == pytest.approx(5)


@pytest.mark.parametrize("budget", [5, 8, 20, 60])
def test_a_budget_is_met_on_either_side_of_the_bend(budget):
    found = costs(num_train=1000, **KEEPING, budget_epochs=budget)
    passes = found.single_step(budget)
    epochs = epochs_for(passes, lambda n: found.step_down(n, 0.1, [0.5]))
    assert found.step_down(epochs, 0.1, [0.5]) == pytest.approx(passes)
    path = path_of("amd")
    joint = epochs_for(0.5 * passes, found.joint)
    rest = epochs_for(
        passes, lambda n: charged(path.bill(found, Epochs(joint=joint, distill=n), found.options))
    )
    assert charged(path.bill(found, Epochs(joint=joint, distill=rest), found.options)) == pytest.approx(
        passes
    )


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_top": 5}, "--cache-top says how much of an answer is kept: give --cache-teacher, too"),
        ({"cache_teacher": 4}, "--cache-teacher 4 keeps logits, and --feature-loss needs states"),
        ({**KEEPING, "logit_weight": 0.0}, "with --logit-weight 0 no teacher is asked"),
        ({**KEEPING, "logit_loss": "loss.py:own"}, "a loss of your own gets all that a teacher computes"),
        ({**KEEPING, "mixup": 0.8}, "--mixup makes images that never come back"),
        ({**KEEPING, "cutmix": 1.0}, "--cutmix makes images that never come back"),
        ({**KEEPING, "minutes": 3.0}, "which no clock foresees: give --budget-epochs"),
        ({**KEEPING, "path": "dgkd"}, "with --path dgkd there are several teachers at a time"),
        ({**KEEPING, "augment": "none"}, "with --augment none all views of an image are one"),
        ({**KEEPING, "epochs": 4.0}, "within 4 epochs no view comes back"),
        ({**KEEPING, "budget_epochs": 3.0}, "within 3 epochs no view comes back"),
        ({**KEEPING, "cache_teacher": 60}, "within 60 epochs no view comes back"),
    ],
)
def test_what_kept_answers_cannot_serve(options, message):
    with pytest.raises(ConfigError) as caught:
        make_config(CompressConfig, options)
    assert message in str(caught.value)


def test_what_they_can():
    assert make_config(CompressConfig, {**KEEPING, "epochs": 2.0, "joint_epochs": 9.0}).cache_teacher == 4
    one = {**KEEPING, "cache_teacher": 1, "augment": "none"}
    assert make_config(CompressConfig, one).cache_teacher == 1
    assert (
        make_config(CompressConfig, {**KEEPING, "augment": "none", "random_erasing": 0.2}).cache_teacher == 4
    )
