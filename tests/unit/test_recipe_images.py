"""The recipe's part on images: mixing against timm's own, erasing, RandAugment; and that nothing leaks."""

import random

import numpy as np
import pytest
import torch
from test_batches import COLOUR, CPU, by_image, image_set, options, photo
from timm.data.mixup import Mixup
from torch import nn

from stepwell.config.options import DataOptions
from stepwell.config.recipe_options import RecipeOptions
from stepwell.data.batches import Batch, TrainBatches
from stepwell.data.mixing import erase, mix
from stepwell.data.randomness import seeded
from stepwell.data.spec import InputSpec
from stepwell.data.transforms import TrainTransform
from stepwell.errors import ConfigError
from stepwell.tasks.classification import loss_per_image
from tiny import random_images

MOMENT = ("0:joint", 3, 7)
LARGE = InputSpec((96, 96), 3, COLOUR.mean, COLOUR.std)


def train_batches(images, spec=COLOUR, recipe=None, seed=0, **values) -> TrainBatches:
    return TrainBatches(
        images, spec, options(**values), seed, CPU, recipe=recipe or RecipeOptions(), num_classes=3
    )


# --- MixUp and CutMix


@pytest.mark.parametrize("values", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
@pytest.mark.parametrize("step", range(4))
def test_mixing_is_timms(values, step):
    labels = torch.tensor([0, 1, 2, 2, 1, 4])
    images, theirs = random_images(6), random_images(6)
    found = mix(images, labels, RecipeOptions(**values), 5, ("0:distill", 0, step))
    timms = Mixup(values.get("mixup", 0.0), values.get("cutmix", 0.0), label_smoothing=0.0, num_classes=5)
    with seeded("mix", "0:distill", 0, step):
        theirs, expected = timms(theirs, labels)
    assert torch.equal(images, theirs)
    assert not torch.equal(images, random_images(6))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(6))


def test_of_an_odd_batch_the_last_image_stays_as_it_is():
    images, labels = random_images(5), torch.tensor([0, 1, 2, 0, 1])
    found = mix(images, labels, RecipeOptions(mixup=1.0), 3, MOMENT)
    assert torch.equal(images[4], random_images(5)[4])
    assert found[4].tolist() == [0, 1, 0]
    even = random_images(5)[:4]
    torch.testing.assert_close(found[:4], mix(even, labels[:4], RecipeOptions(mixup=1.0), 3, MOMENT))
    assert torch.equal(images[:4], even)


def test_labels_that_are_numbers_for_every_class_are_mixed_too():
    """As those of several labels an image are."""
    given = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = mix(random_images(2), given, RecipeOptions(mixup=1.0), 3, MOMENT)
    share = found[0, 0]
    assert 0 < share < 1
    torch.testing.assert_close(found, share * given + (1 - share) * given.flip(0))
    assert given[0].tolist() == [1, 1, 0]


def test_images_without_labels_are_mixed_too():
    images = random_images(4)
    found = mix(images, torch.full((4,), -1), RecipeOptions(mixup=1.0), 3, MOMENT)
    assert torch.equal(found, torch.zeros(4, 3))
    assert not torch.equal(images, random_images(4))


def test_so_many_batches_are_mixed():
    recipe, mixed = RecipeOptions(cutmix=1.0, mix_prob=0.25), 0
    for step in range(400):
        images = random_images(2)
        mix(images, torch.tensor([0, 1]), recipe, 2, ("", 0, step))
        mixed += not torch.equal(images, random_images(2))
    assert 70 <= mixed <= 130


def test_the_cross_entropy_of_a_mixed_image_is_the_mean_of_both():
    logits, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 1])
    soft = mix(random_images(4), labels, RecipeOptions(mixup=1.0), 3, MOMENT)
    share = soft[0, 0]
    for smoothing in (0.0, 0.1):
        expected = share * loss_per_image(logits, labels, smoothing)
        expected += (1 - share) * loss_per_image(logits, labels.flip(0), smoothing)
        torch.testing.assert_close(loss_per_image(logits, soft, smoothing), expected)


def mixed(images, seed=0, training="joint", epoch=1, **values) -> list[Batch]:
    recipe = RecipeOptions(mixup=0.5, cutmix=1.0, random_erasing=0.5)
    return list(train_batches(images, recipe=recipe, seed=seed, **values).epoch(epoch, training=training))


def test_a_mixed_batch_depends_on_seed_training_epoch_and_step(tmp_path):
    images = image_set(tmp_path, 12)
    once, again = mixed(images), mixed(images)
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert once[0].labels.shape == (4, 3)
    assert once[0].labels.dtype == torch.float32
    for other in (mixed(images, seed=1), mixed(images, training="distill"), mixed(images, epoch=2)):
        assert not torch.equal(other[0].labels, once[0].labels)
    # From the middle of an epoch, as a run that is resumed.
    recipe = RecipeOptions(mixup=0.5, cutmix=1.0, random_erasing=0.5)
    rest = list(train_batches(images, recipe=recipe).epoch(1, first_step=2, training="joint"))
    assert torch.equal(rest[0].images, once[2].images)
    assert torch.equal(rest[0].labels, once[2].labels)


def test_mixing_draws_from_nobody_elses_numbers(tmp_path):
    images = image_set(tmp_path, 8)

    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    mixed(images)
    assert states() == before


def test_a_teacher_sees_the_mixed_images(tmp_path):
    """Both models are called with the batch as it is handed out: the labels are of what they see."""
    (batch,) = mixed(image_set(tmp_path, 4))
    plain = by_image(train_batches(image_set(tmp_path, 4)).epoch(1, training="joint"))
    changed = [
        not torch.equal(image, plain[int(i)]) for image, i in zip(batch.images, batch.indices, strict=True)
    ]
    assert any(changed)


# --- random erasing


def test_erasing_paints_rectangles_of_the_mean_colour():
    images = torch.ones(400, 3, 16, 16)
    erase(images, torch.arange(400), 0.25, "0:joint", 0)
    holes = [image[0] == 0 for image in images]
    assert 70 <= sum(bool(hole.any()) for hole in holes) <= 130
    for image, hole in zip(images, holes, strict=True):
        assert torch.equal(image == 0, hole.expand(3, 16, 16))
        if hole.any():
            rows, columns = hole.any(dim=1), hole.any(dim=0)
            assert torch.equal(hole, rows[:, None] & columns)
            assert 0.01 < hole.float().mean() < 0.4


@pytest.mark.parametrize("augment", ["none", "crop", "resized-crop"])
def test_what_is_erased_of_an_image_depends_on_nothing_else(tmp_path, augment):
    images, recipe = image_set(tmp_path, 8), RecipeOptions(random_erasing=0.9)

    def seen(batch_size: int, epoch: int = 1):
        return by_image(
            train_batches(images, recipe=recipe, augment=augment, batch_size=batch_size).epoch(epoch)
        )

    alone, together, later = seen(1), seen(8), seen(8, epoch=2)
    assert all(torch.equal(alone[i], together[i]) for i in range(8))
    assert any(not torch.equal(later[i] == 0, together[i] == 0) for i in range(8))


# --- RandAugment


@pytest.mark.parametrize(
    "config", ["rand-m9-mstd0.5-inc1", "rand-m9-mstd3-inc1", "rand-m1-n4", "rand-tweights"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_never_fails(config, channels):
    """timm's keeps no bit of an image now and then, which Pillow refuses."""
    spec = InputSpec((16, 16), channels, (0.5,) * channels, (0.5,) * channels)
    transform, image = TrainTransform(spec, config), photo(16, 16)
    for number in range(150):
        with seeded(config, number):
            assert transform(image).shape == (channels, 16, 16)


def test_every_image_keeps_a_bit():
    (randaugment,) = (
        t for t in TrainTransform(LARGE, "rand-m9-inc1")._transform.transforms if hasattr(t, "ops")
    )
    (posterize,) = (op for op in randaugment.ops if op.name == "PosterizeIncreasing")
    assert [posterize.level_fn(level, {}) for level in (0, 5, 9, 10)] == [(4,), (2,), (1,), (1,)]


def test_randaugment_takes_the_place_of_colour_jitter(tmp_path):
    images = image_set(tmp_path, 4, 100, 100)
    plain = by_image(train_batches(images, LARGE).epoch(0))
    recipe = RecipeOptions(rand_augment="rand-m9-mstd0.5-inc1")
    ours = by_image(train_batches(images, LARGE, recipe).epoch(0))
    again = by_image(train_batches(images, LARGE, recipe, workers=2, batch_size=2).epoch(0))
    assert all(not torch.equal(ours[i], plain[i]) for i in range(4))
    assert all(torch.equal(ours[i], again[i]) for i in range(4))


def test_randaugment_needs_images_that_are_decoded_anew(tmp_path):
    images, recipe = image_set(tmp_path, 4), RecipeOptions(rand_augment="rand-m9")
    with pytest.raises(ConfigError) as error:
        train_batches(images, recipe=recipe)
    assert str(error.value) == (
        "--rand-augment works on images as they are decoded, and --augment crop decodes them once: give "
        "--augment resized-crop, too"
    )
    train_batches(images, recipe=recipe, augment="resized-crop")


def test_with_the_defaults_nothing_of_it_is_called(tmp_path, monkeypatch):
    monkeypatch.setattr("stepwell.data.batches.mix", nn.Identity())  # fails with more than one argument
    monkeypatch.setattr("stepwell.data.batches.erase", nn.Identity())
    (batch,) = TrainBatches(
        image_set(tmp_path, 4), COLOUR, DataOptions(workers=0, batch_size=4), 0, CPU
    ).epoch(0)
    assert batch.labels.dtype == torch.int64
